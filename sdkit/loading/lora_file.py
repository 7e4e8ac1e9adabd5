"""LoRA files: written in the layouts of diffusers and of kohya's sd-scripts (which A1111 reads), and read in these and
in peft's own layout. kohya's layout also holds what LyCORIS trains: LoCon, LoHa, LoKr, and DoRA.

`sdkit.networks.lora` trains LoRAs and merges them into networks.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdkit.arguments import one_of
from sdkit.atomic import atomic_write
from sdkit.errors import ArgumentError, SourceError
from sdkit.files import expanded
from sdkit.loading.add_on import AddOn
from sdkit.loading.lora_update import LowRank, Update, factors_of
from sdkit.loading.tensors import (
    BYTES,
    TensorFile,
    is_file,
    is_finite,
    not_finite,
    open_tensors,
)
from sdkit.messages import clean, reason
from sdkit.strict_json import parse_object, read_object
from sdkit.tensor_files import encoded

FILENAME = "pytorch_lora_weights.safetensors"
PEFT_FILENAME = "adapter_model.safetensors"
PICKLES = ("pytorch_lora_weights.bin", "adapter_model.bin")
PEFT_CONFIG = "adapter_config.json"
"""The config beside a LoRA in peft's layout. It states the alphas; diffusers has them in metadata, kohya as tensors."""
ADD_ON = AddOn(name="a LoRA", usual=(FILENAME, PEFT_FILENAME), pickles=PICKLES, beside=PEFT_CONFIG)
ADAPTER_METADATA = "lora_adapter_metadata"
"""The key of the metadata of diffusers' files that states the alphas."""
KEPT = ("ss_", "modelspec.")
"""Prefixes of the metadata of kohya's scripts and of Stability's ModelSpec, which a converted file keeps."""
PEFT_PREFIX = "base_model.model."
"""Prefix of tensor names in peft's layout. The layer's name in its network follows."""
LAYOUTS = ("diffusers", "kohya")

KEY = re.compile(
    r"(?P<part>unet\.|lora_unet_|(?=(?:down|mid|up)_block)|text_encoder\.|lora_te1?_)"
    r"(?P<module>.+?)"
    r"(?:[._]lora(?:_linear_layer)?[._](?P<side>down|up|mid|A|B)\.weight"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.weight)?"
    r"|\.(?P<own>alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))"
)
"""Matches a tensor's name in any layout, after `_unwrapped`. In old files of diffusers, U-Net names have no prefix."""
BUNDLED = "bundle_emb."
"""Prefix of the tensors of textual inversion embeddings, which some trainers bundle in a LoRA file."""
SIDES = {"A": "lora_down", "down": "lora_down", "B": "lora_up", "up": "lora_up", "mid": "lora_mid"}
MAGNITUDES = ("dora_scale", "lora_magnitude_vector")
"""Roles of DoRA's magnitude: of LyCORIS, in the shape that broadcasts with the weight; of peft, in another."""
# Old names of attention layers, from before diffusers used peft (with underscores for dots) -> today's names.
OLD_NAMES = ((r"_processor_", "_"), (r"(attn\d_to_out)$", r"\1_0"), (r"self_attn_to_(\w+)$", r"self_attn_\1_proj"))

# Substrings of tensor names that only another kind of file has, and that kind. The first match decides.
FOREIGN = (
    (("string_to_param", "emb_params", "clip_g"), "a textual inversion embedding"),
    (("on_input", "ia3_l"), "an IA3"),
    ((".oft_",), "an OFT"),
    ((".a1.weight", ".b1.weight"), "a GLoRA"),
    ((".diff_b", ".w_norm"), "a difference of whole weights"),
    (
        ("lora_te2_", "text_encoder_2.", "_input_blocks_", "_middle_block_", "_output_blocks_"),
        "a LoRA of Stable Diffusion XL",
    ),
)

FLOATS = {getattr(torch, name) for name in BYTES}
WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
"""Integer dtypes, in which some files store alpha."""
LARGEST_ALPHA = 1e12
MOST_PATTERNS = 1000
"""Largest number of patterns in an `alpha_pattern`; SD 1.x has fewer than 400 layers."""
PATTERN = re.compile(r"\^?(?:\.\*|\\\.|[\w.-])+\$?")
"""Matches the regular expressions of peft's `alpha_pattern` that are supported: a layer's name, or the end of one, in
which `.*` stands for anything."""
OTHER_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations (peft's `init_lora_weights`) that also change the base weights, so the LoRA alone is not enough."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """A LoRA that was read from a file: its updates of layers of the U-Net and the text encoder.

    Layers are named with underscores for dots, as kohya does; the dots cannot be restored without the network.

    Attributes:
        label: The file as messages name it.
        unet: Layer -> its update, in the U-Net.
        text_encoder: Layer -> its update, in the text encoder.
        name: A short name, from that of the file or its folder.
        path: The file; None if it was made in Python.
        metadata: The metadata of a safetensors file.
    """

    label: str
    unet: dict[str, Update]
    text_encoder: dict[str, Update]
    name: str = "lora"
    path: Path | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def updates(self) -> list[Update]:
        """The updates of all layers."""
        return [*self.unet.values(), *self.text_encoder.values()]


def save_lora(
    tensors: dict[str, Tensor],
    path: str | Path,
    layout: str = "diffusers",
    *,
    alpha: float | None = None,
    rslora: bool = False,
) -> None:
    """Write the tensors of a trained LoRA to one .safetensors file, atomically.

    Args:
        tensors: The tensors that `sdkit.networks.lora.lora_tensors` returns, in any precision.
        path: The file, ending in .safetensors.
        layout: "diffusers", for sdkit and diffusers' `load_lora_weights`; or "kohya", for these, A1111, and others.
        alpha: The alpha that it was trained with; None is the rank.
        rslora: Whether alpha is divided by the square root of the rank, not by the rank.

    Raises:
        ArgumentError: The name or the layout cannot be used.
    """
    one_of("layout", layout, LAYOUTS)
    check_lora_name(path)
    groups = _group(tensors, "the LoRA")
    if layout == "diffusers":
        usual = alpha is None and not rslora
        _write(tensors, path, {} if usual else _alpha_metadata(tensors, groups, alpha, rslora))
        return
    stated = _Alphas(usual=alpha, patterns=(), rslora=rslora)
    layers: dict[str, dict[str, Update]] = {"unet": {}, "text_encoder": {}}
    for (part, module), keys in groups.items():
        factors = LowRank(down=tensors[keys["lora_down"]], up=tensors[keys["lora_up"]])
        layers[part][plain_name(module)] = Update(factors=factors, alpha=stated.of(module, factors.rank))
    _write(_kohya(LoRA(label="the LoRA", unet=layers["unet"], text_encoder=layers["text_encoder"])), path)


def _alpha_metadata(
    tensors: Mapping[str, Tensor],
    groups: Mapping[tuple[str, str], Mapping[str, str]],
    alpha: float | None,
    rslora: bool,
) -> dict[str, str]:
    """Return the metadata in which diffusers states alphas: for each network, the config of its peft layers."""
    config: dict[str, Any] = {}
    for part in dict.fromkeys(part for part, _ in groups):
        own = {module.removeprefix("text_model."): keys for (other, module), keys in groups.items() if other == part}
        rank = len(tensors[next(iter(own.values()))["lora_down"]])
        config[f"{part}.r"] = rank
        config[f"{part}.lora_alpha"] = rank if alpha is None else alpha
        config[f"{part}.use_rslora"] = rslora
        config[f"{part}.target_modules"] = [*own]
    return {ADAPTER_METADATA: json.dumps(config)}


def convert_lora(source: str | os.PathLike[str], path: str | Path) -> None:
    """Convert a LoRA in any layout that `read_lora` reads to one .safetensors file in kohya's layout.

    Args:
        source: As in `read_lora`.
        path: The file, ending in .safetensors.

    Raises:
        SourceError: As in `read_lora`.
    """
    check_lora_name(path)
    write_lora(read_lora(source), path)


def write_lora(lora: LoRA, path: str | Path) -> None:
    """Write a LoRA to one .safetensors file in kohya's layout, atomically, with what its metadata say of it."""
    _write(_kohya(lora), path, {key: value for key, value in lora.metadata.items() if key.startswith(KEPT)})


def check_lora_name(path: str | Path) -> None:
    """Raise ArgumentError unless a LoRA can be written under this name."""
    if Path(path).suffix != ".safetensors":
        raise ArgumentError(f"a LoRA cannot be saved as {str(path)!r}; give a name that ends in .safetensors.")


def _write(tensors: dict[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    data = encoded(tensors, {"format": "pt", **(metadata or {})})
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def _kohya(lora: LoRA) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for prefix, layers in (("lora_unet_", lora.unet), ("lora_te_text_model_", lora.text_encoder)):
        for name, update in layers.items():
            named |= {f"{prefix}{name}.{key}": tensor for key, tensor in update.named().items()}
    return named


def read_lora(source: str | os.PathLike[str], *, filename: str | None = None, revision: str | None = None) -> LoRA:
    """Read a LoRA of Stable Diffusion 1.x / 2.x in the layout of diffusers (new or old), kohya, or peft.

    LoCon, LoHa, and LoKr, each with DoRA or without, are read as well, as LyCORIS (kohya's layout) and peft write them.
    Textual inversion embeddings in the file are ignored, with a warning.

    Args:
        source: A file, a folder, or a Hub id.
        filename: The file in a folder or Hub repository. None takes the first that exists of
            pytorch_lora_weights.safetensors, adapter_model.safetensors, the only .safetensors file (in a local folder),
            and the corresponding .bin files.
        revision: A branch, tag, or commit of a Hub repository.

    Raises:
        SourceError: The file is missing, damaged, or of another kind: IA3, OFT, Stable Diffusion XL, a textual
            inversion embedding.
    """
    path = ADD_ON.locate(source, filename, revision)
    file = open_tensors(path)
    names = [name for name in file.shapes if not name.startswith(BUNDLED)]
    groups = _group(names, file.label)
    tensors = _read(file, names)
    alphas = _stated_alphas(file, names)
    parts: dict[str, dict[str, Update]] = {"unet": {}, "text_encoder": {}}
    for (part, module), keys in groups.items():
        if plain_name(module) in parts[part]:
            raise SourceError(f"{file.label} is damaged: it holds {clean(module)} twice; download it again.")
        own = {role: tensors[name] for role, name in keys.items()}
        parts[part][plain_name(module)] = _update(own, alphas[part], module, file.label)
    for name in dict.fromkeys(name.removeprefix(BUNDLED).split(".")[0] for name in file.shapes if name not in tensors):
        warnings.warn(f"{file.label} brings the embedding {clean(name)!r} along, which is not used.", stacklevel=2)
    return LoRA(label=file.label, name=_short_name(source, path), path=path, metadata=file.metadata, **parts)


def _update(tensors: dict[str, Tensor], alphas: _Alphas, module: str, label: str) -> Update:
    """Return the update of a layer from its tensors by role. Raise SourceError if they are damaged."""
    alpha = tensors.pop("alpha", None)
    magnitudes = {role: tensors.pop(role) for role in MAGNITUDES if role in tensors}
    try:
        factors = factors_of(tensors)
        magnitude = _magnitude(magnitudes, factors.shape[0])
        if alpha is not None and alpha.numel() != 1:
            raise ValueError("alpha is no number")
    except ValueError as error:
        problem = f"{label} is damaged: the tensors of {clean(module)} do not fit"
        raise SourceError(f"{problem}; download it again.") from error
    try:
        if alpha is None:
            stated = alphas.of(module, factors.rank)
        else:
            stated = 1.0 if factors.rank is None else _number(alpha.item())  # a whole LoKr has no rank to divide by
    except ValueError as error:
        raise SourceError(f"{label} {error} at {clean(module)}; give another file.") from error
    return Update(factors=factors, alpha=stated, magnitude=magnitude)


def _magnitude(found: Mapping[str, Tensor], outputs: int) -> Tensor | None:
    """Return DoRA's magnitude in a shape that broadcasts with the weight. Raise ValueError if it has none."""
    if not found:
        return None
    ((role, magnitude),) = found.items()
    if role == "lora_magnitude_vector":  # peft: (outputs,); of a convolution, (1, outputs, 1, 1)
        if magnitude.numel() != outputs:
            raise ValueError("another number of outputs")
        return magnitude.reshape(outputs, *[1] * (1 if magnitude.ndim < 4 else 3))
    if magnitude.ndim < 2 or magnitude.numel() not in magnitude.shape[:2] or magnitude.numel() == 0:
        raise ValueError("no shape that broadcasts with the weight")
    return magnitude


def _group(names: Iterable[str], label: str) -> dict[tuple[str, str], dict[str, str]]:
    """Group the names of a LoRA's tensors: (part, module) -> role -> name. Raise SourceError for other names."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    names = list(names)
    alone = len(names) == 1 and "." not in names[0]  # a textual inversion embedding of diffusers: the name is its token
    found = (kind for pieces, kind in FOREIGN if any(piece in name for name in names for piece in pieces))
    if kind := next(found, "a textual inversion embedding" if alone else None):
        raise SourceError(f"{label} looks like {kind}; give a plain LoRA of Stable Diffusion 1.x or 2.x.")
    for name in names:
        match = KEY.fullmatch(_unwrapped(name))
        if match is None:
            raise SourceError(
                f"{label} holds {clean(name)}, which is no part of a LoRA for Stable Diffusion 1.x or 2.x; give one in "
                "the layout of diffusers, kohya, or peft."
            )
        part = "text_encoder" if match["part"] in ("text_encoder.", "lora_te_", "lora_te1_") else "unet"
        roles = groups.setdefault((part, match["module"]), {})
        role = SIDES[match["side"]] if match["side"] else match["magnitude"] or match["own"]
        if role in roles:
            raise SourceError(f"{label} is damaged: it holds {clean(match['module'])} twice; download it again.")
        roles[role] = name
    if not groups:
        raise SourceError(f"{label} holds no tensors; give a LoRA.")
    return groups


def _unwrapped(name: str) -> str:
    """Rename a tensor from peft's layout to diffusers' newest: "unet." or "text_encoder." first. Keep other names."""
    if not name.startswith(PEFT_PREFIX):
        return name
    layer = name.removeprefix(PEFT_PREFIX)
    return f"text_encoder.{layer}" if layer.startswith(("text_model.", "encoder.")) else f"unet.{layer}"


def _read(file: TensorFile, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the named tensors, contiguous. Raise SourceError if one is not of floating-point numbers or not finite."""
    tensors = file.read(names)
    for name, tensor in tensors.items():
        if tensor.dtype not in (FLOATS | WHOLE if name.endswith(".alpha") else FLOATS):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SourceError(f"{file.label} holds {clean(name)} as {kind} numbers, not as floats; give another file.")
    if file.tensors is not None:
        # Copy a pickle's tensors: they may be views or share memory, and safetensors writes neither.
        tensors = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    if broken := next((name for name, tensor in tensors.items() if not is_finite(tensor)), None):
        raise not_finite(file.label, broken)
    return tensors


@dataclass(frozen=True, kw_only=True)
class _Alphas:
    """The alphas of one network's layers, as peft's `LoraConfig` states them.

    Attributes:
        usual: The alpha of layers that match no pattern; None is each layer's rank.
        patterns: Pairs of names (with `*` for anything) and the alpha of the layers they match. The first match counts.
        rslora: Whether alpha is divided by the square root of the rank, not by the rank (rank-stabilised LoRA,
            https://arxiv.org/abs/2312.03732).
        rank: The rank by which the alpha of a LoKr of whole matrices is divided; None is none.
        ranks: The same for layers that match a pattern, as `patterns`.
    """

    usual: float | None
    patterns: tuple[tuple[tuple[str, ...], float], ...]
    rslora: bool
    rank: float | None = None
    ranks: tuple[tuple[tuple[str, ...], float], ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> _Alphas:
        """Read the alphas from a config. Raise ValueError for wrong types. No pattern is run as a regex."""
        patterns, rslora = config.get("alpha_pattern") or {}, config.get("use_rslora") or False
        if not isinstance(patterns, dict) or len(patterns) > MOST_PATTERNS or not isinstance(rslora, bool):
            raise ValueError("has an alpha_pattern or use_rslora of another type or size")
        usual = _number(config["lora_alpha"]) if "lora_alpha" in config else None
        return cls(usual=usual, patterns=_patterns(patterns), rslora=rslora)

    @classmethod
    def read_lycoris(cls, config: Mapping[str, Any]) -> _Alphas:
        """Read the alphas from peft's config of a LoHa or a LoKr. Raise ValueError for wrong types."""
        alphas = cls.read({"lora_alpha": config.get("alpha", 8), "alpha_pattern": config.get("alpha_pattern")})
        found = config.get("rank_pattern") or {}
        if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
            raise ValueError("has a rank_pattern of another type or size")
        rank, ranks = _number(config.get("r", 8)), _patterns(found)
        if min([rank, *(number for _, number in ranks)]) < 1:
            raise ValueError("has a rank below 1")
        return replace(alphas, rank=rank, ranks=ranks)

    def of(self, module: str, rank: int | None) -> float:
        """Return the alpha of a layer, adjusted so that the update is alpha / rank * B A in any case.

        Args:
            module: The layer's name.
            rank: Its rank; None for a LoKr of whole matrices, whose update is alpha times their product.
        """
        if rank is None:
            divisor = _matched(self.ranks, module, self.rank)
            alpha = _matched(self.patterns, module, self.usual)
            return 1.0 if divisor is None or alpha is None else alpha / divisor
        alpha = _matched(self.patterns, module, self.usual)
        alpha = rank if alpha is None else alpha
        return alpha * math.sqrt(rank) if self.rslora else alpha


def _patterns(found: Mapping[str, Any]) -> tuple[tuple[tuple[str, ...], float], ...]:
    return tuple((_globs(pattern), _number(number)) for pattern, number in found.items())


def _matched(patterns: Iterable[tuple[tuple[str, ...], float]], module: str, usual: float | None) -> float | None:
    """Return the number of the first pattern that matches a layer's name, or the usual one."""
    own = (number for globs, number in patterns if any(fnmatchcase(module, glob) for glob in globs))
    return next(own, usual)


def _globs(pattern: str) -> tuple[str, ...]:
    """Translate one of peft's patterns to shell patterns.

    A pattern that begins with ^ matches a layer's whole name. Others match the whole name, or its end after any dot.
    """
    if PATTERN.fullmatch(pattern) is None:
        raise ValueError(f"has the alpha_pattern {clean(pattern)!r}, which is no name of a layer")
    glob = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".").replace(".*", "*")
    return (glob,) if pattern.startswith("^") else (glob, f"*.{glob}")


def _number(alpha: Any) -> float:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise ValueError("has an alpha that is no number")
    if not abs(alpha) <= LARGEST_ALPHA:
        raise ValueError("has an alpha that is not finite, or too large")
    return float(alpha)


def _stated_alphas(file: TensorFile, names: Iterable[str]) -> dict[str, _Alphas]:
    """Return the alphas of both networks, from peft's adapter_config.json or from the metadata of diffusers' newer
    files."""
    if any(name.startswith(PEFT_PREFIX) for name in names):
        return dict.fromkeys(("unet", "text_encoder"), _peft_alphas(file.path.parent / PEFT_CONFIG, file.label))
    try:
        config = parse_object(file.metadata.get(ADAPTER_METADATA, "{}"))
        own = {
            part: {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
            for part in ("unet", "text_encoder")
        }
        return {part: _Alphas.read(values) for part, values in own.items()}
    except ValueError as error:
        problem = f"{file.label} has damaged metadata ({ADAPTER_METADATA}): it {error}"
        raise SourceError(f"{problem}; download it again.") from error


def _peft_alphas(path: Path, label: str) -> _Alphas:
    if not is_file(path):
        warnings.warn(
            f"{label} has no {PEFT_CONFIG} beside it, which states its alpha: 1 x B A is added.", stacklevel=4
        )
        return _Alphas(usual=None, patterns=(), rslora=False)
    try:
        config = read_object(path)
        if config.get("peft_type") in ("LOHA", "LOKR"):
            alphas = _Alphas.read_lycoris(config)
        else:
            alphas = _Alphas.read({"lora_alpha": 8, **config})  # 8 is peft's default
    except ValueError as error:
        raise SourceError(f"{clean(path)!r} {error}; download it again.") from error
    except OSError as error:
        raise SourceError(f"{clean(path)!r} cannot be read: {reason(error)}; check its permissions.") from error
    if (begun := str(config.get("init_lora_weights")).lower()).startswith(OTHER_BASE):
        raise SourceError(
            f"{label} was begun by {clean(begun)}, which changes the model's weights, too; give a plain LoRA of Stable "
            "Diffusion 1.x or 2.x."
        )
    return alphas


def plain_name(module: str) -> str:
    """Normalize a module's name: underscores for dots, no text_model_, and today's names of attention layers."""
    name = module.replace(".", "_").removeprefix("text_model_")
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def _short_name(source: str | os.PathLike[str], path: Path) -> str:
    """Return a short name for a LoRA: the file's, or, where it has the usual one, that of its folder or repository."""
    if path.name not in (FILENAME, PEFT_FILENAME, *PICKLES):
        return path.stem
    given = expanded(source)
    folder = path.parent if path.name == given.name else given
    return folder.parent.name if folder.name == "result" else folder.name  # a run's folder has a result/
