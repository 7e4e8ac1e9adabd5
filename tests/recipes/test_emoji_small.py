"""The small pictures that the package carries."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, composed, pictures
from sdkit.recipes.emoji.small import SIDE, small_pictures


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
