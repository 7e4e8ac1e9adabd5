"""Cases behind the guide "What loads": each makes a file or a folder as other programs produce it.

The docstring of a case is the first column of its row. The test reads the file, and compares the second column with
what happened. `python -m tests.what_loads` writes the guide again.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

import sdkit
from sdkit.cli.jobs import read_prompts
from sdkit.diffusion.schedule import SCHEDULERS
from sdkit.files import sha256
from sdkit.loading.configs import CLASSES
from sdkit.loading.single_file import ASSETS
from sdkit.networks.code_prior import new_prior, save_prior
from sdkit.networks.prior_shape import PriorShape
from sdkit.pipelines.generation import Generation
from sdkit.pipelines.other_generations import KINDS, CodeGeneration, UnCLIPGeneration, read_other
from sdkit.pipelines.settings import PIPELINE
from tests.helpers import classes, original_layout, tiny, unclip
from tests.helpers.color_profiles import P3, matrix_profile
from tests.helpers.networks import control_network

GUIDE = Path(__file__).parents[1] / "notebooks" / "what_loads.md"
HEAD = """# What loads

This page lists the layouts and kinds of files that sdkit reads or refuses, with its messages. A test makes each file,
reads it, and compares the result with this page, so the page cannot become outdated. `python -m tests.what_loads`
writes it.
"""
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kit:
    """A small Stable Diffusion 1.x with random weights, from which the cases are made.

    Attributes:
        root: Folder for its files.
    """

    root: Path

    @cached_property
    def folder(self) -> Path:
        """Return the model as a folder in diffusers layout."""
        here = self.root / "base"
        unet = {"block_out_channels": (8, 16, 16, 16), "sample_size": 8}
        networks = tiny.networks((8, 8, 8, 8), vae={"layers_per_block": 2}, unet=unet)
        networks.save(here)
        tiny.scheduler().save_pretrained(here / "scheduler")
        shutil.copytree(ASSETS / "clip_tokenizer", here / "tokenizer")
        shutil.copy(ASSETS / "sd1" / "tokenizer" / "tokenizer_config.json", here / "tokenizer")
        (here / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        return here

    @cached_property
    def original(self) -> Tensors:
        """Return the model's tensors in the original layout of CompVis."""
        unet, vae, text = (self.weights(part) for part in ("unet", "vae", "text_encoder"))
        tensors = original_layout.vae(vae) | original_layout.unet(unet, layers_per_block=2) | original_layout.clip(text)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    @property
    def vae(self) -> Tensors:
        """Return only the VAE's tensors, in the original layout of CompVis."""
        begin = original_layout.VAE_PREFIX
        return {name.removeprefix(begin): x for name, x in self.original.items() if name.startswith(begin)}

    def weights(self, part: str) -> Tensors:
        """Return the tensors of a part, with diffusers' names."""
        (file,) = (self.folder / part).glob("*.safetensors")
        return load_file(file)

    def copy(self, to: Path) -> Path:
        """Copy the model's folder to `to`, and return `to`."""
        shutil.copytree(self.folder, to)
        return to

    @cached_property
    def photos(self) -> Path:
        """Return a folder of three images with captions."""
        for i in range(3):
            picture(self.root / "photos" / f"{i}.png")
            (self.root / "photos" / f"{i}.txt").write_text("a dog")
        return self.root / "photos"

    @cached_property
    def cache(self) -> Path:
        """Return a latent cache of the photos."""
        return sdkit.data.cache(self.folder, self.photos, self.root / "cache", size=64, dtype="fp32", device="cpu")

    @cached_property
    def run(self) -> Path:
        """Return the folder of a run of one step."""
        return self.train(self.root / "run", 1)

    def train(self, out_dir: Path, steps: int) -> Path:
        """Train a LoRA up to step `steps`, or resume its training; return the run folder."""
        settings = sdkit.training.UNetConfig(
            model=self.folder, data=self.photos, out_dir=out_dir, size=64, max_steps=steps, lora_rank=1, ema_decay=0
        )
        return sdkit.training.train_unet(settings)

    @cached_property
    def controlnet(self) -> Path:
        """Return a folder with a ControlNet of the model in controlnet/, in diffusers layout."""
        from diffusers import UNet2DConditionModel

        here = self.root / "control"
        control_network(UNet2DConditionModel.from_pretrained(self.folder / "unet")).save_pretrained(here / "controlnet")
        return here

    @property
    def control(self) -> Tensors:
        """Return the ControlNet's tensors in the original layout."""
        (file,) = (self.controlnet / "controlnet").glob("*.safetensors")
        return original_layout.controlnet(load_file(file), layers_per_block=2)

    def lora(self, prefix: str = "lora_unet_") -> Tensors:
        """Return a LoRA of one layer, in kohya's layout."""
        name = f"{prefix}down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
        return {
            f"{name}.lora_down.weight": torch.full((2, 8), 0.01),
            f"{name}.lora_up.weight": torch.full((8, 2), 0.01),
            f"{name}.alpha": torch.tensor(2.0),
        }


def edited(path: Path, **changes: Any) -> Path:
    """Change keys of a JSON file in place, and return its path; a value of None removes the key."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return path


def written(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file, and return its path."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def picture(path: Path, **options: Any) -> Path:
    """Write an image file of 64 x 64 pixels in the format of its suffix, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (20, 120, 200)).save(path, **options)
    return path


def encoded() -> bytes:
    """Return the bytes of a PNG."""
    data = io.BytesIO()
    Image.new("RGB", (64, 64), (20, 120, 200)).save(data, "PNG")
    return data.getvalue()


Make = Callable[[Kit, Path], Any]


@dataclass(frozen=True)
class Case:
    """One row of the guide.

    Attributes:
        what: Its first column.
        make: Makes the files in a folder, and returns what `read` takes.
        read: Reads them with sdkit; a string that it returns is shown in the guide.
    """

    what: str
    make: Make
    read: Callable[[Any, Kit], object]


@dataclass
class Group:
    """One section of the guide: the cases that are read in the same way.

    Attributes:
        title: Heading of the section.
        read: Reads what a case has made.
        cases: Rows, in order.
    """

    title: str
    read: Callable[[Any, Kit], object]
    cases: list[Case] = field(default_factory=list)

    def __call__(self, make: Make) -> Make:
        """Add a case (as a decorator); its docstring becomes the first column of the row."""
        assert make.__doc__
        self.cases.append(Case(what=" ".join(make.__doc__.split()).rstrip("."), make=make, read=self.read))
        return make


def _model(source: Any, kit: Kit) -> object:
    options = {}
    if isinstance(source, tuple):
        source, options = source
    if isinstance(source, Path) and source.is_file():
        options = {"config": kit.folder, **options}
    sd = sdkit.StableDiffusion.from_pretrained(source, dtype="fp32", device="cpu", **options)
    condition = Image.new("RGB", (64, 64)) if sd.unet.condition else None
    return sd("a cat", condition=condition, num_inference_steps=1, output_type="latent")


def _vae(source: Any, kit: Kit) -> object:
    options = {"config": kit.folder} if Path(source).is_file() else {}
    return sdkit.VAE.from_pretrained(source, dtype="fp32", device="cpu", **options)


def _controlnet(source: Path, kit: Kit) -> object:
    options = {"config": kit.controlnet} if source.is_file() else {}
    return sdkit.ControlNet.from_pretrained(source, dtype="fp32", device="cpu", **options)


def _unclip(source: Path, kit: Kit) -> object:
    loaded = sdkit.UnCLIP.from_pretrained(source, device="cpu")
    return loaded.variations(Image.new("RGB", (32, 32)), 1, num_inference_steps=1)


def _lora(source: Any, kit: Kit) -> object:
    sd = sdkit.StableDiffusion.from_pretrained(kit.folder, dtype="fp32", device="cpu")
    sd.load_lora(source)
    return sd


def _embedding(source: Any, kit: Kit) -> str:
    sd = sdkit.StableDiffusion.from_pretrained(kit.folder, dtype="fp32", device="cpu")
    token = sd.load_embedding(source)
    return f"`{token}`, vectors: {len(sd.text.learned[token])}"


def _data(source: Any, _: Kit) -> str:
    from sdkit.data import open_examples

    options = {}
    if isinstance(source, tuple):
        source, options = source
    found = [(one.name, one.caption, one.load().size) for one in open_examples(source, **options)]
    return "; ".join(f"{name}: {caption!r}" for name, caption, _ in found)


MODELS = Group("Models", _model)
VAES = Group("Standalone VAEs", _vae)
CONTROLNETS = Group("ControlNets", _controlnet)
UNCLIPS = Group("unCLIP (DALL-E 2)", _unclip)
LORAS = Group("LoRA", _lora)
EMBEDDINGS = Group("Textual inversion embeddings", _embedding)
IMAGES = Group("Images", lambda path, _: sdkit.images.read(path))
DATA = Group("Images with captions", _data)


def _schedule(config: dict[str, Any], _: Kit) -> str:
    schedule = sdkit.NoiseSchedule.from_config(config, latents=True)
    return f"{schedule.num_timesteps} steps, {schedule.timestep_spacing} spacing, offset {schedule.steps_offset}"


def _cache(path: Path, _: Kit) -> str:
    from sdkit.data import LatentCache

    return f"{len([*LatentCache(path)])} images"


def _prior(path: Path, _: Kit) -> str:
    pipeline = sdkit.TokenPipeline.from_pretrained(path, dtype="fp32", device="cpu")
    return f"{pipeline.prior.shape.kind}, {pipeline.prior.shape.codes} codes"


def _settings(path: Path, _: Kit) -> object:
    kind = sdkit.images.read_text(path).get(PIPELINE)
    return read_other(path, kind) if kind in KINDS else Generation.read(path)


def _resumed(path: Path, kit: Kit) -> object:
    return kit.train(path, 2)


SCHEDULES = Group("Noise schedules (scheduler_config.json)", _schedule)
LATENTS = Group("Latent files", lambda path, _: sdkit.latents.load(path))
CACHES = Group("Latent caches", _cache)
RECIPES = Group("PNGs that carry their settings (`sdkit generate --from`)", _settings)
PROMPTS = Group("Prompts (`sdkit generate --prompts`)", lambda path, _: "; ".join(read_prompts(path)))
RUNS = Group("Resumed runs", _resumed)
PRIORS = Group("Priors over codes (`sdkit.TokenPipeline`)", _prior)
GROUPS = (
    MODELS,
    VAES,
    SCHEDULES,
    CONTROLNETS,
    UNCLIPS,
    LORAS,
    EMBEDDINGS,
    IMAGES,
    DATA,
    RECIPES,
    PROMPTS,
    LATENTS,
    CACHES,
    RUNS,
    PRIORS,
)


def outcome(case: Case, kit: Kit, folder: Path) -> str:
    """Make a case, read it, and return the second column of its row, without the paths of temporary folders."""
    folder.mkdir(parents=True)
    source = case.make(kit, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = case.read(source, kit)
            said = f"reads {result}" if isinstance(result, str) else "reads it"
        except sdkit.SdkitError as error:
            said = f"refuses: {error}"
    warned = [f"; warns: {one.message}" for one in caught if "sdkit" in Path(one.filename).parts]
    text = said + "".join(dict.fromkeys(warned))
    for path in (folder, kit.root):
        text = text.replace(f"{path}/", "").replace(str(path), path.name)
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def table(kit: Kit, root: Path) -> str:
    """Return the text of the guide."""
    lines = [HEAD]
    for group in GROUPS:
        lines += [f"## {group.title}", "", "| what | what sdkit does |", "|---|---|"]
        lines += [f"| {row} | {said} |" for row, said in rows(group, kit, root)]
        lines.append("")
    return "\n".join(lines)


def rows(group: Group, kit: Kit, root: Path) -> Iterator[tuple[str, str]]:
    """Yield both columns of each row of a group."""
    for number, case in enumerate(group.cases):
        folder = root / f"{GROUPS.index(group)}-{number}"
        yield case.what.replace("|", "\\|"), outcome(case, kit, folder)


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A folder in diffusers layout"""
    return kit.folder


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """One .safetensors file in the original layout (CompVis, A1111, civitai)"""
    return written(here / "model.safetensors", kit.original)


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """The same model as a pickle (.ckpt), with the other entries that a trainer saves"""
    torch.save({"state_dict": kit.original, "global_step": 3}, here / "model.ckpt")
    return here / "model.ckpt"


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A safetensors file named .ckpt"""
    return written(here / "model.safetensors", kit.original).rename(here / "model.ckpt")


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A pickle named .safetensors"""
    torch.save({"state_dict": kit.original}, here / "model.safetensors")
    return here / "model.safetensors"


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A web page named .safetensors (from a download that required a login)"""
    (here / "model.safetensors").write_text("<!DOCTYPE html><html><body>Log in</body></html>")
    return here / "model.safetensors"


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A Git LFS pointer instead of the weights"""
    (here / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return here / "model.safetensors"


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A truncated file"""
    data = written(here / "whole.safetensors", kit.original).read_bytes()
    (here / "model.safetensors").write_bytes(data[: len(data) // 2])
    return here / "model.safetensors"


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A checkpoint without a VAE"""
    tensors = {name: x for name, x in kit.original.items() if not name.startswith(original_layout.VAE_PREFIX)}
    return written(here / "model.safetensors", tensors)


@MODELS
def _(kit: Kit, here: Path) -> Any:
    """A checkpoint without a VAE, with `vae=` given"""
    tensors = {name: x for name, x in kit.original.items() if not name.startswith(original_layout.VAE_PREFIX)}
    return written(here / "model.safetensors", tensors), {"vae": kit.folder}


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A tensor that belongs to no part of the model"""
    extra = {"model.diffusion_model.input_blocks.1.2.temporal_transformer.norm.weight": torch.ones(4)}
    return written(here / "model.safetensors", kit.original | extra)


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A weight that is not finite"""
    name = next(name for name in kit.original if name.endswith("out.2.weight"))
    return written(here / "model.safetensors", kit.original | {name: kit.original[name] * float("nan")})


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """Weights stored as int8"""
    return written(here / "model.safetensors", {name: x.to(torch.int8) for name, x in kit.original.items()})


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """Stable Diffusion XL in one file"""
    extra = {"conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": torch.ones(4)}
    return written(here / "model.safetensors", kit.original | extra)


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A folder that holds only the weights of the variant fp16"""
    model = kit.copy(here / "model")
    for file in [*model.rglob("*.safetensors")]:
        file.rename(file.with_suffix(".fp16.safetensors"))
    return model


@MODELS
def _(kit: Kit, here: Path) -> Any:
    """`variant="fp16"`, where only the U-Net has this variant"""
    model = kit.copy(here / "model")
    (file,) = (model / "unet").glob("*.safetensors")
    file.rename(file.with_suffix(".fp16.safetensors"))
    return model, {"variant": "fp16"}


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A folder with sharded weights (`*.index.json`)"""
    from diffusers import UNet2DConditionModel

    model = kit.copy(here / "model")
    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    shutil.rmtree(model / "unet")
    unet.save_pretrained(model / "unet", max_shard_size="100KB")
    return model


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A folder with configs that do not name their class"""
    model = kit.copy(here / "model")
    for part in ("vae", "unet", "text_encoder"):
        edited(model / part / "config.json", _class_name=None, architectures=None)
    return model


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """The folder `models--org--name` of the Hub's cache"""
    cache = here / "models--org--name"
    kit.copy(cache / "snapshots" / "0123abcd")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    return cache


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A config with 10^9 layers"""
    model = kit.copy(here / "model")
    edited(model / "unet" / "config.json", layers_per_block=10**9)
    return model


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A config with an unknown activation function"""
    model = kit.copy(here / "model")
    edited(model / "unet" / "config.json", act_fn="unknown")
    return model


@MODELS
def _(kit: Kit, here: Path) -> str:
    """The name of a folder that does not exist (it could be a Hub id)"""
    return "models/sd15"


def widened(kit: Kit, to: Path, channels: int) -> Path:
    """Copy the model, and give its U-Net this number of input channels."""
    unet = kit.copy(to) / "unet"
    edited(unet / "config.json", in_channels=channels)
    (file,) = unet.glob("*.safetensors")
    tensors = load_file(file)
    weight = tensors["conv_in.weight"]
    tensors["conv_in.weight"] = torch.cat([weight, weight.new_zeros(len(weight), channels - 4, 3, 3)], dim=1)
    written(file, tensors)
    return to


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """InstructPix2Pix: a U-Net with eight input channels, which also reads an image (`condition=`)"""
    return widened(kit, here / "model", 8)


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """A U-Net with seven input channels, and no noise levels beside them"""
    return widened(kit, here / "model", 7)


@MODELS
def _(kit: Kit, here: Path) -> Path:
    """An upscaler, as stable-diffusion-x4-upscaler: seven input channels, noise levels as labels (`condition=`)"""
    model = widened(kit, here / "model", 7)
    edited(model / "unet" / "config.json", num_class_embeds=1000)
    (file,) = (model / "unet").glob("*.safetensors")
    tensors = load_file(file)
    width = len(tensors["time_embedding.linear_2.bias"])
    written(file, tensors | {"class_embedding.weight": torch.zeros(1000, width)})
    shutil.copytree(model / "scheduler", model / "low_res_scheduler")
    return model


@MODELS
def _(kit: Kit, here: Path) -> Any:
    """A `DDPMPipeline` of pixels, unconditional or of classes, with `vae="pixels"`"""
    network = classes.network(num_class_embeds=1)
    network.register_to_config(**{CLASSES: ["a cat"]})
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(here / "model")
    return here / "model", {"vae": "pixels"}


@VAES
def _(kit: Kit, here: Path) -> Path:
    """One .safetensors file in the original layout"""
    return written(here / "vae.safetensors", kit.vae)


@VAES
def _(kit: Kit, here: Path) -> Path:
    """The same, with diffusers' names for the attention layers (to_q, to_k, to_v, to_out.0, group_norm)"""
    names = {
        ".q.": ".to_q.",
        ".k.": ".to_k.",
        ".v.": ".to_v.",
        ".proj_out.": ".to_out.0.",
        "attn_1.norm.": "attn_1.group_norm.",
    }

    def renamed(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new) if "attn_1" in name else name
        return name

    return written(here / "vae.safetensors", {renamed(name): x for name, x in kit.vae.items()})


@VAES
def _(kit: Kit, here: Path) -> Path:
    """The weights file of one part in diffusers layout, given without its folder"""
    return kit.folder / "vae" / "diffusion_pytorch_model.safetensors"


@VAES
def _(kit: Kit, here: Path) -> Path:
    """A folder with one part (config.json and weights)"""
    return kit.folder / "vae"


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """A folder in diffusers layout (config.json and weights)"""
    return kit.controlnet / "controlnet"


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """One .safetensors file in the original layout (`control_model.*`)"""
    return written(here / "control.safetensors", kit.control)


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """The same as a pickle (.pth), with Stable Diffusion's tensors beside it, as the first ones came"""
    torch.save(kit.control | kit.original, here / "control.pth")
    return here / "control.pth"


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """A pickle (.pth) that would call a function"""
    torch.save({"state_dict": kit.control, "path": Path("x")}, here / "control.pth")
    return here / "control.pth"


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """A weights file in diffusers layout, given without its folder"""
    return kit.controlnet / "controlnet" / "diffusion_pytorch_model.safetensors"


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """A model instead of a ControlNet"""
    return written(here / "model.safetensors", kit.original)


@CONTROLNETS
def _(kit: Kit, here: Path) -> Path:
    """A ControlNet of Stable Diffusion XL"""
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = {**tiny.TWO_LEVELS, **added, "projection_class_embeddings_input_dim": 64}
    control_network(tiny.networks((8, 16), unet=unet).unet).save_pretrained(here / "control")
    return here / "control"


def _unclip_folder(folder: Path, *without: str) -> Path:
    """Write a small unCLIP with an image encoder, without some of its folders, and return its path."""
    unclip.unclip().save_pretrained(folder)
    unclip.image_encoder().save_pretrained(folder / "image_encoder")
    for name in without:
        shutil.rmtree(folder / name)
    return folder


@UNCLIPS
def _(kit: Kit, here: Path) -> Path:
    """A folder in the layout of diffusers' StableUnCLIPPipeline, with an image encoder"""
    return _unclip_folder(here / "unclip")


@UNCLIPS
def _(kit: Kit, here: Path) -> Path:
    """A folder in the layout of StableUnCLIPImg2ImgPipeline, which has no prior"""
    parts = ("prior", "prior_text_encoder", "prior_tokenizer", "prior_scheduler")
    return _unclip_folder(here / "unclip", *parts)


@UNCLIPS
def _(kit: Kit, here: Path) -> Path:
    """A prior without its text encoder"""
    return _unclip_folder(here / "unclip", "prior_text_encoder")


@UNCLIPS
def _(kit: Kit, here: Path) -> Path:
    """A prior whose config asks for a layer more than its weights have"""
    folder = _unclip_folder(here / "unclip")
    edited(folder / "prior" / "config.json", num_layers=3)
    return folder


@UNCLIPS
def _(kit: Kit, here: Path) -> Path:
    """A decoder without the statistics of its embeddings"""
    return _unclip_folder(here / "unclip", "image_normalizer")


@UNCLIPS
def _(kit: Kit, here: Path) -> Path:
    """Stable Diffusion instead of a decoder of embeddings"""
    return kit.folder


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """kohya's layout, used by A1111 and civitai"""
    return written(here / "lora.safetensors", kit.lora())


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """diffusers' layout"""
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    tensors = {f"{name}.lora.down.weight": torch.ones(2, 8), f"{name}.lora.up.weight": torch.ones(8, 2)}
    return written(here / "lora.safetensors", tensors)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """peft's `adapter_model.safetensors`, with adapter_config.json beside it"""
    name = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    tensors = {f"{name}.lora_A.weight": torch.ones(2, 8), f"{name}.lora_B.weight": torch.ones(8, 2)}
    return written(here / "adapter_model.safetensors", tensors)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A folder that holds only a .bin file"""
    torch.save(kit.lora(), here / "pytorch_lora_weights.bin")
    return here


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A LoRA with a bundled embedding (`bundle_emb`)"""
    extra = {"bundle_emb.zork.string_to_param.*": torch.randn(2, 16, generator=torch.Generator().manual_seed(0))}
    return written(here / "lora.safetensors", kit.lora() | extra)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A LoRA of Stable Diffusion XL"""
    return written(here / "lora.safetensors", kit.lora() | kit.lora("lora_te2_text_model_"))


TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A LoCon: a LoRA of convolutions, with a core (`lora_mid`) or without"""
    shapes = {"lora_down": (2, 4, 1, 1), "lora_mid": (2, 2, 3, 3), "lora_up": (8, 2, 1, 1)}
    core = {f"lora_unet_conv_in.{key}.weight": torch.full(shape, 0.1) for key, shape in shapes.items()}
    return written(here / "lora.safetensors", kit.lora() | core)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A DoRA (`dora_scale` of LyCORIS, or `lora_magnitude_vector` of peft)"""
    return written(here / "lora.safetensors", kit.lora() | {f"{TO_K}.dora_scale": torch.ones(8, 1)})


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A LoHa of LyCORIS"""
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{TO_K}.{key}": torch.full(shape, 0.1) for key, shape in shapes.items()}
    return written(here / "lora.safetensors", tensors)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A LoHa of peft"""
    (here / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2, "alpha": 4}))
    layer = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    shapes = {"hada_w1_a": (8, 2), "hada_w1_b": (2, 8), "hada_w2_a": (8, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{layer}.{key}": torch.full(shape, 0.1) for key, shape in shapes.items()}
    return written(here / "adapter_model.safetensors", tensors)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A LoKr"""
    tensors = {f"{TO_K}.lokr_w1": torch.full((2, 4), 0.1), f"{TO_K}.lokr_w2": torch.full((4, 2), 0.1)}
    return written(here / "lora.safetensors", tensors)


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """An OFT, an IA3, or a GLoRA"""
    return written(here / "lora.safetensors", {f"{TO_K}.oft_blocks": torch.ones(2, 4, 4)})


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """An infinite alpha"""
    tensors = kit.lora()
    return written(
        here / "lora.safetensors", {n: x * float("inf") if n.endswith("alpha") else x for n, x in tensors.items()}
    )


@LORAS
def _(kit: Kit, here: Path) -> Path:
    """A textual inversion embedding instead of a LoRA"""
    return written(here / "zork.safetensors", {"emb_params": torch.ones(2, 16)})


def _a1111(vectors: torch.Tensor, **changes: Any) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "zork", "step": 9} | changes


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """diffusers' `learned_embeds.safetensors`, in a folder: the token is the tensor's name"""
    written(here / "learned_embeds.safetensors", {"<zork>": torch.ones(2, 16)})
    return here


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """diffusers' `learned_embeds.bin`"""
    torch.save({"<zork>": torch.ones(16)}, here / "learned_embeds.bin")
    return here


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """A1111's .pt: the token is the name in it"""
    torch.save(_a1111(torch.ones(3, 16)), here / "other.pt")
    return here / "other.pt"


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """`emb_params` in .safetensors: the token is the file's name"""
    return written(here / "zork.safetensors", {"emb_params": torch.ones(2, 16)})


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """A token that is a word of the vocabulary (`token=` gives it another)"""
    return written(here / "a.safetensors", {"cat": torch.ones(2, 16)})


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """An embedding of another width"""
    return written(here / "a.safetensors", {"<zork>": torch.ones(2, 1024)})


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """More vectors than the model reads tokens"""
    return written(here / "a.safetensors", {"<zork>": torch.ones(99, 16)})


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """An embedding of Stable Diffusion XL"""
    return written(here / "a.safetensors", {"clip_g": torch.ones(1, 1280), "clip_l": torch.ones(1, 768)})


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """A pickle that holds more than tensors"""
    torch.save(_a1111(torch.ones(2, 16), sd_checkpoint=Path("a")), here / "a.pt")
    return here / "a.pt"


@EMBEDDINGS
def _(kit: Kit, here: Path) -> Path:
    """A LoRA instead of an embedding"""
    return written(here / "a.safetensors", kit.lora())


for suffix in ("png", "jpg", "jfif", "webp", "avif", "bmp", "gif", "tif", "tga", "jp2", "ppm"):

    def _image(kit: Kit, here: Path, suffix: str = suffix) -> Path:
        return picture(here / f"picture.{suffix}", **({"format": "JPEG"} if suffix == "jfif" else {}))

    _image.__doc__ = f".{suffix}"
    IMAGES(_image)


@IMAGES
def _(kit: Kit, here: Path) -> Path:
    """A PostScript file named .png"""
    (here / "picture.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n")
    return here / "picture.png"


@IMAGES
def _(kit: Kit, here: Path) -> Path:
    """An image with a colour profile (Display P3, Adobe RGB, CMYK): it is converted to sRGB"""
    return picture(here / "picture.png", icc_profile=matrix_profile(P3, None))


@IMAGES
def _(kit: Kit, here: Path) -> Path:
    """An image with a damaged colour profile"""
    return picture(here / "picture.png", icc_profile=b"no profile")


@IMAGES
def _(kit: Kit, here: Path) -> Path:
    """A HEIC photo"""
    (here / "picture.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    return here / "picture.heic"


@IMAGES
def _(kit: Kit, here: Path) -> Path:
    """A truncated image"""
    picture(here / "whole.png")
    (here / "picture.png").write_bytes((here / "whole.png").read_bytes()[:100])
    return here / "picture.png"


def _beside(name: str, content: str | bytes, image: str = "a.png") -> Make:
    def make(kit: Kit, here: Path) -> Path:
        picture(here / image)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return here

    return make


for what, make in (
    ("a.txt beside a.png", _beside("a.txt", "a dog")),
    ("a.caption (sd-scripts)", _beside("a.caption", "a dog")),
    ("a.png.txt", _beside("a.png.txt", "a dog")),
    ("A.TXT beside A.PNG", _beside("A.TXT", "a dog", "A.PNG")),
    ("a.json", _beside("a.json", '{"caption": "a dog"}')),
    ("metadata.jsonl", _beside("metadata.jsonl", '{"file_name": "a.png", "text": "a dog"}')),
    ("metadata.csv", _beside("metadata.csv", "file_name,text\na.png,a dog\n")),
    (
        "metadata.jsonl without a usual key for captions",
        _beside("metadata.jsonl", '{"file_name": "a.png", "description": "a dog"}'),
    ),
    ("metadata.jsonl with NaN as the caption", _beside("metadata.jsonl", '{"file_name": "a.png", "text": NaN}')),
    ("A caption in UTF-16", _beside("a.txt", "a dog".encode("utf-16"))),
    ("A caption in UTF-16 without a byte order mark", _beside("a.txt", "a dog".encode("utf-16-le"))),
    ("A caption in Latin-1", _beside("a.txt", "un café".encode("latin-1"))),
    (
        "metadata.jsonl nested 100,000 levels deep",
        _beside("metadata.jsonl", '{"file_name": "a.png", "text": ' + "[" * 100_000),
    ),
    ("A HEIC photo among the images", _beside("b.heic", b"\0\0\0\x18ftypheic")),
):
    make.__doc__ = what
    DATA(make)


@DATA
def _(kit: Kit, here: Path) -> Path:
    """metadata.parquet beside the images"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture(here / "a.png")
    pq.write_table(pa.table({"file_name": ["a.png"], "text": ["a dog"]}), here / "metadata.parquet")
    return here


@DATA
def _(kit: Kit, here: Path) -> Path:
    """Parquet files with encoded images"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": pa.array([encoded()], pa.binary()), "text": ["a dog"]}), here / "a.parquet")
    return here


@DATA
def _(kit: Kit, here: Path) -> Path:
    """A parquet file whose image is a URL"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None, "path": "ftp://127.0.0.1/x.png"}], kind)
    pq.write_table(pa.table({"image": image, "text": ["a dog"]}), here / "a.parquet")
    return here


def tar(path: Path, files: dict[str, bytes]) -> Path:
    """Write a tar file, and return its path."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@DATA
def _(kit: Kit, here: Path) -> Path:
    """WebDataset shards (.tar), with dots in the samples' names"""
    return tar(
        here / "a.tar",
        {"1.large.png": encoded(), "1.large.txt": b"a dog", "1.small.png": encoded(), "1.small.txt": b"a cat"},
    )


@LATENTS
def _(kit: Kit, here: Path) -> Path:
    """A file that `sdkit encode` wrote"""
    z = torch.zeros(4, 8, 8)
    latent = sdkit.Latent(
        z=z, height=64, width=64, vae="0" * 16, vae_name="emoji", scale=0.18215, sdkit="0.1.0", dtype="float32"
    )
    sdkit.latents.save(latent, here / "z.safetensors")
    return here / "z.safetensors"


@LATENTS
def _(kit: Kit, here: Path) -> Path:
    """Any other safetensors file"""
    return written(here / "z.safetensors", {"z": torch.zeros(4, 8, 8)})


@LATENTS
def _(kit: Kit, here: Path) -> Path:
    """A PNG named .safetensors"""
    (here / "z.safetensors").write_bytes(encoded())
    return here / "z.safetensors"


SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
for name in SCHEDULERS:

    def _scheduler(kit: Kit, here: Path, name: str = name) -> dict[str, Any]:
        return {"_class_name": name, **SD_SCHEDULE}

    _scheduler.__doc__ = name
    SCHEDULES(_scheduler)


@SCHEDULES
def _(kit: Kit, here: Path) -> dict[str, Any]:
    """`clip_sample: true`, or no such key (latents are never clipped)"""
    return {"_class_name": "DDIMScheduler", **SD_SCHEDULE, "clip_sample": True}


@SCHEDULES
def _(kit: Kit, here: Path) -> dict[str, Any]:
    """The scheduler class of another kind of model"""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@SCHEDULES
def _(kit: Kit, here: Path) -> dict[str, Any]:
    """Dynamic thresholding"""
    return {"_class_name": "DDIMScheduler", **SD_SCHEDULE, "thresholding": True}


@RECIPES
def _(kit: Kit, here: Path) -> Path:
    """A PNG that `sdkit generate` wrote"""
    sdkit.images.save(Image.new("RGB", (8, 8)), here / "a.png", Generation(prompt="a dog").text())
    return here / "a.png"


@RECIPES
def _(kit: Kit, here: Path) -> Path:
    """An image from another program"""
    return picture(here / "a.png")


@RECIPES
def _(kit: Kit, here: Path) -> Path:
    """Values that sdkit never writes"""
    sdkit.images.save(
        Image.new("RGB", (8, 8)), here / "a.png", Generation(prompt="a dog").text() | {"num_inference_steps": "many"}
    )
    return here / "a.png"


@RECIPES
def _(kit: Kit, here: Path) -> Path:
    """A PNG that a prior over codes drew"""
    sdkit.images.save(Image.new("RGB", (8, 8)), here / "a.png", CodeGeneration(prompt="a dog", model="run").text())
    return here / "a.png"


@RECIPES
def _(kit: Kit, here: Path) -> Path:
    """A PNG of DALL-E 2, with steps that sdkit never writes"""
    text = UnCLIPGeneration(prompt="a dog", model="run").text() | {"prior_num_inference_steps": "many"}
    sdkit.images.save(Image.new("RGB", (8, 8)), here / "a.png", text)
    return here / "a.png"


@RECIPES
def _(kit: Kit, here: Path) -> Path:
    """A PNG of a kind of model that sdkit does not know"""
    sdkit.images.save(Image.new("RGB", (8, 8)), here / "a.png", Generation().text() | {PIPELINE: "xl"})
    return here / "a.png"


@PROMPTS
def _(kit: Kit, here: Path) -> Path:
    """UTF-8 text with one prompt per line; # begins a comment"""
    (here / "prompts.txt").write_text("# mine\na dog\n\na cat\n")
    return here / "prompts.txt"


@PROMPTS
def _(kit: Kit, here: Path) -> Path:
    """A device file that never ends"""
    return Path("/dev/zero")


@CACHES
def _(kit: Kit, here: Path) -> Path:
    """A cache that `sdkit cache` wrote"""
    return kit.cache


def _cache_with(file: str, damage: Callable[[Path], object]) -> Make:
    def make(kit: Kit, here: Path) -> Path:
        shutil.copytree(kit.cache, here / "cache")
        damage(here / "cache" / file)
        return here / "cache"

    return make


def _run_with(file: str, damage: Callable[[Path], object]) -> Make:
    def make(kit: Kit, here: Path) -> Path:
        shutil.copytree(kit.run, here / "run")
        damage(here / "run" / file)
        return here / "run"

    return make


DEEP = "[" * 100_000
for what, make in (
    ("A missing shard", _cache_with("shard-00000.safetensors", Path.unlink)),
    ("A manifest that was edited by hand", _cache_with("manifest.json", lambda path: edited(path, images=2))),
    ("A manifest nested 100,000 levels deep", _cache_with("manifest.json", lambda path: path.write_text(DEEP))),
):
    make.__doc__ = what
    CACHES(make)


def _other_shapes(checkpoint: Path) -> None:
    """Shorten every tensor of the optimizer to one number, and correct the checksums."""
    file = checkpoint / "unet.optimizer.safetensors"
    written(file, {name: x.flatten()[:1] for name, x in load_file(file).items()})
    sums = {path.name: sha256(path) for path in sorted(checkpoint.iterdir()) if path.name != "manifest.json"}
    edited(checkpoint / "manifest.json", sha256=sums)


CHECKPOINT = "checkpoints/step-00000001"
for what, make in (
    ("A run that was stopped", _run_with("config.json", lambda path: path)),
    ("A checkpoint with other shapes in the optimizer's state", _run_with(CHECKPOINT, _other_shapes)),
    (
        "A truncated checkpoint",
        _run_with(f"{CHECKPOINT}/rng.safetensors", lambda path: path.write_bytes(b"{")),
    ),
    ("Settings nested 100,000 levels deep", _run_with("config.json", lambda path: path.write_text(DEEP))),
    ("Metrics that are not numbers", _run_with("metrics.jsonl", lambda path: path.write_text('{"step": "x"}\n'))),
):
    make.__doc__ = what
    RUNS(make)


def _prior_with(kind: str, damage: Callable[[Path], object] = lambda folder: None) -> Make:
    def make(_: Kit, here: Path) -> Path:
        folder = here / "run"
        tiny.vq_model(folder / "vqvae")
        shape = PriorShape(kind=kind, codes=16, grid=(8, 8), layers=1, width=8)
        save_prior(new_prior(shape), folder / "prior")
        damage(folder)
        return folder

    return make


for what, make in (
    ("A GPT over the codes of a VQ model", _prior_with("transformer")),
    ("A gated PixelCNN", _prior_with("pixelcnn")),
    ("A VQ model of other codes", _prior_with("pixelcnn", lambda folder: tiny.vq_model(folder / "vqvae", codes=8))),
    ("No folder prior/", _prior_with("pixelcnn", lambda folder: shutil.rmtree(folder / "prior"))),
    (
        "GPT-2's own config",
        _prior_with("transformer", lambda at: edited(at / "prior" / "config.json", _class_name="GPT2LMHeadModel")),
    ),
    ("Another width", _prior_with("pixelcnn", lambda folder: edited(folder / "prior" / "config.json", width=16))),
):
    make.__doc__ = what
    PRIORS(make)


def main() -> None:
    """Write the guide."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        GUIDE.write_text(table(Kit(root / "kit"), root / "cases"), encoding="utf-8")
    sys.stdout.write(f"{GUIDE}\n")


if __name__ == "__main__":
    main()
