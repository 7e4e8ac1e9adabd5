"""How an image was made: kept in its PNG, from which `sdkit generate --from` makes it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdkit import __version__, images, strict_json
from sdkit.arguments import LONGEST_SIDE, PREDICTIONS, noise_levels, number, one_of, strings, whole_number
from sdkit.diffusion.samplers import SAMPLERS
from sdkit.diffusion.schedule import SPACINGS
from sdkit.errors import ArgumentError, ImageError
from sdkit.loading.source import EMBEDDED


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that an image is made of: the text of its PNG, from which `sdkit generate --from` makes it again.

    Values are explained, and checked, by `StableDiffusion` and its `from_pretrained`. None is the model's own.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    sampler: str = "ddim"
    steps: int = 30
    scale: float | None = None
    eta: float = 0.0
    spacing: str | None = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    clip_skip: int = 0
    weighting: bool = False
    height: int | None = None
    width: int | None = None
    model: str = "emoji"
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    prediction_type: str | None = None
    dtype: str = "auto"
    vae: str | None = None
    lora: tuple[str, ...] = ()
    lora_scale: tuple[float, ...] = ()
    """One for each LoRA, or none: then each is 1."""

    @property
    def loras(self) -> list[tuple[str, float]]:
        """Each LoRA with its scale."""
        return list(zip(self.lora, self.lora_scale or [1.0] * len(self.lora), strict=True))

    def check(self) -> None:
        """Raise `ArgumentError` for what no model takes, which `StableDiffusion` would tell only once it is loaded."""
        strings("prompt", self.prompt)
        strings("negative_prompt", self.negative_prompt)
        whole_number("seed", self.seed, 0, 2**63 - 1)
        whole_number("steps", self.steps, 1, 1000)
        one_of("sampler", self.sampler, SAMPLERS)
        if number("eta", self.eta, 0, 1) and self.sampler != "ddim":
            raise ArgumentError(f"eta belongs to sampler 'ddim'; '{self.sampler}' has none.")
        one_of("spacing", self.spacing or SPACINGS[0], SPACINGS)
        number("the guidance scale", 0 if self.scale is None else self.scale, -1e6, 1e6)
        number("the guidance rescale (phi)", self.rescale, 0, 1)
        if self.interval is not None:
            noise_levels("the guidance interval", self.interval)
        whole_number("clip_skip", self.clip_skip, 0)
        for scale in self.lora_scale:
            number("lora_scale", scale)
        if self.lora_scale and not self.lora:
            raise ArgumentError("lora_scale belongs to a LoRA, and there is none; name one as lora.")
        if len(self.lora_scale) not in (0, len(self.lora)):
            raise ArgumentError(
                f"{len(self.lora_scale)} of lora_scale cannot serve {len(self.lora)} LoRAs: give one for each, in the "
                "same order, or none."
            )
        if self.prediction_type is not None:
            one_of("prediction_type", self.prediction_type, PREDICTIONS)
        for name, pixels in (("height", self.height), ("width", self.width)):
            if pixels is not None:
                whole_number(name, pixels, 8, LONGEST_SIDE)

    def text(self) -> dict[str, str]:
        """The text chunks of a PNG; paths are absolute in it, since it is read elsewhere."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        if self.interval is not None:
            values["interval"] = " ".join(map(str, self.interval))
        values |= {key: anywhere(values[key]) for key in ("model", "config", "vae") if key in values}
        for name, items in (("lora", [anywhere(lora) for lora in self.lora]), ("lora_scale", self.lora_scale)):
            if items:
                values[name] = _listed(items)
        return {key: str(value) for key, value in values.items()} | {"sdkit": __version__}

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """The recipe in the text of a PNG. Raises `ImageError` for an image without one, and for damaged text."""
        text = images.read_text(path)
        if not {"prompt", "seed", "sdkit"} <= set(text):
            raise ImageError(f"{path} does not say how it was made; give a PNG as sdkit generate wrote it.")
        if "lora" not in text:  # versions before several LoRAs wrote a scale all the same
            text.pop("lora_scale", None)
        names = [field.name for field in fields(cls) if field.name in text]
        return cls(**{name: _parsed(path, name, text[name]) for name in names})

    def but(self, **changes: Any) -> Recipe:
        """This recipe with some values changed.

        All that belonged to another model is forgotten, its VAE and LoRAs among it, and so are scales of other LoRAs.
        """
        if "lora" in changes:
            changes = {"lora_scale": (), **changes}
        if anywhere(changes.get("model", self.model)) != anywhere(self.model):
            of_model = (
                "scale",
                "spacing",
                "height",
                "width",
                "revision",
                "variant",
                "config",
                "prediction_type",
                "vae",
            )
            changes = {**dict.fromkeys(of_model), "lora": (), "lora_scale": (), **changes}
        return replace(self, **changes)


def anywhere(source: str) -> str:
    """A file or a folder by its absolute path; another source as it is."""
    path = os.path.expanduser(source)  # noqa: PTH111 - pathlib's raise for unknown users and overlong names
    return os.path.abspath(path) if source != EMBEDDED and os.path.exists(path) else source  # noqa: PTH100, PTH110


def _parsed(path: str | Path, name: str, value: str) -> Any:
    try:
        return _PARSERS.get(name, str)(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"{path} says {name} = {value[:40]!r}, which sdkit never writes; give another.") from error


def _listed(items: Sequence[str | float]) -> str:
    """One item as it is, as before there could be several; else, and where it would read as one, a JSON list."""
    text = str(items[0])
    return text if len(items) == 1 and not text.startswith("[") else json.dumps(list(items))


def _items(text: str) -> list[Any]:
    found = strict_json.parse(text) if text.startswith("[") else [text]
    if not isinstance(found, list) or not all(isinstance(item, (str, int, float)) for item in found):
        raise ValueError("is no list")
    return found


def _loras(text: str) -> tuple[str, ...]:
    return tuple(map(str, _items(text)))


def _scales(text: str) -> tuple[float, ...]:
    return tuple(map(float, _items(text)))


def _interval(text: str) -> tuple[float, float]:
    low, high = map(float, text.split())
    return low, high


_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("seed", "steps", "clip_skip", "height", "width"), int),
    **dict.fromkeys(("scale", "eta", "rescale"), float),
    "lora": _loras,
    "lora_scale": _scales,
    "interval": _interval,
    "weighting": {"True": True, "False": False}.__getitem__,
}
