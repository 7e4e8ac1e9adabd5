"""Tokens beside a text encoder's vocabulary, whose vectors were learned by textual inversion (Gal et al. 2022,
https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SYNTAX = re.compile(r"[\s()\[\]:|\\]")
"""Characters that no token may contain: spaces, which separate words, and those with a meaning in weighted prompts."""


class GrownEmbedding(nn.Embedding):
    """A token embedding with further rows for learned tokens.

    The rows of the vocabulary stay the same parameter, so that text without learned tokens is embedded bit-identically.

    Args:
        vocabulary: The embedding of the vocabulary.
        learned: Vectors (n, D) of the ids that follow those of the vocabulary.

    Attributes:
        weight: The rows of the vocabulary (V, D).
        learned: The further rows (n, D).
    """

    def __init__(self, vocabulary: nn.Embedding, learned: Tensor) -> None:
        super().__init__(len(vocabulary.weight), vocabulary.embedding_dim, _weight=vocabulary.weight)
        self.weight = vocabulary.weight
        self.learned = nn.Parameter(learned.to(vocabulary.weight))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors (..., D) of ids (...) below V + n."""
        size = len(self.weight)
        vectors = F.embedding(ids.clamp(max=size - 1), self.weight)
        return torch.where((ids >= size)[..., None], self.learned[(ids - size).clamp(min=0)], vectors)

    def without(self) -> nn.Embedding:
        """Return the embedding of the vocabulary alone."""
        plain = nn.Embedding(len(self.weight), self.embedding_dim, _weight=self.weight)
        plain.weight = self.weight
        return plain


def unwritable(token: str) -> bool:
    """Return whether prompts cannot name a token: it holds a control character or a lone surrogate, or begins with an
    accent, which becomes one with the letter before it."""
    return bool(unicodedata.combining(token[0])) or any(unicodedata.category(one) in ("Cc", "Cs") for one in token)


def same_token(token: str) -> str:
    """Return a text that two tokens share if prompts cannot tell them apart: they differ only in case, or in whether
    accents are characters of their own (Unicode's NFD) or not (NFC)."""
    return _composed(token).lower()


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class LearnedTokens:
    """The learned tokens of a tokenizer: where they are in a text, and which ids they have.

    Args:
        vectors: Token -> its vectors (n, D).
        first: Id of the first vector, the size of the vocabulary.
    """

    def __init__(self, vectors: Mapping[str, Tensor], first: int) -> None:
        ids: dict[str, range] = {}
        for token, rows in vectors.items():
            ids[token] = range(first, first + len(rows))
            first += len(rows)
        # The longest token first, so that "zork2" is not read as "zork" where there are both.
        tokens = sorted(ids, key=len, reverse=True)
        self._ids = [ids[token] for token in tokens]
        groups = "|".join(f"({re.escape(_composed(token))})" for token in tokens)
        self._pattern = re.compile(groups or "(?!)", re.IGNORECASE)  # like the vocabulary; (?!) matches nowhere
        self._lengths = {found.start: len(found) for found in self._ids}

    def split(self, text: str) -> list[str | range]:
        """Split a text into pieces of plain text, and ids of learned tokens."""
        text = _composed(text)  # as CLIP's tokenizer does with plain text
        pieces: list[str | range] = []
        end = 0
        for match in self._pattern.finditer(text):
            pieces += [text[end : match.start()], self._ids[(match.lastindex or 1) - 1]]
            end = match.end()
        return [*pieces, text[end:]]

    def length(self, token: int) -> int:
        """Return the number of vectors of the learned token whose first id this is; 1 for any other id."""
        return self._lengths.get(token, 1)
