"""Users' mistakes with data and caches. Each is reported in one sentence that says what is wrong and what to do."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sdkit
from sdkit.data import cache, check, open_examples

pytest.importorskip("datasets")
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.sentences import one_sentence


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def photos(folder: Path, n: int = 2, **files: str | bytes) -> Path:
    """Make a folder of `n` images and other files; __ in a name stands for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(png())
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def parquet(folder: Path, **columns: list[Any]) -> Path:
    photos(folder, 0)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder


def tar(folder: Path, cut: int | None = None, **files: bytes) -> Path:
    photos(folder, 0)
    with tarfile.open(folder / "a.tar", "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name.replace("__", "."))
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (folder / "a.tar").write_bytes((folder / "a.tar").read_bytes()[:cut])
    return folder


def link(path: Path) -> Path:
    path.symlink_to(path.parent / "nowhere")
    return path


DATA, ARGUMENT, CACHE = sdkit.errors.DataError, sdkit.ArgumentError, sdkit.errors.CacheError
ROW = '{"file_name": "0.png", "text": "a"}'

OPEN: list[tuple[str, Callable[[Path], Any], dict[str, Any], type[sdkit.SdkitError], tuple[str, ...]]] = [
    ("nothing", lambda p: "", {}, ARGUMENT, ("must be the path of a data set or its id on the Hub, not ''",)),
    ("a number", lambda p: 3, {}, ARGUMENT, ("not 3",)),
    ("empty folder", lambda p: p, {}, DATA, ("there is no image, .parquet or .tar file in",)),
    ("no images", lambda p: photos(p, 0, a__txt="x", b__csv="y"), {}, DATA, ("there is no image, .parquet or .tar",)),
    ("only hidden images", lambda p: photos(p, 0, __a__png=png()), {}, DATA, ("there is no image",)),
    ("misspelt folder", lambda p: "photso", {}, DATA, ("'photso' is neither a path that exists nor the id of a data",)),
    ("misspelt path", lambda p: p / "photso" / "x", {}, DATA, ("is neither a path that exists nor",)),
    ("URL", lambda p: "https://example.org/a.tar", {}, DATA, ("is neither a path that exists nor",)),
    ("id, offline", lambda p: "org/photos", {}, DATA, ("cannot open the data set 'org/photos'", "check the name")),
    ("id with a config", lambda p: "org/photos:big", {}, DATA, ("cannot open the data set 'org/photos:big'",)),
    ("an image", lambda p: photos(p) / "0.png", {}, DATA, ("0.png is no data set; name a folder of images",)),
    ("dead link", lambda p: link(p / "x"), {}, DATA, ("is neither a path that exists nor",)),
    ("two kinds", lambda p: photos(parquet(p, image=[png()])), {}, DATA, ("several kinds (2 .png and 1 .parquet",)),
    ("metadata: no JSON", lambda p: photos(p, metadata__jsonl=f"{ROW}\n{{"), {}, DATA, ("line 2: this is not valid",)),
    ("metadata: no object", lambda p: photos(p, metadata__jsonl="[3]"), {}, DATA, ("line 1: there is no file name",)),
    ("metadata: no file", lambda p: photos(p, metadata__jsonl=f'{ROW}\n\n{{"text": "a"}}'), {}, DATA, ("line 3: ",)),
    ("metadata: no text", lambda p: photos(p, metadata__jsonl=b"\xff\xfe"), {}, DATA, ("it is not utf-8 text",)),
    ("metadata: twice", lambda p: photos(p, metadata__jsonl=f"{ROW}\n{ROW}"), {}, DATA, ("line 2: 0.png has a",)),
    ("caption: no text", lambda p: photos(p, **{"0__txt": b"\xff"}), {}, DATA, ("the caption in ", "0.txt cannot")),
    ("unknown key", lambda p: photos(p, metadata__jsonl=ROW), {"caption_column": "de"}, DATA, ("there: 'text'",)),
    ("key, no metadata", photos, {"caption_column": "de"}, DATA, ("no line of a metadata.jsonl", "'de'", "none")),
    ("column of a folder", photos, {"image_column": "jpg"}, ARGUMENT, ("no meaning for a folder of images",)),
    ("no columns of images", lambda p: parquet(p, text=["a"]), {}, DATA, ("no column of images; its columns: text",)),
    ("text for images", lambda p: parquet(p, image=["a.png"]), {"image_column": "image"}, DATA, ("no images in its",)),
    ("unknown image column", lambda p: parquet(p, x=[png()]), {"image_column": "y"}, DATA, ("'y'; it has x",)),
    ("unknown caption column", lambda p: parquet(p, x=[png()]), {"caption_column": "y"}, DATA, ("no column 'y'",)),
    ("one column", lambda p: parquet(p, x=[png()]), {"caption_column": "x"}, DATA, ("column 'x' of ", "holds images")),
    ("no rows", lambda p: parquet(p, image=pa.array([], pa.binary())), {}, DATA, ("corresponds to no data;",)),
    ("no parquet", lambda p: photos(p, 0, a__parquet=b"x" * 99), {}, DATA, ("cannot open the data set", "magic bytes")),
    ("no tar", lambda p: photos(p, 0, a__tar=b"x" * 9999), {}, DATA, ("a.tar is not a whole tar file",)),
    ("truncated tar", lambda p: tar(p, 600, a__png=png(), b__png=png()), {}, DATA, ("a.tar is not a whole tar file",)),
    ("tar without images", lambda p: tar(p, a__txt=b"a"), {}, DATA, ("there is no image in",)),
    ("tar: caption", lambda p: tar(p, a__png=png(), a__json=b"["), {}, DATA, ("the caption in a.tar/a.json cannot",)),
    ("tar: key", lambda p: tar(p, a__png=png()), {"caption_column": "x"}, DATA, ("no .json in the shards", "'x'")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "options", "kind", "fragments"), [case[1:] for case in OPEN], ids=[c[0] for c in OPEN]
)
def test_opening(tmp_path: Path, make: Any, options: dict[str, Any], kind: Any, fragments: tuple[str, ...]) -> None:
    data = make(tmp_path)
    one_sentence(lambda: open_examples(data, **options), kind, *fragments)
    one_sentence(lambda: check(data, size=16, **options), kind, *fragments)


def test_a_stream_without_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "data", image=pa.array([], pa.binary()))
    one_sentence(lambda: make_cache(tmp_path, streaming=True), DATA, "there is no row in")


def make_cache(folder: Path, **options: Any) -> Path:
    """Make a cache of folder/data in folder/out."""
    settings: dict[str, Any] = {"data": folder / "data", "out": folder / "out", "size": 16, "dtype": "fp32", **options}
    return cache(settings.pop("model", "emoji"), settings.pop("data"), settings.pop("out"), **settings)


ARGUMENTS: list[tuple[dict[str, Any], type[sdkit.SdkitError], str]] = [
    ({"size": 20}, ARGUMENT, "size 20 x 20 does not divide by 8, as this VAE needs"),
    ({"size": (16, 20)}, ARGUMENT, "size 16 x 20 does not divide by 8"),
    ({"size": 0}, ARGUMENT, "size must be a whole number from 8 to 16384, not 0"),
    ({"size": "big"}, ARGUMENT, "size must be a whole number"),
    ({"crop": "face"}, ARGUMENT, "crop 'face' is not one of 'center', 'random'"),
    ({"augmentations": 0}, ARGUMENT, "augmentations must be a whole number of at least 1, not 0"),
    ({"augmentations": 2}, ARGUMENT, "2 augmentations would all be alike; take crop='random' or flip"),
    ({"seed": -1}, ARGUMENT, "seed must be a whole number from 0"),
    ({"seed": None}, ARGUMENT, "seed must be a whole number from 0"),
    ({"shard_size": 0}, ARGUMENT, "shard_size must be a whole number of at least 1, not 0"),
    ({"batch_size": 0}, ARGUMENT, "batch_size must be a whole number of at least 1, not 0"),
    ({"workers": 0}, ARGUMENT, "workers must be a whole number of at least 1, not 0"),
    ({"dtype": "int8"}, ARGUMENT, "dtype 'int8' is not one of 'auto', 'fp32', 'bf16', 'fp16'"),
    ({"device": "tpu"}, ARGUMENT, "device 'tpu' cannot be used on this machine"),
    ({"out": ""}, ARGUMENT, "out must be the folder to write the cache to, not ''"),
    ({"out": 3}, ARGUMENT, "out must be the folder to write the cache to, not 3"),
    ({"model": "emojy"}, sdkit.SourceError, "'emojy' is neither a path that exists nor a Hub id"),
    ({"model": "emojy", "size": None}, sdkit.SourceError, "'emojy' is neither a path that exists nor a Hub id"),
]


@pytest.mark.parametrize(("options", "kind", "fragment"), ARGUMENTS, ids=lambda value: str(value)[:30])
def test_arguments_of_a_cache(
    tmp_path: Path, options: dict[str, Any], kind: type[sdkit.SdkitError], fragment: str
) -> None:
    photos(tmp_path / "data")
    one_sentence(lambda: make_cache(tmp_path, **options), kind, fragment)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make images and a cache of them."""
    folder = tmp_path_factory.mktemp("made")
    photos(folder / "data")
    make_cache(folder)
    return folder


class TestOut:
    @pytest.fixture
    def made(self, once: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(once, tmp_path, dirs_exist_ok=True))

    @pytest.mark.parametrize(
        ("options", "fragment"),
        [
            ({"size": 32}, "size 16 x 16, not 32 x 32"),
            ({"flip": True}, "flip false, not true"),
            ({"crop": "random"}, "crop center, not random"),
            ({"crop": "random", "augmentations": 2}, "crop center, not random"),
            ({"embeddings": True}, "embeddings false, not true"),
            ({"seed": 1}, "seed 0, not 1"),
            ({"dtype": "bf16"}, "dtype float32, not bfloat16"),
            ({"shard_size": 3}, "shard_size 1024, not 3"),
        ],
    )
    def test_a_cache_of_other_settings(self, made: Path, options: dict[str, Any], fragment: str) -> None:
        one_sentence(lambda: make_cache(made, **options), CACHE, f"made with {fragment} as asked for now; name another")

    def test_a_cache_of_another_model(self, made: Path) -> None:
        from safetensors.torch import load_file, save_file

        other = made / "model"
        shutil.copytree(Path(sdkit.__file__).parent / "assets" / "emoji", other)
        for part, weights, words in (
            ("text_encoder", "model", "the text encoder"),
            ("vae", "diffusion_pytorch_model", "the VAE"),
        ):
            path = other / part / f"{weights}.safetensors"
            save_file({name: x * 1.01 for name, x in load_file(path).items()}, path, {"format": "pt"})
            one_sentence(lambda: make_cache(made, model=other), CACHE, f"(of emoji) made with {words} ")

    @pytest.mark.parametrize("change", ["another image", "another caption", "repaired image"])
    def test_a_cache_of_other_data(self, made: Path, change: str) -> None:
        if change == "another image":
            (made / "data" / "9.png").write_bytes(png())
        elif change == "another caption":
            (made / "data" / "0.txt").write_text("red")
        else:
            Image.new("RGB", (99, 99)).save(made / "data" / "0.png")
        one_sentence(lambda: make_cache(made), CACHE, "made with the data (names, captions, file sizes)")

    def test_a_folder_of_something_else(self, made: Path) -> None:
        one_sentence(lambda: make_cache(made, out=made / "data"), CACHE, "is not empty, and holds no latent cache")
        assert sorted(path.name for path in (made / "data").iterdir()) == ["0.png", "1.png"]

    def test_a_file(self, made: Path) -> None:
        one_sentence(lambda: make_cache(made, out=made / "data" / "0.png"), CACHE, "is a file; name a folder")
        one_sentence(lambda: make_cache(made, out=made / "data" / "0.png" / "x"), sdkit.SdkitError, "cannot write")

    def test_a_damaged_manifest(self, made: Path) -> None:
        (made / "out" / "manifest.json").write_text("{")
        one_sentence(
            lambda: make_cache(made), CACHE, "manifest.json is damaged: it is not valid JSON", "delete the folder"
        )

    @pytest.mark.skipif(sys.platform != "linux", reason="needs a read-only file system")
    def test_a_place_that_cannot_be_written(self, made: Path) -> None:
        one_sentence(lambda: make_cache(made, out="/proc/sdkit"), sdkit.SdkitError, "cannot write /proc/sdkit")


class TestImages:
    def test_none_can_be_used(self, tmp_path: Path) -> None:
        data = photos(tmp_path / "data", 0, a__png=b"", b__png=png()[:40])
        Image.new("RGB", (1, 1)).save(data / "c.png")
        fragments = ("none of the 3 images in ", "can be used; the first, a.png: ", "a.png is not an image")
        one_sentence(lambda: make_cache(tmp_path), DATA, *fragments)
        one_sentence(lambda: sdkit.data.LatentCache(tmp_path / "out"), CACHE, "is not finished")

    def test_dots(self, tmp_path: Path) -> None:
        photos(tmp_path / "data", 0)
        Image.new("RGB", (1, 1)).save(tmp_path / "data" / "dot.png")
        one_sentence(lambda: make_cache(tmp_path), DATA, "dot.png: 1 x 1 pixels are too few for a crop of 16 x 16")

    def test_only_missing_ones(self, tmp_path: Path) -> None:
        rows = "\n".join(json.dumps({"file_name": f"x{i}.png", "text": ""}) for i in range(3))
        photos(tmp_path / "data", 1, metadata__jsonl=rows)
        made = sdkit.data.LatentCache(make_cache(tmp_path))
        assert [one.name for one in made.manifest.skipped] == ["x0.png", "x1.png", "x2.png"]
        assert all("No such file" in one.reason for one in made.manifest.skipped)

    def test_a_model_that_does_not_say_its_size(self, tmp_path: Path) -> None:
        photos(tmp_path / "data")
        vae = Path(sdkit.__file__).parent / "assets" / "emoji" / "vae"
        one_sentence(lambda: make_cache(tmp_path, model=vae, size=None), ARGUMENT, "does not say what size it is for")
        one_sentence(lambda: make_cache(tmp_path, model=vae), sdkit.SourceError, "not a CLIP text encoder")


def test_without_the_library(tmp_path: Path) -> None:
    photos(tmp_path)
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        f"import sdkit.data\ntry: sdkit.data.open_examples({str(tmp_path)!r})\n"
        "except sdkit.SdkitError as error: print(error)"
    )
    root = str(Path(sdkit.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "reading data sets needs the datasets library; install 'sdkit[train]'.\n"


def test_the_room_is_imported_lightly() -> None:
    code = "import sys, sdkit.data; print({'torch', 'datasets', 'numpy'} & sys.modules.keys())"
    root = str(Path(sdkit.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert sdkit.data.__all__ == sorted(sdkit.data._HOMES)
    assert callable(sdkit.data.cache)
    assert callable(sdkit.data.check)
    with pytest.raises(AttributeError, match=r"module 'sdkit\.data' has no attribute 'cach'"):
        _ = sdkit.data.cach
