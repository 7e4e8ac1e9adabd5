"""Tokenizers must agree with transformers', and damaged or hostile ones be reported in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTextModel, CLIPTokenizer

from sdkit.errors import SourceError
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tokenizer import TRIAL, load_tokenizer
from sdkit.networks.text_encoder import TextEncoder
from tests.helpers.loaders import load_text

EMOJI = ASSETS / "emoji"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(EMOJI, tmp_path / "model"))


def old_layout(folder: Path) -> Path:
    """Rewrite the vocabulary as vocab.json and merges.txt in place of tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


def with_words(model: Path, *words: str) -> None:
    """Add trained words to the text encoder, and name them in the format of transformers before 4.34."""
    text = CLIPTextModel.from_pretrained(model / "text_encoder")
    text.resize_token_embeddings(2048 + len(words))
    text.save_pretrained(model / "text_encoder")
    write(model / "tokenizer" / "added_tokens.json", {word: 2048 + i for i, word in enumerate(words)})


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_tokens_are_those_of_transformers(model: Path, old: bool, added: bool) -> None:
    folder = model / "tokenizer"
    if old:
        old_layout(folder)
    if added:
        with_words(model, "<cat-toy>", "<dog>")
        lenient = {"content": "<|endoftext|>", "lstrip": True, "normalized": False, "rstrip": False}
        write(folder / "special_tokens_map.json", {"eos_token": lenient, "additional_special_tokens": ["<dog>"]})
    ours, theirs = load_tokenizer(folder), CLIPTokenizer.from_pretrained(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    for text in ("a <cat-toy> and a  <dog>here", "", "x <|endoftext|> y", TRIAL):
        assert ours(text).input_ids == theirs(text).input_ids
    assert ours.model_max_length == theirs.model_max_length == 25
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 1)


def test_a_trained_word_is_its_token(model: Path) -> None:
    with_words(model, "<cat-toy>")
    ids, _ = TextEncoder.from_pretrained(model, device="cpu").tokenize("a <cat-toy>")
    assert 2048 in ids[0, 0].tolist()


def test_a_saved_tokenizer_loads_again(model: Path, tmp_path: Path) -> None:
    with_words(model, "<cat-toy>")
    tokenizer = load_tokenizer(model / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again("a <cat-toy>").input_ids == tokenizer("a <cat-toy>").input_ids
    assert not [file for file in (tmp_path / "saved").iterdir() if "sdkit-" in file.read_text()]


DEEP = "[" * 100_000
CASES: list[tuple[str, Callable[[Path], Any], str]] = [
    (
        "an id beyond the text encoder",
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["vocab"].update({"zork": 60_000})),
        "has 2049 tokens, its text encoder 2048",
    ),
    (
        "an id beyond it in place of another",
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["vocab"].update({"x": 60_000})),
        r"gives 'x' the id 60000, beyond the 2048 of its text encoder; give the tokenizer that belongs to it",
    ),
    (
        "a negative id",
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"]["vocab"].update({"x": -1})),
        r"tokenizer\.json' gives 'x' the id -1; download it again",
    ),
    (
        "a huge id",
        lambda f: edit(old_layout(f) / "vocab.json", lambda c: c.update({"x": 10**30})),
        r"vocab\.json' gives 'x' the id 10+; download it again",
    ),
    (
        "an id that is a word",
        lambda f: edit(old_layout(f) / "vocab.json", lambda c: c.update({"x": "5"})),
        r"vocab\.json' gives 'x' the id '5'; download it again",
    ),
    (
        "one id twice",
        lambda f: edit(old_layout(f) / "vocab.json", lambda c: c.update({"x": 7})),
        r"vocab\.json' gives 2 tokens the id 7; download it again",
    ),
    (
        "another kind of tokenizer",
        lambda f: edit(f / "tokenizer.json", lambda c: c["model"].update(vocab=[["a", 0.5]])),
        r"tokenizer\.json' holds no BPE vocabulary",
    ),
    ("deep nesting", lambda f: (f / "tokenizer.json").write_text(DEEP), r"tokenizer\.json' is not valid JSON \(nested"),
    ("deep settings", lambda f: (f / "tokenizer_config.json").write_text(DEEP), r"config\.json' is not valid JSON"),
    ("deep words", lambda f: (f / "added_tokens.json").write_text(DEEP), r"added_tokens\.json' is not valid JSON"),
    ("a list of words", lambda f: write(f / "added_tokens.json", ["<x>"]), r"added_tokens\.json' holds no JSON object"),
    (
        "a trained word far off",
        lambda f: write(f / "added_tokens.json", {"<x>": 5000}),
        r"gives '<x>' the id 2048, and its added_tokens\.json 5000; give the files that belong together",
    ),
    (
        "merges of no text",
        lambda f: (old_layout(f) / "merges.txt").write_bytes(b"\xff\xfe\x00"),
        r"^the tokenizer in '.*' cannot be loaded: \w",
    ),
    (
        "merges of tokens that are not there",
        lambda f: (old_layout(f) / "merges.txt").write_text("#version: 0.2\nzork bork"),
        r"^the tokenizer in '.*' cannot be loaded: \w",
    ),
    (
        "a special token that is no word",
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(bos_token=[5])),
        r"^the tokenizer in '.*' (cannot be loaded|has no bos_token)",
    ),
    (
        "a length that is no number",
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(model_max_length=True)),
        r"has model_max_length True, not a number; correct it",
    ),
    ("no vocabulary but merges", lambda f: (old_layout(f) / "vocab.json").unlink(), r"^the tokenizer "),
]


@pytest.mark.parametrize(("spoil", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_damage_is_told_in_one_sentence(
    model: Path, spoil: Callable[[Path], Any], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil(model / "tokenizer")
    capfd.readouterr()
    with pytest.raises(SourceError, match=expected) as caught:
        load_text(model)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_panic_of_the_library_is_one_sentence(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic of Rust code reaches Python as a BaseException that cannot be imported. It must not be taken for a
    signal.
    """
    panic = type("PanicException", (BaseException,), {})

    def fail(*args: Any, **options: Any) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", fail)
    with pytest.raises(SourceError, match=r"^the tokenizer in '.*' cannot be loaded: index out of bounds\.$"):
        load_tokenizer(model / "tokenizer")


@pytest.mark.parametrize("length", [None, 77, 1e30, int(1e30)])
def test_any_model_max_length_is_read(model: Path, length: float | None) -> None:
    expected = TextEncoder.from_pretrained(model, dtype="fp32", device="cpu").tokenize("a cat")[0]
    edit(model / "tokenizer" / "tokenizer_config.json", lambda content: content.update(model_max_length=length))
    assert TextEncoder.from_pretrained(model, dtype="fp32", device="cpu").tokenize("a cat")[0].equal(expected)
