"""The recipe's steps from `vae` to `export`, in order. Interrupted trainings, or latent caches, are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdkit.atomic import whole_folder
from sdkit.data import cache, open_examples
from sdkit.errors import SourceError, TrainingError
from sdkit.loading.configs import GUIDANCE
from sdkit.messages import no_warnings, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.recipes.emoji.pictures import SIZE
from sdkit.recipes.emoji.settings import settings, shape_file
from sdkit.recipes.emoji.start import make_start
from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae

VAE_RUNS = {
    "vae-1": "tiles", "vae-2": "fine_tiles", "vae-3": "details", "vae-4": "details", "vae-5": "fine_tiles"
}  # fmt: skip
"""Run of the VAE -> its data set. The first run starts from scratch, and each later run from the result before it."""
WHOLE, SHARPENED, FINE = "vae-5", "vae-6", "fine_tiles"
UNET_RUNS = {
    "unet-1": "plain", "unet-2": "plain", "unet-3": "captioned", "unet-4": "captioned", "unet-5": "captioned",
    "unet-6": "captioned",
}  # fmt: skip
"""Run of the U-Net -> its data set. The first begins with root/start, and each later one with the result before it."""
TRAINED = "unet-6"
DRAWN_AT = 1.5  # default guidance scale of the model: images follow their prompts, and backgrounds stay even


def train_the_vae(root: Path) -> None:
    """Train the VAE in the folders root/vae-1 to root/vae-5."""
    if any(settings(run)["lpips_weight"] for run in VAE_RUNS):
        LPIPS.from_pretrained("vgg")  # raises now, not after hours of training, if the weights are missing
    start: dict[str, Any] = {"init": shape_file("vae")}
    for run, tiles in VAE_RUNS.items():
        _train_vae(root, run, tiles, **start)
        start = {"model": _result(root, run)}


def take_the_vae(root: Path, model: str) -> None:
    """Write the VAE of another model as root/vae-5/result, where a trained one would be.

    Args:
        root: Folder of the recipe's results.
        model: Source of the VAE; see `VAE.from_pretrained`.

    Raises:
        SourceError: There is no such VAE, or one was trained in root/vae-5.
    """
    if (root / WHOLE / "checkpoints").exists():
        raise SourceError(f"{root / WHOLE} holds a VAE trained by this recipe; move it, or name another --out.")
    vae = VAE.from_pretrained(model, dtype="fp32")
    vae.network.register_to_config(_name_or_path="")  # otherwise diffusers saves the local path
    with quiet("diffusers"), whole_folder(root / WHOLE / "result", TrainingError) as folder:
        vae.network.save_pretrained(folder)


def _train_vae(root: Path, run: str, tiles: str, **start: Any) -> None:
    """Train the VAE in root/`run`, starting from a model (`model`) or from scratch (`init`)."""
    common: dict[str, Any] = {
        "data": _data(root, tiles), "validation_data": _data(root, "held_out"), "out_dir": root / run
    }  # fmt: skip
    train_vae(VAEConfig(**settings(run), **common, **start))


def _result(root: Path, run: str) -> Path:
    """Return the folder with a run's result. Raises SourceError if it is missing."""
    return _existing(root / run / "result", f"{run} is to be trained first")


def _data(root: Path, name: str) -> Path:
    """Return the folder of a data set. Raises SourceError if it is missing."""
    return _existing(root / "data" / name, f"{'captioned' if name in UNET_RUNS.values() else 'tiles'} makes it")


def _existing(folder: Path, hint: str) -> Path:
    """Return a folder of an earlier step. Raises SourceError, with a hint, if it is missing."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not there: {hint} (see --help for the order of the steps).")
    return folder


def _replaceable(folder: Path) -> Path:
    """Return `folder` if it may be replaced: if it is missing, or holds only a model. Raises SourceError otherwise."""
    parts = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= parts):
        raise SourceError(
            f"{folder} is there already, with what is not of this recipe; move it, or name another --out."
        )
    return folder


def make_latents(root: Path) -> None:
    """Make root/start, where the U-Net's training starts, and root/latents, with a latent cache of each captioned set.

    The tokenizer learns from the captions of the last set, which hold all words.
    """
    names = [*dict.fromkeys(UNET_RUNS.values())]
    start, vae, data = _replaceable(root / "start"), _result(root, WHOLE), _data(root, names[-1])
    VAE.from_pretrained(vae)  # raises if the VAE is damaged
    make_start(vae, open_examples(data).captions, start)
    for name in names:
        cache(start, _data(root, name), root / "latents" / name, size=SIZE, dtype="auto")


def train_the_unet(root: Path) -> None:
    """Train the U-Net and the text encoder in the folders root/unet-1 to root/unet-6, the first from scratch."""
    start: dict[str, Any] = {"model": root / "start", "init": shape_file("unet")}
    for run, images in UNET_RUNS.items():
        latents = _existing(root / "latents" / images, "latents makes it")
        train_unet(
            UNetConfig(**settings(run), data=latents, size=SIZE, train_text_encoder=True, out_dir=root / run, **start)
        )
        start = {"model": _result(root, run)}


def train_the_decoder(root: Path) -> None:
    """Train only the VAE's decoder, in root/vae-6. The encoder is frozen, so that the latents still suit the U-Net."""
    _train_vae(root, SHARPENED, FINE, model=_result(root, WHOLE))


def export(root: Path) -> Path:
    """Write root/model: the U-Net and the text encoder of root/unet-6 with the VAE of root/vae-6, in float16.

    Returns:
        The folder of the model.

    Raises:
        SourceError: A part is missing, or the U-Net was trained on latents of another VAE.
        TrainingError: The folder cannot be written.
    """
    import torch

    vae, unet = _result(root, SHARPENED), _result(root, TRAINED)
    sharpened, trained = VAE.from_pretrained(vae, dtype="fp32"), StableDiffusion.from_pretrained(unet, dtype="fp32")
    if sharpened.identity != trained.vae.identity:
        raise SourceError(
            f"{unet} learned from the latents of another VAE than {vae} is; remove {root / 'latents'} and "
            f"{', '.join(str(root / run) for run in UNET_RUNS)}, and train again from `latents`."
        )
    with quiet("diffusers", "transformers"), no_warnings():
        from diffusers import AutoencoderKL, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            unet, vae=AutoencoderKL.from_pretrained(vae), safety_checker=None
        )
        pipeline.to(torch.float16)
        pipeline.register_to_config(**{GUIDANCE: DRAWN_AT})
        for part in (pipeline, pipeline.vae, pipeline.unet):
            part.register_to_config(_name_or_path="")  # otherwise diffusers saves the local path
        with whole_folder(_replaceable(root / "model"), TrainingError) as folder:
            pipeline.save_pretrained(folder)
            config = folder / "text_encoder" / "config.json"  # transformers loads in the dtype named here
            config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    return root / "model"
