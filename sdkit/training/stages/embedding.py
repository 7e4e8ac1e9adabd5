"""Textual inversion (Gal et al. 2022, https://arxiv.org/abs/2208.01618): a new token's vectors are learned from a few
images, and every network stays frozen."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdkit.data.transform import draw
from sdkit.diffusion.losses import diffusion_loss
from sdkit.engines.attention import PlainWhereSmall
from sdkit.errors import ArgumentError
from sdkit.images import to_tensors
from sdkit.loading.embedding_file import FILENAME, save_embedding
from sdkit.loading.source import Source
from sdkit.messages import clean
from sdkit.networks.autoencoder import VAE
from sdkit.networks.denoiser import UNet
from sdkit.networks.learned_tokens import GrownEmbedding
from sdkit.networks.text_encoder import TextEncoder
from sdkit.pipelines.text_to_image import StableDiffusion
from sdkit.training.loop import fit
from sdkit.training.settings import EmbeddingConfig
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.drawing import Drawing
from sdkit.training.stages.encoding import BatchEncoder
from sdkit.training.stages.evaluating import Picture, PictureMetrics
from sdkit.training.stages.examples import (
    DenoisingExamples,
    Row,
    denoising_batch,
    open_provider,
    validation_batch,
    validation_metrics,
)
from sdkit.training.stages.frozen import check_frozen, keep_schedule
from sdkit.training.stages.images import identity_of
from sdkit.training.stages.unet import HALF, Denoiser, enable_gradient_checkpointing

TEMPLATES = {
    "object": (
        "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
        "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
        "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}",
        "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
        "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}",
        "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}",
        "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}",
    ),
    "style": (
        "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
        "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
        "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
        "a close-up painting in the style of {}", "a bright painting in the style of {}",
        "a good painting in the style of {}", "a close-up painting in the style of {}",
        "a rendition in the style of {}", "a nice painting in the style of {}", "a small painting in the style of {}",
        "a weird painting in the style of {}", "a large painting in the style of {}",
    ),
}  # fmt: skip
"""Name of a kind -> captions of images of that kind, with {} for the token (Gal et al. 2022, supplementary E)."""
CHOICE = 2**32 - 2  # passed to `draw` as the number of an augmentation; no image has this many
PLAYER = "embedding"


def train_embedding(config: EmbeddingConfig) -> Path:
    """Learn the vectors of a new token from a few images. An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images, or a latent cache of encoded images.

    Returns:
        The run folder. Its result/learned_embeds.safetensors is for `StableDiffusion.load_embedding`, diffusers, and
        A1111.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.

    Example:
        >>> from sdkit.training import EmbeddingConfig, train_embedding
        >>> settings = EmbeddingConfig(data="photos", token="<zork>", init_token="cat", out_dir="runs/zork",
        ...                            size=64, max_steps=2)
        >>> run = train_embedding(settings)
        >>> sorted(path.name for path in (run / "result").iterdir())
        ['learned_embeds.safetensors', 'training.json']
    """
    return fit(EmbeddingStage(config), config, Path(config.out_dir))


class TokenCaptions:
    """Examples whose captions name the token. For the attributes see `DenoisingExamples`.

    An image keeps its caption if it names the token. If not, it has one of the templates instead, another one in each
    epoch. Captions are spelled from token ids, so that those from a latent cache are the same as those from images.

    Args:
        examples: The examples.
        plain: The text encoder that made the examples' token ids, without the token.
        text: The text encoder with the token.
        token: The token.
        templates: Captions with {} for the token.
        seed: Random seed of the choice of templates.
    """

    def __init__(
        self,
        examples: DenoisingExamples,
        plain: TextEncoder,
        text: TextEncoder,
        *,
        token: str,
        templates: Sequence[str],
        seed: int,
    ) -> None:
        self.examples, self.plain, self.text, self.token, self.seed = examples, plain, text, token, seed
        self.templates = [template.format(token) for template in templates]
        # A caption in a cache is spelled with spaces between its pieces, such as "< zork >".
        pieces = plain.spelled(plain.tokenize(token)[0][0]).split()
        self._named = re.compile(r"\s*".join(map(re.escape, pieces)), re.IGNORECASE)
        self.scale, self.shift, self.shape = examples.scale, examples.shift, examples.shape
        self.train, self.held_out, self.empty = examples.train, examples.held_out, {"ids": examples.empty["ids"]}
        self.identity, self.skipped = examples.identity, examples.skipped

    def load(self, item: int, epoch: int) -> Row:
        """Return training example `item`, augmented for `epoch`."""
        generator = draw(self.seed, epoch * len(self.train) + item, CHOICE)
        k = int(torch.randint(len(self.templates), (), generator=generator))
        return self._captioned(self.examples.load(item, epoch), self.templates[k])

    def validation(self, i: int) -> Row:
        """Return held-out example i. Its caption is its own, or the first template."""
        return self._captioned(self.examples.validation(i), self.templates[0])

    def held_out_caption(self, i: int) -> str:
        """Return the caption of held-out example i."""
        return self._caption(self.examples.held_out_caption(i), self.templates[0])

    def name(self, item: int) -> str:
        """Return the name of training example `item`, for messages."""
        return self.examples.name(item)

    def _captioned(self, row: Row, template: str) -> Row:
        """Return an example with the ids of its new caption; its own ids and embeddings are dropped."""
        caption = self._caption(self.plain.spelled(row["ids"]), template)
        kept = {name: value for name, value in row.items() if name not in ("ids", "embeddings")}
        return {**kept, "ids": self.text.tokenize(caption)[0][0]}

    def _caption(self, caption: str, template: str) -> str:
        if not self._named.search(caption):
            return template
        return " ".join(self._named.sub(lambda _: f" {self.token} ", caption).split())


class EmbeddingStage:
    """The stage of `train_embedding`: one player, whose only trainable parameter is the vectors of the token.

    Args:
        config: Settings of the run.

    Attributes:
        evaluators: Functions of the step that return further metrics of each validation, the same on every process.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
    """

    def __init__(self, config: EmbeddingConfig) -> None:
        self.config = config
        model = Source.open(config.model)
        vae_source = model if config.vae is None else Source.open(config.vae)
        self.vae = VAE(vae_source.autoencoder()).eval().requires_grad_(False)
        self.text = TextEncoder(*model.text_encoder()).eval().requires_grad_(False)
        self.unet = UNet(model.denoiser()).eval().requires_grad_(False)
        self.schedule = model.schedule(latents=self.vae.kind.makes_latents)
        keep_schedule(config, model.scheduler_config(), "an embedding")
        StableDiffusion(self.vae, self.text, self.unet, self.schedule)  # raises if the parts do not fit each other
        check_frozen(self.unet, "an embedding")
        self.objective = DenoisingObjective(self.schedule, snr_gamma=config.snr_gamma, noise_offset=config.noise_offset)
        networks = identity_of(
            self.vae.network, self.text.network, self.unet.network, schedule=model.scheduler_config()
        )
        side = self.unet.sample_size * self.vae.factor
        plain = TextEncoder(self.text.network, self.text.tokenizer)
        with warnings.catch_warnings():  # templates replace captions that are missing
            warnings.filterwarnings("ignore", message=".*the empty prompt is taken for all")
            examples = open_provider(
                config.data, self.vae, plain, size=config.size, own_size=(side, side), augment=config.augment,
                seed=config.seed, trains_text=True, **config.opened_with(),
            )  # fmt: skip
        self._add_token()
        self.examples = TokenCaptions(
            examples, plain, self.text, token=config.token, templates=TEMPLATES[config.template], seed=config.seed
        )
        self.encoder = BatchEncoder(
            self.vae, self.text, scale=examples.scale, shift=examples.shift, trains_text=True,
            half=config.mixed_precision == "bf16",  # not in float16, where this VAE can overflow
        )  # fmt: skip
        self.identity = {"data": examples.identity, "model": networks, "vae": self.vae.identity}
        self.size = len(examples.train)
        self.evaluators: list[Callable[[int], Mapping[str, float]]] = []
        height, width = (side * self.vae.factor for side in examples.shape)
        self.drawing = Drawing(
            self.unet, self.vae, self.text, self.schedule, prompts=config.validation_prompts, folder=config.samples,
            size=(height, width), guidance_scale=model.guidance_scale, half=HALF.get(config.mixed_precision),
            trains_text=True,
        )  # fmt: skip
        if config.validation_prompts:
            self.evaluators.append(self.drawing)
        if config.evaluate:
            self.pictures = PictureMetrics(
                config.metrics, count=len(examples.held_out), picture=self._picture, size=(height, width),
                device=lambda: self.unet.device,
            )  # fmt: skip
            self.evaluators.append(self._evaluate)
        self.players = [
            Player(
                PLAYER, self.denoiser, self.loss, learning_rate=config.learning_rate, ema=config.ema_decay > 0,
                weight_decay=0.0,  # it would pull the vectors away from the vocabulary, towards 0
                after_update=self._keep_norm if config.keep_norm else None,
            )
        ]  # fmt: skip

    def _add_token(self) -> None:
        """Add the token to the text encoder, each of its vectors that of `init_token`, and mark them for training."""
        config = self.config
        ids = self.text.tokenize(config.init_token)[0][0, 0].tolist()
        inside = ids[1 : ids.index(self.text.tokenizer.eos_token_id, 1)]
        if len(inside) != 1 or inside[0] == self.text.tokenizer.unk_token_id:
            spelled = f"is {len(inside)} tokens" if len(inside) > 1 else "is no word"
            raise ArgumentError(
                f"init_token {clean(repr(config.init_token))} {spelled} of this model's vocabulary; give a word that "
                "is one, such as a noun for what the images show."
            )
        owner = getattr(self.text.network, "text_model", self.text.network).embeddings
        vocabulary = owner.token_embedding.weight
        self.norm = float(vocabulary.norm(dim=1).mean())
        self.text.add_token(config.token, vocabulary[inside].expand(config.vectors, -1))
        table = owner.token_embedding
        assert isinstance(table, GrownEmbedding)
        self.vectors = table.learned.requires_grad_(True)
        for p in self.unet.parameters():  # frozen weights can be in half precision, since autocast casts them anyway
            p.data = p.data.to(HALF.get(config.mixed_precision, torch.float32))
        self.unet.network.set_attn_processor(PlainWhereSmall())
        if config.gradient_checkpointing:
            for part in (self.unet.network, self.text.network):
                enable_gradient_checkpointing(part)
        self.denoiser = Denoiser(self.unet, self.text)

    def _keep_norm(self, networks: Mapping[str, nn.Module], batches: Sequence[Any], step: int) -> Mapping[str, float]:
        """Scale the vectors to the mean norm of the vocabulary's."""
        (vectors,) = (p for p in networks[PLAYER].parameters() if p.requires_grad)
        vectors.mul_(self.norm / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12))
        return {}

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return posterior or pixels, caption, timestep, and noise of samples (n, item), as `collated` does.

        All random values depend only on n and the seed.
        """
        config = self.config
        return denoising_batch(
            samples,
            self.examples,
            self.objective,
            self._shape,
            seed=config.seed,
            caption_dropout=config.caption_dropout,
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Shape (4, h, w) of the latents of one example."""
        height, width = self.examples.shape
        return (self.vae.channels, height, width)

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.examples.name(item) for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the denoising loss, and its parts to log; see `DenoisingObjective.loss`."""
        output, target = self._denoised(networks[PLAYER], batch)
        return self.objective.loss(output, target, batch["t"], batch.get("weight"))

    def _denoised(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the network's output for noised latents, and its target, both (B, 4, h, w)."""
        return self.encoder.denoised(self.objective, network, batch)

    def validate(self, step: int) -> dict[str, float]:
        """Return the unweighted loss on a fixed grid of held-out images, noises, and timesteps.

        Also save images of the validation prompts in samples/, and the names of skipped images in skipped.json.
        Metrics of the `evaluators` come last.
        """
        return validation_metrics(
            self.examples, self._validation_loss, self.evaluators, step,
            skipped=Path(self.config.out_dir) / "skipped.json",
        )  # fmt: skip

    def _validation_loss(self, i: int) -> float:
        """Return the loss of one held-out image over the validation grid."""
        batch = validation_batch(i, self.examples, self.objective, self._shape, self.unet.device)
        return float(diffusion_loss(*self._denoised(self.denoiser, batch)))

    def _evaluate(self, step: int) -> Mapping[str, float]:
        """Return the metrics of pictures of the held-out captions."""
        metrics = self.pictures(step)
        self.drawing.rest()
        return metrics

    def _picture(self, i: int) -> Picture:
        """Draw the caption of held-out image i, always from the same seed. A cached image is decoded."""
        row, caption = self.examples.validation(i), self.examples.held_out_caption(i)
        (drawn,) = to_tensors(self.drawing.draw(caption, seed=i))
        return Picture(drawn, self.encoder.original(row, self.unet.device), caption)

    def export(self, folder: Path) -> None:
        """Write the embedding into an empty folder."""
        save_embedding(self.config.token, self.vectors, folder / FILENAME)
