"""Signals that ask a run to end: Ctrl-C, SIGTERM, and SIGUSR1, which Slurm sends before the time is over."""

import contextlib
import os
import signal
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..errors import Stopped, exit_code

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Request:
    """What this process was asked; signals are of the whole process, so there is one."""

    def __init__(self):
        self.signum: int | None = None
        self.waits = False  # for the end of a step
        self.twice = True  # the second signal ends this process at once
        self.pid = 0

    def handle(self, signum: int, frame: object = None) -> None:
        if os.getpid() != self.pid:
            return  # a loader's worker, which ends with its parent
        again, self.signum = self.signum is not None, self.signum or signum
        if not self.waits:
            raise Stopped(self.signum)
        if not again:
            _say("stopping: the step ends first, and a checkpoint is written" + ("; again: at once" * self.twice))
        elif self.twice:
            _say("stopped at once")
            os._exit(exit_code(self.signum))


def _say(text: str) -> None:
    # a signal may come in the middle of a print
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


_request = _Request()


@contextlib.contextmanager
def signals_handled(*, twice: bool = True) -> Iterator[None]:
    """Within, the signals raise :class:`..errors.Stopped`, at once or where :func:`waiting` is left to say so.

    Args:
        twice: whether the second ends the process at once. Otherwise, for processes that are signalled by others of
            ours, which would be counted twice with a group's own, all are one.
    """
    around = vars(_request).copy()
    _request.signum, _request.waits, _request.twice, _request.pid = None, False, twice, os.getpid()
    before = {signum: signal.signal(signum, _request.handle) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        vars(_request).update(around)  # else the next run of this process would be asked to end as well


@contextlib.contextmanager
def waiting(wait: bool = True) -> Iterator[None]:
    """Within, a signal is only noted, for :func:`asked` to tell; or, without ``wait``, raises at once again."""
    before, _request.waits = _request.waits, wait
    try:
        if not wait and _request.signum is not None:
            raise Stopped(_request.signum)
        yield
    finally:
        _request.waits = before


def asked() -> int | None:
    """The signal that came, if one did."""
    return _request.signum


class StopHook(HookBase):
    """Ends the training after a step in which one of the processes was asked to, in all of them."""

    def after_step(self) -> None:
        signum = _request.signum or 0
        if comm.get_world_size() > 1:
            device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
            together = torch.tensor(signum, device=device)
            torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
            signum = int(together)
        if signum:
            raise Stopped(signum)
