"""Writing a latent cache: every image through the VAE once, every caption through the tokenizer.

Its content depends on `Settings` alone: not on how many processes made it, nor on how often it was interrupted (to the
bit on one kind of device, with as many threads a process; else to rounding). A shard holds `shard_size` successive
examples; process r of n makes every n-th from the r-th. A shard that is there is whole.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import chain, count, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import torch

from sdkit import __version__
from sdkit.arguments import whole_number
from sdkit.data.examples import Example, Examples, Stream, open_examples, warn_of_captions
from sdkit.data.latent_cache import manifest as manifests
from sdkit.data.latent_cache.manifest import Manifest, Settings, Shard, Skipped, difference
from sdkit.data.latent_cache.reading import damaged_files
from sdkit.data.latent_cache.shard_file import ShardFile, save, shard_file
from sdkit.data.latent_cache.shards import ShardEncoder
from sdkit.data.transform import Transform, sides
from sdkit.engines.device import resolve_device, resolve_dtype
from sdkit.errors import ArgumentError, CacheError, DataError, SdkitError
from sdkit.files import TEMPORARY, check_name, encodable, expanded, reason, remove_leftovers, sha256
from sdkit.loading.place import SourceName
from sdkit.loading.source import Source
from sdkit.networks.autoencoder import VAE
from sdkit.networks.text_encoder import TextEncoder
from sdkit.progress import progress

EMPTY = "empty-prompt.safetensors"
LOCK = ".lock"


def cache(
    model: SourceName,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    crop: str = "center",
    flip: bool = False,
    augmentations: int = 1,
    embeddings: bool = False,
    split: str = "train",
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
    class_folders: bool = False,
    default_caption: str = "",
    batch_size: int | None = None,
    workers: int = 4,
    dtype: str | torch.dtype = "fp32",
    device: str | torch.device = "auto",
    seed: int = 0,
    shard_size: int = 1024,
    vae: SourceName | None = None,
) -> Path:
    """Encode images and captions once, for training: into the folder `out`, which `LatentCache` reads.

    What is stored is the posterior's mean and log-variance (float16), raw, so that training draws a new sample each
    time, and the captions' token ids. An image that cannot be read is skipped and named in manifest.json. The same call
    again goes on where an earlier one was stopped, and makes damaged files anew; under `accelerate launch` the
    processes share the work.

    size:          (height, width) in pixels, or one number; None takes the model's own.
    crop, flip:    see `Transform`. augmentations: of each image, where there is chance in them.
    embeddings:    store the text encoder's last hidden states too (float16), those of the empty prompt included.
    split, image_column, caption_column, streaming, class_folders, default_caption: see `open_examples`.
    batch_size:    images that go through the VAE in one pass; None fits it to their size.
    workers:       threads that read and resize images.
    dtype, device: what the VAE computes in and on; bfloat16 is faster, but its rounding (0.3 % of a latent) would stay
                   in the cache. Under `accelerate launch`, device "auto" is the process's own.
    seed:          of the crops and flips.
    shard_size:    images of one file, which is also what an interruption can lose.
    vae:           a VAE in place of the model's own; see `StableDiffusion.from_pretrained`.

    Raises `CacheError` where `out` holds something else, `DataError` where no image can be used.
    """
    whole_number("augmentations", augmentations, 1)
    whole_number("seed", seed, 0, 2**63 - 1)
    whole_number("shard_size", shard_size, 1)
    whole_number("workers", workers, 1)
    if batch_size is not None:
        whole_number("batch_size", batch_size, 1)
    opened = Source.open(model)
    beside = opened if vae is None else Source.open(vae)
    transform = Transform(size=sides(size) if size is not None else own_size(opened, beside), crop=crop, flip=flip)
    if augmentations > 1 and not transform.random:
        raise ArgumentError(f"{augmentations} augmentations would all be alike; take crop='random' or flip as well.")
    folder = _folder(out)
    processes = _processes()
    place = processes.device if device == "auto" else resolve_device(device)
    examples = open_examples(
        data, split=split, image_column=image_column, caption_column=caption_column, streaming=streaming,
        class_folders=class_folders, default_caption=default_caption,
    )  # fmt: skip
    warn_of_captions(examples)
    autoencoder = VAE.from_source(beside, dtype=resolve_dtype(dtype, place), device=place)
    # In float32: its fingerprint does not depend on the dtype then, and beside the VAE it costs little.
    text = TextEncoder.from_source(opened, dtype=torch.float32, device=place if embeddings else torch.device("cpu"))
    del opened, beside  # they hold the tensors of a checkpoint that is a pickle
    autoencoder.check_size(transform.size)
    settings = Settings(
        vae=autoencoder.identity, scale=autoencoder.scale, shift=autoencoder.shift, factor=autoencoder.factor,
        text=manifests.text_identity(text), tokenizer=manifests.tokenizer_identity(text), embeddings=embeddings,
        size=transform.size, crop=crop, flip=flip, augmentations=augmentations, seed=seed,
        dtype=str(autoencoder.dtype).removeprefix("torch."), data=examples.identity, shard_size=shard_size,
    )  # fmt: skip
    named = str(model) if vae is None else f"{model} with the VAE {vae}"
    manifest = Manifest(settings=settings, sdkit=__version__, model=encodable(named), source=encodable(os.fspath(data)))
    with contextlib.ExitStack() as held:
        with processes.main_process_first():
            if _damaged(folder, manifest, processes.is_main_process) == []:
                return folder
            if processes.is_main_process:
                held.enter_context(_alone_in(folder))
                damaged = _damaged(folder, manifest)  # again: another call may just have made it
                if damaged == []:
                    return folder
                for file in damaged or ():  # they are made anew
                    _delete(folder / file)
                manifest.write(folder)  # an unfinished one, so that what was begun is known for what it is
        pool = held.enter_context(ThreadPoolExecutor(workers))
        encoder = ShardEncoder(autoencoder, text, transform, settings, pool, batch_size)
        shards = _Shards(examples, shard_size)
        for number, count, rows in shards:
            path = folder / shard_file(number)
            if number % processes.num_processes != processes.process_index:
                continue
            if not encoder.made(path, number * shard_size, count):
                shown = progress(rows, description=f"shard {number + 1}") if processes.is_main_process else rows
                save(path, *encoder.shard(shown), settings)
        if processes.is_main_process and not encoder.made(folder / EMPTY, prompt_only=True):
            save(folder / EMPTY, encoder.prompts([""]), [], settings)
        processes.wait_for_everyone()
        if processes.is_main_process:
            _finish(folder, manifest, shards.total)
        processes.wait_for_everyone()
    return folder


def own_size(model: Source, vae: Source) -> tuple[int, int]:
    """Return the size that the model's U-Net was trained at, in pixels of the VAE in `vae`, which may be `model`."""
    parts = _configs(model)
    if vae is not model:
        parts["vae"] = _configs(vae).get("vae", parts.get("vae", {}))
    side = parts.get("unet", {}).get("sample_size")
    if not isinstance(side, int):
        raise ArgumentError(f"the model {model.name!r} does not say what size it is for; give size=.")
    pixels = parts.get("vae", {}).get("factor", 8) * side
    return pixels, pixels


def _configs(source: Source) -> dict[str, dict[str, Any]]:
    """The config of each part of a source."""
    return {component.part: component.config for component in source.describe().components}


def _folder(out: str | os.PathLike[str]) -> Path:
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out):
        raise ArgumentError(f"out must be the folder to write the cache to, not {out!r}.")
    folder = expanded(out)
    try:
        check_name(folder)
    except OSError as error:
        raise ArgumentError(f"cannot write {folder}: {reason(error)}; name another folder.") from error
    return folder


def _processes() -> Any:
    """Accelerate's `PartialState` of the processes of one `accelerate launch`. One process alone gets its like: the
    state itself would settle the device of every `Accelerator` made later."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SimpleNamespace(
            process_index=0, num_processes=1, is_main_process=True, device=resolve_device("auto"),
            wait_for_everyone=lambda: None, main_process_first=contextlib.nullcontext,
        )  # fmt: skip
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Resuming, one may have all the work that is left, and the others must not give up waiting.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))


def _damaged(folder: Path, manifest: Manifest, main: bool = True) -> list[str] | None:
    """Files of the cache, if it is there already, that are missing or damaged, so far as the main process tells; None
    where it is not finished. Raises `CacheError` where `folder` holds another cache, or something else."""
    try:
        inside = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise CacheError(f"cannot read {folder}: {reason(error)}.") from error
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file; name a folder for the cache.")
    if manifests.NAME in inside:
        made = Manifest.read(folder)
        if found := difference(made.settings, asdict(manifest.settings)):
            raise CacheError(
                f"{folder} holds a cache (of {made.model}) made with {found} as asked for now; name another folder, or "
                "delete that one."
            )
        if made.complete:
            return damaged_files(folder, made) if main else []
    elif any(not name.startswith((TEMPORARY, LOCK)) for name in inside):
        raise CacheError(f"{folder} is not empty, and holds no latent cache; name another folder.")
    return None


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other call makes this cache meanwhile, and what killed ones left is gone."""
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
        remove_leftovers(folder)
    except filelock.Timeout as error:
        raise CacheError(f"another process makes the cache {folder}; wait for it, or name another folder.") from error
    except OSError as error:
        lock.release()
        raise CacheError(f"cannot write {folder}: {reason(error)}; name another folder.") from error
    try:
        yield
    finally:
        lock.release()


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise CacheError(f"cannot delete {path}, which is damaged: {reason(error)}; delete it yourself.") from error


class _Shards:
    """Iterate over the shards as (number, count of examples, numbered examples).

    The examples of a shard are read only when they are iterated over. A stream is always read, and its counts are not
    known before (None). `total`: the number of examples, of a stream those read so far.
    """

    def __init__(self, examples: Examples | Stream, size: int) -> None:
        self.examples, self.size = examples, size
        self.total = len(examples) if isinstance(examples, Examples) else 0

    def __iter__(self) -> Iterator[tuple[int, int | None, Iterable[tuple[int, Example]]]]:
        if isinstance(self.examples, Examples):
            examples = self.examples
            for number, start in enumerate(range(0, self.total, self.size)):
                indices = range(start, min(start + self.size, self.total))
                yield number, len(indices), ((i, examples[i]) for i in indices)
            return
        rows = self._counted(self.examples)
        for number in count():
            first = next(rows, None)
            if first is None:
                if number == 0:
                    raise DataError(f"there is no row in {self.examples.source}; name other data.")
                return
            shard = chain([first], islice(rows, self.size - 1))
            yield number, None, shard
            deque(shard, maxlen=0)

    def _counted(self, stream: Stream) -> Iterator[tuple[int, Example]]:
        for example in stream:
            self.total += 1
            yield self.total - 1, example


def _finish(folder: Path, manifest: Manifest, total: int) -> None:
    """Write the complete manifest of a cache of `total` examples."""
    shard_size = manifest.settings.shard_size
    entries: list[Shard] = []
    skipped: list[Skipped] = []
    for number, start in enumerate(range(0, total, shard_size)):
        entry, shard = _entry(folder, shard_file(number), manifest.settings)
        if shard.examples != min(shard_size, total - start):  # of a stream it is only now that this is known
            _delete(folder / entry.file)
            raise CacheError(f"{folder / entry.file} lacked images and is deleted; run the same command again.")
        entries.append(entry)
        skipped += shard.skipped
    images = total - len(skipped)
    if not images:
        raise DataError(
            f"none of the {len(skipped)} images in {manifest.source} can be used; the first, {skipped[0].name}: "
            f"{skipped[0].reason}"
        )
    replace(
        manifest, complete=True, examples=total, images=images, items=sum(entry.items for entry in entries),
        skipped=tuple(skipped), shards=tuple(entries), empty=_entry(folder, EMPTY, manifest.settings)[0],
    ).write(folder)  # fmt: skip


def _entry(folder: Path, file: str, settings: Settings) -> tuple[Shard, ShardFile]:
    path = folder / file
    try:
        shard = ShardFile(path, settings, prompt_only=file == EMPTY)
        items = shard.images * settings.augmentations
        return Shard(file=file, items=items, bytes=path.stat().st_size, sha256=sha256(path)), shard
    except (OSError, ValueError) as error:
        raise SdkitError(
            f"{file} of the cache {folder} vanished while it was made; run the same command again."
        ) from error
