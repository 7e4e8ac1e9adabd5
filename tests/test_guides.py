"""Every command and snippet of README and the guides runs, on the embedded model in place of the Hub's."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from sdkit.cli import main
from sdkit.cli.commands import _parser
from sdkit.networks.lpips import LPIPS

ROOT = Path(__file__).parents[1]
GUIDES = {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "notebooks/README.md")
}
NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if not path.stem.endswith("_zh")]
HERE = {
    r"[\w-]+/(?:sd-vae-ft-mse|stable-diffusion-v1-5)|v1-5-pruned-emaonly\.safetensors": "emoji",
    r"(max.steps[= ])\d+": r"\g<1>2",
    "org/name": "photos",
    "--num_processes 8": "--num_processes 2",
}
"""What a test has in place of what the guides speak of: no Hub, no week of GPU time."""
OTHERS = ("make", "pip", "jupyter", ".ci/run")
"""Commands that are not sdkit's, and that continuous integration itself begins with."""


def snippets(text: str, language: str) -> list[str]:
    """Code blocks with what is at hand here, long lines in one."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks = [code.replace("\\\n", "") for code in blocks]
    for pattern, own in HERE.items():
        blocks = [re.sub(pattern, own, code) for code in blocks]
    return blocks


def commands(text: str) -> list[list[str]]:
    """Each command of the bash blocks, as arguments."""
    lines = [line for code in snippets(text, "bash") for line in code.splitlines()]
    parts = (part for line in lines for part in re.sub(r"(^|\s)#.*", "", line).split(" && "))
    return [shlex.split(part) for part in parts if part.strip()]


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astronaut: Image.Image, chelsea: Image.Image) -> None:
    """A folder with the files that README speaks of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "drawing.png", "photos/a.png", "photos/b.jpg"):
        (astronaut if "photo" in name else chelsea).resize((96, 80)).save(name)
    save_lpips(Path("lpips_vgg16.pt"))


def save_lpips(path: Path) -> None:
    """Random weights, named as in the package `lpips`."""
    state = LPIPS().state_dict()
    names = {key: key.replace("vgg.", "net.slice1.") for key in state}
    names |= {key: f"lin{key[-1]}.model.1.weight" for key in state if key.startswith("heads.")}
    torch.save({names[key]: value for key, value in state.items()}, path)


@pytest.mark.usefixtures("photos")
def test_python() -> None:
    """In one go, since later snippets use what earlier ones made."""
    code = "\n".join(snippets(GUIDES["README.md"], "python"))
    assert code.count("from_pretrained") >= 2
    variables: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert Path("astronaut.png").is_file()
    assert Path("apple.png").is_file()
    assert Path("runs/whole/result/unet").is_dir()
    assert Path("runs/vae/result/config.json").is_file()


def test_python_is_in_the_readme_alone() -> None:
    """Or else the test above should read the other guides, too."""
    assert not any(snippets(text, "python") for name, text in GUIDES.items() if name != "README.md")


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("photos")
def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, what `accelerate launch` starts on two processes of the CPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = {"sdkit": 0, "accelerate": 0}
    for command, *arguments in commands(GUIDES["README.md"]):
        if command == "sdkit":
            assert main(arguments) == 0, arguments
        elif command == "accelerate" and "--use_fsdp" not in arguments:
            program = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *arguments]
            done = subprocess.run(
                [*program[:4], "--main_process_port=0", *program[4:]], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
        else:
            assert command in (*OTHERS, "accelerate"), command
            continue
        run[command] += 1
    assert run["sdkit"] >= 13
    assert run["accelerate"] == 2
    assert "SSIM" in capsys.readouterr().out
    assert Path("cache-of-all/manifest.json").is_file()


SMALL = {
    "benchmarks/inference.py": ["--repeats", "1", "--steps", "2", "--parts", "emoji", "cold"],
    "benchmarks/training.py": ["--turns", "1", "--width", "0.1", "--size", "64", "--images", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("program", re.findall(r"`python (benchmarks/\S+\.py)`", GUIDES["README.md"]))
def test_benchmarks(program: str, tmp_path: Path) -> None:
    """What README's numbers come from, in small."""
    command = [sys.executable, program, *SMALL[program], "--json", str(tmp_path / "numbers.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "numbers.json").read_text())


def training_commands(text: str) -> list[list[str]]:
    return [
        arguments for arguments in commands(text) if arguments[0] == "accelerate" or arguments[:2] == ["sdkit", "train"]
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_commands_of_a_notebook_are_understood(path: Path) -> None:
    """And those that need GPUs: both Accelerate and sdkit know each option."""
    prose = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
    understood(prose)
    assert training_commands(prose) or "finetune" not in path.stem


def test_commands_that_need_gpus_are_understood() -> None:
    understood(GUIDES["README.md"])


def understood(text: str) -> None:
    for arguments in training_commands(text):
        if arguments[0] == "accelerate":
            launched = launch_command_parser().parse_args(arguments[2:])
            assert launched.module
            arguments = [launched.training_script, *launched.training_script_args]
        assert arguments[0] == "sdkit"
        _parser().parse_args(arguments[1:])


@pytest.mark.parametrize("name", GUIDES)
def test_what_it_points_to_exists(name: str) -> None:
    """Links, images, commands, and the targets of `make`."""
    text = GUIDES[name]
    for target in re.findall(r"(?<!\")\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command, *arguments in commands(text):
        assert command in ("sdkit", "accelerate", *OTHERS), command
        if command == "make":
            target = next(word for word in arguments if "=" not in word)
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_table_of_rooms_names_what_training_is_made_of() -> None:
    for path in (ROOT / "sdkit" / "training").glob("*.py"):
        assert f"`{path.name}`" in GUIDES["CONTRIBUTING.md"] or f"`training/{path.name}`" in GUIDES["CONTRIBUTING.md"]


@pytest.mark.parametrize("name", GUIDES)
def test_no_placeholder_is_left(name: str) -> None:
    assert not re.search(r"SPEED|TODO|TBD|XXX|@@", GUIDES[name])
