"""The guide "What loads" says what happens: each of its cases is made and read anew."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.what_loads import GROUPS, GUIDE, Group, Kit, rows


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.mark.filterwarnings("default")  # warnings are written down
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_the_guide_says_what_happens(group: Group, kit: Kit, tmp_path: Path) -> None:
    """With the versions of requirements-lock.txt: some sentences quote another library."""
    (section,) = [
        part for part in GUIDE.read_text(encoding="utf-8").split("\n## ") if part.startswith(f"{group.title}\n")
    ]
    found = [f"| {what} | {said} |" for what, said in rows(group, kit, tmp_path)]
    assert section.rstrip().splitlines()[4:] == found
