"""Training of a VQ-VAE-2 and of a prior of each level, from images to drawn images.

Runs that are killed, and those of two processes, are in test_runs.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sdkit
from sdkit.data import cache
from sdkit.errors import SdkitError
from sdkit.networks.code_prior import load_prior, new_prior
from sdkit.networks.vqvae2 import load_vqvae2
from sdkit.pipelines.two_levels import TwoLevelPipeline
from sdkit.training import PriorConfig, VQVAE2Config, train_prior, train_vqvae2
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.prior import PriorStage
from sdkit.training.stages.vqvae2 import VQVAE2Stage
from tests.helpers import tiny
from tests.helpers.sentences import one_sentence

RUN: dict[str, Any] = {
    "width": 8, "latent_channels": 4, "codes": 8, "size": 16, "batch_size": 4, "learning_rate": 3e-3, "max_steps": 30,
    "validate_every": 30, "save_every": 10, "keep_checkpoints": 1, "ema_decay": 0.5, "codebook_decay": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, images, and a trained VQ-VAE-2 with a prior of each level."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 24)
    train_vqvae2(VQVAE2Config(**RUN, data=folder / "photos", out_dir=folder / "two"))
    for level in ("top", "bottom"):
        changes = {"conditioned_on": "class"} if level == "top" else {"kind": "pixelcnn"}
        train_prior(prior_config(folder, out_dir=folder / level, level=level, **changes))
    return folder


def prior_config(made: Path, **changes: Any) -> PriorConfig:
    own: dict[str, Any] = {
        "model": made / "model", "vae": made / "two" / "result", "data": made / "photos", "out_dir": made / "unused",
        "layers": 2, "width": 16, "heads": 2, "batch_size": 4, "max_steps": 2,
    }  # fmt: skip
    return PriorConfig(**own | changes)


def test_both_codebooks_are_used_and_the_reconstruction_improves(made: Path) -> None:
    first, last = [line for line in read_metrics(made / "two" / "metrics.jsonl") if "validation/psnr" in line]
    assert last["validation/psnr"] > first["validation/psnr"] + 3
    for level in ("top", "bottom"):
        assert last[f"validation/{level}_codebook_use"] >= 0.5
        assert last[f"validation/{level}_perplexity"] > 2
    assert len([*(made / "two" / "samples").iterdir()]) == 2


def test_codebooks_of_moving_averages_have_no_gradient(made: Path) -> None:
    """Without moving averages they have that of the codebook loss; the other gradients are the same."""
    found = []
    for decay in (0.0, 0.99):
        settings = RUN | {"codebook_decay": decay, "data": made / "photos", "out_dir": made / "unused"}
        stage = VQVAE2Stage(VQVAE2Config(**settings))
        loss, _ = stage.loss({"vqvae2": stage.model}, stage.batch([(n, n) for n in range(4)]), 0)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append((loss.item(), {name: p.grad for name, p in stage.model.network.named_parameters()}))
    (learned, others), (averaged, same) = found
    assert learned == averaged
    for level in ("top", "bottom"):
        assert others.pop(f"{level}_codes.weight").any()
        assert not same.pop(f"{level}_codes.weight").any()
    assert all(torch.equal(others[name], same[name]) for name in others)


def test_the_bottom_prior_reads_the_top_codes(made: Path) -> None:
    """Codes and map are those of the network; a share of the maps is left out."""
    stage = PriorStage(prior_config(made, level="bottom", kind="pixelcnn", condition_dropout=0.0))
    batch = stage.batch([(n, n) for n in range(4)])
    codes, above = stage._codes(batch)
    top, bottom = load_vqvae2(made / "two" / "result").encode(batch["pixels"])
    assert torch.equal(codes, bottom)
    assert above is not None
    assert torch.equal(above, top)
    shape = stage.prior.shape
    assert (shape.grid, shape.condition_shape, shape.tokens) == ((4, 4), (2, 2), 8)
    assert PriorStage(prior_config(made, level="top")).prior.shape.grid == (2, 2)


def test_images_are_drawn_from_the_top_down(made: Path) -> None:
    pipeline = TwoLevelPipeline.from_pretrained(made / "top" / "result", made / "bottom" / "result", device="cpu")
    top, bottom = pipeline("a red disc", num_images=2, seed=3, guidance_scale=1.5, output_type="codes")
    assert (top.shape, bottom.shape) == ((2, 2, 2), (2, 4, 4))
    images = pipeline("a red disc", num_images=2, seed=3, guidance_scale=1.5, output_type="np")
    expected = pipeline.network.decode(top, bottom)
    assert np.array_equal(images, sdkit.images.from_tensors([*expected], "np"))
    alone = pipeline("a red disc", seed=4, guidance_scale=1.5, output_type="codes")
    assert all(torch.equal(one, other[1:]) for one, other in zip(alone, (top, bottom), strict=True))


def test_bad_input_is_one_sentence(made: Path, tmp_path: Path) -> None:
    cache(made / "model", made / "photos", tmp_path / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")
    two = {"data": made / "photos", "out_dir": tmp_path / "run"}

    def pipeline(top: str, bottom: str) -> Any:
        return lambda: TwoLevelPipeline.from_pretrained(made / top, made / bottom, device="cpu")

    network = load_vqvae2(made / "two" / "result")
    top, bottom = (load_prior(made / level / "result" / "prior") for level in ("top", "bottom"))
    text = new_prior(replace(top.shape, condition="text", condition_shape=(5,), tokens=9, classes=()))
    coarse = new_prior(replace(bottom.shape, grid=(8, 8)))
    cases: list[tuple[Any, str]] = [
        (lambda: VQVAE2Config(**two, codes=1), "codes must be a whole number from 2"),
        (lambda: VQVAE2Config(**two, init="x"), "init has no meaning for a VQ-VAE-2"),
        (lambda: VQVAE2Config(**two, evaluate=("clip_score",)), "evaluate clip_score compares drawings with prompts"),
        (lambda: VQVAE2Stage(VQVAE2Config(**two, size=20)), "size 20 x 20 must divide by 8; change it"),
        (lambda: VQVAE2Stage(VQVAE2Config(**two | {"data": tmp_path / "cache"})), "is a latent cache; give the images"),
        (lambda: prior_config(made, level="middle"), "level 'middle' is not one of 'top', 'bottom'"),
        (lambda: prior_config(made, level="top", vae=None), "level belongs to a VQ-VAE-2; name its folder as vae"),
        (
            lambda: prior_config(made, level="bottom", conditioned_on="class"),
            "the bottom level is conditioned on the top codes; leave conditioned_on out",
        ),
        (lambda: prior_config(made, level="top", evaluate=("frechet",)), "evaluate is for a VQ model of one level"),
        (
            lambda: PriorStage(prior_config(made, level="top", vae=made / "model" / "vae")),
            "holds a AutoencoderKL, not a VQVAE2; give the result of train vqvae2",
        ),
        (
            lambda: PriorStage(prior_config(made, level="top", data=tmp_path / "cache")),
            "a latent cache holds one level of latents",
        ),
        (pipeline("bottom/result", "top/result"), "the priors are not those of the two levels of one VQ-VAE-2"),
        (
            lambda: TwoLevelPipeline(network, text, bottom),
            "reads texts of 9 tokens, and there is no tokenizer",
        ),
        (lambda: TwoLevelPipeline(network, top, coarse), "the priors are not those of the two levels of one VQ-VAE-2"),
        (pipeline("two/result", "bottom/result"), "has no folder vqvae2/; give the result of train prior"),
    ]
    for run, sentence in cases:
        one_sentence(run, SdkitError, sentence)


def test_the_result_says_what_it_is(made: Path) -> None:
    assert json.loads((made / "two" / "result" / "config.json").read_text())["_class_name"] == "VQVAE2"
    assert load_prior(made / "bottom" / "result" / "prior").shape.condition == "map"
