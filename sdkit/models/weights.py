"""Files of weights and of configs, opened without executing anything; what is wrong with them told in one sentence."""

from __future__ import annotations

import json
import logging
import pickle
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sdkit.errors import SdkitError, SourceError

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class TensorFile:
    """A file of named tensors: what its header says, and the tensors themselves on demand."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor] | None = None
    """A pickle's, which come all at once; those of a safetensors file are read when they are wanted."""

    @property
    def label(self) -> str:
        """The file as messages name it."""
        return repr(str(self.path))

    def read(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors, as stored."""
        if self.tensors is not None:
            return {key: self.tensors[key] for key in keys}
        with safe_open(self.path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}

    def summary(self, keys: Iterable[str]) -> tuple[int, str | None, int]:
        """How many numbers the named tensors hold, the dtype of most of them, and their size in bytes."""
        count: Counter[str] = Counter()
        for key in keys:
            if not key.endswith("position_ids"):  # a buffer that older files carry along
                count[self.dtypes[key]] += prod(self.shapes[key])
        size = sum(number * BYTES.get(dtype, 1) for dtype, number in count.items())
        return sum(count.values()), max(count, key=count.__getitem__, default=None), size


def open_tensors(path: Path) -> TensorFile:
    """Reads the header of a safetensors file, or a pickle through torch's weights-only loader.

    Raises SourceError for a file that is damaged, empty, of another kind, or a pickle that holds more than tensors.
    """
    if path.suffix not in SUFFIXES:
        raise SourceError(f"{str(path)!r} is not a file of weights; give a {', '.join(SUFFIXES)} file or a folder.")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except (pickle.UnpicklingError, LookupError, AttributeError) as error:
        raise SourceError(
            f"{str(path)!r} is a damaged pickle, or one that holds more than tensors and so could run code; "
            "sdkit executes none: use the model's .safetensors file."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise SourceError(_unreadable(path, error)) from error


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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Only torch's zip format can be mapped into memory; older files are read whole.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    items = content.items() if isinstance(content, dict) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SourceError(f"{str(path)!r} holds no named tensors; give a model's .safetensors file.")
    return TensorFile(
        path=path,
        shapes={key: tuple(value.shape) for key, value in tensors.items()},
        dtypes={key: str(value.dtype).removeprefix("torch.") for key, value in tensors.items()},
        metadata={},
        tensors=tensors,
    )


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, EOFError) and not path.is_file():
        return f"{str(path)!r} cannot be read ({first_line(error)}); check the path."
    if not path.stat().st_size:
        return f"{str(path)!r} is empty; download it again."
    with path.open("rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            return f"{str(path)!r} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`."
    return f"{str(path)!r} is damaged or not a {path.suffix} file ({first_line(error)}); download it again."


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises SourceError where the file is missing or is something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{str(path)!r} does not exist; give a folder that has it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{str(path)!r} is not valid JSON ({first_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise SourceError(f"{str(path)!r} is not a config, for it holds no JSON object; download it again.")
    return content


def check_fit(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any], problem: str) -> None:
    """Raises SourceError(`problem`) for weights that lack a tensor, have one of another shape, or one with no place."""
    for key, found, wanted in sorted(mismatched):
        raise SourceError(f"{problem}: {key} is {_by(found)} instead of {_by(wanted)}.")
    for keys, what in ((sorted(missing), "missing"), (sorted(unexpected), "not part of that network")):
        if keys:
            raise SourceError(f"{problem}: {keys[0]}{f' and {len(keys) - 1} more are' if keys[1:] else ' is'} {what}.")


def _by(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to be quoted inside a sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line.rstrip(".") for line in lines if line), type(error).__name__)


@contextmanager
def guarded(label: str) -> Iterator[None]:
    """Keeps diffusers and transformers quiet for the time of a load, and makes one sentence of what they raise."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (SdkitError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes a library raise
        raise SourceError(f"{label} cannot be loaded: {first_line(error)}.") from error
    finally:
        for library, (verbosity, progress_bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if progress_bar:
                library.enable_progress_bar()
