"""The recipe's measures, on images with known answers, and a complete evaluation of the embedded model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps
from scipy.spatial.distance import cdist

import sdkit
from sdkit.errors import SdkitError
from sdkit.networks.lpips import LPIPS
from sdkit.recipes.emoji import __main__ as command
from sdkit.recipes.emoji import asked as ask
from sdkit.recipes.emoji import evaluation, gallery, report
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import PLACES, SIZES, arranged
from sdkit.recipes.emoji.drawings import VECTORS, Drawings
from sdkit.recipes.emoji.figures import ALIGNED, Figure, aligned, background_of, figure_of
from sdkit.recipes.emoji.gallery import Gallery, Match
from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, pictures

EVERY = pictures()
ALIKE = [one for one in EVERY if one.held_out not in ask.SHOWN_ON]
FEW = (*[one for one in ALIKE if not one.held_out_style][:4], next(one for one in ALIKE if one.held_out_style))


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Drawings:
    """Make stand-ins for the packages: a polygon for each picture, whose number of sides is the picture and whose
    colour is the style.
    """
    folder = tmp_path_factory.mktemp("packages")
    (folder / "assets").mkdir()
    for sides, one in enumerate(FEW, start=3):
        picture = Image.new("RGBA", (256, 256))
        ImageDraw.Draw(picture).regular_polygon((128, 128, 120), sides, fill=(200, 30, 90, 255))
        picture.save(folder / "assets" / f"{one.file}.webp", lossless=True)
    for package, colour in zip(VECTORS.values(), ("green", "purple", "teal"), strict=True):
        angles = {one: [2 * np.pi * k / n for k in range(n)] for n, one in enumerate(FEW, start=3)}
        corners = {
            one: " ".join(f"{16 + 15 * np.sin(a):.2f},{16 - 15 * np.cos(a):.2f}" for a in of_one)
            for one, of_one in angles.items()
        }
        icons = {one.file: {"body": f'<polygon points="{corners[one]}" fill="{colour}"/>'} for one in FEW}
        (folder / package).mkdir()
        (folder / package / "icons.json").write_text(json.dumps({"icons": icons, "width": 32, "height": 32}))
        names = {one.file.replace("-fe0f", "").replace("_", "-"): one.file for one in FEW}
        (folder / package / "chars.json").write_text(json.dumps(names))
    return Drawings(folder / "assets", folder)


@pytest.fixture(autouse=True)
def few(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recipe know the first pictures only, wherever stand-ins are drawn."""
    if "drawings" in request.fixturenames:
        pytest.importorskip("resvg_py")
        for module in (ask, gallery):
            monkeypatch.setattr(module, "pictures", lambda: FEW)


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    """Make LPIPS with random weights, which distinguish images too."""
    torch.manual_seed(0)
    return LPIPS()


@pytest.fixture
def shown(drawings: Drawings, lpips: LPIPS, tmp_path: Path) -> Gallery:
    return Gallery(drawings, lpips, tmp_path / "gallery")


def image_of(drawings: Drawings, prompt: Prompt, seed: int = 0) -> Image.Image:
    return prompt.composition(seed).drawn(drawings)


# Prompts


def test_named_prompts_were_trained_on_and_are_spread() -> None:
    asked = ask.named(320)
    assert len({prompt.pictures for prompt in asked}) == 320
    assert all(prompt.style in prompt.pictures[0].styles for prompt in asked)
    assert all(prompt.background in prompt.pictures[0].backgrounds for prompt in asked)
    for values, least in (([one.style for one in asked], 60), ([one.background for one in asked], 60)):
        assert min(values.count(value) for value in set(values)) >= least
        assert len(set(values)) == 4
    assert asked[0].text == Prompt(asked[0].pictures, asked[0].style, asked[0].background).text


def test_held_out_pairs_are_in_no_training_image() -> None:
    everything = ask.held_out_pairs(10_000)
    assert len(everything) == sum(bool(one.held_out_style) for one in EVERY)
    for asked in (everything, ask.held_out_pairs(200)):
        assert len({prompt.pictures for prompt in asked}) == len(asked)
        assert all(prompt.style == prompt.pictures[0].held_out_style for prompt in asked)


def test_placed_prompts_name_every_size_and_place_and_a_held_out_background() -> None:
    asked = ask.placed(320)
    assert {(one.size, one.place) for one in asked} == {*ask.SIZED}
    assert {one.place for one in asked} == {"", *PLACES}
    assert all(one.background == one.pictures[0].held_out for one in asked)
    assert "small" in next(one.text for one in asked if one.size == "small")


def test_two_pictures_are_those_that_training_shows_beside_others() -> None:
    for one in ask.pairs_beside(60):
        left, right = one.pictures
        assert left != right
        assert all(one.style in picture.styles and one.background in picture.backgrounds for picture in one.pictures)
        assert f"{left.name} and " in one.text


def test_open_prompts_name_the_picture_alone_or_with_a_background() -> None:
    for one in ask.open_prompts(40, background=False):
        assert (one.style, one.size, one.place, one.background) == ("", "", "", "")
    assert all(one.text.endswith(f"on a {one.background} background") for one in ask.open_prompts(40, background=True))


def test_a_composition_is_what_its_prompt_says() -> None:
    """Seeds differ in what is open, and in nothing else."""
    prompt = Prompt((EVERY[30],), "flat", "blue", "small", "left")
    made = [prompt.composition(seed) for seed in range(20)]
    assert {one.style for one in made} == {"flat"}
    assert {one.background for one in made} == {"blue"}
    assert all(one.parts[0].extent == SIZES["small"] and one.parts[0].across <= 0.12 for one in made)
    assert len({one.parts[0].down for one in made}) > 5
    assert prompt.composition(3) == made[3]


def test_sampled_compositions_are_new() -> None:
    """Sets of different names differ, and so do their images of a picture."""
    one, other = ask.sampled(50, "a"), ask.sampled(50, "b")
    assert ask.sampled(50, "a") == one
    assert {item.parts for item in one}.isdisjoint(item.parts for item in other)


# Figures


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_the_background_is_told_by_the_edge(name: str) -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(np.array(BACKGROUNDS[name]) + rng.normal(0, 12, (128, 128, 3)), 0, 255)
    pixels[8:-8, 8:-8] = (1, 2, 3)
    assert background_of(Image.fromarray(pixels.astype(np.uint8))) == name


def drawn_box(box: tuple[int, int, int, int], side: int = 128) -> Image.Image:
    """Draw a red box on noisy white, with one stray pixel."""
    rng = np.random.default_rng(0)
    pixels = np.clip(255 + rng.normal(0, 6, (side, side, 3)), 0, 255)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = (200, 20, 20)
    pixels[120, 60] = (0, 0, 0)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("box", "size", "place"),
    [
        ((10, 44, 50, 80), "small", "left"),
        ((78, 44, 118, 80), "small", "right"),
        ((44, 6, 84, 46), "small", "top"),
        ((44, 80, 84, 120), "small", "bottom"),
        ((4, 4, 44, 44), "small", ""),  # a corner has no name
        ((30, 24, 98, 98), "small", ""),  # nearer to 48 pixels than to 104
        ((30, 24, 98, 104), "large", ""),
        ((8, 8, 120, 120), "large", ""),
        ((4, 4, 124, 124), "large", ""),  # no room
    ],
)
def test_size_and_place_of_a_box(box: tuple[int, int, int, int], size: str, place: str) -> None:
    figure = figure_of(drawn_box(box))
    assert figure == Figure(box, (128, 128))
    assert (figure.size, figure.place) == (size, place)


@pytest.mark.parametrize("size", ["small", "", "large"])
@pytest.mark.parametrize("place", ["", *PLACES])
def test_what_training_shows_is_measured_as_it_is_named(size: str, place: str) -> None:
    """Every size and place that a caption names is told from the box; captions name no place of large pictures."""
    if size == "large" and place:
        return
    rng = Random(0)
    for _ in range(100):
        part = arranged(EVERY[0], size, place, rng)
        width, height = part.extent, round(part.extent * rng.uniform(0.6, 1))
        left, top = 8 + part.across * (112 - width), 8 + part.down * (112 - height)
        left, top = 8 * round(left / 8), 8 * round(top / 8)
        figure = Figure((left, top, left + width, top + height), (128, 128))
        if size:
            assert figure.size == size
        if place:
            assert figure.place == place


def test_a_plain_image_has_no_figure() -> None:
    plain = Image.new("RGB", (128, 128), "white")
    assert figure_of(plain) is None
    assert aligned(plain).size == (ALIGNED, ALIGNED)


def test_aligned_images_do_not_depend_on_size_and_place() -> None:
    """A box of twice the size elsewhere is aligned to the same image, up to resampling."""
    small, large = (aligned(drawn_box(box)) for box in ((10, 44, 50, 74), (40, 20, 120, 80)))
    difference = np.abs(np.asarray(small, float) - np.asarray(large, float))
    assert np.median(difference) < 8
    assert (difference.max(2) > 60).mean() < 0.05
    assert figure_of(large).extent == pytest.approx(ALIGNED / 1.08, abs=3)  # type: ignore[union-attr]


# Retrieval


@pytest.mark.parametrize("mirrored", [False, True])
def test_real_images_are_retrieved_first(mirrored: bool, shown: Gallery, drawings: Drawings) -> None:
    asked = [Prompt((one,), style, "blue") for one in FEW for style in STYLES]
    images = [image_of(drawings, prompt) for prompt in asked]
    images = [ImageOps.mirror(image) for image in images] if mirrored else images
    matches = shown.matches(asked, images)
    assert [match.style for match in matches] == [prompt.style for prompt in asked]
    assert sum(match.rank == 0 for match in matches) >= 0.9 * len(matches)


def test_distances_are_those_of_the_nearer_side(shown: Gallery, drawings: Drawings) -> None:
    """Compare with scipy's distances between float32 features, of the image and of its mirror image."""
    images = [image_of(drawings, Prompt((one,), "noto", "white")).rotate(9, fillcolor="white") for one in FEW[:2]]
    squares = shown._distances("white", images)
    assert squares.shape == (2, len(STYLES), len(FEW))
    cut = [aligned(image) for image in images]
    with torch.no_grad():
        features = {
            key: shown.lpips.features(torch.stack(sdkit.images.to_tensors(some)), gallery.GRID).numpy()
            for key, some in (("plain", cut), ("mirrored", [ImageOps.mirror(image) for image in cut]))
        }
    for number, style in enumerate(STYLES):
        reference = shown._features("white", style).float().numpy()
        expected = np.minimum(*(cdist(side, reference, "sqeuclidean") for side in features.values()))
        np.testing.assert_allclose(squares[:, number], expected, rtol=0.02, atol=0.02 * expected.max())


def test_a_rank_counts_the_nearer_pictures_of_the_style(shown: Gallery) -> None:
    distances = torch.tensor([[1.0, 9, 9, 9, 9], [5, 4, 3, 2, 6], [9, 9, 9, 9, 9], [9, 9, 9, 9, 0.5]])
    for i, (rank, own) in enumerate([(3, "3d"), (2, "flat"), (1, "flat"), (0, "flat"), (4, "twemoji")]):
        assert shown._match(Prompt((FEW[i],), "flat", "white"), distances) == Match(rank, "twemoji", own)


def test_features_are_made_once(
    shown: Gallery, drawings: Drawings, lpips: LPIPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file is made anew; one of other weights is another file."""
    prompt = Prompt((FEW[0],), "flat", "black")
    image = image_of(drawings, prompt)
    before = shown.matches([prompt], [image])
    damaged = next(shown.folder.glob("flat-*"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:1000])
    assert shown.matches([prompt], [image]) == before
    assert damaged.read_bytes() == whole
    again = Gallery(drawings, lpips, shown.folder)
    monkeypatch.setattr(Gallery, "_canonical", lambda *_: pytest.fail("composed again"))
    assert again.matches([prompt], [image]) == before
    torch.manual_seed(1)
    assert Gallery(drawings, LPIPS(), shown.folder).digest != shown.digest


# Measures


def test_fidelity_of_a_known_mixture(shown: Gallery, drawings: Drawings) -> None:
    """Of four images one has another style, one another background, and one is another picture."""
    asked = [Prompt((one,), "flat", "white") for one in FEW[:4]]
    drawn = [asked[0], Prompt((FEW[1],), "noto", "white"), Prompt((FEW[2],), "flat", "blue"),
             Prompt((FEW[0],), "flat", "white")]  # fmt: skip
    measured = evaluation.fidelity(shown, asked, [image_of(drawings, prompt) for prompt in drawn])
    assert measured["prompts"] == 4
    assert measured["style"] in (0.5, 0.75)  # on the wrong background, the style is a matter of chance
    assert measured["background"] == 0.75
    assert measured["top1"] is not None
    assert measured["top1"] < 1
    assert measured["top5"] == 1  # there are only five


def test_the_first_and_the_first_five(shown: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Match(rank, "flat", "3d") for rank in (0, 4, 5, 0)]
    monkeypatch.setattr(Gallery, "matches", lambda *_: found)
    asked = [Prompt((one,), style, "white") for one, style in zip(FEW, ("flat", "flat", "flat", "3d"), strict=False)]
    measured = evaluation.fidelity(shown, asked, [Image.new("RGB", (16, 16), "white")] * 4)
    assert (measured["top1"], measured["top5"], measured["style"], measured["background"]) == (0.5, 0.75, 0.75, 1)
    assert measured["own style"] == 0.25


def test_halves_are_measured_as_the_left_and_the_right_picture(shown: Gallery, drawings: Drawings) -> None:
    both = [(FEW[0], FEW[4]), (FEW[4], FEW[1]), (FEW[3], FEW[0])]
    asked = [Prompt(pair, "flat", "blue") for pair in both]
    right = [image_of(drawings, prompt) for prompt in asked]
    exchanged = [ImageOps.mirror(image) for image in right]
    measured = evaluation.fidelity_of_two(shown, asked, right)
    assert measured["prompts"] == 6
    assert measured["style"] == measured["background"] == 1
    top1 = evaluation.fidelity_of_two(shown, asked, exchanged)["top1"]
    assert (measured["top1"] or 0) > (top1 or 0)


def test_arrangement_of_a_known_mixture() -> None:
    asked = [
        Prompt((EVERY[0],), "", "white", "small", "left"), Prompt((EVERY[1],), "", "white", "", "top"),
        Prompt((EVERY[2],), "", "blue", "large"), Prompt((EVERY[3],), "", "white", "small"),
    ]  # fmt: skip
    images = [
        drawn_box((10, 44, 50, 80)), drawn_box((10, 44, 50, 80)), drawn_box((8, 8, 120, 118)),
        Image.new("RGB", (128, 128), "white"),
    ]  # fmt: skip
    expected = {"prompts": 4, "size": 2 / 3, "place": 1 / 2, "background": 3 / 4}
    assert evaluation.arrangement(asked, images) == pytest.approx(expected)


def test_variety_is_the_deviation_over_seeds() -> None:
    rng = np.random.default_rng(0)
    groups = [
        [Image.fromarray(rng.normal(128, sigma, (64, 64, 3)).clip(0, 255).astype(np.uint8)) for _ in range(8)]
        for sigma in (10, 30)
    ]
    # the mean of a sample's standard deviation is a little below the distribution's: c4(8) = 0.965
    assert evaluation.variety(groups) == pytest.approx(0.965 * 20, rel=0.02)
    assert evaluation.variety([[groups[0][0]] * 8]) == 0


def test_the_vae_is_measured(sd: sdkit.StableDiffusion, drawings: Drawings) -> None:
    images = [image_of(drawings, Prompt((one,), "3d", "blue")) for one in FEW]
    measured = evaluation.vae_quality(sd.vae, images, LPIPS())
    through = sd.vae.reconstruct(images)
    for name, measure in (("psnr", sdkit.metrics.psnr), ("ssim", sdkit.metrics.ssim)):
        expected = np.mean([float(measure(a, b)) for a, b in zip(images, through, strict=True)])
        assert measured[name] == pytest.approx(expected, abs=1e-3)
    assert (measured["lpips"] or 0) > 0


# Reports


@pytest.fixture
def short(drawings: Drawings, lpips: LPIPS, monkeypatch: pytest.MonkeyPatch) -> Drawings:
    """Use few images and steps, and random weights for LPIPS."""
    monkeypatch.setattr(report, "SCALES", (1.0,))
    monkeypatch.setattr(report, "STEP_COUNTS", (1, 2))
    monkeypatch.setattr(report, "FAST", 2)
    monkeypatch.setattr(report, "PHOTO", 128)
    monkeypatch.setattr(evaluation, "STEPS", 2)
    monkeypatch.setattr(LPIPS, "from_pretrained", lambda _: lpips)
    return drawings


def command_line(monkeypatch: pytest.MonkeyPatch, drawings: Drawings, out: Path, *more: str) -> int:
    folders = ["--drawn", str(drawings.solid), "--vectors", str(drawings.vectors), "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["emoji", "evaluate", *folders, *more])
    return command.main()


FEWER = ("--prompts", "8", "--images", "8")


def test_once_through(
    short: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Write the table, the numbers, and the pictures of a model; then add another model to the same table."""
    out = tmp_path / "out" / "evaluation"
    assert command_line(monkeypatch, short, out.parent, "--models", "emoji", *FEWER) == 0
    table = capsys.readouterr().out
    for metric in (
        "named: top1", "named, large: top1", "placed: size", "two: top5", "variety: deviation", "distribution: frechet",
    ):  # fmt: skip
        assert f"| {metric} |" in table
    assert (out / "table.md").read_text() == table.rstrip("\n") + "\n"
    numbers = json.loads((out / "evaluation.json").read_text())
    real, mean, model = (numbers[name] for name in ("real pictures", "mean image", "emoji"))
    assert real["named"]["style"] == real["placed"]["place"] == 1
    assert mean["variety"]["deviation"] == 0 < real["variety"]["deviation"]
    assert mean["distribution"]["recall"] == 0
    assert real["distribution"]["frechet"] < mean["distribution"]["frechet"]
    assert model["scales"].keys() == {"1.0"}
    assert model["steps"].keys() == {"1", "2"}
    assert model["samplers"].keys() == {*report.SAMPLERS}
    assert 15 < model["vae, photographs"]["psnr"] < 40
    for name in ("named", "named-large", "held-out-pairs", "placed", "two", "variety", "vae", "curves"):
        with Image.open(out / f"emoji-{name}.png") as image:
            assert min(image.size) > 150
    other = tmp_path / "other"
    other.symlink_to(Path(sdkit.__file__).parent / "assets" / "emoji")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # only the curves need matplotlib
    assert command_line(monkeypatch, short, out.parent, "--models", str(other), *FEWER, "--no-sweeps") == 0
    both = json.loads((out / "evaluation.json").read_text())
    assert both["emoji"] == model
    assert both[str(other)] == {
        key: value for key, value in model.items() if key not in ("scales", "steps", "samplers")
    }
    assert (out / "table.md").read_text().startswith(f"| | real pictures | mean image | emoji | {other} |")


def test_curves_want_matplotlib(short: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.Judge, "of", lambda *_: pytest.fail("measured"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        SdkitError, match=r"^the curves need matplotlib; install 'sdkit\[train\]', or give --no-sweeps\.$"
    ):
        report.evaluate(["emoji"], short, tmp_path)


def stop(*_: object) -> Any:
    raise KeyboardInterrupt


def test_what_was_measured_before_the_sweeps_is_kept(
    short: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_measured", lambda *_: {"named": {"top1": 0.5}})
    monkeypatch.setattr(report, "_sweeps", stop)
    with pytest.raises(KeyboardInterrupt):
        report.evaluate(["emoji"], short, tmp_path, prompts=8, images=8)
    rows = json.loads((tmp_path / "evaluation.json").read_text())
    assert [*rows] == [*report.CONTROLS, "emoji"]


def test_a_folder_named_as_the_embedded_model(short: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder ./emoji must be measured itself, not the embedded model, and have a line of its own."""
    measured: list[str] = []

    def note(model: sdkit.StableDiffusion, source: str, *_: object) -> None:
        measured.extend((model.name, source))
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").symlink_to(Path(sdkit.__file__).parent / "assets" / "emoji")
    monkeypatch.setattr(report, "_measured", note)
    monkeypatch.setattr(report, "_controls", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        report.evaluate(["./emoji"], short, tmp_path / "out", prompts=8, images=8)
    assert measured[0] == str(tmp_path / "emoji")
    assert measured[1] != "emoji"


@pytest.mark.parametrize("text", ["[]", '{"old": 3}', '{"old": {"generated": 3}}', "{"])
def test_damaged_numbers(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(SdkitError, match=r"evaluation\.json is damaged; remove it\.$"):
        report.evaluate(["emoji"], Drawings(tmp_path, tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--models", "emoji", "no/such"], "no/such"),
        (["--models", "a/emoji", "a-emoji"], "files of the same name"),
        (["--models", "a/emoji", "a/emoji/"], "files of the same name"),
        (["--models", "emoji", "--prompts", "0"], "prompts must be a whole number of at least 8, not 0"),
        (["--models", "emoji", "--images", "7"], "images must be a whole number of at least 8, not 7"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    more: list[str], sentence: str, short: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report.Judge, "of", lambda *_: pytest.fail("measured"))
    with pytest.raises(SdkitError, match=sentence):
        command_line(monkeypatch, short, tmp_path, *more)
