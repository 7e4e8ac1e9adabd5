"""The conditions of a prior over codes, as users give them: prompts, classes, and maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdkit.arguments import strings, whole_number
from sdkit.errors import ArgumentError, SourceError
from sdkit.messages import clean
from sdkit.networks.class_list import ClassList, plain
from sdkit.networks.prior_shape import PriorShape
from sdkit.pipelines.code_sampling import CodeSampling


class ConditionReader:
    """Turns what a user gives into the conditions of a prior.

    Args:
        shape: The shape of the prior.
        tokenizer: The tokenizer of a prior of texts.
        codes: Returns the codes (B, h, w) of images, for a prior of maps.

    Raises:
        SourceError: The prior reads texts, and the tokenizer is missing or has more tokens than the prior.
    """

    def __init__(self, shape: PriorShape, tokenizer: Any, codes: Callable[[Any], Tensor]) -> None:
        if shape.condition == "text" and (tokenizer is None or len(tokenizer) > shape.tokens):
            held = "no tokenizer" if tokenizer is None else f"a tokenizer of {len(tokenizer)}"
            raise SourceError(f"the prior reads texts of {shape.tokens} tokens, and there is {held}; give its own.")
        self.shape, self.tokenizer, self.codes = shape, tokenizer, codes

    def __call__(
        self, condition: Any, each: int | None, sampling: CodeSampling, count: int = 1
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """Return conditions (B, ...) as the prior takes them, those that stand for none, and B.

        Args:
            condition: What the user gave.
            each: Images of each condition; None takes one condition for all `count` images, or one for each.
            sampling: How codes are drawn.
            count: Number of images, if `each` is None.

        Raises:
            ArgumentError: The prior has no such condition, or their number does not fit.
        """
        kind = self.shape.condition
        if kind is None:
            if condition is not None:
                raise ArgumentError("this prior has no condition; leave the condition out.")
            if sampling.guidance_scale != 1:
                raise ArgumentError("this prior has no condition to guide by; leave guidance_scale out.")
            return None, None, count if each is None else each
        found = self._none() if condition is None else self._read(condition)
        if each is not None:
            found = found.repeat_interleave(each, 0)
        elif len(found) == 1:
            found = found.expand(count, *found.shape[1:])
        elif len(found) != count:
            raise ArgumentError(f"{len(found)} conditions cannot serve {count} images: give one, or one for each.")
        uncond = self._none(found.shape[1:] if kind == "map" else None)
        return found, uncond.expand(len(found), *uncond.shape[1:]), len(found)

    def _none(self, size: tuple[int, ...] | None = None) -> Tensor:
        """Return the condition (1, ...) that stands for none: the empty text, or the prior's own value for it."""
        shape = self.shape
        if shape.condition == "text":
            return text_ids(self.tokenizer, [""], shape.condition_shape[0])
        return torch.full((1, *(shape.condition_shape if size is None else size)), shape.tokens)

    def _read(self, condition: Any) -> Tensor:
        """Return the conditions (B, ...) that a user gave."""
        shape = self.shape
        if shape.condition == "text":
            return text_ids(self.tokenizer, strings("the prompt", condition), shape.condition_shape[0])
        if shape.condition == "class":
            labels = condition if isinstance(condition, (list, tuple)) else [condition]
            if not labels:
                raise ArgumentError("there is no class in the list; give at least one.")
            return torch.tensor([_class_number(label, shape) for label in labels])
        return self.codes(condition)


def text_ids(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Return token ids (B, L): the start token, at most L - 2 tokens of each text, the end token, and padding.

    They are the first chunk of `TextEncoder.tokenize`; longer texts are cut.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: B texts.
        length: L.
    """
    rows = torch.full((len(texts), length), tokenizer.pad_token_id)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False, truncation=False, padding=False, verbose=False).input_ids
        framed = [tokenizer.bos_token_id, *ids[: length - 2], tokenizer.eos_token_id]
        row[: len(framed)] = torch.tensor(framed)
    return rows


def _class_number(label: Any, shape: PriorShape) -> int:
    """Return the number of a class that is given by its number or its name; "" is the number that stands for none."""
    if isinstance(label, str):
        if not plain(label):
            return shape.tokens
        number = ClassList(shape.classes).number(label)
        if number is not None:
            return number
        known = f"its {len(shape.classes)}, such as {clean(repr(shape.classes[0]))}"
        raise ArgumentError(f"the prior knows no class {clean(repr(label))}; give one of {known}.")
    return whole_number("the number of a class", label, 0, shape.tokens - 1)
