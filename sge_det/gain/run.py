"""A run of the matrix as it lies on disk: its folder, its results, its curves, and what it was made from."""

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.config import CfgNode

from ..checkpoint import transplant_file
from ..checkpoint.checksums import sha256
from ..engine.fingerprint import differences, read_fingerprint
from ..errors import UserError
from ..files import read_json
from .arms import Arm

RESULT_FILE = "result.json"
START_FILE = "start.pth"
PREDICTIONS_FILE = "inference/coco_instances_results.json"
_REMEDY = "remove it and run the same command again, which records the run anew"


@dataclass
class Run:
    """One arm with one seed.

    Attributes:
        config: the resolved config.
        command: the arguments of :mod:`.worker`.
        fingerprint: the config, the data sets and the versions that it is made from.
        reference: the run whose weights, transplanted, it starts from.
    """

    arm: Arm
    seed: int
    folder: Path
    config: CfgNode
    command: list[str]
    fingerprint: dict = field(repr=False)
    reference: "Run | None" = None

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed{self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT_FILE).is_file()

    @property
    def is_ready(self) -> bool:
        """Whether the weights that it starts from are there."""
        return self.reference is None or bool(self.reference.config.MODEL.WEIGHTS) or self.reference.finished

    @property
    def start(self) -> Path:
        """The transplanted weights that it starts from, if it is of an arm that does."""
        return self.folder / START_FILE

    def make_start(self) -> None:
        """Transplants the weights of its reference, unless that has been done.

        Raises:
            UserError: they are not there, or cannot be transplanted.
        """
        if self.reference is None or self.start.is_file():
            return
        weights = self.reference.config.MODEL.WEIGHTS or str(self.reference.folder / "model_final.pth")
        if "://" not in weights and not Path(weights).is_file():
            raise UserError(
                f"{self.name} starts from {weights}, which is not there: remove {self.reference.folder / RESULT_FILE} "
                "and run the same command again to train it anew"
            )
        transplant_file(weights, str(self.start), cfg=self.config)

    @property
    def iterations(self) -> int:
        return self.config.SOLVER.MAX_ITER

    @property
    def iterations_done(self) -> int:
        """Iterations that the run has logged; they are written every 20."""
        if self.finished:
            return self.iterations
        try:
            with open(self.folder / "metrics.json", "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - 8192, 0))
                logged = re.findall(rb'"iteration": (\d+)', file.read())
        except OSError:
            return 0
        return min(int(logged[-1]) + 1, self.iterations) if logged else 0

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def predictions(self) -> Path:
        """The detections on the validation images, in COCO's result format."""
        return self.folder / PREDICTIONS_FILE

    def check_predictions(self, result: dict) -> None:
        """Checks that the detections are those that the run recorded; older runs did not record which.

        Raises:
            UserError: they are others, or gone.
        """
        recorded = result.get("predictions")
        if recorded is not None and not (self.predictions.is_file() and sha256(self.predictions) == recorded):
            raise UserError(
                f"{self.predictions} does not hold the detections that {self.name} recorded: put them back, or remove "
                f"{self.folder / RESULT_FILE} and run the same command again, which records the run anew"
            )

    def result(self) -> dict:
        """What the finished run recorded: its cost and ``{"schema", "results", "predictions", "gates", "pointing"}``.

        Raises:
            UserError: it cannot be read.
        """
        path = self.folder / RESULT_FILE
        result = read_json(path, _REMEDY, ("results", "gates", "pointing", "device_seconds"))
        tasks = result.get("results")
        if type(result.get("seconds")) not in (int, float) or not tasks:
            raise UserError(f"{path} is not what a run records: {_REMEDY}")
        if not all(isinstance(metrics, dict) for metrics in tasks.values()):
            raise UserError(f"{path} is not what a run records: {_REMEDY}")
        return result

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """What the run logged: by "total_loss", "bbox/AP", "segm/AP" (points), pairs of iteration and value."""
        found: dict[str, dict[int, float]] = {}
        try:
            lines = (self.folder / "metrics.json").read_text(errors="replace").splitlines()
        except OSError:  # no reason to lose the report
            lines = []
        for line in lines:
            try:
                record = json.loads(line)
                if type(record["iteration"]) is not int:
                    continue
            except (ValueError, KeyError, TypeError, RecursionError):  # cut off when the run was killed
                continue
            for key in ("total_loss", "bbox/AP", "segm/AP"):
                if type(record.get(key)) in (int, float) and math.isfinite(record[key]):
                    # iterations that were repeated after an interruption count once
                    found.setdefault(key, {})[min(record["iteration"] + 1, self.iterations)] = record[key]
        for task, metrics in self.result()["results"].items():
            if metrics.get("AP") is not None:
                found.setdefault(f"{task}/AP", {})[self.iterations] = metrics["AP"]
        return {key: sorted(points.items()) for key, points in found.items()}

    def made_with(self) -> dict | None:
        """The fingerprint in the folder; None where nothing has run there.

        Raises:
            UserError: it cannot be read.
        """
        return read_fingerprint(
            self.folder, f"put a copy back, or remove the folder {self.folder} and give the same command again"
        )

    def check(self, code: dict | None = None) -> None:
        """Checks that what lies in the folder was made by this very run.

        Args:
            code: the versions and sources that it is to have been made with; by default those of here.

        Raises:
            UserError: it was made from something else; names the first difference.
        """
        found = self.made_with()
        if found is None:
            return
        wanted, device = self.fingerprint | (code or {}), found.get("config", {}).get("MODEL.DEVICE")
        if device is not None and not torch.cuda.is_available():
            # where there is no GPU the config's device is a stand-in: a login node reports what others trained
            wanted = {**wanted, "config": {**wanted["config"], "MODEL.DEVICE": device}}
        difference = next(differences(found, wanted), None)
        if difference:
            raise UserError(
                f"{self.folder} holds a run made with {difference}: give the same command, or name another --output"
            )
