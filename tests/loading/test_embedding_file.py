"""Files of textual inversion embeddings: those of diffusers and of A1111 are read, ours is read by both, and what is no
embedding is told in one sentence.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.embedding_file import read_embedding, save_embedding
from sdkit.training import EmbeddingConfig

VECTORS = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def a1111_pickle(vectors: Tensor, name: str = "zork") -> dict[str, Any]:
    """Return what A1111's training writes into a .pt file."""
    return {
        "string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": name, "step": 100,
        "sd_checkpoint": None, "sd_checkpoint_name": None,
    }  # fmt: skip


def read_as_a1111(path: Path) -> tuple[str, Tensor]:
    """Read an embedding by the rules of A1111's loader (`create_embedding_from_data` of its
    modules/textual_inversion/textual_inversion.py), written anew.

    The name of a file is the embedding's token. Its content is a dict with string_to_param, or a dict with one tensor,
    whatever its key.
    """
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    parameters = content.get("string_to_param", content)
    assert len(parameters) == 1
    (vectors,) = parameters.values()
    return path.stem, torch.atleast_2d(vectors).float()


def test_what_is_saved_is_read_by_a1111_and_here(tmp_path: Path) -> None:
    path = tmp_path / "zork.safetensors"
    save_embedding("<zork>", VECTORS.half(), path)
    name, theirs = read_as_a1111(path)
    ours = read_embedding(path)
    assert name == "zork"
    assert ours.token == "<zork>"
    assert torch.equal(theirs, VECTORS.half().float())
    assert torch.equal(ours.vectors, theirs)
    assert ours.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("file", "content", "token"),
    [
        ("a.pt", a1111_pickle(VECTORS), "zork"),
        ("a.pt", a1111_pickle(VECTORS, ""), "a"),
        ("a.safetensors", {"emb_params": VECTORS}, "a"),
        ("a.bin", {"<zork>": VECTORS}, "<zork>"),
        ("a.safetensors", {"<zork>": VECTORS}, "<zork>"),
        ("a.bin", {"<zork>": VECTORS[0]}, "<zork>"),
        ("a.safetensors", {"<zork>": VECTORS.bfloat16()}, "<zork>"),
    ],
    ids=["A1111", "A1111, nameless", "emb_params", "bin", "safetensors", "one vector", "bfloat16"],
)
def test_theirs_are_read(tmp_path: Path, file: str, content: dict[str, Any], token: str) -> None:
    save = save_file if file.endswith(".safetensors") else torch.save
    save(content, tmp_path / file)  # type: ignore[operator]
    found = read_embedding(tmp_path / file)
    _, expected = read_as_a1111(tmp_path / file)
    assert found.token == token
    assert found.vectors.dtype == torch.float32
    assert torch.equal(found.vectors, expected)
    assert read_embedding(tmp_path / file, token="other").token == "other"


def test_from_a_folder_and_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is a snapshot in the cache, as a download leaves it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    torch.save({"<zork>": VECTORS}, folder / "learned_embeds.bin")
    assert read_embedding(folder).token == "<zork>"
    save_file({"<only>": VECTORS}, folder / "any.safetensors")
    assert read_embedding(folder).token == "<only>"
    save_file({"<usual>": VECTORS}, folder / "learned_embeds.safetensors")
    assert read_embedding(folder).token == "<usual>"
    assert read_embedding(folder, filename="any.safetensors").token == "<only>"
    repository = tmp_path / "hub" / "models--sd-concepts-library--zork"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    torch.save({"<zork>": VECTORS[:1]}, snapshot / "learned_embeds.bin")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    import huggingface_hub

    offline = functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path / "hub", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    assert torch.equal(read_embedding("sd-concepts-library/zork").vectors, VECTORS[:1])


class Hostile:
    """A pickle that runs a command when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


LORA = {"lora_unet_x.lora_down.weight": torch.ones(4, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 4)}
BAD: dict[str, tuple[str, Any, str]] = {
    "of SDXL": ("a.safetensors", {"clip_g": torch.ones(1, 1280), "clip_l": torch.ones(1, 768)},
                "is a textual inversion embedding of Stable Diffusion XL or a later model"),
    "a LoRA": ("a.safetensors", LORA, "looks like a LoRA, not an embedding; load it with load_lora"),
    "two tensors": ("a.safetensors", {"<a>": VECTORS, "<b>": VECTORS.clone()}, r"holds 2 tensors \(<a>, <b>\), and"),
    "two tokens in one pickle": ("a.pt", a1111_pickle(VECTORS) | {"string_to_param": {"*": VECTORS, "a": VECTORS}},
                                 r"holds 2 tensors \(string_to_param\.\*, string_to_param\.a\), and"),
    "a picture's latents": ("a.safetensors", {"latent": torch.ones(1, 4, 8, 8)},
                            "holds no textual inversion embedding: its latent is 1x4x8x8, not a list of vectors"),
    "a number": ("a.safetensors", {"<zork>": torch.tensor(1.0)}, "its <zork> is a scalar, not a list"),
    "no vectors": ("a.safetensors", {"<zork>": torch.ones(0, 16)}, "its <zork> is 0x16, not a list of vectors"),
    "not finite": ("a.safetensors", {"<zork>": VECTORS * torch.inf}, "is damaged: its <zork> is not finite"),
    "whole numbers": ("a.safetensors", {"<zork>": torch.ones(1, 16, dtype=torch.int64)},
                      "holds <zork> as (I64|int64) numbers, not as floats"),
    "hostile": ("a.pt", Hostile(), "holds more than tensors and so could run code; sdkit executes none"),
    "hostile inside": ("a.bin", {"<zork>": VECTORS, "name": Hostile()}, "holds more than tensors"),
    "a bare tensor": ("a.pt", VECTORS, "holds no named tensors"),
    "text": ("a.safetensors", b"no tensors at all", "is damaged or not a .safetensors file"),
    "empty": ("a.pt", b"", "is empty; download it again"),
    "a picture": ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "not (the|a file of) weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_embedding_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    file, content, sentence = BAD[case]
    if isinstance(content, bytes):
        Path(file).write_bytes(content)
    elif file.endswith(".safetensors"):
        save_file(content, file)
    else:
        torch.save(content, file)
    with pytest.raises(SourceError, match=sentence) as caught:
        read_embedding(file)
    assert "\n" not in str(caught.value)
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    ("source", "kind", "sentence"),
    [
        ("none.safetensors", SourceError, "the embedding 'none.safetensors' does not exist; give a file"),
        ("", SourceError, "the embedding '' does not exist"),
        (3, ArgumentError, "an embedding is a path or a Hub id, not int"),
        (".", SourceError, r"the folder '\.' has no learned_embeds.safetensors; it holds a.safetensors, b.safetensors"),
        ("./empty", SourceError, "the folder './empty' has no learned_embeds.safetensors; it holds no other"),
    ],
)
def test_a_source_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, kind: type[Exception], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in "ab":
        save_file({"<zork>": VECTORS}, f"{name}.safetensors")
    with pytest.raises(kind, match=f"^{sentence}"):
        read_embedding(source)


@pytest.mark.parametrize("token", [3, "", "__metadata__"])
def test_tokens_that_no_file_can_hold(tmp_path: Path, token: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"^(token must be a word, not|the token '__metadata__' is a name that \.safe)"
    ):
        save_embedding(token, VECTORS, tmp_path / "a.safetensors")
    with pytest.raises(
        ArgumentError, match=r"^(token must be a word, not|the token '__metadata__' is a name that \.safe)"
    ):
        EmbeddingConfig(data="photos", out_dir=tmp_path / "run", token=token, init_token="cat")
    assert not [*tmp_path.iterdir()]


def test_it_is_saved_as_safetensors_only(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"an embedding cannot be saved as .*a\.pt'; give a name that ends in"):
        save_embedding("<zork>", VECTORS, tmp_path / "a.pt")
