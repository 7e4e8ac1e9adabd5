"""The package as a whole: its exports, its imports, its requirements, and the content of a built wheel."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pydoc
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import sdkit
from sdkit.diffusion.guidance import APG
from sdkit.networks.autoencoder import Forward
from sdkit.training import UNetConfig, VAEConfig

ROOT = Path(__file__).parents[1]
# Packages that need the extra `train`
TRAINING = {
    "data",
    "training",
    "recipes",
    "losses.py",
    "lpips.py",
    "discriminator.py",
    "lora.py",
    "latent_cache",
    "training.py",
}
MODULES = sorted((ROOT / "sdkit").rglob("*.py"))
HEAVY = ("torch", "numpy", "PIL", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub", "tqdm")


def run(*arguments: str) -> str:
    """Run Python in a subprocess in the repository's root. Return its output, and fail if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["sdkit", "sdkit.cli"])
def test_import_loads_no_heavy_library(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}} & {set(HEAVY)}))"
    assert run("-c", code).split() == []


def test_all_is_sorted_and_without_repetition() -> None:
    assert sdkit.__all__ == sorted(set(sdkit.__all__))


def test_all_matches_what_is_loaded_lazily_and_what_dir_lists() -> None:
    lazy = {*sdkit._HOMES, *sdkit._MODULES}
    eager = {name for name, value in vars(sdkit.errors).items() if isinstance(value, type)}
    assert lazy | eager | {"__version__"} == set(sdkit.__all__)
    assert set(sdkit.__all__) <= set(dir(sdkit))


@pytest.mark.parametrize("name", sdkit.__all__)
def test_each_exported_name_is_there_and_documented(name: str) -> None:
    value = getattr(sdkit, name)
    if name == "__version__":
        return
    assert value.__name__ in (name, f"sdkit.{name}")
    # Dataclasses and named tuples without a docstring get their signature as one.
    assert value.__doc__
    assert not value.__doc__.startswith(f"{name}(")


@pytest.mark.parametrize(
    "cls", [sdkit.NoiseSchedule, sdkit.Step, sdkit.Prediction, APG, Forward, VAEConfig, UNetConfig]
)
def test_help_tells_of_each_field(cls: type) -> None:
    """Inherited fields must be documented too."""
    doc = inspect.cleandoc(cls.__doc__ or "")
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {*cls._fields}
    assert {*re.findall(r"^ {4}(\w+): ", doc.partition("Attributes:")[2], flags=re.MULTILINE)} == fields
    assert doc.rstrip().splitlines()[-1].strip() in pydoc.plain(pydoc.render_doc(cls))


def test_an_unknown_name_reads_as_any_other_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'sdkit' has no attribute 'VEA'$"):
        _ = sdkit.VEA
    with pytest.raises(ImportError, match="cannot import name 'VEA' from 'sdkit'"):
        from sdkit import VEA  # noqa: F401


def test_every_user_error_derives_from_sdkit_error() -> None:
    errors = [value for value in vars(sdkit.errors).values() if isinstance(value, type)]
    assert len(errors) > 1
    assert all(issubclass(error, sdkit.SdkitError) for error in errors)
    assert issubclass(sdkit.ArgumentError, ValueError)


def imported_by(path: Path) -> set[str]:
    """Return the top-level names of all imports in a file, including those inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_no_test_module_imports_another() -> None:
    """Code that several test modules need belongs in tests/helpers."""
    modules = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{name}" for name in names]
            parts = {part for name in names for part in name.split(".")}
            assert not parts & modules, f"{path.relative_to(ROOT)} imports a test module"


def test_only_one_helper_looks_outside_the_repository() -> None:
    """No other file of the tests or benchmarks may go above the root or name the folder beside it."""
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if path == ROOT / "tests" / "helpers" / "shared_data.py":
                continue
            depth = len(path.relative_to(ROOT).parts)  # parents[depth - 1] is the root
            text = path.read_text(encoding="utf-8")
            climbs = [int(found) for found in re.findall(r"__file__\)(?:\.resolve\(\))?\.parents\[(\d+)\]", text)]
            assert all(climb < depth for climb in climbs), path
            assert not re.search(r"""/ ["']shared["']|["']\.\./shared""", text), path


def requirements() -> dict[str, set[str]]:
    """Return the normalised distribution names in pyproject's requirements, in each extra, and in the lock file."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(\w+) = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    names = {name: re.findall(r'^    "([\w.-]+)[<>=]', body, flags=re.MULTILINE) for name, body in lists}
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    names["lock"] = re.findall(r"^([\w.-]+)==\S+$", lock, flags=re.MULTILINE)
    return {name: {re.sub(r"[-_.]+", "-", item).lower() for item in items} for name, items in names.items()}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_is_required(path: Path) -> None:
    imported = imported_by(path) - set(sys.stdlib_module_names) - {"sdkit"}
    distributions = {
        "PIL": "pillow",
        "huggingface_hub": "huggingface-hub",
        "resvg_py": "resvg-py",
        "sklearn": "scikit-learn",
    }
    # The demo and the recipe use scikit-image's photos if it is installed; only type checkers read typing_extensions.
    optional = {"skimage", "typing_extensions"}
    extra = requirements()["train"] if TRAINING & set(path.parts) else set()
    extra |= requirements()["recipes"] if "recipes" in path.parts else set()
    assert {distributions.get(name, name) for name in imported} - optional <= requirements()["dependencies"] | extra


def test_torchvision_is_needed_nowhere() -> None:
    assert all("torchvision" not in names for names in requirements().values())
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        assert "torchvision" not in imported_by(path), path


def test_the_lock_names_every_direct_requirement_and_each_once() -> None:
    names = requirements()
    assert names["dependencies"] | names["train"] | names["dev"] <= names["lock"]
    lock = (ROOT / "requirements-lock.txt").read_text(encoding="utf-8")
    pinned = [line for line in lock.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pinned)  # no index, URL, hash, or local build
    assert len(pinned) == len(names["lock"])
    assert not any(name.startswith(("nvidia", "triton")) for name in names["lock"])


def test_the_wheel_holds_the_package_whole_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob(f"sdkit-{sdkit.__version__}-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = archive.read(f"sdkit-{sdkit.__version__}.dist-info/METADATA").decode()
        entry_points = archive.read(f"sdkit-{sdkit.__version__}.dist-info/entry_points.txt").decode()
    files = (path for path in (ROOT / "sdkit").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert packed == {path.relative_to(ROOT).as_posix() for path in files}
    assert {Path(name).suffix for name in packed} <= {
        "",
        ".py",
        ".json",
        ".safetensors",
        ".jpg",
        ".png",
        ".webp",
        ".md",
        ".txt",
        ".tsv",
        ".typed",
    }
    assert {
        "sdkit/py.typed",
        "sdkit/assets/emoji/vae/diffusion_pytorch_model.safetensors",
        "sdkit/assets/lpips_alex/lpips_alex.safetensors",
    } <= packed
    licences = "Apache-2.0 AND MIT AND CC-BY-4.0 AND CC0-1.0 AND BSD-2-Clause AND BSD-3-Clause"
    assert f"License-Expression: {licences}\n" in metadata
    for folder in ("", "sdkit/assets/emoji/", "sdkit/assets/clip_tokenizer/", "sdkit/assets/lpips_alex/"):
        assert f"License-File: {folder}LICENSE\n" in metadata
    assert "sdkit = sdkit.cli:main" in entry_points
