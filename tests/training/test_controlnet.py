"""Training a ControlNet: the loss against diffusers, gradients, conditions, runs that are killed, and the result."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file

import sdkit
from sdkit.data.latent_cache.manifest import Manifest
from sdkit.data.transform import Transform, draw
from sdkit.errors import DataError, SdkitError
from sdkit.files import sha256
from sdkit.images import to_pil, to_tensors
from sdkit.images.conditions import CONDITIONS
from sdkit.training import ControlNetConfig, settings, train_controlnet
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.controlnet import ControlNetStage
from tests.helpers import runs as helper
from tests.helpers import tiny

pytest.importorskip("datasets")

BATCH = [(n, n) for n in range(4)]
LONG = "red apple blue cat " * 12  # 48 tokens, which take 2 chunks


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, images, inverted copies of them as conditions, and the same pairs in a parquet file."""
    import datasets

    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 23)
    (folder / "photos" / "001.txt").write_text(LONG)
    (folder / "maps").mkdir()
    rows: dict[str, list[Any]] = {"image": [], "conditioning_image": [], "text": []}
    for path in sorted((folder / "photos").glob("*.png")):
        image = sdkit.images.read(path).resize((48, 40))  # wider than high, so that there is something to crop
        image.save(path)
        ImageOps.invert(image).save(folder / "maps" / f"{path.stem}.webp", lossless=True)
        rows["image"].append(str(path))
        rows["conditioning_image"].append(str(folder / "maps" / f"{path.stem}.webp"))
        rows["text"].append(path.with_suffix(".txt").read_text())
    images = {name: datasets.Image() for name in ("image", "conditioning_image")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({**images, "text": datasets.Value("string")}))
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "a.parquet")
    return folder


def config(made: Path, **changes: Any) -> ControlNetConfig:
    own: dict[str, Any] = {
        "model": made / "model", "data": made / "photos", "conditioning_data": made / "maps",
        "out_dir": made / "unused", "size": tiny.SIZE, "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3,
        "ema_decay": 0.0,
    }  # fmt: skip
    if "condition" in changes or changes.get("data") == made / "table":
        del own["conditioning_data"]
    return ControlNetConfig(**own | changes)


def with_weights(stage: ControlNetStage) -> ControlNetStage:
    """Give the zero convolutions of a stage random weights."""
    torch.manual_seed(1)
    network = stage.controlnet.network
    for head in (network.controlnet_down_blocks, network.controlnet_mid_block, network.controlnet_cond_embedding):
        for p in head.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return stage


def test_settings_name_the_conditions_that_can_be_made() -> None:
    assert (*CONDITIONS,) == settings.CONDITIONS


def test_loss_is_that_of_diffusers_networks(made: Path) -> None:
    """As in diffusers' train_controlnet.py. One caption has two chunks, which diffusers would take alone."""
    stage = with_weights(ControlNetStage(config(made, caption_dropout=0.0, augment=("crop", "flip"))))
    batch = stage.batch(BATCH)
    assert batch["mask"] is not None
    found, parts = stage.loss({"controlnet": stage.denoiser}, batch, 0)
    assert parts == {}
    vae = AutoencoderKL.from_pretrained(made / "model" / "vae")
    unet = UNet2DConditionModel.from_pretrained(made / "model" / "unet")
    scheduler = DDPMScheduler.from_pretrained(made / "model" / "scheduler")
    losses = []
    for i in range(len(BATCH)):
        posterior = vae.encode(batch["pixels"][i : i + 1]).latent_dist
        x0 = (posterior.mean + posterior.std * batch["posterior_eps"][i]) * vae.config.scaling_factor
        eps, t = batch["eps"][i : i + 1], torch.tensor([batch["t"][i]])
        x_t = scheduler.add_noise(x0, eps, t)
        text = stage.encoder.captions(batch)[i : i + 1]
        text = text[:, batch["mask"][i]]
        condition = batch["condition"][i : i + 1]
        down, mid = stage.controlnet.network(x_t, t, text, condition, return_dict=False)
        output = unet(x_t, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
        losses.append((output - eps).square().mean())
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def test_half_of_the_captions_are_dropped(made: Path) -> None:
    """Zhang et al. 2023, section 3.4."""
    stage = ControlNetStage(config(made))
    empty = stage.examples.empty["ids"]
    dropped = [torch.equal(stage.batch([(n, 0)])["ids"][0], empty) for n in range(64)]
    assert 20 < sum(dropped) < 44


def test_begins_as_the_model_and_only_zero_convolutions_move_first(made: Path) -> None:
    """Zhang et al. 2023, section 3.1: before the first step the outputs are the model's own, and only the weights of
    the zero convolutions have a gradient."""
    stage = ControlNetStage(config(made))
    batch = stage.batch(BATCH)
    x_t, t, cond = batch["eps"], torch.tensor(batch["t"]), stage.encoder.conditioning(batch)
    with torch.no_grad():
        assert torch.equal(stage.denoiser(x_t, t, cond, batch["condition"]), stage.unet(x_t, t, cond))
    assert not any(p.requires_grad for part in (stage.unet, stage.vae, stage.text) for p in part.parameters())
    loss, _ = stage.loss({"controlnet": stage.denoiser}, batch, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    moves = {name for name, p in stage.controlnet.network.named_parameters() if float(p.grad.abs().max()) > 0}
    assert moves == {
        name
        for name, _ in stage.controlnet.network.named_parameters()
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block"))
    }
    stage = with_weights(stage)
    loss, _ = stage.loss({"controlnet": stage.denoiser}, batch, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(float(p.grad.abs().max()) > 0 for p in stage.controlnet.network.parameters())
    assert all(p.grad is None for p in stage.unet.parameters())
    copied = stage.controlnet.network.conv_in.weight
    assert torch.equal(copied, stage.unet.network.conv_in.weight)
    assert copied.data_ptr() != stage.unet.network.conv_in.weight.data_ptr()


class TestConditions:
    def test_are_cropped_and_mirrored_like_their_images(self, made: Path) -> None:
        """The conditions are the inverted images, so that any other crop or flip would show."""
        stage = ControlNetStage(config(made, augment=("crop", "flip")))
        rows = [stage.examples.load(item, epoch) for item in range(6) for epoch in range(3)]
        rows += [stage.examples.validation(0)]
        for row in rows:
            assert row["condition"].shape == row["pixels"].shape == (3, tiny.SIZE, tiny.SIZE)
            torch.testing.assert_close(row["condition"], 1 - (row["pixels"] + 1) / 2, atol=2 / 255, rtol=0)
        views = {tuple(stage.examples.load(0, epoch)["pixels"].flatten().tolist()) for epoch in range(8)}
        assert len(views) > 3

    def test_from_a_column_are_those_from_a_folder(self, made: Path) -> None:
        folder = ControlNetStage(config(made, augment=("crop",)))
        table = ControlNetStage(config(made, augment=("crop",), data=made / "table"))
        for name in ("pixels", "condition"):
            assert torch.equal(folder.batch(BATCH)[name], table.batch(BATCH)[name])

    @pytest.mark.parametrize("name", CONDITIONS)
    def test_are_made_of_the_crop(self, made: Path, name: str) -> None:
        stage = ControlNetStage(config(made, condition=name, augment=("flip",)))
        row = stage.examples.load(3, 1)
        (expected,) = to_tensors(CONDITIONS[name](to_pil(row["pixels"])[0]))
        torch.testing.assert_close(row["condition"], (expected + 1) / 2)
        assert 0 <= float(row["condition"].min()) < float(row["condition"].max()) <= 1

    def test_of_a_smaller_size_serve(self, made: Path, tmp_path: Path) -> None:
        for path in (made / "maps").iterdir():
            sdkit.images.read(path).resize((24, 20)).save(tmp_path / f"{path.stem}.png")
        row = ControlNetStage(config(made, conditioning_data=tmp_path)).examples.load(0, 0)
        assert float((row["condition"] - 1 + (row["pixels"] + 1) / 2).abs().mean()) < 0.1

    def test_identity_covers_them(self, made: Path) -> None:
        identities = {
            ControlNetStage(config(made, **changes)).identity["data"]
            for changes in ({}, {"condition": "canny"}, {"condition": "grey"}, {"data": made / "table"})
        }
        assert len(identities) == 4


def test_result_loads_in_diffusers_and_in_sdkit(made: Path, tmp_path: Path) -> None:
    out = train_controlnet(config(made, out_dir=tmp_path / "run", validation_prompts=("a red disc",), max_steps=4))
    theirs = ControlNetModel.from_pretrained(out / "result")
    ours = sdkit.ControlNet.from_pretrained(out / "result", dtype="fp32", device="cpu")
    assert theirs.state_dict().keys() == ours.network.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.network.state_dict()[name])
    assert float(theirs.controlnet_mid_block.weight.detach().abs().max()) > 0  # trained
    assert len([*(out / "samples").iterdir()]) == 2
    losses = [line["validation/loss"] for line in read_metrics(out / "metrics.jsonl") if "validation/loss" in line]
    assert losses[-1] < losses[0]
    # It can be trained further.
    again = ControlNetStage(config(made, controlnet=out / "result"))
    assert torch.equal(again.controlnet.network.controlnet_mid_block.weight, theirs.controlnet_mid_block.weight)


# Runs that are killed

RUN: dict[str, Any] = {
    "max_steps": 6, "batch_size": 2, "gradient_accumulation_steps": 2, "save_every": 2, "keep_checkpoints": 1,
    "validate_every": 3, "lr_scheduler": "cosine", "learning_rate": 1e-3, "size": tiny.SIZE,
    "augment": ("crop", "flip"), "seed": 7, "ema_decay": 0.9,
}  # fmt: skip
POINTS = {
    "loss 6": 2,
    "update 3": 2,
    "half 8": 2,
    "export 1": 6,
}
"""Points at which a run is killed -> the step of the newest checkpoint at that time. test_runs.py has those of the
loop, which is the same for all stages."""


@pytest.fixture(scope="module")
def run() -> helper.Runs:
    return helper.Runs()


@pytest.fixture(scope="module")
def uninterrupted(made: Path, run: helper.Runs) -> Callable[[], dict[str, Any]]:
    @functools.cache
    def train() -> dict[str, Any]:
        given = settings_of(made, made / "uninterrupted")
        assert run("controlnet", given) == 0
        return helper.everything(made / "uninterrupted")

    return train


def settings_of(made: Path, out: Path, **changes: Any) -> dict[str, Any]:
    own = {"model": made / "model", "data": made / "photos", "conditioning_data": made / "maps", "out_dir": out}
    return RUN | own | {"validation_prompts": ("a red disc",)} | changes


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_run_ends_as_one_never_stopped_to_the_bit(
    point: str, made: Path, run: helper.Runs, uninterrupted: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    given = settings_of(made, tmp_path / "run")
    assert run("controlnet", given, f"SIGKILL {point}") == -signal.SIGKILL
    steps = [int(path.name[5:]) for path in (tmp_path / "run").glob("checkpoints/step-*")]
    assert max(steps, default=0) == POINTS[point]
    assert not (tmp_path / "run" / "result").exists()
    assert run("controlnet", given) == 0
    assert helper.everything(tmp_path / "run") == uninterrupted()


def test_other_conditions_are_other_data(made: Path, run: helper.Runs, tmp_path: Path) -> None:
    given = settings_of(made, tmp_path / "run", max_steps=1)
    assert run("controlnet", given) == 0
    for path in (made / "maps").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (48, 40)).save(tmp_path / "000.webp")
    other = tmp_path / "other"
    other.mkdir()
    for path in tmp_path.glob("*.webp"):
        path.rename(other / path.name)
    assert run("controlnet", given | {"conditioning_data": other, "max_steps": 2}) == 2
    assert "data" in run.said(given)


# Bad input

BAD: list[tuple[dict[str, Any], type[SdkitError], str]] = [
    ({"condition": "depth"}, sdkit.ArgumentError, "condition 'depth' is not one of 'canny', 'grey'"),
    ({"condition": "canny", "conditioning_data": "./x"}, sdkit.DataError, ".*x"),
    ({"init": "x"}, sdkit.ArgumentError, "init has no meaning for a ControlNet"),
    ({"condition": "canny", "conditioning_data": None, "conditioning_image_column": "x"}, sdkit.ArgumentError,
     "conditioning_image_column names conditions that are there, and condition makes them of the images; leave one"),
    ({"conditioning_image_column": "x"}, sdkit.ArgumentError,
     "conditioning_image_column: .*maps holds files, which have no columns; leave it out"),
    ({"conditioning_image_column": ""}, sdkit.ArgumentError, "conditioning_image_column must be a path or a name"),
    ({"conditioning_data": None}, sdkit.ArgumentError, ".*photos holds images without conditions: name the folder"),
    ({"prediction_type": "v"}, sdkit.ArgumentError, "a ControlNet is used with the model's own noise schedule, which "
     "prediction_type would change"),
    ({"zero_snr": True}, sdkit.ArgumentError, "a ControlNet is used with the model's own noise schedule, which zero"),
    ({"controlnet": "emoji"}, sdkit.SourceError, ".*controlnet"),
    ({"controlnet": "./none"}, sdkit.SourceError, "the path './none' does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(made: Path, change: dict[str, Any], kind: type[SdkitError], sentence: str) -> None:
    given = {"conditioning_data": made / "maps", **change} if change.get("condition") != "depth" else change
    with pytest.raises(kind, match=f"^{sentence}") as caught:
        ControlNetStage(config(made, **given))
    assert "\n" not in str(caught.value)


def test_an_image_without_a_condition(made: Path, tmp_path: Path) -> None:
    for path in sorted((made / "maps").iterdir())[3:]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(DataError, match=r"has no condition for 3 of 23 images, such as 000\.png; give each image one"):
        ControlNetStage(config(made, conditioning_data=tmp_path))
    (tmp_path / "004.png").write_bytes((tmp_path / "004.webp").read_bytes())
    with pytest.raises(DataError, match=r"has two conditions called 004; leave one of them"):
        ControlNetStage(config(made, conditioning_data=tmp_path))


def test_a_condition_of_other_proportions_is_skipped(made: Path, tmp_path: Path) -> None:
    for path in (made / "maps").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (48, 48)).save(tmp_path / "000.webp")
    stage = ControlNetStage(config(made, conditioning_data=tmp_path))
    with pytest.warns(UserWarning, match=r"^000.png is skipped: its condition has 48 x 48 pixels, the image 48 x 40"):
        first = stage.examples.load(0, 0)
    assert torch.equal(first["pixels"], stage.examples.load(1, 0)["pixels"])


def test_a_column_that_is_missing(made: Path) -> None:
    with pytest.raises(DataError, match=r"^conditioning_image_column: .* has no column 'edges'; it has image, cond"):
        ControlNetStage(config(made, data=made / "table", conditioning_image_column="edges"))


def test_a_controlnet_of_another_model(made: Path, tmp_path: Path) -> None:
    wide = tiny.networks((16, 16), unet={"block_out_channels": (16, 48), **tiny.TWO_LEVELS}).unet
    ControlNetModel.from_unet(wide).save_pretrained(tmp_path)
    with pytest.raises(sdkit.ArgumentError, match=r"^this ControlNet belongs to another model: its block_out_channels"):
        ControlNetStage(config(made, controlnet=tmp_path))


def test_a_model_that_also_pools_the_text(made: Path, tmp_path: Path) -> None:
    """The ControlNet pools with as many heads as the U-Net. When loaded, it computes what diffusers' does."""
    shutil.copytree(made / "model", tmp_path / "model")
    own = UNet2DConditionModel.load_config(tmp_path / "model" / "unet")
    pooling = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    torch.manual_seed(0)
    UNet2DConditionModel.from_config({**own, **pooling}).save_pretrained(tmp_path / "model" / "unet")
    settings = config(made, model=tmp_path / "model", out_dir=tmp_path / "run", max_steps=2, learning_rate=0.01)
    stage = with_weights(ControlNetStage(settings))
    text = torch.randn(4, 32, 16)
    embedding = (one.network.add_embedding(text) for one in (stage.controlnet, stage.unet))
    torch.testing.assert_close(*embedding, atol=0, rtol=0)
    result = train_controlnet(settings) / "result"
    loaded = sdkit.ControlNet.from_pretrained(result, dtype="fp32", device="cpu")
    x_t, image = torch.randn(4, 4, 4, 4), torch.rand(4, 3, 32, 32)
    found_down, found_mid = loaded(x_t, 500, sdkit.guidance.Conditioning(text), image)
    reference = ControlNetModel.from_pretrained(result)
    assert reference.config.addition_embed_type_num_heads == 2
    down, mid = reference(x_t, 500, text, image, return_dict=False)
    torch.testing.assert_close([*found_down, found_mid], [*down, mid], atol=1e-5, rtol=1e-5)
    sd = sdkit.StableDiffusion.from_pretrained(tmp_path / "model", dtype="fp32", device="cpu")
    drawing = {"num_inference_steps": 2, "control_image": sdkit.images.read(made / "maps" / "000.webp")}
    assert len(sd("a red disc", controlnet=loaded, height=32, width=32, **drawing)) == 1


@pytest.fixture(scope="module")
def cached(made: Path) -> Path:
    return sdkit.data.cache(made / "model", made / "photos", made / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")


class TestLatentCache:
    """A cache holds the latents; conditions are read beside it, and cropped like the cached images."""

    @pytest.mark.parametrize("changes", [{}, {"condition": "canny"}], ids=["read", "made"])
    def test_losses_are_those_from_images(self, made: Path, cached: Path, changes: dict[str, Any]) -> None:
        """Edges are made of the photos, which the cache lacks. Moments are stored in float16."""
        beside = {"conditioning_data": made / ("photos" if changes else "maps")}
        straight = with_weights(ControlNetStage(config(made, **changes, **({} if changes else beside))))
        stage = with_weights(ControlNetStage(config(made, data=cached, **changes, **beside)))
        assert stage.size == straight.size == 22
        for samples in (BATCH, [(n, n % 22) for n in range(20, 25)]):
            one, other = straight.batch(samples), stage.batch(samples)
            assert torch.equal(one["condition"], other["condition"])
            expected, _ = straight.loss({"controlnet": straight.denoiser}, one, 0)
            found, _ = stage.loss({"controlnet": stage.denoiser}, other, 0)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        with torch.no_grad():
            assert stage._validation_loss(0) == pytest.approx(straight._validation_loss(0), abs=1e-4)
        assert stage.identity["data"] != straight.identity["data"]
        seen = (stage.encoder.original(stage.examples.validation(0), torch.device("cpu")) + 1) / 2
        decoded = straight.vae.reconstruct([to_pil(straight.examples.validation(0)["pixels"])[0]], output_type="pt")
        torch.testing.assert_close(seen, (decoded[0] + 1) / 2, atol=0.01, rtol=0)

    def test_conditions_are_cropped_and_mirrored_like_their_images(self, made: Path, tmp_path: Path) -> None:
        """The conditions are the inverted images, of which the cache has three crops each."""
        sdkit.data.cache(
            made / "model", made / "photos", tmp_path / "cache", size=tiny.SIZE, crop="random", flip=True,
            augmentations=3, dtype="fp32", device="cpu", seed=5,
        )  # fmt: skip
        stage = ControlNetStage(config(made, data=tmp_path / "cache"))
        crops = Transform(size=(tiny.SIZE, tiny.SIZE), crop="random", flip=True)
        for item in range(0, 30, 4):
            (index,) = stage.examples.train[item : item + 1] // 3
            image = sdkit.images.read(made / "photos" / f"{index:03}.png")
            pixels = crops(image, draw(5, int(index), item % 3))
            condition = stage.examples.load(item, 0)["condition"]
            torch.testing.assert_close(condition, 1 - (pixels + 1) / 2, atol=2 / 255, rtol=0)

    def test_a_condition_that_cannot_be_used_is_skipped(self, made: Path, cached: Path, tmp_path: Path) -> None:
        for path in (made / "maps").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "000.webp").write_bytes(b"RIFF")
        stage = ControlNetStage(config(made, data=cached, conditioning_data=tmp_path))
        with pytest.warns(UserWarning, match=r"^000\.png is skipped: "):
            first = stage.examples.load(0, 0)
        assert torch.equal(first["mean"], stage.examples.load(1, 0)["mean"])
        assert torch.equal(first["condition"], stage.examples.load(1, 0)["condition"])
        assert stage.examples.skipped.keys() == {"000.png"}

    def test_conditions_of_other_sizes_and_proportions(self, made: Path, cached: Path, tmp_path: Path) -> None:
        """As from images: smaller ones are enlarged first, and those of other proportions are skipped."""
        for path in (made / "maps").iterdir():
            sdkit.images.read(path).resize((24, 20)).save(tmp_path / f"{path.stem}.png")
        Image.new("RGB", (48, 48)).save(tmp_path / "000.png")
        stages = [
            ControlNetStage(config(made, data=data, conditioning_data=tmp_path)) for data in (cached, made / "photos")
        ]
        for stage in stages:
            with pytest.warns(
                UserWarning,
                match=r"^000.png is skipped: its condition has 48 x 48 pixels, the image 48 x 40: they must",
            ):
                stage.examples.load(0, 0)
        for item in range(4):
            from_cache, from_images = (stage.examples.load(item, 0)["condition"] for stage in stages)
            assert torch.equal(from_cache, from_images)

    def test_caches_without_sizes_are_still_read(self, made: Path, cached: Path, tmp_path: Path) -> None:
        """Early versions wrote none; conditions of any proportions serve then."""
        old, maps = tmp_path / "cache", tmp_path / "maps"
        shutil.copytree(cached, old)
        shutil.copytree(made / "maps", maps)
        Image.new("RGB", (48, 48)).save(maps / "000.webp")
        shard = old / "shard-00000.safetensors"
        with safe_open(shard, "pt") as file:
            header = file.metadata()
        tensors = load_file(shard)
        del tensors["sizes"]
        shard.write_bytes(safetensors.torch.save(tensors, header))
        manifest = Manifest.read(old)
        (one,) = manifest.shards
        replace(manifest, shards=(replace(one, bytes=shard.stat().st_size, sha256=sha256(shard)),)).write(old)
        row = ControlNetStage(config(made, data=old, conditioning_data=maps)).examples.load(0, 0)
        assert float(row["condition"].max()) == 0
        # It is also complete for `cache`.
        before = shard.read_bytes()
        given: dict[str, Any] = {"size": tiny.SIZE, "dtype": "fp32", "device": "cpu"}
        sdkit.data.cache(made / "model", made / "photos", old, **given)
        assert shard.read_bytes() == before

    def test_conditions_from_a_column(self, made: Path, tmp_path: Path) -> None:
        """Of the table that was cached, by the row, whatever the conditions' names; and of another table, by the name.
        A cache for a U-Net that reads conditions serves too, but holds no images of them."""
        import datasets

        images, maps = (sorted((made / name).glob("*.*p*")) for name in ("photos", "maps"))
        rows = {
            "image": [{"bytes": path.read_bytes(), "path": path.name} for path in images],
            "edges": [{"bytes": path.read_bytes(), "path": f"{(i + 1) % 23:03}.webp"} for i, path in enumerate(maps)],
        }
        table = datasets.Dataset.from_dict(rows, datasets.Features(dict.fromkeys(rows, datasets.Image())))
        (tmp_path / "table").mkdir()
        table.to_parquet(tmp_path / "table" / "a.parquet")
        given: dict[str, Any] = {"size": tiny.SIZE, "dtype": "fp32", "device": "cpu", "default_caption": "a"}
        cache = sdkit.data.cache(
            made / "model",
            tmp_path / "table",
            tmp_path / "cache",
            condition_column="edges",
            condition_kind="map",
            **given,
        )
        with pytest.raises(
            sdkit.ArgumentError, match=r"^a latent cache holds no images.*as conditioning_image_column\.$"
        ):
            ControlNetStage(config(made, data=cache, conditioning_data=None))
        beside = {"conditioning_data": tmp_path / "table", "conditioning_image_column": "edges"}
        with pytest.raises(
            DataError, match=r"^conditioning_image_column: .* has no column 'lines'; it has image, edges"
        ):
            ControlNetStage(config(made, data=cache, **beside | {"conditioning_image_column": "lines"}))
        one = ControlNetStage(config(made, data=cache, **beside))
        for name in ("edges", "image"):  # the same from images
            column = {**beside, "conditioning_image_column": name}
            rows_of = [
                ControlNetStage(config(made, data=data, **column)).examples.load(3, 0)["condition"]
                for data in (cache, tmp_path / "table")
            ]
            assert torch.equal(*rows_of)
        expected = ControlNetStage(config(made, default_caption="a"))
        for item in range(0, 22, 5):
            assert torch.equal(one.examples.load(item, 0)["condition"], expected.examples.load(item, 0)["condition"])
        # Of a table of other images: here of all but one, so that the rows are others.
        table.select(range(1, 23)).to_parquet(tmp_path / "table" / "a.parquet")
        with pytest.raises(DataError, match=r"has no condition for 1 of 23 images, such as 001\.png"):
            ControlNetStage(config(made, data=cache, **beside))

    def test_bad_input_is_one_sentence(self, made: Path, cached: Path, tmp_path: Path) -> None:
        (tmp_path / "000.webp").write_bytes((made / "maps" / "000.webp").read_bytes())
        for changes, sentence in (
            ({"condition": "canny"}, "a latent cache holds no images, which a ControlNet reads as conditions"),
            ({"conditioning_data": None}, "a latent cache holds no images, which a ControlNet reads as conditions"),
            ({"conditioning_data": tmp_path}, f"{tmp_path} has no condition for 22 of 23 images, such as 001.png"),
            ({"default_caption": "a"}, "default_caption= has no meaning for a latent cache"),
            ({"size": 64}, f"the cache {cached} (of {made / 'model'}) was made with size 32 x 32, not 64 x 64"),
        ):  # fmt: skip
            with pytest.raises(SdkitError, match=f"^{re.escape(sentence)}"):
                ControlNetStage(config(made, data=cached, **changes))


def test_conditions_are_made_of_other_images(made: Path) -> None:
    """With both options, the images in conditioning_data are what conditions are made of."""
    both = ControlNetStage(config(made, condition="grey", conditioning_data=made / "maps"))
    read = ControlNetStage(config(made))
    (expected,) = to_tensors(CONDITIONS["grey"](to_pil(read.examples.load(0, 0)["condition"] * 2 - 1)[0]))
    torch.testing.assert_close(both.examples.load(0, 0)["condition"], (expected + 1) / 2)
    assert both.identity["data"] != read.identity["data"]


def test_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdkit.cli import main

    arguments = ["train", "controlnet", "--data", made / "photos", "--model", made / "model", "--condition", "canny"]
    arguments += ["--out-dir", tmp_path / "run", "--size", tiny.SIZE, "--max-steps", 1]
    assert main([str(one) for one in arguments]) == 0
    assert (tmp_path / "run" / "result" / "config.json").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["condition"] == "canny"
    edges = tmp_path / "edges.png"
    sdkit.images.canny(sdkit.images.read(made / "photos" / "000.png")).save(edges)
    arguments = ["generate", "a red disc", "--model", made / "model", "--controlnet", tmp_path / "run" / "result"]
    arguments += ["--control-image", edges, "--steps", 2, "--controlnet-conditioning-scale", 0.5, "--out"]
    capsys.readouterr()
    assert main([str(one) for one in [*arguments, tmp_path / "a.png"]]) == 0
    first = sdkit.images.read(tmp_path / "a.png")
    assert first.size == (48, 40)
    again = ["generate", "--from", tmp_path / "a.png", "--out", tmp_path / "b.png"]
    assert main([str(one) for one in again]) == 0
    assert np.array_equal(np.asarray(sdkit.images.read(tmp_path / "b.png")), np.asarray(first))
    text = sdkit.images.read_text(tmp_path / "a.png")
    assert text["control_image"] == str(edges)
    assert text["controlnet_conditioning_scale"] == "0.5"
    ImageOps.invert(sdkit.images.read(edges)).save(edges)
    capsys.readouterr()
    assert main([str(one) for one in again]) == 2
    assert re.search(r"edges.png has changed since it was drawn from; restore it", capsys.readouterr().err)
    for given, sentence in (
        ([], "a ControlNet needs an image to follow; give it as control_image"),
        (["--control-image", edges] * 2, "2 of control_image cannot serve 1 ControlNets"),
    ):
        assert main([str(one) for one in [*arguments[:6], *given, "--out", tmp_path / "c.png"]]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["generate", "a", "--guess-mode", "--out", str(tmp_path / "c.png")]) == 2
    assert "guess_mode belongs to a ControlNet" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()
