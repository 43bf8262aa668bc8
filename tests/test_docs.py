"""The documentation points at what is there."""

import argparse
import re
import runpy
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_house import FLOORS

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# CHANGELOG.md names what is there no more.
OF_NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]
# Of torchrun, Slurm, pip, timm's train.py and make torture.
ELSEWHERE = {
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--nodes", "--ntasks", "--ntasks-per-node"),
    *("--gpus-per-task", "--array", "--requeue", "--signal", "--no-build-isolation", "--experiment", "--programs"),
    "--every",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    files = [target.partition("#")[0] for target in targets if not re.match(r"https?:|#|mailto:", target)]
    assert [file for file in files if not (page.parent / file).exists()] == []


def options_of(parser):
    found = {*parser._option_string_actions}
    for action in parser._actions:
        for command in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            found |= options_of(command)
    return found


@pytest.fixture(scope="module")
def options():
    """The options of each script of tools/, by its name."""
    from sge_det.engine.pretraining.options import add_options
    from sge_det.engine.training import argument_parser

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        for path in (ROOT / "tools").glob("*.py"):
            if path.stem == "pretrain":  # which imports timm
                add_options(parser := argument_parser())
            else:
                parser = runpy.run_path(str(path)).get("parser", argument_parser)()
            found[path.name] = options_of(parser)
    found["check_config.py"].add("--images")
    found["measure_gain.py"] |= found["pretrain.py"]  # behind --pretrain
    return found


def named_options(page):
    """Each option in a page, behind the tool that is called with it; "" for one that a sentence names."""
    for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        is_code = re.match(r"    |\S*python |torchrun |srun |\w+=", line)
        call = is_code and re.search(r"tools/(\w+\.py)", line)
        for option in re.finditer(r"(?<![\w-])--[a-z][a-z0-9-]*", line):
            yield call[1] if call and option.start() > call.end() else "", option[0]


@pytest.mark.parametrize("page", OF_NOW, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_options_that_a_page_names_are_there(page, options):
    anyone = ELSEWHERE.union(*options.values())
    assert [(tool, name) for tool, name in named_options(page) if name not in options.get(tool, anyone)] == []


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
