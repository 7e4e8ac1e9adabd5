"""The recipe's measures, on images with known answers, and a complete evaluation of the embedded model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import sdkit
from sdkit.errors import SdkitError
from sdkit.networks.lpips import LPIPS
from sdkit.recipes.emoji import __main__ as command
from sdkit.recipes.emoji import evaluation, report
from sdkit.recipes.emoji.evaluation import Gallery, Prompt, background_of, fidelity, prompts, prompts_held_out
from sdkit.recipes.emoji.pictures import BACKGROUNDS, composed, pictures, read

FEW = pictures()[:6]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder like the npm package's assets/, with a different polygon for each of the first pictures."""
    folder = tmp_path_factory.mktemp("assets")
    for sides, one in enumerate(FEW, start=3):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).regular_polygon((128, 128, 100), sides, fill=(30 * sides, 200 - 20 * sides, 90, 255))
        picture.save(folder / f"{one.file}.webp", lossless=True)
    return folder


@pytest.fixture(scope="module")
def gallery(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Gallery:
    """Make a gallery with random features, which distinguish images too."""
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
    """Compare with distances between float32 features."""
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


def test_features_of_other_heads_are_others(gallery: Gallery, drawn: Path) -> None:
    torch.manual_seed(1)
    assert Gallery(drawn, LPIPS(), gallery.folder).digest != gallery.digest


def test_damaged_features_are_made_anew(gallery: Gallery, drawn: Path) -> None:
    image = image_of(drawn, Prompt(FEW[0], "orange"))
    assert gallery.ranks("orange", [image], [FEW[0].file]) == [0]
    (file,) = gallery.folder.glob(f"{bytes(BACKGROUNDS['orange']).hex()}-*")
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    assert gallery.ranks("orange", [image], [FEW[0].file]) == [0]
    assert file.read_bytes() == whole


def test_the_first_and_the_first_five(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gallery, "ranks", lambda _, background, *__: [0, 4, 5, 0] if background == "white" else [])
    measured = fidelity(gallery, [Prompt(one, "white") for one in FEW[:4]], [Image.new("RGB", (8, 8), "white")] * 4)
    assert (measured["top1"], measured["top5"]) == (0.5, 0.75)


def test_fidelity_of_a_known_mixture(gallery: Gallery, drawn: Path) -> None:
    """Two images are right, one shows another picture, and one has another background."""
    asked = [Prompt(one, "white") for one in FEW[:4]]
    shown = [asked[0], asked[1], Prompt(FEW[5], "white"), Prompt(FEW[3], "blue")]
    measured = fidelity(gallery, asked, [image_of(drawn, prompt) for prompt in shown])
    assert measured["prompts"] == measured["retrieved"] == 4
    assert measured["top1"] in (0.5, 0.75)  # the fourth image may be recognised by its shape
    assert measured["background"] == 0.75


def test_only_backgrounds_with_a_gallery_are_retrieved(gallery: Gallery, drawn: Path) -> None:
    asked = [Prompt(FEW[0], "white"), Prompt(FEW[1], "brown")]
    measured = fidelity(gallery, asked, [image_of(drawn, prompt) for prompt in asked])
    assert (measured["prompts"], measured["retrieved"], measured["background"]) == (2, 1, 1.0)


def test_the_vae_is_measured(sd: sdkit.StableDiffusion, drawn: Path) -> None:
    images = [image_of(drawn, Prompt(one, "blue")) for one in FEW]
    measured = evaluation.vae_quality(sd.vae, images, LPIPS())
    through = sd.vae.reconstruct(images)
    for name, measure in (("psnr", sdkit.metrics.psnr), ("ssim", sdkit.metrics.ssim)):
        expected = np.mean([float(measure(a, b)) for a, b in zip(images, through, strict=True)])
        assert measured[name] == pytest.approx(expected, abs=1e-3)
    assert measured["lpips"] > 0


def test_images_are_generated_as_asked(sd: sdkit.StableDiffusion) -> None:
    asked = [Prompt(one, "blue") for one in FEW[:2]]
    made = evaluation.generated(sd, asked, 2.0, 3)
    own = sd([prompt.text for prompt in asked], guidance_scale=2.0, num_inference_steps=3, batch_size=2)
    for one, other in zip(made, own, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1


def test_each_measure_is_of_what_it_says(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are replaced by strings here, to check which images each measure takes, and with which prompts."""
    monkeypatch.setattr(evaluation, "pictures", lambda: FEW)
    monkeypatch.setattr(report, "COMPOSITIONS", 3)
    monkeypatch.setattr(report, "_composed", lambda _, prompt: prompt.text)
    monkeypatch.setattr(evaluation, "generated", lambda model, asked, *at: [(model, one.text, *at) for one in asked])
    monkeypatch.setattr(evaluation, "vae_quality", lambda vae, images, _: {"of": (vae, images)})
    monkeypatch.setattr(
        evaluation, "fidelity", lambda _, asked, images: {"of": (asked, images), "background": (asked, images)}
    )

    class Through:
        def reconstruct(self, images: list[str]) -> list[str]:
            return [f"{one} through the VAE" for one in images]

    seen, held_out, vae = prompts(2), prompts_held_out(2), Through()
    texts, held_out_texts = [one.text for one in seen], [one.text for one in held_out]

    def drawn_at(which: list[str], *at: float) -> list[tuple[object, ...]]:
        return [("model", text, *at) for text in which]

    arguments: list[Any] = ["model", vae, gallery, ["photo"], seen, held_out]
    row, images = report._row(*arguments)
    assert images == drawn_at(texts, 5.0, 30)
    of = {group: measured["of"] for group, measured in row.items()}
    assert of == {
        "vae, held-out compositions": (vae, [one.text for one in prompts_held_out(3)]),
        "vae, held-out photos": (vae, ["photo"]),
        "through the VAE": (seen, [f"{text} through the VAE" for text in texts]),
        "generated": (seen, images),
        "generated, held-out pairs": (held_out, drawn_at(held_out_texts, 5.0, 30)),
    }
    arguments = ["model", gallery, row, seen, held_out]
    swept = report._sweeps(*arguments)
    for key, points in (
        ("scales", {scale: (scale, 30) for scale in report.SCALES}),
        ("steps", {steps: (5.0, steps) for steps in report.STEP_COUNTS}),
    ):
        assert swept[key].keys() == points.keys()
        for point, at in points.items():
            assert swept[key][point]["of"] == (seen, drawn_at(texts, *at))
            assert swept[key][point]["background, held-out pairs"] == (held_out, drawn_at(held_out_texts, *at))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use few images and steps, and random weights for LPIPS."""
    monkeypatch.setattr(evaluation, "pictures", lambda: FEW)
    monkeypatch.setattr(report, "COMPOSITIONS", 3)
    monkeypatch.setattr(report, "STEPS", 2)
    monkeypatch.setattr(report, "SCALES", (1.0,))
    monkeypatch.setattr(report, "STEP_COUNTS", (2,))
    torch.manual_seed(0)
    lpips = LPIPS()
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda _: lpips)


def command_line(monkeypatch: pytest.MonkeyPatch, drawn: Path, out: Path, *more: str) -> int:
    monkeypatch.setattr("sys.argv", ["emoji", "evaluate", "--drawn", str(drawn), "--out", str(out), *more])
    return command.main()


@pytest.mark.usefixtures("short")
def test_once_through(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Write the table, the numbers, and the pictures of a model; then add another model to the same table."""
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
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # only the curves need matplotlib
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
def test_a_folder_named_as_the_embedded_model(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd: sdkit.StableDiffusion
) -> None:
    """The folder ./emoji must be measured itself, not the embedded model, and have a line of its own."""
    measured: list[str] = []

    def note(model: sdkit.StableDiffusion, vae: sdkit.VAE, *_: object) -> None:
        measured.extend((model.name, vae.name))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").symlink_to(Path(sdkit.__file__).parent / "assets" / "emoji")
    monkeypatch.setattr(report, "_row", note)
    with pytest.raises(KeyboardInterrupt):
        report.evaluate(["./emoji"], drawn, tmp_path / "out", prompts=2)
    assert measured == [str(tmp_path / "emoji")] * 2


@pytest.mark.usefixtures("short")
def test_sweeps_are_kept_as_long_as_the_model_is_the_same(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, numbers = tmp_path / "emoji-curves.png", tmp_path / "evaluation.json"
    measured = {"generated": {"top1": 0.5}}
    swept = measured | {"scales": {"1.0": {"top1": 0.5}}}
    monkeypatch.setattr(report, "_row", lambda *_: (dict(measured), [Image.new("RGB", (8, 8))] * 2))
    for top1, kept in ((0.5, True), (0.75, False)):
        numbers.write_text(json.dumps({"emoji": swept}))
        curves.touch()
        measured["generated"] = {"top1": top1}
        report.evaluate(["emoji"], drawn, tmp_path, prompts=2, sweeps=False)
        assert json.loads(numbers.read_text())["emoji"] == (swept if kept else measured)
        assert curves.exists() == kept


@pytest.mark.parametrize("text", ["[]", '{"old": 3}', '{"old": {"generated": 3}}', "{"])
def test_damaged_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(SdkitError, match=r"evaluation\.json is damaged; remove it\.$"):
        report.evaluate(["emoji"], tmp_path, tmp_path)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("more", "error", "sentence"),
    [
        (["--models", "emoji", "no/such"], SdkitError, "no/such"),
        (["--models", "a/emoji", "a-emoji"], SdkitError, "files of the same name"),
        (["--models", "a/emoji", "a/emoji/"], SdkitError, "files of the same name"),
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
    """A new model must not overwrite the pictures of one measured before. The table leaves out missing numbers."""
    (tmp_path / "evaluation.json").write_text('{"runs/a": {"old": {"measure": 0.5}}}')
    monkeypatch.setattr(report, "_row", lambda *_: pytest.fail("measured"))
    with pytest.raises(SdkitError, match="files of the same name"):
        report.evaluate(["runs-a"], drawn, tmp_path)
    table = report._table({"a": {"old": {"measure": 0.5}}, "b": {"new": {"measure": 0.25}}})
    assert "| old: measure | 50.0% | - |" in table
    assert "| new: measure | - | 25.0% |" in table


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
