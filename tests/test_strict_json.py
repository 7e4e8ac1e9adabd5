"""Damaged or hostile JSON raises one kind of exception. Valid JSON is returned unchanged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sdkit.strict_json import parse, parse_object, read_object, require

DEEP = "[" * 100_000


@pytest.mark.parametrize("data", ["", "{", DEEP, '{"a": ' * 100_000, b"\xff\xfe\x00", b"\x80abc", "1" * 5000, "nul"])
def test_whatever_is_no_json_is_one_exception(data: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"^is not valid JSON \("):
        parse(data)


@pytest.mark.parametrize("data", ["[]", "1", "null", '"a"', "NaN"])
def test_an_object_is_an_object(data: str) -> None:
    with pytest.raises(ValueError, match=r"^holds no JSON object$"):
        parse_object(data)
    assert parse_object('{"a": [1, null]}') == {"a": [1, None]}


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "absent", "No such file"),
        (Path("a\0b"), "no file can have this name"),
    ):
        with pytest.raises(OSError, match=reason):
            read_object(path)
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "a.json", largest=8) == {"a": 1}
    with pytest.raises(OSError, match="larger than"):
        read_object(tmp_path / "a.json", largest=7)


def test_fields_have_their_types() -> None:
    fields = {"n": 1, "x": 0.5, "s": "a", "b": True, "none": None}
    require(fields, {"n": int, "x": float, "s": str, "b": bool, "none": (str, type(None))})
    require(fields, {"n": float})
    for name, kind in (("b", int), ("x", int), ("s", int), ("none", str), ("absent", str), ("b", float)):
        with pytest.raises(ValueError, match=f"{name!r}"):
            require(fields, {name: kind})
