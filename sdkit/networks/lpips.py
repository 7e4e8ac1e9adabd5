"""LPIPS: a perceptual distance between images (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

This is version 0.1 with VGG-16. Its values equal the package `lpips`'; neither that nor torchvision is needed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.errors import ImageError, SourceError
from sdkit.loading.place import path_or_fetched
from sdkit.loading.tensors import check_dtypes, check_finite, check_fit, is_file, open_tensors

VARIABLE = "SDKIT_LPIPS"
FILENAME = "lpips_vgg16.safetensors"
BLOCKS = (
    (64, 64),
    (128, 128),
    (256, 256, 256),
    (512, 512, 512),
    (512, 512, 512),
)  # channels of VGG-16's convolutions; a pooling lies between blocks
SUPERFLUOUS = ("lins.", "scaling_layer.")  # in the package's state dict: a second copy of the heads, and constants
SMALLEST = 16  # pixels on each side; four poolings leave one


class LPIPS(nn.Module):
    """LPIPS of pairs of images. The gradient reaches the images; the weights are frozen.

    It computes in the precision of its weights, also under autocast: float32 unless converted. `LPIPS()` has random
    weights, for tests; `LPIPS.from_pretrained` loads the trained ones.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for block in BLOCKS:
            layers += [nn.MaxPool2d(2)] if layers else []
            for channels in block:
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)]
                inputs = channels
        self.vgg = nn.Sequential(*layers)  # numbered as torchvision's `vgg16().features`
        self.heads = nn.ParameterList(torch.rand(1, block[-1], 1, 1) for block in BLOCKS)
        # The package's constants: ImageNet's mean and standard deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | None = None, *, filename: str = FILENAME, revision: str | None = None
    ) -> LPIPS:
        """Load trained weights, on the CPU.

        The file holds the 13 convolutions of torchvision's ImageNet VGG-16 as `features.N.weight` and `features.N.bias`
        and the five heads of LPIPS v0.1 as `linK.weight`, (1, C, 1, 1), in any precision. The state dict of the
        package `lpips` works too: `torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips.pt")`.

        Args:
            source: A file, a folder, or a Hub id. None reads it from the environment variable SDKIT_LPIPS.
            filename: The file in a folder or Hub repository.
            revision: A branch, tag, or commit of a Hub repository.

        Raises:
            SourceError: There is no source, or the file is missing, damaged, or of another layout.
        """
        source = source or os.environ.get(VARIABLE)
        if not source:
            raise SourceError(
                "LPIPS has no default weights: give the path or the Hub id of a file of them, or put it into the "
                f"environment variable {VARIABLE}."
            )
        file = open_tensors(_locate(source, filename, revision))
        model = cls()
        names = {_file_key(key): key for key in model.state_dict()}
        wanted = {name: tuple(model.state_dict()[key].shape) for name, key in names.items()}
        stored = {_plain(key): key for key in file.shapes if not key.startswith(SUPERFLUOUS)}
        shapes = {name: file.shapes[key] for name, key in stored.items()}
        check_fit(shapes, wanted, f"{file.label} does not hold the weights of LPIPS with VGG-16")
        check_dtypes(file, stored.values())
        tensors = file.read(stored.values())
        model.load_state_dict({names[name]: tensors[key] for name, key in stored.items()})
        check_finite(model, file, stored.values())
        return model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair of images (eq. 1 of the paper).

        Args:
            x: (B, 3, H, W) in [-1, 1], of at least 16 x 16 pixels.
            y: Shaped like x.

        Returns:
            (B,); 0 for equal images.
        """
        if x.shape != y.shape:
            raise ImageError(f"LPIPS cannot compare images of shapes {tuple(x.shape)} and {tuple(y.shape)}.")
        # Two passes, not one over both: if only one image has a gradient, the other's pass stores no activations.
        pairs = zip(self._maps(x), self._maps(y), strict=True)
        return torch.stack([(a - b).square().sum(1).mean((1, 2)) for a, b in pairs]).sum(0)

    def features(self, x: Tensor, grid: int | None = None) -> Tensor:
        """Return one vector for each image. Squared distances between vectors are LPIPS, if `grid` is None.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            grid: Average the features of each layer over grid x grid cells first. Vectors are then small enough for a
                nearest-neighbour search, and distances approximate LPIPS.

        Returns:
            (B, D): D = 1472 grid^2, or about 122 H W if `grid` is None.
        """
        vectors = []
        for weighted in self._maps(x):
            cells = weighted if grid is None else F.adaptive_avg_pool2d(weighted, grid)
            vectors.append(cells.flatten(1) / cells[0, 0].numel() ** 0.5)
        return torch.cat(vectors, dim=1)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Return the activations after each block of VGG, normalized at each position, times the square root of the
        weights of the block's head."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST:
            raise ImageError(
                f"LPIPS needs images (B, 3, H, W) of at least {SMALLEST} x {SMALLEST} pixels, not {tuple(x.shape)}."
            )
        activations = []
        with torch.autocast(x.device.type, enabled=False):
            h = (x.to(self.scale.dtype) - self.shift) / self.scale
            for layer in self.vgg:
                if isinstance(layer, nn.MaxPool2d):
                    activations.append(h)
                h = layer(h)
            return [_unit(h) * head.sqrt() for h, head in zip([*activations, h], self.heads, strict=True)]


def _unit(h: Tensor) -> Tensor:  # (B, C, h, w)
    # If the squares underflow, vector_norm has a gradient of 0; the root of their sum would have an infinite one.
    length: Tensor = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h / (length + 1e-10)


def _file_key(key: str) -> str:
    """Return a parameter's name in the file: vgg.0.bias -> features.0.bias, heads.2 -> lin2.weight."""
    return key.replace("vgg.", "features.") if key.startswith("vgg.") else f"lin{key.removeprefix('heads.')}.weight"


def _plain(key: str) -> str:
    """Rename a key of the package `lpips` to the layout of `from_pretrained`. Keep other names."""
    key = re.sub(r"^net\.slice\d\.(\d+\.\w+)$", r"features.\1", key)
    return re.sub(r"^(lin\d)\.model\.1\.weight$", r"\1.weight", key)


def _locate(source: str | os.PathLike[str], filename: str, revision: str | None) -> Path:
    path = path_or_fetched(source, filename, revision)
    if is_file(path):
        return path
    if not is_file(path / filename):
        raise SourceError(
            f"the weights of LPIPS are not at {str(path)!r}; give a file of them, a folder with {filename} or a Hub id."
        )
    return path / filename
