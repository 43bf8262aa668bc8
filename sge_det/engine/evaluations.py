"""What the evaluations of a run found, the best checkpoint by it, and the end of runs that get no better."""

import logging
import math
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.engine.hooks import BestCheckpointer
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..checkpoint.checkpointer import Checkpointer, remove_checkpoint
from ..errors import UserError
from ..files import read_json, write_json

logger = logging.getLogger(__name__)

EVALUATIONS_FILE = "evaluations.json"
BEST = "model_best"


class Settled(BaseException):
    """The run has got no better for so long that its training ends."""


class Evaluations:
    """The metrics of a run's evaluations by the number of iterations done, kept in its folder.

    They are written at once: a run that is cut off between an evaluation and the next checkpoint knows of it, and one
    that goes on from before an evaluation forgets it and does it again.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder, EVALUATIONS_FILE)
        self.values: dict[int, dict[str, float | None]] = {}

    def read(self, last: int) -> None:
        """Reads those of up to ``last`` iterations.

        Raises:
            UserError: the file holds something else.
        """
        self.values = {}
        remedy = "remove it, and evaluations count anew"
        try:
            content = read_json(self.path, remedy)
            self.values = {int(done): _numbers(found) for done, found in content.items() if int(done) <= last}
        except FileNotFoundError:
            return
        except (ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{self.path} is not what a run records: {remedy}") from error

    def add(self, done: int, metrics: dict[str, float]) -> None:
        """Records an evaluation after ``done`` iterations."""
        self.values[done] = metrics
        write_json(self.path, {str(done): found for done, found in sorted(self.values.items())})

    def series(self, metric: str) -> list[tuple[int, float]]:
        """(iterations, value) in order; a value that is none is -infinity."""
        found = ((done, metrics.get(metric)) for done, metrics in sorted(self.values.items()))
        return [(done, -math.inf if value is None or math.isnan(value) else value) for done, value in found]

    def best(self, metric: str) -> tuple[int, float] | None:
        """The first of the highest values, with its number of iterations."""
        there = [entry for entry in self.series(metric) if entry[1] > -math.inf]
        return max(there, key=lambda entry: (entry[1], -entry[0])) if there else None

    def are_settled(self, metric: str, patience: int, min_delta: float) -> bool:
        """Whether the last ``patience`` values are no more than ``min_delta`` above the highest before them."""
        highest, waited = -math.inf, 0
        for _, value in self.series(metric):
            if value > highest + min_delta:
                highest, waited = value, 0
            else:
                waited += 1
            if patience and waited >= patience:
                return True
        return False


def _numbers(metrics: dict) -> dict[str, float | None]:
    if any(type(value) not in (int, float, type(None)) for value in metrics.values()):
        raise ValueError("a metric is no number")
    return metrics


def watches_evaluations(cfg: CfgNode) -> bool:
    """Whether something of a run goes by its evaluations."""
    return cfg.SOLVER.BEST_CHECKPOINTER.ENABLED or cfg.SOLVER.EARLY_STOPPING.PATIENCE > 0


def is_settled(cfg: CfgNode, done: int) -> bool:
    """Whether the run in ``OUTPUT_DIR`` ended early, ``done`` iterations from its start; the same in all processes."""
    rule, settled = cfg.SOLVER.EARLY_STOPPING, False
    if rule.PATIENCE and comm.is_main_process():
        evaluations = Evaluations(cfg.OUTPUT_DIR)
        evaluations.read(done)
        settled = evaluations.are_settled(rule.METRIC, rule.PATIENCE, rule.MIN_DELTA)
    return comm.all_gather(settled)[0]


class EvaluationsHook(BestCheckpointer):
    """Records each evaluation, keeps ``model_best.pth``, and raises :class:`Settled` where the run gets no better.

    It is exact when resumed: what it knows is what the file says.

    Args:
        cfg: with ``SOLVER.BEST_CHECKPOINTER`` and ``SOLVER.EARLY_STOPPING``.
        checkpointer: of the run, whose trainer is a :class:`.training.Trainer`.
    """

    def __init__(self, cfg: CfgNode, checkpointer: Checkpointer):
        super().__init__(cfg.TEST.EVAL_PERIOD, checkpointer, cfg.SOLVER.BEST_CHECKPOINTER.METRIC)
        self._keeps_best = cfg.SOLVER.BEST_CHECKPOINTER.ENABLED
        self._rule = cfg.SOLVER.EARLY_STOPPING
        self._folder = Path(cfg.OUTPUT_DIR)
        self._evaluations = Evaluations(self._folder)

    def begin(self, done: int) -> None:
        """Takes up what a run knows that goes on after ``done`` iterations, or starts."""
        if comm.is_main_process():
            self._evaluations.read(done)
            if self._keeps_best and self._evaluations.best(self._val_metric) is None:
                remove_checkpoint(self._folder / f"{BEST}.pth")  # of a run that was here before

    def lacks(self, done: int) -> bool:
        """Whether the evaluation after ``done`` iterations is not recorded."""
        return done not in self._evaluations.values

    def look(self, done: int, results: dict) -> None:
        """Records the results of the evaluation after ``done`` iterations, and keeps the best; in the main process."""
        if not comm.is_main_process():
            return
        metrics = flatten_results_dict(results)
        if self._rule.PATIENCE:
            _check_metric(self._rule.METRIC, metrics, "EARLY_STOPPING")
        if not self._keeps_best:
            self._evaluations.add(done, metrics)
            return
        _check_metric(self._val_metric, metrics, "BEST_CHECKPOINTER")
        known = self._evaluations.best(self._val_metric)
        value = metrics[self._val_metric]
        if not math.isnan(value) and (known is None or value > known[1]):
            logger.info(f"{self._val_metric} is {value:.4f} after {done} iterations: the best so far")
            # before it is recorded: what is cut off between the two is evaluated and written again
            self._checkpointer.save_model(BEST, iteration=done - 1)
        self._evaluations.add(done, metrics)

    def _best_checking(self) -> None:
        """Detectron2 calls this after each evaluation."""
        done, rule = min(self.trainer.iter + 1, self.trainer.max_iter), self._rule
        self.look(done, self.trainer.last_results)
        settled = self._evaluations.are_settled(rule.METRIC, rule.PATIENCE, rule.MIN_DELTA)
        if comm.all_gather(settled)[0] and done < self.trainer.max_iter:
            logger.info(
                f"{rule.METRIC} has not risen in {rule.PATIENCE} evaluations: the training ends after {done} of "
                f"{self.trainer.max_iter} iterations"
            )
            raise Settled


def _check_metric(name: str, metrics: dict, key: str) -> None:
    if name not in metrics:
        given = ", ".join(sorted(metrics)) or "nothing"
        raise UserError(f"SOLVER.{key}.METRIC {name} is not what the evaluation gives: {given}")
