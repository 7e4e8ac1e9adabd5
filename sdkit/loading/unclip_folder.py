"""The parts of unCLIP (DALL-E 2) in the layout of diffusers' StableUnCLIPPipeline, beside those of Stable Diffusion."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkit.diffusion.embedding_noise import EmbeddingNoise
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import SourceError
from sdkit.files import expanded
from sdkit.loading import tokenizer
from sdkit.loading.configs import COUNT, WHOLE, WORD, Check, class_name, read_config, read_json
from sdkit.loading.parts import SCHEDULER
from sdkit.loading.place import absent, resolve
from sdkit.loading.shards import index_names, open_shards
from sdkit.loading.single_file import LARGEST
from sdkit.loading.tensors import (
    INDICES,
    TensorFile,
    check_dtypes,
    check_finite,
    check_fit,
    guarded,
    is_file,
    open_tensors,
)
from sdkit.loading.transformers_folder import SIZES, root_of
from sdkit.messages import clean

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CONFIG, SCHEDULER_CONFIG = "config.json", "scheduler_config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
PRIOR: Mapping[str, Check] = {
    **dict.fromkeys(("num_attention_heads", "attention_head_dim", "embedding_dim", "num_embeddings"), WHOLE),
    **dict.fromkeys(("num_layers", "additional_embeddings"), COUNT),
    "time_embed_act_fn": WORD,
}
"""Keys in the config of a prior -> their checks."""
PLAIN = ("layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
"""Further keys in the config of one of CLIP's encoders that are passed on."""
FOLDERS = {
    "prior": ("PriorTransformer", PRIOR),
    "prior_text_encoder": ("CLIPTextModelWithProjection", SIZES),
    "image_encoder": ("CLIPVisionModelWithProjection", SIZES),
    "image_normalizer": ("StableUnCLIPImageNormalizer", {"embedding_dim": WHOLE}),
}
"""Folder of a network -> the class that its config must name, and the checks of the config."""
LARGEST_BUFFERS = 2**26
"""Largest number of values in a network's buffers, such as a prior's mask of (L + 4)^2 for texts of L tokens."""
INDEX = "model_index.json"
CLASSES = {
    "feature_extractor": ("transformers", "CLIPImageProcessor"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "image_noising_scheduler": ("diffusers", "DDPMScheduler"),
    "image_normalizer": ("stable_diffusion", "StableUnCLIPImageNormalizer"),
    "prior": ("diffusers", "PriorTransformer"),
    "prior_scheduler": ("diffusers", "DDPMScheduler"),
    "prior_text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "prior_tokenizer": ("transformers", "CLIPTokenizer"),
}
"""Folder -> library and class, as in model_index.json."""


class UnCLIPFolder:
    """A folder or a Hub repository in the layout of StableUnCLIPPipeline, or of StableUnCLIPImg2ImgPipeline.

    All methods raise SourceError for what is missing, damaged, or of another kind.

    Args:
        source: The folder or the Hub id.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        self.place = resolve(source)

    def has(self, folder: str) -> bool:
        """Return whether there is a network in a folder."""
        return is_file(self._files(folder, [CONFIG]) / CONFIG)

    def network(self, folder: str) -> Any:
        """Load a network of `FOLDERS`, in eval mode, frozen, in float32, on the CPU."""
        from accelerate import init_empty_weights

        wanted, checks = FOLDERS[folder]
        path = self._files(folder, [CONFIG, *WEIGHTS, "*.safetensors.index.json", "*-of-*.safetensors"])
        if not is_file(path / CONFIG):
            raise absent(self.place, f"{folder}/{CONFIG}")
        config = read_config(path / CONFIG, checks)
        if (found := class_name(config)) != wanted:
            raise SourceError(f"{clean(path)!r} holds a {found}, not a {wanted}; give another source.")
        label = f"{folder}/ of {self.place.label}"
        file = self._weights(folder, path)
        keys = [key for key in file.shapes if not key.endswith(INDICES)]
        check_dtypes(file, keys)
        # Before memory is taken: a damaged config may ask for any amount of it.
        with guarded(label):
            outline = _outline(_class(wanted), config, path / CONFIG)
        check_fit(
            {key: file.shapes[key] for key in keys},
            {key: tuple(value.shape) for key, value in outline.state_dict().items()},
            f"the weights in {file.label} do not fit the config.json beside them",
        )
        with guarded(label), init_empty_weights():
            network = _empty(_class(wanted), config)
        with guarded(label):
            tensors = {key: value.to(torch.float32, copy=True) for key, value in file.read(keys).items()}
            network.load_state_dict(tensors, assign=True)
        check_finite(network, file, keys)
        return network.eval().requires_grad_(False)

    def _weights(self, folder: str, path: Path) -> TensorFile:
        """Open the weights in a folder."""
        for name in WEIGHTS:
            if is_file(path / name):
                return open_tensors(path / name)
            for index in index_names(name, None):
                if is_file(path / index):
                    return open_shards(path / index)
        raise absent(self.place, f"{folder}/{WEIGHTS[0]}")

    def copy(self, folders: Iterable[str], out: Path) -> None:
        """Copy those of `folders` that there are into a model's folder, and make it one of the unCLIP pipelines of
        diffusers: StableUnCLIPPipeline if it has a prior, else StableUnCLIPImg2ImgPipeline."""
        index = read_json(out / INDEX)
        for folder in folders:
            path = self._files(folder, ["*"])
            if path.is_dir():
                shutil.copytree(path, out / folder)
                index[folder] = CLASSES[folder]
        index["_class_name"] = "StableUnCLIPPipeline" if "prior" in index else "StableUnCLIPImg2ImgPipeline"
        unknown = ["image_encoder", "feature_extractor"] if "prior" in index else []  # `UnCLIP` finds them all the same
        for name in ("safety_checker", "requires_safety_checker", *unknown):
            index.pop(name, None)
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def tokenizer(self) -> CLIPTokenizer:
        """Load the tokenizer of the prior."""
        return tokenizer.load_tokenizer(self._files("prior_tokenizer", list(tokenizer.FILES)))

    def schedule(self, folder: str) -> NoiseSchedule:
        """Return the noise schedule of "prior_scheduler" or "image_noising_scheduler"."""
        return NoiseSchedule.from_config(self.scheduler_config(folder))

    def scheduler_config(self, folder: str) -> dict[str, Any]:
        """Return the noise schedule of a folder as diffusers writes it."""
        path = self._files(folder, [SCHEDULER_CONFIG]) / SCHEDULER_CONFIG
        if not is_file(path):
            raise absent(self.place, f"{folder}/{SCHEDULER_CONFIG}")
        return read_config(path, SCHEDULER.checks)

    def noise(self) -> EmbeddingNoise:
        """Return the noise augmentation: the statistics of image_normalizer, and image_noising_scheduler."""
        normalizer = self.network("image_normalizer")
        mean, std = (p.detach().reshape(-1) for p in (normalizer.mean, normalizer.std))
        if not bool((std > 0).all()):
            raise SourceError(f"image_normalizer of {self.place.label} has a std of 0 or less; give another source.")
        return EmbeddingNoise(mean=mean, std=std, schedule=self.schedule("image_noising_scheduler"))

    def _files(self, folder: str, names: list[str]) -> Path:
        """Return the path of a folder; from the Hub, first download the files in it."""
        return root_of(self.place, [f"{folder}/{name}" for name in names]) / folder


def _empty(cls: Any, config: Mapping[str, Any]) -> Any:
    """Return a network of a config. Only sizes and other plain values are passed on."""
    if hasattr(cls, "config_class"):  # of transformers
        known = {*SIZES, *PLAIN}
        return cls(cls.config_class(**{key: value for key, value in config.items() if key in known}))
    parameters = inspect.signature(cls.__init__).parameters
    return cls(**{key: value for key, value in config.items() if key in parameters})


def _outline(cls: Any, config: Mapping[str, Any], path: Path) -> Any:
    """Return a network of a config without memory. Raise SourceError if its buffers, which no file holds, are large."""
    with torch.device("meta"):
        network = _empty(cls, config)
    count = sum(buffer.numel() for buffer in network.buffers())
    if count > LARGEST_BUFFERS:
        raise SourceError(
            f"{clean(repr(str(path)))} asks for {count:,} numbers beside its weights, sdkit builds at most "
            f"{LARGEST_BUFFERS:,}; correct it."
        )
    return network


def new_prior(config: str | os.PathLike[str]) -> Any:
    """Return a PriorTransformer with random weights, in training mode, on the CPU.

    Args:
        config: A config.json of diffusers' PriorTransformer; or a folder with one, in itself or in prior/.

    Raises:
        SourceError: There is no config, or it is damaged, of another class, or of too large a network.
    """
    path = expanded(config)
    file = next((one for one in (path, path / CONFIG, path / "prior" / CONFIG) if is_file(one)), None)
    if file is None:
        raise SourceError(
            f"there is no config at {clean(path)!r}; give a config.json of diffusers' PriorTransformer, or a folder "
            "with one."
        )
    fields = read_json(file)
    if (found := fields.get("_class_name")) != "PriorTransformer":
        raise SourceError(f"{clean(file)!r} is the config of {clean(found)}, not of PriorTransformer; give another.")
    prior = _class("PriorTransformer")
    sizes = read_config(file, PRIOR)
    with guarded(f"the config {clean(repr(str(file)))}"):
        count = sum(p.numel() for p in _outline(prior, sizes, file).parameters())
        if count > LARGEST:
            raise SourceError(
                f"{clean(file)!r} asks for {count:,} parameters, sdkit builds at most {LARGEST:,}; correct it."
            )
        return _empty(prior, sizes).train()


def _class(name: str) -> Any:
    """Import the class of a network."""
    if name == "PriorTransformer":
        from diffusers import PriorTransformer

        return PriorTransformer
    if name == "StableUnCLIPImageNormalizer":
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

        return StableUnCLIPImageNormalizer
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    return CLIPTextModelWithProjection if "Text" in name else CLIPVisionModelWithProjection
