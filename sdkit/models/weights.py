"""Files of weights and of configs, opened without executing anything; what is wrong with them told in one sentence."""

from __future__ import annotations

import logging
import os
import pickle
import stat
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sdkit.errors import SdkitError, SourceError
from sdkit.files import open_regular
from sdkit.messages import clean, first_line
from sdkit.strict_json import LARGEST, parse_object

SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


def _number(value: Any, low: float = -1e12, high: float = 1e12) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is in no range


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1_000_000


def _list_of(fits: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(map(fits, value))


def _beta(value: Any) -> bool:
    return _number(value, 0, 1)


GUIDANCE = "_guidance_scale"
"""Where model_index.json says at which guidance scale a model is best drawn; diffusers passes over such a key."""

VALUES: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    "vae": {
        "scaling_factor": ("a number above 0", lambda x: _number(x, 1e-12)),
        "shift_factor": ("a number or null", lambda x: x is None or _number(x)),
        **dict.fromkeys(
            ("block_out_channels", "encoder_block_out_channels"),
            ("a list of whole numbers or null", lambda x: x is None or _list_of(_whole, x)),
        ),
    },
    "unet": {
        "sample_size": (
            "a whole number, two of them or null",
            lambda x: x is None or _whole(x) or (_list_of(_whole, x) and len(x) == 2),
        ),
        "cross_attention_dim": ("a whole number or a list", lambda x: _whole(x) or _list_of(_whole, x)),
    },
    "scheduler": {
        "_class_name": ("a word", lambda x: isinstance(x, str)),
        "num_train_timesteps": ("a whole number from 1", _whole),
        "beta_start": ("a number from 0 to 1", _beta),
        "beta_end": ("a number from 0 to 1", _beta),
        "trained_betas": ("a list of numbers from 0 to 1 or null", lambda x: x is None or _list_of(_beta, x)),
        "clip_sample_range": ("a number above 0", lambda x: _number(x, 1e-12)),
    },
    "index": {GUIDANCE: ("a number from 0 to 100", lambda x: _number(x, 0, 100))},
}
"""Of each part's config: what must be right for the package itself -> how a message puts it, and the check."""


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
    beginning = _read(path, 24)
    if not beginning:
        raise SourceError(f"{str(path)!r} is empty; download it again.")
    if beginning == b"version https://git-lfs.":
        raise SourceError(f"{str(path)!r} is a Git LFS pointer, not the weights; fetch them with `git lfs pull`.")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)
    except (SdkitError, MemoryError):
        raise
    except (pickle.UnpicklingError, LookupError, AttributeError, TypeError) as error:
        raise SourceError(
            f"{str(path)!r} is a damaged pickle, or one that holds more than tensors and so could run code; "
            "sdkit executes none: use the model's .safetensors file."
        ) from error
    except Exception as error:  # whatever damage makes torch or safetensors raise
        kind = f"damaged or not a {path.suffix} file"
        raise SourceError(f"{str(path)!r} is {kind} ({first_line(error)}); download it again.") from error


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
    if isinstance(content, dict) and "string_to_param" in content:  # its tensors lie deeper than a model's
        raise SourceError(f"{str(path)!r} looks like a textual inversion embedding; give a model or a LoRA.")
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


def find(path: Path) -> os.stat_result | None:
    """What is at `path`, None for nothing. Raises SourceError where that cannot be known, as in a folder that is closed
    to this user."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file: no folder, pipe or device. Raises SourceError where that cannot be known."""
    found = find(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def _read(path: Path, size: int) -> bytes:
    """The first `size` bytes of a regular file."""
    if not is_file(path):
        problem = "is not a regular file" if find(path) else "does not exist"
        raise SourceError(f"{str(path)!r} {problem}; give a source that has it.")
    try:
        with open_regular(path) as file:
            return file.read(size)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SourceError:
    reason = error.strerror or first_line(error)
    return SourceError(f"{clean(str(path))!r} cannot be read ({reason}); check the path and its permissions.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises SourceError where the file is missing or is something else."""
    try:
        return parse_object(_read(path, LARGEST))
    except ValueError as error:
        raise SourceError(f"{str(path)!r} {error}; download it again.") from error


def read_config(path: Path, part: str) -> dict[str, Any]:
    """The config of `part` ("vae", "unet", "text", "scheduler"; "index", model_index.json) in `path`.

    Raises SourceError for a value that this package computes with and that is of another type or range; what is wrong
    with others the libraries say.
    """
    config = read_json(path)
    for key, (wanted, fits) in VALUES.get(part, {}).items():
        if key in config and not fits(config[key]):
            raise SourceError(f"{str(path)!r} has {key} {clean(repr(config[key]))}, not {wanted}; correct it.")
    return config


def check_fit(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[Any], problem: str) -> None:
    """Raises SourceError(`problem`) for weights that lack a tensor, have one of another shape, or one with no place."""
    for key, found, wanted in sorted(mismatched):
        raise SourceError(f"{problem}: {clean(key)} is {_by(found)} instead of {_by(wanted)}.")
    for keys, what in ((sorted(missing), "missing"), (sorted(unexpected), "not part of that network")):
        if keys:
            verb = f"and {len(keys) - 1} more are" if keys[1:] else "is"
            raise SourceError(f"{problem}: {clean(keys[0])} {verb} {what}.")


def _by(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape) or "a scalar"


@contextmanager
def guarded(label: str) -> Iterator[None]:
    """Keeps diffusers and transformers quiet for the time of a load, and makes one sentence of what they raise.

    torch's default dtype, which diffusers leaves changed when a load fails, is put back.
    """
    dtype = torch.get_default_dtype()
    try:
        with quiet():
            yield
    except (SdkitError, MemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes a library raise
        raise SourceError(f"{label} cannot be loaded: {first_line(error)}.") from error
    finally:
        torch.set_default_dtype(dtype)


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines, warnings and progress bars of diffusers and transformers inside."""
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
    finally:
        for library, (verbosity, progress_bar) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if progress_bar:
                library.enable_progress_bar()
