"""The comparison of systems: its data, its measures against scikit-learn and SciPy, a tiny run that is resumed, the
shipped draws and table, and mistakes of users.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from sdkit.errors import ArgumentError, SdkitError, SourceError
from sdkit.recipes.compare import __main__ as command
from sdkit.recipes.compare import data, draws, systems
from sdkit.recipes.compare.draws import Cost
from sdkit.recipes.compare.gan import Generator, load_generator, train_gan
from sdkit.recipes.compare.judging import load_judges
from sdkit.recipes.compare.measuring import DRAWS, JUDGES, controls, measure, measured, nearest_distance
from sdkit.recipes.compare.report import SHIPPED, SWEEP, as_json, compare, table
from sdkit.recipes.compare.systems import SYSTEMS
from sdkit.recipes.compare.workshop import STEPS, Workshop
from tests.helpers.sentences import one_sentence

pytest.importorskip("datasets")

IMAGES = 12
FEW = 0.0006


@pytest.fixture(scope="module")
def digits() -> data.Digits:
    return data.digits()


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["compare", *words])
    assert command.main() == 0
    return capsys.readouterr().out


class TestData:
    def test_no_digit_is_in_two_sets_and_none_is_lost(self, digits: data.Digits) -> None:
        sets = [digits.training, digits.reference, digits.held_out]
        assert [len(one) for one in sets] == [1197, 300, 300]
        labels = sorted(label for one in sets for label in one.labels)
        assert labels == sorted(load_digits(return_X_y=True)[1].tolist())

    def test_captions_name_the_digit_and_half_of_each_class_is_thick(self, digits: data.Digits) -> None:
        everything = [digits.training, digits.reference, digits.held_out]
        pairs = [
            (data.word_of(text), text, label)
            for one in everything
            for text, label in zip(one.captions, one.labels, strict=True)
        ]
        assert all(word == label for word, _, label in pairs)
        for digit in range(10):
            thick = [text.startswith("a thick") for _, text, label in pairs if label == digit]
            assert 0.4 < sum(thick) / len(thick) <= 0.5

    def test_trainings_with_text_lack_the_unseen_captions(self, digits: data.Digits, tmp_path: Path) -> None:
        for _ in range(2):  # the second time, the folder is kept
            data.write(digits.training, tmp_path / "data")
        found = {
            home: sorted(path.read_text() for path in (tmp_path / "data" / home).glob("*.txt"))
            for home in (data.CAPTIONED, data.EVERYTHING)
        }
        assert found[data.EVERYTHING] == sorted(digits.training.captions)
        assert found[data.CAPTIONED] == sorted(text for text in digits.training.captions if text not in data.UNSEEN)
        assert len([*(tmp_path / "data" / data.CLASSES).rglob("*.png")]) == len(digits.training)


class TestMeasures:
    def test_they_are_those_of_scikit_learn_and_scipy(self, digits: data.Digits) -> None:
        judges = load_judges(SHIPPED / JUDGES)
        pictures = digits.held_out.pictures[:120]
        row = measure(Cost(name="x", images=120, order=0), pictures, digits, judges)
        a, b = (judges.features(draws.grey(one)).double().numpy() for one in (pictures, digits.reference.pictures))
        root = sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        assert row.frechet == pytest.approx(expected, rel=1e-5)
        shares = []
        for ours, theirs in ((a, b), (b, a)):
            radii = NearestNeighbors(n_neighbors=4).fit(theirs).kneighbors(theirs)[0][:, -1]
            distances = np.linalg.norm(ours[:, None] - theirs[None], axis=-1)
            shares.append((distances <= radii).any(1).mean())
        assert (row.precision, row.recall) == pytest.approx(tuple(shares))
        pixels, training = (data.levels(one).numpy() for one in (pictures, digits.training.pictures))
        nearest = NearestNeighbors(n_neighbors=1).fit(training).kneighbors(pixels)[0]
        assert row.nearest == pytest.approx(nearest.mean() / 16, rel=1e-5)
        assert (row.accuracy, row.retrieval) == (None, None)

    def test_the_margin_is_that_of_other_digits(self, digits: data.Digits) -> None:
        """The distance of other held-out digits lies within three margins."""
        judges = load_judges(SHIPPED / JUDGES)
        parts = [digits.held_out[slice(0, 150)], digits.held_out[slice(150, 300)]]
        rows = [measure(Cost(name="x", images=150, order=0), one.pictures, digits, judges) for one in parts]
        assert 0 < rows[0].margin < rows[0].frechet
        assert abs(rows[0].frechet - rows[1].frechet) < 3 * rows[0].margin

    def test_nearest_pixels(self) -> None:
        assert nearest_distance(torch.tensor([[3.0, 4.0], [0.0, 9.0]]), torch.tensor([[0.0, 0.0], [0.0, 7.0]])) == (
            pytest.approx((18**0.5 / 2**0.5 + 2 / 2**0.5) / 2)
        )

    def test_copies_of_training_digits_win_by_nearest_pixels_alone(self, digits: data.Digits) -> None:
        judges = load_judges(SHIPPED / JUDGES)
        rows = {cost.name: measure(cost, pictures, digits, judges) for cost, pictures in controls(digits, 300)}
        mean, real, copies = (rows[name] for name in ("mean image", "held-out digits", "training digits"))
        assert copies.nearest < 0.5 < real.nearest < 40
        assert mean.frechet > 20 * real.frechet
        assert (mean.recall, real.recall > 0.8) == (0.0, True)
        assert real.accuracy is not None
        assert real.accuracy > 0.93
        assert real.retrieval is not None
        assert real.retrieval > 0.3


class TestGan:
    def test_an_image_depends_on_its_own_generator(self) -> None:
        torch.manual_seed(0)
        generator = Generator().eval()
        together = generator.draw([torch.Generator().manual_seed(seed) for seed in (0, 1)])
        alone = generator.draw([torch.Generator().manual_seed(1)])
        assert together.shape == (2, 3, 16, 16)
        torch.testing.assert_close(together[1:], alone)

    def test_it_learns_the_brightness_of_pictures(self, digits: data.Digits, tmp_path: Path) -> None:
        """After 80 steps the mean of its draws is nearer to the mean digit than before."""
        before, after = tmp_path / "before", tmp_path / "after"
        mean = data.levels(digits.training.pictures).mean(0) / 127.5 - 1
        errors = []
        for folder, steps in ((before, 0), (after, 80)):
            train_gan(digits.training.pictures, folder, steps)
            drawn = load_generator(folder).draw([torch.Generator().manual_seed(seed) for seed in range(64)])
            errors.append(float((drawn[:, 0].flatten(1).mean(0) - mean).square().mean()))
        assert errors[1] < 0.7 * errors[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, digits: data.Digits) -> Path:
    """Run a comparison of two systems with a few steps."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    compare(folder, ["GAN", "LDM-VQ"], scale=FEW, images=IMAGES)
    return folder


def test_it_makes_a_table(made: Path) -> None:
    rows = json.loads((made / "comparison.json").read_text())
    assert [row["name"] for row in rows] == [
        "mean image", "held-out digits", "training digits", "held-out, through the VQ-VAE", "GAN", "LDM-VQ"
    ]  # fmt: skip
    ldm = rows[-1]
    assert (ldm["images"], ldm["evaluations"]) == (IMAGES, systems.STEPS + 1)
    assert ldm["training"] > 0
    assert ldm["weights"] > 1e6
    text = (made / "comparison.md").read_text()
    assert [line.split("|")[1].strip() for line in text.splitlines()[2:]] == [row["name"] for row in rows]
    assert len({len(line) for line in text.splitlines()}) == 1


def test_it_is_resumed(made: Path, digits: data.Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained and drawn is kept: another system is added without a step of the shared VQ-VAE."""
    times = {path: path.stat().st_mtime_ns for path in (made / "draws").iterdir()}
    before = json.loads((made / "comparison.json").read_text())
    trained: list[str] = []
    original = Workshop.trained

    def watched(self: Workshop, part: str, train: Any) -> Path:
        def counted(out: Path, steps: int) -> None:
            trained.append(part)
            train(out, steps)

        return original(self, part, counted)

    monkeypatch.setattr(Workshop, "trained", watched)
    rows = compare(made, ["GAN", "LDM-VQ", "VQ + GPT"], scale=FEW, images=IMAGES)
    assert trained == ["gpt"]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    after = {row.cost.name: as_json(row) for row in rows}
    assert [after[row["name"]] for row in before] == before
    assert after["VQ + GPT"]["training"] > after["VQ + GPT"]["seconds"]


def test_a_stopped_training_is_resumed_and_its_time_counts(digits: data.Digits, tmp_path: Path) -> None:
    work = Workshop(tmp_path, digits, FEW)

    def stopped(out: Path, steps: int) -> None:
        sum(range(2_000_000))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work.trained("gan", stopped)
    first = work.seconds("gan")
    assert first > 0
    seen: list[int] = []
    work.trained("gan", lambda out, steps: seen.append(steps))
    assert seen == [max(2, round(STEPS["gan"] * FEW))]
    assert work.seconds("gan") > first
    work.trained("gan", lambda out, steps: seen.append(steps))
    assert len(seen) == 1
    (tmp_path / "gan.json").write_text("{}")
    one_sentence(lambda: work.seconds("gan"), SourceError, "gan.json' is damaged; delete it and the folder 'gan'")


def test_evaluations_are_counted_right(made: Path, digits: data.Digits) -> None:
    drawer = systems.ldm_vq(Workshop(made, digits, FEW))
    seen: list[int] = []
    for network in (drawer.networks[0], drawer.networks[1]):  # the U-Net and the decoder
        network.register_forward_hook(lambda module, inputs, output: seen.append(len(output[0])))
    drawer.draw(["a thick one"])
    assert len(seen) == drawer.evaluations


@pytest.mark.slow
def test_every_system_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    drawer = systems.dall_e

    def counted(work: Workshop, guidance: float) -> systems.Drawer:
        scales.append(guidance)
        return drawer(work, guidance)

    monkeypatch.setattr(systems, "dall_e", counted)
    rows = compare(tmp_path, scale=FEW, images=IMAGES)
    assert [row.cost.name for row in rows if row.cost.order >= 0] == list(SYSTEMS)
    asked = {row.cost.name: row.cost.asked for row in rows if row.cost.asked and row.cost.order >= 0}
    assert asked == {"ADM, guided": "class", "DALL-E": "text", "DALL-E 2": "text"}
    sweep = [cost.name for cost, _ in draws.every(tmp_path / SWEEP)]
    assert sweep == ["guidance 1", "guidance 1.5", "guidance 2", "guidance 4", "guidance 8"]
    assert scales == [1.0, 1.5, 4.0, 8.0]  # "DALL-E" itself has a scale of 2
    assert (tmp_path / SWEEP / "guidance-2.png").read_bytes() == (tmp_path / DRAWS / "dall-e.png").read_bytes()


def test_the_shipped_table_is_that_of_the_shipped_draws() -> None:
    stored = json.loads((SHIPPED / "comparison.json").read_text())
    found = [as_json(row) for row in measured(SHIPPED)]
    assert [row["name"] for row in stored] == [row["name"] for row in found]
    assert {row["name"] for row in stored} >= set(SYSTEMS)
    for old, new in zip(stored, found, strict=True):
        others = [{k: v for k, v in row.items() if not isinstance(v, float)} for row in (old, new)]
        assert others[1] == others[0]
        numbers = [{k: v for k, v in row.items() if isinstance(v, float)} for row in (old, new)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=0.007), old["name"]
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 2e6


def test_draws_are_lossless(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [data.enlarged(rng.integers(0, 256, (8, 8)).astype(float)) for _ in range(23)]
    cost = Cost(name="VQ + GPT", images=23, order=3, training=1.5)
    draws.save(tmp_path, cost, pictures)
    loaded = draws.load(tmp_path, "VQ + GPT")
    assert loaded is not None
    assert asdict(loaded[0]) == asdict(cost)
    assert all(np.array_equal(a, b) for a, b in zip(loaded[1], draws.grey(pictures), strict=True))
    (tmp_path / "vq-gpt.png").write_bytes(b"no picture")
    one_sentence(lambda: draws.load(tmp_path, "VQ + GPT"), SourceError, "are damaged; delete the file")


@pytest.mark.parametrize(
    ("key", "value"),
    [("images", 10**9), ("images", 0), ("order", None), ("captions_of", "x"), ("training", "1"), ("name", 5)],
)
def test_impossible_costs(tmp_path: Path, key: str, value: Any) -> None:
    content = asdict(Cost(name="GAN", images=1, order=0)) | {key: value}
    draws.save(tmp_path, Cost(name="GAN", images=1, order=0), [data.enlarged(np.zeros((8, 8)))])
    (tmp_path / "gan.json").write_text(json.dumps(content))
    one_sentence(lambda: draws.every(tmp_path), SourceError, "gan.json' are damaged; delete the file")


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_damaged_weights(tmp_path: Path, content: bytes | None) -> None:
    for name, load in (("generator", load_generator), ("classifier", load_judges)):
        if content is not None:
            (tmp_path / f"{name}.safetensors").write_bytes(content)
        one_sentence(lambda load=load: load(tmp_path), SourceError, name if content is not None else str(tmp_path))


def test_the_table_leaves_out_what_is_not_measured() -> None:
    stored = table(measured(SHIPPED)).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in stored[2:]}
    assert cells["mean image"][4:] == [""] * 6
    assert cells["DDPM"][4:6] == ["", ""]
    assert "" not in cells["DALL-E"]


@pytest.mark.parametrize(
    ("names", "options", "fragment"),
    [
        (["GPT-5"], {}, "system 'GPT-5' is not one of"),
        (["GAN"], {"scale": 0}, "scale must be"),
        (["GAN"], {"scale": float("nan")}, "scale must be"),
        (["GAN"], {"images": 7}, "images must be"),
        (["GAN"], {"images": 301}, "images must be"),
        (["GAN"], {"scale": 2 * FEW, "images": 2 * IMAGES}, "has drawn 12 images"),
        (["GAN"], {"scale": 3 * FEW, "images": IMAGES}, "this comparison asks for"),
        (["VQ + PixelCNN"], {"scale": 3 * FEW, "images": IMAGES}, "this comparison asks for"),
    ],
)
def test_bad_input(made: Path, names: Sequence[str], options: dict[str, Any], fragment: str) -> None:
    one_sentence(lambda: compare(made, names, **options), ArgumentError, fragment)


def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/inside"):
        one_sentence(
            lambda place=place: compare(tmp_path / place, ["GAN"]), SdkitError, "not a directory; give another"
        )
    (tmp_path / "other" / JUDGES).mkdir(parents=True)
    one_sentence(lambda: compare(tmp_path / "other", ["GAN"]), SourceError, "there are no judges in")
    assert not (tmp_path / "other" / "gan").exists()  # nothing was trained before
    one_sentence(lambda: measured(tmp_path), SourceError, "there are no judges in")


def test_the_command(made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--systems", "GAN", "--out", str(made), "--scale", str(FEW), "--images", str(IMAGES))
    threads = torch.get_num_threads()
    try:
        out = run(capsys, monkeypatch, *words)
    finally:
        torch.set_num_threads(threads)
    assert out.splitlines()[0] == "GAN ..."
    assert "| GAN " in out
    monkeypatch.setattr("sys.argv", ["compare", "--sistems", "GAN"])
    one_sentence(command.main, ArgumentError, "unrecognized arguments: --sistems GAN")
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    assert "A comparison that was stopped is resumed" in capsys.readouterr().out
