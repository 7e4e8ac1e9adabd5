"""Data sets of captioned images: opened from files or the Hub, checked, resized and cropped, and cached as latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdkit.lazy import attributes

if TYPE_CHECKING:  # `as` re-exports a name for type checkers, which cannot evaluate the computed __all__ below
    from sdkit.data.checking import CheckReport as CheckReport
    from sdkit.data.checking import check as check
    from sdkit.data.example import Example as Example
    from sdkit.data.examples import Examples as Examples
    from sdkit.data.examples import Stream as Stream
    from sdkit.data.latent_cache.manifest import Manifest as Manifest
    from sdkit.data.latent_cache.reading import LatentCache as LatentCache
    from sdkit.data.latent_cache.writing import cache as cache
    from sdkit.data.sources import open_examples as open_examples
    from sdkit.data.transform import Transform as Transform

# No module of this package may share its name with a function: importing the module would shadow the function.
_HOMES = {
    "CheckReport": "sdkit.data.checking",
    "Example": "sdkit.data.example",
    "Examples": "sdkit.data.examples",
    "LatentCache": "sdkit.data.latent_cache.reading",
    "Manifest": "sdkit.data.latent_cache.manifest",
    "Stream": "sdkit.data.examples",
    "Transform": "sdkit.data.transform",
    "cache": "sdkit.data.latent_cache.writing",
    "check": "sdkit.data.checking",
    "open_examples": "sdkit.data.sources",
}
__all__ = sorted(_HOMES)

if not TYPE_CHECKING:  # with a module `__getattr__`, a type checker would accept misspelt names
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
