"""The file that shows an image while it is forming."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sdkit.atomic import beside
from sdkit.cli.console import complain
from sdkit.messages import reason

if TYPE_CHECKING:
    from PIL import Image

    from sdkit.diffusion.samplers import Step

SHARE = 0.02
"""Largest share of the time that previews may take, if the user does not say how often to write one."""
QUALITY = 85
"""JPEG quality. A PNG would take ten times as long to write."""


def preview_path(out: Path, *, is_file: bool) -> Path:
    """Return the path of the preview: beside the image `out`, or in the folder `out`."""
    return out.with_name(f"{out.stem}-preview.jpg") if is_file else out / "preview.jpg"


class PreviewFile:
    """The callback of a pipeline that draws the forming image into a file, again and again.

    A viewer sees whole images only. If the file cannot be written, this is said once, and the images go on.

    Attributes:
        path: The file, a JPEG.
        every: Number of steps from one preview to the next; None: as often as takes at most 2 % of the time.
    """

    def __init__(self, path: Path, draw: Callable[[Step], Image.Image], every: int | None = None) -> None:
        """Draw previews with `draw`, as from `sdkit.latents.previewer`."""
        self.path, self.every, self._draw = path, every, draw
        self._begun, self._spent, self._last, self._failed = time.perf_counter(), 0.0, 0.0, False

    def __call__(self, step: Step) -> None:
        """Write a preview, if it is time for one."""
        begun = time.perf_counter()
        if self._failed or not self._due(step, begun - self._begun):
            return
        image = self._draw(step)
        try:
            self._write(image)
        except OSError as error:
            self._failed = True
            complain(f"cannot write the preview {self.path}: {reason(error)}; the images are still drawn.")
        self._last = time.perf_counter() - begun
        self._spent += self._last

    def _due(self, step: Step, elapsed: float) -> bool:
        if self.every is not None:
            return (step.i + 1) % self.every == 0
        return self._spent + self._last <= SHARE * elapsed

    def _write(self, image: Image.Image) -> None:
        """Write beside the file, and rename. Nothing is synced to disk: no one needs a preview after a power cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = beside(self.path, self.path.suffix)
        try:
            image.save(temporary, quality=QUALITY)
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)
