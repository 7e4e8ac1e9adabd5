"""The small pictures that the package carries."""

from __future__ import annotations

import numpy as np

from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, composed, pictures
from sdkit.recipes.emoji.small import SIDE, small_pictures


def test_each_name_is_there_in_each_style() -> None:
    """No picture is empty, none fills less than 30 pixels of its longer side, and the edge stays free."""
    small = small_pictures()
    assert list(small) == [(picture.name, style) for picture in pictures() for style in STYLES]
    for key, picture in small.items():
        assert picture.size == (SIDE, SIDE) and picture.mode == "RGBA", key
        alpha = np.asarray(picture)[..., 3] > 8
        assert max(np.ptp(np.nonzero(alpha)[0]), np.ptp(np.nonzero(alpha)[1])) in (28, 29), key
        assert not (alpha[0].any() or alpha[-1].any() or alpha[:, 0].any() or alpha[:, -1].any()), key


def test_colours_are_those_of_the_names() -> None:
    """Mean colours are as the names say, in all styles: the order of the sheet is that of the names."""
    small = small_pictures()
    for style in STYLES:
        red, green, blue = (
            np.asarray(composed(small[name, style], BACKGROUNDS["white"], size=SIDE, side=SIDE), float)[
                8:24, 8:24
            ].mean((0, 1))
            for name in ("red heart", "green heart", "blue heart")
        )
        assert red.argmax() == 0 and green.argmax() == 1 and blue.argmax() == 2, style
