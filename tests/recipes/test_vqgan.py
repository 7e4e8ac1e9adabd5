"""The four decoders of one codebook: what the shipped ones share and how they differ, a tiny run of which parts are
made again, and mistakes of users.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import sdkit
from sdkit.errors import ArgumentError, SourceError, TrainingError
from sdkit.evaluation.codebook import codebook_use
from sdkit.networks.lpips import LPIPS
from sdkit.recipes import vqgan
from sdkit.recipes.compare.draws import slug
from tests.helpers.sentences import one_sentence

FEW = 0.0005  # of the steps


@pytest.fixture(scope="module")
def vaes() -> dict[str, sdkit.VAE]:
    return vqgan.decoders()


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return torch.stack(sdkit.images.to_tensors(vqgan.emoji()[1]))


@pytest.fixture(scope="module")
def back(vaes: dict[str, sdkit.VAE], held_out: Tensor) -> dict[str, Tensor]:
    """Held-out emoji, through each autoencoder."""
    return {name: vae.reconstruct(held_out, output_type="pt") for name, vae in vaes.items()}


def test_no_emoji_is_in_both_sets_and_none_is_lost() -> None:
    training, held_out = ({image.tobytes() for image in images} for images in vqgan.emoji())
    assert not training & held_out
    assert [len(images) for images in vqgan.emoji()] == [776, 194]
    assert len(training | held_out) == 970


def only_the_decoders_differ(vaes: dict[str, sdkit.VAE]) -> None:
    """Check that all others differ from the first autoencoder in weights of the decoder, and in no others."""
    first, *others = (vae.network.state_dict() for vae in vaes.values())
    for other in others:
        changed = {key.split(".")[0] for key in first if not torch.equal(first[key], other[key])}
        assert changed == {"decoder", "post_quant_conv"}


class TestShipped:
    def test_only_the_decoders_differ(self, vaes: dict[str, sdkit.VAE]) -> None:
        assert list(vaes) == list(vqgan.TERMS)
        only_the_decoders_differ(vaes)

    def test_codes_are_in_use(self, vaes: dict[str, sdkit.VAE], held_out: Tensor) -> None:
        _, perplexity = codebook_use(vaes["L2"].codes(held_out), 512)
        assert perplexity > 300

    def test_squared_error_has_the_best_psnr(self, back: dict[str, Tensor], held_out: Tensor) -> None:
        decibels = {name: float(sdkit.metrics.psnr(images, held_out).mean()) for name, images in back.items()}
        assert max(decibels, key=decibels.__getitem__) == "L2"
        assert min(decibels.values()) > 19

    def test_a_discriminator_sharpens_and_helps_lpips(self, back: dict[str, Tensor], held_out: Tensor) -> None:
        """LPIPS took no part in the training of either of these decoders."""
        lpips = LPIPS.from_pretrained("alex")
        with torch.no_grad():
            perceived = {name: float(lpips(back[name], held_out).mean()) for name in ("L2", "L2 + GAN")}
        assert perceived["L2 + GAN"] < 0.75 * perceived["L2"]
        sharp = {name: float(images.diff(dim=3).square().mean()) for name, images in back.items()}
        assert sharp["L2 + GAN"] > 1.3 * sharp["L2"]
        assert sharp["L2 + LPIPS + GAN"] > 1.3 * sharp["L2 + LPIPS"]

    def test_curves_end_with_what_the_decoders_do(self, back: dict[str, Tensor], held_out: Tensor) -> None:
        lpips = LPIPS.from_pretrained("alex")
        assert list(vqgan.curves()) == list(vqgan.TERMS)
        for name, curve in vqgan.curves().items():
            assert curve[-1]["step"] == vqgan.DECODER["max_steps"]
            decibels = float(sdkit.metrics.psnr(back[name][:64], held_out[:64]).mean())
            assert decibels == pytest.approx(curve[-1]["psnr"], abs=0.1)  # trained in bfloat16, stored in float16
            with torch.no_grad():
                perceived = float(lpips(back[name][:64], held_out[:64]).mean())
            assert perceived == pytest.approx(curve[-1]["lpips"], rel=0.05)


@contextmanager
def few_emoji() -> Iterator[None]:
    """Let runs have few emoji, as most of the time of a short one is that of validation."""
    training, held_out = vqgan.emoji()
    with mock.patch.object(vqgan, "emoji", return_value=(training[:32], held_out[:4])):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of a few steps."""
    folder = tmp_path_factory.mktemp("tiny")
    with few_emoji():
        assert vqgan.train(folder, scale=FEW) == folder / "result"
    return folder


def test_each_decoder_has_its_own_loss(tiny: Path) -> None:
    only_the_decoders_differ(vqgan.decoders(tiny / "result"))
    for name, terms in vqgan.TERMS.items():
        settings = json.loads((tiny / slug(name) / "config.json").read_text())["settings"]
        assert settings["lpips_weight"] == terms["lpips_weight"]
        assert settings["disc_weight"] == terms.get("disc_weight", 0)
        assert not settings["train_encoder"]


def test_what_is_missing_is_made_again(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other parts are kept, and all is as before. The result has what `decoders` reads."""
    stopped = tmp_path / "stopped"
    shutil.copytree(tiny, stopped)
    for name in ("l2-gan", "result"):
        shutil.rmtree(stopped / name)
    times = {path: path.stat().st_mtime_ns for path in stopped.rglob("*.safetensors")}
    with few_emoji(), mock.patch("sys.argv", ["vqgan", "--out", str(stopped), "--scale", str(FEW)]):
        assert vqgan.main() == 0
    assert capsys.readouterr().out.strip().endswith("result")
    assert {path: path.stat().st_mtime_ns for path in times} == times
    resumed = vqgan.decoders(stopped / "result")
    for name, vae in vqgan.decoders(tiny / "result").items():
        other = resumed[name].network.state_dict()
        assert all(torch.equal(value, other[key]) for key, value in vae.network.state_dict().items()), name
    assert vqgan.curves(tiny / "result") == vqgan.curves(stopped / "result")
    assert [row["step"] for row in vqgan.curves(stopped / "result")["L2"]] == [0, 2]


class TestMistakes:
    @pytest.mark.parametrize("scale", [0, -1, 1.5, float("nan")])
    def test_scale(self, tmp_path: Path, scale: float) -> None:
        one_sentence(lambda: vqgan.train(tmp_path, scale=scale), ArgumentError, "scale")
        assert not any(tmp_path.iterdir())

    def test_precision(self, tmp_path: Path) -> None:
        one_sentence(lambda: vqgan.train(tmp_path, mixed_precision="bf61"), ArgumentError, "bf61")
        assert not any(tmp_path.iterdir())

    def test_a_result_of_something_else_is_kept(self, tmp_path: Path) -> None:
        (tmp_path / "result").mkdir()
        (tmp_path / "result" / "thesis.txt").write_text("all of it")
        one_sentence(lambda: vqgan.train(tmp_path, scale=FEW), SourceError, "name another --out")
        assert (tmp_path / "result" / "thesis.txt").read_text() == "all of it"

    def test_a_folder_without_decoders(self, tmp_path: Path) -> None:
        one_sentence(lambda: vqgan.decoders(tmp_path), SourceError, "l2")
        one_sentence(lambda: vqgan.curves(tmp_path), SourceError, "missing")

    @pytest.mark.parametrize("content", ["[", "{}", '{"L2": 3}', json.dumps({name: [1] for name in vqgan.TERMS})])
    def test_damaged_curves(self, tmp_path: Path, content: str) -> None:
        (tmp_path / vqgan.CURVES).write_text(content)
        one_sentence(lambda: vqgan.curves(tmp_path), SourceError, "damaged")

    def test_out_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        one_sentence(lambda: vqgan.train(tmp_path / "file", scale=FEW), TrainingError, "file")
