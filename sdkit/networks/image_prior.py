"""The prior of DALL-E 2 (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125): it denoises the CLIP embedding of an
image, given a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError
from sdkit.networks.shared_timestep import timesteps_of
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from diffusers import PriorTransformer

TEXT = "text_embeds"
"""Name of the text's embedding in `Conditioning.added`."""


class ImagePrior(Wrapper):
    """A `PriorTransformer` that takes a `Conditioning`. It works on normalised embeddings.

    Args:
        network: The network.

    Attributes:
        network: The network.
        width: D, the width of the embeddings.
        length: Tokens of a text, start and end tokens included.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.
    """

    def __init__(self, network: PriorTransformer) -> None:
        super().__init__(network)
        self.width, self.length = int(network.config.embedding_dim), int(network.config.num_embeddings)

    def check_fits(self, width: int, hidden: int, length: int) -> None:
        """Raise ArgumentError unless the prior is one for a CLIP.

        Args:
            width: Width of the CLIP's embeddings.
            hidden: Width of its text encoder's states.
            length: Tokens of its texts.
        """
        sizes = (width, hidden, length)
        if sizes != (self.width, self.width, self.length):
            raise ArgumentError(
                f"this prior is for embeddings and states of width {self.width} and texts of {self.length} tokens; "
                f"this CLIP has widths {width} and {hidden}, and {length} tokens: give the one it was made for."
            )

    def try_out(self) -> None:
        """Denoise zeros."""
        zeros = torch.zeros(1, self.width, device=self.device, dtype=self.dtype)
        self.network(zeros, 1, zeros, zeros[:, None].expand(-1, self.length, -1))

    @blames_network
    def forward(self, x_t: Tensor, t: int | Tensor, cond: Conditioning) -> Tensor:
        """Return the network's prediction of the normalised embedding x0.

        Args:
            x_t: Noised, normalised embeddings (B, D).
            t: An integer or (B,).
            cond: Texts: the encoder's last states `text` (B, L, D), `mask` (B, L), and their embeddings
                `added["text_embeds"]` (B, D).

        Returns:
            (B, D), in the dtype of x_t.
        """
        if cond.text is None or cond.added is None or TEXT not in cond.added:
            raise ArgumentError(f'a prior is conditioned on texts and their embeddings, `added["{TEXT}"]`; give both.')
        output: Tensor = self.network(
            x_t.to(self.device, self.dtype),
            timesteps_of(t, self.device),
            cond.added[TEXT].to(self.device, self.dtype),
            cond.text.to(self.device, self.dtype),
            None if cond.mask is None else cond.mask.to(self.device),
            return_dict=False,
        )[0]
        return output.to(x_t)

    def normalised(self, embeddings: Tensor) -> Tensor:
        """Return embeddings (B, D) less their mean, over their standard deviation, which the network stores."""
        return (embeddings - self._mean(embeddings)) / self._std(embeddings)

    def embeddings(self, normalised: Tensor) -> Tensor:
        """Return embeddings (B, D), given normalised ones; the inverse of `normalised`."""
        return normalised * self._std(normalised) + self._mean(normalised)

    def _mean(self, like: Tensor) -> Tensor:
        return self.network.clip_mean.detach().to(like)  # type: ignore[no-any-return]

    def _std(self, like: Tensor) -> Tensor:
        return self.network.clip_std.detach().to(like)  # type: ignore[no-any-return]


def conditioning(states: Tensor, embeddings: Tensor, ids: Tensor, end: int) -> Conditioning:
    """Return the condition of a prior.

    Args:
        states: The text encoder's last states (B, L, D).
        embeddings: Embeddings of the texts (B, D).
        ids: Token ids (B, L).
        end: Id of the end token. What follows the first one is padding, to which the prior does not attend.
    """
    ends = (ids == end).int()
    mask = (ends.cumsum(1) - ends) == 0
    return Conditioning(text=states, mask=mask.to(states.device), added={TEXT: embeddings})
