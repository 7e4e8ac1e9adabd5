"""Captions: the places where they are looked for, their order, and warnings about missing ones."""

from __future__ import annotations

import json
import os
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdkit
from sdkit.data import check, open_examples
from sdkit.data.captions import caption_of
from sdkit.data.examples import warn_of_captions

pytest.importorskip("datasets")
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.sentences import one_sentence

DATA = sdkit.errors.DataError


def folder_of(folder: Path, files: dict[str, Any]) -> Path:
    """Write a folder of files. None as content makes an image."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (12, 10), "red").save(path, "PNG")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def told(data: Path, **options: Any) -> dict[str, str]:
    return {example.name: example.caption for example in open_examples(data, **options)}


def rows(*fields: dict[str, Any]) -> str:
    return "\n".join(map(json.dumps, fields))


def parquet(**columns: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


# Places of captions, the first with the highest priority.
PLACES: list[tuple[str, str | bytes]] = [
    ("metadata.jsonl", rows({"file_name": "a.png", "text": "metadata.jsonl"})),
    ("a.txt", "a.txt"),
    ("a.caption", "a.caption"),
    ("a.png.txt", "a.png.txt"),
    ("a.png.caption", "a.png.caption"),
    ("a.json", json.dumps({"caption": "a.json"})),
    ("a.png.json", json.dumps({"text": "a.png.json"})),
]


@pytest.mark.parametrize("first", range(len(PLACES)), ids=[name for name, _ in PLACES])
@pytest.mark.filterwarnings("ignore:.* passed over, since the image has another")
def test_the_order_of_places(tmp_path: Path, first: int) -> None:
    name, content = PLACES[first]
    folder_of(tmp_path, {"a.png": None, name: content})
    assert told(tmp_path) == {"a.png": name}
    folder_of(tmp_path, dict(PLACES[first:]))
    assert told(tmp_path) == {"a.png": name}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_other_files_of_metadata(tmp_path: Path, name: str) -> None:
    csv = '\ufefffile_name,id,text\r\na.png,1,"a dog, ""Zork"""\r\nsub/b.png,2,\r\n'
    columns = {"file_name": ["a.png", "sub/b.png"], "text": ['a dog, "Zork"', None], "id": [1, 2]}
    content = csv if name.endswith("csv") else parquet(**columns)
    folder_of(tmp_path, {"a.png": None, "sub/b.png": None, "sub/b.txt": "a cat", name: content})
    assert told(tmp_path) == {"a.png": 'a dog, "Zork"', "sub/b.png": "a cat"}
    assert told(tmp_path, caption_column="id") == {"a.png": "1", "sub/b.png": "2"}


def test_of_two_files_of_metadata_one_is_named(tmp_path: Path) -> None:
    csv = "file_name,text\na.png,a cat\n"
    folder_of(
        tmp_path, {"a.png": None, "metadata.csv": csv, "metadata.jsonl": rows({"file_name": "a.png", "text": "b"})}
    )
    with pytest.warns(UserWarning, match=r"metadata\.csv is passed over, for there is a metadata\.jsonl beside it"):
        assert told(tmp_path) == {"a.png": "b"}


def test_of_two_caption_files_one_is_named(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": None, "a.txt": "a dog", "a.caption": "tags", "a.json": '{"width": 3}'})
    with pytest.warns(UserWarning, match=r"a\.caption is passed over, since the image has another caption file"):
        assert told(tmp_path) == {"a.png": "a dog"}


def test_a_key_that_is_the_only_text_is_taken_and_told(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": None, "metadata.jsonl": rows({"file_name": "a.png", "description": "a dog", "n": 3})})
    with pytest.warns(
        UserWarning, match=r"the captions are taken from 'description', the only text in .*metadata\.jsonl"
    ):
        assert told(tmp_path) == {"a.png": "a dog"}
    folder_of(tmp_path, {"metadata.jsonl": rows({"file_name": "a.png", "title": "a", "artist": "b"})})
    with pytest.warns(
        UserWarning, match=r"none of the keys in .* \('artist', 'title'\) is taken for a caption; name one"
    ):
        assert told(tmp_path) == {"a.png": ""}
    assert told(tmp_path, caption_column="title") == {"a.png": "a"}


NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("image", "written"),
    [
        ("sub/a.png", "sub\\a.png"), (f"{NFD}.png", f"{NFC}.png"), (f"{NFC}.png", f"{NFD}.png"), ("A.PNG", "a.png"),
        ("Sub/a.png", "sub\\A.PNG"),
    ],
)  # fmt: skip
def test_names_that_are_spelt_another_way(tmp_path: Path, image: str, written: str) -> None:
    folder_of(tmp_path, {image: None, "metadata.jsonl": rows({"file_name": written, "text": "a dog"})})
    assert told(tmp_path) == {image: "a dog"}


@pytest.mark.parametrize(
    ("image", "text"), [("A.PNG", "A.TXT"), ("a.png", "A.Txt"), (f"{NFD}.png", f"{NFC}.txt"), ("a.PNG", "a.png.txt")]
)
def test_caption_files_that_are_spelt_another_way(tmp_path: Path, image: str, text: str) -> None:
    folder_of(tmp_path, {image: None, text: "a dog"})
    assert told(tmp_path) == {image: "a dog"}


@pytest.fixture
def cased(tmp_path: Path) -> Path:
    """Return a folder on a case-sensitive file system, or skip the test."""
    (tmp_path / "x").touch()
    if (tmp_path / "X").exists():
        pytest.skip("this file system does not tell a from A")
    return tmp_path / "cased"


def test_a_spelling_that_may_be_two_files_is_told(cased: Path) -> None:
    folder_of(cased, {"a.png": None, "A.png": None, "metadata.jsonl": rows({"file_name": "A.PNG", "text": "a dog"})})
    one_sentence(lambda: open_examples(cased), DATA, "line 1: 'A.PNG' may be A.png and a.png; write it as the file")
    folder_of(cased, {"metadata.jsonl": "", "c.png": None, "C.txt": "x", "c.TXT": "y", "c.Txt": "z"})
    one_sentence(lambda: open_examples(cased), DATA, "the caption of c may be in c.TXT or c.Txt; leave one of them")


def test_another_images_caption_is_not_taken(cased: Path) -> None:
    folder_of(cased, {"a.png": None, "A.png": None, "A.txt": "only of A"})
    assert told(cased) == {"A.png": "only of A", "a.png": ""}
    folder_of(cased, {"metadata.jsonl": rows({"file_name": "a.png", "text": "a"}, {"file_name": "A.PNG", "text": "A"})})
    assert told(cased) == {"A.png": "A", "a.png": "a"}


@pytest.mark.parametrize(
    "name", ["/", "//", "..", "sub/..", "a\0.png", "a\0/b.png", "\ud800/a.png", "\ud800.png", "\\"]
)
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, {"a.png": None, "metadata.jsonl": rows({"file_name": name, "text": "x"})})
    one_sentence(lambda: open_examples(tmp_path), DATA, "metadata.jsonl, line 1: ", "is no name of a file; correct it")


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.parametrize("name", ["loop/a.png", "n" * 10_000, "gone/a.png"])
def test_images_that_are_not_there_are_named_when_they_are_read(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, {"a.png": None, "metadata.jsonl": rows({"file_name": name, "text": "x"})})
    (tmp_path / "loop").symlink_to("loop")
    examples = open_examples(tmp_path)
    assert (len(examples), len(examples.identity)) == (2, 16)
    gone = next(example for example in examples if example.caption == "x")
    one_sentence(gone.load, sdkit.ImageError, "cannot read ")


@pytest.mark.parametrize(
    ("files", "fragments"),
    [
        ({"a.txt": "a dog".encode("utf-16-le")}, ("the caption in ", "a.txt cannot be read")),
        ({"a.txt": "a dog".encode("utf-16")}, ("a.txt cannot be read",)),
        ({"a.caption": b"caf\xe9"}, ("a.caption cannot be read",)),
        ({"a.txt": "x" * (2**20 + 1)}, ("a.txt cannot be read", "of at most 1 MiB")),
        ({"a.json": "[" * 100_000}, ("a.json cannot be read",)),
        ({"a.json": '{"text": "a\\u0000b"}'}, ("a.json cannot be read",)),
        (
            {"metadata.jsonl": rows({"file_name": "a.png", "text": "a\0b"})},
            ("line 1: the caption cannot be used", "NUL"),
        ),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": ' + "[" * 100_000}, ("line 1: this is not valid JSON",)),
        ({"metadata.jsonl": "x" * (2**20 + 1)}, ("line 1: it is longer than 1 MiB",)),
        ({"metadata.jsonl": b"\xff\xfe{"}, ("it is not utf-8 text",)),
        ({"metadata.csv": "name,text\na.png,b\n"}, ("metadata.csv, line 2: there is no file name",)),
        ({"metadata.csv": b"file_name,text\na.png,caf\xe9\n"}, ("metadata.csv: it is not utf-8 text",)),
        ({"metadata.csv": 'file_name,text\na.png,"b\n'}, ("metadata.csv, line ", "this is not CSV")),
        ({"metadata.csv": f"file_name,text\na.png,{'x' * 200_000}\n"}, ("this is not CSV (field larger than",)),
        ({"metadata.parquet": b"PAR1" + bytes(40) + b"PAR1"}, ("cannot read ", "metadata.parquet: ")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_captions_that_cannot_be_read(tmp_path: Path, files: dict[str, Any], fragments: tuple[str, ...]) -> None:
    folder_of(tmp_path, {"a.png": None, **files})
    one_sentence(lambda: open_examples(tmp_path), DATA, *fragments)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "name", ["metadata.jsonl", "metadata.csv", "metadata.parquet", "a.txt", "a.json", "0.tar", "0.parquet"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_told_at_once(tmp_path: Path, name: str, kind: str) -> None:
    if name.startswith("0"):
        tmp_path.joinpath("other.txt").touch()
    else:
        folder_of(tmp_path, {"a.png": None})
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).symlink_to("/dev/zero")
    one_sentence(lambda: open_examples(tmp_path), DATA, name)


@pytest.mark.parametrize(
    ("value", "caption"),
    [
        ("  a dog\n", "a dog"), (["a", "b"], "a"), ([["a"], "b"], "a"), ([], ""), ({"caption": "a"}, "a"),
        ([{"text": "a"}], "a"), ({"text": None, "caption": ["a"]}, "a"), ({"other": "a"}, ""), (b"a", "a"),
        (float("nan"), ""), (float("-inf"), ""), (True, ""), (False, ""), (3, "3"), (2.5, "2.5"), (None, ""),
    ],
)  # fmt: skip
def test_what_counts_as_a_caption(value: Any, caption: str) -> None:
    assert caption_of(value) == caption
    assert caption_of({"mine": value, "text": "other"}, "mine") == caption


def test_missing_values_in_metadata_are_no_captions(tmp_path: Path) -> None:
    lines = (
        '{"file_name": "a.png", "text": NaN}\n{"file_name": "b.png", "text": true}\n{"file_name": "c.png", "text": 7}'
    )
    folder_of(tmp_path, {"a.png": None, "b.png": None, "c.png": None, "metadata.jsonl": lines})
    assert told(tmp_path) == {"a.png": "", "b.png": "", "c.png": "7"}


class TestOnRequest:
    def test_class_folders(self, tmp_path: Path) -> None:
        files = {"3_zork dog/a.png": None, "3_zork dog/b.png": None, "3_zork dog/b.txt": "a cat", "c.png": None,
                 "1_some_style/deep/d.png": None, "0_unused/e.png": None}  # fmt: skip
        folder_of(tmp_path, files)
        examples = open_examples(tmp_path, class_folders=True)
        a, b = ("3_zork dog/a.png", "zork dog"), ("3_zork dog/b.png", "a cat")
        found = [(one.name, one.caption) for one in examples]
        assert found == [("1_some_style/deep/d.png", "some style"), a, a, a, b, b, b, ("c.png", "")]
        assert examples.identity != open_examples(tmp_path).identity
        assert told(tmp_path)["3_zork dog/a.png"] == ""
        assert told(tmp_path / "3_zork dog", class_folders=True)["a.png"] == "zork dog"
        report = check(tmp_path, size=16, class_folders=True)
        assert report.examples == 4

    def test_folders_that_are_classes(self, tmp_path: Path) -> None:
        """Where no folder is named as sd-scripts names them, a folder's name is the caption of images without one."""
        images = dict.fromkeys(("red_panda/a.png", "x/cat/b.png", "c.png", "x/d.png"))
        folder_of(tmp_path, images | {"x/d.txt": "e"})
        found = {one.name: one.caption for one in open_examples(tmp_path, class_folders=True)}
        assert found == {"red_panda/a.png": "red panda", "x/cat/b.png": "cat", "c.png": "", "x/d.png": "e"}

    def test_class_folders_that_are_none(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": None})
        one_sentence(lambda: open_examples(tmp_path, class_folders=True), DATA, "no folder in ", "like '10_zork dog'")
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
        one_sentence(
            lambda: open_examples(tmp_path / "a.parquet", class_folders=True),
            sdkit.ArgumentError,
            "no meaning for parquet",
        )

    def test_a_default_caption(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": None, "b.png": None, "b.txt": "a cat"})
        assert told(tmp_path, default_caption=" a dog ") == {"a.png": "a dog", "b.png": "a cat"}
        identities = {open_examples(tmp_path, default_caption=text).identity for text in ("", "a dog", "a cow")}
        assert len(identities) == 3
        one_sentence(lambda: open_examples(tmp_path, default_caption=3), sdkit.ArgumentError, "must be text, not 3")  # type: ignore[arg-type]
        for streaming in (False, True):
            columns = parquet(image=[b"x", b"y"], text=["a cat", None])
            (tmp_path / "p").mkdir(exist_ok=True)
            (tmp_path / "p" / "a.parquet").write_bytes(columns)
            opened = open_examples(tmp_path / "p", default_caption="a dog", streaming=streaming)
            assert [one.caption for one in opened] == ["a cat", "a dog"]
            assert opened.identity != open_examples(tmp_path / "p", streaming=streaming).identity


class TestWithoutCaptions:
    def test_it_is_told_with_what_is_there(self, tmp_path: Path) -> None:
        folder_of(tmp_path, {"a.png": None, "b.png": None, "prompts.csv": "x", "sub/b.tags": "y"})
        examples = open_examples(tmp_path)
        sentence = (
            r"^none of the 2 images in .* has a caption \(there, but not read: .*prompts\.csv, .*b\.tags\); the empty"
        )
        with pytest.warns(UserWarning, match=sentence):
            warn_of_captions(examples)
        report = check(tmp_path, size=8)
        names = {one.kind: one.names for one in report.findings}
        assert names["no_caption"] == ("a.png", "b.png")
        assert [Path(name).name for name in names["unread"]] == ["prompts.csv", "b.tags"]
        assert "2 files that may hold captions (no image has one): " in str(report)

    @pytest.mark.filterwarnings("error")
    def test_one_caption_is_enough(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder_of(tmp_path, {"a.png": None, "b.png": None})
        with pytest.raises(UserWarning, match="none of the 2 images"):
            warn_of_captions(open_examples(tmp_path))
        warn_of_captions(open_examples(tmp_path, default_caption="a dog"))
        with monkeypatch.context() as other:  # in a run of several processes, only the first one warns
            other.setenv("RANK", "1")
            other.setenv("WORLD_SIZE", "2")
            warn_of_captions(open_examples(tmp_path))
        (tmp_path / "b.txt").write_text("a cat")
        warn_of_captions(open_examples(tmp_path))

    def test_a_cache_tells_it(self, tmp_path: Path) -> None:
        folder_of(tmp_path / "data", {"a.png": None})
        with pytest.warns(
            UserWarning, match=r"none of the 1 images in .*data has a caption; the empty prompt is taken"
        ):
            sdkit.data.cache("emoji", tmp_path / "data", tmp_path / "out", size=16)

    @pytest.mark.parametrize(("name", "read_from"), [("a.txt", ""), ("a.caption", ".caption"), ("a.png.json", ".json")])
    def test_files_that_are_not_the_usual_ones_are_named(self, tmp_path: Path, name: str, read_from: str) -> None:
        folder_of(tmp_path, {"a.png": None, name: '{"text": "a dog"}'})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_captions(open_examples(tmp_path))
        expected = [f"captions in {tmp_path} are read from {read_from} files."] if read_from else []
        assert [str(one.message) for one in caught] == expected


def test_pictures_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, {"a.png": None, "b.heic": "x", "c.CR2": "y"})
    with pytest.warns(
        UserWarning, match=r"^1 \.cr2 file and 1 \.heic file are passed over, which cannot be read: .*b\.heic"
    ):
        assert told(tmp_path) == {"a.png": ""}
    (tmp_path / "a.png").unlink()
    one_sentence(lambda: open_examples(tmp_path), DATA, "(but 1 .cr2 file and 1 .heic file); name other data")


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder_of(
        tmp_path / "other",
        {"x.png": None, "x.txt": "linked", "metadata.jsonl": rows({"file_name": "y.png", "text": "y"})},
    )
    folder_of(tmp_path / "other", {"y.png": None})
    folder_of(tmp_path / "data", {"a.png": None})
    for name in ("one", "two"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data")
    assert told(tmp_path / "data") == {"a.png": "", "one/x.png": "linked", "one/y.png": "y"}
