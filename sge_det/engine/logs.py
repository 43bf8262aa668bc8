"""A run's log, which never ends the run, and says in one line that it cannot be written."""

import argparse
import contextlib
import logging
import sys
from pathlib import Path

from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger

from ..files import cannot_write, cannot_write_output, make_output

_LOGGERS = ("fvcore", "detectron2", "sge_det")


class LogFile(logging.FileHandler):
    """Appends to a file; where that fails, it says so once and gives up."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S"))
        self.failed = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.failed:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self.failed = True
        print(f"warning: {cannot_write(Path(self.baseFilename), error)}; the log ends here", file=sys.stderr)

    def flush(self) -> None:
        # what could not be written stays in the buffer, and would raise again
        if self.failed:
            return
        super().flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def start_logs(folder: str | Path, args: argparse.Namespace, described: str) -> None:
    """Logs to the screen and to ``log.txt`` in the folder of a run.

    Args:
        folder: of the run, ``OUTPUT_DIR``.
        args: of the command.
        described: the full config.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, rank = Path(folder), comm.get_rank()
    make_output(folder)
    log = None
    try:
        log = LogFile(folder / ("log.txt" if rank == 0 else f"log.txt.rank{rank}"))
    except OSError as error:
        raise cannot_write_output(folder, error) from error
    for name in _LOGGERS:
        logger = setup_logger(None, distributed_rank=rank, name=name)
        for before in [handler for handler in logger.handlers if isinstance(handler, LogFile)]:
            logger.removeHandler(before)
            before.close()
        logger.addHandler(log)
    logger = logging.getLogger("detectron2")
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info("Environment info:\n" + collect_env_info())
    logger.info(f"Command line arguments: {args}")
    logger.info(f"Running with full config:\n{described}")
