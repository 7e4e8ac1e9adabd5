"""The recipe from its raw material to a model, with two steps for each training, and stopped and taken up between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

import sdkit
from sdkit.errors import SourceError
from sdkit.recipes.emoji import __main__ as command
from sdkit.recipes.emoji import prepare as preparing
from sdkit.recipes.emoji import training
from sdkit.recipes.emoji.pictures import pictures
from sdkit.recipes.emoji.settings import HERE, settings, shape
from sdkit.recipes.emoji.start import LENGTH, VOCABULARY, make_start
from sdkit.training import UNetConfig, VAEConfig

CAPTIONS = [caption for one in pictures() for caption in (one.name, f"a {one.name} on a blue background")]
RUNS = ("vae-1", "vae-2", "vae-3", "vae-4", "vae-5", "unet-1")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the U-Net begins with, around the embedded model's VAE."""
    folder = tmp_path_factory.mktemp("recipe") / "start"
    make_start(Path(sdkit.__file__).parent / "assets" / "emoji" / "vae", CAPTIONS, folder)
    return folder


def test_the_tokenizer_knows_the_names_and_takes_any_text(start: Path) -> None:
    text = sdkit.TextEncoder.from_pretrained(start, device="cpu", dtype="fp32")
    tokenizer = text.tokenizer
    assert len(tokenizer) == VOCABULARY == text.network.config.vocab_size
    assert text.length == LENGTH
    for sentence in (*CAPTIONS[:50], "Ωmega 🍎 żółw!", "xylophone", "\x00"):
        ids = tokenizer(sentence, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids).split() == sentence.lower().split() or not sentence.isascii()
    whole = [name for one in pictures() for name in one.name.split() if len(tokenizer.tokenize(name)) == 1]
    assert len(whole) > 1000
    assert max(len(tokenizer(caption).input_ids) for caption in CAPTIONS) <= LENGTH


def test_the_start_is_the_same_each_time(start: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    make_start(start / "vae", CAPTIONS, again)
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        assert (again / name).read_bytes() == (start / name).read_bytes()


def test_the_shapes_are_those_of_the_paper_s_model_in_small(start: Path) -> None:
    """Parts as Stable Diffusion has them, which fit into 32 MB in float16."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(shape("vae"))
        unet = UNet2DConditionModel.from_config(shape("unet"))
    text = CLIPTextModel.from_pretrained(start / "text_encoder")
    assert vae.config.latent_channels == unet.config.in_channels == unet.config.out_channels == 4
    assert unet.config.cross_attention_dim == text.config.hidden_size
    assert vae.config.sample_size == 8 * unet.config.sample_size
    numbers = sum(p.numel() for part in (vae, unet, text) for p in part.parameters())
    assert 2 * numbers < 31.5e6


@pytest.mark.parametrize("run", RUNS)
def test_the_settings_are_valid(run: str, tmp_path: Path) -> None:
    kind = VAEConfig if run.startswith("vae") else UNetConfig
    config = kind(**settings(run), model="emoji", data=tmp_path / "data", out_dir=tmp_path / "out")
    assert config.mixed_precision in ("no", "bf16")
    assert {path.stem for path in (HERE / "runs").iterdir()} == set(RUNS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:latents have moved")  # whose U-Net is yet to come
def test_the_whole_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each step twice: the second time it finds what the first has made. The model that comes of it runs in diffusers,
    and its latents are those that its U-Net was trained on."""
    from tests.recipes.test_emoji_data import FEW, make_drawn, make_photographs

    monkeypatch.setattr(preparing, "pictures", lambda: FEW)
    tiles = {"tiles": (64, 12, 0.5, 0.0), "fine_tiles": (128, 12, 0.1, 0.8), "details": (64, 12, 0.1, 0.8)}
    monkeypatch.setattr(preparing, "TILES", tiles)
    shortened = {"max_steps": 2, "batch_size": 2, "validate_every": 2, "lr_warmup_steps": 0, "lr_scheduler": "constant"}
    monkeypatch.setattr(
        training, "settings", lambda run: {**settings(run), **shortened, "lpips_weight": 0.0}
        if run.startswith("vae") else {**settings(run), **shortened, "validation_prompts": ("a red apple",)},
    )  # fmt: skip
    drawn, photographs = make_drawn(tmp_path / "assets"), make_photographs(tmp_path / "photographs")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--drawn", str(drawn), "--photographs", str(photographs)]
    for step in command.STEPS[:-1]:
        for _ in range(2):
            monkeypatch.setattr("sys.argv", ["emoji", step, *arguments])
            assert command.main() == 0
    assert capsys.readouterr().out.count(str(out)) == 2 * (len(command.STEPS) - 2)
    steps = {run: json.loads((out / run / "checkpoints" / "step-00000002" / "state.json").read_text()) for run in RUNS}
    assert len(steps) == len(RUNS)
    first, last = (
        load_file(out / run / "result" / "diffusion_pytorch_model.safetensors") for run in ("vae-4", "vae-5")
    )
    for key, value in first.items():
        assert key.startswith(("decoder.", "post_quant_conv.")) or torch.equal(value, last[key])
    pipe = StableDiffusionPipeline.from_pretrained(out / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red apple", num_inference_steps=2, guidance_scale=2).images[0].size == (128, 128)
    stored = load_file(out / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert sdkit.StableDiffusion.from_pretrained(out / "model").vae.scale == pytest.approx(
        json.loads((out / "vae-1" / "result" / "config.json").read_text())["scaling_factor"]
    )


@pytest.mark.parametrize(("step", "missing"), [("latents", "vae-4"), ("decoder", "vae-4"), ("export", "vae-5")])
def test_a_step_before_its_time(step: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what is missing; the Hub is not asked for it."""
    captioned = tmp_path / "data" / "captioned"
    captioned.mkdir(parents=True)
    (captioned / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a red apple"}\n')
    Image.new("RGB", (128, 128)).save(captioned / "0.png")
    monkeypatch.setattr("sys.argv", ["emoji", step, "--out", str(tmp_path)])
    with pytest.raises(SourceError, match=rf"{missing}/result is not there: {missing} is to be trained first"):
        command.main()


def test_the_start_is_made_anew_for_another_vae(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "cache", lambda *_, **__: None)
    monkeypatch.setattr(training, "open_examples", lambda _: [])
    shutil.copytree(start, tmp_path / "start")
    shutil.copytree(start / "vae", tmp_path / "vae-4" / "result")
    monkeypatch.setattr(training, "make_start", lambda *_: pytest.fail("it fits"))
    training.make_latents(tmp_path)
    file = tmp_path / "vae-4" / "result" / "diffusion_pytorch_model.safetensors"
    save_file({k: v * 1.5 if k == "encoder.conv_in.weight" else v for k, v in load_file(file).items()}, file)
    monkeypatch.setattr(training, "make_start", make_start)
    training.make_latents(tmp_path)
    vaes = (sdkit.VAE.from_pretrained(tmp_path / name) for name in ("start", "vae-4/result"))
    assert len({vae.identity for vae in vaes}) == 1


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    """A U-Net is not exported with a VAE whose latents it does not know."""
    emoji = Path(sdkit.__file__).parent / "assets" / "emoji"
    shutil.copytree(emoji, tmp_path / "unet-1" / "result")
    shutil.copytree(emoji / "vae", tmp_path / "vae-5" / "result")
    file = tmp_path / "vae-5" / "result" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v * 1.5 if k == "encoder.conv_in.weight" else v for k, v in weights.items()}, file)
    with pytest.raises(SourceError, match="learned from the latents of another VAE"):
        training.export(tmp_path)
    assert not (tmp_path / "model").exists()
