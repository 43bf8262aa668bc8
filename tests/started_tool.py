"""Tools that run beside the tests, to be signalled."""

import importlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from conftest import ROOT
from detectron2.utils.logger import setup_logger

MICRO = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "DATALOADER.NUM_WORKERS", "0"),
]


class Started:
    """A tool in a group of its own, its output in a file."""

    def __init__(self, command, output):
        self.output = output
        with open(output, "w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def wait_for(self, text):
        self.wait_until(lambda: text in self.output.read_text())
        return self

    def wait_until(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.05)

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def children(self):
        pid = self.process.pid
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(child) for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]

    def end(self):
        """Its exit code and its last line."""
        code = self.process.wait(timeout=120)
        assert "Traceback" not in self.output.read_text()
        return code, self.output.read_text().strip().splitlines()[-1]


class Forked(Started):
    """A tool of one process, forked from this one, which spares the seconds of its imports; ``name`` without ".py"."""

    def __init__(self, name, arguments, output):
        self.output = output
        output.touch()
        self.process = _Child(os.fork())
        if not self.process.pid:
            try:
                _become(output)
                sys.path.insert(0, str(ROOT / "tools"))
                importlib.import_module(name).main(list(map(str, arguments)))
                os._exit(0)
            except SystemExit as end:
                sys.stderr.flush()
                os._exit(end.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)


def _become(output):
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    # what other tests have left here writes to pytest's files
    setup_logger.cache_clear()
    for name in (None, "detectron2", "fvcore", "sge_det"):
        logging.getLogger(name).handlers.clear()


class _Child:
    """As much of ``subprocess.Popen`` as is needed."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=120):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return self.returncode
