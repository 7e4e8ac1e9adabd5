"""Single files of weights in the original layout (CompVis, A1111, civitai), loaded without a connection.

The shapes of the tensors tell which of the public configs fits.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from sdkit.arguments import PREDICTIONS
from sdkit.errors import SourceError
from sdkit.loading.configs import class_name, layers_of, read_config
from sdkit.loading.original_names import OPEN_CLIP, Tensors
from sdkit.loading.parts import CONTROLNET, PARTS, TEXT, UNET, VAE, Part
from sdkit.loading.tensors import EMBEDDING, TensorFile, check_dtypes, check_finite, check_fit, guarded
from sdkit.messages import clean

ASSETS = Path(__file__).parent.parent / "assets"
SMALL_LAYERS = 100
"""A config of up to this many layers is built even if the file holds fewer tensors: the error then names the missing
ones."""
LARGEST = 10_000_000_000
"""Largest number of parameters of a network that is trained from scratch."""
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"

# Substrings of tensor names that only another model has, and that model. The first match decides.
FOREIGN = (
    ("conditioner.embedders.", "Stable Diffusion XL"),
    ("joint_blocks.", "Stable Diffusion 3"),
    ("double_blocks.", "Flux"),
    ("label_emb.", "a class-conditioned model such as SD 2.1 unCLIP"),
)
# Substrings of tensor names of additions to a model, and their kind. Not checked in a whole checkpoint, which may
# contain additions.
ADDITIONS = (
    ("lora_", "a LoRA"),
    (".lora", "a LoRA"),
    (EMBEDDING, "a textual inversion embedding"),
    ("emb_params", "a textual inversion embedding"),
)
# Prefixes of tensors in a checkpoint that no network loads: EMA copies, training tables, markers, and additions.
PASSED_OVER = (
    "model_ema.",
    "embedding_manager.",
    "bundle_emb.",
    "alphas_cumprod",
    "betas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "posterior_",
    "sqrt_",
    "scale_factor",
    "v_pred",
    "ztsnr",
    "edm_",
    "loss.",
    "discriminator.",
    "first_stage_model.loss.",
    "first_stage_model.discriminator.",
    "first_stage_model.model_ema.",
    "first_stage_model.logvar",
    "vae.loss.",
    "optimizer_states",
    "state_dict",
    "global_step",
)
# Names in diffusers' and transformers' own layout, which cannot be loaded without the config.json beside them.
DIFFUSERS_NAMES = ("down_blocks.", "text_model.encoder.", "encoder.layers.", "decoder.layers.")
WIDTHS = {768: "sd1", 1024: "sd2", 1280: "the refiner of Stable Diffusion XL", 2048: "Stable Diffusion XL"}
# The parameters of transformers' CLIPTextConfig.
TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
INSTRUCT, INPAINTING = 8, 9
INPUTS = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}


def keys_of(file: TensorFile, part: Part) -> list[str]:
    """Return the names of the tensors of `part`; an empty list if the file lacks the part."""
    for prefix in part.prefixes:
        begins = tuple(prefix + module for module in part.modules)
        if keys := [key for key in file.shapes if key.startswith(begins)]:
            return keys
    return []


def require(file: TensorFile, part: Part) -> list[str]:
    """Return the names of the tensors of `part`. Raise SourceError, saying what the file holds instead."""
    if keys := keys_of(file, part):
        return keys
    held = " and ".join(other.noun for other in PARTS.values() if keys_of(file, other))
    beside = ", or a VAE beside it (vae=, --vae)" if part is VAE else ""
    raise SourceError(f"{file.label} holds {held}, not {part.noun}; give a whole checkpoint or another source{beside}.")


def check_kind(file: TensorFile) -> None:
    """Raise SourceError for a file of another model, saying which, or of no model that sdkit knows."""
    parts = {key for part in PARTS.values() for key in keys_of(file, part)}
    for name, looks_like in FOREIGN if parts else (*FOREIGN, *ADDITIONS):
        if any(name in key for key in file.shapes):
            raise SourceError(f"{file.label} looks like {looks_like}; sdkit loads Stable Diffusion 1.x and 2.x.")
    if "xl" in file.metadata.get("modelspec.architecture", ""):  # an SDXL VAE has the shapes of SD's, but another scale
        raise SourceError(f"{file.label} looks like Stable Diffusion XL; sdkit loads Stable Diffusion 1.x and 2.x.")
    own = [key for key in file.shapes if not key.startswith(TEXT.prefixes)]
    if any(name in key for key in own for name in DIFFUSERS_NAMES):
        raise SourceError(f"{file.label} is one part in diffusers layout; give its folder, with the config.json in it.")
    if not parts:
        if len(file.shapes) == 1 and next(iter(file.shapes.values()))[-1:] in {(width,) for width in WIDTHS}:
            raise SourceError(f"{file.label} looks like a textual inversion embedding; give a model.")
        raise SourceError(f"{file.label} holds neither a Stable Diffusion checkpoint nor a VAE; give another file.")
    if strange := sorted(key for key in file.shapes.keys() - parts if not key.startswith(PASSED_OVER)):
        more = f" and {len(strange) - 1} more tensors" if strange[1:] else ""
        warnings.warn(
            f"{file.label} also holds {clean(strange[0])}{more}, which is no part of the model and is not used.",
            stacklevel=2,
        )


def family_of(file: TensorFile) -> str:
    """Return the public config that fits a file: "sd1", "sd2", or "sd2-v" if the file states v-prediction.

    Raises:
        SourceError: The sizes belong to neither family. The sentence says what the file looks like.
    """
    latents = next((_inputs(file, key) for key in keys_of(file, VAE) if key.endswith("decoder.conv_in.weight")), 4)
    if latents != 4:
        raise SourceError(f"{file.label} holds a VAE of another family: {latents} latent channels where SD has 4.")
    channels = inputs_of(file)
    if channels not in (4, INSTRUCT, INPAINTING):
        name = INPUTS.get(channels, "another kind of model")
        raise SourceError(f"{file.label} looks like {name} ({channels} input channels); give a text-to-image model.")
    if unet := keys_of(file, UNET) or keys_of(file, CONTROLNET):
        width = next((_inputs(file, key) for key in unet if key.endswith(".attn2.to_k.weight")), 0)
        family = WIDTHS.get(width, "a model of another family")
        if family not in ("sd1", "sd2"):
            raise SourceError(f"{file.label} looks like {family} (cross-attention width {width}); SD has 768 or 1024.")
    else:
        family = "sd2" if any(key.startswith(OPEN_CLIP) for key in file.shapes) else "sd1"
    return "sd2-v" if family == "sd2" and marked_prediction(file) == "v_prediction" else family


def inputs_of(file: TensorFile) -> int:
    """Return the number of input channels of a file's U-Net: 4, or more for InstructPix2Pix or an inpainting model."""
    return _inputs(file, FIRST_CONV) if FIRST_CONV in file.shapes else 4


def _inputs(file: TensorFile, key: str) -> int:
    """Return the number of input channels of the layer with the weight `key`."""
    shape = file.shapes[key]
    if len(shape) < 2:
        raise SourceError(f"{file.label} is damaged, for its {clean(key)} is no matrix; download it again.")
    return shape[1]


def marked_prediction(file: TensorFile) -> str | None:
    """Return the prediction type that the file states in its metadata or by marker keys; None if it states none."""
    stated = PREDICTIONS.get(file.metadata.get("modelspec.prediction_type", ""))
    return stated or ("v_prediction" if "v_pred" in file.shapes else None)


@torch.inference_mode()
def probe_prediction(unet: Any) -> str:
    """Return the prediction type of a U-Net of SD 2.x, "epsilon" or "v_prediction", found by running the U-Net.

    Its input is pure noise at the last timestep. There x_t is nearly eps: an eps model returns nearly its input, a v
    model nearly -x0, which is uncorrelated with the input.
    """
    channels, width = min(unet.config.in_channels, unet.config.out_channels), unet.config.cross_attention_dim
    # 8 x 8 latents are enough, and fast even in float16 on a CPU, where 32 x 32 take a minute.
    x_t = torch.randn((1, channels, 8, 8), generator=torch.Generator().manual_seed(0))
    cond = torch.zeros((1, 77, width), dtype=unet.dtype)
    beside = torch.zeros((1, unet.config.in_channels - channels, 8, 8))  # an inpainting model's mask and image
    if beside.shape[1] > channels:
        beside[:, :1] = 1  # all is drawn
    output = unet(torch.cat([x_t, beside], dim=1).to(unet.dtype), 999, cond).sample.float()[:, :channels]
    correlation = torch.corrcoef(torch.stack([x_t.flatten(), output.flatten()]))[0, 1]
    return "epsilon" if correlation > 0.5 else "v_prediction"


def config_of(file: TensorFile, part: Part, configs: Path) -> dict[str, Any]:
    """Return the config of a part. The public configs are those of text-to-image models, and serve inpainting models
    too: these differ only in the number of input channels.
    """
    config = read_config(configs / part.config_path, part.checks)
    inputs = {"in_channels": inputs_of(file)} if part is UNET and configs.parent == ASSETS else {}
    return config | inputs


def load_network(file: TensorFile, part: Part, configs: Path, dtype: torch.dtype) -> Any:
    """Load the network `part` of a file, in eval mode, on the CPU.

    Args:
        file: The open file.
        part: The part.
        configs: A folder of configs in diffusers layout.
        dtype: The dtype to convert the weights to.

    Raises:
        SourceError: The part is missing, or the weights are damaged or do not fit the config.
    """
    keys = require(file, part)
    path = configs / part.config_path
    against = f"the public config {configs.name!r}" if configs.parent == ASSETS else f"the config in {str(configs)!r}"
    return build(
        part,
        config_of(file, part, configs),
        lambda network: part.rename(file.read(keys), network),
        dtype,
        file=file,
        keys=keys,
        path=path,
        label=f"{part.noun} from {file.label}",
        problem=f"the weights in {file.label} do not fit {against}",
    )


def build(
    part: Part,
    config: dict[str, Any],
    weights: Callable[[Any], Tensors],
    dtype: torch.dtype,
    *,
    file: TensorFile,
    keys: Collection[str],
    path: Path,
    label: str,
    problem: str,
) -> Any:
    """Build a network from its config, fill it with weights, and return it in eval mode.

    Args:
        part: The part.
        config: The config.
        weights: A function of the empty network that returns the tensors under that network's names.
        dtype: The dtype to convert the weights to.
        file: The file that holds the weights.
        keys: The names of the tensors in that file.
        path: The file of the config.
        label: The network's name in error messages.
        problem: The beginning of the error message for weights that do not fit the config.
    """
    check_dtypes(file, keys)
    network = blueprint(part, config, path, len(keys), label)
    with guarded(label):
        _fill(network, weights(network), dtype, problem)
    check_finite(network, file, keys)
    return network.eval()


def blueprint(part: Part, config: dict[str, Any], path: Path, most: int, label: str) -> Any:
    """Build a network from its config on the meta device: without weights, but with its buffers.

    Raise SourceError if the config asks for more layers than both `most`, the number of tensors, and `SMALL_LAYERS`.
    """
    from accelerate import init_empty_weights

    if (asked := layers_of(config, part.checks)) > max(most, SMALL_LAYERS):
        raise SourceError(f"{str(path)!r} asks for {asked:,} layers, more than the weights can fill; correct it.")
    with guarded(label), init_empty_weights():
        return empty(part, config)


def check_size(part: Part, config: dict[str, Any], path: Path) -> None:
    """Raise SourceError if a config asks for over `LARGEST` parameters: building the network would fill the memory."""
    with guarded(f"{part.noun} in {str(path.parent)!r}"), torch.device("meta"):
        network = empty(part, config)
    count = sum(tensor.numel() for tensor in network.state_dict().values())
    if count > LARGEST:
        raise SourceError(f"{str(path)!r} asks for {count:,} parameters, sdkit builds at most {LARGEST:,}; correct it.")


def empty(part: Part, config: dict[str, Any]) -> Any:
    """Build a network from its config; its weights are random, or empty on the meta device.

    Only keys that are parameters of the network's class are passed on. Others in an untrusted config may name code,
    kernels, or files to download (`auto_map`, `attn_implementation`, `quantization_config`).
    """
    network_class = part.load_class(class_name(config))
    if part is TEXT:
        sizes = config.get("text_config", config)  # nested in the config of a whole CLIP model
        fields = {key: sizes[key] for key in TEXT_FIELDS if key in sizes}
        return network_class(network_class.config_class(**fields))
    known = {"_class_name", *part.checks, *inspect.signature(network_class.__init__).parameters}
    return network_class.from_config({key: value for key, value in config.items() if key in known})


def _fill(network: Any, weights: Tensors, dtype: torch.dtype, problem: str) -> None:
    """Fill an empty network with `weights`. Raise SourceError if they are not exactly the network's own."""
    check_fit(_shapes(weights), _shapes(network.state_dict()), problem)
    network.load_state_dict({key: tensor.to(dtype, copy=True) for key, tensor in weights.items()}, assign=True)


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}
