"""What a run logs, told to a tracker too: Weights & Biases, MLflow or trackio, behind the key ``REPORT_TO``."""

import importlib
import json
import logging
import os
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage

from ..errors import UserError
from ..files import write_json

logger = logging.getLogger(__name__)

REPORT_FILE = "report_to.json"
_PROJECT = "sge_det"
# What has each tracker need no network.
_LOCAL = {
    "wandb": "WANDB_MODE=offline",
    "mlflow": "MLFLOW_TRACKING_URI=sqlite:///mlflow.db",
    "trackio": "no TRACKIO_SPACE_ID",
}
# What Detectron2's printer and its other writers average over.
_WINDOW = 20


class ImagesPerSecond(HookBase):
    """Logs how many images the run has trained on a second, beside the iteration's time and what is left of it.

    Args:
        count: images of a step, of all processes.
    """

    def __init__(self, count: int):
        self._count = count

    def after_step(self) -> None:
        latest = self.trainer.storage.latest().get("time")
        if latest is not None and latest[0] > 0:
            # Detectron2's printer shows what is named so
            self.trainer.storage.put_scalar("[metric]images/s", self._count / latest[0])


@dataclass(frozen=True)
class Tracker:
    """A run as a tracker has it.

    Attributes:
        run: by what it is found again.
        log: takes metrics and the number of the iteration.
        finish: ends it.
    """

    run: str
    log: Callable[[dict[str, float], int], None]
    finish: Callable[[], None]


class ReportWriter(EventWriter):
    """Hands what is logged on to a tracker; one that fails is told once, and the run goes on without it."""

    def __init__(self, name: str, tracker: Tracker):
        self._name, self._tracker = name, tracker
        self._last = -1

    def write(self) -> None:
        found: dict[int, dict[str, float]] = {}
        for name, (value, step) in get_event_storage().latest_with_smoothing_hint(_WINDOW).items():
            if step > self._last:
                found.setdefault(step, {})[name.removeprefix("[metric]")] = value
        for step, values in sorted(found.items()):
            self._last = step
            self._do(lambda values=values, step=step: self._tracker.log(values, step))

    def close(self) -> None:
        self._do(lambda: self._tracker.finish())
        self._tracker = None

    def _do(self, call: Callable[[], None]) -> None:
        if self._tracker is None:
            return
        try:
            call()
        except Exception as error:  # of a network, a disk or another program
            self._tracker = None
            logger.warning(f"{self._name} is told no more of this run ({type(error).__name__}: {_first_line(error)})")


def build_report_writer(cfg: CfgNode, config: dict | None = None) -> ReportWriter | None:
    """The writer that ``REPORT_TO`` asks for, in the main process; None where there is none.

    A run that goes on is the same one for the tracker, too.

    Args:
        cfg: with ``REPORT_TO`` and ``OUTPUT_DIR``.
        config: what the tracker is told of the run's settings; ``cfg`` by default.

    Raises:
        UserError: the tracker is not installed, or does not start.
    """
    name = cfg.get("REPORT_TO", "")
    if not name or not comm.is_main_process():
        return None
    module = import_tracker(name)
    path = Path(cfg.OUTPUT_DIR, REPORT_FILE)
    title = "/".join(Path(cfg.OUTPUT_DIR).absolute().parts[-2:])
    try:
        tracker = _START[name](module, title, _known_run(path, name), cfg.OUTPUT_DIR, config or _as_dict(cfg))
    except (Exception, SystemExit) as error:
        raise UserError(
            f"REPORT_TO {name}: it does not start ({_first_line(error)}): see to that ({_LOCAL[name]} keeps all here), "
            "or leave out REPORT_TO"
        ) from error
    write_json(path, {"tracker": name, "run": tracker.run})
    return ReportWriter(name, tracker)


def import_tracker(name: str):
    """The module of a tracker.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"REPORT_TO {name} needs a package that is not there ({error}): pip install {name}") from error


def _known_run(path: Path, name: str) -> str | None:
    try:
        content = json.loads(path.read_bytes())
        return str(content["run"]) if content["tracker"] == name else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["it says no more"])[0][:300]


def _wandb(module, title: str, known: str | None, folder: str, config: dict) -> Tracker:
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=title,
        id=known,
        resume="allow",
        dir=folder,
        config=config,
    )
    return Tracker(run.id, lambda values, step: run.log(values, step=step), run.finish)


def _mlflow(module, title: str, known: str | None, folder: str, config: dict) -> Tracker:
    module.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
    run = module.start_run(run_id=known, run_name=title)
    module.log_dict(config, "config.yaml")

    def log(values: dict[str, float], step: int) -> None:
        # a category's name may hold what no metric's name may
        module.log_metrics({re.sub(r"[^\w\-. :/]", "_", name): value for name, value in values.items()}, step=step)

    return Tracker(run.info.run_id, log, module.end_run)


def _trackio(module, title: str, known: str | None, folder: str, config: dict) -> Tracker:
    # it knows runs by their names, and would take another's of the same for this one
    run = module.init(
        project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
        name=known or f"{title}-{uuid.uuid4().hex[:8]}",
        resume="allow" if known else "never",
        config=config,
    )
    return Tracker(run.name, lambda values, step: module.log(values, step=step), module.finish)


_START: dict[str, Callable[..., Tracker]] = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def _as_dict(cfg: CfgNode) -> dict:
    return {key: _as_dict(value) if isinstance(value, CfgNode) else value for key, value in cfg.items()}
