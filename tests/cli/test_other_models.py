"""`sdkit generate` with priors over codes, DALL-E 2, and cascades: the images are those of the pipelines in Python, and
a PNG is drawn again from what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sdkit
from sdkit.networks.code_prior import new_prior
from sdkit.networks.prior_shape import PriorShape
from sdkit.pipelines.tokens import TokenPipeline
from tests.helpers import tiny, unclip
from tests.helpers.command_line import Ran
from tests.helpers.loaders import load_tokenizer

Run = Callable[..., Ran]
PLACE = ("--dtype", "fp32", "--device", "cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write priors of texts, of classes, of maps, and of nothing; an unCLIP, with its prior elsewhere; a model and an
    upsampler; and an image."""
    folder = tmp_path_factory.mktemp("made")
    vae = sdkit.VAE.from_pretrained(tiny.vq_model(folder / "vq"), dtype="fp32", device="cpu")
    tokenizer = load_tokenizer()
    shapes: dict[str, dict[str, Any]] = {
        "text": {"condition": "text", "condition_shape": (32,), "tokens": len(tokenizer)},
        "class": {"condition": "class", "tokens": 2, "classes": ("a red disc", "blue")},
        "map": {"condition": "map", "condition_shape": (4, 4), "tokens": 16},
        "none": {},
    }
    for name, shape in shapes.items():
        torch.manual_seed(0)
        prior = new_prior(PriorShape(kind="transformer", codes=16, grid=(4, 4), layers=1, width=8, **shape)).eval()
        for p in prior.parameters():
            torch.nn.init.normal_(p, std=0.4)
        TokenPipeline(vae, prior, tokenizer if name == "text" else None).save(folder / name)
    (folder / "level" / "vqvae2").mkdir(parents=True)
    (folder / "level" / "prior").mkdir()
    unclip.unclip().save_pretrained(folder / "unclip")
    unclip.image_encoder().save_pretrained(folder / "unclip" / "image_encoder")
    tiny.model(folder / "base")
    tiny.upsampler(folder / "upsampler")
    Image.effect_mandelbrot((16, 16), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(folder / "image.png")
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pixels(path: str | Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def again(run: Run, path: str) -> np.ndarray[Any, Any]:
    """Draw an image again from what its PNG says, and return its pixels."""
    assert run("generate", "--from", path, "--device", "cpu", "-o", "again.png") == Ran(0, "again.png\n", "")
    return pixels("again.png")


@pytest.mark.parametrize(
    ("name", "prompts"), [("text", ["a red apple", "a cat"]), ("class", ["A red disc", "blue"]), ("none", [])]
)
def test_codes_are_drawn_as_in_python(run: Run, made: Path, work: Path, name: str, prompts: list[str]) -> None:
    sampling = {"temperature": 0.9, "top_k": 8, "top_p": 0.95} | ({"guidance_scale": 1.5} if prompts else {})
    options = [str(part) for key, value in sampling.items() for part in (f"--{key.replace('_', '-')}", value)]
    found = run("generate", *prompts, "-m", made / name, "--seed", 3, "--count", 2, "--grid", *options, *PLACE)
    assert (found.code, found.err) == (0, "")
    *paths, grid = found.out.splitlines()
    assert len(paths) == 2 * max(len(prompts), 1)
    assert grid.endswith("-grid.png")
    pipeline = TokenPipeline.from_pretrained(made / name, dtype="fp32", device="cpu")
    each = {"num_images": 2} if prompts else {"num_images": len(paths)}
    expected = pipeline(prompts or None, seed=3, output_type="np", **each, **sampling)
    assert np.array_equal([pixels(path) for path in paths], expected)
    assert np.abs(again(run, paths[1]).astype(int) - expected[1]).max() <= 1  # alone, decoding may round differently
    assert len({image.tobytes() for image in expected}) > 1  # the seed matters
    text = sdkit.images.read_text(paths[1])
    assert (text["pipeline"], text["temperature"], text["top_k"], text["seed"]) == ("codes", "0.9", "8", "4")
    assert text["model"] == str(made / name)


def test_an_empty_prompt_is_no_class_alone_and_in_a_batch(run: Run, made: Path, work: Path) -> None:
    given = ("generate", "", "blue", "-m", made / "class", *PLACE)
    alone, batch = (run(*given, "-o", str(size), "--batch-size", size).out.splitlines() for size in (1, 2))
    assert len(batch) == 2
    assert np.array_equal([pixels(path) for path in batch], [pixels(path) for path in alone])


def test_codes_of_a_map(run: Run, made: Path, work: Path) -> None:
    found = run("generate", "-m", made / "map", "--condition", made / "image.png", "-o", "map.png", *PLACE)
    assert found == Ran(0, "map.png\n", "")
    pipeline = TokenPipeline.from_pretrained(made / "map", dtype="fp32", device="cpu")
    (expected,) = pipeline(sdkit.images.read(made / "image.png"), output_type="np")
    assert np.array_equal(pixels("map.png"), expected)
    assert np.array_equal(again(run, "map.png"), expected)
    (made / "other.png").write_bytes((made / "image.png").read_bytes())
    given = ("generate", "-m", made / "map", "--condition", made / "other.png", "-o", "other.png", *PLACE)
    assert run(*given).code == 0
    Image.new("RGB", (16, 16)).save(made / "other.png")
    assert "other.png has changed since it was drawn from" in run("generate", "--from", "other.png", "-o", "a.png").err


def test_unclip_draws_texts_and_variations(run: Run, made: Path, work: Path) -> None:
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "noise_level": 100}
    how = ("--steps", 2, "--scale", 3, "--noise-level", 100, *PLACE)
    model = sdkit.UnCLIP.from_pretrained(made / "unclip", device="cpu")
    prior = ("--prior-steps", 3, "--prior-scale", 2, "--prior-sampler", "ddim")
    found = run("generate", "a cat", "a dog", "-m", made / "unclip", "--seed", 5, *prior, *how)
    assert (found.code, found.err) == (0, "")
    expected = model(
        ["a cat", "a dog"], seed=5, prior_num_inference_steps=3, prior_guidance_scale=2.0, prior_sampler="ddim",
        **options,
    )  # fmt: skip
    paths = found.out.splitlines()
    close([pixels(path) for path in paths], expected)
    close([again(run, paths[1])], expected[1:])
    own = run("generate", "a cat", "-m", made / "unclip", "--prior", made / "unclip", "--seed", 5, *prior, *how)
    close([pixels(own.out.strip())], expected[:1])
    image = ("--image", made / "image.png", "--count", 2)
    found = run("generate", "-m", made / "unclip", *image, "--seed", 9, *how)
    assert (found.code, found.err) == (0, "")
    paths = found.out.splitlines()
    expected = model.variations(sdkit.images.read(made / "image.png"), 2, seed=9, **options)
    close([pixels(path) for path in paths], expected)
    close([again(run, paths[1])], expected[1:])


def close(found: list[Any], expected: list[Image.Image]) -> None:
    """Images equal others to one level of 255, since batches may be of another size."""
    assert len(found) == len(expected)
    assert max(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() for a, b in zip(found, expected, strict=True)) <= 1


def test_a_cascade_enlarges(run: Run, made: Path, work: Path) -> None:
    how = ("--steps", 2, "--noise-level", 50, "--height", 16, "--width", 16, "--negative-prompt", "blue", *PLACE)
    found = run("generate", "a cat", "-m", made / "base", "--upsampler", made / "upsampler", "--seed", 4, *how)
    assert (found.code, found.err) == (0, "")
    stages = [
        sdkit.StableDiffusion.from_pretrained(made / name, dtype="fp32", device="cpu") for name in ("base", "upsampler")
    ]
    (expected,) = sdkit.Cascade(stages)(
        "a cat", "blue", seed=4, num_inference_steps=2, options=[{"height": 16, "width": 16}, {"noise_level": 50}]
    )
    assert expected.size == (64, 64)
    close([pixels(found.out.strip())], [expected])
    close([again(run, found.out.strip())], [expected])


def test_an_upsampler_takes_fewer_images_at_once(
    run: Run, made: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base draws both images of 16 x 16 pixels at once, and the upsampler one of 64 x 64 after the other."""
    monkeypatch.setattr(sdkit.StableDiffusion, "images_at_once", lambda self, height, width: 2 if height < 64 else 1)
    seen: list[int] = []
    original = sdkit.UNet.forward

    def forward(self: sdkit.UNet, z: torch.Tensor, *args: Any, **keywords: Any) -> torch.Tensor:
        seen.append(len(z))
        return original(self, z, *args, **keywords)

    monkeypatch.setattr(sdkit.UNet, "forward", forward)
    how = ("--steps", 1, "--height", 16, "--width", 16, "--scale", 1, "--count", 2, *PLACE)
    assert run("generate", "a cat", "-m", made / "base", "--upsampler", made / "upsampler", *how).code == 0
    assert seen == [2, 1, 1]


def test_an_upsampler_alone_takes_its_noise_level(run: Run, made: Path, work: Path) -> None:
    how = ("--condition", made / "image.png", "--noise-level", 300, "--steps", 2, *PLACE)
    assert run("generate", "a cat", "-m", made / "upsampler", *how, "-o", "a.png").code == 0
    sd = sdkit.StableDiffusion.from_pretrained(made / "upsampler", dtype="fp32", device="cpu")
    image = sdkit.images.read(made / "image.png")
    close([pixels("a.png")], sd("a cat", condition=image, noise_level=300, num_inference_steps=2))
    close([again(run, "a.png")], [Image.open("a.png")])


BAD = {
    "steps of codes": (("cat", "-m", "{text}", "--steps", 3), "--num-inference-steps does not apply to a prior over"),
    "a LoRA of codes": (("cat", "-m", "{text}", "--lora", "x"), "--lora does not apply to a prior over codes; leave"),
    "codes previewed": (("cat", "-m", "{text}", "--preview"), "--preview does not apply to a prior over codes"),
    "unCLIP offloaded": (("cat", "-m", "{unclip}", "--offload"), "--offload does not apply to unCLIP (DALL-E 2)"),
    "unCLIP's height": (("cat", "-m", "{unclip}", "--height", 64), "--height does not apply to unCLIP (DALL-E 2)"),
    "temperature of SD": (("cat", "--temperature", 1), "--temperature does not apply to Stable Diffusion; leave it"),
    "prior of SD": (("cat", "--prior", "x"), "--prior does not apply to Stable Diffusion; leave it out"),
    "temperature": (("cat", "-m", "{text}", "--temperature", -1), "temperature must be a number from 0 to 1000"),
    "top-p": (("cat", "-m", "{text}", "--top-p", 0), "top_p must be above 0"),
    "no class": (("cat", "-m", "{class}"), "the prior knows no class 'cat'"),
    "no condition": (("cat", "-m", "{none}"), "this prior has no condition; leave the condition out"),
    "two conditions": (("cat", "-m", "{map}", "--condition", "{image.png}"), "a prompt or a map, not on both"),
    "a prompt of maps": (("{image.png}", "-m", "{map}"), "this prior reads a map, not a prompt; give the file of the"),
    "a map of classes": (
        ("-m", "{class}", "--condition", "{image.png}"),
        "this prior reads no map; leave condition out",
    ),
    "no map": (("-m", "{map}", "--condition", "nowhere.png"), "cannot read nowhere.png: No such file or directory"),
    "no PNG of a model": (
        ("--from", "{image.png}", "-m", "{text}"),
        "image.png was not drawn by a prior over codes, as",
    ),
    "no prompt": (("-m", "{unclip}"), "there is no prompt; give one, --prompts FILE, --image FILE, or --from"),
    "sampler": (("cat", "-m", "{unclip}", "--prior-sampler", "best"), "sampler 'best' is not one of"),
    "noise": (("cat", "-m", "{unclip}", "--noise-level", 1000), "noise_level must be a whole number from 0 to 999"),
    "half a VQ-VAE-2": (("cat", "-m", "{level}"), "draws one level of a VQ-VAE-2, and an image needs both"),
    "no such folder": (("cat", "-m", "./nowhere"), "the path './nowhere' does not exist"),
    "two files": (("-m", "{none}", "--count", 2, "-o", "a.png"), "a.png cannot hold 2 PNG image(s)"),
    "upsampling an image": (
        ("cat", "-m", "{base}", "--image", "{image.png}", "--upsampler", "x"),
        "upsampler enlarges images that are drawn of a prompt alone; leave image out",
    ),
    "noise of nothing": (("cat", "-m", "{base}", "--noise-level", 3), "noise_level belongs to an upsampler"),
    "no upsampler": (("cat", "-m", "{base}", "--upsampler", "{base}"), "model 2 of the cascade is no upsampler"),
    "cascade previewed": (
        ("cat", "-m", "{base}", "--upsampler", "{upsampler}", "--preview"),
        "--preview shows the latents of one model, and --upsampler adds others",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(run: Run, made: Path, work: Path, case: str) -> None:
    arguments, sentence = BAD[case]
    given = [str(made / part[1:-1]) if str(part).startswith("{") else part for part in arguments]
    code, out, err = run("generate", *given, "--device", "cpu")
    assert (code, out) == (2, "")
    assert sentence in err
    assert len(err.splitlines()) == 1
    assert not [*work.rglob("*.png")]


def test_a_png_of_another_kind_of_model(run: Run, made: Path, work: Path) -> None:
    assert run("generate", "-m", made / "none", "-o", "codes.png", *PLACE).code == 0
    for model, kind in (("unclip", "unCLIP (DALL-E 2)"), ("base", "Stable Diffusion")):
        found = run("generate", "--from", "codes.png", "-m", made / model, "-o", "a.png")
        assert found.code == 2
        assert f"codes.png was drawn by a prior over codes, and '{made / model}' is {kind}" in found.err
    found = run("generate", "--from", "codes.png", "--steps", 3, "-o", "a.png")
    assert "--num-inference-steps does not apply to a prior over codes" in found.err
    assert run("generate", "cat", "--from", "codes.png", "-m", made / "text", "-o", "a.png", *PLACE).code == 0
