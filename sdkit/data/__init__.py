"""Images with captions: opened from anywhere, checked, brought to one shape, and cached as latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdkit.lazy import attributes

if TYPE_CHECKING:  # `as` exports a name to type checkers, which cannot work out the __all__ below
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

# No module here has the name of a function: importing it would put the module in the function's place.
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

if not TYPE_CHECKING:  # a type checker reads the imports above, and so finds a misspelt name
    __getattr__ = attributes(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
