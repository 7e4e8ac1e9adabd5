"""The trainings, in order: each is a call of `train_vae`, `cache` or `train_unet`, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sdkit.data import cache, open_examples
from sdkit.errors import SourceError
from sdkit.loading.configs import GUIDANCE
from sdkit.messages import no_warnings, quiet
from sdkit.networks.autoencoder import VAE
from sdkit.networks.lpips import LPIPS
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.recipes.emoji.pictures import SIZE
from sdkit.recipes.emoji.settings import settings, shape_file
from sdkit.recipes.emoji.start import make_start
from sdkit.training import UNetConfig, VAEConfig, train_unet, train_vae
from sdkit.training.checkpoint import whole_folder

VAE_RUNS = {"vae-1": "tiles", "vae-2": "fine_tiles", "vae-3": "details", "vae-4": "details"}
"""The runs, and what each learns from. The first begins from nothing, another where the one before has ended."""
WHOLE, SHARPENED = "vae-4", "vae-5"
DRAWN_AT = 1.5  # scale of guidance: prompts count for more than they would without, and backgrounds stay even


def train_the_vae(root: Path) -> None:
    """The folders root/vae-1 to root/vae-4."""
    if any(settings(run)["lpips_weight"] for run in VAE_RUNS):
        LPIPS.from_pretrained()  # whether it is there is not to be asked first after hours
    begins: dict[str, Any] = {"init": shape_file("vae")}
    for run, tiles in VAE_RUNS.items():
        _train_vae(root, run, tiles, **begins)
        begins = {"model": _result(root, run)}


def _train_vae(root: Path, run: str, tiles: str, **begins: Any) -> None:
    """root/RUN, from a model or from nothing (init)."""
    common: dict[str, Any] = {
        "data": _data(root, tiles), "validation_data": _data(root, "held_out"), "out_dir": root / run
    }  # fmt: skip
    train_vae(VAEConfig(**settings(run), **common, **begins))


def _result(root: Path, run: str) -> Path:
    """What a run has made."""
    return _there(root / run / "result", f"{run} is to be trained first")


def _data(root: Path, name: str) -> Path:
    """What `prepare` has made."""
    return _there(root / "data" / name, "prepare makes it")


def _there(folder: Path, before: str) -> Path:
    """The folder, which an earlier step makes."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is not there: {before} (see --help for the order of the steps).")
    return folder


def _own(folder: Path) -> Path:
    """The folder, which is not there yet, or is as an earlier run has made it."""
    parts = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}
    if folder.exists() and not (folder.is_dir() and {path.name for path in folder.iterdir()} <= parts):
        raise SourceError(
            f"{folder} is there already, with what is not of this recipe; move it, or name another --out."
        )
    return folder


def make_latents(root: Path) -> None:
    """root/start, a pipeline around the VAE that lacks a U-Net, and root/latents, the captioned images as latents."""
    start, vae, data = _own(root / "start"), _result(root, WHOLE), _data(root, "captioned")
    VAE.from_pretrained(vae)  # whether it is whole
    make_start(vae, open_examples(data).captions, start)
    cache(start, data, root / "latents", size=SIZE)


def train_the_unet(root: Path) -> None:
    """root/unet-1, from nothing and together with the text encoder."""
    latents = _there(root / "latents", "latents makes it")
    train_unet(
        UNetConfig(
            **settings("unet-1"), data=latents, size=SIZE, train_text_encoder=True, model=root / "start",
            init=shape_file("unet"), out_dir=root / "unet-1",
        )
    )  # fmt: skip


def train_the_decoder(root: Path) -> None:
    """root/vae-5: the decoder alone, so that latents keep their meaning."""
    _train_vae(root, SHARPENED, "fine_tiles", model=_result(root, WHOLE))


def export(root: Path) -> Path:
    """root/model: the U-Net and the text encoder of root/unet-1 with the VAE of root/vae-5, in float16."""
    import torch

    vae, unet = _result(root, SHARPENED), _result(root, "unet-1")
    sharpened, trained = VAE.from_pretrained(vae, dtype="fp32"), StableDiffusion.from_pretrained(unet, dtype="fp32")
    if sharpened.identity != trained.vae.identity:
        raise SourceError(
            f"{unet} learned from the latents of another VAE than {vae} is; remove {root / 'latents'} and "
            f"{root / 'unet-1'}, and train again from `latents`."
        )
    with quiet("diffusers", "transformers"), no_warnings():
        from diffusers import AutoencoderKL, StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(
            unet, vae=AutoencoderKL.from_pretrained(vae), safety_checker=None
        )
        pipeline.to(torch.float16)
        pipeline.register_to_config(**{GUIDANCE: DRAWN_AT})
        for part in (pipeline, pipeline.vae, pipeline.unet):
            part.register_to_config(_name_or_path="")  # no folder of this machine
        with whole_folder(_own(root / "model")) as folder:
            pipeline.save_pretrained(folder)
            config = folder / "text_encoder" / "config.json"  # from which transformers would take the dtype
            config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    return root / "model"
