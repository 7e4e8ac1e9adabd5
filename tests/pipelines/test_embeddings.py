"""Drawing with textual inversion embeddings: equal to diffusers, alone and in a batch, and gone without a trace."""

from __future__ import annotations

import copy
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

import sdkit
from sdkit.errors import ArgumentError, SdkitError, SourceError
from sdkit.loading.embedding_file import save_embedding
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tokenizer import load_tokenizer
from sdkit.pipelines.generation import Generation
from tests.helpers.networks import diffusers_pipeline, sd_shaped

WIDTH = 16
X_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
LENGTH = 77


def vectors(n: int, seed: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models() -> tuple[sdkit.StableDiffusion, Any]:
    """Make a small model with SD 1.x's topology, tokenizer, and vocabulary, and diffusers' scheduler for it."""
    torch.manual_seed(0)
    network = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=LENGTH, bos_token_id=49406, eos_token_id=49407, pad_token_id=1,
        )
    )  # fmt: skip
    torch.nn.init.normal_(network.get_input_embeddings().weight)
    text = sdkit.TextEncoder(network.eval(), load_tokenizer(ASSETS / "sd1" / "tokenizer"))
    return sd_shaped(text)


@pytest.fixture
def model(models: tuple[sdkit.StableDiffusion, Any]) -> Any:
    yield models[0]
    models[0].unload_embedding()


def drawn(sd: sdkit.StableDiffusion, prompt: Any, **options: Any) -> Tensor:
    return sd(prompt, **{"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "latent"} | options)


@pytest.mark.parametrize("n", [1, 3])
def test_latents_are_those_of_diffusers(models: Any, model: sdkit.StableDiffusion, tmp_path: Path, n: int) -> None:
    """The token stands beside punctuation, twice, and in the negative prompt. An embedding of A1111 is loaded too."""
    save_embedding("<zork>", vectors(n), tmp_path / "zork.safetensors")
    a1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2, seed=2)}, "name": "blorp"}
    torch.save(a1111 | {"step": 1, "sd_checkpoint": None, "sd_checkpoint_name": None}, tmp_path / "b.pt")
    plain = drawn(model, "a red cat", latents=X_T)
    assert model.load_embedding(tmp_path / "zork.safetensors") == "<zork>"
    assert model.load_embedding(tmp_path / "b.pt") == "blorp"
    prompts = ("a photo of <zork>, and (another)<zork> beside a blorp", "ugly blorp")
    ours = drawn(model, prompts[0], negative_prompt=prompts[1], latents=X_T)
    # A learned token leaves nothing behind.
    assert torch.equal(drawn(model, "a red cat", latents=X_T), plain)
    model.unload_embedding()
    pipe = diffusers_pipeline(model, models[1])
    pipe.register_modules(
        text_encoder=copy.deepcopy(model.text.network), tokenizer=load_tokenizer(ASSETS / "sd1" / "tokenizer")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_textual_inversion(str(tmp_path / "zork.safetensors"))
        pipe.load_textual_inversion(str(tmp_path), weight_name="b.pt")
        theirs = pipe(
            prompts[0], negative_prompt=prompts[1], latents=X_T, num_inference_steps=4, guidance_scale=5.0,
            output_type="latent",
        ).images  # fmt: skip
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float((ours - drawn(model, prompts[0], negative_prompt=prompts[1], latents=X_T)).abs().max()) > 1e-2


def test_unloading_restores_the_network(model: sdkit.StableDiffusion, tmp_path: Path) -> None:
    network = model.text.network
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kind = type(network.embeddings.token_embedding)
    for n, token in ((2, "<zork>"), (1, "<blorp>"), (3, "qwxz")):
        save_file({token: vectors(n, seed=n)}, tmp_path / "a.safetensors")
        model.load_embedding(tmp_path / "a.safetensors")
    both = drawn(model, "a <blorp> and a qwxz", latents=X_T)
    model.unload_embedding("<zork>")  # the ids of the others move
    assert torch.equal(drawn(model, "a <blorp> and a qwxz", latents=X_T), both)
    assert [*model.text.learned] == ["<blorp>", "qwxz"]
    with pytest.raises(ArgumentError, match=r"^no embedding with the token '<zork>' is loaded; loaded are: <blorp>, q"):
        model.unload_embedding("<zork>")
    model.unload_embedding()
    after = network.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert type(network.embeddings.token_embedding) is kind


def test_an_image_alone_and_in_a_batch_is_the_same(model: sdkit.StableDiffusion) -> None:
    model.text.add_token("<zork>", vectors(3))
    long = "a very long prompt about a cat and many other things " * 7 + "<zork>"
    prompts = ["a <zork>", "a cat", long]
    together = drawn(model, prompts, seed=5)
    for i, prompt in enumerate(prompts):
        assert float((together[i] - drawn(model, prompt, seed=5 + i)[0]).abs().max()) < 1e-4


class TestTokens:
    def test_are_found_whatever_their_case(self, model: sdkit.StableDiffusion) -> None:
        model.text.add_token("<Zork>", vectors(2))
        first = model.text.tokenize("a <zork> b")[0]
        assert torch.equal(first, model.text.tokenize("a <ZORK> b")[0])
        assert first.flatten().tolist()[2:4] == [49408, 49409]

    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    def test_are_found_however_unicode_spells_them(
        self, model: sdkit.StableDiffusion, tmp_path: Path, form: Any
    ) -> None:
        token = unicodedata.normalize(form, "<zörk-é>")
        save_file({token: vectors(2)}, tmp_path / "a.safetensors")
        spelled = [unicodedata.normalize(other, "a <ZÖRK-é> and a cliché") for other in ("NFC", "NFD")]
        assert len({*spelled}) == 2
        plain = model.text.tokenize("a cliché")[0]
        assert model.load_embedding(tmp_path / "a.safetensors") == token
        ids = [model.text.tokenize(text)[0] for text in spelled]
        assert torch.equal(*ids)
        assert ids[0][0, 0, 2:4].tolist() == [49408, 49409]
        assert torch.equal(model.text.tokenize(unicodedata.normalize("NFD", "a cliché"))[0], plain)
        for other in ("NFC", "NFD"):
            again = unicodedata.normalize(other, "<ZÖRK-É>")
            with pytest.raises(ArgumentError, match="is loaded already; unload it first, or give another"):
                model.load_embedding(tmp_path / "a.safetensors", again)
        model.unload_embedding(unicodedata.normalize("NFD" if form == "NFC" else "NFC", token))
        assert not model.text.learned

    def test_the_longest_name_counts(self, model: sdkit.StableDiffusion) -> None:
        for n, token in ((1, "qwxz"), (2, "qwxz2"), (1, "qwx")):
            model.text.add_token(token, vectors(n))
        ids = model.text.tokenize("qwxz2 qwxz qwx")[0][0, 0, 1:5].tolist()
        assert ids == [49409, 49410, 49408, 49411]

    def test_letters_that_match_only_without_case(self, model: sdkit.StableDiffusion) -> None:
        """Python's regular expressions match the long s with s, and the sign for kelvin with k."""
        model.text.add_token("<sk>", vectors(1))
        assert model.text.tokenize("<\u017f\u212a>")[0][0, 0, 1] == 49408

    def test_weights_reach_all_their_vectors(self, model: sdkit.StableDiffusion) -> None:
        model.text.add_token("<zork>", vectors(3))
        ids, weights = model.text.tokenize("a (<zork>:1.5) b", weighting=True)
        assert weights[0, 0, ids[0, 0] >= 49408].tolist() == [1.5] * 3
        assert weights.sum() == LENGTH + 1.5

    @pytest.mark.parametrize("before", [71, 72, 74, 75])
    def test_vectors_stay_together_in_a_chunk(self, model: sdkit.StableDiffusion, before: int) -> None:
        model.text.add_token("<zork>", vectors(4))
        ids, _ = model.text.tokenize("cat " * before + "<zork> dog")
        chunks = [[token for token in chunk.tolist() if token >= 49408] for chunk in ids[0]]
        assert chunks == ([[49408, 49409, 49410, 49411], []] if before == 71 else [[], [49408, 49409, 49410, 49411]])
        words = int((ids == ids[0, 0, 1]).sum())
        assert words == before

    def test_as_many_as_a_chunk_holds(self, model: sdkit.StableDiffusion) -> None:
        model.text.add_token("<zork>", vectors(75))
        ids, _ = model.text.tokenize("a <zork>")
        assert ids.shape == (1, 2, LENGTH)


def test_half_precision(models: Any) -> None:
    """The vectors take the network's dtype, whenever they are loaded, and come back as they were."""
    text = sdkit.TextEncoder(copy.deepcopy(models[0].text.network), models[0].text.tokenizer)
    text.add_token("<zork>", vectors(1))
    text.bfloat16()
    text.add_token("<blorp>", vectors(2))
    assert text.network.embeddings.token_embedding.learned.dtype == torch.bfloat16
    assert text.encode("a <zork> <blorp>").isfinite().all()
    text.float()
    text.remove_token("<blorp>")
    assert torch.equal(text.network.embeddings.token_embedding.learned, vectors(1))


BAD: dict[str, tuple[Any, Any, type[SdkitError], str]] = {
    "a word of the vocabulary": ("cat", vectors(1), ArgumentError, "the token 'cat' is a word of the vocabulary"),
    "a special token": ("<|endoftext|>", vectors(1), ArgumentError, ".* has a space or one of"),
    "empty": ("", vectors(1), ArgumentError, "a token must be a text that is not empty"),
    "no text": (3, vectors(1), ArgumentError, "a token must be a text that is not empty"),
    "with a space": ("my cat", vectors(1), ArgumentError, "the token 'my cat' has a space or one of"),
    "a lone surrogate": ("<\udcff>", vectors(1), ArgumentError, "the token '<.*>' has a control character in it, or"),
    "a control character": ("a\0b", vectors(1), ArgumentError, "the token .* has a control character in it, or"),
    "an accent": ("\u0301", vectors(1), ArgumentError, "the token .* or begins with an accent, which belongs"),
    "with brackets": ("(zork)", vectors(1), ArgumentError, r"the token '\(zork\)' has a space or one of"),
    "loaded already": ("<LOADED>", vectors(1), ArgumentError, "an embedding with the token '<LOADED>' is load"),
    "another width": ("<zork>", vectors(1, width=1024), SourceError,
                      ".*zork.safetensors' was made for another model: its vectors have 1024 numbers, this"),
    "too many vectors": ("<zork>", vectors(76), SourceError,
                         ".*zork.safetensors' has 76 vectors, and this model reads at most 75"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded_is_one_sentence(model: sdkit.StableDiffusion, tmp_path: Path, case: str) -> None:
    token, rows, kind, sentence = BAD[case]
    save_file({"emb_params": rows}, tmp_path / "zork.safetensors")
    model.text.add_token("<loaded>", vectors(1))
    before = drawn(model, "a <loaded>", latents=X_T)
    with pytest.raises(kind, match=f"^{sentence}") as caught:
        model.load_embedding(tmp_path / "zork.safetensors", token)
    assert "\n" not in str(caught.value)
    assert [*model.text.learned] == ["<loaded>"]
    assert torch.equal(drawn(model, "a <loaded>", latents=X_T), before)


NO_EMBEDDING: Any = "zork.safetensors"
NO_TENSOR: Any = [[0.0] * WIDTH]


@pytest.mark.parametrize(
    "rows", [vectors(1)[0], vectors(0), vectors(1).long(), NO_TENSOR], ids=["1d", "none", "integers", "a list"]
)
def test_vectors_that_are_none(model: sdkit.StableDiffusion, rows: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"^the vectors of '<zork>' must be a tensor \(n, D\) of floats, n at least 1"
    ):
        model.text.add_token("<zork>", rows)
    with pytest.raises(SourceError, match=r"^this embedding has numbers that are not finite; give another"):
        model.text.add_token("<zork>", vectors(1) * torch.nan)
    with pytest.raises(
        ArgumentError, match=r"^add_embedding takes an Embedding as read_embedding returns it, not 'zork"
    ):
        model.add_embedding(NO_EMBEDDING)
    assert not model.text.learned


def test_numbers_that_float16_cannot_hold(models: Any) -> None:
    text = sdkit.TextEncoder(copy.deepcopy(models[0].text.network), models[0].text.tokenizer).half()
    with pytest.raises(SourceError, match=r"^this embedding has numbers that are too large for torch.float16; take dt"):
        text.add_token("<zork>", vectors(1) * 1e6)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embeddings, their tokens, and their hashes are in the PNG, from which --from draws again."""
    from sdkit.cli import main

    save_embedding("<zork>", vectors(2, width=192), tmp_path / "a.safetensors")
    save_file({"emb_params": vectors(1, width=192)}, tmp_path / "cat.safetensors")
    arguments = ["generate", "a <zork> and a blorp", "--steps", "1", "--dtype", "fp32"]
    given = ["--embedding", str(tmp_path / "a.safetensors"), "--embedding", str(tmp_path / "cat.safetensors")]
    out = [tmp_path / f"{name}.png" for name in ("first", "again", "plain", "reset")]
    tokens = ["--embedding-token", "<zork>", "--embedding-token", "blorp"]
    assert main([*arguments, *given, *tokens, "--out", str(out[0])]) == 0
    assert main(["generate", "--from", str(out[0]), "--out", str(out[1])]) == 0
    assert main([*arguments, "--out", str(out[2])]) == 0
    first, again, plain = (np.asarray(sdkit.images.read(path)) for path in out[:3])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, plain)
    text = sdkit.images.read_text(out[0])
    assert text["embedding_token"] == '["<zork>", "blorp"]'
    assert text["embedding"] == f'["{tmp_path}/a.safetensors", "{tmp_path}/cat.safetensors"]'
    # An embedding that is given anew has its own token.
    assert main(["generate", "--from", str(out[0]), *given[:2], "--out", str(out[3])]) == 0
    assert sdkit.images.read_text(out[3])["embedding_token"] == "<zork>"
    capsys.readouterr()
    for more, sentence in (
        (given, "the token 'cat' is a word of the vocabulary already"),
        ([*given[:2], *given[:2]], "an embedding with the token '<zork>' is loaded already"),
        ([*given, "--embedding-token", "<a>"], "1 of embedding_token cannot serve 2 embeddings"),
        (["--embedding", "none.pt"], "the embedding 'none.pt' does not exist"),
    ):
        assert main([*arguments, *more, "--out", str(tmp_path / "bad.png")]) == 2
        assert sentence in capsys.readouterr().err
    save_embedding("<zork>", vectors(3, width=192), tmp_path / "a.safetensors")
    assert main(["generate", "--from", str(out[0]), "--out", str(tmp_path / "bad.png")]) == 2
    assert "a.safetensors' has changed since it was drawn with; restore it" in capsys.readouterr().err
    assert not (tmp_path / "bad.png").exists()
    assert load_file(tmp_path / "a.safetensors").keys() == {"<zork>"}


@pytest.mark.parametrize(
    "files", [{"embedding": ("a",)}, {"lora": ("a",)}, {"control_image": ("a",), "controlnet": ("c",)}]
)
def test_a_png_with_more_hashes_than_files(files: dict[str, Any]) -> None:
    name = next(iter(files))
    settings: dict[str, Any] = {**files, f"{name}_sha256": ("0", "1")}
    with pytest.raises(ArgumentError, match=f"^2 of {name}_sha256 cannot serve 1 of {name}: give one for each"):
        Generation(**settings).check()
