"""Training the prior of DALL-E 2 (Ramesh et al. 2022, https://arxiv.org/abs/2204.06125, section 2.2): captions and
noised CLIP embeddings of images -> transformer -> the embeddings.

It is the denoising objective with x0 as the target, on vectors in place of latents.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from sdkit.atomic import atomic_write
from sdkit.data.transform import Transform
from sdkit.diffusion.conditioning import Conditioning
from sdkit.diffusion.guidance import guided
from sdkit.diffusion.losses import diffusion_loss
from sdkit.diffusion.samplers import ddim
from sdkit.diffusion.schedule import NoiseSchedule
from sdkit.errors import TrainingError
from sdkit.loading.unclip_folder import UnCLIPFolder, new_prior
from sdkit.messages import no_warnings, quiet
from sdkit.networks.clip import CLIP, TextTower
from sdkit.networks.image_prior import ImagePrior
from sdkit.tensor_files import encoded, read
from sdkit.training.batches import noise_of
from sdkit.training.distributed import split_over_processes
from sdkit.training.loop import fit
from sdkit.training.settings import ImagePriorConfig
from sdkit.training.stage import Player, Samples
from sdkit.training.stages.captioned import open_captioned, split_captioned
from sdkit.training.stages.clip import preprocessing, tokenizer_fingerprint
from sdkit.training.stages.denoising import DenoisingObjective
from sdkit.training.stages.encoding import MOST_EMBEDDINGS
from sdkit.training.stages.images import TrainingImages, first_usable, identity_of, report_skipped

SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "variance_type": "fixed_small_log",
    "clip_sample": True,
    "clip_sample_range": 5.0,
}
"""Noise schedule of a prior that is trained from scratch: the paper's cosine schedule and target, and Karlo's bound of
normalised embeddings."""
NOISING = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
"""Noise schedule of the decoder's noise augmentation."""
EMBEDDINGS = "embeddings.safetensors"
"""File in the run folder with the embeddings of all images."""
HEADER = 2**20  # most bytes of that file beside the numbers
SAMPLING_STEPS = 10


def train_image_prior(config: ImagePriorConfig) -> Path:
    """Train a prior, which turns a text into CLIP's embedding of an image. An existing run is resumed.

    Args:
        config: Settings of the run. `config.data` is a data set of images with captions.

    Returns:
        The run folder. Its result/ has the prior, both encoders of its CLIP, and the statistics of its embeddings, in
        the layout of diffusers' StableUnCLIPPipeline: for `UnCLIP.from_pretrained(..., prior=...)`.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
        TrainingStopped: SIGTERM, SIGHUP, or Ctrl-C arrived; a checkpoint has been written.
    """
    stage = ImagePriorStage(config)
    return fit(stage, config, Path(config.out_dir), before=stage.prepare)


class ImagePriorStage:
    """The stage of `train_image_prior`: one player, the prior, and a frozen CLIP.

    Args:
        config: Settings of the run.

    Raises:
        SdkitError: The settings, the model, or the data cannot be used.
    """

    def __init__(self, config: ImagePriorConfig) -> None:
        self.config = config
        self.clip = CLIP.from_pretrained(config.model, device="cpu")
        # The export needs an unused copy, because tokenizing changes what a tokenizer saves.
        self.tokenizer = copy.deepcopy(self.clip.tokenizer)
        text_network, self.image_network = halves(self.clip)
        self.text = TextTower(text_network, self.clip.tokenizer)
        self.scheduler: Mapping[str, Any] = SCHEDULER
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self._make_prior()
        self.prior.check_fits(self.text.width, self.text.hidden, self.text.length)
        self.schedule = NoiseSchedule.from_config(self.scheduler)
        self.objective = DenoisingObjective(self.schedule)
        self.examples = open_captioned(config.data, "a prior", config.opened_with())
        self.pairs, self.train, self.held_out = split_captioned(self.examples, "a prior")
        size = (self.clip.side, self.clip.side)
        self.images = TrainingImages(self.examples, Transform(size=size), config.seed)
        self.identity = {
            "data": self.examples.identity,
            "model": identity_of(self.clip.network, self.prior.network, schedule=dict(self.scheduler)),
            "tokenizer": tokenizer_fingerprint(self.clip.tokenizer),
        }
        self.size = len(self.train)
        self._rows: dict[int, int] = {}  # index of an example -> its row in the embeddings
        self._embeddings = self._used = torch.empty(0)
        self._texts: dict[bytes, Conditioning] = {}
        rate, ema = config.learning_rate, config.ema_decay > 0
        self.players = [Player("prior", self.prior, self.loss, learning_rate=rate, ema=ema)]

    def _make_prior(self) -> None:
        """Load or make the prior, and mark the parameters to train."""
        config = self.config
        if config.prior is None:
            network = new_prior(config.init or "")
        else:
            folder = UnCLIPFolder(config.prior)
            network, self.scheduler = folder.network("prior"), folder.scheduler_config("prior_scheduler")
        network.requires_grad_(True)
        for statistic in (network.clip_mean, network.clip_std):
            statistic.requires_grad_(False)
        self.prior = ImagePrior(network)

    def prepare(self) -> None:
        """Embed all images, on all processes together, unless the run folder has them. Then set the prior's statistics,
        if it is trained from scratch: those of the training images."""
        path = Path(self.config.out_dir) / EMBEDDINGS
        identity = {"data": self.identity["data"], "model": self.identity["model"]}
        found = _read(path, identity, (len(self.pairs), self.clip.width))
        there: list[bool] = gather_object([found is not None])  # on several machines, one may lack the file
        if found is None or not all(there):
            self.clip.to(PartialState().device)
            embedded = split_over_processes(len(self.pairs), self._embedded)
            found = {
                "embeddings": torch.stack([embedding for embedding, _ in embedded]),
                "used": torch.tensor([index for _, index in embedded]),
            }
            report_skipped(self.images.skipped, Path(self.config.out_dir) / "skipped.json")
            if PartialState().is_main_process:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(encoded(found, identity))
            self.clip.cpu()
        self._embeddings, self._used = found["embeddings"], found["used"]
        self._rows = {int(index): row for row, index in enumerate(self.pairs)}
        if self.config.init is not None:
            own = self._embeddings[[self._rows[int(index)] for index in self.train]].double()
            std = own.std(0, correction=0)
            self.prior.network.clip_mean.data.copy_(own.mean(0))
            self.prior.network.clip_std.data.copy_(torch.where(std > 0, std, 1.0))

    @torch.no_grad()
    def _embedded(self, row: int) -> tuple[Tensor, int]:
        """Return the embedding (D,) of an image, or of the next usable one, and the index of the one that was used."""
        used = -1

        def load(index: int) -> Tensor:
            nonlocal used
            used = index
            return self.images.pixels(self.examples[index], index, 0)

        pixels = first_usable(
            self.pairs, row, load, name=lambda index: self.examples[index].name, skipped=self.images.skipped,
            source=self.examples.source,
        )  # fmt: skip
        return self.clip.embed_images(pixels[None].to(self.clip.device))[0].cpu(), used

    def batch(self, samples: Samples) -> dict[str, Any]:
        """Return embeddings (B, D), token ids (B, L), timesteps, and noise (B, D) of samples (n, item)."""
        rows = []
        for n, item in samples:
            generator = noise_of(self.config.seed, n)
            dropped = float(torch.rand((), generator=generator)) < self.config.caption_dropout
            t = self.objective.timestep(generator)
            row = self._row(int(self.train[item]), empty=dropped)
            rows.append(row | {"t": t, "eps": self.objective.noise((self.prior.width,), generator)["eps"]})
        return _collated(rows)

    def _row(self, index: int, *, empty: bool = False) -> dict[str, Any]:
        """Return the embedding and the caption's token ids of an example; those of the empty caption if asked for."""
        row = self._rows[index]
        caption = "" if empty else self.examples[int(self._used[row])].caption
        return {"embedding": self._embeddings[row], "ids": self.text.words.ids(caption)[0]}

    def names(self, samples: Samples) -> list[str]:
        """Return the names of the examples of samples (n, item)."""
        return [self.examples[int(self.train[item])].name for _, item in samples]

    def loss(
        self, networks: Mapping[str, nn.Module], batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Return the mean squared error of the normalised embeddings; see `DenoisingObjective.loss`."""
        output, target = self._denoised(networks["prior"], batch)
        return self.objective.loss(output, target, batch["t"])

    def _denoised(self, network: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the network's output for noised, normalised embeddings, and its target, both (B, D)."""
        t, eps = torch.tensor(batch["t"]), batch["eps"]
        x_t, target = self.objective.noised(self.prior.normalised(batch["embedding"]), eps, t)
        return network(x_t, t.to(eps.device), self._condition(batch["ids"])), target

    def _condition(self, ids: Tensor) -> Conditioning:
        """Return the condition for token ids (B, L). Texts are encoded one at a time and cached on the CPU: a resumed
        run starts with an empty cache and must get bit-identical states."""
        conditions = []
        for one in ids:
            key = one.cpu().numpy().tobytes()
            if key not in self._texts:
                with torch.no_grad():
                    found = self.text.to(ids.device)(one[None]).to("cpu")
                if len(self._texts) >= MOST_EMBEDDINGS:
                    self._texts.clear()
                self._texts[key] = found
            conditions.append(self._texts[key].to(ids.device))
        return Conditioning.cat(conditions)

    def validate(self, step: int) -> dict[str, float]:
        """Return metrics of the held-out images.

        Returns:
            `loss` on a fixed grid of noises and timesteps; `cosine`, of the embeddings that are drawn for the captions
            with those of their images; and `cosine_shuffled`, with those of other images, as a control.
        """
        found = split_over_processes(len(self.held_out), self._measured)
        drawn, own = torch.stack([one[1] for one in found]), torch.stack([one[2] for one in found])
        return {
            "loss": math.fsum(one[0] for one in found) / len(found),
            "cosine": float(F.cosine_similarity(drawn, own).mean()),
            "cosine_shuffled": float(F.cosine_similarity(drawn, own.roll(1, 0)).mean()),
        }

    def _measured(self, i: int) -> tuple[float, Tensor, Tensor]:
        """Return the loss of held-out image i, the embedding that is drawn for its caption, and its own."""
        row, device = self._row(self.held_out[i]), self.prior.device
        grid = self.objective.validation_grid(i, (self.prior.width,))
        batch = _collated([row | {"t": one["t"], "eps": one["eps"]} for one in grid])
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        loss = float(diffusion_loss(*self._denoised(self.prior, batch)))
        predict = guided(self.prior, self.schedule, self._condition(row["ids"][None].to(device)), scale=1.0)
        x_T = torch.randn(1, self.prior.width, generator=torch.Generator().manual_seed(i)).to(device)
        steps = self.schedule.timesteps(min(SAMPLING_STEPS, self.schedule.num_timesteps))
        *_, last = ddim(predict, x_T, self.schedule, steps, clip_x0=self.schedule.clip_x0)
        return loss, self.prior.embeddings(last.x)[0].cpu(), row["embedding"]

    def export(self, folder: Path) -> None:
        """Write the prior's parts of a StableUnCLIPPipeline, the image encoder, and the statistics of embeddings."""
        from diffusers import DDPMScheduler
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

        normalizer = StableUnCLIPImageNormalizer(self.prior.width)
        normalizer.mean.data.copy_(self.prior.network.clip_mean)
        normalizer.std.data.copy_(self.prior.network.clip_std)
        parts = {
            "prior": self.prior.network, "prior_text_encoder": self.text.network, "prior_tokenizer": self.tokenizer,
            "image_encoder": self.image_network, "image_normalizer": normalizer,
        }  # fmt: skip
        with quiet("diffusers", "transformers"), no_warnings():
            for name, part in parts.items():
                part.save_pretrained(folder / name)
            DDPMScheduler.from_config(NOISING).save_pretrained(folder / "image_noising_scheduler")
        (folder / "prior_scheduler").mkdir()
        (folder / "prior_scheduler" / "scheduler_config.json").write_text(json.dumps(dict(self.scheduler), indent=2))
        (folder / "feature_extractor").mkdir()
        content = json.dumps(preprocessing(self.clip.side), indent=2)
        (folder / "feature_extractor" / "preprocessor_config.json").write_text(content)


def halves(clip: CLIP) -> tuple[Any, Any]:
    """Return the text encoder and the image encoder of a CLIP, each with its projection; they share its weights."""
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    network, width = clip.network, clip.network.config.projection_dim
    found = []
    for kind, config, name, projection in (
        (CLIPTextModelWithProjection, network.config.text_config, "text_model", "text_projection"),
        (CLIPVisionModelWithProjection, network.config.vision_config, "vision_model", "visual_projection"),
    ):
        config = copy.deepcopy(config)
        config.projection_dim = width
        with quiet("transformers"), no_warnings():
            half = kind(config)
        getattr(half, name).load_state_dict(getattr(network, name).state_dict(), assign=True)
        getattr(half, projection).load_state_dict(getattr(network, projection).state_dict(), assign=True)
        found.append(half.eval().requires_grad_(False))
    return found[0], found[1]


def _collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch of rows: tensors are stacked, and timesteps are a list."""
    batch: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    return {key: torch.stack(values) if isinstance(values[0], Tensor) else values for key, values in batch.items()}


def _read(path: Path, identity: Mapping[str, str], shape: tuple[int, int]) -> dict[str, Tensor] | None:
    """Return the embeddings in the run folder; None if there are none of these images and networks."""
    try:
        tensors, metadata = read(path, HEADER + shape[0] * (4 * shape[1] + 8))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{path} cannot be read: {error}; remove it, and the images are embedded again.") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if metadata != identity or shapes != {"embeddings": shape, "used": shape[:1]}:
        return None
    return tensors
