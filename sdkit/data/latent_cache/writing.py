"""Writing a latent cache: each image is encoded by the VAE once, and each caption by the tokenizer.

The content depends only on `Settings`, not on the number of processes or on interruptions. It is bit-identical on the
same kind of device with the same number of threads per process, and otherwise equal up to rounding. A shard holds
`shard_size` successive examples; process r of n makes shards r, r + n, r + 2n, and so on. Each is written atomically.
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
from sdkit.arguments import first_seed, whole_number
from sdkit.atomic import TEMPORARY, remove_leftovers
from sdkit.data.example import Example
from sdkit.data.examples import Examples, Stream, warn_of_captions
from sdkit.data.latent_cache.manifest import (
    MANIFEST_FILE,
    Manifest,
    Settings,
    Shard,
    Skipped,
    difference,
    text_identity,
    tokenizer_identity,
)
from sdkit.data.latent_cache.reading import damaged_files
from sdkit.data.latent_cache.shard_file import ShardFile, save, shard_file
from sdkit.data.latent_cache.shards import ShardEncoder
from sdkit.data.pairs import kind_of_conditions, open_conditions
from sdkit.data.sources import open_examples
from sdkit.data.transform import Transform, sides
from sdkit.engines.device import resolve_device, resolve_dtype
from sdkit.errors import ArgumentError, CacheError, DataError, SdkitError
from sdkit.files import check_name, encodable, expanded, sha256
from sdkit.loading.place import SourceName
from sdkit.loading.source import Source
from sdkit.messages import reason
from sdkit.networks.autoencoder import VAE
from sdkit.networks.text_encoder import TextEncoder
from sdkit.progress import progress

EMPTY = "empty-prompt.safetensors"
"""Name of the file of the empty prompt."""
LOCK = ".lock"
"""Name of the lock file, which a process holds while it makes a cache."""


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
    condition_column: str | None = None,
    conditioning_data: str | os.PathLike[str] | None = None,
    condition_kind: str | None = None,
    batch_size: int | None = None,
    workers: int = 4,
    dtype: str | torch.dtype = "fp32",
    device: str | torch.device = "auto",
    seed: int = 0,
    shard_size: int = 1024,
    vae: SourceName | None = None,
) -> Path:
    """Encode images and captions once before training, into a folder that `LatentCache` reads.

    The cache stores the posterior's mean and log-variance (float16, not scaled), so that training can draw new latents
    in each epoch, and the captions' token ids. An image that cannot be used is skipped, and named in manifest.json.
    Calling `cache` again with the same arguments resumes an interrupted cache, and replaces damaged files. Under
    `accelerate launch`, the processes share the work.

    Args:
        model: Model that gives the VAE, the text encoder, and the tokenizer.
        data: Path or id of the data set; see `open_examples`.
        out: Folder of the cache.
        size: (height, width) in pixels, or one number for a square. None takes the model's own size.
        crop, flip: See `Transform`.
        augmentations: Random crops and flips of each image. More than 1 needs a random crop or `flip`.
        embeddings: Also store the text encoder's last hidden states (float16), of the empty prompt too.
        split, image_column, caption_column, streaming, class_folders, default_caption: See `open_examples`.
        condition_column: Column of an image that a U-Net is to read beside the noise, in parquet files and data sets of
            the Hub. The cache then also holds these conditions, cropped and mirrored like their images.
        conditioning_data: Data set of the conditions, images of the same names as those in `data`, in place of
            `condition_column`.
        condition_kind: What a U-Net is to read of them: "latents" (None), or "map"; see `sdkit.UNet`.
        batch_size: Images that go through the VAE at once. None chooses by their size.
        workers: Threads that read and resize images.
        dtype: Dtype that the VAE computes in. bfloat16 is faster, but its rounding (0.3 % of a latent) stays in the
            cache.
        device: Device that the VAE runs on. Under `accelerate launch`, "auto" is the process's own device.
        seed: Seed of the crops and flips.
        shard_size: Images per file. An interruption loses at most one unfinished file per process.
        vae: A VAE to use instead of the model's own; see `StableDiffusion.from_pretrained`.

    Returns:
        The folder of the cache.

    Raises:
        ArgumentError: An argument is impossible, or does not apply to the data.
        CacheError: `out` holds something else, or another process is making the cache.
        DataError: There is no such data set, or no image in it can be used.

    Example:
        >>> from sdkit import data
        >>> folder = data.cache("emoji", "photos", "cache", size=64, default_caption="a photo")
        >>> len(data.LatentCache(folder))
        3
    """
    whole_number("augmentations", augmentations, 1)
    first_seed(seed, 1)
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
    conditions = None
    kind = kind_of_conditions(condition_column, conditioning_data, condition_kind)
    if kind is not None:
        conditions = open_conditions(
            examples, data, column=condition_column, conditioning_data=conditioning_data, split=split,
            image_column=image_column, class_folders=class_folders,
        )  # fmt: skip
    autoencoder = VAE.from_source(beside, dtype=resolve_dtype(dtype, place), device=place)
    # Always float32, so that the text encoder's fingerprint does not depend on `dtype`. The VAE takes most of the time.
    text = TextEncoder.from_source(opened, dtype=torch.float32, device=place if embeddings else torch.device("cpu"))
    del opened, beside  # frees the tensors that a pickled checkpoint holds in memory
    autoencoder.check_size(transform.size)
    settings = Settings(
        vae=autoencoder.identity, scale=autoencoder.scale, shift=autoencoder.shift, factor=autoencoder.factor,
        text=text_identity(text), tokenizer=tokenizer_identity(text), embeddings=embeddings,
        size=transform.size, crop=crop, flip=flip, augmentations=augmentations, seed=seed,
        dtype=str(autoencoder.dtype).removeprefix("torch."), shard_size=shard_size,
        data=examples.identity if conditions is None else conditions.added_to(examples.identity), condition=kind or "",
    )  # fmt: skip
    named = str(model) if vae is None else f"{model} with the VAE {vae}"
    manifest = Manifest(settings=settings, sdkit=__version__, model=encodable(named), source=encodable(os.fspath(data)))
    with contextlib.ExitStack() as held:
        if not _begin(folder, manifest, processes, held):
            return folder
        pool = held.enter_context(ThreadPoolExecutor(workers))
        pairs = None if conditions is None else conditions.images
        encoder = ShardEncoder(autoencoder, text, transform, settings, pool, batch_size, pairs)
        shards = _Shards(examples, shard_size)
        _write_shards(folder, encoder, shards, processes)
        processes.wait_for_everyone()
        if processes.is_main_process:
            _finish(folder, manifest, shards.total)
        processes.wait_for_everyone()
    return folder


def _begin(folder: Path, manifest: Manifest, processes: Any, held: contextlib.ExitStack) -> bool:
    """Prepare the folder for writing shards. Return False if none is needed: its cache is complete and undamaged.

    The main process locks the folder until `held` is closed, deletes damaged files, and marks the cache as unfinished,
    so that a later call recognises and resumes it. The other processes wait for that.
    """
    with processes.main_process_first():
        if _damaged(folder, manifest, processes.is_main_process) == []:
            return False
        if processes.is_main_process:
            held.enter_context(_alone_in(folder))
            damaged = _damaged(folder, manifest)  # again, under the lock: another call may have finished it since
            if damaged == []:
                return False
            for file in damaged or ():  # `_write_shards` makes them again
                _delete(folder / file)
            manifest.write(folder)
    return True


def _write_shards(folder: Path, encoder: ShardEncoder, shards: _Shards, processes: Any) -> None:
    """Write this process's shards, except undamaged ones. The main process also writes the file of the empty prompt."""
    for number, size, rows in shards:
        path = folder / shard_file(number)
        if number % processes.num_processes != processes.process_index:
            continue
        if not encoder.made(path, number * shards.size, size):
            shown = progress(rows, description=f"shard {number + 1}") if processes.is_main_process else rows
            save(path, *encoder.shard(shown), encoder.settings)
    if processes.is_main_process and not encoder.made(folder / EMPTY, prompt_only=True):
        save(folder / EMPTY, encoder.prompts([""]), [], encoder.settings)


def own_size(model: Source, vae: Source) -> tuple[int, int]:
    """Return the (height, width), in pixels, that the model's U-Net was trained at.

    `vae`, which may be `model` itself, is the source whose VAE says how many pixels a latent spans.
    """
    parts = _configs(model)
    if vae is not model:
        parts["vae"] = _configs(vae).get("vae", parts.get("vae", {}))
    side = parts.get("unet", {}).get("sample_size")
    if not isinstance(side, int):
        raise ArgumentError(f"the model {model.name!r} does not say what size it is for; give size=.")
    pixels = parts.get("vae", {}).get("factor", 8) * side
    return pixels, pixels


def _configs(source: Source) -> dict[str, dict[str, Any]]:
    """Return the config of each part of a source."""
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
    """Return Accelerate's `PartialState` under `accelerate launch`; for a single process, a stand-in for it.

    The stand-in has the attributes used here. A real `PartialState` would fix the device of every later `Accelerator`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return SimpleNamespace(
            process_index=0, num_processes=1, is_main_process=True, device=resolve_device("auto"),
            wait_for_everyone=lambda: None, main_process_first=contextlib.nullcontext,
        )  # fmt: skip
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # On resume, one process may have all the remaining work. The others must not time out while they wait for it.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))


def _damaged(folder: Path, manifest: Manifest, main: bool = True) -> list[str] | None:
    """Return the names of the cache's damaged files; None if the cache is not finished.

    Only the main process (`main`) reads the files. Other processes get an empty list for a finished cache.

    Raises:
        CacheError: `folder` holds another cache or something else.
    """
    try:
        inside = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise CacheError(f"cannot read {folder}: {reason(error)}.") from error
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder} is a file; name a folder for the cache.")
    if MANIFEST_FILE in inside:
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
    """Hold the lock of a cache, and remove temporary files of killed processes. Raises CacheError if it is taken."""
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
    """Iterates over the shards: (number, count of examples, iterator of (index, example)).

    The caller may skip the examples of a shard; a stream is read past them. The counts of a stream's shards are None,
    since they are not known in advance.

    Attributes:
        examples: The examples of all shards.
        size: Examples per shard.
        total: Number of examples; of a stream, the number that was read so far.
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
    """Check the shards of a cache of `total` examples, and write its complete manifest."""
    shard_size = manifest.settings.shard_size
    entries: list[Shard] = []
    skipped: list[Skipped] = []
    for number, start in enumerate(range(0, total, shard_size)):
        entry, shard = _entry(folder, shard_file(number), manifest.settings)
        if shard.examples != min(shard_size, total - start):  # a stream's length is known only now
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
