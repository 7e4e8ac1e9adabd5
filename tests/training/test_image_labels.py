"""Training the decoder of DALL-E 2: labels by transformers and diffusers, a U-Net that starts unchanged, the result in
diffusers and in `UnCLIP`, and users' mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPPipeline, UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionModelWithProjection

import sdkit
from sdkit.data import cache
from sdkit.errors import DataError
from sdkit.pipelines.unclip import UnCLIP
from sdkit.training import ImagePriorConfig, UNetConfig, train_image_prior, train_unet
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.unet import UNetStage
from tests.helpers import clip, tiny, unclip
from tests.helpers.sentences import one_sentence

D = 32


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, images, and a trained prior, with the parts around it."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 24)
    train_image_prior(
        ImagePriorConfig(
            data=folder / "photos", model=clip.save_clip(folder / "clip", projection=D), out_dir=folder / "prior",
            init=unclip.save_prior_config(folder / "prior.json", embedding_dim=D), max_steps=1, batch_size=2,
        )
    )  # fmt: skip
    return folder


def config(made: Path, out: Path, **changes: Any) -> UNetConfig:
    given = {
        "data": made / "photos",
        "model": made / "model",
        "out_dir": out,
        "image_encoder": made / "prior" / "result",
    }
    given |= {"batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.0, "size": tiny.SIZE}
    return UNetConfig(**given | {"validate_every": 1000} | changes)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_labels_are_those_of_diffusers(made: Path, tmp_path: Path) -> None:
    """The images are as large as the encoder's, so that they are not resized."""
    stage = UNetStage(config(made, tmp_path / "run", embedding_dropout=0.4))
    assert stage.labels is not None
    batch = stage.batch([(n, n) for n in range(12)])
    kept = batch["label_kept"].bool()
    assert 0 < int(kept.sum()) < 12
    levels = batch["label_level"]
    assert len({*levels.tolist()}) > 8
    encoder = CLIPVisionModelWithProjection.from_pretrained(made / "prior" / "result" / "image_encoder").eval()
    mean, std = (torch.tensor(values)[:, None, None] for values in (
        (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    ))  # fmt: skip
    pipe = unclip.unclip()
    statistics = load_file(made / "prior" / "result" / "image_normalizer" / "diffusion_pytorch_model.safetensors")
    normalizer = type(pipe.image_normalizer)(D)
    normalizer.load_state_dict(statistics)
    pipe.register_modules(image_normalizer=normalizer)
    label = stage.labels.label(batch)
    with torch.no_grad():
        embeddings = encoder((batch["pixels"] / 2 + 0.5 - mean) / std).image_embeds
        for i in range(12):
            noise = batch["label_eps"][i : i + 1]
            theirs = pipe.noise_image_embeddings(embeddings[i : i + 1], int(levels[i]), noise=noise)
            torch.testing.assert_close(label[i : i + 1], theirs * kept[i], atol=1e-4, rtol=1e-4)


def test_the_new_input_starts_at_zero_and_learns(made: Path, tmp_path: Path) -> None:
    """The first loss is that of the plain U-Net on the same noise; later ones differ."""
    with_labels = train_unet(config(made, tmp_path / "with", max_steps=2))
    without = train_unet(config(made, tmp_path / "without", max_steps=2, image_encoder=None))
    found, plain = losses(with_labels), losses(without)
    assert found[0] == pytest.approx(plain[0], rel=1e-5)
    assert found[1] != pytest.approx(plain[1], rel=1e-6)
    weights = load_file(with_labels / "result" / "unet" / "diffusion_pytorch_model.safetensors")
    assert float(weights["class_embedding.linear_2.weight"].abs().max()) > 0


GOLDEN = [1.027241, 1.120286, 0.967315, 1.044037, 0.880967, 1.001329]


def test_golden_losses(made: Path, tmp_path: Path) -> None:
    """Losses of six steps in float32, to 1e-3, in a run that was stopped after two. A change in these numbers is a
    change in what is learned.
    """
    for steps in (2, 6):
        train_unet(config(made, tmp_path, max_steps=steps, embedding_dropout=0.3))
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=1e-3)


def test_the_result_is_a_whole_unclip(made: Path, tmp_path: Path) -> None:
    """It loads in diffusers as StableUnCLIPPipeline, and draws texts, variations, and what lies between images."""
    out = train_unet(config(made, tmp_path / "run"))
    pipe = StableUnCLIPPipeline.from_pretrained(out / "result")
    assert pipe.unet.config.projection_class_embeddings_input_dim == 2 * D
    model = UnCLIP.from_pretrained(out / "result", device="cpu")
    options: dict[str, Any] = {"num_inference_steps": 2}
    image = Image.open(made / "photos" / "000.png")
    drawn = model("a red disc", prior_num_inference_steps=2, **options) + model.variations(image, 2, **options)
    with_own = UnCLIP.from_pretrained(out / "result", prior=made / "prior" / "result", device="cpu")
    assert with_own("a red disc", prior_num_inference_steps=2, **options)[0].tobytes() == drawn[0].tobytes()
    drawn += model.interpolate(image, Image.open(made / "photos" / "001.png"), 2, **options)
    assert [one.size for one in drawn] == [(tiny.SIZE, tiny.SIZE)] * 5
    levels = [np.asarray(one, int) for one in drawn]
    assert np.abs(levels[1] - levels[2]).max() > 1
    again = train_unet(
        config(made, tmp_path / "again", model=out / "result", max_steps=1, seed=1)
    )  # a decoder is trained further
    assert losses(again)[0] != losses(out)[0]


def test_a_decoder_of_pixels_learns_its_variance(made: Path, tmp_path: Path) -> None:
    """The hybrid loss and bits per dimension read the embeddings, too: other embeddings give other losses."""
    own = json.loads((made / "model" / "unet" / "config.json").read_text()) | {"in_channels": 3, "out_channels": 6}
    (tmp_path / "config.json").write_text(json.dumps(own))
    changes: dict[str, Any] = {"init": tmp_path / "config.json", "vae": "pixels", "size": 8, "loss": "hybrid"}
    settings = config(made, tmp_path / "run", **changes, bits_per_dimension=3, timestep_sampling="importance")
    stage = UNetStage(settings)
    torch.nn.init.normal_(stage.unet.network.class_embedding.linear_2.weight)
    batch = stage.batch([(n, n) for n in range(4)])
    with torch.no_grad():
        one, other = (
            stage.loss({"unet": stage.denoiser}, {**batch, "label_kept": torch.full((4,), kept)}, 0)[0]
            for kept in (0.0, 1.0)
        )
        bits = stage.validate(0)["bits_per_dimension"]
        torch.nn.init.normal_(stage.unet.network.class_embedding.linear_2.weight)
        assert stage.validate(0)["bits_per_dimension"] != bits
    assert float(one) != float(other)
    train_unet(settings)
    assert len(losses(tmp_path / "run")) == 2


def test_mistakes(made: Path, tmp_path: Path) -> None:
    cache("emoji", made / "photos", tmp_path / "cache", size=32, device="cpu")
    UNet2DModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).save_config(tmp_path / "unet")  # fmt: skip
    encoder, argument, source = {"image_encoder": made / "prior" / "result"}, sdkit.ArgumentError, sdkit.SourceError
    for change, fragment in (
        ({"embedding_dropout": 0.2}, "embedding_dropout belongs to image_encoder, and there is none"),
        (encoder | {"embedding_dropout": 2}, "embedding_dropout must be a number from 0 to 1, not 2"),
        ({"image_encoder": 3}, "image_encoder must be a path or a name, not 3"),
        (encoder | {"upscale_factor": 2}, "upscale_factor has no meaning for a U-Net that reads image embeddings"),
        (encoder | {"lora_rank": 4}, "lora_rank has no meaning for a U-Net that reads image embeddings"),
        (encoder | {"condition_column": "map"}, "condition_column has no meaning for a U-Net that reads image"),
        (encoder | {"validation_prompts": ("a",)}, "validation_prompts has no meaning for a U-Net that reads image"),
        (encoder | {"evaluate": ("lpips",)}, "evaluate has no meaning for a U-Net that reads image embeddings"),
        (encoder | {"data": "", "instance_data": "five"}, "instance_data has no meaning for a U-Net that reads image"),
    ):
        one_sentence(lambda change=change: UNetConfig(**{"data": "a", "out_dir": "b"} | change), argument, fragment)
    for change, error, fragment in (
        ({"data": tmp_path / "cache"}, DataError, "is a latent cache, and image_encoder embeds images"),
        ({"image_encoder": made / "photos"}, source, "has no image_encoder/config.json"),
        ({"init": tmp_path / "unet"}, argument, "image_encoder needs a U-Net that attends to text"),
        ({"image_encoder": "emoji"}, source, "is the embedded model; give a folder or a Hub id"),
    ):
        run = config(made, tmp_path / "run", **change)
        one_sentence(lambda run=run: train_unet(run), error, fragment)
        assert not (tmp_path / "run").exists()
