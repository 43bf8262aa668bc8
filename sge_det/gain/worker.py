"""One run of the matrix in a process of its own.

python -m sge_det.gain.worker --config-file F ... OUTPUT_DIR D SEED K
"""

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from pathlib import Path

import filelock
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..analysis.pointing import pointing_game
from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.checksums import sha256
from ..config import sge_options
from ..data.loader import build_test_loader
from ..engine.launching import launch
from ..engine.training import argument_parser, build_seeded_model, setup_config, start_run, train
from ..errors import Resumable, UserError, user_errors
from ..files import remove_file, write_json
from ..modeling.gates import gate_statistics
from . import cost
from .run import PREDICTIONS_FILE, RESULT_FILE

# Of a run that goes on once something is put right; as in sysexits.h.
RESUMABLE_EXIT = os.EX_TEMPFAIL
# What a dead worker leaves running ends by itself in less than this many seconds.
_ORPHAN_SECONDS = 60


def _train_and_record(args: argparse.Namespace) -> None:
    import_modules(args.imports)
    cfg = setup_config(args.config_file, args.opts, args.dataset)
    folder = Path(cfg.OUTPUT_DIR)
    if comm.is_main_process():
        on_gpus = cfg.MODEL.DEVICE != "cpu"
        count = comm.get_world_size() * (1 if on_gpus else torch.get_num_threads())
        cost.begin(folder, "GPU" if on_gpus else "core", count)
    start_run(cfg, args)
    results = train(cfg, resume=True)
    if not comm.is_main_process():
        return
    shown = _what_gates_show(cfg)
    for checkpoint in folder.glob("model_[0-9]*.pth*"):
        remove_file(checkpoint)
    # the last file of a run, and what marks it as finished
    predictions = folder / PREDICTIONS_FILE
    digest = sha256(predictions) if predictions.is_file() else None
    record = {"schema": 1, **cost.end(folder), "results": results, "predictions": digest, **shown}
    write_json(folder / RESULT_FILE, record)


def _what_gates_show(cfg: CfgNode) -> dict:
    """The gates' statistics and the pointing game's figures on the validation images; empty without SGE."""
    if not sge_options(cfg).is_sge:
        return {"gates": {}, "pointing": {}}
    model = build_seeded_model(cfg)
    Checkpointer(model, cfg.OUTPUT_DIR, whole_model=True).resume_or_load("", resume=True)
    gates = gate_statistics(model, build_test_loader(cfg, cfg.DATASETS.TEST[0], alone=True))
    try:
        pointing = pointing_game(cfg, model)
    except UserError as error:  # no objects to point at: no reason to lose the run
        logging.getLogger(__name__).warning(f"the pointing game was not played: {error}")
        pointing = {}
    return {"gates": gates, "pointing": pointing}


def import_modules(names: list[str]) -> None:
    """Imports what registers backbones, data sets or heads of the user's own.

    Raises:
        UserError: there is no such module.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"--import {name}: {error}") from error


def _heed_parent() -> None:
    """Stops the run when the process that started it says so, and ends when that is gone: the pipe at stdin closes."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1):
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def parser() -> argparse.ArgumentParser:
    arguments = argument_parser(epilog=__doc__)
    arguments.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE")
    return arguments


@user_errors(go_on="")
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    _heed_parent()
    folder = Path(dict(zip(args.opts[::2], args.opts[1::2]))["OUTPUT_DIR"])
    name = ".run.lock" if args.machine_rank == 0 else f".run{args.machine_rank}.lock"
    try:
        with filelock.FileLock(folder / name, timeout=_ORPHAN_SECONDS):
            launch(_train_and_record, args, own_only=True, twice=False)
    except Resumable as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(RESUMABLE_EXIT)
    except filelock.Timeout as error:
        raise UserError(f"{folder} is being trained by another process: wait for it, or end it") from error


if __name__ == "__main__":
    main()
