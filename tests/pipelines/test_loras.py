"""Several LoRAs in a pipeline, each with a scale: compared with diffusers' `set_adapters`, changed, and taken out."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdkit
from sdkit.errors import ArgumentError, SourceError
from sdkit.loading.lora_file import convert_lora, read_lora, save_lora
from sdkit.networks.lora import add_lora, lora_tensors
from sdkit.pipelines.generation import Generation
from tests.helpers.networks import diffusers_pipeline, sd_shaped

pytest.importorskip("peft")

Make = Callable[[], sdkit.StableDiffusion]
COMMON = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
EVERYWHERE = ("attention", "feed_forward", "convolutions")


def drawn(model: sdkit.StableDiffusion) -> Tensor:
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z: Tensor = model(latents=x_T, guidance_scale=2.0, **COMMON)
    return z


@torch.no_grad()
def theirs(model: sdkit.StableDiffusion, scheduler: Any, load: Callable[[Any], object]) -> Tensor:
    """Draw with diffusers' pipeline, after `load` has loaded LoRAs into it."""
    pipe = diffusers_pipeline(model, scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of a second adapter
        load(pipe)
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z: Tensor = pipe(latents=x_T, guidance_scale=2.0, **COMMON).images
    return z


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def weights(model: sdkit.StableDiffusion) -> dict[str, Tensor]:
    networks = {"unet": model.unet.network, "text": model.text.network}
    return {f"{part}.{key}": x.clone() for part, net in networks.items() for key, x in net.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[key], expected[key]) for key in expected)


def trained(model: sdkit.StableDiffusion, seed: int, **options: Any) -> sdkit.StableDiffusion:
    """Add LoRA layers as after training to a model."""
    torch.manual_seed(seed)
    for network in (model.unet.network, model.text.network):
        add_lora(network, 4, **options)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    return model


@pytest.fixture(scope="module")
def base(sd: sdkit.StableDiffusion) -> tuple[sdkit.StableDiffusion, Any]:
    return sd_shaped(sd.text)


@pytest.fixture
def model(base: tuple[sdkit.StableDiffusion, Any]) -> sdkit.StableDiffusion:
    return copy.deepcopy(base[0])


@pytest.fixture(scope="module")
def files(base: tuple[sdkit.StableDiffusion, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs: of the attention in kohya's layout, and of all layers in diffusers', with alpha / sqrt(rank)."""
    folder = tmp_path_factory.mktemp("loras")
    first, second = (copy.deepcopy(base[0]) for _ in range(2))
    trained(first, 1)
    tensors = lora_tensors(first.unet.network, first.text.network)
    save_lora(tensors, folder / "first.safetensors", "kohya", alpha=3)
    trained(second, 2, alpha=1.5, rslora=True, targets=EVERYWHERE)
    tensors = lora_tensors(second.unet.network, second.text.network)
    save_lora(tensors, folder / "second.safetensors", alpha=1.5, rslora=True)
    return {name: folder / f"{name}.safetensors" for name in ("first", "second")}


class TestSeveral:
    def test_two_equal_diffusers(
        self, base: tuple[sdkit.StableDiffusion, Any], model: sdkit.StableDiffusion, files: dict[str, Path]
    ) -> None:
        def load(pipe: Any) -> None:
            for name, file in files.items():
                pipe.load_lora_weights(file, adapter_name=name)
            pipe.set_adapters([*files], [0.7, -0.4])

        expected = theirs(copy.deepcopy(base[0]), base[1], load)
        for (name, file), scale in zip(files.items(), (0.7, -0.4), strict=True):
            assert model.load_lora(file, scale) == name
        close(drawn(model), expected)
        assert (expected - drawn(base[0])).abs().max() > 0.05
        model.unload_lora("first")
        close(drawn(model), theirs(copy.deepcopy(base[0]), base[1], self._only(files["second"], -0.4)))

    @staticmethod
    def _only(file: Path, scale: float) -> Callable[[Any], object]:
        def load(pipe: Any) -> None:
            pipe.load_lora_weights(file, adapter_name="one")
            pipe.set_adapters(["one"], [scale])

        return load

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_scales_change_and_unloading_restores_all_to_the_bit(
        self, model: sdkit.StableDiffusion, files: dict[str, Path], dtype: torch.dtype
    ) -> None:
        model.unet.to(dtype=dtype)
        model.text.to(dtype=dtype)
        before, image = weights(model), drawn(model)
        twin = copy.deepcopy(model)
        model.load_lora(files["first"], 1.5)
        model.load_lora(files["second"], 0.3)
        twin.load_lora(files["first"], 0.5, name="first")
        twin.load_lora(files["second"], -1.0, name="second")
        model.set_lora_scales({"second": -1.0, "first": 0.5})
        assert model.lora_scales == twin.lora_scales == {"first": 0.5, "second": -1.0}
        assert same(weights(model), weights(twin))
        assert not same(weights(model), before)
        model.set_lora_scales({"first": 0, "second": 0})
        assert same(weights(model), before)
        model.set_lora_scales({"first": 1})
        model.unload_lora("first")
        model.unload_lora("second")
        twin.unload_lora()
        for one in (model, twin):
            assert same(weights(one), before)
            assert torch.equal(drawn(one), image)
            assert one.lora_scales == {}

    def test_names(self, model: sdkit.StableDiffusion, files: dict[str, Path], tmp_path: Path) -> None:
        lora = read_lora(files["first"])
        names = [model.merge_lora(lora, 0), model.merge_lora(lora, 0), model.load_lora(files["first"], 0, "mine")]
        assert [*names, model.merge_lora(lora, 0)] == ["first", "first-2", "mine", "first-3"] == [*model.lora_scales]
        run = tmp_path / "zork" / "result"
        run.mkdir(parents=True)
        (run / "pytorch_lora_weights.safetensors").symlink_to(files["second"])
        for source in (run, run / "pytorch_lora_weights.safetensors"):
            assert read_lora(source).name == "zork"

    def test_a_copy_has_its_own(self, model: sdkit.StableDiffusion, files: dict[str, Path]) -> None:
        before = weights(model)
        model.load_lora(files["first"])
        other = copy.deepcopy(model)
        other.unload_lora()
        assert same(weights(other), before)
        assert [*model.lora_scales] == ["first"]
        assert not same(weights(model), before)
        other.load_lora(files["second"])
        model.unload_lora()
        assert same(weights(model), before)
        assert [*other.lora_scales] == ["second"]

    def test_a_shallow_copy_is_refused(self, model: sdkit.StableDiffusion) -> None:
        """It would share the weights, which LoRAs change."""
        with pytest.raises(
            ArgumentError, match=r"^a shallow copy of a pipeline would share its weights.*take copy.deep"
        ):
            copy.copy(model)

    def test_two_pipelines_with_the_same_networks(self, model: sdkit.StableDiffusion, files: dict[str, Path]) -> None:
        """One of them can have LoRAs at a time: those of the other would become part of its original weights."""
        before = weights(model)
        other = sdkit.StableDiffusion(model.vae, model.text, model.unet, model.schedule)
        model.load_lora(files["first"])
        loaded = weights(model)
        with pytest.raises(
            ArgumentError, match=r"^another pipeline with the same network has loaded LoRAs into it: unl"
        ):
            other.load_lora(files["second"])
        assert same(weights(model), loaded)
        assert other.lora_scales == {}
        model.unload_lora()
        other.load_lora(files["second"])
        with pytest.raises(ArgumentError, match="another pipeline"):
            model.load_lora(files["first"])
        other.unload_lora()
        assert same(weights(model), before)
        model.load_lora(files["first"])
        assert same(weights(model), loaded)


class TestTrainedFiles:
    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    def test_alpha_rank_stabilised_in_all_layers(
        self, base: tuple[sdkit.StableDiffusion, Any], model: sdkit.StableDiffusion, layout: str, tmp_path: Path
    ) -> None:
        """The live layers of peft, the file in this pipeline, and the file in diffusers' draw the same."""
        live = trained(copy.deepcopy(base[0]), 3, alpha=5, rslora=True, targets=EVERYWHERE, dropout=0.5)
        tensors = lora_tensors(live.unet.network, live.text.network)
        save_lora(tensors, tmp_path / "one.safetensors", layout, alpha=5, rslora=True)
        model.load_lora(tmp_path / "one.safetensors")
        close(drawn(model), drawn(live))
        found = theirs(
            copy.deepcopy(base[0]), base[1], lambda pipe: pipe.load_lora_weights(tmp_path / "one.safetensors")
        )
        close(found, drawn(live))
        # The factor is alpha / sqrt(r) (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732, equation 3).
        B, A = (tensors[f"unet.conv_in.lora_{side}.weight"].flatten(1) for side in "BA")
        before, after = (x.unet.network.conv_in.weight.flatten(1) for x in (base[0], model))
        torch.testing.assert_close(after - before, 5 / 4**0.5 * B @ A, atol=1e-5, rtol=0)
        dropouts = {x.p for x in live.unet.network.modules() if isinstance(x, nn.Dropout) and x.p}
        assert dropouts == {0.5}


class TestDoRA:
    def test_as_diffusers_saves_and_loads_it(
        self,
        base: tuple[sdkit.StableDiffusion, Any],
        model: sdkit.StableDiffusion,
        files: dict[str, Path],
        tmp_path: Path,
    ) -> None:
        """With a LoRA beside it. diffusers adds the change by DoRA that it computes from the original weights, too."""
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import LoraConfig
        from peft.utils import get_peft_model_state_dict

        live = copy.deepcopy(base[0]).unet.network
        live.add_adapter(LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=["to_k", "ff.net.2"]))
        torch.manual_seed(0)
        for name, parameter in live.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.1)
        tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(live))
        StableDiffusionPipeline.save_lora_weights(tmp_path / "dora", unet_lora_layers=tensors)

        def load(pipe: Any) -> None:
            pipe.load_lora_weights(tmp_path / "dora", adapter_name="dora")
            pipe.load_lora_weights(files["first"], adapter_name="first")
            pipe.set_adapters(["dora", "first"], [1.0, 0.5])

        expected = theirs(copy.deepcopy(base[0]), base[1], load)
        before = weights(model)
        model.load_lora(tmp_path / "dora")
        model.load_lora(files["first"], 0.5)
        close(drawn(model), expected)
        model.set_lora_scales({"dora": 0.0})
        model.unload_lora("first")
        assert same(weights(model), before)  # unlike in diffusers, a scale of 0 turns DoRA off
        convert_lora(tmp_path / "dora", tmp_path / "kohya.safetensors")
        model.unload_lora()
        model.load_lora(tmp_path / "kohya.safetensors")
        converted, twin = weights(model), copy.deepcopy(base[0])
        twin.load_lora(tmp_path / "dora")
        assert same(converted, weights(twin))


NO_TEXT: Any = 3
NO_MAPPING: Any = 0.5
LIST: Any = ["one"]
PATH: Any = "one.safetensors"
BAD: dict[str, tuple[Callable[[sdkit.StableDiffusion, Path], object], type[Exception], str]] = {
    "scale not finite": (lambda m, f: m.load_lora(f, float("nan")), ArgumentError, r"^scale must be a finite number"),
    "a path to merge": (lambda m, f: m.merge_lora(PATH), ArgumentError, r"^merge_lora takes a LoRA as read_lora re"),
    "name taken": (lambda m, f: m.load_lora(f, 1, "one"), ArgumentError, r"^a LoRA named 'one' is loaded already"),
    "name of no text": (lambda m, f: m.load_lora(f, 1, NO_TEXT), ArgumentError, r"^the name of a LoRA must be text"),
    "empty name": (lambda m, f: m.load_lora(f, 1, ""), ArgumentError, r"^the name of a LoRA must be text, not ''\.$"),
    "unknown name": (
        lambda m, f: m.set_lora_scales({"two": 1}), ArgumentError, r"^no LoRA named 'two' is loaded; loaded: one\.$"
    ),
    "no mapping": (
        lambda m, f: m.set_lora_scales(NO_MAPPING), ArgumentError, r"^scales must be a dict of names and numbers"
    ),
    "new scale not finite": (
        lambda m, f: m.set_lora_scales({"one": float("inf")}), ArgumentError, r"^scale must be a finite number, not inf"
    ),
    "unload what is not loaded": (lambda m, f: m.unload_lora("two"), ArgumentError, r"^no LoRA named 'two' is loaded"),
    "new scale overflows": (
        lambda m, f: m.set_lora_scales({"one": 1e39}), SourceError, r"at scale 1e\+39 would make \w+ infinite; give a"
    ),
    "unload a list": (
        lambda m, f: m.unload_lora(LIST), ArgumentError, r"^no LoRA named \['one'\] is loaded; loaded: one\.$"
    ),
    "unload twice": (
        lambda m, f: [m.unload_lora(), m.unload_lora()], ArgumentError, r"^no LoRA is loaded, so there is none to take"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model: sdkit.StableDiffusion, files: dict[str, Path], case: str) -> None:
    """Each is one sentence, and changes no weight; two calls change what the first of them changes."""
    call, error, message = BAD[case]
    before = weights(model)
    model.load_lora(files["first"], 0.5, "one")
    loaded = weights(model)
    with pytest.raises(error, match=message):
        call(model, files["second"])
    assert same(weights(model), before if case == "unload twice" else loaded)


def test_the_second_of_another_width_changes_nothing(
    model: sdkit.StableDiffusion, files: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(files["second"])
    tensors["unet.conv_in.lora_B.weight"] = torch.ones(7, 4, 1, 1)
    save_file(tensors, tmp_path / "wide.safetensors")
    model.load_lora(files["first"])
    before = weights(model)
    with pytest.raises(SourceError, match=r"for another model: its conv_in is 7 x 36, where this one's is 32 x 36"):
        model.load_lora(tmp_path / "wide.safetensors")
    assert same(weights(model), before)
    assert [*model.lora_scales] == ["first"]


@pytest.mark.parametrize("change", ["load", "unload"])
def test_an_interrupted_change_changes_nothing(
    model: sdkit.StableDiffusion, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    before = weights(model)
    model.load_lora(files["first"])
    loaded, copy_, left = weights(model), Tensor.copy_, [3]

    def interrupted(self: Tensor, *args: Any) -> Tensor:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return copy_(self, *args)

    call = model.unload_lora if change == "unload" else partial(model.load_lora, files["second"])
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert same(weights(model), loaded)
    assert [*model.lora_scales] == ["first"]
    model.unload_lora()
    assert same(weights(model), before)


def test_a_png_knows_a_lora_by_its_hash(files: dict[str, Path], tmp_path: Path) -> None:
    """`--from` refuses a LoRA that has changed, until it is given anew."""
    lora = tmp_path / "zork.safetensors"
    lora.write_bytes(files["first"].read_bytes())
    given = Generation(prompt="a cat", lora=(str(lora), str(files["second"])), lora_scale=(0.5, 1.0))
    loras, settings = given.loras()
    assert [(one.name, scale) for one, scale in loras] == [("zork", 0.5), ("second", 1.0)]
    expected = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in (lora, files["second"]))
    assert settings.lora_sha256 == expected
    sdkit.images.save(Image.new("RGB", (8, 8)), tmp_path / "one.png", settings.text())
    read = Generation.read(tmp_path / "one.png")
    assert read == settings
    assert read.loras()[1] == settings
    lora.write_bytes(files["second"].read_bytes())
    sentence = r"zork\.safetensors' has changed since it was drawn with; restore it, or give it anew as lora to draw"
    for again in (read, read.but(lora_scale=(1.0, 1.0)), read.but(prompt="a dog")):
        with pytest.raises(SourceError, match=sentence):
            again.loras()
    assert read.but(lora=(str(lora),)).loras()[1].lora_sha256 == expected[1:]
    assert read.but(model="other").lora_sha256 == ()
    text = {key: value for key, value in settings.text().items() if key != "lora_sha256"}  # of an earlier version
    sdkit.images.save(Image.new("RGB", (8, 8)), tmp_path / "old.png", text)
    assert Generation.read(tmp_path / "old.png").loras()[1].lora_sha256 == (expected[1], expected[1])
