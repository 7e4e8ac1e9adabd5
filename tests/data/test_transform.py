"""The transform against Pillow and NumPy, and its randomness."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sdkit
from sdkit.data import Transform
from sdkit.data.transform import draw
from sdkit.images import to_uint8


def levels(x: torch.Tensor) -> np.ndarray:
    return to_uint8(x)[0]


class TestGeometry:
    @given(
        st.integers(8, 70),
        st.integers(8, 70),
        st.integers(8, 40),
        st.integers(8, 40),
        st.sampled_from(["center", "random"]),
    )
    @settings(max_examples=60)
    def test_any_image_gives_the_size(self, width: int, height: int, h: int, w: int, crop: str) -> None:
        transform = Transform(size=(h, w), crop=crop, flip=True)
        x = transform(Image.new("RGB", (width, height), (0, 128, 255)), draw(0, 0, 0))
        assert x.shape == (3, h, w)
        assert x.dtype == torch.float32
        assert torch.equal(x, torch.tensor([0, 128, 255]).float()[:, None, None].expand(3, h, w) / 127.5 - 1)

    def test_an_image_of_the_size_is_left_alone(self, chelsea: Image.Image) -> None:
        x = Transform(size=(300, 451))(chelsea, draw(0, 0, 0))
        np.testing.assert_array_equal(levels(x), np.asarray(chelsea))

    @pytest.mark.parametrize(
        ("size", "resized"), [((96, 96), (144, 96)), ((100, 200), (200, 133)), ((480, 64), (722, 480))]
    )
    def test_centre(self, chelsea: Image.Image, size: tuple[int, int], resized: tuple[int, int]) -> None:
        """A picture of 451 x 300 is resized by max(h / 300, w / 451), and its middle is cropped."""
        whole = np.asarray(chelsea.resize(resized, Image.Resampling.LANCZOS))
        top, left = (resized[1] - size[0]) // 2, (resized[0] - size[1]) // 2
        x = Transform(size=size)(chelsea, draw(0, 0, 0))
        np.testing.assert_array_equal(levels(x), whole[top : top + size[0], left : left + size[1]])

    def test_shrinking_is_antialiased(self) -> None:
        """A checkerboard of single pixels must become grey. Without antialiasing it would become black or white."""
        board = Image.fromarray((np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
        x = Transform(size=(16, 16))(board, draw(0, 0, 0))
        assert x[:, 2:-2, 2:-2].abs().max() < 0.05


class TestChance:
    def test_random_crops_are_windows_of_the_image_each_as_likely(self) -> None:
        values = np.arange(12 * 10).reshape(12, 10)
        transform, found = Transform(size=(12, 8), crop="random"), Counter[int]()
        image = Image.fromarray(values.astype(np.uint8)).convert("RGB")
        for i in range(900):
            x = levels(transform(image, draw(1, i, 0)))[..., 0]
            left = int(x[0, 0])
            np.testing.assert_array_equal(x, values[:, left : left + 8])
            found[left] += 1
        assert found.keys() == {0, 1, 2}
        assert all(abs(n - 300) < 4 * (900 * 2 / 9) ** 0.5 for n in found.values())  # 4 standard deviations

    def test_half_are_mirrored(self) -> None:
        image = Image.fromarray(np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)).convert("RGB")
        plain = levels(Transform(size=(8, 8))(image, draw(0, 0, 0)))
        mirrored = 0
        for i in range(400):
            x = levels(Transform(size=(8, 8), flip=True)(image, draw(0, i, 0)))
            mirrored += np.array_equal(x, plain[:, ::-1])
            assert np.array_equal(x, plain) or np.array_equal(x, plain[:, ::-1])
        assert abs(mirrored - 200) < 4 * 10  # 4 standard deviations

    def test_flipping_leaves_the_crop_where_it_is(self, chelsea: Image.Image) -> None:
        """Flips must not change the crops, so that runs with and without flips are comparable."""
        for i in range(10):
            x = Transform(size=(64, 64), crop="random")(chelsea, draw(0, i, 0))
            y = Transform(size=(64, 64), crop="random", flip=True)(chelsea, draw(0, i, 0))
            assert torch.equal(x, y) or torch.equal(x, y.flip(2))

    def test_each_augmentation_of_each_image_has_its_own_source(self) -> None:
        drawn = [torch.rand(1, generator=draw(*key)).item() for key in np.ndindex(4, 6, 6)]
        assert len(set(drawn)) == len(drawn)
        assert torch.rand(1, generator=draw(2, 3, 1)).item() == drawn[2 * 36 + 3 * 6 + 1]
        assert 0.4 < np.mean(drawn) < 0.6


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"size": (7, 64)}, "size must be a whole number from 8"),
        ({"size": (64.5, 64)}, "size must be a whole number from 8"),
        ({"size": (64, 64, 3)}, "size must be one number of pixels"),
        ({"size": "64"}, "size must be a whole number"),
        ({"size": (64, 64), "crop": "corner"}, "crop 'corner' is not one of 'center', 'random'"),
    ],
)
def test_bad_settings(options: dict[str, object], fragment: str) -> None:
    with pytest.raises(sdkit.ArgumentError, match=fragment):
        Transform(**options)  # type: ignore[arg-type]


def test_what_would_be_enlarged_over_eight_times_is_too_small() -> None:
    transform = Transform(size=(64, 128))
    assert transform(Image.new("RGB", (16, 8)), draw(0, 0, 0)).shape == (3, 64, 128)
    for size in ((15, 8), (16, 7), (1, 1), (1, 500)):
        with pytest.raises(sdkit.ImageError, match=f"^{size[0]} x {size[1]} pixels are too few for a crop of 128 x 64"):
            transform(Image.new("RGB", size), draw(0, 0, 0))
