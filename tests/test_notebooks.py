"""The notebooks run as they are, with few steps of training and sampling, and their committed outputs come from their
current code.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path for path in FOLDER.glob("*.ipynb") if not path.stem.endswith("_zh"))
TRANSLATIONS = sorted(FOLDER.glob("*_zh.ipynb"))
FEW = {
    "STEPS": 4, "CONV_STEPS": 3, "MAE_STEPS": 3, "TEXTURE_STEPS": 3, "LATENT_STEPS": 3, "COUNTS": (2, 4), "EXACT": 8,
    "QUICK": 2, "PICTURES": 8, "CONTROL_STEPS": 2, "MAPS": 16, "MAP_STEPS": 2, "CLASS_IMAGES": 4, "OBJECT_STEPS": 2,
    "WORD_STEPS": 2, "VQ_STEPS": 4, "PRIOR_STEPS": 3, "TEXT_STEPS": 3, "CLIP_STEPS": 3, "DRAWS": 14, "EACH": 8,
    "JUDGE_STEPS": 3, "CLASSIFIER_STEPS": 3, "ABLATION_STEPS": 2,
    "GAN_STEPS": 16, "DECODER_STEPS": 3,
    "SCALE": 0.0006, "IMAGES": 16, "REPEATS": 2, "DEEP": 8,
    "DRAW_STEPS": 2, "STYLE_STEPS": 2, "LEVEL_STEPS": 2, "CROPS": 32, "MORE_STEPS": 2, "ROWS": 2, "CASCADE_STEPS": 2,
}  # fmt: skip
FIRST = """
from sdkit.pipelines.settings import DrawingSettings
from sdkit.training.stages import drawing
DrawingSettings.__init__.__kwdefaults__["num_inference_steps"] = drawing.VALIDATION_STEPS = 2
"""
"""A cell that is run before all others: where a notebook names no number of sampling steps, there are two."""


spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
assert spec
assert spec.loader
running = importlib.util.module_from_spec(spec)
spec.loader.exec_module(running)


def cells(path: Path) -> list[Any]:
    """Return the cells that contain code."""
    cells: list[Any] = running.code(nbformat.read(path, 4))
    return cells


def is_parameters(cell: Any) -> bool:
    return "parameters" in cell.metadata.get("tags", ())


def test_they_are_all_there() -> None:
    assert [int(path.stem[:2]) for path in NOTEBOOKS] == [*range(1, 13)]
    assert [path.stem for path in TRANSLATIONS] == [
        "01_encode_decode_zh", "02_text_to_image_zh", "03_autoencoders_zh", "04_ddpm_from_scratch_zh",
        "05_vector_quantisation_zh",
    ]  # fmt: skip


@pytest.mark.parametrize("path", [*NOTEBOOKS, *TRANSLATIONS], ids=lambda path: path.stem)
def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size <= 1.5e6


LONG = {"08_more_than_a_prompt"}
"""Notebooks that take about a minute even with few steps, where the others take seconds."""
RUNS = [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LONG else [], id=path.stem) for path in NOTEBOOKS]


@pytest.mark.parametrize("path", RUNS)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDKIT_LPIPS", raising=False)
    notebook = nbformat.read(path, 4)
    for cell in filter(is_parameters, notebook.cells):
        names = re.findall(r"^([A-Z_]+) = ", cell.source, re.MULTILINE)
        assert names
        cell.source = "\n".join(f"{name} = {FEW[name]!r}" for name in names)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_what_its_code_has_shown(path: Path) -> None:
    """Every cell must have been run in order and unchanged since, and its outputs include pictures and no error."""
    notebook = nbformat.read(path, 4)
    code = running.code(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert notebook.metadata.ran == running.digest(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    shown = [kind for output in outputs for kind in output.get("data", ()) if kind in ("image/png", "image/jpeg")]
    assert len(shown) >= 2


@pytest.mark.parametrize(("number", "told"), [("03", "+ LPIPS"), ("06", "SSIM      LPIPS")])
def test_lpips_took_part_where_it_is_shown(number: str, told: str) -> None:
    """Both notebooks leave LPIPS out if its weights are missing, so the committed outputs must show that
    it was there.
    """
    path = next(path for path in NOTEBOOKS if path.stem.startswith(number))
    printed = "".join(output.get("text", "") for cell in cells(path) for output in cell.outputs)
    assert told in printed


@pytest.mark.parametrize("path", TRANSLATIONS, ids=lambda path: path.stem)
def test_a_translation_has_the_code_and_what_it_shows(path: Path) -> None:
    original = path.with_stem(path.stem.removesuffix("_zh"))
    mine, its = ([(cell.source, cell.outputs) for cell in cells(one)] for one in (path, original))
    assert mine == its
