"""Compositions: captions, held-out pairs, sizes, places, mirror images, and two pictures side by side."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from sdkit import images as image_io
from sdkit.data import open_examples
from sdkit.errors import DataError
from sdkit.recipes.emoji import prepare as module
from sdkit.recipes.emoji.compositions import (
    MARGIN,
    PLACES,
    SIZES,
    STRIDE,
    Composition,
    Part,
    all_pairs,
    companions,
    described,
    may_be_beside,
    one,
    two,
)
from sdkit.recipes.emoji.drawings import PIXELS, VECTORS, Drawings, _json, _rendered
from sdkit.recipes.emoji.pictures import BACKGROUNDS, SIZE, STYLES, TABLE, Picture, pictures, with_article
from sdkit.recipes.emoji.prepare import CAPTIONED, prepare_captioned
from sdkit.recipes.emoji.settings import settings
from sdkit.recipes.emoji.start import LENGTH, VOCABULARY
from sdkit.training.learned_tokenizer import learn_tokenizer
from tests.helpers.emoji_pictures import COLOURS, FEW, make_drawings

CAT = Picture("1f408", "cat", "kitty", "gray")
APPLE = Picture("1f34e", "red apple", "apple", "blue")


@pytest.fixture
def drawings(tmp_path: Path) -> Drawings:
    """Make pictures in all styles; vector graphics need resvg-py, which is in the extra `recipes`."""
    pytest.importorskip("resvg_py")
    return make_drawings(tmp_path)


@cache
def planned(name: str) -> tuple[Composition, ...]:
    return made(name)


def made(name: str) -> tuple[Composition, ...]:
    beside = companions(pictures())
    plans = [module._plan(name, picture, style, beside) for picture, style in all_pairs(pictures())]
    return tuple(composition for plan in plans for composition in plan)


def test_the_table_holds_out_a_tenth_of_the_pairs_by_a_seeded_rule() -> None:
    """Of 970 pictures, 4 x 97 have a held-out style, in turns in the order of a seeded sample."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    chosen = Random(20).sample(range(len(rows)), 4 * (len(rows) // 10))
    expected = {number: STYLES[k % 4] for k, number in enumerate(chosen)}
    assert [row["held-out style"] for row in rows] == [expected.get(number, "") for number in range(len(rows))]
    counts = Counter(one.held_out_style for one in pictures() if one.held_out_style)
    assert counts == dict.fromkeys(STYLES, 97)
    assert sum(counts.values()) == len(pictures()) * len(STYLES) // 10
    assert len(all_pairs(pictures())) == len(pictures()) * len(STYLES) - sum(counts.values())


@pytest.mark.parametrize("name", CAPTIONED)
def test_no_training_image_shows_a_held_out_pair(name: str) -> None:
    """Neither a held-out style nor a held-out background may be shown, alone or beside another picture. All other pairs
    of picture and style are.
    """
    seen = set()
    for composition in planned(name):
        for part in composition.parts:
            assert composition.style != part.picture.held_out_style
            assert composition.background != part.picture.held_out
            seen.add((part.picture, composition.style))
    assert seen == set(all_pairs(pictures()))


def test_captions_say_what_the_images_show() -> None:
    """Each word of a caption is read back by a grammar of its own here, and compared with the composition."""
    styles, backgrounds = "|".join(STYLES), "|".join(BACKGROUNDS)
    words = rf"(?:(?P<a{{0}}>an?) )?(?:(?P<size{{0}}>small|large) )?(?:(?P<style{{0}}>{styles}) )?(?P<name{{0}}>{{1}})"
    place = r"(?: (?P<place>on the left|on the right|at the top|at the bottom))?"
    ground = rf"(?: (?:on|of) an? (?P<ground>{backgrounds}) background)?(?:, (?P<suffix>{styles}) style)?"
    open_at = Counter[str]()
    n = 0
    for composition in planned("captioned"):
        n += 1
        names = ["|".join(map(re.escape, part.picture.names)) for part in composition.parts]
        things = " and ".join(words.format(k, name) for k, name in enumerate(names))
        match = re.fullmatch(things + (place if len(names) == 1 else "") + ground, composition.caption)
        assert match, composition.caption
        said = match.groupdict()
        for k in range(len(composition.parts)):
            assert said[f"style{k}"] in (None, composition.style)
            assert said[f"size{k}"] is None or len(composition.parts) == 1
        said.setdefault("place", None)
        assert said["suffix"] in (None, composition.style)
        assert not (said["suffix"] and said["style0"])
        assert said["ground"] in (None, composition.background)
        open_at["style"] += not (said["suffix"] or said["style0"])
        open_at["ground"] += not said["ground"]
        if len(composition.parts) == 1:
            (part,) = composition.parts
            if said["size0"]:
                assert part.extent == SIZES[said["size0"]]
            if said["place"]:
                axis = "across" if said["place"].split()[-1] in ("left", "right") else "down"
                near = getattr(part, axis)
                assert near <= 0.12 if said["place"].split()[-1] in ("left", "top") else near >= 0.88
                assert 0.4 <= getattr(part, "down" if axis == "across" else "across") <= 0.6
                assert part.extent == SIZES["small"]
            open_at["alone"] += 1
            open_at["size"] += not said["size0"]
            open_at["place"] += not said["place"]
    for key, share, of in (
        ("style", 0.3, n), ("ground", 0.3, n), ("size", 0.6, open_at["alone"]),
        ("place", 1 - 0.25 * 0.8, open_at["alone"]),
    ):  # fmt: skip
        assert abs(open_at[key] - of * share) <= 4 * math.sqrt(of * share * (1 - share)), key


def test_two_pictures_have_short_names_and_differ() -> None:
    pairs = [composition for composition in planned("captioned") if len(composition.parts) == 2]
    total = module.CAPTIONED["captioned"] * len(all_pairs(pictures()))
    eligible = sum(may_be_beside(picture) for picture, _ in all_pairs(pictures())) * module.CAPTIONED["captioned"]
    assert abs(len(pairs) - 0.12 * eligible) <= 4 * math.sqrt(eligible * 0.12 * 0.88)
    assert 0.08 < len(pairs) / total < 0.13
    for composition in pairs:
        left, right = (part.picture for part in composition.parts)
        assert left != right
        assert composition.caption.count(" and ") == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"names": ["cat"]}, "a cat"),
        ({"names": ["cat"], "article": False}, "cat"),
        ({"names": ["apple"], "size": "small", "style": "flat"}, "a small flat apple"),
        ({"names": ["apple"], "style": "flat", "suffix": True}, "an apple, flat style"),
        ({"names": ["grapes"], "size": "large", "background": "orange"}, "large grapes on an orange background"),
        ({"names": ["cat"], "place": "left"}, "a cat on the left"),
        (
            {"names": ["cat"], "place": "top", "background": "blue", "style": "noto", "suffix": True},
            "a cat at the top of a blue background, noto style",
        ),
        (
            {"names": ["cat", "owl"], "style": "3d", "background": "red"},
            "a 3d cat and a 3d owl on a red background",
        ),
        ({"names": ["cat", "owl"], "article": False}, "cat and an owl"),
    ],
)
def test_captions(arguments: dict[str, object], text: str) -> None:
    assert described(**arguments) == text  # type: ignore[arg-type]


def test_what_must_not_be_mirrored_is_not() -> None:
    """The table excludes what has letters, digits, a clock face, or a side that matters. Half of the rest is."""
    excluded = {one.name for one in pictures() if one.mirrored}
    assert {one.mirrored for one in pictures()} == {"", "no"}
    assert excluded > {"alarm clock", "watch", "stop sign", "1st place medal", "taxi", "chart increasing", "newspaper"}
    assert excluded > {"musical note", "world map", "keyboard", "waxing crescent moon", "pool 8 ball", "ambulance"}
    assert not excluded & {"cat", "rocket", "red apple", "guitar", "penguin", "bicycle"}
    counts = defaultdict[bool, Counter[bool]](Counter)
    for composition in planned("captioned"):
        for part in composition.parts:
            counts[part.picture.mirrored == "no"][part.mirrored] += 1
    assert not counts[True][True]
    n = counts[False].total()
    assert abs(counts[False][True] - n / 2) <= 2 * math.sqrt(n)


def test_compositions_are_the_same_each_time_and_differ_between_sets() -> None:
    first, other = planned("captioned"), planned("plain")
    assert first == made("captioned")
    assert not {*first} & {*other}
    # A picture's compositions do not depend on its place in the table, nor on the styles of other pictures.
    beside, n = companions(pictures()), module.CAPTIONED["captioned"]
    picture, style = all_pairs(pictures())[40]
    assert module._plan("captioned", picture, style, beside) == [*first[40 * n : 41 * n]]


def test_plain_compositions_leave_nothing_open() -> None:
    for composition in planned("plain"):
        (part,) = composition.parts
        assert (part.extent, part.across, part.down, part.mirrored) == (SIZES["large"], 0.5, 0.5, False)
        thing, ground = f"large {composition.style} {part.picture.name}", with_article(composition.background)
        assert composition.caption == f"{with_article(thing)} on {ground} background"
        assert composition.background in part.picture.backgrounds


def test_captions_fit_the_text_encoder() -> None:
    captions = [composition.caption for composition in planned("captioned")]
    tokenizer = learn_tokenizer(captions, VOCABULARY, LENGTH)
    cut = [caption for caption in captions if len(tokenizer(caption).input_ids) > LENGTH]
    assert len(cut) <= 3, cut
    for word in ("flat", "noto", "twemoji", "small", "large", "left", "background"):
        assert len(tokenizer.tokenize(word)) == 1, word


def test_the_sheet_s_prompts_are_captions_of_the_recipe() -> None:
    """Each prompt of the validation sheet follows the grammar, with names from the table; some are held out."""
    names = {name for one in pictures() for name in one.names}
    prompts = settings("unet-1")["validation_prompts"]
    assert len(prompts) == 64
    held_out = Counter[str]()
    by_name = {name: one for one in pictures() for name in one.names}
    for prompt in prompts:
        text, _, suffix = prompt.partition(", ")
        match = re.fullmatch(
            r"(.*?)(?: (?:on|at) the (?:left|right|top|bottom))?(?: (?:on|of) an? (\w+) background)?", text
        )
        assert match
        assert match[2] is None or match[2] in BACKGROUNDS
        for thing in match[1].split(" and "):
            style = next((style for style in STYLES if f"{style} " in f"{thing} {suffix}"), None)
            name = re.sub(r"^(an? )?((small|large) )?((3d|flat|noto|twemoji) )?", "", thing)
            assert name in names, prompt
            held_out["style"] += style is not None and by_name[name].held_out_style == style
            held_out["background"] += by_name[name].held_out == match[2]
    assert held_out["style"] >= 6
    assert held_out["background"] >= 4


def part(**changes: object) -> Part:
    values = {"picture": FEW[0], "extent": 60, "across": 0.5, "down": 0.5, "mirrored": False}
    return Part(**{**values, **changes})  # type: ignore[arg-type]


def box_of(image: Image.Image, background: str) -> tuple[int, int, int, int]:
    """Return the bounding box of what differs from the background."""
    other = np.abs(np.asarray(image).astype(int) - BACKGROUNDS[background]).max(-1) > 25
    rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("place", "box"),
    [
        ((0, 0), (16, 16, 76, 76)),
        ((1, 1), (64, 64, 124, 124)),
        ((0.5, 0), (32, 16, 92, 76)),
        ((0, 0.5), (16, 32, 76, 92)),
    ],
)
def test_where_a_picture_is_drawn(
    style: str, place: tuple[float, float], box: tuple[int, int, int, int], drawings: Drawings
) -> None:
    """A disc without its empty edges fills a square of the extent, strides of 16 pixels from the middle."""
    composition = Composition(
        parts=(part(across=place[0], down=place[1]),), style=style, background="white", caption=""
    )
    found = box_of(composition.drawn(drawings), "white")
    assert np.abs(np.subtract(found, box)).max() <= 1


@pytest.mark.parametrize("style", STYLES)
def test_every_style_has_its_own_picture(style: str, drawings: Drawings) -> None:
    image = Composition(parts=(part(),), style=style, background="white", caption="").drawn(drawings)
    assert image.size == (SIZE, SIZE)
    assert image.mode == "RGB"
    assert np.abs(np.subtract(image.getpixel((75, 64)), COLOURS[style])).max() <= 2
    assert image.getpixel((0, 0)) == BACKGROUNDS["white"]


def test_mirror_images(drawings: Drawings) -> None:
    """The stand-ins' left halves are darker."""
    for mirrored in (False, True):
        one = Composition(parts=(part(mirrored=mirrored),), style="flat", background="white", caption="")
        left, right = (sum(one.drawn(drawings).getpixel((x, 64))) for x in (50, 78))
        assert (left > right) == mirrored


def test_two_pictures_side_by_side(drawings: Drawings) -> None:
    """Each picture is in its half of the image."""
    for seed in range(20):
        composition = two([FEW[0], FEW[1]], "flat", Random(seed))
        left, top, right, bottom = box_of(composition.drawn(drawings), composition.background)
        assert MARGIN <= left < SIZE // 2 < right <= SIZE - MARGIN + STRIDE // 2
        assert MARGIN <= top < bottom <= SIZE - MARGIN + STRIDE // 2
        halves = [np.asarray(composition.drawn(drawings))[:, x : x + 2] for x in (0, SIZE // 2 - 1, SIZE - 2)]
        assert all((half == BACKGROUNDS[composition.background]).all() for half in halves)


def test_named_places_and_sizes_can_be_measured(drawings: Drawings) -> None:
    """The middle of what is drawn lies to the named side, further than to any other; "small" and "large" are apart."""
    extents = defaultdict[str, list[int]](list)
    for seed in range(300):
        composition = one(FEW[seed % len(FEW)], "flat", Random(seed), ["white"])
        left, top, right, bottom = box_of(composition.drawn(drawings), "white")
        dx, dy = (left + right) / 2 - SIZE / 2, (top + bottom) / 2 - SIZE / 2
        place = next((place for place, words in PLACES.items() if words in composition.caption), None)
        if place:
            towards = {"left": -dx, "right": dx, "top": -dy, "bottom": dy}
            assert max(towards, key=towards.__getitem__) == place
            assert towards[place] >= 12
        size = next((size for size in ("small", "large") if f"{size} " in composition.caption), "")
        extents[size].append(max(right - left, bottom - top))
    assert max(extents["small"]) < 55
    assert min(extents["large"]) > 95
    assert {round(extent, -1) for extent in extents[""]} == {50, 100}


def test_a_caption_has_many_images() -> None:
    """With everything left open, the same caption has images of all styles, backgrounds, sizes, and places."""
    images = [one(CAT, style, Random(f"{style} {seed}")) for style in STYLES for seed in range(500)]
    plain = [image for image in images if image.caption == "a cat"]
    assert len(plain) > 30
    assert {image.style for image in plain} == {*STYLES}
    assert {image.background for image in plain} == BACKGROUNDS.keys() - {"gray"}
    assert max(image.parts[0].extent for image in plain) - min(image.parts[0].extent for image in plain) > 50
    assert {image.parts[0].mirrored for image in plain} == {False, True}


def test_an_existing_name_is_as_frequent_as_planned() -> None:
    counts = Counter("kitty" in one(CAT, "flat", Random(seed)).caption for seed in range(2000))
    assert abs(counts[True] - 500) < 4 * math.sqrt(2000 * 0.25 * 0.75)


def test_sdkit_reads_the_captioned_sets(drawings: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders hold the planned images and captions, and a second call changes nothing."""
    monkeypatch.setattr(module, "pictures", lambda: FEW)
    monkeypatch.setattr(module, "CAPTIONED", {"plain": 2, "captioned": 3})
    out = tmp_path / "data"
    prepare_captioned(drawings, out)
    beside = companions(FEW)
    for name, n in module.CAPTIONED.items():
        examples = open_examples(out / name)
        plans = [module._plan(name, picture, style, beside) for picture, style in all_pairs(FEW)]
        assert [*examples.captions] == [composition.caption for plan in plans for composition in plan]
        assert len(examples) == n * len(all_pairs(FEW))
        assert np.array_equal(
            np.asarray(image_io.read(out / name / "0000-0.png")), np.asarray(plans[0][0].drawn(drawings))
        )
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    prepare_captioned(drawings, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SIZE_NAMED", 0.5), ("PLACE_NAMED", 0.5), ("STYLE_NAMED", 0.5), ("BACKGROUND_NAMED", 0.5), ("WHITE", 0.5),
        ("MARGIN", 5), ("GRID", 4), ("STRIDE", 8), ("LARGE", 0.3), ("BESIDE", 41),
    ],
)  # fmt: skip
def test_other_rules_make_the_captioned_sets_anew(
    name: str, value: object, drawings: Drawings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pictures", lambda: FEW)
    monkeypatch.setattr(module, "CAPTIONED", {"captioned": 20})
    monkeypatch.setattr(module, "TWO", 0.5)
    monkeypatch.setattr(module, "_captioned", lambda *_: [])
    prepare_captioned(drawings, tmp_path / "data")
    mark = tmp_path / "data" / "captioned" / "mark"
    mark.touch()
    prepare_captioned(drawings, tmp_path / "data")
    assert mark.exists()
    monkeypatch.setattr(module.compositions, name, value)
    prepare_captioned(drawings, tmp_path / "data")
    assert not mark.exists()


@pytest.fixture
def damaged(drawings: Drawings) -> Iterator[Callable[[str, str], None]]:
    """Return a function that overwrites a file of Noto's package. Nothing of it stays in the memory of other tests."""

    def overwrite(name: str, text: str) -> None:
        (drawings.vectors / VECTORS["noto"] / name).write_text(text)
        for known in (_json, _rendered):
            known.cache_clear()

    yield overwrite
    for known in (_json, _rendered):
        known.cache_clear()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("icons.json", "{", r"icons\.json cannot be read"),
        ("chars.json", "{}", "has no picture 1f004 that can be drawn"),
        ("icons.json", '{"icons": {}}', "has no picture 1f004 that can be drawn"),
        ("icons.json", '{"icons": {"mahjong-red-dragon": {"body": "<"}}}', "has no picture 1f004 that can be drawn"),
    ],
)
def test_damaged_vector_graphics(
    name: str, text: str, sentence: str, drawings: Drawings, damaged: Callable[[str, str], None]
) -> None:
    damaged(name, text)
    with pytest.raises(DataError, match=sentence):
        drawings.read(FEW[0].file, "noto")
    assert drawings.read(FEW[0].file, "flat").size == (PIXELS, PIXELS)


def test_vector_graphics_that_are_not_square(drawings: Drawings, damaged: Callable[[str, str], None]) -> None:
    """An icon may have a size of its own, as Twemoji's some have. It keeps its proportions, in the middle."""
    icon = {"body": '<path d="M0 0h36v18H0z" fill="#f00"/>', "width": 36, "height": 18}
    damaged("icons.json", json.dumps({"icons": {"mahjong-red-dragon": icon}, "width": 128, "height": 128}))
    assert drawings.read(FEW[0].file, "noto").getbbox() == (0, PIXELS // 4, PIXELS, PIXELS * 3 // 4)
    assert drawings.trimmed(FEW[0].file, "noto").size == (PIXELS, PIXELS // 2)


def test_missing_vector_graphics(drawings: Drawings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"icons\.json is not there; give the folder of the npm packages @iconify-json"):
        prepare_captioned(replace(drawings, vectors=tmp_path / "nowhere"), tmp_path / "data")
