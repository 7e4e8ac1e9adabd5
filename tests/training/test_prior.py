"""Priors over codes: what the loss is, with which conditions, caches, learning, and the result.

Runs that are killed, and those of two processes, are in test_runs.py.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor

import sdkit
from sdkit.data import cache
from sdkit.errors import SdkitError
from sdkit.networks.prior_shape import CONDITIONS, KINDS
from sdkit.training import PriorConfig, settings, train_prior
from sdkit.training.loop import fit
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.prior import PriorStage
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

BATCH = [(n, n) for n in range(4)]
COLOURS = ("a blue disc", "a green disc", "a red disc", "a yellow disc")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, a VQ model, six images and their maps, and caches of both."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.vq_model(folder / "vq")
    tiny.photos(folder / "photos", 6)
    (folder / "maps").mkdir()
    for path in sorted((folder / "photos").glob("*.png")):
        Image.open(path).rotate(90).save(folder / "maps" / path.name)
    common: dict[str, Any] = {"size": tiny.SIZE, "dtype": "fp32", "device": "cpu", "vae": folder / "vq"}
    cache(folder / "model", folder / "photos", folder / "cache", **common)
    cache(folder / "model", folder / "photos", folder / "cached maps", conditioning_data=folder / "maps", **common)
    return folder


def config(made: Path, **changes: Any) -> PriorConfig:
    own: dict[str, Any] = {
        "model": made / "model", "vae": made / "vq", "data": made / "photos", "out_dir": made / "unused",
        "layers": 2, "width": 16, "heads": 2, "batch_size": 4, "max_steps": 3, "condition_dropout": 0.0,
    }  # fmt: skip
    return PriorConfig(**own | changes)


MAPS: dict[str, Any] = {"conditioned_on": "map"}
KINDS_OF_RUN: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt text": {"conditioned_on": "text"},
    "gpt class": {"conditioned_on": "class"},
    "gpt map": MAPS,
    "pixelcnn": {"kind": "pixelcnn"},
    "pixelcnn class": {"kind": "pixelcnn", "conditioned_on": "class"},
    "pixelcnn map": {"kind": "pixelcnn", **MAPS},
}


def run_of(made: Path, name: str, **changes: Any) -> PriorConfig:
    """Return the settings of one of `KINDS_OF_RUN`, from images unless `data` is given."""
    maps = {"conditioning_data": made / "maps"} if "map" in name and "data" not in changes else {}
    return config(made, **KINDS_OF_RUN[name] | maps | changes)


def codes_of(made: Path, pixels: Tensor) -> Tensor:
    """Return the codes of images by diffusers' own quantizer, one image at a time."""
    network = VQModel.from_pretrained(made / "vq").eval()
    with torch.no_grad():
        latents = [network.encode(one[None]).latents for one in pixels]
        numbers = [network.quantize(latent)[2][2].reshape(8, 8) for latent in latents]
    return torch.stack(numbers)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_settings_name_the_kinds() -> None:
    assert (KINDS, CONDITIONS) == (settings.PRIORS, settings.PRIOR_CONDITIONS)


@pytest.mark.parametrize("name", KINDS_OF_RUN)
def test_loss_is_the_cross_entropy_of_diffusers_codes(name: str, made: Path) -> None:
    """The conditions are those of the examples, and the codes those of diffusers' `VectorQuantizer`."""
    stage = PriorStage(run_of(made, name))
    batch = stage.batch(BATCH)
    codes = codes_of(made, batch["pixels"])
    assert len(codes.unique()) > 3
    condition: Any = None
    if "text" in name:
        captions = [(made / "photos" / f"{n:03}.txt").read_text() for n in range(4)]
        condition = torch.stack([stage.text.tokenize(caption)[0][0, 0] for caption in captions])
    elif "class" in name:
        condition = torch.tensor([2, 1, 0, 3])
        assert stage.classes == COLOURS
    elif "map" in name:
        condition = codes_of(made, batch["concat_pixels"])
    found, parts = stage.loss({"prior": stage.prior}, batch, 0)
    p = stage.prior(codes, condition).softmax(-1).gather(-1, codes[..., None])
    torch.testing.assert_close(found, -p.log().mean())
    assert parts == {}


@pytest.mark.parametrize("name", ["gpt text", "pixelcnn class", "gpt map"])
def test_some_conditions_are_left_out(name: str, made: Path) -> None:
    """A share of them, which depends on the sample's number alone; for the rest nothing changes."""
    stage = PriorStage(run_of(made, name, condition_dropout=0.4))
    numbers = [(n, n % 6) for n in range(300)]
    left_out = stage.batch(numbers)["left_out"]
    assert 0.3 < float(left_out.float().mean()) < 0.5
    assert torch.equal(stage.batch(numbers[100:120])["left_out"], left_out[100:120])
    batch = stage.batch(numbers[:12])
    codes, condition = stage._codes(batch)
    whole = stage._codes(batch | {"left_out": torch.zeros(12, dtype=torch.bool)})
    assert torch.equal(codes, whole[0])
    assert condition is not None
    assert whole[1] is not None
    empty = stage.text.tokenize("")[0][0, 0] if "text" in name else torch.tensor(stage.prior.shape.tokens)
    for i in range(12):
        expected = empty.expand(condition[i].shape) if batch["left_out"][i] else whole[1][i]
        assert torch.equal(condition[i], expected)


@pytest.mark.parametrize("name", ["gpt text", "pixelcnn class", "gpt map", "pixelcnn map"])
def test_a_latent_cache_holds_the_same_codes(name: str, made: Path) -> None:
    data = made / ("cached maps" if "map" in name else "cache")
    images, cached = PriorStage(run_of(made, name)), PriorStage(run_of(made, name, data=data))
    for one, other in zip(images._codes(images.batch(BATCH)), cached._codes(cached.batch(BATCH)), strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert images.prior.shape == cached.prior.shape


def test_cache_and_images_give_the_same_run(made: Path, tmp_path: Path) -> None:
    for data in ("photos", "cache"):
        train_prior(run_of(made, "gpt text", data=made / data, out_dir=tmp_path / data, condition_dropout=0.3))
    assert losses(tmp_path / "photos") == pytest.approx(losses(tmp_path / "cache"), rel=1e-6)


GOLDEN = {
    "gpt text": [2.754168, 2.720195, 2.691116, 2.659668, 2.641822, 2.613469, 2.606103, 2.577933, 2.564059, 2.529931],
    "pixelcnn class": [
        2.786884, 2.766752, 2.771384, 2.756821, 2.741293, 2.736752, 2.730204, 2.707139, 2.696932, 2.687988,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(name: str, made: Path, tmp_path: Path) -> None:
    """Losses of ten steps in float32, to 1e-3. A change in these numbers is a change in what is learned."""
    changes: dict[str, Any] = {"max_steps": 10, "augment": ("flip",), "condition_dropout": 0.3, "learning_rate": 3e-3}
    train_prior(run_of(made, name, out_dir=tmp_path, **changes))
    assert losses(tmp_path) == pytest.approx(GOLDEN[name], rel=1e-3)


def test_validation_is_exact_in_nats_and_bits(made: Path) -> None:
    """Six images are all held out; the mean of their likelihoods is that of the pipeline."""
    stage = PriorStage(run_of(made, "gpt class"))
    with torch.no_grad():
        metrics = stage.validate(0)
    pixels = torch.stack([stage.examples.validation(i)["pixels"] for i in range(6)])
    pipeline = sdkit.TokenPipeline(stage.vae, stage.prior.eval())
    captions = [(made / "photos" / f"{n:03}.txt").read_text() for n in range(6)]
    found = pipeline.log_likelihood(codes_of(made, pixels), captions)
    nats = -float(found.mean()) / 64
    assert metrics["loss"] == pytest.approx(nats, rel=1e-5)
    assert metrics["bits_per_code"] == pytest.approx(nats / math.log(2), rel=1e-5)
    assert metrics["bits_per_dimension"] == pytest.approx(64 * nats / math.log(2) / (3 * 32 * 32), rel=1e-5)


def striped(folder: Path, n: int) -> Path:
    """Write n images of horizontal or vertical stripes in two colours, with captions that name the direction."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        bands, vertical = np.kron(rng.integers(0, 2, 8), np.ones(4)), bool(rng.integers(2))
        image = np.repeat(bands[None], 32, axis=0) if vertical else np.repeat(bands[:, None], 32, axis=1)
        Image.fromarray((image[..., None] * [150, 200, 80] + 40).astype(np.uint8)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text("a red disc" if vertical else "a blue disc")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("gpt class", 0.8), ("pixelcnn class", 0.75)])
def test_learns_more_than_how_often_each_code_occurs(name: str, share: float, made: Path, tmp_path: Path) -> None:
    """On 15 held-out images of stripes, against independent codes; the right class is likelier than the wrong one."""
    data = striped(tmp_path / "stripes", 300)
    run = run_of(
        made, name, data=data, out_dir=tmp_path / "run", max_steps=200, batch_size=16, width=32, ema_decay=0.9,
        learning_rate=2e-3 if "gpt" in name else 1e-3, condition_dropout=0.2, validate_every=200,
    )  # fmt: skip
    stage = PriorStage(run)
    fit(stage, run, tmp_path / "run")
    count = len(stage.examples.held_out)
    codes = codes_of(made, torch.stack([stage.examples.validation(i)["pixels"] for i in range(count)]))
    training = codes_of(made, torch.stack([stage.examples.load(i, 0)["pixels"] for i in range(stage.size)]))
    frequencies = torch.bincount(training.flatten(), minlength=16).double() + 1
    independent = -float((frequencies / frequencies.sum()).log()[codes].mean())
    pipeline = sdkit.TokenPipeline.from_pretrained(tmp_path / "run" / "result", dtype="fp32", device="cpu")
    directions = [stage.examples.held_out_caption(i) for i in range(count)]
    others = ["a red disc" if text == "a blue disc" else "a blue disc" for text in directions]
    right, wrong = (-float(pipeline.log_likelihood(codes, labels).mean()) / 64 for labels in (directions, others))
    assert right < share * independent
    assert right < wrong - 0.05


def test_the_result_draws(made: Path, tmp_path: Path) -> None:
    out = train_prior(
        run_of(made, "gpt text", out_dir=tmp_path, evaluate=("frechet",), gradient_checkpointing=True, size=16)
    )
    last = [line for line in read_metrics(out / "metrics.jsonl") if "validation/loss" in line][-1]
    assert {"validation/bits_per_code", "validation/bits_per_dimension", "validation/frechet"} <= last.keys()
    pipeline = sdkit.TokenPipeline.from_pretrained(out / "result", dtype="fp32", device="cpu")
    first, second = (pipeline("a red disc", seed=1, guidance_scale=2.0, output_type="np") for _ in range(2))
    assert first.shape == (1, 16, 16, 3)
    assert np.array_equal(first, second)
    assert sorted(path.name for path in (out / "result").iterdir()) == ["prior", "tokenizer", "training.json", "vqvae"]


def test_no_captions_are_needed_without_a_condition(made: Path, tmp_path: Path) -> None:
    """Without a warning, which would be an error here."""
    tiny.photos(tmp_path / "photos", 2)
    for path in (tmp_path / "photos").glob("*.txt"):
        path.unlink()
    PriorStage(config(made, data=tmp_path / "photos"))


# Bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"kind": "rnn"}, "kind 'rnn' is not one of 'transformer', 'pixelcnn'"),
    ({"conditioned_on": "sound"}, "conditioned_on 'sound' is not one of 'text', 'class', 'map'"),
    ({"kind": "pixelcnn", "conditioned_on": "text"}, "a pixelcnn is conditioned on a class or a map; for text take"),
    ({"kind": "pixelcnn", "gradient_checkpointing": True}, "gradient_checkpointing is for a transformer; leave it out"),
    ({"condition_dropout": 1.5}, "condition_dropout must be a number from 0 to 1, not 1.5"),
    ({"layers": 1000, "width": 16384}, "parameters, sdkit builds at most 10,000,000,000; take fewer layers"),
    ({"layers": 0}, "layers must be a whole number from 1 to 1000, not 0"),
    ({"width": "wide"}, "width must be a whole number from 1 to 16384, not 'wide'"),
    ({"heads": 3}, "width 16 is not divisible by 3 heads; change one of the two"),
    ({"init": "config.json"}, "init has no meaning for a prior, whose shape is layers and width; leave it out"),
    ({"conditioning_data": "maps"}, "conditioning_data belongs to maps; give conditioned_on map, or leave it out"),
    ({"conditioned_on": "map", "conditioning_data": "maps", "condition_column": "map"}, "both name the maps"),
    ({"conditioned_on": "map"}, "conditioned_on map needs maps; name them as condition_column or conditioning_data"),
    ({"evaluate": ("clip_score",)}, "evaluate clip_score compares drawings with prompts; it needs conditioned_on text"),
    ({"vae": None}, "a prior learns codes, and this VAE has no codebook; name a VQModel as vae"),
    ({"vae": 3}, "vae must be a path or a name, not 3"),
    ({"size": 30}, "30"),
    ({"data": "nothing here"}, "nothing here"),
    ({"data": "CACHE", "conditioned_on": "map"}, "holds no latents of maps; make another with sdkit cache"),
    (
        {"data": "CACHE", "conditioned_on": "map", "conditioning_data": "maps"},
        "conditioning_data= has no meaning for a latent cache; give it to sdkit cache instead",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(made: Path, change: dict[str, Any], sentence: str) -> None:
    change = change | ({"data": made / "cache"} if change.get("data") == "CACHE" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one_sentence(lambda: PriorStage(config(made, **change)), SdkitError, sentence)


def test_classes_that_do_not_differ(made: Path, tmp_path: Path) -> None:
    data = tiny.photos(tmp_path / "photos", 3)
    for path in data.glob("*.txt"):
        path.write_text("a disc")
    sentence = "all images have the same caption, and classes are captions that differ"
    one_sentence(lambda: PriorStage(config(made, data=data, conditioned_on="class")), SdkitError, sentence)


def test_classes_are_numbered_alike_from_images_and_a_cache(made: Path, tmp_path: Path) -> None:
    """Numbers come first, by their value; an image without a caption has no condition."""
    data = tiny.photos(tmp_path / "photos", 6)
    for caption, path in zip(["10", "T-shirt", "9", "", "ice cream", "10"], sorted(data.glob("*.txt")), strict=True):
        path.write_text(caption)
    options: dict[str, Any] = {"size": tiny.SIZE, "dtype": "fp32", "device": "cpu", "vae": made / "vq"}
    cached = cache(made / "model", data, tmp_path / "cache", **options)
    for source in (data, cached):
        stage = PriorStage(config(made, data=source, conditioned_on="class"))
        assert ["".join(name.lower().split()) for name in stage.classes] == ["9", "10", "icecream", "t-shirt"]
        labels = [int(stage.batch([(n, n)])["condition"]) for n in range(len(stage.examples.train))]
        wanted = [1, 3, 0, 4, 2, 1]
        assert labels == [wanted[i] for i in stage.examples.train.tolist()]
        assert stage.prior.shape.no_condition() == 4
        assert "classes" in stage.identity


def test_another_condition_is_another_run(made: Path, tmp_path: Path) -> None:
    train_prior(config(made, out_dir=tmp_path, max_steps=1))
    other = config(made, out_dir=tmp_path, conditioned_on="text", max_steps=2)
    one_sentence(lambda: train_prior(other), SdkitError, "conditioned_on")


def test_command_line(made: Path, tmp_path: Path) -> None:
    from sdkit.cli import main

    arguments = ["train", "prior", "--data", made / "photos", "--model", made / "model", "--vae", made / "vq"]
    arguments += ["--kind", "pixelcnn", "--conditioned-on", "class", "--layers", 2, "--width", 8]
    assert main([str(one) for one in [*arguments, "--out-dir", tmp_path / "run", "--max-steps", 1]]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["kind"] == "pixelcnn"
    pipeline = sdkit.TokenPipeline.from_pretrained(tmp_path / "run" / "result", dtype="fp32", device="cpu")
    assert len(pipeline("a red disc", num_images=2)) == 2
