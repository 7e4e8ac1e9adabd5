"""JSON configs of networks and schedules: read, and checked before diffusers and transformers see their values."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdkit.diffusion.schedule import BOUNDS, LONGEST_CHAIN
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


def _within(key: str) -> Callable[[Any], bool]:
    """Return the check of a number in a scheduler's config, by the bounds that `NoiseSchedule` sets."""
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


def _or_null(check: Check) -> Check:
    wanted, fits = check
    return f"{wanted} or null", lambda x: x is None or fits(x)


WHOLE: Check = ("a whole number from 1", _whole)
WHOLES: Check = ("a list of whole numbers", lambda x: _list_of(_whole, x))
COUNT: Check = (f"a whole number from 0 to {LAYERS}", _count)
COUNTS: Check = (f"a list of whole numbers from 0 to {LAYERS}", lambda x: _list_of(_count, x))
BLOCKS: Check = (f"a list of at most {LEVELS} words", lambda x: _list_of(_word, x))
WHOLE_OR_LIST: Check = ("a whole number or a list", lambda x: _one_or_list(_whole, x))
COUNT_OR_LIST: Check = (f"a whole number from 0 to {LAYERS} or a list", lambda x: _one_or_list(_count, x))
NESTED_COUNTS: Check = (
    f"a whole number from 0 to {LAYERS} or a list",
    lambda x: _one_or_list(lambda one: _one_or_list(_count, one), x),
)

GUIDANCE = "_guidance_scale"
"""Key in model_index.json of the guidance scale that suits the model best; diffusers ignores it."""

VALUES: dict[str, dict[str, Check]] = {
    "vae": {
        "scaling_factor": ("a number above 0", lambda x: _number(x, 1e-12)),
        "shift_factor": ("a number or null", lambda x: x is None or _number(x)),
        **dict.fromkeys(("block_out_channels", "encoder_block_out_channels"), _or_null(WHOLES)),
        "decoder_block_out_channels": WHOLES,
        **dict.fromkeys(("vq_embed_dim", "norm_num_groups"), _or_null(WHOLE)),
        **dict.fromkeys(("in_channels", "out_channels", "latent_channels", "num_vq_embeddings"), WHOLE),
        **dict.fromkeys(("down_block_types", "up_block_types"), BLOCKS),
        "layers_per_block": COUNT,
        **dict.fromkeys(("num_encoder_blocks", "num_decoder_blocks"), COUNTS),
        "upsampling_scaling_factor": WHOLE,
    },
    "unet": {
        "sample_size": (
            "a whole number, two of them or null",
            lambda x: x is None or _whole(x) or (_list_of(_whole, x) and len(x) == 2),
        ),
        "cross_attention_dim": WHOLE_OR_LIST,
        "block_out_channels": WHOLES,
        **dict.fromkeys(("in_channels", "out_channels", "conv_in_kernel", "conv_out_kernel"), WHOLE),
        **dict.fromkeys(("down_block_types", "up_block_types"), BLOCKS),
        "layers_per_block": COUNT_OR_LIST,
        **dict.fromkeys(
            ("transformer_layers_per_block", "reverse_transformer_layers_per_block"), _or_null(NESTED_COUNTS)
        ),
        **dict.fromkeys(("attention_head_dim", "num_attention_heads"), _or_null(WHOLE_OR_LIST)),
        **dict.fromkeys(
            (
                "norm_num_groups",
                "time_cond_proj_dim",
                "time_embedding_dim",
                "encoder_hid_dim",
                "num_class_embeds",
                "addition_time_embed_dim",
                "projection_class_embeddings_input_dim",
            ),
            _or_null(WHOLE),
        ),
    },
    "text": {
        **dict.fromkeys(
            (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_attention_heads",
                "max_position_embeddings",
            ),
            WHOLE,
        ),
        "num_hidden_layers": COUNT,
        "hidden_act": ("a word", _word),
    },
    "scheduler": {
        "_class_name": ("a word", _word),
        "num_train_timesteps": ("a whole number from 1", lambda x: type(x) is int and 1 <= x <= LONGEST_CHAIN),
        "beta_start": ("a number from 0 to 1", _within("beta_start")),
        "beta_end": ("a number from 0 to 1", _within("beta_end")),
        "trained_betas": (
            "a list of numbers from 0 to 1 or null",
            lambda x: x is None or (isinstance(x, list) and x != [] and all(map(_within("trained_betas"), x))),
        ),
        "clip_sample_range": ("a number above 0", _within("clip_sample_range")),
    },
    "index": {GUIDANCE: ("a number from 0 to 100", lambda x: _number(x, 0, 100))},
}
"""Part -> key -> what messages call a valid value, and the check. The keys are those that set the size of a network and
those that sdkit itself computes with. The libraries check the others."""

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


def read_config(path: Path, part: str) -> dict[str, Any]:
    """Read and check a config.

    Args:
        path: The file.
        part: "vae", "unet", "text", "scheduler", or "index" (model_index.json).

    Raises:
        SourceError: A value has a type or range that `VALUES` excludes; a number is NaN or infinite, except for
            `UNBOUNDED`; or the network would have more than 1,000 layers.
    """
    config = read_json(path)
    nested = [config[key] for key in ("text_config", "text_config_dict") if isinstance(config.get(key), dict)]
    for values in [config, *nested]:
        for key, (wanted, fits) in VALUES.get(part, {}).items():
            if key in values and not fits(values[key]):
                raise SourceError(f"{str(path)!r} has {key} {clean(repr(values[key]))}, not {wanted}; correct it.")
        if (asked := layers_of(values, part)) > LAYERS:
            raise SourceError(f"{str(path)!r} asks for {asked:,} layers; sdkit builds {LAYERS:,} at most; correct it.")
    for key, value in config.items():
        if key not in UNBOUNDED and not _all_finite(value):
            raise SourceError(f"{str(path)!r} has NaN or infinity in {clean(key)!r}; correct it.")
    return config


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


def layers_of(config: dict[str, Any], part: str) -> int:
    """Return an upper bound on the number of layers of a network.

    Each layer takes time and memory to build, even without weights, so configs that ask for too many are refused.

    Args:
        config: A config with checked values.
        part: As in `read_config`.
    """
    sizes = {key: config[key] for key in VALUES.get(part, {}) if key in config}
    levels = max(len(sizes.get(key) or ()) for key in ("block_out_channels", "down_block_types", "up_block_types"))
    within = _most(sizes.get("transformer_layers_per_block", 1))
    blocks = levels * _most(sizes.get("layers_per_block", 1)) * max(1, within)
    tiny = sum(sum(sizes.get(key) or ()) for key in ("num_encoder_blocks", "num_decoder_blocks"))
    return int(max(blocks, tiny, sizes.get("num_hidden_layers", 0)))


def _most(value: Any) -> int:
    """Return the largest number in nested lists, or the number itself; 0 for null."""
    return max(map(_most, value), default=0) if isinstance(value, (list, tuple)) else int(value or 0)
