"""What disks, loader workers and other processes do to a run, in a sentence each."""

import errno
import os

from ..errors import Resumable, UserError, shortage
from ..files import cannot_write

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
# In the words of torch's backends, which raise RuntimeErrors of several kinds.
_CONNECTION = (
    *("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "NCCL", "Broken pipe"),
    *("DistNetworkError", "monitoredBarrier", "Connection refused", "client socket has timed out", "Socket Timeout"),
)


def in_words(error: BaseException, folder: str) -> UserError | None:
    """The sentence for an error that is neither a mistake in the code nor in what was given; None for any other.

    Args:
        error: what a run ended with.
        folder: its ``OUTPUT_DIR``.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        return cannot_write(error.filename or folder, error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return Resumable(f"{os.fsdecode(error.filename)} is not there any more: put it back")
    text = str(error)
    if lacking := shortage(error):
        # what a run may change on the way, and what only another may
        less = (
            ", lower DATALOADER.NUM_WORKERS, or begin a new run with less in SOLVER.IMS_PER_BATCH or more in "
            "SOLVER.GRADIENT_ACCUMULATION_STEPS"
        )
        return Resumable(lacking + less * ("memory" in lacking))
    if not isinstance(error, RuntimeError):
        return None
    if "DataLoader timed out" in text:
        return Resumable(
            "no loader worker gave a batch within DATALOADER.TIMEOUT seconds: they wait for a disk, or were stopped; "
            "raise DATALOADER.TIMEOUT or see to what they wait for"
        )
    if "DataLoader worker" in text:
        return Resumable(
            f"a loader worker ended ({' '.join(text.split())[:200]}): where memory is short lower "
            "DATALOADER.NUM_WORKERS"
        )
    if any(word in text for word in _CONNECTION):
        return Resumable(
            f"another process of the run is gone, or did not answer within --timeout ({' '.join(text.split())[:200]}): "
            "see to it"
        )
    return None
