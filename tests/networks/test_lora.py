"""LoRA: training layers through peft, files compared with diffusers' own reading of them, and merged weights."""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from shutil import copy as copy_file
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import sdkit
from sdkit.diffusion.conditioning import Conditioning
from sdkit.errors import ArgumentError, SdkitError, SourceError
from sdkit.loading.lora_file import FILENAME, convert_lora, read_lora, save_lora
from sdkit.networks.lora import TARGETS, add_lora, lora_tensors, merge_lora
from tests.helpers.networks import diffusers_pipeline

pytest.importorskip("peft")

Tensors = dict[str, Tensor]
RANK = 4
COMMON = {
    "prompt": ["a cat", "a red ball"],
    "num_inference_steps": 4,
    "output_type": "latent",
}  # 4 steps divide 1,000; see test_pipeline
TO_Q, WIDTH = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", 128


def trained(sd: sdkit.StableDiffusion, rank: int = RANK) -> sdkit.StableDiffusion:
    """Copy the model with LoRA layers as after training: both A and B are random."""
    live = copy.deepcopy(sd)
    torch.manual_seed(0)
    for network in (live.unet.network, live.text.network):
        add_lora(network, rank)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return live


def latents(model: sdkit.StableDiffusion) -> Tensor:
    x_T = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z: Tensor = model(latents=x_T, **COMMON)
    return z


@torch.no_grad()
def theirs(sd: sdkit.StableDiffusion, file: Path) -> Tensor:
    """Draw latents with a diffusers pipeline that has loaded `file`."""
    pipe = diffusers_pipeline(copy.deepcopy(sd))
    pipe.load_lora_weights(file)
    x_T = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    z: Tensor = pipe(latents=x_T, guidance_scale=sd.guidance_scale, **COMMON).images
    return z


def loaded(sd: sdkit.StableDiffusion, file: Path, scale: float = 1.0) -> sdkit.StableDiffusion:
    model = copy.deepcopy(sd)
    model.load_lora(file, scale)
    return model


def weights(model: sdkit.StableDiffusion) -> Tensors:
    return {
        f"{part}.{name}": tensor.clone()
        for part, network in (("unet", model.unet.network), ("text", model.text.network))
        for name, tensor in network.state_dict().items()
    }


@pytest.fixture(scope="module")
def live(sd: sdkit.StableDiffusion) -> sdkit.StableDiffusion:
    return trained(sd)


@pytest.fixture(scope="module")
def tensors(live: sdkit.StableDiffusion) -> Tensors:
    return lora_tensors(live.unet.network, live.text.network)


@pytest.fixture(scope="module")
def files(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("lora")
    for layout in ("diffusers", "kohya"):
        save_lora(tensors, folder / f"{layout}.safetensors", layout)
    return {layout: folder / f"{layout}.safetensors" for layout in ("diffusers", "kohya")}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(tensors: Tensors, metadata: dict[str, str] | None = None, name: str = "one.safetensors") -> Path:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata)
        return tmp_path / name

    return write


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Any:
    """Capture log records of diffusers, transformers, and peft, which do not reach the root logger."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


class TestTraining:
    def test_changes_nothing_at_first(self, sd: sdkit.StableDiffusion) -> None:
        fresh = copy.deepcopy(sd)
        for network in (fresh.unet.network, fresh.text.network):
            add_lora(network, RANK)
        assert torch.equal(latents(fresh), latents(sd))

    def test_every_attention_and_nothing_else_is_trained(self, live: sdkit.StableDiffusion) -> None:
        for network in (live.unet.network, live.text.network):
            attentions = sum(name.endswith(("attn1", "attn2", "self_attn")) for name, _ in network.named_modules())
            marked = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
            assert marked == {name for name, _ in network.named_parameters() if ".lora_" in name}
            assert len(marked) == attentions * 4 * 2 > 0

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_gradient_reaches_only_lora(self, dtype: str) -> None:
        unet = sdkit.UNet.from_pretrained("emoji", dtype=dtype, device="cpu")
        text = sdkit.TextEncoder.from_pretrained("emoji", dtype=dtype, device="cpu")
        torch.manual_seed(0)
        add_lora(unet.network, RANK)
        add_lora(text.network, RANK)
        ids, _ = text.tokenize(["a cat", "a dog"])
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            output = unet(noise, torch.tensor([3, 900]), Conditioning(text(ids[:, 0])))
        output.square().mean().backward()
        for name, parameter in [*unet.named_parameters(), *text.named_parameters()]:
            if ".lora_" not in name:
                assert parameter.grad is None, name
                continue
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all()
            assert bool(parameter.grad.any()) == ("lora_B" in name), name  # A has no gradient while B is 0

    def test_drawn_from_the_global_generator(self, sd: sdkit.StableDiffusion) -> None:
        first, second = (lora_tensors(trained(sd).unet.network) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)
        downs = torch.cat([tensor.flatten() for key, tensor in first.items() if "down.weight" in key])
        assert abs(float(downs.std()) * RANK - 1) < 0.05  # Gaussian of deviation 1 / r, as in diffusers' scripts

    def test_names_and_kind_of_what_was_trained(self, live: sdkit.StableDiffusion, tensors: Tensors) -> None:
        assert tensors[f"unet.{TO_Q}.lora.down.weight"].shape == (RANK, WIDTH)
        prefix = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
        assert tensors[f"{prefix}.up.weight"].shape == (192, RANK)
        assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors.values())
        assert set(lora_tensors(live.unet.network)) == {key for key in tensors if key.startswith("unet.")}

    def test_without_peft(self, sd: sdkit.StableDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ArgumentError, match=r"needs peft; install 'sdkit\[train\]'\.$"):
            add_lora(copy.deepcopy(sd.unet.network), RANK)


class TestLayouts:
    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    def test_merged_equals_live_layers_and_diffusers(
        self, sd: sdkit.StableDiffusion, live: sdkit.StableDiffusion, files: dict[str, Path], layout: str, warned: Any
    ) -> None:
        expected = latents(live)
        assert (expected - latents(sd)).abs().max() > 0.5
        diffusers_pipeline(sd)  # the first import of the pipeline warns about torchvision
        warned.clear()
        torch.testing.assert_close(latents(loaded(sd, files[layout])), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(theirs(sd, files[layout]), expected, atol=1e-4, rtol=0)
        assert [record.getMessage() for record in warned.records if record.levelno >= logging.WARNING] == []

    def test_kohya_names(self, files: dict[str, Path], tensors: Tensors) -> None:
        written = load_file(files["kohya"])
        assert len(written) == len(tensors) * 3 // 2
        module = f"lora_unet_{TO_Q.replace('.', '_')}"
        assert torch.equal(written[f"{module}.lora_down.weight"], tensors[f"unet.{TO_Q}.lora.down.weight"])
        assert torch.equal(written[f"{module}.lora_up.weight"], tensors[f"unet.{TO_Q}.lora.up.weight"])
        assert written[f"{module}.alpha"].item() == RANK
        assert "lora_te_text_model_encoder_layers_2_self_attn_out_proj.lora_up.weight" in written

    def test_precision_is_kept(self, tensors: Tensors, tmp_path: Path) -> None:
        half = {key: tensor.half() for key, tensor in tensors.items()}
        for layout in ("diffusers", "kohya"):
            save_lora(half, tmp_path / "half.safetensors", layout)
            assert {tensor.dtype for tensor in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}

    def test_as_diffusers_saves(
        self, sd: sdkit.StableDiffusion, live: sdkit.StableDiffusion, tensors: Tensors, tmp_path: Path
    ) -> None:
        """Save with the last lines of diffusers' training scripts."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft.utils import get_peft_model_state_dict

        unet, text = (
            convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
            for network in (live.unet.network, live.text.network)
        )
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=unet, text_encoder_lora_layers=text)
        saved = load_file(tmp_path / FILENAME)
        ours = {key.replace("text_model.", ""): tensor for key, tensor in tensors.items()}
        assert {key.replace("text_model.", "") for key in saved} == set(ours)
        torch.testing.assert_close(latents(loaded(sd, tmp_path)), latents(live), atol=1e-4, rtol=0)

    @pytest.mark.parametrize(
        ("rename", "pickled"),
        [
            (lambda key: key.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B"), False),
            (lambda key: old_processors(key), False),
            (lambda key: old_processors(key).removeprefix("unet."), True),
        ],
        ids=["peft", "processors", "no prefix"],
    )
    def test_other_names(
        self,
        sd: sdkit.StableDiffusion,
        files: dict[str, Path],
        tensors: Tensors,
        tmp_path: Path,
        rename: Callable[[str], str],
        pickled: bool,
    ) -> None:
        renamed = {rename(key): tensor for key, tensor in tensors.items()}
        assert len(renamed.keys() & tensors.keys()) < len(tensors) // 2
        file = tmp_path / ("old.bin" if pickled else "old.safetensors")
        (torch.save if pickled else save_file)(renamed, file)
        changed, expected = weights(loaded(sd, file)), weights(loaded(sd, files["diffusers"]))
        assert all(torch.equal(changed[key], expected[key]) for key in expected)

    def test_old_processors_as_diffusers_reads_them(
        self, sd: sdkit.StableDiffusion, live: sdkit.StableDiffusion, tensors: Tensors, write: Callable[..., Path]
    ) -> None:
        file = write({old_processors(key): tensor for key, tensor in tensors.items()})
        torch.testing.assert_close(theirs(sd, file), latents(live), atol=1e-4, rtol=0)


def old_processors(key: str) -> str:
    """Return the name that diffusers used before it adopted peft."""
    key = key.replace("to_out.0.lora", "to_out_lora").replace(".to_q.lora", ".to_q_lora")
    key = key.replace(".to_k.lora", ".to_k_lora").replace(".to_v.lora", ".to_v_lora")
    key = key.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.")
    for side in ("q", "k", "v", "out"):
        key = key.replace(f"self_attn.{side}_proj.lora_linear_layer", f"self_attn.to_{side}_lora")
    return key


class TestPeft:
    """Files written by peft's `save_pretrained`, a folder for each network, compared with peft's own merged weights."""

    @pytest.fixture(params=["unet", "text"])
    def part(self, request: pytest.FixtureRequest) -> str:
        part: str = request.param
        return part

    @pytest.fixture
    def merged(self, sd: sdkit.StableDiffusion, part: str, tmp_path: Path) -> Callable[..., Tensors]:
        """Return a function that saves an adapter with given settings in `tmp_path`, and returns peft's
        merged weights.
        """

        def merged(**settings: Any) -> Tensors:
            from peft import LoraConfig, get_peft_model

            network = copy.deepcopy(getattr(sd, part).network)
            options: dict[str, Any] = {"r": RANK, "target_modules": [*TARGETS, "conv1", "proj_in"]}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft asks transformers for a deprecated name
                live: Any = get_peft_model(network, LoraConfig(**{**options, **settings}))
            torch.manual_seed(0)
            for name, parameter in live.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter, std=0.05)
            live.save_pretrained(tmp_path, save_embedding_layers=False)
            return dict(live.merge_and_unload().state_dict())

        return merged

    @pytest.mark.parametrize("rslora", [False, True])
    def test_alphas_and_ranks_of_its_config(
        self, sd: sdkit.StableDiffusion, merged: Callable[..., Tensors], part: str, tmp_path: Path, rslora: bool
    ) -> None:
        first = {"unet": TO_Q, "text": "encoder.layers.0.self_attn.q_proj"}[part]
        last = {"unet": "mid_block.*.to_k", "text": r"layers\.1.*"}[part]
        expected = merged(
            lora_alpha=7, use_rslora=rslora, rank_pattern={first: 6}, alpha_pattern={f"^{first}": 16, last: 3}
        )
        found = getattr(loaded(sd, tmp_path), part).network.state_dict()
        before = getattr(sd, part).network.state_dict()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, atol=1e-5, rtol=0)
        assert max(float((found[key] - before[key]).abs().max()) for key in before) > 0.05
        assert sum(not torch.equal(found[key], before[key]) for key in before) > 10

    def test_without_its_config(
        self, sd: sdkit.StableDiffusion, merged: Callable[..., Tensors], part: str, tmp_path: Path
    ) -> None:
        expected = merged(lora_alpha=RANK)
        (tmp_path / "adapter_config.json").unlink()
        with pytest.warns(UserWarning, match=r"has no adapter_config\.json beside it, which states its alpha"):
            found = getattr(loaded(sd, tmp_path / "adapter_model.safetensors"), part).network.state_dict()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, atol=1e-5, rtol=0)

    def test_a_config_that_cannot_be_used(self, merged: Callable[..., Tensors], tmp_path: Path) -> None:
        merged(lora_alpha=7)
        file = tmp_path / "adapter_config.json"
        made = json.loads(file.read_text())
        for changes, problem in (
            ({"lora_alpha": None}, "has an alpha that is no number; download"),
            ({"lora_alpha": float("nan")}, "has an alpha that is not finite, or too large; download"),
            ({"use_rslora": "no"}, "has an alpha_pattern or use_rslora of another type or size; download"),
            ({"alpha_pattern": {"(a+)+": 1}}, r"has the alpha_pattern '\(a\+\)\+', which is no name of a layer; down"),
            ({"init_lora_weights": "pissa_niter_4"}, "was begun by pissa_niter_4, which changes the model's weights"),
        ):
            file.write_text(json.dumps(made | changes))
            with pytest.raises(SourceError, match=rf"adapter_\w+\.\w+' {problem}"):
                read_lora(tmp_path)
        file.write_text("[" * 100_000)
        with pytest.raises(
            SourceError, match=r"adapter_config\.json' is not valid JSON \(nested too deeply\); download"
        ):
            read_lora(tmp_path)
        file.unlink()
        file.mkdir()
        with pytest.warns(UserWarning, match="has no adapter_config"):
            read_lora(tmp_path)


class TestAlpha:
    def test_of_kohya(self, sd: sdkit.StableDiffusion, files: dict[str, Path], write: Callable[..., Path]) -> None:
        named = load_file(files["kohya"])
        file = write({key: tensor * 0.5 if key.endswith("alpha") else tensor for key, tensor in named.items()})
        ours = loaded(sd, file)
        torch.testing.assert_close(latents(ours), theirs(sd, file), atol=1e-4, rtol=0)
        assert_same(ours, loaded(sd, files["kohya"], 0.5))
        without = write({key: tensor for key, tensor in named.items() if not key.endswith("alpha")})
        assert_same(loaded(sd, without), loaded(sd, files["kohya"]))

    @pytest.mark.parametrize("alpha", ["Infinity", "NaN", "1e400", "1e300", "1" + "0" * 400, "-1e13", "true", '"7"'])
    def test_not_finite_too_large_or_no_number(self, tensors: Tensors, write: Callable[..., Path], alpha: str) -> None:
        for config in (f'{{"unet.lora_alpha": {alpha}}}', f'{{"unet.alpha_pattern": {{"to_q": {alpha}}}}}'):
            file = write(tensors, {"lora_adapter_metadata": config})
            for use in (read_lora, lambda file: convert_lora(file, file.parent / "made.safetensors")):
                with pytest.raises(SourceError, match=r"has damaged metadata .*: it has an alpha that is (no|not) "):
                    use(file)
        assert not (file.parent / "made.safetensors").exists()

    @pytest.mark.parametrize(
        ("alpha", "problem"),
        [
            (torch.tensor(1 + 1j), "holds .* as complex64 numbers, not as floats"),
            (torch.tensor(True), "holds .* as bool numbers, not as floats"),
            (torch.tensor(torch.inf), "its .* is not finite"),
            (torch.tensor(1e30), "has an alpha that is not finite, or too large at"),
        ],
    )
    def test_of_a_tensor_that_is_none(
        self, tensors: Tensors, write: Callable[..., Path], alpha: Tensor, problem: str
    ) -> None:
        with pytest.raises(SourceError, match=problem):
            read_lora(write(tensors | {f"unet.{TO_Q}.alpha": alpha}))

    def test_of_a_whole_number(self, tensors: Tensors, write: Callable[..., Path]) -> None:
        lora = read_lora(write(tensors | {f"unet.{TO_Q}.alpha": torch.tensor(3)}))
        assert lora.unet[TO_Q.replace(".", "_")].alpha == 3

    @pytest.mark.parametrize("alpha", [100_000, 4.1, 2])
    def test_converted_exactly(self, tensors: Tensors, write: Callable[..., Path], alpha: float) -> None:
        """float16 ends at 65,504 and rounds 4.1, so the written alpha may need float32."""
        half = {key: tensor.half() for key, tensor in tensors.items()}
        file = write(half, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha})})
        convert_lora(file, file.parent / "made.safetensors")
        written = load_file(file.parent / "made.safetensors")[f"lora_unet_{TO_Q.replace('.', '_')}.alpha"]
        assert written.item() == pytest.approx(alpha, rel=1e-7)
        assert written.dtype == (torch.float16 if alpha == 2 else torch.float32)

    def test_patterns_are_names_and_never_run(self, tensors: Tensors, write: Callable[..., Path]) -> None:
        """A pattern matches as in peft: the whole name or the part after a dot, `.*` for anything, and the first match
        counts.
        """
        config = {"to_q": 5, r"attn2\.to_k": 6, "^attn1.to_k": 7, "^down_blocks.1.*to_v$": 8, "o_v": 9, "lora_alpha": 1}
        text = json.dumps({"unet.lora_alpha": 1, "unet.alpha_pattern": config})
        for name, x in read_lora(write(tensors, {"lora_adapter_metadata": text})).unet.items():
            wanted = {"attn1_to_q": 5, "attn2_to_q": 5, "attn2_to_k": 6}.get(name[-10:], 1)
            wanted = 8 if name.startswith("down_blocks_1") and name.endswith("to_v") else wanted
            assert x.alpha == wanted, name
        for pattern in ("([a-z._0-9]+)+X", "a|b", "to_[qk]", "a*", ""):
            text = json.dumps({"unet.alpha_pattern": {pattern: 1.0}})
            with pytest.raises(
                SourceError, match=r"it has the alpha_pattern .*, which is no name of a layer; download"
            ):
                read_lora(write(tensors, {"lora_adapter_metadata": text}))
        text = json.dumps({"unet.alpha_pattern": {f"a{i}": 1.0 for i in range(1001)}})
        with pytest.raises(SourceError, match="alpha_pattern or use_rslora of another type or size"):
            read_lora(write(tensors, {"lora_adapter_metadata": text}))

    @pytest.mark.parametrize("rslora", [False, True])
    def test_of_diffusers_metadata(
        self, sd: sdkit.StableDiffusion, tensors: Tensors, write: Callable[..., Path], rslora: bool
    ) -> None:
        """Metadata as diffusers writes them. Alpha differs from the rank, and in two layers from the general alpha."""
        config: dict[str, Any] = {}
        patterns = {"unet": {TO_Q: 16, "mid_block.*.to_k": 1}, "text_encoder": {"encoder.layers.1.self_attn.q_proj": 9}}
        modules = {
            "unet": ["to_q", "to_k", "to_v", "to_out.0"],
            "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
        }
        for part, pattern in patterns.items():
            config |= {f"{part}.r": RANK, f"{part}.lora_alpha": 7, f"{part}.alpha_pattern": pattern}
            config |= {f"{part}.target_modules": modules[part], f"{part}.use_rslora": rslora}
        file = write(tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config)})
        factor = RANK**0.5 if rslora else 1.0
        lora = read_lora(file)
        assert lora.unet[TO_Q.replace(".", "_")].alpha == pytest.approx(16 * factor)
        assert lora.text_encoder["encoder_layers_0_self_attn_q_proj"].alpha == pytest.approx(7 * factor)
        torch.testing.assert_close(latents(loaded(sd, file)), theirs(sd, file), atol=1e-4, rtol=0)

    def test_ranks_that_differ(self, sd: sdkit.StableDiffusion, tensors: Tensors, write: Callable[..., Path]) -> None:
        """Each layer's factor is its own alpha over its own rank, and 1 without an alpha."""
        name = f"unet.{TO_Q}.lora"
        wider = {f"{name}.down.weight": torch.randn(6, WIDTH), f"{name}.up.weight": torch.randn(WIDTH, 6) * 0.05}
        file = write(tensors | wider)
        expected = (
            sd.unet.network.get_submodule(TO_Q).weight + wider[f"{name}.up.weight"] @ wider[f"{name}.down.weight"]
        )
        torch.testing.assert_close(loaded(sd, file).unet.network.get_submodule(TO_Q).weight, expected)
        torch.testing.assert_close(latents(loaded(sd, file)), theirs(sd, file), atol=1e-4, rtol=0)


def assert_same(a: sdkit.StableDiffusion, b: sdkit.StableDiffusion, atol: float = 1e-6) -> None:
    found, expected = weights(a), weights(b)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=atol, rtol=0)


class TestMerging:
    def test_scale(self, sd: sdkit.StableDiffusion, files: dict[str, Path]) -> None:
        before, whole = weights(sd), weights(loaded(sd, files["diffusers"]))
        half = weights(loaded(sd, files["kohya"], 0.5))
        for key in before:
            torch.testing.assert_close(half[key], (before[key] + whole[key]) / 2, atol=1e-6, rtol=0)
        none = weights(loaded(sd, files["diffusers"], 0))
        assert all(torch.equal(none[key], before[key]) for key in before)
        assert sum(not torch.equal(whole[key], before[key]) for key in before) == 7 * 2 * 4 + 4 * 4

    def test_minus_the_scale_undoes_it_and_two_add_up(self, sd: sdkit.StableDiffusion, files: dict[str, Path]) -> None:
        model = loaded(sd, files["diffusers"], 0.7)
        model.load_lora(files["kohya"], 0.3)
        assert_same(model, loaded(sd, files["diffusers"]))
        model.load_lora(files["diffusers"], -1)
        assert_same(model, sd)

    def test_into_bfloat16_rounds_once(self, tensors: Tensors, files: dict[str, Path]) -> None:
        half = sdkit.StableDiffusion.from_pretrained("emoji", dtype="bf16", device="cpu")
        before = half.unet.network.get_submodule(TO_Q).weight.clone()
        half.load_lora(files["diffusers"])
        delta = tensors[f"unet.{TO_Q}.lora.up.weight"] @ tensors[f"unet.{TO_Q}.lora.down.weight"]
        assert torch.equal(half.unet.network.get_submodule(TO_Q).weight, (before.float() + delta).bfloat16())
        assert {parameter.dtype for parameter in half.unet.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("dtype", "size", "scale"),
        [("fp32", 1e25, 1.0), ("fp32", 1e25, 0.0), ("fp16", 100.0, 10.0), ("bf16", 1e19, 1.0)],
    )
    def test_what_overflows_is_refused_before_a_weight_changes(
        self, tensors: Tensors, write: Callable[..., Path], dtype: str, size: float, scale: float
    ) -> None:
        """The factors in the last layer are finite, but their product is not."""
        name = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer"
        large = {f"{name}.{side}.weight": tensors[f"{name}.{side}.weight"] * 0 + size for side in ("down", "up")}
        model = sdkit.StableDiffusion.from_pretrained("emoji", dtype=dtype, device="cpu")
        before = weights(model)
        with pytest.raises(SourceError, match=r"at scale \S+ would make encoder_layers_3_self_attn_q_proj infinite"):
            model.load_lora(write(tensors | large), scale)
        found = weights(model)
        assert all(torch.equal(found[key], before[key]) for key in before)

    def test_what_nearly_overflows_is_merged(self, tensors: Tensors, write: Callable[..., Path]) -> None:
        """The quick bound on the product is not sharp. If it does not decide, the product itself must."""
        name = f"unet.{TO_Q}.lora"
        down, up = torch.zeros(RANK, WIDTH), torch.zeros(WIDTH, RANK)
        down[0, 0], up[0, 1] = 2000.0, 2000.0  # these two entries are never multiplied with each other
        model = sdkit.StableDiffusion.from_pretrained("emoji", dtype="fp16", device="cpu")
        before = model.unet.network.get_submodule(TO_Q).weight.clone()
        model.load_lora(write({f"{name}.down.weight": down, f"{name}.up.weight": up}))
        assert torch.equal(model.unet.network.get_submodule(TO_Q).weight, before)

    def test_into_a_text_encoder_of_older_names(self, sd: sdkit.StableDiffusion, files: dict[str, Path]) -> None:
        nested = nn.Module()
        nested.text_model = copy.deepcopy(sd.text.network)
        merge_lora(read_lora(files["kohya"]), copy.deepcopy(sd.unet.network), nested, 1.0)
        expected = loaded(sd, files["kohya"]).text.network.state_dict()
        assert all(torch.equal(found, expected[key]) for key, found in nested.text_model.state_dict().items())

    def test_convolutions(self, sd: sdkit.StableDiffusion, write: Callable[..., Path]) -> None:
        """3 x 3 and 1 x 1 convolutions and linear layers. The factors of a 1 x 1 convolution may have a linear layer's
        shape, and the reverse.
        """
        generator = torch.Generator().manual_seed(0)
        made: Tensors = {}
        layers = {
            "conv_in": 3,
            "down_blocks.1.resnets.0.conv1": 3,
            "down_blocks.0.downsamplers.0.conv": 3,
            "up_blocks.1.resnets.0.conv_shortcut": 1,
            "mid_block.attentions.0.proj_in": 1,
            "time_embedding.linear_1": 0,
            "down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": 0,
        }
        for name, kernel in layers.items():
            outputs, inputs = sd.unet.network.get_submodule(name).weight.shape[:2]
            key = f"lora_unet_{name.replace('.', '_')}"
            sides = (kernel, kernel)[: 2 * (kernel > 0)]
            ones = (1, 1)[: len(sides)]
            made[f"{key}.lora_down.weight"] = torch.randn(RANK, inputs, *sides, generator=generator) * 0.1
            made[f"{key}.lora_up.weight"] = torch.randn(outputs, RANK, *ones, generator=generator) * 0.1
            made[f"{key}.alpha"] = torch.tensor(2.0)
        file = write(made)
        model = loaded(sd, file)
        torch.testing.assert_close(latents(model), theirs(sd, file), atol=1e-4, rtol=0)
        assert (latents(model) - latents(sd)).abs().max() > 0.1
        # The factors are two convolutions in a row.
        x = torch.randn(1, 4, 8, 8, generator=generator)
        down, up = made["lora_unet_conv_in.lora_down.weight"], made["lora_unet_conv_in.lora_up.weight"]
        expected = sd.unet.network.conv_in(x) + F.conv2d(F.conv2d(x, down, padding=1), up) * 2 / RANK
        torch.testing.assert_close(model.unet.network.conv_in(x), expected, atol=1e-5, rtol=0)
        squeezed = {
            key: tensor.flatten(1)
            if "proj_in" in key and tensor.ndim
            else tensor[..., None, None]
            if "linear_1" in key and tensor.ndim
            else tensor
            for key, tensor in made.items()
        }
        assert squeezed["lora_unet_time_embedding_linear_1.lora_down.weight"].ndim == 4
        assert_same(loaded(sd, write(squeezed, name="squeezed.safetensors")), model, atol=0)

    @pytest.mark.parametrize(
        ("name", "shape", "problem"),
        [
            (
                "text_encoder.text_model.encoder.layers.7.self_attn.q_proj",
                (192, 192),
                "this one has no encoder_layers_7",
            ),
            ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", (768, 768), "768 x 768, where .* 192 x 192"),
            ("text_encoder.text_model.final_layer_norm", (192, 192), "this one has no final_layer_norm"),
        ],
        ids=["absent", "other size", "no linear layer"],
    )
    def test_all_or_nothing(
        self,
        sd: sdkit.StableDiffusion,
        tensors: Tensors,
        write: Callable[..., Path],
        name: str,
        shape: tuple[int, int],
        problem: str,
    ) -> None:
        """The only layer that does not fit is in the network that is merged last. No other layer may have changed."""
        outputs, inputs = shape
        wrong = {f"{name}.lora_A.weight": torch.ones(RANK, inputs), f"{name}.lora_B.weight": torch.ones(outputs, RANK)}
        same = {key for key in tensors if key.startswith(f"{name}.")}
        file = write({key: tensor for key, tensor in tensors.items() if key not in same} | wrong)
        model = copy.deepcopy(sd)
        with pytest.raises(SourceError, match=rf"one\.safetensors' was made for another model: .*{problem}.*\.$"):
            model.load_lora(file)
        found, expected = weights(model), weights(sd)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


class TestSources:
    def test_folder(self, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "run").mkdir()
        copy_file(files["kohya"], tmp_path / "run" / "only.safetensors")
        assert "only.safetensors" in read_lora(tmp_path / "run").label
        copy_file(files["diffusers"], tmp_path / "run" / FILENAME)
        assert FILENAME in read_lora(tmp_path / "run").label
        assert "only.safetensors" in read_lora(tmp_path / "run", filename="only.safetensors").label
        monkeypatch.setenv("HOME", str(tmp_path))
        assert FILENAME in read_lora("~/run").label

    def test_hub(
        self, sd: sdkit.StableDiffusion, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = tmp_path / "hub" / "models--org--lora" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / FILENAME).symlink_to(files["diffusers"])
        (snapshot / "other.safetensors").symlink_to(files["kohya"])
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        model = copy.deepcopy(sd)
        model.load_lora("org/lora")
        model.load_lora("org/lora", -1, filename="other.safetensors", revision=commit)
        assert_same(model, sd)
        with pytest.raises(SourceError, match=r"'org/lora' in the cache .* lacks third\.safetensors"):
            read_lora("org/lora", filename="third.safetensors")
        (snapshot / FILENAME).unlink()
        with pytest.raises(SourceError, match=rf"lacks {FILENAME} \(filename= names another\)"):
            read_lora("org/lora")

    @pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin", "old.bin"])
    def test_folder_of_a_pickle(
        self, sd: sdkit.StableDiffusion, files: dict[str, Path], tensors: Tensors, tmp_path: Path, name: str
    ) -> None:
        torch.save(tensors, tmp_path / name)
        (tmp_path / "README.md").touch()
        assert_same(loaded(sd, tmp_path), loaded(sd, files["diffusers"]), atol=0)
        torch.save({"optimizer": 1}, tmp_path / "optimizer.bin")  # with a second file, only the usual names count
        if name == "old.bin":
            with pytest.raises(SourceError, match=r"it holds old\.bin, optimizer\.bin: name one by filename=\.$"):
                read_lora(tmp_path)
            assert name in read_lora(tmp_path, filename=name).label
        else:
            assert name in read_lora(tmp_path).label

    @pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin"])
    def test_hub_id_of_another_file(
        self, tensors: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        snapshot = tmp_path / "hub" / "models--org--lora" / "snapshots" / ("0123456789" * 4)
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
        wrapped = {key.replace("unet.", "base_model.model."): x for key, x in tensors.items() if "unet." in key}
        (save_file if name.endswith("safetensors") else torch.save)(wrapped, snapshot / name)
        (snapshot / "adapter_config.json").write_text('{"lora_alpha": 3}')
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        if name.startswith("adapter"):
            assert {x.alpha for x in read_lora("org/lora").unet.values()} == {3}
        assert name in read_lora("org/lora").label

    def test_the_text_encoder_as_sdxl_names_it(
        self, sd: sdkit.StableDiffusion, files: dict[str, Path], write: Callable[..., Path]
    ) -> None:
        """Some trainers write SDXL's prefix lora_te1_ for Stable Diffusion 1.x too."""
        named = {key.replace("lora_te_", "lora_te1_"): tensor for key, tensor in load_file(files["kohya"]).items()}
        assert any("lora_te1_" in key for key in named)
        assert_same(loaded(sd, write(named)), loaded(sd, files["kohya"]), atol=0)

    def test_a_bundled_embedding_is_told_and_left_out(
        self, sd: sdkit.StableDiffusion, files: dict[str, Path], write: Callable[..., Path]
    ) -> None:
        bundle = {"bundle_emb.zork.string_to_param.*": torch.randn(2, 192), "bundle_emb.zork.x": torch.zeros(1)}
        file = write(load_file(files["kohya"]) | bundle)
        with pytest.warns(UserWarning, match=r"brings the embedding 'zork' along, which is not used\.$") as caught:
            model = loaded(sd, file)
        assert len(caught) == 1
        assert_same(model, loaded(sd, files["kohya"]), atol=0)

    def test_an_embedding_is_told_for_what_it_is(self, tmp_path: Path) -> None:
        vectors = torch.randn(2, 192)
        torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "z"}, tmp_path / "a.pt")
        torch.save({"<zork>": vectors[0]}, tmp_path / "b.bin")
        save_file({"emb_params": vectors}, tmp_path / "c.safetensors")
        save_file({"clip_g": vectors.clone(), "clip_l": vectors}, tmp_path / "d.safetensors")
        for file in sorted(tmp_path.iterdir()):
            with pytest.raises(SourceError, match=r"looks like a textual inversion embedding; give .*\.$"):
                read_lora(file)

    def test_bad_sources(self, files: dict[str, Path], tmp_path: Path) -> None:
        expected: dict[Any, str] = {
            "": r"^the LoRA '' does not exist",
            "no such thing": r"^the LoRA 'no such thing' does not exist; give a file, a folder with one, or a Hub id",
            "absent/one.safetensors": r"'absent/one\.safetensors' does not exist",
            tmp_path / "absent": r"absent' does not exist",
            "org/absent": r"^'org/absent' is not in the cache, and the Hub cannot be reached",
            "~nobody/lora": r"'~nobody/lora' does not exist",
            tmp_path: rf"^the folder .* has no {FILENAME}; it holds no other; give another source\.$",
            files["kohya"].parent: r"it holds diffusers\.safetensors, kohya\.safetensors: name one by filename=\.$",
        }
        for source, message in expected.items():
            with pytest.raises(SourceError, match=message):
                read_lora(source)
        with pytest.raises(SourceError, match=r"has no third\.safetensors; it holds diffusers"):
            read_lora(files["kohya"].parent, filename="third.safetensors")
        with pytest.raises(ArgumentError, match="not int"):
            read_lora(3)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("key", "kind"),
        [
            ("lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "a LoRA of Stable Diffusion XL"),
            ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", "a LoRA of Stable Diffusion XL"),
            ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "a LoRA of Stable Diffusion XL"),
            ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "an OFT"),
            ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "a GLoRA"),
            ("lora_unet_mid_block_attentions_0_proj_in.diff_b", "a difference of whole weights"),
            ("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.on_input", "an IA3"),
        ],
    )
    def test_other_kinds(self, tensors: Tensors, write: Callable[..., Path], key: str, kind: str) -> None:
        file = write(tensors | {key: torch.ones(2, 2)})
        with pytest.raises(SourceError, match=rf"one\.safetensors' looks like {kind}; give a plain LoRA of .*\.$"):
            read_lora(file)

    def test_no_lora(self, write: Callable[..., Path]) -> None:
        for key in ("conv_in.weight", "lora_unet_double_blocks.0.weight", f"unet.{TO_Q}.lora_B.bias"):
            with pytest.raises(SourceError, match=rf"one\.safetensors' holds {key}, which is no part of a LoRA for"):
                read_lora(write({key: torch.ones(2, 2)}))
        with pytest.raises(SourceError, match=r"one\.safetensors' holds no tensors; give a LoRA\.$"):
            read_lora(write({}))
        embedded = Path(sdkit.__file__).parent / "assets" / "emoji" / "unet" / "diffusion_pytorch_model.safetensors"
        with pytest.raises(SourceError, match="which is no part of a LoRA"):
            read_lora(embedded)

    def test_damaged(
        self, tensors: Tensors, files: dict[str, Path], tmp_path: Path, write: Callable[..., Path]
    ) -> None:
        content = files["diffusers"].read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(SourceError, match=r"cut\.safetensors' is damaged"):
            read_lora(tmp_path / "cut.safetensors")
        down, up = f"unet.{TO_Q}.lora.down.weight", f"unet.{TO_Q}.lora.up.weight"
        alpha = f"unet.{TO_Q}.alpha"
        for broken in (
            {key: tensor for key, tensor in tensors.items() if key != up},
            {key: tensor for key, tensor in tensors.items() if key != down},
            tensors | {up: torch.ones(WIDTH, RANK + 1)},
            tensors | {up: torch.ones(WIDTH)},
            tensors | {up: torch.ones(WIDTH, RANK, 3, 3)},
            tensors | {up: torch.ones(WIDTH, 0), down: torch.ones(0, WIDTH)},
            tensors | {alpha: torch.ones(2)},
            {alpha: torch.tensor(1.0)},
        ):
            with pytest.raises(SourceError, match=rf"one\.safetensors' is damaged: the tensors of {TO_Q} do not fit"):
                read_lora(write(broken))
        with pytest.raises(SourceError, match=rf"is damaged: its {up} is not finite; download it again\.$"):
            read_lora(write(tensors | {up: torch.full((WIDTH, RANK), torch.nan)}))
        for other in (f"unet.{TO_Q}.lora_B.weight", f"lora_unet_{TO_Q.replace('.', '_')}.lora_up.weight"):
            again = {other: tensors[up].clone()}
            again |= {other.replace("up", "down"): tensors[down].clone()} if "up" in other else {}
            with pytest.raises(SourceError, match=r"one\.safetensors' is damaged: it holds \S+to_q twice; download"):
                read_lora(write(tensors | again))
        for text in ("{", "[]", '{"unet.alpha_pattern": {"(": 1}}', '{"unet.lora_alpha": "x"}'):
            with pytest.raises(SourceError, match=r"one\.safetensors' has damaged metadata \(lora_adapter_metadata\)"):
                read_lora(write(tensors, {"lora_adapter_metadata": text}))

    @pytest.mark.parametrize(
        ("make", "problem"),
        [
            (lambda x: torch.empty_like(x, device="meta"), "which is no plain tensor"),
            (lambda x: x.to_sparse(), "which is no plain tensor"),
            (lambda x: x.to_sparse_csr(), "which is no plain tensor"),
            (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "which is no plain tensor"),
            (lambda x: x.to(torch.int8), "as int8 numbers"),
            (lambda x: x > 0, "as bool numbers"),
            (lambda x: x.to(torch.complex64), "as complex64 numbers"),
            (lambda x: x[:1, :1].expand(10**8, 10**8), "is damaged: its tensors are larger than the file"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")  # torch warns about quantized and sparse tensors
    def test_a_pickle_of_odd_tensors(
        self, tensors: Tensors, tmp_path: Path, make: Callable[[Tensor], Tensor], problem: str
    ) -> None:
        down = f"unet.{TO_Q}.lora.down.weight"
        torch.save(tensors | {down: make(tensors[down])}, tmp_path / "odd.pt")
        for use in (read_lora, lambda file: convert_lora(file, tmp_path / "made.safetensors")):
            with pytest.raises(SourceError, match=rf"odd\.pt' .*{problem}"):
                use(tmp_path / "odd.pt")
        assert not (tmp_path / "made.safetensors").exists()

    def test_a_pickle_of_views(self, sd: sdkit.StableDiffusion, tensors: Tensors, tmp_path: Path) -> None:
        """Tensors that are transposed, expanded, trained parameters, or share memory are loaded and converted."""
        both = torch.cat([x.flatten() for x in tensors.values()])
        views = dict(zip(tensors, both.split([x.numel() for x in tensors.values()]), strict=True))
        views = {key: view.view(tensors[key].shape) for key, view in views.items()}
        down, up = f"unet.{TO_Q}.lora.down.weight", f"unet.{TO_Q}.lora.up.weight"
        views |= {down: tensors[down].T.contiguous().T, up: nn.Parameter(torch.tensor(0.1)).expand(WIDTH, RANK)}
        torch.save(views, tmp_path / "views.pt")
        save_file({key: view.detach().clone().contiguous() for key, view in views.items()}, tmp_path / "a.safetensors")
        convert_lora(tmp_path / "views.pt", tmp_path / "b.safetensors")
        for file in ("views.pt", "b.safetensors"):
            assert_same(loaded(sd, tmp_path / file), loaded(sd, tmp_path / "a.safetensors"), atol=0)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None])
    def test_bad_scale(self, sd: sdkit.StableDiffusion, files: dict[str, Path], scale: Any) -> None:
        with pytest.raises(ArgumentError, match="scale must be a finite number"):
            sd.load_lora(files["diffusers"], scale)

    def test_bad_targets(self, tensors: Tensors, tmp_path: Path) -> None:
        with pytest.raises(ArgumentError, match="layout 'a1111' is not one of 'diffusers', 'kohya'"):
            save_lora(tensors, tmp_path / "one.safetensors", "a1111")
        with pytest.raises(ArgumentError, match=r"one\.bin'; give a name that ends in \.safetensors\.$"):
            save_lora(tensors, tmp_path / "one.bin")
        (tmp_path / "folder.safetensors").mkdir()
        with pytest.raises(SdkitError, match="cannot write"):
            save_lora(tensors, tmp_path / "folder.safetensors")
        assert [path.name for path in tmp_path.iterdir()] == ["folder.safetensors"]
