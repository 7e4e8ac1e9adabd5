"""Every snippet of README runs, on the embedded model in place of the Hub's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdkit.cli import main
from sdkit.lpips import LPIPS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
OTHER_MODELS = r"[\w-]+/(?:sd-vae-ft-mse|stable-diffusion-v1-5)|v1-5-pruned-emaonly\.safetensors"


def snippets(language: str) -> list[str]:
    """With the embedded model, two steps of training in place of a thousand, and long lines in one."""
    blocks = (code.replace("\\\n", "") for kind, code in BLOCKS if kind == language)
    return [re.sub(r"(max.steps[= ])1000", r"\g<1>2", re.sub(OTHER_MODELS, "emoji", code)) for code in blocks]


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
    code = "\n".join(snippets("python"))
    assert code.count("from_pretrained") >= 2
    variables: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), variables)
    assert Path("astronaut.png").is_file()
    assert Path("apple.png").is_file()
    assert Path("runs/whole/result/unet").is_dir()
    assert Path("runs/vae/result/config.json").is_file()


@pytest.mark.usefixtures("photos")
def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for code in snippets("bash") for line in code.splitlines() if line.startswith("sdkit ")]
    assert len(lines) >= 5
    for line in lines:
        for command in line.split(" && "):
            arguments = shlex.split(command, comments=True)
            assert main(arguments[1:]) == 0, command
    assert "SSIM" in capsys.readouterr().out


def test_what_it_points_to_exists() -> None:
    """Links, and the targets of `make`."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"SPEED|TODO|TBD|XXX", README)
