"""Examples for the stages: held-out images, the source of noise, replacements for broken images, and caches, which must
give the same examples as the images.
"""

from __future__ import annotations

import json
import shutil
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from sdkit.data import LatentCache, Transform, cache, open_examples
from sdkit.data.transform import draw
from sdkit.errors import ArgumentError, CacheError, DataError
from sdkit.networks.autoencoder import VAE
from sdkit.networks.text_encoder import TextEncoder
from sdkit.training import UNetConfig
from sdkit.training.batches import noise_of
from sdkit.training.distributed import split_over_processes
from sdkit.training.signals import StopSignals, Unfinished, raise_if_stopped
from sdkit.training.stages.examples import CachedLatents, DenoisingExamples, ImageLatents, open_provider
from sdkit.training.stages.images import TrainingImages, report_skipped, split
from tests.helpers import tiny
from tests.helpers.loaders import load_text, load_vae

LONG = "red apple blue cat " * 12  # 48 tokens, which take 2 chunks


@pytest.fixture(autouse=True)
def one_process() -> None:
    PartialState(cpu=True)


class TestSplit:
    @pytest.mark.parametrize("n", [*range(1, 45), 319, 320, 321, 1000, 12345])
    def test_held_out_images_are_a_few_spread_evenly_and_not_learnt_from(self, n: int) -> None:
        train, held_out = split(n)
        assert len(held_out) == len({*held_out}) == min(16, n // 20 if n >= 20 else n)
        gaps = np.diff([-held_out[0], *held_out, 2 * n - held_out[-1]])  # the first and last gaps are half as long
        assert gaps.max() - gaps.min() <= 2
        expected = range(n) if n < 20 else sorted({*range(n)} - {*held_out})
        assert train.tolist() == [*expected]

    def test_by_hand(self) -> None:
        assert split(40)[1] == [10, 30]
        assert split(20)[1] == [10]
        assert split(3)[1] == [0, 1, 2]


class TestNoise:
    def test_is_of_the_seed_and_the_sample_and_of_no_crop(self) -> None:
        def first(generator: torch.Generator) -> float:
            return float(torch.rand((), generator=generator, dtype=torch.float64))

        assert first(noise_of(3, 5)) == first(noise_of(3, 5))
        different = [first(noise_of(seed, n)) for seed in (0, 1, 2**31 - 1) for n in (0, 1, 2, 2**40)]
        different += [first(draw(seed, n, epoch)) for seed in (0, 1) for n in (0, 1) for epoch in (0, 1, 2)]
        assert len({*different}) == len(different)


class TestTrainingImages:
    @pytest.fixture
    def images(self, tmp_path: Path) -> TrainingImages:
        """Open six images, the second and third of which are broken."""
        photos = tiny.photos(tmp_path / "photos", 6)
        (photos / "001.png").write_bytes(b"no image")
        Image.new("RGB", (3, 300)).save(photos / "002.png")
        return TrainingImages(open_examples(photos), Transform(size=(32, 32), flip=True), seed=5)

    def test_are_those_of_the_transform(self, images: TrainingImages) -> None:
        for epoch in (0, 1):
            x, example = images.load([4, 3], 1, epoch)
            assert (example.name, example.caption) == ("003.png", "a yellow disc")
            assert torch.equal(x, images.transform(example.load(), draw(5, 3, epoch)))
        flipped = [images.load([0], 0, epoch)[0] for epoch in range(12)]
        assert {torch.equal(x, flipped[0]) for x in flipped} == {True, False}  # flips differ between epochs

    def test_the_next_takes_the_place_of_a_broken_one(self, images: TrainingImages) -> None:
        with pytest.warns(UserWarning, match=r"^00[12]\.png is skipped: ") as warned:
            x, example = images.load([0, 1, 2, 3], 1, 0)
        assert torch.equal(images.load([0, 1, 2, 3], 1, 0)[0], x)
        assert example.name == "003.png"
        assert torch.equal(x, images.load([0, 1, 2, 3], 3, 0)[0])
        assert len(warned) == 2  # one warning for each image, although it was asked for twice
        assert [*images.skipped] == ["001.png", "002.png"]
        assert "is not an image" in images.skipped["001.png"]
        assert "3 x 300 pixels are too few" in images.skipped["002.png"]
        assert images.load([0, 1, 2], 1, 0)[1].name == "000.png"  # the image after the last one is the first

    def test_nothing_but_broken_ones_is_one_sentence(self, images: TrainingImages) -> None:
        with (
            pytest.warns(UserWarning, match="is skipped"),
            pytest.raises(
                DataError,
                match=r"^2 images in a row in .*photos cannot be used, the first: .*3 x 300 .* sdkit data check\.$",
            ),
        ):
            images.load([1, 2], 1, 0)

    @pytest.mark.parametrize(
        ("held_out", "names"),
        [([0, 3], ["000.png", "003.png"]), ([1, 3], ["003.png", "003.png"]), ([2, 1], ["000.png", "000.png"])],
    )
    def test_held_out_ones_are_replaced_by_others_that_are_held_out_while_there_are_any(
        self, images: TrainingImages, held_out: list[int], names: list[str], recwarn: Any
    ) -> None:
        assert [images.load_held_out(held_out, i)[1].name for i in (0, 1)] == names
        assert {*images.skipped} == {f"00{i}.png" for i in {1, 2} & {*held_out}}
        recwarn.clear()


class TestReport:
    def test_of_what_was_skipped_grows_from_run_to_run(self, tmp_path: Path) -> None:
        file = tmp_path / "skipped.json"
        report_skipped({}, file)
        assert not file.exists()
        report_skipped({"a.png": "cannot read a.png: ä."}, file)
        report_skipped({"b.png": "too small."}, file)
        assert json.loads(file.read_text()) == {"a.png": "cannot read a.png: ä.", "b.png": "too small."}
        before = file.stat().st_mtime_ns
        report_skipped({"b.png": "too small."}, file)
        assert file.stat().st_mtime_ns == before

    def test_one_process_does_all(self) -> None:
        assert split_over_processes(3, lambda i: 10 * i) == [0, 10, 20]

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
    def test_a_signal_ends_the_work_after_the_piece_at_hand(self, name: str) -> None:
        done = []

        def do(i: int) -> None:
            if i == 2:
                signal.raise_signal(getattr(signal, name))
            raise_if_stopped()  # a stage checks this between two passes of one piece
            done.append(i)

        with StopSignals() as stop, pytest.raises(Unfinished):
            split_over_processes(5, do)
        assert (done, stop.exit_code) == ([0, 1], 128 + getattr(signal, name))
        assert split_over_processes(1, lambda i: i) == [0]  # no signal is pending any more


def provider(config: UNetConfig, vae: VAE, text: TextEncoder) -> DenoisingExamples:
    """Open the data of a run as its stage does."""
    return open_provider(
        config.data, vae, text, size=config.size, own_size=(tiny.SIZE, tiny.SIZE), augment=config.augment,
        seed=config.seed, trains_text=config.train_text_encoder, **config.opened_with(),
    )  # fmt: skip


@dataclass(frozen=True)
class Kit:
    model: Path
    photos: Path
    caches: dict[str, Path]
    vae: VAE
    text: TextEncoder

    def latents(self, data: Path, **changes: Any) -> Any:
        config = UNetConfig(model=self.model, data=data, out_dir="unused", **changes)
        return provider(config, self.vae, self.text)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Make 24 images, the last of which is broken and the second has a long caption, and caches of them in float32."""
    folder = tmp_path_factory.mktemp("data")
    model, photos = tiny.model(folder / "model"), tiny.photos(folder / "photos", 24, size=40)
    (photos / "001.txt").write_text(LONG)
    (photos / "023.png").write_bytes(b"no image")
    options: dict[str, dict[str, Any]] = {"plain": {}, "embedded": {"embeddings": True}}
    options["augmented"] = {"crop": "random", "flip": True, "augmentations": 3, "seed": 4, "size": (32, 24)}
    made = {
        name: cache(model, photos, folder / name, **({"size": 32, "dtype": "fp32", "device": "cpu"} | option))
        for name, option in options.items()
    }
    vae, text = VAE(load_vae(model)).eval(), TextEncoder(*load_text(model)).eval()
    return Kit(model, photos, made, vae.requires_grad_(False), text.requires_grad_(False))


def moments(kit: Kit, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, logvar = kit.vae.posterior(pixels[None])
    return mean[0], logvar[0]


class TestLatents:
    """Examples of 23 usable images. The 12th is held out."""

    def test_a_cache_and_images_are_told_apart(self, kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert isinstance(kit.latents(kit.caches["plain"]), CachedLatents)
        assert isinstance(kit.latents(kit.photos, size=32), ImageLatents)
        monkeypatch.setenv("HOME", str(kit.caches["plain"].parent))
        assert isinstance(kit.latents(Path("~/plain")), CachedLatents)

    def test_a_cache_gives_what_the_images_give(self, kit: Kit) -> None:
        """Moments must agree up to float16's rounding. Captions must be identical."""
        cached, straight = kit.latents(kit.caches["plain"]), kit.latents(kit.photos, size=32)
        assert (cached.scale, cached.shift, cached.shape) == (straight.scale, straight.shift, straight.shape)
        assert (cached.scale, cached.shape) == (0.5, (4, 4))
        assert len(cached.train) == 22  # the broken image is not in the cache
        assert len(straight.train) == 23
        assert cached.held_out == [11]
        assert straight.held_out == [12]
        pairs = [
            (cached.load(i, 0), straight.images.load([*range(24)], index, 0)) for i, index in enumerate(cached.train)
        ]
        pairs.append((cached.validation(0), straight.images.load([*range(24)], 11, 0)))
        for found, (pixels, example) in pairs:
            mean, logvar = moments(kit, pixels)
            torch.testing.assert_close(found["mean"], mean, rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(found["logvar"], logvar, rtol=2**-10, atol=1e-5)
            assert torch.equal(found["ids"], kit.text.tokenize(example.caption)[0][0])
            assert found.keys() == {"mean", "logvar", "ids"}
        assert pairs[1][0]["ids"].shape == (2, 32)
        loaded = straight.load(3, 0)
        assert torch.equal(loaded["pixels"], pairs[3][1][0])
        assert torch.equal(loaded["ids"], pairs[3][0]["ids"])
        for latents in (cached, straight):
            assert torch.equal(latents.empty["ids"], kit.text.tokenize("")[0][0])
            assert latents.name(1) == "001.png"
            assert latents.name(20) == "021.png"

    def test_embeddings_are_the_text_encoders(self, kit: Kit) -> None:
        cached = kit.latents(kit.caches["embedded"])
        for found, caption in ((cached.load(1, 0), LONG), (cached.load(2, 0), "a blue disc"), (cached.empty, "")):
            expected = kit.text.encode(caption)[0]
            assert torch.equal(found["ids"], kit.text.tokenize(caption)[0][0])
            torch.testing.assert_close(found["embeddings"], expected, rtol=2**-10, atol=1e-5)
        # A trained text encoder computes its own embeddings.
        along = kit.latents(kit.caches["embedded"], train_text_encoder=True)
        assert "embeddings" not in along.load(1, 0)
        assert "embeddings" not in along.empty

    def test_augmentations_of_an_image_are_examples_of_their_own(self, kit: Kit) -> None:
        """Augmentation a of an image must be what epoch a of a run straight from the images sees. Augmentations of a
        held-out image must not be trained on.
        """
        cached = kit.latents(kit.caches["augmented"])
        straight = kit.latents(kit.photos, size=(32, 24), augment=("crop", "flip"), seed=4)
        assert len(cached.train) == 22 * 3
        different = set()
        for i, item in enumerate(cached.train.tolist()):
            image, augmentation = divmod(item, 3)
            assert image != 11
            pixels, example = straight.images.load([*range(24)], image, augmentation)
            found = cached.load(i, 0)
            mean, logvar = moments(kit, pixels)
            torch.testing.assert_close(found["mean"], mean, rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(found["logvar"], logvar, rtol=2**-10, atol=1e-5)
            assert cached.name(i) == example.name
            different.add(found["mean"].numpy().tobytes())
        assert len(different) > 60  # of 66 examples, a few of which can be equal
        pixels, _ = straight.images.load([11], 0, 0)
        torch.testing.assert_close(cached.validation(0)["mean"], moments(kit, pixels)[0], rtol=2**-10, atol=1e-5)

    def test_a_cache_without_captions_is_told_once(self, kit: Kit, tmp_path: Path) -> None:
        photos = tiny.photos(tmp_path / "photos", 3)
        for file in photos.glob("*.txt"):
            file.unlink()
        cache(kit.model, photos, tmp_path / "none", size=32, augmentations=2, flip=True, dtype="fp32", device="cpu")
        (photos / "001.txt").write_text("a disc")
        cache(kit.model, photos, tmp_path / "one", size=32, dtype="fp32", device="cpu")
        with pytest.warns(UserWarning, match=r"^none of the 3 images in .*none has a caption; the empty ") as warned:
            kit.latents(tmp_path / "none")
        assert len(warned) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kit.latents(tmp_path / "one")

    def test_what_a_cache_skipped_is_known(self, kit: Kit) -> None:
        (skipped,) = kit.latents(kit.caches["plain"]).skipped.items()
        assert skipped[0] == "023.png"
        assert "is not an image" in skipped[1]

    def test_what_images_skip_is_known_from_training_and_validation(self, kit: Kit, tmp_path: Path) -> None:
        photos = Path(shutil.copytree(kit.photos, tmp_path / "photos"))
        (photos / "012.png").write_bytes(b"no image")
        straight = kit.latents(photos, size=32)
        with pytest.warns(UserWarning, match="is skipped") as warned:
            last, first, held_out = straight.load(22, 0), straight.load(0, 0), straight.validation(0)
        assert torch.equal(last["pixels"], first["pixels"])
        assert torch.equal(held_out["pixels"], first["pixels"])  # no other image is held out
        assert [*straight.skipped] == ["023.png", "012.png"]
        assert len(warned) == 2


def changed(model: Path, to: Path, part: str, **config: Any) -> Path:
    """Copy a model and change one number in the weights of one of its networks, or in its config."""
    folder = Path(shutil.copytree(model, to))
    if config:
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.startswith("encoder") or "encoder.layers" in key)
    tensors[name].flatten()[0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    return folder


class TestMismatch:
    """Caches that were not made for this run are refused, in a sentence that says why and what to do."""

    def refused(self, kit: Kit, cached: str, model: Path | None = None, **changes: Any) -> str:
        config = UNetConfig(model=model or kit.model, data=kit.caches[cached], out_dir="unused", **changes)
        vae, text = VAE(load_vae(config.model)), TextEncoder(*load_text(config.model))
        with pytest.raises(CacheError) as error:
            provider(config, vae, text)
        sentence = str(error.value)
        assert sentence.startswith(f"the cache {kit.caches[cached]} (of {kit.model}) was made with ")
        assert sentence.endswith(
            " as in this run; make another with sdkit cache for this run, or run with what it was made with."
        )
        return sentence.partition(" was made with ")[2].removesuffix(sentence.partition(" as in this run")[2])

    @pytest.mark.parametrize("name", ["split", "image_column", "class_folders", "caption_column", "default_caption"])
    def test_how_to_open_images_has_no_meaning(self, kit: Kit, name: str) -> None:
        option = {name: True if name == "class_folders" else "other"}
        with pytest.raises(ArgumentError, match=rf"^{name}= has no meaning for a latent cache; give it to "):
            kit.latents(kit.caches["plain"], **option)

    def test_of_the_vae(self, kit: Kit, tmp_path: Path) -> None:
        other = changed(kit.model, tmp_path / "model", "vae")
        theirs = VAE(load_vae(other)).identity
        assert self.refused(kit, "plain", other) == f"the VAE {kit.vae.identity}, not {theirs} as in this run"

    def test_of_the_scale(self, kit: Kit, tmp_path: Path) -> None:
        other = changed(kit.model, tmp_path / "model", "vae", scaling_factor=0.25)
        assert self.refused(kit, "plain", other).startswith("the VAE ")

    def test_of_the_text_encoder_where_embeddings_are_used(self, kit: Kit, tmp_path: Path) -> None:
        other = changed(kit.model, tmp_path / "model", "text_encoder")
        assert self.refused(kit, "embedded", other).startswith("the text encoder ")
        text = TextEncoder(*load_text(other))
        for cached, along in (("plain", False), ("embedded", True)):
            config = UNetConfig(model=other, data=kit.caches[cached], out_dir="unused", train_text_encoder=along)
            provider(config, kit.vae, text)

    def test_of_the_tokenizer(self, kit: Kit, tmp_path: Path) -> None:
        other = Path(shutil.copytree(kit.model, tmp_path / "model"))
        file = other / "tokenizer" / "tokenizer.json"
        fields = json.loads(file.read_text())
        vocabulary = fields["model"]["vocab"]
        names = sorted(vocabulary, key=vocabulary.get)[-2:]
        vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
        file.write_text(json.dumps(fields))
        assert self.refused(kit, "plain", other).startswith("the tokenizer ")

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"size": 64}, "size 32 x 32, not 64 x 64"),
            ({"size": (32, 40)}, "size 32 x 32, not 32 x 40"),
            ({"augment": ("flip",)}, "flip false, not true"),
            ({"augment": ("crop",)}, "crop center, not random"),
        ],
    )
    def test_of_the_transform(self, kit: Kit, changes: dict[str, Any], why: str) -> None:
        assert self.refused(kit, "plain", **changes) == f"{why} as in this run"

    def test_what_the_run_does_not_ask_for_is_as_in_the_cache(self, kit: Kit) -> None:
        assert isinstance(kit.latents(kit.caches["augmented"]), CachedLatents)
        assert isinstance(kit.latents(kit.caches["augmented"], augment=("flip",), size=(32, 24)), CachedLatents)

    def test_a_size_that_the_vae_cannot_take(self, kit: Kit) -> None:
        with pytest.raises(ArgumentError, match=r"^size 36 x 32 does not divide by 8, as this VAE needs; change it\.$"):
            kit.latents(kit.photos, size=(36, 32))

    def test_items_are_as_the_cache_has_them(self, kit: Kit) -> None:
        made, cached = LatentCache(kit.caches["plain"]), kit.latents(kit.caches["plain"])
        assert torch.equal(cached.load(15, 0)["mean"], made[16]["mean"])  # one image before it is held out
