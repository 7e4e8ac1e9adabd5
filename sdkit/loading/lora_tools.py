"""LoRA files described, and joined into one."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdkit.arguments import number
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.lora_file import LoRA, check_lora_name, read_lora, write_lora
from sdkit.loading.lora_update import LowRank, Update
from sdkit.loading.tensors import is_finite
from sdkit.messages import clean
from sdkit.strict_json import parse_object

TRIGGERS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
"""Metadata that name the words which a LoRA was trained to follow; the first that is there counts."""
NAMES = ("modelspec.title", "ss_output_name")
BASES = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
TAGS = "ss_tag_frequency"
MERGED_FROM = "modelspec.merged_from"
"""Metadata that name the files which a LoRA was joined of, each with its scale."""
SHOWN_TAGS = 20

BLOCK = re.compile(r"(?:[a-z]+_)?(?:blocks|layers|attentions|resnets|downsamplers|upsamplers)_\d+_|mid_block_")
"""Matches a step of the path to a layer, in a name with underscores for dots."""


@dataclass(frozen=True, kw_only=True)
class LoRADescription:
    """Description of a LoRA file.

    Attributes:
        path: The file.
        kinds: Kinds of its updates: "LoRA", "LoCon" (convolutions), "LoHa", or "LoKr", with " with DoRA" or without.
        layers: "U-Net" and "text encoder" -> the number of layers that it changes.
        ranks: Its ranks in ascending order. A LoKr of whole matrices has none.
        alphas: Its alphas in ascending order, for the factor alpha / rank; that of a rank-stabilised LoRA is times the
            square root of the rank.
        targets: Layers that it changes, without the path of blocks -> how often.
        dtype: The most common dtype of its factors.
        parameters: Number of parameters.
        title: Its name by its metadata, or None.
        base: What its metadata say of the model that it was trained on, or None.
        trigger: Words by its metadata that the prompt needs, or None.
        tags: The most frequent tags of its training captions by its metadata, and how often each occurred.
        merged_from: The files that it was joined of by its metadata, each with its scale, or None.
    """

    path: str
    kinds: tuple[str, ...]
    layers: dict[str, int]
    ranks: tuple[int, ...]
    alphas: tuple[float, ...]
    targets: dict[str, int]
    dtype: str
    parameters: int
    title: str | None
    base: str | None
    trigger: str | None
    tags: dict[str, int]
    merged_from: str | None


def describe_lora(source: str | os.PathLike[str], *, filename: str | None = None) -> LoRADescription:
    """Describe a LoRA file: kind, rank, alpha, layers, and what its metadata say.

    Args:
        source: A file, a folder, or a Hub id; see `read_lora`.
        filename: The file in a folder or Hub repository; see `read_lora`.

    Raises:
        SourceError: As in `read_lora`.
    """
    lora = read_lora(source, filename=filename)
    ranks = {rank for update in lora.updates if (rank := update.factors.rank) is not None}
    tensors = [tensor for update in lora.updates for name, tensor in update.named().items() if name != "alpha"]
    targets = Counter(BLOCK.sub("", name) for layers in (lora.unet, lora.text_encoder) for name in layers)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    return LoRADescription(
        path=str(lora.path),
        kinds=tuple(sorted({update.kind for update in lora.updates})),
        layers={"U-Net": len(lora.unet), "text encoder": len(lora.text_encoder)},
        ranks=tuple(sorted(ranks)),
        alphas=tuple(sorted({round(update.alpha, 6) for update in lora.updates})),
        targets=dict(sorted(targets.items())),
        dtype=max(dtypes, key=dtypes.__getitem__),
        parameters=sum(tensor.numel() for tensor in tensors),
        title=_first(lora, NAMES),
        base=_listed(lora.metadata.get(key) for key in BASES),
        trigger=_first(lora, TRIGGERS),
        tags=dict(_tags(lora).most_common(SHOWN_TAGS)),
        merged_from=lora.metadata.get(MERGED_FROM) or None,
    )


def _first(lora: LoRA, keys: Iterable[str]) -> str | None:
    """Return the first of these metadata that is not empty, or None."""
    return next((lora.metadata[key] for key in keys if lora.metadata.get(key)), None)


def _listed(texts: Iterable[str | None]) -> str | None:
    """Return the items of comma-separated lists as one list, each once; None if there are none."""
    items = (item.strip() for text in texts if text for item in text.split(","))
    return ", ".join(dict.fromkeys(item for item in items if item)) or None


def _tags(lora: LoRA) -> Counter[str]:
    """Return how often each tag occurs, from kohya's JSON: folder -> tag -> count.

    Damaged metadata have none: a LoRA can be used without.
    """
    counts: Counter[str] = Counter()
    try:
        folders = parse_object(lora.metadata.get(TAGS, "{}"))
    except ValueError:
        return counts
    for tags in folders.values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(count, int) and tag.strip():
                counts[tag.strip()] += count
    return counts


def join_loras(loras: Sequence[tuple[LoRA, float]], path: str | Path) -> None:
    """Write several LoRAs, each times its scale, as one file in kohya's layout. It does what they do together.

    The factors of each layer are concatenated along the rank, which is exact: s1 B1 A1 + s2 B2 A2 is [s1 B1, s2 B2]
    times [A1; A2]. The scales and alphas go into B, so that alpha is the rank. The metadata name the files and their
    scales, the trigger words, base models, and training tags of all. Other metadata describe one training, and are
    dropped.

    Args:
        loras: LoRAs and their scales.
        path: The file, ending in .safetensors.

    Raises:
        ArgumentError: There is no LoRA, a scale is not finite, or the name cannot be used.
        SourceError: The LoRAs were made for different models, or one is a LoHa, a LoKr, or a DoRA, whose update is no
            product of two factors; or a factor would overflow.
    """
    check_lora_name(path)
    if not loras:
        raise ArgumentError("there is no LoRA to join; give at least one.")
    for _, scale in loras:
        number("scale", scale)
    joined: dict[str, dict[str, Update]] = {"unet": {}, "text_encoder": {}}
    for part, layers in joined.items():
        own = [(lora.label, scale, getattr(lora, part)) for lora, scale in loras]
        for name in dict.fromkeys(name for _, _, updates in own for name in updates):
            terms = [(label, scale, updates[name]) for label, scale, updates in own if name in updates]
            layers[name] = _joined(name, terms)
    label = " and ".join(lora.label for lora, _ in loras)
    metadata = _joined_metadata(loras)
    write_lora(LoRA(label=label, unet=joined["unet"], text_encoder=joined["text_encoder"], metadata=metadata), path)


def _joined_metadata(loras: Sequence[tuple[LoRA, float]]) -> dict[str, str]:
    """Return the metadata of LoRAs that are joined with these scales."""
    each = [lora for lora, _ in loras]
    tags = sum((_tags(lora) for lora in each), Counter[str]())
    own = {
        MERGED_FROM: ", ".join(f"{_file_name(lora)} ({scale:g})" for lora, scale in loras),
        NAMES[0]: " + ".join(_first(lora, NAMES) or lora.name for lora in each),
        TRIGGERS[0]: _listed(_first(lora, TRIGGERS) for lora in each),
        TAGS: json.dumps({"merged": dict(tags.most_common())}, ensure_ascii=False) if tags else None,
    }
    own |= {key: _listed(lora.metadata.get(key) for lora in each) for key in BASES}
    return {key: value for key, value in own.items() if value}


def _file_name(lora: LoRA) -> str:
    """Return the name of a LoRA's file; its short name, if that is the usual one or if it has no file."""
    return lora.name if lora.path is None or lora.path.stem != lora.name else lora.path.name


def _joined(name: str, terms: Sequence[tuple[str, float, Update]]) -> Update:
    """Return the sum of the updates of a layer, each with the label of its LoRA and its scale."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    first, _, expected = terms[0]
    for label, scale, update in terms:
        factors = update.factors
        if not isinstance(factors, LowRank) or update.magnitude is not None:
            raise SourceError(
                f"{label} is a {update.kind} at {clean(name)}, which cannot be joined exactly with others into one "
                "LoRA; merge it into a model instead."
            )
        if factors.shape != expected.factors.shape:
            sizes = [" x ".join(map(str, one.factors.shape)) for one in (update, expected)]
            raise SourceError(
                f"{label} and {first} were made for different models: at {clean(name)} they are {sizes[0]} and "
                f"{sizes[1]}; give LoRAs of one model."
            )
        plain = factors.plain()
        up = scale * update.scale * plain.up
        if not is_finite(up):
            raise SourceError(f"{label} at scale {scale:g} would make {clean(name)} infinite; give a smaller scale.")
        downs.append(plain.down)
        ups.append(up)
    # The factors of a 1 x 1 convolution may have the shape of a linear layer's.
    kernel = max((down.shape[2:] for down in downs), key=len)
    down = torch.cat([down.reshape(len(down), -1, *kernel) for down in downs])
    up = torch.cat([up.flatten(1) for up in ups], dim=1).reshape(len(ups[0]), -1, *[1] * len(kernel))
    return Update(factors=LowRank(down=down, up=up.contiguous()), alpha=float(len(down)))
