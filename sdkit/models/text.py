"""The text encoder of Stable Diffusion: prompts of any length to the embeddings that the U-Net attends to."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdkit.arguments import strings, whole
from sdkit.device import resolve_device, resolve_dtype
from sdkit.models.source import load_text
from sdkit.models.wrapper import Wrapper, blames_network

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CHUNKS_AT_ONCE = 64
_one_at_a_time = threading.Lock()  # a tokenizer is not for several threads, and training loads in some


class TextEncoder(Wrapper):
    """CLIP's text transformer (Radford et al. 2021, https://arxiv.org/abs/2103.00020) with its tokenizer.

    Attributes: `network` and `tokenizer`, those of transformers; `length`, tokens of one chunk, its two end marks
        included (77); `width` D.
    """

    def __init__(self, network: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.network = network
        self.tokenizer: Any = tokenizer
        self.length = int(network.config.max_position_embeddings)
        self.width = int(network.config.hidden_size)

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
        """Load a text encoder and its tokenizer; parameters as in `sdkit.VAE.from_pretrained`."""
        device = resolve_device(device)
        dtype = resolve_dtype(dtype, device)
        text = cls(*load_text(source, dtype=dtype, revision=revision, variant=variant, config=config))
        text.name = str(source)
        return text.eval().to(device=device)

    def encode(
        self, prompts: str | Sequence[str], *, clip_skip: int = 0, weighting: bool = False, chunks: int | None = None
    ) -> Tensor:
        """Embeddings (B, 77k, D), float32, of B prompts, each encoded in k chunks of at most 75 tokens, as many as the
        longest prompt needs.

        clip_skip: how many of the last layers to pass over (A1111's "clip skip" less one); the final layer norm is
            applied all the same.
        weighting: read `(word:1.3)`, `(word)` (1.1) and `[word]` (1 / 1.1) as A1111 does, and weight those tokens'
            embeddings; `\\(` is a plain bracket.
        chunks: the least k, for prompts that are to be compared with longer ones.
        """
        layers = int(self.network.config.num_hidden_layers)
        clip_skip = whole("clip_skip", clip_skip, 0, layers - 1)
        ids, weights = self.tokenize(prompts, weighting=weighting, chunks=chunks)
        with torch.inference_mode():
            embedded = [self._embed(part, clip_skip) for part in ids.flatten(0, 1).split(CHUNKS_AT_ONCE)]
        embeddings = torch.cat(embedded).clone()  # outside of inference mode, so that autograd takes it
        if weighting:
            mean = embeddings.mean(dim=(1, 2), keepdim=True)
            embeddings = embeddings * weights.flatten(0, 1)[:, :, None].to(embeddings)
            embeddings = embeddings * (mean / embeddings.mean(dim=(1, 2), keepdim=True))
        return embeddings.reshape(len(ids), -1, self.width)

    def try_out(self) -> None:
        """Encode a chunk of the token that every vocabulary has."""
        self.network(torch.zeros(1, self.length, dtype=torch.int64, device=self.device))

    @blames_network
    def forward(self, ids: Tensor) -> Tensor:
        """Last hidden states (N, 77, D) of token ids (N, 77), with gradient, for training."""
        hidden: Tensor = self.network(ids.to(self.device)).last_hidden_state
        return hidden

    def tokenize(
        self, prompts: str | Sequence[str], *, weighting: bool = False, chunks: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token ids and their weights, each (B, k, 77): every chunk is begin, at most 75 tokens, end, padding."""
        prompts = strings("prompts", prompts)
        tokens = [self._tokens(prompt, weighting) for prompt in prompts]
        body = self.length - 2
        k = max(1 if chunks is None else whole("chunks", chunks, 1), *(-(-len(row) // body) for row in tokens))
        ids = torch.full((len(prompts), k, self.length), self.tokenizer.pad_token_id)
        weights = torch.ones(ids.shape)
        for b, row in enumerate(tokens):
            for c in range(k):
                chunk = row[c * body : (c + 1) * body]
                framed = [self.tokenizer.bos_token_id, *(token for token, _ in chunk), self.tokenizer.eos_token_id]
                ids[b, c, : len(framed)] = torch.tensor(framed)
                weights[b, c, 1 : len(framed) - 1] = torch.tensor([weight for _, weight in chunk])
        return ids, weights

    def _tokens(self, prompt: str, weighting: bool) -> list[tuple[int, float]]:
        pieces = parse_weights(prompt) if weighting else [(prompt, 1.0)]
        tokens: list[tuple[int, float]] = []
        for text, weight in pieces:
            with _one_at_a_time:
                encoded = self.tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False)
            tokens += [(token, weight) for token in encoded.input_ids]
        return tokens

    @blames_network
    def _embed(self, ids: Tensor, clip_skip: int) -> Tensor:
        """Hidden states (N, 77, D), float32, of token ids (N, 77)."""
        if clip_skip == 0:
            return self(ids).float()  # type: ignore[no-any-return]
        hidden = self.network(ids.to(self.device), output_hidden_states=True).hidden_states[-1 - clip_skip]
        transformer = getattr(self.network, "text_model", self.network)  # transformers 4 nests it, 5 does not
        return transformer.final_layer_norm(hidden).float()  # type: ignore[no-any-return]


_SYNTAX = re.compile(r"\\[()\[\]\\]|[()\[\]]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:|\\", re.DOTALL)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """A1111's prompt syntax as (text, weight) pairs: `(a)` 1.1, `((a))` 1.21, `[a]` 1 / 1.1, `(a:1.3)` 1.3; `\\(`
    escapes; open brackets close at the end."""
    pieces: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # brackets not yet closed: the first piece inside

    def close(start: int, factor: float) -> None:
        pieces[start:] = [(text, weight * factor) for text, weight in pieces[start:]]

    for match in _SYNTAX.finditer(prompt):
        symbol = match[0]
        if symbol in opened:
            opened[symbol].append(len(pieces))
        elif match[1] is not None and opened["("]:
            close(opened["("].pop(), float(match[1]))
        elif symbol == ")" and opened["("]:
            close(opened["("].pop(), 1.1)
        elif symbol == "]" and opened["["]:
            close(opened["["].pop(), 1 / 1.1)
        else:
            pieces.append((symbol.removeprefix("\\"), 1.0))
    for start in opened["("]:
        close(start, 1.1)
    for start in opened["["]:
        close(start, 1 / 1.1)
    groups = itertools.groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), weight) for weight, group in groups]
