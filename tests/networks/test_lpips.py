"""LPIPS against values of the package `lpips`, with the embedded AlexNet, and with VGG-16 if its real weights are
available. Other tests of VGG-16 use random weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdkit.errors import ArgumentError, ImageError, SdkitError, SourceError
from sdkit.networks.lpips import EMBEDDED, LPIPS
from tests.helpers import shared_data


@pytest.fixture(scope="module")
def real() -> LPIPS:
    return LPIPS.from_pretrained(shared_data.lpips_weights())


@pytest.fixture(scope="module")
def alex() -> LPIPS:
    return LPIPS.from_pretrained("alex")


@pytest.fixture(scope="module")
def random() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("vgg")


@pytest.fixture(scope="module")
def file(random: LPIPS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the random weights in the layout of the real ones: heads and biases in float32, convolutions in float16."""
    tensors = {}
    for name, tensor in random.state_dict().items():
        kind, index, *rest = name.split(".")
        if kind == "vgg":
            tensors[f"features.{index}.{rest[0]}"] = tensor.half() if rest[0] == "weight" else tensor
        else:
            tensors[f"lin{index}.weight"] = tensor
    path = tmp_path_factory.mktemp("lpips") / "lpips_vgg16.safetensors"
    save_file(tensors, path)
    return path


def tensor(*images: np.ndarray) -> Tensor:  # (B, 3, H, W) in [-1, 1]
    return torch.from_numpy(np.stack(images).astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pairs() -> tuple[Tensor, Tensor]:
    """Return photos, and versions of them with block means, with a checkerboard of noise, and mirrored."""
    face = skimage.data.astronaut()[0:256, 128:384]
    means = np.round(face.reshape(32, 8, 32, 8, 3).mean((1, 3))).repeat(8, 0).repeat(8, 1)
    cat = skimage.data.chelsea()[20:276, 100:356]
    rows, columns = np.mgrid[:256, :256]
    board = np.where((rows + columns) % 2 == 0, -20, 20)[..., None]
    cup = skimage.data.coffee()[60:316, 150:406]
    return tensor(face, cat, cup), tensor(means, np.clip(cat.astype(int) + board, 0, 255), cup[:, ::-1])


def test_equal_to_the_package_lpips(real: LPIPS) -> None:
    with torch.no_grad():
        assert real(*pairs()).tolist() == pytest.approx([0.640984, 0.139721, 0.505928], abs=2e-6)


class TestAlexNet:
    def test_equal_to_the_package_lpips(self, alex: LPIPS) -> None:
        with torch.no_grad():
            assert alex(*pairs()).tolist() == pytest.approx([0.543723, 0.008303, 0.433629], abs=2e-6)

    def test_equal_to_its_formula_in_float64(self, alex: LPIPS) -> None:
        """The layers and eq. 1 of the paper, written with functions over the stored tensors."""
        stored = {name: tensor.double() for name, tensor in load_file(EMBEDDED).items()}
        x, y = pixels(1, 3, 47, 40).double(), pixels(1, 3, 47, 40, seed=1).double()

        def activations(h: Tensor) -> list[Tensor]:
            h = (h - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
                :, None, None
            ]
            found = []
            for name, stride, padding, pooled in (
                (0, 4, 2, 0),
                (3, 1, 2, 1),
                (6, 1, 1, 1),
                (8, 1, 1, 0),
                (10, 1, 1, 0),
            ):
                h = F.max_pool2d(h, 3, 2) if pooled else h
                h = F.conv2d(h, stored[f"features.{name}.weight"], stored[f"features.{name}.bias"], stride, padding)
                h = h.clamp(min=0)
                found.append(h)
            return found

        expected = 0.0
        for i, (a, b) in enumerate(zip(activations(x), activations(y), strict=True)):
            a, b = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10) for h in (a, b))
            expected += float(((a - b).square() * stored[f"lin{i}.weight"]).sum(1).mean())
        double = copy.deepcopy(alex).double()
        assert double(x, y).item() == pytest.approx(expected, rel=1e-6)  # the package's constants are float32
        assert double(x, y).dtype == torch.float64
        assert alex(x.float(), y.float()).item() == pytest.approx(expected, rel=1e-5)

    def test_weights_stored_in_float16_compute_in_float32(self, alex: LPIPS) -> None:
        stored = load_file(EMBEDDED)
        assert stored["features.0.weight"].dtype == torch.float16
        assert {p.dtype for p in alex.parameters()} == {torch.float32}
        assert torch.equal(alex.state_dict()["alex.10.weight"], stored["features.10.weight"].float())
        assert torch.equal(alex.heads[4], stored["lin4.weight"])

    def test_the_gradient_reaches_the_image_and_no_weight(self, alex: LPIPS) -> None:
        x, y = pixels(2, 3, 32, 40).requires_grad_(), pixels(2, 3, 32, 40, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            alex(x, y).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad != 0).float().mean() > 0.99
        assert not any(p.requires_grad or p.grad is not None for p in alex.parameters())
        assert not alex.training
        double = copy.deepcopy(alex).double()
        one, other = pixels(1, 3, 31, 33).double().requires_grad_(), pixels(1, 3, 31, 33, seed=1).double()
        assert torch.autograd.gradcheck(lambda x: double(x, other), (one,), fast_mode=True)

    def test_features_give_the_distance(self, alex: LPIPS) -> None:
        x, y = pixels(2, 3, 64, 48), pixels(2, 3, 64, 48, seed=1)
        distances = (alex.features(x) - alex.features(y)).square().sum(1)
        torch.testing.assert_close(distances, alex(x, y), rtol=1e-5, atol=0)
        assert alex.features(x, grid=2).shape == (2, 1152 * 4)

    def test_the_smallest_image_is_checked_in_one_sentence(self, alex: LPIPS) -> None:
        assert alex.smallest == 31
        assert alex(pixels(1, 3, 31, 31), pixels(1, 3, 31, 31, seed=1)).isfinite().all()
        with pytest.raises(
            ImageError, match=r"^LPIPS needs images .* of at least 31 x 31 pixels, not \(1, 3, 30, 40\)"
        ):
            alex(pixels(1, 3, 30, 40), pixels(1, 3, 30, 40))


def test_zero_for_equal_images_and_symmetric(random: LPIPS) -> None:
    x, y = pixels(2, 3, 32, 40), pixels(2, 3, 32, 40, seed=1)
    assert random(x, x).tolist() == [0, 0]
    assert (random(x, y) > 0).all()
    torch.testing.assert_close(random(x, y), random(y, x))
    torch.testing.assert_close(random(x, y)[1:], random(x[1:], y[1:]))


class TestGradient:
    """Without a gradient, LPIPS would appear in the log but teach nothing."""

    @pytest.mark.parametrize("which", ["random", "real"])
    def test_equals_finite_differences(self, which: str, request: pytest.FixtureRequest) -> None:
        model = LPIPS("vgg")
        model.load_state_dict(request.getfixturevalue(which).state_dict())
        model.double()
        x, y = pixels(1, 3, 16, 17).double().requires_grad_(), pixels(1, 3, 16, 17, seed=1).double()
        assert torch.autograd.gradcheck(lambda x: model(x, y), (x,), fast_mode=True)
        (gradient,) = torch.autograd.grad(model(x, y).sum(), x)
        step = 1e-6
        # Check single entries too, because fast_mode checks only a projection.
        for index in ((0, 0, 3, 5), (0, 1, 8, 8), (0, 2, 15, 16)):
            moved = torch.zeros_like(x)
            moved[index] = step
            slope = (model(x + moved, y) - model(x - moved, y)).item() / (2 * step)
            assert gradient[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)

    def test_reaches_the_image_through_autocast_and_no_weight(self, random: LPIPS) -> None:
        x, y = pixels(2, 3, 32, 32).requires_grad_(), pixels(2, 3, 32, 32, seed=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            random(x, y).sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert (x.grad != 0).float().mean() > 0.99
        assert not any(p.requires_grad or p.grad is not None for p in random.parameters())
        assert not random.training

    @pytest.mark.parametrize("bias", [-1.0, 0.0, 1e-30])
    def test_is_finite_where_activations_are_zero_or_their_squares_underflow(self, bias: float) -> None:
        model = LPIPS("vgg")
        for name, parameter in model.named_parameters():
            parameter.fill_(bias if name.endswith("bias") else 0.0)
        for head in model.heads:
            head.fill_(1.0)
        x = pixels(1, 3, 16, 16).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x, pixels(1, 3, 16, 16, seed=1)).sum(), x)
        assert gradient.isfinite().all()

    def test_lets_an_image_be_found_again(self, random: LPIPS) -> None:
        y = pixels(1, 3, 16, 16, seed=1)
        x = (y + 0.3 * pixels(1, 3, 16, 16)).requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.02)
        first = random(x, y).item()
        for _ in range(15):
            optimizer.zero_grad()
            random(x, y).sum().backward()
            optimizer.step()
        assert random(x, y).item() < first / 2


def test_computes_in_float32(random: LPIPS) -> None:
    x, y = pixels(2, 3, 32, 32), pixels(2, 3, 32, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = random(x, y)
        half = random(x.bfloat16(), y.bfloat16())
    assert torch.equal(inside, random(x, y))
    assert half.dtype == torch.float32
    assert torch.equal(half, random(x.bfloat16().float(), y.bfloat16().float()))


class TestFeatures:
    def test_squared_distances_are_lpips(self, random: LPIPS) -> None:
        x, y = pixels(3, 3, 32, 48), pixels(3, 3, 32, 48, seed=1)
        a, b = random.features(x), random.features(y)
        assert a.shape == (3, 64 * 32 * 48 + 128 * 16 * 24 + 256 * 8 * 12 + 512 * 4 * 6 + 512 * 2 * 3)
        torch.testing.assert_close((a - b).square().sum(1), random(x, y), rtol=1e-5, atol=0)

    def test_a_grid_bounds_their_size(self, random: LPIPS) -> None:
        for size in (32, 64):
            assert random.features(pixels(2, 3, size, size), grid=2).shape == (2, 1472 * 4)
        # Averages are closer to each other than the averaged values (Jensen).
        x, y = pixels(1, 3, 32, 32), pixels(1, 3, 32, 32, seed=1)
        distances = [(random.features(x, n) - random.features(y, n)).square().sum().item() for n in (1, 2, None)]
        assert 0 < distances[0] < distances[1] < distances[2]

    def test_find_a_photo_among_others(self, real: LPIPS) -> None:
        photos = [getattr(skimage.data, name)() for name in ("astronaut", "chelsea", "coffee", "rocket")]
        x = tensor(*[photo[100:196, 100:196] for photo in photos])
        noisy = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        with torch.no_grad():
            distances = torch.cdist(real.features(noisy, grid=4), real.features(x, grid=4))
        assert distances.argmin(1).tolist() == [0, 1, 2, 3]


class TestWeights:
    def test_from_a_file_a_folder_the_environment_and_the_hub(
        self, file: Path, random: LPIPS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        snapshot = tmp_path / "hub" / "models--org--lpips" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "lpips_vgg16.safetensors").symlink_to(file)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(commit)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("SDKIT_LPIPS", str(file))
        expected = {name: value.half().float() for name, value in random.state_dict().items() if value.ndim == 4}
        for model in (
            LPIPS.from_pretrained(file),
            LPIPS.from_pretrained(str(file.parent)),
            LPIPS.from_pretrained(),
            LPIPS.from_pretrained("org/lpips"),
        ):
            assert not model.training
            for name, value in model.state_dict().items():
                assert value.dtype == torch.float32
                wanted = expected[name] if name.startswith("vgg") and value.ndim == 4 else random.state_dict()[name]
                assert torch.equal(value, wanted)
            assert not any(p.requires_grad for p in model.parameters())
        with pytest.raises(SourceError, match=r"'org/lpips' .* lacks? other\.safetensors|no other\.safetensors"):
            LPIPS.from_pretrained("org/lpips", filename="other.safetensors")

    def test_from_the_state_of_the_package_lpips(self, random: LPIPS, tmp_path: Path) -> None:
        """Names as in lpips 0.1.4: slices of VGG-16 with torchvision's numbers, two copies of the heads, and two
        constants.
        """
        ends = (4, 9, 16, 23, 30)  # ends of the slices
        state = {}
        for key, value in random.vgg.state_dict().items():
            layer = int(key.split(".")[0])
            slice_ = 1 + sum(layer >= end for end in ends)
            state[f"net.slice{slice_}.{key}"] = value
        for i, head in enumerate(random.heads):
            state |= {f"lin{i}.model.1.weight": head.data, f"lins.{i}.model.1.weight": head.data}
        state |= {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
        torch.save(state, tmp_path / "lpips.pt")
        loaded = LPIPS.from_pretrained(tmp_path / "lpips.pt").state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in random.state_dict().items())

    def test_the_embedded_weights_are_the_default(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SDKIT_LPIPS", raising=False)
        assert LPIPS.from_pretrained().network == "alex"
        monkeypatch.setenv("SDKIT_LPIPS", str(file))
        networks = [LPIPS.from_pretrained(source).network for source in (None, "alex", "vgg", EMBEDDED)]
        assert networks == ["vgg", "alex", "vgg", "alex"]

    @pytest.mark.parametrize("variable", ["", "alex", "vgg"])
    def test_vgg_that_is_not_named_is_one_sentence(self, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SDKIT_LPIPS", variable)
        with pytest.raises(
            SourceError, match=r"VGG do not ship: .* variable SDKIT_LPIPS, or take 'alex', which ships\.$"
        ):
            LPIPS.from_pretrained("vgg")

    def test_weights_of_another_network_are_one_sentence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SDKIT_LPIPS", str(EMBEDDED))
        with pytest.raises(SourceError, match="does not hold the weights of LPIPS with VGG-16"):
            LPIPS.from_pretrained("vgg")

    def test_names_that_fingerprints_of_runs_hold(self) -> None:
        """Runs made when VGG was the only network resume, as its parameters keep their names."""
        names = [*LPIPS("vgg").state_dict()]
        assert (names[0], names[-1], len(names)) == ("vgg.0.weight", "heads.4", 31)

    @pytest.mark.parametrize(
        ("source", "sentence"),
        [
            ("missing.safetensors", r"the weights of LPIPS are not at 'missing\.safetensors'; give"),
            ("no/such/folder", "the weights of LPIPS are not at 'no/such/folder'; give"),
            ("org/absent", r"'org/absent' is not in the cache, and the Hub cannot be reached"),
        ],
    )
    def test_what_is_not_there_is_one_sentence(self, source: str, sentence: str) -> None:
        with pytest.raises(SourceError, match=sentence):
            LPIPS.from_pretrained(source)

    def test_a_folder_without_them_is_one_sentence(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"a folder with lpips_vgg16\.safetensors or a Hub id\.$"):
            LPIPS.from_pretrained(tmp_path)

    @pytest.mark.parametrize(
        ("damage", "sentence"),
        [
            (lambda path: path.write_bytes(b""), "is empty; download it again"),
            (lambda path: path.write_bytes(b"\x80\x04junk" * 100), "is a damaged pickle"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is damaged or not a .safetensors file"),
        ],
        ids=["empty", "junk", "truncated"],
    )
    def test_a_damaged_file_is_one_sentence(self, damage: object, sentence: str, file: Path, tmp_path: Path) -> None:
        path = tmp_path / "lpips_vgg16.safetensors"
        path.write_bytes(file.read_bytes())
        damage(path)  # type: ignore[operator]
        with pytest.raises(SdkitError, match=sentence):
            LPIPS.from_pretrained(path)

    def test_a_file_of_something_else_is_one_sentence(self, file: Path, tmp_path: Path) -> None:
        tensors, path = load_file(file), tmp_path / "other.safetensors"
        save_file({name: value for name, value in tensors.items() if name != "lin3.weight"}, path)
        with pytest.raises(SourceError, match=r"does not hold the weights of LPIPS .*: lin3\.weight is missing\.$"):
            LPIPS.from_pretrained(path)
        save_file({**tensors, "classifier.0.weight": torch.zeros(1)}, path)
        with pytest.raises(SourceError, match=r": classifier\.0\.weight is not part of that network\.$"):
            LPIPS.from_pretrained(path)
        save_file({**tensors, "lin0.weight": torch.zeros(1, 192, 1, 1)}, path)
        with pytest.raises(SourceError, match=r": lin0\.weight is 1x192x1x1 instead of 1x64x1x1\.$"):
            LPIPS.from_pretrained(path)


@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ((1, 3, 16, 15), (1, 3, 16, 15), "LPIPS needs images"),
        ((1, 1, 32, 32), (1, 1, 32, 32), "LPIPS needs images"),
        ((3, 32, 32), (3, 32, 32), "LPIPS needs images"),
        ((2, 3, 32, 32), (1, 3, 32, 32), r"LPIPS cannot compare images of shapes \(2, 3, 32, 32\) and"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(
    x: tuple[int, ...], y: tuple[int, ...], sentence: str, random: LPIPS
) -> None:
    with pytest.raises(ImageError, match=sentence):
        random(torch.zeros(x), torch.zeros(y))


def test_an_unknown_network_is_one_sentence() -> None:
    with pytest.raises(ArgumentError, match="network 'squeeze' is not one of 'alex', 'vgg'"):
        LPIPS("squeeze")
