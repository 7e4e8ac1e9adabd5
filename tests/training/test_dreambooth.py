"""DreamBooth: the loss against the formula of diffusers' script, the batch, the class images, and bad input.

Runs that are killed, and two processes, are tested in test_runs.py.
"""

from __future__ import annotations

import functools
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

import sdkit
from sdkit.data import cache
from sdkit.data.transform import Transform
from sdkit.errors import ArgumentError, DataError, SdkitError, TrainingError
from sdkit.images import to_tensors
from sdkit.training import TrainingStopped, UNetConfig, train_unet
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.drawing import Drawing
from sdkit.training.stages.dreambooth import CLASS_IMAGES, ClassImages
from sdkit.training.stages.unet import UNetStage
from tests.helpers import VALIDATION_STEPS, tiny
from tests.helpers.sentences import one_sentence

pytest.importorskip("datasets")
pytest.importorskip("peft")

INSTANCE, CLASS = "a sks disc", "a disc"
BATCH = [(n, n) for n in range(4)]
COUNT = 2
OWN: dict[str, Any] = {"instance_prompt": INSTANCE, "class_prompt": CLASS, "size": tiny.SIZE}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the runs in other processes do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, five images of an object, four of its class, the first ones without captions, and a cache."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "captioned", 5)
    tiny.photos(folder / "class", 4)
    shutil.copytree(folder / "captioned", folder / "object", ignore=shutil.ignore_patterns("*.txt"))
    cache(folder / "model", folder / "captioned", folder / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")
    return folder


def config(made: Path, out: Path, **changes: Any) -> UNetConfig:
    own = OWN | {"model": made / "model", "instance_data": made / "object", "class_data": made / "class"}
    common = {"out_dir": out, "batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "ema_decay": 0.0}
    return UNetConfig(**own | common | changes)


def stage_of(made: Path, **changes: Any) -> UNetStage:
    return UNetStage(config(made, made / "unused", **changes))


# The loss


@functools.cache
def theirs(model: Path) -> tuple[Any, Any, Any, Any]:
    """Load diffusers' and transformers' networks, and the function that tokenizes."""
    return (
        AutoencoderKL.from_pretrained(model / "vae").eval(),
        CLIPTextModel.from_pretrained(model / "text_encoder").eval(),
        UNet2DConditionModel.from_pretrained(model / "unet").eval(),
        sdkit.TextEncoder.from_pretrained(model, device="cpu").tokenize,
    )


def diffusers_loss(model: Path, batch: dict[str, Any], prompts: list[str], prior_weight: float, v: bool) -> Tensor:
    """Return the loss as examples/dreambooth/train_dreambooth.py of diffusers writes it, on a batch's images, noise,
    and timesteps: the batch is instance images, then class images; the prediction is chunked in two."""
    vae, text, unet, tokenize = theirs(model)
    scheduler: Any = DDPMScheduler.from_pretrained(
        model / "scheduler", prediction_type="v_prediction" if v else "epsilon"
    )
    with torch.no_grad():
        posterior = vae.encode(batch["pixels"]).latent_dist
        latents = (posterior.mean + posterior.std * batch["posterior_eps"]) * vae.config.scaling_factor
        t = torch.tensor(batch["t"])
        noisy = scheduler.add_noise(latents, batch["eps"], t)
        ids = torch.cat([tokenize(prompt)[0][0] for prompt in prompts])
        prediction = unet(noisy, t, text(ids).last_hidden_state).sample
        target = scheduler.get_velocity(latents, batch["eps"], t) if v else batch["eps"]
        prediction, prediction_prior = torch.chunk(prediction, 2, dim=0)
        target, target_prior = torch.chunk(target, 2, dim=0)
        loss = F.mse_loss(prediction, target, reduction="mean")
        prior_loss = F.mse_loss(prediction_prior, target_prior, reduction="mean")
        return loss + prior_weight * prior_loss


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"prior_weight": 0.3},
        {"lora_rank": 2},
        {"train_text_encoder": True, "prior_weight": 2.5},
        {"prediction_type": "v"},
    ],
    ids=str,
)
def test_loss_is_that_of_diffusers_script(made: Path, changes: dict[str, Any]) -> None:
    stage = stage_of(made, **changes)
    batch = stage.batch(BATCH)
    with torch.no_grad():
        loss, parts = stage.loss({"unet": stage.denoiser}, batch, 0)
    weight = changes.get("prior_weight", 1.0)
    prompts = [INSTANCE] * 4 + [CLASS] * 4
    expected = diffusers_loss(made / "model", batch, prompts, weight, "prediction_type" in changes)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert float(loss) == pytest.approx(float(parts["instance_loss"] + weight * parts["prior_loss"]), rel=1e-6)
    swapped = diffusers_loss(made / "model", batch, prompts[::-1], weight, "prediction_type" in changes)
    assert float(expected) != pytest.approx(float(swapped), rel=1e-5)  # the prompts matter


def test_min_snr_weights_both_parts(made: Path) -> None:
    """Eq. 2 of the paper has a weight w_t before each part, where diffusers' script has it before the first alone."""
    stage = stage_of(made, snr_gamma=5.0)
    batch = stage.batch(BATCH)
    with torch.no_grad():
        loss, parts = stage.loss({"unet": stage.denoiser}, batch, 0)
        output, target = stage._denoised(stage.denoiser, batch)
    a = stage.schedule.alphas_cumprod[torch.tensor(batch["t"])].double()
    weight = torch.minimum(a / (1 - a), torch.tensor(5.0)) / (a / (1 - a))
    weighted = weight * (output - target).double().square().mean((1, 2, 3))
    assert float(parts["instance_loss"]) == pytest.approx(float(weighted[:4].mean()), rel=1e-5)
    assert float(parts["prior_loss"]) == pytest.approx(float(weighted[4:].mean()), rel=1e-5)
    assert float(loss) == pytest.approx(float(weighted[:4].mean() + weighted[4:].mean()), rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"lora_rank": 2, "train_text_encoder": True}], ids=str)
def test_gradient_reaches_what_is_trained_alone(made: Path, changes: dict[str, Any]) -> None:
    stage = stage_of(made, **changes)
    loss, _ = stage.loss({"unet": stage.denoiser}, stage.batch(BATCH), 0)
    loss.backward()  # type: ignore[no-untyped-call]
    moved = {part for part in ("unet", "text", "vae") for p in getattr(stage, part).parameters() if p.grad is not None}
    assert moved == ({"unet", "text"} if "train_text_encoder" in changes else {"unet"})


# The batch


def test_batch_is_instances_then_as_many_of_the_class(made: Path) -> None:
    stage = stage_of(made)
    batch = stage.batch(BATCH)
    known = {
        name: [to_tensors(sdkit.images.read(path))[0] for path in sorted((made / name).glob("*.png"))]
        for name in ("object", "class")
    }
    for i, (_, item) in enumerate(BATCH):
        assert torch.equal(batch["pixels"][i], known["object"][item])
    found = [[torch.equal(one, image) for image in known["class"]].index(True) for one in batch["pixels"][4:]]
    assert sorted(found) == [0, 1, 2, 3]  # an epoch visits each once
    ids = [stage.text.tokenize(prompt)[0][0] for prompt in (INSTANCE, CLASS)]
    assert torch.equal(batch["ids"], torch.stack([ids[0]] * 4 + [ids[1]] * 4))
    assert len({one.numpy().tobytes() for one in batch["eps"]}) == 8  # the class has noise of its own
    assert batch["t"][:4] != batch["t"][4:]
    assert batch["t"][:4] == stage_of(made, class_data=None, class_prompt=None).batch(BATCH)["t"]


def test_batch_depends_on_numbers_alone(made: Path) -> None:
    samples = [(n, n % 5) for n in range(12)]
    whole, again = (stage_of(made, augment=("flip",)) for _ in range(2))
    batch = whole.batch(samples)
    for n, item in reversed(samples):
        one = again.batch([(n, item)])
        for i, at in enumerate((n, 12 + n)):
            for key in ("pixels", "eps", "posterior_eps", "ids"):
                assert torch.equal(one[key][i], batch[key][at])
            assert one["t"][i] == batch["t"][at]


def test_no_prompt_is_dropped(made: Path) -> None:
    stage = stage_of(made, caption_dropout=1.0)
    assert stage.batch([(n, n % 5) for n in range(20)])["ids"].unique(dim=0).shape[0] == 2


def test_without_instance_prompt_captions_are_read(made: Path) -> None:
    stage = stage_of(made, instance_data=made / "captioned", instance_prompt=None)
    ids = stage.batch(BATCH)["ids"]
    captions = [(made / "captioned" / f"{i:03}.txt").read_text() for i in range(4)]
    assert torch.equal(ids[:4], torch.stack([stage.text.tokenize(caption)[0][0] for caption in captions]))
    # A prompt takes the place of all captions.
    ids = stage_of(made, instance_data=made / "captioned").batch(BATCH)["ids"]
    assert torch.equal(ids[0], stage.text.tokenize(INSTANCE)[0][0])


def test_without_class_images_it_is_training_on_captions(made: Path) -> None:
    """The loss must be bit-identical to that of the same images with the prompt as their caption."""
    alone = stage_of(made, class_data=None, class_prompt=None)
    plain = UNetStage(
        UNetConfig(
            model=made / "model", data=made / "object", default_caption=INSTANCE, caption_dropout=0.0,
            out_dir=made / "unused", size=tiny.SIZE,
        )
    )  # fmt: skip
    with torch.no_grad():
        one, other = (stage.loss({"unet": stage.denoiser}, stage.batch(BATCH), 0)[0] for stage in (alone, plain))
    assert torch.equal(one, other)


# Class images


def drawn(out: Path) -> dict[str, bytes]:
    """Read the class images that a run drew."""
    return {path.name: path.read_bytes() for path in sorted((out / "class_images").rglob("*.png"))}


def test_class_images_are_the_models_own_drawings(made: Path, tmp_path: Path) -> None:
    """They are what the untrained model draws of the class prompt at the seeds from the run's on, also if the run
    is resumed after training."""
    given = {"class_data": None, "class_count": COUNT, "seed": 5, "learning_rate": 0.1, "save_every": 1}
    out = train_unet(config(made, tmp_path / "run", max_steps=1, **given))
    before = drawn(out)
    assert [*before] == ["00000.png", "00001.png"]
    sd = sdkit.StableDiffusion.from_pretrained(made / "model", dtype="fp32", device="cpu")
    for i, path in enumerate(sorted((out / "class_images").rglob("*.png"))):
        (expected,) = sd(CLASS, seed=5 + i, height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=VALIDATION_STEPS)
        levels = [np.asarray(image, float) for image in (sdkit.images.read(path), expected)]
        assert np.abs(levels[0] - levels[1]).max() <= 1
    next(iter(sorted((out / "class_images").rglob("*.png")))).unlink()
    train_unet(config(made, tmp_path / "run", max_steps=2, **given))
    assert drawn(out) == before
    losses = [line["prior_loss"] for line in read_metrics(out / "metrics.jsonl") if "prior_loss" in line]
    assert len(losses) == 2


def test_the_rest_of_the_class_images_is_drawn(made: Path, tmp_path: Path) -> None:
    stage = UNetStage(config(made, tmp_path / "run", class_count=6))
    stage.prepare()
    assert len(stage.class_images or ()) == 6
    assert len(drawn(tmp_path / "run")) == 2
    pixels = stage.batch([(n, n % 5) for n in range(6)])["pixels"][6:]
    assert len({one.numpy().tobytes() for one in pixels}) == 6
    assert not (made / "class" / "class_images").exists()
    fewer = UNetStage(config(made, tmp_path / "fewer", class_count=2))
    fewer.prepare()
    assert len(fewer.class_images or ()) == 2
    assert not drawn(tmp_path / "fewer")
    assert len(stage_of(made, class_data=None).class_images or ()) == CLASS_IMAGES == 100


def test_identity_covers_the_class_images(made: Path) -> None:
    changes: tuple[dict[str, Any], ...] = (
        {}, {"class_data": made / "captioned"}, {"class_count": 2}, {"class_count": 6}, {"class_data": None},
        {"class_data": None, "class_prompt": "a red disc"}, {"class_data": None, "seed": 1},
        {"class_data": None, "mixed_precision": "bf16"},
    )  # fmt: skip
    found = [
        ClassImages(
            config(made, made / "unused", **change), Transform(size=(tiny.SIZE, tiny.SIZE)), torch.zeros(1, 32),
            model=("a model",), draw=lambda *_: pytest.fail("nothing is drawn yet"), skipped={},
        )
        for change in changes
    ]  # fmt: skip
    assert len({one.identity for one in found}) == len(changes)
    assert len({one.folder for one in found}) == 4  # another count needs no other drawings
    assert [len(one) for one in found] == [4, 5, 2, 6, *[CLASS_IMAGES] * 4]


def test_a_stop_amid_the_drawing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Drawing.draw

    def then_stop(self: Drawing, *given: Any) -> Any:
        image = draw(self, *given)
        signal.raise_signal(signal.SIGTERM)
        return image

    with monkeypatch.context() as patch:
        patch.setattr(Drawing, "draw", then_stop)
        with pytest.raises(TrainingStopped, match=r"^stopped before the first step; the same command resumes it\.$"):
            train_unet(config(made, tmp_path / "run", class_data=None, class_count=2))
    assert [*drawn(tmp_path / "run")] == ["00000.png"]
    # Another class has images of its own: those that are there are not taken for it.
    train_unet(config(made, tmp_path / "run", class_data=None, class_count=2, class_prompt="a cat", max_steps=1))
    folders = sorted(len([*folder.iterdir()]) for folder in (tmp_path / "run" / "class_images").iterdir())
    assert folders == [1, 2]


def test_other_class_images_are_another_run(made: Path, tmp_path: Path) -> None:
    common = {"lora_rank": 2, "batch_size": 1}
    train_unet(config(made, tmp_path / "run", max_steps=1, **common))
    shutil.copytree(made / "class", tmp_path / "moved")
    moved = common | {"class_data": tmp_path / "moved"}
    train_unet(config(made, tmp_path / "run", max_steps=2, **moved))  # the path may change
    (tmp_path / "moved" / "000.png").unlink()
    one_sentence(
        lambda: train_unet(config(made, tmp_path / "run", max_steps=3, **moved)), TrainingError,
        "holds another run: its class images was different",
    )  # fmt: skip


GOLDEN = {"whole": [2.12339, 2.23416, 1.73359], "lora": [2.12339, 2.39181, 1.80874]}
KINDS: dict[str, dict[str, Any]] = {"whole": {}, "lora": {"lora_rank": 2, "train_text_encoder": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_golden_losses(made: Path, tmp_path: Path, kind: str) -> None:
    """Losses of three steps in float32 on one thread, to 1e-3. A change in them is a change in what is learned."""
    given = KINDS[kind] | {"seed": 7, "batch_size": 2, "max_steps": 3, "augment": ("crop", "flip")}
    out = train_unet(config(made, tmp_path / "run", **given))
    found = [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]
    assert found == pytest.approx(GOLDEN[kind], rel=1e-3)


# Bad input

NAN, INF = float("nan"), float("inf")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": "photos"}, "data and instance_data are two ways to say what to train on; leave one of them out"),
    ({"instance_data": None}, "data must be given (--data), or instance_data (--instance-data), to train on"),
    ({"instance_data": None, "data": "photos"}, "instance_prompt belongs to DreamBooth; give instance_data"),
    ({"instance_data": None, "data": "photos", "instance_prompt": None}, "class_data belongs to DreamBooth"),
    ({"instance_data": 3}, "instance_data must be a path or a name, not 3"),
    ({"instance_data": ""}, "instance_data must be a path or a name, not ''"),
    ({"class_data": 3}, "class_data must be a path or a name, not 3"),
    ({"instance_prompt": "  "}, "instance_prompt must be a text of at least one word, not '  '"),
    ({"instance_prompt": 3}, "instance_prompt must be a text of at least one word, not 3"),
    ({"class_prompt": ""}, "class_prompt must be a text of at least one word, not ''"),
    ({"class_prompt": None}, "class_data needs class_prompt, the caption of the class images; give it, too"),
    ({"class_prompt": None, "class_data": None, "class_count": 5}, "class_count needs class_prompt"),
    ({"class_prompt": None, "class_data": None, "prior_weight": 0.5}, "prior_weight belongs to class images"),
    ({"class_prompt": INSTANCE + " "}, "instance_prompt and class_prompt are both 'a sks disc', and the class would"),
    ({"prior_weight": 0}, "at prior_weight 0 the class images serve for nothing; leave class_prompt out"),
    ({"prior_weight": -1}, "prior_weight must be a number of at least 0, not -1"),
    ({"prior_weight": NAN}, "prior_weight must be a number of at least 0, not nan"),
    ({"prior_weight": INF}, "prior_weight must be a number of at least 0, not inf"),
    ({"prior_weight": "1"}, "prior_weight must be a number of at least 0, not '1'"),
    ({"class_count": 0}, "class_count must be a whole number of at least 1, not 0"),
    ({"class_count": 2.5}, "class_count must be a whole number of at least 1, not 2.5"),
    ({"default_caption": "a disc"}, "instance_prompt is the caption of all images; leave default_caption out"),
    ({"caption_column": "text"}, "instance_prompt is the caption of all images; leave caption_column out"),
    ({"init": "unet"}, "a network made from init= knows no class to preserve; leave class_prompt out"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=str)
def test_bad_settings(made: Path, change: dict[str, Any], sentence: str) -> None:
    one_sentence(lambda: config(made, made / "unused", **change), ArgumentError, sentence)


def test_bad_data(made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cases: list[tuple[dict[str, Any], type[SdkitError], str]] = [
        ({"instance_data": tmp_path / "empty"}, DataError, "there is no image"),
        ({"class_data": tmp_path / "empty"}, DataError, "there is no image"),
        ({"class_data": tmp_path / "none"}, DataError, "none"),
        ({"instance_prompt": None}, DataError, "has a caption; say what the object is called (instance_prompt)"),
        ({"instance_data": made / "cache"}, ArgumentError, "instance_data is a latent cache, which DreamBooth cannot"),
        ({"class_data": made / "cache"}, ArgumentError, "class_data is a latent cache, which DreamBooth cannot read"),
        ({"class_data": made / "object"}, ArgumentError, "instance_data and class_data are the same"),
        ({"out_dir": made / "object" / "run"}, ArgumentError, "lies in instance_data"),
        ({"out_dir": made / "class" / "run"}, ArgumentError, "lies in class_data"),
    ]
    for change, kind, sentence in cases:
        given = {"out_dir": tmp_path / "run"} | change
        one_sentence(lambda given=given: UNetStage(config(made, made / "unused", **given)), kind, sentence)  # type: ignore[misc]
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdkit.cli import main

    given = ["train", "unet", "--model", made / "model", "--instance-data", made / "object", "--size", tiny.SIZE]
    given += ["--instance-prompt", INSTANCE, "--class-prompt", CLASS, "--out-dir", tmp_path / "run", "--max-steps", 1]
    command = [*given, "--class-count", 2, "--prior-weight", 0.5, "--lora-rank", 2]
    assert main([str(one) for one in command]) == 0
    assert (tmp_path / "run" / "result" / "pytorch_lora_weights.safetensors").exists()
    assert len(drawn(tmp_path / "run")) == 2
    again = ["train", "unet", "--config", tmp_path / "run" / "config.json", "--max-steps", 2]
    assert main([str(one) for one in again]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (settings["data"], settings["prior_weight"], settings["class_count"]) == ("", 0.5, 2)
    capsys.readouterr()
    for more, sentence in (
        (["--data", made / "class"], "data and instance_data are two ways"),
        (["--class-data", tmp_path / "none"], "is neither a path that exists nor the id of a data set"),
        (["--prior-weight", "nan"], "prior_weight must be a number of at least 0"),
    ):
        assert main([str(one) for one in [*given, *more]]) == 2
        assert sentence in capsys.readouterr().err
