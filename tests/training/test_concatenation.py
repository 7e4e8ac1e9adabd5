"""Training a U-Net that reads a condition: the loss against diffusers, dropped conditions, caches, and the result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image, ImageOps

import sdkit
from sdkit.cli import main
from sdkit.data import cache
from sdkit.errors import SdkitError
from sdkit.networks.concatenation import map_of
from sdkit.training import UNetConfig, settings, train_unet
from sdkit.training.batches import noise_of
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.concatenation import told
from sdkit.training.stages.unet import UNetStage
from tests.helpers import tiny

pytest.importorskip("datasets")

BATCH = [(n, n) for n in range(4)]
KINDS = ("latents", "map")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model, images, inverted copies as conditions, the same pairs in a parquet file, and caches of them."""
    import datasets

    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.photos(folder / "photos", 23)
    (folder / "maps").mkdir()
    rows: dict[str, list[Any]] = {"image": [], "before": [], "text": []}
    for path in sorted((folder / "photos").glob("*.png")):
        image = sdkit.images.read(path).resize((48, 40))  # wider than high, so that there is something to crop
        image.save(path)
        ImageOps.invert(image).save(folder / "maps" / f"{path.stem}.webp", lossless=True)
        rows["image"].append(str(path))
        rows["before"].append(str(folder / "maps" / f"{path.stem}.webp"))
        rows["text"].append(path.with_suffix(".txt").read_text())
    images = {name: datasets.Image() for name in ("image", "before")}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({**images, "text": datasets.Value("string")}))
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "a.parquet")
    for kind in KINDS:
        cache(
            folder / "model", folder / "photos", folder / f"cached {kind}", conditioning_data=folder / "maps",
            condition_kind=kind, size=tiny.SIZE, dtype="fp32", device="cpu",
        )  # fmt: skip
    return folder


def config(made: Path, kind: str | None = None, **changes: Any) -> UNetConfig:
    own: dict[str, Any] = {
        "model": made / "model", "data": made / "photos", "conditioning_data": made / "maps", "condition_kind": kind,
        "out_dir": made / "unused", "size": tiny.SIZE, "batch_size": 4, "max_steps": 3, "learning_rate": 1e-3,
        "ema_decay": 0.0,
    }  # fmt: skip
    return UNetConfig(**own | changes)


def cached(made: Path, kind: str, **changes: Any) -> UNetConfig:
    return config(made, **{"data": made / f"cached {kind}", "conditioning_data": None} | changes)


TABLE: dict[str, Any] = {"condition_column": "before", "image_column": "image", "conditioning_data": None}
GOLDEN = {
    "latents": [1.101685, 0.890995, 1.036265, 0.968389, 0.738381],
    "map": [1.101685, 0.890002, 1.033906, 0.965627, 0.738653],
}


@pytest.fixture(scope="module")
def runs(made: Path) -> dict[str, Path]:
    """Train a model of each kind, from its cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    common: dict[str, Any] = {
        "seed": 1, "max_steps": 5, "condition_dropout": 0.3, "learning_rate": 5e-3, "evaluate": ("lpips",),
        "validation_prompts": ("a red disc",),
    }  # fmt: skip
    done = {kind: train_unet(cached(made, kind, out_dir=made / f"run {kind}", **common)) for kind in KINDS}
    torch.set_num_threads(threads)
    return done


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def test_settings_name_the_kinds_of_conditions() -> None:
    from sdkit.loading.configs import CONDITIONS

    assert settings.CONDITION_KINDS == CONDITIONS


@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_that_of_diffusers_networks(made: Path, kind: str) -> None:
    """As in diffusers' train_instruct_pix2pix.py: the condition's latents are the mode, and are not scaled."""
    stage = UNetStage(config(made, kind, caption_dropout=0.0, condition_dropout=0.4, augment=("crop", "flip")))
    torch.nn.init.normal_(stage.unet.network.conv_in.weight, std=0.1)
    batch = stage.batch([(n, n) for n in range(8)])
    assert 0 < int(batch["told"].sum()) < 8
    found, _ = stage.loss({"unet": stage.denoiser}, batch, 0)
    vae = AutoencoderKL.from_pretrained(made / "model" / "vae")
    scheduler = DDPMScheduler.from_pretrained(made / "model" / "scheduler")
    with torch.no_grad():
        posterior = vae.encode(batch["pixels"]).latent_dist
        x0 = (posterior.mean + posterior.std * batch["posterior_eps"]) * vae.config.scaling_factor
        condition = -batch["pixels"]  # the conditions are the inverted images, cropped and mirrored alike
        beside = vae.encode(condition).latent_dist.mode() if kind == "latents" else None
        if beside is None:
            beside = condition.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).mean((3, 5))
        beside = beside * batch["told"][:, None, None, None]
        t = torch.tensor(batch["t"])
        x_t = torch.cat([scheduler.add_noise(x0, batch["eps"], t), beside], dim=1)
        output = stage.unet.network(x_t, t, stage.encoder.captions(batch)).sample
    # An inverted image is resized to other 8-bit levels than the image, here and there.
    torch.testing.assert_close(found.detach(), (output - batch["eps"]).square().mean(), atol=2e-3, rtol=2e-3)
    with torch.no_grad():
        told_all, _ = stage.loss({"unet": stage.denoiser}, batch | {"told": torch.ones(8)}, 0)
    assert abs(float(told_all) - float(found.detach())) > 1e-4


def test_dropped_conditions_and_captions_are_as_in_the_paper(made: Path) -> None:
    """5 % without the caption alone, 5 % without the condition alone, and 5 % without both (Brooks et al. 2023)."""
    samples = [(n, 0) for n in range(4000)]
    shares = torch.tensor([float(torch.rand((), generator=noise_of(0, n))) for n, _ in samples])
    no_caption, no_condition = shares < 0.1, told(samples, cached(made, "map")) == 0
    for found in (no_caption & ~no_condition, no_condition & ~no_caption, no_caption & no_condition):
        assert float(found.float().mean()) == pytest.approx(0.05, abs=0.012)
    stage = UNetStage(cached(made, "map"))
    batch = stage.batch(samples[:100])
    empty = stage.latents.empty["ids"]
    assert torch.equal(torch.tensor([torch.equal(ids, empty) for ids in batch["ids"]]), no_caption[:100])
    assert torch.equal(batch["told"] == 0, no_condition[:100])
    for captions, conditions in ((0.0, 0.2), (1.0, 0.2), (0.3, 1.0), (0.5, 0.0)):
        share = 1 - told(samples, config(made, caption_dropout=captions, condition_dropout=conditions)).mean()
        assert float(share) == pytest.approx(conditions, abs=0.025)


@pytest.mark.parametrize("kind", KINDS)
def test_begins_as_the_model_and_the_new_weights_learn(made: Path, kind: str) -> None:
    stage = UNetStage(config(made, kind, condition_dropout=0.0))
    batch = stage.batch(BATCH)
    plain = sdkit.UNet(UNet2DConditionModel.from_pretrained(made / "model" / "unet"))
    x_t, t, cond = batch["eps"], torch.tensor(batch["t"]), stage.encoder.conditioning(batch)
    assert cond.concat is not None
    with torch.no_grad():
        expected = plain(x_t, t, sdkit.guidance.Conditioning(cond.text, cond.mask))
        torch.testing.assert_close(stage.unet(x_t, t, cond), expected, atol=1e-6, rtol=0)
    loss, _ = stage.loss({"unet": stage.denoiser}, batch, 0)
    loss.backward()  # type: ignore[no-untyped-call]
    gradient = stage.unet.network.conv_in.weight.grad
    assert all(float(gradient[:, channel].abs().max()) > 0 for channel in range(gradient.shape[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_cache_column_and_folder_give_the_same_losses(made: Path, kind: str) -> None:
    """With weights that read the condition. The cache rounds to float16."""
    found = []
    for one in (config(made, kind), config(made, kind, data=made / "table", **TABLE), cached(made, kind)):
        stage = UNetStage(one)
        torch.manual_seed(0)
        torch.nn.init.normal_(stage.unet.network.conv_in.weight, std=0.1)
        with torch.no_grad():
            found.append([float(stage.loss({"unet": stage.denoiser}, stage.batch([(n, n)]), 0)[0]) for n in range(4)])
            found[-1].append(stage._validation_loss(0))
    assert found[1] == found[0]
    assert found[2] == pytest.approx(found[0], abs=1e-3)
    assert found[2] != pytest.approx(found[0], abs=1e-7)


def test_cached_conditions_are_cropped_and_mirrored_like_their_images(made: Path, tmp_path: Path) -> None:
    folder = cache(
        made / "model", made / "table", tmp_path / "cache", condition_column="before", image_column="image",
        condition_kind="map", size=tiny.SIZE, crop="random", flip=True, augmentations=3, dtype="fp32", device="cpu",
    )  # fmt: skip
    found = sdkit.data.LatentCache(folder)
    stage = UNetStage(
        config(made, "map", augment=("crop", "flip"), data=made / "table", **TABLE)
    )  # fmt: skip
    for i in range(0, len(found), 7):
        pixels = stage.latents.images.pixels(  # type: ignore[attr-defined]
            stage.latents.images.examples[found[i]["index"]], found[i]["index"], found[i]["augmentation"]
        )  # type: ignore[attr-defined]
        torch.testing.assert_close(found[i]["concat"], map_of(-pixels[None, :3], 8)[0], atol=2e-2, rtol=0)
    # A finished cache is recognised.
    assert cache(made / "model", made / "table", folder, condition_column="before", image_column="image",
                 condition_kind="map", size=tiny.SIZE, crop="random", flip=True, augmentations=3, dtype="fp32",
                 device="cpu") == folder  # fmt: skip
    with pytest.raises(sdkit.CacheError, match=r"made with condition map, not latents as asked for now"):
        cache(made / "model", made / "table", folder, condition_column="before", image_column="image",
              size=tiny.SIZE, crop="random", flip=True, augmentations=3, dtype="fp32", device="cpu")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_golden(runs: dict[str, Path], kind: str) -> None:
    """Losses in float32 on one thread, to 1e-3. A change in these numbers is a change in what is learned."""
    assert losses(runs[kind]) == pytest.approx(GOLDEN[kind], rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_result_loads_in_diffusers_and_trains_further(made: Path, runs: dict[str, Path], kind: str) -> None:
    ours = sdkit.StableDiffusion.from_pretrained(runs[kind] / "result", dtype="fp32", device="cpu")
    assert ours.unet.condition == kind
    assert float(ours.unet.network.conv_in.weight[:, 4:].detach().abs().max()) > 0  # trained
    theirs = UNet2DConditionModel.from_pretrained(runs[kind] / "result" / "unet")
    assert theirs.config.in_channels == {"latents": 8, "map": 7}[kind]
    assert len([*(runs[kind] / "samples").iterdir()]) == 2
    if kind == "latents":
        pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(runs[kind] / "result")
        pipe.set_progress_bar_config(disable=True)
        image, noise = sdkit.images.read(made / "photos" / "000.png").resize((32, 32)), torch.randn(1, 4, 4, 4)
        common: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "image_guidance_scale": 1.5}
        expected = pipe("a red disc", image=image, latents=noise, output_type="latent", **common).images
        z = ours("a red disc", condition=image, latents=noise, output_type="latent", **common)
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
    again = UNetStage(config(made, model=runs[kind] / "result"))  # its kind is the model's own
    assert again.unet.condition == kind
    assert torch.equal(again.unet.network.conv_in.weight, theirs.conv_in.weight)
    assert {"concat" if kind == "map" else "concat_pixels"} <= again.batch(BATCH).keys()
    lora = UNetStage(config(made, model=runs[kind] / "result", lora_rank=2))
    assert float(lora.loss({"unet": lora.denoiser}, lora.batch(BATCH), 0)[0].detach()) > 0


def test_from_scratch(made: Path) -> None:
    stage = UNetStage(cached(made, "map", init=made / "model" / "unet"))
    assert stage.unet.condition == "map"
    assert float(stage.unet.network.conv_in.weight[:, 4:].detach().abs().max()) == 0


# Bad input

BAD: list[tuple[dict[str, Any], str]] = [
    ({"condition_kind": "depth"}, "condition_kind 'depth' is not one of 'latents', 'map'"),
    ({"condition_dropout": 1.5}, "condition_dropout must be a number from 0 to 1"),
    ({"condition_column": ""}, "condition_column must be a path or a name"),
    ({"condition_column": "before"}, "condition_column and conditioning_data both name the conditions"),
    ({"conditioning_data": None, "condition_kind": "map"}, "condition_kind belongs to conditions; name them"),
    (
        {"conditioning_data": None, "condition_column": "a"},
        r"condition_column: .*photos holds files, which have no col",
    ),
    (
        {"data": "", "instance_data": "x", "instance_prompt": "a zork"},
        "conditioning_data has no meaning for DreamBooth",
    ),
    (
        {"data": "", "instance_data": "x", "conditioning_data": None, "condition_kind": "map"},
        "condition_kind has no meaning for DreamBooth",
    ),
    (
        {"conditioning_data": None, "condition_dropout": 0.3},
        "condition_dropout belongs to conditions, and there are none: name them as condition_column or",
    ),
    (
        {"data": "", "instance_data": "x", "conditioning_data": None, "condition_dropout": 0.3},
        "condition_dropout belongs to conditions, and there are none",
    ),
    ({"lora_rank": 2}, "a LoRA cannot train the new input channels of a condition"),
    ({"conditioning_data": "./none"}, ".*none"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_sentence(made: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SdkitError, match=f"^{sentence}") as caught:
        UNetStage(config(made, **change))
    assert "\n" not in str(caught.value)


def test_conditions_that_are_missing_or_do_not_fit(made: Path, tmp_path: Path) -> None:
    table: dict[str, Any] = {"data": made / "table", "conditioning_data": None, "image_column": "image"}
    with pytest.raises(sdkit.DataError, match=r"^condition_column: .* has no column 'after'; it has image, before, t"):
        UNetStage(config(made, condition_column="after", **table))
    with pytest.raises(sdkit.DataError, match=r"^condition_column: .* has no images in its column 'text'"):
        UNetStage(config(made, condition_column="text", **table))
    for path in sorted((made / "maps").iterdir())[3:]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        sdkit.DataError, match=r"has no condition for 3 of 23 images, such as 000\.png; give each image"
    ):
        UNetStage(config(made, conditioning_data=tmp_path))
    for path in (made / "maps").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (48, 48)).save(tmp_path / "000.webp")
    stage = UNetStage(config(made, conditioning_data=tmp_path))
    with pytest.warns(UserWarning, match=r"^000.png is skipped: its condition has 48 x 48 pixels, the image 48 x 40"):
        stage.latents.load(0, 0)
    common: dict[str, Any] = {"size": tiny.SIZE, "dtype": "fp32", "device": "cpu"}
    cache(made / "model", made / "photos", tmp_path / "skips", conditioning_data=tmp_path, **common)
    assert [one.name for one in sdkit.data.LatentCache(tmp_path / "skips").manifest.skipped] == ["000.png"]
    with pytest.raises(sdkit.ArgumentError, match=r"^conditions are not read from a stream; leave streaming out"):
        cache(made / "model", made / "table", tmp_path / "s", condition_column="before", streaming=True, **common)


def test_caches_of_format_2_are_still_read(made: Path, tmp_path: Path) -> None:
    """They know nothing of conditions."""
    folder = cache(made / "model", made / "photos", tmp_path / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")
    content = json.loads((folder / "manifest.json").read_text())
    del content["checksum"], content["settings"]["condition"]
    content["format_version"] = 2
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": checksum}))
    assert sdkit.data.LatentCache(folder)[3]["concat"] is None


def test_models_and_caches_that_do_not_fit(made: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(sdkit.ArgumentError, match=r"^conditioning_data= has no meaning for a latent cache; give it to"):
        UNetStage(cached(made, "map", conditioning_data=made / "maps"))
    with pytest.raises(
        sdkit.CacheError, match=r"holds conditions of the kind map, not latents; make another with sdkit"
    ):
        UNetStage(cached(made, "map", condition_kind="latents"))
    plain = cache(made / "model", made / "photos", tmp_path / "cache", size=tiny.SIZE, dtype="fp32", device="cpu")
    with pytest.raises(sdkit.CacheError, match=r"holds no conditions, not map; make another with sdkit cache --condit"):
        UNetStage(config(made, data=plain, conditioning_data=None, condition_kind="map"))
    with pytest.raises(
        sdkit.ArgumentError, match=r"^condition_dropout belongs to conditions, and there are none: name"
    ):
        UNetStage(config(made, data=plain, conditioning_data=None, condition_dropout=0.0))
    result = runs["map"] / "result"
    with pytest.raises(
        sdkit.ArgumentError, match=r"^this model draws from an image: name the images as condition_column"
    ):
        UNetStage(config(made, model=result, conditioning_data=None))
    with pytest.raises(
        sdkit.ArgumentError, match=r"^this model reads map beside x_t, the conditions of this run are l"
    ):
        UNetStage(cached(made, "latents", model=result))
    with pytest.raises(sdkit.SourceError, match=r"looks like a model that takes a map beside x_t \(7 input channels\)"):
        sdkit.training.train_controlnet(
            sdkit.training.ControlNetConfig(
                model=result, data=made / "photos", out_dir=tmp_path / "c", condition="grey"
            )
        )


def test_command_line(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["cache", made / "photos", "--conditioning-data", made / "maps", "--condition-kind", "map", "--model"]
    given += [made / "model", "--size", tiny.SIZE, "--dtype", "fp32", "--out", tmp_path / "cache"]
    assert main([str(one) for one in given]) == 0
    given = ["train", "unet", "--data", tmp_path / "cache", "--model", made / "model", "--max-steps", 1]
    given = [str(one) for one in [*given, "--out-dir", tmp_path / "run"]]
    assert main([*given, "--condition-column", "before"]) == 2
    assert "condition_column= has no meaning for a latent cache; give it to sdkit cache" in capsys.readouterr().err
    assert main(given) == 0
    unet = json.loads((tmp_path / "run" / "result" / "unet" / "config.json").read_text())
    assert (unet["in_channels"], unet["_condition"]) == (7, "map")
