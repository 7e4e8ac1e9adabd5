"""The recipe's data: the table of pictures, the composed images, and the held-out pairs."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import nbformat
import numpy as np
import pytest
from PIL import Image

from sdkit.cli import demo
from sdkit.errors import DataError, SdkitError
from sdkit.recipes.emoji import pictures as table
from sdkit.recipes.emoji import prepare as module
from sdkit.recipes.emoji.clip_report import told
from sdkit.recipes.emoji.compositions import Composition, companions, described
from sdkit.recipes.emoji.drawings import VECTORS, Drawings
from sdkit.recipes.emoji.pictures import (
    BACKGROUNDS,
    SIDE,
    SIZE,
    Picture,
    composed,
    pictures,
    used,
    with_article,
)
from sdkit.recipes.emoji.prepare import prepare_tiles
from tests.helpers.emoji_pictures import COLOUR, FEW, make_drawings, make_drawn, make_photographs


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    return make_drawn(tmp_path / "assets")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    return make_photographs(tmp_path / "photographs")


@pytest.fixture
def drawings(tmp_path: Path) -> Drawings:
    """Make pictures in all styles; vector graphics need resvg-py, which is in the extra `recipes`."""
    pytest.importorskip("resvg_py")
    return make_drawings(tmp_path / "packages")


@pytest.fixture
def data(drawings: Drawings, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the VAE's data sets of the first pictures."""
    monkeypatch.setattr(module, "pictures", lambda: FEW)
    monkeypatch.setattr(
        module,
        "TILES",
        {"tiles": module.Tiles(64, 20, 0.5, 0.0), "fine_tiles": module.Tiles(SIZE, 12, 0.3, 0.6)},
    )
    prepare_tiles(drawings, photographs, tmp_path / "data")
    return tmp_path / "data"


def rows(folder: Path) -> dict[str, str]:
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    return {row["file_name"]: row["text"] for row in map(json.loads, lines)}


def test_the_table() -> None:
    """Names must be unique, and every background be held out equally often."""
    assert 900 <= len(pictures()) <= 1000
    names = [name for one in pictures() for name in one.names]
    assert len(names) == len(set(names))
    assert all(name == name.strip().lower() for name in names)
    assert len({one.file for one in pictures()}) == len(pictures())
    counts = Counter(one.held_out for one in pictures())
    assert counts.keys() == BACKGROUNDS.keys() - {"white"}
    assert max(counts.values()) - min(counts.values()) <= 1


def test_backgrounds_are_far_apart() -> None:
    colours = np.array(list(BACKGROUNDS.values()), dtype=float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e9 * np.eye(len(colours))
    assert distances.min() > 60


@pytest.mark.parametrize(
    ("name", "background", "text"),
    [
        ("red apple", "blue", "a red apple on a blue background"),
        ("avocado", "orange", "an avocado on an orange background"),
        ("grapes", "white", "grapes on a white background"),
        ("compass", "gray", "a compass on a gray background"),
        ("octopus", "black", "an octopus on a black background"),
        ("face with rolling eyes", "pink", "a face with rolling eyes on a pink background"),
        ("unicorn", "blue", "a unicorn on a blue background"),
        ("one-piece swimsuit", "red", "a one-piece swimsuit on a red background"),
        ("hourglass", "green", "an hourglass on a green background"),
        ("x-ray", "white", "an x-ray on a white background"),
    ],
)
def test_captions(name: str, background: str, text: str) -> None:
    assert described([name], background=background) == text
    assert described([name], background=background, article=False) == text.removeprefix("a ").removeprefix("an ")
    assert text.startswith(with_article(name))


def prompts_written_out() -> list[str]:
    """Collect the prompts in README's commands for the embedded model and in notebooks 2, 6, and 7, except four new
    words and two negative prompts.
    """
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text(encoding="utf-8")
    found = re.findall(r'^sdkit generate "([^"]+)"(?!.*--model)', readme, re.MULTILINE)
    for path in (root / "notebooks").glob("0[267]*[!h].ipynb"):
        code = "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code")
        found += re.findall(r'"(an? [^"{]+)"', code)
    others = ("a zork", "a blick", "a frum", "a dwop", "a white background", "a red mushroom")
    return [prompt for prompt in found if prompt not in others]


def test_prompts_that_are_shown_are_captions_that_were_learned() -> None:
    shown = [*demo.SEEDED, *demo.DIFFERENT, demo.SKETCHED, demo.PAIR, demo.CHANGED, *prompts_written_out()]
    assert len(shown) > 20
    for prompt in shown:
        alone = told(prompt)
        for asked in (alone,) if alone else map(told, prompt.split(" and ")):
            assert asked, prompt
            (picture,) = asked.pictures
            assert not asked.style or asked.style in picture.styles, prompt
            assert not asked.background or asked.background in picture.backgrounds, prompt


def test_composed_in_the_middle() -> None:
    """A picture must be fully visible with its colours unchanged. Its edges must be blended with the background, not
    with black.
    """
    picture = Image.new("RGBA", (256, 256), (*COLOUR, 255))
    pixels = np.asarray(composed(picture, (255, 255, 255)))
    assert pixels.shape == (SIZE, SIZE, 3)
    edge = (SIZE - SIDE) // 2
    assert (pixels[:edge] == 255).all()
    assert (pixels[edge:-edge, edge:-edge] == COLOUR).all()
    clear = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    clear.paste((*COLOUR, 255), (0, 0, 101, 256))
    pixels = np.asarray(composed(clear, (255, 255, 255))).astype(int)
    # Lanczos overshoots; a dark rim would be lower still
    assert (pixels.min(axis=(0, 1)) >= np.array(COLOUR) - 12).all()


def test_composed_at_a_corner() -> None:
    picture = Image.new("RGBA", (8, 8), (*COLOUR, 255))
    pixels = np.asarray(composed(picture, (0, 0, 0), size=64, side=40, corner=(-10, 50)))
    assert (pixels[50:, :30] == COLOUR).all()
    assert not pixels[:50].any()
    assert not pixels[:, 30:].any()


def test_what_is_used(drawn: Path, tmp_path: Path) -> None:
    assert used(drawn) == sorted([*(one.file for one in FEW), "1f468"])
    with pytest.raises(DataError, match=r"is not assets/ of the unpacked npm package"):
        used(tmp_path)


def test_what_is_not_used(tmp_path: Path) -> None:
    """Skin tones, letters and tags of flags, and keycaps are not used, wherever they are in a name. Their neighbours in
    Unicode are.
    """
    ranges = [(0x1F3FB, 0x1F3FF), (0x1F1E6, 0x1F1FF), (0x20E3, 0x20E3), (0xE0000, 0xE00FF)]
    ends = [*range(0x1F3FB, 0x1F400), *(point for ends in ranges for point in ends)]
    beside = [point for first, last in ranges for point in (first - 1, last + 1)]
    for point in (*ends, *beside):
        for stem in (f"{point:x}", f"{point:x}-200d", f"1f468-200d_{point:x}_1f468"):
            (tmp_path / f"{stem}.webp").touch()
    (tmp_path / "1f468.png").touch()
    assert {stem.partition("-")[0] for stem in used(tmp_path)} == {"1f468", *(f"{point:x}" for point in beside)}
    assert len(used(tmp_path)) == 3 * len(beside)
    (tmp_path / "logo.webp").touch()
    with pytest.raises(DataError, match=r"\.webp files with numbers for names"):
        used(tmp_path)


def test_held_out_images_show_the_held_out_pairs(data: Path) -> None:
    """Every picture is on its held-out background, and in its held-out style if it has one."""
    held_out = rows(data / "held_out")
    assert len(held_out) == len(FEW)
    for number, (one, name) in enumerate(zip(FEW, held_out, strict=True)):
        plan = module._held_out_plan(number)
        assert plan.background == one.held_out
        assert plan.style == (one.held_out_style or plan.style)
        assert plan.caption == held_out[name]
        with Image.open(data / "held_out" / name) as image:
            assert image.size == (SIZE, SIZE)
            assert image.getpixel((0, 0)) == BACKGROUNDS[one.held_out]


def test_every_held_out_pair_is_planned() -> None:
    """Whether the caption names the background or not."""
    plans = [module._held_out_plan(number) for number in range(len(pictures()))]
    assert [plan.background for plan in plans] == [one.held_out for one in pictures()]
    assert all(plan.style == (one.held_out_style or plan.style) for plan, one in zip(plans, pictures(), strict=True))
    assert 0.5 < sum("background" in plan.caption for plan in plans) / len(plans) < 0.7


def test_tiles(data: Path) -> None:
    """Some tiles are of photographs, and the others of pictures."""
    for name, (size, n, *_) in module.TILES.items():
        files = sorted((data / name).glob("*.png"))
        assert len(files) == n
        noisy = 0
        for file in files:
            with Image.open(file) as image:
                assert image.size == (size, size)
                noisy += len(image.getcolors(1 << 16) or []) > size * size // 2
        assert 0 < noisy < n


def test_tiles_keep_out_what_is_held_out(drawn: Path) -> None:
    one = FEW[0]
    colours = set()
    for seed in range(300):
        tile = module._drawn_tile(64, drawn, [one.file], Random(seed))
        colours |= {colour for _, colour in tile.getcolors(1 << 16)}
    assert set(BACKGROUNDS.values()) - colours == {BACKGROUNDS[one.held_out]}


def is_share(part: int, of: int, share: float) -> bool:
    """Return whether a count is within four standard deviations of the binomial distribution."""
    return abs(part - of * share) <= 4 * math.sqrt(of * share * (1 - share))


@pytest.mark.parametrize("name", module.TILES)
def test_how_many_tiles_there_are_of_each_kind(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, n = module.TILES[name], 4000
    monkeypatch.setattr(module, "_photo_tile", lambda *_: "photograph")
    monkeypatch.setattr(module, "_drawn_tile", lambda *_: "other")
    monkeypatch.setattr(Composition, "drawn", lambda *_: Image.new("1", (SIZE, SIZE)))
    beside, drawings = companions(pictures()), Drawings(Path(), Path())
    made = [module._tile(name, drawings, [], [], beside, number)[0][1] for number in range(n)]
    kinds = Counter(tile if isinstance(tile, str) else "captioned" for tile in made)
    assert is_share(kinds["photograph"], n, tiles.photographs)
    assert is_share(kinds["captioned"], n, tiles.captioned)
    assert is_share(kinds["other"], n, 1 - tiles.photographs - tiles.captioned)


@pytest.mark.parametrize("size", [64, SIZE])
def test_captioned_tiles(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are cut from anywhere in compositions of every picture, in all styles and on all backgrounds except the
    held-out ones.
    """
    places = np.zeros((SIZE, SIZE, 3), np.uint8)
    places[..., 0], places[..., 1] = np.arange(SIZE), np.arange(SIZE)[:, None]
    seen = []
    monkeypatch.setattr(module, "pictures", lambda: FEW)
    monkeypatch.setattr(module, "TILES", {"tiles": module.Tiles(size, 0, 0.0, 1.0)})
    monkeypatch.setattr(Composition, "drawn", lambda self, drawings: seen.append(self) or Image.fromarray(places))
    beside = companions(FEW)
    tiles = [np.asarray(module._tile("tiles", None, [], [], beside, number)[0][1]) for number in range(1500)]
    shown = {(part.picture, one.background, one.style) for one in seen for part in one.parts}
    assert {(picture, background) for picture, background, _ in shown} == {
        (one, background) for one in FEW for background in one.backgrounds
    }
    assert {(picture, style) for picture, _, style in shown} == {(one, style) for one in FEW for style in one.styles}
    lefts, tops = ({int(tile[0, 0, axis]) for tile in tiles} for axis in (0, 1))
    assert lefts == tops == {*range(SIZE - size + 1)}
    for tile in tiles:
        left, top, _ = tile[0, 0].astype(int)
        assert np.array_equal(tile, places[top : top + size, left : left + size])
        assert tile.shape == (size, size, 3)


@pytest.mark.parametrize(("size", "share"), [(64, 0.0), (SIZE, module.AS_CAPTIONED)])
def test_other_tiles_as_captioned(size: int, share: float, drawn: Path) -> None:
    """The share AS_CAPTIONED of the large tiles equals the captioned image on the same background, and none of the
    small tiles.
    """
    picture = table.read(drawn, FEW[0].file)
    tiles = [module._drawn_tile(size, drawn, [FEW[0].file], Random(seed)) for seed in range(300)]
    assert is_share(sum(tile == composed(picture, tile.getpixel((0, 0))) for tile in tiles), 300, share)


def test_tiles_are_made_alike_again(data: Path, drawings: Drawings, photographs: Path) -> None:
    photos, beside = module._photos(photographs), companions(FEW)
    for number in range(6):
        made = module._tile("tiles", drawings, used(drawings.solid), photos, beside, number)
        with Image.open(data / "tiles" / made[0][0]) as image:
            assert np.array_equal(np.asarray(image), np.asarray(made[0][1]))


def test_what_is_made_is_not_made_again(data: Path, drawings: Drawings, photographs: Path) -> None:
    """A missing set is made again. Sets that exist are not, even if their source files moved or have another time."""
    file = data / "tiles" / "00000.png"
    before = file.stat().st_mtime_ns
    shutil.rmtree(data / "held_out")
    (drawings.solid / "1f468.webp").touch()
    moved = replace(drawings, solid=drawings.solid.rename(data.parent / "moved"))
    prepare_tiles(moved, photographs.rename(data.parent / "moved too"), data)
    assert file.stat().st_mtime_ns == before
    assert len(rows(data / "held_out")) == len(list((data / "held_out").glob("*.png"))) == len(FEW)


def test_only_the_named_tiles_are_made(
    drawings: Drawings, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pictures", lambda: FEW)
    monkeypatch.setattr(module, "TILES", dict.fromkeys(("one", "other"), module.Tiles(64, 2, 0.0, 1.0)))
    prepare_tiles(drawings, photographs, tmp_path / "data", ["other"])
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"other", "held_out"}


def test_another_way_makes_all_of_a_set_anew(
    data: Path, drawings: Drawings, photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file of the earlier set may remain, because training would take it for one of its own."""
    file = data / "fine_tiles" / next(iter(rows(data / "fine_tiles")))
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(module, "TILES", {**module.TILES, "tiles": module.Tiles(64, 3, 0.5, 0.0)})
    prepare_tiles(drawings, photographs, data, ["tiles", "fine_tiles"])
    assert len(list((data / "tiles").glob("*.png"))) == 3
    assert file.stat().st_mtime_ns == before


@pytest.fixture
def remade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], set[str]]:
    """Return a function that calls `prepare_tiles` again, and returns the sets that are new. All sets are empty."""
    files = [f"vectors/{package}/{name}.json" for package in VECTORS.values() for name in ("icons", "chars")]
    files += [f"assets/{stem}.webp" for stem in ("1f468", "1f469", "1f1e6-1f1e8")]
    for file in (*files, "photographs/Dune.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setattr(module, "pictures", lambda: FEW)
    monkeypatch.setattr(module, "_photos", lambda folder: sorted(folder.iterdir()))
    for make in ("_tile", "_captioned"):
        monkeypatch.setattr(module, make, lambda *_: [])
    tiles = {"tiles": module.Tiles(64, 1, 0.5, 0.5), "others": module.Tiles(64, 1, 0.5, 0.5)}
    monkeypatch.setattr(module, "TILES", tiles)

    def again() -> set[str]:
        sets = [*(tmp_path / "data").glob("*")]
        for folder in sets:
            (folder / "mark").touch()
        drawings = Drawings(tmp_path / "assets", tmp_path / "vectors")
        prepare_tiles(drawings, tmp_path / "photographs", tmp_path / "data", tiles)
        return {folder.name for folder in sets if not (folder / "mark").exists()}

    again()
    assert again() == set()
    return again


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SIZE", 129),
        ("BACKGROUNDS", {**BACKGROUNDS, "white": (254, 254, 254)}),
        ("pictures", lambda: FEW[:-1]),
        *(
            ("pictures", lambda field=field, value=value: [replace(FEW[0], **{field: value}), *FEW[1:]])
            for field, value in (("file", "1f8ff"), ("name", "another"), ("held_out", "pink"), ("mirrored", ""))
        ),
    ],
)
def test_another_way_makes_all_sets_anew(
    name: str, value: object, remade: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    assert remade() == {"tiles", "others", "held_out"}


@pytest.mark.parametrize(
    ("name", "value"), [("AS_CAPTIONED", 0.6), ("FLAT", 21), ("PHOTO_HEIGHT", 1601), ("SIDE", 111), ("TWO", 0.5)]
)
def test_another_way_makes_tiles_anew(
    name: str, value: object, remade: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, value)
    assert remade() == {"tiles", "others"}


@pytest.mark.parametrize(("field", "value"), [("size", 63), ("number", 2), ("photographs", 0.4), ("captioned", 0.4)])
def test_other_tiles_make_their_set_anew(
    field: str, value: float, remade: Callable[[], set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.TILES, "tiles", module.TILES["tiles"]._replace(**{field: value}))
    assert remade() == {"tiles"}


@pytest.mark.parametrize(("file", "name"), [("assets/1f468.webp", "1f46a.webp"), ("photographs/Dune.jpg", "Sea.jpg")])
def test_other_files_make_all_sets_anew(file: str, name: str, remade: Callable[[], set[str]], tmp_path: Path) -> None:
    """Files with another size or name count. Files that are not used do not."""
    everything = {"tiles", "others", "held_out"}
    (tmp_path / file).write_bytes(b"longer")
    assert remade() == everything
    (tmp_path / file).rename((tmp_path / file).with_name(name))
    assert remade() == everything
    (tmp_path / "assets/1f1e6-1f1e8.webp").write_bytes(b"longer")
    assert remade() == set()


def test_sets_of_tiles_do_not_repeat_one_another(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILES", dict.fromkeys(("one", "other"), module.Tiles(64, 1, 1.0, 0.0)))
    one, other = (module._tile(name, None, [], module._photos(photographs), {}, 0)[0][1] for name in ("one", "other"))
    assert one.tobytes() != other.tobytes()


def test_a_damaged_photograph_leaves_nothing_half_made(drawings: Drawings, photographs: Path, tmp_path: Path) -> None:
    for path in photographs.rglob("*.jpg"):
        path.write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SdkitError, match=r"\.jpg is not an image"):
        prepare_tiles(drawings, photographs, tmp_path / "data")
    assert not [*(tmp_path / "data").iterdir()]


@pytest.mark.parametrize(
    ("size", "sentence"), [((300, 320), "next to nothing but plain areas"), ((100, 100), "is too small, 100 x 100")]
)
def test_photographs_that_are_none(
    size: tuple[int, int], sentence: str, data: Path, drawings: Drawings, photographs: Path
) -> None:
    module._photo.cache_clear()
    for path in photographs.rglob("*.jpg"):
        Image.new("RGB", size).save(path)
    with pytest.raises(DataError, match=sentence):
        prepare_tiles(drawings, photographs, data)


def test_a_folder_of_the_users_own_is_left_alone(data: Path, drawings: Drawings, photographs: Path) -> None:
    (data / "fine_tiles" / module.MADE_OF).unlink()
    with pytest.raises(DataError, match=r"fine_tiles is there already, and not of this recipe"):
        prepare_tiles(drawings, photographs, data)
    assert rows(data / "fine_tiles")


def test_missing_photographs_are_named(drawings: Drawings, photographs: Path, tmp_path: Path) -> None:
    (photographs / "Dune.jpg").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the \d+ photographs, Dune\.jpg first"):
        prepare_tiles(drawings, photographs, tmp_path / "data")


def test_a_damaged_picture_is_named(drawn: Path) -> None:
    (drawn / f"{FEW[0].file}.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=rf"{FEW[0].file}\.webp cannot be read"):
        table.read(drawn, FEW[0].file)


def test_a_picture_says_its_names() -> None:
    assert Picture("1f34e", "red apple", "apple", "blue").names == ["red apple", "apple"]
    assert Picture("1f34c", "banana", "", "blue").names == ["banana"]
