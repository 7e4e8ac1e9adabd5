"""The recipe's measures: on images of which the answer is known, and once through on the embedded model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import sdkit
from sdkit.errors import SdkitError
from sdkit.lpips import LPIPS
from sdkit.recipes.emoji import __main__ as command
from sdkit.recipes.emoji import evaluation, report
from sdkit.recipes.emoji.evaluation import Gallery, Prompt, background_of, fidelity, prompts, prompts_held_out
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed, pictures, read

FEW = pictures()[:6]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the npm package's assets/: the first pictures, each another polygon."""
    folder = tmp_path_factory.mktemp("assets")
    for sides, one in enumerate(FEW, start=3):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).regular_polygon((128, 128, 100), sides, fill=(30 * sides, 200 - 20 * sides, 90, 255))
        picture.save(folder / f"{one.file}.webp", lossless=True)
    return folder


@pytest.fixture(scope="module")
def gallery(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """With random features, which tell images apart, too."""
    torch.manual_seed(0)
    return Gallery(drawn, LPIPS(), tmp_path_factory.mktemp("gallery"))


def image_of(drawn: Path, prompt: Prompt) -> Image.Image:
    return composed(read(drawn, prompt.picture.file), BACKGROUNDS[prompt.background])


def test_prompts_were_trained_on_and_are_spread() -> None:
    asked = prompts(320)
    assert len({prompt.picture for prompt in asked}) == 320
    assert not any(prompt.held_out for prompt in asked)
    counts = Counter(prompt.background for prompt in asked)
    assert counts.keys() == set(evaluation.SHOWN_ON)
    assert min(counts.values()) >= 60
    assert asked[0].text == f"a {pictures()[0].name} on a white background"


def test_pairs_held_out() -> None:
    asked = prompts_held_out(320)
    assert len({prompt.picture for prompt in asked}) == 320
    assert all(prompt.held_out for prompt in asked)


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_the_background_is_told_by_the_edge(name: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(np.array(BACKGROUNDS[name]) + rng.normal(0, 12, (128, 128, 3)), 0, 255)
    pixels[8:-8, 8:-8] = (1, 2, 3)
    assert background_of(Image.fromarray(pixels.astype(np.uint8))) == name


def test_real_images_are_retrieved_first(gallery: Gallery, drawn: Path) -> None:
    for background in ("white", "blue"):
        asked = [Prompt(one, background) for one in FEW]
        images = [image_of(drawn, prompt) for prompt in asked]
        assert gallery.ranks(background, images, [one.file for one in FEW]) == [0] * len(FEW)


def test_a_rank_counts_those_that_are_nearer(gallery: Gallery, drawn: Path) -> None:
    """Against distances between float32 features."""
    image = image_of(drawn, Prompt(FEW[1], "white")).rotate(8, fillcolor="white")
    images = [image, *(image_of(drawn, Prompt(one, "white")) for one in FEW)]
    with torch.no_grad():
        features = gallery.lpips.features(torch.stack(sdkit.images.to_tensors(images)), evaluation.GRID)
    distances = (features[1:] - features[0]).square().sum(1)
    expected = [int((distances < distances[k]).sum()) for k in range(len(FEW))]
    files = [one.file for one in FEW]
    assert gallery.ranks("white", [image] * len(FEW), files) == [expected[gallery.names.index(name)] for name in files]


def test_features_are_made_once(gallery: Gallery, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of(drawn, Prompt(FEW[0], "black"))
    assert gallery.ranks("black", [image], [FEW[0].file]) == [0]
    again = Gallery(drawn, gallery.lpips, gallery.folder)
    monkeypatch.setattr(evaluation, "composed", lambda *_: pytest.fail("composed again"))
    assert again.ranks("black", [image], [FEW[0].file]) == [0]


def test_fidelity_of_a_known_mixture(gallery: Gallery, drawn: Path) -> None:
    """Two right, one that shows another picture, one on another background."""
    asked = [Prompt(one, "white") for one in FEW[:4]]
    shown = [asked[0], asked[1], Prompt(FEW[5], "white"), Prompt(FEW[3], "blue")]
    measured = fidelity(gallery, asked, [image_of(drawn, prompt) for prompt in shown])
    assert measured["prompts"] == measured["retrieved"] == 4
    assert measured["top1"] in (0.5, 0.75)  # the fourth may be told by its shape
    assert measured["background"] == 0.75


def test_only_backgrounds_with_a_gallery_are_retrieved(gallery: Gallery, drawn: Path) -> None:
    asked = [Prompt(FEW[0], "white"), Prompt(FEW[1], "brown")]
    measured = fidelity(gallery, asked, [image_of(drawn, prompt) for prompt in asked])
    assert (measured["prompts"], measured["retrieved"], measured["background"]) == (2, 1, 1.0)


def test_the_vae_is_measured(sd: sdkit.StableDiffusion, drawn: Path) -> None:
    images = [image_of(drawn, Prompt(one, "blue")) for one in FEW]
    measured = evaluation.vae_quality(sd.vae, images, LPIPS())
    through = sd.vae.reconstruct(images)
    expected = np.mean([float(sdkit.metrics.psnr(a, b)) for a, b in zip(images, through, strict=True)])
    assert measured["psnr"] == pytest.approx(expected, abs=1e-3)
    assert 0 < measured["ssim"] < 1
    assert measured["lpips"] > 0


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images and steps, and random weights of LPIPS."""
    monkeypatch.setattr(evaluation, "pictures", lambda: FEW)
    monkeypatch.setattr(report, "COMPOSITIONS", 3)
    monkeypatch.setattr(report, "STEPS", 2)
    monkeypatch.setattr(report, "SCALES", (1.0,))
    monkeypatch.setattr(report, "STEP_COUNTS", (2,))
    torch.manual_seed(0)
    lpips = LPIPS()
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda: lpips)


def command_line(monkeypatch: pytest.MonkeyPatch, drawn: Path, out: Path, *more: str) -> int:
    monkeypatch.setattr("sys.argv", ["emoji", "evaluate", "--drawn", str(drawn), "--out", str(out), *more])
    return command.main()


@pytest.mark.usefixtures("short")
def test_once_through(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table, the numbers and the pictures of one model; then, in the same table, of another."""
    out = tmp_path / "out" / "evaluation"
    assert command_line(monkeypatch, drawn, out.parent, "--models", "emoji", "--prompts", "6") == 0
    table = capsys.readouterr().out
    assert "| generated: top1 |" in table
    assert "| vae, held-out photos: psnr |" in table
    assert (out / "table.md").read_text() == table.rstrip("\n") + "\n"
    numbers = json.loads((out / "evaluation.json").read_text())["emoji"]
    assert numbers["scales"].keys() == {"1.0"}
    assert {"top1", "top5", "background, held-out pairs"} <= numbers["steps"]["2"].keys()
    assert 15 < numbers["vae, held-out photos"]["psnr"] < 40
    for name in ("generated", "vae", "curves"):
        with Image.open(out / f"emoji-{name}.png") as image:
            assert min(image.size) > 150
    other = tmp_path / "other"
    other.symlink_to(Path(sdkit.__file__).parent / "assets" / "emoji")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # which only the curves need
    more = ("--models", str(other), "--prompts", "6", "--no-sweeps")
    assert command_line(monkeypatch, drawn, out.parent, *more) == 0
    both = json.loads((out / "evaluation.json").read_text())
    assert both["emoji"] == numbers
    assert both[str(other)].keys() == numbers.keys() - {"scales", "steps"}
    assert both[str(other)]["generated"] == numbers["generated"]
    assert (out / "table.md").read_text().startswith(f"| | emoji | {other} |")


@pytest.mark.usefixtures("short")
def test_curves_want_matplotlib(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_row", lambda *_: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        SdkitError, match=r"^the curves need matplotlib; install 'sdkit\[train\]', or give --no-sweeps\.$"
    ):
        report.evaluate(["emoji"], drawn, tmp_path)


@pytest.mark.usefixtures("short")
def test_what_was_measured_before_the_sweeps_is_kept(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_sweeps", stopped)
    with pytest.raises(KeyboardInterrupt):
        report.evaluate(["emoji"], drawn, tmp_path, prompts=2)
    assert json.loads((tmp_path / "evaluation.json").read_text())["emoji"]["generated"]["prompts"] == 2


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("more", "error", "sentence"),
    [
        (["--models", "emoji", "no/such"], SdkitError, "no/such"),
        (["--models", "a/emoji", "a-emoji"], SdkitError, "called alike"),
        (["--models", "a/emoji", "a/emoji/"], SdkitError, "called alike"),
        (["--models", "emoji", "--prompts", "0"], SdkitError, "prompts must be a whole number of at least 1, not 0"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    more: list[str], error: type[Exception], sentence: str, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_row", lambda *_: pytest.fail("measured"))
    with pytest.raises(error, match=sentence):
        command_line(monkeypatch, drawn, tmp_path, *more)


@pytest.mark.usefixtures("short")
def test_a_package_that_lacks_a_picture(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "pictures", lambda: pictures()[:7])
    with pytest.raises(SdkitError, match=rf"lacks 1 pictures, {pictures()[6].file}\.webp first"):
        report.evaluate(["emoji"], drawn, tmp_path, prompts=7)


def test_models_measured_before_count_as_well(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their pictures would be overwritten; numbers that they lack are left out of the table."""
    (tmp_path / "evaluation.json").write_text('{"runs/a": {"old": {"measure": 0.5}}}')
    monkeypatch.setattr(report, "_row", lambda *_: pytest.fail("measured"))
    with pytest.raises(SdkitError, match="called alike"):
        report.evaluate(["runs-a"], drawn, tmp_path)
    assert "| old: measure | 50.0% | - |" in report._table({"a": {"old": {"measure": 0.5}}, "b": {}})


def test_nothing_to_retrieve(gallery: Gallery, drawn: Path) -> None:
    asked = [Prompt(FEW[1], "brown")]
    measured = fidelity(gallery, asked, [image_of(drawn, prompt) for prompt in asked])
    assert measured == {"prompts": 1, "retrieved": 0, "top1": None, "top5": None, "background": 1.0}


def test_the_contact_sheet_has_all_backgrounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, texts = prompts(320), []
    monkeypatch.setattr(sdkit.images, "grid", lambda images, *_, captions, **__: texts.extend(captions) or images[0])
    report._save_sheet(tmp_path / "sheet.png", [Image.new("RGB", (8, 8))] * 320, asked)
    assert len(texts) == report.SHOWN
    assert {text.split(" on a ")[1].split()[0] for text in texts} == set(evaluation.SHOWN_ON)
