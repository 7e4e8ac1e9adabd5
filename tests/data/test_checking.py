"""The data check: each kind of finding, the examples that are left out, and the report as text and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sdkit.data import CheckReport, check
from sdkit.data.checking import NEAR_BITS, _bit_count, _buckets, perceptual_hash

pytest.importorskip("datasets")


def found(report: CheckReport) -> dict[str, list[str]]:
    return {one.kind: [*one.names, *("|".join(group) for group in one.groups)] for one in report.findings}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> CheckReport:
    """Check a folder that has every kind of finding, for a crop of 64 x 64 and the embedded model."""
    import skimage.data

    folder = tmp_path_factory.mktemp("photos")
    photos = {name: Image.fromarray(getattr(skimage.data, name)()) for name in ("astronaut", "chelsea", "coffee")}
    for name, photo in photos.items():
        photo.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
    photos["chelsea"].save(folder / "same.png", compress_level=1)  # other bytes, equal pixels
    photos["coffee"].resize((450, 300)).save(folder / "smaller.jpg", quality=60)
    photos["coffee"].crop((300, 200, 350, 240)).save(folder / "detail.png")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (80, 80), "red").save(folder / "red.png")
    Image.new("RGB", (80, 80), "blue").save(folder / "blue.png")
    (folder / "same.txt").write_text(" \n")
    (folder / "smaller.txt").write_text("red apple blue cat " * 16)
    (folder / "broken.png").write_bytes((folder / "coffee.png").read_bytes()[:9000])
    (folder / "zero.jpg").write_bytes(b"")
    return check(folder, model="emoji", size=64)


class TestFindings:
    def test_kinds_and_names(self, report: CheckReport) -> None:
        assert found(report) == {
            "unreadable": ["broken.png", "zero.jpg"],
            "too_small": ["dot.png"],
            "enlarged": ["detail.png"],
            "no_caption": ["blue.png", "broken.png", "detail.png", "dot.png", "red.png", "same.png", "zero.jpg"],
            "long_caption": ["smaller.jpg"],
            "duplicates": ["chelsea.png|same.png"],
            "near_duplicates": ["coffee.png|smaller.jpg"],
        }
        assert (report.examples, report.usable, report.size) == (11, 8, (64, 64))

    def test_reasons(self, report: CheckReport) -> None:
        reasons = {name: reason for one in report.findings for name, reason in one.reasons.items()}
        assert reasons.keys() == {"broken.png", "zero.jpg", "smaller.jpg"}
        assert "truncated" in reasons["broken.png"]
        assert reasons["smaller.jpg"] == "64 tokens in 3 chunks"  # the embedded model's chunks have 23 tokens

    def test_shapes(self, report: CheckReport) -> None:
        shapes = {(one.width, one.height): one.count for one in report.shapes}
        assert shapes == {
            (451, 300): 2,
            (80, 80): 2,
            (512, 512): 1,
            (600, 400): 1,
            (450, 300): 1,
            (50, 40): 1,
            (1, 1): 1,
        }
        assert [one.count for one in report.shapes] == sorted(shapes.values(), reverse=True)

    def test_json(self, report: CheckReport) -> None:
        plain = json.loads(json.dumps(report.asdict()))
        assert plain["findings"][0]["names"] == ["broken.png", "zero.jpg"]
        assert plain["shapes"][0] == {"width": 80, "height": 80, "count": 2}

    def test_words(self, report: CheckReport) -> None:
        text = str(report)
        assert "11 images, 8 of them usable for a crop of 64 x 64" in text
        assert "chelsea.png, same.png" in text
        assert "and 2 more" in text
        assert all(one.consequence in text for one in report.findings)

    def test_nothing_found(self, tmp_path: Path, chelsea: Image.Image) -> None:
        """Without a model, size and tokenizer are those of Stable Diffusion 1.x."""
        chelsea.resize((700, 600)).save(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("word " * 75)
        report = check(tmp_path)
        assert (report.findings, report.size, report.usable) == ((), (512, 512), 1)
        assert "nothing to complain of" in str(report)
        (tmp_path / "a.txt").write_text("word " * 76)
        assert check(tmp_path, streaming=True).findings[0].reasons == {"a.png": "76 tokens in 2 chunks"}


class TestLikeness:
    def test_it_survives_what_keeps_the_picture(self, astronaut: Image.Image) -> None:
        original = perceptual_hash(astronaut)
        changed = [
            astronaut.resize((200, 200)),
            ImageEnhance.Brightness(astronaut).enhance(0.95),
            ImageEnhance.Contrast(astronaut).enhance(1.05),
        ]
        assert all((perceptual_hash(image) ^ original).bit_count() <= NEAR_BITS for image in changed)

    def test_it_tells_pictures_apart(self, astronaut: Image.Image, chelsea: Image.Image, coffee: Image.Image) -> None:
        hashes = [
            perceptual_hash(image) for image in (astronaut, chelsea, coffee, coffee.transpose(Image.Transpose(0)))
        ]
        distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
        assert min(distances) > 4 * NEAR_BITS

    def test_every_near_pair_meets_in_a_bucket(self) -> None:
        rng = np.random.default_rng(0)
        hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
        for i in range(0, 300, 2):  # each gets a neighbour that differs in at most NEAR_BITS bits
            flips = rng.choice(64, rng.integers(0, NEAR_BITS + 1), replace=False)
            hashes[i + 1] = int(hashes[i]) ^ sum(1 << int(bit) for bit in flips)
        met = {(int(i), int(j)) for bucket in _buckets(hashes) for i in bucket for j in bucket}
        assert all((i, i + 1) in met for i in range(0, 300, 2))
        assert len(met) < 300 * 300 / 20

    def test_bit_count(self) -> None:
        values = [0, 1, 2**63, 2**64 - 1, 0b1011]
        assert _bit_count(np.array(values, dtype=np.uint64)).tolist() == [value.bit_count() for value in values]


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    report = check(tmp_path)
    assert (report.usable, report.shapes) == (0, ())
    assert found(report)["unreadable"] == ["torn.png"]
