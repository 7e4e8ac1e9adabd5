"""JSON configs of networks and schedules: read, and checked before diffusers and transformers see their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sdkit.diffusion.schedule import BOUNDS
from sdkit.errors import SourceError
from sdkit.loading.tensors import check_regular, unreadable
from sdkit.messages import clean
from sdkit.strict_json import read_object

LEVELS = 32
"""Largest number of entries of a list in a config."""
LAYERS = 1000
"""Largest number of layers of a network that is built."""


def _number(value: Any, low: float = -1e12, high: float = 1e12) -> bool:
    return type(value) in (int, float) and low <= value <= high  # NaN is in no range


def within(key: str) -> Callable[[Any], bool]:
    """Return a function that checks a number in a scheduler's config by the bounds that `NoiseSchedule` sets."""
    low, high = BOUNDS[key]
    return lambda value: _number(value, low, high)


def _whole(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 1_000_000


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LAYERS


def _list_of(fits: Callable[[Any], bool], value: Any) -> bool:
    return isinstance(value, (list, tuple)) and 0 < len(value) <= LEVELS and all(map(fits, value))


def _one_or_list(fits: Callable[[Any], bool], value: Any) -> bool:
    return fits(value) or _list_of(fits, value)


def _word(value: Any) -> bool:
    return isinstance(value, str)


Check = tuple[str, Callable[[Any], bool]]
"""The words for a valid value in messages, and a function that returns whether a value is valid."""


def or_null(check: Check) -> Check:
    """Return a check that accepts null, too."""
    wanted, fits = check
    return f"{wanted} or null", lambda x: x is None or fits(x)


WHOLE: Check = ("a whole number from 1", _whole)
WHOLES: Check = ("a list of whole numbers", lambda x: _list_of(_whole, x))
COUNT: Check = (f"a whole number from 0 to {LAYERS}", _count)
COUNTS: Check = (f"a list of whole numbers from 0 to {LAYERS}", lambda x: _list_of(_count, x))
BLOCKS: Check = (f"a list of at most {LEVELS} words", lambda x: _list_of(_word, x))
WHOLE_OR_LIST: Check = ("a whole number or a list", lambda x: _one_or_list(_whole, x))
COUNT_OR_LIST: Check = (f"a whole number from 0 to {LAYERS} or a list", lambda x: _one_or_list(_count, x))
WORD: Check = ("a word", _word)
WORDS: Check = ("a list of words", lambda x: isinstance(x, (list, tuple)) and all(map(_word, x)))
NUMBER: Check = ("a number", _number)
POSITIVE: Check = ("a number above 0", lambda x: _number(x, 1e-12))
SIZE: Check = ("a whole number, two of them", lambda x: _whole(x) or (_list_of(_whole, x) and len(x) == 2))
NESTED_COUNTS: Check = (
    f"a whole number from 0 to {LAYERS} or a list",
    lambda x: _one_or_list(lambda one: _one_or_list(_count, one), x),
)

GUIDANCE = "_guidance_scale"
"""Key in model_index.json of the guidance scale that suits the model best; diffusers ignores it."""

CONDITION = "_condition"
"""Key in a U-Net's config of what its further input channels hold, one of `CONDITIONS`; diffusers ignores it."""
CONDITIONS = ("latents", "map")
"""Conditions that a U-Net takes beside x_t: the latents of an image (not scaled, the mean of their posterior), or its
colours at the size of the latents."""
LOW_RES = "low_res"
"""The condition of an upsampler: the image to enlarge, small and noisy. It is made of the image itself in training."""
UPSCALE = "_upscale_factor"
"""Key in an upsampler's config of how many times larger its images are than those that it reads; diffusers ignores
it."""
MAP_CHANNELS = 3
"""Channels of a condition of the kind "map" or "low_res"."""

CLASSES = "_classes"
"""Key in a U-Net's config of the names of its classes, in the order of their labels; diffusers ignores it."""
MOST_CLASSES = 100_000
"""Largest number of names of classes in a config."""

INDEX: dict[str, Check] = {GUIDANCE: ("a number from 0 to 100", lambda x: _number(x, 0, 100))}
"""Checks of model_index.json. Those of the other configs are in `sdkit.loading.parts`."""

UNBOUNDED = ("lambda_min_clipped",)
"""Keys that may be infinite: diffusers writes -Infinity in configs of DPM-Solver. sdkit does not use them."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raise SourceError if the file is missing or holds something else."""
    check_regular(path)
    try:
        return read_object(path)
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise SourceError(f"{str(path)!r} {error}; download it again.") from error


def read_config(path: Path, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Read and check a config.

    Args:
        path: The file.
        checks: Key -> the check of its value, as in `Part.checks`.

    Raises:
        SourceError: A value fails its check; a number is NaN or infinite, except for
            `UNBOUNDED`; or the network would have more than 1,000 layers.
    """
    config = read_json(path)
    nested = [config[key] for key in ("text_config", "text_config_dict") if isinstance(config.get(key), dict)]
    for values in [config, *nested]:
        for key, (wanted, fits) in checks.items():
            if key in values and not fits(values[key]):
                raise SourceError(f"{str(path)!r} has {key} {clean(repr(values[key]))}, not {wanted}; correct it.")
        if (asked := layers_of(values, checks)) > LAYERS:
            raise SourceError(f"{str(path)!r} asks for {asked:,} layers; sdkit builds {LAYERS:,} at most; correct it.")
    for key, value in config.items():
        if key not in UNBOUNDED and not _all_finite(value):
            raise SourceError(f"{str(path)!r} has NaN or infinity in {clean(key)!r}; correct it.")
    return config


def class_name(config: dict[str, Any]) -> str:
    """Return the class that a config of diffusers or transformers names."""
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return clean(next((name for name in names if name and isinstance(name, str)), "unknown network"))


def _all_finite(value: Any) -> bool:
    """Return whether all numbers in a JSON value, however deeply nested, are finite."""
    left = [value]
    while left:  # no recursion: JSON may be nested more deeply than Python can recurse
        one = left.pop()
        if isinstance(one, (dict, list)):
            left += one.values() if isinstance(one, dict) else one
        elif isinstance(one, float) and not math.isfinite(one):
            return False
    return True


def layers_of(config: dict[str, Any], checks: Mapping[str, Check]) -> int:
    """Return an upper bound on the number of layers of a network.

    Each layer takes time and memory to build, even without weights, so configs that ask for too many are refused.

    Args:
        config: A config with checked values.
        checks: As in `read_config`. Only checked keys count.
    """
    sizes = {key: config[key] for key in checks if key in config}
    levels = max(len(sizes.get(key) or ()) for key in ("block_out_channels", "down_block_types", "up_block_types"))
    within = _most(sizes.get("transformer_layers_per_block", 1))
    blocks = levels * _most(sizes.get("layers_per_block", 1)) * max(1, within)
    tiny = sum(sum(sizes.get(key) or ()) for key in ("num_encoder_blocks", "num_decoder_blocks"))
    return int(max(blocks, tiny, sizes.get("num_hidden_layers", 0)))


def _most(value: Any) -> int:
    """Return the largest number in nested lists, or the number itself; 0 for null."""
    return max(map(_most, value), default=0) if isinstance(value, (list, tuple)) else int(value or 0)
