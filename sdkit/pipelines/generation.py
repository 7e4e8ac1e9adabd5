"""`Generation`: all settings of an image as one value, stored in its PNG so that it can be drawn again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from sdkit import __version__, images, strict_json
from sdkit.arguments import PREDICTIONS, first_seed, number, one_of, strings, whole_number
from sdkit.diffusion.samplers import default_spacing
from sdkit.errors import ArgumentError, ImageError, SourceError
from sdkit.fields import with_inherited_fields
from sdkit.files import sha256
from sdkit.loading.embedding_file import Embedding, read_embedding
from sdkit.loading.lora_file import LoRA, read_lora
from sdkit.loading.place import EMBEDDED, PIXELS
from sdkit.messages import clean
from sdkit.pipelines import infotext
from sdkit.pipelines.concatenation import check_condition_settings
from sdkit.pipelines.controlnet import OWN, SHARED, check_control_numbers
from sdkit.pipelines.image_to_image import check_inputs
from sdkit.pipelines.settings import PIPELINE, DrawingSettings

EARLIER_NAMES = {
    "steps": "num_inference_steps",
    "scale": "guidance_scale",
    "rescale": "guidance_rescale",
    "interval": "guidance_interval",
}
"""Key in PNGs that earlier versions wrote -> the field of `Generation` that it is today."""
SOURCES = ("lora", "embedding", "controlnet", "control_image", "upsampler")
"""Fields with several files, folders, or Hub ids."""

INPUTS = {"image": "white", "mask_image": "black", "condition": "white"}
"""Field of an input image -> the colour behind its transparent pixels."""


@dataclass(frozen=True, kw_only=True)
class Generation(DrawingSettings):
    """Settings of an image. A PNG stores them as text, from which `sdkit generate --from` draws the image again.

    None stands for the model's own value.

    Attributes:
        prompt: The prompt.
        negative_prompt: The prompt to steer away from.
        seed: Seed of the noise.
        image: File of the image to start from.
        image_sha256: SHA-256 of that file.
        mask_image: File of the mask.
        mask_image_sha256: SHA-256 of that file.
        condition: File of the image that the U-Net reads beside the noise.
        condition_sha256: SHA-256 of that file.
        model: Source of the model; see `StableDiffusion.from_pretrained`, as for the next six fields.
        revision: Branch, tag, or commit of a Hub repository.
        variant: Variant of a repository's weight files.
        config: Folder of configs for a single file.
        prediction_type: Parameterisation of a single file.
        dtype: Precision of the networks.
        vae: Source of a VAE that replaces the model's own.
        lora: Sources of LoRAs, which are merged in this order.
        lora_scale: A scale for each LoRA; empty stands for 1 each.
        lora_sha256: SHA-256 of each of their files.
        embedding: Sources of textual inversion embeddings; see `StableDiffusion.load_embedding`.
        embedding_token: The token of each; empty stands for their own.
        embedding_sha256: SHA-256 of each of their files.
        controlnet: Sources of ControlNets; see `ControlNet.from_pretrained`.
        control_image: Files of the images that they read, one for each.
        control_image_sha256: SHA-256 of each of these files.
        upsampler: Sources of upsamplers, each of which enlarges the images of the model before it; see `Cascade`.
        noise_level: For an upsampler: noise added to the image to enlarge, a timestep. More noise lets it invent more.
            None is 20.
    """

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    image: str | None = None
    image_sha256: str | None = None
    mask_image: str | None = None
    mask_image_sha256: str | None = None
    condition: str | None = None
    condition_sha256: str | None = None
    model: str = "emoji"
    revision: str | None = None
    variant: str | None = None
    config: str | None = None
    prediction_type: str | None = None
    dtype: str = "auto"
    vae: str | None = None
    lora: tuple[str, ...] = ()
    lora_scale: tuple[float, ...] = ()
    lora_sha256: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()
    embedding_token: tuple[str, ...] = ()
    embedding_sha256: tuple[str, ...] = ()
    controlnet: tuple[str, ...] = ()
    control_image: tuple[str, ...] = ()
    control_image_sha256: tuple[str, ...] = ()
    upsampler: tuple[str, ...] = ()
    noise_level: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the keywords of the pipeline's call, except the prompt, the seed, and the images of `inputs`."""
        settings = {field.name: getattr(self, field.name) for field in fields(DrawingSettings)}
        return {"negative_prompt": self.negative_prompt, **settings}

    def check(self) -> None:
        """Raise ArgumentError for values that no model accepts, before one is loaded."""
        super().check()
        strings("prompt", self.prompt)
        strings("negative_prompt", self.negative_prompt)
        first_seed(self.seed, 1)
        check_inputs(self, image=self.image is not None, mask=self.mask_image is not None)
        check_condition_settings(self, condition=self.condition is not None)
        check_control_numbers(self, len(self.controlnet), len(self.control_image))
        self._check_upsampling()
        for scale in self.lora_scale:
            number("lora_scale", scale)
        if self.lora_scale and not self.lora:
            raise ArgumentError("lora_scale belongs to a LoRA, and there is none; name one as lora.")
        if len(self.lora_scale) not in (0, len(self.lora)):
            raise ArgumentError(
                f"{len(self.lora_scale)} of lora_scale cannot serve {len(self.lora)} LoRAs: give one for each, in the "
                "same order, or none."
            )
        if len(self.embedding_token) not in (0, len(self.embedding)):
            raise ArgumentError(
                f"{len(self.embedding_token)} of embedding_token cannot serve {len(self.embedding)} embeddings: give "
                "one for each, in the same order, or none."
            )
        for name in ("lora", "embedding", "control_image"):
            files, hashes = len(getattr(self, name)), len(getattr(self, f"{name}_sha256"))
            if hashes not in (0, files):
                raise ArgumentError(
                    f"{hashes} of {name}_sha256 cannot serve {files} of {name}: give one for each, or none."
                )
        if self.prediction_type is not None:
            one_of("prediction_type", self.prediction_type, PREDICTIONS)

    def _check_upsampling(self) -> None:
        """Raise ArgumentError for upsamplers, or their noise, beside something that excludes them."""
        excluded = ("image", "mask_image", "condition", "controlnet")
        if self.upsampler and (name := next((name for name in excluded if getattr(self, name)), None)):
            raise ArgumentError(f"upsampler enlarges images that are drawn of a prompt alone; leave {name} out.")
        if self.noise_level is None:
            return
        whole_number("noise_level", self.noise_level, 0)
        if not self.upsampler and self.condition is None:
            raise ArgumentError("noise_level belongs to an upsampler, and there is none; name one as upsampler.")

    def inputs(self) -> tuple[dict[str, Any], Generation]:
        """Read the image, the mask, and the condition.

        Returns:
            Keywords of the pipeline's call, and these settings with the SHA-256 of each file.

        Raises:
            ImageError: A file cannot be read, or has changed since these settings were written.
        """
        pictures: dict[str, Image.Image] = {}
        hashes: dict[str, str] = {}
        for name, background in INPUTS.items():
            path, expected = getattr(self, name), getattr(self, f"{name}_sha256")
            if path is None:
                continue
            pictures[name] = images.read(path, background)
            hashes[f"{name}_sha256"] = hashed(path, name, expected)
        return pictures, self.but(**hashes)

    def control_images(self) -> tuple[list[Image.Image], Generation]:
        """Read the images of the ControlNets.

        Returns:
            The images, and these settings with the SHA-256 of each file.

        Raises:
            ImageError: A file cannot be read, or has changed since these settings were written.
        """
        expected = self.control_image_sha256 or [None] * len(self.control_image)
        pictures = [images.read(path) for path in self.control_image]
        hashes = [hashed(path, "control_image", one) for path, one in zip(self.control_image, expected, strict=True)]
        return pictures, replace(self, control_image_sha256=tuple(hashes))

    def loras(self) -> tuple[list[tuple[LoRA, float]], Generation]:
        """Read the LoRAs.

        Returns:
            The LoRAs and their scales, and these settings with the SHA-256 of each file.

        Raises:
            SourceError: A file cannot be read, or has changed since these settings were written.
        """
        found = [read_lora(source) for source in self.lora]
        hashes = tuple(sha256(one.path) for one in found if one.path is not None)
        _check_unchanged("lora", [one.label for one in found], hashes, self.lora_sha256)
        scales = self.lora_scale or [1.0] * len(found)
        return list(zip(found, scales, strict=True)), replace(self, lora_sha256=hashes)

    def embeddings(self) -> tuple[list[Embedding], Generation]:
        """Read the textual inversion embeddings.

        Returns:
            The embeddings, and these settings with the token and the SHA-256 of each.

        Raises:
            SourceError: A file cannot be read, or has changed since these settings were written.
        """
        none = [None] * len(self.embedding)
        found = [
            read_embedding(source, token=token)
            for source, token in zip(self.embedding, self.embedding_token or none, strict=True)
        ]
        tokens, hashes = tuple(one.token for one in found), tuple(one.sha256 for one in found)
        _check_unchanged("embedding", [one.label for one in found], hashes, self.embedding_sha256)
        return found, replace(self, embedding_token=tokens, embedding_sha256=hashes)

    def text(self) -> dict[str, str]:
        """Return the text chunks of a PNG: each setting, and all of them as A1111 writes them (see `infotext`).

        Paths are absolute, since a PNG may be read from another folder.
        """
        values = {key: value for key, value in asdict(self).items() if value not in (None, ())}
        if self.guidance_interval is not None:
            values["guidance_interval"] = " ".join(map(str, self.guidance_interval))
        values |= {key: anywhere(values[key]) for key in ("model", "config", "vae", *INPUTS) if key in values}
        if self.condition is None:
            values.pop("image_guidance_scale")
        if not self.controlnet:
            values = {key: value for key, value in values.items() if key not in OWN}
        for name, value in values.items():
            if isinstance(value, (list, tuple)):
                values[name] = _listed([anywhere(item) for item in value] if name in SOURCES else value)
        own = {key: str(value) for key, value in values.items()}
        return {**own, "sdkit": __version__, infotext.KEY: infotext.infotext(self)}

    @classmethod
    def read(cls, path: str | Path) -> Generation:
        """Read the settings from the text chunks of a PNG, written by this version or an earlier one.

        Raises:
            ImageError: The PNG holds no settings, or its text is damaged.
        """
        text = {EARLIER_NAMES.get(key, key): value for key, value in images.read_text(path).items()}
        if not {"prompt", "seed", "sdkit"} <= set(text):
            raise ImageError(f"{path} does not say how it was made; give a PNG as sdkit generate wrote it.")
        if PIPELINE in text:
            kind = clean(repr(text[PIPELINE]))
            raise ImageError(f"{path} was drawn by a model of the kind {kind}, not by Stable Diffusion; give another.")
        if "lora" not in text:  # the first versions wrote a scale even without a LoRA
            text.pop("lora_scale", None)
        given = [field for field in fields(cls) if field.name in text]
        return cls(**{field.name: parsed(path, field, text[field.name]) for field in given})

    def but(self, **changes: Any) -> Generation:
        """Return a copy with some values changed.

        A change of the model resets all settings that belong to a model, its VAE, LoRAs, embeddings, ControlNets, and
        upsamplers included. A change of the LoRAs resets their scales, one of the embeddings their tokens, and one
        between samplers that need different spacings the spacing. An input that is given anew may hold anything.
        """
        if "control_image" in changes:
            changes = {"control_image_sha256": (), **changes}
        if "embedding" in changes:
            changes = {"embedding_token": (), "embedding_sha256": (), **changes}
        if "lora" in changes:
            changes = {"lora_scale": (), "lora_sha256": (), **changes}
        if default_spacing(changes.get("sampler", self.sampler)) != default_spacing(self.sampler):
            changes = {"spacing": None, **changes}
        changes = {**{f"{name}_sha256": None for name in INPUTS if name in changes}, **changes}
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
                "condition",
                "condition_sha256",
                "noise_level",
            )
            of_loras, of_embeddings = ("lora", "lora_scale", "lora_sha256"), ("embedding", "embedding_token")
            names = (*of_loras, *of_embeddings, "embedding_sha256", "controlnet", "upsampler")
            lists: dict[str, Any] = dict.fromkeys(names, ())
            if "controlnet" not in changes:
                lists |= {"control_image": (), "control_image_sha256": ()}
                lists |= {field.name: field.default for field in fields(self) if field.name in OWN}
            changes = {**dict.fromkeys(of_model), "image_guidance_scale": 1.0, **lists, **changes}
        return replace(self, **changes)


Generation.__doc__ = with_inherited_fields(Generation)


def hashed(path: str, name: str, expected: str | None) -> str:
    """Return the SHA-256 of an input's file. Raise ImageError if it is not the expected one."""
    found = sha256(Path(path))
    if expected not in (None, found):
        raise ImageError(
            f"{path} has changed since it was drawn from; restore it, or give it anew as {name} to draw from what it "
            "is now."
        )
    return found


def _check_unchanged(name: str, labels: Sequence[str], found: Sequence[str], expected: Sequence[str]) -> None:
    """Raise SourceError if a file is not the one that was drawn with.

    Args:
        name: Field of the files.
        labels: The files as messages name them.
        found: SHA-256 of each.
        expected: SHA-256 that each had; empty where that is not known.
    """
    for label, now, then in zip(labels, found, expected or found, strict=True):
        if now != then:
            raise SourceError(
                f"{label} has changed since it was drawn with; restore it, or give it anew as {name} to draw with what "
                "it is now."
            )


def anywhere(source: str) -> str:
    """Return the absolute path of a file or folder, and any other source unchanged."""
    path = os.path.expanduser(source)  # noqa: PTH111 - pathlib raises for unknown users and overlong names
    return os.path.abspath(path) if source not in (EMBEDDED, PIXELS) and os.path.exists(path) else source  # noqa: PTH100, PTH110


def parsed(path: str | Path, field: Field[Any], value: str) -> Any:
    """Parse the text of one field. Raise ImageError if it is damaged."""
    name = field.name
    parse = _PARSERS.get(name) or _TYPES[str(field.type).removesuffix(" | None")]
    try:
        return parse(value)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ImageError(f"{path} says {name} = {value[:40]!r}, which sdkit never writes; give another.") from error


def _listed(items: Sequence[str | float]) -> str:
    """Write one item as plain text, as the first versions did, and several items as a JSON list.

    An item that begins with "[" is written as a list too, since it would be read as one.
    """
    text = str(items[0])
    return text if len(items) == 1 and not text.startswith("[") else json.dumps(list(items))


def _items(text: str) -> list[Any]:
    """Read a list of items that `_listed` wrote."""
    found = strict_json.parse(text) if text.startswith("[") else [text]
    if not isinstance(found, list) or not all(isinstance(item, (str, int, float)) for item in found):
        raise ValueError("is no list")
    return found


def _texts(text: str) -> tuple[str, ...]:
    """Read a field of several texts."""
    return tuple(map(str, _items(text)))


def _numbers(text: str) -> tuple[float, ...]:
    """Read a field of several numbers."""
    return tuple(map(float, _items(text)))


def _one_or_more(text: str) -> float | tuple[float, ...]:
    """Read a field of one number or several."""
    numbers = _numbers(text)
    return numbers if text.startswith("[") else numbers[0]


def _interval(text: str) -> tuple[float, float]:
    """Read the field `guidance_interval`: two numbers."""
    low, high = map(float, text.split())
    return low, high


_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "bool": {"True": True, "False": False}.__getitem__,
}
"""Parsers of fields by their types."""
_PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys((*SOURCES, "control_image_sha256", "lora_sha256", "embedding_token", "embedding_sha256"), _texts),
    "lora_scale": _numbers,
    **dict.fromkeys(SHARED, _one_or_more),
    "guidance_interval": _interval,
}
"""Parsers of fields whose text is of a form of its own."""
