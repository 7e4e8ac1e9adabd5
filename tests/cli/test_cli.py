"""The commands as a user runs them. Most run in this process through `main`; process behaviour is tested in
subprocesses.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdkit
from sdkit import images
from sdkit.arguments import PREDICTIONS
from sdkit.cli import main
from sdkit.cli.commands import _parser
from sdkit.cli.console import Stopped, signals_raised
from sdkit.cli.training import STAGES, _settings
from sdkit.data import latent_file as latents
from sdkit.data.transform import CROPS
from sdkit.diffusion.samplers import SAMPLERS
from sdkit.diffusion.schedule import ALL_SPACINGS
from sdkit.engines.device import DTYPES
from sdkit.pipelines.generation import Generation
from tests.helpers import forks, toy
from tests.helpers.command_line import Ran

QUICK = ("--steps", "2", "--dtype", "fp32", "--device", "cpu")
ROOT = Path(__file__).parents[2]


def opened(path: str | Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*arguments: object) -> Ran:
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, astronaut: Image.Image) -> Path:
    """Make the current folder, with good and bad inputs of every kind."""
    monkeypatch.chdir(tmp_path)
    astronaut.resize((40, 24)).save("good.png")
    astronaut.resize((16, 16)).save("photo.jpg")
    Path("torn.png").write_bytes(Path("good.png").read_bytes()[:300])
    Path("text.png").write_text("no image", encoding="utf-8")
    Path("empty").mkdir()
    Path("file").write_text("a cat", encoding="utf-8")
    Path("comments.txt").write_text("# a\n\n  \n", encoding="utf-8")
    Path("binary.txt").write_bytes(bytes(range(128, 256)))
    fields = {
        "vae": "f" * 16,
        "vae_name": "other",
        "scale": 1.0,
        "sdkit": "0",
        "dtype": "float32",
        "height": 16,
        "width": 16,
    }
    latents.save(latents.Latent(z=torch.zeros(4, 2, 2), **fields), "other.safetensors")
    latents.save(latents.Latent(z=torch.zeros(8, 2, 2), **fields), "wide.safetensors")
    Path("torn.safetensors").write_bytes(Path("other.safetensors").read_bytes()[:-9])
    Path("weights.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    recipes = {
        "seed": {"seed": "1; rm -rf /"},
        "steps": {"steps": "9" * 5000},
        "scale": {"scale": "much"},
        "interval": {"interval": "1"},
        "weighting": {"weighting": "maybe"},
        "sampler": {"sampler": "../../x"},
        "model": {"model": "../no/such/model"},
    }
    for name, text in recipes.items():
        images.save(Image.new("RGB", (8, 8)), f"hostile-{name}.png", Generation(prompt="a").text() | text)
    return tmp_path


def test_version_and_help(run: Callable[..., Ran]) -> None:
    assert run("--version") == Ran(0, f"sdkit {sdkit.__version__}\n", "")
    code, out, err = run("--help")
    listed = re.findall(r"^    ([a-z]+)\b", out, flags=re.MULTILINE)
    assert (
        " ".join(listed) == "generate encode decode reconstruct info demo data cache train plot convert lora evaluate"
    )
    for command in ([], *([name] for name in listed), ["data", "check"], ["train", "vae"], ["train", "unet"]):
        code, out, err = run(*command, "--help")
        assert (code, err) == (0, "")
        assert out.startswith(f"usage: {' '.join(['sdkit', *command])} ")


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and, recursively, the parsers of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


COMMANDS = {parser.prog: parser for parser in parsers(_parser())}


def test_the_choices_in_the_help_are_all_there_are() -> None:
    options = {action.dest: action for action in COMMANDS["sdkit generate"]._actions}
    found_out = {name for name in Generation.__dataclass_fields__ if name.endswith("_sha256")}  # no options
    assert set(Generation.__dataclass_fields__) - {"prompt", *found_out} <= set(options)
    crop = next(action for action in COMMANDS["sdkit cache"]._actions if action.dest == "crop")
    for option, known in (
        (options["sampler"], SAMPLERS),
        (options["spacing"], ALL_SPACINGS),
        (options["prediction_type"], set(PREDICTIONS.values())),
        (options["dtype"], {"auto", *DTYPES} - {"float32", "bfloat16", "float16"}),  # PNGs may also hold these aliases
        (crop, CROPS),
    ):
        shown = str(option.metavar).strip("{}").split(",")
        quoted = re.findall(r'"([^"]+)"', str(option.help))  # a long list is in the help's sentence
        assert set(quoted if shown == ["NAME"] else shown) == set(known)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_example_in_a_help_is_understood(command: str) -> None:
    """The parser of each command must accept its own examples."""
    examples = re.findall(r"^  (\S.*)", str(COMMANDS[command].epilog), flags=re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example.removeprefix("accelerate launch -m "))
        assert " ".join(words).startswith(command)
        args = _parser().parse_args(words[1:])
        if command.startswith("sdkit train ") and not args.config:
            assert _settings(STAGES[words[2]].settings, args).out_dir == args.out_dir


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_terminal_and_says_each_default_in_words(
    command: str, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = COMMANDS[command].format_help()
    assert max(map(len, text.splitlines())) < columns
    assert not re.search(r"\(default:\s*(none)?\s*\)", text, flags=re.IGNORECASE)
    for option in COMMANDS[command]._actions:
        assert option.help or isinstance(option, argparse._SubParsersAction)


def test_an_option_may_be_given_to_each_parse_of_a_parser() -> None:
    parser = _parser()
    for _ in range(2):
        assert parser.parse_args(["generate", "a", "--lora", "x", "--lora", "y", "--steps", "3"]).lora == ["x", "y"]


def test_generate_writes_pngs_that_say_how_they_were_made(run: Callable[..., Ran], work: Path) -> None:
    arguments = ("a cat", "red apple", "--count", 2, "--seed", 5, "--scale", "4.5", "--sampler", "dpm++2m", *QUICK)
    code, out, err = run("generate", *arguments, "--negative-prompt", "blue", "--grid")
    assert (code, err) == (0, "")
    paths = [Path(line) for line in out.splitlines()]
    assert [path.as_posix() for path in paths] == [
        "outputs/0001-a-cat-5.png",
        "outputs/0002-a-cat-6.png",
        "outputs/0003-red-apple-7.png",
        "outputs/0004-red-apple-8.png",
        "outputs/0005-grid.png",
    ]
    text = opened(paths[3]).text  # type: ignore[attr-defined]
    expected = {
        "prompt": "red apple",
        "negative_prompt": "blue",
        "seed": "8",
        "sampler": "dpm++2m",
        "num_inference_steps": "2",
    }
    expected |= {
        "guidance_scale": "4.5",
        "model": "emoji",
        "sdkit": sdkit.__version__,
        "height": "128",
        "dtype": "float32",
    }
    assert expected.items() <= text.items()
    assert opened(paths[4]).width > 2 * 128


def test_generate_from_makes_the_same_image_again(run: Callable[..., Ran], work: Path) -> None:
    run("generate", "a ghost on a purple background", "--seed", 3, "--eta", "0.5", *QUICK)
    (made,) = Path("outputs").iterdir()
    assert run("generate", "--from", made, "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == made.read_bytes()
    assert run("generate", "--from", made, "--seed", 4, "-o", "other.png").code == 0
    again, first = (opened(path).text for path in ("other.png", made))  # type: ignore[attr-defined]
    assert again == first | {"seed": "4", "parameters": first["parameters"].replace("Seed: 3", "Seed: 4")}
    assert not np.array_equal(np.asarray(opened("other.png")), np.asarray(opened(made)))


def test_generate_from_an_image_and_into_a_mask(run: Callable[..., Ran], work: Path) -> None:
    run("generate", "a red apple", *QUICK, "-o", "apple.png")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (32, 40, 96, 90))
    mask.save("mask.png")
    options = ("--image", "apple.png", "--mask", "mask.png", "--mask-blur", "2", "--strength", "0.7", "--steps", "3")
    assert run("generate", "a cat", *options, "-o", "cat.png") == Ran(0, "cat.png\n", "")
    kept = (np.asarray(opened("cat.png")) == np.asarray(opened("apple.png"))).all(-1)
    assert kept[np.asarray(mask) == 0].all()
    assert kept[np.asarray(mask) > 0].mean() < 0.5
    text = opened("cat.png").text  # type: ignore[attr-defined]
    for name, path in (("image", work / "apple.png"), ("mask_image", work / "mask.png")):
        assert text[name] == str(path)
        assert text[f"{name}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "Denoising strength: 0.7, Mask blur: 2.0" in text["parameters"]
    assert run("generate", "--from", "cat.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("cat.png").read_bytes()
    assert run("generate", "a cat", "--image", "apple.png", "--strength", "0.5", *QUICK, "--count", 2).code == 0


def test_inputs_are_read_and_hashed_once(run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdkit.pipelines import generation

    done: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *rest: Any) -> Any:
            done.append(f"{function.__name__} {Path(path).name}")
            return function(path, *rest)

        return call

    monkeypatch.setattr(sdkit.images, "read", noted(sdkit.images.read))
    monkeypatch.setattr(generation, "sha256", noted(generation.sha256))
    Image.new("L", opened("good.png").size, 255).save("mask.png")
    assert run("generate", "a", "--image", "good.png", "--mask", "mask.png", "--steps", 1, "-o", "a.png").code == 0
    assert sorted(done) == ["read good.png", "read mask.png", "sha256 good.png", "sha256 mask.png"]


def test_an_input_that_has_changed_is_reported(run: Callable[..., Ran], work: Path) -> None:
    assert run("generate", "a cat", "--image", "good.png", "--strength", "1", "--steps", 1, "-o", "cat.png").code == 0
    Image.new("RGB", (40, 24), "red").save("good.png")
    code, out, err = run("generate", "--from", "cat.png", "-o", "again.png")
    assert (code, out) == (2, "")
    assert "good.png has changed since it was drawn from; restore it, or give it anew as image" in err
    assert run("generate", "--from", "cat.png", "--image", "good.png", "-o", "again.png").code == 0
    Path("good.png").unlink()
    assert "good.png" in run("generate", "--from", "cat.png", "-o", "again.png").err


def test_an_enlarged_region_is_drawn_again(run: Callable[..., Ran], work: Path, astronaut: Image.Image) -> None:
    astronaut.save("photo.png")
    mask = Image.new("L", astronaut.size)
    mask.paste(255, (100, 40, 140, 90))
    mask.save("mask.png")
    options = ("--image", "photo.png", "--mask", "mask.png", "--only-masked", 8, "--steps", 1)
    assert run("generate", "a cat", *options, "-o", "cat.png").code == 0
    assert opened("cat.png").size == astronaut.size
    assert run("generate", "--from", "cat.png", "-o", "again.png").code == 0
    assert Path("again.png").read_bytes() == Path("cat.png").read_bytes()


def test_prompts_come_from_files_and_from_stdin(
    run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("prompts.txt").write_text("# two\na cat\n\na dog\n", encoding="utf-8")
    assert len(run("generate", "a bird", "--prompts", "prompts.txt", *QUICK).out.splitlines()) == 3
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("naïve\n".encode()), encoding="ascii"))
    assert run("generate", "--prompts", "-", *QUICK).out == f"outputs{os.sep}0004-naïve-0.png\n"


def test_photos_are_encoded_and_decoded(run: Callable[..., Ran], work: Path) -> None:
    assert run("encode", "good.png", "photo.jpg", "--mean") == Ran(
        0, f"latents{os.sep}good.safetensors\nlatents{os.sep}photo.safetensors\n", ""
    )
    assert run("decode", "latents").code == 0
    assert opened("decoded/good.png").size == (40, 24)
    assert run("decode", "other.safetensors", "--force").code == 0


def test_reconstruct_prints_a_table_or_json(run: Callable[..., Ran], work: Path) -> None:
    code, out, err = run("reconstruct", "good.png", "photo.jpg", "torn.png")
    assert code == 1
    assert [line.split()[0] for line in out.splitlines()] == ["image", "good.png", "photo.jpg", "mean"]
    assert err.startswith("sdkit: cannot read torn.png")
    code, out, err = run("reconstruct", "good.png", "photo.jpg", "torn.png", "--json")
    found = json.loads(out)
    assert (code, len(err.splitlines())) == (1, 1)
    assert [one["source"] for one in found["images"]] == ["good.png", "photo.jpg"]
    assert found["mean"]["psnr"] == pytest.approx(np.mean([one["psnr"] for one in found["images"]]))
    assert found["failed"][0]["source"] == "torn.png"


def test_json_has_no_infinity(run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdkit.evaluation.similarity.psnr", lambda x, y: torch.tensor([torch.inf]))
    found = json.loads(run("reconstruct", "good.png", "--json").out, parse_constant=pytest.fail)
    assert found["images"][0]["psnr"] is found["mean"]["psnr"] is None


def test_info_as_table_and_as_json(run: Callable[..., Ran]) -> None:
    code, out, err = run("info", "emoji")
    assert (code, err) == (0, "")
    assert "UNet2DConditionModel" in out
    parts = {part["part"]: part for part in json.loads(run("info", "emoji", "--json").out)["components"]}
    assert parts["scheduler"]["config"]["prediction_type"] == "v_prediction"


def test_demo_shows_a_grid_and_photos(run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skimage.data.astronaut", lambda: np.zeros((16, 16, 3), np.uint8))
    call = sdkit.StableDiffusion.__call__
    monkeypatch.setattr(sdkit.StableDiffusion, "__call__", functools.partialmethod(call, num_inference_steps=2))
    code, out, err = run("demo", "good.png")
    assert (code, err) == (0, "")
    assert "photos given" in out
    assert "good-reconstruction.png" in out
    assert opened("demo/generated.png").width > 4 * 128
    assert opened("demo/generated.png").height > 5 * 128
    monkeypatch.setattr("sdkit.cli.demo._drawn", lambda _: (["red"], [Image.new("RGB", (64, 64), "red")]))
    monkeypatch.setattr("sdkit.cli.demo.PHOTOS", ("astronaut",))
    assert "photos of scikit-image" in run("demo").out
    monkeypatch.setitem(sys.modules, "skimage", None)
    assert "generated images" in run("demo").out


BAD = {
    "no command": ((), 2, "COMMAND"),
    "unknown command": (("paint", "a cat"), 2, "invalid choice: 'paint'"),
    "unknown option": (("info", "emoji", "--color"), 2, "--color"),
    "generate: no prompt": (("generate",), 2, "there is no prompt"),
    "generate: prompt file missing": (("generate", "--prompts", "no.txt"), 2, "no such file"),
    "generate: prompt file a folder": (("generate", "--prompts", "empty"), 2, "is a directory"),
    "generate: prompt file without prompts": (
        ("generate", "--prompts", "comments.txt"),
        2,
        "no prompt in comments.txt",
    ),
    "generate: prompt file binary": (("generate", "--prompts", "binary.txt"), 2, "not UTF-8"),
    "generate: prompt not UTF-8": (("generate", "caf\udce9", *QUICK), 2, "prompt"),
    "generate: from nothing": (("generate", "--from", "no.png"), 2, "no.png"),
    "generate: from a JPEG": (("generate", "--from", "photo.jpg"), 2, "does not say how it was made"),
    "generate: from a PNG without text": (("generate", "--from", "good.png"), 2, "does not say how it was made"),
    "generate: from a torn PNG": (("generate", "--from", "torn.png"), 2, "torn.png"),
    "generate: from no image": (("generate", "--from", "text.png"), 2, "is not an image"),
    "generate: hostile seed": (("generate", "--from", "hostile-seed.png"), 2, "seed = '1; rm -rf /'"),
    "generate: hostile steps": (("generate", "--from", "hostile-steps.png"), 2, "steps = '9999"),
    "generate: hostile scale": (("generate", "--from", "hostile-scale.png"), 2, "scale = 'much'"),
    "generate: hostile interval": (("generate", "--from", "hostile-interval.png"), 2, "interval = '1'"),
    "generate: hostile weighting": (("generate", "--from", "hostile-weighting.png"), 2, "weighting = 'maybe'"),
    "generate: hostile sampler": (("generate", "--from", "hostile-sampler.png"), 2, "sampler '../../x'"),
    "generate: hostile model": (("generate", "--from", "hostile-model.png"), 2, "../no/such/model"),
    "generate: image missing": (("generate", "a", "--image", "no.png"), 2, "no.png"),
    "generate: image torn": (("generate", "a", "--image", "torn.png"), 2, "torn.png"),
    "generate: image no image": (("generate", "a", "--image", "text.png"), 2, "text.png is not an image"),
    "generate: strength without an image": (("generate", "a", "--strength", "0.5"), 2, "belongs to an image"),
    "generate: strength 0": (("generate", "a", "--image", "good.png", "--strength", "0"), 2, "must be above 0"),
    "generate: strength 1.5": (("generate", "a", "--image", "good.png", "--strength", "1.5"), 2, "from 0 to 1"),
    "generate: mask without an image": (("generate", "a", "--mask", "good.png"), 2, "mask_image belongs to an image"),
    "generate: mask of another size": (
        ("generate", "a", "--image", "good.png", "--mask", "photo.jpg"),
        2,
        "16 x 16 pixels, the image 40 x 24",
    ),
    "generate: mask missing": (("generate", "a", "--image", "good.png", "--mask", "no.png"), 2, "no.png"),
    "generate: blur without a mask": (("generate", "a", "--mask-blur", "3"), 2, "mask_blur belongs to a mask"),
    "generate: padding -1": (
        ("generate", "a", "--image", "good.png", "--mask", "good.png", "--only-masked", "-1"),
        2,
        "must be a whole number of at least 0",
    ),
    "generate: unknown sampler": (("generate", "a", "--sampler", "plms"), 2, "sampler 'plms' is not one of"),
    "generate: unknown spacing": (("generate", "a", "--spacing", "log"), 2, "spacing 'log' is not one of"),
    "generate: steps 0": (("generate", "a", "--steps", "0"), 2, "of at least 1, not 0"),
    "generate: steps 5000": (("generate", "a", "--steps", "5000"), 2, "from 1 to 1000, not 5000"),
    "generate: steps abc": (("generate", "a", "--steps", "abc"), 2, "invalid int value: 'abc'"),
    "generate: steps 2.5": (("generate", "a", "--steps", "2.5"), 2, "invalid int value: '2.5'"),
    "generate: height negative": (("generate", "a", "--height", "-64"), 2, "must be a whole number from 8 to 16384"),
    "generate: height 0": (("generate", "a", "--height", "0"), 2, "must be a whole number from 8 to 16384"),
    "generate: width 7": (("generate", "a", "--width", "7"), 2, "must be a whole number from 8 to 16384"),
    "generate: width beyond reason": (
        ("generate", "a", "--width", "999999999999"),
        2,
        "must be a whole number from 8 to 16384",
    ),
    "generate: scale nan": (("generate", "a", "--scale", "nan", *QUICK), 2, "guidance scale"),
    "generate: scale inf": (("generate", "a", "--scale", "inf", *QUICK), 2, "guidance scale"),
    "generate: eta 2": (("generate", "a", "--eta", "2"), 2, "eta must be a number from 0 to 1"),
    "generate: eta nan": (("generate", "a", "--eta", "nan"), 2, "eta must be a number from 0 to 1"),
    "generate: eta of another sampler": (("generate", "a", "--eta", "1", "--sampler", "ddpm"), 2, "belongs to sampler"),
    "generate: rescale 2": (("generate", "a", "--rescale", "2", *QUICK), 2, "rescale"),
    "generate: rescale nan": (("generate", "a", "--rescale", "nan", *QUICK), 2, "rescale"),
    "generate: interval reversed": (("generate", "a", "--interval", "5", "1", *QUICK), 2, "guidance interval"),
    "generate: interval nan": (("generate", "a", "--interval", "nan", "1", *QUICK), 2, "guidance interval"),
    "generate: interval of one": (("generate", "a", "--interval", "5"), 2, "expected 2 arguments"),
    "generate: seed -1": (("generate", "a", "--seed", "-1"), 2, "seed must be a whole number from 0"),
    "generate: seed 2^63": (("generate", "a", "--seed", 2**63), 2, "seed must be a whole number from 0"),
    "generate: second seed 2^63": (
        ("generate", "a", "--seed", 2**63 - 1, "--count", "2"),
        2,
        "seed must be a whole number from 0",
    ),
    "generate: count 0": (("generate", "a", "--count", "0"), 2, "count must be a whole number of at least 1"),
    "generate: batch-size 0": (
        ("generate", "a", "--batch-size", "0"),
        2,
        "batch_size must be a whole number of at least 1",
    ),
    "generate: clip-skip 99": (("generate", "a", "--clip-skip", "99", *QUICK), 2, "clip_skip"),
    "generate: given twice": (("generate", "a", "--steps", "2", "--steps", "2"), 2, "--steps is given twice: give it"),
    "generate: given twice, in two ways": (("generate", "a", "-o", "x", "--out=y"), 2, "--out is given twice"),
    "generate: yes and no": (
        ("generate", "a", "--weighting", "--no-weighting"),
        2,
        "--weighting/--no-weighting is given twice",
    ),
    "generate: a switch twice": (("generate", "a", "--grid", "--grid"), 2, "--grid is given twice"),
    "generate: two values twice": (
        ("generate", "a", "--interval", "1", "2", "--interval", "3", "4"),
        2,
        "--interval is given twice",
    ),
    "generate: negative prompt without guidance": (
        ("generate", "a", "--scale", "1", "--negative-prompt", "b"),
        2,
        "--negative-prompt belongs to guidance",
    ),
    "generate: interval without guidance": (
        ("generate", "a", "--scale", "1", "--interval", "0", "2"),
        2,
        "--interval belongs to guidance",
    ),
    "generate: unknown model": (("generate", "a", "-m", "no-such-model"), 2, "no-such-model"),
    "generate: unknown dtype": (("generate", "a", "--dtype", "int8"), 2, "dtype 'int8'"),
    "generate: unknown device": (("generate", "a", "--device", "toaster"), 2, "device 'toaster'"),
    "generate: unknown prediction type": (("generate", "a", "--prediction-type", "x"), 2, "prediction_type 'x'"),
    "generate: out is a file": (("generate", "a", "--out", "file", *QUICK), 2, "cannot write into file"),
    "generate: out below a file": (("generate", "a", "--out", "file/x", *QUICK), 2, "cannot write into file"),
    "generate: out cannot be made": (("generate", "a", "--out", "/proc/outputs", *QUICK), 2, "cannot write into /proc"),
    "generate: two images into one": (("generate", "a", "b", "-o", "x.png", *QUICK), 2, "cannot hold 2"),
    "generate: out is a JPEG": (("generate", "a", "-o", "x.jpg", *QUICK), 2, "give a folder, or a .png"),
    "encode: nothing given": (("encode",), 2, "required"),
    "encode: missing file": (("encode", "no.png"), 2, "cannot read no.png: no such file"),
    "encode: folder without images": (("encode", "empty"), 2, "in empty"),
    "encode: no image": (("encode", "good.png", "text.png"), 1, "text.png is not an image"),
    "encode: torn image": (("encode", "torn.png"), 1, "cannot read torn.png"),
    "encode: name not UTF-8": (("encode", "caf\udce9.png"), 2, "caf?.png"),
    "encode: name of two lines": (("encode", "a\nb.png"), 2, "a?b.png"),
    "encode: name empty": (("encode", ""), 2, "empty"),
    "encode: tile 5": (("encode", "good.png", "--tile", "5"), 2, "must be a whole number of at least 16"),
    "encode: tile 64": (("encode", "good.png", "--tile", "64"), 2, "must be a whole number of at least 128"),
    "encode: batch-size 0": (
        ("encode", "good.png", "--batch-size", "0"),
        2,
        "batch_size must be a whole number of at least 1",
    ),
    "encode: seed -1": (("encode", "good.png", "--seed", "-1"), 2, "seed must be a whole number from 0"),
    "encode: seed of a mean": (("encode", "good.png", "--mean", "--seed", "1"), 2, "--seed belongs to a sample"),
    "encode: given twice": (("encode", "good.png", "-m", "emoji", "-m", "emoji"), 2, "--model is given twice"),
    "encode: out is a file": (("encode", "good.png", "--out", "file"), 2, "cannot write into file"),
    "encode: unknown dtype": (("encode", "good.png", "--dtype", "int8"), 2, "dtype 'int8'"),
    "encode: unknown device": (("encode", "good.png", "--device", "toaster"), 2, "device 'toaster'"),
    "encode: no model": (("encode", "good.png", "-m", "empty"), 2, "'empty' has no"),
    "decode: missing file": (("decode", "no.safetensors"), 2, "no such file"),
    "decode: folder without latents": (("decode", "empty"), 2, "found no .safetensors file"),
    "decode: torn latent": (("decode", "torn.safetensors"), 1, "torn.safetensors"),
    "decode: no latent": (("decode", "weights.safetensors"), 1, "not a latent file"),
    "decode: an image": (("decode", "good.png"), 1, "good.png"),
    "decode: another VAE's": (("decode", "other.safetensors"), 1, "made by another VAE"),
    "decode: another shape's": (("decode", "wide.safetensors", "--force"), 1, "8 channels"),
    "decode: tile -1": (
        ("decode", "other.safetensors", "--force", "--tile", "-1"),
        2,
        "must be a whole number of at least 16",
    ),
    "decode: out is a file": (("decode", "other.safetensors", "--force", "-o", "file"), 2, "cannot write into file"),
    "reconstruct: missing file": (("reconstruct", "no.png"), 2, "no such file"),
    "reconstruct: torn image": (("reconstruct", "torn.png", "--json"), 1, "cannot read torn.png"),
    "reconstruct: batch-size -1": (
        ("reconstruct", "good.png", "--batch-size", "-1"),
        2,
        "batch_size must be a whole number of at least 1",
    ),
    "info: nothing there": (("info", "./nowhere"), 2, "nowhere"),
    "info: an image": (("info", "good.png"), 2, "good.png"),
    "info: an empty folder": (("info", "empty"), 2, "'empty' has no"),
    "info: a revision of a folder": (("info", "emoji", "--revision", "main"), 2, "revision"),
    "demo: missing photo": (("demo", "no.png"), 2, "no such file"),
    "demo: unknown dtype": (("demo", "--dtype", "int8"), 2, "dtype 'int8'"),
}


@pytest.mark.parametrize(("arguments", "code", "fragment"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_told_in_one_sentence(
    run: Callable[..., Ran], work: Path, arguments: tuple[object, ...], code: int, fragment: str
) -> None:
    before = {path.name for path in work.rglob("*.png")}
    found = run(*arguments)
    assert found.code == code, found
    assert len(found.err.splitlines()) == 1, found.err
    assert found.err.startswith("sdkit: ")
    assert found.err.endswith((".\n", "?\n")), found.err
    assert fragment in found.err
    assert "Traceback" not in found.err
    if code == 2:
        assert {path.name for path in work.rglob("*.png")} == before
    assert not list(work.rglob(".sdkit-*"))


def test_good_files_are_done_beside_bad_ones(run: Callable[..., Ran], work: Path) -> None:
    code, out, err = run("encode", "text.png", "good.png", "torn.png")
    assert (code, out) == (1, f"latents{os.sep}good.safetensors\n")
    assert [line.split(":")[0] for line in err.splitlines()] == ["sdkit", "sdkit"]


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="these file systems have no names that are not UTF-8")
def test_names_that_are_not_utf8_are_taken(run: Callable[..., Ran], work: Path) -> None:
    Path(os.fsdecode(b"caf\xe9.png")).write_bytes(Path("good.png").read_bytes())
    assert run("encode", os.fsdecode(b"caf\xe9.png")) == Ran(0, "latents/caf\ufffd.safetensors\n", "")
    assert run("decode", "latents") == Ran(0, "decoded/caf\ufffd.png\n", "")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_lack_of_memory_is_told_in_one_sentence(
    run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("sdkit.networks.autoencoder.VAE.encode", fail)
    found = run("encode", "good.png")
    assert found[:2] == (2, "")
    assert found.err == "sdkit: the memory does not suffice; give a smaller --batch-size, --tile or image size.\n"


def test_a_bug_is_not_hidden(run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("sdkit.networks.autoencoder.VAE.encode", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("encode", "good.png")


# The tests' own parent may have set signals to be ignored: shells do so with SIGINT for background jobs, and nohup with
# SIGHUP.
LAUNCH = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
from sdkit.cli import main
sys.exit(main())
"""


@contextlib.contextmanager
def process(*arguments: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run the command in a subprocess, which is killed at the end of the test."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, object] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", LAUNCH, *arguments]
    with subprocess.Popen(command, env=environment, **pipes | options) as running:  # type: ignore[call-overload]
        try:
            yield running
        finally:
            running.kill()


@contextlib.contextmanager
def forked(*arguments: str, out: Path = Path("out"), err: Path = Path("err")) -> Iterator[ForkServerProcess]:
    """Run the command in a forked process, which is killed at the end of the test."""
    running = forks.start(toy.command, arguments, out=out, err=err)
    try:
        yield running
    finally:
        running.kill()
        running.join()


def wait_for_images(work: Path, n: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(work.glob("outputs/0*.png"))) < n:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_json_alone_is_on_stdout(work: Path) -> None:
    with process("reconstruct", "good.png", "torn.png", "--json", cwd=work) as running:
        out, err = running.communicate()
    assert running.returncode == 1
    assert len(json.loads(out)["images"]) == 1
    assert err.startswith(b"sdkit: cannot read torn.png")
    assert err.count(b"\n") == 1


def test_a_users_error_ends_the_process_with_2(work: Path) -> None:
    with process("generate", "a", "--steps", "0", cwd=work) as running:
        out, err = running.communicate()
    assert (running.returncode, out, err.count(b"\n")) == (2, b"", 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals to send")
@pytest.mark.parametrize(("name", "said"), [("SIGINT", ""), ("SIGTERM", " by SIGTERM"), ("SIGHUP", " by SIGHUP")])
def test_a_signal_leaves_whole_files_only(work: Path, name: str, said: str) -> None:
    number = getattr(signal, name)
    arguments = ("generate", "a red apple", "--count", "5000", "--batch-size", "1", "--steps", "1", "--dtype", "fp32")
    with forked(*arguments, "--height", "32", "--width", "32") as running:
        wait_for_images(work, 3)
        assert running.pid
        os.kill(running.pid, number)
        running.join(60)
    assert running.exitcode == 128 + number
    assert Path("err").read_text() == f"sdkit: stopped{said}; the files that were finished are whole.\n"
    made = sorted(path for path in (work / "outputs").iterdir() if path.is_file())
    assert 3 <= len(made) < 5000
    for path in made:
        assert path.suffix == ".png"
        opened(path).load()
    assert {work / line for line in Path("out").read_text().splitlines()} in (set(made), set(made[:-1]))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_handlers_are_put_back_and_those_of_others_left_alone(run: Callable[..., Ran]) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert run("info", "emoji").code == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with signals_raised():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(Stopped, match="stopped by SIGTERM"), signals_raised():
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(number, handler)


def test_it_runs_in_another_thread_too(run: Callable[..., Ran]) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "info", "emoji").result().code == 0


def test_two_processes_share_a_folder(work: Path) -> None:
    arguments = ("generate", "a", "--count", "6", "--batch-size", "1", "--steps", "1", "--dtype", "fp32", "--grid")
    with (
        forked(*arguments, "--height", "32", "--width", "32", out=Path("first")) as first,
        forked(*arguments, "--height", "32", "--width", "32", out=Path("second")) as second,
    ):
        first.join(120)
        second.join(120)
    assert (first.exitcode, second.exitcode) == (0, 0)
    told = [Path(name).read_text().splitlines() for name in ("first", "second")]
    assert len(set(told[0]) | set(told[1])) == 14
    assert {work / line for lines in told for line in lines} == set((work / "outputs").iterdir())


def test_what_is_finished_is_printed_though_an_error_ends_the_run(
    run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = images.save, []

    def full(*arguments: object, **options: object) -> None:
        calls.append(arguments)
        if len(calls) % 2 == 0:
            raise sdkit.SdkitError("the disk is full.")
        real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("sdkit.images.save", full)
    small = ("--height", "16", "--width", "16", "--count", "3", *QUICK)
    expected = "sdkit: the disk is full.\n"
    assert run("generate", "a", *small) == Ran(2, f"outputs{os.sep}0001-a-0.png\n", expected)
    code, out, err = run("reconstruct", "torn.png", "good.png", "photo.jpg")
    assert code == 2
    assert [line.split()[0] for line in out.splitlines()] == ["image", "good.png", "mean"]
    assert [line[:24] for line in err.splitlines()] == ["sdkit: cannot read torn.", "sdkit: the disk is full."]
    code, out, err = run("reconstruct", "torn.png", "good.png", "photo.jpg", "--json")
    found = json.loads(out)
    assert code == 2
    assert [one["source"] for one in found["images"]] == ["good.png"]
    assert [one["source"] for one in found["failed"]] == ["torn.png"]
    assert found["error"] == "the disk is full."


WRONG = {
    "steps": ("generate", "a", "--steps", "0"),
    "scale": ("generate", "a", "--scale", "nan"),
    "interval": ("generate", "a", "--interval", "5", "1"),
    "count": ("generate", "a", "--count", "0"),
    "prediction type": ("generate", "a", "--prediction-type", "x"),
    "batch size": ("generate", "a", "--batch-size", "0"),
    "dtype": ("generate", "a", "--dtype", "int8"),
    "device": ("generate", "a", "--device", "toaster"),
    "out": ("generate", "a", "--out", "file"),
    "two into one": ("generate", "a", "b", "--out", "x.png"),
    "encode: tile": ("encode", "good.png", "--tile", "5"),
    "encode: seed": ("encode", "good.png", "--seed", "-1"),
    "encode: device": ("encode", "good.png", "--device", "toaster"),
    "decode: batch size": ("decode", "other.safetensors", "--batch-size", "0"),
    "reconstruct: out": ("reconstruct", "good.png", "--out", "file"),
    "demo: out": ("demo", "--out", "file"),
}


@pytest.mark.parametrize("arguments", WRONG.values(), ids=WRONG.keys())
def test_wrong_flags_are_told_before_a_model_is_loaded(
    run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    for name in ("_load_sd", "_load_vae"):
        monkeypatch.setattr(f"sdkit.cli.commands.{name}", lambda *_: pytest.fail("a model was loaded"))
    before = sorted(work.rglob("*"))
    assert run(*arguments).code == 2
    assert sorted(work.rglob("*")) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.timeout(60)
def test_what_cannot_be_read_in_a_folder_is_told(run: Callable[..., Ran], work: Path) -> None:
    Path("in").mkdir()
    Path("in/good.png").write_bytes(Path("good.png").read_bytes())
    for suffix in ("png", "safetensors"):
        Path(f"in/dangling.{suffix}").symlink_to("nowhere")
        Path(f"in/loop.{suffix}").symlink_to(f"loop.{suffix}")
        os.mkfifo(f"in/pipe.{suffix}")
    code, out, err = run("encode", "in")
    assert (code, out) == (1, "latents/good.safetensors\n")
    assert [line.split(": ")[1] for line in err.splitlines()] == [
        f"cannot read in/{name}.png" for name in ("dangling", "loop", "pipe")
    ]
    code, out, err = run("decode", "in")
    assert (code, out, len(err.splitlines())) == (1, "", 3)
    assert run("generate", "--from", "in/pipe.png").err == "sdkit: cannot read in/pipe.png: it is not a regular file.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
@pytest.mark.timeout(60)
def test_prompts_may_come_from_a_pipe(run: Callable[..., Ran], work: Path) -> None:
    os.mkfifo("pipe")
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(Path("pipe").write_text, "a cat\n", encoding="utf-8")
        assert run("generate", "--prompts", "pipe", *QUICK).code == 0
        writing.result()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
def test_tables_are_clean(run: Callable[..., Ran], work: Path) -> None:
    Path("a\x1b[31m\nb.png").write_bytes(Path("good.png").read_bytes())
    out = run("reconstruct", "a\x1b[31m\nb.png", "good.png").out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 4
    assert out.splitlines()[1].startswith("a?[31m?b.png ")
    assert out.splitlines()[1].index("40 x 24") == out.splitlines()[2].index("40 x 24")


def _is_full(device: Path) -> bool:
    """Return whether writing to the device fails as on a full disk. In some containers /dev/full is an ordinary file or
    is missing.
    """
    try:
        with device.open("r+b", buffering=0) as file:
            file.write(b"\n")
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False


@pytest.mark.skipif(not _is_full(Path("/dev/full")), reason="needs a /dev/full on which each write fails")
@pytest.mark.parametrize("arguments", [("info", "emoji"), ("info", "emoji", "--json")])
def test_a_full_disk_below_stdout_is_one_sentence(work: Path, arguments: tuple[str, ...]) -> None:
    with forked(*arguments, out=Path("/dev/full")) as running:
        running.join(60)
    assert running.exitcode == 2
    assert Path("err").read_text() == "sdkit: cannot write to the standard output: no space left on device.\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_closed_streams_are_no_bug(work: Path, closed: str) -> None:
    command = f'exec "$0" -m sdkit reconstruct good.png torn.png {closed}'
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], cwd=work, env=environment, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr
    assert (work / "reconstructions" / "good-reconstruction.png").is_file()


def test_an_error_may_have_its_own_code(run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Halted(sdkit.SdkitError):
        exit_code = 143

    def fail(*_: object, **__: object) -> None:
        raise Halted("halted.")

    monkeypatch.setattr("sdkit.networks.autoencoder.VAE.encode", fail)
    monkeypatch.setattr("sdkit.cli.commands._load_vae", fail)
    assert run("encode", "good.png") == Ran(143, "", "sdkit: halted.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows tells of a closed pipe in another way")
def test_a_closed_pipe_ends_it_quietly(work: Path) -> None:
    with process("info", "emoji", "--json", cwd=work) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        err = running.stderr.read()
    assert (running.returncode, err) == (141, b"")
