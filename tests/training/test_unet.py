"""The U-Net stage against diffusers' networks and schedulers: the loss and its gradients, from a cache and from images,
validation, and saved models, which must draw the same in diffusers as in sdkit.
"""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel

import sdkit
from sdkit.data import cache
from sdkit.errors import ArgumentError, TrainingError
from sdkit.training import UNetConfig, train_unet
from sdkit.training.distributed import make_accelerator
from sdkit.training.loop import fit
from sdkit.training.prepared import PreparedPlayer
from sdkit.training.run_folder import read_metrics
from sdkit.training.signals import StopSignals, Unfinished
from sdkit.training.stages.unet import UNetStage
from tests.helpers import VALIDATION_STEPS, tiny
from tests.helpers.loaders import load_guidance_scale, load_schedule

pytest.importorskip("datasets")
pytest.importorskip("peft")

INDEX = Path(sdkit.__file__).parent / "assets" / "emoji" / "model_index.json"
LONG = "red apple blue cat " * 12  # 48 tokens, which take 2 chunks
BATCH = [(n, n) for n in range(8)]  # the second sample has the long caption
PROMPTS = ["a red disc", "a blue disc"]


@dataclass(frozen=True)
class Kit:
    models: Mapping[str, Path]
    photos: Path
    caches: Mapping[str, Path]

    def config(self, out: Path, model: str = "epsilon", data: str = "plain", **changes: Any) -> UNetConfig:
        """Return settings of three steps of four samples, from the cache of this name or straight from the photos."""
        source = self.photos if data == "photos" else self.caches[data]
        settings: dict[str, Any] = {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "ema_decay": 0.0}
        return UNetConfig(**{"model": self.models[model], "data": source, "out_dir": out} | settings | changes)

    def stage(self, **changes: Any) -> UNetStage:
        return UNetStage(self.config(Path("unused"), **changes))


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("unet")
    models = {kind: tiny.model(folder / kind, kind) for kind in ("epsilon", "v_prediction")}
    for model in models.values():  # diffusers requires this file
        shutil.copy(INDEX, model)
    photos = tiny.photos(folder / "photos", 24)
    (photos / "001.txt").write_text(LONG)
    caches = {
        name: cache(models["epsilon"], photos, folder / name, dtype="fp32", device="cpu", embeddings=name == "embedded")
        for name in ("plain", "embedded")
    }
    return Kit(models, photos, caches)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lines(out: Path, validation: bool = False) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl that are of training, or those of validation."""
    return [line for line in read_metrics(out / "metrics.jsonl") if ("validation/loss" in line) == validation]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in lines(out)]


def weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def backward(stage: UNetStage, batch: dict[str, Any]) -> dict[str, Tensor | None]:
    """Return the gradient of every parameter of the stage after one backward pass through the loop's own
    preparation.
    """
    accelerator = make_accelerator(stage.config, Path("unused"))
    prepared = PreparedPlayer(stage.players[0], stage.config, accelerator)
    loss, _ = stage.loss({"unet": prepared.network}, batch, 0)
    accelerator.backward(loss)
    parts = {"unet": stage.unet.network, "text": stage.text.network, "vae": stage.vae.network}
    return {f"{part}.{name}": p.grad for part, network in parts.items() for name, p in network.named_parameters()}


class Theirs:
    """diffusers' networks and scheduler, loaded from a folder. Each sample is passed through them alone."""

    def __init__(self, model: Path, **scheduler: Any) -> None:
        self.vae: Any = AutoencoderKL.from_pretrained(model / "vae").eval()
        self.text: Any = CLIPTextModel.from_pretrained(model / "text_encoder").eval()
        self.unet: Any = UNet2DConditionModel.from_pretrained(model / "unet")
        self.scheduler: Any = DDPMScheduler.from_pretrained(model / "scheduler", **scheduler)

    def loss(self, batch: Mapping[str, Any], ids: list[Tensor], gamma: float | None) -> tuple[Tensor, Tensor]:
        """Return the loss with min-SNR's weights and without them, for a batch's images and noise."""
        weighted, plain = [], []
        kind = self.scheduler.config.prediction_type
        for i, caption in enumerate(ids):
            t, eps = torch.tensor([batch["t"][i]]), batch["eps"][i][None]
            if "pixels" in batch:
                posterior = self.vae.encode(batch["pixels"][i][None]).latent_dist
                mean, std = posterior.mean.detach(), posterior.std.detach()
            else:
                mean, std = batch["mean"][i][None], (batch["logvar"][i][None] / 2).exp()
            z = (mean + std * batch["posterior_eps"][i]) * self.vae.config.scaling_factor
            x_t = self.scheduler.add_noise(z, eps, t)
            target = {"epsilon": eps, "sample": z, "v_prediction": self.scheduler.get_velocity(z, eps, t)}[kind]
            cond = torch.cat([self.text(chunk[None]).last_hidden_state for chunk in caption], dim=1)
            error = (self.unet(x_t, t, cond).sample - target).square().mean()
            snr = float(compute_snr(self.scheduler, t))
            plain.append(error)
            weighted.append(error * (1.0 if gamma is None else self.weight(snr, gamma, kind)))
        return torch.stack(weighted).mean(), torch.stack(plain).mean()

    def weight(self, snr: float, gamma: float, kind: str) -> float:
        """Return min-SNR's weight, Hang et al. 2023, section 3.4. With zero terminal SNR, the minimum takes snr + 1 in
        place of snr.
        """
        if kind == "epsilon":
            return min(snr, gamma) / snr
        low = min(snr + 1 if self.scheduler.config.rescale_betas_zero_snr else snr, gamma)
        return low if kind == "sample" else low / (snr + 1)


def captions(stage: UNetStage, samples: list[tuple[int, int]], dropped: set[int] = frozenset()) -> list[Tensor]:
    """Return the token ids (k, 32) of the caption file of each sample."""
    texts = [Path(stage.config.data) / name for name in stage.names(samples)]
    return [
        stage.text.tokenize("" if n in dropped else file.with_suffix(".txt").read_text())[0][0]
        for (n, _), file in zip(samples, texts, strict=True)
    ]


class TestLoss:
    @pytest.mark.parametrize(
        ("data", "changes"),
        [
            ("photos", {}),
            ("plain", {}),
            ("embedded", {}),
            ("photos", {"train_text_encoder": True}),
            ("plain", {"snr_gamma": 5.0}),
            ("plain", {"prediction_type": "v"}),
            ("plain", {"prediction_type": "v", "snr_gamma": 5.0}),
            ("plain", {"prediction_type": "v", "snr_gamma": 5.0, "zero_snr": True}),
            ("plain", {"prediction_type": "v", "zero_snr": True}),
            ("photos", {"prediction_type": "x0"}),
            ("plain", {"prediction_type": "x0", "snr_gamma": 5.0}),
            ("plain", {"prediction_type": "x0", "snr_gamma": 5.0, "zero_snr": True}),
            ("plain", {"snr_gamma": 5.0, "noise_offset": 0.1}),
        ],
        ids=str,
    )
    def test_is_that_of_diffusers_networks_and_scheduler(self, kit: Kit, data: str, changes: dict[str, Any]) -> None:
        """The loss must agree to 1e-5. The samples include the first and last timestep, and captions of one and two
        chunks.
        """
        stage = kit.stage(data=data, caption_dropout=0.0, **changes)
        batch = stage.batch(BATCH)
        batch["t"][:2] = [0, 999]
        with torch.no_grad():
            loss, parts = stage.loss({"unet": stage.denoiser}, batch, 0)
        settings = {
            "prediction_type": stage.schedule.prediction_type,
            "rescale_betas_zero_snr": stage.objective.zero_snr,
        }
        theirs = Theirs(kit.models["epsilon"], **settings)
        ids = captions(kit.stage(data="photos"), BATCH)
        assert [len(one) for one in ids] == [1, 2, 1, 1, 1, 1, 1, 1]
        with torch.no_grad():
            weighted, plain = theirs.loss(batch, ids, changes.get("snr_gamma"))
        tolerance = 1e-3 if data == "embedded" else 1e-5  # embeddings are stored in float16
        assert float(loss) == pytest.approx(float(weighted), rel=tolerance)
        assert parts.keys() == ({"mse"} if "snr_gamma" in changes else set())
        if parts:
            assert float(parts["mse"]) == pytest.approx(float(plain), rel=1e-5)
            assert float(weighted) != pytest.approx(float(plain), rel=0.01)

    @pytest.mark.parametrize("kind", ["v", "x0"])
    def test_zero_terminal_snr(self, kit: Kit, tmp_path: Path, kind: str) -> None:
        """The schedule must equal diffusers' to 1e-6, the noisiest step must have weight 1 in min-SNR's loss, and the
        exported scheduler must state zero terminal SNR.
        """
        changes = {"prediction_type": kind, "zero_snr": True, "snr_gamma": 5.0}
        config = kit.config(tmp_path, max_steps=1, **changes)
        stage = UNetStage(config)
        theirs = DDPMScheduler.from_pretrained(kit.models["epsilon"] / "scheduler", rescale_betas_zero_snr=True)
        torch.testing.assert_close(stage.schedule.alphas_cumprod.float(), theirs.alphas_cumprod, atol=1e-6, rtol=0)
        assert stage.schedule.alphas_cumprod[-1] == 0
        batch = stage.batch(BATCH[:1])
        batch["t"] = [999]
        with torch.no_grad():
            loss, parts = stage.loss({"unet": stage.denoiser}, batch, 0)
        assert float(loss) == pytest.approx(float(parts["mse"]), rel=1e-6)  # a weight of 1
        fit(stage, config, tmp_path)
        saved = json.loads((tmp_path / "result" / "scheduler" / "scheduler_config.json").read_text())
        expected = {"v": "v_prediction", "x0": "sample"}[kind]
        assert (saved["_class_name"], saved["prediction_type"]) == ("DDIMScheduler", expected)
        assert (saved["rescale_betas_zero_snr"], saved["timestep_spacing"]) == (True, "trailing")
        schedule = load_schedule(tmp_path / "result")
        assert schedule.alphas_cumprod[-1] == 0
        assert schedule.timesteps(4)[0][0] == 999

    def test_eps_at_zero_terminal_snr_is_one_sentence(self, kit: Kit) -> None:
        with pytest.raises(ArgumentError, match=r"^at zero terminal SNR the noise says nothing .* without zero_snr\.$"):
            kit.stage(zero_snr=True)

    def test_a_scheduler_that_cannot_is_replaced_in_what_is_saved(self, kit: Kit, tmp_path: Path) -> None:
        """SD 1.x ships PNDM, which supports neither x0-prediction nor zero terminal SNR, so DDIM is exported. For
        fields that PNDM's config lacks, DDIM's defaults would clip latents and end beyond the first timestep.
        """
        model = Path(shutil.copytree(kit.models["epsilon"], tmp_path / "model"))
        file = model / "scheduler" / "scheduler_config.json"
        fields = json.loads(file.read_text())
        pndm = {name: value for name, value in fields.items() if name not in ("clip_sample", "set_alpha_to_one")}
        file.write_text(json.dumps(pndm | {"_class_name": "PNDMScheduler", "skip_prk_steps": True}))
        for changes, name in (
            ({}, "PNDMScheduler"),
            ({"prediction_type": "v"}, "PNDMScheduler"),
            ({"prediction_type": "x0"}, "DDIMScheduler"),
            ({"prediction_type": "v", "zero_snr": True}, "DDIMScheduler"),
        ):
            stage = UNetStage(UNetConfig(model=model, data=kit.caches["plain"], out_dir="unused", **changes))
            folder = tmp_path / "-".join(map(str, [name, *changes]))
            stage.export(folder)
            assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", name]
            assert load_guidance_scale(folder) == load_guidance_scale(model) != 7.5
            sd = sdkit.StableDiffusion.from_pretrained(folder, dtype="fp32", device="cpu")
            for schedule in (sd.schedule, stage.schedule):
                assert schedule.clip_x0 is None
                assert not schedule.set_alpha_to_one
            if name == "DDIMScheduler":
                z = sd(PROMPTS, num_inference_steps=10, output_type="latent")
                torch.testing.assert_close(drawn_by_diffusers(folder, 10, "latent"), z, atol=1e-4, rtol=1e-4)


class TestNoise:
    def rows(self, stage: UNetStage, samples: list[tuple[int, int]]) -> list[tuple[Any, ...]]:
        batch = stage.batch(samples)
        keys = ("eps", "posterior_eps")
        return [(batch["t"][i], *(batch[key][i].numpy().tobytes() for key in keys)) for i in range(len(samples))]

    def test_depends_on_seed_and_number_alone(self, kit: Kit) -> None:
        stage = kit.stage()
        found = self.rows(stage, [(n, 3) for n in range(40)])
        backwards = self.rows(
            kit.stage(data="photos", train_text_encoder=True), [(n, n % 7) for n in reversed(range(40))]
        )
        assert backwards[::-1] == found
        assert self.rows(stage, [(17, 0)]) == [found[17]]
        others = self.rows(kit.stage(seed=1), [(n, 3) for n in range(40)])
        noises = [one for row in (*found, *others) for one in row[1:]]
        assert len({*noises}) == len(noises) == 160
        assert [row[0] for row in found] != [row[0] for row in others]

    def test_timesteps_are_uniform_noise_is_normal_and_captions_are_dropped_as_often_as_asked(self, kit: Kit) -> None:
        """The chi-square of 2,000 timesteps in 20 bins must be below its 99.9 % quantile, and the rate of dropped
        captions within 3 standard deviations of 10 %.
        """
        stage = kit.stage()
        batch = stage.batch([(n, n % stage.size) for n in range(2000)])
        observed = np.bincount(np.array(batch["t"]) // 50, minlength=20)
        assert (min(batch["t"]), max(batch["t"])) == (0, 999)
        assert ((observed - 100) ** 2 / 100).sum() < 43.82
        for name in ("eps", "posterior_eps"):
            x = batch[name].double()
            assert abs(float(x.mean())) < 4 / x.numel() ** 0.5
            assert float(x.var()) == pytest.approx(1, abs=4 * (2 / x.numel()) ** 0.5)
        dropped = [key == stage.latents.empty["ids"].numpy().tobytes() for key in self.captions(batch)]
        assert sum(dropped) == pytest.approx(200, abs=3 * (2000 * 0.1 * 0.9) ** 0.5)

    def captions(self, batch: dict[str, Any]) -> list[bytes]:
        """Return each sample's token ids without padding."""
        lengths = [int(n) for n in batch["mask"].sum(1)]
        return [ids.flatten()[:n].numpy().tobytes() for ids, n in zip(batch["ids"], lengths, strict=True)]

    def test_logit_normal_timesteps_are_drawn_where_they_are_asked_for(self, kit: Kit) -> None:
        """sigmoid(1) is 0.731, and 3.5 standard deviations are 0.014. They depend on seed and number alone."""
        stage = kit.stage(timestep_sampling="logit_normal", logit_mean=1.0, logit_std=0.02)
        found = self.rows(stage, [(n, 3) for n in range(300)])
        assert {row[0] for row in found} <= {*range(717, 745)}
        assert len({row[0] for row in found}) > 10
        assert self.rows(stage, [(17, 0)]) == [found[17]]

    def test_a_dropped_caption_is_the_empty_prompt(self, kit: Kit) -> None:
        """The network's input must equal the empty prompt's, for frozen and trained text encoders, and for stored
        embeddings up to float16's rounding.
        """
        for data in ("plain", "embedded", "photos"):
            stage = kit.stage(data=data, caption_dropout=1.0)
            empty = stage.text.encode("")[0]
            cond = stage.encoder.captions(batch := stage.batch(BATCH))
            assert batch["mask"] is None
            torch.testing.assert_close(cond, empty.expand(8, -1, -1), atol=1e-3 if data == "embedded" else 1e-6, rtol=0)
        ids = kit.stage(caption_dropout=1.0, train_text_encoder=True).batch(BATCH)["ids"]
        assert torch.equal(ids, stage.text.tokenize("")[0].expand(8, -1, -1))
        kept = kit.stage(caption_dropout=0.0).batch([(n, 2) for n in range(50)])["ids"]
        assert torch.equal(kept, stage.text.tokenize("a blue disc")[0].expand(50, -1, -1))

    def test_offset(self, kit: Kit) -> None:
        """The offset adds one number of deviation 0.1 to each channel of each sample, and leaves the other noise as it
        was.
        """
        n = 500
        samples = [(i, i % 20) for i in range(n)]
        plain, offset = (kit.stage(noise_offset=size).batch(samples) for size in (0.0, 0.1))
        assert torch.equal(plain["posterior_eps"], offset["posterior_eps"])
        assert plain["t"] == offset["t"]
        added = (offset["eps"] - plain["eps"]).double()  # shape (n, 4, 4, 4)
        assert (added - added.mean((2, 3), keepdim=True)).abs().max() < 1e-6
        numbers = added.mean((2, 3))
        assert float(numbers.std()) == pytest.approx(0.1, abs=4 * 0.1 / (2 * 4 * n) ** 0.5)
        assert abs(float(numbers.mean())) < 4 * 0.1 / (4 * n) ** 0.5
        correlations = torch.corrcoef(torch.cat([numbers.T, plain["eps"].double().mean((2, 3)).T])) - torch.eye(8)
        assert correlations.abs().max() < 4.5 / n**0.5
        draws = torch.stack([self.offset_of(kit, i) for i, _ in samples[:5]])
        torch.testing.assert_close(numbers[:5].float(), 0.1 * draws, atol=1e-6, rtol=0)

    def offset_of(self, kit: Kit, n: int) -> Tensor:
        """Read an offset off a run with an offset so large that the other noise does not matter."""
        eps: Tensor = kit.stage(noise_offset=1e6).batch([(n, 0)])["eps"][0]
        return eps.mean((1, 2)) / 1e6


class TestGradients:
    @pytest.mark.parametrize("train_text_encoder", [False, True], ids=["U-Net", "text encoder too"])
    def test_reach_every_weight_and_are_those_of_diffusers_networks(self, kit: Kit, train_text_encoder: bool) -> None:
        """Each gradient must agree to 1e-3 of its length. Frozen weights must have none."""
        stage = kit.stage(caption_dropout=0.0, snr_gamma=5.0, train_text_encoder=train_text_encoder)
        batch = stage.batch(BATCH[:4])
        found = backward(stage, batch)
        theirs = Theirs(kit.models["epsilon"])
        theirs.loss(batch, captions(kit.stage(data="photos"), BATCH[:4]), 5.0)[0].backward()
        expected = {f"unet.{name}": p.grad for name, p in theirs.unet.named_parameters()}
        if train_text_encoder:
            expected |= {f"text.{name}": p.grad for name, p in theirs.text.named_parameters()}
        for name, gradient in found.items():
            if name not in expected:
                assert gradient is None, name
                continue
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            if "k_proj.bias" in name:  # a softmax does not depend on this bias
                assert gradient.abs().max() < 1e-6
                continue
            assert gradient.any(), name
            assert (gradient - expected[name]).norm() <= 1e-3 * expected[name].norm(), name

    @pytest.mark.parametrize("lora_rank", [None, 2], ids=["whole", "LoRA"])
    def test_checkpointing_changes_none(self, kit: Kit, lora_rank: int | None) -> None:
        found: list[dict[str, Tensor | None]] = []
        kept: list[int] = []
        for on in (False, True):
            stage = kit.stage(lora_rank=lora_rank, train_text_encoder=True, gradient_checkpointing=on)
            for name, p in stage.denoiser.named_parameters():
                if "lora_B" in name:  # while B is 0, A has no gradient
                    nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(0))
            sizes: dict[int, int] = {}

            def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                found.append(backward(stage, stage.batch(BATCH)))
            kept.append(sum(sizes.values()))
        assert kept[1] < 0.8 * kept[0]
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=name)
        assert any(gradient is not None for gradient in found[0].values())


def moved(kit: Kit, result: Path, part: str) -> set[str]:
    """Return the names of the weights of one part that have changed."""
    before, after = weights(kit.models["epsilon"] / part), weights(result / part)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class TestWhatMoves:
    def test_the_whole_unet_and_nothing_else(self, kit: Kit, tmp_path: Path) -> None:
        train_unet(kit.config(tmp_path))
        assert moved(kit, tmp_path / "result", "unet") == weights(tmp_path / "result" / "unet").keys()
        assert moved(kit, tmp_path / "result", "text_encoder") == set()
        assert moved(kit, tmp_path / "result", "vae") == set()

    def test_the_text_encoder_too(self, kit: Kit, tmp_path: Path) -> None:
        train_unet(kit.config(tmp_path, train_text_encoder=True))
        assert moved(kit, tmp_path / "result", "unet") == weights(tmp_path / "result" / "unet").keys()
        text = moved(kit, tmp_path / "result", "text_encoder")
        assert text >= {name for name in weights(tmp_path / "result" / "text_encoder") if "k_proj.bias" not in name}
        assert moved(kit, tmp_path / "result", "vae") == set()

    @pytest.mark.parametrize("train_text_encoder", [False, True], ids=["U-Net", "text encoder too"])
    def test_lora_layers_alone(self, kit: Kit, tmp_path: Path, train_text_encoder: bool) -> None:
        config = kit.config(tmp_path, lora_rank=2, train_text_encoder=train_text_encoder)
        stage = UNetStage(config)
        first = {name: p.clone() for name, p in stage.denoiser.named_parameters() if ".lora_" in name}
        fit(stage, config, tmp_path)
        base = {f"unet.{name}": value for name, value in weights(kit.models["epsilon"] / "unet").items()}
        text = weights(kit.models["epsilon"] / "text_encoder")
        base |= {f"text.{name.removeprefix('text_model.')}": value for name, value in text.items()}
        seen = set()
        for part, network in (("unet", stage.unet.network), ("text", stage.text.network)):
            for name, p in network.named_parameters():
                if ".lora_" in name:
                    assert not torch.equal(p, first[f"{part}.network.{name}"]), name
                    continue
                plain = f"{part}.{name.replace('.base_layer', '').removeprefix('text_model.')}"
                assert torch.equal(p, base[plain]), name
                assert not p.requires_grad
                seen.add(plain)
        assert seen == base.keys()
        parts = {name.partition(".")[0] for name in weights(tmp_path / "result")}
        assert parts == ({"unet", "text_encoder"} if train_text_encoder else {"unet"})
        assert len(first) == len(weights(tmp_path / "result"))

    def test_result_holds_the_moving_average(self, kit: Kit, tmp_path: Path) -> None:
        train_unet(kit.config(tmp_path, ema_decay=0.9))
        folder = tmp_path / "checkpoints" / "step-00000003"
        result, average, last = (
            weights(tmp_path / "result" / "unet"), load_file(folder / "unet.ema.safetensors"),
            load_file(folder / "unet.safetensors"),
        )  # fmt: skip
        assert all(torch.equal(value, average[f"unet.network.{name}"]) for name, value in result.items())
        assert not any(torch.equal(value, last[f"unet.network.{name}"]) for name, value in result.items())


class TestCaptionsOfSeveralLengths:
    @pytest.mark.parametrize("data", ["plain", "embedded", "photos", "along"])
    def test_each_sample_is_the_same_alone_and_in_a_batch(self, kit: Kit, data: str) -> None:
        """Padding of shorter captions must have no influence beyond 1e-5. Without the mask it would have one."""
        changes: dict[str, Any] = {"train_text_encoder": True} if data == "along" else {"data": data}
        stage = kit.stage(caption_dropout=0.0, **changes)
        with torch.no_grad():
            batch = stage.batch(BATCH[:4])
            assert batch["mask"].sum(1).tolist() == [32, 64, 32, 32]
            together, _ = stage._denoised(stage.denoiser, batch)
            unmasked, _ = stage._denoised(stage.denoiser, batch | {"mask": None})
            for i, sample in enumerate(BATCH[:4]):
                single = stage.batch([sample])
                assert single["mask"] is None
                alone, _ = stage._denoised(stage.denoiser, single)
                torch.testing.assert_close(together[i], alone[0], atol=1e-5, rtol=0)
                assert ((unmasked[i] - alone[0]).abs().max() < 1e-5) == (i == 1)

    def test_remembered_embeddings_are_the_same_to_the_bit(self, kit: Kit) -> None:
        """Bit-identical also to those of a resumed run, which starts with an empty cache or one of other captions."""
        stage, fresh = kit.stage(), kit.stage()
        first = stage.encoder.captions(batch := stage.batch(BATCH))
        assert len(stage.encoder.embeddings) == len({*batch["keys"]}) == 5
        assert torch.equal(stage.encoder.captions(batch), first)
        fresh.encoder.captions(fresh.batch(BATCH[3:5]))
        assert torch.equal(fresh.encoder.captions(batch), first)

    def test_not_more_are_remembered_than_there_is_room_for(self, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sdkit.training.stages.encoding.MOST_EMBEDDINGS", 2)
        stage = kit.stage()
        first = stage.encoder.captions(batch := stage.batch(BATCH))
        assert len(stage.encoder.embeddings) <= 2
        assert torch.equal(stage.encoder.captions(batch), first)


class TestSources:
    def test_cache_and_images_give_the_same_losses(self, kit: Kit, tmp_path: Path) -> None:
        """Five steps must agree to 1e-4 between a cache of moments, one of embeddings too, and the
        images themselves.
        """
        found = []
        for data in ("photos", "plain", "embedded"):
            train_unet(kit.config(tmp_path / data, data=data, max_steps=5))
            found.append(losses(tmp_path / data))
        assert found[1] == pytest.approx(found[0], abs=1e-4)
        assert found[2] == pytest.approx(found[0], abs=1e-4)
        checks = [lines(tmp_path / data, validation=True)[-1]["validation/loss"] for data in ("photos", "plain")]
        assert checks[0] == pytest.approx(checks[1], abs=1e-4)

    def test_a_cache_with_augmentations(self, kit: Kit, tmp_path: Path) -> None:
        """An epoch has each augmentation of each image once, and the loss of a step is that of these moments."""
        made = cache(
            kit.models["epsilon"], kit.photos, tmp_path / "cache", flip=True, augmentations=2, dtype="fp32",
            device="cpu",
        )  # fmt: skip
        config = UNetConfig(
            model=kit.models["epsilon"], data=made, out_dir=tmp_path / "run", batch_size=23, max_steps=2
        )
        stage = UNetStage(config)
        assert stage.size == 46  # 23 images with two augmentations; one further image is held out
        fit(stage, config, tmp_path / "run")
        assert len(losses(tmp_path / "run")) == 2
        straight = kit.stage(data="photos", augment=("flip",))
        stage = UNetStage(config)  # a new stage, with untrained weights
        for item in range(46):
            index, augmentation = divmod(item, 2)
            a = stage.batch([(item, item)])
            b = straight.batch([(item, index)])
            pixels, _ = straight.latents.images.load(straight.latents.train, index, augmentation)
            x, y = (
                one._denoised(one.denoiser, part)[0]
                for one, part in ((stage, a), (straight, b | {"pixels": pixels[None]}))
            )
            torch.testing.assert_close(x, y, atol=2e-3, rtol=0)

    def test_broken_images_are_skipped_and_named(self, kit: Kit, tmp_path: Path) -> None:
        photos = Path(shutil.copytree(kit.photos, tmp_path / "photos"))
        for name in ("003.png", "012.png"):  # the second one would be held out
            (photos / name).write_bytes((photos / name).read_bytes()[:60])
        config = {"batch_size": 12, "max_steps": 2}
        with pytest.warns(UserWarning, match=r"^0(03|12)\.png is skipped: .*0(03|12)\.png") as warned:
            train_unet(UNetConfig(model=kit.models["epsilon"], data=photos, out_dir=tmp_path / "a", **config))
        assert sorted(str(one.message)[:7] for one in warned) == ["003.png", "012.png"]
        assert len(losses(tmp_path / "a")) == 2
        made = cache(kit.models["epsilon"], photos, tmp_path / "cache", dtype="fp32", device="cpu")
        train_unet(UNetConfig(model=kit.models["epsilon"], data=made, out_dir=tmp_path / "b", **config))
        reports = [json.loads((tmp_path / run / "skipped.json").read_text()) for run in ("a", "b")]
        assert reports[0] == reports[1]
        assert reports[0].keys() == {"003.png", "012.png"}
        assert all("cannot be decoded" in reason for reason in reports[0].values())


class TestValidation:
    def test_is_the_same_number_whatever_the_run(self, kit: Kit, tmp_path: Path) -> None:
        """Before the first step, the number must be bit-identical between runs, and equal the plain loss at eight
        timesteps by diffusers' networks.
        """
        runs: list[dict[str, Any]] = [
            {}, {"seed": 7}, {"batch_size": 1}, {"noise_offset": 0.2, "caption_dropout": 0.5, "snr_gamma": 5.0},
            {"ema_decay": 0.9, "gradient_accumulation_steps": 2}, {"lora_rank": 2},
        ]  # fmt: skip
        found = []
        for i, changes in enumerate(runs):
            train_unet(kit.config(tmp_path / str(i), **{"max_steps": 1} | changes))
            found.append([line["validation/loss"] for line in lines(tmp_path / str(i), validation=True)])
        assert {loss for loss, _ in found} == {found[0][0]}
        assert len({loss for _, loss in found}) == len(runs)
        stage = kit.stage()
        captured: list[dict[str, Any]] = []
        denoised = stage._denoised
        stage._denoised = lambda network, batch: captured.append(batch) or denoised(network, batch)  # type: ignore[func-returns-value,method-assign]
        with torch.no_grad():
            assert stage.validate(0)["loss"] == pytest.approx(found[0][0], rel=1e-6)
            (batch,) = captured
            assert batch["t"] == [62, 187, 312, 437, 562, 687, 812, 937]
            held_out = Theirs(kit.models["epsilon"]).loss(batch, [stage.text.tokenize("a red disc")[0][0]] * 8, None)[1]
        assert float(held_out) == pytest.approx(found[0][0], rel=1e-5)
        assert float(batch["eps"].std()) == pytest.approx(1, abs=0.2)

    def test_evaluators_add_metrics(self, kit: Kit, tmp_path: Path) -> None:
        config = kit.config(tmp_path, max_steps=1)
        stage = UNetStage(config)
        stage.evaluators += [lambda step: {"fid": 2.0 * step}, lambda step: {"clip": step + 0.5}]
        fit(stage, config, tmp_path)
        first, last = lines(tmp_path, validation=True)
        names = [f"validation/{name}" for name in ("loss", "fid", "clip")]
        assert [name for name in first if name in names] == names
        assert [(line["validation/fid"], line["validation/clip"]) for line in (first, last)] == [(0, 0.5), (2, 1.5)]

    @pytest.mark.parametrize("passes", [1, 4])  # within the loss; within the first image
    def test_a_signal_waits_for_one_pass(self, passes: int, kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
        stage, done = kit.stage(validation_prompts=("a disc", "a cat")), 0
        forward = stage.unet.network.forward

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == passes:
                signal.raise_signal(signal.SIGTERM)
            return forward(*args, **options)

        monkeypatch.setattr(stage.unet.network, "forward", counted)
        with StopSignals(), torch.no_grad(), pytest.raises(Unfinished):
            stage.validate(0)
        assert done == passes

    def test_images_of_prompts(self, kit: Kit, tmp_path: Path) -> None:
        """The same weights must give the same pixels, which the public pipeline draws too."""
        shared = {"max_steps": 1, "validation_prompts": tuple(PROMPTS)}
        for i, changes in enumerate([{}, {"seed": 7, "batch_size": 1}]):
            train_unet(kit.config(tmp_path / str(i), model="v_prediction", **shared | changes))
        first, other = ((tmp_path / str(i) / "samples" / "step-00000000.png").read_bytes() for i in range(2))
        assert first == other
        assert (tmp_path / "0" / "samples" / "step-00000001.png").read_bytes() != first
        for step, model in ((0, kit.models["v_prediction"]), (1, tmp_path / "0" / "result")):
            sd = sdkit.StableDiffusion.from_pretrained(model, dtype="fp32", device="cpu")
            drawn = sd(PROMPTS, seed=0, num_inference_steps=VALIDATION_STEPS, batch_size=1)
            with Image.open(tmp_path / "0" / "samples" / f"step-{step:08}.png") as sheet:
                pixels = np.asarray(sheet)
            for x, image in zip((8, 48), drawn, strict=True):
                assert np.array_equal(pixels[8:40, x : x + 32], np.asarray(image)), step


def drawn_by_diffusers(model: Path, steps: int, kind: str, lora: Path | None = None) -> Any:
    """Draw the prompts with diffusers' pipeline from the noise of seeds 0 and 1."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora)
    x_T = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    with torch.no_grad():
        scale = load_guidance_scale(model)
        return pipe(PROMPTS, latents=x_T, num_inference_steps=steps, guidance_scale=scale, output_type=kind).images


class TestResult:
    @pytest.mark.parametrize("kind", ["epsilon", "v at zero SNR", "sample"])
    def test_draws_the_same_in_diffusers(self, kit: Kit, tmp_path: Path, kind: str) -> None:
        """Latents must agree to 1e-4. Ten steps divide 1,000, where diffusers' timesteps equal ours; see
        test_pipeline.
        """
        changes = {
            "v at zero SNR": {"prediction_type": "v", "zero_snr": True},
            "sample": {"prediction_type": "x0"},
        }.get(kind, {"train_text_encoder": True})
        train_unet(kit.config(tmp_path, **changes))
        result = tmp_path / "result"
        sd = sdkit.StableDiffusion.from_pretrained(result, dtype="fp32", device="cpu")
        assert sd.schedule.prediction_type == {"v at zero SNR": "v_prediction"}.get(kind, kind)
        z = sd(PROMPTS, num_inference_steps=10, output_type="latent")
        torch.testing.assert_close(drawn_by_diffusers(result, 10, "latent"), z, atol=1e-4, rtol=1e-4)
        before = sdkit.StableDiffusion.from_pretrained(kit.models["epsilon"], dtype="fp32", device="cpu")
        assert (before(PROMPTS, num_inference_steps=10, output_type="latent") - z).abs().max() > 0.1

    def test_lora_draws_the_same_in_diffusers_and_as_trained(self, kit: Kit, tmp_path: Path) -> None:
        config = kit.config(tmp_path, lora_rank=4, train_text_encoder=True, learning_rate=1e-2, max_steps=5)
        stage = UNetStage(config)
        fit(stage, config, tmp_path)
        sd = sdkit.StableDiffusion.from_pretrained(kit.models["epsilon"], dtype="fp32", device="cpu")
        common = {"num_inference_steps": 10, "guidance_scale": sd.guidance_scale, "output_type": "latent"}
        before = sd(PROMPTS, **common)
        sd.load_lora(tmp_path / "result")
        z = sd(PROMPTS, **common)
        assert (z - before).abs().max() > 0.1
        live = sdkit.StableDiffusion(stage.vae, stage.text.eval(), stage.unet.eval(), stage.schedule)
        torch.testing.assert_close(live(PROMPTS, **common), z, atol=1e-4, rtol=1e-4)
        theirs = drawn_by_diffusers(kit.models["epsilon"], 10, "latent", tmp_path / "result")
        torch.testing.assert_close(theirs, z, atol=1e-4, rtol=1e-4)
        images = drawn_by_diffusers(kit.models["epsilon"], 10, "np", tmp_path / "result")
        ours = sd(PROMPTS, num_inference_steps=10, output_type="np")
        assert np.abs(images * 255 - ours).max() <= 1


class TestFromNothing:
    def test_first_weights_are_the_seeds(self, kit: Kit) -> None:
        init = kit.models["epsilon"] / "unet" / "config.json"
        torch.manual_seed(7)
        state = torch.get_rng_state()
        one, two, other = (kit.stage(init=init, seed=seed).unet.network.state_dict() for seed in (3, 3, 4))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(one[name], two[name]) for name in one)
        drawn = [name for name, value in one.items() if value.any() and not (value == 1).all()]
        assert len(drawn) > 50
        assert not any(torch.equal(one[name], other[name]) for name in drawn)

    def test_lora_too(self, kit: Kit) -> None:
        state = torch.get_rng_state()
        one, two, other = (kit.stage(lora_rank=2, seed=seed).unet.network.state_dict() for seed in (3, 3, 4))
        assert torch.equal(torch.get_rng_state(), state)
        downs = [name for name in one if "lora_A" in name]
        assert downs
        assert all(torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name]) for name in downs)

    def test_learns(self, kit: Kit, tmp_path: Path) -> None:
        init = kit.models["epsilon"] / "unet"
        train_unet(kit.config(tmp_path, init=init, max_steps=40, batch_size=8, learning_rate=3e-3))
        first, last = (line["validation/loss"] for line in lines(tmp_path, validation=True))
        assert last < 0.8 * first
        sdkit.StableDiffusion.from_pretrained(tmp_path / "result", dtype="fp32", device="cpu")


def test_bf16_keeps_weights_in_float32_and_the_losses(kit: Kit, tmp_path: Path) -> None:
    """Losses of five steps straight from images, with a trained text encoder, must agree to 2 %."""
    found = []
    for precision in ("no", "bf16"):
        config = kit.config(
            tmp_path / precision, data="photos", max_steps=5, train_text_encoder=True, mixed_precision=precision,
            ema_decay=0.9, validation_prompts=("a red disc",),
        )  # fmt: skip
        stage = UNetStage(config)
        fit(stage, config, tmp_path / precision)
        assert {p.dtype for network in (stage.vae, stage.text, stage.unet) for p in network.parameters()} == {
            torch.float32
        }
        for file in (tmp_path / precision).rglob("*.safetensors"):
            if not file.name.startswith("rng"):
                kinds = {value.dtype for name, value in load_file(file).items() if name != "num_updates"}
                assert kinds <= {torch.float32, torch.int64}, file
        found.append(losses(tmp_path / precision))
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert found[1] != pytest.approx(found[0], rel=1e-6)  # it did run in another precision


SETTINGS = {"data": "photos", "seed": 1, "max_steps": 10, "augment": ("crop", "flip"), "noise_offset": 0.05}
GOLDEN = {
    "whole": [1.120777, 0.929412, 1.049394, 1.005037, 0.795499, 0.610823, 0.729104, 0.943561, 0.997913, 0.852313],
    "LoRA": [0.723987, 0.545534, 0.505250, 0.604969, 0.401234, 0.849271, 0.794578, 0.405650, 0.365068, 0.449231],
}


class TestGolden:
    """Golden losses of ten steps in float32 on one thread, to 1e-3. A change in these numbers is a change in what is
    learned.
    """

    def test_whole(self, kit: Kit, tmp_path: Path) -> None:
        train_unet(kit.config(tmp_path, snr_gamma=5.0, **SETTINGS))
        assert losses(tmp_path) == pytest.approx(GOLDEN["whole"], rel=1e-3)

    def test_lora(self, kit: Kit, tmp_path: Path) -> None:
        settings = SETTINGS | {"lora_rank": 4, "train_text_encoder": True, "learning_rate": 1e-2}
        train_unet(kit.config(tmp_path, model="v_prediction", **settings))

        assert losses(tmp_path) == pytest.approx(GOLDEN["LoRA"], rel=1e-3)


@pytest.mark.parametrize("change", [{"zero_snr": True, "prediction_type": "v"}, {"prediction_type": "v"}])
def test_a_lora_cannot_change_the_schedule(kit: Kit, tmp_path: Path, change: dict[str, Any]) -> None:
    """A LoRA file cannot hold a schedule. Whoever loads it would sample with the model's own."""
    with pytest.raises(ArgumentError, match=r"the model's own noise schedule, which prediction_type would change\.$"):
        kit.stage(lora_rank=2, **change)


def test_data_that_has_grown_is_another_run_and_data_that_has_moved_is_not(kit: Kit, tmp_path: Path) -> None:
    photos = tiny.photos(tmp_path / "photos", 5)
    config = replace(kit.config(tmp_path / "run", max_steps=1), data=str(photos))
    train_unet(config)
    photos = photos.rename(tmp_path / "moved")
    train_unet(replace(config, data=f"{photos}/", max_steps=2))
    (photos / "more.png").write_bytes((photos / "000.png").read_bytes())
    with pytest.raises(TrainingError, match=r"holds another run: its data was different"):
        train_unet(replace(config, data=photos, max_steps=3))


def test_a_model_of_pixels_is_trained_exported_and_loaded(kit: Kit, tmp_path: Path) -> None:
    config = json.loads((kit.models["epsilon"] / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_channels": 3, "out_channels": 3}))
    settings = kit.config(
        tmp_path / "run", data="photos", init=tmp_path / "config.json", vae="pixels", size=8, max_steps=1, batch_size=2
    )
    result = train_unet(settings) / "result"
    sd = sdkit.StableDiffusion.from_pretrained(result, device="cpu", dtype="fp32")
    assert (sd.vae.factor, sd.vae.channels) == (1, 3)
    assert sd("a red disc", num_inference_steps=1, output_type="np", height=8, width=8).shape == (1, 8, 8, 3)


def test_pooled_text_beside_the_timestep(kit: Kit, tmp_path: Path) -> None:
    """A U-Net that also adds the pooled text to the timestep learns, and draws the same in diffusers."""
    config = json.loads((kit.models["epsilon"] / "unet" / "config.json").read_text())
    config |= {
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "resnet_time_scale_shift": "scale_shift",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    stage = kit.stage(init=tmp_path / "config.json", train_text_encoder=True)
    gradients = backward(stage, stage.batch(BATCH))
    pooled = {name: p for name, p in gradients.items() if "add_embedding" in name}
    assert pooled
    assert all(p is not None and bool(p.abs().max() > 0) for name, p in pooled.items() if name.endswith("weight"))
    result = train_unet(kit.config(tmp_path / "run", init=tmp_path / "config.json")) / "result"
    sd = sdkit.StableDiffusion.from_pretrained(result, dtype="fp32", device="cpu")
    z = sd(PROMPTS, num_inference_steps=10, output_type="latent")
    torch.testing.assert_close(drawn_by_diffusers(result, 10, "latent"), z, atol=1e-4, rtol=1e-4)
    assert bool(sd(LONG, num_inference_steps=2, output_type="latent").isfinite().all())  # of two chunks


def test_a_run_that_would_repeat_the_noise_of_another_is_warned_of(kit: Kit, tmp_path: Path) -> None:
    """The noise of a sample depends on the seed and on its number in the run alone."""
    result = train_unet(kit.config(tmp_path / "first", max_steps=1)) / "result"
    again = replace(kit.config(tmp_path / "again", max_steps=1), model=result)
    with pytest.warns(UserWarning, match=r"result was trained on this data with seed 0: .*; give another seed\.$"):
        train_unet(again)
    # These must not warn: in tests a warning is an error.
    train_unet(replace(again, out_dir=tmp_path / "other", seed=1))
    train_unet(replace(again, out_dir=tmp_path / "photos", data=kit.photos))
    train_unet(replace(again, max_steps=2))  # the same run, continued
