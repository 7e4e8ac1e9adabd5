"""Images in a folder and their captions: listed, but no image is opened."""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdkit.data.captions import BESIDE, Texts
from sdkit.data.metadata import NAMES, Row, read_metadata
from sdkit.errors import DataError
from sdkit.file_search import walk
from sdkit.files import encodable
from sdkit.images import READABLE
from sdkit.messages import clean, listed

NAME, OFFSET, SIZE = "sdkit.name", "sdkit.offset", "sdkit.size"
"""Columns of the data set besides `image` and `caption`. Offset and size, in bytes, locate an image in a tar shard."""
CLASS_FOLDER = re.compile(r"(\d{1,4})_(.*)")
"""Matches a folder name of kohya's sd-scripts, REPEATS_CAPTION, such as "10_zork dog"."""
TEXT_SUFFIXES = frozenset((*BESIDE, ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".tags", ".cap", ".parquet"))
"""Suffixes of files that may hold captions, including formats that are not read."""


def folder_rows(
    files: Iterable[Path], root: Path, caption_column: str | None, class_folders: bool = False
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """List the images in a folder with their captions, which are found as `open_examples` describes.

    Args:
        files: The image files below `root`.
        root: The folder.
        caption_column: Key of the caption in metadata and .json files; None tries the usual keys.
        class_folders: Repeat each image in a folder named like "10_zork dog" ten times, and give it the caption
            "zork dog" if it has no other. If no folder is named so, each image counts once, and its caption is the name
            of its folder below `root`.

    Returns:
        Three lists: a row for each image file and each file that metadata names, sorted by path; the files that may
        hold captions, if no image has one, else none; and the suffixes, other than .txt, of the files that captions
        were read from.

    Raises:
        DataError: Captions cannot be read or are ambiguous, or no caption has the key `caption_column`.
    """
    listed = {str(Path(folder)): names for folder, names in walk(root)}
    place = Places()
    images = {place(path): path for path in files}  # several paths may lead to one file, through ".." or links
    stated, keys = read_metadata(listed, caption_column)
    captions = matched(stated, images, place)
    texts, beside = Texts(caption_column), _Beside(listed)
    rows, sources = list[dict[str, Any]](), set[str]()
    classes = 0
    named = dict[int, str]()  # row -> the name of its folder, where it has no caption
    for key, path in sorted(images.items(), key=lambda item: item[1]):
        caption = captions.get(key, "")
        if not caption:
            caption, source = _first(beside.of(path, caption_column is not None), texts)
            sources.add(source)
        repeats = 1
        if class_folders and (found := _class(path, root)):
            classes += 1
            repeats = int(found[1])
            caption = caption or found[2].replace("_", " ").strip()
        if class_folders and not caption and len(inside := Path(os.path.relpath(path, root)).parts) > 1:
            named[len(rows)] = inside[-2].replace("_", " ").strip()
        rows += [row(relative(path, root), path, caption)] * repeats
    texts.check()
    beside.warn()
    keys |= texts.keys
    if caption_column is not None and caption_column not in keys:
        have = ", ".join(map(repr, map(clean, sorted(keys)))) or "none"
        raise DataError(
            f"no line of a {NAMES[0]} in {root}, and no .json, has {caption_column!r}; the keys there: {have}."
        )
    if class_folders and not classes:
        if not named:
            raise DataError(f"no folder in {root} is named like '10_zork dog'; leave class_folders out.")
        for i, name in named.items():
            rows[i]["caption"] = name
    unread = [] if any(one["caption"] for one in rows) else _texts_in(listed)
    return rows, unread, sorted(sources - {"", BESIDE[0]})


def _first(paths: Iterable[Path], texts: Texts) -> tuple[str, str]:
    """Return the first caption that is not empty, and the suffix of its file."""
    found = ((texts.read(path), path.suffix.lower()) for path in paths)
    return next((one for one in found if one[0]), ("", ""))


def _class(path: Path, root: Path) -> re.Match[str] | None:
    """Match `CLASS_FOLDER` against the folders from the image up to `root`, and return the first match."""
    inside = [root.absolute().name, *Path(os.path.relpath(path, root)).parts[:-1]]
    return next((found for part in reversed(inside) if (found := CLASS_FOLDER.fullmatch(part))), None)


def _texts_in(listed: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted(
        str(Path(folder, name))
        for folder, names in listed.items()
        for name in names
        if os.path.splitext(name)[1].lower() in TEXT_SUFFIXES  # noqa: PTH122
    )


class Places:
    """Resolves links and ".." in the folder part of a path only: a link to a file counts as a file of its own."""

    def __init__(self) -> None:
        self.folders: dict[Path, Path] = {}

    def __call__(self, path: Path) -> Path:
        """Return a path with its folder resolved."""
        if path.parent not in self.folders:
            self.folders[path.parent] = Path(os.path.realpath(path.parent))  # `Path.resolve` raises for a loop of links
        return self.folders[path.parent] / path.name


def row(name: str, path: Path, caption: str, offset: int | None = None, size: int | None = None) -> dict[str, Any]:
    """Return an image and its caption as a row of the data set."""
    return {
        "image": {"bytes": None, "path": encodable(str(path))},
        "caption": caption,
        NAME: name,
        OFFSET: offset,
        SIZE: size,
    }


def relative(path: Path, root: Path) -> str:
    """Return a file's path relative to `root`, for people to read."""
    return encodable(Path(os.path.relpath(path, root)).as_posix())


def normalized(name: str) -> str:
    """Normalize a name: names become equal if they differ only in case, Unicode form (NFC or NFD), or / and \\."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).casefold()


def matched(stated: Iterable[Row], images: dict[Path, Path], place: Places) -> dict[Path, str]:
    """Match the lines of metadata to images, and return resolved path of an image -> its caption.

    If the file that a line names does not exist, the line belongs to the one image that has an equal normalized path
    and no line of its own. Files that only metadata names are added to `images`, even missing ones: loading those
    raises an error that names them.
    """
    captions: dict[Path, str] = {}
    missing: list[tuple[Row, Path]] = []

    def add(one: Row, key: Path) -> None:
        if key in captions:
            raise DataError(f"{one.where}: {clean(key.name)} has a caption already; leave one line for each image.")
        captions[key] = one.caption

    for one in stated:
        path = Path(os.path.normpath(one.folder / one.file_name))
        if place(path) in images or os.path.lexists(path):
            images.setdefault(place(path), path)
            add(one, place(path))
        else:
            missing.append((one, path))
    if not missing:
        return captions
    spelt: dict[str, list[Path]] = defaultdict(list)
    for key in images.keys() - captions.keys():
        spelt[normalized(str(key))].append(key)
    for one, path in missing:
        written = Path(os.path.normpath(one.folder / one.file_name.replace("\\", "/")))
        found = spelt.get(normalized(str(place(written))), [])
        if len(found) > 1:
            names = " and ".join(sorted(clean(key.name) for key in found)[:2])
            raise DataError(f"{one.where}: {clean(one.file_name)!r} may be {names}; write it as the file is called.")
        key = found[0] if found else place(path)
        images.setdefault(key, path)
        add(one, key)
    return captions


class _Beside:
    """Finds caption files beside an image A.png: A.txt, A.caption, A.png.txt, A.png.caption, A.json, or A.png.json."""

    def __init__(self, listed: Mapping[str, Sequence[str]]) -> None:
        self.listed = listed
        self.folders: dict[str, _Names] = {}
        self.passed_over: list[str] = []

    def of(self, image: Path, json_first: bool) -> list[Path]:
        """Return the caption files of an image, the preferred one first."""
        folder = str(image.parent)
        if folder not in self.folders:
            self.folders[folder] = _Names(self.listed[folder] if folder in self.listed else _list(folder))
        names = self.folders[folder]
        if not names.texts:
            return []
        stem = image.name[: len(image.name) - len(image.suffix)]
        plain = [(base, suffix) for base in (stem, image.name) for suffix in BESIDE[:-1]]
        fields = [(base, BESIDE[-1]) for base in (stem, image.name)]
        order = [*fields, *plain] if json_first else [*plain, *fields]
        found = [name for base, suffix in order if (name := names.find(base, suffix))]
        texts = [name for name in found if not name.lower().endswith(".json")]
        self.passed_over += [str(image.parent / name) for name in texts[1:]]
        return [image.parent / name for name in found]

    def warn(self) -> None:
        """Warn of caption files that are ignored because their image has another caption file."""
        if self.passed_over:
            verb = "are" if len(self.passed_over) > 1 else "is"
            warnings.warn(
                f"{listed(self.passed_over)} {verb} passed over, since the image has another caption file.",
                stacklevel=3,
            )


class _Names:
    """The caption files in one folder, by exact and by normalized name."""

    def __init__(self, names: Iterable[str]) -> None:
        split = [os.path.splitext(name) for name in names]  # noqa: PTH122 - pathlib takes three times as long
        texts = [(stem, suffix) for stem, suffix in split if suffix.lower() in BESIDE]
        self.texts = {stem + suffix for stem, suffix in texts}
        self.images = {base for stem, suffix in split if suffix.lower() in READABLE for base in (stem, stem + suffix)}
        self.spelt: dict[str, list[str]] = defaultdict(list)
        for stem, suffix in texts:
            self.spelt[normalized(stem + suffix)].append(stem + suffix)

    def find(self, base: str, suffix: str) -> str | None:
        """Return the file `base` + `suffix`, or one with an equal normalized name that belongs to no other image."""
        if base + suffix in self.texts:
            return base + suffix
        found = self.spelt.get(normalized(base + suffix), [])
        exact = [name for name in found if name[: -len(suffix)] == base]  # only the suffix's case differs: A.TXT
        free = exact or [name for name in found if name[: -len(suffix)] not in self.images]
        if len(free) > 1:
            names = " or ".join(map(clean, sorted(free)[:2]))
            raise DataError(f"the caption of {clean(base)} may be in {names}; leave one of them.")
        return free[0] if free else None


def _list(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]
    except OSError:  # loading the images in this folder will raise the error
        return []
