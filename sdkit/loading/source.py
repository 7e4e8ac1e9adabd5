"""What a model source is: the embedded name, a Hub id, a diffusers folder or a single file. One resolver for them all.

A path that exists wins over a Hub id. Nothing here runs code that came with a model: configs are JSON, weights are
safetensors or weights-only pickles, and the classes they become are a fixed few.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from sdkit.arguments import PREDICTIONS, one_of
from sdkit.errors import ArgumentError, SourceError
from sdkit.files import read_regular
from sdkit.loading import diffusers_folder as folder
from sdkit.loading import single_file, tokenizer
from sdkit.loading.configs import GUIDANCE, read_config, read_json
from sdkit.loading.diffusers_folder import PARTS, SCHEDULER, TEXT, UNET, VAE, Part, Place
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tensors import SUFFIXES, TensorFile, is_file, open_tensors, status_or_none
from sdkit.messages import clean

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel, VQModel
    from transformers import CLIPTextModel, CLIPTokenizer

Source = str | os.PathLike[str]

EMBEDDED = "emoji"
USUAL_GUIDANCE = 7.5
KINDS = {"embedded": "the embedded model", "hub": "a Hub id", "folder": "a folder", "file": "a file"}

_probed: dict[tuple[Path, int, int], str] = {}  # a probe takes seconds, and a pipeline asks for U-Net and schedule


@dataclass(frozen=True, kw_only=True)
class Component:
    """One part of a source. What cannot be known without downloading the weights is None."""

    part: str
    """"vae", "unet", "text" or "scheduler"."""
    class_name: str
    parameters: int | None = None
    dtype: str | None = None
    """Of most of the parameters as stored: "float32", "float16", ..."""
    bytes: int | None = None
    config: dict[str, Any]
    """The values that matter: latent channels, scaling factor, cross-attention width, prediction type, ..."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a source is and holds, told without loading it."""

    source: str
    kind: str
    """"embedded", "hub", "folder" or "file"."""
    path: Path
    """The folder or the file; of a Hub id, its snapshot in the cache."""
    family: str | None
    """For a file: the public config that fits it ("sd1", "sd2", "sd2-v"), or the folder given as config."""
    components: tuple[Component, ...]


def load_vae(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    config: Source | None = None,
) -> AutoencoderKL | AutoencoderTiny | VQModel:
    """The VAE of `source`, in eval mode on the CPU, its weights as `dtype` whatever they are stored in.

    The rest is as in `sdkit.StableDiffusion.from_pretrained`; `config` may be a Hub id, too. Raises SourceError, as the
    other loaders do, for anything that is missing, damaged or of another kind.
    """
    place = _resolve(source, revision=revision, variant=variant, config=config)
    return cast("AutoencoderKL | AutoencoderTiny | VQModel", _load(place, VAE, dtype, variant, config))


def load_unet(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    config: Source | None = None,
) -> UNet2DConditionModel:
    """The U-Net of `source`, in eval mode on the CPU. Parameters as in `load_vae`."""
    place = _resolve(source, revision=revision, variant=variant, config=config)
    unet = cast("UNet2DConditionModel", _load(place, UNET, dtype, variant, config))
    settings: Any = unet.config
    if settings.addition_embed_type or settings.class_embed_type or settings.num_class_embeds:
        raise SourceError(f"{place.label} holds a U-Net of Stable Diffusion XL or of another kind; give SD 1.x or 2.x.")
    if settings.in_channels > settings.out_channels:
        name = single_file.INPUTS.get(settings.in_channels, "another kind of model")
        raise SourceError(
            f"{place.label} looks like {name} ({settings.in_channels} input channels); give a text-to-image model."
        )
    return unet


def load_text(
    source: Source,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    variant: str | None = None,
    config: Source | None = None,
) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The text encoder of `source`, in eval mode on the CPU, and its tokenizer. Parameters as in `load_vae`.

    Of a text encoder's own folder, the tokenizer is looked for in it and in ../tokenizer.
    """
    place = _resolve(source, revision=revision, variant=variant, config=config)
    if place.kind == "file":
        file, configs = _open(place, config)
        text = single_file.load_network(file, "text", configs, dtype)
        words = tokenizer.load_tokenizer(configs / "tokenizer")
    else:
        text = folder.load_network(place, TEXT, dtype, variant)
        words = folder.load_place_tokenizer(place)
    size = text.config.vocab_size
    if len(words) > size:
        raise SourceError(
            f"the tokenizer of {place.label} has {len(words)} tokens, its text encoder {size}; "
            "give the tokenizer that belongs to it."
        )
    token, number = max(words.get_vocab().items(), key=lambda item: item[1])
    if number >= size:
        raise SourceError(
            f"the tokenizer of {place.label} gives {clean(token)!r} the id {number}, beyond the {size} of its text "
            "encoder; give the tokenizer that belongs to it."
        )
    return cast("CLIPTextModel", text), words


def load_scheduler_config(
    source: Source, *, revision: str | None = None, config: Source | None = None, prediction_type: str | None = None
) -> dict[str, Any]:
    """The noise schedule of `source` as diffusers writes it in scheduler_config.json.

    The prediction type of a file is, the first that is known: `prediction_type`, its metadata, its marker keys
    (`v_pred`, beside `ztsnr` for zero terminal SNR), the config's, and for SD 2.x what a run of its U-Net tells.
    `prediction_type` may be given in short: "eps", "v", "x0".
    """
    if prediction_type is not None:
        prediction_type = PREDICTIONS[one_of("prediction_type", prediction_type, PREDICTIONS)]
    place = _resolve(source, revision=revision, config=config)
    if place.kind != "file":
        schedule = read_config(folder.locate(place, SCHEDULER) / SCHEDULER.config, "scheduler")
        return schedule | ({"prediction_type": prediction_type} if prediction_type else {})
    file, configs = _open(place, config)
    single_file.require(file, "unet")
    if not prediction_type:
        prediction_type = _probe(file) if _unstated(file, configs) else single_file.marked_prediction(file)
    schedule = read_config(configs / SCHEDULER.folder / SCHEDULER.config, "scheduler")
    if prediction_type:
        schedule["prediction_type"] = prediction_type
    if "ztsnr" in file.shapes:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return schedule


def load_guidance_scale(source: Source, *, revision: str | None = None, config: Source | None = None) -> float:
    """The guidance scale that `source` is best drawn at: what its model_index.json says, or Stable Diffusion's 7.5."""
    place = _resolve(source, revision=revision, config=config)
    index = place.root(["model_index.json"]) / "model_index.json"  # of a file: a path that cannot be
    return float(read_config(index, "index").get(GUIDANCE, USUAL_GUIDANCE)) if is_file(index) else USUAL_GUIDANCE


def describe(source: Source, *, revision: str | None = None, config: Source | None = None) -> Description:
    """What `source` is and holds, from its configs and headers alone. Of a Hub id no weights are downloaded."""
    place = _resolve(source, revision=revision, config=config)
    if place.kind == "file":
        file, configs = _open(place, config)
        path, family = place.path, configs.name if config is None else str(config)
        components = tuple(_describe_file(file, configs))
    else:
        path, family = place.root([name for part in PARTS for name in part.files]), None
        components = tuple(_describe_folder(place, path))
        if not components:
            raise folder.absent(place, "model in diffusers layout (vae/config.json, unet/config.json, ...)")
    return Description(source=str(source), kind=place.kind, path=path, family=family, components=components)


def _resolve(
    source: Source, *, revision: str | None = None, variant: str | None = None, config: Source | None = None
) -> Place:
    """Tells the kinds of sources apart, and refuses options that this kind has no use for."""
    if not isinstance(source, (str, os.PathLike)):
        raise ArgumentError(f"a model source is a name, a path or a Hub id, not {type(source).__name__}.")
    name = os.fspath(source)
    path = _path(name)
    kind = _kind(source, path)
    place = Place(name=name, kind=kind, path=_snapshot(path) if kind == "folder" else path, revision=revision)
    unfit = {
        "revision": revision is not None and place.kind != "hub",
        "variant": variant is not None and place.kind == "file",
        "config": config is not None and place.kind != "file",
    }
    if option := next((option for option, wrong in unfit.items() if wrong), None):
        raise ArgumentError(f"{option}= has no meaning for {KINDS[place.kind]} such as {place.label}; leave it out.")
    return Place(name=name, kind="embedded", path=ASSETS / name) if place.kind == "embedded" else place


def _snapshot(path: Path) -> Path:
    """The snapshot in a folder of the Hub's cache (models--org--name), its main branch's if it has several; any other
    folder as it is."""
    if not path.name.startswith("models--") or not (path / "snapshots").is_dir():
        return path
    held = sorted(found for found in (path / "snapshots").iterdir() if found.is_dir())
    main = path / "refs" / "main"
    branch = path / "snapshots" / read_regular(main, 1000).decode(errors="replace").strip() if is_file(main) else None
    if branch in held:
        return branch
    if len(held) == 1:
        return held[0]
    names = ", ".join(found.name for found in held)
    few = f"several snapshots: give one of snapshots/ ({names})" if held else "no snapshot: give another source"
    raise SourceError(f"{clean(path)!r} is a folder of the Hub's cache with {few}.")


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # ~somebody who has no account here
        raise SourceError(f"the path {name!r} begins with a home folder that does not exist; check it.") from error


def _kind(source: Source, path: Path) -> str:
    name = os.fspath(source)
    if source == EMBEDDED:  # the string; a Path of that name is a path
        return "embedded"
    if "://" in name:
        raise SourceError(f"{name!r} is a URL; give the Hub id alone (org/name), or the path of the downloaded file.")
    if name and (found := status_or_none(path)):
        if stat.S_ISDIR(found.st_mode):
            return "folder"
        if stat.S_ISREG(found.st_mode):
            return "file"
        raise SourceError(f"{name!r} is a pipe or a device; give a folder, a regular file or a Hub id.")
    is_path = (
        not isinstance(source, str)
        or name.startswith((".", "/", "~"))
        or name.lower().endswith(SUFFIXES)
        or "\\" in name
    )
    if not is_path and name.count("/") == 1 and not name.endswith("/"):
        return "hub"
    if not is_path and name and "/" not in name:
        raise SourceError(f"{name!r} is neither a path that exists nor a Hub id; did you mean 'org/{name}'?")
    raise SourceError(f"the path {name!r} does not exist; give one that does, a Hub id (org/name) or {EMBEDDED!r}.")


def _load(place: Place, part: Part, dtype: torch.dtype, variant: str | None, config: Source | None) -> Any:
    if place.kind != "file":
        return folder.load_network(place, part, dtype, variant)
    file, configs = _open(place, config)
    network = single_file.load_network(file, part.name, configs, dtype)
    if part is UNET and _unstated(file, configs) and _probe(file, network) == "v_prediction":
        network.register_to_config(sample_size=read_json(ASSETS / "sd2-v" / "unet" / "config.json")["sample_size"])
    return network


def _open(place: Place, config: Source | None) -> tuple[TensorFile, Path]:
    """A file, and the folder of configs for it: the user's own, or the public ones that its tensors' shapes ask for."""
    file = open_tensors(place.path)
    single_file.check_kind(file)
    if config is None:
        return file, ASSETS / single_file.family_of(file)
    own = _resolve(config)
    if own.kind == "file":
        raise SourceError(f"config={own.label} is a file; give a folder (or a Hub id) in diffusers layout.")
    files = [f"{part.folder}/{part.config}" for part in PARTS] + [f"tokenizer/{name}" for name in tokenizer.FILES]
    return file, own.root(files)


def _unstated(file: TensorFile, configs: Path) -> bool:
    """Whether neither the file nor the user's own config says which prediction type it is: SD 2.x has both."""
    return configs == ASSETS / "sd2" and not single_file.marked_prediction(file)


def _probe(file: TensorFile, unet: Any = None) -> str:
    """The prediction type of an SD 2.x file that does not state it, from its U-Net (loaded for that unless given)."""
    found = file.path.stat()
    identity = file.path.resolve(), found.st_size, found.st_mtime_ns  # another one for another content
    if identity not in _probed:
        unet = unet or single_file.load_network(file, "unet", ASSETS / "sd2", torch.float32)
        _probed[identity] = single_file.probe_prediction(unet)
    return _probed[identity]


def _describe_file(file: TensorFile, configs: Path) -> Iterator[Component]:
    for part in (VAE, UNET, TEXT):
        if keys := single_file.keys_of(file, part.name):
            yield _component(part, read_config(configs / part.folder / part.config, part.name), file.summary(keys))
    if single_file.keys_of(file, "unet"):
        schedule = read_config(configs / SCHEDULER.folder / SCHEDULER.config, SCHEDULER.name)
        marked = single_file.marked_prediction(file)
        stated = None if _unstated(file, configs) else marked or schedule.get("prediction_type")
        yield _component(SCHEDULER, schedule | {"prediction_type": stated})


def _describe_folder(place: Place, root: Path) -> Iterator[Component]:
    for part in PARTS:
        inside = next((path for path in (root / part.folder, root) if is_file(path / part.config)), None)
        config = read_json(inside / part.config) if inside else {}
        name = folder.class_of(config, part) if part.classes else folder.class_name(config)
        if inside is None or (part.classes and name not in part.classes):
            continue
        config = read_config(inside / part.config, part.name) | {"_class_name": name}
        file = folder.open_weights(place, part, inside) if part.classes else None
        yield _component(part, config, file.summary(file.shapes) if file else (None, None, None))


def _component(
    part: Part, config: dict[str, Any], weights: tuple[int | None, str | None, int | None] = (None, None, None)
) -> Component:
    shown = {key: config.get(key, default) for key, default in part.shown.items()}
    if part is VAE:
        levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or (64,)
        shown["factor"] = 2 ** (len(levels) - 1)
    parameters, dtype, size = weights
    name = folder.class_name(config)
    return Component(part=part.name, class_name=name, parameters=parameters, dtype=dtype, bytes=size, config=shown)
