"""Networks in transformers' own layout, in a folder or on the Hub, and CLIPs made from a config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkit.errors import SourceError
from sdkit.files import expanded
from sdkit.loading import hub, tokenizer
from sdkit.loading.configs import COUNT, WHOLE, WORD, Check, read_json
from sdkit.loading.place import EMBEDDED, KINDS, Place, absent, resolve
from sdkit.loading.single_file import ASSETS, LARGEST
from sdkit.loading.tensors import guarded, is_file
from sdkit.messages import clean

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SIZES: Mapping[str, Check] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim"), WHOLE),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "image_size", "patch_size", "num_channels"), WHOLE),
    "num_hidden_layers": COUNT,
    "hidden_act": WORD,
}
"""Keys in the config of a CLIP from which a network is made -> their checks. Other keys are not passed on."""
SMALL = 2**24
"""Parameters that a network may have whatever the size of its file of weights; they take 64 MiB."""
LEGACY_END = 2
"""Id of the end token in configs of CLIP from before transformers 4.31. It is wrong: their tokenizers' is the last."""

EMBEDDED_CLIP = ASSETS / "emoji_clip"


def clip_source(source: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Return the folder of the embedded CLIP for "emoji", and other sources unchanged."""
    return EMBEDDED_CLIP if source == EMBEDDED else source  # only as a string: Path("emoji") is a path


def pretrained(cls: Any, source: str | os.PathLike[str], kind: str, revision: str | None = None) -> Any:
    """Load a network of transformers, in eval mode, frozen, in float32, on the CPU.

    Args:
        cls: Its class.
        source: A folder or a Hub id.
        kind: The `model_type` that its config must name.
        revision: Branch, tag, or commit of a Hub repository.

    Raises:
        SourceError: The network is missing, damaged, incomplete, or of another kind.
        ArgumentError: `source` is no Hub id, and `revision` is given.
    """
    place = resolve(source, revision=revision)
    root = root_of(place, ["config.json"])
    if not is_file(root / "config.json"):
        raise absent(place, "config.json")
    config = read_json(root / "config.json")
    if (found := config.get("model_type")) != kind:
        raise SourceError(f"{place.label} holds a network of type {clean(found)}, not {kind}; give another source.")
    for sizes in (config, *(value for value in config.values() if isinstance(value, dict))):
        _sizes(sizes, root / "config.json")
    weights = _weights(place)
    with guarded(place.label):
        # Before memory is taken: a damaged config may ask for any amount of it.
        with torch.device("meta"):
            count = sum(p.numel() for p in cls(cls.config_class.from_dict(config)).parameters())
        held = sum(path.stat().st_size for path in weights.iterdir() if path.suffix in (".safetensors", ".bin"))
        if count > max(held, SMALL):  # a weight takes a byte or more
            raise SourceError(
                f"the config of {place.label} asks for {count:,} parameters, more than the weights beside it hold; "
                "download it again."
            )
        network, report = cls.from_pretrained(
            weights, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    if missing := sorted(report["missing_keys"]):
        raise SourceError(f"{place.label} lacks {clean(missing[0])} and so is no whole {kind}; download it again.")
    return network.eval().requires_grad_(False)


def own_tokenizer(source: str | os.PathLike[str], revision: str | None = None) -> CLIPTokenizer:
    """Load the tokenizer in the same folder or Hub repository as a network; CLIP's, if there is none."""
    return tokenizer.load_tokenizer(root_of(resolve(source, revision=revision), ["config.json", *tokenizer.FILES]))


def root_of(place: Place, files: list[str]) -> Path:
    """Return the folder of a network; from the Hub, first download `files`. Raises SourceError for other sources."""
    if place.kind not in ("folder", "hub"):
        raise SourceError(
            f"{place.label} is {KINDS[place.kind]}; give a folder or a Hub id of a network in transformers' layout."
        )
    return place.root(files)


def clip_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the config of a CLIP to make.

    Args:
        path: A config.json of transformers' CLIPModel, or a folder with one.

    Returns:
        The sizes, with those of both encoders under "text_config" and "vision_config".

    Raises:
        SourceError: There is no config, or it is damaged, or of another network.
    """
    given = expanded(path)
    file = next((one for one in (given, given / "config.json") if is_file(one)), None)
    if file is None:
        raise SourceError(
            f"there is no config at {clean(given)!r}; give a config.json of transformers' CLIPModel, or a folder with "
            "one."
        )
    config = read_json(file)
    if config.get("model_type", "clip") != "clip" or not isinstance(config.get("text_config"), dict):
        found = clean(config.get("model_type") or config.get("_class_name") or "unknown type")
        raise SourceError(f"{clean(file)!r} is the config of a network of type {found}, not of a CLIP; give another.")
    if not isinstance(config.get("vision_config"), dict):
        raise SourceError(f"{clean(file)!r} has no vision_config, and a CLIP has one; correct it.")
    sizes: dict[str, Any] = _sizes(config, file)
    for name in ("text_config", "vision_config"):
        sizes[name] = _sizes(config[name], file)
    return sizes


def _sizes(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return the values of `SIZES` in a config. Raise SourceError for one that fails its check."""
    for key, (wanted, fits) in SIZES.items():
        if key in config and not fits(config[key]):
            raise SourceError(f"{clean(file)!r} has {key} {clean(repr(config[key]))}, not {wanted}; correct it.")
    return {key: config[key] for key in SIZES if key in config}


def new_clip(config: Mapping[str, Any], words: CLIPTokenizer) -> Any:
    """Return a CLIP with random weights, in training mode, on the CPU.

    Args:
        config: Its sizes, from `clip_config`.
        words: Its tokenizer, whose special tokens it is made for.

    Raises:
        SourceError: No network can have these sizes, or it would be too large, or it cannot use this tokenizer.
    """
    from transformers import CLIPConfig, CLIPModel

    if words.eos_token_id == LEGACY_END:
        raise SourceError(
            f"the end token of this tokenizer has id {LEGACY_END}, and for that id transformers embeds a text by its "
            "token with the largest id instead; give another tokenizer."
        )

    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with guarded("the config of this CLIP"):
        made = CLIPConfig(
            **{**config, "text_config": {**config["text_config"], **special}}  # the encoder looks for the end token
        )
        with torch.device("meta"):
            count = sum(p.numel() for p in CLIPModel(made).parameters())
    if count > LARGEST:
        raise SourceError(
            f"this CLIP would have {count:,} parameters, sdkit builds at most {LARGEST:,}; correct its config."
        )
    with guarded("the config of this CLIP"):
        return CLIPModel(made).train()


def _weights(place: Place) -> Path:
    """Return the folder that holds the weights; of a Hub repository, fetch its safetensors, or else its pickle."""
    names = hub.list_files(place.name, place.revision) if place.kind == "hub" else None
    single = "model.safetensors" if names is None or "model.safetensors" in names else "pytorch_model.bin"
    patterns = ["config.json", "model.safetensors.index.json", "model-*.safetensors", single]
    return root_of(place, patterns)
