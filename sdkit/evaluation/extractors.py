"""Feature extractors: frozen networks that turn an image into the vector by which metrics compare images.

| name | network | features | weights |
|---|---|---|---|
| `alex` | AlexNet of LPIPS v0.1 | 1152 | embedded |
| `inception` | Inception v3 of the FID (Heusel et al. 2017) | 2048 | a file, a folder, or a Hub id; SDKIT_INCEPTION |
| `dinov2` | DINOv2 (Oquab et al. 2023), as Stein et al. 2023 advise | its width | a folder or a Hub id |
| `clip` | image encoder of CLIP (Radford et al. 2021), as for CMMD | its projection | a folder, a Hub id, or `emoji` |

Distances of different extractors, or of different resizing, cannot be compared with each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdkit.arguments import one_of
from sdkit.engines.device import resolve_device
from sdkit.errors import ArgumentError, SourceError
from sdkit.evaluation.inception import CLASSES, Inception
from sdkit.evaluation.inception import WIDTH as INCEPTION_WIDTH
from sdkit.images import Images, to_pil, to_rgb
from sdkit.images.convert import flat
from sdkit.loading import hub
from sdkit.loading.place import path_or_fetched
from sdkit.loading.tensors import (
    check_dtypes,
    check_finite,
    check_fit,
    is_file,
    open_tensors,
)
from sdkit.loading.transformers_folder import pretrained
from sdkit.messages import clean
from sdkit.networks.clip import CLIP
from sdkit.networks.lpips import LPIPS

VARIABLE = "SDKIT_INCEPTION"
"""Environment variable that names the weights of the FID's Inception network."""
DOWNLOADED = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
"""Files of these weights as pytorch-fid and torch-fidelity download them, into torch's hub folder."""
INCEPTION_FILES = ("model.safetensors", *DOWNLOADED)
"""Files that are looked for in a folder or a Hub repository."""
SOURCES = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
"""Extractor -> the network that its metrics' papers use."""
NAMES = ("alex", "inception", "dinov2", "clip")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of ImageNet's pixels in [0, 1]."""
SIDE = 224
"""Side in pixels to which images are resized for "alex" and "dinov2"."""
INCEPTION_SIDE = 299
AT_ONCE = 64
"""Images in one pass through a network, when `Extractor` is called."""

Outputs = tuple[Tensor, Tensor | None]
"""Features (B, D), and logits of classes (B, K) if the network has any."""


class Extractor:
    """A frozen network, with the resizing that it expects.

    Calling it turns images into features. A loop over many images calls `prepare` in the threads that read them, and
    `outputs` on the stacked results.

    Attributes:
        name: "alex", or a name with its source, such as "clip:openai/clip-vit-large-patch14-336".
        kind: "alex", "inception", "dinov2", or "clip".
        width: D, the number of features.
        side: Side in pixels of the images that the network takes.
        crops: Whether images are cropped to a square first. If not, their aspect ratio is not kept.
        network: The network.
        text: The network of "clip" with its tokenizer, for `embed_texts`; None for other extractors.
        device: Where the network computes.
    """

    network: Any

    def __init__(
        self,
        network: nn.Module,
        run: Callable[[Tensor], Outputs],
        *,
        name: str,
        width: int,
        side: int,
        crops: bool = False,
        text: CLIP | None = None,
    ) -> None:
        """Wrap a network; `open_extractor` loads one.

        Args:
            network: The network, on its device.
            run: Computes the outputs of pixels (B, 3, side, side), float32 in [0, 255].
            name: As the attribute, and so are the others.
            width: As above.
            side: As above.
            crops: As above.
            text: As above.
        """
        self.network, self._run = network, run
        self.name, self.width, self.side, self.crops, self.text = name, width, side, crops, text
        self.kind = name.partition(":")[0]
        self.device = next(network.parameters()).device

    @property
    def resizing(self) -> str:
        """The resizing of an image before the network sees it."""
        how = "shorter side resized, then cropped at the centre" if self.crops else "aspect ratio not kept"
        return f"{self.side} x {self.side} pixels, antialiased bicubic, {how}"

    def prepare(self, image: Image.Image) -> Tensor:
        """Return an image as the network takes it: uint8 (3, side, side).

        Pillow's bicubic filter is antialiased: it widens with the reduction (Parmar et al. 2022,
        https://arxiv.org/abs/2104.11222). Levels are rounded to 8 bits.
        """
        rgb = to_rgb(image)
        size = (self.side, self.side)
        if self.crops:
            # As CLIP's own preprocessing does, the longer side is rounded down.
            size = (self.side * rgb.width // min(rgb.size), self.side * rgb.height // min(rgb.size))
        resized = rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BICUBIC)
        left, top = (resized.width - self.side) // 2, (resized.height - self.side) // 2
        square = resized.crop((left, top, left + self.side, top + self.side))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1)

    @torch.no_grad()
    def outputs(self, pixels: Tensor) -> Outputs:
        """Return features and logits of prepared images.

        Args:
            pixels: (B, 3, side, side), levels in [0, 255] of any type.

        Returns:
            Features (B, D) and logits (B, K) or None, float32 on the CPU.
        """
        features, logits = self._run(pixels.to(self.device).float())
        return features.float().cpu(), None if logits is None else logits.float().cpu()

    def __call__(self, images: Images) -> Tensor:
        """Return the features (B, D) of images, float32 on the CPU. Tensors in [-1, 1] are rounded to 8 bits first."""
        pictures = [image if isinstance(image, Image.Image) else to_pil(image)[0] for image in flat(images)]
        batches = (pictures[i : i + AT_ONCE] for i in range(0, len(pictures), AT_ONCE))
        return torch.cat([self.outputs(torch.stack([self.prepare(one) for one in batch]))[0] for batch in batches])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return CLIP's embeddings (B, D) of texts, float32 on the CPU. Texts too long for it are cut, with a warning.

        Raises:
            ArgumentError: The extractor has no text encoder.
        """
        if self.text is None:
            raise ArgumentError(f"{self.name} has no text encoder to compare images with prompts; take 'clip'.")
        batches = self.text.tokenize(texts).split(AT_ONCE)
        return torch.cat([self.text.embed_texts(ids.to(self.device)).cpu() for ids in batches])


def open_extractor(name: str = "alex", *, device: str | torch.device = "auto") -> Extractor:
    """Load a feature extractor.

    Args:
        name: "alex", "inception", "dinov2", or "clip", with or without a source of its weights: "NAME:SOURCE". A source
            is a folder, a Hub id, or, for "inception", also a file in the layout of pytorch-fid or torch-fidelity.
            Without one, "inception" takes the environment variable SDKIT_INCEPTION, or the file that pytorch-fid or
            torch-fidelity have downloaded; the other two take the networks of their metrics' papers from the Hub.
            "clip:emoji" is embedded: a small CLIP that knows emoji alone, by the recipe `sdkit.recipes.emoji.clip`.
        device: Where the network computes; "auto" is a GPU if there is one.

    Raises:
        ArgumentError: There is no extractor of this name, or the device cannot be used.
        SourceError: The weights are missing, damaged, or of another network.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"an extractor is named by a string such as 'alex', not by {clean(repr(name))}.")
    kind, _, source = name.partition(":")
    one_of("extractor", kind, NAMES)
    on = resolve_device(device)
    if kind == "alex":
        if source:
            raise ArgumentError(f"the weights of 'alex' are embedded; leave {clean(repr(source))} out.")
        return _alex(on)
    if kind == "inception":
        return _inception(source, on)
    return (_dinov2 if kind == "dinov2" else _clip)(source or SOURCES[kind], on)


def _alex(device: torch.device) -> Extractor:
    """Return the activations of AlexNet, normalised and weighted as LPIPS does, and averaged over all positions.

    LPIPS's vectors have a length of about 1. Here it is about the root of the number of features, as with other
    networks: KID's kernel (x . y / D + 1)^3 would otherwise be nearly linear.
    """
    network = LPIPS.from_pretrained("alex").to(device)
    width = sum(head.shape[1] for head in network.heads)

    def run(pixels: Tensor) -> Outputs:
        return network.features(pixels / 127.5 - 1, grid=1) * width**0.5, None

    return Extractor(network, run, name="alex", width=width, side=SIDE)


def _inception(source: str, device: torch.device) -> Extractor:
    file = open_tensors(_inception_file(source))
    network = Inception()
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items() if not _is_counter(key)}
    # Files of torchvision's layout also hold the auxiliary classifier, which is used in training only.
    shapes = {key: shape for key, shape in file.shapes.items() if not _is_counter(key) and key != "fc.bias"}
    wanted.pop("fc.bias")  # the logits are computed without it
    shapes = {key: shape for key, shape in shapes.items() if not key.startswith("AuxLogits.")}
    if shapes.get("fc.weight", wanted["fc.weight"])[0] != CLASSES:
        raise SourceError(
            f"{file.label} holds another Inception network, of {shapes['fc.weight'][0]} classes; the FID's has "
            f"{CLASSES}: give pytorch-fid's {DOWNLOADED[0]}."
        )
    check_fit(shapes, wanted, f"{file.label} does not hold the Inception network of the FID")
    check_dtypes(file, shapes)
    network.load_state_dict(file.read(shapes), strict=False)
    check_finite(network, file, shapes)
    network.eval().requires_grad_(False).to(device)

    def run(pixels: Tensor) -> Outputs:
        return network((pixels - 128) / 128)  # type: ignore[no-any-return] # as TensorFlow's graph scales its input

    name = f"inception:{source}" if source else "inception"
    return Extractor(network, run, name=name, width=INCEPTION_WIDTH, side=INCEPTION_SIDE)


def _is_counter(key: str) -> bool:
    """Return whether a tensor counts batches; older files lack it, and evaluation ignores it."""
    return key.endswith("num_batches_tracked")


def _inception_file(source: str) -> Path:
    """Return the file of the weights: in `source`, in SDKIT_INCEPTION, or where other packages have put it."""
    named = source or os.environ.get(VARIABLE, "")
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if not named:
        found = [folder / name for name in DOWNLOADED if is_file(folder / name)]
        if not found:
            raise SourceError(
                f"the weights of the FID's Inception network do not ship: put the path or the Hub id of pytorch-fid's "
                f"{DOWNLOADED[0]} into the environment variable {VARIABLE}, or take the extractor 'alex', which ships."
            )
        return found[0]
    if hub.is_hub_id(named) and not Path(named).exists():
        names = hub.list_files(named, None) or ()
        return path_or_fetched(
            named, next((name for name in INCEPTION_FILES if name in names), INCEPTION_FILES[0]), None
        )
    path = Path(named).expanduser()
    if path.is_dir():
        return next((path / name for name in INCEPTION_FILES if is_file(path / name)), path / INCEPTION_FILES[0])
    return path


def _dinov2(source: str, device: torch.device) -> Extractor:
    from transformers import Dinov2Model

    network = pretrained(Dinov2Model, source, "dinov2").to(device)
    mean, std = (_channels(values, device) for values in IMAGENET)

    def run(pixels: Tensor) -> Outputs:
        x = (pixels / 255 - mean) / std
        return network(x).pooler_output, None  # the class token after the last layer norm

    width = int(network.config.hidden_size)
    return Extractor(network, run, name=f"dinov2:{source}", width=width, side=SIDE)


def _clip(source: str, device: torch.device) -> Extractor:
    clip = CLIP.from_pretrained(source, device=device)

    def run(pixels: Tensor) -> Outputs:
        return clip.embed_images(pixels / 127.5 - 1), None

    return Extractor(clip.network, run, name=f"clip:{source}", width=clip.width, side=clip.side, crops=True, text=clip)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device).view(1, 3, 1, 1)
