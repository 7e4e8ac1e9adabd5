"""Every kind of data set, broken images, and captions from every place."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import sdkit
from sdkit.data import Examples, Stream, open_examples
from sdkit.messages import quiet

datasets = pytest.importorskip("datasets")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def encoded(color: Any = "red", size: tuple[int, int] = (12, 10), format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def told(examples: Examples | Stream) -> list[tuple[str, str]]:
    return [(one.name, one.caption) for one in examples]


def colors(examples: Examples | Stream) -> list[Any]:
    return [one.load().getpixel((0, 0)) for one in examples]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name, color in {"a.png": "red", "b/z.PNG": "lime", "b/c/y.png": "blue", ".hidden.png": "white"}.items():
        (tmp_path / name).write_bytes(encoded(color))
    return tmp_path


class TestFolder:
    def test_without_captions(self, folder: Path) -> None:
        examples = open_examples(folder)
        assert told(examples) == [("a.png", ""), ("b/c/y.png", ""), ("b/z.PNG", "")]
        assert colors(examples) == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
        assert (len(examples), examples.names, examples.captions) == (3, ["a.png", "b/c/y.png", "b/z.PNG"], [""] * 3)

    def test_captions_beside_the_images(self, folder: Path) -> None:
        (folder / "a.txt").write_bytes(b"\xef\xbb\xbf  a red square\r\n")
        (folder / "b" / "c" / "y.txt").write_text("ein blaues Quadrat, größer\n", encoding="utf-8")
        (folder / "notes.txt").write_text("of no image")
        assert open_examples(folder).captions == ["a red square", "ein blaues Quadrat, größer", ""]

    @pytest.mark.parametrize("key", ["text", "caption"])
    def test_captions_in_metadata(self, folder: Path, key: str) -> None:
        rows = [{"file_name": "a.png", key: "red"}, {"file_name": "b/z.PNG", key: "green", "width": 3}]
        (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
        (folder / "a.txt").write_text("not this")
        (folder / "b" / "c" / "metadata.jsonl").write_text(json.dumps({"file_name": "y.png", key: "blue"}))
        assert open_examples(folder).captions == ["red", "blue", "green"]

    def test_captions_however_the_folder_is_written(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "red"}))
        expected = [("a.png", "red"), ("b/c/y.png", ""), ("b/z.PNG", "")]
        assert told(open_examples(folder / "b" / "..")) == expected
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": str(folder / "a.png"), "text": "red"}))
        monkeypatch.chdir(folder.parent)
        assert told(open_examples(folder.name)) == expected
        row = {"file_name": str(folder / "b" / ".." / "a.png"), "text": "rouge"}
        again = {"file_name": "a.png", "text": "red"}
        (folder / "metadata.jsonl").write_text(f"{json.dumps(again)}\n{json.dumps(row)}")
        with pytest.raises(sdkit.errors.DataError, match=r"a\.png has a caption already"):
            open_examples(folder)

    def test_what_may_not_be_read_is_told(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A refusal by the operating system is simulated, because root may read everything."""
        (folder / "a.txt").write_text("a red square")
        walk = os.walk

        def closed(top: Path, onerror: Any) -> Any:
            onerror(PermissionError(errno.EACCES, "Permission denied", str(folder / "b" / "c")))
            return walk(top)

        with monkeypatch.context() as patch:
            patch.setattr(os, "walk", closed)
            with pytest.raises(
                sdkit.errors.DataError, match=r"^cannot read .*c; change its permissions, or take it out"
            ):
                open_examples(folder)
        monkeypatch.setattr("sdkit.data.captions.read_regular", lambda *_: (_ for _ in ()).throw(PermissionError()))
        with pytest.raises(sdkit.errors.DataError, match=r"^the caption in .*a\.txt cannot be read; "):
            open_examples(folder)

    def test_another_key_of_metadata(self, folder: Path) -> None:
        row = {"file_name": "a.png", "text": "red", "de": "rot"}
        (folder / "metadata.jsonl").write_text(json.dumps(row))
        assert open_examples(folder, caption_column="de").captions == ["rot", "", ""]

    def test_a_file_that_metadata_names_and_that_is_missing(self, folder: Path) -> None:
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "gone.png", "text": "gone"}))
        examples = open_examples(folder)
        assert told(examples)[-1] == ("gone.png", "gone")
        with pytest.raises(sdkit.ImageError, match=r"cannot read .*gone\.png: No such file"):
            examples[-1].load()

    def test_broken_images_concern_only_themselves(self, folder: Path) -> None:
        (folder / "empty.png").write_bytes(b"")
        (folder / "text.jpg").write_text("no image")
        (folder / "truncated.jpg").write_bytes(encoded(size=(200, 200), format="JPEG")[:800])
        examples = open_examples(folder)
        assert len(examples) == 6
        for example in examples:
            if example.name in ("empty.png", "text.jpg", "truncated.jpg"):
                with pytest.raises(sdkit.ImageError, match=example.name):
                    example.load()
            else:
                assert example.load().size == (12, 10)

    def test_modes_and_orientation(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
        Image.new("RGB", (12, 10), "blue").save(tmp_path / "exif.jpg", exif=exif)
        Image.new("L", (12, 10), 77).save(tmp_path / "grey.png")
        Image.fromarray(np.full((10, 12), 0x8080, np.uint16)).save(tmp_path / "grey16.png")
        Image.new("RGBA", (12, 10), (255, 0, 0, 0)).save(tmp_path / "alpha.png")
        loaded = {one.name: one.load() for one in open_examples(tmp_path)}
        assert all(image.mode == "RGB" for image in loaded.values())
        assert loaded["exif.jpg"].size == (10, 12)
        pixels = {name: image.getpixel((5, 5)) for name, image in loaded.items() if name != "exif.jpg"}
        assert pixels == {"grey.png": (77,) * 3, "grey16.png": (128,) * 3, "alpha.png": (255,) * 3}

    def test_indices(self, folder: Path) -> None:
        examples = open_examples(folder)
        assert examples[1].name == "b/c/y.png"
        assert examples[-1].name == "b/z.PNG"
        with pytest.raises(IndexError):
            examples[3]

    def test_identity(self, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        """The fingerprint covers names, captions, and sizes of files, and not the path of the folder."""
        copy = tmp_path_factory.mktemp("copy")
        (copy / "b" / "c").mkdir(parents=True)
        for name in ("a.png", "b/z.PNG", "b/c/y.png"):
            (copy / name).write_bytes((folder / name).read_bytes())
        before = open_examples(folder).identity
        assert open_examples(copy).identity == before
        seen = {before}
        for name, data in {"a.txt": b"red", "d.png": encoded(), "a.png": encoded(size=(99, 99))}.items():
            (copy / name).write_bytes(data)
            seen.add(open_examples(copy).identity)
        assert len(seen) == 4


class TestTar:
    @pytest.fixture
    def shards(self, tmp_path: Path) -> Path:
        """Write shards with mixed formats, both kinds of captions, one missing caption, and a broken image. `datasets`
        itself refuses such shards.
        """
        write_tar(
            tmp_path / "0.tar",
            {
                "x/0.jpg": encoded("blue", format="JPEG"), "x/0.txt": b"a blue one\n",
                "x/1.png": encoded("red"),
                "x/2.json": json.dumps({"text": "a green one", "other": "grün"}).encode(),
                "x/2.webp": encoded("lime", format="WEBP"),
                "x/3.png": b"broken", "x/3.txt": b"broken",
            },
        )  # fmt: skip
        write_tar(tmp_path / "1.tar", {"y.png": encoded("white"), "y.cls": b"7", "y.txt": b"white"})
        return tmp_path

    @pytest.mark.parametrize("streaming", [False, True])
    def test_shards(self, shards: Path, streaming: bool) -> None:
        examples = open_examples(shards, streaming=streaming)
        names = ["0.tar/x/0.jpg", "0.tar/x/1.png", "0.tar/x/2.webp", "0.tar/x/3.png", "1.tar/y.png"]
        assert told(examples) == list(zip(names, ["a blue one", "", "a green one", "broken", "white"], strict=True))
        with pytest.raises(sdkit.ImageError, match=r"0\.tar/x/3\.png is not an image"):
            colors(examples)
        whole = [one.load() for one in examples if "3.png" not in one.name]
        assert [image.size for image in whole] == [(12, 10)] * 4
        np.testing.assert_allclose(
            [image.getpixel((5, 5)) for image in whole], [(0, 0, 255), (255, 0, 0), (0, 255, 0), (255,) * 3], atol=3
        )

    def test_one_shard_and_a_key_of_its_json(self, shards: Path) -> None:
        assert open_examples(shards / "0.tar", caption_column="other").captions == ["", "", "grün", ""]
        assert open_examples(shards / "0.tar", caption_column="txt").captions == ["a blue one", "", "", "broken"]


class TestColumns:
    """Parquet files, in which data sets on the Hub come too."""

    CAPTIONS = ("red", None, "blue")

    def cells(self) -> list[dict[str, Any]]:
        return [{"bytes": encoded(color), "path": None} for color in ("red", "lime", "blue")]

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("form", ["fields", "bytes", "datasets"])
    def test_forms_of_images(self, tmp_path: Path, form: str, streaming: bool) -> None:
        file = tmp_path / "a.parquet"
        cells = self.cells()
        if form == "datasets":
            features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
            table = datasets.Dataset.from_dict({"picture": cells, "text": list(self.CAPTIONS)}, features=features)
            with quiet("datasets"):
                table.to_parquet(str(file))
        else:
            images = cells if form == "fields" else [cell["bytes"] for cell in cells]
            pq.write_table(pa.table({"id": [1, 2, 3], "picture": images, "text": list(self.CAPTIONS)}), file)
        examples = open_examples(tmp_path, streaming=streaming)
        assert isinstance(examples, Stream if streaming else Examples)
        assert told(examples) == [("row 0", "red"), ("row 1", ""), ("row 2", "blue")]
        assert colors(examples) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        if isinstance(examples, Examples):
            assert (examples.names, examples.captions) == (["row 0", "row 1", "row 2"], ["red", "", "blue"])

    def test_forms_of_captions(self, tmp_path: Path) -> None:
        lists = [["first", "second"], [], None]
        fields = [{"caption": "a", "n": 1}, {"caption": None, "n": 2}, None]
        table = pa.table({"image": self.cells(), "captions": lists, "json": fields, "label": [3, 4, 5]})
        pq.write_table(table, tmp_path / "a.parquet")
        assert open_examples(tmp_path).captions == ["first", "", ""]
        assert open_examples(tmp_path, caption_column="json").captions == ["a", "", ""]
        assert open_examples(tmp_path, caption_column="label").captions == ["3", "4", "5"]
        for streaming in (False, True):
            columns = ("captions", "json", "label", None)
            opened = [open_examples(tmp_path, caption_column=column, streaming=streaming) for column in columns]
            assert len({one.identity for one in opened}) == 3
            assert opened[0].identity == opened[3].identity

    def test_the_column_of_images_can_be_named(self, tmp_path: Path) -> None:
        cells = self.cells()
        pq.write_table(pa.table({"image": cells, "other": cells[::-1]}), tmp_path / "a.parquet")
        assert colors(open_examples(tmp_path)) == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
        assert colors(open_examples(tmp_path, image_column="other")) == [(0, 0, 255), (0, 255, 0), (255, 0, 0)]

    def test_names_and_what_is_missing(self, tmp_path: Path) -> None:
        cells = [{"bytes": encoded(), "path": "one.png"}, {"bytes": b"broken", "path": "two.png"}, None]
        pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
        examples = open_examples(tmp_path)
        assert examples.names == ["one.png", "two.png", "row 2"] == [one.name for one in examples]
        for i, fragment in ((1, "two.png is not an image"), (2, "row 2 holds no image")):
            with pytest.raises(sdkit.ImageError, match=fragment):
                examples[i].load()
        identity = examples.identity
        cells[1] = {"bytes": encoded(), "path": "two.png"}
        pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
        assert open_examples(tmp_path).identity != identity

    @pytest.mark.parametrize("streaming", [False, True])
    def test_images_that_are_files(self, tmp_path: Path, streaming: bool) -> None:
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a.png").write_bytes(encoded("blue"))
        paths = ["sub/a.png", str(tmp_path / "sub" / "a.png"), "gone.png"]
        cells = [{"bytes": None, "path": path} for path in paths]
        pq.write_table(pa.table({"image": cells}, pa.schema({"image": IMAGE})), tmp_path / "a.parquet")
        here, whole, gone = open_examples(tmp_path / "a.parquet", streaming=streaming)
        assert (here.name, whole.load().getpixel((0, 0)), here.load().getpixel((0, 0))) == (
            "sub/a.png", (0, 0, 255), (0, 0, 255),
        )  # fmt: skip
        with pytest.raises(sdkit.ImageError, match=r"cannot read gone\.png: No such file"):
            gone.load()

    @pytest.mark.parametrize(
        "path",
        [
            "ftp://127.0.0.1/x.png", "http://127.0.0.1/x.png", "github://a:b@/x.png", "local:///dev/zero",
            "file:///dev/zero", "zip://x.png::http://127.0.0.1/a.zip", "simplecache::hf://datasets/a/b/x.png",
        ],
    )  # fmt: skip
    def test_no_address_that_a_file_names_is_opened(self, tmp_path: Path, path: str) -> None:
        cells = [{"bytes": None, "path": path}]
        pq.write_table(pa.table({"image": cells}, pa.schema({"image": IMAGE})), tmp_path / "a.parquet")
        (one,) = open_examples(tmp_path)
        with pytest.raises(sdkit.ImageError, match=r"which is neither a file here nor on the Hub; store the images"):
            one.load()

    def test_the_hub_is_asked_only_where_it_may_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A stream of a folder of images on the Hub gives addresses in place of bytes. They may be fetched only when
        online.
        """
        asked: list[str] = []

        def opened(path: str, mode: str) -> Any:
            asked.append(path)
            return io.BytesIO(encoded("blue"))

        monkeypatch.setattr("fsspec.open", opened)
        paths = ["hf://datasets/a/b@c/x.png", "zip://x.png::hf://datasets/a/b@c/d.zip"]
        cells = [{"bytes": None, "path": path} for path in paths]
        pq.write_table(pa.table({"image": cells}, pa.schema({"image": IMAGE})), tmp_path / "a.parquet")
        examples = open_examples(tmp_path)
        with pytest.raises(sdkit.ImageError, match=r"x\.png lies on the Hub, and HF_HUB_OFFLINE forbids to fetch it"):
            examples[0].load()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        assert colors(examples) == [(0, 0, 255)] * 2
        assert asked == paths

    @pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs POSIX")
    def test_a_device_is_no_image(self, tmp_path: Path) -> None:
        cells = [{"bytes": None, "path": "/dev/zero"}]
        pq.write_table(pa.table({"image": cells}, pa.schema({"image": IMAGE})), tmp_path / "a.parquet")
        with pytest.raises(sdkit.ImageError, match="it is not a regular file"):
            open_examples(tmp_path)[0].load()

    def test_numbers_are_no_images(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [{"bytes": 5, "path": 7}]}), tmp_path / "a.parquet")
        with pytest.raises(sdkit.errors.DataError, match=r"has no column of images; its columns: image\.$"):
            open_examples(tmp_path)

    def test_captions_that_the_library_would_open_are_none(self, tmp_path: Path) -> None:
        """A file's schema may declare a column of paths as images. Such a column is not read as captions, because
        decoding it would open the addresses.
        """
        features = datasets.Features({"image": datasets.Image(), "text": datasets.Image(), "n": datasets.Value("int8")})
        rows = {"image": self.cells(), "text": [{"bytes": None, "path": "ftp://127.0.0.1/x.png"}] * 3, "n": [1, 2, 3]}
        with quiet("datasets"):
            schema = features.arrow_schema
            pq.write_table(pa.table(rows, schema), tmp_path / "a.parquet")
        assert open_examples(tmp_path).captions == [""] * 3
        assert open_examples(tmp_path, caption_column="n").captions == ["1", "2", "3"]
        with pytest.raises(sdkit.errors.DataError, match=r"column 'text' of .* holds images or the like"):
            open_examples(tmp_path, caption_column="text")

    def test_captions_that_are_missing_or_damaged(self, tmp_path: Path) -> None:
        values = {"nan": [float("nan"), float("inf"), 2.5], "bool": [True, False, None], "bytes": [b"a dog", None, b""]}
        pq.write_table(pa.table({"image": self.cells(), **values}), tmp_path / "a.parquet")
        expected = {"nan": ["", "", "2.5"], "bool": [""] * 3, "bytes": ["a dog", "", ""]}
        for column, captions in expected.items():
            if column != "bytes":  # this column would be taken for the images
                assert open_examples(tmp_path, caption_column=column).captions == captions
        pq.write_table(pa.table({"image": self.cells(), "text": ["a", "b\0", "c"]}), tmp_path / "a.parquet")
        for streaming in (False, True):
            with pytest.raises(sdkit.errors.DataError, match=r"the caption of row 1 in .* it holds NUL characters"):
                list(open_examples(tmp_path, streaming=streaming))

    def test_several_files_are_one(self, tmp_path: Path) -> None:
        for i, cell in enumerate(self.cells()):
            pq.write_table(pa.table({"image": [cell], "text": [str(i)]}), tmp_path / f"{i}.parquet")
        assert open_examples(tmp_path).captions == ["0", "1", "2"]
        assert open_examples(tmp_path / "1.parquet").captions == ["1"]

    def test_names_are_no_patterns(self, tmp_path: Path) -> None:
        for name in ("1", "[1]", "2*"):
            pq.write_table(pa.table({"image": [encoded()], "text": [name]}), tmp_path / f"{name}.parquet")
        assert sorted(open_examples(tmp_path).captions) == ["1", "2*", "[1]"]

    def test_identity_of_a_stream_of_files(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [encoded()], "text": ["a"]}), tmp_path / "1.parquet")
        before = open_examples(tmp_path, streaming=True).identity
        assert open_examples(tmp_path, streaming=True).identity == before
        pq.write_table(pa.table({"image": [encoded()], "text": ["a longer one"]}), tmp_path / "2.parquet")
        assert open_examples(tmp_path, streaming=True).identity != before


def test_the_librarys_settings_are_left_as_they_were(folder: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [encoded()]}), tmp_path / "a.parquet")
    before = (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity())
    open_examples(tmp_path / "a.parquet")
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


def test_nothing_is_written_into_the_data(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    list(open_examples(folder))
    assert sorted(folder.rglob("*")) == before
