"""Each case of the guide "What loads" is made and read anew, and must end as the guide says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.what_loads import GROUPS, GUIDE, Group, Kit, rows


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.mark.filterwarnings("default")  # warnings are part of the result
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.title)
def test_the_guide_says_what_happens(group: Group, kit: Kit, tmp_path: Path) -> None:
    """Sentences of other libraries are quoted, so the test needs the versions of requirements-lock.txt."""
    (section,) = [
        part for part in GUIDE.read_text(encoding="utf-8").split("\n## ") if part.startswith(f"{group.title}\n")
    ]
    found = [f"| {what} | {said} |" for what, said in rows(group, kit, tmp_path)]
    assert section.rstrip().splitlines()[4:] == found
