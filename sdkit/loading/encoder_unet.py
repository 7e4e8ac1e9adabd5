"""A classifier of noisy images: the down path of a U-Net, pooled into logits. diffusers has no such network."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import AttentionPooling
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn


class EncoderUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """ADM's classifier (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233, section 4.1): the down path and the
    middle block of a `UNet2DModel`, then attention pooling and a linear layer.

    Fields that are not listed are those of `UNet2DModel`.

    Args:
        in_channels: Channels of the images or latents.
        num_classes: Number of classes.
        class_names: Names of the classes in the order of the logits; None names them by their numbers.
        latents: Fingerprint of the VAE in whose latents it classifies, as `VAE.identity`; None does not state it.
    """

    _supports_gradient_checkpointing = True

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 3,
        num_classes: int = 1000,
        class_names: Sequence[str] | None = None,  # noqa: ARG002 - `register_to_config` keeps it
        latents: str | None = None,  # noqa: ARG002 - likewise
        down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        block_out_channels: Sequence[int] = (64, 128, 256),
        layers_per_block: int = 2,
        downsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int = 32,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "scale_shift",
    ) -> None:
        super().__init__()
        unet = UNet2DModel(
            sample_size=sample_size, in_channels=in_channels, down_block_types=tuple(down_block_types),
            up_block_types=("UpBlock2D",) * len(down_block_types), block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block, downsample_type=downsample_type, dropout=dropout, act_fn=act_fn,
            attention_head_dim=attention_head_dim, norm_num_groups=norm_num_groups, norm_eps=norm_eps,
            resnet_time_scale_shift=resnet_time_scale_shift,
        )  # fmt: skip
        self.conv_in, self.down_blocks, self.mid_block = unet.conv_in, unet.down_blocks, unet.mid_block
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        width = block_out_channels[-1]
        self.norm_out = nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        self.pool = AttentionPooling(max(1, width // attention_head_dim), width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the logits (B, K) of noisy images.

        Args:
            sample: x_t (B, C, h, w). h and w divide by 2 for each level but the last.
            timestep: t, (B,) or (1,).
        """
        embedding = self.time_embedding(self.time_proj(timestep.expand(len(sample))).to(sample.dtype))
        h = self.conv_in(sample)
        for block in self.down_blocks:
            h, _ = block(hidden_states=h, temb=embedding)
        h = F.silu(self.norm_out(self.mid_block(h, embedding)))
        logits: Tensor = self.head(self.pool(h.flatten(2).transpose(1, 2)))
        return logits
