"""`sdkit evaluate vae` as a user runs it, alone and under `accelerate launch`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdkit.cli import main
from tests.helpers import forks, toy


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astronaut: Image.Image, coffee: Image.Image) -> Path:
    """Enter a folder with eleven pictures in photos/: ten to evaluate on, and one that is torn."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(5):
        for name, photo in (("astronaut", astronaut), ("coffee", coffee)):
            photo.crop((40 * i, 30 * i, 40 * i + 64, 30 * i + 64)).save(f"photos/{name}-{i}.png")
    Path("photos/torn.png").write_bytes(Path("photos/coffee-1.png").read_bytes()[:99])
    return tmp_path


ARGUMENTS = ("evaluate", "vae", "emoji", "--data", "photos", "--size", "64", "--dtype", "fp32", "--device", "cpu")


@pytest.mark.usefixtures("photos")
def test_prints_tables_with_controls_and_draws_a_sheet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS]) == 1  # one image was skipped
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()]
    assert out.startswith("10 images of 64 x 64 pixels; LPIPS with alex\nrFID with alex: images 224 x 224 pixels")
    assert [row[0] for row in rows if row and row[0] in ("emoji", "pixels", "blur")] == ["emoji", "pixels", "blur"] * 2
    assert ["pixels", "inf", "1.0000", "0.0000", "0.0000"] in [row[:5] for row in rows]
    assert out.splitlines()[-1] == "The worst and the best reconstructions: vae-evaluation.png"
    with Image.open("vae-evaluation.png") as sheet:
        assert sheet.width > 8 * 64
    assert "torn.png is skipped: " in err
    assert "10 images are fewer than the 1152 features of alex" in err


@pytest.mark.usefixtures("photos")
def test_replaces_a_sheet_only_if_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """As `sdkit generate` does: a default name spares what is there, and `--sheet` says what to replace."""
    kept = ("vae-evaluation.png", "vae-evaluation-2.png")
    for name in (*kept, "mine.png"):
        Path(name).write_text("an earlier sheet")
    Path("photos/torn.png").unlink()
    arguments = ["evaluate", "vae", "blur", *ARGUMENTS[3:]]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(": vae-evaluation-3.png")
    assert main([*arguments, "--sheet", "mine.png", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sheet"] == "mine.png"
    assert [Path(name).read_text() for name in kept] == ["an earlier sheet"] * 2
    for name in ("vae-evaluation-3.png", "mine.png"):
        with Image.open(name) as sheet:
            assert sheet.width > 8 * 64


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Batches are the same, so that only the order in which the features' moments are added up differs."""
    arguments = ["evaluate", "vae", "emoji", "blur", *ARGUMENTS[3:], "--batch-size", "3", "--json"]
    assert main(arguments) == 1
    alone = json.loads(capsys.readouterr().out)
    ended = forks.launch(toy.command, [*arguments, "--sheet", "two.png"])
    assert ended.out, ended.err
    together = json.loads(ended.out)
    assert [one["vae"] for one in together["vaes"]] == ["emoji", "blur"]
    assert [one["vae"] for one in together["controls"]] == ["pixels"]
    assert numbers(together) == pytest.approx(numbers(alone), rel=1e-6, abs=1e-9)
    assert Path("two.png").is_file()


def numbers(found: dict[str, Any]) -> list[Any]:
    """Return all that was measured, except times and memory. JSON has None for infinity."""
    rows = [*found["vaes"], *found["controls"]]
    measured = ("psnr", "ssim", "lpips", "rfid", "noise_share", "unit_scale", "images")
    values = [row[key] for row in rows for key in measured]
    values += [number for row in rows for key in ("latent_mean", "latent_std") for number in row[key]]
    values += [end[key] for row in rows for end in row["worst"] for key in ("psnr", "lpips", "ssim")]
    return [math.inf if value is None else value for value in values]


@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["vae", "--data", "photos"], "the following arguments are required: SOURCE"),
        (["vae", "emoji"], "the following arguments are required: --data"),
        (["vae", "emoji", "--data", "no"], "'no' is neither a path that exists nor the id of a data set"),
        (["vae", "emoji", "no/such", "--data", "photos"], "no/such"),
        (["vae", "emoji", "--data", "photos", "--size", "1", "2", "3"], "size must be one number of pixels"),
        (["vae", "emoji", "--data", "photos", "--size", "20"], "size 20 x 20 is too small"),
        (["vae", "emoji", "--data", "photos"], "none of 11 images can be used"),  # 256 pixels by default
        (["vae", "emoji", "--data", "photos", "--lpips", "no.pt"], "no.pt"),
        (["vae", "emoji", "--data", "photos", "--extractor", "resnet"], "extractor 'resnet' is not one of"),
        (["vae", "emoji", "--data", "photos", "--extractor", "alex:mine"], "the weights of 'alex' are embedded"),
        (["vae", "emoji", "--data", "photos", "--sheet", "a.jpg"], "the sheet a.jpg must be a .png"),
        (["vae", "emoji", "--data", "photos", "--sheet", "photos/torn.png/a.png"], "cannot write into"),
        (["vae", "emoji", "--data", "photos", "--batch-size", "0"], "batch_size must be a whole number"),
        (["vae", "emoji", "--data", "photos", "--dtype", "int8"], "dtype 'int8' is not one of"),
        (["vae", "emoji", "--data", "photos", "--device", "abacus"], "device 'abacus' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence(
    arguments: list[str], fragment: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["evaluate", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert fragment in err
    assert err.startswith("sdkit: ")
    assert err.count("\n") == 1
