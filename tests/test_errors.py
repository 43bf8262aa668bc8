import errno
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sge_det.errors import UserError, user_errors


def ends(capsys, error):
    @user_errors
    def main():
        raise error

    with pytest.raises(SystemExit) as raised:
        main()
    return raised.value.code, capsys.readouterr().err


def test_a_users_mistake_is_a_line_and_code_2(capsys):
    assert ends(capsys, UserError("no\nsuch file")) == (2, "error: no such file\n")


@pytest.mark.parametrize("error", [TypeError("an odd\nthing"), RuntimeError(), OSError(28, "No space left on device")])
def test_any_other_error_is_a_line_and_its_traceback_a_file(capsys, error, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, told = ends(capsys, error)
    assert code == 1 and told.count("\n") == 1
    assert "a fault of sge_det or of the environment" in told and type(error).__name__ in told
    log = Path(re.search(r"the traceback is in (\S+)", told)[1])
    assert log.parent == tmp_path
    assert "Traceback" in log.read_text() and "raise error" in log.read_text()


SHORTAGES = {
    "too little memory (MemoryError): end what else uses it": MemoryError(),
    "too little memory (CUDA out of memory. Tried": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2 GiB"
    ),
    "too little memory ([Errno 12] Cannot allocate memory)": OSError(errno.ENOMEM, "Cannot allocate memory"),
    "too many files are open: raise the limit on them (ulimit -n)": OSError(errno.EMFILE, "Too many open files"),
    "raise the limit on sizes (ulimit -f)": OSError(errno.EFBIG, "File too large"),
    "raise the limits on them and on memory (ulimit -u, ulimit -v)": RuntimeError("can't start new thread"),
    "(ulimit -n), then run the same": RuntimeError("Too many open files. Communication with the workers is no longer"),
}


@pytest.mark.parametrize("words", SHORTAGES)
def test_what_the_machine_lacks_is_told_as_that(capsys, words):
    code, told = ends(capsys, SHORTAGES[words])
    assert code == 2 and told.startswith("error: ") and told.endswith(", then run the same command again to go on\n")
    assert words in told


def test_memory_that_really_lacks_is_told(capsys):
    @user_errors
    def main():
        torch.empty(1 << 60, dtype=torch.uint8)

    with pytest.raises(SystemExit, match="2"):
        main()
    assert "error: there is too little memory (" in capsys.readouterr().err


def test_a_file_that_is_not_allowed_to_grow_is_told(tmp_path):
    """In a process of its own, whose limit it is."""
    program = (
        "import pathlib, resource, sys; from sge_det.files import write_file; from sge_det.errors import user_errors;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        "user_errors(write_file)(pathlib.Path(sys.argv[1]), 'x' * 2000)"
    )
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith(
        f"error: {tmp_path / 'a'} cannot be written: a file may not become as large"
    )
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_goes_to_the_runs_log_where_there_is_one(capsys, tmp_path):
    log = logging.getLogger("sge_det")
    with open(tmp_path / "log.txt", "w") as file:
        handler = logging.StreamHandler(file)
        log.addHandler(handler)
        try:
            code, told = ends(capsys, ZeroDivisionError("by nought"))
        finally:
            log.removeHandler(handler)
    assert code == 1 and str(tmp_path / "log.txt") in told
    assert "ZeroDivisionError: by nought" in (tmp_path / "log.txt").read_text()


def test_no_place_for_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    code, told = ends(capsys, KeyError("x"))
    assert code == 1 and "KeyError: 'x'" in told and "could not be written" in told
