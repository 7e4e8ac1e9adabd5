"""Conditioning: all inputs of a denoiser besides x_t and t, as one value that can be joined, split, and moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdkit.errors import ArgumentError

Residuals = tuple[tuple[Tensor, ...], Tensor]
"""A ControlNet's outputs: one tensor for each skip connection of the U-Net, and one for its middle block."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Condition of a batch of B images: all that a denoiser receives besides x_t and t. Unused parts are None.

    Example:
        >>> import sdkit
        >>> from sdkit.guidance import Conditioning
        >>> text = sdkit.TextEncoder.from_pretrained("emoji")
        >>> cond = Conditioning(text.encode(["a cat", ""]))
        >>> len(cond), len(cond[:1]), len(Conditioning.cat([cond, cond]))
        (2, 1, 4)

    Attributes:
        text: (B, L, D) text embeddings, as from `TextEncoder.encode`.
        mask: (B, L) attention mask, True for tokens to attend to; None attends to all.
        concat: (B, C', h, w), appended to the channels of x_t. For inpainting: the mask and the latents of the masked
            image.
        residuals: A ControlNet's outputs (B, c, h', w'): a tuple for the skip connections, a tensor for the mid block.
        label: (B,) class labels.
        added: diffusers' `added_cond_kwargs`, such as SDXL's `text_embeds` (B, D) and `time_ids` (B, 6).
    """

    text: Tensor | None = None
    mask: Tensor | None = None
    concat: Tensor | None = None
    residuals: Residuals | None = None
    label: Tensor | None = None
    added: Mapping[str, Tensor] | None = None

    @staticmethod
    def cat(conditions: Sequence[Conditioning]) -> Conditioning:
        """Join conditions along the batch, such as [uncond, cond].

        Args:
            conditions: Conditions with the same parts. Only `mask` may be absent from some, which then attend to all
                tokens.

        Raises:
            ArgumentError: A part is absent from some of the conditions and present in others.
        """
        if any(one.mask is not None for one in conditions):
            conditions = [one if one.mask is not None else _with_full_mask(one) for one in conditions]
        return Conditioning(**{name: _cat(name, [getattr(one, name) for one in conditions]) for name in _PARTS})

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Return the condition with `function` applied to each of its tensors."""
        return Conditioning(**{name: _mapped(getattr(self, name), function) for name in _PARTS})

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Conditioning:
        """Select images of the batch. For a single image take a slice, which keeps the batch dimension."""
        return self.map(lambda part: part[index])

    def chunk(self, n: int) -> tuple[Conditioning, ...]:
        """Split the batch into `n` equal parts: the inverse of `cat` for `n` conditions of the same batch size.

        Raises:
            ArgumentError: The batch size is not a multiple of `n`.
        """
        if n < 1 or len(self) % n:
            raise ArgumentError(f"a condition of {len(self)} images cannot be split into {n} equal parts.")
        size = len(self) // n
        return tuple(self[i * size : (i + 1) * size] for i in range(n))

    def __len__(self) -> int:
        """Return the batch size, B."""
        return next((len(one) for name in _PARTS for one in _tensors(getattr(self, name))), 0)

    def repeat(self, n: int) -> Conditioning:
        """Return the condition with each image repeated `n` times in a row."""
        return self.map(lambda part: part.repeat_interleave(n, dim=0))

    def to(self, device: torch.device | str) -> Conditioning:
        """Return the condition with all tensors on a device."""
        return self.map(lambda part: part.to(device))


_PARTS = tuple(Conditioning.__dataclass_fields__)


def check_condition(cond: object) -> None:
    """Raise ArgumentError unless `cond` is a `Conditioning`; a bare tensor of embeddings is a common mistake."""
    if not isinstance(cond, Conditioning):
        raise ArgumentError(
            f"the condition is given as sdkit.guidance.Conditioning(embeddings), not {type(cond).__name__}."
        )


def _with_full_mask(cond: Conditioning) -> Conditioning:
    """Return the condition with a mask that attends to all its tokens."""
    if cond.text is None:
        raise ArgumentError("a mask belongs to a text, and one of the conditions has none.")
    mask = torch.ones(cond.text.shape[:2], dtype=torch.bool, device=cond.text.device)
    return replace(cond, mask=mask)


def _tensors(part: Any) -> Iterator[Tensor]:
    """Yield the tensors of a part, which may be a tree of tuples and dictionaries."""
    if isinstance(part, (tuple, Mapping)):
        for one in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(one)
    elif part is not None:
        yield part


def _mapped(part: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to each tensor of a part, also in nested tuples and dictionaries; None stays None."""
    if part is None:
        return None
    if isinstance(part, tuple):
        return tuple(_mapped(one, function) for one in part)
    if isinstance(part, Mapping):
        return {name: _mapped(one, function) for name, one in part.items()}
    return function(part)


def _cat(name: str, parts: Sequence[Any]) -> Any:
    """Join one part of several conditions along the batch."""
    if all(part is None for part in parts):
        return None
    if any(part is None for part in parts):
        raise ArgumentError(f"one condition has `{name}` and another has none: give it to all of them.")
    if isinstance(parts[0], tuple):
        return tuple(_cat(name, group) for group in zip(*parts, strict=True))
    if isinstance(parts[0], Mapping):
        if any(part.keys() != parts[0].keys() for part in parts):
            raise ArgumentError(f"the conditions' `{name}` must have the same names.")
        return {key: _cat(key, [part[key] for part in parts]) for key in parts[0]}
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        shapes = " and ".join(str(tuple(part.shape)) for part in parts)
        raise ArgumentError(f"conditions whose `{name}` have the shapes {shapes} cannot be joined.")
    return torch.cat(list(parts))
