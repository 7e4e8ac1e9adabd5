"""The text encoder against diffusers' own prompt encoding, long prompts, and A1111's weights."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import sdkit
from sdkit.loading.tokenizer import load_tokenizer
from sdkit.networks.text_encoder import parse_weights
from tests.helpers.networks import EMOJI, diffusers_pipeline


@pytest.fixture(scope="module")
def text(sd: sdkit.StableDiffusion) -> sdkit.TextEncoder:
    return sd.text


@pytest.fixture(scope="module")
def pipe(sd: sdkit.StableDiffusion) -> Any:
    return diffusers_pipeline(sd)


def theirs(pipe: Any, prompts: list[str], **kwargs: Any) -> Tensor:
    embeddings: Tensor = pipe.encode_prompt(prompts, "cpu", 1, False, **kwargs)[0].detach()
    return embeddings


class TestAgainstDiffusers:
    PROMPTS = ("a cat", "", "a red apple on a blue background")

    def test_embeddings(self, text: sdkit.TextEncoder, pipe: Any) -> None:
        ours = text.encode(self.PROMPTS)
        assert ours.shape == (3, text.length, text.width)
        torch.testing.assert_close(ours, theirs(pipe, list(self.PROMPTS)), atol=1e-5, rtol=0)

    @pytest.mark.parametrize("clip_skip", [1, 2])
    def test_clip_skip_leaves_out_the_last_layers(self, text: sdkit.TextEncoder, clip_skip: int) -> None:
        """Compare with a network without these layers, because diffusers' own clip_skip fails with transformers 5."""
        shallow = copy.deepcopy(text.network)
        layers = (shallow.text_model if hasattr(shallow, "text_model") else shallow).encoder.layers
        del layers[-clip_skip:]
        expected = sdkit.TextEncoder(shallow, text.tokenizer).encode(self.PROMPTS)
        ours = text.encode(self.PROMPTS, clip_skip=clip_skip)
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(ours, text.encode(self.PROMPTS), atol=1e-2)


class TestLongPrompts:
    def test_chunks(self, text: sdkit.TextEncoder) -> None:
        words = ["red", "apple", "blue", "cat"] * 20  # one token each
        body = text.length - 2
        for n, k in ((body, 1), (body + 1, 2), (2 * body, 2), (2 * body + 1, 3)):
            prompt = " ".join(words[:n])
            ids, _ = text.tokenize(prompt)
            assert ids.shape == (1, k, text.length)
            assert int(((ids != text.tokenizer.bos_token_id) & (ids != text.tokenizer.eos_token_id)).sum()) == n
            parts = [" ".join(words[:n][i : i + body]) for i in range(0, n, body)]
            by_hand = torch.cat([text.encode(part) for part in parts], dim=1)
            torch.testing.assert_close(text.encode(prompt), by_hand, atol=1e-5, rtol=0)

    def test_a_short_prompt_beside_a_long_one_is_padded_with_an_empty_chunk(self, text: sdkit.TextEncoder) -> None:
        both = text.encode(["a cat", "a cat " * 20])
        assert both.shape == (2, 2 * text.length, text.width)
        alone = torch.cat([text.encode("a cat"), text.encode("")], dim=1)
        torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(text.encode("a cat", chunks=2), alone, atol=1e-5, rtol=0)

    def test_many_prompts(self, text: sdkit.TextEncoder) -> None:
        prompts = [f"{n} red apples" for n in range(70)]
        torch.testing.assert_close(text.encode(prompts)[-1:], text.encode(prompts[-1]), atol=1e-5, rtol=0)

    def test_embeddings_can_enter_autograd(self, text: sdkit.TextEncoder) -> None:
        weight = torch.ones(1, requires_grad=True)
        (text.encode("a cat") * weight).sum().backward()
        assert weight.grad is not None


@pytest.mark.parametrize(("family", "pad"), [("sd1", 49407), ("sd2", 0)])
def test_padding_is_the_familys_own(family: str, pad: int) -> None:
    """SD 1.x pads with the end token, SD 2.x with "!"."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    network = CLIPTextModel(CLIPTextConfig(**size))
    tokenizer = load_tokenizer(EMOJI.parent / family / "tokenizer")
    ids, _ = sdkit.TextEncoder(network, tokenizer).tokenize("a cat")
    assert ids[0, 0, :5].tolist() == [49406, 320, 2368, 49407, pad]


class TestWeighting:
    # The first block is from A1111's own parser (its doctests). The rest follows from the same rules.
    @pytest.mark.parametrize(
        ("prompt", "pieces"),
        [
            ("normal text", [("normal text", 1.0)]),
            ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
            ("(unbalanced", [("unbalanced", 1.1)]),
            (r"\(literal\]", [("(literal]", 1.0)]),
            ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
            (
                "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
                [
                    ("a ", 1.0),
                    ("house", 1.5730000000000004),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641000000000006),
                    (".", 1.1),
                ],
            ),
            ("", []),
            ("a:b", [("a:b", 1.0)]),
            ("stray ) and ]", [("stray ) and ]", 1.0)]),
            ("[[less]]", [("less", 1 / 1.21)]),
            ("(x:1.3", [("x:1.3", 1.1)]),
            ("(x:y)", [("x:y", 1.1)]),
            (r"back\slash \\ end", [("backslash \\ end", 1.0)]),
            (r"(cat\:1.3)", [("cat", 1.3)]),
            ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        ],
    )
    def test_parser(self, prompt: str, pieces: list[tuple[str, float]]) -> None:
        parsed = parse_weights(prompt)
        assert [text for text, _ in parsed] == [text for text, _ in pieces]
        assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces])

    def test_off_unless_asked(self, text: sdkit.TextEncoder) -> None:
        plain, weighted = text.encode("a (cat:1.5)"), text.encode("a (cat:1.5)", weighting=True)
        assert not torch.allclose(plain, weighted, atol=1e-2)
        assert (text.tokenize("a (cat:1.5)")[1] == 1).all()

    def test_weights_scale_their_tokens_and_keep_the_mean(self, text: sdkit.TextEncoder) -> None:
        plain, weighted = text.encode("a red cat"), text.encode("a (red:1.5) cat", weighting=True)
        ids, weights = text.tokenize("a (red:1.5) cat", weighting=True)
        assert torch.equal(ids, text.tokenize("a red cat")[0])
        assert weights[0, 0, :6].tolist() == [1, 1, 1.5, 1, 1, 1]
        ratio = weighted / plain
        torch.testing.assert_close(ratio[0, 2] / ratio[0, 1], torch.full((text.width,), 1.5), atol=1e-4, rtol=0)
        torch.testing.assert_close(weighted.mean(), plain.mean(), atol=1e-5, rtol=0)

    def test_the_same_alone_and_in_a_batch(self, text: sdkit.TextEncoder) -> None:
        both = text.encode(["a (red:1.5) cat", "[[[dog]]] (x:3)"], weighting=True)
        torch.testing.assert_close(text.encode("a (red:1.5) cat", weighting=True), both[:1], atol=1e-5, rtol=0)

    def test_no_weights_change_nothing(self, text: sdkit.TextEncoder) -> None:
        torch.testing.assert_close(text.encode("a cat", weighting=True), text.encode("a cat"), atol=1e-6, rtol=0)

    def test_parser_against_the_rules_step_by_step(self) -> None:
        """A closing bracket multiplies the weights of everything inside it. The reference works one character at a
        time.
        """
        parts = ["(", ")", "[", "]", ":1.2)", ":-.5)", ": 3. )", "\\", "a", " b", ":", "0"]
        choose = random.Random(0)
        for _ in range(3000):
            prompt = "".join(choose.choices(parts, k=choose.randint(1, 14)))
            parsed = [(letter, weight) for text, weight in parse_weights(prompt) for letter in text]
            expected = step_by_step(prompt)
            assert [letter for letter, _ in parsed] == [letter for letter, _ in expected], prompt
            assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in expected], rel=1e-9)

    def test_brackets_in_one_another(self) -> None:
        pieces = parse_weights("(a" * 5000 + ")" * 4999)
        assert [text for text, _ in pieces] == ["a"] * 5000
        assert [weight for _, weight in pieces] == pytest.approx([1.1 ** (i + 1) for i in range(5000)], rel=1e-9)
        squared = parse_weights("[" * 500 + "a" + "]" * 500)
        assert squared == [("a", pytest.approx(1.1**-500, rel=1e-9))]


def step_by_step(prompt: str) -> list[tuple[str, float]]:
    """Return A1111's weight of each character of a prompt."""
    letters: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(kind: str, factor: float, start: int | None = None) -> None:
        start = opened[kind].pop() if start is None else start
        letters[start:] = [(letter, weight * factor) for letter, weight in letters[start:]]

    i = 0
    while i < len(prompt):
        given = re.match(r":\s*([+-]?[.\d]+)\s*\)", prompt[i:])
        if prompt[i] == "\\" and prompt[i + 1 : i + 2] and prompt[i + 1] in "()[]\\":
            letters.append((prompt[i + 1], 1.0))
            i += 1
        elif prompt[i] in opened:
            opened[prompt[i]].append(len(letters))
        elif given and opened["("]:
            close("(", float(given[1]))
            i += given.end() - 1
        elif given:
            letters += [(letter, 1.0) for letter in given[0]]
            i += given.end() - 1
        elif prompt[i] == ")" and opened["("]:
            close("(", 1.1)
        elif prompt[i] == "]" and opened["["]:
            close("[", 1 / 1.1)
        elif prompt[i] != "\\":
            letters.append((prompt[i], 1.0))
        i += 1
    for kind, factor in (("(", 1.1), ("[", 1 / 1.1)):
        for start in opened[kind]:
            close(kind, factor, start)
    return letters


class TestBreak:
    """A1111's BREAK pads the current chunk and starts the next."""

    @pytest.mark.parametrize(
        ("prompt", "chunks"),
        [
            ("a cat BREAK a dog", ["a cat", "a dog"]),
            ("a cat\nBREAK\na dog BREAK", ["a cat", "a dog"]),
            ("BREAK a cat", ["", "a cat"]),
            ("a cat BREAK BREAK a dog", ["a cat", "", "a dog"]),
            ("BREAK", [""]),
        ],
    )
    def test_chunks(self, text: sdkit.TextEncoder, prompt: str, chunks: list[str]) -> None:
        ids, weights = text.tokenize(prompt, weighting=True)
        assert torch.equal(ids[0], torch.cat([text.tokenize(chunk)[0][0] for chunk in chunks]))
        assert (weights == 1).all()
        encoded = torch.cat([text.encode(chunk) for chunk in chunks], dim=1)
        torch.testing.assert_close(text.encode(prompt, weighting=True), encoded, atol=1e-5, rtol=0)

    def test_in_brackets(self, text: sdkit.TextEncoder) -> None:
        ids, weights = text.tokenize("(a cat BREAK a dog:1.5)", weighting=True)
        assert torch.equal(ids, text.tokenize("a cat BREAK a dog", weighting=True)[0])
        assert weights[0, :, :4].tolist() == [[1, 1.5, 1.5, 1]] * 2

    def test_after_a_full_chunk_and_inside_a_long_section(self, text: sdkit.TextEncoder) -> None:
        body = text.length - 2
        full, longer = (" ".join(["red"] * n) for n in (body, body + 1))
        assert text.tokenize(f"{full} BREAK cat", weighting=True)[0].shape[1] == 2
        ids, _ = text.tokenize(f"{longer} BREAK cat", weighting=True)
        expected = torch.cat([text.tokenize(longer)[0], text.tokenize("cat")[0]], dim=1)
        assert torch.equal(ids, expected)

    def test_is_a_word_of_its_own_and_only_with_weighting(self, text: sdkit.TextEncoder) -> None:
        assert text.tokenize("a BREAKFAST, a break", weighting=True)[0].shape[1] == 1
        assert text.tokenize("a cat BREAK a dog")[0].shape[1] == 1


class TestSyntaxThatIsNotRead:
    @pytest.mark.parametrize(
        ("prompt", "found"),
        [
            ("a cat AND a dog :1.2", "'AND'"),
            ("a [cat:dog:0.5] here", r"'\[cat:dog:0.5\]'"),
            ("a [(cat:1.2):10] here", r"'\[\(cat:1.2\):10\]'"),
            ("a [cat|dog] here", r"'\[cat\|dog\]'"),
            ("a cat <lora:zork:0.8>", "'<lora:zork:0.8>' .* load_lora"),
        ],
    )
    def test_is_told_and_read_as_plain_text(self, text: sdkit.TextEncoder, prompt: str, found: str) -> None:
        with pytest.warns(UserWarning, match=rf"^{found}") as told:
            ids, _ = text.tokenize(prompt, weighting=True)
        assert len(told) == 1
        assert "in the prompt is read as plain text; in A1111 it" in str(told[0].message)
        plain = "".join(piece for piece, _ in parse_weights(prompt))
        assert torch.equal(ids, text.tokenize(plain)[0])

    @pytest.mark.parametrize("prompt", [r"a \[cat|dog\]", "[cat] a|b", "the SAND, 1 < 2: a > b", "[cat: a dog]"])
    def test_nothing_is_told_of_plain_text(self, text: sdkit.TextEncoder, prompt: str) -> None:
        text.tokenize(prompt, weighting=True)  # a warning would be an error here
        text.tokenize("a cat AND a [cat|dog] <lora:a:1>")  # no warning without weighting either
