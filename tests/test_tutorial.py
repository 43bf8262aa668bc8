"""The tutorial runs from its first cell to its last."""

import json
import re
import sys
import types

import pytest
from conftest import ROOT

# few and small enough for a test; a person waits ten minutes
SHORT = 'ITERATIONS, SEEDS, TRAIN_IMAGES, VALIDATION_IMAGES, JOBS = 2, (0, 1), 8, 4, 1\nOUTPUT = "output/tutorial"'


@pytest.fixture
def shown(monkeypatch):
    """What the cells display, in place of a notebook."""
    found = []
    module = types.ModuleType("IPython.display")
    module.Image = lambda source=None, data=None: ("image", source, data)
    module.Markdown = lambda text: ("markdown", text)
    module.display = found.append
    # matplotlib asks it, where it is there, whether it runs in a notebook
    package = types.ModuleType("IPython")
    package.version_info, package.get_ipython, package.display = (8, 24), lambda: None, module
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return found


def test_every_cell_runs(shown, forked_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    names = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = SHORT if "parameters" in cell["metadata"].get("tags", []) else "".join(cell["source"])
            exec(compile(code, cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    assert "sge - plain" in printed
    tables = [text for kind, text, *_ in shown if kind == "markdown"]
    assert "both" in tables[0]
    assert "AP50" in tables[1]
    pictured = [display for display in shown if display[0] == "image"]
    pictures = [data or (tmp_path / source).read_bytes() for kind, source, data in pictured]
    assert len(pictures) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert (tmp_path / "output/tutorial/report.html").stat().st_size > 10_000


def test_its_links_and_parameters():
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text(encoding="utf-8"))
    (parameters,) = [cell for cell in notebook["cells"] if cell["metadata"].get("tags") == ["parameters"]]
    named = {name for line in parameters["source"] for name in re.findall(r"[A-Z_]{3,}", line.partition("=")[0])}
    assert named == set(re.findall(r"[A-Z_]{3,}", "".join(part.partition("=")[0] for part in SHORT.splitlines())))
    text = "".join("".join(cell["source"]) for cell in notebook["cells"])
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert [target for target in targets if not (ROOT / "docs" / target).exists()] == []
    assert len(targets) > 5
