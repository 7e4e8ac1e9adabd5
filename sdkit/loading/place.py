"""Locate a model source: decide whether its name is the embedded model, a Hub id, a folder, or a file.

No file of a model is opened. A path that exists wins over a Hub id.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from sdkit.errors import ArgumentError, SourceError
from sdkit.files import expanded, read_regular
from sdkit.loading import hub
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tensors import SUFFIXES, is_file, status_or_none
from sdkit.messages import clean

SourceName = str | os.PathLike[str]

EMBEDDED = "emoji"
PIXELS = "pixels"
KINDS = {
    "embedded": "the embedded model",
    "pixels": "the pixel identity",
    "hub": "a Hub id",
    "folder": "a folder",
    "file": "a file",
}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a source is.

    Attributes:
        name: The source as the user gave it.
        kind: "embedded", "pixels", "hub", "folder", or "file".
        path: The folder or the file; unused for a Hub id, whose snapshot is known once it is fetched.
        revision: A branch, tag, or commit of a Hub repository.
    """

    name: str
    kind: str
    path: Path
    revision: str | None = None

    @property
    def label(self) -> str:
        """The source as messages name it."""
        return clean(repr(self.name))

    def root(self, files: list[str]) -> Path:
        """Return the source's folder. For a Hub repository, first download those of `files` that it has."""
        return hub.fetch(self.name, self.revision, files) if self.kind == "hub" else self.path


def resolve(
    source: SourceName, *, revision: str | None = None, variant: str | None = None, config: SourceName | None = None
) -> Place:
    """Return a source's place: its kind and path. Raise ArgumentError for options that this kind does not take."""
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
    return Place(name=name, kind=kind, path=ASSETS / name) if kind in ("embedded", "pixels") else place


def path_or_fetched(source: SourceName, filename: str, revision: str | None) -> Path:
    """Return `source` as a path, whether it exists or not. For a Hub id, fetch `filename` and return its path.

    Raise SourceError if the repository lacks that file.
    """
    path = expanded(source)
    if not hub.is_hub_id(source) or status_or_none(path):
        return path
    place = Place(name=str(source), kind="hub", path=path, revision=revision)
    if is_file(file := place.root([filename]) / filename):
        return file
    raise absent(place, filename)


def absent(place: Place, what: str) -> SourceError:
    """Return the error for a place that lacks `what`."""
    what = clean(what)
    if place.kind == "hub":
        if hub.list_files(place.name, place.revision) is not None:
            return SourceError(f"{place.label} has no {what} on the Hub; give another id, variant or revision.")
        return SourceError(
            f"the snapshot of {place.label} in the cache is incomplete: it lacks {what}, and the Hub cannot be "
            "reached; load it once with a connection."
        )
    files = sorted(place.path.glob("*.safetensors"))
    if files and not any(is_file(place.path / name) for name in ("model_index.json", "config.json")):
        return SourceError(f"{place.label} has no {what}; give the file in it ({files[0].name}) if that is meant.")
    beside = ", or a VAE beside it (vae=, --vae)" if what.startswith("vae") else ""
    return SourceError(
        f"{place.label} has no {what}; give a folder in diffusers layout, a single file or a Hub id{beside}."
    )


def _snapshot(path: Path) -> Path:
    """Return the snapshot folder in a repository folder of the Hub's cache (models--org--name): that of the main
    branch, or else the only one. Return other folders unchanged."""
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
    except RuntimeError as error:  # ~user, where there is no such user
        raise SourceError(f"the path {name!r} begins with a home folder that does not exist; check it.") from error


def _kind(source: SourceName, path: Path) -> str:
    name = os.fspath(source)
    if source == EMBEDDED:  # only as a string; Path("emoji") is a path
        return "embedded"
    if source == PIXELS:
        return "pixels"
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
