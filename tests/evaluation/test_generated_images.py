from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import sdkit
from sdkit.data import open_examples
from sdkit.errors import ArgumentError, ImageError, SdkitError
from sdkit.evaluation.extractors import Extractor, open_extractor
from sdkit.evaluation.frechet import frechet_distance
from sdkit.evaluation.generated_images import ImageEvaluation, evaluate_images
from sdkit.evaluation.kernel_distance import kid
from sdkit.processes import is_main_process
from tests.helpers import forks
from tests.helpers.clip import save_clip, save_dinov2, train_clip
from tests.helpers.real_images import crops, save_all
from tests.helpers.sentences import one_sentence

pytestmark = pytest.mark.filterwarnings("ignore:.*are fewer than the:UserWarning")

N = 32
EMOJI = {
    "1f335": "a cactus", "1f33b": "a sunflower", "1f34e": "a red apple", "1f353": "a strawberry",
    "1f382": "a birthday cake", "1f388": "a balloon", "1f419": "an octopus", "1f43c": "a panda", "1f47b": "a ghost",
    "1f680": "a rocket", "1f984": "a unicorn", "1f98a": "a fox",
}  # fmt: skip


@pytest.fixture(scope="module")
def alex() -> Extractor:
    return open_extractor("alex", device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Extractor:
    """A random network of 24 features, where only mechanics count."""
    return open_extractor(f"dinov2:{save_dinov2(tmp_path_factory.mktemp('dinov2'))}", device="cpu")


@pytest.fixture(scope="module")
def reference() -> list[Image.Image]:
    return crops(N, seed=0)


@pytest.fixture(scope="module")
def good(alex: Extractor, reference: list[Image.Image]) -> ImageEvaluation:
    """Other squares of the same photographs."""
    return evaluate_images(crops(N, seed=1), reference, extractors=alex)


def blurred(images: Sequence[Image.Image], radius: float) -> list[Image.Image]:
    return [image.filter(ImageFilter.GaussianBlur(radius)) for image in images]


def noisy(images: Sequence[Image.Image], sigma: float) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    levels = (np.asarray(image) + rng.normal(0, sigma, (image.height, image.width, 3)) for image in images)
    return [Image.fromarray(one.round().clip(0, 255).astype(np.uint8)) for one in levels]


DAMAGES: dict[str, tuple[Callable[[float], list[Image.Image]], Sequence[float]]] = {
    "blur": (lambda radius: blurred(crops(N, seed=1), radius), (1, 2, 4)),
    "noise": (lambda sigma: noisy(crops(N, seed=1), sigma), (8, 20, 50)),
    "modes": (lambda photos: crops(N, seed=1, photos=int(photos)), (4, 2, 1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_more_damage_is_worse_and_the_mean_image_is_worst(
    good: ImageEvaluation, alex: Extractor, reference: list[Image.Image], damage: str
) -> None:
    make, amounts = DAMAGES[damage]
    found = [good, *(evaluate_images(make(amount), reference, extractors=alex) for amount in amounts)]
    for metric in ("frechet", "frechet_at_infinity", "kid"):
        values = [one.generated[metric] for one in found]
        assert values == sorted(values), metric
        if metric != "frechet_at_infinity":
            assert values[-1] < found[-1].ceiling[metric], metric
    recalls = [one.generated["recall"] for one in found]
    assert recalls == sorted(recalls, reverse=True)
    assert recalls[-1] < 0.6 * recalls[0]
    assert found[-1].ceiling["precision"] == found[-1].ceiling["recall"] == 0
    if damage == "modes":  # what few modes show is real: only the recall tells
        assert min(one.generated["precision"] for one in found) > 0.6


def test_controls_stand_where_they_should(good: ImageEvaluation) -> None:
    assert good.floor["frechet"] < 0.5 * good.ceiling["frechet"]
    assert abs(good.floor["kid"]) < 0.2 * good.ceiling["kid"]
    assert good.generated["frechet_at_infinity"] < good.generated["frechet"]  # the bias of N is taken off
    low, high = good.generated.scores[0].interval or (0, 0)
    assert low < good.generated["frechet"] < high < good.ceiling["frechet"]


def test_every_number_says_what_it_was_measured_on(good: ImageEvaluation) -> None:
    for row in good.rows:
        for score in row.scores:
            assert (score.extractor, score.width) == ("alex", 1152)
            assert score.resizing == "224 x 224 pixels, antialiased bicubic, aspect ratio not kept"
    assert {(score.count, score.reference_count) for score in good.generated.scores} == {(N, N)}
    assert {(score.count, score.reference_count) for score in good.floor.scores} == {(N // 2, N // 2)}
    assert good.shuffled is None
    assert json.loads(json.dumps(good.asdict()))["generated"]["scores"][0]["count"] == N


def test_values_are_those_of_the_metrics_themselves(
    good: ImageEvaluation, alex: Extractor, reference: list[Image.Image]
) -> None:
    a, b = alex(crops(N, seed=1)), alex(reference)
    assert good.generated["frechet"] == pytest.approx(frechet_distance(a, b), rel=1e-5)
    assert good.generated["kid"] == pytest.approx(kid(a, b), rel=1e-4, abs=1e-6)
    mean = np.mean([np.asarray(alex.prepare(image), dtype=float) for image in reference], axis=0).round()
    grey = Image.fromarray(np.moveaxis(mean, 0, -1).astype(np.uint8))
    assert good.ceiling["frechet"] == pytest.approx(frechet_distance(alex(grey), b), rel=1e-5)


def test_shuffled_captions_are_worse_the_more_of_them(tmp_path: Path) -> None:
    # A tiny CLIP learns the names of a dozen real emoji. Its scores then fall with the share of wrong captions.
    folder = Path(__file__).parents[1] / "embedded" / "3d"
    pictures = [sdkit.images.read(folder / f"{name}.webp") for name in EMOJI]
    captions = list(EMOJI.values())
    clip = train_clip(save_clip(tmp_path / "clip"), pictures, captions)
    found = list[ImageEvaluation]()
    for wrong in (0, 4, 8, 12):
        rolled = [*captions[1:wrong], *captions[: wrong and 1], *captions[wrong:]]
        assert sum(a != b for a, b in zip(rolled, captions, strict=True)) == wrong
        found.append(evaluate_images(pictures, pictures, extractors=clip, prompts=rolled))
    for metric in ("clip_score", "clip_cosine"):
        values = [one.generated[metric] for one in found]
        assert values == sorted(values, reverse=True)
        assert values[3] < 0.5 * values[0]
    right = found[0]
    assert right.shuffled is not None
    assert right.shuffled["clip_score"] < 0.5 * right.generated["clip_score"]
    assert right.ceiling["clip_score"] < 0.7 * right.generated["clip_score"]
    assert right.generated["clip_score"] == pytest.approx(right.generated["clip_cosine"] / 40, rel=1e-6)
    assert right.generated["cmmd"] == pytest.approx(0, abs=1e-6)
    assert right.ceiling["cmmd"] > 1


def test_any_kind_of_images_gives_the_same_numbers(tmp_path: Path, tiny: Extractor) -> None:
    images, reference = crops(N, seed=1), crops(N, seed=0)
    expected = evaluate_images(images, reference, extractors=tiny)
    folder = save_all(reference, tmp_path / "real")
    tensors = torch.stack(sdkit.images.to_tensors(images))
    kinds: list[tuple[Any, Any, dict[str, Any]]] = [
        (tensors, folder, {}),
        (np.stack([np.asarray(image) for image in images]), str(folder), {}),
        ((image for image in images), sorted(folder.iterdir()), {}),
        (lambda numbers: [images[i] for i in numbers], open_examples(folder), {"count": N}),
    ]
    for generated, real, options in kinds:
        assert evaluate_images(generated, real, extractors=tiny, **options) == expected


def test_prompts_serve_successive_images(tmp_path: Path) -> None:
    clip = open_extractor(f"clip:{save_clip(tmp_path / 'clip')}", device="cpu")
    images = crops(8, seed=0)
    pairs = evaluate_images(images, images, extractors=clip, prompts=["a cat", "a dog", "a fox", "a cake"])
    each = ["a cat", "a cat", "a dog", "a dog", "a fox", "a fox", "a cake", "a cake"]
    assert pairs.generated == evaluate_images(images, images, extractors=clip, prompts=each).generated
    alone = evaluate_images(images, images, extractors=clip, prompts=["a cat"])
    assert alone.shuffled is None


def test_several_extractors_share_the_images(alex: Extractor, tiny: Extractor) -> None:
    images, reference = crops(10, seed=1), crops(12, seed=0)
    both = evaluate_images(images, reference, extractors=[alex, tiny])
    for extractor in (alex, tiny):
        alone = evaluate_images(images, reference, extractors=extractor).generated.scores
        assert alone == tuple(score for score in both.generated.scores if score.extractor == extractor.name)
    found = both.generated.get("frechet", tiny.name)
    assert found is not None
    assert found.width == 24
    assert both.generated.get("cmmd") is None
    with pytest.raises(KeyError):
        both.generated["cmmd"]


def test_files_that_cannot_be_read_are_named_and_left_out(tmp_path: Path, tiny: Extractor) -> None:
    reference = crops(10, seed=0)
    folder = save_all(crops(10, seed=1), tmp_path / "made")
    whole = evaluate_images(folder, reference, extractors=tiny, batch_size=4)
    (folder / "0005b.png").write_bytes((folder / "0001.png").read_bytes()[:300])
    found = evaluate_images(folder, reference, extractors=tiny, batch_size=4)
    ((name, reason),) = found.skipped
    assert name == str(folder / "0005b.png")
    assert "cannot read" in reason
    assert found.generated.scores[0].count == 10
    assert found.generated["frechet"] == pytest.approx(whole.generated["frechet"], rel=1e-5)


def test_fewer_images_than_features_warn(alex: Extractor) -> None:
    with pytest.warns(UserWarning, match="9 images are fewer than the 1152 features of alex"):
        evaluate_images(crops(9, seed=1), crops(10, seed=0), extractors=alex)


def measure(generated: Path, reference: Path, clip: Path) -> None:
    """Measure in this process, or in this and others together, and print the numbers."""
    found = evaluate_images(
        generated, reference, extractors=["alex", f"clip:{clip}"], prompts=["a cat", "a dog"], batch_size=4,
        device="cpu",
    )  # fmt: skip
    if is_main_process():
        print(json.dumps(found.asdict()))


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    generated = save_all(crops(18, seed=1), tmp_path / "made")
    (generated / "0003.png").write_text("no image")
    reference, clip = save_all(crops(23, seed=0), tmp_path / "real"), save_clip(tmp_path / "clip")
    outputs = []
    for start in (forks.run, forks.launch):
        ended = start(measure, generated, reference, clip)
        assert not any(ended.codes), ended.err
        outputs.append(json.loads(ended.out))
    one, two = outputs
    assert one["skipped"] == two["skipped"]
    for row in ("generated", "floor", "ceiling", "shuffled"):
        for a, b in zip(one[row]["scores"], two[row]["scores"], strict=True):
            assert b["value"] == pytest.approx(a["value"], rel=1e-6, abs=1e-9), (row, a["metric"])
            assert {**a, "value": 0, "interval": 0} == {**b, "value": 0, "interval": 0}


def test_bad_input_is_one_sentence(tmp_path: Path, alex: Extractor, reference: list[Image.Image]) -> None:
    def call(generated: Any = reference, real: Any = reference, **options: Any) -> Callable[[], object]:
        return lambda: evaluate_images(generated, real, **{"extractors": alex, **options})

    torn = save_all(crops(9, seed=1), tmp_path / "torn")
    for path in torn.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    (tmp_path / "empty").mkdir()
    cases: list[tuple[Callable[[], object], type[SdkitError], str]] = [
        (call(reference[:7]), ArgumentError, "7 generated images are too few to measure; give at least 8"),
        (call(reference, reference[:3]), ArgumentError, "3 reference images are too few to measure"),
        (call(image for image in reference[:7]), ArgumentError, "7 generated images are too few"),
        (
            call(7),
            ArgumentError,
            "generated must be a folder, a list of images, or a function that draws them, not int",
        ),
        (call(str(tmp_path / "none")), SdkitError, "cannot read"),
        (call(tmp_path / "empty"), SdkitError, "found no file of a kind that is read here"),
        (call(torn), ImageError, "none of the 9 generated images can be read; the first: cannot read"),
        (call([None] * 9), ImageError, "type NoneType is no image"),
        (call([torch.full((3, 9, 9), 200.0)] * 9), ImageError, "outside [-1, 1]"),
        (call([torch.zeros(2, 3, 9, 9)] * 9), ImageError, "an entry of a set holds 2 images"),
        (call(lambda numbers: reference), ArgumentError, "count= belongs to a function that draws images"),
        (call(count=9), ArgumentError, "count= belongs to a function that draws images"),
        (call(lambda numbers: reference, count=0), ArgumentError, "count must be a whole number"),
        (call(lambda numbers: reference[:3], count=9), ArgumentError, "the function drew 3 images for 9 numbers"),
        (call(batch_size=0), ArgumentError, "batch_size must be a whole number"),
        (call(extractors=[]), ArgumentError, "there is no feature extractor; name at least one"),
        (call(extractors=[alex, "alex"]), ArgumentError, "the extractor 'alex' is named twice"),
        (call(extractors="resnet"), ArgumentError, "extractor 'resnet' is not one of 'alex', 'inception'"),
        (call(prompts=["a"] * 7), ArgumentError, "7 prompts cannot be assigned to 32 images; give one for each"),
        (call(prompts=7), ArgumentError, "prompts must be a string or a list of at least one string"),
        (call(prompts=[]), ArgumentError, "prompts must be a string or a list of at least one string"),
        (call(prompts=["a", 2]), ArgumentError, "prompts must be a string or a list"),
        (call(device="gpu9"), ArgumentError, "device 'gpu9' cannot be used on this machine"),
    ]
    for run, kind, sentence in cases:
        one_sentence(run, kind, sentence)


def test_a_stream_needs_one_prompt_for_each_image(tmp_path: Path) -> None:
    clip = open_extractor(f"clip:{save_clip(tmp_path / 'clip')}", device="cpu")
    images = crops(9, seed=0)
    for prompts in (["a cat"] * 3, ["a cat"] * 10):
        one_sentence(
            lambda prompts=prompts: evaluate_images(iter(images), images, extractors=clip, prompts=prompts),
            ArgumentError, f"{len(prompts)} prompts cannot be assigned to",
        )  # fmt: skip
    streamed = evaluate_images(iter(images), images, extractors=clip, prompts=["a cat", "a dog", "a fox"] * 3)
    listed = evaluate_images(images, images, extractors=clip, prompts=["a cat", "a dog", "a fox"] * 3)
    assert streamed == listed


def test_more_images_than_are_kept_are_sampled(monkeypatch: pytest.MonkeyPatch, tiny: Extractor) -> None:
    monkeypatch.setattr("sdkit.evaluation.summary.KEPT", 16)
    images, reference = crops(40, seed=1), crops(36, seed=0)
    found = evaluate_images(images, reference, extractors=tiny, batch_size=8)
    assert [found.generated.get(metric).count for metric in ("frechet", "kid", "recall")] == [40, 16, 16]  # type: ignore[union-attr]
    expected = frechet_distance(tiny(images), tiny(reference))
    assert found.generated["frechet"] == pytest.approx(expected, rel=1e-5)
