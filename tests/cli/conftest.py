"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from sdkit.cli import main
from tests.helpers.command_line import Ran


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return call
