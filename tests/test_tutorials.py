"""The page "From the tutorial to the cell": each section, name, and command on it exists."""

from __future__ import annotations

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from sdkit.cli.commands import _parser

FOLDER = Path(__file__).parents[1] / "notebooks"
PAGE = (FOLDER / "tutorials.md").read_text(encoding="utf-8")
ROWS = [row for row in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE, re.MULTILINE) if row[0] != "idea"]


def headings(notebook: str) -> list[str]:
    """Return the headings of a notebook, without marks."""
    cells = json.loads((FOLDER / notebook).read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.findall(r"^#+ (.+)$", text, re.MULTILINE)


def test_ideas_are_listed_once() -> None:
    ideas = [idea for idea, _, _ in ROWS]
    assert len(ideas) == len(set(ideas)) > 50
    assert not any(section == tool == "-" for _, section, tool in ROWS)


@pytest.mark.parametrize(("idea", "section"), [row[:2] for row in ROWS if row[1] != "-"])
def test_the_section_exists(idea: str, section: str) -> None:
    found = re.fullmatch(r"\[(\d+): (.+)\]\((\S+\.ipynb)\)", section)
    assert found, idea
    number, title, notebook = found.groups()
    assert notebook.startswith(f"{int(number):02}_")
    assert any(heading.startswith(title) for heading in headings(notebook)), (title, headings(notebook))


@pytest.mark.parametrize("name", sorted({*re.findall(r"`(sdkit\.[\w.]+)`", PAGE)}))
def test_the_name_exists(name: str) -> None:
    """A module, or a chain of attributes of one."""
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part)
        return
    pytest.fail(name)


@pytest.mark.parametrize("command", sorted({*re.findall(r"`sdkit ([a-z][^`]*)`", PAGE)}))
def test_the_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its help has each of its options."""
    words = command.split()
    options = [word for word in words if word.startswith("--")]
    with pytest.raises(SystemExit):
        _parser().parse_args([*words[: 1 + (words[0] in ("train", "evaluate"))], "--help"])
    told = capsys.readouterr().out
    assert all(re.search(rf"{option}\b", told) for option in options)
