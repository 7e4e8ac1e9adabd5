"""Errors that a user can cause. Each message says in one sentence what was wrong, with what, and what to do."""

from __future__ import annotations

from sdkit.messages import shortened


class SdkitError(Exception):
    """Base class of every error that sdkit raises on purpose.

    The command line prints the message without a traceback, and exits with code 2. The middle of a message
    of over 1,000 characters is cut out, since such a message quotes a very long name or value.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(message))


class ArgumentError(SdkitError, ValueError):
    """A parameter's value, type, or shape cannot be used."""


class SourceError(SdkitError):
    """A model source cannot be found or read, or lacks the part that was asked for."""


class ImageError(SdkitError):
    """An image cannot be read, or cannot be used as one."""


class LatentError(SdkitError):
    """A latent file cannot be read, or belongs to another VAE."""


class DataError(SdkitError):
    """A data set cannot be found or read, or holds nothing to train on."""


class CacheError(SdkitError):
    """A latent cache is damaged, or was made with other networks or settings than those asked for."""


class TrainingError(SdkitError):
    """A training run cannot start, continue, or resume."""
