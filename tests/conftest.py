"""Fixtures of all tests: no network, an empty Hub cache, the embedded model loaded once, and a few real photos."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator

# Set before huggingface_hub and torch are first imported, because they read these variables once. Subprocesses inherit
# them.
_cache = tempfile.TemporaryDirectory(prefix="sdkit-tests-")
atexit.register(_cache.cleanup)
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=_cache.name, HF_HUB_CACHE=_cache.name + "/hub")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import skimage.data  # noqa: E402
from PIL import Image  # noqa: E402

import sdkit  # noqa: E402
from tests.helpers import VALIDATION_STEPS  # noqa: E402

# No deadline, because the first call of torch is slow. Derandomized, so that every run draws the same examples.
hypothesis.settings.register_profile("sdkit", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sdkit")


@pytest.fixture(scope="session", autouse=True)
def few_validation_steps() -> Iterator[None]:
    """Draw the pictures of validation prompts in few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdkit.training.stages.drawing.VALIDATION_STEPS", VALIDATION_STEPS)
        yield


@pytest.fixture(scope="session")
def sd() -> sdkit.StableDiffusion:
    """The embedded model in float32 on the CPU."""
    return sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")


@pytest.fixture(scope="session")
def astronaut() -> Image.Image:
    """A portrait of 512 x 512 pixels."""
    return Image.fromarray(skimage.data.astronaut())


@pytest.fixture(scope="session")
def chelsea() -> Image.Image:
    """A cat, 451 x 300 (width x height). Neither side is a multiple of 8."""
    return Image.fromarray(skimage.data.chelsea())


@pytest.fixture(scope="session")
def coffee() -> Image.Image:
    """A cup on a table, 600 x 400 pixels."""
    return Image.fromarray(skimage.data.coffee())
