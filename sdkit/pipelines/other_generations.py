"""Settings of an image that another model than Stable Diffusion drew, as its PNG stores them: `CodeGeneration` for a
prior over codes, `UnCLIPGeneration` for DALL-E 2.

Importing this module does not load PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sdkit import __version__
from sdkit.errors import ArgumentError, ImageError
from sdkit.pipelines.settings import DECODER_GUIDANCE, DECODER_STEPS, PIPELINE, PRIOR_GUIDANCE, PRIOR_STEPS

if TYPE_CHECKING:
    from PIL import Image

    from sdkit.pipelines.tokens import TokenPipeline
    from sdkit.pipelines.unclip import UnCLIP

CODES_AT_ONCE = 16
"""Images whose codes are drawn together, unless a user says how many."""


@dataclass(frozen=True, kw_only=True)
class CodeGeneration:
    """Settings of an image whose codes a prior drew; see `TokenPipeline`.

    Attributes:
        prompt: The prompt, or the name of a class; empty draws without a condition.
        seed: Random seed.
        condition: File of the map, for a prior of maps.
        condition_sha256: SHA-256 of that file.
        model: Source of the model.
        dtype: Precision of the VQ model.
        height: Height in pixels. None is that of the training images, or of the map.
        width: Width in pixels, likewise.
        temperature: For codes: divisor of the logits; 1 draws from the prior itself, 0 takes the likeliest code.
        top_k: For codes: number of the likeliest codes to draw from. None draws from all.
        top_p: For codes: draw from the fewest of the likeliest codes that have this probability together. None draws
            from all.
        guidance_scale: Scale of classifier-free guidance on the logits; 1 turns it off.
    """

    prompt: str = ""
    seed: int = 0
    condition: str | None = None
    condition_sha256: str | None = None
    model: str = ""
    dtype: str = "auto"
    height: int | None = None
    width: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance_scale: float = 1.0

    @property
    def takes_no_prompt(self) -> bool:
        """Whether there is something to draw without a prompt."""
        return True

    def check(self) -> None:
        """Raise ArgumentError for values that no model accepts, before one is loaded."""
        from sdkit.arguments import first_seed, strings
        from sdkit.pipelines.code_sampling import CodeSampling

        strings("prompt", self.prompt)
        first_seed(self.seed, 1)
        CodeSampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, guidance_scale=self.guidance_scale
        )

    def load(self, device: str) -> TokenPipeline:
        """Load the model."""
        from sdkit.pipelines.tokens import TokenPipeline

        return TokenPipeline.from_pretrained(self.model, dtype=self.dtype, device=device)

    def at_once(self, pipeline: TokenPipeline) -> int:
        """Return how many images to draw together."""
        del pipeline
        return CODES_AT_ONCE

    def inputs(self) -> tuple[Image.Image | None, CodeGeneration]:
        """Read the map. Return it, and these settings with the SHA-256 of its file.

        Raises:
            ImageError: The file cannot be read, or has changed since these settings were written.
        """
        from sdkit import images
        from sdkit.pipelines.generation import hashed

        if self.condition is None:
            return None, self
        picture = images.read(self.condition)
        return picture, replace(self, condition_sha256=hashed(self.condition, "condition", self.condition_sha256))

    def draw(
        self, pipeline: TokenPipeline, prompts: Sequence[str], seeds: Sequence[int], given: Image.Image | None
    ) -> list[Image.Image]:
        """Draw an image of each prompt, or of the map `given`, from its seed."""
        if given is not None and any(prompts):
            raise ArgumentError("a prior is conditioned on a prompt or a map, not on both; leave one of them out.")
        reads_map = pipeline.prior.shape.condition == "map"
        if given is not None and not reads_map:
            raise ArgumentError("this prior reads no map; leave condition out.")
        if any(prompts) and reads_map:  # the pipeline would take a prompt for a file
            raise ArgumentError("this prior reads a map, not a prompt; give the file of the map as condition.")
        condition: Any = [given] * len(seeds) if given is not None else [*prompts]
        if given is None and not any(prompts):
            condition = None
        drawn: list[Image.Image] = pipeline(
            condition, num_images=len(seeds) if condition is None else 1, seed=seeds, height=self.height,
            width=self.width, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            guidance_scale=self.guidance_scale,
        )  # fmt: skip
        return drawn

    def text(self) -> dict[str, str]:
        """Return the text chunks of a PNG."""
        return _text(self)


@dataclass(frozen=True, kw_only=True)
class UnCLIPGeneration:
    """Settings of an image of DALL-E 2: a text, or an image of which it is a variation; see `UnCLIP`.

    Attributes:
        prompt: The prompt; with an image, a text that the decoder reads beside it.
        seed: Random seed.
        image: File of the image to vary.
        image_sha256: SHA-256 of that file.
        model: Source of the model.
        prior: For DALL-E 2: source of the prior, such as the result of train image-prior. None is the model's own.
        dtype: Precision of the networks.
        num_inference_steps: Steps of the decoder's sampler.
        guidance_scale: Guidance scale of the decoder; 1 turns it off.
        sampler: Sampler of the decoder.
        noise_level: For DALL-E 2: timestep of the noise that is added to the embedding; more gives more variety.
        prior_num_inference_steps: For DALL-E 2: steps of the prior's sampler.
        prior_guidance_scale: For DALL-E 2: guidance scale of the prior; 1 turns it off.
        prior_sampler: For DALL-E 2: sampler of the prior.
    """

    prompt: str = ""
    seed: int = 0
    image: str | None = None
    image_sha256: str | None = None
    model: str = ""
    prior: str | None = None
    dtype: str = "auto"
    num_inference_steps: int = DECODER_STEPS
    guidance_scale: float = DECODER_GUIDANCE
    sampler: str = "ddim"
    noise_level: int = 0
    prior_num_inference_steps: int = PRIOR_STEPS
    prior_guidance_scale: float = PRIOR_GUIDANCE
    prior_sampler: str = "ddpm"

    @property
    def takes_no_prompt(self) -> bool:
        """Whether there is something to draw without a prompt."""
        return self.image is not None

    def check(self) -> None:
        """Raise ArgumentError for values that no model accepts, before one is loaded."""
        from sdkit.arguments import first_seed, strings
        from sdkit.diffusion.guidance import check_scale
        from sdkit.diffusion.samplers import sampler_by_name
        from sdkit.diffusion.schedule import check_steps

        strings("prompt", self.prompt)
        first_seed(self.seed, 1)
        for steps in (self.num_inference_steps, self.prior_num_inference_steps):
            check_steps(steps)
        for scale in (self.guidance_scale, self.prior_guidance_scale):
            check_scale(scale)
        for name in (self.sampler, self.prior_sampler):
            sampler_by_name(name)

    def load(self, device: str) -> UnCLIP:
        """Load the model."""
        from sdkit.pipelines.unclip import UnCLIP

        return UnCLIP.from_pretrained(self.model, prior=self.prior, dtype=self.dtype, device=device)

    def at_once(self, pipeline: UnCLIP) -> int:
        """Return how many images to draw together."""
        side = pipeline.sd.unet.sample_size * pipeline.sd.vae.factor
        return pipeline.sd.images_at_once(side, side)

    def inputs(self) -> tuple[Image.Image | None, UnCLIPGeneration]:
        """Read the image. Return it, and these settings with the SHA-256 of its file.

        Raises:
            ImageError: The file cannot be read, or has changed since these settings were written.
        """
        from sdkit import images
        from sdkit.pipelines.generation import hashed

        if self.image is None:
            return None, self
        return images.read(self.image), replace(self, image_sha256=hashed(self.image, "image", self.image_sha256))

    def draw(
        self, pipeline: UnCLIP, prompts: Sequence[str], seeds: Sequence[int], given: Image.Image | None
    ) -> list[Image.Image]:
        """Draw an image of each prompt, or a variation of the image `given`, from its seed."""
        common: dict[str, Any] = {
            "seed": seeds, "num_inference_steps": self.num_inference_steps, "guidance_scale": self.guidance_scale,
            "sampler": self.sampler, "noise_level": self.noise_level,
        }  # fmt: skip
        if given is not None:
            embeddings = pipeline.embed_images(given).expand(len(seeds), -1)
            return pipeline.draw(embeddings, prompt=prompts, **common)
        return pipeline(
            prompts, prior_num_inference_steps=self.prior_num_inference_steps,
            prior_guidance_scale=self.prior_guidance_scale, prior_sampler=self.prior_sampler, **common,
        )  # fmt: skip

    def text(self) -> dict[str, str]:
        """Return the text chunks of a PNG."""
        return _text(self)


OtherGeneration: TypeAlias = CodeGeneration | UnCLIPGeneration
KINDS: dict[str, type[CodeGeneration] | type[UnCLIPGeneration]] = {"codes": CodeGeneration, "unclip": UnCLIPGeneration}
"""Kind of a model, as `model_kind` returns it, and as PNGs name it -> the settings of its images."""


def _text(settings: OtherGeneration) -> dict[str, str]:
    """Return the text chunks of a PNG: each setting that is not None. Paths are absolute, as in `Generation.text`."""
    from sdkit.pipelines.generation import anywhere

    kind = next(name for name, cls in KINDS.items() if isinstance(settings, cls))
    values = {name: value for name, value in asdict(settings).items() if value is not None}
    values |= {name: anywhere(values[name]) for name in ("model", "prior", "condition", "image") if name in values}
    return {**{name: str(value) for name, value in values.items()}, PIPELINE: kind, "sdkit": __version__}


def read_other(path: str | Path, kind: str) -> OtherGeneration:
    """Read the settings of a model of this kind from the text chunks of a PNG.

    Raises:
        ImageError: The PNG holds no settings of this kind, or its text is damaged.
    """
    from sdkit import images
    from sdkit.pipelines.generation import parsed

    text, cls = images.read_text(path), KINDS[kind]
    if text.get(PIPELINE) != kind or not {"prompt", "seed", "model", "sdkit"} <= text.keys():
        raise ImageError(f"{path} was not drawn by a model of this kind; give one that was, or give options.")
    return cls(**{field.name: parsed(path, field, text[field.name]) for field in fields(cls) if field.name in text})
