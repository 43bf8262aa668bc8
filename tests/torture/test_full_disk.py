"""What a disk that is really full does to runs: a small file system, or failing writes where none may be mounted."""

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

from sge_det import UserError
from sge_det.checkpoint.checkpointer import Checkpointer
from sge_det.checkpoint.safe_load import load_file
from sge_det.engine.claims import claimed_folder
from sge_det.engine.logs import LogFile
from sge_det.files import write_json

sys.path.insert(0, str(Path(__file__).parent))
from faulty_files import Faults

_faults = None


@pytest.fixture
def disk(tmp_path):
    """A folder of which :func:`filled` is true: of 256 kB, if this user may have one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with contextlib.suppress(OSError):  # there may be no such tool
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True)
    yield folder
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def filled(folder):
    """Within, there is no room left."""
    ballast = folder / "ballast"
    if not os.path.ismount(folder):
        _faults.at = _faults.counter.value + 1
        yield
        return
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


def in_child(function, folder):
    """In a process of its own, whose file functions may be spoiled; its exit code."""
    global _faults
    pid = os.fork()
    if not pid:
        try:
            if not os.path.ismount(folder):
                _faults = Faults(folder, kind="ENOSPC")
                _faults.install()
            function(folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def a_checkpoint(folder):
    checkpointer = Checkpointer(torch.nn.Linear(8, 8), str(folder))
    checkpointer.save("model_0000000", iteration=0)
    names = {path.name for path in folder.iterdir()}
    told = (
        r"model_0000001\.pth cannot be written \(the disk is full\), the last good checkpoint is .*model_0000000\.pth"
    )
    with filled(folder), pytest.raises(UserError, match=f"{told}: free some space$"):
        checkpointer.save("model_0000001", iteration=1)
    assert {path.name for path in folder.iterdir()} == names
    assert torch.equal(load_file(str(checkpointer.get_checkpoint_file()))["model"]["weight"], checkpointer.model.weight)


def a_start(folder):
    with (
        filled(folder),
        pytest.raises(UserError, match=r"^the disk that holds .* is full: free some space$"),
        claimed_folder(str(folder), lambda: {"config": {"key": "value" * 1000}}, changeable=lambda key: False),
    ):
        pass


def a_report(folder):
    path = folder / "report.json"
    write_json(path, {"AP": 1})
    with filled(folder), pytest.raises(UserError, match=r"report\.json is full: free some space$"):
        write_json(path, {"AP": 2, "more": "." * 10000})
    assert json.loads(path.read_text()) == {"AP": 1}
    assert not [name for name in os.listdir(folder) if name.endswith(".part")]


@pytest.mark.parametrize("action", [a_checkpoint, a_start, a_report])
def test_a_full_disk_is_told_and_costs_nothing_that_was_there(disk, action, capfd):
    assert in_child(action, disk) == 0, capfd.readouterr().err


def a_log(folder):
    logger = logging.Logger("of a run")
    logger.addHandler(LogFile(folder / "log.txt"))
    logger.warning("before")
    with filled(folder):
        for _ in range(5):
            logger.warning("." * 10000)
    logging.shutdown()


def test_a_log_on_a_full_disk_says_so_once(disk, capfd):
    assert in_child(a_log, disk) == 0
    told = capfd.readouterr().err
    assert re.fullmatch(r"warning: the disk that holds .*log\.txt is full: free some space; the log ends here\n", told)
    assert "before" in (disk / "log.txt").read_text()
