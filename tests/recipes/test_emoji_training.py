"""The recipe from raw material to a model, with two steps for each training, and interrupted in between."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import sdkit
from sdkit.errors import SourceError
from sdkit.recipes.emoji import __main__ as command
from sdkit.recipes.emoji import prepare as preparing
from sdkit.recipes.emoji import training
from sdkit.recipes.emoji.clip import RUNS as CLIP_RUNS
from sdkit.recipes.emoji.pictures import pictures
from sdkit.recipes.emoji.settings import HERE, settings, shape
from sdkit.recipes.emoji.start import LENGTH, VOCABULARY, make_start
from sdkit.training import ClipConfig, UNetConfig, VAEConfig
from tests.helpers.emoji_pictures import FEW, make_drawings, make_photographs

CAPTIONS = [caption for one in pictures() for caption in (one.name, f"a {one.name} on a blue background")]
RUNS = (*training.VAE_RUNS, training.SHARPENED, *training.UNET_RUNS)


def copy_emoji(root: Path) -> None:
    """Copy the embedded model to where the recipe puts its trained results."""
    emoji = Path(sdkit.__file__).parent / "assets" / "emoji"
    shutil.copytree(emoji, root / training.TRAINED / "result")
    shutil.copytree(emoji / "vae", root / training.SHARPENED / "result")


def when_written(root: Path) -> dict[Path, int]:
    """Return the times of images, latents, and weights, except the U-Net's start, which is made again each time."""
    files = (path for end in ("png", "safetensors") for path in root.rglob(f"*.{end}"))
    return {path: path.stat().st_mtime_ns for path in files if path.parts[len(root.parts)] != "start"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the U-Net's start, around the embedded model's VAE."""
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
    """Parts must fit together as in Stable Diffusion, and take at most 48 MB in float16."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(shape("vae"))
        unet = UNet2DConditionModel.from_config(shape("unet"))
    text = CLIPTextModel.from_pretrained(start / "text_encoder")
    assert vae.config.latent_channels == unet.config.in_channels == unet.config.out_channels == 4
    assert unet.config.cross_attention_dim == text.config.hidden_size
    assert vae.config.sample_size == 8 * unet.config.sample_size
    numbers = sum(p.numel() for part in (vae, unet, text) for p in part.parameters())
    assert 2 * numbers < 48e6


@pytest.mark.parametrize("run", [*RUNS, *CLIP_RUNS])
def test_the_settings_are_valid(run: str, tmp_path: Path) -> None:
    kind = {"vae": VAEConfig, "unet": UNetConfig, "clip": ClipConfig}[run.split("-")[0]]
    config = kind(**settings(run), model="emoji", data=tmp_path / "data", out_dir=tmp_path / "out")
    assert config.mixed_precision in ("no", "bf16")
    assert {path.stem for path in (HERE / "runs").iterdir()} == {*RUNS, *CLIP_RUNS}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:latents have moved")  # the U-Net is trained only afterwards
def test_the_whole_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run each step twice. The second time must reuse the results of the first. The final model must run in diffusers,
    and its VAE make the latents on which its U-Net was trained.
    """
    pytest.importorskip("resvg_py")
    monkeypatch.setattr(preparing, "pictures", lambda: FEW)
    monkeypatch.setattr(preparing, "CAPTIONED", {"plain": 2, "captioned": 2})
    tiles = {"tiles": (64, 12, 0.5, 0.0), "fine_tiles": (128, 12, 0.1, 0.8), "details": (64, 12, 0.1, 0.8)}
    tiles = {name: preparing.Tiles(*one) for name, one in tiles.items()}
    monkeypatch.setattr(preparing, "TILES", tiles)
    shortened = {"max_steps": 2, "batch_size": 2, "validate_every": 2, "lr_warmup_steps": 0, "lr_scheduler": "constant"}
    monkeypatch.setattr(
        training, "settings", lambda run: {**settings(run), **shortened, "lpips_weight": 0.0, "lpips": "alex"}
        if run.startswith("vae") else {**settings(run), **shortened, "validation_prompts": ("a red apple",)},
    )  # fmt: skip
    drawings, photographs = make_drawings(tmp_path / "packages"), make_photographs(tmp_path / "photographs")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--drawn", str(drawings.solid), "--vectors", str(drawings.vectors)]
    arguments += ["--photographs", str(photographs)]
    for step in command.STEPS[:-1]:
        monkeypatch.setattr("sys.argv", ["emoji", step, *arguments])
        assert command.main() == 0
        made = when_written(out)
        assert command.main() == 0
        if step != "export":
            assert when_written(out) == made
    assert capsys.readouterr().out.count(str(out)) == 2 * (len(command.STEPS) - 1)
    for run in RUNS:
        assert json.loads((out / run / "checkpoints" / "step-00000002" / "state.json").read_text())["step"] == 2
    first, last = (
        load_file(out / run / "result" / "diffusion_pytorch_model.safetensors")
        for run in (training.WHOLE, training.SHARPENED)
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


BEFORE = {
    "vae": "data/tiles is not there: tiles makes it",
    "latents": "vae-5/result is not there: vae-5 is to be trained first",
    "unet": "latents/plain is not there: latents makes it",
    "decoder": "vae-5/result is not there: vae-5 is to be trained first",
    "export": "vae-6/result is not there: vae-6 is to be trained first",
}


@pytest.mark.parametrize("step", BEFORE)
def test_a_step_before_its_time(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is run too early says what is missing, and does not look for it on the Hub."""
    monkeypatch.setattr(training.LPIPS, "from_pretrained", lambda _: None)
    monkeypatch.setattr("sys.argv", ["emoji", step, "--out", str(tmp_path)])
    with pytest.raises(SourceError, match=BEFORE[step]):
        command.main()
    assert not [*tmp_path.iterdir()]


def test_the_vae_of_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --from, the other model's VAE stands where the trained one would: its latents are the same."""
    monkeypatch.setattr("sys.argv", ["emoji", "vae", "--out", str(tmp_path), "--from", "emoji"])
    for _ in range(2):  # a second time replaces it
        assert command.main() == 0
    folder = tmp_path / training.WHOLE / "result"
    taken, emoji = (sdkit.VAE.from_pretrained(source, dtype="fp32") for source in (folder, "emoji"))
    assert taken.identity == emoji.identity
    for key, value in emoji.network.state_dict().items():
        assert torch.equal(value, taken.network.state_dict()[key]), key
    assert "assets" not in (folder / "config.json").read_text()
    (tmp_path / training.WHOLE / "checkpoints").mkdir()
    with pytest.raises(SourceError, match="holds a VAE trained by this recipe"):
        command.main()


def test_an_exported_model(tmp_path: Path) -> None:
    """Weights are in half precision, the config asks for single precision, and no file contains a path
    of this machine.
    """
    copy_emoji(tmp_path)
    folder = training.export(tmp_path)
    for file in folder.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    for file in folder.rglob("*.safetensors"):
        assert {value.dtype for value in load_file(file).values()} <= {torch.float16, torch.int64}, file
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    made, embedded = (sdkit.StableDiffusion.from_pretrained(source) for source in (folder, "emoji"))
    assert made.vae.identity == embedded.vae.identity
    assert made.guidance_scale == embedded.guidance_scale == training.DRAWN_AT


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    """A U-Net must not be exported with another VAE than the one on which it was trained."""
    copy_emoji(tmp_path)
    file = tmp_path / training.SHARPENED / "result" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    save_file({k: v * 1.5 if k == "encoder.conv_in.weight" else v for k, v in weights.items()}, file)
    with pytest.raises(SourceError, match="learned from the latents of another VAE"):
        training.export(tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"])
def test_a_damaged_part_is_not_exported(file: str, tmp_path: Path) -> None:
    copy_emoji(tmp_path)
    weights = tmp_path / training.TRAINED / "result" / file
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SourceError, match=f"{weights.name}.*damaged"):
        training.export(tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_folder_of_the_users_own_is_not_replaced(tmp_path: Path) -> None:
    copy_emoji(tmp_path)
    training.export(tmp_path)
    notes = tmp_path / "model" / "NOTES.md"
    notes.write_text("mine")
    with pytest.raises(SourceError, match=r"model is there already, with what is not of this recipe"):
        training.export(tmp_path)
    assert notes.read_text() == "mine"
