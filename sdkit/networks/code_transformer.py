"""A GPT over the codes of a VQ model, with tokens of a condition in front (Esser et al. 2021,
https://arxiv.org/abs/2012.09841, section 3.2; Ramesh et al. 2021, https://arxiv.org/abs/2102.12092)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdkit.networks.pixelcnn import Step
from sdkit.networks.prior_shape import PriorShape


class CodeTransformer(nn.Module):
    """transformers' `GPT2LMHeadModel` over a condition and then the codes in raster order.

    The vocabulary is the N codes, then the T values of a condition, then one that stands for none, which also starts
    the codes if there is no condition. Only codes are predicted.

    Args:
        shape: The shape.

    Attributes:
        shape: The shape.
        network: The network, of transformers.
    """

    def __init__(self, shape: PriorShape) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.shape = shape
        height, width = shape.grid
        # Without dropout, whose random numbers would depend on how a batch is split over processes.
        config = GPT2Config(
            vocab_size=shape.codes + shape.tokens + 1, n_positions=shape.prefix + height * width, n_embd=shape.width,
            n_layer=shape.layers, n_head=shape.heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.network: Any = GPT2LMHeadModel(config)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return the logits (B, h, w, N) of each code, given the codes before it.

        Args:
            codes: (B, h, w), int64, of the size of the grid.
            condition: (B, *condition_shape), int64; None if there is no condition.
        """
        ids = self._ids(codes.flatten(1), condition)[:, :-1]  # nothing follows the last code
        logits: Tensor = self.network(ids, use_cache=False).logits[:, self.shape.prefix - 1 :, : self.shape.codes]
        return logits.reshape(*codes.shape, -1)

    def _ids(self, codes: Tensor, condition: Tensor | None) -> Tensor:
        """Return token ids (B, P + n) of n codes (B, n) after their condition."""
        if condition is None:
            condition = codes.new_zeros(len(codes))
        return torch.cat([condition.reshape(len(codes), -1) + self.shape.codes, codes], dim=1)

    def next_logits(self, codes: Tensor, condition: Tensor | None, past: Any = None) -> Tensor:
        """Return the logits (B, N) of the code that follows n codes (B, n).

        Args:
            codes: (B, n), int64, with n from 0.
            condition: As in `forward`.
            past: A `DynamicCache` of transformers that has seen some of these codes; it is filled in place. None
                computes everything anew.
        """
        ids = self._ids(codes, condition)
        seen = 0 if past is None else past.get_seq_length()
        output = self.network(ids[:, seen:], past_key_values=past, use_cache=past is not None)
        logits: Tensor = output.logits[:, -1, : self.shape.codes]
        return logits

    def stepper(self, condition: Tensor | None, size: tuple[int, int], *, cached: bool = True) -> Step:
        """Return a function (codes (B, h, w), i, j) -> logits (B, N) of position (i, j); codes after it are ignored.

        It must be called in raster order. For images that are larger than the grid, a window of the grid's size slides
        over the image, with the position at its centre where the borders allow that (Esser et al. 2021, section 3.3).

        Args:
            condition: As in `forward`; a map is as large as the image.
            size: Height and width of the images in codes, at least those of the grid.
            cached: Whether keys and values of earlier positions are kept. In windows, whose positions change, they
                never are.
        """
        from transformers import DynamicCache

        if size != self.shape.grid:
            return self._sliding(condition)
        past = DynamicCache() if cached else None

        def step(codes: Tensor, i: int, j: int) -> Tensor:
            return self.next_logits(codes.flatten(1)[:, : i * size[1] + j], condition, past)

        return step

    def _sliding(self, condition: Tensor | None) -> Step:
        height, width = self.shape.grid

        def step(codes: Tensor, i: int, j: int) -> Tensor:
            top = window_start(i, height, codes.shape[1])
            left = window_start(j, width, codes.shape[2])
            window = codes[:, top : top + height, left : left + width]
            seen = condition
            if seen is not None and self.shape.condition == "map":
                seen = seen[:, top : top + height, left : left + width]
            return self.next_logits(window.flatten(1)[:, : (i - top) * width + j - left], seen)

        return step


def window_start(i: int, window: int, size: int) -> int:
    """Return where a window starts that has position i at its centre, or as near to that as the borders allow.

    Args:
        i: Position, from 0.
        window: Length of the window.
        size: Number of positions, at least `window`.
    """
    return min(max(i - window // 2, 0), size - window)
