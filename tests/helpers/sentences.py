"""The form of every error message that a user can cause."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

import sdkit


def one_sentence(run: Callable[[], object], kind: type[sdkit.SdkitError], *fragments: str) -> None:
    """Check that `run` raises an error of this kind, and that its message is one sentence with these fragments."""
    with pytest.raises(sdkit.SdkitError) as caught:
        run()
    message = str(caught.value)
    assert isinstance(caught.value, kind), repr(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert not re.search(r"[.!?] [A-Z]", message), message
