"""Training a prior over the codes of a frozen VQ model: codes, and a condition -> network -> cross-entropy.

Codes are the nearest ones to the VQ model's latents. A latent cache holds these latents, so that it also serves as a
cache of codes, and of the codes of maps. Latents of images are rounded as a cache rounds them, so that the codes are
the same.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdkit.data.latent_cache.manifest import Manifest
from sdkit.data.pairs import open_conditions
from sdkit.data.sources import open_examples
from sdkit.errors import ArgumentError, CacheError, DataError
from sdkit.files import expanded
from sdkit.images import to_tensors
from sdkit.loading.single_file import LARGEST
from sdkit.loading.source import Source
from sdkit.networks.autoencoder import VAE
from sdkit.networks.autoencoder_kinds import nearest_codes
from sdkit.networks.code_prior import CodePrior, new_prior, parameters_of, save_prior
from sdkit.networks.code_transformer import CodeTransformer
from sdkit.networks.prior_shape import PriorShape
from sdkit.networks.text_encoder import TextEncoder
from sdkit.networks.vqvae2 import Level, load_vqvae2
from sdkit.pipelines.code_sampling import draw_codes
from sdkit.pipelines.tokens import PRIOR, TOKENIZER, TokenPipeline
from sdkit.pipelines.two_levels import VQVAE2_FOLDER
from sdkit.training.batches import noise_of
from sdkit.training.loop import fit
from sdkit.training.settings import PriorConfig
from sdkit.training.signals import raise_if_stopped
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.classes import LabelledExamples, caption_classes
from sdkit.training.stages.concatenation import CachedConditions
from sdkit.training.stages.conditions import PairedExamples
from sdkit.training.stages.encoding import BatchEncoder
from sdkit.training.stages.evaluating import Picture, PictureMetrics
from sdkit.training.stages.examples import CachedLatents, ImageLatents, Row, open_provider, validation_metrics
from sdkit.training.stages.images import identity_of, is_cache, training_transform
from sdkit.training.stages.unet import enable_gradient_checkpointing

PLAYER = "prior"


def train_prior(config: PriorConfig) -> Path:
    """Train a prior over the codes of a VQ model from scratch. An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images, or a latent cache made with the VQ model.

    Returns:
        The run folder. Its result/ is for `sdkit.TokenPipeline.from_pretrained`; that of a level, for
        `sdkit.pipelines.two_levels.TwoLevelPipeline.from_pretrained`.

    Raises:
        SdkitError: The settings, the VQ model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.

    Example:
        >>> import diffusers
        >>> import sdkit
        >>> from sdkit.training import PriorConfig, train_prior
        >>> diffusers.VQModel(sample_size=8, num_vq_embeddings=16).save_pretrained("vq")
        >>> settings = PriorConfig(data="photos", vae="vq", out_dir="runs/prior", layers=2, width=32, max_steps=2)
        >>> run = train_prior(settings)
        >>> pipeline = sdkit.TokenPipeline.from_pretrained(run / "result", device="cpu")
        >>> [image.size for image in pipeline(num_images=2, seed=1)]
        [(8, 8), (8, 8)]
    """
    return fit(PriorStage(config), config, Path(config.out_dir))


class PriorStage:
    """The stage of `train_prior`: one player, the prior; and a frozen VQ model.

    Args:
        config: Settings of the run.

    Attributes:
        evaluators: Functions of the step that return further metrics of each validation, the same on every process.

    Raises:
        SdkitError: The settings, the VQ model, or the data cannot be used.
    """

    def __init__(self, config: PriorConfig) -> None:
        self.config = config
        model = Source.open(config.model)
        self.vae: VAE | Level
        if config.level is not None:
            self.vae = Level(load_vqvae2(str(config.vae)), config.level)
        else:
            self.vae = VAE((model if config.vae is None else Source.open(config.vae)).autoencoder())
        self.vae.eval().requires_grad_(False)
        if self.vae.codebook is None:
            raise ArgumentError("a prior learns codes, and this VAE has no codebook; name a VQModel as vae.")
        self.text = TextEncoder(*model.text_encoder())
        # The export needs an unused copy, because tokenizing changes what a tokenizer saves.
        self.tokenizer = copy.deepcopy(self.text.tokenizer)
        self.condition = "map" if config.level == "bottom" else config.conditioned_on
        self.examples: CachedLatents | ImageLatents | LabelledExamples = self._open()
        self.identity = {
            "data": self.examples.identity,
            "model": identity_of(self.vae.network),
            "vae": self.vae.identity,
        }
        self.classes: tuple[str, ...] = ()
        if config.conditioned_on == "class":
            self.examples = labelled = _labelled(self.examples)
            self.classes = labelled.classes.names
            self.identity["classes"] = labelled.classes.identity
        self.prior = self._make_prior(len(self.vae.codebook))
        self.size = len(self.examples.train)
        self.evaluators: list[Callable[[int], Mapping[str, float]]] = []
        if config.evaluate:
            assert isinstance(self.vae, VAE)  # settings of a level name no metrics
            self.originals = BatchEncoder(self.vae, self.text, scale=self.examples.scale, shift=self.examples.shift)
            height, width = (side * self.vae.factor for side in self.examples.shape)
            self.pictures = PictureMetrics(
                config.metrics, count=len(self.examples.held_out), picture=self._picture, size=(height, width),
                device=lambda: self._device,
            )  # fmt: skip
            self.evaluators.append(self._evaluate)
        rate, ema = config.learning_rate, config.ema_decay > 0
        self.players = [Player(PLAYER, self.prior, self.loss, learning_rate=rate, ema=ema)]

    def _open(self) -> CachedLatents | ImageLatents:
        """Open the data. Rows of a prior of maps have `concat`, or `concat_pixels` to encode."""
        config: Any = self.config
        vae: Any = self.vae
        sample = vae.network.config.sample_size
        own = (sample, sample) if isinstance(sample, int) else tuple(sample)
        common: Any = {"size": config.size, "own_size": own, "augment": config.augment, "seed": config.seed}
        with warnings.catch_warnings():
            if config.conditioned_on not in ("text", "class"):
                warnings.filterwarnings("ignore", message=".*the empty prompt is taken for all")
            if config.conditioned_on == "map":
                return self._open_maps(common)
            if config.level is not None and is_cache(config.data):
                raise DataError("a latent cache holds one level of latents; give the images that it was made of.")
            found: Any = open_provider(config.data, vae, self.text, trains_text=True, **common, **config.opened_with())
            return found  # type: ignore[no-any-return]

    def _open_maps(self, common: Mapping[str, Any]) -> CachedLatents | ImageLatents:
        """Open images with maps: from a latent cache, a column, or another folder."""
        config, vae = self.config, self.vae
        assert isinstance(vae, VAE)  # settings of a level have no maps
        places = [name for name in ("condition_column", "conditioning_data") if getattr(config, name) is not None]
        if is_cache(config.data):
            if places:
                raise ArgumentError(f"{places[0]}= has no meaning for a latent cache; give it to sdkit cache instead.")
            if Manifest.read(expanded(config.data)).settings.condition != "latents":
                raise CacheError(
                    f"the cache {expanded(config.data)} holds no latents of maps; make another with sdkit cache "
                    "--condition-column or --conditioning-data."
                )
            found: Any = open_provider(
                config.data, vae, self.text, trains_text=True, cached=CachedConditions, **common,
                **config.opened_with(),
            )  # fmt: skip
            return found  # type: ignore[no-any-return]
        if not places:
            raise ArgumentError("conditioned_on map needs maps; name them as condition_column or conditioning_data.")
        size: Any = config.size or common["own_size"]
        vae.check_size(size)
        examples = open_examples(config.data, **config.opened_with())
        conditions = open_conditions(
            examples, config.data, column=config.condition_column, conditioning_data=config.conditioning_data,
            **config.opened_with(),
        )  # fmt: skip
        return PairedExamples(
            examples, conditions, lambda pixels: {"concat_pixels": pixels}, training_transform(size, config.augment),
            vae, self.text, seed=config.seed,
        )  # fmt: skip

    def _make_prior(self, codes: int) -> CodePrior:
        """Return the prior, with weights that depend on the seed alone."""
        config, grid = self.config, self.examples.shape
        shape_of: dict[str | None, tuple[tuple[int, ...], int]] = {
            None: ((), 0),
            "text": ((self.text.length,), len(self.tokenizer)),
            "class": ((), len(self.classes)),
            "map": (grid if config.level is None else (grid[0] // 2, grid[1] // 2), codes),
        }
        condition_shape, tokens = shape_of[self.condition]
        shape = PriorShape(
            kind=config.kind, codes=codes, grid=grid, condition=self.condition,
            condition_shape=condition_shape, tokens=tokens, classes=self.classes, layers=config.layers,
            width=config.width, heads=config.heads if config.kind == "transformer" else 1,
        )  # fmt: skip
        if (count := parameters_of(shape)) > LARGEST:
            raise ArgumentError(
                f"a prior of {config.layers} layers of width {config.width} would have {count:,} parameters, sdkit "
                f"builds at most {LARGEST:,}; take fewer layers, or a smaller width."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            prior = new_prior(shape)
        if config.gradient_checkpointing and isinstance(prior, CodeTransformer):
            enable_gradient_checkpointing(prior.network)
        return prior

    @property
    def _device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return pixels or latents of samples (n, item), and their conditions, some of which are left out.

        All random values depend only on n and the seed.
        """
        rows = []
        for n, item in samples:
            row = self._row(self.examples.load(item, n // self.size))
            left_out = float(torch.rand((), generator=noise_of(self.config.seed, n))) < self.config.condition_dropout
            if self.condition is not None:
                row["left_out"] = torch.tensor(left_out)
            rows.append(row)
        return _stacked(rows)

    def _row(self, example: Row) -> Row:
        """Return what the loss reads of an example: its image, and `condition` or the image of its map."""
        row: Row = {name: example[name] for name in ("pixels", "mean", "concat", "concat_pixels") if name in example}
        if self.config.conditioned_on == "text":
            row["condition"] = example["ids"][0]
        elif self.config.conditioned_on == "class":
            row["condition"] = example["label"]
        return row

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.examples.name(item) for _, item in samples]

    def loss(
        self,
        networks: Mapping[str, nn.Module],
        batch: dict[str, Any],
        step: int,  # noqa: ARG002 - all steps are alike
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the cross-entropy of the codes, in nats per code."""
        codes, condition = self._codes(batch)
        return cross_entropy(networks[PLAYER](codes, condition), codes), {}

    @torch.no_grad()
    def _codes(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the codes (B, h, w) of a batch, and its conditions (B, ...)."""
        kind = self.condition
        if isinstance(self.vae, Level):
            codes, above = self.vae.codes(batch["pixels"])
        else:
            codes = self._nearest(batch, "pixels", "mean")
            above = self._nearest(batch, "concat_pixels", "concat") if kind == "map" else codes
        if kind is None:
            return codes, None
        condition = above if kind == "map" else batch["condition"]
        none = self.examples.empty["ids"][0] if kind == "text" else self.prior.shape.no_condition()
        left_out = batch["left_out"].reshape(-1, *[1] * none.ndim)
        return codes, torch.where(left_out, none.to(condition), condition)

    def _nearest(self, batch: Mapping[str, Any], pixels: str, mean: str) -> Tensor:
        """Return the codes (B, h, w) of the latents that a batch has by the name `mean`, or of its images."""
        assert isinstance(self.vae, VAE)
        if pixels in batch:
            vae = self.vae.to(batch[pixels].device)
            with torch.autocast(vae.device.type, enabled=False):  # rounding would give other codes
                latents = vae.posterior(batch[pixels].float())[0].half()
        else:
            latents = batch[mean]
        codebook = self.vae.codebook
        assert codebook is not None
        return nearest_codes(codebook.to(latents.device), latents)[1]

    def validate(self, step: int) -> dict[str, float]:
        """Return the exact cross-entropy of the held-out images, each with its condition.

        `loss` is in nats per code, `bits_per_code` in bits, and `bits_per_dimension` in bits of the codes for each
        number of the image (three for a pixel). Also save the names of skipped images in skipped.json. Metrics of the
        `evaluators` come last.
        """
        metrics = validation_metrics(
            self.examples, self._validation_loss, [], step, skipped=Path(self.config.out_dir) / "skipped.json"
        )
        bits = metrics["loss"] / math.log(2)
        metrics |= {"bits_per_code": bits, "bits_per_dimension": bits / (3 * self.vae.factor**2)}
        for evaluator in self.evaluators:
            metrics |= evaluator(step)
        return metrics

    def _held_out(self, i: int) -> tuple[Row, Tensor, Tensor | None]:
        """Return held-out example i, its codes (1, h, w), and its condition (1, ...)."""
        example = self.examples.validation(i)
        row = self._row(example) | {"left_out": torch.tensor(False)}
        codes, condition = self._codes({name: value.to(self._device) for name, value in _stacked([row]).items()})
        return example, codes, condition

    def _validation_loss(self, i: int) -> float:
        """Return the cross-entropy of one held-out image."""
        _, codes, condition = self._held_out(i)
        prior: Any = self.prior
        logits = type(prior).forward(prior, codes, condition)  # in float32; a call would run Accelerate's autocast
        return float(cross_entropy(logits, codes))

    def _evaluate(self, step: int) -> Mapping[str, float]:
        """Return the metrics of pictures of the held-out conditions."""
        metrics = self.pictures(step)
        self.vae.cpu()  # it needs GPU memory only while it works
        return metrics

    def _picture(self, i: int) -> Picture:
        """Draw a picture with the condition of held-out image i, always from the same seed."""
        example, _, condition = self._held_out(i)
        codes = draw_codes(
            self.prior, [torch.Generator().manual_seed(i)], condition=condition, before_step=raise_if_stopped
        )
        assert isinstance(self.vae, VAE)
        (drawn,) = to_tensors(self.vae.to(self._device).decode_codes(codes))
        return Picture(drawn, self.originals.original(example, self._device), self.examples.held_out_caption(i))

    def export(self, folder: Path) -> None:
        """Write the VQ model, the prior, and the tokenizer of a prior of texts into an empty folder."""
        tokenizer = self.tokenizer if self.config.conditioned_on == "text" else None
        if isinstance(self.vae, VAE):
            TokenPipeline(self.vae, self.prior, tokenizer).write(folder)
            return
        self.vae.network.save_pretrained(folder / VQVAE2_FOLDER)
        save_prior(self.prior, folder / PRIOR)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / TOKENIZER)


def _labelled(examples: CachedLatents | ImageLatents) -> LabelledExamples:
    """Return the examples with their captions as classes. An image without a caption is of none."""
    classes = caption_classes(examples)
    if len(classes.names) < 2:
        raise DataError("all images have the same caption, and classes are captions that differ; leave them out.")
    return LabelledExamples(examples, classes, none=len(classes.names))


def cross_entropy(logits: Tensor, codes: Tensor) -> Tensor:
    """Return the mean cross-entropy, in nats per code, of logits (B, h, w, N) and codes (B, h, w)."""
    return F.cross_entropy(logits.float().movedim(-1, 1), codes)


def _stacked(rows: Sequence[Row]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
