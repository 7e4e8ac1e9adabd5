"""Latent files: the scaled latents of one image, and what is needed to decode them.

A latent file is a safetensors file that any safetensors reader opens. It holds one tensor, `z` (C, h, w), in a
floating-point dtype (`sdkit encode` writes float32), and these metadata, all strings:

    format          "sdkit.latent"
    format_version  "1"
    height, width   size of the image in pixels: the upper left part of the h * factor x w * factor decoded pixels
    factor          pixels per latent along each axis (8 in Stable Diffusion): h = ceil(height / factor), w likewise
    vae             fingerprint of the VAE's encoder side: equal fingerprints mean the same latent space
    vae_name        path or name that the VAE was loaded from
    scale, shift    z = (raw - shift) * scale, where raw are the unscaled latents that the VAE's network decodes
    dtype           dtype that the VAE computed in, such as "bfloat16"; z may have another dtype
    source          name of the image file, if there was one
    sdkit           version of sdkit that wrote the file
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdkit import tensor_files
from sdkit.atomic import atomic_write
from sdkit.errors import LatentError
from sdkit.files import encodable
from sdkit.messages import clean, reason

FORMAT = "sdkit.latent"
FORMAT_VERSION = 1
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LARGEST = 2**31
"""Largest size in bytes of a latent file that is read."""


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{clean(text)!r} is no whole number")
    return int(text)


PARSERS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("height", "width", "factor"), _whole),
    **dict.fromkeys(("scale", "shift"), float),
    **dict.fromkeys(("vae", "vae_name", "dtype", "sdkit"), str),
}
"""Field of `Latent` -> parser of its string in the metadata. The other fields are z and source."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Latent:
    """Scaled latents of one image, and where they come from.

    Attributes:
        z: Latents (C, h, w), of a dtype in `DTYPES`.
        height: Height of the image in pixels.
        width: Width of the image in pixels.
        vae: Fingerprint of the VAE's encoder side.
        vae_name: Path or name that the VAE was loaded from.
        scale: Raw latents are z / scale + shift.
        sdkit: Version of sdkit that made the latents.
        dtype: Dtype that the VAE computed in.
        shift: See `scale`.
        factor: Pixels per latent along each axis.
        source: Name of the image file, if there was one.

    Raises:
        LatentError: The fields contradict one another, or z is not finite.
    """

    z: Tensor
    height: int
    width: int
    vae: str
    vae_name: str
    scale: float
    sdkit: str
    dtype: str
    shift: float = 0.0
    factor: int = 8
    source: str | None = None

    def __post_init__(self) -> None:
        finite = math.isfinite(self.scale) and math.isfinite(self.shift)
        if not finite or min(self.height, self.width, self.factor, self.scale) <= 0:
            raise LatentError(
                f"a latent of {self.height} x {self.width} pixels with factor {self.factor}, scale {self.scale} and "
                f"shift {self.shift} cannot exist; all but the shift must be positive, and finite."
            )
        expected = (-(-self.height // self.factor), -(-self.width // self.factor))  # rounded up
        if self.z.ndim != 3 or tuple(self.z.shape[1:]) != expected or len(self.z) == 0:
            raise LatentError(
                f"z has shape {tuple(self.z.shape)}, but the latents of {self.height} x {self.width} pixels have shape "
                f"(C, {expected[0]}, {expected[1]}); encode the image again."
            )
        if self.z.dtype not in DTYPES or not torch.isfinite(self.z).all():
            raise LatentError(
                "z is not made of finite floating point numbers (float16, bfloat16, float32 or float64); encode the "
                "image again."
            )


def save(latent: Latent, path: str | Path) -> None:
    """Write a latent file, atomically. Raises SdkitError if it cannot be written."""
    metadata = {name: encodable(str(getattr(latent, name))) for name in PARSERS}
    metadata |= {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    if latent.source is not None:
        metadata["source"] = encodable(latent.source)
    data = tensor_files.encoded({"z": latent.z}, metadata)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def load(path: str | Path) -> Latent:
    """Read a latent file; `z` is on the CPU. Raises LatentError if it is damaged, of another kind, or too new."""
    try:
        tensors, metadata = tensor_files.read(Path(path), LARGEST)
    except OSError as error:
        raise LatentError(f"{path}: the file cannot be read ({reason(error)}); check the name.") from error
    except ValueError as error:
        raise LatentError(f"{path}: this {error}; encode the image again.") from error
    try:
        if metadata.get("format") != FORMAT:
            raise LatentError("this is not a latent file of sdkit; sdkit encode makes them.")
        if _whole(metadata["format_version"]) > FORMAT_VERSION:
            raise LatentError("this was written by a newer version of sdkit; update sdkit to read it.")
        if "z" not in tensors:
            raise LatentError("there is no z in it, which is not a whole latent file; encode the image again.")
        fields = {name: parse(metadata[name]) for name, parse in PARSERS.items()}
        return Latent(z=tensors["z"], **fields, source=metadata.get("source"))
    except LatentError as error:
        raise LatentError(f"{path}: {error}") from None
    except (KeyError, ValueError) as error:
        raise LatentError(f"{path}: its metadata are damaged ({error}); encode the image again.") from error


def check_vae(
    latent: Latent, identity: str, force: bool = False, *, scale: float | None = None, shift: float | None = None
) -> None:
    """Raise LatentError if another VAE made the latent.

    Args:
        latent: The latent to check.
        identity: Fingerprint of the VAE; see `VAE.identity`.
        force: Check nothing.
        scale: Scale of the VAE. The fingerprint covers it, so if only the scale differs, the file is damaged.
        shift: Shift of the VAE, covered in the same way.
    """
    if force:
        return
    if latent.vae != identity:
        raise LatentError(
            f"the latent was made by another VAE ({clean(latent.vae_name)}, {latent.vae[:12]}) than this one "
            f"({identity[:12]}); decode it with that VAE, or force it."
        )
    for name, own, wanted in (("scale", latent.scale, scale), ("shift", latent.shift, shift)):
        if wanted is not None and not math.isclose(own, wanted, rel_tol=1e-5, abs_tol=1e-9):
            raise LatentError(
                f"the latent says {name} {own:g}, but the VAE that it names has {wanted:g}: its metadata are damaged; "
                "encode the image again, or force it."
            )
