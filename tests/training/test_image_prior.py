"""Training the prior of DALL-E 2: its data and loss by transformers and NumPy, learning with a control, the result in
diffusers, and users' mistakes. Runs that are killed, and two processes, are in test_runs.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PriorTransformer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

import sdkit
from sdkit.errors import DataError, TrainingError
from sdkit.loading.unclip_folder import UnCLIPFolder
from sdkit.pipelines.unclip import open_prior
from sdkit.tensor_files import encoded, read
from sdkit.training import ImagePriorConfig, train_image_prior
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.image_prior import ImagePriorStage
from tests.helpers import clip, tiny, unclip
from tests.helpers.sentences import one_sentence

D = 32  # width of the embeddings


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a CLIP, the config of a prior, and images, of which one is broken."""
    folder = tmp_path_factory.mktemp("made")
    clip.save_clip(folder / "clip", projection=D)
    unclip.save_prior_config(folder / "prior.json", embedding_dim=D)
    photos = tiny.photos(folder / "photos", 24)
    (photos / "005.png").write_bytes((photos / "005.png").read_bytes()[:60])
    return folder


def config(made: Path, out: Path, **changes: Any) -> ImagePriorConfig:
    given = {"data": made / "photos", "model": made / "clip", "init": made / "prior.json", "out_dir": out}
    given |= {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "ema_decay": 0.9, "validate_every": 1000}
    return ImagePriorConfig(**given | changes)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def learned(made: Path) -> Path:
    settings = config(made, made / "learned", max_steps=100, batch_size=8, learning_rate=3e-3, ema_decay=0.0)
    with pytest.warns(UserWarning, match="005.png is skipped"):
        return train_image_prior(settings)


GOLDEN = [1.209005, 0.907959, 1.519192, 0.705371, 0.864472, 2.512105, 0.649641, 1.590544]


@pytest.mark.filterwarnings("ignore:005.png is skipped")
def test_golden_losses(made: Path, tmp_path: Path) -> None:
    """Losses of eight steps in float32, to 1e-3. A change in these numbers is a change in what is learned."""
    train_image_prior(config(made, tmp_path, max_steps=8))
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=1e-3)


def embeddings(made: Path) -> Tensor:
    """Compute embeddings of the images with transformers' CLIP; the broken one is replaced by the next."""
    network = CLIPModel.from_pretrained(made / "clip").eval()
    paths = sorted((made / "photos").glob("*.png"))
    paths[5] = paths[6]
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB"), np.float32) / 255 for path in paths])
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    scaled = torch.from_numpy(((pixels - mean) / std).transpose(0, 3, 1, 2)).float()
    with torch.no_grad():
        return network.visual_projection(network.vision_model(scaled).pooler_output)


def test_the_embeddings_and_their_statistics(made: Path, learned: Path) -> None:
    """Statistics are of the training images alone: the held-out one, number 12, is left out."""
    expected = embeddings(made)
    found = load_file(learned / "embeddings.safetensors")
    torch.testing.assert_close(found["embeddings"], expected, atol=1e-5, rtol=1e-4)
    assert found["used"].tolist() == [0, 1, 2, 3, 4, 6, *range(6, 24)]
    train = np.delete(expected.numpy().astype(float), 12, axis=0)
    weights = load_file(learned / "result" / "prior" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_allclose(weights["clip_mean"][0], train.mean(0), atol=1e-5)
    np.testing.assert_allclose(weights["clip_std"][0], train.std(0), rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:005.png is skipped")
def test_the_loss_of_a_step_is_numpy_s(made: Path, tmp_path: Path) -> None:
    """mean |f(sqrt(a) x0 + sqrt(1 - a) eps, t, caption) - x0|^2, with x0 normalised, and a of the cosine schedule."""
    settings = config(made, tmp_path / "run", max_steps=1, caption_dropout=0.4)
    stage = ImagePriorStage(settings)
    stage.prepare()
    items = np.random.default_rng((0, 0)).permutation(23)[:4]
    batch = stage.batch([(n, int(item)) for n, item in enumerate(items)])
    network = stage.prior.network
    x0 = (batch["embedding"].numpy() - network.clip_mean.numpy()) / network.clip_std.numpy()
    u = np.arange(1001) / 1000
    f = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    a = np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999))[batch["t"]][:, None]
    x_t = torch.from_numpy(np.sqrt(a) * x0 + np.sqrt(1 - a) * batch["eps"].numpy()).float()
    text = CLIPModel.from_pretrained(made / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(made / "clip")
    captions = tokenizer.batch_decode(batch["ids"], skip_special_tokens=True)
    assert sorted({caption.strip() for caption in captions} - {""})
    tokens = tokenizer(
        [caption.strip() for caption in captions], padding="max_length", max_length=32, return_tensors="pt"
    )
    assert torch.equal(tokens.input_ids, batch["ids"])
    with torch.no_grad():
        encoded = text.text_model(tokens.input_ids)
        output = network(
            x_t, torch.tensor(batch["t"]), text.text_projection(encoded.pooler_output), encoded.last_hidden_state,
            tokens.attention_mask.bool(),
        ).predicted_image_embedding.numpy()  # fmt: skip
    train_image_prior(settings)
    assert losses(tmp_path / "run") == pytest.approx([np.square(output - x0).mean()], rel=1e-4)


def test_it_learns_which_embedding_belongs_to_a_caption(made: Path, learned: Path) -> None:
    """Embeddings drawn for captions of four colours, against the mean of each colour's; control: the other colours."""
    prior = open_prior(UnCLIPFolder(learned / "result"), torch.device("cpu"))
    colours = ("red", "green", "blue", "yellow")
    own = embeddings(made).reshape(6, 4, D).mean(0)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    drawn = prior.sample([f"a {colour} disc" for colour in colours], generators, guidance_scale=1.5)
    distances = torch.cdist(prior.network.normalised(drawn), prior.network.normalised(own))
    assert distances.argmin(1).tolist() == [0, 1, 2, 3]
    before, after = (line for line in read_metrics(learned / "metrics.jsonl") if "validation/loss" in line)
    assert after["validation/loss"] < 0.8 * before["validation/loss"]
    assert after["validation/cosine"] > before["validation/cosine"]


def test_the_result_loads_in_diffusers_and_transformers(made: Path, learned: Path) -> None:
    result, whole = learned / "result", CLIPModel.from_pretrained(made / "clip").eval()
    text = CLIPTextModelWithProjection.from_pretrained(result / "prior_text_encoder").eval()
    image = CLIPVisionModelWithProjection.from_pretrained(result / "image_encoder").eval()
    prior = PriorTransformer.from_pretrained(result / "prior").eval()
    ids = CLIPTokenizer.from_pretrained(result / "prior_tokenizer")(["a red disc"], return_tensors="pt").input_ids
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = whole(input_ids=ids, pixel_values=pixels)
        embedded = text(ids)
        torch.testing.assert_close(torch.nn.functional.normalize(embedded.text_embeds), both.text_embeds)
        torch.testing.assert_close(torch.nn.functional.normalize(image(pixels).image_embeds), both.image_embeds)
        states = torch.nn.functional.pad(embedded.last_hidden_state, (0, 0, 0, 32 - ids.shape[1]))
        output = prior(torch.zeros(1, D), 5, embedded.text_embeds, states).predicted_image_embedding
    assert bool(torch.isfinite(output).all())
    noise = UnCLIPFolder(result).noise()
    torch.testing.assert_close(noise.mean, prior.clip_mean[0].detach())
    torch.testing.assert_close(noise.std, prior.clip_std[0].detach())


def test_a_prior_is_trained_further(made: Path, learned: Path, tmp_path: Path) -> None:
    """It begins where the other run ended, with its statistics, also on other images."""
    others = tiny.photos(tmp_path / "others", 8)
    out = train_image_prior(
        config(made, tmp_path / "run", init=None, prior=learned / "result", data=others, max_steps=1)
    )
    old, new = (
        load_file(run / "result" / "prior" / "diffusion_pytorch_model.safetensors") for run in (learned, out)
    )  # fmt: skip
    for name in ("clip_mean", "clip_std"):
        assert torch.equal(old[name], new[name])
    assert 0 < max(float((old[name] - new[name]).abs().max()) for name in old) < 2e-3


# Users' mistakes

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({}, "a prior is either trained further or made: give one of prior and init"),
    ({"prior": "a", "init": "b"}, "a prior is either trained further or made: give one of prior and init"),
    ({"prior": 3}, "prior must be a path or a name, not 3"),
    ({"init": "a", "size": 64}, "size has no meaning for a prior"),
    ({"init": "a", "augment": ("flip",)}, "augment has no meaning for a prior, whose images are embedded once"),
    ({"init": "a", "evaluate": ("lpips",)}, "evaluate measures pictures, and a prior makes none"),
    ({"init": "a", "gradient_checkpointing": True}, "is not offered by diffusers' PriorTransformer"),
    ({"init": "a", "caption_dropout": 2}, "caption_dropout must be a number from 0 to 1, not 2"),
]


@pytest.mark.parametrize(("change", "fragment"), SETTINGS)
def test_settings(change: dict[str, Any], fragment: str) -> None:
    one_sentence(lambda: ImagePriorConfig(data="photos", out_dir="run", **change), sdkit.ArgumentError, fragment)


def test_mistakes_in_data_and_model(made: Path, tmp_path: Path) -> None:
    """Each is one sentence, and leaves no run folder."""

    def prior(name: str, **changes: Any) -> Path:
        return unclip.save_prior_config(tmp_path / name, **{"embedding_dim": D} | changes)

    silent = tiny.photos(tmp_path / "silent", 3)
    for path in silent.glob("*.txt"):
        path.write_text("")
    clip.save_clip(tmp_path / "narrow")
    argument, source = sdkit.ArgumentError, sdkit.SourceError
    cases: list[tuple[dict[str, Any], type[sdkit.SdkitError], str]] = [
        ({"data": silent}, DataError, "0 of the 3 images in"),
        ({"init": made}, source, "there is no config at"),
        ({"init": prior("1.json", _class_name="UNet2DModel")}, source, "is the config of UNet2DModel, not of Prior"),
        ({"init": prior("2.json", num_layers=-1)}, source, "has num_layers -1"),
        ({"init": prior("3.json", embedding_dim=24)}, argument, "this prior is for embeddings and states of width 24"),
        ({"init": prior("4.json", num_embeddings=77)}, argument, "texts of 77 tokens; this CLIP has widths 32 and 32"),
        ({"init": prior("5.json", num_layers=1000, num_attention_heads=5000)}, source, "sdkit builds at most"),
        ({"init": prior("7.json", num_embeddings=10**5)}, source, "numbers beside its weights, sdkit builds at most"),
        ({"init": prior("6.json", time_embed_act_fn=3)}, source, "has time_embed_act_fn 3, not a word"),
        ({"model": tmp_path / "narrow"}, argument, "this CLIP has widths 24 and 32"),
        ({"model": made / "photos"}, source, "config.json"),
        ({"init": None, "prior": made / "photos"}, source, "has no prior/config.json"),
    ]  # fmt: skip
    for number, (change, error, fragment) in enumerate(cases):
        out = tmp_path / f"run-{number}"
        one_sentence(lambda change=change, out=out: train_image_prior(config(made, out, **change)), error, fragment)
        assert not out.exists()


@pytest.mark.filterwarnings("ignore:005.png is skipped")
def test_command_line(made: Path, tmp_path: Path) -> None:
    from sdkit.cli import main

    arguments = ["train", "image-prior", "--data", made / "photos", "--model", made / "clip", "--max-steps", 1]
    arguments += ["--init", made / "prior.json", "--batch-size", 4, "--out-dir", tmp_path / "run"]
    assert main([str(one) for one in arguments]) == 0
    assert open_prior(UnCLIPFolder(tmp_path / "run" / "result"), torch.device("cpu")).network.width == D


@pytest.mark.filterwarnings("ignore:005.png is skipped")
def test_damaged_embeddings_of_a_run(made: Path, tmp_path: Path) -> None:
    out = train_image_prior(config(made, tmp_path / "run", max_steps=1))
    path = out / "embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    again = config(made, out, max_steps=2)
    one_sentence(lambda: train_image_prior(again), TrainingError, "remove it, and the images are embedded again")
    path.unlink()
    train_image_prior(again)
    whole = train_image_prior(config(made, tmp_path / "whole", max_steps=2))
    assert losses(out) == losses(whole)
    tensors, identity = read(path, path.stat().st_size)
    path.write_bytes(encoded({"embeddings": tensors["embeddings"]}, identity))  # embedded again
    train_image_prior(config(made, out, max_steps=3))
    assert torch.equal(read(path, 2**30)[0]["used"], tensors["used"])
    assert json.loads((out / "skipped.json").read_text()).keys() == {"005.png"}
