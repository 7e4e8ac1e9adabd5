"""LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) of the U-Net and the text encoder: W + alpha / r * B A.

Trained through peft; saved and read in the layouts of diffusers and of kohya's sd-scripts (which A1111 reads); for
inference merged into the weights, which needs no peft and costs nothing at sampling.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sdkit.arguments import one_of
from sdkit.errors import ArgumentError, SourceError
from sdkit.files import atomic_write
from sdkit.messages import clean
from sdkit.models.folder import path_or_fetched
from sdkit.models.weights import TensorFile, find, is_file, loading, open_tensors

FILENAME = "pytorch_lora_weights.safetensors"
LAYOUTS = ("diffusers", "kohya")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""The projections of every attention, as the U-Net and CLIP name them."""

KEY = re.compile(
    r"(?P<part>unet\.|lora_unet_|(?=(?:down|mid|up)_block)|text_encoder\.|lora_te_)"
    r"(?P<module>.+?)"
    r"(?:[._]lora(?:_linear_layer)?[._](?P<role>down|up|A|B)\.weight|\.alpha)"
)
"""A tensor's name in any of the layouts; old files of diffusers have the U-Net's without a prefix."""
KOHYA = ("lora_down.weight", "lora_up.weight", "alpha")
ROLES = {"A": "down", "down": "down", "B": "up", "up": "up", None: "alpha"}
# What attention processors were called before peft, underscores in place of dots -> the layer itself.
OLD_NAMES = ((r"_processor_", "_"), (r"(attn\d_to_out)$", r"\1_0"), (r"self_attn_to_(\w+)$", r"self_attn_\1_proj"))

# Pieces of names that only others have, the most telling first.
FOREIGN = (
    (("hada_w",), "a LoHa"),
    (("lokr_w",), "a LoKr"),
    (("dora_scale", "lora_magnitude_vector"), "a DoRA"),
    (("on_input", "ia3_l"), "an IA3"),
    (("lora_mid",), "a LoCon with Tucker decomposition"),
    (
        ("lora_te1_", "lora_te2_", "text_encoder_2.", "_input_blocks_", "_middle_block_", "_output_blocks_"),
        "a LoRA of Stable Diffusion XL",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """What is added to one layer's weight: alpha / r * up @ down."""

    down: Tensor
    """A: (r, inputs), of a convolution (r, inputs, k, k)."""
    up: Tensor
    """B: (outputs, r), of a convolution (outputs, r, 1, 1)."""
    alpha: float

    def delta(self, weight: Tensor) -> Tensor:
        """The whole update in the shape of `weight` and on its device, float32."""
        up, down = (x.to(weight.device, torch.float32).flatten(1) for x in (self.up, self.down))
        return self.alpha / len(down) * (up @ down).reshape(weight.shape)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A LoRA as read: for each network the layers that it changes, by name with underscores in place of dots (kohya's
    way, which cannot be undone without the network)."""

    label: str
    """The file as messages name it."""
    unet: dict[str, Factors]
    text_encoder: dict[str, Factors]


def add_lora(network: nn.Module, rank: int) -> None:
    """Freeze `network` (a UNet2DConditionModel or a CLIPTextModel) and add trainable layers to its attention.

    They are float32 whatever the network is, alpha is the rank, A is drawn from torch's global generator and B is 0, so
    that nothing changes at first. Needs peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ArgumentError("LoRA training needs peft; install 'sdkit[train]'.") from error
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian")
    with loading:  # layers made while another thread loads would be without memory
        inject_adapter_in_model(config, network)  # which freezes all else
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_tensors(unet: nn.Module, text: nn.Module | None = None) -> dict[str, Tensor]:
    """What was trained in networks that went through `add_lora`, named as diffusers saves it; float32, on the CPU."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    tensors = {}
    # transformers dropped text_model from its names in 5.6; files have it.
    for prefix, network in (("unet.", unet), ("text_encoder.text_model.", text)):
        if network is not None:
            trained = get_peft_model_state_dict(network, save_embedding_layers=False)  # True would ask the Hub
            for key, tensor in convert_state_dict_to_diffusers(trained).items():
                tensors[prefix + key.removeprefix("text_model.")] = tensor.float().cpu().contiguous()
    return tensors


def save_lora(tensors: dict[str, Tensor], path: str | Path, layout: str = "diffusers") -> None:
    """Write what `lora_tensors` gives, in any precision, to one .safetensors file, whole or not at all.

    layout: "diffusers", for `load_lora` and diffusers' `load_lora_weights`; or "kohya", for these, A1111 and others.
    """
    one_of("layout", layout, LAYOUTS)
    _check_name(path)
    if layout == "kohya":
        layers: dict[str, dict[str, Factors]] = {"unet": {}, "text_encoder": {}}
        for (part, module), keys in _group(tensors, "the LoRA").items():
            down, up = tensors[keys["down"]], tensors[keys["up"]]
            layers[part][_plain(module)] = Factors(down=down, up=up, alpha=len(down))
        tensors = _kohya(LoRA(label="the LoRA", **layers))
    _write(tensors, path)


def convert_lora(source: str | os.PathLike[str], path: str | Path) -> None:
    """Write a LoRA, in any layout that `read_lora` reads, to one .safetensors file in kohya's."""
    _check_name(path)
    _write(_kohya(read_lora(source)), path)


def _check_name(path: str | Path) -> None:
    if Path(path).suffix != ".safetensors":
        raise ArgumentError(f"a LoRA cannot be saved as {str(path)!r}; give a name that ends in .safetensors.")


def _write(tensors: dict[str, Tensor], path: str | Path) -> None:
    data = safetensors.torch.save(tensors, {"format": "pt"})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def _kohya(lora: LoRA) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for prefix, layers in (("lora_unet_", lora.unet), ("lora_te_text_model_", lora.text_encoder)):
        for name, x in layers.items():
            alpha = torch.tensor(x.alpha, dtype=x.down.dtype)
            named |= {f"{prefix}{name}.{key}": value for key, value in zip(KOHYA, (x.down, x.up, alpha), strict=True)}
    return named


def read_lora(source: str | os.PathLike[str], *, filename: str | None = None, revision: str | None = None) -> LoRA:
    """Read a LoRA for Stable Diffusion 1.x / 2.x, in a layout of diffusers (of any age) or kohya's.

    source:   a file; a folder; or a Hub id.
    filename: in a folder or Hub repository; None is pytorch_lora_weights.safetensors, or a folder's only .safetensors.
    revision: a branch, tag or commit, for a Hub id.

    Raises SourceError for what is missing, damaged, or of another kind: LoHa, LoKr, DoRA, Stable Diffusion XL.
    """
    file = open_tensors(_locate(source, filename, revision))
    groups = _group(file.shapes, file.label)
    tensors = file.read(file.shapes)
    if broken := next((key for key, tensor in tensors.items() if not tensor.float().isfinite().all()), None):
        raise SourceError(f"{file.label} is damaged: its {clean(broken)} is not finite; download it again.")
    parts: dict[str, dict[str, Factors]] = {"unet": {}, "text_encoder": {}}
    for (part, module), keys in groups.items():
        down, up = (tensors.get(keys.get(role, ""), torch.empty(0)) for role in ("down", "up"))
        alpha = tensors.get(keys.get("alpha", ""))
        whole = min(down.ndim, up.ndim) > 1 and down.numel() and up.numel() and up[0].numel() == len(down)
        if not whole or (alpha is not None and alpha.numel() != 1):
            raise SourceError(f"{file.label} is damaged: the tensors of {clean(module)} do not fit; download it again.")
        stated = _stated_alpha(file, part, module, len(down)) if alpha is None else alpha.item()
        parts[part][_plain(module)] = Factors(down=down, up=up, alpha=stated)
    return LoRA(label=file.label, **parts)


def _group(names: Iterable[str], label: str) -> dict[tuple[str, str], dict[str, str]]:
    """(part, module) -> role -> name, of the names of tensors. SourceError where they are no LoRA's."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    names = list(names)
    for pieces, kind in FOREIGN:
        if any(piece in name for name in names for piece in pieces):
            raise SourceError(f"{label} looks like {kind}; give a plain LoRA of Stable Diffusion 1.x or 2.x.")
    for name in names:
        match = KEY.fullmatch(name)
        if match is None:
            raise SourceError(
                f"{label} holds {clean(name)}, which is no part of a LoRA for Stable Diffusion 1.x or 2.x; give one in "
                "the layout of diffusers or kohya."
            )
        part = "text_encoder" if match["part"] in ("text_encoder.", "lora_te_") else "unet"
        groups.setdefault((part, match["module"]), {})[ROLES[match["role"]]] = name
    if not groups:
        raise SourceError(f"{label} holds no tensors; give a LoRA.")
    return groups


def _stated_alpha(file: TensorFile, part: str, module: str, rank: int) -> float:
    """The alpha in the metadata of newer files, which are peft's `LoraConfig`; else the rank."""
    try:
        config: dict[str, Any] = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        patterns = config.get(f"{part}.alpha_pattern") or {}
        found = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = float(next(found, config.get(f"{part}.lora_alpha", rank)))
    except (ValueError, TypeError, AttributeError, RecursionError, re.error) as error:
        raise SourceError(f"{file.label} has damaged metadata (lora_adapter_metadata); download it again.") from error
    return alpha * math.sqrt(rank) if config.get(f"{part}.use_rslora") else alpha


def _plain(module: str) -> str:
    """A module's name as the networks and all layouts have it in common."""
    name = module.replace(".", "_").removeprefix("text_model_")
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def merge_lora(lora: LoRA, unet: nn.Module, text: nn.Module, scale: float) -> None:
    """Add `scale` times the LoRA to the weights of both networks in place, computed in float32.

    Raises SourceError, before any weight is changed, for one that was made for other networks.
    """
    layers = [*_layers(lora.unet, unet, lora.label), *_layers(lora.text_encoder, text, lora.label)]
    with torch.no_grad():
        for weight, factors in layers:
            weight.copy_(weight.float() + scale * factors.delta(weight))


def _layers(named: dict[str, Factors], network: nn.Module, label: str) -> Iterator[tuple[Tensor, Factors]]:
    """The weight that each of the factors is for."""
    layers = {_plain(name): x for name, x in network.named_modules() if isinstance(x, (nn.Linear, nn.Conv2d))}
    for name, factors in named.items():
        if name not in layers:
            raise SourceError(
                f"{label} was made for another model: this one has no {clean(name)}; give one of its own."
            )
        weight = layers[name].weight
        shape = len(factors.up), factors.down[0].numel()
        if shape != (len(weight), weight[0].numel()):
            found, wanted = (" x ".join(map(str, size)) for size in (shape, (len(weight), weight[0].numel())))
            raise SourceError(
                f"{label} was made for another model: its {clean(name)} is {found}, where this one's is {wanted}; "
                "give one of its own."
            )
        yield weight, factors


def _locate(source: str | os.PathLike[str], filename: str | None, revision: str | None) -> Path:
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(f"a LoRA is a path or a Hub id, not {type(source).__name__}.")
    name = os.fspath(source)
    path = path_or_fetched(source, filename or FILENAME, revision, "" if filename else " (filename= names another)")
    found = find(path) if name else None
    if found is None:
        raise SourceError(f"the LoRA {clean(name)!r} does not exist; give a file, a folder with one or a Hub id.")
    if not stat.S_ISDIR(found.st_mode):
        return path
    inside = sorted(file.name for file in path.glob("*.safetensors"))
    wanted = filename or (FILENAME if FILENAME in inside or len(inside) != 1 else inside[0])
    if is_file(path / wanted):
        return path / wanted
    held = f"holds {', '.join(inside)}: name one by filename=" if inside else "holds no other; give another source"
    raise SourceError(f"the folder {clean(name)!r} has no {wanted}; it {held}.")
