from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sdkit import images
from sdkit.cli import main
from sdkit.cli.evaluate import COLUMNS
from sdkit.evaluation.generated_images import evaluate_images
from sdkit.loading.embedding_file import save_embedding
from tests.helpers.clip import save_clip
from tests.helpers.command_line import Ran
from tests.helpers.real_images import crops, save_all

pytestmark = pytest.mark.filterwarnings("ignore:.*are fewer than the:UserWarning")

QUICK = ("--steps", "1", "--dtype", "fp32", "--device", "cpu")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def call(*arguments: object) -> Ran:
        code = main(["evaluate", "images", *(str(argument) for argument in arguments)])
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make sets of images, prompts, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_all(crops(10, seed=1), folder / "made")
    save_all(crops(12, seed=0), folder / "real")
    save_all(crops(5, seed=0), folder / "few")
    (folder / "empty").mkdir()
    save_clip(folder / "clip")
    (folder / "prompts.txt").write_text("a cat\na dog\n# not one\na fox\na rocket\na cake\n", encoding="utf-8")
    (folder / "zorks.txt").write_text("a <zork>\na dog\na fox\na blorp\na cake\n", encoding="utf-8")
    (folder / "three.txt").write_text("a cat\na dog\na fox\n", encoding="utf-8")
    (folder / "none.txt").write_text("# nothing\n", encoding="utf-8")
    return folder


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def test_a_table_has_the_images_and_two_controls(run: Callable[..., Ran], work: Path) -> None:
    code, out, err = run("made", "--reference", "real")
    assert code == 0
    assert err.count("\n") == 1
    assert "10 images are fewer than the 1152 features of alex" in err
    head, columns, *rows = out.splitlines()
    assert head == "alex: 1152 features; images 224 x 224 pixels, antialiased bicubic, aspect ratio not kept"
    assert re.split(r" {2,}", columns.strip()) == [
        "N", "compared with", "Fréchet", "Fréchet, N→∞", "KID x 1000", "precision", "recall",
    ]  # fmt: skip
    assert [re.split(r" {2,}", row)[:3] for row in rows] == [
        ["generated", "10", "12"], ["half of the reference", "6", "6"], ["mean image", "10", "12"],
    ]  # fmt: skip
    found = evaluate_images("made", "real", device="cpu")
    assert f"  {found.generated['frechet']:.3f} (" in rows[0]
    assert f"  {1000 * found.floor['kid']:.3f}  " in rows[1]
    assert rows[2].endswith("0.000      0.000")


def test_json_holds_every_number(run: Callable[..., Ran], work: Path) -> None:
    clip = f"clip:{work / 'clip'}"
    code, out, _ = run("made", "--reference", "real", "--extractor", "alex", clip, "--prompts", "prompts.txt", "--json")
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"generated", "floor", "ceiling", "shuffled", "skipped"}
    metrics = {(score["extractor"], score["metric"]) for score in found["generated"]["scores"]}
    of_all = {"frechet", "frechet_at_infinity", "kid", "precision", "recall"}
    of_clip = of_all | {"cmmd", "clip_score", "clip_cosine"}
    assert metrics == {("alex", name) for name in of_all} | {(clip, name) for name in of_clip}
    assert {name for _, name in metrics} <= set(COLUMNS)
    table = run("made", "--reference", "real", "--extractor", clip, "--prompts", "prompts.txt").out
    assert [line.split("  ")[0] for line in table.splitlines()][2:] == [
        "generated", "half of the reference", "mean image", "shuffled prompts",
    ]  # fmt: skip


def test_a_model_draws_the_images(run: Callable[..., Ran], work: Path, sd: object) -> None:
    """With a LoRA, two embeddings, and other options that say how."""
    save_embedding("<zork>", torch.randn(1, 192), work / "zork.safetensors")
    lora = {"lora_unet_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3) / 9,
            "lora_unet_conv_in.lora_up.weight": torch.randn(64, 2, 1, 1) / 9}  # fmt: skip
    save_file(lora, work / "lora.safetensors")
    arguments = (
        "--model", "emoji", "--prompts", "zorks.txt", "--count", "2", "--seed", "7", *QUICK, "--lora",
        "lora.safetensors", "--lora-scale", "0.5", "--embedding", "zork.safetensors", "--embedding", "zork.safetensors",
        "--embedding-token", "<zork>", "--embedding-token", "blorp", "--negative-prompt", "a <zork>", "--height", "64",
        "--width", "72", "--sampler", "euler", "--scale", "3",
    )  # fmt: skip
    clip = f"clip:{work / 'clip'}"
    code, out, err = run(*arguments, "--reference", "real", "--extractor", "alex", clip, "--json")
    assert code == 0, err
    found = json.loads(out)["generated"]["scores"]
    assert found[0]["count"] == 10
    # They are the images of `sdkit generate`, and evaluated like them.
    made = work / "drawn"
    assert main(["generate", "--out", str(made), *arguments]) == 0
    options = ("--prompts", "zorks.txt", "--extractor", "alex", clip, "--device", "cpu", "--json")
    out = run(made, "--reference", "real", *options).out
    again = json.loads(out[out.index("{") :])["generated"]["scores"]  # after the paths that `generate` printed
    for a, b in zip(found, again, strict=True):
        assert a["metric"] == b["metric"]
        assert a["value"] == pytest.approx(b["value"], rel=1e-3, abs=1e-3)


def test_data_sets_of_other_kinds_are_read(run: Callable[..., Ran], work: Path) -> None:
    import tarfile

    with tarfile.open("made.tar", "w") as archive:
        for path in sorted(Path("made").iterdir()):
            archive.add(path)
    folder, shard = (json.loads(run(name, "--reference", "real", "--json").out) for name in ("made", "made.tar"))
    assert folder == shard


def test_an_unreadable_image_is_named_and_the_exit_code_tells(
    run: Callable[..., Ran], work: Path, tmp_path: Path
) -> None:
    torn = save_all(crops(9, seed=1), tmp_path / "torn")
    (torn / "0003.png").write_text("no image")
    code, out, err = run(torn, "--reference", "real")
    assert code == 1
    assert out.splitlines()[2].split()[1] == "8"
    assert f"0003.png is skipped: {torn / '0003.png'} is not an image" in err


CASES = {
    "made": "the following arguments are required: --reference",
    "--reference real": "there is nothing to measure; give GENERATED, or --model and --prompts",
    "made --reference real --model emoji": "GENERATED and --model both say what to measure",
    "--model emoji --reference real": "--model needs prompts to draw images from; give --prompts FILE",
    "made --reference real --count 3": "--count belongs to --model, and there is none; leave it out",
    "made --reference real --seed 0": "--seed belongs to --model",
    "made --reference real --lora x": "--lora belongs to --model",
    "made --reference real --compile": "--compile belongs to --model",
    "none --reference real": "none",
    "empty --reference real": "there is no image",
    "made --reference empty": "there is no image",
    "few --reference real": "5 generated images are too few to measure; give at least 8",
    "made --reference few": "5 reference images are too few to measure; give at least 8",
    "made --reference real --extractor vgg": "extractor 'vgg' is not one of 'alex', 'inception', 'dinov2', 'clip'",
    "made --reference real --extractor alex alex": "the extractor 'alex' is named twice",
    "made --reference real --extractor alex:x": "the weights of 'alex' are embedded; leave 'x' out",
    "made --reference real --extractor inception": "the weights of the FID's Inception network do not ship",
    "made --reference real --extractor inception:none.pth": "none.pth",
    "made --reference real --extractor dinov2:clip": "'clip' holds a network of type clip, not dinov2",
    "made --reference real --extractor clip:none": "'none' is neither a path that exists nor a Hub id",
    "made --reference real --extractor clip": "is not in the cache, and the Hub cannot be reached",
    "made --reference real --prompts none": "cannot read the prompts in none",
    "made --reference real --prompts none.txt": "there is no prompt in none.txt",
    "made --reference real --extractor clip:clip --prompts three.txt": "3 prompts cannot be assigned to 10 images",
    "made --reference real --batch-size 0": "batch_size must be a whole number of at least 1, not 0",
    "made --reference real --device gpu": "device 'gpu' cannot be used on this machine",
    "--reference real --model none --prompts three.txt --count 3": "'none' is neither a path that exists nor a Hub id",
    "--reference real --model emoji --prompts three.txt --count 0": "count must be a whole number of at least 1",
    "--reference real --model emoji --prompts three.txt --count 1": "3 generated images are too few to measure",
    "--reference real --model emoji --prompts three.txt --seed -1": "seed must be a whole number",
    "--reference real --model emoji --prompts three.txt --sampler x": "sampler 'x' is not one of",
    "--reference real --model none --prompts three.txt --lora none.bin": "the LoRA 'none.bin' does not exist",
    "--reference real --model none --prompts three.txt --embedding no.pt": "the embedding 'no.pt' does not exist",
    "--reference real --model emoji --prompts three.txt --lora-scale 1": "lora_scale belongs to a LoRA",
    "--reference real --model emoji --prompts three.txt --scale 1 --negative-prompt a": "--negative-prompt belongs to",
    "made --reference real --embedding-token x": "--embedding-token belongs to --model",
    "made --reference real --offload": "--offload belongs to --model",
    "made --reference real --count 0": "--count belongs to --model",
    "made --reference real --strength 0.5": "unrecognized arguments: --strength 0.5",
}


@pytest.mark.parametrize("command", CASES)
def test_bad_input_is_one_sentence(
    run: Callable[..., Ran], work: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.delenv("SDKIT_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code, out, err = run(*command.split())
    assert (code, out) == (2, ""), err
    assert err.startswith("sdkit: ")
    assert err.count("\n") == 1
    assert CASES[command] in err
    assert not re.search(r"[.!?] [A-Z]", err)


def test_a_folder_of_the_command_line_is_that_of_python(run: Callable[..., Ran], work: Path) -> None:
    out = run("made", "--reference", "real", "--json").out
    found = evaluate_images("made", "real", device="cpu")
    assert json.loads(out) == json.loads(json.dumps(found.asdict()))
    assert isinstance(images.read("made/0000.png"), Image.Image)
