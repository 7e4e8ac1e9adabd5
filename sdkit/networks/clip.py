"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): images and texts embedded in one space."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.arguments import strings
from sdkit.errors import SourceError
from sdkit.loading.transformers_folder import own_tokenizer, pretrained
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of CLIP's training pixels in [0, 1]."""
_tokenizing = threading.Lock()  # tokenizers are not thread-safe, and training tokenizes in several threads


class CLIP(Wrapper):
    """Both encoders of a CLIP, their projections, and the learned temperature.

    Args:
        network: The network.
        tokenizer: Its tokenizer.

    Attributes:
        network: The network, of transformers.
        tokenizer: The tokenizer, of transformers.
        side: Height and width in pixels of the images that it takes.
        length: Tokens of a text, start and end tokens included (77).
        width: D, the width of the embeddings.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.

    Raises:
        SourceError: The network takes images other than square RGB ones, or the tokenizer has too many tokens for it.
    """

    def __init__(self, network: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__(network)
        self.tokenizer: Any = tokenizer
        text, vision = network.config.text_config, network.config.vision_config
        if not isinstance(vision.image_size, int) or vision.num_channels != 3:
            raise SourceError(
                f"this CLIP takes images of {vision.image_size} pixels with {vision.num_channels} channels; give one "
                "that takes square RGB images."
            )
        if len(tokenizer) > text.vocab_size:
            raise SourceError(
                f"the tokenizer has {len(tokenizer)} tokens, this CLIP a vocabulary of {text.vocab_size}; give the "
                "tokenizer that belongs to it."
            )
        self.side, self.length = vision.image_size, int(text.max_position_embeddings)
        self.width = int(network.config.projection_dim)
        self._warned = False

    @classmethod
    def from_pretrained(cls, source: str | PathLike[str]) -> CLIP:
        """Load a CLIP and its tokenizer, frozen, in float32, on the CPU.

        Args:
            source: A folder or a Hub id in transformers' layout, or the result of `train_clip`.

        Raises:
            SourceError: There is no CLIP, or it is damaged.
        """
        from transformers import CLIPModel

        clip = cls(pretrained(CLIPModel, source, "clip"), own_tokenizer(source))
        clip.name = str(source)
        return clip.eval()

    def try_out(self) -> None:
        """Embed a grey image and a text without words."""
        self.network(
            pixel_values=torch.zeros(1, 3, self.side, self.side, device=self.device),
            input_ids=self.tokenize("").to(self.device),
        )

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Return token ids (B, 77) of texts: start token, at most 75 tokens, end token, padding.

        CLIP has no second chunk: longer texts are cut, with one warning.
        """
        texts = strings("texts", texts)
        ids = torch.full((len(texts), self.length), self.tokenizer.pad_token_id)
        for row, text in zip(ids, texts, strict=True):
            with _tokenizing:
                found = self.tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
            words = found.input_ids
            if len(words) > self.length - 2 and not self._warned:
                self._warned = True
                warnings.warn(
                    f"the caption {text[:60]!r}... has {len(words)} tokens, and this CLIP reads {self.length - 2}; "
                    "the rest is cut, of other captions, too.", stacklevel=2,
                )  # fmt: skip
            framed = [self.tokenizer.bos_token_id, *words[: self.length - 2], self.tokenizer.eos_token_id]
            row[: len(framed)] = torch.tensor(framed)
        return ids

    @blames_network
    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed images and texts, with gradient, for training.

        Args:
            pixels: (B, 3, side, side) in [-1, 1].
            ids: Token ids (B', 77).

        Returns:
            Embeddings of the images (B, D) and of the texts (B', D), of any length, in float32; and the factor of the
            logits, a scalar: the inverse of the temperature.
        """
        return self.embed_images(pixels), self.embed_texts(ids), self.network.logit_scale.exp()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return embeddings (B, D), of any length, of images (B, 3, side, side) in [-1, 1]."""
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in PIXELS)
        return pooled(self.network.get_image_features((pixels / 2 + 0.5 - mean) / std)).float()

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Return embeddings (B, D), of any length, of token ids (B, 77)."""
        # Attention is causal, so the end token, whose state is the embedding, does not see the padding after it.
        return pooled(self.network.get_text_features(ids)).float()


def pooled(output: Any) -> Tensor:
    """Return the projected embeddings, which some versions of transformers wrap into an output object."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
