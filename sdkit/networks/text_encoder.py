"""The text encoder of Stable Diffusion: prompts of any length to embeddings that the U-Net attends to."""

from __future__ import annotations

import itertools
import re
import sys
import threading
import warnings
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.arguments import strings, whole_number
from sdkit.engines.device import resolve_place
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.source import Source
from sdkit.loading.tensors import loading
from sdkit.messages import clean
from sdkit.networks.learned_tokens import SYNTAX, GrownEmbedding, LearnedTokens, same_token, unwritable
from sdkit.networks.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

Tokens = list[tuple[int, float]]
"""Token ids and the weight of each."""
CHUNKS_AT_ONCE = 64
"""Chunks in one pass through the network."""
_tokenizing = threading.Lock()  # tokenizers are not thread-safe, and training tokenizes in several threads


class TextEncoder(Wrapper):
    """CLIP's text transformer (Radford et al. 2021, https://arxiv.org/abs/2103.00020) with its tokenizer.

    Args:
        network: The network.
        tokenizer: Its tokenizer.

    Attributes:
        network: The network, of transformers.
        tokenizer: The tokenizer, of transformers.
        name: The source that they came from.
        length: Tokens of one chunk, start and end tokens included (77).
        width: D, the width of the embeddings.
        learned: Textual inversion embeddings: token -> its vectors (n, D), float32, on the CPU, as they were added.
        device: The device that the network computes on.
        dtype: The dtype that the network computes in.
    """

    def __init__(self, network: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        """Wrap a network and its tokenizer; `from_pretrained` loads them."""
        super().__init__(network)
        self.tokenizer: Any = tokenizer
        self.length = int(network.config.max_position_embeddings)
        self.width = int(network.config.hidden_size)
        self.learned: dict[str, Tensor] = {}
        self._learned = LearnedTokens({}, 0)

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        revision: str | None = None,
        variant: str | None = None,
        config: str | PathLike[str] | None = None,
    ) -> TextEncoder:
        """Load a text encoder and its tokenizer. Arguments and errors are those of `sdkit.VAE.from_pretrained`."""
        dtype, device = resolve_place(dtype, device)
        opened = Source.open(source, revision=revision, variant=variant, config=config)
        return cls.from_source(opened, dtype=dtype, device=device)

    @classmethod
    def from_source(cls, source: Source, *, dtype: torch.dtype, device: torch.device) -> TextEncoder:
        """Load a text encoder and its tokenizer from an opened `Source`."""
        text = cls(*source.text_encoder(dtype))
        text.name = source.name
        return text.eval().to(device=device)

    def encode(
        self, prompts: str | Sequence[str], *, clip_skip: int = 0, weighting: bool = False, chunks: int | None = None
    ) -> Tensor:
        """Encode prompts of any length to embeddings.

        Args:
            prompts: One prompt, or a list of B.
            clip_skip: Number of last layers to skip: A1111's "clip skip" minus one. The final layer norm is
                applied all the same.
            weighting: Read `(word:1.3)`, `(word)` (1.1), and `[word]` (1 / 1.1) as A1111 does, and weight the
                embeddings of those tokens. `\\(` is a literal bracket, and BREAK begins a new chunk. False reads a
                prompt as plain text.
            chunks: Smallest k, for embeddings as long as those of longer prompts.

        Returns:
            (B, 77k, D) float32: k chunks of at most 75 tokens each, as many as the longest prompt needs.
        """
        clip_skip = check_clip_skip(clip_skip, int(self.network.config.num_hidden_layers))
        ids, weights = self.tokenize(prompts, weighting=weighting, chunks=chunks)
        with torch.inference_mode():
            embedded = [self._embed(part, clip_skip) for part in ids.flatten(0, 1).split(CHUNKS_AT_ONCE)]
        embeddings = torch.cat(embedded).clone()  # autograd refuses tensors that were made in inference mode
        if weighting:
            mean = embeddings.mean(dim=(1, 2), keepdim=True)
            embeddings = embeddings * weights.flatten(0, 1)[:, :, None].to(embeddings)
            embeddings = embeddings * (mean / embeddings.mean(dim=(1, 2), keepdim=True))
        return embeddings.reshape(len(ids), -1, self.width)

    def add_token(self, token: str, vectors: Tensor, *, label: str = "this embedding") -> None:
        """Add a token that is not in the vocabulary, and its vectors: a textual inversion embedding.

        Prompts without the token are embedded bit-identically as before. Its case is ignored, as that of other words,
        and so is how Unicode spells its accents.

        Args:
            token: The token, as prompts spell it.
            vectors: Its vectors (n, D).
            label: The embedding as messages name it.

        Raises:
            ArgumentError: The token cannot be used, or there is one of that name.
            SourceError: The vectors do not fit this text encoder.
        """
        self._check_token(token)
        if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not len(vectors) or not vectors.is_floating_point():
            raise ArgumentError(f"the vectors of {clean(repr(token))} must be a tensor (n, D) of floats, n at least 1.")
        if not len(vectors) <= self.length - 2:
            raise SourceError(
                f"{label} has {len(vectors)} vectors, and this model reads at most {self.length - 2} tokens together; "
                "give one with fewer."
            )
        if vectors.shape[1] != self.width:
            raise SourceError(
                f"{label} was made for another model: its vectors have {vectors.shape[1]} numbers, this model's have "
                f"{self.width}; give one of its own."
            )
        if not bool(vectors.isfinite().all()):
            raise SourceError(f"{label} has numbers that are not finite; give another.")
        if not bool(vectors.to(self.dtype).isfinite().all()):
            raise SourceError(f"{label} has numbers that are too large for {self.dtype}; take dtype 'fp32'.")
        self._set_learned({**self.learned, token: vectors.detach().float().cpu().clone()})

    def remove_token(self, token: str) -> None:
        """Remove a token that `add_token` added. Raises ArgumentError if there is none of that name."""
        found = next((other for other in self.learned if same_token(other) == same_token(str(token))), None)
        if found is None:
            held = ", ".join(map(clean, self.learned)) or "none"
            raise ArgumentError(f"no embedding with the token {clean(repr(token))} is loaded; loaded are: {held}.")
        self._set_learned({other: vectors for other, vectors in self.learned.items() if other != found})

    def _check_token(self, token: str) -> None:
        """Raise ArgumentError for a token that cannot be added."""
        if not isinstance(token, str) or not token:
            raise ArgumentError("a token must be a text that is not empty, such as '<zork>'.")
        name = clean(repr(token))
        if unwritable(token):
            raise ArgumentError(
                f"the token {name} has a control character in it, or begins with an accent, which belongs to the "
                "letter before it; give another, such as '<zork>'."
            )
        if SYNTAX.search(token):
            raise ArgumentError(
                f"the token {name} has a space or one of ()[]:|\\ in it, which prompts read in another way; give one "
                "without, such as '<zork>'."
            )
        if same_token(token) in map(same_token, self.learned):
            raise ArgumentError(
                f"an embedding with the token {name} is loaded already; unload it first, or give another token."
            )
        if len(self._plain_tokens(token)) < 2:
            raise ArgumentError(
                f"the token {name} is a word of the vocabulary already; give one that is not, such as '<zork>'."
            )

    def _set_learned(self, learned: dict[str, Tensor]) -> None:
        """Give the network the rows of these tokens, in place of those that it has beside the vocabulary."""
        owner = getattr(self.network, "text_model", self.network).embeddings
        table = owner.token_embedding
        vocabulary = table.without() if isinstance(table, GrownEmbedding) else table
        with loading:  # while any thread loads a network, torch allocates no memory for new layers
            owner.token_embedding = (
                GrownEmbedding(vocabulary, torch.cat([*learned.values()])).eval() if learned else vocabulary
            )
        self.learned, self._learned = learned, LearnedTokens(learned, len(vocabulary.weight))

    def try_out(self) -> None:
        """Encode a chunk of token 0, which every vocabulary has."""
        self.network(torch.zeros(1, self.length, dtype=torch.int64, device=self.device))

    @blames_network
    def forward(self, ids: Tensor) -> Tensor:
        """Return the last hidden states (N, 77, D) of token ids (N, 77), with gradient, for training."""
        hidden: Tensor = self.network(ids.to(self.device)).last_hidden_state
        return hidden

    def tokenize(
        self, prompts: str | Sequence[str], *, weighting: bool = False, chunks: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Split prompts into chunks of tokens: start token, at most 75 tokens, end token, padding.

        Args:
            prompts: As in `encode`.
            weighting: As in `encode`.
            chunks: As in `encode`.

        Returns:
            Token ids and their weights, each (B, k, 77).
        """
        prompts = strings("prompts", prompts)
        rows = [self._chunks(prompt, weighting) for prompt in prompts]
        k = max(1 if chunks is None else whole_number("chunks", chunks, 1), *map(len, rows))
        ids = torch.full((len(prompts), k, self.length), self.tokenizer.pad_token_id)
        weights = torch.ones(ids.shape)
        for b, row in enumerate(rows):
            for c, chunk in enumerate([*row, *[[]] * (k - len(row))]):
                framed = [self.tokenizer.bos_token_id, *(token for token, _ in chunk), self.tokenizer.eos_token_id]
                ids[b, c, : len(framed)] = torch.tensor(framed)
                weights[b, c, 1 : len(framed) - 1] = torch.tensor([weight for _, weight in chunk])
        return ids, weights

    def spelled(self, ids: Tensor) -> str:
        """Return the text of token ids (k, 77), without special tokens. `tokenize` makes the same ids of it."""
        end = self.tokenizer.eos_token_id
        tokens = [token for chunk in ids.tolist() for token in chunk[1 : chunk.index(end, 1)]]
        with _tokenizing:
            text: str = self.tokenizer.decode(tokens)
        return text.strip()

    def _chunks(self, prompt: str, weighting: bool) -> list[Tokens]:
        """Return the prompt's tokens and weights in chunks of at most 75. With `weighting`, BREAK ends a chunk."""
        if not weighting:
            return self._filled(self._tokens(prompt, 1.0))
        warn_of_unread_syntax(prompt)
        sections: list[Tokens] = [[]]
        for text, weight in parse_weights(prompt):
            first, *others = _BREAK.split(text)
            sections[-1] += self._tokens(first, weight)
            sections += [self._tokens(other, weight) for other in others]
        if len(sections) > 1 and not sections[-1]:  # nothing follows the last BREAK
            sections.pop()
        return [chunk for section in sections for chunk in self._filled(section)]

    def _filled(self, tokens: Tokens) -> list[Tokens]:
        """Split tokens into chunks of at most 75; no tokens make one empty chunk.

        The vectors of a learned token stay together, as in A1111.
        """
        chunks: list[Tokens] = [[]]
        i = 0
        while i < len(tokens):
            together = tokens[i : i + self._learned.length(tokens[i][0])]
            if len(chunks[-1]) + len(together) > self.length - 2:
                chunks.append([])
            chunks[-1] += together
            i += len(together)
        return chunks

    def _tokens(self, text: str, weight: float) -> Tokens:
        ids: list[int] = []
        for piece in self._learned.split(text):
            ids += self._plain_tokens(piece) if isinstance(piece, str) else piece
        return [(token, weight) for token in ids]

    def _plain_tokens(self, text: str) -> list[int]:
        """Return the ids of a text without learned tokens."""
        with _tokenizing:
            encoded = self.tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        ids: list[int] = encoded.input_ids
        return ids

    @blames_network
    def _embed(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Return hidden states (N, 77, D), float32, of token ids (N, 77)."""
        if clip_skip == 0:
            return self(ids).float()  # type: ignore[no-any-return]
        hidden = self.network(ids.to(self.device), output_hidden_states=True).hidden_states[-1 - clip_skip]
        transformer = getattr(self.network, "text_model", self.network)  # older versions of transformers nest it
        return transformer.final_layer_norm(hidden).float()  # type: ignore[no-any-return]


_SYNTAX = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|[^\\()\[\]:]+|:|\\", re.DOTALL)
_BREAK = re.compile(r"\bBREAK\b")
_NOT_READ = {
    "joins two prompts": re.compile(r"\bAND\b"),
    "changes the prompt while it draws": re.compile(r"(?<!\\)\[[^\[\]]*:\s*[\d.]+\s*\]"),
    "alternates between words": re.compile(r"(?<!\\)\[[^\[\]|]*\|[^\[\]]*\]"),
    "loads a network, as load_lora (--lora) does here": re.compile(r"<\w+:[^<>]+>"),
}
"""Meaning in A1111 of syntax that sdkit does not support -> its pattern. Each pattern matches in linear time."""


def check_clip_skip(clip_skip: int, layers: int | None = None) -> int:
    """Return a number of layers to skip. Raise ArgumentError unless it leaves at least one of the encoder's `layers`.

    Args:
        clip_skip: Number of last layers to skip.
        layers: Number of layers of the text encoder; None sets no upper bound.
    """
    return whole_number("clip_skip", clip_skip, 0, None if layers is None else layers - 1)


def warn_of_unread_syntax(prompt: str) -> None:
    """Warn of each kind of A1111's syntax in `prompt` that sdkit reads as plain text."""
    for meaning, pattern in _NOT_READ.items():
        if found := pattern.search(prompt):
            # stacklevel=1 names this line, where Python shows a warning once. Prompts are read from several lines.
            warnings.warn(
                f"{clean(found[0])!r} in the prompt is read as plain text; in A1111 it {meaning}.", stacklevel=1
            )


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """Parse A1111's prompt syntax into pairs (text, weight).

    `(a)` has weight 1.1, `((a))` 1.21, `[a]` 1 / 1.1, and `(a:1.3)` 1.3. `\\(` is a literal bracket. Brackets that
    are still open at the end close there.
    """
    texts: list[str] = []
    round_, square = _Brackets(1.1), _Brackets(1 / 1.1)
    for match in _SYNTAX.finditer(prompt):
        symbol, weight = match[0], match[1]
        if symbol in ("(", "["):
            (round_ if symbol == "(" else square).open(len(texts))
        elif (symbol == ")" or weight is not None) and round_.opened:
            round_.close(len(texts), None if weight is None else float(weight))
        elif symbol == "]" and square.opened:
            square.close(len(texts))
        else:
            texts.append(symbol.removeprefix("\\"))
    weights = [a * b for a, b in zip(round_.products(len(texts)), square.products(len(texts)), strict=True)]
    pieces: list[tuple[str, float]] = []
    first = 0
    for _, group in itertools.groupby(weights, key="{:.12g}".format):  # ignore rounding errors
        end = first + sum(1 for _ in group)
        pieces.append(("".join(texts[first:end]), weights[first]))
        first = end
    return pieces


class _Brackets:
    """The brackets of one kind, round or square, in a prompt that is cut into pieces. They may nest.

    Attributes:
        factor: Weight of a bracket without a number.
        starts: First piece inside each bracket, in the order of their opening.
        ends: First piece after each bracket.
        factors: Weight of each bracket.
        opened: Indices into these lists of the brackets that are still open.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.factors: list[float] = []
        self.opened: list[int] = []

    def open(self, start: int) -> None:
        self.opened.append(len(self.starts))
        self.starts.append(start)
        self.ends.append(sys.maxsize)
        self.factors.append(self.factor)

    def close(self, end: int, factor: float | None = None) -> None:
        """Close the innermost bracket."""
        bracket = self.opened.pop()
        self.ends[bracket] = end
        self.factors[bracket] = self.factor if factor is None else factor

    def products(self, n: int) -> list[float]:
        """Return, for each of n pieces, the product of the weights of the brackets around it, in linear time."""
        products: list[float] = []
        # A stack of the brackets around the current piece: where each ends, and the product of weights down to it.
        ends, around = [sys.maxsize], [1.0]
        following = 0
        for i in range(n):
            while ends[-1] <= i:
                ends.pop()
                around.pop()
            while following < len(self.starts) and self.starts[following] == i:
                if self.ends[following] > i:  # an empty bracket surrounds no piece
                    ends.append(self.ends[following])
                    around.append(around[-1] * self.factors[following])
                following += 1
            products.append(around[-1])
        return products
