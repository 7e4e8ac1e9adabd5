"""A file of weights in the original (CompVis, A1111, civitai) layout, made into networks with no network connection.

diffusers' converters rename the tensors; which public config they are poured into is read off their shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sdkit.arguments import PREDICTIONS
from sdkit.errors import SourceError
from sdkit.messages import clean
from sdkit.models.weights import TensorFile, check_fit, guarded, read_config

ASSETS = Path(__file__).parent.parent / "assets"
NOUNS = {"vae": "a VAE", "unet": "a U-Net", "text": "a CLIP text encoder", "scheduler": "a noise schedule"}

# How the names of each part begin in a checkpoint; a VAE alone has its names without a prefix.
PREFIXES = {
    "vae": ("first_stage_model.", "vae.", ""),
    "unet": ("model.diffusion_model.",),
    "text": ("cond_stage_model.",),
}
VAE_MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
OPEN_CLIP = "cond_stage_model.model."
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"

# Pieces of names that only other models have, the most telling first.
FOREIGN = (
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("control_model.", "a ControlNet"),
    ("lora_", "a LoRA"),
    (".lora", "a LoRA"),
    ("label_emb.", "a class-conditioned model such as SD 2.1 unCLIP"),
    ("string_to_param", "a textual inversion embedding"),
    ("emb_params", "a textual inversion embedding"),
)
# The names of diffusers' and transformers' own layout, which say too little without the config.json beside them.
DIFFUSERS_NAMES = ("down_blocks.", "text_model.encoder.", "encoder.layers.", "decoder.layers.")
WIDTHS = {768: "sd1", 1024: "sd2", 1280: "the refiner of Stable Diffusion XL", 2048: "Stable Diffusion XL"}
INPUTS = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}


def keys_of(file: TensorFile, part: str) -> list[str]:
    """The names of the tensors of `part` ("vae", "unet", "text"); an empty list where it is not in the file."""
    for prefix in PREFIXES[part]:
        begins = tuple(prefix + module for module in VAE_MODULES) if part == "vae" else (prefix,)
        if keys := [key for key in file.shapes if key.startswith(begins)]:
            return keys
    return []


def require(file: TensorFile, part: str) -> list[str]:
    """The names of the tensors of `part`, or a SourceError that says what the file holds instead."""
    if keys := keys_of(file, part):
        return keys
    held = " and ".join(NOUNS[other] for other in PREFIXES if keys_of(file, other))
    wanted = NOUNS[part]
    remedy = "name one beside it (vae=, or --vae)" if part == "vae" else "give a whole checkpoint or another source"
    raise SourceError(f"{file.label} holds {held}, not {wanted}; {remedy}.")


def check_kind(file: TensorFile) -> None:
    """Raises SourceError for names that belong to other models, saying which, or to none that sdkit knows."""
    for name, looks_like in FOREIGN:
        if any(name in key for key in file.shapes):
            raise SourceError(f"{file.label} looks like {looks_like}; sdkit loads Stable Diffusion 1.x and 2.x.")
    if "xl" in file.metadata.get("modelspec.architecture", ""):  # an SDXL VAE has the shapes of SD's, not its scale
        raise SourceError(f"{file.label} looks like Stable Diffusion XL; sdkit loads Stable Diffusion 1.x and 2.x.")
    own = [key for key in file.shapes if not key.startswith(PREFIXES["text"])]
    if any(name in key for key in own for name in DIFFUSERS_NAMES):
        raise SourceError(f"{file.label} is one part in diffusers layout; give its folder, with the config.json in it.")
    if not any(keys_of(file, part) for part in PREFIXES):
        raise SourceError(f"{file.label} holds neither a Stable Diffusion checkpoint nor a VAE; give another file.")


def family_of(file: TensorFile) -> str:
    """The public config that fits: "sd1", "sd2", or "sd2-v" where the file says so.

    Raises SourceError where the sizes are of neither family, naming what the file looks like.
    """
    latents = next((_inputs(file, key) for key in keys_of(file, "vae") if key.endswith("decoder.conv_in.weight")), 4)
    if latents != 4:
        raise SourceError(f"{file.label} holds a VAE of another family: {latents} latent channels where SD has 4.")
    channels = _inputs(file, FIRST_CONV) if FIRST_CONV in file.shapes else 4
    if channels != 4:
        name = INPUTS.get(channels, "another kind of model")
        raise SourceError(f"{file.label} looks like {name} ({channels} input channels); give a text-to-image model.")
    if unet := keys_of(file, "unet"):
        width = next((_inputs(file, key) for key in unet if key.endswith(".attn2.to_k.weight")), 0)
        family = WIDTHS.get(width, "a model of another family")
        if family not in ("sd1", "sd2"):
            raise SourceError(f"{file.label} looks like {family} (cross-attention width {width}); SD has 768 or 1024.")
    else:
        family = "sd2" if any(key.startswith(OPEN_CLIP) for key in file.shapes) else "sd1"
    return "sd2-v" if family == "sd2" and marked_prediction(file) == "v_prediction" else family


def _inputs(file: TensorFile, key: str) -> int:
    """How many channels the layer takes whose weight is `key`."""
    shape = file.shapes[key]
    if len(shape) < 2:
        raise SourceError(f"{file.label} is damaged, for its {clean(key)} is no matrix; download it again.")
    return shape[1]


def marked_prediction(file: TensorFile) -> str | None:
    """The prediction type that the file states by its metadata or by marker keys; None where it says nothing."""
    stated = PREDICTIONS.get(file.metadata.get("modelspec.prediction_type", ""))
    return stated or ("v_prediction" if "v_pred" in file.shapes else None)


@torch.inference_mode()
def probe_prediction(unet: Any) -> str:
    """ "epsilon" or "v_prediction", told by what a U-Net of SD 2.x answers to pure noise at the last timestep.

    There x_t is nearly eps: an eps model returns nearly its input, a v model nearly -x0, which is unlike it.
    """
    channels, width = unet.config.in_channels, unet.config.cross_attention_dim
    # 8 x 8 latents are enough to tell, and quick in float16 on a CPU too, where 32 x 32 take a minute.
    x_t = torch.randn((1, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    cond = torch.zeros((1, 77, width), dtype=unet.dtype)
    output = unet(x_t.to(unet.dtype), 999, cond).sample.float()[:, :channels]
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), output.flatten()]))[0, 1]
    return "epsilon" if correlation > 0.5 else "v_prediction"


def load_network(file: TensorFile, part: str, configs: Path, dtype: torch.dtype) -> Any:
    """The network `part` of the file, built from `configs` (a folder in diffusers layout), in eval mode."""
    from accelerate import init_empty_weights

    keys = require(file, part)
    config = read_config(configs / ("text_encoder" if part == "text" else part) / "config.json", part)
    against = f"the public config {configs.name!r}" if configs.parent == ASSETS else f"the config in {str(configs)!r}"
    with guarded(f"{NOUNS[part]} from {file.label}"):
        with init_empty_weights():
            network = empty(part, config)
        weights = _converted(part, file.read(keys), network)
        _fill(network, weights, dtype, f"the weights in {file.label} do not fit {against}")
    return network.eval()


def empty(part: str, config: dict[str, Any]) -> Any:
    """The network `part` in the shape of its config, its weights not yet those of anything."""
    if part == "text":
        from transformers import CLIPTextConfig, CLIPTextModel

        return CLIPTextModel(CLIPTextConfig.from_dict(config))
    if part == "vae":
        from diffusers import AutoencoderKL, VQModel

        return (VQModel if config.get("_class_name") == "VQModel" else AutoencoderKL).from_config(config)
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(config)


def _converted(part: str, tensors: dict[str, torch.Tensor], network: Any) -> dict[str, torch.Tensor]:
    """The tensors under the network's own names. What a text encoder does not use (SD 2.x's last layer) is left out."""
    from diffusers.loaders import single_file_utils as converters

    if part == "vae":
        return dict(converters.convert_ldm_vae_checkpoint(tensors, network.config))
    if part == "unet":
        return dict(converters.convert_ldm_unet_checkpoint(tensors, network.config))
    if any(key.startswith(OPEN_CLIP) for key in tensors):
        named = converters.convert_open_clip_checkpoint(network, tensors)
    else:
        named = converters.convert_ldm_clip_checkpoint(tensors)
    expected = network.state_dict().keys()
    # transformers dropped this level of names in 5.6.
    level = "text_model." if any(key.startswith("text_model.") for key in expected) else ""
    named = {level + key.removeprefix("text_model."): tensor for key, tensor in named.items()}
    return {key: tensor for key, tensor in named.items() if key in expected}


def _fill(network: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype, problem: str) -> None:
    """Puts `weights` into an empty network, each of them and no other; SourceError(`problem`: which) otherwise."""
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    both = expected.keys() & weights.keys()
    mismatched = [(key, weights[key].shape, expected[key]) for key in both if weights[key].shape != expected[key]]
    check_fit(expected.keys() - both, weights.keys() - both, mismatched, problem)
    network.load_state_dict({key: tensor.to(dtype, copy=True) for key, tensor in weights.items()}, assign=True)
