"""The recipe's small CLIP: it is small enough to ship, loads in float16, and is trained by one command."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdkit import images
from sdkit.errors import DataError, SourceError
from sdkit.evaluation.extractors import open_extractor
from sdkit.recipes.emoji import clip, clip_report
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.compositions import PLACES, SIZES, one
from sdkit.recipes.emoji.pictures import STYLES, pictures
from tests.helpers import clip as tiny_clip
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

LARGEST = 6 * 10**6  # bytes of the CLIP with its tokenizer


def test_it_is_trained_and_exported_by_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in clip.RUNS.values():
        tiny.photos(tmp_path / "data" / name, 24, size=64)
    words = ("--data", str(tmp_path / "data"), "--out", str(tmp_path / "runs"), "--max-steps", "1")
    monkeypatch.setattr(clip, "settings", lambda run: {"batch_size": 8, "lr_scheduler": "constant"})
    monkeypatch.setattr("sys.argv", ["clip", *words])
    for _ in range(2):  # the second time, the finished runs are exported again
        assert clip.main() == 0
    made = tmp_path / "runs" / "clip-fp16"
    assert capsys.readouterr().out.split() == [str(made)] * 2
    assert sum(path.stat().st_size for path in made.iterdir()) < LARGEST
    assert {value.dtype for value in load_file(made / "model.safetensors").values()} == {torch.float16}
    extractor = open_extractor(f"clip:{made}", device="cpu")
    assert extractor.embed_texts(["a red disc", "a blue one"]).shape == (2, extractor.width) == (2, 128)
    written = [*(tmp_path / "runs" / "clip-data").glob("*/*.png")]
    assert len(written) == 2 * 48  # each image with two captions
    assert {images.read(path).size for path in written} == {(extractor.side, extractor.side)}
    one_sentence(lambda: clip.export(tmp_path, made), SourceError, "holds no CLIP; train it first")
    one_sentence(lambda: clip.export(made, tmp_path / "data"), SourceError, "with what is not of this recipe")


def test_images_of_another_set_are_not_taken_for_those_that_were_made(tmp_path: Path) -> None:
    first, second = (tiny.photos(tmp_path / str(n) / "plain", n, size=64) for n in (3, 4))
    made = [clip.restate(data, tmp_path / "made") for data in (first, second, first)]
    assert made[0] == made[2] != made[1]
    assert [len([*folder.glob("*.png")]) for folder in made] == [6, 8, 6]
    words = [clip._words(folder, tmp_path) for folder in made]
    assert words[0] == words[2] != words[1]


@pytest.mark.parametrize("run", clip.RUNS)
def test_its_settings_are_valid(tmp_path: Path, run: str) -> None:
    from sdkit.recipes.emoji.settings import settings, shape_file
    from sdkit.training import ClipConfig

    config = ClipConfig(**settings(run), data="photos", init=shape_file("clip"), out_dir=tmp_path)
    assert config.batch_size == 128


def said_of(name: str, **attributes: str) -> Prompt:
    """Return a prompt for the picture with this name, which is the first of its names."""
    return Prompt(tuple(picture for picture in pictures() if picture.name == name), **attributes)


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a mahjong", said_of("mahjong red dragon")),  # the other name of that picture
        ("red apple", said_of("red apple")),
        ("a small flat red apple at the bottom of a purple background",
         said_of("red apple", style="flat", size="small", place="bottom", background="purple")),
        ("small airplane", said_of("small airplane")),
        ("a large small airplane on the left, 3d style",
         said_of("small airplane", style="3d", size="large", place="left")),
        ("a noto ghost and a noto red apple", None),
        ("a red apple, cartoon style", None),
        ("a red apple on a wooden background", None),
    ],
)  # fmt: skip
def test_captions_are_read(caption: str, said: Prompt | None) -> None:
    assert clip_report.told(caption) == said


def test_each_caption_of_the_recipe_is_read_as_it_was_made() -> None:
    """485 random compositions: what their captions say is what their makers named."""
    rng = Random(0)
    for picture in pictures()[::2]:
        made = one(picture, rng.choice(STYLES), rng)
        found = clip_report.told(made.caption)
        assert found is not None, made.caption
        assert found.pictures == (picture,)
        assert found.style == (made.style if re.search(rf"\b{made.style}\b", made.caption) else "")
        assert found.background == (made.background if "background" in made.caption else "")
        if found.size:
            assert made.parts[0].extent == SIZES[found.size]
        assert bool(found.place) == any(f" {words}" in made.caption for words in PLACES.values())


def test_a_caption_becomes_one_of_the_name_and_one_of_another_attribute() -> None:
    """In 400 draws: the first names the picture, mostly nothing else; the second is whole, or says one attribute."""
    caption, rng = "a small flat shooting star at the bottom of a purple background", Random(0)
    drawn = [clip.restated(caption, rng, alone=True) for _ in range(400)]
    firsts = [clip_report.told(first) for first, _ in drawn]
    assert {one.pictures[0].name for one in firsts if one is not None} == {"shooting star"}
    for attribute in clip_report.ANSWERS:
        kept = sum(getattr(one, attribute) != "" for one in firsts) / 400
        assert kept == pytest.approx(clip.KEPT, abs=0.07)
    alone = {
        "a picture at the bottom": 4 / 8, "a flat picture": 2 / 8, "a small picture": 1 / 8,
        "a picture on a purple background": 1 / 8,
    }  # fmt: skip
    seconds = [second for _, second in drawn]
    assert {*seconds} == {caption, *alone}
    assert seconds.count(caption) / 400 == pytest.approx(1 - clip.ALONE, abs=0.08)
    for said, share in alone.items():
        assert seconds.count(said) / 400 == pytest.approx(clip.ALONE * share, abs=0.07)


def test_both_captions_of_a_plain_image_name_it() -> None:
    rng = Random(0)
    drawn = [clip.restated("a large flat red apple on a blue background", rng, alone=False) for _ in range(100)]
    found = [clip_report.told(caption) for both in drawn for caption in both]
    assert {one.pictures[0].name for one in found if one is not None} == {"red apple"}
    assert None not in found
    assert len({first == second for first, second in drawn}) == 2


@pytest.mark.parametrize("caption", ["a red disc", "a noto ghost and a noto red apple"])
def test_other_captions_stay(caption: str) -> None:
    for alone in (False, True):
        assert {clip.restated(caption, Random(seed), alone=alone) for seed in range(20)} == {(caption, caption)}


def test_a_caption_of_the_name_alone_keeps_its_name() -> None:
    said = {clip.restated("a mahjong red dragon", Random(seed), alone=True) for seed in range(20)}
    assert said == {(first, "a mahjong red dragon") for first in ("a mahjong", "a mahjong red dragon")}


def test_shares_are_counted_by_hand() -> None:
    """Four images, three answers each. The first two are right; the others' own answers are second and last."""
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.3], [0.7, 0.6, 0.1], [0.1, 0.5, 0.9]])
    found = clip_report._share(scores, [0, 1, 1, 0])
    assert (found.right, found.right5, found.images) == (0.5, 1.0, 4)
    assert found.chance == pytest.approx(1 / 3)
    rivals = clip_report._share(torch.arange(12.0).expand(2, 12), [6, 7])  # the nearest are 11, 10, 9, 8, 7
    assert (rivals.right, rivals.right5, rivals.chance) == (0, 0.5, 1 / 12)


def test_a_folder_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of five images, one has two things, and two name their size, one of them in its held-out style; a CLIP of random
    weights fills the table."""
    said = [
        "a red apple on a blue background", "a small cat, 3d style", "a large twemoji ghost on the left",
        "rocket at the top of a red background", "a cat and a rocket",
    ]  # fmt: skip
    for i, text in enumerate(said):
        Image.new("RGB", (32, 32), (40 * i, 99, 20)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    found = clip_report.measure(str(tiny_clip.save_clip(tmp_path / "clip")), tmp_path)
    counts = {
        "name, of pairs in training": 1, "name, of held-out pairs": 1, "style": 2, "background": 2, "size": 2,
        "place": 2,
    }  # fmt: skip
    assert {name: one.images for name, one in found.items()} == counts
    assert [one.chance for one in found.values()] == pytest.approx([1 / 970, 1 / 970, 1 / 4, 1 / 12, 1 / 2, 1 / 4])
    assert clip_report.table(found).count("\n") == 7
    (tmp_path / "other").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "other" / "a.png")
    one_sentence(lambda: clip_report.measure("none", tmp_path / "other"), DataError, "has a caption of one emoji")
