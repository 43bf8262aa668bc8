"""Runs as jobs of a scheduler, through submitit: Slurm, or this machine, which is how it is tested."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .matrix import Execution, Matrix, summary
from .processes import RunFailed
from .run import Run

KINDS = ("slurm", "local")
_POLL_SECONDS = 2.0
_MOST_TIMEOUTS = 1000
# Linux's prctl: the signal that a process gets when the one that started it ends.
_PR_SET_PDEATHSIG = 1
# Before a job is ended: a step, and its checkpoint on the disk.
_SIGNAL_SECONDS = 180


@dataclass(frozen=True)
class Cluster:
    """Where runs go as jobs.

    Attributes:
        kind: "slurm", or "local" for jobs on this machine.
        command: what runs one of them, but for ``--run ARM SEED`` and the overrides behind it.
        overrides: KEY VALUE ..., for all runs.
        hours: after which a job is stopped, and queued again where it is not done.
        gpus: of a job.
        partition: of Slurm; "" for its default.
        sbatch: further options for Slurm, by name.
    """

    kind: str
    command: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    hours: float = 24.0
    gpus: int = 1
    partition: str = ""
    sbatch: tuple[tuple[str, str], ...] = ()

    def execute(self, matrix: Matrix, *, wait: bool = True, keep_going: bool = False) -> Execution:
        """Submits a job for each run that has not finished, and follows them to their end.

        A job that is preempted, or whose time is over, writes a checkpoint, is queued again and goes on from it.

        Args:
            matrix: whose runs.
            wait: until they have ended; otherwise those that can start are left in the queue.
            keep_going: a run that fails does not end the others.

        Raises:
            RunFailed: a run failed, and the other jobs are cancelled; not with ``keep_going``.
            UserError: submitit or the scheduler is not there, or does not take the jobs.
        """
        executor = self._executor(matrix)
        result = Execution()
        waiting = [run for run in matrix.runs if not run.finished]
        jobs: dict[str, tuple[Run, Any]] = {}
        try:
            while waiting or jobs:
                self._submit(executor, waiting, jobs, result)
                if not wait:
                    result.left = [run.name for run in (*waiting, *(run for run, _ in jobs.values()))]
                    jobs.clear()
                    return result
                for name, (run, job) in list(jobs.items()):
                    if not job.done():
                        continue
                    del jobs[name]
                    if run.finished:
                        print(f"finished {summary(run)}", flush=True)
                        continue
                    result.failed[name] = f"{name} (job {job.job_id}): {_last_line(job)}"
                    if not keep_going:
                        raise RunFailed(result.failed[name])
                    print(f"failed, the others go on: {result.failed[name]}", flush=True)
                if jobs:
                    time.sleep(_POLL_SECONDS)
        finally:
            for _, job in jobs.values():
                job.cancel(check=False)
        return result

    def _submit(self, executor: Any, waiting: list[Run], jobs: dict[str, tuple[Run, Any]], result: Execution) -> None:
        """Submits what can start by now, as an array; what starts from a run that has failed fails too."""
        for run in [run for run in waiting if run.reference is not None and run.reference.name in result.failed]:
            waiting.remove(run)
            result.failed[run.name] = f"{run.name} starts from {run.reference.name}, which has failed"
        ready = [run for run in waiting if run.is_ready]
        if not ready:
            return
        try:
            with executor.batch():
                submitted = [executor.submit(RunJob(self._command_of(run))) for run in ready]
            numbers = [job.job_id for job in submitted]
        except Exception as error:  # of a program of the scheduler's
            text = " ".join(str(error).split())[:300]
            raise UserError(f"--cluster {self.kind} does not take the jobs ({type(error).__name__}: {text})") from error
        for run, job, number in zip(ready, submitted, numbers, strict=True):
            waiting.remove(run)
            jobs[run.name] = (run, job)
            print(f"submitted {run.name} as job {number}, its output in {job.paths.folder}", flush=True)

    def _command_of(self, run: Run) -> list[str]:
        return [*self.command, "--run", run.arm.name, str(run.seed), "--", *self.overrides]

    def _executor(self, matrix: Matrix) -> Any:
        try:
            import cloudpickle
            import submitit
        except ImportError as error:
            raise UserError(f"--cluster needs submitit ({error}): pip install submitit") from error
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        folder = matrix.output / "jobs" / "%j"
        try:
            # a job whose time is over goes on in the next, as often as it takes
            executor = submitit.AutoExecutor(
                folder=str(folder),
                cluster=self.kind,
                **{f"{self.kind}_max_num_timeout": _MOST_TIMEOUTS},
            )
            executor.update_parameters(**self._parameters(matrix))
        except Exception as error:
            raise UserError(f"--cluster {self.kind} cannot be used: {' '.join(str(error).split())[:300]}") from error
        return executor

    def _parameters(self, matrix: Matrix) -> dict[str, Any]:
        # a login node has no GPU, where the config's device says nothing
        is_cpu = "cpu" in matrix.overrides[1::2] if self.kind == "slurm" else matrix.config.MODEL.DEVICE == "cpu"
        gpus = 0 if is_cpu else self.gpus
        found = {"name": "sge_gain", "timeout_min": max(int(self.hours * 60), 1), "gpus_per_node": gpus}
        if self.kind == "slurm":
            found |= {"nodes": 1, "tasks_per_node": 1, "slurm_signal_delay_s": _SIGNAL_SECONDS}
            found |= {"slurm_additional_parameters": dict(self.sbatch)} if self.sbatch else {}
            found |= {"slurm_partition": self.partition} if self.partition else {}
        return found


class RunJob:
    """A run in a job of its own; what submitit calls there.

    It goes there by value, so that the job's process, which waits, does not import Detectron2.
    """

    def __init__(self, command: Sequence[str]):
        self.command = list(command)
        self.process = None

    def __call__(self) -> int:
        libc = ctypes.CDLL(None)
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # not the job's, whose processes the scheduler signals one by one
            # where the job is killed the run writes a checkpoint and ends, rather than going on unseen
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM),
        )
        try:
            while self.process.poll() is None:
                time.sleep(0.2)
        except KeyboardInterrupt:  # cancelled
            self.process.terminate()
            raise
        if self.process.returncode:
            raise RuntimeError(f"{shlex.join(self.command)} ended with exit code {self.process.returncode}")
        return 0

    def checkpoint(self):
        """Ends the run after its step, with a checkpoint; returns what goes on with it."""
        import submitit

        if self.process is not None:
            os.kill(self.process.pid, signal.SIGTERM)
            # no wait(), which this, a signal's handler, may have interrupted
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(type(self)(self.command))


def _last_line(job: Any) -> str:
    """What a job that failed said last."""
    try:
        text = Path(job.paths.stderr).read_text(errors="replace")  # a bar of progress returns to its line's start
        lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    except OSError:
        lines = []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    silent = f"it ended without a word, as what is killed does; its output is in {job.paths.folder}"
    return (errors or lines or [silent])[-1].strip()
