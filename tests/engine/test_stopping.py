"""Signals, lost workers, lost processes and torchrun: real processes, and the advice that they print is followed."""

import os
import signal
import sys

import pytest
import torch
from conftest import ROOT, TINY
from started_tool import MICRO, Started

from sge_det.engine.launching import _find_free_port

WORKERS = ("DATALOADER.NUM_WORKERS", "1")


@pytest.fixture
def start(tmp_path, sample_datasets):
    started = []

    def call(folder, iterations, *last, options=(), before=(), fresh=False):
        data = [word for triple in sample_datasets for word in ("--dataset", *triple)]
        arguments = ["--config-file", "sample/faster_rcnn_SGE_R_50_FPN.yaml", *data, *options]
        arguments += [*TINY, *MICRO, "SOLVER.MAX_ITER", str(iterations), "OUTPUT_DIR", str(tmp_path / folder), *last]
        output = tmp_path / f"{folder}{len(started)}.txt"
        command = [sys.executable, "-W", "ignore", *before, str(ROOT / "tools/train_net.py"), *arguments]
        started.append(Started(command, output, fresh))
        return started[-1]

    yield call
    for each in started:
        each.kill()


def weights(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGUSR1", 143)])
def test_a_signal_ends_the_step_and_the_advice_ends_as_if_there_had_been_none(start, tmp_path, signum, code):
    """The whole group is signalled, as by Ctrl-C and by Slurm: the loader's worker too."""
    run = start("run", 5, *WORKERS).wait_for("Starting training")
    os.killpg(run.process.pid, getattr(signal, signum))
    assert run.end() == (code, "interrupted: give the same command with --resume to go on")
    (checkpoint,) = (tmp_path / "run").glob("model_*.pth")
    assert (tmp_path / "run/last_checkpoint").read_text() == checkpoint.name != "model_final.pth"
    if signum != "SIGINT":
        return
    # as a reader of the advice would add it, at the end
    assert start("run", 5, *WORKERS, "--resume", fresh=True).end()[0] == 0  # whatever its seed of hashes is
    assert start("whole", 5, *WORKERS).end()[0] == 0
    resumed, whole = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_the_second_signal_ends_at_once(start, tmp_path):
    run = start("run", 100000).wait_for("Starting training")
    os.kill(run.process.pid, signal.SIGSTOP)  # so that both arrive before a step's end
    os.kill(run.process.pid, signal.SIGTERM)
    os.kill(run.process.pid, signal.SIGINT)
    os.kill(run.process.pid, signal.SIGCONT)
    assert run.end() in ((130, "stopped at once"), (143, "stopped at once"))
    assert not list((tmp_path / "run").glob("model_*.pth"))


def test_two_processes_stop_together(start, tmp_path):
    run = start("two", 100000, options=["--num-gpus", "2"]).wait_for("Starting training")
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == (143, "interrupted: give the same command with --resume to go on")
    assert len(list((tmp_path / "two").glob("model_*.pth"))) == 1


@pytest.mark.parametrize(
    ("signum", "words"),
    [("SIGKILL", "process 1 of the run was killed by SIGKILL"), ("SIGSTOP", "did not answer within")],
)
def test_a_lost_process_is_told(start, signum, words):
    run = start("run", 100000, options=["--num-gpus", "2", "--timeout", "5"]).wait_for("Starting training")
    os.kill(run.children()[-1], getattr(signal, signum))
    code, line = run.end()
    assert code == 2
    assert words in line and line.endswith("give the same command with --resume to go on")


@pytest.mark.parametrize(
    ("signum", "words"), [("SIGKILL", "a loader worker ended"), ("SIGSTOP", "within DATALOADER.TIMEOUT seconds")]
)
def test_a_lost_worker_is_told(start, signum, words):
    run = start("run", 100000, "DATALOADER.NUM_WORKERS", "1", "DATALOADER.TIMEOUT", "2").wait_for("Starting training")
    run.wait_until(run.children)
    (worker,) = run.children()
    os.kill(worker, getattr(signal, signum))
    code, line = run.end()
    assert code == 2
    assert words in line and line.endswith("give the same command with --resume to go on")


@pytest.mark.slow
def test_torchrun_starts_one_run(start, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_find_free_port())]
    run = start("run", 1, before=torchrun)
    assert run.process.wait(timeout=120) == 0, run.output.read_text()
    assert run.output.read_text().count("Starting training") == 1
    assert (tmp_path / "run/log.txt.rank1").is_file()
