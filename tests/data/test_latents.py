from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from sdkit.data import latent_file
from sdkit.data.latent_file import Latent
from sdkit.errors import LatentError, SdkitError


def make(**changes: Any) -> Latent:
    """Make the latents of a picture of 20 x 33 pixels."""
    values: dict[str, Any] = {
        "z": torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)),
        "height": 20,
        "width": 33,
        "vae": "ab" * 32,
        "vae_name": "someone/some-vae",
        "scale": 0.18215,
        "sdkit": "0.1.0",
        "dtype": "bfloat16",
        "source": "photo.jpg",
    }
    return Latent(**values | changes)


def assert_equal(a: Latent, b: Latent) -> None:
    for field in dataclasses.fields(Latent):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "z":
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
        else:
            assert type(left) is type(right)
            assert left == right


@st.composite
def made(draw: st.DrawFn) -> Latent:
    height, width, factor = (draw(st.integers(1, high)) for high in (70, 70, 16))
    shape = (draw(st.integers(1, 16)), -(-height // factor), -(-width // factor))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    return make(
        z=torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))).to(dtype),
        height=height,
        width=width,
        factor=factor,
        vae=draw(text),
        vae_name=draw(text),
        scale=draw(st.floats(1e-6, 1e6)),
        shift=draw(st.floats(-1e6, 1e6)),
        source=draw(st.none() | text),
    )


@given(made())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, latent: Latent) -> None:
    path = tmp_path_factory.getbasetemp() / "latent.safetensors"
    latent_file.save(latent, path)
    assert_equal(latent_file.load(path), latent)


def test_others_can_read_the_file_with_safetensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    latent_file.save(make(shift=0.1), path)
    with safe_open(path, framework="np") as file:
        assert list(file.keys()) == ["z"]
        z = file.get_tensor("z")
        metadata = file.metadata()
    assert np.array_equal(z, make().z.numpy())
    assert metadata == {
        "format": "sdkit.latent",
        "format_version": "1",
        "height": "20",
        "width": "33",
        "factor": "8",
        "vae": "ab" * 32,
        "vae_name": "someone/some-vae",
        "scale": "0.18215",
        "shift": "0.1",
        "source": "photo.jpg",
        "sdkit": "0.1.0",
        "dtype": "bfloat16",
    }
    assert latent_file.__doc__ is not None
    # the module's docstring explains every key
    assert all(f"    {key}" in latent_file.__doc__.replace(", ", "\n    ") for key in metadata)


def test_views_and_gradients_are_saved_as_values(tmp_path: Path) -> None:
    z = torch.randn(5, 3, 4, requires_grad=True).permute(2, 1, 0)
    latent_file.save(make(z=z), tmp_path / "a.safetensors")
    assert torch.equal(latent_file.load(tmp_path / "a.safetensors").z, z)


def test_numbers_may_be_numpy_s(tmp_path: Path) -> None:
    latent_file.save(make(scale=np.float64(0.25), shift=np.float32(0.5)), tmp_path / "a.safetensors")
    loaded = latent_file.load(tmp_path / "a.safetensors")
    assert (loaded.scale, loaded.shift) == (0.25, 0.5)


def test_loaded_latent_outlives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    latent_file.save(make(), path)
    latent = latent_file.load(path)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # overwritten in place, which a rename never does
    assert_equal(latent, make())


def test_source_name_with_undecodable_bytes(tmp_path: Path) -> None:
    latent_file.save(make(source=os.fsdecode(b"caf\xe9.jpg")), tmp_path / "a.safetensors")
    assert latent_file.load(tmp_path / "a.safetensors").source in ("caf?.jpg", "café.jpg")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"z": torch.zeros(1, 4, 3, 5)},
            r"z has shape \(1, 4, 3, 5\), but the latents of 20 x 33 pixels have shape \(C, 3, 5\)",
        ),
        ({"z": torch.zeros(4, 5, 3)}, r"z has shape \(4, 5, 3\)"),
        ({"z": torch.zeros(0, 3, 5)}, r"z has shape \(0, 3, 5\)"),
        ({"height": 25}, r"z has shape \(4, 3, 5\), but the latents of 25 x 33 pixels have shape \(C, 4, 5\)"),
        ({"height": 16}, r"the latents of 16 x 33 pixels have shape \(C, 2, 5\)"),
        ({"factor": 16}, r"have shape \(C, 2, 3\)"),
        ({"z": torch.full((4, 3, 5), float("nan"))}, "z is not made of finite floating point numbers"),
        ({"z": torch.full((4, 3, 5), float("inf")).half()}, "z is not made of finite"),
        ({"z": torch.zeros(4, 3, 5, dtype=torch.int64)}, "z is not made of finite floating point"),
        (
            {"z": torch.zeros(4, 3, 5).to(torch.float8_e4m3fn)},
            "z is not made of .*float16, bfloat16, float32 or float64",
        ),
        ({"height": 0}, "a latent of 0 x 33 pixels .* cannot exist"),
        ({"factor": 0}, "factor 0, .* cannot exist"),
        ({"scale": 0.0}, "scale 0.0 .* cannot exist"),
        ({"scale": float("nan")}, "scale nan .* cannot exist"),
        ({"shift": float("inf")}, "shift inf cannot exist"),
    ],
)
def test_parts_must_fit(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LatentError, match=sentence):
        make(**changes)


def file_of(metadata: dict[str, str] | None, **tensors: torch.Tensor) -> bytes:
    return safetensors.torch.save(tensors or {"z": make().z}, metadata)


def metadata_of(**changes: str) -> dict[str, str]:
    return {
        "format": "sdkit.latent", "format_version": "1", "height": "20", "width": "33", "factor": "8", "vae": "a",
        "vae_name": "b", "scale": "0.2", "shift": "0.0", "sdkit": "0.1.0", "dtype": "float32",
    } | changes  # fmt: skip


def torch_pickle() -> bytes:
    torch.save({"z": make().z}, buffer := io.BytesIO())
    return buffer.getvalue()


WHOLE = file_of(metadata_of())


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "this is not a whole safetensors file"),
        (b"a text file, but long enough to hold a header's length", "this is not a whole safetensors file"),
        (torch_pickle(), "this is a zip archive, not a safetensors file"),
        (pickle.dumps({"z": 0}), "this is a pickle, not a safetensors file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "this is a PNG image, not a safetensors file"),
        (b"\xff\xd8\xff\xe0" + bytes(99), "this is a JPEG image, not a safetensors file"),
        (b"\n<!DOCTYPE html><title>404</title>", "this is a web page .HTML., not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer"),
        # Cut short, with a header that claims 640 bytes.
        (b"\x80\x02" + bytes(300), "this is not a whole safetensors file"),
        (WHOLE[:5], "this is not a whole safetensors file"),
        (WHOLE[:100], "this is not a whole safetensors file"),
        (WHOLE[:-1], "this is not a whole safetensors file"),
        (file_of(None), "this is not a latent file of sdkit; sdkit encode makes them"),
        (file_of({"format": "pt"}), "this is not a latent file of sdkit"),
        (
            file_of(metadata_of(format_version="2")),
            "this was written by a newer version of sdkit; update sdkit to read it",
        ),
        (file_of({"format": "sdkit.latent"}), r"its metadata are damaged \('format_version'\); encode the image again"),
        (file_of(metadata_of(format_version="one")), "its metadata are damaged"),
        (file_of(metadata_of(height="20.5")), "its metadata are damaged"),
        (file_of(metadata_of(height="2_0")), "its metadata are damaged"),
        (file_of(metadata_of(width="-33")), "its metadata are damaged"),
        (file_of(metadata_of(format_version="-1")), "its metadata are damaged"),
        (file_of(metadata_of(scale="1e999")), "scale inf"),
        (file_of(metadata_of(scale="large")), "its metadata are damaged"),
        (file_of(metadata_of(height="9" * 400)), "the latents of 9+ x 33 pixels"),
        (file_of(metadata_of(), other=make().z), "there is no z in it"),
        (file_of(metadata_of(), z=make().z[0]), r"z has shape \(3, 5\)"),
        (file_of(metadata_of(height="200")), r"z has shape \(4, 3, 5\), but the latents of 200 x 33 pixels"),
        (file_of(metadata_of(factor="0")), "factor 0"),
        (file_of(metadata_of(), z=make().z.to(torch.float8_e5m2)), "z is not made of finite"),
        (file_of(metadata_of(), z=make().z * float("nan")), "z is not made of finite"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "data",
)
def test_what_cannot_be_loaded_is_one_sentence(tmp_path: Path, data: bytes, sentence: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(LatentError, match=rf"^.*a\.safetensors: .*{sentence}") as caught:
        latent_file.load(path)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(LatentError, match=r"no\.safetensors: the file cannot be read \(no such file or directory\)"):
        latent_file.load(tmp_path / "no.safetensors")
    with pytest.raises(LatentError, match=r"the file cannot be read \(is a directory\)"):
        latent_file.load(tmp_path)
    with pytest.raises(SdkitError, match=r"cannot write .*: it is a folder"):
        latent_file.save(make(), tmp_path)


@given(st.data())
def test_damaged_files_raise_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    header = 8 + int.from_bytes(WHOLE[:8], "little")
    damaged = bytearray(WHOLE)
    for position, value in data.draw(
        st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), min_size=1, max_size=4)
    ):
        damaged[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        latent_file.load(path)
    except LatentError as error:
        assert "damaged.safetensors: " in str(error)  # noqa: PT017 - loading may also succeed


def test_unknown_keys_are_for_later_versions(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of(metadata_of(caption=json.dumps(["a cat"])), z=make().z, extra=torch.zeros(1)))
    assert torch.equal(latent_file.load(path).z, make().z)


def test_check_vae() -> None:
    latent_file.check_vae(make(), "ab" * 32)
    latent_file.check_vae(make(), "cd" * 32, force=True)
    sentence = (
        r"made by another VAE \(someone/some-vae, abababababab\) than this one \(cdcdcdcdcdcd\); decode it with that"
    )
    with pytest.raises(LatentError, match=sentence):
        latent_file.check_vae(make(), "cd" * 32)


def test_a_latent_that_contradicts_the_vae_that_it_names() -> None:
    """The VAE's fingerprint covers scale and shift. A latent that names the VAE but has another scale was edited."""
    identity = "ab" * 32
    latent_file.check_vae(make(shift=0.1), identity, scale=0.18215, shift=0.1)
    for wanted, sentence in (
        (
            {"scale": 0.13025},
            r"the latent says scale 0\.18215, but the VAE that it names has 0\.13025: its meta",
        ),
        ({"shift": 0.1}, r"the latent says shift 0, but the VAE that it names has 0\.1"),
    ):
        with pytest.raises(LatentError, match=sentence):
            latent_file.check_vae(make(), identity, **wanted)
        latent_file.check_vae(make(), identity, force=True, **wanted)


def test_the_same_latent_has_the_same_bytes(tmp_path: Path) -> None:
    """Equal latents must give equal bytes, although safetensors itself writes metadata in random order."""
    for i in range(8):
        latent_file.save(make(source="naïve 猫.jpg"), tmp_path / f"{i}.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    data = (tmp_path / "0.safetensors").read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    assert latent_file.load(tmp_path / "0.safetensors").source == "naïve 猫.jpg"


@pytest.mark.skipif(os.name != "posix", reason="needs names that are not UTF-8, and pipes")
def test_files_with_odd_names_and_of_odd_kinds(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    latent_file.save(make(), odd)
    assert_equal(latent_file.load(odd), make())
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    for name in ("pipe", "zero", "huge", "nul\0", "n" * 300):
        with pytest.raises(LatentError, match="the file cannot be read"):
            latent_file.load(tmp_path / name)
