"""Complete runs of the real stages: killed at any point and resumed, and in two processes compared with one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdkit.data import cache
from sdkit.networks.autoencoder import latents_of
from sdkit.training.checkpoint import checkpoints, newest
from sdkit.training.loop import fit
from sdkit.training.stages.unet import UNetStage
from tests.helpers import classes, clip, forks, tiny, unclip
from tests.helpers import runs as helper
from tests.helpers.runs import everything, files, metrics

# Of 23 images one is broken and one is held out. Epochs have 22 samples, and a step takes 4.
RUN: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_every": 2,
    "keep_checkpoints": 1,
    "validate_every": 4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "learning_rate": 1e-3,
    "size": tiny.SIZE,
    "augment": ("crop", "flip"),
    "seed": 7,
}
BROKEN = "005.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, a copy of it with dropout, images, a cache of them, and random weights for LPIPS."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.vq_model(folder / "vq")
    tiny.photos(folder / "photos", 23)
    for path in (folder / "photos").glob("*.png"):  # wider than high, so that there is something to crop
        Image.open(path).resize((48, 40)).save(path)
    (folder / "photos" / "007.txt").write_text(" ".join(["a red disc beside a blue one"] * 8))  # two chunks of tokens
    (folder / "photos" / BROKEN).write_bytes((folder / "photos" / BROKEN).read_bytes()[:60])
    weights = folder / "model" / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    # Raise the contrast: with flat pictures, normalisation would amplify rounding errors.
    tensors["decoder.conv_out.weight"] *= 10
    save_file(tensors, weights, {"format": "pt"})
    shutil.copytree(folder / "model", folder / "dropout")
    for part, entry in (("unet", "dropout"), ("text_encoder", "attention_dropout")):
        path = folder / "dropout" / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {entry: 0.2}))
    cache(
        folder / "model", folder / "photos", folder / "cache",
        size=tiny.SIZE, crop="random", flip=True, augmentations=2, dtype="fp32", device="cpu",
    )  # fmt: skip
    helper.lpips_weights(folder / "lpips.safetensors")
    for path in (folder / "photos").glob("*.png"):  # classes: the colours that captions name, in folders
        kind = folder / "kinds" / path.with_suffix(".txt").read_text().split()[1]
        kind.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kind)
    (folder / "classifier.json").write_text(json.dumps(tiny.CLASSIFIER))
    (folder / "maps").mkdir()
    for path in (folder / "photos").glob("*.png"):  # conditions: colours that differ from image to image
        Image.new("RGB", (48, 40), (7 * int(path.stem), 90, 200)).save(folder / "maps" / path.name)
    clip.save_config(folder / "clip.json")
    clip.save_clip(folder / "clip", projection=32)
    unclip.save_prior_config(folder / "prior.json", embedding_dim=32)
    # Few timesteps, so that each has ten losses early, and timesteps are drawn by importance.
    classes.init(folder / "classes", timesteps=2, out_channels=6, num_class_embeds=6)
    return folder


@pytest.fixture(scope="module")
def run() -> helper.Runs:
    return helper.Runs()


def settings(made: Path, kind: str, out: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Return stage and settings of a kind of run: "vae", "controlnet", "dreambooth", "embedding", "prior", "pixelcnn",
    "vqvae2", "classes", "clip", "image_prior", "classifier", "upsampler", "muon" (a U-Net with that optimizer),
    "unet", or "lora". The last two can be followed by " from a cache".
    A U-Net that is trained from images also reads conditions, and a VAE's input is corrupted.
    """
    own: dict[str, Any] = {
        "vae": {
            "disc_weight": 0.5, "disc_start": 3, "train_encoder": True, "lpips_weight": 0.0,
            "input_noise": 0.1, "mask_ratio": 0.25,
        },
        "unet": {"caption_dropout": 0.3, "snr_gamma": 5.0, "noise_offset": 0.1, "validation_prompts": ("a red disc",)},
        "lora": {
            "caption_dropout": 0.3,
            "lora_rank": 2,
            "train_text_encoder": True,
            "lora_alpha": 3.0,
            "lora_dropout": 0.2,
            "lora_rank_stabilized": True,
            "lora_targets": ("attention", "feed_forward", "conv1"),
        },
        "controlnet": {"condition": "grey", "caption_dropout": 0.3, "validation_prompts": ("a red disc",)},
        "dreambooth": {
            "data": "",
            "instance_data": made / "photos",
            "class_prompt": "a disc",
            "class_count": 3,
            "lora_rank": 2,
        },
        "classes": {
            "init": made / "classes", "vae": "pixels", "loss": "hybrid", "timestep_sampling": "importance",
            "caption_dropout": 0.3, "bits_per_dimension": 2, "size": 8,
            "seed": 2,  # each timestep has its ten losses after five steps
        },
        "embedding": {
            "token": "<zork>", "init_token": "apple", "vectors": 2, "keep_norm": True, "ema_decay": 0.9,
            "validation_prompts": ("a red <zork>",),
        },
        "prior": {
            "vae": made / "vq", "conditioned_on": "text", "condition_dropout": 0.3, "layers": 2, "width": 16,
            "heads": 2,
        },
        "pixelcnn": {
            "vae": made / "vq", "kind": "pixelcnn", "conditioned_on": "map", "conditioning_data": made / "maps",
            "layers": 2, "width": 8,
        },
        "clip": {"init": made / "clip.json", "size": None},
        "image_prior": {"init": made / "prior.json", "size": None, "augment": (), "caption_dropout": 0.3},
        "classifier": {"data": made / "kinds", "init": made / "classifier.json"},
        "upsampler": {"upscale_factor": 8, "caption_dropout": 0.3, "validation_prompts": ("a red disc",)},
        "vqvae2": {"width": 8, "latent_channels": 4, "codes": 8},
        "muon": {"optimizer": "muon", "train_text_encoder": True, "caption_dropout": 0.3},
    }[kind.split()[0]]  # fmt: skip
    if kind == "unet":
        own |= {"conditioning_data": made / "maps", "condition_kind": "map", "condition_dropout": 0.3}
    if kind == "image_prior":
        changes["model"] = made / "clip"
    data = made / ("cache" if "cache" in kind else "photos")
    common = RUN | {"model": made / "dropout", "data": data, "out_dir": out}
    stage = "prior" if kind == "pixelcnn" else kind
    return stage if stage in helper.STAGES else "unet", common | own | changes


@pytest.fixture(scope="module")
def uninterrupted(made: Path, run: helper.Runs) -> Callable[[str], dict[str, Any]]:
    @functools.cache
    def train(kind: str) -> dict[str, Any]:
        stage, config = settings(made, kind, made / "uninterrupted" / kind)
        assert run(stage, config) == 0
        return everything(config["out_dir"])

    return train


# Interrupting and resuming

# Points at which a run is killed, and the step of the newest checkpoint at that time; 0 if there is none.
POINTS = {
    "os.rename:config.json 1": 0,  # before anything is written
    "batch 3": 0,  # while examples are loaded
    "loss 6": 2,  # among the micro-batches of a step
    "discriminator_loss 3": 4,
    "update 3": 2,  # between the optimizer's step and the average's update
    "validate 2": 4,
    "os.rename:samples 2": 4,  # a picture is written, but not renamed yet
    "os.mkdir:checkpoints/.sdkit- 2": 2,  # a checkpoint has been begun
    "half 8": 2,  # one of its files is half written
    "os.rename:checkpoints/step- 2": 2,  # it is complete, but not renamed yet
    "os.rename:checkpoints/step- 3": 4,  # it is in place beside the old one
    "os.remove:.safetensors 2": 4,  # the old one is partly removed
    "export 1": 8,
    "os.rename:result 1": 8,  # the result is complete, but not renamed yet
}
CACHE = " from a cache"
KILLS = [
    ("vae", point) for point in POINTS if point not in ("os.rename:config.json 1", "os.mkdir:checkpoints/.sdkit- 2")
]
# The loop is the same for a whole U-Net and for a LoRA, so that most points are tested with one of them, in turn. What
# they save differs, and only the first has prompts to draw.
for i, point in enumerate(point for point in POINTS if "discriminator" not in point):
    one = "unet" if i % 2 == 0 or "samples" in point else "lora"
    kinds = ("unet", "lora") if point in ("half 8", "export 1") else (one,)
    KILLS += [(kind + CACHE * (i % 4 > 1), point) for kind in kinds]
POINTS["os.rename:class_images 2"] = 0  # an image of DreamBooth's class is written, but not renamed yet
KILLS += [("dreambooth", point) for point in ("os.rename:class_images 2", "loss 6", "half 8")]
for kind in ("prior", "clip", "image_prior"):
    KILLS += [(kind, point) for point in ("loss 6", "update 3", "half 8", "export 1")]
POINTS["os.rename:embeddings 1"] = 0  # the embeddings of all images are written, but not renamed yet
KILLS += [("image_prior", "os.rename:embeddings 1"), ("vqvae2", "update 3")]
KILLS += [
    ("classifier", point)
    for point in ("batch 3", "loss 6", "update 3", "half 8", "os.rename:checkpoints/step- 2", "export 1")
]
KILLS += [("muon", point) for point in ("update 3", "half 8")]
# The losses of timesteps are in the checkpoint.
KILLS += [("classes", point) for point in ("loss 14", "half 8")]
POINTS["loss 14"] = 6


@pytest.mark.parametrize(("kind", "point"), KILLS)
def test_a_killed_run_ends_as_one_never_stopped_to_the_bit(
    kind: str, point: str, made: Path, run: helper.Runs, uninterrupted: Any, tmp_path: Path
) -> None:
    """Guards against common defects: resuming raises, starts the epoch again, or uses a partial checkpoint."""
    stage, config = settings(made, kind, tmp_path / "run")
    assert run(stage, config, f"SIGKILL {point}") == -signal.SIGKILL
    last = newest(tmp_path / "run" / "checkpoints")
    assert (int(last.name[5:]) if last else 0) == POINTS[point]
    assert not (tmp_path / "run" / "result").exists()
    assert run(stage, config) == 0
    again, whole = everything(tmp_path / "run"), uninterrupted(kind)
    for what in whole:
        assert again[what] == whole[what], what
    assert not [*tmp_path.rglob(".sdkit-*")]


def test_what_the_runs_above_go_through(made: Path, uninterrupted: Any) -> None:
    """The runs above must exercise what they test: each network moves, dropout is active, and the broken image is
    skipped.
    """
    names = {"vae": {"vae", "discriminator"}, "unet": {"unet"}, "lora": {"unet"}}
    for kind in ("vae", "unet", "unet from a cache", "lora", "lora from a cache"):
        found = uninterrupted(kind)
        kept = {path.split("/")[1].split(".")[0] for path in found["checkpoints"]}
        assert kept - {"manifest", "state"} == {"rng", *names[kind.split()[0]]}
        assert {path.split("/")[0] for path in found["checkpoints"]} == {"step-00000008"}
        assert [line["step"] for line in found["metrics"] if "validation/seconds" in line or "loss" not in line] == [
            0,
            4,
            8,
        ]
        assert [*found["skipped"]] == [BROKEN]
    assert {len(found["samples"]) for kind in ("vae", "unet") for found in [uninterrupted(kind)]} == {3}


def test_timesteps_are_drawn_by_importance_in_the_runs(made: Path, uninterrupted: Any, launched: Path) -> None:
    """Each timestep has its ten losses before the last step, on one process and on two."""
    uninterrupted("classes")
    for run in (made / "uninterrupted" / "classes", launched / "classes"):
        folder = checkpoints(run / "checkpoints")[0]
        counts = load_file(folder / "unet.safetensors")["timesteps.counts"]
        assert counts.tolist() == [10, 10]


@pytest.mark.parametrize("kind", ["vae", "unet", "lora from a cache"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    kind: str, made: Path, run: helper.Runs, uninterrupted: Any, tmp_path: Path
) -> None:
    stage, config = settings(made, kind, tmp_path / "run")
    assert run(stage, config, "FSIZE loss 6") == 2
    assert "checkpoints/step-00000004: " in run.said(config)
    assert run.said(config).endswith("what was there before is untouched, so make room and run again.")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert run(stage, config) == 0
    again, whole = everything(tmp_path / "run"), uninterrupted(kind)
    assert again == whole


@pytest.mark.parametrize("kind", ["vae", "unet", "lora from a cache"])
def test_a_disk_that_fills_up_at_the_result_leaves_none(
    kind: str, made: Path, run: helper.Runs, uninterrupted: Any, tmp_path: Path
) -> None:
    stage, config = settings(made, kind, tmp_path / "run")
    assert run(stage, config, "FSIZE export 1") == 2
    assert "run/result" in run.said(config)
    assert "make room" in run.said(config)
    assert not (tmp_path / "run" / "result").exists()
    assert not [*tmp_path.rglob(".sdkit-*")]
    assert run(stage, config) == 0
    assert everything(tmp_path / "run") == uninterrupted(kind)


def test_a_damaged_newest_checkpoint_is_passed_over(
    made: Path, run: helper.Runs, uninterrupted: Any, tmp_path: Path
) -> None:
    stage, config = settings(made, "unet from a cache", tmp_path / "run", keep_checkpoints=2)
    assert run(stage, config, "SIGKILL loss 14") == -signal.SIGKILL
    damaged, before = checkpoints(tmp_path / "run" / "checkpoints")
    os.truncate(damaged / "unet.optimizer.safetensors", 1000)
    with pytest.warns(
        UserWarning, match=rf"{damaged} is damaged \(the checksum of unet.optimizer.safetensors is wrong"
    ):
        assert newest(tmp_path / "run" / "checkpoints") == before
    assert run(stage, config | {"keep_checkpoints": 1}) == 0
    assert everything(tmp_path / "run") == uninterrupted("unet from a cache")


def test_two_runs_in_one_folder_at_once_are_refused(made: Path, run: helper.Runs, tmp_path: Path) -> None:
    stage, config = settings(made, "unet from a cache", tmp_path / "run")
    assert run(stage, config, "SIGSTOP loss 6") == -signal.SIGSTOP
    stopped, before = run.process, files(tmp_path / "run")
    try:
        assert run(stage, config) == 2
        assert run.said(config) == (
            f"another process trains in {tmp_path / 'run'}; wait for it, or name another out_dir."
        )
        assert files(tmp_path / "run") == before
    finally:
        os.kill(stopped, signal.SIGKILL)
    assert run(stage, config) == 0  # a killed process holds no lock


# Several processes


@pytest.fixture(scope="module")
def launched(made: Path) -> Path:
    """Launch two processes, which train several runs one after another."""
    folder = made / "launched"
    wanted = [together(made, kind, folder / kind) for kind in TOGETHER]
    for out, steps in (("whole", STEPS), ("parts", 3), ("parts", STEPS)):
        changes: dict[str, Any] = {
            "model": made / "dropout",
            "lr_scheduler": "constant",
            "lr_warmup_steps": 0,
            "max_steps": steps,
        }
        wanted.append(together(made, "lora from a cache", folder / out, keep_checkpoints=1, **changes))
    folder.mkdir()
    scenarios = [{"stage": stage, "settings": config} for stage, config in wanted]
    ended = forks.launch(helper.launched, scenarios)
    assert ended.codes == [0, 0], ended.err
    return folder


STEPS, DISC_START = 6, 4
TOGETHER: dict[str, dict[str, Any]] = {
    # The discriminator starts late. While both sides of the hinge loss are within their margins, its gradients nearly
    # cancel, and AdamW turns the remaining rounding errors into full steps.
    "vae": {"disc_start": DISC_START, "lpips_weight": 0.1, "learning_rate": 3e-5},
    "unet": {},
    "lora from a cache": {"lora_dropout": 0.0},
    "controlnet": {},
    "dreambooth": {},
    "embedding": {},
    "prior": {},
    "pixelcnn": {},
    "clip": {},
    "image_prior": {},
    # The biases of attention's keys change nothing, and AdamW turns their rounding errors into full steps.
    "classifier": {"learning_rate": 1e-4},
    "upsampler": {},
    # So it does with other gradients that are nearly 0. The codes follow moving averages, whatever the rate.
    "vqvae2": {"learning_rate": 1e-5},
    "classes": {"learning_rate": 1e-4},
    "muon": {"learning_rate": 3e-5},  # it raises small singular values, and with them rounding errors
}
PLAYERS = {
    "vae": ["vae", "discriminator"], "controlnet": ["controlnet"], "embedding": ["embedding"], "prior": ["prior"],
    "pixelcnn": ["prior"], "clip": ["clip"], "image_prior": ["prior"], "classifier": ["classifier"],
    "vqvae2": ["vqvae2"],
}  # fmt: skip
"""Kind of run -> its players; that of the others is the U-Net."""
WITHOUT_PICTURES = (
    "lora from a cache", "dreambooth", "prior", "pixelcnn", "clip", "image_prior", "classifier", "classes",
    "muon",
)  # fmt: skip


def together(made: Path, kind: str, out: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """Return stage and settings without dropout, because dropout differs between processes."""
    own = {"model": made / "model", "max_steps": STEPS, "validate_every": 2, "gradient_accumulation_steps": 1}
    own |= {"lr_scheduler": "linear", "keep_checkpoints": STEPS} | TOGETHER[kind] | changes
    return settings(made, kind, out, **own | ({"lpips": made / "lpips.safetensors"} if kind == "vae" else {}))


def at(out: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint, without biases of keys: attention does not see them, so that their gradients
    are rounding errors, which AdamW turns into full steps.
    """
    found = load_file(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors")
    return {key: value for key, value in found.items() if not key.endswith(("k_proj.bias", "to_k.bias"))}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@pytest.mark.parametrize("split", [{"batch_size": 4}, {"batch_size": 2, "gradient_accumulation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", TOGETHER)
def test_two_processes_train_as_one(
    kind: str, split: dict[str, int], made: Path, run: helper.Runs, launched: Path, tmp_path: Path
) -> None:
    """Losses, validation, and weights must agree to 1e-5. Guards against common defects: data that is not sharded, the
    same noise on each process, a learning-rate schedule stepped once per process, networks called without DDP's
    wrapper, and validation on one process.

    With accumulation, VQGAN's adaptive weight differs between micro-batches. The VAE is therefore compared up to the
    step at which the discriminator starts. A CLIP contrasts the pairs of one micro-batch on all processes, so only a
    single process with a micro-batch of that many is the same.
    """
    if kind == "clip":
        split = {"batch_size": 4}
    stage, config = together(made, kind, tmp_path / "run", **split)
    assert run(stage, config) == 0
    end = DISC_START if kind == "vae" and len(split) > 1 else STEPS
    many, one = ([line for line in metrics(out) if line["step"] <= end] for out in (launched / kind, tmp_path / "run"))
    assert [line.keys() for line in many] == [line.keys() for line in one]
    for left, right in zip(many, one, strict=True):
        assert left == pytest.approx(right, abs=1e-5, rel=1e-5)
    first, *others = PLAYERS.get(kind, ["unet"])
    for name in (first, f"{first}.ema", *others):
        weights = at(launched / kind, end, name)
        assert difference(weights, at(tmp_path / "run", end, name)) < 1e-5
        assert name == "discriminator" or difference(weights, at(launched / kind, 2, name)) > 5e-5
    skipped = [json.loads((out / "skipped.json").read_text()) for out in (launched / kind, tmp_path / "run")]
    assert skipped[0] == skipped[1] != {}
    pictures = [*(launched / kind / "samples").glob(f"step-{end:08d}.png")]
    assert pictures or kind in WITHOUT_PICTURES
    for drawn in pictures:
        levels = [np.asarray(Image.open(path), float) for path in (drawn, tmp_path / "run" / "samples" / drawn.name)]
        assert np.abs(levels[0] - levels[1]).max() <= 1
    assert files(launched / kind / "class_images") == files(tmp_path / "run" / "class_images")


@pytest.mark.parametrize("kind", TOGETHER)
def test_every_process_has_the_same_networks(kind: str, launched: Path) -> None:
    """Guards against a common defect: encode and decode called on the unwrapped model, so that the ranks
    drift apart.
    """
    zero, one = (load_file(launched / kind / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert {name.split("/")[0] for name in zero} == {*PLAYERS.get(kind, ["unet"])}
    assert difference(zero, one) == 0


@pytest.mark.parametrize("kind", TOGETHER)
def test_processes_share_the_data_and_one_writes(kind: str, launched: Path) -> None:
    """Guards against common defects: data that is not sharded, and every process writing the same file."""
    zero, one = (json.loads((launched / kind / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    numbers = sorted(n for n, _ in zero["samples"] + one["samples"])
    assert numbers == list(range(4 * STEPS))
    drawn = ["class_images"] if kind == "dreambooth" else []  # the work of both processes
    assert one["wrote"] == drawn
    embedded = ["embeddings.safetensors"] if kind == "image_prior" else []
    pictures = [] if kind in WITHOUT_PICTURES else ["samples"]
    written = ["checkpoints", *drawn, "config.json", *embedded, "metrics.jsonl", "result", *pictures, "skipped.json"]
    assert [name for name in zero["wrote"] if not name.startswith(".sdkit")] == written


def test_two_processes_go_on_as_if_never_stopped(launched: Path) -> None:
    """Guards against a common defect: only the first process's random state is saved."""
    parts, whole = everything(launched / "parts"), everything(launched / "whole")
    assert parts["checkpoints"] == whole["checkpoints"]
    assert parts["result"] == whole["result"]
    assert [line for line in parts["metrics"] if "loss" in line] == [
        line for line in whole["metrics"] if "loss" in line
    ]


# Two more defects that are common elsewhere


def test_nothing_frozen_is_computed_twice(made: Path, tmp_path: Path) -> None:
    """Guards against a common defect: the frozen VAE and text encoder run at every step."""
    _, config = settings(made, "unet from a cache", tmp_path / "run", validation_prompts=(), batch_size=4)
    stage = UNetStage(helper.config_of("unet", config))
    called: list[str] = []
    for name, network in (("vae", stage.vae.network.encoder), ("text", stage.text.network)):
        network.register_forward_hook(lambda *_, name=name: called.append(name))
    fit(stage, stage.config, tmp_path / "run")
    captions = {path.read_text() for path in (made / "photos").glob("*.txt")}
    # The empty caption counts too. Each is encoded up to twice, because it is padded to two chunks beside a longer one.
    # The run has 64 samples and 3 validations.
    assert len(captions) < called.count("text") <= 2 * (len(captions) + 1) == 12
    assert "vae" not in called


def test_a_cached_latent_is_drawn_anew_each_time(made: Path, tmp_path: Path) -> None:
    """Guards against a common defect: the cache holds one sample of the posterior in place of its moments."""
    _, config = settings(made, "unet from a cache", tmp_path / "run")
    stage = UNetStage(helper.config_of("unet", config))
    batch = stage.batch([(n, 3) for n in range(200)])  # one example, in many steps
    z = latents_of(batch["mean"], batch["logvar"], batch["posterior_eps"], 1.0, 0.0)
    deviation = torch.exp(batch["logvar"][0] / 2)
    assert float(deviation.min()) > 0.1
    assert torch.allclose(z.mean(0), batch["mean"][0], atol=float(0.3 * deviation.max()))
    assert torch.allclose(z.std(0), deviation, rtol=0.25)
