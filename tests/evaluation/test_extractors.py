from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, Dinov2Model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sdkit.errors import ArgumentError, ImageError, SdkitError, SourceError
from sdkit.evaluation import extractors as module
from sdkit.evaluation.extractors import DOWNLOADED, VARIABLE, Extractor, open_extractor
from sdkit.evaluation.inception import Inception
from sdkit.images import to_tensors
from sdkit.networks.clip import CLIP
from sdkit.recipes.emoji.asked import Prompt
from sdkit.recipes.emoji.pictures import BACKGROUNDS, STYLES, composed, pictures
from sdkit.recipes.emoji.small import small_pictures
from tests.helpers.clip import save_clip, save_dinov2
from tests.helpers.real_images import crops
from tests.helpers.sentences import one_sentence


@pytest.fixture(scope="module")
def alex() -> Extractor:
    return open_extractor("alex", device="cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"))


class TestAlex:
    def test_features_are_pooled_activations(self, alex: Extractor, astronaut: Image.Image) -> None:
        # Collect the activations with hooks; normalise, weight, and average them in NumPy.
        network, maps = alex.network, list[Tensor]()
        layers = [module for module in network.modules() if isinstance(module, nn.ReLU)]
        hooks = [layer.register_forward_hook(lambda _, __, output: maps.append(output.clone())) for layer in layers]
        found = alex(astronaut)[0].double().numpy()
        for hook in hooks:
            hook.remove()
        expected = []
        for activations, head in zip(maps, network.heads, strict=True):
            x = activations[0].double().numpy()
            unit = x / (np.sqrt((x**2).sum(axis=0)) + 1e-10)
            expected.append(unit.mean(axis=(1, 2)) * np.sqrt(head.detach().double().numpy().ravel()))
        np.testing.assert_allclose(found, np.concatenate(expected) * math.sqrt(1152), atol=1e-4)

    def test_says_what_it_is(self, alex: Extractor, astronaut: Image.Image) -> None:
        assert (alex.name, alex.kind, alex.width, alex.side) == ("alex", "alex", 1152, 224)
        assert alex.resizing == "224 x 224 pixels, antialiased bicubic, aspect ratio not kept"
        assert alex(astronaut).shape == (1, 1152)
        assert alex(astronaut).dtype == torch.float32
        assert not any(p.requires_grad for p in alex.network.parameters())

    def test_all_kinds_of_images_are_the_same_to_it(self, alex: Extractor) -> None:
        images = crops(3, seed=0)
        expected = alex(images)
        for others in (torch.stack(to_tensors(images)), np.stack([np.asarray(image) for image in images])):
            assert torch.equal(alex(others), expected)
        one_by_one = torch.cat([alex(image) for image in images])
        torch.testing.assert_close(one_by_one, expected, rtol=0, atol=1e-4)

    def test_many_images_are_taken_in_batches(self, alex: Extractor, monkeypatch: pytest.MonkeyPatch) -> None:
        images = crops(5, seed=0)
        expected = alex(images)
        monkeypatch.setattr(module, "AT_ONCE", 2)
        torch.testing.assert_close(alex(images), expected, rtol=0, atol=1e-4)


class TestResizing:
    def test_equal_to_torchs_antialiased_bicubic(self, alex: Extractor, coffee: Image.Image) -> None:
        for size in ((600, 400), (100, 70), (224, 224)):
            # The bicubic filter overshoots at edges, and Pillow clips after each of its two passes: leave it room.
            small = coffee.resize(size).point(lambda level: 64 + level // 2)
            x = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)[None].double()
            expected = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
            difference = (alex.prepare(small)[None] - expected).abs()
            assert difference.max() <= 1.3  # Pillow rounds to 8 bits after each pass, too
            assert difference.mean() <= 0.4

    def test_a_pattern_finer_than_the_result_is_averaged(self, alex: Extractor) -> None:
        # Without antialiasing, a checkerboard of single pixels would alias to a coarse pattern.
        y, x = np.mgrid[0:896, 0:896]
        board = Image.fromarray(((x + y) % 2 * 255).astype(np.uint8))
        levels = alex.prepare(board).float()
        assert (levels - 127.5).abs().max() <= 1

    def test_clip_crops_as_transformers_do(self, clip_folder: Path, chelsea: Image.Image, coffee: Image.Image) -> None:
        clip = open_extractor(f"clip:{clip_folder}", device="cpu")
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        processor = CLIPImageProcessorPil(**sizes, do_rescale=False, do_normalize=False)
        for image in (chelsea, coffee, coffee.rotate(90, expand=True), coffee.resize((20, 30))):
            expected = processor(image, return_tensors="pt").pixel_values[0]
            assert torch.equal(clip.prepare(image), expected.to(torch.uint8))
        assert clip.resizing == (
            "32 x 32 pixels, antialiased bicubic, shorter side resized, then cropped at the centre"
        )


class TestTransformers:
    def test_clip_equals_transformers(self, clip_folder: Path, chelsea: Image.Image) -> None:
        clip = open_extractor(f"clip:{clip_folder}", device="cpu")
        network = CLIPModel.from_pretrained(clip_folder).eval()
        sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
        pixels = CLIPImageProcessorPil(**sizes)(chelsea, return_tensors="pt").pixel_values
        texts = ["a cat", "a birthday cake on a pink background"]
        tokens = clip.text.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            both = network(pixel_values=pixels, **tokens)
        # transformers return normalised embeddings here.
        torch.testing.assert_close(F.normalize(clip(chelsea)), both.image_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(F.normalize(clip.embed_texts(texts)), both.text_embeds, rtol=0, atol=1e-5)
        assert (clip.name, clip.kind, clip.width) == (f"clip:{clip_folder}", "clip", 24)

    def test_a_long_text_is_cut_as_clip_does(self, clip_folder: Path) -> None:
        clip = open_extractor(f"clip:{clip_folder}", device="cpu")
        with pytest.warns(UserWarning, match="has 400 tokens, and this CLIP reads 30"):
            embedded = clip.embed_texts(["a cat " * 200, "a cat " * 100])
        assert torch.equal(embedded[0], embedded[1])

    def test_dinov2_equals_transformers(self, dinov2_folder: Path, chelsea: Image.Image) -> None:
        dinov2 = open_extractor(f"dinov2:{dinov2_folder}", device="cpu")
        network = Dinov2Model.from_pretrained(dinov2_folder).eval()
        levels = np.asarray(chelsea.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        x = (levels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            states = network(torch.from_numpy(x).float().permute(2, 0, 1)[None]).last_hidden_state
        torch.testing.assert_close(dinov2(chelsea), states[:, 0], rtol=0, atol=1e-5)
        assert (dinov2.kind, dinov2.width, dinov2.side) == ("dinov2", 24, 224)


def known_weights() -> dict[str, Tensor]:
    """Make weights of Inception by a formula, such that the signal keeps its scale through all layers."""
    shapes = {key: value.shape for key, value in Inception().state_dict().items() if "num_batches" not in key}
    weights = {}
    for k, (name, shape) in enumerate(sorted(shapes.items())):
        wave = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * (1.0 + 0.37 * (k % 17)) + k).view(shape)
        if name.endswith("running_var"):
            values = 1 + 0.5 * wave
        elif name.endswith("bn.weight"):
            values = 1 + 0.3 * wave
        elif len(shape) == 4:
            values = wave * math.sqrt(6 / math.prod(shape[1:]))
        else:
            values = 0.1 * wave
        weights[name] = values.float()
    return weights


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return known_weights()


@pytest.fixture(scope="module")
def inception_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "model.safetensors"
    safetensors.torch.save_file(weights, path)
    return path


class TestInception:
    def test_features_and_logits_equal_pytorch_fids(self, weights: dict[str, Tensor], inception_file: Path) -> None:
        # The numbers were computed by pytorch-fid 0.3.0 with torchvision 0.28, with these weights and this image.
        inception = open_extractor(f"inception:{inception_file}", device="cpu")
        i = torch.arange(2 * 3 * 299 * 299, dtype=torch.float64)
        x = (torch.sin(i * 0.01) * torch.cos(i * 0.0003)).view(2, 3, 299, 299).float()
        with torch.no_grad():
            features, logits = inception.network(x)
        np.testing.assert_allclose(features[0, :5], [0, 0, 0.2282, 0, 0.01446], atol=2e-5)
        np.testing.assert_allclose(features[1, -5:], [0, 7e-5, 0, 0.02384, 0], atol=2e-5)
        assert float(features.double().sum()) == pytest.approx(258.97924, rel=1e-5)
        assert float(logits.double().sum()) == pytest.approx(-0.52155, abs=1e-4)
        assert logits.shape == (2, 1008)
        torch.testing.assert_close(logits, features @ weights["fc.weight"].T)

    def test_layout(self) -> None:
        # 23,850,960 is torchvision's count without the auxiliary classifier, with 1008 classes in place of 1000.
        network = Inception()
        assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
        assert shapes["Mixed_6b.branch7x7dbl_2.conv.weight"] == (128, 128, 7, 1)
        assert shapes["Mixed_7c.branch3x3dbl_3b.bn.weight"] == (384,)
        assert shapes["fc.weight"] == (1008, 2048)

    def test_pixels_are_scaled_as_in_tensorflows_graph(self, inception_file: Path, chelsea: Image.Image) -> None:
        inception = open_extractor(f"inception:{inception_file}", device="cpu")
        assert (inception.kind, inception.width, inception.side) == ("inception", 2048, 299)
        levels = np.asarray(chelsea.resize((299, 299), Image.Resampling.BICUBIC), dtype=np.float32)
        with torch.no_grad():
            expected, _ = inception.network(torch.from_numpy((levels - 128) / 128).permute(2, 0, 1)[None])
        torch.testing.assert_close(inception(chelsea), expected, rtol=0, atol=1e-5)

    def test_weights_are_found_in_every_place(
        self,
        weights: dict[str, Tensor],
        inception_file: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        chelsea: Image.Image,
    ) -> None:
        expected = open_extractor(f"inception:{inception_file}", device="cpu")(chelsea)
        pickled = tmp_path / "hub" / "checkpoints" / DOWNLOADED[1]  # as torch-fidelity and pytorch-fid leave them
        pickled.parent.mkdir(parents=True)
        ignored = {"AuxLogits.fc.weight": torch.zeros(2), "Mixed_6a.branch3x3.bn.num_batches_tracked": torch.tensor(0)}
        torch.save(weights | ignored, pickled)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.delenv(VARIABLE, raising=False)
        assert torch.equal(open_extractor("inception", device="cpu")(chelsea), expected)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
        monkeypatch.setenv(VARIABLE, str(inception_file.parent))
        assert torch.equal(open_extractor("inception", device="cpu")(chelsea), expected)


class TestTheEmbeddedClip:
    def test_says_what_it_is(self) -> None:
        clip = open_extractor("clip:emoji", device="cpu")
        assert (clip.name, clip.kind, clip.width, clip.side) == ("clip:emoji", "clip", 128, 64)
        assert CLIP.from_pretrained("emoji", device="cpu").side == 64

    def test_own_captions_fit_better_than_others(self) -> None:
        """Every tenth picture, large and plain as in its training. A quarter of the others name the same style."""
        clip = open_extractor("clip:emoji", device="cpu")
        prompts = [Prompt((picture,), STYLES[i % 4], "gray", "large") for i, picture in enumerate(pictures()[::10])]
        drawn = [small_pictures()[prompt.pictures[0].name, prompt.style] for prompt in prompts]
        images = F.normalize(clip([composed(one, BACKGROUNDS["gray"], size=64, side=52) for one in drawn]), dim=1)
        texts = F.normalize(clip.embed_texts([prompt.text for prompt in prompts]), dim=1)
        scores = images @ texts.T  # (97, 97)
        assert (scores.diagonal() - scores.roll(1, 1).diagonal()).mean() > 0.1
        assert (scores.argmax(1) == torch.arange(len(scores))).double().mean() > 0.7  # chance: 0.01


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "kind", "sentence"),
        [
            (7, ArgumentError, "an extractor is named by a string such as 'alex', not by 7"),
            ("", ArgumentError, "extractor '' is not one of"),
            ("alex:weights", ArgumentError, "the weights of 'alex' are embedded; leave 'weights' out"),
            ("inception", SourceError, "put the path or the Hub id of pytorch-fid's pt_inception-2015-12-05-6"),
            ("inception:none.pth", SourceError, "'none.pth' does not exist"),
            ("inception:.", SourceError, "'model.safetensors' does not exist"),
            ("clip:org/none", SourceError, "'org/none' is not in the cache, and the Hub cannot be reached"),
            ("clip:.", SourceError, "'.' has no config.json"),
            ("dinov2:emoji", SourceError, "'emoji' is the embedded model; give a folder or a Hub id"),
            ("dinov2:file.txt", SourceError, "'file.txt' is a file; give a folder or a Hub id"),
        ],
    )
    def test_names_and_places(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, kind: type[SdkitError], sentence: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        monkeypatch.delenv(VARIABLE, raising=False)
        Path("file.txt").write_text("no network")
        one_sentence(lambda: open_extractor(name, device="cpu"), kind, sentence)

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda w: w.pop("Mixed_5b.branch1x1.conv.weight"), "Mixed_5b.branch1x1.conv.weight is missing"),
            (lambda w: w.update(extra=torch.zeros(1)), "extra is not part of that network"),
            (lambda w: w.update({"fc.weight": torch.zeros(1000, 2048)}), "another Inception network, of 1000 classes"),
            (lambda w: w["fc.weight"].fill_(torch.nan), "its fc.weight is not finite"),
            (lambda w: w.update({"fc.weight": torch.zeros(1008, 2048).int()}), "stores fc.weight as I32"),
        ],
    )
    def test_other_weights_than_inceptions(
        self,
        weights: dict[str, Tensor],
        tmp_path: Path,
        damage: Callable[[dict[str, Tensor]], object],
        sentence: str,
    ) -> None:
        damaged = {key: value.half() for key, value in weights.items()}
        damage(damaged)
        safetensors.torch.save_file(damaged, tmp_path / "w.safetensors")
        one_sentence(lambda: open_extractor(f"inception:{tmp_path / 'w.safetensors'}"), SourceError, sentence)

    def test_other_networks_than_clip(self, clip_folder: Path, dinov2_folder: Path, tmp_path: Path) -> None:
        found = f"{str(dinov2_folder)!r} holds a network of type dinov2, not clip; give another source"
        one_sentence(lambda: open_extractor(f"clip:{dinov2_folder}"), SourceError, found)
        network = CLIPModel.from_pretrained(clip_folder)
        network.config.save_pretrained(tmp_path / "half")
        half = {key: value for key, value in network.state_dict().items() if "visual_projection" not in key}
        safetensors.torch.save_file(half, tmp_path / "half" / "model.safetensors", metadata={"format": "pt"})
        one_sentence(lambda: open_extractor(f"clip:{tmp_path / 'half'}"), SourceError, "lacks visual_projection.weight")
        CLIPTextModel(CLIPTextConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8)
                      ).save_pretrained(tmp_path / "text")  # fmt: skip
        one_sentence(lambda: open_extractor(f"clip:{tmp_path / 'text'}"), SourceError, "type clip_text_model, not clip")
        (tmp_path / "half" / "model.safetensors").write_bytes(b"damaged")
        one_sentence(lambda: open_extractor(f"clip:{tmp_path / 'half'}"), SourceError, "cannot be loaded")

    def test_images_and_texts(self, alex: Extractor) -> None:
        one_sentence(lambda: alex([]), ImageError, "the list of images is empty")
        one_sentence(lambda: alex(torch.full((3, 40, 40), 9.0)), ImageError, "outside [-1, 1]")
        one_sentence(lambda: alex.embed_texts(["a cat"]), ArgumentError, "alex has no text encoder", "take 'clip'")
