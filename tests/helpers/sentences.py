"""What every error that a user can cause has to be."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import sdkit


def one_sentence(run: Callable[[], object], kind: type[sdkit.SdkitError], *fragments: str) -> None:
    """That `run` ends with an error of this kind, told in one sentence that holds the fragments."""
    with pytest.raises(sdkit.SdkitError) as caught:
        run()
    message = str(caught.value)
    assert isinstance(caught.value, kind), repr(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert not re.search(r"[.!?] [A-Z]", message), message
