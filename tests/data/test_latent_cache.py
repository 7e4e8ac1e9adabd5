"""Reading a latent cache: it is memory-mapped, compared with what a run needs, and checked for damage."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdkit
from sdkit.data import LatentCache, Transform, cache
from sdkit.data.latent_cache.manifest import FORMAT_VERSION, Manifest, Settings, Shard
from sdkit.data.latent_cache.shard_file import save
from sdkit.files import sha256

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("cache")
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(data / f"{i}.png")
    return cache("emoji", data, out, size=16, dtype="fp32", device="cpu", shard_size=2, embeddings=True)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


class TestDamage:
    def test_whole(self, folder: Path) -> None:
        LatentCache(folder).verify()

    @pytest.mark.parametrize("file", ["shard-00001.safetensors", "empty-prompt.safetensors"])
    @pytest.mark.parametrize("at", [3, -2])
    def test_one_wrong_bit_is_found_by_checksum(self, copy: Path, file: str, at: int) -> None:
        data = bytearray((copy / file).read_bytes())
        data[at] ^= 1
        (copy / file).write_bytes(data)
        with pytest.raises(
            sdkit.CacheError, match=rf"^{file} of the cache .* is damaged \(wrong checksum\); delete that"
        ):
            LatentCache(copy).verify()

    @pytest.mark.parametrize("how", ["missing", "short"])
    def test_a_file_that_is_not_whole_is_found_on_opening(self, copy: Path, how: str) -> None:
        file = copy / "shard-00001.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        if how == "missing":
            file.unlink()
        with pytest.raises(sdkit.CacheError, match=r"^shard-00001.safetensors of the cache .* is missing or cut short"):
            LatentCache(copy)

    def test_a_header_that_is_damaged(self, copy: Path) -> None:
        file = copy / "shard-00000.safetensors"
        file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])
        with pytest.raises(sdkit.CacheError, match=r"shard-00000.safetensors is not a whole safetensors file"):
            LatentCache(copy)[0]

    @pytest.mark.parametrize(
        ("change", "fragment"),
        [
            (lambda fields: fields | {"format": "sdkit.other"}, "is not the manifest of a latent cache"),
            (lambda fields: fields | {"format_version": FORMAT_VERSION + 1}, "was written by a newer version of sdkit"),
            (lambda fields: fields | {"complete": False}, "it has a wrong checksum"),
            (lambda fields: fields | {"unknown": 1}, "is damaged"),
            (lambda fields: {key: fields[key] for key in fields if key != "checksum"}, "has no 'checksum'"),
            (lambda fields: {key: fields[key] for key in fields if key != "settings"}, "is damaged"),
            (lambda fields: fields | {"settings": None}, "is damaged"),
            (lambda fields: [fields], "is damaged"),
        ],
    )
    def test_manifests(self, copy: Path, change: Any, fragment: str) -> None:
        path = copy / "manifest.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        with pytest.raises(sdkit.CacheError, match=fragment):
            LatentCache(copy)

    @pytest.mark.parametrize(
        ("change", "fragment"),
        [
            (lambda fields: fields | {"items": "3"}, "a 'items' of another type"),
            (lambda fields: fields | {"complete": 1}, "a 'complete' of another type"),
            (lambda fields: fields | {"skipped": [5]}, "holds something else in place of a skipped"),
            (lambda fields: fields | {"items": 2}, "numbers that contradict one another"),
            (lambda fields: fields | {"examples": 4}, "numbers that contradict one another"),
            (lambda fields: fields | {"empty": None}, "numbers that contradict one another"),
            (lambda fields: fields | {"shards": fields["shards"][:1] * 2}, "names a file twice"),
            (lambda fields: fields | {"shards": [{"file": "a"}]}, "has no 'items'"),
            *[
                (lambda fields, key=key, value=value: fields | {"settings": fields["settings"] | {key: value}}, said)
                for key, value, said in (
                    ("size", "16", "a 'size' that is not two"),
                    ("size", [16, 16.5], "a 'size' that is not two"),
                    ("size", [16, 18], "that the 'factor' does not divide"),
                    ("factor", 0, "impossible settings"),
                    ("augmentations", 0, "impossible settings"),
                    ("scale", float("nan"), "impossible settings"),
                    ("flip", "no", "a 'flip' of another type"),
                )
            ],
            *[
                (
                    lambda fields, key=key, value=value: (
                        fields | {"shards": [fields["shards"][0] | {key: value}, fields["shards"][1]]}
                    ),
                    said,
                )
                for key, value, said in (
                    ("file", "../shard-00000.safetensors", "outside of the folder"),
                    ("file", "/etc/passwd", "outside of the folder"),
                    ("file", "..", "outside of the folder"),
                    ("file", "a\0", "outside of the folder"),
                    ("bytes", -1, "an impossible size"),
                    ("sha256", "x", "an impossible size or checksum"),
                )
            ],
        ],
    )
    def test_manifests_of_the_first_version_have_no_checksum_but_are_checked(
        self, copy: Path, change: Any, fragment: str
    ) -> None:
        path = copy / "manifest.json"
        fields = json.loads(path.read_text()) | {"format_version": 1}
        del fields["checksum"]
        path.write_text(json.dumps(fields))
        LatentCache(copy).verify()
        path.write_text(json.dumps(change(fields)))
        with pytest.raises(sdkit.CacheError, match=rf"manifest.json is damaged: it .*{fragment}.*; delete the folder"):
            LatentCache(copy)

    @pytest.mark.parametrize("field", ["scale", "shift", "vae", "data", "dtype"])
    def test_a_manifest_has_a_checksum_of_itself(self, copy: Path, field: str) -> None:
        """A single changed letter is found, whatever the manifest contains."""
        path = copy / "manifest.json"
        text = path.read_text()
        at = text.index(f'"{field}": ') + len(f'"{field}": ') + 1
        for other in ("1", "2"):
            path.write_text(text[:at] + other + text[at + 1 :])
            if path.read_text() != text:
                with pytest.raises(sdkit.CacheError, match=r"manifest.json is damaged: it (has a wrong|is not valid)"):
                    LatentCache(copy)

    def test_an_unfinished_one(self, copy: Path) -> None:
        replace(Manifest.read(copy), complete=False).write(copy)
        with pytest.raises(sdkit.CacheError, match="is not finished"):
            LatentCache(copy)

    @pytest.mark.parametrize(
        ("name", "change", "fragment"),
        [
            ("ids_ends", lambda x: x - 100, "row 0 of 'embeddings' would go from 0 to -99"),
            ("ids_ends", lambda x: x + 2**40, "row 0 of 'embeddings' would go from 0 to"),
            ("ids_ends", lambda x: x * 0, "row 0 of 'embeddings' would go from 0 to 0"),
            ("names_ends", lambda x: x + 2**40, "row 0 of 'names' would go from 0 to"),
            ("names", lambda x: x * 0 + 255, "the name of row 0 is not UTF-8"),
            ("ids", lambda x: -x, "'ids' holds impossible numbers"),
            ("index", lambda x: x - 5, "'index' holds impossible numbers"),
            ("index", lambda x: x + 5, "examples that belong elsewhere"),
            ("sizes", lambda x: x * 0, "'sizes' holds impossible numbers"),
            ("sizes", lambda x: x[:, :1], "holds 'sizes' of another type or shape"),
            ("mean", lambda x: x * float("nan"), "'mean' holds impossible numbers"),
            ("embeddings", lambda x: x / 0, "'embeddings' holds impossible numbers"),
            ("mean", lambda x: x.float(), "holds 'mean' of another type or shape"),
            ("logvar", lambda x: x[..., :1], "holds 'logvar' of another type or shape"),
            ("ids", lambda x: x[:, :1], "holds 'ids' of another type or shape"),
            ("mean", lambda _: None, "lacks the tensor 'mean'"),
        ],
    )
    def test_numbers_that_cannot_be(self, copy: Path, name: str, change: Any, fragment: str) -> None:
        """Impossible values must be found even if the manifest has the right checksum for them, as one made from
        damaged files would.
        """
        LatentCache(copy)[2]
        path = copy / "shard-00000.safetensors"
        with safe_open(path, "pt") as file:
            header = file.metadata()
        tensors = load_file(path)
        changed = change(tensors.pop(name))
        tensors |= {} if changed is None else {name: changed.contiguous()}
        path.write_bytes(safetensors.torch.save(tensors, header))
        manifest = Manifest.read(copy)
        first = replace(manifest.shards[0], bytes=path.stat().st_size, sha256=sha256(path))
        replace(manifest, shards=(first, *manifest.shards[1:])).write(copy)
        made = LatentCache(copy)
        made.verify()
        made[2]  # an item of the other, undamaged shard
        with pytest.raises(sdkit.CacheError, match=rf"shard-00000.safetensors .*{fragment}.*; delete it, then run"):
            made[0]

    def test_shards_of_another_cache(self, folder: Path, copy: Path, tmp_path: Path) -> None:
        """Shards are swapped, and the manifest has the right checksums for them."""
        manifest = Manifest.read(copy)
        shards = tuple(replace(shard, items=2) for shard in manifest.shards)
        replace(manifest, shards=shards, images=4, examples=4, items=4).write(copy)
        with pytest.raises(sdkit.CacheError, match=r"holds another number of images than the manifest says"):
            LatentCache(copy)[3]

    def test_no_cache(self, tmp_path: Path) -> None:
        with pytest.raises(sdkit.CacheError, match=r"there is no latent cache in .*; sdkit cache makes one\."):
            LatentCache(tmp_path)
        (tmp_path / "manifest.json").write_text("{")
        with pytest.raises(sdkit.CacheError, match="is damaged"):
            LatentCache(tmp_path)


class TestCheckModel:
    def test_what_matches(self, folder: Path) -> None:
        made = LatentCache(folder)
        settings = made.manifest.settings
        made.check_model()
        made.check_model(
            vae=settings.vae, scale=settings.scale, shift=settings.shift, factor=settings.factor,
            tokenizer=settings.tokenizer, text=settings.text,
            transform=Transform(size=(16, 16)),
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("wanted", "fragment"),
        [
            ({"vae": "0123"}, r"the VAE [0-9a-f]{16}, not 0123"),
            ({"scale": 0.18215}, r"scale 0\.456064, not 0\.18215"),
            ({"shift": 0.1}, r"shift 0, not 0\.1"),
            ({"factor": 4}, r"factor 8, not 4"),
            ({"tokenizer": "0123"}, r"the tokenizer [0-9a-f]{16}, not 0123"),
            ({"text": "0123"}, r"the text encoder [0-9a-f]{16}, not 0123"),
            ({"transform": Transform(size=(16, 24))}, r"size 16 x 16, not 16 x 24"),
            ({"transform": Transform(size=(16, 16), crop="random")}, r"crop center, not random"),
            ({"transform": Transform(size=(16, 16), flip=True)}, r"flip false, not true"),
        ],
    )
    def test_what_does_not(self, folder: Path, wanted: dict[str, Any], fragment: str) -> None:
        with pytest.raises(
            sdkit.CacheError, match=rf"^the cache .* \(of emoji\) was made with {fragment}.* make another"
        ):
            LatentCache(folder).check_model(**wanted)

    def test_the_text_encoder_matters_to_embeddings_only(self, folder: Path, copy: Path) -> None:
        manifest = Manifest.read(copy)
        replace(manifest, settings=replace(manifest.settings, embeddings=False)).write(copy)
        LatentCache(copy).check_model(text="0123")


READER = """
import sys
from pathlib import Path
from sdkit.data import LatentCache

def mebibytes(kind):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) // 1024

small, large = map(LatentCache, sys.argv[1:])
for item in small:
    item["mean"].sum()
resident, held = mebibytes("VmRSS"), mebibytes("RssAnon")
assert len(large) == 2048
for i in range(0, 2048, 300):
    large[i]["mean"].sum()
print(mebibytes("VmRSS") - resident)
for item in large:
    item["mean"].sum()
print(mebibytes("RssAnon") - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_large_cache_is_not_brought_into_memory(folder: Path, tmp_path: Path) -> None:
    """Reading a few items of 128 MiB in two shards must leave most of it on disk. Reading all items must not increase
    the process's own memory: mapped pages do not count, because the system reclaims them when it needs to.
    """
    settings = replace(LatentCache(folder).manifest.settings, size=(512, 512), embeddings=False, shard_size=1024)
    shards = tuple(fabricated(tmp_path / f"shard-{i}.safetensors", 1024, settings) for i in range(2))
    shutil.copy(folder / "empty-prompt.safetensors", tmp_path)
    manifest = replace(Manifest.read(folder), settings=settings, examples=2048, images=2048, items=2048, shards=shards)
    manifest.write(tmp_path)
    command = [sys.executable, "-c", READER, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(sdkit.__file__).parents[1], capture_output=True, text=True, check=True)
    some, held = map(int, done.stdout.split())
    assert some < 64  # MiB; the kernel maps up to 2 MiB around each page that is read
    assert held < 8


def fabricated(path: Path, n: int, settings: Settings) -> Shard:
    """Write a shard of n images of 512 x 512 pixels."""
    moments = torch.zeros(n, 1, 4, 64, 64, dtype=torch.float16)
    ends = torch.arange(1, n + 1)
    tensors = {"mean": moments, "logvar": moments.clone()}
    tensors |= {name: ends.clone() for name in ("index", "names_ends", "ids_ends")}
    tensors |= {"names": torch.full((n,), ord("a"), dtype=torch.uint8), "ids": torch.zeros(n, 25, dtype=torch.int32)}
    save(path, tensors, [], settings)
    return Shard(file=path.name, items=n, bytes=path.stat().st_size, sha256=sha256(path))


def test_it_travels_to_other_processes(folder: Path) -> None:
    made = LatentCache(folder)
    first = made[0]["mean"]
    assert torch.equal(pickle.loads(pickle.dumps(made))[0]["mean"], first)


def test_items_are_copies(folder: Path) -> None:
    made = LatentCache(folder)
    before = made[1]["mean"].clone()
    made[1]["mean"].zero_()
    made[1]["ids"].zero_()
    assert torch.equal(made[1]["mean"], before)
    assert made[1]["ids"].any()
    made.verify()
