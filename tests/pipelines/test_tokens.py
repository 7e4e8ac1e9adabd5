"""Images from codes: how codes are drawn, the pipeline, its files, and bad input."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import sdkit
from sdkit.errors import ArgumentError, SourceError
from sdkit.evaluation.clip_score import clip_score
from sdkit.networks.code_prior import CodePrior, log_likelihood, new_prior
from sdkit.networks.prior_shape import PriorShape
from sdkit.pipelines.code_conditions import text_ids
from sdkit.pipelines.code_sampling import CodeSampling, draw_codes, drawn
from sdkit.pipelines.tokens import TokenPipeline, rerank
from tests.helpers import clip, tiny
from tests.helpers.loaders import load_tokenizer
from tests.helpers.sentences import one_sentence

GRID = (4, 4)  # codes of an image of 16 pixels


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def prior(kind: str, **changes: Any) -> CodePrior:
    sizes: dict[str, Any] = {"codes": 16, "grid": GRID, "layers": 2, "width": 8, "heads": 2}
    torch.manual_seed(0)
    made = new_prior(PriorShape(kind=kind, **sizes | changes)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


# Drawing codes


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, 4, None), (1.3, None, 0.7), (0.8, 6, 0.6), (1.0, 99, 1)],
)
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = 2 * torch.randn(50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = CodeSampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(logits)
    torch.testing.assert_close(found, expected.softmax(1))


def test_temperature_0_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 3.0, -1.0], [5.0, 4.9, 0.0]])
    assert CodeSampling(temperature=0).probabilities(logits).tolist() == [[0, 1, 0], [1, 0, 0]]
    for cut in ({}, {"top_k": 2**70}, {"top_p": 0.5}):  # also where the logits, divided, are infinite
        assert CodeSampling(temperature=1e-310, **cut).probabilities(logits).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_codes_without_probability_are_never_drawn() -> None:
    p = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]], dtype=torch.float64).expand(1, -1)
    generator = torch.Generator().manual_seed(0)
    assert {int(drawn(p, [generator])) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_frequencies_are_the_exact_probabilities(kind: str) -> None:
    """4,000 images of 2 x 2 codes of 3, drawn with guidance from a class: chi-squared over all 81, p above 0.001.

    The expected probabilities are products of guided ones, from the likelihoods of all images alone.
    """
    made = prior(kind, codes=3, grid=(2, 2), condition="class", tokens=2, classes=("a", "b"))
    images = torch.tensor([*itertools.product(range(3), repeat=4)]).reshape(-1, 2, 2)
    with torch.no_grad():
        cond, uncond = (torch.log_softmax(made(images, torch.full((81,), k)).double(), -1) for k in (1, 2))
    guided = torch.log_softmax(uncond + 1.5 * (cond - uncond), -1)
    p = guided.gather(-1, images[..., None])[..., 0].sum((1, 2)).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-6)
    n = 4000
    codes = draw_codes(
        made, generators(*range(n)), condition=torch.full((n,), 1), uncond=torch.full((n,), 2),
        sampling=CodeSampling(guidance_scale=1.5),
    )  # fmt: skip
    counts = torch.bincount((codes.flatten(1) * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81)
    often = n * p >= 5
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    expected = [*(n * p[often]).tolist(), float(n * p[~often].sum())]
    keep = slice(None) if expected[-1] > 0 else slice(-1)
    assert chisquare(observed[keep], expected[keep]).pvalue > 0.001
    unguided = chisquare(observed[keep], [*expected[:-1][::-1], expected[-1]][keep]).pvalue
    assert unguided < 1e-6  # the test can fail


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
def test_an_image_is_the_same_alone_and_in_a_batch(kind: str) -> None:
    made = prior(kind)
    together = draw_codes(made, generators(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(draw_codes(made, generators(seed))[0], together[i])
    assert len({tuple(one.flatten().tolist()) for one in together}) == 3


def test_the_cache_changes_nothing() -> None:
    made = prior("transformer")
    assert torch.equal(draw_codes(made, generators(0, 1)), draw_codes(made, generators(0, 1), cached=False))


def test_known_rows_are_kept_and_the_rest_follows_from_them() -> None:
    """The rest has the likelihood of the last rows, given the first: with temperature 0 it is the likeliest."""
    made = prior("transformer", codes=3, grid=(2, 2))
    for row in itertools.product(range(3), repeat=2):
        known = torch.tensor([[row]])
        found = draw_codes(made, generators(0), known=known, sampling=CodeSampling(temperature=0))
        assert torch.equal(found[:, :1], known)
        first = torch.cat([known.expand(3, -1, -1), torch.tensor([[[k, 0]] for k in range(3)])], 1)
        assert int(found[0, 1, 0]) == int(made(first)[0, 1, 0].argmax())
        second = torch.cat([found[:, :, :].expand(3, -1, -1)])
        second[:, 1, 1] = torch.arange(3)
        assert int(found[0, 1, 1]) == int(log_likelihood(made, second).argmax())


# The pipeline


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> sdkit.VAE:
    folder = tiny.vq_model(tmp_path_factory.mktemp("vq"))
    return sdkit.VAE.from_pretrained(folder, dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def pipelines(vae: sdkit.VAE) -> dict[str, TokenPipeline]:
    tokenizer = load_tokenizer()
    text: dict[str, Any] = {"condition": "text", "condition_shape": (32,), "tokens": len(tokenizer)}
    label: dict[str, Any] = {"condition": "class", "tokens": 2, "classes": ("a red disc", "a blue disc")}
    map_: dict[str, Any] = {"condition": "map", "condition_shape": GRID, "tokens": 16}
    return {
        "none": TokenPipeline(vae, prior("transformer")),
        "text": TokenPipeline(vae, prior("transformer", **text), tokenizer),
        "class": TokenPipeline(vae, prior("pixelcnn", **label)),
        "map": TokenPipeline(vae, prior("transformer", **map_)),
        "pixelcnn map": TokenPipeline(vae, prior("pixelcnn", **map_)),
    }


def picture(size: tuple[int, int] = (16, 16), colour: str = "teal") -> Image.Image:
    image = Image.new("RGB", size, colour)
    image.paste((250, 250, 250), (0, 0, size[0] // 2, size[1] // 3))
    return image


GIVEN: dict[str, Any] = {"none": None, "text": "a red apple", "class": "A blue disc", "map": picture()}


@pytest.mark.parametrize("name", GIVEN)
def test_images_are_the_decoded_codes(name: str, pipelines: dict[str, TokenPipeline], vae: sdkit.VAE) -> None:
    pipeline, given = pipelines[name], GIVEN[name]
    scale = 1.0 if given is None else 1.5
    codes = pipeline(given, num_images=2, seed=3, guidance_scale=scale, output_type="codes")
    assert (codes.shape, codes.dtype) == ((2, *GRID), torch.int64)
    assert torch.equal(pipeline(given, seed=4, guidance_scale=scale, output_type="codes")[0], codes[1])
    images = pipeline(given, num_images=2, seed=3, guidance_scale=scale, output_type="np")
    assert np.array_equal(images, vae.decode_codes(codes, output_type="np"))
    found = pipeline.log_likelihood(codes, given)
    condition = {
        "none": lambda: None,
        "text": lambda: text_ids(pipeline.tokenizer, ["a red apple"], 32),
        "class": lambda: torch.tensor([1]),
        "map": lambda: vae.codes(given),
    }[name]()
    expected = log_likelihood(
        pipeline.prior, codes, None if condition is None else torch.cat([condition] * 2)
    ).detach()  # fmt: skip
    torch.testing.assert_close(found, expected)


def test_text_ids_are_those_of_the_text_encoder() -> None:
    """Of prompts that fit; of a longer one, the first chunk."""
    text = sdkit.TextEncoder.from_pretrained("emoji", dtype="fp32", device="cpu")
    prompts = ["", "a red apple on a blue background", "a red apple and a cat " * 20]
    found = text_ids(text.tokenizer, prompts, text.length)
    for ids, prompt in zip(found, prompts, strict=True):
        assert torch.equal(ids, text.tokenize(prompt)[0][0, 0])


def test_a_condition_of_each_image_and_none(pipelines: dict[str, TokenPipeline]) -> None:
    pipeline = pipelines["class"]
    both = pipeline(["a red disc", 1], num_images=2, seed=0, output_type="codes")
    for i, label in enumerate((0, 0, "a blue disc", "a blue disc")):
        assert torch.equal(pipeline(label, seed=i, output_type="codes")[0], both[i])
    nothing = pipeline(seed=0, output_type="codes")
    codes = draw_codes(pipeline.prior, generators(0), condition=torch.tensor([2]))
    assert torch.equal(nothing, codes)
    empty = pipelines["text"]("", seed=0, output_type="codes")
    assert torch.equal(pipelines["text"](seed=0, output_type="codes"), empty)


@pytest.mark.parametrize("name", ["none", "class", "map", "pixelcnn map"])
def test_larger_images(name: str, pipelines: dict[str, TokenPipeline]) -> None:
    pipeline = pipelines[name]
    given: dict[str, Any] = {"height": 20, "width": 24} if "map" not in name else {"condition": picture((24, 20))}
    (image,) = pipeline(**given, seed=1)
    assert image.size == (24, 20)


def test_completion_keeps_the_codes_of_the_upper_half(pipelines: dict[str, TokenPipeline], vae: sdkit.VAE) -> None:
    images = [picture(), picture(colour="red")]
    codes = vae.codes(images)
    found = pipelines["none"].complete(images, seed=[4, 5], output_type="codes")
    assert torch.equal(found[:, :2], codes[:, :2])
    alone = pipelines["none"].complete(images[1], seed=5, output_type="codes")
    assert torch.equal(found[1:], alone)
    assert torch.equal(pipelines["none"].complete(images, keep=1, output_type="codes"), codes)
    assert len(pipelines["text"].complete(images, "a red disc", guidance_scale=2.0)) == 2


def test_completion_keeps_whole_rows_despite_rounding(vae: sdkit.VAE) -> None:
    pipeline, image = TokenPipeline(vae, prior("pixelcnn")), picture((16, 200))  # 50 rows of codes
    completed = pipeline.complete(image, keep=0.58, output_type="codes")
    same = (completed == vae.codes([image])).all(dim=2)[0]
    assert (int(same[:29].sum()), bool(same[29])) == (29, False)


def test_likelihood_of_images_is_that_of_their_codes(pipelines: dict[str, TokenPipeline], vae: sdkit.VAE) -> None:
    images = [picture(), picture(colour="red")]
    torch.testing.assert_close(
        pipelines["none"].log_likelihood(images), pipelines["none"].log_likelihood(vae.codes(images))
    )


@pytest.mark.parametrize("name", ["text", "class", "none"])
def test_saved_and_loaded(name: str, pipelines: dict[str, TokenPipeline], tmp_path: Path) -> None:
    folder = pipelines[name].save(tmp_path / "saved")
    assert {path.name for path in folder.iterdir()} == {"vqvae", "prior", *(["tokenizer"] if name == "text" else [])}
    loaded = sdkit.TokenPipeline.from_pretrained(folder, dtype="fp32", device="cpu")
    given: dict[str, Any] = {"condition": GIVEN[name], "seed": 1, "output_type": "np"}
    assert np.array_equal(loaded(**given), pipelines[name](**given))
    one_sentence(lambda: loaded.save(folder), ArgumentError, "exists already; name another folder")


def test_reranking_by_a_clip(tmp_path: Path) -> None:
    """Best first, as the CLIP scores of each pair alone say."""
    extractor = sdkit.evaluation.open_extractor(f"clip:{clip.save_clip(tmp_path)}", device="cpu")
    images = [picture(colour=name) for name in ("red", "teal", "yellow", "black")]
    text = extractor.embed_texts(["a red disc"])
    scores = [float(clip_score(extractor([image]), text)) for image in images]
    found = rerank(images, "a red disc", extractor)
    assert found.scores == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert [scores[i] for i in found.order] == pytest.approx(found.scores, abs=1e-5)
    assert all(image is images[i] for image, i in zip(found.images, found.order, strict=True))
    one_sentence(lambda: rerank([], "a", extractor), ArgumentError, "there is no image to rank")
    two: Any = ["a", "b"]
    one_sentence(lambda: rerank(images, two, extractor), ArgumentError, "are ranked by one prompt, not by 2")


def test_classes_are_named_as_captions_or_as_their_tokens_spell_them(vae: sdkit.VAE) -> None:
    names = ("a b", "ab", "cat , orange")
    reader = TokenPipeline(vae, prior("pixelcnn", condition="class", tokens=3, classes=names))._read
    for given, number in (("ab", 1), ("A b ", 0), ("cat, orange", 2), ("Cat , orange", 2)):
        assert reader(given, 1, CodeSampling())[0] == torch.tensor([number])


# Bad input

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("none", {"condition": "a cat"}, "this prior has no condition; leave the condition out"),
    ("none", {"guidance_scale": 2.0}, "this prior has no condition to guide by; leave guidance_scale out"),
    ("none", {"num_images": 0}, "num_images must be a whole number of at least 1, not 0"),
    ("none", {"temperature": -1}, "temperature must be a number from 0 to 1000, not -1"),
    ("none", {"top_k": 0}, "top_k must be a whole number of at least 1, not 0"),
    ("none", {"top_p": 0}, "top_p must be above 0; for the likeliest code alone, take temperature 0"),
    ("none", {"top_p": 1.5}, "top_p must be a number from 0 to 1, not 1.5"),
    ("none", {"height": 30}, "height must be a multiple of 4 pixels, not 30"),
    ("none", {"height": 2**40}, "height must be a whole number from 1 to 16384"),
    ("none", {"width": 8}, "width must be at least 16 pixels for this prior, not 8"),
    ("none", {"output_type": "gif"}, "output_type 'gif' is not one of 'pil', 'np', 'pt', 'codes'"),
    ("none", {"seed": -1}, "seed must be a whole number"),
    ("none", {"seed": [1, 2]}, "2 seeds cannot serve 1 images"),
    ("text", {"condition": 3}, "the prompt must be a string or a list of at least one string"),
    ("text", {"guidance_scale": float("nan")}, "the guidance scale must be a number"),
    ("class", {"condition": "a cat"}, "the prior knows no class 'a cat'; give one of its 2, such as 'a red disc'"),
    ("class", {"condition": 2}, "the number of a class must be a whole number from 0 to 1, not 2"),
    ("class", {"condition": []}, "there is no class in the list; give at least one"),
    ("map", {"condition": picture((24, 16)), "width": 16}, "the map is for images of 16 x 24 pixels"),
    ("map", {"condition": [picture(), picture((24, 24))]}, "the images differ in size; give images of one size"),
]


@pytest.mark.parametrize(("name", "arguments", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(
    name: str, arguments: dict[str, Any], sentence: str, pipelines: dict[str, TokenPipeline]
) -> None:
    one_sentence(lambda: pipelines[name](**arguments), ArgumentError, sentence)


def test_bad_images_are_one_sentence(pipelines: dict[str, TokenPipeline]) -> None:
    pipeline = pipelines["none"]
    cases = [
        (lambda: pipeline.complete(picture((8, 8))), "height must be at least 16 pixels for this prior, not 8"),
        (lambda: pipeline.complete(picture(), keep=2), "keep must be a number from 0 to 1, not 2"),
        (lambda: pipeline.log_likelihood(picture((32, 32))), "the likelihood is that of images of 4 x 4 codes"),
        (lambda: pipeline.log_likelihood(torch.full((1, 4, 4), 16)), "codes are numbers from 0 to 15"),
        (lambda: pipeline.log_likelihood(torch.zeros(0, 4, 4, dtype=torch.int64)), "there is no code; give at least"),
        (
            lambda: pipelines["pixelcnn map"].log_likelihood(picture((32, 32)), picture()),
            "the map is for images of 16 x 16 pixels; give one of the size of the images, 32 x 32",
        ),
        (
            lambda: pipelines["class"].complete([picture()] * 3, ["a red disc", "a blue disc"]),
            "2 conditions cannot serve 3 images: give one, or one for each",
        ),
    ]
    for run, sentence in cases:
        one_sentence(run, ArgumentError, sentence)


def test_bad_folders_are_one_sentence(pipelines: dict[str, TokenPipeline], tmp_path: Path) -> None:
    def load(folder: Path) -> Any:
        return lambda: sdkit.TokenPipeline.from_pretrained(folder, dtype="fp32", device="cpu")

    whole = pipelines["text"].save(tmp_path / "whole")
    one_sentence(load(tmp_path / "nothing"), SourceError, "has no folder vqvae/; give the result of sdkit train prior")
    shutil.copytree(whole, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "prior")
    one_sentence(load(tmp_path / "a"), SourceError, "has no folder prior/")
    shutil.copytree(whole, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "vqvae")
    tiny.vq_model(tmp_path / "b" / "vqvae", codes=8)
    one_sentence(load(tmp_path / "b"), SourceError, "the prior is for a VQ model of 16 codes, and this VAE has 8 codes")
    one_sentence(lambda: TokenPipeline(pipelines["text"].vae, pipelines["text"].prior), SourceError, "no tokenizer")
