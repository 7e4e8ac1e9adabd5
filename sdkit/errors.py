"""Errors that a user can cause: each carries one sentence that says what was wrong, with what, and what to do."""

from __future__ import annotations

from sdkit.messages import shortened


class SdkitError(Exception):
    """Base class of every error that sdkit raises on purpose. The command line prints it without a traceback, exit code
    2.

    A message that quotes names or values of thousands of letters loses its middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class ArgumentError(SdkitError, ValueError):
    """A parameter's value, type or shape cannot be used."""


class SourceError(SdkitError):
    """A model source cannot be found, read, or does not hold what was asked of it."""


class ImageError(SdkitError):
    """An image cannot be read, or cannot be used as one."""


class LatentError(SdkitError):
    """A latent file cannot be read, or belongs to another VAE."""


class DataError(SdkitError):
    """A data set cannot be found or read, or holds nothing to train on."""


class CacheError(SdkitError):
    """A latent cache is damaged, or was made by other networks or settings than those asked for."""


class TrainingError(SdkitError):
    """A training run cannot start, go on, or resume."""
