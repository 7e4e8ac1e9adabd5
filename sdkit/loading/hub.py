"""The Hugging Face Hub: snapshots of repositories, downloaded or found in the cache, and its errors in one sentence."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sdkit.errors import SourceError
from sdkit.loading.tensors import SUFFIXES
from sdkit.messages import clean, first_line, quiet
from sdkit.stops import stop_in

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TIMEOUT = 10  # seconds to wait for a list of files


def is_hub_id(source: str | os.PathLike[str]) -> bool:
    """Return whether `source` is a string of the form of a Hub id (org/name), and not the name of a weight file."""
    return isinstance(source, str) and HUB_ID.fullmatch(source) is not None and not source.endswith(SUFFIXES)


def list_files(repository: str, revision: str | None) -> list[str] | None:
    """Return the names of the files in a repository; None if the Hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        found = HfApi().repo_info(repository, revision=revision, timeout=TIMEOUT)
    except Exception as error:  # huggingface_hub passes on the errors of several HTTP libraries
        if stop := stop_in(error):
            raise stop from error
        return None
    return [file.rfilename for file in getattr(found, "siblings", None) or ()]


def fetch(repository: str, revision: str | None, files: list[str]) -> Path:
    """Return the folder of a repository's snapshot, after downloading those of `files` that the repository has.

    Without a connection, return the cached snapshot, which may lack some of `files`.

    Raises:
        SourceError: The repository does not exist, is gated, or is not cached while the Hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    label = clean(repr(repository))
    at = f"{label} (revision {revision!r})" if revision else label
    try:
        with quiet("huggingface_hub"):
            try:
                return Path(snapshot_download(repository, revision=revision, allow_patterns=files))
            except errors.OfflineModeIsEnabled:  # raised by huggingface_hub 1.x for a commit, even if cached
                return Path(
                    snapshot_download(repository, revision=revision, allow_patterns=files, local_files_only=True)
                )
    except errors.LocalEntryNotFoundError as error:
        if partial := getattr(error, "snapshot_path", None):
            return Path(partial)  # may suffice; if not, the caller raises an error that names what is missing
        raise SourceError(
            f"{at} is not in the cache, and the Hub cannot be reached; load it once with a connection, or correct the "
            "path if a folder is meant, for there is none of that name."
        ) from error
    except Exception as error:  # huggingface_hub passes on the errors of several HTTP libraries
        raise stop_in(error) or SourceError(_problem(repository, revision, at, error)) from error


def _problem(repository: str, revision: str | None, at: str, error: Exception) -> str:
    """Return the sentence for an error of huggingface_hub; `at` names the repository and the revision."""
    from huggingface_hub import errors

    label = clean(repr(repository))
    if isinstance(error, errors.HFValidationError):
        return f"{label} is neither a path that exists nor a Hub id (org/name); check its spelling."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{label} has no revision {revision!r} on the Hub; give a branch, tag or commit."
    if isinstance(error, errors.GatedRepoError):
        page = f"https://huggingface.co/{repository}"
        return f"{label} is gated; accept its terms at {page} and log in with `hf auth login`."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{label} is not on the Hub, or is private; check its spelling, log in with `hf auth login`, or "
            "correct the path if a folder is meant, for there is none of that name."
        )
    return f"{at} cannot be loaded from the Hub ({first_line(error)}); try again."
