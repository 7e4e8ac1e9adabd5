"""Finding the file of a LoRA or of an embedding: both take the same arguments, and refuse the same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sdkit
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.embedding_file import read_embedding
from sdkit.loading.lora_file import read_lora

TENSORS = {
    "lora": {f"lora_unet_conv_in.lora_{side}.weight": torch.ones(2, 2) for side in ("down", "up")},
    "embedding": {"<zork>": torch.ones(1, 8)},
}  # fmt: skip
READ: dict[str, Callable[..., Any]] = {"lora": read_lora, "embedding": read_embedding}

BAD: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "filename of no text": (".", {"filename": 3}, ArgumentError, "filename must be a name, not 3; correct it"),
    "empty filename": (".", {"filename": ""}, ArgumentError, "filename must be a name, not ''; correct it"),
    "filename with NUL": (".", {"filename": "a\0"}, ArgumentError, "filename must be a name, not 'a"),
    "revision of no text": ("org/x", {"revision": 3}, ArgumentError, "revision must be a name, not 3; correct it"),
    "filename beside a file": (
        "one.safetensors", {"filename": "one.safetensors"}, ArgumentError,
        "filename= belongs to a folder, and 'one.safetensors' is a file; leave it out.",
    ),
    "a URL": (
        "https://example.org/a.safetensors", {}, SourceError,
        "'https://example.org/a.safetensors' is a URL; give a Hub id (org/name), or the downloaded file.",
    ),
    "revision of a path": (
        ".", {"revision": "main"}, ArgumentError, "revision= belongs to a Hub id, and '.' is a path; leave it out.",
    ),
    "filename that is not there": (
        ".", {"filename": "two.bin"}, SourceError,
        "the folder '.' has no two.bin; it holds one.safetensors: name one by filename=.",
    ),
    "filename that is a folder": (".", {"filename": "sub"}, SourceError, "the folder '.' has no sub; it holds one"),
}  # fmt: skip


@pytest.fixture(params=["lora", "embedding"])
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the current folder, with one file of this kind."""
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    save_file(TENSORS[request.param], "one.safetensors")
    return str(request.param)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(kind: str, case: str) -> None:
    source, options, error, message = BAD[case]
    with pytest.raises(error) as caught:
        READ[kind](source, **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_the_only_file_of_a_folder_is_found(kind: str) -> None:
    one = READ[kind](".")
    assert "one.safetensors" in one.label
    Path("one.safetensors").unlink()
    torch.save(TENSORS[kind], "old.bin")
    assert "old.bin" in READ[kind](".").label


def test_the_pipeline_refuses_them_too(sd: sdkit.StableDiffusion, kind: str) -> None:
    load: Any = sd.load_lora if kind == "lora" else sd.load_embedding
    with pytest.raises(ArgumentError, match=r"^filename must be a name, not 3"):
        load(".", filename=3)
    assert not sd.lora_scales
    assert not sd.text.learned
