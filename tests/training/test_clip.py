"""Training a CLIP: its loss by NumPy, retrieval by brute force, learning with a control, and users' mistakes. Runs that
are killed, and two processes, are in test_runs.py.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

import sdkit
from sdkit.diffusion.contrastive import contrastive, equal_rows
from sdkit.errors import DataError, TrainingError
from sdkit.evaluation.extractors import open_extractor
from sdkit.evaluation.retrieval import retrieval
from sdkit.loading.transformers_folder import clip_config, new_clip
from sdkit.networks.clip import CLIP
from sdkit.training import ClipConfig, train_clip
from sdkit.training.learned_tokenizer import END, START, learn_tokenizer
from sdkit.training.prepared import make_optimizer
from sdkit.training.run_folder import read_metrics
from sdkit.training.settings import LoopSettings
from sdkit.training.stages.clip import CLIPStage
from tests.helpers import clip, tiny
from tests.helpers.sentences import one_sentence

COLOURS = ("red", "green", "blue", "yellow")


def numpy_loss(images: Tensor, texts: Tensor, scale: float, captions: list[int]) -> float:
    """Compute CLIP's loss in NumPy: the log of each pair's share among itself and the pairs of other captions."""
    x, y = (np.asarray(z, float) / np.linalg.norm(np.asarray(z, float), axis=1, keepdims=True) for z in (images, texts))
    terms = []
    for i, caption in enumerate(captions):
        others = [j for j, other in enumerate(captions) if other != caption]
        both = (scale * y[[i, *others]] @ x[i], scale * x[[i, *others]] @ y[i])
        terms += [-log_softmax(logits)[0] for logits in both]
    return float(np.mean(terms))


class TestTheLoss:
    @pytest.mark.parametrize("captions", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 0], [0, 0, 0, 0, 1]])
    def test_equals_numpy_s(self, captions: list[int]) -> None:
        images, texts = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        same = equal_rows(torch.tensor(captions)[:, None])
        assert same.tolist() == [[a == b for b in captions] for a in captions]
        found = contrastive(images, texts, 14.0, same)
        assert float(found) == pytest.approx(numpy_loss(images, texts, 14.0, captions), rel=1e-12)

    def test_of_a_guess_is_ln_n(self) -> None:
        assert float(contrastive(torch.ones(6, 3), torch.ones(6, 3), 100.0)) == pytest.approx(math.log(6))

    def test_has_the_gradient_of_its_differences(self) -> None:
        values = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        same = equal_rows(torch.tensor([[0], [1], [1], [2]]))
        images, texts, scale = (x.clone().requires_grad_() for x in (*values, torch.tensor(5.0).double()))
        assert torch.autograd.gradcheck(lambda *x: contrastive(*x, same), (images, texts, scale))


class TestRetrieval:
    def test_equals_a_search_one_by_one(self) -> None:
        images, texts = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        captions = list("aabcdefghijk")
        texts[1] = texts[0]
        found = retrieval(images, texts, captions)
        cos = torch.nn.functional.cosine_similarity(images[:, None], texts[None], dim=2)
        for k in (1, 5):
            to_text = [captions[i] in {captions[j] for j in distinct(cos[i], captions)[:k]} for i in range(12)]
            assert found[f"image_to_text_top{k}"] == np.mean(to_text)
            to_image = [
                captions[j] in {captions[i] for i in cos[:, j].argsort(descending=True)[:k].tolist()}
                for j in [0, *range(2, 12)]
            ]
            assert found[f"text_to_image_top{k}"] == np.mean(to_image)

    def test_of_a_collapsed_network_finds_nothing(self) -> None:
        found = retrieval(torch.ones(8, 3), torch.ones(8, 3), list("abcdefgh"))
        assert [found[f"{name}_top1"] for name in ("image_to_text", "text_to_image")] == [0, 0]
        assert found["image_to_text_top5"] == 0
        assert found["image_to_text_top1_chance"] == 1 / 8

    def test_chance_is_that_of_all_orders(self) -> None:
        captions = list("aaabbc")
        found = retrieval(torch.randn(6, 2), torch.randn(6, 2), captions)
        for k in (1, 5):
            orders = [*itertools.permutations(captions)]
            chance = np.mean([[text in order[:k] for order in orders] for text in "abc"])
            assert found[f"text_to_image_top{k}_chance"] == pytest.approx(chance)
        assert found["image_to_text_top1_chance"] == pytest.approx(1 / 3)
        assert found["image_to_text_top5_chance"] == 1

    def test_needs_pairs(self) -> None:
        one_sentence(lambda: retrieval(torch.ones(2, 3), torch.ones(2, 3), ["a"]), sdkit.ArgumentError, "are no pairs")


def distinct(scores: Tensor, captions: list[str]) -> list[int]:
    """Return the first index of each caption, in the order of the scores."""
    order = [captions.index(captions[j]) for j in scores.argsort(descending=True).tolist()]
    return [*dict.fromkeys(order)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a config, a CLIP with its tokenizer, and images of discs in four colours and two sizes."""
    folder = tmp_path_factory.mktemp("made")
    clip.save_config(folder / "clip.json")
    clip.save_clip(folder / "model")
    tiny.photos(folder / "photos", 24)
    return folder


def config(made: Path, out: Path, **changes: Any) -> ClipConfig:
    given = {"data": made / "photos", "init": made / "clip.json", "out_dir": out, "batch_size": 4, "max_steps": 3}
    given |= {"learning_rate": 1e-3, "ema_decay": 0.9, "validate_every": 100}
    return ClipConfig(**given | changes)


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


GOLDEN = [1.406771, 1.235135, 1.201488, 1.270402, 1.234994, 1.22525, 1.233896, 1.234174]


def test_golden_losses(made: Path, tmp_path: Path) -> None:
    """Losses of eight steps in float32, to 1e-3. A change in these numbers is a change in what is learned."""
    train_clip(config(made, tmp_path, max_steps=8, augment=("crop", "flip"), gradient_accumulation_steps=2))
    assert losses(tmp_path) == pytest.approx(GOLDEN, rel=1e-3)


def test_the_loss_of_a_step_is_numpy_s_over_each_micro_batch(made: Path, tmp_path: Path) -> None:
    """With accumulation, a step averages separate contrasts, and equal captions are no wrong answers."""
    settings = config(made, tmp_path / "run", max_steps=1, gradient_accumulation_steps=2)
    stage = CLIPStage(settings)
    expected = []
    for micro in (0, 1):
        numbers = range(4 * micro, 4 * micro + 4)
        batch = stage.batch([(n, item_of(settings.seed, n, stage.size)) for n in numbers])
        with torch.no_grad():
            images, texts, scale = stage.clip(batch["pixels"], batch["ids"])
        captions = [[*map(tuple, batch["ids"].tolist())].index(tuple(row)) for row in batch["ids"].tolist()]
        expected.append(numpy_loss(images, texts, float(scale), captions))
    train_clip(settings)
    assert losses(tmp_path / "run") == pytest.approx([np.mean(expected)], rel=1e-5)
    assert float(scale) == pytest.approx(1 / 0.07, rel=1e-3)  # as in the paper


def test_weights_decay_but_gains_and_biases_do_not(made: Path, tmp_path: Path) -> None:
    """Where gradients are zero, AdamW's step is its decay alone. Control: a player that decays everything."""
    player = CLIPStage(config(made, tmp_path)).players[0]
    network = player.network.network
    gains = {f"{name}.weight" for name, part in network.named_modules() if isinstance(part, torch.nn.LayerNorm)}
    spared = gains | {name for name, _ in network.named_parameters() if name.endswith(".bias")}
    spared |= {"logit_scale", "vision_model.embeddings.class_embedding"}  # in open_clip, too, vectors do not decay
    for decays_gains in (False, True):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        optimizer = make_optimizer(replace(player, decays_gains=decays_gains), LoopSettings(), torch.device("cpu"))
        for p in network.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in network.named_parameters():
            factor = 1 if name in spared and not decays_gains else 1 - player.learning_rate * 0.01
            torch.testing.assert_close(p, before[name] * factor, rtol=1e-6, atol=0, msg=name)


def test_attention_is_plain_under_autocast_on_a_cpu(made: Path, tmp_path: Path) -> None:
    """Fused attention trains slowly there. The exported config names neither."""
    for precision, wanted in (("no", "sdpa"), ("bf16", "eager")):
        stage = CLIPStage(config(made, tmp_path, mixed_precision=precision))
        towers = (stage.clip.network.text_model, stage.clip.network.vision_model)
        assert [tower.config._attn_implementation for tower in towers] == [wanted] * 2
    (tmp_path / "result").mkdir()
    stage.export(tmp_path / "result")
    assert "eager" not in (tmp_path / "result" / "config.json").read_text()


def item_of(seed: int, n: int, size: int) -> int:
    return int(np.random.default_rng((seed, n // size)).permutation(size)[n % size])


@pytest.fixture(scope="module")
def learned(made: Path) -> Path:
    """Train a CLIP from scratch on images of four colours."""
    settings = config(
        made, made / "learned", max_steps=120, batch_size=8, learning_rate=3e-3, validate_every=120, ema_decay=0.0,
        validation_data=tiny.photos(made / "others", 12),
    )  # fmt: skip
    return train_clip(settings)


def test_it_learns_which_caption_belongs_to_which_image(made: Path, learned: Path) -> None:
    """Control: the network before training, and chance."""
    before, after = (line for line in read_metrics(learned / "metrics.jsonl") if "validation/loss" in line)
    for name in ("image_to_text", "text_to_image"):
        assert after[f"validation/{name}_top1_chance"] == pytest.approx(0.25)
        assert before[f"validation/{name}_top1"] <= 0.5 < 0.9 < after[f"validation/{name}_top1"]
    assert after["validation/loss"] < before["validation/loss"] / 2


def test_the_result_is_a_clip_of_transformers(made: Path, learned: Path) -> None:
    result = learned / "result"
    network, tokenizer = CLIPModel.from_pretrained(result).eval(), CLIPTokenizer.from_pretrained(result)
    ours = CLIP.from_pretrained(result)
    captions = [f"a {colour} disc" for colour in COLOURS] + ["a cat!"]
    tokens = tokenizer(captions, padding="max_length", max_length=20, return_tensors="pt")
    assert torch.equal(tokens.input_ids, ours.tokenize(captions))
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(values)[:, None, None] for values in preprocessing(result))
    with torch.no_grad():
        theirs = network(pixel_values=(pixels / 2 + 0.5 - mean) / std, **tokens)
        images, texts, scale = ours(pixels, tokens.input_ids)
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    torch.testing.assert_close(scale * cosines, theirs.logits_per_image, atol=1e-4, rtol=1e-4)


def preprocessing(folder: Path) -> tuple[list[float], list[float]]:
    found = json.loads((folder / "preprocessor_config.json").read_text())
    assert (found["size"], found["crop_size"]) == ({"shortest_edge": 32}, {"height": 32, "width": 32})
    return found["image_mean"], found["image_std"]


def test_the_result_measures_the_clip_score(made: Path, learned: Path) -> None:
    """An image scores higher with its own caption than with those of other colours."""
    extractor = open_extractor(f"clip:{learned / 'result'}", device="cpu")
    images = extractor([Image.open(made / "others" / f"{i:03}.png") for i in range(4)])
    texts = extractor.embed_texts([f"a {colour} disc" for colour in COLOURS])
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(texts).T
    assert cosines.argmax(1).tolist() == [0, 1, 2, 3]


def test_a_clip_is_fine_tuned_and_its_temperature_clipped(made: Path, tmp_path: Path) -> None:
    """The factor of the logits never exceeds 100, though the loss would raise it. Gradient checkpointing changes
    nothing."""
    network = CLIPModel.from_pretrained(made / "model")
    network.logit_scale.data.fill_(math.log(99.9999))
    shutil.copytree(made / "model", tmp_path / "model")
    network.save_pretrained(tmp_path / "model")
    found = []
    for checkpointing in (False, True):
        out = tmp_path / f"run-{checkpointing}"
        given = {
            "init": None,
            "model": tmp_path / "model",
            "learning_rate": 1e-2,
            "gradient_checkpointing": checkpointing,
        }
        train_clip(config(made, out, **given))
        found.append(losses(out))
        scales = [line["logit_scale"] for line in read_metrics(out / "metrics.jsonl") if "logit_scale" in line]
        assert max(scales) <= 100.001
        assert CLIPModel.from_pretrained(out / "result").logit_scale.item() <= math.log(100.001)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_learned_tokenizer_spells_every_text(tmp_path: Path) -> None:
    words = learn_tokenizer(["a red disc", "a blue disc"] * 5, 530, 20)
    assert len(words) <= 530
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (0, 1, 1)
    for text in ("a red disc", "zebra \N{CAT FACE} \u4e2d\u6587"):
        assert words.decode(words(text).input_ids, skip_special_tokens=True).strip() == text
    one_sentence(lambda: learn_tokenizer(["a"], 513, 20), sdkit.ArgumentError, "too small: every byte needs two")


def test_embeddings_that_are_not_finite_find_nothing() -> None:
    embeddings = torch.full((6, 4), torch.nan)
    found = retrieval(embeddings, embeddings, [str(i) for i in range(6)])
    assert [found[f"{name}_top1"] for name in ("image_to_text", "text_to_image")] == [0, 0]


def test_a_clip_is_loaded_as_other_networks_are(tmp_path: Path) -> None:
    folder = clip.save_clip(tmp_path / "clip")
    half = CLIP.from_pretrained(folder, dtype="bf16", device="cpu")
    assert (half.dtype, half.device, half.name) == (torch.bfloat16, torch.device("cpu"), str(folder))
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert CLIP.from_pretrained(folder, device="cpu").dtype == torch.float32
    for options, sentence in (
        ({"revision": "main"}, "revision= has no meaning for a folder"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "abacus"}, "device"),
    ):
        one_sentence(lambda: CLIP.from_pretrained(folder, **options), sdkit.ArgumentError, sentence)  # noqa: B023


def test_a_damaged_clip_takes_no_memory(tmp_path: Path) -> None:
    folder = clip.save_clip(tmp_path / "clip")
    path = folder / "config.json"
    written = json.loads(path.read_text())
    for part, change, sentence in (
        ("text_config", {"num_hidden_layers": 10**9}, "has num_hidden_layers 1000000000, not a whole number"),
        ("vision_config", {"image_size": -1}, "has image_size -1, not a whole number from 1"),
        ("text_config", {"vocab_size": 10**6}, "parameters, more than the weights beside it"),
        ("vision_config", {"image_size": 10**6, "patch_size": 1}, "parameters, more than the weights beside it"),
    ):
        path.write_text(json.dumps(written | {part: written[part] | change}))
        one_sentence(lambda: CLIP.from_pretrained(folder), sdkit.SourceError, sentence)


def test_a_tokenizer_whose_end_token_transformers_would_overlook(made: Path) -> None:
    words = learn_tokenizer(["a red disc", "a blue disc"] * 5, 530, 20)
    vocabulary = words.get_vocab()
    swapped = {START: 0, END: 2} | {word: 1 if n == 2 else n for word, n in vocabulary.items() if n > 1}
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    other = CLIPTokenizer(swapped, [tuple(one) for one in merges])
    assert other.eos_token_id == 2
    sizes = clip_config(made / "clip.json")
    one_sentence(lambda: new_clip(sizes, other), sdkit.SourceError, "end token of this tokenizer has id 2")
    new_clip(sizes, words)


# Users' mistakes

SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"size": 64}, "size has no meaning for a CLIP, whose config names the size of its images"),
    ({"evaluate": ("lpips",)}, "evaluate measures pictures, and a CLIP makes none; leave it out"),
    ({"tokenizer": "emoji"}, "tokenizer belongs to a CLIP trained from scratch; give init, or leave it out"),
    ({"init": "clip.json", "tokenizer": 3}, "tokenizer must be a path or a name, not 3"),
    ({"validation_data": 3}, "validation_data must be a path or a name, not 3"),
    ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
]


@pytest.mark.parametrize(("change", "fragment"), SETTINGS)
def test_settings(change: dict[str, Any], fragment: str) -> None:
    one_sentence(lambda: ClipConfig(data="photos", out_dir="run", **change), sdkit.ArgumentError, fragment)


def edited(made: Path, path: Path, **changes: Any) -> Path:
    """Write the config of the CLIP with changes of itself, or of its text_config."""
    content = json.loads((made / "clip.json").read_text())
    for key, value in changes.items():
        (content if key in content or key == "architecture" else content["text_config"])[key] = value
    path.write_text(json.dumps(content))
    return path


def test_the_embedded_clip_is_fine_tuned(made: Path, tmp_path: Path) -> None:
    run = train_clip(config(made, tmp_path / "run", init=None, model="emoji", max_steps=1))
    before, after = (CLIP.from_pretrained(source, device="cpu") for source in ("emoji", run / "result"))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert (after.side, after.words.length) == (before.side, before.words.length) == (64, 32)
    assert sum(moved) > len(moved) / 2


def test_mistakes_in_data_and_model(made: Path, tmp_path: Path) -> None:
    """Each is one sentence, and leaves no run folder."""
    silent, uniform = tmp_path / "silent", tmp_path / "uniform"
    for folder, caption in ((silent, ""), (uniform, "a disc")):
        for path in tiny.photos(folder, 3).glob("*.txt"):
            path.write_text(caption)
    argument, source = sdkit.ArgumentError, sdkit.SourceError
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"batch_size": 1}, argument, "batch_size 1 leaves an image nothing to be contrasted with"),
        ({"data": silent}, DataError, "0 of the 3 images in"),
        ({"data": uniform}, DataError, "have one caption, from which a CLIP learns nothing"),
        ({"init": made}, source, "there is no config at"),
        ({"init": made / "photos" / "000.txt"}, source, "000.txt"),
        ({"init": edited(made, tmp_path / "1.json", model_type="bert")}, source, "of type bert, not of a CLIP"),
        ({"init": edited(made, tmp_path / "2.json", vision_config=None)}, source, "has no vision_config"),
        ({"init": edited(made, tmp_path / "3.json", hidden_size=0)}, source, "has hidden_size 0, not a whole number"),
        ({"init": edited(made, tmp_path / "4.json", vocab_size=100)}, argument, "too small: every byte needs two"),
        ({"init": edited(made, tmp_path / "5.json", num_attention_heads=3)}, source, "the config of this CLIP"),
        ({"init": edited(made, tmp_path / "6.json", hidden_size=999998)}, source, "parameters, sdkit builds at most"),
        ({"tokenizer": made / "model"}, source, "the tokenizer has 2048 tokens, this CLIP a vocabulary of 530"),
        ({"init": None, "model": made / "photos"}, source, "config.json"),
    ]  # fmt: skip
    for number, (change, error, fragment) in enumerate(cases):
        out = tmp_path / f"run-{number}"
        one_sentence(lambda change=change, out=out: train_clip(config(made, out, **change)), error, fragment)
        assert not out.exists()


def test_a_latent_cache_is_refused(made: Path, tmp_path: Path) -> None:
    from sdkit.data import cache

    cache("emoji", made / "photos", tmp_path / "cache", size=32, device="cpu")
    one_sentence(
        lambda: train_clip(config(made, tmp_path / "run", data=tmp_path / "cache")), DataError, "is a latent cache"
    )


def test_images_without_captions_are_left_out_and_long_captions_cut(made: Path, tmp_path: Path) -> None:
    photos = tiny.photos(tmp_path / "photos", 24)
    (photos / "003.txt").unlink()
    (photos / "004.txt").write_text("a disc " * 30)
    with pytest.warns(UserWarning, match=r"1 of the 24 images in .* have no caption, and are left out"):
        stage = CLIPStage(config(made, tmp_path / "run", data=photos))
    with pytest.warns(UserWarning, match=r"has 60 tokens, and this CLIP reads 18; the rest is cut") as warned:
        stage.batch([(n, n) for n in range(stage.size)] * 2)
    assert len(warned) == 1
    assert 3 not in {*stage.train.tolist(), *stage.held_out}
    assert stage.size == 22


def test_a_run_is_not_resumed_with_another_contrast(made: Path, tmp_path: Path) -> None:
    train_clip(config(made, tmp_path / "run", max_steps=1, gradient_accumulation_steps=2))
    one_sentence(
        lambda: train_clip(config(made, tmp_path / "run", max_steps=2, batch_size=8)), TrainingError,
        "its contrast was over '4' pairs, this is over '8' (batch_size x processes, whose product must stay)",
    )  # fmt: skip
