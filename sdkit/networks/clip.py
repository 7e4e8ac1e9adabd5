"""CLIP (Radford et al. 2021, https://arxiv.org/abs/2103.00020): images and texts embedded in one space."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sdkit.arguments import strings
from sdkit.diffusion.conditioning import Conditioning
from sdkit.engines.device import resolve_place
from sdkit.errors import SourceError
from sdkit.images import to_tensors
from sdkit.loading.transformers_folder import clip_source, own_tokenizer, pretrained
from sdkit.networks.image_prior import conditioning
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of CLIP's training pixels in [0, 1]."""
_tokenizing = threading.Lock()  # tokenizers are not thread-safe, and training tokenizes in several threads


class Words:
    """A tokenizer of CLIP, and the length of the texts that its encoder reads.

    Args:
        tokenizer: The tokenizer.
        config: Config of the text encoder.

    Attributes:
        tokenizer: The tokenizer, of transformers.
        length: Tokens of a text, start and end tokens included (77).

    Raises:
        SourceError: The tokenizer has more tokens than the encoder.
    """

    def __init__(self, tokenizer: CLIPTokenizer, config: Any) -> None:
        if len(tokenizer) > config.vocab_size:
            raise SourceError(
                f"the tokenizer has {len(tokenizer)} tokens, this CLIP a vocabulary of {config.vocab_size}; give the "
                "tokenizer that belongs to it."
            )
        self.tokenizer: Any = tokenizer
        self.length = int(config.max_position_embeddings)
        self._warned = False

    def ids(self, texts: str | Sequence[str]) -> Tensor:
        """Return token ids (B, L) of texts: start token, at most L - 2 tokens, end token, padding. L is the `length`.

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
                    f"the text {text[:60]!r}... has {len(words)} tokens, and this CLIP reads {self.length - 2}; the "
                    "rest is cut, of other texts, too.", stacklevel=2,
                )  # fmt: skip
            framed = [self.tokenizer.bos_token_id, *words[: self.length - 2], self.tokenizer.eos_token_id]
            row[: len(framed)] = torch.tensor(framed)
        return ids


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
        text, vision = network.config.text_config, network.config.vision_config
        if not isinstance(vision.image_size, int) or vision.num_channels != 3:
            raise SourceError(
                f"this CLIP takes images of {vision.image_size} pixels with {vision.num_channels} channels; give one "
                "that takes square RGB images."
            )
        self.words = Words(tokenizer, text)
        self.tokenizer, self.length = self.words.tokenizer, self.words.length
        self.side, self.width = vision.image_size, int(network.config.projection_dim)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "fp32",
        device: str | torch.device = "auto",
        revision: str | None = None,
    ) -> CLIP:
        """Load a CLIP and its tokenizer, frozen.

        Args:
            source: A folder or a Hub id in transformers' layout, the result of `train_clip`, or "emoji", the embedded
                CLIP of emoji.
            dtype: As in `sdkit.VAE.from_pretrained`, as for the other arguments.
            device: A GPU or the CPU.
            revision: Branch, tag, or commit of a Hub repository.

        Raises:
            SourceError: There is no CLIP, or it is damaged, or cannot be downloaded.
            ArgumentError: An argument is out of range.
        """
        from transformers import CLIPModel

        dtype, device = resolve_place(dtype, device)
        place = clip_source(source)
        clip = cls(pretrained(CLIPModel, place, "clip", revision), own_tokenizer(place, revision))
        clip.name = str(source)
        return clip.eval().to(device, dtype)

    def try_out(self) -> None:
        """Embed a grey image and a text without words."""
        self.network(
            pixel_values=torch.zeros(1, 3, self.side, self.side, device=self.device),
            input_ids=self.tokenize("").to(self.device),
        )

    def tokenize(self, texts: str | Sequence[str]) -> Tensor:
        """Return token ids (B, L) of texts; see `Words.ids`."""
        return self.words.ids(texts)

    @blames_network
    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed images and texts, with gradient, for training.

        Args:
            pixels: (B, 3, side, side) in [-1, 1].
            ids: Token ids (B', L).

        Returns:
            Embeddings of the images (B, D) and of the texts (B', D), of any length, in float32; and the factor of the
            logits, a scalar: the inverse of the temperature.
        """
        return self.embed_images(pixels), self.embed_texts(ids), self.network.logit_scale.exp()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return embeddings (B, D), of any length, of images (B, 3, side, side) in [-1, 1]."""
        return pooled(self.network.get_image_features(scaled(pixels))).float()

    def embed_texts(self, ids: Tensor) -> Tensor:
        """Return embeddings (B, D), of any length, of token ids (B, L)."""
        # Attention is causal, so the end token, whose state is the embedding, does not see the padding after it.
        return pooled(self.network.get_text_features(ids)).float()


class TextTower(Wrapper):
    """CLIP's text encoder with its projection, as the prior of DALL-E 2 reads it.

    Args:
        network: The network.
        tokenizer: Its tokenizer.

    Attributes:
        network: The network, of transformers.
        tokenizer: The tokenizer, of transformers.
        width: D, the width of the embeddings.
        hidden: Width of the states of the tokens.
        length: Tokens of a text, start and end tokens included.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.
    """

    def __init__(self, network: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer) -> None:
        super().__init__(network)
        self.words = Words(tokenizer, network.config)
        self.tokenizer, self.length = self.words.tokenizer, self.words.length
        self.width, self.hidden = int(network.config.projection_dim), int(network.config.hidden_size)

    def try_out(self) -> None:
        """Encode a text without words."""
        self.network(self.words.ids("").to(self.device))

    def condition(self, texts: str | Sequence[str]) -> Conditioning:
        """Return the condition of a prior: the states of B texts, their mask, and their embeddings."""
        condition: Conditioning = self(self.words.ids(texts))
        return condition

    @blames_network
    def forward(self, ids: Tensor) -> Conditioning:
        """Return the condition of a prior for token ids (B, L)."""
        output = self.network(ids.to(self.device))
        return conditioning(output.last_hidden_state, output.text_embeds, ids, self.tokenizer.eos_token_id)


class ImageEncoder(Wrapper):
    """CLIP's image encoder with its projection.

    Args:
        network: The network.

    Attributes:
        network: The network, of transformers.
        side: Height and width in pixels of the images that it takes.
        width: D, the width of the embeddings.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.
    """

    def __init__(self, network: CLIPVisionModelWithProjection) -> None:
        super().__init__(network)
        self.side, self.width = int(network.config.image_size), int(network.config.projection_dim)

    def try_out(self) -> None:
        """Embed a grey image."""
        self.network(torch.zeros(1, 3, self.side, self.side, device=self.device, dtype=self.dtype))

    @blames_network
    def forward(self, pixels: Tensor) -> Tensor:
        """Return embeddings (B, D), of any length, of images (B, 3, side, side) in [-1, 1]."""
        embeddings: Tensor = self.network(scaled(pixels.to(self.device)).to(self.dtype)).image_embeds
        return embeddings.float()

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Return embeddings (B, D) of images, resized and cropped as CLIP's own preprocessing does."""
        embeddings: Tensor = self(torch.stack([to_tensors(cropped(image, self.side))[0] for image in images]))
        return embeddings


def cropped(image: Image.Image, side: int) -> Image.Image:
    """Return the square in the middle of an image, after its shorter side was resized to `side` (bicubic)."""
    width, height = (side * length // min(image.size) for length in image.size)
    resized = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return resized.crop((left, top, left + side, top + side))


def scaled(pixels: Tensor) -> Tensor:
    """Return pixels in [-1, 1], (B, 3, H, W), as CLIP was trained on them: less their mean, over their deviation."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in PIXELS)
    return (pixels / 2 + 0.5 - mean) / std


def pooled(output: Any) -> Tensor:
    """Return the projected embeddings, which some versions of transformers wrap into an output object."""
    found: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return found
