"""Codebooks that do not collapse: moving averages, k-means, restarts, and codes of length 1."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import VQModel
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from torch import Tensor

import sdkit
from sdkit.data.transform import draw
from sdkit.errors import ArgumentError
from sdkit.evaluation.codebook import use_of_counts
from sdkit.training import VAEConfig, train_vae
from sdkit.training.batches import samples_of
from sdkit.training.run_folder import read_metrics
from sdkit.training.stages import codebook as module
from sdkit.training.stages.codebook import Chosen, CodebookAverages, kmeans, moved
from sdkit.training.stages.vae import AVERAGES, RESTARTS, VAEStage
from tests.helpers import forks, runs, tiny
from tests.helpers.sentences import one_sentence

CODES = 32
EVERY_CONFIG = ("_class_name", "_diffusers_version")
SHAPE: dict[str, Any] = {
    "_class_name": "VQModel", "num_vq_embeddings": CODES, "block_out_channels": [16] * 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 4,
    "norm_num_groups": 4, "sample_size": tiny.SIZE, "mid_block_add_attention": False,
}  # fmt: skip
RUN: dict[str, Any] = {
    "regularizer": "vq", "batch_size": 4, "max_steps": 8, "learning_rate": 1e-3, "lpips_weight": 0.0,
    "ema_decay": 0.0, "codebook_decay": 0.05, "validate_every": 4, "save_every": 4, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.photos(tmp_path_factory.mktemp("discs") / "photos", 24)


def settings(photos: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Return settings that train from scratch, with codes that die soon."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shape.json").write_text(json.dumps(SHAPE))
    return RUN | {"init": folder / "shape.json", "data": photos, "out_dir": folder / "run"} | changes


def trained(photos: Path, folder: Path, **changes: Any) -> Path:
    return train_vae(VAEConfig(**settings(photos, folder, **changes)))


def saved(run: Path, step: int) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "vae.safetensors")


def logged(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in read_metrics(run / "metrics.jsonl")]


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nothing() -> Tensor:
    raise AssertionError("no code is to be replaced")


class TestAverages:
    def test_appendix_a1(self) -> None:
        """The codes are those of eq. 6 to 8 in NumPy, with counts that begin as one equal share."""
        decay, steps, latents_of_a_step = 0.9, 5, 40
        rng = np.random.default_rng(0)
        codes = rng.normal(size=(3, 2))
        n, m = np.full(3, latents_of_a_step / 3), codes * latents_of_a_step / 3
        averages = CodebookAverages(torch.tensor(codes), decay=decay, learned=True)
        for _ in range(steps):
            z, k = rng.normal(size=(latents_of_a_step, 2)), rng.integers(3, size=latents_of_a_step)
            averages.step(Chosen.of(torch.tensor(z).float(), torch.tensor(k), 3), nothing, seeded())
            for i in range(3):
                n[i] = decay * n[i] + (1 - decay) * (k == i).sum()
                m[i] = decay * m[i] + (1 - decay) * z[k == i].sum(0)
        np.testing.assert_allclose(averages.codebook, m / n[:, None], atol=1e-6)

    def test_the_codes_begin_as_they_were(self) -> None:
        codes = torch.randn(5, 4, generator=seeded())
        torch.testing.assert_close(CodebookAverages(codes, decay=0.99).codebook, codes)
        assert not CodebookAverages(codes, decay=0.99).dead.any()

    def test_a_code_that_is_never_chosen_is_restarted_in_time(self) -> None:
        """Its share is decay^n of an equal one after n steps, until that is less than `DEAD`."""
        latents = torch.tensor([[0.0, 0.0], [5.0, 5.0], [5.0, 5.0]])
        averages = CodebookAverages(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), decay=0.5, learned=True)
        chosen = Chosen.of(latents, torch.tensor([0, 0, 0]), 2)
        restarted = [averages.step(chosen, lambda: latents, seeded(step)) for step in range(8)]
        first = next(n for n in range(1, 9) if 0.5**n < module.DEAD) - 1
        assert restarted[:first] == [0] * first
        assert restarted[first] == 1
        assert averages.codebook[1].tolist() in latents.tolist()

    def test_codes_of_length_one(self) -> None:
        averages = CodebookAverages(torch.randn(6, 3, generator=seeded()), decay=0.9, normalize=True)
        latents = F.normalize(torch.randn(50, 3, generator=seeded(1)), dim=1)
        for step in range(3):
            chosen = Chosen.of(latents, torch.arange(50) % 6, 6)
            averages.step(chosen, lambda: latents, seeded(step))
            torch.testing.assert_close(averages.codebook.norm(dim=1), torch.ones(6))


class TestReplacing:
    def test_latents_far_from_all_codes_are_drawn(self) -> None:
        """As in k-means++, the probability is proportional to the squared distance from the nearest code."""
        codes = torch.tensor([[0.0], [100.0]])
        latents = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        drawn = [
            float(moved(codes, torch.tensor([False, True]), latents, seeded(i))[1]) for i in range(2000)
        ]  # the second code is far from all latents
        frequencies = np.array([drawn.count(x) for x in (0.0, 1.0, 2.0, 3.0)])
        expected = 2000 * np.array([0, 1, 4, 9]) / 14
        assert frequencies[0] == 0
        assert ((frequencies[1:] - expected[1:]) ** 2 / expected[1:]).sum() < 13.8  # chi-squared, p = 0.001

    def test_fewer_latents_than_dead_codes(self) -> None:
        codes = torch.zeros(4, 2)
        latents = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
        found = moved(codes, torch.tensor([True, False, True, True]), latents, seeded())
        assert found.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
        assert torch.equal(moved(codes, torch.ones(4, dtype=torch.bool), torch.zeros(3, 2), seeded()), codes)

    def test_kmeans_is_nearly_as_good_as_scikit_learn_s_best_of_five(self) -> None:
        blobs = torch.randn(12, 3, generator=seeded()) * 4
        latents = (blobs[torch.arange(1200) % 12] + torch.randn(1200, 3, generator=seeded(1))).float()
        best = KMeans(12, n_init=5, random_state=0).fit(latents.numpy()).inertia_

        def inertia(codes: Tensor) -> float:
            return float(torch.cdist(latents, codes).min(1).values.square().sum())

        start = torch.rand(12, 3, generator=seeded(2)) / 12
        found = [inertia(kmeans(latents, start, seeded(i))) for i in range(5)]
        assert max(found) < 1.5 * best
        assert inertia(start) > 5 * best

    def test_spherical_kmeans(self) -> None:
        latents = F.normalize(torch.randn(200, 4, generator=seeded()), dim=1)
        codes = kmeans(latents, torch.zeros(8, 4), seeded(1), normalize=True)
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(8))
        assert len((latents @ codes.T).argmax(1).unique()) == 8


class TestRuns:
    def test_a_resumed_run_is_bit_identical(self, photos: Path, tmp_path: Path) -> None:
        """Codes must be restarted before and after the interruption."""
        whole = trained(photos, tmp_path / "whole", max_steps=12)
        trained(photos, tmp_path / "parts", max_steps=8)
        parts = trained(photos, tmp_path / "parts", max_steps=12)
        assert files(parts / "checkpoints") == files(whole / "checkpoints")
        assert files(parts / "result") == files(whole / "result")
        lines = [line for line in logged(whole) if "loss" in line]
        assert [line for line in logged(parts) if "loss" in line] == lines
        assert all(any(line["codes_restarted"] for line in some) for some in (lines[:8], lines[8:]))
        averages = {name for name in saved(whole, 12) if name.startswith(AVERAGES)}
        assert averages == {f"{AVERAGES}.{name}" for name in ("shares", "sums", "started")}

    def test_the_first_step_starts_from_kmeans(self, photos: Path, tmp_path: Path) -> None:
        """The codes must be near the latents that the untrained encoder gives the images of the first step."""
        stage = VAEStage(VAEConfig(**settings(photos, tmp_path)))
        run = trained(photos, tmp_path, max_steps=1)
        codes = saved(run, 1)["network.quantize.embedding.weight"]
        batch = stage.batch(samples_of(stage.config, step=0, micro_batch=0, rank=0, world=1, size=stage.size))
        stage.loss({"vae": stage.vae}, batch, 0)
        latents = batch["latents"].movedim(1, -1).flatten(0, 2)
        own = stage.vae.network.quantize.embedding.weight.detach()
        expected = kmeans(latents, own, draw(RUN["seed"], 0, RESTARTS))
        torch.testing.assert_close(codes, expected)
        (first, *_) = [line for line in logged(run) if "loss" in line]
        assert first["codes_restarted"] == 0

    def test_metrics_of_a_step(self, photos: Path, tmp_path: Path) -> None:
        run = trained(photos, tmp_path)
        for line in logged(run):
            if "loss" in line:
                assert 1 / CODES <= line["codebook_use"] <= 1
                assert 1 <= line["perplexity"] <= CODES * line["codebook_use"] + 1e-9
                assert 0 <= line["codes_restarted"] <= CODES
        after = [line for line in logged(run) if "validation/psnr" in line][-1]
        assert {"validation/codebook_use", "validation/perplexity"} <= after.keys()

    @pytest.mark.parametrize("normalize", [False, True])
    def test_diffusers_computes_the_same(self, normalize: bool, photos: Path, tmp_path: Path) -> None:
        """The result must load in diffusers as it is, and give the images that validation measured."""
        run = trained(photos, tmp_path, normalize_codes=normalize)
        network = VQModel.from_pretrained(run / "result")
        assert type(network) is VQModel
        assert json.loads((run / "result" / "config.json").read_text()).keys() <= own_of_diffusers()
        codes = network.quantize.embedding.weight
        torch.testing.assert_close(codes, saved(run, 8)["network.quantize.embedding.weight"])
        stage = VAEStage(VAEConfig(**settings(photos, tmp_path, normalize_codes=normalize)))
        stage.vae.network.load_state_dict(network.state_dict())
        x = torch.stack([stage.validation.load_held_out(stage.held_out, i)[0] for i in range(len(stage.held_out))])
        with torch.no_grad():
            pixels, mean, _, _, numbers = stage.vae(x)
            found = network(x).sample
        torch.testing.assert_close(found, pixels, atol=1e-5, rtol=0)
        vae = sdkit.VAE(network)
        assert torch.equal(vae.codes(x), numbers)
        assert torch.equal(vae.decode_codes(numbers, output_type="pt"), vae.reconstruct(x, output_type="pt"))
        if normalize:
            torch.testing.assert_close(codes.norm(dim=1), torch.ones(CODES))
            assert float((mean.norm(dim=1) - 1).abs().max()) > 0.1  # the latents themselves have any length

    def test_a_skipped_step_leaves_no_trace(
        self, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loss = VAEStage.loss

        def spoiled(self: VAEStage, networks: Any, batch: dict[str, Any], step: int) -> Any:
            value, parts = loss(self, networks, batch, step)
            return (value * float("nan") if step == 5 else value), parts

        monkeypatch.setattr(VAEStage, "loss", spoiled)
        with pytest.warns(UserWarning, match="step 6 is skipped"):
            run = trained(photos, tmp_path, max_steps=6, save_every=1, keep_checkpoints=2)
        before, after = saved(run, 5), saved(run, 6)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)

    @pytest.mark.parametrize("split", [(2, 2), (1, 4)])
    def test_accumulation_is_one_large_batch(self, split: tuple[int, int], photos: Path, tmp_path: Path) -> None:
        whole = trained(photos, tmp_path / "whole", learning_rate=1e-5)
        batch_size, accumulated = split
        parts = trained(
            photos, tmp_path / "parts", learning_rate=1e-5, batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        agree(parts, whole)

    def test_by_gradient_alone(self, photos: Path, tmp_path: Path) -> None:
        """With a decay of 0 the codes follow the optimizer, and nothing is added to the VAE."""
        run = trained(photos, tmp_path, codebook_decay=0.0, max_steps=1)
        stage = VAEStage(VAEConfig(**settings(photos, tmp_path, codebook_decay=0.0)))
        codes = stage.vae.network.quantize.embedding.weight.detach()
        step = (saved(run, 1)["network.quantize.embedding.weight"] - codes).abs()
        assert float(step.max()) == pytest.approx(1e-3, rel=0.05)  # AdamW's first step is as long as the rate
        assert not [name for name in saved(run, 1) if name.startswith(AVERAGES)]
        assert {"codebook_use", "perplexity"} <= logged(run)[1].keys()

    def test_a_codebook_of_moving_averages_has_no_gradient(self, photos: Path, tmp_path: Path) -> None:
        """Its gradient is that of eq. 3 without moving averages, and else zero, so that it does not count in the norm
        by which gradients are clipped. The other gradients are the same."""
        found = []
        for decay in (0.0, 0.99):
            stage = VAEStage(VAEConfig(**settings(photos, tmp_path, codebook_decay=decay)))
            batch = stage.batch([(n, n) for n in range(4)])
            loss, parts = stage.loss({"vae": stage.vae}, batch, 0)
            loss.backward()  # type: ignore[no-untyped-call]
            gradients = {name: p.grad for name, p in stage.vae.network.named_parameters()}
            found.append((loss.item(), torch.as_tensor(parts["codebook"]).item(), gradients, batch))
        (learned, averaged), name = found, "quantize.embedding.weight"
        assert averaged[:2] == learned[:2]
        z, numbers = learned[3]["latents"].movedim(1, -1).flatten(0, 2), learned[3]["numbers"].flatten()
        codes = stage.vae.network.quantize.embedding.weight.detach()
        expected = torch.zeros(CODES, 4).index_add_(0, numbers, 2 * (codes[numbers] - z) / z.numel())
        torch.testing.assert_close(learned[2].pop(name), expected, atol=1e-7, rtol=1e-4)
        assert not averaged[2].pop(name).any()
        assert learned[2].keys() == averaged[2].keys()
        assert all(torch.equal(learned[2][other], averaged[2][other]) for other in learned[2])
        norm = float(torch.stack([gradient.norm() for gradient in averaged[2].values()]).norm())
        run = trained(photos, tmp_path, codebook_decay=0.99, max_steps=1)
        assert next(line["grad_norm"] for line in logged(run) if "grad_norm" in line) == pytest.approx(norm, rel=0.2)

    @pytest.mark.parametrize("changes", [{"ema_decay": 0.9}, {"codebook_decay": 0.0}], ids=str)
    def test_exported_codes_have_length_one(self, changes: dict[str, float], photos: Path, tmp_path: Path) -> None:
        """Averages of weights shorten codes, and the optimizer lengthens them."""
        run = trained(photos, tmp_path, normalize_codes=True, learning_rate=1e-2, **changes)
        codes = VQModel.from_pretrained(run / "result").quantize.embedding.weight
        torch.testing.assert_close(codes.norm(dim=1), torch.ones(CODES))

    def test_a_learned_codebook_is_fine_tuned(self, photos: Path, tmp_path: Path) -> None:
        """Its codes must move on, and not start anew."""
        first = trained(photos, tmp_path / "first")
        second = trained(
            photos, tmp_path / "second", init=None, model=first / "result", train_encoder=True, codebook_decay=0.99,
            learning_rate=1e-6, max_steps=1,
        )  # fmt: skip
        codes = [VQModel.from_pretrained(run / "result").quantize.embedding.weight.detach() for run in (first, second)]
        moved_by = (codes[0] - codes[1]).norm(dim=1)
        assert 0 < float(moved_by.max()) < 0.2 * float(codes[0].norm(dim=1).mean())


def own_of_diffusers() -> set[str]:
    """Return the keys in a config of diffusers' own VQModel."""
    return {*VQModel(**{name: value for name, value in SHAPE.items() if name[0] != "_"}).config, *EVERY_CONFIG}


def agree(run: Path, other: Path) -> None:
    """Check that two runs are the same but for rounding, and that codes were restarted in them."""
    lines, others = ([line for line in logged(folder) if "loss" in line] for folder in (run, other))
    assert sum(line["codes_restarted"] for line in lines) > 0
    for line, of_other in zip(lines, others, strict=True):
        assert line == pytest.approx(of_other, abs=1e-5, rel=1e-4)
    one, another = saved(run, 8), saved(other, 8)
    assert one.keys() == another.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, another[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes_train_as_one(photos: Path, tmp_path: Path) -> None:
    """Statistics are summed, and restarted codes drawn from the latents of both. Both must have the same codebook."""
    two = settings(photos, tmp_path / "two", batch_size=2, learning_rate=1e-5)
    ended = forks.launch(runs.launched, [{"stage": "vae", "settings": two}])
    assert ended.codes == [0, 0], ended.err
    agree(tmp_path / "two" / "run", trained(photos, tmp_path / "one", learning_rate=1e-5))
    zero, one = (load_file(tmp_path / "two" / "run" / f"rank-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(zero[name], one[name]) for name in zero)


def test_use_of_counts() -> None:
    assert use_of_counts(torch.tensor([3.0, 1.0, 0.0, 0.0])) == pytest.approx((0.5, 4 / 3**0.75))


class TestMistakes:
    @pytest.mark.parametrize("changes", [{"regularizer": "kl"}, {"init": None, "model": "emoji"}], ids=str)
    def test_normalised_codes_without_a_codebook_in_training(
        self, changes: dict[str, Any], photos: Path, tmp_path: Path
    ) -> None:
        one_sentence(
            lambda: VAEConfig(**settings(photos, tmp_path, normalize_codes=True, **changes)),
            ArgumentError,
            "normalize_codes",
        )

    @pytest.mark.parametrize("decay", [-0.1, 1.0, "fast"])
    def test_decay(self, decay: Any, photos: Path, tmp_path: Path) -> None:
        one_sentence(
            lambda: VAEConfig(**settings(photos, tmp_path, codebook_decay=decay)), ArgumentError, "codebook_decay"
        )
