import logging
import re
from pathlib import Path

import pytest

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
