"""Examples in the docstrings of public names must run as they stand, on the embedded model and photos of the reader's
own.
"""

from __future__ import annotations

import doctest
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

import sdkit
from sdkit.pipelines import steps

FACES = (
    sdkit, sdkit.data, sdkit.evaluation, sdkit.guidance, sdkit.images, sdkit.latents, sdkit.metrics, sdkit.samplers,
    sdkit.training,
)  # fmt: skip
MAIN = (
    "VAE",
    "VAE.encode",
    "VAE.decode",
    "StableDiffusion",
    "StableDiffusion.__call__",
    "training.train_vae",
    "training.train_unet",
    "data.cache",
    "guidance.guided",
    "samplers.ddim",
)
"""Names under `sdkit` that must have an example."""


def public_names(face: ModuleType) -> Iterator[tuple[str, object]]:
    """Yield each class, method, and function that `face` exports, with its name under `sdkit`."""
    prefix = face.__name__.removeprefix("sdkit").removeprefix(".")
    for name in getattr(face, "__all__", vars(face)):
        value = getattr(face, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)) or not value.__module__.startswith("sdkit"):
            continue
        path = f"{prefix}.{name}" if prefix else name
        yield path, value
        for method, function in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isroutine(function) or isinstance(function, property):
                yield f"{path}.{method}", function


DOCS = {name: inspect.getdoc(value) or "" for face in (*FACES, steps) for name, value in public_names(face)}
WITH_EXAMPLES = [name for name, doc in DOCS.items() if "Example:\n" in doc or "Examples:\n" in doc]


@pytest.fixture
def photos(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    astronaut: Image.Image,
    chelsea: Image.Image,
    coffee: Image.Image,
) -> None:
    """Make a working folder with `photo.jpg` and a folder `photos` of three images."""
    (tmp_path / "photos").mkdir()
    for name, image in (("astronaut", astronaut), ("chelsea", chelsea), ("coffee", coffee)):
        image.resize((image.width // 4, image.height // 4)).save(tmp_path / "photos" / f"{name}.jpg")
    astronaut.resize((128, 128)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:3 images are fewer than")
@pytest.mark.usefixtures("photos")
@pytest.mark.parametrize("name", dict.fromkeys((*MAIN, *WITH_EXAMPLES)))
def test_example_runs(name: str) -> None:
    example = doctest.DocTestParser().get_doctest(DOCS[name], {}, name, None, None)
    assert example.examples, f"the docstring of sdkit.{name} has no example with a >>> prompt"
    output = io.StringIO()
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=output.write)
    assert results.failed == 0, output.getvalue()
