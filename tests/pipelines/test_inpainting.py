"""Inpainting with any model and with inpainting U-Nets: against diffusers' pipeline, and which pixels are kept."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

import sdkit
from sdkit import images
from sdkit.loading.source import Source
from sdkit.pipelines.inpainting import drawing_size, feathered, latent_mask, read_masks, region
from tests.helpers import original_layout, tiny
from tests.helpers.networks import diffusers_pipeline, sd_shaped

PROMPTS = ["a red apple on a blue background", "a cat"]
SIDE = 64


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def pixels(n: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """Random images (n, 3, H, W) of 8-bit levels in [-1, 1]."""
    levels = torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(0))
    return levels.float() / 127.5 - 1


def rectangle(top: int, left: int, bottom: int, right: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    """A mask (1, 1, H, W)."""
    mask = torch.zeros(1, 1, height, width)
    mask[:, :, top:bottom, left:right] = 1
    return mask


MASKS = torch.cat([rectangle(16, 8, 48, 40), rectangle(0, 32, 64, 64)])  # at edges of latents


@pytest.fixture(scope="module", params=[4, 9])
def both(sd: sdkit.StableDiffusion, request: pytest.FixtureRequest) -> tuple[sdkit.StableDiffusion, Any]:
    """A small random model with 4 or 9 input channels as sdkit's, and as diffusers' inpainting pipeline."""
    ours, scheduler = sd_shaped(sd.text, request.param)
    return ours, diffusers_pipeline(ours, scheduler, "StableDiffusionInpaintPipeline")


@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_latents_are_those_of_diffusers(both: tuple[sdkit.StableDiffusion, Any], strength: float, scale: float) -> None:
    ours, pipe = both
    common = {"num_inference_steps": 10, "guidance_scale": scale, "strength": strength, "output_type": "latent"}
    image = pixels(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = pipe(
            PROMPTS, image=image, mask_image=MASKS, height=SIDE, width=SIDE, generator=seeds(3, 4), **common
        ).images
    z = ours(PROMPTS, image=image, mask_image=MASKS, seed=3, **common)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)


def outside(mask: Tensor) -> np.ndarray:
    return ~mask[0, 0].bool().numpy()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.5}, {"mask_blur": 3.0}, {"padding_mask_crop": 5}, {"strength": 0.5}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_pixels_outside_the_mask_are_bit_identical(
    sd: sdkit.StableDiffusion, sampler: str, options: dict[str, Any]
) -> None:
    if sampler != "ddim" and "eta" in options:
        options = {}
    image, mask = pixels(1, 72, 53), rectangle(11, 9, 40, 34, 72, 53)
    (original,) = images.to_pil(image)
    common = {"mask_image": mask, "num_inference_steps": 2, "sampler": sampler, **options}
    (drawn,) = sd("a cat", image=original, **common)
    kept = np.asarray(drawn) == np.asarray(original)
    assert kept[outside(mask)].all()
    assert kept[~outside(mask)].mean() < 0.5
    exact = sd("a cat", image=image, output_type="pt", **common)
    assert torch.equal(exact[0][:, outside(mask)], image[0][:, outside(mask)])


def test_an_inpainting_model_keeps_the_pixels_too(sd: sdkit.StableDiffusion) -> None:
    nine, _ = sd_shaped(sd.text, 9)
    drawn = nine("a cat", image=pixels(1), mask_image=MASKS[:1], num_inference_steps=2, output_type="pt")
    assert torch.equal(drawn[0][:, outside(MASKS[:1])], pixels(1)[0][:, outside(MASKS[:1])])
    assert not torch.equal(drawn, pixels(1))


def test_latents_outside_the_mask_follow_the_noised_original(sd: sdkit.StableDiffusion) -> None:
    image, noise = pixels(1, 128, 128), torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    z = sd.vae.encode(image, generator=seeds(0))
    kept = latent_mask(rectangle(32, 32, 96, 96, 128, 128), 8)[0, 0] == 0
    for sampler in ("ddim", "dpm++2m"):
        steps: list[sdkit.Step] = []
        sd(
            "a cat", image=image, mask_image=rectangle(32, 32, 96, 96, 128, 128), latents=noise, sampler=sampler,
            num_inference_steps=4, output_type="latent", callback=steps.append,
        )  # fmt: skip
        for step, (_, t_prev) in zip(steps[:-1], sd.schedule.timesteps(4), strict=False):
            expected = sd.schedule.add_noise(z, noise, t_prev)
            torch.testing.assert_close(step.x[..., kept], expected[..., kept], atol=1e-4, rtol=0)
            assert (step.x - expected)[..., ~kept].abs().max() > 0.1


@pytest.mark.parametrize("channels", [4, 9])
def test_an_image_is_the_same_alone_and_in_a_batch(sd: sdkit.StableDiffusion, channels: int) -> None:
    model = sd if channels == 4 else sd_shaped(sd.text, 9)[0]
    # Guidance multiplies the rounding of sums that batches of other sizes order in another way.
    common = {"num_inference_steps": 3, "eta": 0.5, "output_type": "latent", "guidance_scale": 1.5}
    batch = model(PROMPTS, image=pixels(2), mask_image=MASKS, num_images_per_prompt=2, seed=5, **common)
    for i in range(4):
        alone = model(PROMPTS[i // 2], image=pixels(2)[i // 2], mask_image=MASKS[i // 2], seed=5 + i, **common)
        torch.testing.assert_close(alone[0], batch[i], atol=3e-5, rtol=0)


@pytest.mark.parametrize("channels", [4, 9])
def test_one_image_for_several_prompts_is_encoded_once(sd: sdkit.StableDiffusion, channels: int) -> None:
    """Each of several images is drawn as if it were alone, and the VAE encodes each distinct image once."""
    model, rows = sd_shaped(sd.text, channels)[0], list[int]()
    common = {"strength": 0.5, "num_inference_steps": 2, "guidance_scale": 1, "output_type": "latent"}
    with model.vae.network.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0]))):
        batch = model(PROMPTS * 2, image=pixels(1), mask_image=MASKS[:1], seed=5, **common)
        once = sum(rows)
        model(PROMPTS, image=pixels(2), mask_image=MASKS, **common)
    for i, prompt in enumerate(PROMPTS * 2):
        alone = model(prompt, image=pixels(1), mask_image=MASKS[:1], seed=5 + i, **common)
        torch.testing.assert_close(alone[0], batch[i], atol=3e-5, rtol=0)
    kinds = {4: 1, 9: 2}[channels]  # the image, and for nine channels the image without the masked part
    assert (once, sum(rows) - once) == (kinds, 2 * kinds)


@pytest.mark.parametrize("channels", [4, 9])
def test_evaluations_are_those_of_text_to_image(sd: sdkit.StableDiffusion, channels: int) -> None:
    model, sizes = sd_shaped(sd.text, channels)[0], list[int]()
    with model.unet.network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0]))):
        model(PROMPTS, image=pixels(1), mask_image=MASKS[:1], strength=0.5, num_inference_steps=4)
        model(PROMPTS, image=pixels(1), mask_image=MASKS[:1], num_inference_steps=2, guidance_scale=1)
    assert sizes == [4] * 2 + [2] * 2


def test_an_object_is_replaced(sd: sdkit.StableDiffusion) -> None:
    """The middle of a red apple becomes green; the mask of a corner leaves the middle as it was."""
    (image,) = sd("a large 3d red apple on a purple background", seed=1)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((16, 16, 112, 112), fill=255)
    (drawn,) = sd("a large 3d green apple on a purple background", image=image, mask_image=mask, seed=3)
    middle = [np.asarray(one)[56:88, 48:80].reshape(-1, 3).astype(float).mean(0) for one in (image, drawn)]
    assert middle[0][0] > middle[0][1] + 60
    assert middle[1][1] > middle[1][0] + 30


class TestMask:
    @pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 30), (8, 8)])
    def test_a_latent_is_drawn_where_any_of_its_pixels_is(self, height: int, width: int) -> None:
        mask = (torch.rand(2, 1, height, width, generator=torch.Generator().manual_seed(0)) > 0.98).float()
        found = latent_mask(mask, 8)
        for n in range(2):
            for row in range(-(-height // 8)):
                for column in range(-(-width // 8)):
                    block = mask[n, 0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                    assert found[n, 0, row, column] == block.max()

    @pytest.mark.parametrize("blur", [1e-300, 1e-30, 1e-3])
    def test_a_blur_too_small_to_see_leaves_the_mask(self, blur: float) -> None:
        mask = torch.zeros(1, 1, 16, 16)
        mask[..., 4:12, 5:11] = 1
        torch.testing.assert_close(feathered(mask, blur), mask)

    def test_feathered_edges_are_inside_the_mask(self) -> None:
        mask = rectangle(16, 16, 64, 64)
        share = feathered(mask, 4.0)[0, 0]
        assert (share[outside(mask)] == 0).all()
        assert ((share >= 0) & (share <= 1)).all()
        across = share[40, 16:]
        assert (across.diff() >= -1e-6).all()  # rises inwards
        assert across[0] < 0.15
        assert across[12:].min() > 0.99  # also along the image's own edge
        # Twice the Gaussian's distribution function, less 1: what a blurred straight edge is.
        x = torch.arange(48) + 0.5
        torch.testing.assert_close(across, torch.erf(x / 4 / 2**0.5), atol=5e-3, rtol=0)

    def test_masks_of_every_kind(self, tmp_path: Path) -> None:
        expected = rectangle(2, 3, 9, 12, 16, 20)
        grey = Image.fromarray((expected[0, 0] * 200).byte().numpy())
        grey.save(tmp_path / "mask.png")
        transparent = Image.new("RGBA", (20, 16), (255, 255, 255, 0))
        transparent.paste((255, 255, 255, 255), (3, 2, 12, 9))
        level = expected[0, 0].byte().numpy() * 255
        for given in (
            grey, Image.fromarray(level).convert("1"), grey.convert("RGB"), transparent, str(tmp_path / "mask.png"),
            tmp_path / "mask.png", level, expected, expected[0], expected[0, 0], expected.bool(), [grey],
            expected * 0.5,
        ):  # fmt: skip
            assert torch.equal(read_masks(given, (16, 20), 1), expected)
        assert read_masks(MASKS, (SIDE, SIDE), 2).shape == (2, 1, SIDE, SIDE)

    def test_a_mask_is_resized_with_its_image(self, sd: sdkit.StableDiffusion) -> None:
        image = pixels(1, 32, 32)
        common = {"mask_image": rectangle(8, 8, 16, 24, 32, 32), "num_inference_steps": 1, "output_type": "np"}
        drawn = sd("a cat", image=image, height=64, width=64, **common)[0]
        twice = np.asarray(images.to_pil(image)[0].resize((64, 64), Image.Resampling.LANCZOS))
        kept = (drawn == twice).all(-1)
        assert kept[outside(rectangle(16, 16, 32, 48))].all()
        assert kept[16:32, 16:48].mean() < 0.1


class TestRegion:
    @pytest.mark.parametrize(
        "box", [(10, 20, 14, 50), (0, 0, 5, 5), (50, 90, 60, 96), (0, 0, 60, 96), (20, 30, 50, 33)]
    )
    @pytest.mark.parametrize("padding", [0, 4, 40])
    @pytest.mark.parametrize("size", [(64, 64), (32, 96)])
    def test_it_is_that_of_diffusers_within_a_pixel(
        self, box: tuple[int, int, int, int], padding: int, size: tuple[int, int]
    ) -> None:
        mask = rectangle(*box, 60, 96)
        (image,) = images.to_pil(mask.expand(1, 3, -1, -1) * 2 - 1)
        left, top, right, bottom = VaeImageProcessor.get_crop_region(image, size[1], size[0], pad=padding)
        found = region(mask, padding, *size)
        assert np.abs(np.subtract(found, (top, left, bottom, right))).max() <= 1
        assert 0 <= found[0] <= box[0] < box[2] <= found[2] <= 60
        assert 0 <= found[1] <= box[1] < box[3] <= found[3] <= 96

    def test_it_is_drawn_in_its_own_shape_at_the_models_size(self) -> None:
        assert region(rectangle(10, 20, 20, 40), 5, None, None) == (5, 15, 25, 45)
        height, width = drawing_size((5, 15, 25, 45), None, None, 512)
        assert height % 8 == width % 8 == 0
        assert height * width == pytest.approx(512**2, rel=0.02)
        assert width / height == pytest.approx(1.5, rel=0.02)
        assert drawing_size((5, 15, 25, 45), 64, 72, 512) == (64, 72)

    def test_a_thin_region_does_not_get_very_long(self) -> None:
        assert drawing_size((0, 0, 1, 4096), None, None, 512) == (8, 4 * 512)

    def test_the_region_alone_is_drawn_and_enlarged(self, sd: sdkit.StableDiffusion) -> None:
        shapes: list[tuple[int, ...]] = []
        mask = rectangle(40, 40, 60, 60, 256, 256)
        with sd.unet.network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape[2:]))):
            drawn = sd(
                "a cat", image=pixels(1, 256, 256), mask_image=mask, padding_mask_crop=6, num_inference_steps=1,
                output_type="pt",
            )  # fmt: skip
        assert shapes == [(16, 16)]
        assert drawn.shape == (1, 3, 256, 256)
        assert not torch.equal(drawn[..., 40:60, 40:60], pixels(1, 256, 256)[..., 40:60, 40:60])


class TestLoading:
    """U-Nets with nine channels load from folders and single files."""

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A tiny inpainting model in diffusers layout."""
        folder = tiny.model(tmp_path_factory.mktemp("inpainting") / "model")
        text = {"hidden_size": 16}
        parts = tiny.networks(
            (16, 16, 16, 16), text=text,
            unet={"in_channels": 9, "sample_size": 4, "block_out_channels": (16, 32), **tiny.TWO_LEVELS},
        )  # fmt: skip
        shutil.rmtree(folder / "unet")
        parts.unet.save_pretrained(folder / "unet")
        return folder

    def test_a_folder(self, folder: Path) -> None:
        model = sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")
        assert model.unet.inpaints
        (drawn,) = model(
            "a red disc", image=pixels(1, 32, 32), mask_image=rectangle(8, 8, 24, 24, 32, 32), num_inference_steps=2
        )
        assert drawn.size == (32, 32)
        described = {part.part: part for part in Source.open(folder).describe().components}
        assert described["unet"].config["in_channels"] == 9
        with pytest.raises(sdkit.ArgumentError, match="trained to paint into images: give image and mask_image"):
            model("a red disc")
        with pytest.raises(sdkit.ArgumentError, match="trained to paint into images: give image and mask_image"):
            model("a red disc", image=pixels(1, 32, 32))

    def test_a_single_file(self, folder: Path, tmp_path: Path) -> None:
        """The file is in the original layout, and its configs are given, since its sizes are those of no public one."""
        whole = sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")
        tensors = {
            **original_layout.vae(whole.vae.network.state_dict()),
            **original_layout.unet(whole.unet.network.state_dict(), 1),
            **original_layout.clip(whole.text.network.state_dict()),
        }
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "inpainting.safetensors")
        file = sdkit.StableDiffusion.from_pretrained(
            tmp_path / "inpainting.safetensors", config=folder, dtype="fp32", device="cpu"
        )
        common = {
            "prompt": "a red disc", "image": pixels(1, 32, 32), "mask_image": rectangle(8, 8, 24, 24, 32, 32),
            "num_inference_steps": 2, "output_type": "latent",
        }  # fmt: skip
        assert torch.equal(file(**common), whole(**common))

    def test_training_refuses_it(self, folder: Path) -> None:
        with pytest.raises(sdkit.SourceError, match=r"looks like an inpainting model \(9 input channels\)"):
            Source.open(folder).denoiser()
        config = json.loads((folder / "unet" / "config.json").read_text())
        assert config["in_channels"] == 9


IMAGE, MASK = torch.zeros(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask_image": MASK}, sdkit.ArgumentError, "mask_image belongs to an image; give it as image"),
    (
        {"image": IMAGE, "mask_image": torch.ones(1, 1, 16, 24)},
        sdkit.ArgumentError,
        "24 x 16 pixels, the image 16 x 16",
    ),
    ({"image": IMAGE, "mask_image": MASK * 0}, sdkit.ArgumentError, "the mask is black"),
    ({"image": IMAGE, "mask_image": MASK * 2}, sdkit.ImageError, "must be in [0, 1]"),
    ({"image": IMAGE, "mask_image": MASK * float("nan")}, sdkit.ImageError, "must be in [0, 1]"),
    ({"image": IMAGE, "mask_image": torch.ones(3, 16, 16)}, sdkit.ImageError, "shape (3, 16, 16) is no mask"),
    ({"image": IMAGE, "mask_image": torch.ones(1, 1, 1, 16, 16)}, sdkit.ImageError, "is no mask"),
    (
        {"image": IMAGE, "mask_image": MASK * 1j},
        sdkit.ImageError,
        "a tensor of torch.complex64 is no mask; give booleans",
    ),
    ({"image": IMAGE, "mask_image": "no.png"}, sdkit.ImageError, "no.png"),
    ({"image": IMAGE, "mask_image": 3}, sdkit.ImageError, "no image"),
    ({"image": IMAGE, "mask_image": []}, sdkit.ImageError, "empty"),
    ({"image": IMAGE, "mask_image": np.ones((16, 16))}, sdkit.ImageError, "float64"),
    ({"image": IMAGE, "mask_image": torch.ones(2, 1, 16, 16)}, sdkit.ArgumentError, "2 masks cannot serve 1 prompts"),
    ({"image": IMAGE, "mask_blur": 4.0}, sdkit.ArgumentError, "mask_blur belongs to a mask"),
    ({"mask_blur": 4.0}, sdkit.ArgumentError, "mask_blur belongs to a mask"),
    ({"image": IMAGE, "mask_image": MASK, "mask_blur": -1}, sdkit.ArgumentError, "mask_blur must be a number from 0"),
    ({"image": IMAGE, "mask_image": MASK, "mask_blur": 1e4}, sdkit.ArgumentError, "mask_blur must be a number from 0"),
    ({"image": IMAGE, "padding_mask_crop": 8}, sdkit.ArgumentError, "padding_mask_crop belongs to a mask"),
    (
        {"image": IMAGE, "mask_image": MASK, "padding_mask_crop": -8},
        sdkit.ArgumentError,
        "padding_mask_crop must be a whole number of at least 0",
    ),
    (
        {"image": IMAGE, "mask_image": MASK, "padding_mask_crop": 1.5},
        sdkit.ArgumentError,
        "padding_mask_crop must be a whole number",
    ),
    (
        {"prompt": ["a", "b"], "image": [IMAGE, IMAGE], "mask_image": MASK, "padding_mask_crop": 1},
        sdkit.ArgumentError,
        "give one image and one mask",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input(sd: sdkit.StableDiffusion, case: int) -> None:
    arguments, kind, fragment = BAD[case]
    with pytest.raises(kind) as caught:
        sd(**{"prompt": "a", "num_inference_steps": 2, **arguments})
    message = str(caught.value)
    assert fragment in message
    assert "\n" not in message
    assert message.endswith(".")
