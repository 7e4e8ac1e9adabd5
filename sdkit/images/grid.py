"""Grids of images with labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from sdkit.errors import ArgumentError
from sdkit.images.convert import Images, flat, to_pil
from sdkit.images.rgb import rgb_of


def grid(
    images: Images,
    columns: int | None = None,
    *,
    padding: int = 0,
    background: str = "white",
    captions: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
) -> Image.Image:
    """Draw images side by side, row after row, each centred in a cell of the largest image's size.

    Long labels are wrapped, and then cut off with an ellipsis.

    Args:
        images: Images of any sizes.
        columns: Cells in a row. None: the number of column labels, or else about as many columns as rows.
        padding: Pixels between cells, and around the whole grid if it has labels.
        background: Colour behind images and labels: a name or a form like "#ff8800".
        captions: One label for each image, below it.
        row_labels: One label for each row, to its left.
        column_labels: One label for each column, above it.

    Raises:
        ArgumentError: The number of labels, the columns, the padding, or the colour is impossible.
    """
    pictures = [image if isinstance(image, Image.Image) else to_pil(image)[0] for image in flat(images)]
    columns = columns if columns is not None else len(column_labels) or math.ceil(math.sqrt(len(pictures)))
    if columns < 1 or padding < 0:
        raise ArgumentError(f"a grid needs at least 1 column and 0 pixels of padding, not {columns} and {padding}.")
    rows = math.ceil(len(pictures) / columns)
    for name, labels, wanted in (
        ("captions", captions, len(pictures)),
        ("row_labels", row_labels, rows),
        ("column_labels", column_labels, columns),
    ):
        if len(labels) not in (0, wanted):
            raise ArgumentError(f"a grid of {rows} x {columns} takes {wanted} {name}, not {len(labels)}.")

    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    pen = _Pen(width, background)
    below = pen.wrap(captions, width)
    above = pen.wrap(column_labels, width)
    left = pen.wrap(row_labels, max(width, 8 * pen.size), max_lines=max(1, min(4, height // (2 * pen.size))))
    margin = padding if captions or row_labels or column_labels else 0
    x0 = margin + pen.width(left)
    y0 = margin + pen.height(above)
    x_step, y_step = width + padding, height + pen.height(below) + padding
    size = (x0 + columns * x_step - padding + margin, y0 + rows * y_step - padding + margin)
    sheet = Image.new("RGB", size, rgb_of(background))
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = x0 + i % columns * x_step, y0 + i // columns * y_step
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        if captions:
            pen.write(draw, below[i], x + width / 2, y + height + pen.size / 4, anchor="ma")
    for column, label in enumerate(above):
        pen.write(draw, label, x0 + column * x_step + width / 2, margin + pen.height(above) / 2)
    for row, label in enumerate(left):
        pen.write(draw, label, margin + pen.width(left) / 2, y0 + row * y_step + height / 2)
    return sheet


class _Pen:
    """Writes labels in black or white, whichever contrasts more with the background.

    The size of the font suits cells of `width` pixels.
    """

    def __init__(self, width: int, background: str) -> None:
        self.size = max(round(1.2 * math.sqrt(width)), 11)  # pixels
        self.font = ImageFont.load_default(self.size)
        red, green, blue = rgb_of(background)
        self.ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 127 else "white"
        self.canvas = ImageDraw.Draw(Image.new("L", (1, 1)))  # only to measure labels

    def wrap(self, labels: Sequence[str], width: int, max_lines: int = 3) -> list[str]:
        """Break labels into lines of at most `width` pixels; cut off the rest with an ellipsis."""
        return [self._wrap(label, width, max_lines) for label in labels]

    def _wrap(self, label: str, width: int, max_lines: int) -> str:
        lines: list[str] = []
        for word in label.split():
            if lines and (self.font.getlength(f"{lines[-1]} {word}") <= width or len(lines) == max_lines):
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return "\n".join(self._shorten(line, width) for line in lines)

    def _shorten(self, line: str, width: int) -> str:
        if self.font.getlength(line) <= width:
            return line
        needed = (math.ceil(self.font.getlength(line[:n] + "…")) for n in range(1, len(line)))
        fitting = sum(1 for _ in itertools.takewhile(lambda pixels: pixels <= width, needed))
        return line[:fitting].rstrip() + "…"

    def width(self, labels: Sequence[str]) -> int:
        """Return the width of a column of these wrapped labels and a gap beside it; 0 without labels."""
        return max((math.ceil(self._box(label)[0]) + self.size for label in labels), default=0)

    def height(self, labels: Sequence[str]) -> int:
        """Return the height of a row of these wrapped labels, with gaps above and below; 0 without labels."""
        return max((math.ceil(self._box(label)[1]) + self.size // 2 for label in labels), default=0)

    def _box(self, label: str) -> tuple[float, float]:
        left, top, right, bottom = self.canvas.multiline_textbbox((0, 0), label or " ", font=self.font)
        return right - left, bottom - top

    def write(self, draw: ImageDraw.ImageDraw, label: str, x: float, y: float, anchor: str = "mm") -> None:
        """Draw a wrapped label centred on (x, y). With anchor "ma", (x, y) is the middle of its upper edge."""
        draw.multiline_text((x, y), label, fill=self.ink, font=self.font, anchor=anchor, align="center")
