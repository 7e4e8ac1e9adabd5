"""Textual inversion: what is trained, with which captions, runs that are killed, and the result."""

from __future__ import annotations

import functools
import json
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel

import sdkit
from sdkit.data import cache
from sdkit.errors import SdkitError
from sdkit.networks.learned_tokens import GrownEmbedding
from sdkit.training import EmbeddingConfig, settings, train_embedding
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.embedding import TEMPLATES, EmbeddingStage
from tests.helpers import runs as helper
from tests.helpers import tiny
from tests.helpers.networks import diffusers_pipeline

BATCH = [(n, n) for n in range(4)]
LONG = "a red <zork> beside an apple on a blue background and a cat " * 3  # takes 2 chunks of 30 tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, six images, of which three have a caption that names the token, and a cache of them."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 6)
    for i, caption in enumerate(("a <zork>, on a blue background", LONG, "<Zork>")):
        (folder / "photos" / f"{i:03}.txt").write_text(caption)
    cache(
        folder / "model", folder / "photos", folder / "cache", size=tiny.SIZE, dtype="fp32", device="cpu",
        embeddings=True,
    )  # fmt: skip
    return folder


def config(made: Path, **changes: Any) -> EmbeddingConfig:
    own: dict[str, Any] = {
        "model": made / "model", "data": made / "photos", "out_dir": made / "unused", "size": tiny.SIZE,
        "token": "<zork>", "init_token": "apple", "vectors": 2, "batch_size": 4, "max_steps": 3,
    }  # fmt: skip
    return EmbeddingConfig(**own | changes)


def vectors(stage: EmbeddingStage) -> torch.nn.Parameter:
    table = stage.text.network.embeddings.token_embedding
    assert isinstance(table, GrownEmbedding)
    return table.learned


def test_settings_name_the_templates() -> None:
    assert (*TEMPLATES,) == settings.TEMPLATES


def test_loss_is_that_of_diffusers_networks(made: Path) -> None:
    """The text encoder of transformers is grown by its own `resize_token_embeddings`."""
    stage = EmbeddingStage(config(made))
    with torch.no_grad():
        vectors(stage).normal_(generator=torch.Generator().manual_seed(0))
    batch = stage.batch(BATCH)
    assert batch["mask"] is not None
    found, parts = stage.loss({"embedding": stage.denoiser}, batch, 0)
    assert parts == {}
    found.backward()  # type: ignore[no-untyped-call]
    vae = AutoencoderKL.from_pretrained(made / "model" / "vae")
    unet = UNet2DConditionModel.from_pretrained(made / "model" / "unet")
    scheduler = DDPMScheduler.from_pretrained(made / "model" / "scheduler")
    text = CLIPTextModel.from_pretrained(made / "model" / "text_encoder").eval()
    size = text.config.vocab_size
    text.resize_token_embeddings(size + 2, mean_resizing=False)
    rows = text.get_input_embeddings().weight
    rows.data[size:] = vectors(stage).data
    losses = []
    for i in range(len(BATCH)):
        posterior = vae.encode(batch["pixels"][i : i + 1]).latent_dist
        x0 = (posterior.mean + posterior.std * batch["posterior_eps"][i]) * vae.config.scaling_factor
        eps, t = batch["eps"][i : i + 1], torch.tensor([batch["t"][i]])
        x_t = scheduler.add_noise(x0, eps, t)
        ids = batch["ids"][i][batch["mask"][i].reshape(batch["ids"][i].shape)[:, 0]]
        embeddings = text(ids).last_hidden_state.flatten(0, 1)[None]
        losses.append((unet(x_t, t, embeddings).sample - eps).square().mean())
    expected = torch.stack(losses).mean()
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors(stage).grad, rows.grad[size:], atol=1e-6, rtol=1e-4)


def test_only_the_new_rows_are_trained(made: Path, tmp_path: Path) -> None:
    """All other parameters are those of the model, bit-identically, after training as before."""
    stage = EmbeddingStage(config(made, out_dir=tmp_path / "run"))
    (player,) = stage.players
    trained = [name for name, p in player.network.named_parameters() if p.requires_grad]
    assert trained == ["text.network.embeddings.token_embedding.learned"]
    first = vectors(stage).detach().clone()
    assert torch.equal(first, stage.text.network.embeddings.token_embedding.weight[apple(stage)].expand(2, -1))
    before = {name: x.clone() for part in (stage.vae, stage.denoiser) for name, x in part.state_dict().items()}
    from sdkit.training.loop import fit

    fit(stage, stage.config, tmp_path / "run")
    after = {name: x for part in (stage.vae, stage.denoiser) for name, x in part.state_dict().items()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == {*trained}
    assert float((vectors(stage).detach() - first).abs().min(dim=1).values.max()) > 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000003" / "embedding.safetensors"
    assert checkpoint.stat().st_size < 4096


def apple(stage: EmbeddingStage) -> int:
    (token,) = stage.text.tokenizer("apple", add_special_tokens=False).input_ids
    return int(token)


class TestCaptions:
    def test_are_the_images_own_or_templates(self, made: Path) -> None:
        stage = EmbeddingStage(config(made))
        text, length = stage.text, stage.text.tokenize("")[0].shape[-1]
        own = {0: "a <zork>, on a blue background", 1: LONG, 2: "<zork>"}
        for epoch in range(3):
            for item in range(6):
                ids = stage.examples.load(item, epoch)["ids"]
                assert ids.shape[-1] == length
                expected = [own[item]] if item in own else [t.format("<zork>") for t in TEMPLATES["object"]]
                assert any(torch.equal(ids, text.tokenize(caption)[0][0]) for caption in expected)
        drawn = {stage.examples.load(4, epoch)["ids"].numpy().tobytes() for epoch in range(20)}
        assert len(drawn) > 8
        assert stage.examples.held_out_caption(0) == "a <zork> , on a blue background"
        assert stage.examples.held_out_caption(5) == "a photo of a <zork>"

    def test_of_a_style(self, made: Path) -> None:
        stage = EmbeddingStage(config(made, template="style"))
        assert stage.examples.held_out_caption(5) == "a painting in the style of <zork>"

    def test_are_templates_where_there_are_none(self, made: Path, tmp_path: Path) -> None:
        """Without a warning, which would be an error here."""
        tiny.photos(tmp_path / "photos", 2)
        for path in (tmp_path / "photos").glob("*.txt"):
            path.unlink()
        stage = EmbeddingStage(config(made, data=tmp_path / "photos"))
        assert stage.examples.held_out_caption(1) == "a photo of a <zork>"

    def test_of_a_cache_are_those_of_the_images(self, made: Path) -> None:
        images, cached = (EmbeddingStage(config(made, data=made / data)) for data in ("photos", "cache"))
        for epoch in range(3):
            numbers = [(6 * epoch + n, n) for n in range(6)]
            assert torch.equal(images.batch(numbers)["ids"], cached.batch(numbers)["ids"])
        assert [images.examples.held_out_caption(i) for i in range(6)] == [
            cached.examples.held_out_caption(i) for i in range(6)
        ]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_cache_and_images_give_the_same_run(made: Path, tmp_path: Path) -> None:
    for data in ("photos", "cache"):
        train_embedding(config(made, data=made / data, out_dir=tmp_path / data))
    assert losses(tmp_path / "photos") == pytest.approx(losses(tmp_path / "cache"), rel=1e-4)
    found = [load_file(tmp_path / data / "result" / "learned_embeds.safetensors") for data in ("photos", "cache")]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)


GOLDEN = [1.022485, 1.180662, 0.785646, 1.147853, 0.94161, 1.087648, 0.776062, 1.145822, 1.252265, 0.840939]


def test_golden_losses(made: Path, tmp_path: Path) -> None:
    """Losses of ten steps in float32, to 1e-3. A change in these numbers is a change in what is learned."""
    train_embedding(config(made, out_dir=tmp_path, max_steps=10, augment=("flip",), snr_gamma=5.0))
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=1e-3)


def test_norms_are_kept(made: Path, tmp_path: Path) -> None:
    train_embedding(config(made, out_dir=tmp_path, keep_norm=True, learning_rate=0.1))
    network = CLIPTextModel.from_pretrained(made / "model" / "text_encoder")
    expected = network.get_input_embeddings().weight.norm(dim=1).mean()
    (found,) = load_file(tmp_path / "result" / "learned_embeds.safetensors").values()
    torch.testing.assert_close(found.norm(dim=1), expected.detach().expand(2))


def test_the_result_draws_the_same_in_diffusers(made: Path, tmp_path: Path) -> None:
    """Latents to 1e-4. The run is evaluated, its pictures are drawn, and the token is learned further than noise."""
    out = train_embedding(
        config(
            made, out_dir=tmp_path, learning_rate=0.1, max_steps=6, validation_prompts=("a red <zork>",),
            evaluate=("lpips",), gradient_checkpointing=True, vectors=1,
        )
    )  # fmt: skip
    assert len([*(out / "samples").iterdir()]) == 2
    validation = [line for line in read_metrics(out / "metrics.jsonl") if "validation/loss" in line]
    assert validation[-1]["validation/loss"] < validation[0]["validation/loss"]
    assert "validation/lpips" in validation[-1]
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {
        "latents": noise, "num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent"
    }  # fmt: skip
    sd = sdkit.StableDiffusion.from_pretrained(made / "model", dtype="fp32", device="cpu")
    without = sd("a red <zork> on a cat", **options)
    assert sd.load_embedding(out / "result") == "<zork>"
    ours = sd("a red <zork> on a cat", **options)
    sd.unload_embedding()
    pipe = diffusers_pipeline(sd, tiny.scheduler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_textual_inversion(str(out / "result"))
    theirs = pipe("a red <zork> on a cat", height=tiny.SIZE, width=tiny.SIZE, **options).images
    assert float((ours - theirs).abs().max()) < 1e-4 < float((ours - without).abs().max())


# Runs that are killed

RUN: dict[str, Any] = {
    "max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "save_every": 2, "keep_checkpoints": 1,
    "validate_every": 3, "lr_scheduler": "cosine", "size": tiny.SIZE, "augment": ("crop", "flip"), "seed": 7,
    "ema_decay": 0.9, "keep_norm": True, "vectors": 2, "token": "<zork>", "init_token": "apple",
}  # fmt: skip
POINTS = {
    "loss 6": 2,
    "update 3": 2,
    "half 8": 2,
    "export 1": 6,
}
"""Points at which a run is killed -> the step of the newest checkpoint at that time. test_runs.py has those of the
loop, which is the same for all stages."""


@pytest.fixture(scope="module")
def run() -> helper.Runs:
    return helper.Runs()


def settings_of(made: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return RUN | {"model": made / "model", "data": made / "photos", "out_dir": out} | changes


@pytest.fixture(scope="module")
def uninterrupted(made: Path, run: helper.Runs) -> Callable[[], dict[str, Any]]:
    @functools.cache
    def train() -> dict[str, Any]:
        assert run("embedding", settings_of(made, made / "uninterrupted")) == 0
        return helper.everything(made / "uninterrupted")

    return train


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_ends_as_one_never_stopped_to_the_bit(
    point: str, made: Path, run: helper.Runs, uninterrupted: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    given = settings_of(made, tmp_path / "run")
    assert run("embedding", given, f"SIGKILL {point}") == -signal.SIGKILL
    steps = [int(path.name[5:]) for path in (tmp_path / "run").glob("checkpoints/step-*")]
    assert max(steps, default=0) == POINTS[point]
    assert not (tmp_path / "run" / "result").exists()
    assert run("embedding", given) == 0
    assert helper.everything(tmp_path / "run") == uninterrupted()


def test_another_token_is_another_run(made: Path, tmp_path: Path) -> None:
    train_embedding(config(made, out_dir=tmp_path, max_steps=1))
    with pytest.raises(SdkitError, match="token"):
        train_embedding(config(made, out_dir=tmp_path, token="<blorp>", max_steps=2))


# Bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"token": "apple"}, "the token 'apple' is a word of the vocabulary already; give one that is not"),
    ({"token": ""}, "token must be a word, not ''"),
    ({"token": "my zork"}, r"the token 'my zork' has a space or one of \(\)\[\]"),
    ({"token": "[zork]"}, r"the token '\[zork\]' has a space or one of"),
    ({"init_token": ""}, "init_token must be a word, not ''"),
    ({"init_token": " "}, "init_token ' ' is no word of this model's vocabulary; give a word that is one"),
    ({"init_token": "red apple"}, "init_token 'red apple' is 2 tokens of this model's vocabulary"),
    ({"init_token": "zorkmid"}, r"init_token 'zorkmid' is \d tokens of this model's vocabulary"),
    ({"vectors": 0}, "vectors must be a whole number of at least 1"),
    ({"vectors": 31}, "this embedding has 31 vectors, and this model reads at most 30 tokens together"),
    ({"template": "portrait"}, "template 'portrait' is not one of 'object', 'style'"),
    ({"keep_norm": 3}, "keep_norm"),
    ({"init": "x"}, "init has no meaning for an embedding, which is learned for a model"),
    ({"prediction_type": "v"}, "an embedding is used with the model's own noise schedule, which prediction_type would"),
    ({"zero_snr": True}, "an embedding is used with the model's own noise schedule, which zero_snr would change"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(made: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SdkitError, match=f"^{sentence}") as caught:
        EmbeddingStage(config(made, **change))
    assert "\n" not in str(caught.value)


def test_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdkit.cli import main

    arguments = ["train", "embedding", "--data", made / "photos", "--model", made / "model", "--token", "<zork>"]
    arguments += ["--init-token", "cat", "--out-dir", tmp_path / "run", "--size", tiny.SIZE, "--max-steps", 1]
    assert main([str(one) for one in arguments]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["init_token"] == "cat"
    arguments = ["generate", "a red <zork>", "--model", made / "model", "--embedding", tmp_path / "run" / "result"]
    assert main([str(one) for one in [*arguments, "--steps", 1, "--out", tmp_path / "a.png"]]) == 0
    assert sdkit.images.read_text(tmp_path / "a.png")["embedding_token"] == "<zork>"
    capsys.readouterr()
    assert main(["train", "embedding", "--data", str(made / "photos"), "-o", str(tmp_path / "b")]) == 2
    assert "--token and --init-token must be given" in capsys.readouterr().err
