"""Runs in processes of their own: how they are started, watched and stopped."""

import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import filelock
import torch

from ..engine.fingerprint import FINGERPRINT_FILE
from ..engine.stopping import asked
from ..errors import Resumable, UserError, exit_code
from ..files import cannot_write, disk_full, is_disk_full
from .run import Run
from .worker import RESUMABLE_EXIT

_STOPPED = exit_code(signal.SIGTERM)


class RunFailed(RuntimeError):
    """A run ended with an error that is not the user's: names the run, its log and the log's last line."""


@dataclass(frozen=True)
class Launch:
    """How each run is started; the fields are those of ``detectron2.engine.launch``.

    Attributes:
        imports: modules that each run imports first, for what they register.
    """

    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    imports: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this machine records the runs that it takes part in."""
        return self.machine_rank == 0


def check_jobs(launch: Launch, jobs: int, device: str) -> None:
    """Checks that so many runs at once have GPUs of their own, where they run on CUDA.

    Raises:
        UserError: there are fewer: all would share the first ones.
    """
    gpus, each = torch.cuda.device_count(), max(launch.num_gpus, 1)
    if jobs > 1 and gpus and device.startswith("cuda") and jobs * each > gpus:
        raise UserError(
            f"--jobs {jobs} of {each} GPUs each need {jobs * each}, but there are {gpus}: give --jobs "
            f"{max(gpus // each, 1)}"
        )


class RunProcess:
    """A run that is going on in a process of its own."""

    def __init__(self, run: Run, lock: filelock.BaseFileLock | None, launch: Launch, slot: int, jobs: int):
        self.run, self.lock = run, lock
        environment = os.environ.copy()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(cores // (jobs * max(launch.num_gpus, 1)), 1)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        gpus = torch.cuda.device_count()
        if jobs > 1 and gpus >= jobs * launch.num_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            own = visible[slot * launch.num_gpus : (slot + 1) * launch.num_gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        try:
            with open(run.log, "ab") as log:
                self.start_of_log = log.tell()
                # stdin stays open as long as this process lives; the run ends when it closes
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "sge_det.gain.worker", *run.command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise cannot_write(run.log, error) from error

    def ended(self) -> bool:
        """Whether the run has ended, well or as it was asked to; its lock is free then.

        Raises:
            UserError, RunFailed: it has ended, but not well.
        """
        code = self.process.poll()
        if code is None:
            return False
        self._release()
        is_finished = self.run.finished or self.lock is None
        if code == _STOPPED and asked() is not None:
            return True
        self._check_folder()
        if code == 0 and is_finished:
            return True
        if code == _STOPPED:
            raise Resumable(f"{self.run.name} was stopped by a signal")
        with open(self.run.log, "rb") as log:
            log.seek(self.start_of_log)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if code in (2, RESUMABLE_EXIT) and errors:
            raise (UserError if code == 2 else Resumable)(f"{self.run.name}: {errors[-1]}")
        if is_disk_full(self.run.folder):
            raise disk_full(self.run.folder)
        what = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"failed (exit {code})"
        last = lines[-1].strip() if lines else "(empty)"
        raise RunFailed(f"{self.run.name} {what}; its log is {self.run.log}, which ends with: {last}")

    def _check_folder(self) -> None:
        """What is in a folder that was removed in the middle of the run was written since, and is not whole."""
        folder = self.run.folder
        there = self.run.log.is_file() and (self.lock is None or (folder / FINGERPRINT_FILE).is_file())
        if not there:
            raise UserError(
                f"{folder} was removed while {self.run.name} was writing there: remove what is left of it and run the "
                "same command again"
            )

    def ask_to_stop(self) -> None:
        """The run's step ends, and a checkpoint is written, before its process ends."""
        with contextlib.suppress(OSError):
            self.process.stdin.write(b"s")
            self.process.stdin.flush()

    def stop(self) -> None:
        """Ends the run at once."""
        if self.process.poll() is None:  # otherwise its number may be another process's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._release()

    def _release(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if self.lock is not None:
            self.lock.release()
