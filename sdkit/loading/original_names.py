"""Tensor names in the original layout, converted to those of diffusers' and transformers' networks.

Each function takes the tensors of one part and its network, and returns the tensors under the network's names. Tensors
that are not part of the network keep their names, and so `check_fit` reports them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Tensors = dict[str, Tensor]

OPEN_CLIP = "cond_stage_model.model."
GUIDANCE_INPUT = "model.diffusion_model.time_embed.cond_proj.weight"
# Suffixes of the names of tensors that SD's text encoder does not use.
UNUSED_TEXT = ("position_ids", "logit_scale", "text_projection", "text_projection.weight", "attn_mask")
UNUSED_TOWERS = (
    f"{OPEN_CLIP}visual.",
    "cond_stage_model.transformer.vision_model.",
    "cond_stage_model.transformer.visual_projection.",
)
# Names of a VAE's attention layers in diffusers, today and before 0.18 -> in the original layout.
VAE_ATTENTION = {
    "group_norm": "norm",
    **dict.fromkeys(("to_q", "query"), "q"),
    **dict.fromkeys(("to_k", "key"), "k"),
    **dict.fromkeys(("to_v", "value"), "v"),
    **dict.fromkeys(("to_out.0", "proj_attn"), "proj_out"),
}
RENAMED = re.compile(rf"(\.mid\.attn_1\.)({'|'.join(map(re.escape, VAE_ATTENTION))})(\.weight|\.bias)$")


def vae(tensors: Tensors, network: Any) -> Tensors:
    """Rename the tensors of a VAE."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    original = {
        RENAMED.sub(lambda match: f"{match[1]}{VAE_ATTENTION[match[2]]}{match[3]}", key): tensor
        for key, tensor in tensors.items()
    }
    return _with_dropped(convert_ldm_vae_checkpoint(original, network.config), tensors)


def unet(tensors: Tensors, network: Any) -> Tensors:
    """Rename the tensors of a U-Net."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    named = dict(convert_ldm_unet_checkpoint(tensors, network.config))
    if GUIDANCE_INPUT in tensors and network.time_embedding.cond_proj is not None:  # a latent consistency model
        named["time_embedding.cond_proj.weight"] = tensors[GUIDANCE_INPUT]
    return _with_dropped(named, tensors)


def controlnet(tensors: Tensors, network: Any) -> Tensors:
    """Rename the tensors of a ControlNet."""
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    found = convert_controlnet_checkpoint(tensors, network.config)
    # The converter gives None for layers that are missing.
    named = {key: tensor for key, tensor in found.items() if tensor is not None}
    return _with_dropped(named, tensors)


def text(tensors: Tensors, network: Any) -> Tensors:
    """Rename the tensors of a text encoder. Leave out those that SD does not use: buffers, projections, an image
    encoder, and the last layer of SD 2.x."""
    from diffusers.loaders import single_file_utils as converters

    last = f"{OPEN_CLIP}transformer.resblocks.{network.config.num_hidden_layers}."
    unused = (last, *UNUSED_TOWERS)
    used = {key: x for key, x in tensors.items() if not key.endswith(UNUSED_TEXT) and not key.startswith(unused)}
    if any(key.startswith(OPEN_CLIP) for key in tensors):
        named = converters.convert_open_clip_checkpoint(network, used)
        rules = converters.DIFFUSERS_TO_LDM_MAPPING["openclip"]["layers"].values()
        begins = (f"{OPEN_CLIP}transformer.", *(OPEN_CLIP + name for name in rules))
    else:
        named = converters.convert_ldm_clip_checkpoint(used)
        begins = tuple(converters.LDM_CLIP_PREFIX_TO_REMOVE)
    # transformers dropped this level of names in 5.6.
    level = "text_model." if any(key.startswith("text_model.") for key in network.state_dict()) else ""
    named = {level + key.removeprefix("text_model."): tensor for key, tensor in named.items()}
    return named | {key: tensor for key, tensor in used.items() if not key.startswith(begins)}


def _with_dropped(named: Mapping[str, Tensor], tensors: Tensors) -> Tensors:
    """Return `named`, together with those of `tensors` that diffusers' converter dropped, having no rule for them.

    Tensors that it kept, even reshaped, share the memory of the originals.
    """
    kept = {tensor.data_ptr() for tensor in named.values() if tensor.numel()}
    return dict(named) | {key: tensor for key, tensor in tensors.items() if tensor.data_ptr() not in kept}
