"""Priors over codes: their likelihood by brute force, what a position sees, and saved files."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdkit
from sdkit.networks.code_prior import CodePrior, load_prior, log_likelihood, new_prior, save_prior
from sdkit.networks.code_transformer import CodeTransformer, window_start
from sdkit.networks.pixelcnn import GatedPixelCNN
from sdkit.networks.prior_shape import PriorShape
from tests.helpers.sentences import one_sentence

CONDITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "class": {"condition": "class", "tokens": 3, "classes": ("a", "b", "c")},
    "map": {"condition": "map", "condition_shape": (2, 2), "tokens": 4},
    "coarse map": {"condition": "map", "condition_shape": (1, 1), "tokens": 4},
    "text": {"condition": "text", "condition_shape": (5,), "tokens": 7},
}
CASES = [
    (kind, name) for kind in ("transformer", "pixelcnn") for name in CONDITIONS if (kind, name) != ("pixelcnn", "text")
]


def prior(kind: str, name: str = "none", **changes: Any) -> CodePrior:
    """Make a prior of 2 x 2 images of 3 codes, whose weights are large enough to make its probabilities uneven."""
    sizes: dict[str, Any] = {"codes": 3, "grid": (2, 2), "layers": 2, "width": 8, "heads": 2}
    torch.manual_seed(0)
    made = new_prior(PriorShape(kind=kind, **sizes | CONDITIONS[name] | changes)).eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return made


def condition_of(made: CodePrior, count: int) -> Tensor | None:
    shape = made.shape
    if shape.condition is None:
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.tokens + 1, (1, *shape.condition_shape), generator=generator).expand(
        count, *shape.condition_shape
    )


def every_image(codes: int = 3, height: int = 2, width: int = 2) -> Tensor:
    return torch.tensor([*itertools.product(range(codes), repeat=height * width)]).reshape(-1, height, width)


@pytest.mark.parametrize(("kind", "name"), CASES)
class TestLikelihood:
    def test_probabilities_of_all_images_sum_to_1(self, kind: str, name: str) -> None:
        """All 81 images of 2 x 2 codes, to 1e-5; and they are not equally likely."""
        made, images = prior(kind, name), every_image()
        with torch.no_grad():
            p = log_likelihood(made, images, condition_of(made, len(images))).double().exp()
        assert float(p.sum()) == pytest.approx(1, abs=1e-5)
        assert float(p.max()) > 3 * float(p.min())

    def test_is_the_product_of_what_is_drawn_from(self, kind: str, name: str) -> None:
        """Steps see nothing but the codes before a position, since those after it are overwritten here."""
        made, images = prior(kind, name), every_image()
        condition = condition_of(made, len(images))
        expected = log_likelihood(made, images, condition)
        for cached in (True, False):
            step, total = made.stepper(condition, (2, 2), cached=cached), torch.zeros(len(images))
            for i, j in itertools.product(range(2), repeat=2):
                seen = images.clone()
                seen.flatten(1)[:, 2 * i + j :] = 0
                total += torch.log_softmax(step(seen, i, j), dim=1).gather(1, images[:, i, j, None])[:, 0]
            torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-5)

    def test_the_condition_matters(self, kind: str, name: str) -> None:
        made, images = prior(kind, name), every_image()[:5]
        if made.shape.condition is None:
            return
        given = condition_of(made, 5)
        assert given is not None
        with torch.no_grad():
            own, other = (log_likelihood(made, images, one) for one in (given, (given + 1) % (made.shape.tokens + 1)))
        assert float((own - other).abs().min()) > 1e-3


WIDE: dict[str, Any] = {"codes": 5, "grid": (5, 6), "layers": 4}


@pytest.mark.parametrize("kind", ["transformer", "pixelcnn"])
class TestCausality:
    def test_by_perturbation(self, kind: str) -> None:
        """A changed code changes all later logits, and none before it or at it: there is no blind spot."""
        made = prior(kind, **WIDE)
        codes = torch.randint(5, (1, 5, 6), generator=torch.Generator().manual_seed(0))
        before = made(codes).flatten(1, 2)[0].detach()
        for k in range(30):
            changed = codes.clone()
            changed.flatten()[k] = (changed.flatten()[k] + 1) % 5
            moved = (made(changed).flatten(1, 2)[0].detach() - before).abs().amax(1)
            assert float(moved[: k + 1].max()) == 0
            assert k == 29 or float(moved[k + 1 :].min()) > 0, k

    def test_by_autograd(self, kind: str) -> None:
        """The gradient of the logits at k reaches the embeddings of exactly the codes before k."""
        made = prior(kind, **WIDE)
        embedding = made.embedding if isinstance(made, GatedPixelCNN) else made.network.get_input_embeddings()
        held: list[Tensor] = []
        embedding.register_forward_hook(lambda *call: held.append(call[-1]) or call[-1].retain_grad())
        codes = torch.randint(5, (1, 5, 6), generator=torch.Generator().manual_seed(0))
        for k in range(30):
            held.clear()
            # A random projection: the sum over the codes could be constant.
            (made(codes).flatten(1, 2)[0, k] @ torch.arange(1.0, 6.0).square()).backward()
            reached = held[0].grad.flatten(1, -2)[0].abs().amax(1)  # type: ignore[union-attr]
            reached = reached[1:] if kind == "transformer" else reached  # the token that starts
            assert (reached > 0).nonzero().flatten().tolist() == [*range(k)]


def masked(k: int, x: Tensor, weight: Tensor, bias: Tensor, rows: slice, columns: slice) -> Tensor:
    """Convolve with a full kernel k x k, whose weights are `weight` in some rows and columns, and elsewhere 0."""
    kernel = torch.zeros(*weight.shape[:2], k, k)
    kernel[:, :, rows, columns] = weight
    return F.conv2d(x, kernel, bias, padding=k // 2)


def test_pixelcnn_is_that_of_masked_convolutions() -> None:
    """Figure 2 of the paper with kernels k x k and masks, in place of smaller kernels and shifts."""
    made = prior("pixelcnn", "class", **WIDE, width=4)
    assert isinstance(made, GatedPixelCNN)
    codes = torch.randint(5, (2, 5, 6), generator=torch.Generator().manual_seed(0))
    h = made.condition.embedding.weight[torch.tensor([2, 0])][:, :, None, None]  # type: ignore[union-attr]
    v = x = F.one_hot(codes, 5).float().matmul(made.embedding.weight).movedim(-1, 1)

    def gate(both: Tensor) -> Tensor:
        return torch.tanh(both[:, :4]) * torch.sigmoid(both[:, 4:])

    for number, layer in enumerate(made.layers):
        r = 3 if number == 0 else 1
        tall = masked(2 * r + 1, v, layer.vertical.weight, layer.vertical.bias, slice(0, r + 1), slice(None))
        # The row above, by a masked kernel that copies it.
        copy = torch.zeros(8, 8, 3, 3)
        copy[range(8), range(8), 0, 1] = 1
        above = F.conv2d(tall, copy, padding=1)
        own = masked(
            2 * r + 1, x, layer.horizontal.weight, layer.horizontal.bias, slice(r, r + 1), slice(0, r + (number > 0))
        ) + layer.link(above) + layer.condition(h)  # fmt: skip
        x = layer.out(gate(own)) + (x if number else 0)
        if layer.vertical_condition is not None:
            v = gate(tall + layer.vertical_condition(h))
    expected = made.head(x).movedim(1, -1)
    torch.testing.assert_close(made(codes, torch.tensor([2, 0])), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_parameter_is_trained(kind: str, name: str) -> None:
    """Processes wait for the gradient of each parameter; one that nothing reads would hold them up."""
    made = prior(kind, name)
    log_likelihood(made, every_image(), condition_of(made, 81)).sum().backward()  # type: ignore[no-untyped-call]
    assert [n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)] == []


def test_gpt_is_transformers_own() -> None:
    """The logits after each prefix of the tokens, from the network itself."""
    made = prior("transformer", "text")
    assert isinstance(made, CodeTransformer)
    text, codes = torch.tensor([[6, 0, 2, 2, 1]]), torch.tensor([[[1, 2], [0, 1]]])
    found = made(codes, text).flatten(1, 2)[0]
    for n in range(4):
        ids = torch.tensor([[9, 3, 5, 5, 4, 1, 2, 0][: 5 + n]])
        torch.testing.assert_close(found[n], made.network(ids).logits[0, -1, :3], atol=1e-5, rtol=1e-5)


def test_windows_are_centred_within_the_image() -> None:
    assert [window_start(i, 4, 7) for i in range(7)] == [0, 0, 0, 1, 2, 3, 3]
    assert [window_start(i, 4, 4) for i in range(4)] == [0] * 4


@pytest.mark.parametrize("name", ["none", "map"])
def test_sliding_windows(name: str) -> None:
    """Each logit of a larger image is that of a whole window of it, cut out by hand."""
    made = prior("transformer", name, codes=4, tokens=4 if name == "map" else 0)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (2, 3, 4), generator=generator)
    condition = torch.randint(4, (2, 3, 4), generator=generator) if name == "map" else None
    step = made.stepper(condition, (3, 4))
    for i, j in itertools.product(range(3), range(4)):
        top, left = [0, 0, 1][i], [0, 0, 1, 2][j]
        window = codes[:, top : top + 2, left : left + 2]
        seen = None if condition is None else condition[:, top : top + 2, left : left + 2]
        torch.testing.assert_close(step(codes, i, j), made(window, seen)[:, i - top, j - left], atol=1e-5, rtol=1e-5)


def test_a_transformer_of_a_larger_image_starts_like_one_of_its_own() -> None:
    made = prior("transformer", **WIDE)
    codes = torch.randint(5, (1, 7, 6), generator=torch.Generator().manual_seed(0))
    own, larger = made.stepper(None, (5, 6)), made.stepper(None, (7, 6))
    torch.testing.assert_close(own(codes[:, :5], 1, 2), larger(codes, 1, 2), atol=1e-5, rtol=1e-5)


# Files


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_saved_and_loaded(kind: str, name: str, tmp_path: Path) -> None:
    made = prior(kind, name)
    save_prior(made, tmp_path / "prior")
    loaded = load_prior(tmp_path / "prior")
    assert (loaded.shape, loaded.training, type(loaded)) == (made.shape, False, type(made))
    assert {path.name for path in (tmp_path / "prior").iterdir()} == {"config.json", "model.safetensors"}
    images = every_image()[::9]
    condition = condition_of(made, len(images))
    assert torch.equal(loaded(images, condition), made(images, condition))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "class": ({"_class_name": "GPT2LMHeadModel"}, "is the config of GPT2LMHeadModel, not of a CodePrior"),
    "kind": ({"kind": "rnn"}, "has kind 'rnn', which cannot be"),
    "codes": ({"codes": "3"}, "has a 'codes' of another type"),
    "no codes": ({"codes": 0}, "has codes 0, which cannot be"),
    "grid": ({"grid": [2]}, "has grid [2], which cannot be"),
    "huge": ({"grid": [10**6, 10**6]}, "has grid [1000000, 1000000], which cannot be"),
    "condition": ({"condition": "sound"}, "has condition 'sound', which cannot be"),
    "classes": ({"classes": ["a"]}, "has classes ['a'], which cannot be"),
    "heads": ({"heads": 3}, "has heads 3, which cannot be"),
    "layers": ({"layers": 10**5}, "has layers 100000, which cannot be"),
    "memory": ({"width": 10**6, "layers": 1}, "do not fit its config, such as"),
    "text": ({"condition": "text", "condition_shape": [1], "classes": []}, "has condition_shape [1], which cannot be"),
    "fit": ({"width": 16}, "do not fit its config, such as"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_config_is_one_sentence(case: str, tmp_path: Path) -> None:
    change, sentence = BAD[case]
    save_prior(prior("transformer", "class"), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    one_sentence(lambda: load_prior(tmp_path), sdkit.SourceError, sentence)


def test_a_likelihood_without_its_condition_is_one_sentence() -> None:
    codes = every_image()
    made = prior("transformer", "class")
    one_sentence(lambda: log_likelihood(made, codes), sdkit.ArgumentError, "takes a condition of kind class; give one")
    given = torch.zeros(len(codes), dtype=torch.int64)
    for one in (prior("transformer"), prior("pixelcnn")):
        one_sentence(lambda one=one: log_likelihood(one, codes, given), sdkit.ArgumentError, "takes no condition")


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    save_prior(prior("pixelcnn"), tmp_path / "prior")
    one_sentence(lambda: load_prior(tmp_path), sdkit.SourceError, "config.json")
    for damage in ("missing", "cut", "other", "infinite"):
        folder = tmp_path / damage
        shutil.copytree(tmp_path / "prior", folder)
        weights = folder / "model.safetensors"
        if damage == "missing":
            weights.unlink()
        elif damage == "cut":
            weights.write_bytes(weights.read_bytes()[:100])
        elif damage == "other":
            save_file({**load_file(weights), "more": torch.zeros(1)}, weights)
        else:
            save_file({name: tensor * torch.inf for name, tensor in load_file(weights).items()}, weights)
        one_sentence(lambda folder=folder: load_prior(folder), sdkit.SourceError)
