"""Images with captions: opened from anywhere, checked, brought to one shape, and cached as latents."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdkit.data.checking import CheckReport, check
    from sdkit.data.encoding import cache
    from sdkit.data.examples import Example, Examples, Stream, open_examples
    from sdkit.data.latent_cache import LatentCache
    from sdkit.data.manifest import Manifest
    from sdkit.data.transform import Transform

# No module here has the name of a function: importing it would put the module in the function's place.
_HOMES = {
    "CheckReport": "sdkit.data.checking",
    "Example": "sdkit.data.examples",
    "Examples": "sdkit.data.examples",
    "LatentCache": "sdkit.data.latent_cache",
    "Manifest": "sdkit.data.manifest",
    "Stream": "sdkit.data.examples",
    "Transform": "sdkit.data.transform",
    "cache": "sdkit.data.encoding",
    "check": "sdkit.data.checking",
    "open_examples": "sdkit.data.examples",
}

__all__ = [
    "CheckReport",
    "Example",
    "Examples",
    "LatentCache",
    "Manifest",
    "Stream",
    "Transform",
    "cache",
    "check",
    "open_examples",
]

if not TYPE_CHECKING:  # a type checker reads the imports above, and so finds a misspelt name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
