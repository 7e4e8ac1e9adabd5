"""A model in diffusers layout: a pipeline's folder or one component's own, on disk or on the Hub (and in its cache)."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sdkit.errors import SourceError
from sdkit.files import expanded
from sdkit.messages import clean, first_line
from sdkit.models.single_file import ASSETS, NOUNS, check_size
from sdkit.models.weights import (
    SUFFIXES,
    check_dtypes,
    check_finite,
    check_fit,
    check_name,
    find,
    guarded,
    is_file,
    open_tensors,
    read_config,
    read_json,
)

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
VOCABULARY = ASSETS / "clip_tokenizer"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a model: where diffusers keeps it, and what of its config matters to people."""

    name: str
    folder: str
    classes: dict[str, str] = field(default_factory=dict)
    """The class named in the config -> the class that loads it. Empty for the schedule, which is read as data."""
    config: str = "config.json"
    weights: tuple[str, ...] = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    shown: dict[str, Any] = field(default_factory=dict)
    """Values of the config to show -> their defaults in diffusers."""

    @property
    def files(self) -> list[str]:
        """Every small file that the part may need, in a pipeline's repository or in its own."""
        names = [self.config, f"{self.folder}/{self.config}"]
        if self is TEXT:
            names += [f"{folder}{name}" for folder in ("", "tokenizer/") for name in TOKENIZER_FILES]
        return names


VAE = Part(
    name="vae",
    folder="vae",
    classes={name: name for name in ("AutoencoderKL", "AutoencoderTiny", "VQModel")},
    shown={"latent_channels": 4, "scaling_factor": 0.18215},
)
UNET = Part(
    name="unet",
    folder="unet",
    classes={"UNet2DConditionModel": "UNet2DConditionModel"},
    shown={"in_channels": 4, "cross_attention_dim": 1280, "sample_size": None},
)
TEXT = Part(
    name="text",
    folder="text_encoder",
    classes={"CLIPTextModel": "CLIPTextModel", "CLIPModel": "CLIPTextModel"},
    weights=("model.safetensors", "pytorch_model.bin"),
    shown={"hidden_size": 512, "num_hidden_layers": 12, "max_position_embeddings": 77},
)
SCHEDULER = Part(
    name="scheduler",
    folder="scheduler",
    config="scheduler_config.json",
    shown={"prediction_type": "epsilon", "timestep_spacing": "leading", "rescale_betas_zero_snr": False},
)
PARTS = (VAE, UNET, TEXT, SCHEDULER)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A source told apart by its kind ("embedded", "hub", "folder", "file"), before anything of it is read."""

    name: str
    kind: str
    path: Path
    """The folder or the file; unused for a Hub id, whose snapshot is known once it is fetched."""
    revision: str | None = None

    @property
    def label(self) -> str:
        """The source as messages name it."""
        return repr(self.name)

    def root(self, files: list[str]) -> Path:
        """The folder that has those of `files` that exist, fetched if it is on the Hub."""
        return fetch(self, files) if self.kind == "hub" else self.path


def locate(place: Place, part: Part) -> Path:
    """The folder with the part's config: a pipeline's subfolder or the place itself. Checks the class in the config."""
    root = place.root(part.files)
    for folder in (root / part.folder, root):
        if is_file(folder / part.config):
            name = class_name(read_json(folder / part.config))
            if part.classes and name not in part.classes:
                raise _wrong(place, name, part)
            return folder
    if other := next((file for file in (root / "config.json", root / SCHEDULER.config) if is_file(file)), None):
        raise _wrong(place, class_name(read_json(other)), part)
    raise absent(place, f"{part.folder}/{part.config}")


def class_name(config: dict[str, Any]) -> str:
    """The class that a diffusers or transformers config was written for."""
    architectures = config.get("architectures")
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [])]
    return clean(next((name for name in names if name and isinstance(name, str)), "unknown network"))


def _wrong(place: Place, name: str, part: Part) -> SourceError:
    wanted = f" ({' or '.join(dict.fromkeys(part.classes.values()))})" if part.classes else ""
    article = "an" if name.lower().startswith(("a", "e", "i", "o", "unknown")) else "a"
    return SourceError(f"{place.label} holds {article} {name}, not {NOUNS[part.name]}{wanted}; give another source.")


def load_network(place: Place, part: Part, dtype: torch.dtype, variant: str | None) -> Any:
    """The network of `part`, in eval mode on the CPU."""
    folder = locate(place, part)
    weights = _find_weights(place, part, folder, variant)
    file = open_tensors(weights)  # so that damage is told in our words
    config = read_config(folder / part.config, part.name)
    name = part.classes[class_name(config)]
    check_name(file)
    check_dtypes(file, file.shapes)
    check_size(part.name, config, folder / part.config, file.shapes.values())
    library = "transformers" if part is TEXT else "diffusers"
    with guarded(f"{NOUNS[part.name]} in {str(folder)!r}"):
        network, info = getattr(import_module(library), name).from_pretrained(
            str(folder),
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=weights.suffix == ".safetensors",
            local_files_only=True,
            output_loading_info=True,  # the libraries only warn of missing weights, and leave them random
            ignore_mismatched_sizes=True,
        )
        unexpected = () if part is TEXT else info["unexpected_keys"]  # a whole CLIP model serves as a text encoder
        problem = f"the weights in {str(weights)!r} do not fit the config.json beside them"
        check_fit(info["missing_keys"], unexpected, info["mismatched_keys"], problem)
    # Out of the mapped file, where tensors lie at odd addresses: on those, kernels differ in the last bit.
    for parameter in network.parameters():
        parameter.data = parameter.data.clone()
    check_finite(network, file, file.shapes)
    return network.eval()


def _find_weights(place: Place, part: Part, folder: Path, variant: str | None) -> Path:
    """The part's file of weights, safetensors rather than a pickle; downloaded if need be, and no other with it."""
    names = [name.replace(".", f".{variant}.", 1) if variant else name for name in part.weights]
    if found := next((folder / name for name in names if is_file(folder / name)), None):
        return found
    inside = f"{part.folder}/" if folder.name == part.folder else ""
    for name in names if place.kind == "hub" else ():
        if is_file(found := fetch(place, [inside + name]) / inside / name):
            return found
    raise absent(place, inside + names[0])


def load_place_tokenizer(place: Place) -> CLIPTokenizer:
    """The tokenizer that belongs to the text encoder of `place`: in the same folder, or in ../tokenizer."""
    folder = locate(place, TEXT)
    for candidate in (folder, folder.parent / "tokenizer"):
        if any(is_file(candidate / name) for name in TOKENIZER_FILES[:3]):
            return load_tokenizer(candidate)
    raise absent(place, "tokenizer (vocab.json and merges.txt, or tokenizer.json)")


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in `folder`; one that is only a tokenizer_config.json gets the embedded CLIP vocabulary."""
    from transformers import CLIPTokenizer

    own = any(is_file(folder / name) for name in TOKENIZER_FILES[:3])
    options = {} if own else read_json(folder / "tokenizer_config.json")
    options.pop("tokenizer_class", None)
    with guarded(f"the tokenizer in {str(folder)!r}"):
        source = folder if own else VOCABULARY
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(str(source), local_files_only=True, **options)
    for token in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, f"{token}_id") is None:
            raise SourceError(f"the tokenizer in {str(folder)!r} has no {token}; correct its tokenizer_config.json.")
    if not isinstance(length := tokenizer.model_max_length, (int, float)):
        found = clean(repr(length))
        raise SourceError(f"the tokenizer in {str(folder)!r} has model_max_length {found}, not a number; correct it.")
    return tokenizer


def absent(place: Place, what: str) -> SourceError:
    """The error for a place that lacks `what`."""
    what = clean(what)
    if place.kind == "hub":
        if _reachable(place):
            return SourceError(f"{place.label} has no {what} on the Hub; give another id, variant or revision.")
        return SourceError(
            f"the snapshot of {place.label} in the cache is incomplete: it lacks {what}, and the Hub cannot be "
            "reached; load it once with a connection."
        )
    files = sorted(place.path.glob("*.safetensors"))
    if files and not any(is_file(place.path / name) for name in ("model_index.json", "config.json")):
        return SourceError(f"{place.label} has no {what}; give the file in it ({files[0].name}) if that is meant.")
    return SourceError(f"{place.label} has no {what}; give a folder in diffusers layout, a single file or a Hub id.")


def path_or_fetched(source: str | os.PathLike[str], filename: str, revision: str | None, hint: str = "") -> Path:
    """The path that `source` is, there or not; where it is none but a Hub id, that of its `filename`, fetched.

    Raises SourceError, with the `hint`, for a repository without that file.
    """
    path = expanded(source)
    hub = isinstance(source, str) and HUB_ID.fullmatch(source) and not source.endswith(SUFFIXES)
    if not hub or find(path):
        return path
    place = Place(name=str(source), kind="hub", path=path, revision=revision)
    if is_file(file := fetch(place, [filename]) / filename):
        return file
    raise absent(place, filename + hint)


def _reachable(place: Place) -> bool:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(place.name, revision=place.revision, timeout=10)
    except Exception:  # noqa: BLE001 (whatever it is, the Hub did not answer)
        return False
    return True


def fetch(place: Place, files: list[str]) -> Path:
    """The snapshot of a Hub id with those of `files` that it has, from the cache where there is no network."""
    from huggingface_hub import errors, snapshot_download

    at = f"{place.label} (revision {place.revision!r})" if place.revision else place.label
    try:
        with _quiet_hub():
            try:
                return Path(snapshot_download(place.name, revision=place.revision, allow_patterns=files))
            except errors.OfflineModeIsEnabled:  # huggingface_hub 1.x does not look into its cache for a commit
                return Path(
                    snapshot_download(place.name, revision=place.revision, allow_patterns=files, local_files_only=True)
                )
    except errors.LocalEntryNotFoundError as error:
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)  # it may have what is needed all the same; if not, `absent` says so
        raise SourceError(
            f"{at} is not in the cache, and the Hub cannot be reached; load it once with a connection."
        ) from error
    except Exception as error:  # the network can fail in as many ways as there are libraries below
        raise SourceError(_hub_problem(place, at, error)) from error


def _hub_problem(place: Place, at: str, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"{place.label} is neither a path that exists nor a Hub id (org/name); check its spelling."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{place.label} has no revision {place.revision!r} on the Hub; give a branch, tag or commit."
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{place.name}"
        return f"{place.label} is gated; accept its terms at {page} and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{place.label} is not on the Hub, or is private; check its spelling, or log in with `hf auth login`."
    return f"{at} cannot be loaded from the Hub ({first_line(error)}); try again."


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """No log lines of huggingface_hub, and its progress bars only on a terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silence = not sys.stderr.isatty() and not are_progress_bars_disabled()
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    if silence:
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if silence:
            enable_progress_bars()
