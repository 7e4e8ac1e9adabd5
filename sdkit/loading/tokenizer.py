"""CLIP's tokenizer. Its files are read and checked here; transformers sees only copies of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdkit.errors import SourceError
from sdkit.loading.configs import read_json
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tensors import guarded, is_file
from sdkit.messages import clean
from sdkit.strict_json import LARGEST

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

VOCABULARY = ASSETS / "clip_tokenizer"
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer.json")
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json")
ADDED = "added_tokens.json"
FILES = (*VOCABULARY_FILES, *SETTINGS_FILES, ADDED)
"""Every small file that transformers reads a CLIP tokenizer from."""

SETTINGS = (
    "additional_special_tokens",
    "extra_special_tokens",
    "added_tokens_decoder",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "clean_up_tokenization_spaces",
    "split_special_tokens",
)
"""Settings that are passed on to transformers, together with every `..._token`. Others may name code or files to load.
"""

LARGEST_ID = 10_000_000
TRIAL = "a photo of a cat, 1234! \N{CAT FACE}" + "".join(map(chr, range(0x20, 0x2000)))
"""A text in many scripts, tokenized once on loading: a damaged tokenizer then fails there, not at the first prompt."""


def has_vocabulary(folder: Path) -> bool:
    """Return whether `folder` holds a tokenizer with a vocabulary of its own."""
    return any(is_file(folder / name) for name in VOCABULARY_FILES)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer in `folder`. If it has no vocabulary of its own, take that of CLIP, which comes with sdkit.

    Raises:
        SourceError: A file is damaged, a special token is missing, or two tokens share an id.
    """
    from transformers import CLIPTokenizer

    label = f"the tokenizer in {clean(folder)!r}"
    vocabulary = folder if has_vocabulary(folder) else VOCABULARY
    settings = {name: _settings(folder / name) for name in SETTINGS_FILES if is_file(folder / name)}
    vocabulary_files = [vocabulary / name for name in VOCABULARY_FILES if is_file(vocabulary / name)]
    added = _ids(folder / ADDED, read_json(folder / ADDED)) if is_file(folder / ADDED) else {}
    for path in vocabulary_files:
        _check_vocabulary(path)
    with guarded(label), tempfile.TemporaryDirectory(prefix="sdkit-") as copies:
        for name, values in (settings | ({ADDED: added} if added else {})).items():
            Path(copies, name).write_text(json.dumps(values), encoding="utf-8")
        for path in vocabulary_files:
            shutil.copyfile(path, Path(copies, path.name))
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(copies, local_files_only=True)
    tokenizer.name_or_path = str(folder)
    for key in ("name_or_path", "vocab_file", "merges_file", "tokenizer_file"):  # these are paths of the deleted copies
        tokenizer.init_kwargs.pop(key, None)
    _check(tokenizer, label, added)
    with guarded(label):
        tokenizer(TRIAL, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return tokenizer


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings in `path` that are passed on to transformers; see `SETTINGS`."""
    found = {key: value for key, value in read_json(path).items() if key in SETTINGS or key.endswith("_token")}
    if found.get("model_max_length", 0) is None:
        del found["model_max_length"]  # null means the default
    if type(length := found.get("model_max_length", 77)) not in (int, float):
        raise SourceError(f"{clean(path)!r} has model_max_length {clean(repr(length))}, not a number; correct it.")
    return found


def _check_vocabulary(path: Path) -> None:
    if path.name == "vocab.json":
        _ids(path, read_json(path))
    if path.name == "tokenizer.json":
        model = read_json(path).get("model")
        if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
            raise SourceError(f"{clean(path)!r} holds no BPE vocabulary, as CLIP's tokenizer has; give another.")
        _ids(path, model["vocab"])
    if path.name == "merges.txt" and path.stat().st_size > LARGEST:
        raise SourceError(f"{clean(path)!r} is larger than {LARGEST // 2**20} MiB; give another.")


def _ids(path: Path, ids: dict[str, Any]) -> dict[str, int]:
    """Check and return the token ids in `path`. Raise SourceError for an invalid id, or one that two tokens share."""
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < LARGEST_ID:
            found = clean(repr(number))
            raise SourceError(f"{clean(path)!r} gives {clean(token)!r} the id {found}; download it again.")
    if len({*ids.values()}) < len(ids):
        number, count = Counter(ids.values()).most_common(1)[0]
        raise SourceError(f"{clean(path)!r} gives {count} tokens the id {number}; download it again.")
    return ids


def _check(tokenizer: CLIPTokenizer, label: str, added: dict[str, int]) -> None:
    for token in ("bos_token", "eos_token", "pad_token"):
        if not isinstance(getattr(tokenizer, f"{token}_id"), int):
            raise SourceError(f"{label} has no {token}; correct its tokenizer_config.json.")
    ids = tokenizer.get_vocab() if added else {}
    for word, number in added.items():
        if ids.get(word) != number:
            raise SourceError(
                f"{label} gives {clean(word)!r} the id {ids.get(word)}, and its {ADDED} {number}; give the files that "
                "belong together."
            )
