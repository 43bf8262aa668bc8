"""Detectron2's hooks for checkpoints and evaluations, kept from losing them."""

from pathlib import Path
from typing import Any

from detectron2.engine import hooks

from ..checkpoint.checksums import sidecar
from ..files import remove_file


class LoggedEvaluation(hooks.EvalHook):
    """Detectron2's, but what took minutes to measure is on the disk at once, not at the next of the writers' turns.

    Its trainer is a :class:`.training.Trainer`.
    """

    def _do_eval(self) -> None:
        super()._do_eval()
        self.trainer.write_metrics()


class KeptCheckpoints(hooks.PeriodicCheckpointer):
    """Detectron2's, but two are kept at least, lest the last be damaged; one that goes takes its checksum with it."""

    def __init__(self, checkpointer, period: int, max_to_keep: int | None = None, **more: Any):
        super().__init__(checkpointer, period, max_to_keep=max_to_keep and max(max_to_keep, 2), **more)

    def step(self, iteration: int, **kwargs: Any) -> None:
        before = list(self.recent_checkpoints)
        super().step(iteration, **kwargs)
        for path in before:
            if path not in self.recent_checkpoints:
                remove_file(sidecar(Path(path)))
