"""Sample data and tiny configs that several test files share."""

import collections
import logging
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import forked_python
import pytest

ROOT = Path(__file__).resolve().parent.parent

# So few and so small images that a detector trains on them in seconds.
TINY = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0", "MODEL.DEVICE", "cpu"),
]


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items):
    seen = collections.Counter()
    for item in items:
        grid = item.get_closest_marker("sampled")
        if grid:
            if seen[item.parent.nodeid, item.originalname] % grid.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[item.parent.nodeid, item.originalname] += 1


@pytest.fixture(autouse=True)
def _no_logs_to_closed_streams():
    """What an earlier test set up in this process may log to its captured output, which is closed by now."""
    for logger in (logging.getLogger(), *logging.root.manager.loggerDict.values()):
        for handler in [*getattr(logger, "handlers", ())]:
            if getattr(getattr(handler, "stream", None), "closed", False):
                logger.removeHandler(handler)


@pytest.fixture(scope="module", autouse=True)
def _files_go_with_their_tests(tmp_path_factory):
    """What a file's fixtures wrote goes with its last test, or the checkpoints of the whole suite fill a small disk."""
    folder = tmp_path_factory.getbasetemp()
    before = {*folder.iterdir()}
    yield
    for path in {*folder.iterdir()} - before:
        # a test's own folder (test_...) is kept where it failed
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(("sample", "test_")):
            shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """A folder with a small sample set in the plain layout."""
    from sge_det.data.sample import make_sample_coco

    folder = tmp_path_factory.mktemp("sample") / "sge_sample"
    make_sample_coco(folder, train=8, val=4, size=96, seed=3)
    return folder


@pytest.fixture(scope="session")
def sample_datasets(sample):
    """The sample set as ``--dataset`` triples."""
    return [
        (f"tiny_{split}", str(sample / f"annotations/instances_{split}.json"), str(sample / split))
        for split in ("train", "val")
    ]


@pytest.fixture
def run_tool(tmp_path):
    """Runs a script of tools/ as a person would, in a new interpreter; returns the finished process."""

    def run(name, *arguments, env=None):
        return subprocess.run(
            [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=500,
        )

    return run


@pytest.fixture
def fork_tool(tmp_path):
    """What ``run_tool`` does, without the seconds of a new interpreter's imports.

    For a tool that another test runs with ``run_tool``.
    """

    def run(name, *arguments):
        return forked_python.run([sys.executable, ROOT / "tools" / name, *arguments], cwd=tmp_path, timeout=500)

    return run


@pytest.fixture(scope="module")
def forked_runs():
    """The runs of a matrix are forked too."""
    from sge_det.gain import processes

    forked_python.serve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "subprocess", forked_python.SUBPROCESS)
        yield


@pytest.fixture
def call_tool(tmp_path, monkeypatch, capsys):
    """Calls ``main`` of a script of tools/ in this process, which spares its start; returns what ``run_tool`` does.

    For mistakes alone: a run that comes as far as Detectron2's ``default_setup`` leaves its log handlers behind.
    """

    def call(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(ROOT / "tools")
        tool = runpy.run_path(str(ROOT / "tools" / name))
        code = 0
        try:
            tool["main"]([*map(str, arguments)])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(name, code, printed.out, printed.err)

    return call
