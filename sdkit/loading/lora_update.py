"""The update of one layer's weight that a LoRA file holds: LoRA (also LoCon), LoHa, or LoKr, each with DoRA or without.

`sdkit.loading.lora_file` reads and writes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """LoRA: B A (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1). For a convolution, A is a convolution
    to r channels, and B one of 1 x 1, which is known as LoCon.

    Attributes:
        down: The matrix A, (r, inputs); for a convolution, (r, inputs, k, k).
        up: The matrix B, (outputs, r); for a convolution, (outputs, r, 1, 1).
        mid: Core of a Tucker decomposition of a convolution, (r, r, k, k); `down` is then (r, inputs, 1, 1). None is a
            plain product.
    """

    prefix: ClassVar[str] = "lora_"
    suffix: ClassVar[str] = ".weight"

    down: Tensor
    up: Tensor
    mid: Tensor | None = None

    def __post_init__(self) -> None:
        _check(min(self.down.ndim, self.up.ndim) > 1)
        self._product()

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: outputs, and inputs times the kernel's area."""
        return self._product().shape

    @property
    def kind(self) -> str:
        """The name of this kind of update."""
        kernel = self.down if self.mid is None else self.mid
        return "LoCon" if kernel.ndim == 4 and kernel.shape[2:] != (1, 1) else "LoRA"

    def matrix(self, device: torch.device) -> Tensor:
        """Return the product, float32, of the size `shape`."""
        return self._product().matrix(device)

    def plain(self) -> LowRank:
        """Return the same update as a plain product of two factors, float32."""
        if self.mid is None:
            return LowRank(down=self.down.float(), up=self.up.float())
        down = torch.einsum("nmkl,mq->nqkl", self.mid.float(), self.down.flatten(1).float())
        return LowRank(down=down, up=self.up.float())

    def _product(self) -> _Product:
        up = self.up.flatten(1)
        return _Product(up if self.mid is None else up.T, self.down.flatten(1), self.mid)


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """LoHa: the elementwise product (B1 A1) * (B2 A2) (FedPara, Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098,
    proposition 1). For a convolution, each factor may have a Tucker decomposition (proposition 3).

    Attributes:
        w1_a: (outputs, r); with a core, (r, outputs).
        w1_b: (r, inputs times the kernel's area); with a core, (r, inputs).
        w2_a: Shaped like w1_a.
        w2_b: Shaped like w1_b.
        t1: Core of the first factor, (r, r, k, k), or None.
        t2: Core of the second factor, or None.
    """

    prefix: ClassVar[str] = "hada_"
    suffix: ClassVar[str] = ""
    kind: ClassVar[str] = "LoHa"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    t1: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        _check((self.t1 is None) == (self.t2 is None))
        first, second = self._products()
        _check(first.shape == second.shape)

    @property
    def rank(self) -> int:
        """The rank r of each factor. That of the product is up to r * r."""
        return len(self.w1_b)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: outputs, and inputs times the kernel's area."""
        return self._products()[0].shape

    def matrix(self, device: torch.device) -> Tensor:
        """Return the product, float32, of the size `shape`."""
        first, second = self._products()
        return first.matrix(device) * second.matrix(device)

    def _products(self) -> tuple[_Product, _Product]:
        return _Product(self.w1_a, self.w1_b, self.t1), _Product(self.w2_a, self.w2_b, self.t2)


@dataclass(frozen=True, kw_only=True)
class Kronecker:
    """LoKr: the Kronecker product of W1 and W2 (Yeh et al. 2023, https://arxiv.org/abs/2309.14859, section 3.3; KronA,
    Edalati et al. 2022, https://arxiv.org/abs/2212.10650). Each is a matrix or a product of low rank.

    Attributes:
        w1: W1, (a, c), where a and c divide the outputs and the inputs; None where it is `w1_a` times `w1_b`.
        w1_a: (a, r), or None.
        w1_b: (r, c), or None.
        w2: W2, (outputs / a, inputs / c), for a convolution (outputs / a, inputs / c, k, k); None as for `w1`.
        w2_a: (outputs / a, r); with a core, (r, outputs / a); or None.
        w2_b: (r, inputs / c times the kernel's area); with a core, (r, inputs / c); or None.
        t2: Core of a Tucker decomposition of W2, (r, r, k, k), or None.
    """

    prefix: ClassVar[str] = "lokr_"
    suffix: ClassVar[str] = ""
    kind: ClassVar[str] = "LoKr"

    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None

    def __post_init__(self) -> None:
        first, _ = self._products()
        _check(self.w1 is None or self.w1.ndim == 2)
        _check(min(first.shape) > 0)

    @property
    def rank(self) -> int | None:
        """The rank r; None if both matrices are whole, and then there is none to divide alpha by."""
        low = self.w2_b if self.w2_b is not None else self.w1_b
        return None if low is None else len(low)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix: outputs, and inputs times the kernel's area."""
        (a, c), (b, d) = (factor.shape for factor in self._products())
        return a * b, c * d

    def matrix(self, device: torch.device) -> Tensor:
        """Return the product, float32, of the size `shape`."""
        first, second = self._products()
        return torch.kron(first.matrix(device), second.matrix(device))

    def _products(self) -> tuple[_Product | _Whole, _Product | _Whole]:
        return _factor(self.w1, self.w1_a, self.w1_b, None), _factor(self.w2, self.w2_a, self.w2_b, self.t2)


Factors: TypeAlias = LowRank | Hadamard | Kronecker


def factors_of(tensors: Mapping[str, Tensor]) -> Factors:
    """Return the factors of an update from tensors under kohya's names, without ".weight": "lora_down", "hada_w1_a".

    Raises:
        ValueError: The tensors are of two kinds, incomplete, or do not fit each other.
    """
    for kind in (LowRank, Hadamard, Kronecker):
        own = {name.removeprefix(kind.prefix): x for name, x in tensors.items() if name.startswith(kind.prefix)}
        if own:
            required = {field.name for field in fields(kind) if field.default is MISSING}
            _check(len(own) == len(tensors) and required <= own.keys())
            return kind(**own)
    raise ValueError("no factors")


@dataclass(frozen=True, kw_only=True)
class Update:
    """The update of one layer's weight W.

    Without a magnitude, it is dW = alpha / r times the product of the factors. With one (DoRA, Liu et al. 2024,
    https://arxiv.org/abs/2402.09353, equation 5), it is m (W + dW) / ||W + dW|| - W.

    Attributes:
        factors: The factors.
        alpha: The numerator of the scaling factor alpha / r; of factors without a rank, the factor itself.
        magnitude: DoRA's m, of a shape that broadcasts with W: one number for each output, (outputs, 1) or
            (outputs, 1, 1, 1), as peft does and LyCORIS today; or one for each input, (1, inputs) or
            (1, inputs, 1, 1), as in the paper. None is no DoRA.
    """

    factors: Factors
    alpha: float
    magnitude: Tensor | None = None

    @property
    def scale(self) -> float:
        """The scaling factor alpha / r."""
        return self.alpha / (self.factors.rank or 1)

    @property
    def kind(self) -> str:
        """The name of this kind of update, such as "LoHa with DoRA"."""
        return self.factors.kind if self.magnitude is None else f"{self.factors.kind} with DoRA"

    def magnitudes(self) -> tuple[int, int]:
        """Return the axis of W along which there is one magnitude each, and their number; (0, outputs) without DoRA."""
        if self.magnitude is None:
            return 0, self.factors.shape[0]
        n = self.magnitude.numel()
        return (0 if len(self.magnitude) == n else 1), n

    def delta(self, weight: Tensor) -> Tensor:
        """Return what is added to `weight` at scale 1, float32, in its shape and on its device."""
        delta = self.scale * self.factors.matrix(weight.device).reshape(weight.shape)
        if self.magnitude is None:
            return delta
        axis, _ = self.magnitudes()
        merged = weight.float() + delta
        dims = [i for i in range(merged.ndim) if i != axis]
        norm = torch.linalg.vector_norm(merged, dim=dims, keepdim=True)
        magnitude = self.magnitude.to(weight.device, torch.float32).reshape(norm.shape)
        normed: Tensor = magnitude * merged / norm.clamp_min(torch.finfo(torch.float32).tiny)
        return normed - weight.float()

    def named(self) -> dict[str, Tensor]:
        """Return the tensors as kohya's layout names them, after the layer's name."""
        kind = self.factors
        values = {field.name: getattr(kind, field.name) for field in fields(kind)}
        if (
            isinstance(kind, Kronecker) and kind.rank is None and kind.w1 is not None
        ):  # this layout has no factor for it
            values["w1"] = kind.w1 if self.alpha == 1 else kind.w1.float() * self.alpha
        named = {f"{kind.prefix}{name}{kind.suffix}": x for name, x in values.items() if x is not None}
        if kind.rank is not None:
            named["alpha"] = _alpha_tensor(self.alpha, next(iter(named.values())).dtype)
        return named if self.magnitude is None else named | {"dora_scale": self.magnitude}


def _alpha_tensor(alpha: float, dtype: torch.dtype) -> Tensor:
    """Return alpha as a tensor, in float32 if the dtype of the factors would round it or overflow."""
    tensor = torch.tensor(alpha, dtype=dtype)
    return tensor if float(tensor) == alpha else torch.tensor(alpha, dtype=torch.float32)


def _check(fits: bool) -> None:
    if not fits:
        raise ValueError("the tensors do not fit")


@dataclass(frozen=True)
class _Product:
    """A matrix (outputs, inputs times the kernel's area) of low rank. Raises ValueError if its tensors do not fit.

    Attributes:
        a: (outputs, r); with a core, (r, outputs).
        b: (r, inputs times the kernel's area); with a core, (r, inputs).
        core: Core of a Tucker decomposition, (r, r, k, k), or None.
    """

    a: Tensor
    b: Tensor
    core: Tensor | None

    def __post_init__(self) -> None:
        a, b, core = self.a, self.b, self.core
        _check(a.ndim == b.ndim == 2 and a.numel() > 0 and b.numel() > 0)
        if core is None:
            _check(a.shape[1] == len(b))
        else:
            _check(core.ndim == 4 and core.numel() > 0 and core.shape[:2] == (len(a), len(b)))

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        if self.core is None:
            return len(self.a), self.b.shape[1]
        return self.a.shape[1], self.b.shape[1] * self.core[0, 0].numel()

    def matrix(self, device: torch.device) -> Tensor:
        """Return the matrix, float32."""
        a, b = (x.to(device, torch.float32) for x in (self.a, self.b))
        if self.core is None:
            return a @ b
        core = self.core.to(device, torch.float32)
        return torch.einsum("nmkl,np,mq->pqkl", core, a, b).flatten(1)


@dataclass(frozen=True)
class _Whole:
    """A matrix that is stored as it is, with the axes of a kernel as its last ones."""

    tensor: Tensor

    def __post_init__(self) -> None:
        _check(self.tensor.ndim > 1 and self.tensor.numel() > 0)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix."""
        return len(self.tensor), self.tensor[0].numel()

    def matrix(self, device: torch.device) -> Tensor:
        """Return the matrix, float32."""
        return self.tensor.to(device, torch.float32).flatten(1)


def _factor(whole: Tensor | None, a: Tensor | None, b: Tensor | None, core: Tensor | None) -> _Product | _Whole:
    """Return a factor of a Kronecker product, which is either whole or of low rank."""
    if whole is not None:
        _check(a is None and b is None and core is None)
        return _Whole(whole)
    if a is None or b is None:
        raise ValueError("a factor is missing")
    return _Product(a, b, core)
