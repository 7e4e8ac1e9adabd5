"""Run the notebooks and save their outputs: python notebooks/run.py [NAME.ipynb ...]

Each notebook runs in its own kernel, in an empty folder. A translation (NAME_zh.ipynb) has the code of its
original, and gets a copy of the outputs.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent


def code(notebook: Any) -> list[Any]:
    """Return the code cells of a notebook."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def digest(notebook: Any) -> str:
    """Return the SHA-256 digest of a notebook's code and outputs. The notebook's metadata stores it as `ran`."""
    cells = [(cell.source, cell.outputs) for cell in code(notebook)]
    return hashlib.sha256(json.dumps(cells, sort_keys=True).encode()).hexdigest()


def packed(png: str) -> str:
    """Return a PNG in fewer bytes, without matplotlib's opaque alpha channel; both PNGs are in base64."""
    smaller = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").save(smaller, "PNG", optimize=True)
    return base64.b64encode(smaller.getvalue()).decode()


def joined(outputs: list[Any]) -> list[Any]:
    """Return outputs in which adjacent pieces of text are one: how a kernel cuts its text depends on the time."""
    whole: list[Any] = []
    for output in outputs:
        if whole and output.output_type == whole[-1].output_type == "stream":
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def run(path: Path) -> None:
    """Run a notebook and save it with its outputs, except what it wrote to stderr (progress bars, warnings)."""
    notebook = nbformat.read(path, 4)
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in code(notebook):
        cell.outputs = joined([output for output in cell.outputs if output.get("name") != "stderr"])
        cell.metadata.pop("execution", None)  # times of the run
        for output in cell.outputs:
            if "image/png" in output.get("data", ()):
                output.data.pop("image/jpeg", None)  # a PIL image has both
                output.data["image/png"] = packed(output.data["image/png"])
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.ran = digest(notebook)
    nbformat.write(notebook, path)
    translation = path.with_stem(f"{path.stem}_zh")
    if translation.exists():
        other = nbformat.read(translation, 4)
        for mine, its in zip(code(notebook), code(other), strict=True):
            its.source, its.outputs, its.execution_count = mine.source, mine.outputs, mine.execution_count
        nbformat.write(other, translation)


def main(names: list[str]) -> None:
    """Run the named notebooks, or all of them."""
    os.environ.pop("SDKIT_LPIPS", None)  # the outputs are those of the network that comes with sdkit
    paths = [HERE / Path(name).name for name in names] or sorted(HERE.glob("*.ipynb"))
    for path in dict.fromkeys(path.with_stem(path.stem.removesuffix("_zh")) for path in paths):
        start = time.monotonic()
        run(path)
        print(f"{path.name}: {time.monotonic() - start:.0f} s, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(sys.argv[1:])
