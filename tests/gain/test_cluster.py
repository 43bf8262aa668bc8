"""Jobs of submitit's local executor, whose command stands in for a run: it is preempted, fails, or ends well."""

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from sge_det.engine.stopping import signals_handled
from sge_det.errors import UserError
from sge_det.gain import Cluster, RunFailed, cluster

# DIR --run ARM SEED -- KEY VALUE; the arm says what becomes of it
COMMAND = """
import os, pathlib, signal, sys, time
folder, _, arm, seed = sys.argv[1:5]
own = pathlib.Path(folder, arm + seed)
def stop(*_):
    own.with_suffix(".checkpoint").write_text("half")
    print("interrupted", file=sys.stderr)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
if arm == "bad":
    sys.exit("error: no such image")
if arm == "long" and not own.with_suffix(".checkpoint").exists():
    own.with_suffix(".part").write_text(str(os.getppid()))
    own.with_suffix(".part").rename(own.with_suffix(".started"))
    time.sleep(100)
own.with_suffix(".result").write_text(" ".join(sys.argv[2:]))
"""


@dataclass
class Wanted:
    arm: SimpleNamespace
    seed: int
    folder: Path
    reference: "Wanted | None" = None
    name: str = field(init=False)

    def __post_init__(self):
        self.name = f"{self.arm.name}/seed{self.seed}"

    def file(self, kind):
        return self.folder / f"{self.arm.name}{self.seed}.{kind}"

    @property
    def finished(self):
        return self.file("result").exists()

    @property
    def is_ready(self):
        return self.reference is None or self.reference.finished


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_POLL_SECONDS", 0.1)
    monkeypatch.setattr(cluster, "summary", lambda run: run.name)

    def begin(*arms, **how):
        runs = [Wanted(SimpleNamespace(name=arm), seed, tmp_path) for seed in (0, 1) for arm in arms]
        device = SimpleNamespace(MODEL=SimpleNamespace(DEVICE="cpu"))
        matrix = SimpleNamespace(output=tmp_path, runs=runs, overrides=["A.B", "1"], config=device)
        jobs = Cluster("local", (sys.executable, "-c", COMMAND, str(tmp_path)), ("A.B", "1"))

        def execute():
            with signals_handled():  # as in the tool: jobs are cancelled by SIGINT, which a shell may have turned off
                return jobs.execute(matrix, **how)

        return runs, execute

    return begin


def preempt(run, signum=signal.SIGUSR2):
    """As a scheduler does it, once the run is going on."""
    while not run.file("started").exists():
        time.sleep(0.05)
    os.kill(int(run.file("started").read_text()), signum)


def test_a_job_that_is_preempted_is_queued_again_and_goes_on(start, capsys):
    runs, execute = start("quick", "long")
    preempted = [run for run in runs if run.arm.name == "long"]
    threads = [threading.Thread(target=preempt, args=(run,), daemon=True) for run in preempted]
    for thread in threads:
        thread.start()
    result = execute()
    assert (result.failed, result.left) == ({}, [])
    assert all(run.finished for run in runs)
    assert [run.file("checkpoint").exists() for run in preempted] == [True, True]
    assert runs[1].file("result").read_text() == "--run long 0 -- A.B 1"
    printed = capsys.readouterr().out
    assert printed.count("submitted") == printed.count("finished") == 4
    # once more: nothing is left to submit
    execute()
    assert "submitted" not in capsys.readouterr().out


def test_a_job_that_is_killed_is_told_and_ends_its_run(start):
    runs, execute = start("quick", "long", keep_going=True)
    signals = ((runs[1], signal.SIGKILL), (runs[3], signal.SIGUSR2))
    for how in signals:
        threading.Thread(target=preempt, args=how, daemon=True).start()
    result = execute()
    assert set(result.failed) == {"long/seed0"}
    assert [run.finished for run in runs] == [True, False, True, True]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not runs[1].file("checkpoint").exists():
        time.sleep(0.1)
    assert runs[1].file("checkpoint").exists()
    execute()  # the same command goes on
    assert runs[1].finished


def test_what_starts_from_another_run_waits_for_it(start, capsys):
    runs, execute = start("quick", "later")
    for reference, run in ((runs[0], runs[1]), (runs[2], runs[3])):
        run.reference = reference
    execute()
    assert capsys.readouterr().out.splitlines()[0].startswith("submitted quick/seed0")
    for run in (runs[1], runs[3]):
        assert run.file("result").stat().st_mtime_ns > run.reference.file("result").stat().st_mtime_ns


def test_a_run_that_fails_cancels_the_others(start):
    runs, execute = start("bad", "long")
    with pytest.raises(RunFailed, match=r"bad/seed\d .job \d+.: no such image"):
        execute()
    deadline = time.monotonic() + 20
    going = [run.file("started") for run in runs if run.file("started").exists()]
    while time.monotonic() < deadline and any(Path(f"/proc/{path.read_text()}").exists() for path in going):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{path.read_text()}").exists() for path in going)
    assert not any(run.finished for run in runs)


def test_a_run_that_fails_leaves_the_others_where_that_is_asked_for(start):
    runs, execute = start("bad", "quick", keep_going=True)
    runs[1].reference = runs[0]
    result = execute()
    assert set(result.failed) == {"bad/seed0", "bad/seed1", "quick/seed0"}
    assert "starts from bad/seed0, which has failed" in result.failed["quick/seed0"]
    assert runs[3].finished


def test_submitit_is_an_extra(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    _, execute = start("quick")
    with pytest.raises(UserError, match="pip install submitit"):
        execute()


def test_slurm_that_is_not_there_is_told(start, monkeypatch, tmp_path):
    runs, _ = start("quick")
    monkeypatch.setenv("PATH", str(tmp_path))
    matrix = SimpleNamespace(output=tmp_path, runs=runs, overrides=[], config=None)
    with pytest.raises(UserError, match="--cluster slurm"):
        Cluster("slurm", ("true",), partition="gpu", sbatch=(("account", "mine"),)).execute(matrix)
