"""The small pictures that the package carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdkit.errors import DataError
from sdkit.recipes.emoji import small as module
from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, composed, pictures
from sdkit.recipes.emoji.small import SIDE, small_pictures
from tests.helpers.sentences import one_sentence


def test_each_name_is_there_in_each_style() -> None:
    """No picture is empty, none fills less than 30 pixels of its longer side, and the edge stays free."""
    small = small_pictures()
    assert list(small) == [(picture.name, style) for picture in pictures() for style in STYLES]
    for key, picture in small.items():
        assert (picture.size, picture.mode) == ((SIDE, SIDE), "RGBA"), key
        left, top, right, bottom = Image.fromarray(np.asarray(picture)[..., 3] > 8).getbbox()
        assert max(right - left, bottom - top) in (29, 30), key
        assert min(left, top) >= 1, key
        assert max(right, bottom) <= SIDE - 1, key


def test_colours_are_those_of_the_names() -> None:
    """Mean colours are as the names say, in all styles: the order of the sheet is that of the names."""
    small = small_pictures()
    for style in STYLES:
        for channel, name in enumerate(("red heart", "green heart", "blue heart")):
            image = composed(small[name, style], BACKGROUNDS["white"], size=SIDE, side=SIDE)
            assert np.asarray(image, float)[8:24, 8:24].mean((0, 1)).argmax() == channel, (name, style)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [(None, "is missing or damaged"), (b"no picture", "is missing or damaged"), ("small", "holds other pictures than")],
)
def test_a_bad_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | str | None, fragment: str
) -> None:
    """Beyond the edge of a small sheet, Pillow would crop transparent pictures."""
    path = tmp_path / "pictures.webp"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        Image.new("RGBA", (64, 64)).save(path)
    monkeypatch.setattr(module, "FILE", path)
    one_sentence(small_pictures.__wrapped__, DataError, fragment)
