"""A tokenizer with CLIP's byte-pair encoding, whose merges are learned from captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sdkit.errors import ArgumentError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
SMALLEST = 514
"""Tokens of the smallest vocabulary: start, end, and each of the 256 bytes both inside and at the end of a word."""


def learn_tokenizer(captions: Iterable[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """Learn a tokenizer with CLIP's byte-pair encoding (Radford et al. 2021) from captions.

    Its vocabulary has every byte, both inside and at the end of a word, so that any text can be encoded. The start
    token has id 0, the end token, which also pads, id 1. The same captions give the same tokenizer.

    Args:
        captions: The captions.
        vocabulary: Largest number of tokens, at least 514.
        length: Longest text in tokens, start and end included.

    Raises:
        ArgumentError: The vocabulary is too small.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if vocabulary < SMALLEST:
        raise ArgumentError(
            f"a vocabulary of {vocabulary} tokens is too small: every byte needs two, and so {SMALLEST} at least; give "
            "a larger vocab_size."
        )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [START, END, *alphabet, *(f"{byte}</w>" for byte in alphabet)]
    learner = CLIPTokenizer().backend_tokenizer
    # As "special" tokens all symbols have fixed ids. The trainer breaks ties by id, so its merges are reproducible.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=symbols, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocabulary - len(symbols)]
    ids = {symbol: n for n, symbol in enumerate([*symbols, *map("".join, merges)])}
    tokenizer: CLIPTokenizer = CLIPTokenizer(ids, merges, model_max_length=length)
    return tokenizer
