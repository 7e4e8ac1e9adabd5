from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.metrics
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import sdkit
from sdkit import images
from sdkit.cli.jobs import (
    Report,
    check_generation,
    decode_files,
    encode_files,
    generate_files,
    mean_scores,
    read_prompts,
    reconstruct_files,
)
from sdkit.data import latent_file as latents
from sdkit.errors import ArgumentError
from sdkit.pipelines.generation import Generation

QUICK = Generation(num_inference_steps=3, guidance_scale=5.0)


@pytest.fixture
def photos(tmp_path: Path, astronaut: Image.Image, chelsea: Image.Image) -> Path:
    """Make a folder with three images, one of them in a sub-folder, and two broken ones that sort before them."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "a-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "b-empty.jpg").write_bytes(b"")
    astronaut.resize((64, 64)).save(folder / "face.png")
    chelsea.crop((100, 50, 161, 93)).save(folder / "sub" / "cat.png")  # 61 x 43, neither a multiple of 8
    astronaut.crop((0, 0, 40, 64)).save(folder / "sub" / "flag.webp", lossless=True)
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image


def pixels(path: Path) -> np.ndarray:
    return np.asarray(opened(path)).astype(int)


def no_temporary_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_encode_does_the_good_files_and_reports_the_broken_ones(
    sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "latents"
    report = encode_files(sd.vae, [photos], out)
    assert report.done == [out / "face.safetensors", out / "sub/cat.safetensors", out / "sub/flag.safetensors"]
    assert [path.name for path, _ in report.failed] == ["a-broken.png", "b-empty.jpg"]
    assert all(str(path) in sentence and "\n" not in sentence for path, sentence in report.failed)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == report.done
    cat = latents.load(out / "sub/cat.safetensors")
    assert (cat.height, cat.width, tuple(cat.z.shape)) == (43, 61, (4, 6, 8))
    assert (cat.vae, cat.scale, cat.source) == (sd.vae.identity, sd.vae.scale, "cat.png")


def test_encoding_a_file_is_the_same_alone_and_among_others(
    sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path
) -> None:
    """Seeds count files, including broken ones: face.png is the third, and cat.png the fourth."""
    encode_files(sd.vae, [photos], tmp_path / "all", seed=10)
    for name, seed in (("face.png", 12), ("sub/cat.png", 13)):
        encode_files(sd.vae, [photos / name], tmp_path / "one", seed=seed)
        alone = latents.load(tmp_path / "one" / Path(name).with_suffix(".safetensors").name).z
        among = latents.load(tmp_path / "all" / Path(name).with_suffix(".safetensors")).z
        torch.testing.assert_close(alone, among, rtol=0, atol=1e-5)


def test_the_mean_is_that_of_the_vae(sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path) -> None:
    (path,) = encode_files(sd.vae, [photos / "face.png"], tmp_path, sample=False).done
    mean, _ = sd.vae.moments(photos / "face.png")
    torch.testing.assert_close(latents.load(path).z, (mean[0] - sd.vae.shift) * sd.vae.scale)


def test_outputs_never_overwrite_one_another_or_an_input(
    sd: sdkit.StableDiffusion, astronaut: Image.Image, tmp_path: Path
) -> None:
    small = astronaut.resize((16, 16))
    for name in ("a.png", "a.jpg", "b.png", "x/c.png", "y/c.png", "A.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        small.save(tmp_path / name)
    given = [tmp_path / name for name in ("a.png", "a.jpg", "A.webp", "b.png", "x/c.png", "y/c.png")]
    done = encode_files(sd.vae, given, tmp_path / "out").done
    assert [path.name for path in done] == [
        "a.png.safetensors",
        "a.jpg.safetensors",
        "A.webp.safetensors",
        "b.safetensors",
        "c.png.safetensors",
        "c.png-1.safetensors",
    ]
    assert [latents.load(path).source for path in done] == [path.name for path in given]

    small.save(tmp_path / "b-reconstruction.png")
    before = (tmp_path / "b-reconstruction.png").read_bytes()
    inputs = [tmp_path / "b.png", tmp_path / "b-reconstruction.png"]
    done_files = [one.path.name for one in reconstruct_files(sd.vae, inputs, tmp_path).done]
    assert done_files == ["b-1-reconstruction.png", "b-reconstruction-reconstruction.png"]
    assert (tmp_path / "b-reconstruction.png").read_bytes() == before


def test_a_second_run_does_not_take_what_the_first_one_wrote(
    sd: sdkit.StableDiffusion, astronaut: Image.Image, tmp_path: Path
) -> None:
    astronaut.resize((16, 16)).save(tmp_path / "a.png")
    first = reconstruct_files(sd.vae, [tmp_path], tmp_path / "out")
    second = reconstruct_files(sd.vae, [tmp_path], tmp_path / "out")
    assert (
        [one.path for one in first.done] == [one.path for one in second.done] == [tmp_path / "out/a-reconstruction.png"]
    )


def test_a_second_run_does_so_however_the_folders_are_written(
    sd: sdkit.StableDiffusion, astronaut: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    astronaut.resize((16, 16)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert len(reconstruct_files(sd.vae, [tmp_path], "out").done) == 1
        assert len(reconstruct_files(sd.vae, ["."], tmp_path / "out").done) == 1


def test_decode_restores_sizes_and_equals_the_vae(sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path) -> None:
    encode_files(sd.vae, [photos], tmp_path / "latents")
    report = decode_files(sd.vae, [tmp_path / "latents"], tmp_path / "decoded")
    assert report.failed == []
    assert {path.name: opened(path).size for path in report.done} == {
        "face.png": (64, 64),
        "cat.png": (61, 43),
        "flag.png": (40, 64),
    }
    z = latents.load(tmp_path / "latents/sub/cat.safetensors").z
    (expected,) = sd.vae.decode(z[None], size=(43, 61))
    assert np.abs(pixels(tmp_path / "decoded/sub/cat.png") - np.asarray(expected)).max() <= 1


def test_decode_reports_other_vaes_and_forces_them_where_it_can(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    fields = {"vae_name": "x", "scale": 1.0, "sdkit": "0", "dtype": "float32", "height": 16, "width": 16}
    latents.save(latents.Latent(z=torch.zeros(4, 2, 2), vae="f" * 16, **fields), tmp_path / "other.safetensors")
    latents.save(latents.Latent(z=torch.zeros(16, 2, 2), vae="f" * 16, **fields), tmp_path / "wide.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-10])
    refused = decode_files(sd.vae, [tmp_path], tmp_path / "out")
    assert (refused.done, [path.name for path, _ in refused.failed]) == (
        [],
        ["other.safetensors", "torn.safetensors", "wide.safetensors"],
    )
    forced = decode_files(sd.vae, [tmp_path], tmp_path / "out", force=True)
    assert [path.name for path in forced.done] == ["other.png"]
    assert "16 channels" in dict(forced.failed)[tmp_path / "wide.safetensors"]


def test_one_bad_latent_does_not_take_the_others_along(
    sd: sdkit.StableDiffusion, astronaut: Image.Image, tmp_path: Path
) -> None:
    folder = tmp_path / "latents"
    for name in "abc":
        astronaut.resize((16, 16)).save(tmp_path / f"{name}.png")
    encode_files(sd.vae, [tmp_path / f"{name}.png" for name in "abc"], folder)
    good = latents.load(folder / "b.safetensors")
    latents.save(replace(good, z=good.z * 1e30), folder / "b.safetensors")
    with safe_open(folder / "c.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file({"z": good.z.to(torch.float8_e4m3fn)}, folder / "bb.safetensors", metadata)
    report = decode_files(sd.vae, [folder], tmp_path / "out")
    assert [path.name for path in report.done] == ["a.png", "c.png"]
    assert [path.name for path, _ in report.failed] == ["bb.safetensors", "b.safetensors"]
    assert all(str(path) in sentence and sentence.endswith(".") for path, sentence in report.failed)


@pytest.mark.parametrize("job", ["encode", "reconstruct"])
def test_one_image_that_the_vae_refuses_does_not_take_the_others_along(
    sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    real = getattr(sd.vae, job)

    def refuse(pictures: list[Image.Image], **options: object) -> object:
        if any(picture.size == (61, 43) for picture in pictures):
            raise sdkit.ImageError("not this one.")
        return real(pictures, **options)

    encode_files(sd.vae, [photos], tmp_path / "whole")
    monkeypatch.setattr(sd.vae, job, refuse)
    if job == "encode":
        report: Report[Any] = encode_files(sd.vae, [photos], tmp_path / "out")
    else:
        report = reconstruct_files(sd.vae, [photos], tmp_path / "out")
    assert len(report.done) == 2
    assert dict(report.failed)[photos / "sub/cat.png"] == f"{photos / 'sub/cat.png'}: not this one."
    for path in (tmp_path / "out").rglob("*.safetensors"):  # each has the seed of its place among all files
        whole = latents.load(tmp_path / "whole" / path.relative_to(tmp_path / "out"))
        torch.testing.assert_close(latents.load(path).z, whole.z, rtol=0, atol=1e-5)


def test_wrong_sizes_end_a_job_before_any_work(sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path) -> None:
    for options in ({"tile": 5}, {"tile": -256}, {"batch_size": 0}):
        for job in (encode_files, reconstruct_files, decode_files):
            with pytest.raises(ArgumentError, match=r"(tile|batch_size).* must be a whole number"):
                job(sd.vae, [photos], tmp_path / "out", **options)  # type: ignore[operator]
    assert not (tmp_path / "out").exists()


def test_a_report_tells_of_each_file_as_it_is_finished(sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path) -> None:
    told: list[tuple[Path, bool]] = []
    report = Report[Path](on_done=lambda path: told.append((path, path.is_file())))
    assert encode_files(sd.vae, [photos], tmp_path / "out", report=report) is report
    assert told == [(path, True) for path in report.done]
    assert len(told) == 3
    assert len(report.failed) == 2


def test_two_runs_into_one_folder_overwrite_nothing(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    start = threading.Barrier(4)

    def run(_: int) -> list[Path]:
        start.wait()
        return generate_files(
            sd, ["x"], tmp_path, Generation(num_inference_steps=1, height=16, width=16), count=3, grid=True
        )

    with ThreadPoolExecutor(4) as pool:
        paths = [path for made in pool.map(run, range(4)) for path in made]
    assert len(set(paths)) == 16
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert sum(path.name.endswith("-grid.png") for path in paths) == 4


def test_numbers_of_more_than_four_digits_are_counted(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    (tmp_path / "12345678901-x.png").touch()
    (path,) = generate_files(sd, ["x"], tmp_path, Generation(num_inference_steps=1, height=16, width=16))
    assert path.name == "12345678902-x-0.png"


def test_reconstructions_are_measured_as_scikit_image_does(
    sd: sdkit.StableDiffusion, photos: Path, tmp_path: Path
) -> None:
    report = reconstruct_files(sd.vae, [photos], tmp_path / "out")
    assert [one.source.name for one in report.done] == ["face.png", "cat.png", "flag.webp"]
    assert len(report.failed) == 2
    for one in report.done:
        both = np.asarray(opened(one.path))
        before, after = both[:, : one.width], both[:, -one.width :]
        np.testing.assert_array_equal(before, pixels(one.source))
        assert one.psnr == pytest.approx(skimage.metrics.peak_signal_noise_ratio(before, after), abs=1e-6)
        ssim = skimage.metrics.structural_similarity(
            before,
            after,
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert one.ssim == pytest.approx(ssim, abs=1e-4)
    psnr, ssim_mean = mean_scores(report.done)
    assert psnr == pytest.approx(np.mean([one.psnr for one in report.done]))
    assert ssim_mean == pytest.approx(np.mean([one.ssim for one in report.done]))
    assert mean_scores([]) == (None, None)


def test_an_image_too_small_for_ssim_still_has_a_psnr(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    Image.new("RGB", (10, 30), "red").save(tmp_path / "tiny.png")
    (one,) = reconstruct_files(sd.vae, [tmp_path / "tiny.png"], tmp_path / "out").done
    assert one.ssim is None
    assert math.isfinite(one.psnr)


def test_files_are_written_batch_by_batch(
    sd: sdkit.StableDiffusion, astronaut: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is stopped keeps the files that it has finished, and holds only a limited number of
    pixels in memory.
    """
    for i in range(6):
        astronaut.resize((32, 32)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr("sdkit.cli.jobs.PIXELS_HELD", 2 * 32 * 32)
    held = []
    real = sd.vae.encode

    def encode(pictures: list[Image.Image], **options: object) -> object:
        held.append(len(pictures))
        if len(held) == 3:
            raise KeyboardInterrupt
        return real(pictures, **options)

    monkeypatch.setattr(sd.vae, "encode", encode)
    with pytest.raises(KeyboardInterrupt):
        encode_files(sd.vae, [tmp_path], tmp_path / "out")
    assert held == [2, 2, 2]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"{i}.safetensors" for i in range(4)]


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0), ("dpm++2m", 0.0)])
def test_each_image_of_a_batch_is_made_again_alone(
    sd: sdkit.StableDiffusion, tmp_path: Path, sampler: str, eta: float
) -> None:
    recipe = Generation(num_inference_steps=6, sampler=sampler, eta=eta, seed=3, negative_prompt="blue")
    prompts = ["a red apple on a blue background", "cat", "a ghost", "pizza"]
    for path in generate_files(sd, prompts, tmp_path / "four", recipe):
        found = Generation.read(path)
        (again,) = generate_files(sd, [found.prompt], tmp_path / "again.png", found)
        difference = np.abs(pixels(path) - pixels(again))
        assert difference.max() <= 1  # batches of other sizes change the order of sums
        assert (difference > 0).mean() < 1e-2
        assert opened(path).text == opened(again).text  # type: ignore[attr-defined]


def test_in_bfloat16_an_image_is_made_again_within_one_level(tmp_path: Path) -> None:
    half = sdkit.StableDiffusion.from_pretrained("emoji", dtype="bf16", device="cpu")
    path = generate_files(half, ["red apple", "cat", "ghost", "pizza"], tmp_path, Generation(num_inference_steps=6))[2]
    (again,) = generate_files(half, ["ghost"], tmp_path / "again.png", Generation.read(path))
    assert np.abs(pixels(path) - pixels(again)).max() <= 2  # 1 was measured, over 30 steps


def test_names_go_on_from_an_earlier_run_and_tell_prompt_and_seed(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    first = generate_files(sd, ["A cat, on/a \\mat!", ""], tmp_path, Generation(num_inference_steps=1, seed=7), count=2)
    assert [path.name for path in first] == [
        "0001-a-cat-on-a-mat-7.png",
        "0002-a-cat-on-a-mat-8.png",
        "0003-image-9.png",
        "0004-image-10.png",
    ]
    (tmp_path / "0002-a-cat-on-a-mat-8.png").unlink()
    second = generate_files(sd, ["../猫" * 200], tmp_path, Generation(num_inference_steps=1), grid=True)
    assert re.fullmatch(r"0005-[猫-]+-0\.png", second[0].name)
    assert second[1].name == "0006-grid.png"
    assert all(path.parent == tmp_path for path in second)


def test_the_size_is_recorded_and_kept(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    (path,) = generate_files(sd, ["x"], tmp_path / "x.png", Generation(num_inference_steps=1, height=50, width=43))
    assert opened(path).size == (43, 50)
    assert (Generation.read(path).height, Generation.read(path).width) == (50, 43)


@pytest.mark.parametrize("sampler", ["lcm", "tcd", "ddim"])
def test_the_spacing_that_was_used_is_recorded(sd: sdkit.StableDiffusion, tmp_path: Path, sampler: str) -> None:
    """LCM and TCD have a spacing of their own, not the schedule's."""
    first = generate_files(sd, ["x"], tmp_path / "1.png", Generation(num_inference_steps=2, sampler=sampler))[0]
    again = generate_files(sd, ["x"], tmp_path / "2.png", Generation.read(first))[0]
    assert again.read_bytes() == first.read_bytes()
    own = sd.schedule.timestep_spacing if sampler == "ddim" else "lcm"
    assert Generation.read(first).spacing == own
    assert Generation.read(first).but(sampler="euler").spacing == (own if sampler == "ddim" else None)


def test_the_scale_is_the_models_own_and_recorded(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    """Recording the scale makes the image reproducible even if the model's own scale changes."""
    own, same, other = (
        generate_files(
            sd, ["a cat"], tmp_path / f"{scale}.png", Generation(num_inference_steps=2, guidance_scale=scale)
        )[0]
        for scale in (None, sd.guidance_scale, 7.5)
    )
    assert sd.guidance_scale != 7.5
    assert Generation.read(own).guidance_scale == sd.guidance_scale
    assert own.read_bytes() == same.read_bytes()
    assert not np.array_equal(np.asarray(opened(own)), np.asarray(opened(other)))


def test_a_recipe_goes_through_a_png_unchanged(tmp_path: Path) -> None:
    recipe = Generation(
        prompt="naïve 猫\nsecond line",
        negative_prompt="ünlike",
        seed=2**62,
        sampler="ddpm",
        num_inference_steps=7,
        guidance_scale=1 / 3,
        eta=0.25,
        spacing="linspace",
        guidance_rescale=0.7,
        guidance_interval=(0.28, math.inf),
        clip_skip=1,
        weighting=True,
        height=64,
        width=72,
        model="some/model",
        revision="main",
        variant="fp16",
        config="folder",
        prediction_type="epsilon",
        dtype="float16",
        vae="some/vae",
        image="some/photo.png",
        image_sha256="ab" * 32,
        mask_image="some/mask.png",
        mask_image_sha256="cd" * 32,
        strength=0.3,
        mask_blur=2.5,
        padding_mask_crop=16,
        lora=("some/lora", "[other]"),
        lora_scale=(-0.3, 1.0),
    )
    images.save(Image.new("RGB", (8, 8)), tmp_path / "x.png", recipe.text())
    assert Generation.read(tmp_path / "x.png") == recipe
    images.save(Image.new("RGB", (8, 8)), tmp_path / "y.png", Generation(prompt="y").text())
    assert Generation.read(tmp_path / "y.png") == Generation(prompt="y")
    required = {"prompt", "negative_prompt", "seed", "sampler", "num_inference_steps", "model", "sdkit"}
    assert required <= set(Generation().text())


def test_a_recipe_names_files_and_folders_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "emoji").mkdir()
    (tmp_path / "configs").mkdir()
    recipe = Generation(model="./model.ckpt", config="configs", height=64, lora=("configs",), vae="configs")
    assert recipe.text()["model"] == str(tmp_path / "model.ckpt")
    assert recipe.text()["config"] == recipe.text()["lora"] == recipe.text()["vae"] == str(tmp_path / "configs")
    # "emoji" is the embedded model, even if a file of that name is in the current folder.
    assert Generation().text()["model"] == "emoji"
    assert Generation(model="some/model").text()["model"] == "some/model"
    assert replace(recipe, model=recipe.text()["model"]).but(model="model.ckpt").height == 64


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"num_inference_steps": 0}, "steps"),
        ({"sampler": "plms"}, "sampler"),
        ({"eta": 2.0}, "eta"),
        ({"eta": 0.5, "sampler": "ddpm"}, "eta"),
        ({"spacing": "log"}, "spacing"),
        ({"guidance_scale": math.nan}, "guidance scale"),
        ({"guidance_scale": 1e7}, "guidance scale"),
        ({"guidance_rescale": 2.0}, "guidance rescale"),
        ({"guidance_interval": (5.0, 1.0)}, "guidance interval"),
        ({"guidance_interval": (math.nan, 1.0)}, "guidance interval"),
        ({"seed": -1}, "seed"),
        ({"clip_skip": -1}, "clip_skip"),
        ({"height": 7}, "height"),
        ({"width": 16385}, "width"),
        ({"negative_prompt": "\udce9"}, "negative_prompt"),
        ({"strength": 0.5}, "strength belongs to an image"),
        ({"mask_blur": 1.0}, "mask_blur belongs to a mask"),
        ({"padding_mask_crop": 0}, "padding_mask_crop belongs to a mask"),
    ],
)
def test_what_a_recipe_refuses_the_model_refuses_too(
    sd: sdkit.StableDiffusion, tmp_path: Path, changes: dict[str, Any], fragment: str
) -> None:
    """The check before a model is loaded must not be stricter than the model."""
    recipe = replace(Generation(num_inference_steps=1), **changes)
    with pytest.raises(ArgumentError, match=fragment):
        recipe.check()
    with pytest.raises(ArgumentError):
        sd("a", seed=recipe.seed, **recipe.options())


def test_another_model_takes_nothing_over_from_the_old_one() -> None:
    own = {"height": 64, "guidance_scale": 3.0, "spacing": "trailing", "revision": "main", "vae": "a/vae"}
    recipe = Generation(**own, num_inference_steps=7, lora=("a/lora",), lora_scale=(0.5,))
    assert recipe.but(model="other", width=72) == Generation(model="other", width=72, num_inference_steps=7)
    assert recipe.but(model="emoji") == recipe
    drawn = Generation(controlnet=("a/net",), control_image=("edges.png",), control_guidance_end=0.5)
    assert drawn.but(model="other") == Generation(model="other")
    again = drawn.but(model="other", controlnet=("b/net",))
    assert again == replace(drawn, model="other", controlnet=("b/net",))


def test_a_recipe_of_before_there_was_lora_is_read(tmp_path: Path) -> None:
    text = {key: value for key, value in Generation(prompt="a").text().items() if not key.startswith("lora")}
    images.save(Image.new("RGB", (8, 8)), tmp_path / "x.png", text)
    assert Generation.read(tmp_path / "x.png") == Generation(prompt="a")


def test_a_text_with_the_names_of_earlier_versions_is_read(tmp_path: Path) -> None:
    text = {"prompt": "a", "seed": "3", "sdkit": "0.0.9", "steps": "7", "scale": "2.5", "rescale": "0.7"}
    images.save(Image.new("RGB", (8, 8)), tmp_path / "x.png", text | {"interval": "0.28 inf"})
    assert Generation.read(tmp_path / "x.png") == Generation(
        prompt="a", seed=3, num_inference_steps=7, guidance_scale=2.5, guidance_rescale=0.7,
        guidance_interval=(0.28, math.inf),
    )  # fmt: skip


def test_the_most_steps_are_known_to_the_schedule_alone(sd: sdkit.StableDiffusion) -> None:
    Generation(num_inference_steps=2000).check()
    long = sdkit.NoiseSchedule.scaled_linear(4000, prediction_type="v_prediction")
    assert len(long.timesteps(2000)) == 2000
    with pytest.raises(ArgumentError, match="from 1 to 1000, not 2000"):
        sd("a", num_inference_steps=2000)


@pytest.mark.parametrize("changes", [{"lora_scale": (0.5,)}, {"lora": ("some/lora",), "lora_scale": (math.inf,)}])
def test_a_scale_needs_a_lora_and_is_finite(changes: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="lora_scale"):
        replace(Generation(), **changes).check()


def test_prompts_are_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\n  # no\n a dog \nnaïve #1".encode())
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog", "naïve #1"]


def test_there_may_be_no_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(
        ArgumentError, match=r"^there is no standard input to read prompts from; name a file of them\.$"
    ):
        read_prompts("-")


def test_nothing_half_written_stays_when_the_disk_is_full(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(sdkit.SdkitError, match="cannot write"):
        generate_files(sd, ["x"], Path("/dev/full/x.png"), QUICK)
    generate_files(sd, ["x"], tmp_path, QUICK)
    assert no_temporary_files(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
@pytest.mark.timeout(60)
def test_prompts_that_never_end_or_never_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdkit.cli.jobs.PATIENCE", 0.1)
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in (
        ("/dev/zero", r"^/dev/zero is larger than 64 MiB"),
        (tmp_path / "pipe", "^there is no prompt in .*pipe; write one a line"),
        (tmp_path, "cannot read the prompts in .*: is a directory"),
        ("nul\0", "cannot read the prompts in .*: no file can have this name"),
        ("n" * 300, "cannot read the prompts in .*: file name too long"),
    ):
        with pytest.raises(ArgumentError, match=sentence):
            read_prompts(path)


@pytest.mark.skipif(os.name != "posix", reason="needs /dev/fd")
def test_prompts_of_a_process_substitution() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"a cat\na dog\n")
    os.close(writing)
    try:
        assert read_prompts(f"/dev/fd/{reading}") == ["a cat", "a dog"]
    finally:
        os.close(reading)


def test_a_folder_that_cannot_be_listed(
    sd: sdkit.StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are tried one after another, and no file is overwritten."""

    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refuse)
        patch.setattr("os.scandir", refuse)
        first = generate_files(sd, ["x"], tmp_path, QUICK, count=2)
        kept = first[0].read_bytes()
        second = generate_files(sd, ["x"], tmp_path, QUICK, count=2)
    assert [path.name for path in first] == ["0001-x-0.png", "0002-x-1.png"]
    assert [path.name for path in second] == ["0002-x-0.png", "0003-x-1.png"]
    assert first[0].read_bytes() == kept
    assert len([*tmp_path.iterdir()]) == 4


@pytest.mark.parametrize("name", ["nul\0", "n" * 300, "n" * 300 + ".png", "nul\0.png"])
def test_outputs_that_no_file_can_be_are_told_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(sdkit.SdkitError, match=r"^cannot write into .*; give another folder\.$"):
        check_generation(["x"], tmp_path / name, QUICK)


ELSEWHERE = """
import sys
from tests.cli.test_jobs import make_files
make_files()
print(sys.getfilesystemencoding())
"""


def make_files() -> None:
    """Encode, decode, and generate in the current folder."""
    sd = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp32", device="cpu")
    encode_files(sd.vae, ["in"], "latents")
    decode_files(sd.vae, ["latents"], "decoded")
    generate_files(sd, read_prompts("prompts.txt"), "outputs", Generation(num_inference_steps=1, height=64, width=64))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are always UTF-8")
def test_names_are_utf8_on_disk_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare a process in an ASCII locale with this one."""
    (tmp_path / "in").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "in" / "猫.png")
    (tmp_path / "prompts.txt").write_text("ein grüner Fuchs", encoding="utf-8")
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = {"PYTHONPATH": str(Path(sdkit.__file__).parents[1])}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(command, env=os.environ | environment | path, cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout == b"ascii\n"
    elsewhere = (tmp_path / "latents" / "猫.safetensors").read_bytes()
    assert (tmp_path / "decoded" / "猫.png").is_file()
    monkeypatch.chdir(tmp_path)
    make_files()
    assert (tmp_path / "latents" / "猫.safetensors").read_bytes() == elsewhere
    assert latents.load(tmp_path / "latents" / "猫.safetensors").source == "猫.png"
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == [
        "0001-ein-grüner-fuchs-0.png", "0002-ein-grüner-fuchs-0.png",
    ]  # fmt: skip
