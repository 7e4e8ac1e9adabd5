"""The `datasets` library: imported on first use, silenced, and with its errors raised as `DataError`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from sdkit.errors import DataError
from sdkit.messages import clean, quiet
from sdkit.stops import stop_in


def datasets_library() -> Any:
    """Import the library, which takes over a second. Raises DataError if it is not installed."""
    try:
        return import_module("datasets")
    except ImportError as error:
        raise DataError("reading data sets needs the datasets library; install 'sdkit[train]'.") from error


def load(source: str, streaming: bool, split: str = "train", **options: Any) -> Any:
    """Call `datasets.load_dataset` with `options`. Errors name the data set `source`."""
    datasets = datasets_library()
    with raised_as_data_error(source), quiet("datasets"):
        return datasets.load_dataset(split=split, streaming=streaming, **options)


@contextlib.contextmanager
def raised_as_data_error(source: str) -> Iterator[None]:
    """Raise any exception of the `datasets` library as a `DataError` of one sentence that names the data set."""
    try:
        yield
    except Exception as error:  # the library's builders raise nearly anything
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        problem = re.split(r"\n|[.!?] (?=[A-Z])", str(cause).strip())[0].rstrip(".!") or type(cause).__name__
        problem = f"cannot open the data set {clean(source)!r}: {clean(problem)}"
        raise stop_in(error) or DataError(f"{problem}; check the name and the files.") from error
