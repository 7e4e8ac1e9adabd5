"""Making a latent cache: its content, interruption at any point, and several processes."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import sdkit
from sdkit.data import LatentCache, Transform, cache, open_examples
from sdkit.data.latent_cache.manifest import Manifest, text_identity, tokenizer_identity
from sdkit.data.latent_cache.shards import ShardEncoder
from sdkit.data.transform import draw
from sdkit.errors import CacheError
from tests.data import cache_job, kill_job
from tests.helpers import forks, tiny

pytest.importorskip("datasets")

LONG = "red apple blue cat " * 16  # 64 tokens, which take 3 chunks of the embedded model
FLOAT16 = {"rtol": 2.0**-10, "atol": 1e-5}  # the rounding of float16, and that of sums of float32 in another order


def make(data: Path, out: Path, **options: Any) -> LatentCache:
    settings: dict[str, Any] = {"size": 16, "dtype": "fp32", "device": "cpu", "shard_size": 2, **options}
    return LatentCache(cache("emoji", data, out, **settings))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make seven small pictures, of which the fourth is broken and the last is too small."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(7):
        pixels = rng.integers(0, 256, (3, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((150 - i, 20 + i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a picture of {i}" if i != 1 else LONG)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:100])
    Image.new("RGB", (1, 1)).save(folder / "6.png")
    return folder


@pytest.fixture(scope="module")
def made(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    out = tmp_path_factory.mktemp("made") / "deep" / "cache"
    return make(photos, out, crop="random", flip=True, augmentations=3, embeddings=True)


class TestContent:
    def test_order_and_names(self, made: LatentCache) -> None:
        """Items are in the order of the examples, with the augmentations of an example in a row. A broken example
        leaves no gap.
        """
        assert len(made) == 15
        expected = [(f"{i}.png", i, a) for i in (0, 1, 2, 4, 5) for a in range(3)]
        assert [(item["name"], item["index"], item["augmentation"]) for item in made] == expected
        assert made[-1]["name"] == "5.png"
        with pytest.raises(IndexError):
            made[15]

    def test_moments_are_the_vaes_raw_ones_of_the_transformed_image(
        self, made: LatentCache, photos: Path, sd: sdkit.StableDiffusion
    ) -> None:
        examples, transform = open_examples(photos), Transform(size=(16, 16), crop="random", flip=True)
        different = set()
        for item in made:
            pixels = transform(examples[item["index"]].load(), draw(0, item["index"], item["augmentation"]))
            mean, logvar = sd.vae.moments(pixels[None])
            assert item["mean"].dtype == item["logvar"].dtype == torch.float32
            torch.testing.assert_close(item["mean"], mean[0], **FLOAT16)
            torch.testing.assert_close(item["logvar"], logvar[0], **FLOAT16)
            different.add(item["mean"].numpy().tobytes())
        assert len(different) > 12  # two random crops can be equal

    def test_captions(self, made: LatentCache, sd: sdkit.StableDiffusion) -> None:
        for item in made:
            caption = LONG.strip() if item["index"] == 1 else f"a picture of {item['index']}"
            assert item["ids"].dtype == torch.int64
            assert torch.equal(item["ids"], sd.text.tokenize(caption)[0][0])
            assert item["embeddings"] is not None
            torch.testing.assert_close(item["embeddings"], sd.text.encode(caption)[0], **FLOAT16)
        assert made[3]["ids"].shape == (3, sd.text.length)

    def test_the_empty_prompt(self, made: LatentCache, sd: sdkit.StableDiffusion) -> None:
        empty = made.empty
        assert torch.equal(empty["ids"], sd.text.tokenize("")[0][0])
        assert empty["embeddings"] is not None
        torch.testing.assert_close(empty["embeddings"], sd.text.encode("")[0], **FLOAT16)
        # Repeated, it is the empty prompt in as many chunks.
        torch.testing.assert_close(empty["embeddings"].repeat(3, 1), sd.text.encode("", chunks=3)[0], **FLOAT16)

    def test_manifest(self, made: LatentCache, sd: sdkit.StableDiffusion) -> None:
        manifest, settings = made.manifest, made.manifest.settings
        assert (manifest.examples, manifest.images, manifest.items) == (7, 5, 15)
        assert [one.name for one in manifest.skipped] == ["3.png", "6.png"]
        assert "1 x 1 pixels are too few" in manifest.skipped[1].reason
        assert (settings.vae, settings.scale, settings.factor) == (sd.vae.identity, sd.vae.scale, 8)
        assert (settings.text, settings.tokenizer) == (text_identity(sd.text), tokenizer_identity(sd.text))
        assert (settings.size, settings.crop, settings.flip, settings.seed) == ((16, 16), "random", True, 0)
        assert (manifest.sdkit, manifest.model) == (sdkit.__version__, "emoji")
        assert [one.items for one in manifest.shards] == [6, 3, 6, 0]

    def test_the_defaults(self, photos: Path, tmp_path: Path) -> None:
        """The defaults are the model's own size, one augmentation, and no embeddings."""
        small = LatentCache(cache("emoji", photos, tmp_path / "c", device="cpu", dtype="fp32"))
        assert small[0]["mean"].shape == (4, 16, 16)
        assert (len(small), small.empty["embeddings"], small[0]["embeddings"]) == (5, None, None)

    @pytest.mark.parametrize("options", [{"streaming": True}, {"batch_size": 1}, {"workers": 1}, {"shard_size": 100}])
    def test_how_it_is_made_changes_nothing(
        self, made: LatentCache, photos: Path, tmp_path: Path, options: Any
    ) -> None:
        other = make(photos, tmp_path, crop="random", flip=True, augmentations=3, **options)
        for a, b in zip(made, other, strict=True):
            torch.testing.assert_close(a["mean"], b["mean"], **FLOAT16)
            assert (a["name"], a["augmentation"]) == (b["name"], b["augmentation"])

    def test_another_seed(self, made: LatentCache, photos: Path, tmp_path: Path) -> None:
        other = make(photos, tmp_path, crop="random", flip=True, augmentations=3, seed=1)
        assert sum(torch.equal(a["mean"], b["mean"]) for a, b in zip(made, other, strict=True)) < 3

    def test_a_vae_that_is_not_finite_skips_the_image(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd: sdkit.StableDiffusion
    ) -> None:
        moments = sdkit.VAE.moments

        def overflowing(self: sdkit.VAE, images: Any, **options: Any) -> Any:
            mean, logvar = moments(self, images, **options)
            mean[1, 0, 0, 0] = 1e6  # beyond float16's range
            return mean, logvar

        monkeypatch.setattr(sdkit.VAE, "moments", overflowing)
        spoilt = make(photos, tmp_path, shard_size=7)
        assert [one.name for one in spoilt.manifest.skipped] == ["1.png", "3.png", "6.png"]
        assert [item["name"] for item in spoilt] == ["0.png", "2.png", "4.png", "5.png"]
        assert torch.equal(spoilt[1]["ids"], sd.text.tokenize("a picture of 2")[0][0])


class TestAgain:
    def test_the_same_call_does_nothing(self, photos: Path, tmp_path: Path) -> None:
        make(photos, tmp_path)
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        make(photos, tmp_path)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before

    def test_only_what_is_missing_or_cut_short_is_made(self, photos: Path, tmp_path: Path) -> None:
        make(photos, tmp_path)
        before = content(tmp_path)
        (tmp_path / "shard-00001.safetensors").unlink()
        (tmp_path / "shard-00002.safetensors").write_bytes(before["shard-00002.safetensors"][:-7])
        kept = (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns
        make(photos, tmp_path)
        assert content(tmp_path) == before
        assert (tmp_path / "shard-00000.safetensors").stat().st_mtime_ns == kept


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_point_and_resumed_it_is_as_if_never_stopped(photos: Path, tmp_path: Path) -> None:
    """A cache that was killed and resumed must be bit-identical. Seven files (two manifests, four shards, and the empty
    prompt) are written in three steps each.
    """
    ended = forks.run(kill_job.main, str(photos), tmp_path)
    assert ended.codes == [0], ended.err
    points, deaths = map(int, ended.out.split())
    assert (points, deaths) == (21, 5)
    uninterrupted = content(tmp_path / "22")
    assert len(uninterrupted) == 7
    for name in [*map(str, range(1, 22)), "often"]:
        assert content(tmp_path / name) == uninterrupted, name
    LatentCache(tmp_path / "often").verify()


class TestProcesses:
    def test_two_give_the_files_that_one_gives(self, photos: Path, tmp_path: Path) -> None:
        settings = {"size": 16, "shard_size": 2, "embeddings": True, "crop": "random", "augmentations": 2}
        for start, out in ((forks.run, "one"), (forks.launch, "two")):
            ended = start(functools.partial(cache_job.made, str(photos), str(tmp_path / out), **settings))
            assert not any(ended.codes), ended.err
            # Each process prints the number of processes.
            assert sorted(ended.out.replace("\n", "")) == list({"one": "1", "two": "22"}[out])
        assert content(tmp_path / "two") == content(tmp_path / "one")
        assert len(content(tmp_path / "one")) == 7

    def test_an_error_ends_both_with_its_sentence(self, photos: Path, tmp_path: Path) -> None:
        (tmp_path / "diary.txt").write_text("dear diary")
        ended = forks.launch(functools.partial(cache_job.made, str(photos), str(tmp_path), size=16))
        assert all(ended.codes)
        assert f"{tmp_path} is not empty, and holds no latent cache; name another folder." in ended.err
        assert content(tmp_path) == {"diary.txt": b"dear diary"}


def test_damaged_files_are_made_anew(photos: Path, made: LatentCache, tmp_path: Path) -> None:
    """One flipped bit in the middle of a shard is found by the shard's checksum, and the same call repairs it."""
    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    shard = copy / made.manifest.shards[0].file
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    again = make(photos, copy, crop="random", flip=True, augmentations=3, embeddings=True)
    again.verify()
    assert content(copy) == content(made.path)


def test_damage_is_found_where_another_file_is_missing(photos: Path, tmp_path: Path) -> None:
    """Damage must be found before the manifest is rewritten, because the new manifest would have the damaged file's
    checksum.
    """
    make(photos, tmp_path)
    before = content(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    data = bytearray(before["shard-00000.safetensors"])
    data[-1] ^= 1
    (tmp_path / "shard-00000.safetensors").write_bytes(data)
    make(photos, tmp_path).verify()
    assert content(tmp_path) == before


def test_a_stream_of_files_that_have_changed_is_other_data(photos: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    make(folder, tmp_path / "cache", streaming=True)
    shutil.copy(folder / "0.png", folder / "8.png")
    with pytest.raises(CacheError, match=r"holds a cache .* made with .*data"):
        make(folder, tmp_path / "cache", streaming=True)


def test_the_models_own_size_is_in_its_vaes_pixels(photos: Path, tmp_path: Path) -> None:
    """The default size is in pixels of the model's own VAE. One of three levels has a factor of 4."""
    model = tiny.model(tmp_path / "model")
    for levels in (3, 4):
        AutoencoderKL(
            block_out_channels=(16,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, layers_per_block=1, norm_num_groups=4,
        ).save_pretrained(model / "vae")  # fmt: skip
        cached = LatentCache(cache(model, photos, tmp_path / f"cache-{levels}", device="cpu"))
        assert cached.manifest.settings.size == (4 * 2 ** (levels - 1),) * 2
        assert cached[0]["mean"].shape == (4, 4, 4)


def test_a_folder_that_cannot_be_written(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with pytest.raises(CacheError, match=r"^cannot write .*: permission denied; name another folder\.$"):
        make(photos, tmp_path / "cache")


def test_one_call_at_a_time(photos: Path, tmp_path: Path) -> None:
    """A second call at the same time is refused, and does no harm."""
    held = filelock.FileLock(tmp_path / ".lock")
    with held, pytest.raises(CacheError, match=r"^another process makes the cache .*; wait for it, or name another"):
        make(photos, tmp_path)
    assert len(make(photos, tmp_path)) == 5


Tensors = dict[str, Tensor]
HEADERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cut": lambda _: "{",
    "nested": lambda _: "[" * 100_000,
    "a list": lambda _: "[]",
    "nothing skipped is said": lambda own: json.dumps({"settings": own["settings"]}),
    "skipped no object": lambda own: json.dumps(own | {"skipped": [5]}),
    "skipped of other types": lambda own: json.dumps(own | {"skipped": [{"name": 5, "reason": None}]}),
    "skipped what is there": lambda own: json.dumps(own | {"skipped": [{"name": "0.png", "reason": "x"}]}),
    "of other settings": lambda own: json.dumps(own | {"settings": "0" * 64}),
}
TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "mean has no axes": lambda x: x | {"mean": torch.zeros(())},
    "images are missing": lambda x: x | {"mean": x["mean"][:1]},
    "all of them": lambda x: {name: one[:1] if one.shape[0] == 2 else one for name, one in x.items()},
    "one is missing everywhere": lambda x: {
        name: one[:1] if name not in ("names", "ids") else one[: int(x[f"{name}_ends"][0])] for name, one in x.items()
    },
    "mean is NaN": lambda x: x | {"mean": x["mean"] * float("nan")},
    "logvar is infinite": lambda x: x | {"logvar": x["logvar"] / 0},
    "mean is float32": lambda x: x | {"mean": x["mean"].float()},
    "other channels": lambda x: x | {name: x[name][:, :, :2] for name in ("mean", "logvar")},
    "ids are negative": lambda x: x | {"ids": -x["ids"]},
    "ids are beyond the vocabulary": lambda x: x | {"ids": x["ids"] + 100_000},
    "ends descend": lambda x: x | {"ids_ends": x["ids_ends"].flip(0)},
    "ends stop early": lambda x: x | {"names_ends": x["names_ends"] - 1},
    "names are not UTF-8": lambda x: x | {"names": torch.full_like(x["names"], 255)},
    "examples of another shard": lambda x: x | {"index": x["index"] + 2},
    "examples twice": lambda x: x | {"index": x["index"] * 0},
    **{
        f"no {name}": lambda x, name=name: {key: x[key] for key in x if key != name}
        for name in ("mean", "names", "ids")
    },
}


def damage(folder: Path, file: str, name: str) -> None:
    """Rewrite a shard with a fault in its header or its tensors, as described by HEADERS and TENSORS."""
    with safe_open(folder / file, "pt") as opened:
        header = opened.metadata()["sdkit"]
    tensors = safetensors.torch.load_file(folder / file)
    if name in HEADERS:
        header = HEADERS[name](json.loads(header))
    else:
        tensors = {key: x.contiguous().clone() for key, x in TENSORS[name](tensors).items()}
    (folder / file).write_bytes(safetensors.torch.save(tensors, {"sdkit": header}))


def unfinish(folder: Path) -> None:
    """Make the cache look as if it had been stopped before its manifest was completed."""
    replace(
        Manifest.read(folder), complete=False, examples=0, images=0, items=0, skipped=(), shards=(), empty=None
    ).write(folder)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a complete cache of `photos`."""
    return make(photos, tmp_path_factory.mktemp("whole")).path


class TestDamagedShardsWhileResuming:
    @pytest.mark.parametrize(
        ("file", "name"),
        [
            *(("shard-00000.safetensors", name) for name in (*HEADERS, *TENSORS)),
            *(("empty-prompt.safetensors", name) for name in ("cut", "ids are negative", "no ids")),
        ],
    )
    def test_they_are_made_anew(self, whole: Path, photos: Path, tmp_path: Path, file: str, name: str) -> None:
        folder = Path(shutil.copytree(whole, tmp_path / "c"))
        unfinish(folder)
        damage(folder, file, name)
        make(photos, folder)
        assert content(folder) == content(whole)

    def test_whole_ones_stay(self, whole: Path, photos: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(whole, tmp_path / "c"))
        unfinish(folder)
        before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
        make(photos, folder)
        assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")} == before
        assert content(folder) == content(whole)

    def test_a_shard_that_lacks_images_is_told_at_the_end_of_a_stream(
        self, whole: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Before the end of a stream, the number of images that a shard should have is unknown. The end is simulated
        here.
        """
        folder = Path(shutil.copytree(whole, tmp_path / "c"))
        unfinish(folder)
        damage(folder, "shard-00002.safetensors", "one is missing everywhere")
        with monkeypatch.context() as patch:
            patch.setattr(ShardEncoder, "made", lambda *_, **__: True)
            with pytest.raises(CacheError, match=r"shard-00002.safetensors lacked images and is deleted; run the same"):
                make(photos, folder)
        make(photos, folder)
        assert content(folder) == content(whole)

    def test_what_cannot_be_read_is_not_told_as_damaged(
        self, whole: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = Path(shutil.copytree(whole, tmp_path / "c"))
        before = content(folder)
        opening = Path.open

        def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "shard-00001.safetensors" and path.parent == folder:
                raise PermissionError(errno.EACCES, "Permission denied")
            return opening(path, *arguments, **options)

        for finished in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(Path, "open", refuse)
                with pytest.raises(CacheError, match=r"^cannot read .*shard-00001.safetensors: permission"):
                    make(photos, folder)
                if finished:
                    for read in (LatentCache.verify, lambda made: made[2]):
                        with pytest.raises(
                            CacheError, match=r"^cannot read .*00001.safetensors: permission denied; check"
                        ):
                            read(LatentCache(folder))
            assert content(folder) == before
            unfinish(folder)
            before = content(folder)


def test_a_name_that_no_folder_can_have(photos: Path) -> None:
    for name in ("nul\0", "n" * 300):
        with pytest.raises(sdkit.ArgumentError, match=r"^cannot write .*; name another folder\.$"):
            make(photos, Path(name))
