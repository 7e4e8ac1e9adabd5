"""Each kind of file that sdkit reads: how to make a small valid one, and how a user's command reads it.

A read ends with a result or an `SdkitError`, however the files are damaged. It goes as far as the command would: a
loaded network is run once, because some damage shows only there.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sdkit
from sdkit import images
from sdkit.cli import jobs, main
from sdkit.data import latent_file as latents
from sdkit.errors import SdkitError
from sdkit.files import read_regular
from sdkit.loading.embedding_file import save_embedding
from sdkit.loading.lora_file import convert_lora, read_lora, save_lora
from sdkit.networks.clip import CLIP
from sdkit.networks.code_prior import new_prior, save_prior
from sdkit.networks.lora import add_lora, lora_layers, lora_tensors, merge_lora
from sdkit.networks.prior_shape import PriorShape
from sdkit.networks.vqvae2 import VQVAE2, load_vqvae2
from sdkit.pipelines.generation import Generation
from sdkit.training.loop import fit
from sdkit.training.plot import plot
from tests.fuzz.mutators import in_order
from tests.helpers import clip, original_layout, tiny, unclip
from tests.helpers.loaders import TOKENIZER, describe, load_schedule
from tests.helpers.toy import Toy, ToySettings

SIDE = 16  # pixels
TOKENS = 320  # size of the tokenizer's vocabulary
CPU: dict[str, Any] = {"dtype": "fp32", "device": "cpu"}
DRAW: dict[str, Any] = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
PROMPT = "a (red:1.2) disc, café"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of input and how it is read."""

    name: str
    make: Callable[[Path], object]
    """Writes a small valid input into a folder"""
    read: Callable[[Path, Path], object]
    """Reads the first folder, and writes, if at all, into the second"""
    files: tuple[str, ...] = ("*",)
    """Patterns of the files that may be damaged"""
    repair: Callable[[Path], object] = lambda folder: None
    """Corrects the checksums of damaged files"""
    writes_input: bool = False
    """Whether the command writes into its input folder"""

    def damageable(self, folder: Path) -> list[Path]:
        """Return the files in `folder` that may be damaged."""
        found = {path for pattern in self.files for path in folder.glob(pattern) if path.is_file()}
        return sorted(found)


# A complete model with few channels


@cache
def model() -> Path:
    """Return the folder of a small valid model in diffusers layout; see `set_home`."""
    return _made("model", make_model)


_home = Path()


def set_home(folder: Path) -> None:
    """Set the folder in which valid inputs are made, each once."""
    global _home
    _home = folder


def _made(name: str, make: Callable[[Path], object]) -> Path:
    folder = _home / name
    if not folder.exists():
        unfinished = _home / f".{name}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def valid(target: Target) -> Path:
    """Return the valid input of `target`. It is shared, so no read may change it."""
    return _made(target.name, target.make)


def make_model(folder: Path) -> None:
    made = tiny.networks(
        (8, 8),
        vae={"sample_size": SIDE, "scaling_factor": 0.5},
        unet={"sample_size": SIDE // 2, **tiny.TWO_LEVELS},
        text={
            "vocab_size": TOKENS + 1, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
            "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "dtype": "float32",
        },
    )  # fmt: skip
    torch.nn.init.normal_(
        next(p for n, p in made.text.named_parameters() if "final_layer_norm.bias" in n)
    )  # otherwise the mean of each embedding is 0
    made.save(folder)
    tiny.scheduler().save_pretrained(folder / "scheduler")
    make_tokenizer(folder / "tokenizer", fast=True)
    index = {"_class_name": "StableDiffusionPipeline", "_guidance_scale": 3.0, "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(in_order(path.read_bytes()))


def make_tokenizer(folder: Path, *, fast: bool) -> None:
    """Write the first tokens of the tests' tokenizer, as tokenizer.json or as vocab.json and merges.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(TOKENIZER / "tokenizer_config.json", folder)
    shutil.os.chmod(folder / "tokenizer_config.json", 0o644)  # type: ignore[attr-defined]
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    whole = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocabulary = {token: i for token, i in whole["model"]["vocab"].items() if i < TOKENS}
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in whole["model"]["merges"]]
    merges = [pair for pair in pairs if {*pair, "".join(pair)} <= vocabulary.keys()]
    if fast:
        whole["model"] |= {"vocab": vocabulary, "merges": merges}
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]))
        special = {"bos_token": "<|startoftext|>", "eos_token": {"content": "<|endoftext|>", "lstrip": False}}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        (folder / "added_tokens.json").write_text(json.dumps({"<a-cat>": TOKENS}))


@cache
def sd() -> sdkit.StableDiffusion:
    """Load the valid model. It is shared, so no read may change it."""
    return sdkit.StableDiffusion.from_pretrained(model(), **CPU)


def drawn(made: sdkit.StableDiffusion) -> None:
    made(PROMPT, weighting=True, **DRAW)


def parts(*names: str) -> Callable[[Path], None]:
    """Return a function that copies some parts of the model into a folder."""

    def make(folder: Path) -> None:
        for name in names:
            shutil.copytree(model() / name, folder / name)

    return make


def with_part(**changed: Any) -> None:
    """Draw an image with some parts of the model replaced."""
    whole = sd()
    made = {"vae": whole.vae, "text": whole.text, "unet": whole.unet, "schedule": whole.schedule} | changed
    drawn(sdkit.StableDiffusion(**made))


def read_vae(folder: Path, out: Path) -> None:
    describe(folder)
    vae = sdkit.VAE.from_pretrained(folder, **CPU)
    vae.check_size((SIDE, SIDE))
    vae.reconstruct([picture()])
    with_part(vae=vae)


def make_prior(folder: Path) -> None:
    """Write a VQ model, a prior of texts over its codes, and the tokenizer."""
    torch.manual_seed(0)
    tiny.vq_model(folder / "vqvae")
    shape = PriorShape(
        kind="transformer", codes=16, grid=(2, 2), condition="text", condition_shape=(6,), tokens=TOKENS + 1, layers=1,
        width=8, heads=2,
    )  # fmt: skip
    save_prior(new_prior(shape), folder / "prior")
    make_tokenizer(folder / "tokenizer", fast=True)


def read_prior(folder: Path, out: Path) -> None:
    sdkit.TokenPipeline.from_pretrained(folder, **CPU)(PROMPT, guidance_scale=2.0)


def make_vqvae2(folder: Path) -> None:
    torch.manual_seed(0)
    VQVAE2((8, 8), (8, 8), latent_channels=4, num_vq_embeddings=6, norm_num_groups=4).save_pretrained(folder)


def read_vqvae2(folder: Path, out: Path) -> None:
    network = load_vqvae2(folder)
    network.decode(*network.encode(torch.zeros(1, 3, 8, 8)))


def make_clip(folder: Path) -> None:
    clip.save_clip(folder)


def read_clip(folder: Path, out: Path) -> None:
    network = CLIP.from_pretrained(folder)
    network(torch.zeros(1, 3, network.side, network.side), network.tokenize([PROMPT]))


def read_unet(folder: Path, out: Path) -> None:
    describe(folder)
    with_part(unet=sdkit.UNet.from_pretrained(folder, **CPU))


def read_text(folder: Path, out: Path) -> None:
    text = sdkit.TextEncoder.from_pretrained(folder, **CPU)
    text.encode(["", PROMPT, "a " * 40], weighting=True, clip_skip=0)
    with_part(text=text)


def read_schedule(folder: Path, out: Path) -> None:
    describe(folder)
    schedule = load_schedule(folder)
    with_part(schedule=schedule)
    for sampler in ("ddpm", "dpm++2m"):
        whole = sd()
        sdkit.StableDiffusion(whole.vae, whole.text, whole.unet, schedule)(
            "", sampler=sampler, guidance_scale=1, **DRAW
        )


def read_model(folder: Path, out: Path) -> None:
    describe(folder)
    drawn(sdkit.StableDiffusion.from_pretrained(folder, **CPU))


def make_unclip(folder: Path) -> None:
    unclip.unclip().save_pretrained(folder)
    unclip.image_encoder().save_pretrained(folder / "image_encoder")


def read_unclip(folder: Path, out: Path) -> None:
    loaded = sdkit.UnCLIP.from_pretrained(folder, device="cpu")
    loaded(PROMPT, num_inference_steps=2, prior_num_inference_steps=2)
    loaded.variations(Image.new("RGB", (SIDE, SIDE)), 1, num_inference_steps=2)


def as_pickles(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        parts(*names)(folder)
        for path in folder.rglob("*.safetensors"):
            name = "pytorch_model.bin" if path.name == "model.safetensors" else path.with_suffix(".bin").name
            torch.save(load_file(path), path.with_name(name))
            path.unlink()

    return make


# Single files


def make_single(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        whole = sd()
        tensors = original_layout.vae(whole.vae.network.state_dict())
        tensors |= original_layout.unet(whole.unet.network.state_dict(), layers_per_block=1)
        tensors |= original_layout.clip(whole.text.network.state_dict())
        tensors = {name: x.contiguous() for name, x in tensors.items()}
        if suffix == ".ckpt":
            torch.save({"state_dict": tensors, "global_step": 7}, folder / "one.ckpt")
        else:
            save_file(tensors, folder / "one.safetensors", {"format": "pt"})
            (folder / "one.safetensors").write_bytes(in_order((folder / "one.safetensors").read_bytes()))

    return make


def read_single(name: str) -> Callable[[Path, Path], None]:
    def read(folder: Path, out: Path) -> None:
        file = folder / name
        with suppress(SdkitError):  # its networks have none of SD's sizes, so describing it may fail
            describe(file)
        describe(file, config=model())
        drawn(sdkit.StableDiffusion.from_pretrained(file, config=model(), **CPU))

    return read


# LoRA


def make_lora(layout: str, suffix: str = ".safetensors") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        torch.manual_seed(1)
        whole = sdkit.StableDiffusion.from_pretrained(model(), **CPU)
        add_lora(whole.unet.network, 2)
        add_lora(whole.text.network, 2)
        tensors = lora_tensors(whole.unet.network, whole.text.network)
        for x in tensors.values():
            x.normal_()
        path = folder / f"one{suffix}"
        if layout == "kohya":
            save_lora(tensors, path, "kohya")
        elif layout == "diffusers":
            settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"mid_block.*.to_k": 1}}
            save_file(tensors, path, {"lora_adapter_metadata": json.dumps(settings)})
        else:
            named = {
                name.replace(".lora.down", ".lora_A").replace(".lora.up", ".lora_B"): x for name, x in tensors.items()
            }
            torch.save(named, path)
        if suffix == ".safetensors":
            path.write_bytes(in_order(path.read_bytes()))

    return make


def make_lycoris(folder: Path) -> None:
    """A LoHa, a LoKr, and a DoRA, each of a layer, in kohya's layout."""
    rng = torch.Generator().manual_seed(1)
    layers = lora_layers(sdkit.StableDiffusion.from_pretrained(model(), **CPU).unet.network)
    tensors = {}
    for (name, layer), kind in zip(layers.items(), ("loha", "lokr", "dora"), strict=False):
        outputs, inputs = layer.weight.shape
        shapes = {
            "loha": {"hada_w1_a": (outputs, 2), "hada_w1_b": (2, inputs), "hada_w2_a": (outputs, 2),
                     "hada_w2_b": (2, inputs)},
            "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (outputs // 2, 2), "lokr_w2_b": (2, inputs // 2)},
            "dora": {"lora_down.weight": (2, inputs), "lora_up.weight": (outputs, 2), "dora_scale": (outputs, 1)},
        }[kind]  # fmt: skip
        for key, shape in {**shapes, "alpha": ()}.items():
            tensors[f"lora_unet_{name.replace('.', '_')}.{key}"] = torch.randn(shape, generator=rng)
    path = folder / "one.safetensors"
    save_file(tensors, path)
    path.write_bytes(in_order(path.read_bytes()))


def read_one_lora(name: str) -> Callable[[Path, Path], None]:
    def read(folder: Path, out: Path) -> None:
        lora = read_lora(folder / name)
        whole = sdkit.StableDiffusion.from_pretrained(model(), **CPU)
        merge_lora(lora, whole.unet.network, whole.text.network, 0.7)
        drawn(whole)
        convert_lora(folder / name, out / "kohya.safetensors")

    return read


# Textual inversion


def make_embedding(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        vectors = torch.randn(2, sd().text.width, generator=torch.Generator().manual_seed(1))
        if name.endswith(".pt"):  # as A1111 writes it
            named = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "zork", "step": 9}
            torch.save(named | {"sd_checkpoint": None, "sd_checkpoint_name": None}, folder / name)
        else:
            save_embedding("<zork>", vectors, folder / name)

    return make


def read_one_embedding(name: str) -> Callable[[Path, Path], None]:
    def read(folder: Path, out: Path) -> None:
        whole = sdkit.StableDiffusion.from_pretrained(model(), **CPU)
        token = whole.load_embedding(folder / name)
        whole.text.encode(f"a {token}")
        drawn(whole)
        save_embedding(token, whole.text.learned[token], out / "one.safetensors")

    return read


# Images, latents, recipes, prompts


def picture(mode: str = "RGB", size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    gradient = Image.linear_gradient("L").resize(size)
    return Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180))).convert(mode)


def make_images(folder: Path) -> None:
    for suffix in sorted(images.READABLE):
        mode = "P" if suffix == ".gif" else "L" if suffix == ".pgm" else "RGB"
        with suppress(KeyError, ValueError, OSError):  # Pillow may have been built without AVIF
            picture(mode).save(folder / f"one{suffix}")
    for mode in ("RGBA", "LA", "P", "1"):
        picture(mode).save(folder / f"{mode}.png")
    Image.fromarray(np.linspace(0, 65535, SIDE**2).astype(np.uint16).reshape(SIDE, SIDE)).save(folder / "I16.png")
    picture("CMYK").save(folder / "CMYK.tiff")
    picture("L").convert("F").save(folder / "F.tiff")


def read_images(folder: Path, out: Path) -> None:
    """Encode the images that can be read and are small. An image that damage has made large would rightly take long."""
    small = []
    for path in sorted(folder.iterdir()):
        with suppress(SdkitError):
            image = images.read(path)
            small += [path] if max(image.size) <= 64 else []
    if small:
        jobs.encode_files(sd().vae, small, out)


def make_latent(folder: Path) -> None:
    picture().save(folder / "one.png")
    jobs.encode_files(sd().vae, [folder / "one.png"], folder)
    (folder / "one.png").unlink()
    (folder / "one.safetensors").write_bytes(in_order((folder / "one.safetensors").read_bytes()))


def read_latent(folder: Path, out: Path) -> None:
    file = folder / "one.safetensors"
    with suppress(SdkitError):
        latent = latents.load(file)
        if max(latent.height, latent.width) > 64:
            return
    for force in (False, True):
        report = jobs.decode_files(sd().vae, [file], out, force=force)
        assert len(report.done) + len(report.failed) == 1


def make_recipe(folder: Path) -> None:
    recipe = Generation(
        prompt=PROMPT, negative_prompt="café ☕", num_inference_steps=2, guidance_scale=2.0, height=SIDE, width=SIDE,
        guidance_interval=(0.5, 5.0),
        spacing="leading", dtype="fp32", weighting=True, model=str(model()),
    )  # fmt: skip
    images.save(picture(), folder / "one.png", recipe.text())


def read_recipe(folder: Path, out: Path) -> None:
    """Read a recipe as `sdkit generate --from` does, and draw it with the small model, few pixels, and few steps."""
    recipe = Generation.read(folder / "one.png")
    prompts = [recipe.prompt]
    jobs.check_generation(prompts, out, recipe)
    recipe = replace(recipe, num_inference_steps=min(recipe.num_inference_steps, 2), height=SIDE, width=SIDE)
    jobs.generate_files(sd(), prompts, out, recipe)


def make_prompts(folder: Path) -> None:
    (folder / "one.txt").write_text(f"# prompts\n{PROMPT}\n\na ((green)) [disc], (blue\n  \\(x\\) \n")


def read_prompts(folder: Path, out: Path) -> None:
    prompts = jobs.read_prompts(folder / "one.txt")
    jobs.check_generation(prompts, out, Generation(weighting=True))
    for prompt in prompts[:4]:
        sd().text.encode([prompt], weighting=True)


# Data sets


def make_folder(folder: Path) -> None:
    """Write images with captions in each of the supported forms."""
    (folder / "sub").mkdir()
    for i in range(4):
        picture(size=(SIDE + i, SIDE)).save(folder / f"{i}.png")
    picture().save(folder / "sub" / "4.png")
    (folder / "0.txt").write_text("a red disc")
    (folder / "1.txt").write_text("a green disc\n", encoding="utf-8-sig")
    lines = [
        {"file_name": "2.png", "text": "a blue disc"},
        {"file_name": "sub/4.png", "caption": ["a yellow disc", "x"]},
    ]
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def make_csv(folder: Path) -> None:
    for i in range(2):
        picture(size=(SIDE + i, SIDE)).save(folder / f"{i}.png")
    (folder / "metadata.csv").write_text('file_name,text\n0.png,"a red, round disc"\n1.png,a green disc\n')


def read_data(folder: Path, out: Path) -> None:
    """Run `sdkit data check`, then load every image and caption."""
    sdkit.data.check(folder, model=str(model()), size=SIDE)
    for example in sdkit.data.open_examples(folder):
        with suppress(SdkitError):
            example.load()


def make_tar(folder: Path) -> None:
    with tarfile.open(folder / "one.tar", "w") as archive:
        for i in range(2):
            buffer = io.BytesIO()
            picture(size=(SIDE + i, SIDE)).save(buffer, "PNG")
            fields = {"text": "a red disc", "width": SIDE}
            for suffix, data in (("png", buffer.getvalue()), ("txt", b"a disc"), ("json", json.dumps(fields).encode())):
                info = tarfile.TarInfo(f"a/{i}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def make_parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for i in range(2):
        buffer = io.BytesIO()
        picture(size=(SIDE + i, SIDE)).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": f"{i}.png"})
    pq.write_table(pa.table({"image": rows, "text": ["a red disc", "a green disc"]}), folder / "one.parquet")


def read_parquet(folder: Path, out: Path) -> None:
    sdkit.data.check(folder, model=str(model()), size=SIDE)
    for streaming in (False, True):
        for example in sdkit.data.open_examples(folder, streaming=streaming):
            with suppress(SdkitError):
                example.load()


# Latent caches


def make_cache(folder: Path) -> None:
    data = _made("cache-data", make_folder)
    sdkit.data.cache(model(), data, folder, size=SIDE, embeddings=True, shard_size=3, device="cpu")
    (folder / ".lock").unlink(missing_ok=True)


def repair_cache(folder: Path) -> None:
    """Correct sizes and checksums in the manifest, as if the cache had been made with the damaged content."""
    with suppress(Exception):
        manifest = json.loads(read_regular(folder / "manifest.json", 2**30))
        write_manifest(folder, manifest)  # so that it is valid even if the loop below raises
        for entry in [*manifest["shards"], manifest["empty"]]:
            data = read_regular(folder / entry["file"], 2**30)
            entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_manifest(folder, manifest)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a cache's manifest with its own checksum."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": checksum}))


def read_cache(folder: Path, out: Path) -> None:
    made = sdkit.data.LatentCache(folder)
    whole = sd()
    made.check_model(vae=whole.vae.identity, scale=whole.vae.scale)
    made.verify()
    for item in made:
        assert item["mean"].shape == item["logvar"].shape, "mean and logvar have other shapes"
    _ = made.empty


def resume_cache(folder: Path, out: Path) -> None:
    data = _made("cache-data", make_folder)
    sdkit.data.cache(model(), data, folder, size=SIDE, embeddings=True, shard_size=3, device="cpu")


def make_unfinished_cache(folder: Path) -> None:
    make_cache(folder)
    manifest = json.loads(read_regular(folder / "manifest.json", 2**30))
    manifest |= {"complete": False, "shards": [], "empty": None, "items": 0, "images": 0, "examples": 0, "skipped": []}
    write_manifest(folder, manifest)


# Runs


def make_unet_run(folder: Path) -> None:
    train_unet(folder, 1)


def train_unet(folder: Path, steps: int) -> None:
    from sdkit.training import UNetConfig
    from sdkit.training import train_unet as train

    data = _made("cache", make_cache)
    train(
        UNetConfig(
            data=data, out_dir=folder / "run", model=model(), max_steps=steps, validate_every=10, lora_rank=1,
            ema_decay=0,
        )
    )  # fmt: skip


TOY = ToySettings(max_steps=2, examples=4, discriminator=False, validate_every=10, batch_size=2)


def make_toy_run(folder: Path) -> None:
    fit(Toy(TOY), TOY, folder / "run")
    (folder / "run" / ".lock").unlink(missing_ok=True)


def resume_toy_run(folder: Path, out: Path) -> None:
    settings = replace(TOY, max_steps=3)
    fit(Toy(settings), settings, folder / "run")


def repair_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("run/checkpoints/step-*"):
        with suppress(Exception):
            manifest = json.loads(read_regular(checkpoint / "manifest.json", 2**30))
            names = [path.name for path in checkpoint.iterdir() if path.name != "manifest.json"]
            manifest["sha256"] = {n: hashlib.sha256(read_regular(checkpoint / n, 2**30)).hexdigest() for n in names}
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def read_run(folder: Path, out: Path) -> None:
    """Read a run's result as a LoRA, and plot its curves."""
    with suppress(SdkitError):
        read_lora(folder / "run" / "result")
    plot(folder / "run", out / "curves.png")


def make_settings(folder: Path) -> None:
    values: dict[str, Any] = {
        "data": str(_made("cache", make_cache)), "model": str(model()), "max_steps": 1, "lora_rank": 1, "seed": 3,
        "ema_decay": 0.0, "learning_rate": 1e-4, "lr_scheduler": "constant", "size": [SIDE, SIDE], "augment": [],
        "report_to": [],
    }  # fmt: skip
    (folder / "one.json").write_text(json.dumps({"stage": "UNetConfig", "settings": values}))


def read_settings(folder: Path, out: Path) -> None:
    """Run `sdkit train` with options that keep the run small."""
    small = ["--max-steps", "1", "--batch-size", "1", "--gradient-accumulation-steps", "1", "--lora-rank", "1"]
    main(["train", "unet", "--config", str(folder / "one.json"), "--out-dir", str(out / "run"), *small])


RUN = {"writes_input": True, "repair": repair_checkpoints}
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="image", make=make_images, read=read_images),
        Target(name="latent", make=make_latent, read=read_latent),
        Target(name="recipe", make=make_recipe, read=read_recipe),
        Target(name="prompts", make=make_prompts, read=read_prompts),
        Target(name="vae-config", make=parts("vae"), read=read_vae, files=("vae/config.json",)),
        Target(name="vae-weights", make=parts("vae"), read=read_vae, files=("vae/*.safetensors",)),
        Target(name="vae-pickle", make=as_pickles("vae"), read=read_vae, files=("vae/*.bin",)),
        Target(name="unet-config", make=parts("unet"), read=read_unet, files=("unet/config.json",)),
        Target(name="unet-weights", make=parts("unet"), read=read_unet, files=("unet/*.safetensors",)),
        Target(name="unet-pickle", make=as_pickles("unet"), read=read_unet, files=("unet/*.bin",)),
        Target(
            name="text-config", make=parts("text_encoder", "tokenizer"), read=read_text,
            files=("text_encoder/config.json",),
        ),
        Target(
            name="text-weights", make=parts("text_encoder", "tokenizer"), read=read_text,
            files=("text_encoder/*.safetensors",),
        ),
        Target(name="tokenizer", make=parts("text_encoder", "tokenizer"), read=read_text, files=("tokenizer/*",)),
        Target(
            name="tokenizer-vocabulary", read=read_text, files=("tokenizer/*",),
            make=lambda folder: (parts("text_encoder")(folder), make_tokenizer(folder / "tokenizer", fast=False)),
        ),
        Target(
            name="scheduler-config", make=parts("scheduler"), read=read_schedule,
            files=("scheduler/scheduler_config.json",),
        ),
        Target(
            name="model-folder", make=make_model, read=read_model,
            files=("model_index.json", "*/*.json", "*/*.safetensors"),
        ),
        Target(
            name="unclip", make=make_unclip, read=read_unclip,
            files=("prior*/*", "image_*/*"),
        ),
        Target(name="single-file", make=make_single(".safetensors"), read=read_single("one.safetensors")),
        Target(name="single-pickle", make=make_single(".ckpt"), read=read_single("one.ckpt")),
        Target(name="lora-diffusers", make=make_lora("diffusers"), read=read_one_lora("one.safetensors")),
        Target(name="lora-kohya", make=make_lora("kohya"), read=read_one_lora("one.safetensors")),
        Target(name="lora-lycoris", make=make_lycoris, read=read_one_lora("one.safetensors")),
        Target(name="lora-pickle", make=make_lora("peft", ".bin"), read=read_one_lora("one.bin")),
        *(
            Target(name=f"embedding-{name}", make=make_embedding(f"one.{name}"), read=read_one_embedding(f"one.{name}"))
            for name in ("safetensors", "pt")
        ),
        Target(name="prior", make=make_prior, read=read_prior, files=("prior/*",)),
        Target(name="vqvae2", make=make_vqvae2, read=read_vqvae2, files=("*",)),
        Target(name="clip", make=make_clip, read=read_clip, files=("config.json", "*.safetensors")),
        Target(name="folder", make=make_folder, read=read_data, files=("*", "sub/*")),
        Target(name="captions", make=make_folder, read=read_data, files=("*.txt", "*.jsonl")),
        Target(name="metadata-csv", make=make_csv, read=read_data, files=("*.csv",)),
        Target(name="tar", make=make_tar, read=read_data),
        Target(name="parquet", make=make_parquet, read=read_parquet),
        Target(name="cache", make=make_cache, read=read_cache, repair=repair_cache),
        Target(name="cache-resumed", make=make_cache, read=resume_cache, repair=repair_cache, writes_input=True),
        Target(name="cache-unfinished", make=make_unfinished_cache, read=resume_cache, writes_input=True),
        Target(
            name="checkpoint", make=make_toy_run, read=resume_toy_run,
            files=("run/checkpoints/step-*/*",), **RUN,  # type: ignore[arg-type]
        ),
        Target(
            name="run-folder", make=make_toy_run, read=resume_toy_run,
            files=("run/*.json*", "run/result/training.json"), **RUN,  # type: ignore[arg-type]
        ),
        Target(
            name="unet-checkpoint", make=make_unet_run, read=lambda folder, out: train_unet(folder, 2),
            files=("run/checkpoints/step-*/*", "run/*.json*"), **RUN,  # type: ignore[arg-type]
        ),
        Target(name="metrics", make=make_unet_run, read=read_run, files=("run/metrics.jsonl", "run/result/*")),
        Target(name="settings", make=make_settings, read=read_settings),
    )
}  # fmt: skip
