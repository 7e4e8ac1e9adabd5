"""`DrawingSettings` is the one list of the options of an image: the call, its types, and `Generation` agree with it."""

from __future__ import annotations

import inspect
from dataclasses import asdict, fields
from typing import get_type_hints

import pytest

import sdkit
from sdkit.fields import field_docs
from sdkit.pipelines.generation import Generation
from sdkit.pipelines.settings import DrawingKeywords, DrawingSettings
from sdkit.pipelines.text_to_image import CallKeywords

CALL = sdkit.StableDiffusion.__call__


def test_options_are_keywords_of_the_call_with_its_defaults() -> None:
    parameters = inspect.signature(CALL).parameters
    options = Generation().options()
    assert {name: parameters[name].default for name in options} == options | {"negative_prompt": None}
    assert set(options) - {"negative_prompt"} == set(asdict(DrawingSettings()))


def test_the_types_of_the_keywords_are_those_of_the_settings() -> None:
    assert get_type_hints(DrawingKeywords) == get_type_hints(DrawingSettings)
    named = set(inspect.signature(CALL).parameters) - {"self", "prompt", "negative_prompt", "output_type"}
    assert named == set(CallKeywords.__annotations__)


def test_help_of_the_call_describes_each_argument_once() -> None:
    arguments = (CALL.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\nReturns:\n")[0]
    for name in inspect.signature(CALL).parameters:
        assert arguments.count(f"\n    {name}: ") + arguments.startswith(f"    {name}: ") == (name != "self"), name
    for field in fields(DrawingSettings):
        assert field_docs(DrawingSettings)[field.name] in " ".join(arguments.split())
    assert set(field_docs(Generation)) == {field.name for field in fields(Generation)}


def test_an_unknown_keyword_is_an_error(sd: sdkit.StableDiffusion) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'stepz'"):
        sd("a cat", stepz=3)  # type: ignore[call-overload]
