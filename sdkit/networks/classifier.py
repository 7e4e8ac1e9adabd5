"""A classifier of noisy images, whose gradient guides sampling (Dhariwal & Nichol 2021,
https://arxiv.org/abs/2105.05233, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.engines.device import resolve_place
from sdkit.errors import ArgumentError
from sdkit.loading.source import Source
from sdkit.messages import clean, listed
from sdkit.networks.autoencoder import VAE
from sdkit.networks.class_list import ClassList
from sdkit.networks.shared_timestep import embed_timestep_once, shared_timestep, timesteps_of
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from sdkit.loading.encoder_unet import EncoderUNet


class Classifier(Wrapper):
    """A classifier of noisy images x_t, in pixels or in the latents of a VAE.

    `sdkit.training.train_classifier` trains one, and `log_prob` is what `sdkit.guidance.classifier` takes.

    Args:
        network: The network.

    Attributes:
        network: The network.
        name: The source that it came from.
        channels: Channels of x_t.
        classes: Names of the classes in the order of the logits.
        factor: Height and width of x_t must divide by this.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.

    Example:
        >>> import sdkit, torch
        >>> from sdkit.loading.encoder_unet import EncoderUNet
        >>> network = EncoderUNet(in_channels=4, num_classes=2, class_names=["cat", "dog"],
        ...                       down_block_types=["DownBlock2D"], block_out_channels=[32])  # untrained
        >>> classifier = sdkit.Classifier(network)
        >>> classifier(torch.randn(1, 4, 16, 16), 500).shape
        torch.Size([1, 2])
        >>> classifier.log_prob("dog")(torch.randn(3, 4, 16, 16), 500).shape
        torch.Size([3])
    """

    def __init__(self, network: EncoderUNet) -> None:
        """Wrap a network; `from_pretrained` loads one."""
        super().__init__(network)
        config: Any = network.config
        self.channels = int(config.in_channels)
        self.classes = tuple(config.class_names or map(str, range(config.num_classes)))
        if len(self.classes) != config.num_classes:
            raise ArgumentError(
                f"the config of this classifier names {len(self.classes)} classes, and its network has "
                f"{config.num_classes}; correct class_names."
            )
        self._numbers = ClassList(self.classes)
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        embed_timestep_once(network)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        variant: str | None = None,
    ) -> Classifier:
        """Load a classifier.

        Args:
            source: A folder with config.json and weights, such as result/ of a run of `train_classifier`; or a Hub id.
            dtype: As in `sdkit.VAE.from_pretrained`, as for the other arguments.
            device: A GPU or the CPU.
            revision: Branch, tag, or commit of a Hub repository.
            variant: Variant of a repository's weight files, such as "fp16".

        Raises:
            SourceError: The source is missing, unreadable, of another kind, or cannot be downloaded.
            ArgumentError: An argument is out of range.
        """
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant)
        classifier = cls(opened.classifier(dtype))
        classifier.name = opened.name
        return classifier.eval().to(device)

    def try_out(self) -> None:
        """Classify a small image of zeros."""
        side = 2 * self.factor
        x_t = torch.zeros(1, self.channels, side, side, device=self.device, dtype=self.dtype)
        self.network(x_t, torch.ones(1, device=self.device, dtype=torch.long))

    @blames_network
    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        """Return logits.

        Args:
            x_t: Noisy images or latents (B, C, h, w).
            t: Timestep, an integer or (B,).

        Returns:
            (B, K), float32; float64 from a network in float64.

        Raises:
            ArgumentError: x_t has another number of channels, or sides that the network cannot halve.
        """
        if x_t.ndim != 4 or x_t.shape[1] != self.channels or any(side % self.factor for side in x_t.shape[2:]):
            raise ArgumentError(
                f"this classifier takes x_t (B, {self.channels}, h, w) whose sides divide by {self.factor}, not "
                f"{tuple(x_t.shape)}."
            )
        with shared_timestep(isinstance(t, int)):
            logits: Tensor = self.network(x_t.to(self.device, self.dtype), timesteps_of(t, self.device))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def log_prob(self, labels: str | int | Sequence[str | int]) -> Callable[[Tensor, int], Tensor]:
        """Return the function log p(y | x_t) of the wanted classes, as `sdkit.guidance.classifier` takes it.

        Args:
            labels: The wanted class of all images, or of each; by its name or its number.

        Returns:
            log_prob(x_t, t) -> (B,), differentiable in x_t, on its device.

        Raises:
            ArgumentError: There is no such class. Later: the number of images is another.
        """
        numbers = self.numbers_of(labels)
        with torch.inference_mode(False):  # autograd keeps them
            column = torch.tensor(numbers, device=self.device)  # once: a copy in each step would synchronise with a GPU

        def log_prob(x_t: Tensor, t: int) -> Tensor:
            if len(numbers) not in (1, len(x_t)):
                raise ArgumentError(f"{len(numbers)} labels cannot serve {len(x_t)} images: give one, or one for each.")
            columns = column.to(self.device).expand(len(x_t))[:, None]
            chosen: Tensor = self(x_t, t).log_softmax(dim=1).gather(1, columns)
            return chosen.flatten().to(x_t)

        return log_prob

    def numbers_of(self, labels: str | int | Sequence[str | int]) -> list[int]:
        """Return the numbers of classes given by name or number. Raise ArgumentError if there is no such class."""
        many = [labels] if isinstance(labels, (str, int)) else labels
        if not isinstance(many, Sequence) or not many:
            raise ArgumentError(f"labels must be names or numbers of classes, not {many!r}.")
        return [self._number(label) for label in many]

    def _number(self, label: str | int) -> int:
        if isinstance(label, str) and (number := self._numbers.number(label)) is not None:
            return number
        if type(label) is int and 0 <= label < len(self.classes):
            return label
        raise ArgumentError(
            f"this classifier knows no class {clean(repr(label))}; it knows {listed(self.classes)}, or their numbers "
            f"from 0 to {len(self.classes) - 1}."
        )

    def check_fits(self, vae: VAE) -> None:
        """Raise ArgumentError if the classifier was trained on other latents than those of a VAE."""
        stated = self.network.config.latents
        if self.channels != vae.channels or (stated is not None and stated != vae.identity):
            raise ArgumentError(
                "this classifier was trained on the latents of another VAE: train one for this model with sdkit train "
                "classifier."
            )
