"""The documentation points at what is there."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_house import FLOORS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [target.partition("#")[0] for target in targets if not re.match(r"https?:|#|mailto:", target)]
    assert [file for file in files if not (page.parent / file).exists()] == []


def test_the_architecture_names_every_room():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = [
        f"`{room}/`" if (ROOT / "sge_det" / room).is_dir() else f"`{room}.py`" for floor in FLOORS for room in floor
    ]
    assert [room for room in rooms if room not in text] == []


def test_the_files_to_read_first_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    first = re.search(r"these four first: (.*)", text)[1]
    assert len(files := re.findall(r"`([^`]+)`", first)) == 4
    assert all((ROOT / "sge_det" / file).is_file() for file in files)


def test_the_citation_is_of_this_version():
    import sge_det

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == sge_det.__version__
    assert "1905.09646" in citation["preferred-citation"]["url"]
    assert f"## {sge_det.__version__}" in Path(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
