"""Rename networks' tensors to the original (CompVis) layout, the inverse of loading them.

The rules come from the layout itself, not from diffusers' converter. A file made here tests a loader independently.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Rules = list[tuple[str, str | Callable[[re.Match[str]], str]]]

UNET_PREFIX = "model.diffusion_model."
CONTROLNET_PREFIX = "control_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae(state: Tensors, prefix: str = VAE_PREFIX) -> Tensors:
    """Rename an AutoencoderKL's tensors. `prefix=""` gives a file that holds a VAE only."""
    blocks = 1 + max(int(found[1]) for key in state if (found := re.match(r"decoder\.up_blocks\.(\d+)", key)))
    rules: Rules = [
        (r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.down.\1.block.\2"),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.conv", r"encoder.down.\1.downsample.conv"),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.block.{m[2]}"),
        (
            r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.conv",
            lambda m: f"decoder.up.{blocks - 1 - int(m[1])}.upsample.conv",
        ),
        (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (
            r"mid_block\.attentions\.0\.(group_norm|to_q|to_k|to_v|to_out\.0)",
            lambda m: f"mid.attn_1.{VAE_ATTENTION[m[1]]}",
        ),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    ]
    renamed = {_rename(key, rules): tensor for key, tensor in state.items()}
    # The original VAE's attention uses 1 x 1 convolutions in place of linear layers.
    as_conv = r"mid\.attn_1\.(q|k|v|proj_out)\.weight$"
    return {
        prefix + key: tensor[:, :, None, None] if re.search(as_conv, key) else tensor for key, tensor in renamed.items()
    }


def unet(state: Tensors, layers_per_block: int) -> Tensors:
    """Rename a UNet2DConditionModel's tensors."""
    down, up = layers_per_block + 1, layers_per_block + 1
    attends = {found[1] for key in state if (found := re.match(r"up_blocks\.(\d+)\.attentions", key))}

    def upsampler(match: re.Match[str]) -> str:
        return f"output_blocks.{int(match[1]) * up + layers_per_block}.{2 if match[1] in attends else 1}.conv"

    rules: Rules = [
        (r"^conv_in", "input_blocks.0.0"),
        (r"^time_embedding\.linear_1", "time_embed.0"),
        (r"^time_embedding\.linear_2", "time_embed.2"),
        (r"^conv_norm_out", "out.0"),
        (r"^conv_out", "out.2"),
        (r"^down_blocks\.(\d+)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{(int(m[1]) + 1) * down}.0.op"),
        (r"^up_blocks\.(\d+)\.upsamplers\.0\.conv", upsampler),
        (
            r"^down_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)",
            lambda m: f"input_blocks.{1 + int(m[1]) * down + int(m[2])}.0.{RESNET[m[3]]}",
        ),
        (
            r"^down_blocks\.(\d+)\.attentions\.(\d+)",
            lambda m: f"input_blocks.{1 + int(m[1]) * down + int(m[2])}.1",
        ),
        (
            r"^up_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)",
            lambda m: f"output_blocks.{int(m[1]) * up + int(m[2])}.0.{RESNET[m[3]]}",
        ),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"output_blocks.{int(m[1]) * up + int(m[2])}.1"),
        (r"^mid_block\.resnets\.(\d+)\.(\w+)", lambda m: f"middle_block.{2 * int(m[1])}.{RESNET[m[2]]}"),
        (r"^mid_block\.attentions\.0", "middle_block.1"),
    ]
    return {UNET_PREFIX + _rename(key, rules): tensor for key, tensor in state.items()}


def controlnet(state: Tensors, layers_per_block: int) -> Tensors:
    """Rename a ControlNetModel's tensors. The copied encoder has the U-Net's names."""
    own: Rules = [
        (r"^controlnet_down_blocks\.(\d+)", r"zero_convs.\1.0"),
        (r"^controlnet_mid_block", "middle_block_out.0"),
        (r"^controlnet_cond_embedding\.conv_in", "input_hint_block.0"),
        (r"^controlnet_cond_embedding\.blocks\.(\d+)", lambda m: f"input_hint_block.{2 * int(m[1]) + 2}"),
        (r"^controlnet_cond_embedding\.conv_out", "input_hint_block.14"),
    ]
    heads = {key: tensor for key, tensor in state.items() if key.startswith("controlnet_")}
    copied = unet({key: tensor for key, tensor in state.items() if key not in heads}, layers_per_block)
    names = {key.removeprefix(UNET_PREFIX): tensor for key, tensor in copied.items()}
    names |= {_rename(key, own): tensor for key, tensor in heads.items()}
    return {CONTROLNET_PREFIX + key: tensor for key, tensor in names.items()}


def clip(state: Tensors) -> Tensors:
    """Rename a CLIPTextModel's tensors as in SD 1.x, including the buffer of positions that transformers saved then."""
    tensors = {f"{CLIP_PREFIX}text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in state.items()}
    positions = next(tensor.shape[0] for key, tensor in tensors.items() if "position_embedding" in key)
    return tensors | {f"{CLIP_PREFIX}text_model.embeddings.position_ids": torch.arange(positions)[None]}


def open_clip(state: Tensors) -> Tensors:
    """Rename a text encoder's tensors to OpenCLIP's, as in SD 2.x, including its unused last layer."""
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    width = state["final_layer_norm.weight"].shape[0]
    layers = 1 + max(int(found[1]) for key in state if (found := re.match(r"encoder\.layers\.(\d+)", key)))
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": torch.zeros(width, width),
        "logit_scale": torch.tensor(4.6),
    }
    names = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for layer in range(layers + 1):
        old = f"encoder.layers.{min(layer, layers - 1)}."  # the unused last layer is a copy of the one before
        new = f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in names.items():
                tensors[f"{new}{ours}.{kind}"] = state[f"{old}{theirs}.{kind}"].clone()
            parts = [state[f"{old}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{new}attn.in_proj_{kind}"] = torch.cat(parts)
    return {OPEN_CLIP_PREFIX + key: tensor for key, tensor in tensors.items()}


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
