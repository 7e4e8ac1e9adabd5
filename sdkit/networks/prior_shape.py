"""The shape of a prior over codes: what its network is built from, and what config.json in its folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from sdkit.errors import SourceError
from sdkit.loading.configs import LAYERS
from sdkit.messages import clean
from sdkit.strict_json import require

KINDS = ("transformer", "pixelcnn")
CONDITIONS = ("text", "class", "map")
CLASS = "CodePrior"
"""Name of the class in the config of a prior."""
LARGEST = 1_000_000
"""Largest number in the config of a prior."""


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """Everything that the network of a prior is built from.

    Attributes:
        kind: "transformer" or "pixelcnn".
        codes: N, the number of codes in the codebook.
        grid: Height and width, in codes, of the images that it is trained on.
        condition: What it is conditioned on: "text", "class", "map", or None.
        condition_shape: Shape of one condition: (L,) tokens of a text, () for a class, (h', w') codes of a map.
        tokens: T, the number of values that an entry of a condition can have. The value T stands for a condition that
            is left out.
        classes: Names of the classes.
        layers: Number of layers.
        width: Number of channels.
        heads: Attention heads of a transformer.
    """

    kind: str
    codes: int
    grid: tuple[int, int]
    condition: str | None = None
    condition_shape: tuple[int, ...] = ()
    tokens: int = 0
    classes: tuple[str, ...] = ()
    layers: int
    width: int
    heads: int = 1

    @property
    def prefix(self) -> int:
        """Number of tokens in front of the codes of a transformer: those of the condition, or one that starts."""
        return prod(self.condition_shape)

    @property
    def ratio(self) -> int:
        """Codes that one code of a map stands for, on each side; 1 if there is no map."""
        return self.grid[0] // self.condition_shape[0] if self.condition == "map" else 1

    def no_condition(self) -> Tensor:
        """Return the condition that stands for none, int64. For a text, the empty text is used instead."""
        return torch.full(self.condition_shape, self.tokens)

    def asdict(self) -> dict[str, Any]:
        """Return the config as it is saved."""
        return {"_class_name": CLASS, **asdict(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], label: str) -> PriorShape:
        """Check a config and return the shape.

        Args:
            config: The fields, from a file that may be damaged.
            label: Name of the file, for messages.

        Raises:
            SourceError: A field is missing, or cannot be.
        """
        if config.get("_class_name") != CLASS:
            found = clean(config.get("_class_name"))
            raise SourceError(f"{label} is the config of {found}, not of a {CLASS}; give the folder of train prior.")
        kinds: dict[str, Any] = {
            "kind": str, "codes": int, "grid": list, "condition_shape": list, "tokens": int, "classes": list,
            "layers": int, "width": int, "heads": int,
        }  # fmt: skip
        try:
            require(config, kinds)
        except ValueError as error:
            raise SourceError(f"{label} {error}; give the folder that train prior wrote.") from error
        fields: dict[str, Any] = {name: tuple(config[name]) if kinds[name] is list else config[name] for name in kinds}
        fields["condition"] = config.get("condition")
        if (wrong := _wrong(fields)) is not None:
            raise SourceError(f"{label} has {wrong} {clean(repr(config.get(wrong)))}, which cannot be; correct it.")
        return cls(**fields)


def _wrong(fields: Mapping[str, Any]) -> str | None:
    """Return the name of the first field with an impossible value, or None."""

    def whole(value: Any, low: int = 1, high: int = LARGEST) -> bool:
        return type(value) is int and low <= value <= high

    def wholes(values: Any, *lengths: int) -> bool:
        return len(values) in lengths and all(map(whole, values)) and prod(values) <= LARGEST

    grid, condition = fields["grid"], fields["condition"]
    axes = {"text": 1, "map": 2}.get(str(condition), 0)
    good = {
        "kind": fields["kind"] in KINDS,
        "codes": whole(fields["codes"]),
        "grid": wholes(grid, 2),
        "condition": condition is None
        or (isinstance(condition, str) and condition in CONDITIONS[fields["kind"] == "pixelcnn" :]),
        "condition_shape": wholes(fields["condition_shape"], axes)
        and (condition != "text" or fields["condition_shape"][0] >= 2),  # start and end token
        "tokens": whole(fields["tokens"], 0 if condition is None else 1),
        "classes": all(isinstance(name, str) for name in fields["classes"])
        and len(fields["classes"]) == (fields["tokens"] if condition == "class" else 0),
        "layers": whole(fields["layers"], high=LAYERS),
        "width": whole(fields["width"]),
        "heads": whole(fields["heads"]) and (fields["kind"] == "pixelcnn" or fields["width"] % fields["heads"] == 0),
    }
    if condition == "map" and good["grid"] and good["condition_shape"]:
        (height, width), (rows, columns) = grid, fields["condition_shape"]
        good["condition_shape"] = height % rows == 0 and height // rows * columns == width
    return next((name for name, fits in good.items() if not fits), None)
