"""The file that shows an image while it is forming."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

import sdkit
from sdkit.cli import main
from sdkit.cli import preview as module
from sdkit.cli.preview import PreviewFile
from sdkit.samplers import Step

QUICK = ("--steps", "4", "--dtype", "fp32", "--device", "cpu")


@pytest.fixture(autouse=True)
def _one_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd: sdkit.StableDiffusion) -> None:
    """Run in an empty folder, and load no model again and again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sdkit.StableDiffusion, "from_pretrained", lambda *_, **__: sd)


def steps(n: int) -> list[Step]:
    z = torch.zeros(1, 4, 2, 2)
    return [Step(i, 999 - i, z, z) for i in range(n)]


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_is_written_beside_the_image(sd: sdkit.StableDiffusion, capsys: pytest.CaptureFixture[str]) -> None:
    """The last preview is the linear preview of the image: it is near the image, and only the PNG is listed."""
    assert main(["generate", "a red apple on a blue background", *QUICK, "--preview-every", "1", "-o", "a.png"]) == 0
    assert capsys.readouterr().out.splitlines() == ["a.png"]
    with Image.open("a-preview.jpg") as preview, Image.open("a.png") as image:
        assert preview.format == "JPEG"
        assert float(sdkit.metrics.psnr(preview.convert("RGB"), image)) > 15
    assert sorted(path.name for path in Path().iterdir()) == ["a-preview.jpg", "a.png"]


def test_in_a_folder_shows_the_batch() -> None:
    assert main(["generate", "a cat", "a dog", *QUICK, "--preview"]) == 0
    assert size_of("outputs/preview.jpg") == (256, 128)
    assert len([*Path("outputs").iterdir()]) == 3


def test_by_a_tiny_vae(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (4,) * 4, "decoder_block_out_channels": (4,) * 4}
    AutoencoderTiny(latent_channels=4, **widths).save_pretrained("tiny")
    assert main(["generate", "a cat", *QUICK, "--preview-vae", "tiny", "-o", "b.png"]) == 0
    assert size_of("b-preview.jpg") == (128, 128)
    AutoencoderTiny(latent_channels=8, **widths).save_pretrained("other")
    assert main(["generate", "a cat", *QUICK, "--preview-vae", "other", "-o", "c.png"]) == 2
    assert "cannot preview them" in capsys.readouterr().err


@pytest.mark.parametrize("every", ["0", "-1"])
def test_every_must_be_positive(every: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a cat", "--preview-every", every]) == 2
    assert "preview_every must be a whole number of at least 1" in capsys.readouterr().err


def test_every_kth_step() -> None:
    drawn = list[int]()

    def draw(step: Step) -> Image.Image:
        drawn.append(step.i)
        return Image.new("RGB", (8, 8))

    preview = PreviewFile(Path("new/p.jpg"), draw, every=3)
    for step in steps(8):
        preview(step)
    assert drawn == [2, 5]
    assert size_of("new/p.jpg") == (8, 8)


def test_takes_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 100 ms, and a preview 5 ms: its share allows about every third one. A clock stands in for time."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    drawn = list[int]()

    def draw(step: Step) -> Image.Image:
        drawn.append(step.i)
        now[0] += 0.005
        return Image.new("RGB", (8, 8))

    preview = PreviewFile(Path("p.jpg"), draw)
    for step in steps(100):
        now[0] += 0.1
        preview(step)
    assert drawn[0] == 0
    assert 0.01 < 0.005 * len(drawn) / now[0] <= module.SHARE
    assert max(np.diff(drawn)) <= 6


def test_a_file_that_cannot_be_written_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    preview = PreviewFile(Path("taken/p.jpg"), lambda _: Image.new("RGB", (8, 8)), every=1)
    for step in steps(3):
        preview(step)
    err = capsys.readouterr().err
    assert err.count("cannot write the preview taken") == 1
    assert "the images are still drawn" in err


def test_nothing_is_left_when_it_is_stopped() -> None:
    class Stopping(Image.Image):
        def save(self, fp: object, *_: object, **__: object) -> None:
            Path(str(fp)).write_bytes(b"half")
            raise KeyboardInterrupt

    preview = PreviewFile(Path("p.jpg"), lambda _: Stopping(), every=1)
    with pytest.raises(KeyboardInterrupt):
        preview(steps(1)[0])
    assert [*Path().iterdir()] == []
