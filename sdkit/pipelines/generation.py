"""How an image was made: kept in its PNG, from which `sdkit generate --from` makes it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from sdkit import __version__, images, strict_json
from sdkit.arguments import PREDICTIONS, noise_levels, number, one_of, strings, whole_number
from sdkit.diffusion.schedule import SPACINGS
from sdkit.errors import ArgumentError, ImageError
from sdkit.loading.place import EMBEDDED
from sdkit.pipelines.steps import check_sampler, check_side

EARLIER_NAMES = {
    "steps": "num_inference_steps",
    "scale": "guidance_scale",
    "rescale": "guidance_rescale",
    "interval": "guidance_interval",
}
"""Keys in the text of PNGs of earlier versions -> today's."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """All that says what to draw: kept in a PNG's text, from which `sdkit generate --from` makes the image again.

    Fields have the names of the arguments of `StableDiffusion` and its `from_pretrained`, which explain them. None is
    the model's own.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    sampler: str = "ddim"
    num_inference_steps: int = 30
    guidance_scale: float | None = None
    eta: float = 0.0
    spacing: str | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
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
        """Raise `ArgumentError` for what no model takes, before one is loaded."""
        strings("prompt", self.prompt)
        strings("negative_prompt", self.negative_prompt)
        whole_number("seed", self.seed, 0, 2**63 - 1)
        whole_number("num_inference_steps", self.num_inference_steps, 1)  # the most is known to the model's schedule
        check_sampler(self.sampler, self.eta)
        one_of("spacing", self.spacing or SPACINGS[0], SPACINGS)
        number("the guidance scale", 0 if self.guidance_scale is None else self.guidance_scale, -1e6, 1e6)
        number("the guidance rescale (phi)", self.guidance_rescale, 0, 1)
        if self.guidance_interval is not None:
            noise_levels("the guidance interval", self.guidance_interval)
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
                check_side(name, pixels)

    def text(self) -> dict[str, str]:
        """The text chunks of a PNG; paths are absolute in it, since it is read elsewhere."""
        values = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        if self.guidance_interval is not None:
            values["guidance_interval"] = " ".join(map(str, self.guidance_interval))
        values |= {key: anywhere(values[key]) for key in ("model", "config", "vae") if key in values}
        for name, items in (("lora", [anywhere(lora) for lora in self.lora]), ("lora_scale", self.lora_scale)):
            if items:
                values[name] = _listed(items)
        return {key: str(value) for key, value in values.items()} | {"sdkit": __version__}

    @classmethod
    def read(cls, path: str | Path) -> Generation:
        """Read what the text of a PNG says, under today's names or earlier ones.

        Raises:
            ImageError: The image does not say how it was made, or its text is damaged.
        """
        text = {EARLIER_NAMES.get(key, key): value for key, value in images.read_text(path).items()}
        if not {"prompt", "seed", "sdkit"} <= set(text):
            raise ImageError(f"{path} does not say how it was made; give a PNG as sdkit generate wrote it.")
        if "lora" not in text:  # versions before several LoRAs wrote a scale all the same
            text.pop("lora_scale", None)
        names = [field.name for field in fields(cls) if field.name in text]
        return cls(**{name: _parsed(path, name, text[name]) for name in names})

    def but(self, **changes: Any) -> Generation:
        """Return a copy with some values changed.

        All that belonged to another model is forgotten, its VAE and LoRAs among it, and so are scales of other LoRAs.
        """
        if "lora" in changes:
            changes = {"lora_scale": (), **changes}
        if anywhere(changes.get("model", self.model)) != anywhere(self.model):
            of_model = (
                "guidance_scale",
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
    **dict.fromkeys(("seed", "num_inference_steps", "clip_skip", "height", "width"), int),
    **dict.fromkeys(("guidance_scale", "eta", "guidance_rescale"), float),
    "lora": _loras,
    "lora_scale": _scales,
    "guidance_interval": _interval,
    "weighting": {"True": True, "False": False}.__getitem__,
}
