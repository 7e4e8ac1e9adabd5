"""Updates of LoRA files: LoCon, LoHa, LoKr, and DoRA, against the papers' formulas in NumPy and against peft."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdkit
from sdkit.errors import SourceError
from sdkit.loading.lora_file import convert_lora, read_lora
from sdkit.networks.lora import lora_layers, merge_lora
from tests.helpers import tiny
from tests.helpers.networks import sd_shaped

Array = np.ndarray[Any, np.dtype[np.float64]]
Arrays = dict[str, Array]
OUT, IN, K, R = 8, 6, 3, 2


def network() -> nn.Module:
    """A network with a linear layer and a convolution, named as in a U-Net."""
    torch.manual_seed(0)
    net, block = nn.Module(), nn.Module()
    block.linear, block.conv = nn.Linear(IN, OUT), nn.Conv2d(IN, OUT, K)
    net.mid_block = block
    return net


def draw(*shapes: tuple[int, ...]) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.normal(size=shape) for shape in shapes]


# Each returns the tensors of a layer by kohya's names, and the product by the paper's formula, in the weight's shape.


def locon() -> tuple[Arrays, Array]:
    down, up = draw((R, IN, K, K), (OUT, R, 1, 1))
    return {"lora_down.weight": down, "lora_up.weight": up}, np.einsum("or,riyx->oiyx", up[:, :, 0, 0], down)


def locon_with_core() -> tuple[Arrays, Array]:
    down, up, mid = draw((R, IN, 1, 1), (OUT, R, 1, 1), (R, R, K, K))
    dW = np.zeros((OUT, IN, K, K))
    for n in range(R):  # three convolutions in a row: IN -> R by 1 x 1, R -> R by 3 x 3, R -> OUT by 1 x 1
        for m in range(R):
            dW += up[:, n, 0, 0, None, None, None] * mid[n, m] * down[m, :, 0, 0, None, None]
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}, dW


def loha() -> tuple[Arrays, Array]:
    a1, b1, a2, b2 = draw((OUT, R), (R, IN), (OUT, R), (R, IN))
    return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, (a1 @ b1) * (a2 @ b2)


def loha_of_a_convolution() -> tuple[Arrays, Array]:
    a1, b1, a2, b2 = draw((OUT, R), (R, IN * K * K), (OUT, R), (R, IN * K * K))
    dW = ((a1 @ b1) * (a2 @ b2)).reshape(OUT, IN, K, K)
    return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, dW


def loha_with_cores() -> tuple[Arrays, Array]:
    a1, b1, a2, b2, t1, t2 = draw((R, OUT), (R, IN), (R, OUT), (R, IN), (R, R, K, K), (R, R, K, K))
    first, second = (np.einsum("rsyx,ro,si->oiyx", t, a, b) for t, a, b in ((t1, a1, b1), (t2, a2, b2)))
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "hada_t1": t1, "hada_t2": t2}
    return tensors, first * second


def kronecker(w1: Array, w2: Array) -> Array:
    """Return W1 (x) W2 element by element. The kernel's axes are W2's."""
    (a, c), (b, d, *kernel) = w1.shape, w2.shape
    dW = np.zeros((a * b, c * d, *kernel))
    for i in range(a * b):
        for j in range(c * d):
            dW[i, j] = w1[i // b, j // d] * w2[i % b, j % d]
    return dW


def lokr_of_whole_matrices() -> tuple[Arrays, Array]:
    w1, w2 = draw((2, 3), (4, 2))
    return {"lokr_w1": w1, "lokr_w2": w2}, kronecker(w1, w2)


def lokr() -> tuple[Arrays, Array]:
    a1, b1, a2, b2 = draw((2, R), (R, 3), (4, R), (R, 2))
    return {"lokr_w1_a": a1, "lokr_w1_b": b1, "lokr_w2_a": a2, "lokr_w2_b": b2}, kronecker(a1 @ b1, a2 @ b2)


def lokr_of_a_convolution() -> tuple[Arrays, Array]:
    w1, a2, b2 = draw((2, 3), (4, R), (R, 2 * K * K))
    return {"lokr_w1": w1, "lokr_w2_a": a2, "lokr_w2_b": b2}, kronecker(w1, (a2 @ b2).reshape(4, 2, K, K))


def lokr_with_a_core() -> tuple[Arrays, Array]:
    w1, a2, b2, t2 = draw((2, 3), (R, 4), (R, 2), (R, R, K, K))
    tensors = {"lokr_w1": w1, "lokr_w2_a": a2, "lokr_w2_b": b2, "lokr_t2": t2}
    return tensors, kronecker(w1, np.einsum("rsyx,ro,si->oiyx", t2, a2, b2))


KINDS = {
    locon: "LoCon",
    locon_with_core: "LoCon",
    loha: "LoHa",
    loha_of_a_convolution: "LoHa",
    loha_with_cores: "LoHa",
    lokr_of_whole_matrices: "LoKr",
    lokr: "LoKr",
    lokr_of_a_convolution: "LoKr",
    lokr_with_a_core: "LoKr",
}


def file_of(tensors: Arrays, folder: Path, layer: str, alpha: float | None) -> Path:
    named = {f"lora_unet_mid_block_{layer}.{key}": torch.from_numpy(x).float() for key, x in tensors.items()}
    if alpha is not None:
        named[f"lora_unet_mid_block_{layer}.alpha"] = torch.tensor(alpha)
    save_file({key: x.contiguous() for key, x in named.items()}, folder / "one.safetensors")
    return folder / "one.safetensors"


@pytest.mark.parametrize("axis", [None, 0, 1], ids=["plain", "DoRA by outputs", "DoRA by inputs"])
@pytest.mark.parametrize("made", KINDS, ids=lambda made: made.__name__)
def test_kinds_are_the_formulas_of_their_papers(
    made: Callable[[], tuple[Arrays, Array]], axis: int | None, tmp_path: Path
) -> None:
    """W + s (alpha / r) dW; with DoRA, W + s (m W' / ||W'|| - W) with W' = W + alpha / r dW (equation 5). Converted to
    kohya's layout, a file does the same.
    """
    tensors, product = made()
    layer = "conv" if product.ndim == 4 else "linear"
    whole = made is lokr_of_whole_matrices  # without a rank there is no alpha / r
    net = network()
    before = getattr(net.mid_block, layer).weight.detach().double().numpy().copy()
    after = before + product * (1 if whole else 3 / R)
    if axis is not None:
        others = tuple(i for i in range(after.ndim) if i != axis)
        magnitude = np.random.default_rng(2).uniform(
            0.5, 2, size=[n if i == axis else 1 for i, n in enumerate(after.shape)]
        )
        after = magnitude * after / np.sqrt((after**2).sum(axis=others, keepdims=True))
        tensors = tensors | {"dora_scale": magnitude}
    expected = before + 0.7 * (after - before)
    file = file_of(tensors, tmp_path, layer, None if whole else 3.0)
    convert_lora(file, tmp_path / "converted.safetensors")
    for path in (file, tmp_path / "converted.safetensors"):
        net = network()
        lora = read_lora(path)
        assert {update.kind.removesuffix(" with DoRA") for update in lora.updates} == {KINDS[made]}
        merge_lora(lora, net, nn.Module(), 0.7)
        found = getattr(net.mid_block, layer).weight.detach().double().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(found - before).max() > 0.1


@pytest.mark.parametrize("made", KINDS, ids=lambda made: made.__name__)
def test_tensors_that_do_not_fit_are_reported(made: Callable[[], tuple[Arrays, Array]], tmp_path: Path) -> None:
    """Each tensor in turn is left out, is empty, or has another size in its first axis."""
    tensors, product = made()
    layer = "conv" if product.ndim == 4 else "linear"
    for key, tensor in tensors.items():
        changes = [{k: x for k, x in tensors.items() if k != key}, tensors | {key: tensor[:0]}]
        changes.append(tensors | {key: np.concatenate([tensor, tensor, tensor])})
        for changed in changes:
            with pytest.raises(SourceError, match=r"is damaged: the tensors of \w+ do not fit|for another model"):
                merge_lora(read_lora(file_of(changed, tmp_path, layer, 1.0)), network(), nn.Module(), 1.0)
    for magnitude in (np.ones(OUT), np.ones((3, 3)), np.ones((OUT + 1, 1)), np.ones((0, 1))):
        file = file_of(tensors | {"dora_scale": magnitude}, tmp_path, layer, 1.0)
        with pytest.raises(SourceError, match=r"do not fit|for another model"):
            merge_lora(read_lora(file), network(), nn.Module(), 1.0)


def test_two_kinds_in_one_layer_are_damage(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is damaged: the tensors of mid_block_linear do not fit; download it again"):
        read_lora(file_of(loha()[0] | lokr()[0], tmp_path, "linear", 1.0))


@pytest.fixture(scope="module")
def unet(sd: sdkit.StableDiffusion) -> nn.Module:
    network: nn.Module = sd_shaped(sd.text)[0].unet.network
    return network


class TestPeft:
    """Files of peft's `save_pretrained`, on a small U-Net, against peft's own merged weights."""

    @pytest.fixture
    def merged(self, unet: nn.Module, tmp_path: Path) -> Callable[[Any], dict[str, Tensor]]:
        def merged(config: Any) -> dict[str, Tensor]:
            from peft import get_peft_model

            torch.manual_seed(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft asks transformers for a deprecated name
                live: Any = get_peft_model(copy.deepcopy(unet), config)
            for name, parameter in live.named_parameters():
                if parameter.requires_grad:
                    nn.init.normal_(parameter, *((1.0, 0.1) if "magnitude" in name else (0.0, 0.3)))
            live.save_pretrained(tmp_path, save_embedding_layers=False)
            return dict(live.merge_and_unload().state_dict())

        return merged

    def check(self, unet: nn.Module, folder: Path, expected: dict[str, Tensor]) -> None:
        net = copy.deepcopy(unet)
        merge_lora(read_lora(folder), net, nn.Module(), 1.0)
        before, found = unet.state_dict(), net.state_dict()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, atol=1e-5, rtol=0)
        assert sum(float((found[key] - before[key]).abs().max()) > 1e-3 for key in before) >= 5

    TARGETS = ("to_q", "ff.net.2", "conv1", "conv_shortcut", "proj_in", "conv_in")

    def test_dora(self, unet: nn.Module, merged: Any, tmp_path: Path) -> None:
        from peft import LoraConfig

        expected = merged(LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=[*self.TARGETS]))
        self.check(unet, tmp_path, expected)
        assert {update.kind for update in read_lora(tmp_path).updates} == {"LoRA with DoRA", "LoCon with DoRA"}

    @pytest.mark.parametrize("core", [False, True])
    def test_loha(self, unet: nn.Module, merged: Any, tmp_path: Path, core: bool) -> None:
        from peft import LoHaConfig

        config = LoHaConfig(
            r=3, alpha=12, target_modules=[*self.TARGETS], use_effective_conv2d=core, alpha_pattern={"conv_in": 5},
            rank_pattern={"to_q": 2},
        )  # fmt: skip
        self.check(unet, tmp_path, merged(config))

    @pytest.mark.parametrize("options", [{"use_effective_conv2d": True}, {"decompose_both": True}, {"r": 64}], ids=str)
    def test_lokr(self, unet: nn.Module, merged: Any, tmp_path: Path, options: dict[str, Any]) -> None:
        """At rank 64 most matrices are whole; peft divides alpha by the rank in its config all the same."""
        from peft import LoKrConfig

        config = {"r": 2, "alpha": 12, "target_modules": [*self.TARGETS], "alpha_pattern": {"conv_in": 5}}
        self.check(unet, tmp_path, merged(LoKrConfig(**{**config, **options}, rank_pattern={"conv_shortcut": 32})))

    def test_configs_that_cannot_be_used(self, merged: Any, tmp_path: Path) -> None:
        from peft import LoKrConfig

        merged(LoKrConfig(r=64, alpha=12, target_modules=["to_q"]))
        file = tmp_path / "adapter_config.json"
        config = json.loads(file.read_text())
        for change, problem in (
            ({"alpha": "x"}, "has an alpha that is no number"),
            ({"r": 0}, "has a rank below 1"),
            ({"rank_pattern": {"to_q": 0}}, "has a rank below 1"),
            ({"rank_pattern": 3}, "has a rank_pattern of another type or size"),
        ):
            file.write_text(json.dumps(config | change))
            with pytest.raises(SourceError, match=rf"adapter_config\.json' {problem}; download it again\.$"):
                read_lora(tmp_path)


def test_converted_lokr_of_whole_matrices_keeps_its_factor(sd: sdkit.StableDiffusion, tmp_path: Path) -> None:
    """kohya's layout has no alpha for it, so that the factor goes into W1."""
    w1, w2 = (torch.from_numpy(x).float() for x in lokr_of_whole_matrices()[0].values())
    prefix = "base_model.model.mid_block.linear."
    save_file({f"{prefix}lokr_w1": w1, f"{prefix}lokr_w2": w2}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 4, "alpha": 3}))
    convert_lora(tmp_path, tmp_path / "kohya.safetensors")
    torch.testing.assert_close(
        load_file(tmp_path / "kohya.safetensors")["lora_unet_mid_block_linear.lokr_w1"], w1 * 0.75
    )


def test_choice_of_layers(sd: sdkit.StableDiffusion) -> None:
    unet, text = sd.unet.network, sd.text.network
    convolutions = {name for name, x in unet.named_modules() if isinstance(x, nn.Conv2d)}
    assert lora_layers(unet, ["convolutions"]).keys() == convolutions
    assert [*lora_layers(unet, ["conv_in"])] == ["conv_in"]
    assert all(name.endswith(".attn2.to_k") for name in lora_layers(unet, ["attn2.to_k"]))
    assert len(lora_layers(unet, ["attn2.to_k", "attn1.to_k"])) == len(lora_layers(unet, ["to_k"])) > 4
    assert {name.rpartition(".")[2] for name in lora_layers(text, ["feed_forward"])} == {"fc1", "fc2"}
    assert lora_layers(text, ["convolutions", "o_k"]) == {}
    assert {name.rpartition(".")[2] for name in lora_layers(text)} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    pools = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}  # in layers that diffusers' LoRAs lack
    pooling = tiny.networks((16, 16), unet={**pools, **tiny.TWO_LEVELS}).unet
    assert any("add_embedding.pool.q_proj" in name for name, _ in pooling.named_modules())
    assert not any("add_embedding" in name for name in lora_layers(pooling, ["attention", "q_proj"]))
