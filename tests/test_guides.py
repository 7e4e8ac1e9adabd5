"""Every command and snippet of README and the guides runs, on the embedded model in place of the Hub's."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from sdkit.cli import main
from sdkit.cli.commands import _parser
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.generation import Generation
from sdkit.pipelines.settings import DrawingSettings
from tests.helpers import forks, toy

ROOT = Path(__file__).parents[1]
NAMES = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/README.md", "notebooks/inference.md",
    "notebooks/training.md",
)  # fmt: skip
GUIDES = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if not path.stem.endswith("_zh")]
HERE = {
    r"[\w-]+/(?:sd-vae-ft-mse|stable-diffusion-v1-5)|v1-5-pruned-emaonly\.safetensors": "emoji",
    r" --variant fp16": "",
    r"(max.steps[= ])\d+": r"\g<1>2",
    r"(class-count )\d+": r"\g<1>1",
    r"(num_inference_steps=|timesteps\()\d+": r"\g<1>2",
    r"sdkit train vae(?!.*--size)": "sdkit train vae --size 64",
    "size=256": "size=64",
    "org/name": "photos",
    "--num_processes 8": "--num_processes 2",
}
"""Replacements of what a test does not have: the Hub, and a week of GPU time. No test looks at the pictures."""

OTHERS = ("make", "pip", "jupyter", ".ci/run")
"""Commands other than sdkit's, which continuous integration starts with."""
MADE = {
    "README.md": ("encode-decode.jpg", "text-to-image.jpg", "guitar.png", "fine-tune.jpg", "runs/zork/result"),
    "notebooks/inference.md": ("astronaut.png", "apple.png"),
    "notebooks/training.md": ("runs/whole/result/unet", "runs/vae/result/config.json"),
}
"""Files that the Python snippets of each guide write."""


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
def photos(astronaut: Image.Image, chelsea: Image.Image) -> Callable[[], None]:
    """A function that writes the files that a reader of the guides has, into the current folder."""

    def write() -> None:
        Path("photos").mkdir()
        for name in ("photo.jpg", "drawing.png", "photos/a.png", "photos/b.jpg"):
            (astronaut if "photo" in name else chelsea).resize((96, 80)).save(name)
        save_lpips(Path("lpips_vgg16.pt"))

    return write


def save_lpips(path: Path) -> None:
    """Random weights, named as in the package `lpips`."""
    state = LPIPS("vgg").state_dict()
    names = {key: key.replace("vgg.", "net.slice1.") for key in state}
    names |= {key: f"lin{key[-1]}.model.1.weight" for key in state if key.startswith("heads.")}
    torch.save({names[key]: value for key, value in state.items()}, path)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sample in two steps where a guide names no number."""
    for settings in (DrawingSettings, Generation):
        monkeypatch.setitem(settings.__init__.__kwdefaults__, "num_inference_steps", 2)  # type: ignore[misc,arg-type]
        assert settings().num_inference_steps == 2


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", MADE)
def test_python(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: Callable[[], None]) -> None:
    """Run a guide's snippets in one go, since later ones use the results of earlier ones."""
    monkeypatch.chdir(tmp_path)
    if name != "README.md":  # which needs no file
        photos()
    code = "\n".join(snippets(GUIDES[name], "python"))
    assert code.count("from_pretrained") >= 1
    variables: dict[str, Any] = {}
    exec(compile(code, name, "exec"), variables)
    for file in MADE[name]:
        assert Path(file).exists(), file
    if name == "README.md":  # "the third image above"
        apart = np.asarray(Image.open("guitar.png")).astype(int)
        assert np.abs(apart - np.asarray(variables["images"][2])).max() <= 1


def test_python_of_every_guide_runs() -> None:
    assert {name for name, text in GUIDES.items() if snippets(text, "python")} == set(MADE)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", MADE)
def test_command_line(
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    photos: Callable[[], None],
) -> None:
    """Run a guide's commands one after another, those of `accelerate launch` on two processes of the CPU."""
    monkeypatch.chdir(tmp_path)
    photos()
    for command, *arguments in commands(GUIDES[name]):
        if command == "sdkit":
            assert main(arguments) == 0, arguments
        elif command == "accelerate" and "--use_fsdp" not in arguments:
            position = arguments.index("-m")
            assert arguments[position + 1] == "sdkit"
            ended = forks.launch(toy.command, arguments[position + 2 :], options=arguments[1:position])
            assert ended.codes == [0, 0], ended.err
        else:
            assert command in (*OTHERS, "accelerate"), command
    assert name == "notebooks/training.md" or "SSIM" in capsys.readouterr().out
    assert name != "notebooks/training.md" or Path("cache-of-all/manifest.json").is_file()


def test_guides_have_all_commands() -> None:
    """Commands that the test above runs, over all guides."""
    run = [words for name in GUIDES for words in commands(GUIDES[name]) if "--use_fsdp" not in words]
    assert sum(words[0] == "sdkit" for words in run) >= 13
    assert sum(words[0] == "accelerate" for words in run) == 2
    for name in set(GUIDES) - set(MADE):
        assert {words[0] for words in commands(GUIDES[name])} <= set(OTHERS), name


BENCHMARKS = sorted({*re.findall(r"`python\s+(benchmarks/\S+\.py)`", " ".join(GUIDES.values()))})
SMALL = {
    "benchmarks/inference.py": ["--repeats", "1", "--steps", "2", "--parts", "emoji", "cold"],
    "benchmarks/pipelines.py": ["--turns", "1", "--steps", "2", "--batch-sizes", "1"],
    "benchmarks/training.py": ["--turns", "1", "--width", "0.1", "--size", "64", "--images", "2"],
}


def test_numbers_come_from_both_benchmarks() -> None:
    assert set(BENCHMARKS) == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("program", BENCHMARKS)
def test_benchmarks(program: str, tmp_path: Path) -> None:
    """Measure in small what the guides' numbers come from."""
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


@pytest.mark.parametrize("name", MADE)
def test_commands_that_need_gpus_are_understood(name: str) -> None:
    understood(GUIDES[name])


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
    """Links, their anchors, images, commands, and the targets of `make`."""
    text = GUIDES[name]
    for target, anchor in re.findall(r"(?<!\")\]\((?!http)([^)#]*)(?:#([^)]+))?\)", text):
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), (target, anchor)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command, *arguments in commands(text):
        assert command in ("sdkit", "accelerate", *OTHERS), command
        if command == "make":
            target = next(word for word in arguments if "=" not in word)
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tables_of_floors_and_tests_name_what_exists() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", GUIDES["CONTRIBUTING.md"], flags=re.MULTILINE)
    for floor, modules in rows:
        for room in re.findall(r"`(tests/\w+)`", floor):
            assert (ROOT / room).is_dir(), room
        folder = re.search(r"\]\((sdkit/\S+)\)", floor)
        if folder or floor.endswith("ground"):
            for name in re.findall(r"`(\w+(?:\.py|/))`", modules):
                assert (ROOT / (folder[1] if folder else "sdkit") / name).exists(), name


def test_the_table_of_rooms_names_what_training_is_made_of() -> None:
    for path in (ROOT / "sdkit" / "training").glob("*.py"):
        assert f"`{path.name}`" in GUIDES["CONTRIBUTING.md"] or f"`training/{path.name}`" in GUIDES["CONTRIBUTING.md"]


@pytest.mark.parametrize("name", GUIDES)
def test_no_placeholder_is_left(name: str) -> None:
    assert not re.search(r"SPEED|TODO|TBD|XXX|@@", GUIDES[name])
