"""Shapes of the networks: configs of diffusers and transformers, small enough for one core."""

from __future__ import annotations

from typing import Any

from sdkit.recipes.compare.data import SIDE

_AUTOENCODER: dict[str, Any] = {
    "sample_size": SIDE,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}


def _levels(*channels: int) -> dict[str, Any]:
    """Return the blocks of an autoencoder, each of which but the last halves the image."""
    return {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
    }


def _unet(channels: list[int], attention: list[bool], **changes: Any) -> dict[str, Any]:
    """Return the config of a `UNet2DModel`, with attention in some of its levels."""
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in attention]
    up = ["AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(attention)]
    return {
        "_class_name": "UNet2DModel", "sample_size": SIDE, "in_channels": 3, "out_channels": 3,
        "block_out_channels": channels, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
        "down_block_types": down, "up_block_types": up,
    } | changes  # fmt: skip


_PIXELS = [16, 32, 64]  # channels at 16 x 16, 8 x 8, and 4 x 4 pixels
_LATENTS = {"sample_size": 4, "in_channels": 4, "out_channels": 4}
_CLIP: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
CLIP_WIDTH = 64

SHAPES: dict[str, dict[str, Any]] = {
    # A latent of only 2 x 2 places, so that codes drawn from N(0, I) need little arrangement.
    "vae": {"_class_name": "AutoencoderKL", **_AUTOENCODER, "latent_channels": 6, **_levels(16, 32, 48, 64)},
    "kl": {"_class_name": "AutoencoderKL", **_AUTOENCODER, **_levels(16, 32, 48)},
    "vq": {"_class_name": "VQModel", **_AUTOENCODER, **_levels(16, 32, 48), "num_vq_embeddings": 64},
    "ddpm": _unet(_PIXELS, [False, True, False]),
    "improved-ddpm": _unet(_PIXELS, [False, True, False], out_channels=6),
    "adm": _unet(_PIXELS, [False, True, True], resnet_time_scale_shift="scale_shift", num_class_embeds=11),
    "classifier": {
        "_class_name": "EncoderUNet", "block_out_channels": _PIXELS, "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    },
    "ldm-kl": _unet([48, 64], [True, True], **_LATENTS),
    "ldm-vq": _unet([48, 64], [True, True], **_LATENTS),
    "clip": {
        "model_type": "clip", "projection_dim": CLIP_WIDTH,
        "text_config": {**_CLIP, "num_hidden_layers": 2, "vocab_size": 600, "max_position_embeddings": 16},
        "vision_config": {**_CLIP, "num_hidden_layers": 3, "image_size": SIDE, "patch_size": 4},
    },
    "image-prior": {
        "_class_name": "PriorTransformer", "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 3,
        "embedding_dim": CLIP_WIDTH, "num_embeddings": 16,
    },
    "decoder": {
        "_class_name": "UNet2DConditionModel", "sample_size": SIDE, "in_channels": 3, "out_channels": 3,
        "block_out_channels": _PIXELS, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 8,
        "cross_attention_dim": 192,  # of the embedded model's text encoder, which only ever reads the empty caption
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip
"""Part -> its config."""
