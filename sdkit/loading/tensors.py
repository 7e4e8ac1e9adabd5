"""Files of weights. Opening one executes no code, and any damage raises a SourceError of one sentence."""

from __future__ import annotations

import os
import pickle
import stat
import threading
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sdkit.errors import SdkitError, SourceError
from sdkit.file_kind import BEGINNING, JSON, LFS, PAGE, PICKLE, SAFETENSORS, ZIP, kind_of
from sdkit.files import open_regular, status
from sdkit.messages import clean, first_line, no_warnings, quiet
from sdkit.stops import stop_in

loading = threading.RLock()
"""Lock that a thread holds while it builds a network or adds layers to one: meanwhile the libraries patch torch."""

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Dtypes that weights may have -> bytes of one number."""
INDICES = ("position_ids", "num_batches_tracked")
EMBEDDING = "string_to_param"
MOST_AXES = 8
"""Largest number of axes of a weight tensor. No layer has more than five; torch computes with at most 64."""
REMEDIES = {
    LFS: "fetch them with `git lfs pull`",
    PAGE: "the site may want a log-in: download the file itself with a browser",
    JSON: "give the folder that it is in, or the file of weights beside it",
}
"""Kind of a file that holds no weights -> what its error tells the user to do."""
SPARE = 2**28
"""A pickle's tensors may take twice the file's size plus this many bytes, since several may view one storage."""


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file of named tensors. Its header is read when it is opened, its tensors on demand.

    Attributes:
        path: The file.
        shapes: Name -> shape.
        dtypes: Name -> dtype, such as "float16".
        metadata: The metadata of a safetensors file, or the name that a pickle of A1111 gives an embedding.
        tensors: The tensors of a pickle, which are read all at once; None for a safetensors file.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor] | None = None

    @property
    def label(self) -> str:
        """The file as messages name it."""
        return repr(str(self.path))

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the named tensors, as stored."""
        if self.tensors is not None:
            return {key: self.tensors[key] for key in keys}
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}

    def summary(self, keys: Iterable[str]) -> tuple[int, str | None, int]:
        """Return the number of parameters in the named tensors, the most common dtype, and their size in bytes."""
        count: Counter[str] = Counter()
        for key in keys:
            if not key.endswith("position_ids"):  # a buffer in older files, not a parameter
                count[self.dtypes[key]] += prod(self.shapes[key])
        size = sum(number * BYTES.get(dtype, 1) for dtype, number in count.items())
        return sum(count.values()), max(count, key=count.__getitem__, default=None), size


def open_tensors(path: Path) -> TensorFile:
    """Open a file of weights: the header of a safetensors file, or a pickle through torch's weights-only loader.

    The first bytes decide which of the two it is; only if they do not tell, the suffix does.

    Raises:
        SourceError: The file is damaged, empty, of another kind, or a pickle that holds more than tensors.
    """
    name = repr(clean(path))
    beginning, suffix = _beginning(path), path.suffix.lower()
    if not beginning:
        raise SourceError(f"{name} is empty; download it again.")
    kind = kind_of(beginning)
    if kind == ZIP and _is_torchs(path):
        kind = PICKLE
    if kind is None and suffix not in SUFFIXES:
        raise SourceError(f"{name} is not a file of weights; give a {', '.join(SUFFIXES)} file or a folder.")
    if kind not in (None, SAFETENSORS, PICKLE):
        remedy = "unpack it, and give the file of weights in it" if kind.endswith("archive") else REMEDIES.get(kind)
        raise SourceError(f"{name} is {kind}, not the weights; {remedy or 'give the file of weights'}.")
    safe = kind == SAFETENSORS or (kind is None and suffix == ".safetensors")
    try:
        opened = _open_safetensors(path) if safe else _open_pickle(path)
        if odd := next((key for key, shape in opened.shapes.items() if len(shape) > MOST_AXES), None):
            raise SourceError(f"{name} is damaged: its {clean(odd)} has over {MOST_AXES} axes; download it again.")
        return opened
    except (SdkitError, MemoryError):
        raise
    except (pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:
        if safe:
            raise _damaged(name, ".safetensors", error) from error
        raise SourceError(
            f"{name} is a damaged pickle, or one that holds more than tensors and so could run code; "
            "sdkit executes none: use the model's .safetensors file."
        ) from error
    except Exception as error:  # damage may make torch or safetensors raise anything
        raise stop_in(error) or _damaged(name, ".safetensors" if safe else ".ckpt", error) from error


def _is_torchs(archive: Path) -> bool:
    """Return whether a zip archive holds FOLDER/data.pkl, as torch writes it, or is truncated (torch then says so)."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return any(name.endswith("/data.pkl") for name in opened.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return True


def _damaged(name: str, kind: str, error: Exception) -> SourceError:
    return SourceError(f"{name} is damaged or not a {kind} file ({first_line(error)}); download it again.")


def _open_safetensors(path: Path) -> TensorFile:
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (safetensors' method, not a dict's)
        return TensorFile(
            path=path,
            shapes={key: tuple(part.get_shape()) for key, part in slices.items()},
            dtypes={key: DTYPES.get(part.get_dtype(), part.get_dtype()) for key, part in slices.items()},
            metadata=file.metadata() or {},
        )


def _open_pickle(path: Path) -> TensorFile:
    misnamed = path.suffix == ".safetensors"  # given the path, torch would read it as safetensors
    with no_warnings(), open_regular(path) as file:
        # Only torch's zip format can be mapped into memory, and only by its path; other files are read as a whole.
        mapped = zipfile.is_zipfile(path) and not misnamed
        content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    tensors = _named_tensors(content, repr(clean(path)), path.stat().st_size)
    name = content.get("name") if isinstance(content, dict) else None
    return TensorFile(
        path=path,
        shapes={key: tuple(value.shape) for key, value in tensors.items()},
        dtypes={key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()},
        metadata={"name": name} if isinstance(name, str) else {},
        tensors=tensors,
    )


def _named_tensors(content: Any, name: str, size: int) -> dict[str, torch.Tensor]:
    """Return the tensors in a pickle's state_dict, in its dict itself, or in the only dict of tensors in that.

    Raise SourceError if there are none, or if they are too large for a file of `size` bytes.
    """
    outer = content if isinstance(content, dict) else {}
    inside = {str(key): _tensors_of(value) for key, value in outer.items() if isinstance(value, dict)}
    inside = {key: tensors for key, tensors in inside.items() if tensors}
    if EMBEDDING in inside:  # A1111's textual inversion: the prefix lets `check_kind` recognise it
        tensors = {f"{EMBEDDING}.{key}": tensor for key, tensor in inside[EMBEDDING].items()}
    elif "state_dict" in inside:
        tensors = inside["state_dict"]
    elif not (tensors := _tensors_of(outer)) and len(inside) == 1:
        (tensors,) = inside.values()
    if not tensors and inside:
        raise SourceError(
            f"{name} holds tensors under {' and '.join(repr(clean(key)) for key in inside)}; give a file with one of "
            "them, or the model's .safetensors file."
        )
    if not tensors:
        raise SourceError(f"{name} holds no named tensors; give a model's .safetensors file.")
    for key, tensor in tensors.items():
        plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            raise SourceError(f"{name} holds {clean(key)}, which is no plain tensor; give a model's .safetensors file.")
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > 2 * size + SPARE:
        raise SourceError(f"{name} is damaged: its tensors are larger than the file; download it again.")
    return tensors


def _tensors_of(content: dict[Any, Any]) -> dict[str, torch.Tensor]:
    return {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}


def check_dtypes(file: TensorFile, keys: Iterable[str]) -> None:
    """Raise SourceError if weights are not floating-point numbers. The buffers in `INDICES` may be integers."""
    for key in keys:
        dtype = file.dtypes[key]
        if dtype not in BYTES and not key.endswith(INDICES):
            raise SourceError(
                f"{file.label} stores {clean(key)} as {clean(dtype)}; give the model with weights in "
                "float32, float16, bfloat16, or float8."
            )


def check_finite(network: nn.Module, file: TensorFile, keys: Iterable[str]) -> None:
    """Raise SourceError if a weight of `network`, loaded from the tensors `keys` of `file`, is not finite."""
    if all(is_finite(tensor) for tensor in network.state_dict().values()):
        return
    for key in keys:
        (tensor,) = file.read([key]).values()
        if not is_finite(tensor):
            raise not_finite(file.label, key)
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    raise SourceError(f"{file.label} has weights that are too large for {dtype}; take dtype 'fp32'.")


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is free of NaN and infinity. Integer tensors always are."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # no aminmax for float8
    # If any value is NaN, minimum and maximum are NaN. No other exact test is nearly as fast.
    return all(bool(end.isfinite()) for end in torch.aminmax(wide))


def not_finite(label: str, key: str) -> SourceError:
    """Return the error for a tensor that holds NaN or infinity."""
    return SourceError(f"{label} is damaged: its {clean(key)} is not finite; download it again.")


def status_or_none(path: Path) -> os.stat_result | None:
    """Return the status of a file or folder, None if it does not exist. Raise SourceError if that cannot be known, as
    in a folder without permission."""
    try:
        return status(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def is_file(path: Path) -> bool:
    """Return whether `path` is a regular file: no folder, pipe, or device. Raise SourceError if that is unknown."""
    found = status_or_none(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def check_regular(path: Path) -> None:
    """Raise SourceError if `path` does not exist or is no regular file."""
    if not is_file(path):
        problem = "is not a regular file" if status_or_none(path) else "does not exist"
        raise SourceError(f"{str(path)!r} {problem}; give a source that has it.")


def _beginning(path: Path) -> bytes:
    check_regular(path)
    try:
        with open_regular(path) as file:
            return file.read(BEGINNING)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> SourceError:
    """Return the error for a file that the system refuses to read."""
    reason = error.strerror or first_line(error)
    return SourceError(f"{clean(path)!r} cannot be read ({reason}); check the path and its permissions.")


def check_fit(found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], problem: str) -> None:
    """Check that weights have the names and shapes of a network.

    Args:
        found: Name -> shape, in the file.
        wanted: Name -> shape, in the network.
        problem: The beginning of the error's sentence.

    Raises:
        SourceError: A tensor is missing, has another shape, or does not belong to the network.
    """
    for key in sorted(found.keys() & wanted.keys()):
        if tuple(found[key]) != tuple(wanted[key]):
            raise SourceError(f"{problem}: {clean(key)} is {_by(found[key])} instead of {_by(wanted[key])}.")
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    for keys, what in ((missing, "missing"), (unexpected, "not part of that network")):
        if keys:
            verb = f"and {len(keys) - 1} more are" if keys[1:] else "is"
            raise SourceError(f"{problem}: {clean(keys[0])} {verb} {what}.")


def _by(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


@contextmanager
def guarded(label: str) -> Iterator[None]:
    """Silence diffusers and transformers during a load, and raise their errors as a SourceError of one sentence.

    Only one thread at a time enters: during a load the libraries patch torch for the whole process.
    """
    try:
        with loading, quiet("diffusers", "transformers"), no_warnings(), _same_default_dtype():
            yield
    except (SdkitError, MemoryError):
        raise
    except Exception as error:  # damage may make a library raise anything
        raise stop_in(error) or SourceError(f"{label} cannot be loaded: {first_line(error)}.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3's BaseException for a panic in Rust
            raise
        raise SourceError(f"{label} cannot be loaded: {first_line(error)}.") from error


@contextmanager
def _same_default_dtype() -> Iterator[None]:
    """Restore torch's default dtype, which a failed load may leave changed."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
