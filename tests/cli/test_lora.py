"""`sdkit lora info` and `sdkit lora merge`, on a small model and LoRAs with random factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdkit
from sdkit.loading.lora_file import read_lora
from sdkit.loading.lora_tools import join_loras
from tests.helpers import tiny
from tests.helpers.command_line import Ran

ATTENTION = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
CONVOLUTION = "lora_unet_conv_in"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
METADATA = {
    "ss_output_name": "zork",
    "ss_base_model_version": "sd_v1",
    "ss_sd_model_name": "v1-5.safetensors",
    "modelspec.trigger_phrase": "zork, a dog",
    "ss_tag_frequency": json.dumps({"10_zork": {"a dog": 7, " zork": 20}, "1_other": {"a dog": 2, "x": "many"}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, and LoRAs: a.safetensors of three layers, b.safetensors with a convolution's core, and others."""
    folder = tmp_path_factory.mktemp("lora")
    tiny.model(folder / "model")
    sd = sdkit.StableDiffusion.from_pretrained(folder / "model", dtype="fp32", device="cpu")
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng) * 0.1

    to_k = sd.unet.network.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_k
    width = to_k.in_features
    n = sd.unet.network.conv_in.out_channels
    text = sd.text.width
    a = {
        f"{ATTENTION}.lora_down.weight": draw(2, width), f"{ATTENTION}.lora_up.weight": draw(width, 2),
        f"{ATTENTION}.alpha": torch.tensor(1.0),
        f"{CONVOLUTION}.lora_down.weight": draw(2, 4, 3, 3), f"{CONVOLUTION}.lora_up.weight": draw(n, 2, 1, 1),
        f"{TEXT}.lora_down.weight": draw(2, text), f"{TEXT}.lora_up.weight": draw(2 * text, 2),
    }  # fmt: skip
    b = {
        f"{ATTENTION}.lora_down.weight": draw(3, width).half(), f"{ATTENTION}.lora_up.weight": draw(width, 3).half(),
        f"{ATTENTION}.alpha": torch.tensor(4.0),
        f"{CONVOLUTION}.lora_down.weight": draw(3, 4, 1, 1), f"{CONVOLUTION}.lora_up.weight": draw(n, 3, 1, 1),
        f"{CONVOLUTION}.lora_mid.weight": draw(3, 3, 3, 3) * 10,
    }  # fmt: skip
    loha = {f"{ATTENTION}.hada_w{i}_{side}": draw(*shape) for i in (1, 2)
            for side, shape in (("a", (width, 2)), ("b", (2, width)))}  # fmt: skip
    lokr = {f"{ATTENTION}.lokr_w1": draw(2, 2), f"{ATTENTION}.lokr_w2": draw(width // 2, width // 2)}
    magnitude = {f"{ATTENTION}.dora_scale": to_k.weight.detach().norm(dim=1, keepdim=True)}
    wide = {f"{ATTENTION}.lora_down.weight": draw(2, 5), f"{ATTENTION}.lora_up.weight": draw(width, 2)}
    xl = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": draw(2, 5)}
    none = {f"{ATTENTION}.lora_down.weight": draw(0, width), f"{ATTENTION}.lora_up.weight": draw(width, 0)}
    others = {"loha": loha, "lokr": lokr, "dora": a | magnitude, "wide": wide, "xl": xl, "none": none,
              "unknown": a | {f"{ATTENTION}.what": draw(1)}}  # fmt: skip
    save_file(a, folder / "a.safetensors", METADATA)
    save_file(b, folder / "b.safetensors", {"ss_tag_frequency": "{damaged"})
    for name, tensors in others.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:1000])
    return folder


@pytest.fixture
def work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the current folder, with links to the content of `folder`."""
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        Path(path.name).symlink_to(path)
    return tmp_path


def weights(model: str | Path, *loras: tuple[str, float]) -> dict[str, Tensor]:
    sd = sdkit.StableDiffusion.from_pretrained(model, dtype="fp32", device="cpu")
    for source, scale in loras:
        sd.load_lora(source, scale)
    networks = {"unet": sd.unet.network, "text": sd.text.network, "vae": sd.vae.network}
    return {f"{part}.{key}": x for part, network in networks.items() for key, x in network.state_dict().items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=atol, rtol=0)


def test_info(run: Callable[..., Ran], work: Path) -> None:
    done = run("lora", "info", "a.safetensors")
    assert (done.code, done.err) == (0, "")
    path, *lines = done.out.splitlines()
    assert path == "a.safetensors"
    rows = {line[:13].strip(): line[13:].strip() for line in lines}
    assert rows | {"stored as": ""} == {
        "kind": "LoCon, LoRA",
        "title": "zork",
        "base model": "sd_v1, v1-5.safetensors",
        "rank": "2",
        "alpha": "1, 2",
        "layers": "2 in the U-Net, 1 in the text encoder",
        "targets": "attn1_to_k (1), conv_in (1), mlp_fc1 (1)",
        "stored as": "",
        "trigger words": "zork, a dog",
        "tags": "zork (20), a dog (9)",
    }
    assert rows["stored as"].startswith("float32, 0.00 M")


def test_info_as_json(run: Callable[..., Ran], work: Path) -> None:
    found = json.loads(run("lora", "info", "b.safetensors", "--json").out)
    tensors = load_file("b.safetensors")
    assert found == {
        "path": "b.safetensors", "kinds": ["LoCon", "LoRA"], "layers": {"U-Net": 2, "text encoder": 0}, "ranks": [3],
        "alphas": [3.0, 4.0], "targets": {"attn1_to_k": 1, "conv_in": 1}, "dtype": "float32",
        "parameters": sum(x.numel() for key, x in tensors.items() if "alpha" not in key),
        "title": None, "base": None, "trigger": None, "tags": {}, "merged_from": None,
    }  # fmt: skip
    kinds = {name: json.loads(run("lora", "info", f"{name}.safetensors", "--json").out)["kinds"]
             for name in ("loha", "lokr", "dora")}  # fmt: skip
    assert kinds == {"loha": ["LoHa"], "lokr": ["LoKr"], "dora": ["LoCon", "LoRA", "LoRA with DoRA"]}
    assert "whole matrices" in run("lora", "info", "lokr.safetensors").out


def test_merge_into_one_file(run: Callable[..., Ran], work: Path) -> None:
    """The file does what its LoRAs do together, with their ranks added up; also one alone, at its scale."""
    scales = ("--scale", 0.5, "--scale", -1.5)
    done = run("lora", "merge", "a.safetensors", "b.safetensors", *scales, "--out", "c/both.safetensors")
    assert done == Ran(0, str(Path("c/both.safetensors")) + "\n", "")
    expected = weights("model", ("a.safetensors", 0.5), ("b.safetensors", -1.5))
    assert_close(weights("model", ("c/both.safetensors", 1.0)), expected)
    assert load_file("c/both.safetensors")[f"{ATTENTION}.lora_down.weight"].shape[0] == 5
    assert run("lora", "merge", "a.safetensors", "--scale", 2, "-o", "twice.safetensors").code == 0
    assert_close(weights("model", ("twice.safetensors", 1.0)), weights("model", ("a.safetensors", 2.0)))


def test_a_merged_file_names_the_words_of_all(run: Callable[..., Ran], work: Path) -> None:
    """Trigger words and base models once each, tags added up, and the files with their scales."""
    other = {
        "trigger_words": "blorp, zork", "ss_base_model_version": "sd_v1", "ss_sd_model_name": "other.ckpt",
        "ss_tag_frequency": json.dumps({"10_zork": {"zork": 1, "blorp": 50}}), "ss_network_dim": "3",
    }  # fmt: skip
    save_file(load_file("b.safetensors"), "d.safetensors", other)
    loras = ("a.safetensors", "b.safetensors", "d.safetensors")
    scales = [part for scale in (1, -0.25, 0.5) for part in ("--scale", scale)]
    assert run("lora", "merge", *loras, *scales, "-o", "all.safetensors").code == 0
    found = json.loads(run("lora", "info", "all.safetensors", "--json").out)
    assert found["trigger"] == "zork, a dog, blorp"
    assert found["base"] == "sd_v1, v1-5.safetensors, other.ckpt"
    assert found["title"] == "zork + b + d"
    assert found["tags"] == {"blorp": 50, "zork": 21, "a dog": 9}
    assert found["merged_from"] == "a.safetensors (1), b.safetensors (-0.25), d.safetensors (0.5)"
    shown = run("lora", "info", "all.safetensors").out
    assert "merged from    a.safetensors (1), b.safetensors (-0.25), d.safetensors (0.5)" in shown
    first = Path("all.safetensors").read_bytes()
    assert b"ss_network_dim" not in first  # of one training
    assert run("lora", "merge", *loras, *scales, "-o", "all.safetensors").code == 0
    assert Path("all.safetensors").read_bytes() == first
    # LoRAs without metadata give none but the files' names.
    assert run("lora", "merge", "b.safetensors", "-o", "one.safetensors").code == 0
    found = json.loads(run("lora", "info", "one.safetensors", "--json").out)
    assert [found[key] for key in ("trigger", "base", "tags", "merged_from")] == [None, None, {}, "b.safetensors (1)"]


def test_merge_into_a_model(run: Callable[..., Ran], work: Path) -> None:
    loras = ("a.safetensors", "dora.safetensors", "loha.safetensors")
    done = run("lora", "merge", *loras, "--scale", 1, "--scale", 0.5, "--scale", 2, "-m", "model", "-o", "merged")
    assert done == Ran(0, "merged\n", "")
    expected = weights("model", *zip(loras, (1, 0.5, 2), strict=True))
    assert_close(weights("merged"), expected)
    assert (Path("merged") / "scheduler" / "scheduler_config.json").exists()
    Path("half").mkdir()  # an empty folder may be there
    assert run("lora", "merge", "lokr.safetensors", "-m", "model", "-o", "half", "--dtype", "fp16").code == 0
    assert {x.dtype for x in load_file("half/unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    assert_close(weights("half"), weights("model", ("lokr.safetensors", 1.0)), atol=2e-3)
    assert not [*work.glob(".sdkit-*")]


def test_what_cannot_be_joined_in_python(work: Path) -> None:
    (work / "model").unlink()
    lora, text = read_lora("a.safetensors"), "0.5"
    wrong: Any = ([], [(lora, text)], [(lora, float("nan"))])
    for loras, sentence in zip(
        wrong, ("there is no LoRA to join", "scale must be a fin", "scale must be a fin"), strict=True
    ):
        with pytest.raises(sdkit.ArgumentError, match=f"^{sentence}"):
            join_loras(loras, "joined.safetensors")
    assert not Path("joined.safetensors").exists()


BAD: dict[str, tuple[str, str]] = {
    "info of a model": ("info model/unet/diffusion_pytorch_model.safetensors", "which is no part of a LoRA for"),
    "info of nothing": ("info absent.safetensors", "the LoRA 'absent.safetensors' does not exist; give a file"),
    "info of a folder": ("info model", "has no pytorch_lora_weights.safetensors; it holds no other; give another"),
    "corrupt file": ("info cut.safetensors", "'cut.safetensors' is damaged or not a .safetensors file"),
    "Stable Diffusion XL": ("info xl.safetensors", "looks like a LoRA of Stable Diffusion XL; give a plain LoRA of"),
    "rank 0": ("info none.safetensors", "is damaged: the tensors of down_blocks_0"),
    "unknown key": ("info unknown.safetensors", f"holds {ATTENTION}.what, which is no part of a LoRA for Stable"),
    "of two scales one": (
        "merge a.safetensors b.safetensors --scale 1 -o c.safetensors",
        "1 of --scale cannot serve 2",
    ),
    "scale not finite": ("merge a.safetensors --scale nan -o c.safetensors", "scale must be a finite number, not nan."),
    "scale too large": ("merge a.safetensors --scale 1e39 -o c.safetensors", "at scale 1e+39 would make"),
    "other shapes": (
        "merge a.safetensors wide.safetensors -o c.safetensors",
        "'wide.safetensors' and 'a.safetensors' were made for different models: at down_blocks_0",
    ),
    "a LoHa": (
        "merge a.safetensors loha.safetensors -o c.safetensors",
        "'loha.safetensors' is a LoHa at ",
    ),
    "a LoKr": ("merge lokr.safetensors -o c.safetensors", "is a LoKr at down_blocks_0"),
    "a DoRA": ("merge dora.safetensors -o c.safetensors", "is a LoRA with DoRA at down_blocks_0"),
    "another suffix": ("merge a.safetensors -o c.bin", "a LoRA cannot be saved as 'c.bin'; give a name that ends in"),
    "dtype of no model": ("merge a.safetensors -o c.safetensors --dtype fp16", "--dtype belongs to --model, and there"),
    "another dtype": ("merge a.safetensors -m model -o c --dtype fp8", "dtype 'fp8'"),
    "model of another width": ("merge wide.safetensors -m model -o c", "was made for another model: its down_blocks_0"),
    "overflow in a model": ("merge a.safetensors -m model -o c --scale 1e39", "at scale 1e+39 would make "),
    "overflow in the new dtype": ("merge a.safetensors -m model -o c --scale 1e9 --dtype fp16", "infinite in float16"),
    "folder that is there": ("merge a.safetensors -m model -o model", "model exists already; name another folder."),
    "no model": ("merge a.safetensors -m absent -o c", "absent"),
    "out is an input": (
        "merge a.safetensors b.safetensors -o b.safetensors",
        "b.safetensors is one of the LoRAs to merge, which would be lost; name another file.",
    ),
    "no out": ("merge a.safetensors", "the following arguments are required: --out/-o"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(run: Callable[..., Ran], work: Path, case: str) -> None:
    """Each is one sentence on stderr, and leaves no file."""
    arguments, sentence = BAD[case]
    before = sorted(work.iterdir())
    done = run("lora", *arguments.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("sdkit: ")
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert sorted(work.iterdir()) == before
