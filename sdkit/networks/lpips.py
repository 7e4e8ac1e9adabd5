"""LPIPS: a perceptual distance between images (Zhang et al. 2018, https://arxiv.org/abs/1801.03924).

This is version 0.1, with AlexNet, whose weights are embedded, or with VGG-16. Its values equal the package `lpips`';
neither that nor torchvision is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.arguments import one_of
from sdkit.errors import ImageError, SourceError
from sdkit.loading.place import path_or_fetched
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tensors import check_dtypes, check_finite, check_fit, is_file, open_tensors

VARIABLE = "SDKIT_LPIPS"
FILENAME = "lpips_vgg16.safetensors"
EMBEDDED = ASSETS / "lpips_alex" / "lpips_alex.safetensors"
SUPERFLUOUS = ("lins.", "scaling_layer.")  # in the package's state dict: a second copy of the heads, and constants


def _alexnet() -> nn.Sequential:
    """Return the convolutions of AlexNet, numbered as in torchvision's `alexnet().features`."""
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2), nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1), nn.ReLU(inplace=True),
    )  # fmt: skip


def _vgg16() -> nn.Sequential:
    """Return the convolutions of VGG-16, numbered as in torchvision's `vgg16().features`, without the last pooling."""
    layers: list[nn.Module] = []
    inputs = 3
    for block in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        layers += [nn.MaxPool2d(2)] if layers else []
        for channels in block:
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = channels
    return nn.Sequential(*layers)


class Network(NamedTuple):
    """A network whose activations LPIPS compares.

    Attributes:
        title: Its name in messages.
        layers: Makes it with random weights.
        compared: Index of each layer whose activations are compared -> their channels.
        smallest: Smallest side of an image in pixels; the last layer then has a single position.
    """

    title: str
    layers: Callable[[], nn.Sequential]
    compared: dict[int, int]
    smallest: int


NETWORKS = {
    "alex": Network("AlexNet", _alexnet, {1: 64, 4: 192, 7: 384, 9: 256, 11: 256}, smallest=31),
    "vgg": Network("VGG-16", _vgg16, {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}, smallest=16),
}


class LPIPS(nn.Module):
    """LPIPS of pairs of images. The gradient reaches the images; the weights are frozen.

    It computes in the precision of its weights, also under autocast: float32 unless converted. `LPIPS()` has random
    weights, for tests; `LPIPS.from_pretrained` loads the trained ones.

    Args:
        network: "alex" or "vgg". The paper's authors advise VGG-16 as a loss. It takes about twenty times as long.

    Attributes:
        network: "alex" or "vgg".
        smallest: Smallest side of an image in pixels.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, network: str = "alex") -> None:
        super().__init__()
        self.network, made = network, NETWORKS[one_of("network", network, NETWORKS)]
        self.smallest, self._compared = made.smallest, made.compared
        # Runs recognise LPIPS by a fingerprint that includes the parameters' names, such as "vgg.0.weight".
        self.add_module(network, made.layers())
        self.heads = nn.ParameterList(torch.rand(1, channels, 1, 1) for channels in made.compared.values())
        # The package's constants: ImageNet's mean and standard deviation, for images in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | None = None, *, filename: str = FILENAME, revision: str | None = None
    ) -> LPIPS:
        """Load trained weights, on the CPU.

        A file holds the convolutions of torchvision's ImageNet VGG-16 (or AlexNet) as `features.N.weight` and
        `features.N.bias`, and the five heads of LPIPS v0.1 as `linK.weight`, (1, C, 1, 1), in any precision. The state
        dict of the package `lpips` works too: `torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips.pt")`.

        Args:
            source: "alex", whose weights are embedded; "vgg", whose weights the environment variable SDKIT_LPIPS
                names; or a file, a folder, or a Hub id of weights. None is SDKIT_LPIPS if it is set, or else "alex".
            filename: The file in a folder or Hub repository.
            revision: A branch, tag, or commit of a Hub repository.

        Raises:
            SourceError: The file is missing, damaged, or of another layout, or SDKIT_LPIPS is needed and not set.
        """
        source = source or os.environ.get(VARIABLE) or "alex"
        if source == "alex":
            return cls._loaded(EMBEDDED, "alex")
        if source != "vgg":
            return cls._loaded(_locate(source, filename, revision))
        named = os.environ.get(VARIABLE)
        if not named or named in NETWORKS:
            raise SourceError(
                f"the weights of LPIPS with VGG do not ship: put their path or Hub id into the environment variable "
                f"{VARIABLE}, or take 'alex', which ships."
            )
        return cls._loaded(_locate(named, filename, revision), "vgg")

    @classmethod
    def _loaded(cls, path: Path, network: str | None = None) -> LPIPS:
        """Load the weights in a file. If `network` is None, the shape of the first convolution tells it."""
        file = open_tensors(path)
        stored = {_plain(key): key for key in file.shapes if not key.startswith(SUPERFLUOUS)}
        shapes = {name: file.shapes[key] for name, key in stored.items()}
        if network is None:
            network = "alex" if shapes.get("features.0.weight") == (64, 3, 11, 11) else "vgg"
        with torch.random.fork_rng(devices=[]):  # the random weights are replaced: leave the caller's generator alone
            model = cls(network)
        names = {_file_key(key): key for key in model.state_dict()}
        wanted = {name: tuple(model.state_dict()[key].shape) for name, key in names.items()}
        title = NETWORKS[network].title
        check_fit(shapes, wanted, f"{file.label} does not hold the weights of LPIPS with {title}")
        check_dtypes(file, stored.values())
        tensors = file.read(stored.values())
        model.load_state_dict({names[name]: tensors[key] for name, key in stored.items()})
        check_finite(model, file, stored.values())
        return model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair of images (eq. 1 of the paper).

        Args:
            x: (B, 3, H, W) in [-1, 1]. H and W are at least `smallest`: 31 with AlexNet, 16 with VGG.
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
            (B, D). If `grid` is None, D is about 10 H W with AlexNet and 122 H W with VGG, otherwise 1152 grid^2 and
            1472 grid^2.
        """
        vectors = []
        for weighted in self._maps(x):
            cells = weighted if grid is None else F.adaptive_avg_pool2d(weighted, grid)
            vectors.append(cells.flatten(1) / cells[0, 0].numel() ** 0.5)
        return torch.cat(vectors, dim=1)

    def _maps(self, x: Tensor) -> list[Tensor]:
        """Return the compared activations, normalized at each position, times the square root of their head's
        weights."""
        activations = self.activations(x)
        with torch.autocast(x.device.type, enabled=False):
            return [_unit(h) * head.sqrt() for h, head in zip(activations, self.heads, strict=True)]

    def activations(self, x: Tensor) -> list[Tensor]:
        """Return the activations of the compared layers, (B, C, h, w) each, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ImageError: The images are too small, or no images.
        """
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < self.smallest:
            raise ImageError(
                f"LPIPS needs images (B, 3, H, W) of at least {self.smallest} x {self.smallest} pixels, not "
                f"{tuple(x.shape)}."
            )
        activations = []
        with torch.autocast(x.device.type, enabled=False):
            h = (x.to(self.scale.dtype) - self.shift) / self.scale
            for i, layer in enumerate(self.get_submodule(self.network).children()):
                h = layer(h)
                if i in self._compared:
                    activations.append(h)
        return activations


def _unit(h: Tensor) -> Tensor:  # (B, C, h, w)
    # If the squares underflow, vector_norm has a gradient of 0; the root of their sum would have an infinite one.
    length: Tensor = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h / (length + 1e-10)


def _file_key(key: str) -> str:
    """Return a parameter's name in the file: vgg.0.bias -> features.0.bias, heads.2 -> lin2.weight."""
    part, name = key.split(".", 1)
    return f"lin{name}.weight" if part == "heads" else f"features.{name}"


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
