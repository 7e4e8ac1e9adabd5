"""Locate the one file of an addition to a model: a LoRA, or a textual inversion embedding."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdkit.arguments import possible_name
from sdkit.errors import ArgumentError, SourceError
from sdkit.files import expanded
from sdkit.loading.hub import is_hub_id
from sdkit.loading.place import Place, absent
from sdkit.loading.tensors import is_file, status_or_none
from sdkit.messages import clean


@dataclass(frozen=True, kw_only=True)
class AddOn:
    """A kind of addition, and the names that its files usually have.

    Attributes:
        name: The kind as messages name it, with its article.
        usual: Usual names of .safetensors files, the first to try first.
        pickles: Usual names of pickles, which are tried after all .safetensors files.
        beside: Name of a config that may lie in the file's folder; it is downloaded, too.
    """

    name: str
    usual: tuple[str, ...]
    pickles: tuple[str, ...]
    beside: str | None = None

    def locate(self, source: str | os.PathLike[str], filename: str | None, revision: str | None) -> Path:
        """Return the path of the file, after downloading it if it is on the Hub.

        Args:
            source: A file, a folder, or a Hub id.
            filename: Name of the file in a folder or Hub repository. None takes the first that exists of `usual`, the
                only .safetensors file (in a local folder), `pickles`, and the only .bin file (in a local folder).
            revision: Branch, tag, or commit of a Hub repository.

        Raises:
            ArgumentError: An argument is of another type, or has no meaning for this source.
            SourceError: There is no such file.
        """
        if not isinstance(source, (str, os.PathLike)):
            raise ArgumentError(f"{self.name} is a path or a Hub id, not {type(source).__name__}.")
        for option, value in (("filename", filename), ("revision", revision)):
            if value is not None and not (isinstance(value, str) and value and possible_name(value)):
                raise ArgumentError(f"{option} must be a name, not {clean(repr(value))}; correct it, or leave it out.")
        name, path = os.fspath(source), expanded(source)
        if "://" in name:
            raise SourceError(f"{clean(repr(name))} is a URL; give a Hub id (org/name), or the downloaded file.")
        found = status_or_none(path) if name else None
        if found is None and is_hub_id(source):
            return self._fetched(Place(name=name, kind="hub", path=path, revision=revision), filename)
        if found is None:
            kind = self.name.partition(" ")[2]
            raise SourceError(
                f"the {kind} {clean(name)!r} does not exist; give a file, a folder with one, or a Hub id."
            )
        if revision is not None:
            raise ArgumentError(f"revision= belongs to a Hub id, and {clean(name)!r} is a path; leave it out.")
        if stat.S_ISDIR(found.st_mode):
            return self._inside(path, name, filename)
        if filename is not None:
            raise ArgumentError(f"filename= belongs to a folder, and {clean(name)!r} is a file; leave it out.")
        return path

    def _inside(self, folder: Path, name: str, filename: str | None) -> Path:
        """Return the path of the file in a folder. Raise SourceError if there is none, or no choice between several."""
        inside, pickles = (sorted(file.name for file in folder.glob(f"*{end}")) for end in (".safetensors", ".bin"))
        usual = [*self.usual, *inside[: len(inside) == 1], *self.pickles, *pickles[: len(pickles) == 1]]
        for wanted in [filename] if filename else usual:
            if is_file(folder / wanted):
                return folder / wanted
        others = ", ".join(map(clean, inside or pickles))
        held = f"holds {others}: name one by filename=" if others else "holds no other; give another source"
        raise SourceError(f"the folder {clean(name)!r} has no {clean(filename or self.usual[0])}; it {held}.")

    def _fetched(self, place: Place, filename: str | None) -> Path:
        """Download the file from a Hub repository, and return its path."""
        for wanted in [filename] if filename else [*self.usual, *self.pickles]:
            file = place.root([wanted]) / wanted
            if is_file(file):
                if self.beside is not None:
                    place.root([PurePosixPath(wanted).with_name(self.beside).as_posix()])
                return file
        raise absent(place, filename or f"{self.usual[0]} (filename= names another)")
