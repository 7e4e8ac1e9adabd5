"""The classes of a model without a text encoder: a prompt is the name of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from sdkit.arguments import strings
from sdkit.errors import ArgumentError
from sdkit.loading.configs import CLASSES
from sdkit.messages import clean
from sdkit.networks.class_list import ClassList, plain
from sdkit.networks.text_encoder import TextEncoder
from sdkit.networks.wrapper import Wrapper

if TYPE_CHECKING:
    from sdkit.networks.denoiser import UNet

SHOWN = 10
"""Number of names that a message lists."""


class ClassNames(TextEncoder):
    """The classes of a U-Net that takes labels, or of one that takes nothing, in the place of a text encoder.

    A prompt is the name of a class, whatever its case and spaces. The empty prompt is no class: the label of
    classifier-free guidance's unconditional output, one beyond the last class, if the network has been trained with it.
    A network that takes nothing has no classes, and only the empty prompt.

    Args:
        names: Names of the classes, in the order of their labels.
        has_none: Whether the network has a label for no class.

    Attributes:
        classes: The classes.
        names: Their names.
        none: The label for no class, or None.
        width: 0: there are no embeddings.

    Example:
        >>> from sdkit.networks.class_names import ClassNames
        >>> ClassNames(["cat", "dog"]).labels(["dog", "", "Cat"]).tolist()
        [1, 2, 0]
    """

    def __init__(self, names: Sequence[str] = (), *, has_none: bool = True) -> None:
        Wrapper.__init__(self, nn.Module())
        self.classes = ClassList(tuple(names))
        self.names = self.classes.names
        self.none = len(self.names) if self.names and has_none else None
        self.tokenizer: Any = None
        self.length, self.width = 1, 0
        self.learned: dict[str, Tensor] = {}

    @classmethod
    def of(cls, unet: UNet) -> ClassNames:
        """Return the classes of a U-Net, by the config of its network.

        A network that names none, because another toolkit has trained it, calls its labels "0", "1", and so on.
        """
        if not unet.takes_labels:
            return cls()
        if unet.network.config.class_embed_type == "identity":
            raise ArgumentError(
                "this U-Net takes vectors in place of class labels (class_embed_type 'identity'); give one with "
                "num_class_embeds."
            )
        count = unet.network.config.num_class_embeds
        names = list(unet.network.config.get(CLASSES) or map(str, range(count or 0)))
        return cls(names, has_none=count is None or count > len(names))

    def labels(self, prompts: str | Sequence[str]) -> Tensor:
        """Return the labels (B,) of classes.

        Args:
            prompts: Name of a class, or a list of B names; "" is no class.

        Raises:
            ArgumentError: A name is that of no class, or the network has no label for none.
        """
        return torch.tensor([self._label(prompt) for prompt in strings("prompt", prompts)])

    def _label(self, prompt: str) -> int:
        if not plain(prompt):
            if self.none is None:
                raise ArgumentError(
                    "this model was trained without label dropout, and draws classes alone: name one, with "
                    "guidance_scale 1."
                )
            return self.none
        number = self.classes.number(prompt)
        if number is None:
            more = ", ..." if len(self.names) > SHOWN else ""
            known = ", ".join(clean(name) for name in self.names[:SHOWN]) + more
            raise ArgumentError(f"{clean(repr(prompt))} is no class of this model; its classes: {known}.")
        return number

    def check(self, prompts: Sequence[str]) -> None:
        """Raise ArgumentError unless the model can draw all these prompts."""
        if self.names:
            self.labels(prompts)
        elif any(map(plain, prompts)):
            raise ArgumentError("this model draws without prompts and classes; give the empty prompt, ''.")

    def tokenize(
        self, prompts: str | Sequence[str], *, weighting: bool = False, chunks: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the labels as tokens (B, 1, 1), and weights of 1. The other arguments are ignored."""
        del weighting, chunks
        prompts = strings("prompts", prompts)
        self.check(prompts)
        ids = self.labels(prompts) if self.names else torch.zeros(len(prompts), dtype=torch.int64)
        return ids[:, None, None], torch.ones(len(prompts), 1, 1)

    def encode(
        self, prompts: str | Sequence[str], *, clip_skip: int = 0, weighting: bool = False, chunks: int | None = None
    ) -> NoReturn:
        """Raise ArgumentError: there are no embeddings; see `labels`."""
        del prompts, clip_skip, weighting, chunks
        raise ArgumentError("this model takes classes and has no text encoder; `labels` gives the labels of its names.")

    def add_token(self, token: str, vectors: Tensor, *, label: str = "this embedding") -> NoReturn:
        """Raise ArgumentError: an embedding belongs to a text encoder."""
        del token, vectors
        raise ArgumentError(f"{label} belongs to a text encoder, and this model has none; leave it out.")
