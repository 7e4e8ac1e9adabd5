"""The folder of a comparison: each part is trained in it once, and its time is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdkit.atomic import atomic_write
from sdkit.errors import ArgumentError, SourceError
from sdkit.recipes.compare.data import CAPTIONED, CLASSES, EVERYTHING, Digits
from sdkit.recipes.compare.shapes import SHAPES
from sdkit.strict_json import read_object, require

STEPS = {
    "gan": 5000, "vae": 1500, "vq": 1750, "kl": 1500, "vq-latents": 1, "vq-captioned": 1, "kl-latents": 1,
    "pixelcnn": 1250, "gpt": 1750, "ddpm": 2300, "improved-ddpm": 2250, "adm": 1200, "classifier": 400, "ldm-kl": 1100,
    "ldm-vq": 1100, "dall-e": 1750, "clip": 600, "image-prior": 600, "decoder": 800, "judge-clip": 800,
}  # fmt: skip
"""Part -> its steps, by which the systems take from 104 to 326 seconds of one core, 192 on average."""


@dataclass(frozen=True)
class Workshop:
    """A folder in which parts are trained.

    Attributes:
        folder: The folder.
        digits: The data.
        scale: Share of the steps in `STEPS` that are taken.
    """

    folder: Path
    digits: Digits
    scale: float = 1.0

    @property
    def classes(self) -> Path:
        """Folder of the training images, in folders of their classes."""
        return self.folder / "data" / CLASSES

    @property
    def captioned(self) -> Path:
        """Folder of the training images with captions."""
        return self.folder / "data" / CAPTIONED

    @property
    def everything(self) -> Path:
        """Folder of all training images with captions, for the judge."""
        return self.folder / "data" / EVERYTHING

    def shape(self, part: str) -> Path:
        """Write the config of a part's network into a file of its own, and return the file."""
        path = self.folder / "shapes" / part / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(SHAPES[part], indent=1), encoding="utf-8")
        return path

    def check_scale(self) -> None:
        """Raise ArgumentError if a part is there, trained for another number of steps."""
        for part in STEPS:
            had, wanted = self._record(part)["steps"], self._steps(part)
            if had not in (None, wanted):
                raise ArgumentError(
                    f"{part} in {str(self.folder)!r} has {had} steps, and this comparison asks for {wanted}; name "
                    "another --out, or the same --scale as before, if that was with this version of sdkit."
                )

    def result(self, part: str) -> Path:
        """Return the folder of a part that has been trained."""
        return self.folder / part / "result"

    def trained(self, part: str, train: Callable[[Path, int], Any]) -> Path:
        """Train a part, unless it has been trained, and return the folder of its result.

        Args:
            part: Name of the part.
            train: Trains it, given its run folder and its number of steps. A run that was stopped is resumed, except
                the GAN, which begins again. Its time is kept if Python could still write it: a process that is killed
                outright loses the time since it was started.

        Raises:
            SourceError: Its record is damaged.
        """
        steps, record = self._steps(part), self._record(part)
        if not record["done"]:
            start = time.process_time()
            try:
                self._write(part, {"steps": steps, "done": False, "seconds": record["seconds"]})
                train(self.folder / part, steps)
                record["done"] = True
            finally:  # a run that was stopped has cost its time, too
                seconds = record["seconds"] + time.process_time() - start
                self._write(part, {"steps": steps, "done": record["done"], "seconds": seconds})
        return self.result(part)

    def seconds(self, part: str) -> float:
        """Return the CPU time that a part's training has taken."""
        seconds: float = self._record(part)["seconds"]
        return seconds

    def _steps(self, part: str) -> int:
        return max(2, round(STEPS[part] * self.scale))

    def _record(self, part: str) -> dict[str, Any]:
        path = self.folder / f"{part}.json"
        if not path.exists():
            return {"steps": None, "done": False, "seconds": 0.0}
        try:
            record = read_object(path)
            require(record, {"steps": int, "done": bool, "seconds": float})
        except (OSError, ValueError) as error:
            raise SourceError(f"{str(path)!r} is damaged; delete it and the folder {part!r} beside it.") from error
        return record

    def _write(self, part: str, record: dict[str, Any]) -> None:
        with atomic_write(self.folder / f"{part}.json") as path:
            path.write_text(json.dumps(record), encoding="utf-8")
