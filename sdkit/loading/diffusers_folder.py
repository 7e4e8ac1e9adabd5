"""A model in diffusers layout: the folder of a pipeline or of one component, on disk or on the Hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkit.errors import ArgumentError, SourceError
from sdkit.loading import hub, pixels, tokenizer
from sdkit.loading.configs import class_name, read_config, read_json
from sdkit.loading.parts import PARTS, SCHEDULER, TEXT, Part
from sdkit.loading.place import Place, absent
from sdkit.loading.shards import index_names, open_shards, read_index
from sdkit.loading.single_file import build
from sdkit.loading.tensors import TensorFile, is_file, open_tensors
from sdkit.messages import clean

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# Names of attention layers in diffusers before 0.18 -> today's.
NEW_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OLD_ATTENTION = re.compile(r"\.(?:query|key|value|proj_attn)\.(?=(?:weight|bias)$)")
# Prefixes of the tensors of a whole CLIP model that do not belong to its text encoder.
BESIDE_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
VARIANT = re.compile(r"[\w-]+")


def config_files(part: Part) -> list[str]:
    """Return paths of configs and tokenizer files that a part may need, in a pipeline's repository or in its own."""
    names = [part.config, part.config_path]
    if part is TEXT:
        names += [f"{folder}{name}" for folder in ("", "tokenizer/") for name in tokenizer.FILES]
    return names


def locate(place: Place, part: Part) -> Path:
    """Return the folder with the part's config: a subfolder or the root.

    Raises SourceError if there is no config, or if it names a class that does not fit the part.
    """
    root = place.root(config_files(part))
    for folder in (root / part.folder, root):
        if is_file(folder / part.config):
            name = class_of(read_json(folder / part.config), part)
            if not part.accepts(name):
                raise _wrong(place, name, part)
            return folder
    if other := next((file for file in (root / "config.json", root / SCHEDULER.config) if is_file(file)), None):
        raise _wrong(place, class_name(read_json(other)), part)
    raise absent(place, part.config_path)


def class_of(config: dict[str, Any], part: Part) -> str:
    """Return the class that a config names. If it names none, infer the class from its keys by `part.telling`."""
    if config.get("_class_name") is None and config.get("architectures") is None:
        clip = config.get("model_type") in (None, "clip", "clip_text_model")
        return next((name for key, name in part.telling.items() if key in config and clip), "unknown network")
    return class_name(config)


def _wrong(place: Place, name: str, part: Part) -> SourceError:
    classes = dict.fromkeys(path.split(":")[1] for path in part.classes.values() if path)
    wanted = f" ({' or '.join(classes)})" if classes else ""
    article = "an" if name.lower().startswith(("a", "e", "i", "o", "unknown")) else "a"
    return SourceError(f"{place.label} holds {article} {name}, not {part.noun}{wanted}; give another source.")


def load_network(place: Place, part: Part, dtype: torch.dtype, variant: str | None) -> Any:
    """Load the network of `part`, in eval mode, on the CPU.

    diffusers and transformers build it from the checked config and open no file, so they load nothing unchecked.

    Args:
        place: The source.
        part: The part.
        dtype: The dtype to convert the weights to.
        variant: The variant of the weights, such as "fp16".

    Raises:
        SourceError: The part is missing, damaged, or of another class.
    """
    folder = locate(place, part)
    config = read_config(folder / part.config, part.checks)
    name = class_of(config, part)
    if name == pixels.CLASS:
        return pixels.PixelIdentity().eval()
    if config.get("quantization_config"):
        problem = "is the config of quantized weights (quantization_config)"
        raise SourceError(f"{str(folder / part.config)!r} {problem}; give the model in float16 or float32.")
    weights = _open(_find_weights(place, part, folder, variant))
    return build(
        part,
        config | {"_class_name": name},
        lambda network: _named(part, weights, network),
        dtype,
        file=weights,
        keys=weights.shapes,
        path=folder / part.config,
        label=f"{part.noun} in {str(folder)!r}",
        problem=f"the weights in {weights.label} do not fit the config.json beside them",
    )


def _named(part: Part, weights: TensorFile, network: Any) -> dict[str, torch.Tensor]:
    """Read the tensors, renamed to the network's own names. Of a whole CLIP model, read the text encoder's only."""
    expected = network.state_dict().keys()
    names = {key: key for key in weights.shapes}
    if part is TEXT:
        level = "text_model." if any(key.startswith("text_model.") for key in expected) else ""
        own = [key for key in names if not key.startswith(BESIDE_TEXT) and not key.endswith("position_ids")]
        names = {key: level + key.removeprefix("text_model.") for key in own}
    for key in names:
        renamed = OLD_ATTENTION.sub(lambda match: NEW_ATTENTION[match[0]], key)
        if renamed in expected and renamed not in names:
            names[key] = renamed
    return {names[key]: tensor for key, tensor in weights.read(names).items()}


def _open(path: Path) -> TensorFile:
    return open_shards(path) if path.suffix == ".json" else open_tensors(path)


def open_weights(place: Place, part: Part, folder: Path) -> TensorFile | None:
    """Open the weights of `part` in `folder`, not a variant of them. Return None if they are absent or incomplete."""
    path = _there(folder, _weights_names(part, None))
    if path and path.suffix == ".json" and place.kind == "hub" and not _complete(path):
        return None
    return _open(path) if path else None


def _weights_names(part: Part, variant: str | None) -> list[str]:
    """Return possible file names of the weights: safetensors before pickles, one file before shards."""
    return [
        candidate
        for name in part.weights
        for candidate in (name.replace(".", f".{variant}.", 1) if variant else name, *index_names(name, variant))
    ]


def _there(folder: Path, names: list[str]) -> Path | None:
    return next((folder / name for name in names if is_file(folder / name)), None)


def _complete(index: Path) -> bool:
    return all(is_file(index.parent / shard) for shard in read_index(index))


def _find_weights(place: Place, part: Part, folder: Path, variant: str | None) -> Path:
    """Return the path of the part's weights, or of the index of their shards. No other weights are downloaded.

    If a part lacks the variant but another part has it, the part's plain weights are loaded, as in diffusers.
    """
    if variant is not None and not VARIANT.fullmatch(variant):
        raise ArgumentError(f"variant {clean(repr(variant))} is not one word such as 'fp16'; correct it.")
    inside = f"{part.folder}/" if folder.name == part.folder else ""
    if found := _fetched(place, folder, inside, _weights_names(part, variant)):
        return found
    names = _listed(place, folder.parent if inside else folder)
    elsewhere = variant and any(variant in _variants(names, other, f"{other.folder}/") for other in PARTS.values())
    if elsewhere and (found := _fetched(place, folder, inside, _weights_names(part, None))):
        return found
    wanted = inside + _weights_names(part, variant)[0]
    if others := _variants(names, part, inside):
        held = " and ".join(map(repr, others))
        raise SourceError(f"{place.label} has no {wanted}, but the variant {held}; choose it by variant=.")
    raise absent(place, wanted)


def _fetched(place: Place, folder: Path, inside: str, names: list[str]) -> Path | None:
    """Return the path of the first of `names` that exists. Download it from the Hub; for an index, its shards, too."""
    found = _there(folder, names)
    if place.kind != "hub":
        return found
    if found is None:
        tried = (_there(place.root([inside + name]) / inside, [name]) for name in names)
        found = next(filter(None, tried), None)
    if found and found.suffix == ".json" and not _complete(found):
        place.root([inside + shard for shard in read_index(found)])
        if shard := next((shard for shard in read_index(found) if not is_file(found.parent / shard)), None):
            raise absent(place, inside + shard)
    return found


def _variants(names: list[str], part: Part, inside: str) -> list[str]:
    """Return the variants of a part's weights, such as "fp16", that occur in `names`."""
    found = set()
    for weights in part.weights:
        stem, suffix = map(re.escape, weights.split("."))
        for pattern in (rf"{stem}\.([\w-]+)\.{suffix}", rf"{stem}\.{suffix}\.index\.([\w-]+)\.json"):
            found |= {match[1] for name in names if (match := re.fullmatch(re.escape(inside) + pattern, name))}
    return sorted(found)


def _listed(place: Place, root: Path) -> list[str]:
    """Return the names of a place's files. If the Hub cannot be reached, these are the files in the cache."""
    if place.kind == "hub" and (names := hub.list_files(place.name, place.revision)) is not None:
        return names
    folders = [root, *(root / part.folder for part in PARTS.values())]
    return [path.relative_to(root).as_posix() for folder in folders for path in folder.glob("*")]


def load_place_tokenizer(place: Place) -> CLIPTokenizer:
    """Load the tokenizer of the text encoder of `place`, from the same folder or from ../tokenizer."""
    folder = locate(place, TEXT)
    for candidate in (folder, folder.parent / "tokenizer"):
        if tokenizer.has_vocabulary(candidate):
            return tokenizer.load_tokenizer(candidate)
    raise absent(place, "tokenizer (vocab.json and merges.txt, or tokenizer.json)")
