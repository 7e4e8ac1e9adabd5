"""Tests of the table of parts, against the libraries that load them."""

from __future__ import annotations

import inspect
import json

import pytest

from sdkit.loading.configs import CLASSES, CONDITION, UPSCALE
from sdkit.loading.parts import CLASSIFIER, CONTROLNET, PARTS, VAE, Part
from sdkit.loading.single_file import ASSETS


def classes(part: Part) -> list[type]:
    return [part.load_class(name) for name, path in part.classes.items() if path]


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_classes_are_those_that_configs_name(part: Part) -> None:
    for name, path in part.classes.items():
        if path:
            assert part.load_class(name).__name__ == path.split(":")[1]
    assert {*part.trainable} | {*part.telling.values()} <= part.classes.keys()


@pytest.mark.parametrize("part", [part for part in PARTS.values() if part.classes], ids=lambda part: part.name)
def test_checked_and_shown_keys_are_parameters_of_the_classes(part: Part) -> None:
    parameters = {
        name: parameter.default
        for cls in classes(part)
        for name, parameter in inspect.signature(getattr(cls, "config_class", cls)).parameters.items()
    }
    ours = {CONDITION, UPSCALE, CLASSES}
    assert {*part.checks, *part.shown} - ours <= parameters.keys()


def test_a_class_that_is_unknown_or_has_no_weights_loads_as_the_first() -> None:
    assert VAE.load_class("AutoencoderMystery").__name__ == "AutoencoderKL"
    assert VAE.load_class("PixelIdentity").__name__ == "AutoencoderKL"


@pytest.mark.parametrize("family", ["emoji", "sd1", "sd2", "sd2-v"])
def test_files_of_the_models_that_ship(family: str) -> None:
    absent = (CLASSIFIER, *([CONTROLNET] if family == "emoji" else []))
    shipped = [part for part in PARTS.values() if part not in absent]
    for part in shipped:
        config = json.loads((ASSETS / family / part.config_path).read_text())
        assert config.keys() & part.telling.keys() or not part.telling
        for key, value in config.items():
            if key in part.checks:
                wanted, fits = part.checks[key]
                assert fits(value), f"{key} {value} is not {wanted}"
