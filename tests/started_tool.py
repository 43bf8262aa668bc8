"""Tools that run beside the tests, to be signalled."""

import os
import signal
import subprocess
import time
from pathlib import Path

import forked_python

_HEADS = [
    *("MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "20", "DATALOADER.NUM_WORKERS", "0"),
]
# Its steps take long enough for a signal to come in one.
MICRO = ["MODEL.RESNETS.DEPTH", "18", *_HEADS]
# So narrow that a step and a checkpoint take no time.
NARROW = [
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.STEM_OUT_CHANNELS", "4", "MODEL.SGE.GROUPS", "4"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", *_HEADS),
]


class Started:
    """A tool in a group of its own, its output in a file; forked, or in a new interpreter."""

    def __init__(self, command, output, fresh=False):
        self.output = output
        with open(output, "w") as file:
            self.process = (subprocess.Popen if fresh else forked_python.start)(
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
