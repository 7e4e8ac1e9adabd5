"""Model sources: the embedded model, a Hub id, a diffusers folder, or a single file, behind one class.

No code that comes with a model is run: configs are JSON, weights are safetensors or weights-only pickles, and networks
are built only from a fixed set of classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sdkit.arguments import PREDICTIONS, one_of
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import SourceError
from sdkit.loading import diffusers_folder, single_file, tokenizer
from sdkit.loading.configs import (
    CONDITION,
    GUIDANCE,
    INDEX,
    LOW_RES,
    MAP_CHANNELS,
    class_name,
    read_config,
    read_json,
)
from sdkit.loading.parts import CLASSIFIER, CONTROLNET, LOW_RES_SCHEDULER, PARTS, SCHEDULER, TEXT, UNET, VAE, Part
from sdkit.loading.place import Place, SourceName, absent, resolve
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tensors import is_file, open_tensors
from sdkit.messages import clean

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, UNet2DConditionModel, VQModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from sdkit.loading.encoder_unet import EncoderUNet

USUAL_GUIDANCE = 7.5


@dataclass(frozen=True, kw_only=True)
class Component:
    """Description of one part of a source. A value is None if it cannot be known without downloading the weights.

    Attributes:
        part: "vae", "unet", "controlnet", "classifier", "text", or "scheduler".
        class_name: The class that its config names.
        parameters: Number of parameters.
        dtype: The dtype that most parameters are stored in, such as "float16".
        bytes: Size of the weights.
        config: The values that matter: latent channels, scaling factor, cross-attention width, prediction type, ...
    """

    part: str
    class_name: str
    parameters: int | None = None
    dtype: str | None = None
    bytes: int | None = None
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Description:
    """Description of a source and its parts, made without loading them.

    Attributes:
        source: The source as the user gave it.
        kind: "embedded", "pixels", "hub", "folder", or "file".
        path: The folder or the file; for a Hub id, its snapshot in the cache.
        family: For a file: the public config that fits it ("sd1", "sd2", "sd2-v"), or the folder given as config.
        components: Its parts.
    """

    source: str
    kind: str
    path: Path
    family: str | None
    components: tuple[Component, ...]


class Source:
    """An open model source, from which its parts are loaded.

    All its methods raise SourceError for anything that is missing, damaged, or of another kind.

    Attributes:
        name: The source as the user gave it.
        place: Where it is.
    """

    def __init__(self, place: Place, backend: _Folder | _File, prediction_type: str | None) -> None:
        self.place = place
        self.name = place.name
        self._backend = backend
        self._prediction_type = prediction_type

    @classmethod
    def open(
        cls,
        name: SourceName,
        *,
        revision: str | None = None,
        variant: str | None = None,
        config: SourceName | None = None,
        prediction_type: str | None = None,
    ) -> Source:
        """Find a source and open it. The header of a file is read here, once for all its parts.

        Args:
            name: Anything that `sdkit.StableDiffusion.from_pretrained` takes; or one part's own folder, file, or Hub
                repository.
            revision: A branch, tag, or commit of a Hub repository.
            variant: The variant of the weights in a folder or Hub repository, such as "fp16".
            config: A folder or Hub id with the configs for a single file, in place of the public ones.
            prediction_type: The noise schedule's prediction type, in place of the source's own: diffusers' names, or
                "eps", "v", and "x0" for short.
        """
        if prediction_type is not None:
            prediction_type = PREDICTIONS[one_of("prediction_type", prediction_type, PREDICTIONS)]
        place = resolve(name, revision=revision, variant=variant, config=config)
        backend = _File(place, config) if place.kind == "file" else _Folder(place, variant)
        return cls(place, backend, prediction_type)

    def autoencoder(self, dtype: torch.dtype = torch.float32) -> AutoencoderKL | AutoencoderTiny | VQModel:
        """Load the VAE's network, in eval mode, on the CPU, converted to `dtype`. "pixels" is a `PixelIdentity`."""
        return cast("AutoencoderKL | AutoencoderTiny | VQModel", self._backend.network(VAE, dtype))

    @property
    def takes_text(self) -> bool:
        """Whether the U-Net attends to text. A `UNet2DModel` does not, and has no text encoder beside it."""
        try:
            return self._backend.unet_class() != "UNet2DModel"
        except SourceError:
            return True  # `denoiser` says what is wrong with it

    def denoiser(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        inpainting: bool = False,
        conditioned: bool = False,
        embedded: bool = False,
    ) -> UNet2DConditionModel:
        """Load the U-Net's network, in eval mode, on the CPU, converted to `dtype`.

        Args:
            dtype: The dtype of its weights.
            inpainting: Whether it may be an inpainting model, which also takes a mask and the latents of an image.
            conditioned: Whether it may be one that takes a condition beside x_t; see `condition_of`.
            embedded: Whether it may be one that takes the embedding of an image, as unCLIP's decoder does.
        """
        unet = cast("UNet2DConditionModel", self._backend.network(UNET, dtype))
        label, settings = self.place.label, cast("Any", unet.config)
        if not hasattr(settings, "cross_attention_dim"):
            return unet
        upscales = condition_of(settings) == LOW_RES  # noise levels are its class embeddings
        decodes = embedded and settings.class_embed_type == "projection"
        other = adds_more_than_text(settings) or settings.class_embed_type or settings.num_class_embeds
        if other and not upscales and not decodes:
            raise SourceError(f"{label} holds a U-Net of Stable Diffusion XL or of another kind; give SD 1.x or 2.x.")
        latents, condition = latent_channels(settings), condition_of(settings)
        accepted = [latents, *([2 * latents + 1] if inpainting else [])]
        if condition is not None:
            wanted = latents + condition_channels(condition, latents)
            if settings.in_channels != wanted:
                raise SourceError(
                    f"the U-Net of {label} has {settings.in_channels} input channels, and {wanted} with the condition "
                    f"that its config names ({CONDITION}: {condition}); correct the config."
                )
            accepted += [wanted] if conditioned else []
        if settings.in_channels not in accepted:
            name = single_file.INPUTS.get(settings.in_channels, "another kind of model")
            name = "a model that takes a map beside x_t" if condition == "map" else name
            name = "an upscaler" if condition == LOW_RES else name
            raise SourceError(
                f"{label} looks like {name} ({settings.in_channels} input channels); give a text-to-image model."
            )
        return unet

    def controlnet(self, dtype: torch.dtype = torch.float32) -> ControlNetModel:
        """Load the ControlNet's network, in eval mode, on the CPU, converted to `dtype`."""
        controlnet = cast("ControlNetModel", self._backend.network(CONTROLNET, dtype))
        settings = cast("Any", controlnet.config)
        if adds_more_than_text(settings) or settings.class_embed_type or settings.num_class_embeds:
            raise SourceError(
                f"{self.place.label} holds a ControlNet of Stable Diffusion XL or of another kind; give one of SD 1.x "
                "or 2.x."
            )
        return controlnet

    def classifier(self, dtype: torch.dtype = torch.float32) -> EncoderUNet:
        """Load the network of a classifier of noisy images, in eval mode, on the CPU, converted to `dtype`."""
        return cast("EncoderUNet", self._backend.network(CLASSIFIER, dtype))

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> tuple[CLIPTextModel, CLIPTokenizer]:
        """Load the text encoder's network, in eval mode, on the CPU, converted to `dtype`; and its tokenizer.

        If the source is a text encoder's own folder, the tokenizer is in it or in ../tokenizer.
        """
        text = self._backend.network(TEXT, dtype)
        words = self._backend.tokenizer()
        size = text.config.vocab_size
        if len(words) > size:
            raise SourceError(
                f"the tokenizer of {self.place.label} has {len(words)} tokens, its text encoder {size}; "
                "give the tokenizer that belongs to it."
            )
        token, number = max(words.get_vocab().items(), key=lambda item: item[1])
        if number >= size:
            raise SourceError(
                f"the tokenizer of {self.place.label} gives {clean(token)!r} the id {number}, beyond the {size} of its "
                "text encoder; give the tokenizer that belongs to it."
            )
        return cast("CLIPTextModel", text), words

    def scheduler_config(self) -> dict[str, Any]:
        """Return the noise schedule as diffusers writes it in scheduler_config.json.

        The prediction type of a single file comes from the first of these that states it: the argument of `open`; the
        file's metadata; its marker key `v_pred`; for SD 2.x without a config given to `open`, a trial run of the U-Net;
        the config. The marker key `ztsnr` means zero terminal SNR.
        """
        return self._backend.scheduler_config(self._prediction_type)

    def schedule(self, *, latents: bool = True) -> NoiseSchedule:
        """Return the noise schedule.

        Args:
            latents: Whether the model denoises latents. x0 is then not clipped, and `steps_offset` is 1, whatever the
                config says: see `NoiseSchedule.from_config`. False, for a model of pixels, takes the config as it is.
        """
        return NoiseSchedule.from_config(self.scheduler_config(), latents=latents)

    def low_res_config(self) -> dict[str, Any] | None:
        """Return the schedule by which an upsampler's low-resolution image is noised, from low_res_scheduler; None if
        there is none."""
        return self._backend.low_res_config()

    @property
    def guidance_scale(self) -> float:
        """The guidance scale that suits the model best: the one in its model_index.json, or Stable Diffusion's 7.5; or
        1, if the model takes no text."""
        index, usual = self._backend.index(), USUAL_GUIDANCE if self.takes_text else 1.0
        return float(read_config(index, INDEX).get(GUIDANCE, usual)) if is_file(index) else usual

    def describe(self) -> Description:
        """Describe the source by its configs and headers alone. No weights are downloaded from the Hub."""
        path, family, components = self._backend.description()
        return Description(
            source=self.name,
            kind=self.place.kind,
            path=path,
            family=family,
            components=components,
        )


def latent_channels(unet: Any) -> int:
    """Return the channels of the latents that a U-Net denoises, by its config. With twice as many outputs as inputs,
    the second half is a learned variance."""
    return int(unet.in_channels if unet.out_channels == 2 * unet.in_channels else unet.out_channels)


def adds_more_than_text(network: Any) -> bool:
    """Return whether a U-Net or ControlNet, by its config, adds more than the pooled text to the timestep."""
    return network.addition_embed_type not in (None, "text")


def condition_of(unet: Any) -> str | None:
    """Return what a U-Net takes beside x_t by its config: "latents", "map", or "low_res"; None if it takes nothing, or
    a mask, too.

    Without a word on it, twice as many inputs as latents are InstructPix2Pix's (Brooks et al. 2023): x_t and "latents".
    Three more inputs than latents, and class embeddings, are an upscaler's: "low_res".
    """
    stated: str | None = unet.get(CONDITION)
    if stated:
        return stated
    latents = latent_channels(unet)
    upscales = unet.in_channels == latents + MAP_CHANNELS and (unet.num_class_embeds or unet.class_embed_type)
    if upscales and latents != MAP_CHANNELS:
        return LOW_RES
    return "latents" if unet.in_channels == 2 * latents else None


def condition_channels(condition: str, latents: int) -> int:
    """Return the number of channels of a condition beside latents of that many channels."""
    return latents if condition == "latents" else MAP_CHANNELS


class _Folder:
    """A model in diffusers layout: embedded, "pixels", in a folder, or on the Hub."""

    def __init__(self, place: Place, variant: str | None) -> None:
        self.place = place
        self.variant = variant

    def network(self, part: Part, dtype: torch.dtype) -> Any:
        return diffusers_folder.load_network(self.place, part, dtype, self.variant)

    def unet_class(self) -> str:
        folder = diffusers_folder.locate(self.place, UNET)
        return diffusers_folder.class_of(read_json(folder / UNET.config), UNET)

    def tokenizer(self) -> CLIPTokenizer:
        return diffusers_folder.load_place_tokenizer(self.place)

    def scheduler_config(self, prediction_type: str | None) -> dict[str, Any]:
        schedule = read_config(diffusers_folder.locate(self.place, SCHEDULER) / SCHEDULER.config, SCHEDULER.checks)
        return schedule | ({"prediction_type": prediction_type} if prediction_type else {})

    def low_res_config(self) -> dict[str, Any] | None:
        path = self.place.root([LOW_RES_SCHEDULER.config_path]) / LOW_RES_SCHEDULER.config_path
        return read_config(path, LOW_RES_SCHEDULER.checks) if is_file(path) else None

    def index(self) -> Path:
        return self.place.root(["model_index.json"]) / "model_index.json"

    def description(self) -> tuple[Path, str | None, tuple[Component, ...]]:
        path = self.place.root([name for part in PARTS.values() for name in diffusers_folder.config_files(part)])
        components = tuple(_describe_folder(self.place, path))
        if not components:
            raise absent(self.place, "model in diffusers layout (vae/config.json, unet/config.json, ...)")
        return path, None, components


class _File:
    """A file in the original layout, and the folder of configs for it."""

    def __init__(self, place: Place, config: SourceName | None) -> None:
        self.place = place
        self.config = config
        self._probed: str | None = None
        self.file = open_tensors(place.path)
        single_file.check_kind(self.file)

    @cached_property
    def configs(self) -> Path:
        """The folder of configs: the user's own, or the public ones that fit the shapes of the tensors."""
        if self.config is None:
            return ASSETS / single_file.family_of(self.file)
        own = resolve(self.config)
        if own.kind == "file":
            raise SourceError(f"config={own.label} is a file; give a folder (or a Hub id) in diffusers layout.")
        files = [part.config_path for part in PARTS.values()] + [f"tokenizer/{name}" for name in tokenizer.FILES]
        return own.root(files)

    def network(self, part: Part, dtype: torch.dtype) -> Any:
        network = single_file.load_network(self.file, part, self.configs, dtype)
        if part is UNET and self.unstated and self.probed(network) == "v_prediction":
            network.register_to_config(sample_size=read_json(ASSETS / "sd2-v" / "unet" / "config.json")["sample_size"])
        return network

    def unet_class(self) -> str:
        return "UNet2DConditionModel"

    def tokenizer(self) -> CLIPTokenizer:
        return tokenizer.load_tokenizer(self.configs / "tokenizer")

    def scheduler_config(self, prediction_type: str | None) -> dict[str, Any]:
        configs = self.configs
        single_file.require(self.file, UNET)
        if not prediction_type:
            prediction_type = self.probed() if self.unstated else single_file.marked_prediction(self.file)
        schedule = read_config(configs / SCHEDULER.config_path, SCHEDULER.checks)
        if prediction_type:
            schedule["prediction_type"] = prediction_type
        if "ztsnr" in self.file.shapes:
            schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return schedule

    def low_res_config(self) -> None:
        return None

    def index(self) -> Path:
        return self.place.path / "model_index.json"  # never exists: a single file has no index

    def description(self) -> tuple[Path, str | None, tuple[Component, ...]]:
        family = self.configs.name if self.config is None else str(self.config)
        return self.place.path, family, tuple(self._components())

    @property
    def unstated(self) -> bool:
        """Whether the prediction type of an SD 2.x file is unknown: neither the file nor a given config states it."""
        return self.configs == ASSETS / "sd2" and not single_file.marked_prediction(self.file)

    def probed(self, unet: Any = None) -> str:
        """Return the prediction type of an SD 2.x file that does not state it, found by running its U-Net.

        The run takes seconds, and both the U-Net and the schedule need the result, so it is cached. The U-Net is loaded
        unless `unet` is given.
        """
        if self._probed is None:
            unet = unet or single_file.load_network(self.file, UNET, ASSETS / "sd2", torch.float32)
            self._probed = single_file.probe_prediction(unet)
        return self._probed

    def _components(self) -> Iterator[Component]:
        file, configs = self.file, self.configs
        for part in PARTS.values():
            if keys := single_file.keys_of(file, part):
                yield _component(part, single_file.config_of(file, part, configs), file.summary(keys))
        if single_file.keys_of(file, UNET):
            schedule = read_config(configs / SCHEDULER.config_path, SCHEDULER.checks)
            marked = single_file.marked_prediction(file)
            stated = None if self.unstated else marked or schedule.get("prediction_type")
            yield _component(SCHEDULER, schedule | {"prediction_type": stated})


def _describe_folder(place: Place, root: Path) -> Iterator[Component]:
    for part in PARTS.values():
        path = next((path for path in (root / part.config_path, root / part.config) if is_file(path)), None)
        if path and part.accepts(name := diffusers_folder.class_of(read_json(path), part)):
            config = read_config(path, part.checks) | {"_class_name": name}
            file = diffusers_folder.open_weights(place, part, path.parent)
            yield _component(part, config, file.summary(file.shapes) if file else (None, None, None))


def _component(
    part: Part, config: dict[str, Any], weights: tuple[int | None, str | None, int | None] = (None, None, None)
) -> Component:
    shown = {key: config.get(key, default) for key, default in part.shown.items()}
    if part is VAE:
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (64,)
        shown["factor"] = 2 ** (len(levels) - 1)
    parameters, dtype, size = weights
    name = class_name(config)
    if name == "UNet2DModel":  # it has no cross-attention, and the defaults of the rest are its own
        shown = {"in_channels": config.get("in_channels", 3), "num_class_embeds": config.get("num_class_embeds")}
        shown["sample_size"] = config.get("sample_size")
    return Component(part=part.name, class_name=name, parameters=parameters, dtype=dtype, bytes=size, config=shown)
