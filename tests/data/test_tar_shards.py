"""Tar shards: matching captions to images, and damaged or hostile archives."""

from __future__ import annotations

import io
import random
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdkit
from sdkit.data import open_examples

pytest.importorskip("datasets")
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.sentences import one_sentence

DATA = sdkit.errors.DataError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), "red").save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def shard(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def captions(path: Path, **options: Any) -> dict[str, str]:
    return {one.name.split("/", 1)[1]: one.caption for one in open_examples(path, **options)}


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        (
            {"22.05.png": PNG, "22.05.txt": b"a dog", "22.06.png": PNG, "22.06.txt": b"a cat"},
            {"22.05.png": "a dog", "22.06.png": "a cat"},
        ),
        (
            {"i 1. big.json": b'{"caption": "a dog"}', "i 1. big.png": PNG, "i 1. small.png": PNG,
             "i 1. small.json": b'{"caption": "a cat"}'},
            {"i 1. big.png": "a dog", "i 1. small.png": "a cat"},
        ),
        ({"a.left.png": PNG, "a.right.png": PNG, "a.txt": b"both"}, {"a.left.png": "both", "a.right.png": "both"}),
        ({"a.1.png": PNG, "a.2.png": PNG, "a.2.txt": b"of 2"}, {"a.1.png": "", "a.2.png": "of 2"}),
        ({"a.png": PNG, "a.caption.txt": b"a dog"}, {"a.png": "a dog"}),
        ({"a.png": PNG, "a.png.txt": b"a dog"}, {"a.png": "a dog"}),
        ({"a.png": PNG, "a.caption": b"a dog"}, {"a.png": "a dog"}),
        ({"a.png": PNG, "a.json": b'{"text": "c"}', "a.caption": b"b", "a.txt": b"a"}, {"a.png": "a"}),
        ({"a.png": PNG, "a.json": b'{"text": "c"}', "a.txt": b" \n"}, {"a.png": "c"}),
        ({"1.0/1.png": PNG, "1.0/1.txt": b"a", "2.0/1.png": PNG}, {"1.0/1.png": "a", "2.0/1.png": ""}),
        ({"./A.PNG": PNG, "./A.TXT": b"a dog"}, {"./A.PNG": "a dog"}),
        ({"a.json": b'{"text": NaN}', "a.png": PNG}, {"a.png": ""}),
    ],
)  # fmt: skip
def test_which_caption_is_whose(tmp_path: Path, members: dict[str, bytes], expected: dict[str, str]) -> None:
    assert captions(shard(tmp_path / "a.tar", members)) == expected


def test_a_kind_of_captions_can_be_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"a.png": PNG, "a.txt": b"t", "a.caption": b"c", "a.json": b'{"x": "j"}'})
    named = {column: captions(path, caption_column=column)["a.png"] for column in ("txt", "caption", "x", None)}
    assert named == {"txt": "t", "caption": "c", "x": "j", None: "t"}


def test_pictures_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"a.png": PNG, "b.heic": b"x"})
    with pytest.warns(UserWarning, match=r"1 files are passed over, which cannot be read: a\.tar/b\.heic"):
        assert captions(path) == {"a.png": ""}


def header(name: bytes, kind: bytes, size: bytes, rest: dict[int, bytes] | None = None) -> bytes:
    block = bytearray(512)
    fields = {0: name, 100: b"0000644\0", 108: b"0000000\0" * 2, 124: size, 136: b"00000000000\0", 156: kind}
    for at, data in {**fields, 257: b"ustar  \0", **(rest or {})}.items():
        block[at : at + len(data)] = data
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


SPARSE = {386: b"00000000000\0" * 2, 483: b"%011o\0" % (3 * 2**30)}
HUGE, NEGATIVE = b"\x80" + (1 << 45).to_bytes(11, "big"), b"\xff" * 10 + b"\xfe\0"


@pytest.mark.parametrize(
    ("raw", "fragment"),
    [
        (header(b"b.txt", b"S", b"00000000000\0", SPARSE), "b.txt is stored as a sparse file, which is not read; make"),
        (header(b"b.png", b"S", b"00000000000\0", SPARSE), "b.png is stored as a sparse file"),
        (
            header(b"b.txt", b"0", b"00010000000\0") + bytes(2**21),
            "b.txt is larger than 1 MiB, too large for a caption",
        ),
        (header(b"b.png", b"0", HUGE), "is not a whole tar file"),
        (header(b"b.png", b"0", NEGATIVE), "is not a whole tar file"),
        (header(b"x", b"x", HUGE), "is not a whole tar file"),
        (header(b"x", b"L", HUGE), "is not a whole tar file"),
        (header(b"x", b"x", NEGATIVE), "is not a whole tar file"),
        (header(b"x", b"x", b"%011o\0" % 30) + b"30 GNU.sparse.size=-1\n".ljust(512, b"\0"), "is not a whole tar file"),
        (header(b"b.png", b"0", b"%011o\0" % 5000), "is not a whole tar file"),
        (b"\x07" * 512, "is not a whole tar file (a header is damaged)"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:30],
)
@pytest.mark.timeout(60)
def test_members_that_are_refused(tmp_path: Path, raw: bytes, fragment: str) -> None:
    whole = shard(tmp_path / "a.tar", {"a.png": PNG}).read_bytes().rstrip(b"\0")
    (tmp_path / "a.tar").write_bytes(whole + bytes(-len(whole) % 512) + raw + bytes(1024))
    one_sentence(lambda: open_examples(tmp_path), DATA, fragment)


def test_many_extended_headers_in_a_row(tmp_path: Path) -> None:
    raw = (header(b"x", b"x", b"%011o\0" % 20) + b"20 comment=aaaaaaaa\n".ljust(512, b"\0")) * 3000
    (tmp_path / "a.tar").write_bytes(raw + bytes(1024))
    one_sentence(lambda: open_examples(tmp_path), DATA, "is not a whole tar file")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damaged_shards_are_read_or_refused(tmp_path: Path, format: int) -> None:
    long = "n" * 120 + ".txt"
    whole = shard(tmp_path / "a.tar", {"a.png": PNG, "ä.txt": b"a dog", "a.json": b'{"text": "x"}'} | (
        {} if format == tarfile.USTAR_FORMAT else {long: b"a cat"}
    ), format=format).read_bytes()  # fmt: skip
    rng = random.Random(format)
    used = len(whole.rstrip(b"\0"))
    odd = [b"\xff" * 8, b"\x80" + bytes(11), NEGATIVE, HUGE, b"S", b"x", b"g", b"L", b"99999999999\0", b"-0000000001\0"]
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = (
                rng.randrange(used)
                if rng.random() < 0.5
                else 512 * rng.randrange(used // 512) + rng.choice([0, 124, 148, 156, 257])
            )
            new = rng.choice(odd) if rng.random() < 0.5 else rng.randbytes(rng.randint(1, 4))
            data[at : at + len(new)] = new
        for start in range(0, used, 512):  # a right checksum, so that the damage gets past it
            if data[start + 257 : start + 262] == b"ustar" and rng.random() < 0.9:
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        (tmp_path / "a.tar").write_bytes(data)
        try:
            for example in open_examples(tmp_path):
                example.load()
        except sdkit.SdkitError as error:
            assert "\n" not in str(error)  # noqa: PT017 - reading may also succeed


@pytest.mark.timeout(120)
def test_damaged_parquet_is_read_or_refused(tmp_path: Path) -> None:
    struct_ = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    cells = pa.array([{"bytes": PNG, "path": None}] * 3, struct_)
    pq.write_table(pa.table({"image": cells, "text": ["a", "b", None]}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    footer = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    rng = random.Random(0)
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(footer, len(whole)) if rng.random() < 0.7 else rng.randrange(len(whole))
            data[at] = rng.randrange(256)
        (tmp_path / "a.parquet").write_bytes(data)
        for streaming in (False, True):
            try:
                for example in open_examples(tmp_path, streaming=streaming):
                    example.load()
            except sdkit.SdkitError as error:  # noqa: PERF203
                assert "\n" not in str(error)  # noqa: PT017 - reading may also succeed
