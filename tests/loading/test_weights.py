"""Weight files are recognised by their content and checked on loading, and no tensor is dropped silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import sdkit
from sdkit.cli import main
from sdkit.errors import SourceError
from sdkit.loading.lora_file import read_lora
from sdkit.loading.new_network import new_network
from sdkit.loading.single_file import ASSETS
from sdkit.loading.tensors import open_tensors
from sdkit.networks.lpips import LPIPS
from tests.helpers import original_layout
from tests.helpers.loaders import describe, load_text, load_unet, load_vae

EMOJI = ASSETS / "emoji"
LOADERS: dict[str, Callable[..., Any]] = {"vae": load_vae, "unet": load_unet, "text_encoder": load_text}
TENSORS = {
    "vae": "decoder.conv_out.weight",
    "unet": "mid_block.resnets.0.conv1.weight",
    "text_encoder": "text_model.final_layer_norm.bias",
}
WITHOUT_POOLED = json.loads((EMOJI / "unet" / "config.json").read_text()) | {"addition_embed_type": None}
"""Config of the embedded U-Net without the pooled text, for which the original layout has no names."""
Tensors = dict[str, torch.Tensor]


def weights_of(part: str) -> Tensors:
    (file,) = (EMOJI / part).glob("*.safetensors")
    return load_file(file)


def folder_with(to: Path, part: str, tensors: Tensors, suffix: str = ".safetensors") -> Path:
    """Copy the embedded model's folder, with other tensors in one part."""
    shutil.copytree(EMOJI, to)
    (file,) = (to / part).glob("*.safetensors")
    file.unlink()
    if suffix == ".safetensors":
        save_file(tensors, file, {"format": "pt"})
    else:
        name = {"model.safetensors": "pytorch_model"}.get(file.name, file.stem)
        torch.save(tensors, file.with_name(name + suffix))
    return to


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    """Make a small VAE with attention in its middle block, as Stable Diffusion's has."""
    torch.manual_seed(0)
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    made = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, layers_per_block=2, **types)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def whole(vae: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """Make a folder of configs, and the tensors of a complete checkpoint for them in the original layout."""
    configs = shutil.copytree(EMOJI, tmp_path_factory.mktemp("whole") / "model")
    shutil.rmtree(configs / "vae")
    vae.save_pretrained(configs / "vae")
    (configs / "unet" / "config.json").write_text(json.dumps(WITHOUT_POOLED))
    unet = {key: tensor for key, tensor in weights_of("unet").items() if not key.startswith("add_embedding.")}
    tensors = original_layout.vae(vae.state_dict())
    tensors |= original_layout.unet(unet, layers_per_block=1)
    tensors |= original_layout.clip(weights_of("text_encoder"))
    return configs, {key: tensor.contiguous() for key, tensor in tensors.items()}


def saved(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path)
    return path


class TestFinite:
    @pytest.mark.parametrize("part", LOADERS)
    @pytest.mark.parametrize(
        ("value", "stored"),
        [(float("nan"), torch.float32), (float("inf"), torch.float16), (float("-inf"), torch.bfloat16)],
    )
    @pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
    def test_folders(self, tmp_path: Path, part: str, value: float, stored: torch.dtype, suffix: str) -> None:
        tensors = {key: tensor.to(stored) for key, tensor in weights_of(part).items()}
        name = next(key for key in tensors if key.endswith(TENSORS[part].removeprefix("text_model.")))
        tensors[name].view(-1)[-1] = value
        where = folder_with(tmp_path / "m", part, tensors, suffix)
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(SourceError, match=f"' is damaged: its {name} is not finite; download it again\\.$"):
                LOADERS[part](where, dtype=dtype)

    @pytest.mark.parametrize(
        ("load", "key"),
        [
            (load_vae, "first_stage_model.decoder.mid.attn_1.q.weight"),
            (load_unet, "model.diffusion_model.out.2.bias"),
            (load_text, "cond_stage_model.transformer.text_model.final_layer_norm.weight"),
        ],
    )
    def test_single_files(
        self, whole: tuple[Path, Tensors], tmp_path: Path, load: Callable[..., Any], key: str
    ) -> None:
        configs, tensors = whole
        broken = tensors[key].float().clone()
        broken.view(-1)[0] = float("nan")
        file = saved(tmp_path / "m.safetensors", tensors | {key: broken})
        with pytest.raises(SourceError, match=f"m.safetensors' is damaged: its {key} is not finite"):
            load(file, config=configs)
        others = {load_vae, load_unet, load_text} - {load}
        for other in others:
            other(file, config=configs)  # the requested part is complete

    def test_a_weight_beyond_float16(self, tmp_path: Path) -> None:
        tensors = {key: tensor.float() for key, tensor in weights_of("unet").items()}
        tensors["conv_out.bias"][0] = 1e5
        where = folder_with(tmp_path / "m", "unet", tensors)
        assert load_unet(where, dtype=torch.float32).conv_out.bias[0] == 1e5
        with pytest.raises(SourceError, match=r"has weights that are too large for float16; take dtype 'fp32'\.$"):
            load_unet(where, dtype=torch.float16)

    def test_a_vae_beyond_float16(self, tmp_path: Path) -> None:
        tensors = {key: tensor.float() for key, tensor in weights_of("vae").items()}
        tensors["decoder.conv_out.bias"][0] = 1e5
        where = folder_with(tmp_path / "m", "vae", tensors)
        with pytest.raises(SourceError, match=r"has weights that are too large for torch.float16; take dtype 'fp32'"):
            sdkit.VAE.from_pretrained(where, dtype="fp16", device="cpu")

    def test_lpips(self, tmp_path: Path) -> None:
        tensors = {key.replace("alex.", "features."): t for key, t in LPIPS().state_dict().items() if "alex" in key}
        tensors |= {f"lin{i}.weight": head for i, head in enumerate(LPIPS().heads)}
        tensors["features.3.bias"][0] = float("nan")
        with pytest.raises(SourceError, match=r"is damaged: its features.3.bias is not finite"):
            LPIPS.from_pretrained(saved(tmp_path / "l.safetensors", tensors))


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
    @pytest.mark.parametrize("part", LOADERS)
    def test_no_floats(self, tmp_path: Path, part: str, dtype: torch.dtype) -> None:
        name, tensor = next(iter(weights_of(part).items()))
        where = folder_with(tmp_path / "m", part, weights_of(part) | {name: tensor.to(dtype)})
        told = f"stores {name} as .*; give the model with weights in float32, float16, bfloat16, or float8"
        with pytest.raises(SourceError, match=told):
            LOADERS[part](where)

    def test_no_floats_in_a_single_file(self, whole: tuple[Path, Tensors], tmp_path: Path) -> None:
        configs, tensors = whole
        key = "model.diffusion_model.out.2.weight"
        file = saved(tmp_path / "m.safetensors", tensors | {key: tensors[key].to(torch.int8)})
        with pytest.raises(SourceError, match=f"stores {key} as I8; "):
            load_unet(file, config=configs)

    @pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
    def test_other_floats_are_cast(self, whole: tuple[Path, Tensors], tmp_path: Path, stored: torch.dtype) -> None:
        configs, tensors = whole
        cast = {key: t.to(stored) if t.is_floating_point() else t for key, t in tensors.items()}
        file = saved(tmp_path / "m.safetensors", cast)
        loaded = load_unet(file, config=configs)
        wanted = tensors["model.diffusion_model.out.2.weight"].to(stored).float()
        assert torch.equal(loaded.conv_out.weight, wanted)
        assert describe(file, config=configs).components[1].dtype == str(stored).removeprefix("torch.")
        inside = folder_with(tmp_path / "m", "unet", {key: t.to(stored) for key, t in weights_of("unet").items()})
        assert torch.equal(load_unet(inside).conv_out.weight, wanted)

    def test_a_tensor_that_claims_more_than_it_holds(self, tmp_path: Path) -> None:
        torch.save({"decoder.conv_in.weight": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "a.ckpt")
        with pytest.raises(SourceError, match="is damaged: its tensors are larger than the file"):
            load_vae(tmp_path / "a.ckpt")

    def test_a_tensor_of_more_axes_than_torch_has(self, tmp_path: Path) -> None:
        tensor = torch.ones(1)
        file = saved(tmp_path / "m.safetensors", {"decoder.conv_in.weight": tensor})
        data = file.read_bytes()
        header = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b"[1]", str([1] * 65).encode())
        file.write_bytes(len(header).to_bytes(8, "little") + header + data[-4:])
        with pytest.raises(
            SourceError, match=r"m\.safetensors' is damaged: its decoder\.conv_in\.weight has over 8 axes"
        ):
            open_tensors(file)


class TestKinds:
    @pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "M.SAFETENSORS", "m.bin", "m"])
    def test_safetensors_under_any_name(self, whole: tuple[Path, Tensors], tmp_path: Path, name: str) -> None:
        configs, tensors = whole
        found = load_vae(saved(tmp_path / name, tensors), config=configs)
        assert torch.equal(found.encoder.conv_in.weight, tensors["first_stage_model.encoder.conv_in.weight"])

    @pytest.mark.parametrize("name", ["m.safetensors", "M.CKPT", "m"])
    @pytest.mark.parametrize("legacy", [False, True])
    def test_pickles_under_any_name(self, whole: tuple[Path, Tensors], tmp_path: Path, name: str, legacy: bool) -> None:
        configs, tensors = whole
        torch.save({"state_dict": tensors}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
        found = load_vae(tmp_path / name, config=configs)
        assert torch.equal(found.encoder.conv_in.weight, tensors["first_stage_model.encoder.conv_in.weight"])

    @pytest.mark.parametrize("key", ["model", "module", "params"])
    def test_the_one_dict_inside_a_pickle(self, tmp_path: Path, key: str) -> None:
        torch.save({key: {"a": torch.ones(2)}, "epoch": 3, "config": {"x": 1}}, tmp_path / "m.pt")
        assert open_tensors(tmp_path / "m.pt").shapes == {"a": (2,)}

    def test_two_dicts_inside_a_pickle(self, tmp_path: Path) -> None:
        torch.save({"ema": {"a": torch.ones(2)}, "raw": {"a": torch.ones(2)}}, tmp_path / "m.pt")
        with pytest.raises(SourceError, match=r"holds tensors under 'ema' and 'raw'; give a file with one of them"):
            open_tensors(tmp_path / "m.pt")

    @pytest.mark.parametrize(
        ("content", "told"),
        [
            (b"", "is empty; download it again"),
            (b"  <!DOCTYPE html><html>", "is a web page .HTML., not the weights; the site may want a log-in"),
            (b"<HTML><head>", "is a web page"),
            (b'{"error": "Invalid credentials"}', "is JSON text, not the weights"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the weights; fetch them"),
            (b"GGUF\x03\0\0\0", "is a GGUF file, quantized for other programs"),
            (b"\x1f\x8b\x08\0", "is a gzip archive, not the weights; unpack it"),
            (b"\x89PNG\r\n\x1a\n", "is a PNG image, not the weights"),
            (b"PK\x05\x06" + b"\0" * 18, "is damaged|holds no"),
        ],
    )
    @pytest.mark.parametrize("name", ["m.safetensors", "m.ckpt", "m.PT"])
    @pytest.mark.parametrize("read", [load_vae, read_lora, LPIPS.from_pretrained])
    def test_other_content(
        self, tmp_path: Path, content: bytes, told: str, name: str, read: Callable[..., Any]
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=told) as caught:
            read(tmp_path / name)
        assert str(caught.value).endswith(".")

    def test_a_zip_of_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.txt").write_text("x")
        shutil.make_archive(str(tmp_path / "m"), "zip", tmp_path / "in")
        (tmp_path / "m.zip").rename(tmp_path / "m.ckpt")
        with pytest.raises(SourceError, match="is a zip archive, not the weights; unpack it"):
            load_vae(tmp_path / "m.ckpt")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_a_pickle_that_is_cut(self, tmp_path: Path, legacy: bool) -> None:
        whole = tmp_path / "whole.ckpt"
        torch.save({"a": torch.ones(1000)}, whole, _use_new_zipfile_serialization=not legacy)
        (tmp_path / "cut.ckpt").write_bytes(whole.read_bytes()[:-500])
        with pytest.raises(SourceError, match=r"cut.ckpt' is (damaged|a damaged pickle)"):
            open_tensors(tmp_path / "cut.ckpt")

    @pytest.mark.parametrize(
        "content",
        [
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 768)}, "name": "zork"},
            {"emb_params": torch.ones(2, 768)},
            {"<zork>": torch.ones(768)},
        ],
    )
    def test_textual_inversion_given_as_a_model(self, tmp_path: Path, content: dict[str, Any]) -> None:
        torch.save(content, tmp_path / "zork.pt")
        with pytest.raises(SourceError, match="looks like a textual inversion embedding"):
            load_unet(tmp_path / "zork.pt")


class TestNothingIsDropped:
    @pytest.mark.parametrize(
        ("load", "key"),
        [
            (load_unet, "model.diffusion_model.time_embed.cond_proj.weight"),
            (load_unet, "model.diffusion_model.input_blocks.1.2.temporal_transformer.norm.weight"),
            (load_unet, "model.diffusion_model.out.2.scale_weight"),
            (load_vae, "first_stage_model.decoder.extra.weight"),
            (load_text, "cond_stage_model.extra.weight"),
            (load_text, "cond_stage_model.transformer.text_model.encoder.layers.0.extra.weight"),
        ],
    )
    def test_a_tensor_without_a_place(
        self, whole: tuple[Path, Tensors], tmp_path: Path, load: Callable[..., Any], key: str
    ) -> None:
        configs, tensors = whole
        file = saved(tmp_path / "m.safetensors", tensors | {key: torch.ones(4, 4)})
        ending = key.rpartition("text_model.")[2]
        with pytest.raises(SourceError, match=f"{ending} is not part of that network"):
            load(file, config=configs)

    def test_what_is_known_is_passed_over(self, whole: tuple[Path, Tensors], tmp_path: Path) -> None:
        configs, tensors = whole
        names = (
            "model_ema.diffusion_modelout2bias",
            "alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "first_stage_model.loss.logvar",
            "cond_stage_model.logit_scale",
            "cond_stage_model.transformer.text_model.embeddings.position_ids",
            "embedding_manager.string_to_param_dict.*",
            "bundle_emb.zork.string_to_param.*",
        )
        file = saved(tmp_path / "m.safetensors", tensors | {name: torch.ones(1) for name in names})
        for load in LOADERS.values():
            load(file, config=configs)

    def test_what_is_in_no_part_is_told(self, whole: tuple[Path, Tensors], tmp_path: Path) -> None:
        configs, tensors = whole
        file = saved(tmp_path / "m.safetensors", tensors | {"adapter.x": torch.ones(1), "adapter.y": torch.ones(1)})
        with pytest.warns(UserWarning, match=r"also holds adapter.x and 1 more tensors, which is no part of the model"):
            load_vae(file, config=configs)

    def test_a_guidance_input(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(WITHOUT_POOLED | {"time_cond_proj_dim": 32})
        unet.save_pretrained(tmp_path / "m" / "unet")
        state = dict(unet.state_dict())
        guidance = {"model.diffusion_model.time_embed.cond_proj.weight": state.pop("time_embedding.cond_proj.weight")}
        file = saved(tmp_path / "lcm.safetensors", original_layout.unet(state, layers_per_block=1) | guidance)
        loaded = load_unet(file, config=tmp_path / "m")
        assert all(torch.equal(t, unet.state_dict()[key]) for key, t in loaded.state_dict().items())


@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        {},
        {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
        {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
    ],
)
def test_names_of_a_vaes_attention(
    vae: AutoencoderKL, whole: tuple[Path, Tensors], tmp_path: Path, names: dict[str, str], conv: bool
) -> None:
    tensors = {}
    for key, tensor in original_layout.vae(vae.state_dict(), prefix="").items():
        head, middle, name = key.partition(".mid.attn_1.")
        layer, _, kind = name.rpartition(".")
        flat = tensor if conv or tensor.ndim < 4 or not middle else tensor[:, :, 0, 0]
        tensors[f"{head}{middle}{names.get(layer, layer)}.{kind}" if middle else key] = flat.contiguous()
    loaded = load_vae(saved(tmp_path / "vae.safetensors", tensors), config=whole[0])
    assert loaded.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(t, vae.state_dict()[key]) for key, t in loaded.state_dict().items())


def configured(to: Path, name: str, **values: Any) -> Path:
    shutil.copytree(EMOJI, to)
    (to / name).write_text(json.dumps(json.loads((to / name).read_text()) | values))
    return to


class TestConfigs:
    @pytest.mark.parametrize(
        ("part", "key", "value"),
        [
            ("vae", "layers_per_block", 10**9),
            ("vae", "block_out_channels", [32] * 10**6),
            ("vae", "block_out_channels", [32, 64, 128, -128]),
            ("vae", "latent_channels", 10**9),
            ("vae", "latent_channels", "4"),
            ("vae", "norm_num_groups", 0),
            ("vae", "norm_num_groups", float("nan")),
            ("vae", "down_block_types", 4),
            ("vae", "force_upcast", float("nan")),
            ("unet", "layers_per_block", 10**9),
            ("unet", "layers_per_block", [1, 1, 10**9]),
            ("unet", "transformer_layers_per_block", 10**9),
            ("unet", "transformer_layers_per_block", [[1], [10**9], [1]]),
            ("unet", "attention_head_dim", [4, 4, float("inf")]),
            ("unet", "in_channels", float("nan")),
            ("unet", "cross_attention_dim", 10**9),
            ("unet", "conv_in_kernel", 10**9),
            ("unet", "addition_embed_type_num_heads", None),
            ("text_encoder", "num_hidden_layers", 10**9),
            ("text_encoder", "hidden_size", float("nan")),
            ("text_encoder", "vocab_size", -1),
            ("text_encoder", "num_attention_heads", 0),
            ("text_encoder", "text_config", {"num_hidden_layers": 10**9}),
        ],
    )
    def test_sizes_are_bounded(self, tmp_path: Path, part: str, key: str, value: Any) -> None:
        where = configured(tmp_path / "m", f"{part}/config.json", **{key: value})
        with pytest.raises(SourceError, match=r"config.json' has (?s:.*); correct it\.$"):
            LOADERS[part](where)

    @pytest.mark.parametrize(
        ("part", "values"),
        [
            ("vae", {"layers_per_block": 900}),
            ("unet", {"layers_per_block": 300}),
            ("unet", {"layers_per_block": 100, "transformer_layers_per_block": 100}),
            ("text_encoder", {"num_hidden_layers": 900}),
        ],
    )
    def test_no_more_layers_than_weights(self, tmp_path: Path, part: str, values: dict[str, int]) -> None:
        where = configured(tmp_path / "m", f"{part}/config.json", **values)
        with pytest.raises(SourceError, match=r"config.json' asks for [\d,]+ layers.*; correct it\.$"):
            LOADERS[part](where)

    def test_from_scratch(self, tmp_path: Path) -> None:
        deep = configured(tmp_path / "a", "unet/config.json", layers_per_block=900)
        with pytest.raises(SourceError, match=r"asks for 2,700 layers; sdkit builds 1,000 at most"):
            new_network(deep, "unet")
        wide = configured(tmp_path / "b", "unet/config.json", block_out_channels=[160_000] * 3)
        with pytest.raises(SourceError, match=r"asks for [\d,]+ parameters, sdkit builds at most 10,000,000,000"):
            new_network(wide, "unet")

    @pytest.mark.parametrize(
        ("name", "key"),
        [
            ("vae/config.json", "latent_channels"),
            ("unet/config.json", "in_channels"),
            ("text_encoder/config.json", "hidden_size"),
            ("scheduler/scheduler_config.json", "prediction_type"),
        ],
    )
    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_info_of_a_value_that_is_no_number(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, key: str, value: float
    ) -> None:
        where = configured(tmp_path / "m", name, **{key: value})
        assert main(["info", str(where), "--json"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert key in err
        assert err.endswith("correct it.\n")
