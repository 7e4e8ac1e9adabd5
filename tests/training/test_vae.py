"""The VAE stage against diffusers' network and losses written out by hand: which loss moves which weights, what is
logged, what is measured on held-out images, and what is saved.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import sdkit
from sdkit.evaluation.similarity import psnr, ssim
from sdkit.networks.lpips import LPIPS
from sdkit.training import VAEConfig, train_vae
from sdkit.training.batches import noise_of, samples_of
from sdkit.training.distributed import make_accelerator
from sdkit.training.loop import fit
from sdkit.training.prepared import PreparedPlayer, only_gradients_of
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages.vae import VAEStage
from tests.helpers import shared_data, tiny

VALUES = 3 * tiny.SIZE**2  # values of an image
LATENT = (4, tiny.SIZE // 8, tiny.SIZE // 8)


@dataclass(frozen=True)
class Kit:
    model: Path
    photos: Path
    lpips: Path

    def config(self, out: Path, **changes: Any) -> VAEConfig:
        """Return settings of three steps on the tiny model, without LPIPS."""
        settings: dict[str, Any] = {"batch_size": 2, "max_steps": 3, "learning_rate": 1e-3, "lpips_weight": 0.0}
        return VAEConfig(**{"model": self.model, "data": self.photos, "out_dir": out} | settings | changes)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("vae")
    torch.manual_seed(0)
    lpips = {
        f"features.{key[4:]}" if key.startswith("vgg.") else f"lin{key[6:]}.weight": value.half()
        for key, value in LPIPS("vgg").state_dict().items()
    }
    save_file(lpips, folder / "lpips_vgg16.safetensors")
    photos = tiny.photos(folder / "photos", 40)
    return Kit(tiny.model(folder / "model"), photos, folder / "lpips_vgg16.safetensors")


@pytest.fixture(autouse=True)
def no_weights_of_lpips_but_those_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDKIT_LPIPS", raising=False)


def pixels(*files: Path) -> Tensor:
    """Read images as (B, 3, H, W) in [-1, 1]."""
    arrays = [np.asarray(Image.open(file), np.float32) / 127.5 - 1 for file in files]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def lines(out: Path, validation: bool = False) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl that are of training, or those of validation without their prefix."""
    prefix = "validation/"
    found = [line for line in read_metrics(out / "metrics.jsonl") if ("loss" in line) != validation]
    return [{key.removeprefix(prefix): value for key, value in line.items()} for line in found]


def saved(out: Path, step: int, name: str) -> dict[str, Tensor]:
    file = out / "checkpoints" / f"step-{step:08}" / f"{name}.safetensors"
    return {key.removeprefix("network."): value for key, value in load_file(file).items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def in_encoder(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv."))


def passed(network: Any, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pass images through diffusers' own network: the reconstruction from a posterior sample, the mean, and the
    log-variance.
    """
    mean, logvar = network.quant_conv(network.encoder(x)).chunk(2, dim=1)
    return network.decode(mean + (logvar / 2).exp() * eps).sample, mean, logvar


def kl_of(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of an image in nats, summed over its latents; the mean over images."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / len(mean)


class Turns:
    """The players of a stage, prepared as in the loop, on one batch."""

    def __init__(self, stage: VAEStage) -> None:
        self.stage, self.accelerator = stage, make_accelerator(stage.config, Path(stage.config.out_dir))
        self.prepared = [PreparedPlayer(player, stage.config, self.accelerator) for player in stage.players]
        self.networks = {t.player.name: t.network for t in self.prepared}
        self.batch = stage.batch([(0, 3), (1, 5)])

    def gradients(self, turn: int = 0, step: int = 0) -> dict[str, dict[str, Tensor | None]]:
        """Return the gradients of every network of the stage after one backward pass of one player's loss."""
        t = self.prepared[turn]
        with only_gradients_of(t, self.prepared, self.accelerator):
            loss, _ = t.player.loss(self.networks, self.batch, step)
            self.accelerator.backward(loss)
        stage = self.stage
        networks = {
            "vae": stage.vae.network, "discriminator": stage.discriminator, "lpips": stage.training_lpips,
            "start": stage.start,
        }  # fmt: skip
        found = {part: {name: p.grad for name, p in n.named_parameters()} for part, n in networks.items() if n}
        for network in filter(None, networks.values()):
            network.zero_grad(set_to_none=True)
        return found


def assert_near(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Check that the difference is at most `tolerance` times the length of `expected`."""
    assert found.isfinite().all(), name
    assert (found - expected).norm() <= tolerance * expected.norm() + 1e-7, name


TERMS: dict[str, dict[str, Any]] = {
    "l1": {"reconstruction": "l1"},
    "l2": {"reconstruction": "l2"},
    "lpips": {"lpips_weight": 0.3},
    "kl": {"kl_weight": 0.1 * VALUES},
    "adversarial": {"disc_weight": 0.5},
}


class TestGradients:
    """Gradient of each loss term, in the steps of both players. The gradients with a term less those without it must
    equal the term's gradient written out by hand (to 1e-3 of its length).
    """

    def by_hand(self, stage: VAEStage, batch: dict[str, Tensor], term: str) -> dict[str, Tensor]:
        """Return the weighted gradient of one term alone, by parameter of the VAE."""
        network: Any = copy.deepcopy(stage.vae.network).requires_grad_(True)
        for p in network.parameters():
            p.grad = None
        x = batch["pixels"]
        y, mean, logvar = passed(network, x, batch["eps"])
        if term == "lpips":
            loss = 0.3 * stage.lpips(y, x).mean()
        elif term == "kl":
            loss = 0.1 * VALUES * kl_of(mean, logvar) / VALUES
        elif term == "adversarial":
            loss = -stage.discriminator(y).mean()
            last = network.decoder.conv_out.weight
            pulls = [
                torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in ((y - x).square().mean(), loss)
            ]
            loss = 0.5 * pulls[0] / pulls[1] * loss
        else:
            loss = (y - x).abs().mean() if term == "l1" else (y - x).square().mean()
        loss.backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.named_parameters()}

    @pytest.mark.parametrize("train_encoder", [False, True], ids=["decoder", "encoder too"])
    @pytest.mark.parametrize("term", TERMS)
    def test_of_a_term_reaches_the_weights_that_it_should_and_no_others(
        self, kit: Kit, tmp_path: Path, term: str, train_encoder: bool
    ) -> None:
        without = {"train_encoder": train_encoder, "kl_weight": 0.0}
        changes = without | TERMS[term] | ({"lpips": kit.lpips} if term == "lpips" else {})
        turns = Turns(VAEStage(kit.config(tmp_path, **changes)))
        found = turns.gradients()
        base = {} if term in ("l1", "l2") else Turns(VAEStage(kit.config(tmp_path, **without))).gradients()["vae"]
        if term == "kl" and not train_encoder:  # no trainable weight affects it
            assert all(base[k] is None if g is None else torch.equal(g, base[k]) for k, g in found["vae"].items())
            return
        expected = self.by_hand(turns.stage, turns.batch, term)
        for name, gradient in found["vae"].items():
            if in_encoder(name) and not train_encoder:
                assert gradient is None, name
                continue
            gradient = gradient - base.get(name, 0)
            if "to_k.bias" in name:  # a softmax does not depend on this bias
                assert gradient.abs().max() < 1e-6, name
            elif term == "kl" and not in_encoder(name):
                assert not gradient.any(), name
            else:
                assert expected[name].any(), name
                assert_near(gradient, expected[name], 1e-3, name)
        for part in ("discriminator", "lpips", "start"):
            assert all(gradient is None for gradient in found.get(part, {}).values()), part
        assert ("start" in found) == train_encoder

    @pytest.mark.parametrize("train_encoder", [False, True], ids=["decoder", "encoder too"])
    def test_in_the_discriminators_turn(self, kit: Kit, tmp_path: Path, train_encoder: bool) -> None:
        changes = {"train_encoder": train_encoder, "lpips": kit.lpips, "lpips_weight": 0.1, "disc_weight": 0.5}
        turns = Turns(VAEStage(kit.config(tmp_path, **changes)))
        turns.gradients(0)  # puts its reconstruction into the batch
        found = turns.gradients(1)
        for part in ("vae", "lpips", "start"):
            assert all(gradient is None for gradient in found.get(part, {}).values()), part
        twin: Any = copy.deepcopy(turns.stage.discriminator)
        x = turns.batch["pixels"]
        y = passed(turns.stage.vae.network, x, turns.batch["eps"])[0].detach()
        (0.5 * (F.relu(1 - twin(x)).mean() + F.relu(1 + twin(y)).mean())).backward()
        for name, p in twin.named_parameters():
            gradient = found["discriminator"][name]
            assert gradient is not None, name
            # The last bias moves real and fake outputs alike. Within both margins of the hinge loss this cancels.
            assert p.grad.any() or name == "layers.11.bias", name
            assert_near(gradient, p.grad, 1e-3, name)

    @pytest.mark.parametrize("train_encoder", [False, True], ids=["decoder", "encoder too"])
    def test_checkpointing_changes_none(self, kit: Kit, tmp_path: Path, train_encoder: bool) -> None:
        settings = {"train_encoder": train_encoder, "kl_weight": 1.0, "disc_weight": 0.5}
        plain, frugal = (
            Turns(VAEStage(kit.config(tmp_path, gradient_checkpointing=on, **settings))) for on in (False, True)
        )
        saved: list[int] = []

        def bytes_kept(turns: Turns) -> dict[str, Any]:
            kept: dict[int, int] = {}

            def pack(x: Tensor) -> Tensor:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                return x

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                turns.networks["vae"](turns.batch["pixels"], turns.batch["eps"])
            saved.append(sum(kept.values()))
            return turns.gradients()["vae"]

        expected, found = bytes_kept(plain), bytes_kept(frugal)
        assert saved[1] < 0.8 * saved[0]
        for name, gradient in expected.items():
            assert (gradient is None) == (in_encoder(name) and not train_encoder), name
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5)


class TestLoss:
    @pytest.mark.parametrize("whole", [False, True], ids=["decoder", "everything"])
    def test_logged_is_what_latent_diffusion_has_it(self, kit: Kit, tmp_path: Path, whole: bool) -> None:
        """Compare the log of each step with the checkpoint before it, by diffusers' network and the loss of Rombach et
        al. 2022 and VQGAN, to 1e-4. Theirs is summed over an image's values, and KL over its latents; ours is theirs
        divided by 3 H W.
        """
        changes: dict[str, Any] = {"lpips_weight": 0.1, "lpips": kit.lpips, "save_every": 1, "keep_checkpoints": 9}
        if whole:
            changes |= {"reconstruction": "l1", "train_encoder": True, "kl_weight": 2.5, "disc_weight": 0.5}
        config = kit.config(tmp_path / "run", lr_scheduler="linear", learning_rate=1e-4, **changes)
        stage = VAEStage(config)
        network, judge = copy.deepcopy(stage.vae.network).train(), copy.deepcopy(stage.discriminator)
        fit(stage, config, tmp_path / "run")
        logged = lines(tmp_path / "run")
        assert len(logged) == 3
        for step, line in enumerate(logged):
            if step:
                network.load_state_dict(saved(tmp_path / "run", step, "vae"), strict=False)
            samples = samples_of(config, step, 0, 0, 1, stage.size)
            x = pixels(*(kit.photos / name for name in stage.names(samples)))
            eps = torch.stack([torch.randn(LATENT, generator=noise_of(0, n)) for n, _ in samples])
            y, mean, logvar = passed(network, x, eps)
            error = (y - x).abs() if whole else (y - x).square()
            lpips = stage.lpips(y, x)
            loss = nll = (error + 0.1 * lpips[:, None, None, None]).sum() / len(x)
            expected = {"l1" if whole else "l2": error.mean(), "lpips": lpips.mean()}
            if whole:
                if step:
                    judge.load_state_dict(saved(tmp_path / "run", step, "discriminator"))
                adversarial = -judge(y).mean()
                last = network.decoder.conv_out.weight
                pulls = [torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (nll, adversarial)]
                weight = pulls[0] / VALUES / pulls[1]
                loss = nll + 2.5 * kl_of(mean, logvar) + 0.5 * weight * VALUES * adversarial
                hinge = 0.5 * (F.relu(1 - judge(x)).mean() + F.relu(1 + judge(y)).mean())
                expected |= {"kl": kl_of(mean, logvar), "adversarial": adversarial, "adaptive_weight": weight}
                expected |= {"discriminator/loss": hinge, "discriminator/real": judge(x).mean()}
                expected |= {"discriminator/fake": judge(y).mean()}
            expected["loss"] = loss / VALUES
            rates = {"lr": 1e-4 * (3 - step) / 3}
            rates |= {"discriminator/lr": rates["lr"]} if whole else {}
            of_the_loop = {key for key in line if key.endswith("grad_norm")} | {"step", "seconds"}
            assert line.keys() - of_the_loop == expected.keys() | rates.keys()
            for key, value in (expected | rates).items():
                value = value.item() if isinstance(value, Tensor) else value
                assert line[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, key)

    def test_latent_diffusions_kl_weight_is_small_beside_the_rest(self, kit: Kit, tmp_path: Path) -> None:
        """The default of 1e-6 goes with a sum over pixels. In a mean over pixels a hundred nats weigh only 3e-8."""
        settings = {"train_encoder": True, "save_every": 1}
        stage = VAEStage(kit.config(tmp_path, **settings))
        turns = Turns(stage)
        loss, parts = stage.loss(turns.networks, turns.batch, 0)
        assert parts["kl"] > 1
        assert loss.item() == pytest.approx(float(parts["l2"]) + 1e-6 * float(parts["kl"]) / VALUES, rel=1e-6)


def test_discriminator_starts_when_it_should(kit: Kit, tmp_path: Path) -> None:
    """Before disc_start the discriminator is in no loss and does not move. Its learning rate counts its own steps."""
    config = kit.config(
        tmp_path, max_steps=7, disc_weight=0.5, disc_start=3, lr_scheduler="linear", lr_warmup_steps=2, save_every=1,
        keep_checkpoints=9, learning_rate=1e-2,
    )  # fmt: skip
    stage = VAEStage(config)
    first = {name: value.clone() for name, value in stage.discriminator.state_dict().items()}
    fit(stage, config, tmp_path)
    logged = lines(tmp_path)
    for step, line in enumerate(logged):
        plays = step >= 3
        for key in ("adversarial", "adaptive_weight", "discriminator/loss", "discriminator/lr"):
            assert (key in line) == plays, (step, key)
        assert plays or line["loss"] == pytest.approx(line["l2"], rel=1e-6)
    for step in (1, 2, 3):
        assert all(torch.equal(saved(tmp_path, step, "discriminator")[name], first[name]) for name in first)
    moved = saved(tmp_path, 5, "discriminator")  # its first step has a learning rate of 0 because of the warm-up
    assert not any(torch.equal(moved[name], first[name]) for name in first if name != "layers.11.bias")
    rates = [line["lr"] for line in logged]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.008, 0.006, 0.004, 0.002])  # 7 steps with 2 of warm-up
    assert [line["discriminator/lr"] for line in logged[3:]] == pytest.approx([0, 0.005, 0.01, 0.005])  # 4 steps


class TestWhatIsLeftAlone:
    def test_the_encoder_of_a_run_of_the_decoder(self, kit: Kit, tmp_path: Path) -> None:
        train_vae(kit.config(tmp_path, disc_weight=0.5, ema_decay=0.5))
        before, after = weights(kit.model / "vae"), weights(tmp_path / "result")
        assert before.keys() == after.keys()
        for name in before:
            # A softmax does not depend on the key's bias, so AdamW moves that by rounding errors only.
            assert torch.equal(after[name], before[name]) == in_encoder(name) or "to_k.bias" in name, name
        old, new = (sdkit.VAE.from_pretrained(f, dtype="fp32", device="cpu") for f in (kit.model, tmp_path / "result"))
        assert new.identity == old.identity
        assert new.scale == old.scale == 0.5

    def test_nothing_where_the_encoder_trains(self, kit: Kit, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="latents have moved by"):
            train_vae(kit.config(tmp_path, train_encoder=True, ema_decay=0.5))
        before, after = weights(kit.model / "vae"), weights(tmp_path / "result")
        assert not any(torch.equal(after[name], before[name]) for name in before)
        old, new = (sdkit.VAE.from_pretrained(f, dtype="fp32", device="cpu") for f in (kit.model, tmp_path / "result"))
        assert new.identity != old.identity


class TestValidation:
    def reconstructed(self, model: Path, files: list[Path]) -> Tensor:
        vae = sdkit.VAE.from_pretrained(model, dtype="fp32", device="cpu")
        y: Tensor = vae.reconstruct(files, output_type="pt")
        return y

    def outside(self, model: Path, files: list[Path]) -> dict[str, float]:
        """Measure the same numbers through the public VAE and diffusers' posterior."""
        x = pixels(*files)
        y = self.reconstructed(model, files)
        folder = model / "vae" if (model / "vae").is_dir() else model
        network = AutoencoderKL.from_pretrained(folder)
        with torch.no_grad():
            posterior = network.encode(x).latent_dist
        raw = posterior.mean.double()
        std = float((raw.square() + posterior.var.double()).mean() - raw.mean() ** 2) ** 0.5
        return {
            "psnr": float(psnr(x, y).mean()), "ssim": float(ssim(x, y).mean()),
            "latent_mean": float(raw.mean()) * 0.5, "latent_std": std * 0.5, "recommended_scale": 1 / std,
        }  # fmt: skip

    def test_equals_what_the_public_vae_says_of_the_held_out_images(self, kit: Kit, tmp_path: Path) -> None:
        """Measure two of 40 images before and after training. Numbers must agree to 1e-4; PSNR is in dB."""
        train_vae(kit.config(tmp_path, train_encoder=True, learning_rate=1e-5, lpips=kit.lpips, validate_every=2))
        files = [kit.photos / "010.png", kit.photos / "030.png"]
        found = lines(tmp_path, validation=True)
        assert [line["step"] for line in found] == [0, 2, 3]
        for line, model in ((found[0], kit.model), (found[-1], tmp_path / "result")):
            expected = self.outside(model, files)
            lpips = LPIPS.from_pretrained(kit.lpips)
            expected["lpips"] = float(lpips(pixels(*files), self.reconstructed(model, files)).mean())
            for key, value in expected.items():
                assert line[key] == pytest.approx(value, rel=1e-4), key
            assert line.keys() == expected.keys() | {"step", "seconds", "latent_drift"}
        for step in (0, 2, 3):
            with Image.open(tmp_path / "samples" / f"step-{step:08}.png") as sheet:  # two pairs of images
                assert min(sheet.size) > 2 * tiny.SIZE
        assert found[0]["psnr"] != found[-1]["psnr"]

    def test_evaluators_add_metrics(self, kit: Kit, tmp_path: Path) -> None:
        config = kit.config(tmp_path, max_steps=1)
        stage = VAEStage(config)
        stage.evaluators.append(lambda step: {"fid": step + 0.5})
        fit(stage, config, tmp_path)
        assert [line["fid"] for line in lines(tmp_path, validation=True)] == [0.5, 1.5]

    def test_statistics_are_those_of_samples(self, kit: Kit, tmp_path: Path) -> None:
        """The statistics must equal, to 1 %, those of 4,000 posterior draws of each image through the public VAE."""
        train_vae(kit.config(tmp_path, max_steps=1))
        line = lines(tmp_path, validation=True)[0]
        vae = sdkit.VAE.from_pretrained(kit.model, dtype="fp32", device="cpu")
        mean, logvar = vae.moments([kit.photos / "010.png", kit.photos / "030.png"])
        eps = torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(0))
        z = (mean + (logvar / 2).exp() * eps) * vae.scale
        assert line["latent_std"] == pytest.approx(float(z.std()), rel=0.01)
        assert line["latent_mean"] == pytest.approx(float(z.mean()), abs=0.01 * float(z.std()))
        assert line["recommended_scale"] * float(z.std()) / vae.scale == pytest.approx(1, rel=0.01)

    def test_held_out_images_are_in_no_batch(self, kit: Kit, tmp_path: Path) -> None:
        config = kit.config(tmp_path, batch_size=19, max_steps=4, augment=("flip",))
        stage = VAEStage(config)
        held_out = pixels(kit.photos / "010.png", kit.photos / "030.png").flatten(1)
        seen: dict[str, list[Tensor]] = {}
        for step in range(4):  # two epochs
            samples = samples_of(config, step, 0, 0, 1, stage.size)
            batch = stage.batch(samples)["pixels"]
            for x in (batch.flatten(1), batch.flip(3).flatten(1)):
                assert torch.cdist(x, held_out).min() > 1
            for name, x in zip(stage.names(samples), batch, strict=True):
                seen.setdefault(name, []).append(x)
        assert seen.keys() == {f"{i:03}.png" for i in range(40)} - {"010.png", "030.png"}
        # Flips differ between the epochs.
        assert {torch.equal(first, second) for first, second in seen.values()} == {True, False}

    def test_images_of_ones_own(self, kit: Kit, tmp_path: Path) -> None:
        """With a validation folder, all of the data are trained on, and the first 64 images of that folder validate."""
        own = tiny.photos(tmp_path / "own", 66)
        config = kit.config(tmp_path / "run", max_steps=1, validation_data=own)
        stage = VAEStage(config)
        assert stage.size == 40
        assert {*stage.names([(0, item) for item in range(40)])} == {f"{i:03}.png" for i in range(40)}
        fit(stage, config, tmp_path / "run")
        expected = self.outside(kit.model, [own / f"{i:03}.png" for i in range(64)])
        found = lines(tmp_path / "run", validation=True)[0]
        for key in ("psnr", "ssim", "latent_mean", "latent_std"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4), key

    def test_drift(self, kit: Kit, tmp_path: Path) -> None:
        """Drift starts at 0, grows to that of the result's latents of the held-out images, and gives a warning above
        0.1.
        """
        settings = {"train_encoder": True, "max_steps": 6, "validate_every": 2, "ema_decay": 0.0}
        with pytest.warns(UserWarning, match="latents have moved") as warned:
            train_vae(kit.config(tmp_path, learning_rate=3e-4, **settings))
        drifts = [line["latent_drift"] for line in lines(tmp_path, validation=True)]
        assert drifts[0] == 0
        assert drifts == sorted(drifts)
        assert drifts[-1] > 0.1
        expected = [
            f"latents have moved by {drift:.2f} of their standard deviation: U-Nets and caches made for the starting "
            "VAE no longer fit."
            for drift in drifts
            if drift > 0.1
        ]
        assert [str(one.message) for one in warned] == expected
        files = [kit.photos / "010.png", kit.photos / "030.png"]
        (old, logvar), (new, _) = (
            sdkit.VAE.from_pretrained(folder, dtype="fp32", device="cpu").moments(files)
            for folder in (kit.model, tmp_path / "result")
        )
        std = float((old**2 + logvar.exp()).mean() - old.mean() ** 2) ** 0.5
        assert drifts[-1] == pytest.approx(float((new - old).square().mean()) ** 0.5 / std, rel=1e-4)

    def test_little_drift_is_no_warning(self, kit: Kit, tmp_path: Path) -> None:
        train_vae(kit.config(tmp_path, train_encoder=True, learning_rate=1e-5))
        assert 0 < lines(tmp_path, validation=True)[-1]["latent_drift"] < 0.1


class TestFromNothing:
    def test_trains_and_gets_the_scale_that_its_latents_ask_for(self, kit: Kit, tmp_path: Path) -> None:
        config = kit.config(
            tmp_path, init=kit.model / "vae" / "config.json", max_steps=30, batch_size=4, ema_decay=0.9,
            reconstruction="l1", learning_rate=3e-3, save_every=1000,
        )  # fmt: skip
        train_vae(config)
        losses = [line["loss"] for line in lines(tmp_path)]
        assert np.mean(losses[-5:]) < 0.75 * np.mean(losses[:5])
        validated = lines(tmp_path, validation=True)
        assert validated[-1]["psnr"] > validated[0]["psnr"] + 2
        assert "latent_drift" not in validated[-1]
        scale = json.loads((tmp_path / "result" / "config.json").read_text())["scaling_factor"]
        assert scale == pytest.approx(validated[-1]["recommended_scale"], rel=1e-6)
        vae = sdkit.VAE.from_pretrained(tmp_path / "result", dtype="fp32", device="cpu")
        z = vae.encode([kit.photos / f"{i:03}.png" for i in range(40)], seed=0)
        assert float(z.std()) == pytest.approx(1, abs=0.1)  # statistics of two images hold for all
        before, after = weights(kit.model / "vae"), weights(tmp_path / "result")
        assert not any(torch.equal(after[name], before[name]) for name in before if "norm" not in name)

    def test_first_weights_are_the_seeds(self, kit: Kit, tmp_path: Path) -> None:
        init = kit.model / "vae"
        torch.manual_seed(7)
        state = torch.get_rng_state()
        one, two, other = (VAEStage(kit.config(tmp_path, init=init, seed=seed, disc_weight=0.5)) for seed in (3, 3, 4))
        assert torch.equal(torch.get_rng_state(), state)
        for part in ("vae", "discriminator"):
            a, b, c = (getattr(stage, part).state_dict() for stage in (one, two, other))
            assert all(torch.equal(a[name], b[name]) for name in a)
            drawn = [name for name in a if "norm" not in name and a[name].any() and not (a[name] == 1).all()]
            assert drawn
            assert not any(torch.equal(a[name], c[name]) for name in drawn)


class TestResult:
    def test_loads_in_diffusers_and_here_alike(self, kit: Kit, tmp_path: Path) -> None:
        train_vae(kit.config(tmp_path))
        x = pixels(*sorted(kit.photos.glob("*.png"))[:3])
        ours = sdkit.VAE.from_pretrained(tmp_path / "result", dtype="fp32", device="cpu")
        theirs = AutoencoderKL.from_pretrained(tmp_path / "result")
        with torch.no_grad():
            expected = theirs(x).sample.clamp(-1, 1)
        found = ours.reconstruct(x, output_type="pt")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        old = sdkit.VAE.from_pretrained(kit.model, dtype="fp32", device="cpu").reconstruct(x, output_type="pt")
        assert (found - old).abs().max() > 1e-2

    def test_holds_the_moving_average(self, kit: Kit, tmp_path: Path) -> None:
        train_vae(kit.config(tmp_path, ema_decay=0.9))
        result, average, last = (
            weights(tmp_path / "result"), saved(tmp_path, 3, "vae.ema"), saved(tmp_path, 3, "vae"),
        )  # fmt: skip
        names = {name for name in result if not in_encoder(name)}
        assert average.keys() - {"num_updates"} == names
        assert all(torch.equal(result[name], average[name]) for name in names)
        assert any(not torch.equal(result[name], last[name]) for name in names)

    def test_holds_the_weights_themselves_where_there_is_none(self, kit: Kit, tmp_path: Path) -> None:
        train_vae(kit.config(tmp_path, ema_decay=0.0))
        assert not list((tmp_path / "checkpoints").glob("*/vae.ema.safetensors"))
        last, result = saved(tmp_path, 3, "vae"), weights(tmp_path / "result")
        assert all(torch.equal(result[name], last[name]) for name in last)


def test_data_and_a_folder_are_enough(kit: Kit, tmp_path: Path) -> None:
    """Nothing else must be found or set: LPIPS is in the loss, and falls. (Steps and size are set to save time.)"""
    run = train_vae(VAEConfig(data=kit.photos, out_dir=tmp_path / "run", size=64, max_steps=6))
    config = json.loads((run / "config.json").read_text())
    assert (config["settings"]["lpips"], config["lpips_backbone_identity"]) == ("alex", "alex")
    measured = [line for line in read_metrics(run / "metrics.jsonl") if "validation/lpips" in line]
    assert [line["step"] for line in measured] == [0, 6]
    assert measured[1]["validation/lpips"] < measured[0]["validation/lpips"]


def test_small_images_are_validated_without_lpips(kit: Kit, tmp_path: Path) -> None:
    """Where LPIPS is not in the loss, and no network is named. The embedded one takes 31 pixels."""
    with torch.no_grad():
        assert "lpips" not in VAEStage(kit.config(tmp_path / "a", size=24)).validate(0)
        assert VAEStage(kit.config(tmp_path / "b", size=32)).validate(0)["lpips"] > 0


def test_a_broken_image_is_left_out_and_named(kit: Kit, tmp_path: Path) -> None:
    data = tiny.photos(tmp_path / "photos", 24)
    (data / "003.png").write_bytes(b"no image")
    (data / "012.png").write_bytes((data / "012.png").read_bytes()[:60])  # this image is held out
    with pytest.warns(UserWarning, match=r"^0(03|12)\.png is skipped: .*") as warned:
        train_vae(kit.config(tmp_path / "run", data=data, batch_size=12, max_steps=4))
    assert sorted(str(one.message)[:7] for one in warned) == ["003.png", "012.png"]
    report = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert report.keys() == {"003.png", "012.png"}
    assert all("cannot" in reason or "not" in reason for reason in report.values())
    assert len(lines(tmp_path / "run")) == 4


class TestPrecision:
    def test_bf16_keeps_weights_in_float32_and_the_losses(self, kit: Kit, tmp_path: Path) -> None:
        """Losses of five steps with every term must agree to 2 %."""
        settings = {
            "max_steps": 5, "train_encoder": True, "lpips_weight": 0.1, "lpips": kit.lpips, "disc_weight": 0.2,
            "learning_rate": 1e-4,
        }  # fmt: skip
        losses = []
        for precision in ("no", "bf16"):
            config = kit.config(tmp_path / precision, mixed_precision=precision, **settings)
            stage = VAEStage(config)
            fit(stage, config, tmp_path / precision)
            networks = [stage.vae, stage.discriminator]
            assert {p.dtype for network in networks for p in network.parameters()} == {torch.float32}
            assert {p.dtype for p in stage.lpips.parameters()} == {torch.float32}
            for file in (tmp_path / precision).rglob("*.safetensors"):
                if not file.name.startswith("rng"):
                    kinds = {value.dtype for name, value in load_file(file).items() if name != "num_updates"}
                    assert kinds == {torch.float32}, file
            losses.append([line["loss"] for line in lines(tmp_path / precision)])
        assert losses[1] == pytest.approx(losses[0], rel=0.02)
        assert losses[1] != pytest.approx(losses[0], rel=1e-6)  # it did run in another precision
        assert lines(tmp_path / "bf16", validation=True)[0]["latent_drift"] == 0

    @pytest.mark.parametrize("network", ["alex", "vgg"])
    def test_lpips_in_bf16_teaches_the_decoder_the_same(
        self, network: str, kit: Kit, tmp_path: Path, chelsea: Image.Image
    ) -> None:
        """Cosine between the gradients of the decoder's weights in bf16 and float32, with real LPIPS weights, the
        embedded model's VAE, and a photo of a cat.
        """
        weights = "alex" if network == "alex" else shared_data.lpips_weights()
        config = kit.config(tmp_path, model="emoji", lpips=weights, lpips_weight=1.0, mixed_precision="bf16")
        stage = VAEStage(config)
        assert {p.dtype for p in stage.training_lpips.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in stage.lpips.parameters()} == {torch.float32}
        x = (
            torch.from_numpy(np.asarray(chelsea.crop((150, 60, 278, 188)), np.float32)).permute(2, 0, 1)[None] / 127.5
            - 1
        )
        y = stage.vae(x)[0]
        trained = [p for p in stage.vae.parameters() if p.requires_grad]
        half, full = (
            torch.cat([g.flatten() for g in torch.autograd.grad(lpips(y, x).mean(), trained, retain_graph=True)])
            for lpips in (stage.training_lpips, stage.lpips)
        )
        assert F.cosine_similarity(half, full, dim=0) > 0.99
        assert half.norm() / full.norm() == pytest.approx(1, abs=0.05)


GOLDEN = {
    "decoder": [0.912855, 0.738584, 0.619219, 0.501327, 0.434222, 0.370507, 0.336824, 0.277638, 0.273584, 0.247463],
    "everything": [0.867698, 0.889775, 0.880205, 0.871968, 0.905375, 0.883731, 0.899123, 0.915230, 0.886246, 0.823761],
    "discriminator": [0.668503, 0.571457, 0.398550, 0.448394, 0.506972],
}


class TestGolden:
    """Golden losses of ten steps in float32 on one thread, to 1e-3. A change in these numbers is a change in what is
    learned.
    """

    def losses(self, kit: Kit, out: Path, **changes: Any) -> list[dict[str, float]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            train_vae(kit.config(out, max_steps=10, seed=1, augment=("crop", "flip"), **changes))
        finally:
            torch.set_num_threads(threads)
        return lines(out)

    def test_decoder(self, kit: Kit, tmp_path: Path) -> None:
        found = self.losses(kit, tmp_path, lpips_weight=0.1, lpips=kit.lpips)
        assert [line["loss"] for line in found] == pytest.approx(GOLDEN["decoder"], rel=1e-3)

    def test_everything_with_the_discriminator_from_step_5(self, kit: Kit, tmp_path: Path) -> None:
        settings = {"train_encoder": True, "reconstruction": "l1", "kl_weight": 1.0, "disc_weight": 0.5}
        found = self.losses(kit, tmp_path, disc_start=5, learning_rate=1e-5, **settings)
        assert [line["loss"] for line in found] == pytest.approx(GOLDEN["everything"], rel=1e-3)
        assert [line["discriminator/loss"] for line in found[5:]] == pytest.approx(GOLDEN["discriminator"], rel=1e-3)
