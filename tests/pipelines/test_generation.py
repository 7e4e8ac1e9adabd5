"""`Generation` and the pipeline's call agree on the options of an image."""

from __future__ import annotations

import inspect
from dataclasses import fields

import sdkit
from sdkit.pipelines.generation import LOADING, Generation


def test_options_are_keywords_of_the_call_with_its_defaults() -> None:
    parameters = inspect.signature(sdkit.StableDiffusion.__call__).parameters
    options = Generation().options()
    assert {name: parameters[name].default for name in options} == options | {"negative_prompt": None}
    assert {*options, "prompt", "seed", *LOADING} == {field.name for field in fields(Generation)}
