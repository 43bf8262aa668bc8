"""A folder belongs to one run: none is written over by accident, none goes on as another."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..checkpoint.checkpointer import checkpoints
from ..errors import UserError
from ..files import cannot_write_output, make_output, remove_file, write_json
from .evaluations import EVALUATIONS_FILE
from .fingerprint import FINGERPRINT_FILE, Contents, differences, fingerprint, read_fingerprint
from .reporting import REPORT_FILE

logger = logging.getLogger(__name__)

LOCK_FILE = ".run.lock"
# How long a run goes, where, how it is watched and what it is tested with may change on the way.
_CHANGEABLE_KEYS = (
    *("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.SKIP_NONFINITE", "MODEL.DEVICE"),
    *("DATASETS.TEST", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
)
_CHANGEABLE_SECTIONS = ("TEST.", "SOLVER.BEST_CHECKPOINTER.", "SOLVER.EARLY_STOPPING.")
_LOGGED = ("metrics.json", EVALUATIONS_FILE, REPORT_FILE)


def _is_changeable(key: str) -> bool:
    return key in _CHANGEABLE_KEYS or key.startswith(_CHANGEABLE_SECTIONS)


@contextlib.contextmanager
def claimed(cfg: CfgNode, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """Holds ``OUTPUT_DIR`` for the run of ``cfg``, in all its processes at once.

    Args:
        resume: the run that is there goes on.
        overwrite: the run that is there is removed.

    Raises:
        UserError: it holds a run, and neither is said; or the run that should go on was made from something else; or
            another process is training there.
    """
    with claimed_folder(cfg.OUTPUT_DIR, functools.partial(_made_from, cfg), resume=resume, overwrite=overwrite):
        yield


def _made_from(cfg: CfgNode) -> dict:
    return fingerprint(cfg, Contents(coco_only=False), comm.get_world_size())


@contextlib.contextmanager
def claimed_folder(
    folder: str | Path,
    made_from: Callable[[], dict],
    *,
    resume: bool = False,
    overwrite: bool = False,
    changeable: Callable[[str], bool] = _is_changeable,
) -> Iterator[None]:
    """:func:`claimed` for runs of any kind.

    Args:
        made_from: returns the run's fingerprint.
        changeable: says of a key whether it may change on the way.

    Raises:
        UserError: as :func:`claimed`; or, at the end, the folder was removed in between.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        if comm.is_main_process():
            if resume and overwrite:
                raise UserError("--resume goes on with a run and --overwrite removes it: give one of them")
            make_output(folder)
            stack.enter_context(locked(folder))
            _prepare(folder, made_from(), resume, overwrite, changeable)
        comm.synchronize()
        yield
        if comm.is_main_process():
            check_still_there(folder / FINGERPRINT_FILE)


def check_still_there(first_file: Path) -> None:
    """Tells where somebody removed a run's folder in the middle: what is in it now was written since.

    Args:
        first_file: what the run wrote there before all else.

    Raises:
        UserError: it is gone.
    """
    if not first_file.is_file():
        raise UserError(
            f"{first_file.parent} was removed while the run was writing there, so that what is in it now is not whole: "
            "run the same command with --overwrite in place of --resume, or name another folder"
        )


@contextlib.contextmanager
def locked(folder: Path, option: str = "OUTPUT_DIR") -> Iterator[None]:
    """Holds ``folder`` against other processes.

    Args:
        option: of the command line, or key of a config, that names it.

    Raises:
        UserError: another has it, or it cannot be written.
    """
    lock = filelock.FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(f"{folder} is being trained by another process: wait for it, or end it") from error
    except OSError as error:
        raise cannot_write_output(folder, error, option) from error
    except NotImplementedError as error:
        raise UserError(f"{option} {folder} cannot be written ({error}): name another") from error
    try:
        yield
    finally:
        lock.release()


def _prepare(folder: Path, made_from: dict, resume: bool, overwrite: bool, changeable: Callable[[str], bool]) -> None:
    found = folder_holds(folder)
    if found and overwrite:
        remove_run(folder)
    elif found and resume:
        _compare(folder, made_from, changeable)
    elif found:
        raise UserError(
            f"{folder} holds a run ({found}): give the same command with --resume to go on with it or with "
            "--overwrite to remove it, or name another OUTPUT_DIR"
        )
    elif resume:
        logger.warning(f"--resume: {folder} has no checkpoint yet, the run starts at iteration 0")
    if not found:
        # what a run that was cut off before its first checkpoint logged
        for name in _LOGGED:
            remove_file(folder / name)
    write_json(folder / FINGERPRINT_FILE, made_from)


def folder_holds(folder: Path) -> str:
    """The name of what shows that a folder holds a run; empty where there is none."""
    found = checkpoints(folder)
    return found[0].name if found else "last_checkpoint" if (folder / "last_checkpoint").exists() else ""


def keeps_config(folder: str | Path) -> bool:
    """Whether a run was trained in ``folder``, so that the config there is the run's."""
    there = Path(folder)
    return (there / "config.yaml").is_file() and any(
        (there / name).exists() for name in (FINGERPRINT_FILE, "last_checkpoint")
    )


def remove_run(folder: Path) -> None:
    """Removes what a run would go on from; until the last of it is gone, it is refused or removed as before."""
    remove_file(folder / "result.json")
    for path in sorted(folder.glob("model_*.pth*"), key=lambda path: not path.name.endswith(".json")):
        remove_file(path)
    for name in ("last_checkpoint", *_LOGGED, FINGERPRINT_FILE):
        remove_file(folder / name)


def _compare(folder: Path, made_from: dict, changeable: Callable[[str], bool]) -> None:
    found = read_fingerprint(folder, "remove it to go on without this check")
    if found is None:
        logger.warning(f"{folder} has no {FINGERPRINT_FILE}: whether this config is the run's cannot be told")
        return
    found.setdefault("config", {})
    # the keys tell of what is named anew or no longer: a test set, which may change
    common = found.get("content", {}).keys() & made_from["content"].keys()
    counted = [
        {
            **made,
            "config": {key: value for key, value in made["config"].items() if not changeable(key)},
            "content": {name: content for name, content in made.get("content", {}).items() if name in common},
        }
        for made in (found, made_from)
    ]
    here = {key: counted[1][key] for key in ("version", "source", "processes")}
    difference = next(differences(counted[0] | here, counted[1]), None)
    if difference:
        raise UserError(
            f"{folder} holds a run made with {difference}: give it as it was to go on with --resume, or name another "
            "OUTPUT_DIR"
        )
    for change in differences(counted[1] | {key: found.get(key, {}) for key in here}, counted[1]):
        logger.warning(f"the run goes on, but not to the bit as it would have: it was made with {change}")
