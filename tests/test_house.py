"""The house's first rule, read from the source: imports point down, and never in a circle (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "sge_det"
# A room imports from lower floors and from itself. What is not named here stands beside the rooms: sge_det/__init__.py.
FLOORS = [
    {"errors", "layers", "markdown"},
    {"files"},
    {"config", "data", "evaluation"},
    {"modeling", "checkpoint", "solver"},
    {"engine"},
    {"analysis", "export", "hub"},
    {"gain"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS, 1) for room in rooms}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """``sge_det/gain/run.py`` -> ``gain.run``; a package is named after its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """The modules of sge_det, without that name, that a file imports anywhere in it, functions included."""
    found = set()
    package = ["sge_det", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    inside = {name.removeprefix("sge_det.") for name in found if name.startswith("sge_det.")}
    # "errors.UserError" is a name in the module "errors"
    return {name if name in NAMES else name.rpartition(".")[0] for name in inside} - {""}


def room(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path):
    own = room(name_of(path))
    assert own in FLOOR, f"{path} stands on no floor"
    assert not {name for name in imports(path) if room(name) != own and FLOOR[room(name)] >= FLOOR[own]}, (
        "from its own floor or a higher one"
    )


def test_no_circle():
    graph = {name_of(path): imports(path) - {name_of(path)} for path in MODULES}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for name in graph[module]:
                visit(name, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_layers_need_torch_alone():
    """At import: what a rival needs beyond that is imported when the rival is built."""
    for path in (PACKAGE / "layers").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and not node.level}
        assert not names & {"detectron2", "fvcore", "timm"}, path


def test_nothing_imports_tools():
    for path in PACKAGE.rglob("*.py"):
        assert "tools" not in {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom) and not node.level
                else []
            )
        }, path
