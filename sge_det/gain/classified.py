"""A comparison of classifiers, from what ``tools/pretrain.py`` leaves: which validation images each run got right."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.annotations import is_number
from ..engine.pretraining.options import PREDICTIONS, RESULT
from ..errors import UserError
from ..evaluation.bootstrap import image_weights
from .input import equal_files, result_files
from .measurement import Measurement, check_question, compared
from .parts import Question

TASK = "classification"
METRICS = ("top1", "top5")
TOP1 = Question(metric="top1")
# What the runs of two arms differ in on purpose, or without an effect.
_OF_AN_ARM = ("model", "groups", "sge_lr_factor", "seed", "output")


@dataclass(frozen=True)
class Classified:
    """What a run got right.

    Attributes:
        path: of its predictions.
        images: names of the validation images.
        hits: (images, 2), 0 or 1: the class is the first of the scores, and is among the first five.
        result: what the run recorded of itself; empty where only the predictions are there.
    """

    path: Path
    images: list[str]
    hits: np.ndarray
    result: dict[str, Any]


def read_classified(path: str | Path) -> Classified:
    """Reads a run.

    Args:
        path: its folder, or its ``predictions.json`` or ``result.json``.

    Raises:
        UserError: it is not there or malformed.
    """
    file = predictions_file(path)
    content = _read(file)
    images = content.get("images")
    if not isinstance(images, list) or not images or not all(isinstance(name, str) for name in images):
        raise UserError(f"{file} has no list 'images' of names: it is not what tools/pretrain.py writes")
    for metric in METRICS:
        values = content.get(metric)
        if not isinstance(values, list) or len(values) != len(images) or not all(value in (0, 1) for value in values):
            raise UserError(f"{file}: {metric!r} must be a list of 0 or 1, one for each of its {len(images)} images")
    hits = np.array([content[metric] for metric in METRICS], dtype=np.int8).T
    if (hits[:, 0] > hits[:, 1]).any():
        raise UserError(f"{file}: an image is right by top1 and wrong by top5, which cannot be")
    beside = file.with_name(RESULT)
    result = _read(beside) if beside.is_file() else {}
    history = result.get("history", [])
    are_points = isinstance(history, list) and all(
        isinstance(point, dict) and is_number(point.get("epoch")) and is_number(point.get("top1")) for point in history
    )
    if not are_points or not is_number(result.get("seconds", 0)):
        raise UserError(
            f"{beside}: 'history' must be a list of objects with the numbers epoch and top1, and 'seconds' a number: "
            "it is not what tools/pretrain.py writes"
        )
    return Classified(file, images, hits, result)


def predictions_file(path: str | Path) -> Path:
    """The predictions of a run that is given as its folder or as a file of it."""
    path = Path(path)
    if path.is_dir():
        return path / PREDICTIONS
    return path.with_name(PREDICTIONS) if path.name == RESULT else path


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: give a folder in which tools/pretrain.py has finished") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object: it is not what tools/pretrain.py writes")
    return content


def measure_classified(
    arms: Mapping[str, Sequence[str | Path]], *, bootstrap: int = 1000, question: Question = TOP1
) -> tuple[Measurement, dict[str, list[Classified]]]:
    """Compares arms by the images that each run got right.

    Args:
        arms: for each arm, the first being the reference, a run for each seed, as :func:`read_classified` takes it.
        bootstrap: samples of the image bootstrap, at least 200; 0 for none.
        question: what is to be answered, of "top1" or "top5".

    Returns:
        the comparison, and the runs by arm.

    Raises:
        UserError: a run is missing, malformed or given twice, runs are of other images than others or of seeds that do
            not pair, or the question is none.
    """
    check_question(question, bootstrap, METRICS)
    files = {name: [predictions_file(path) for path in paths] for name, paths in arms.items()}
    runs = {name: [read_classified(path) for path in paths] for name, paths in files.items()}
    given = result_files(files, range(len(next(iter(files.values())))))
    first = next(iter(runs.values()))[0]
    for run in (run for of_arm in runs.values() for run in of_arm):
        if run.images != first.images:
            raise UserError(f"{run.path} and {first.path} are of other validation images: compare like with like")
        check_tells(question.metric, run.result.get("classes"))
    seeds = _seeds(runs)
    weights = image_weights(len(first.images), bootstrap) if bootstrap else None
    found, samples = {}, {}
    for name, of_arm in runs.items():
        found[name] = [dict(zip(METRICS, _points(run.hits), strict=True)) for run in of_arm]
        if weights is not None:
            # float64 counts exactly, and is multiplied faster than whole numbers
            samples[name] = np.stack([100 * (weights @ run.hits.astype(float)) / len(run.images) for run in of_arm])
    report = compared(
        {TASK: found},
        {TASK: samples} if bootstrap else {},
        seeds=seeds,
        images=len(first.images),
        bootstrap=bootstrap,
        question=question,
        notes=[*equal_files(given), *_unlike(runs)],
    )
    return Measurement(report), runs


def check_tells(metric: str, classes: object) -> None:
    """Checks that a metric can differ between runs.

    Args:
        classes: their names, where they are known.

    Raises:
        UserError: every image is right by it.
    """
    if metric == "top5" and isinstance(classes, list) and len(classes) <= 5:
        raise UserError(f"of {len(classes)} classes every image is right by top5: give --metric top1")


def _points(hits: np.ndarray) -> list[float]:
    return (100 * hits.sum(0, dtype=float) / len(hits)).tolist()


def _seeds(runs: Mapping[str, Sequence[Classified]]) -> list[int]:
    """The seeds that the runs recorded, the same in all arms; 0, 1, ... where they recorded none."""
    recorded = {name: [run.result.get("seed") for run in of_arm] for name, of_arm in runs.items()}
    reference, seeds = next(iter(recorded.items()))
    if any(type(seed) is not int for of_arm in recorded.values() for seed in of_arm):
        return list(range(len(seeds)))
    for name, others in recorded.items():
        if others != seeds:
            raise UserError(
                f"the runs of {name} have the seeds {', '.join(map(str, others))} and those of {reference} "
                f"{', '.join(map(str, seeds))}: give the same seeds in the same order, since runs are paired by seed"
            )
        if len(set(others)) < len(others):
            raise UserError(f"the runs of {name} have a seed twice ({', '.join(map(str, others))}): give one of each")
    return seeds


def _unlike(runs: Mapping[str, Sequence[Classified]]) -> list[str]:
    """A sentence for each thing besides the model in which the runs differ."""
    all_of_them = [(str(run.path.parent), run.result) for of_arm in runs.values() for run in of_arm if run.result]
    found = []
    for key in all_of_them[0][1] if all_of_them else ():
        if key in _OF_AN_ARM or key in (*METRICS, "ema", "history", "seconds"):
            continue
        (first, result), *others = all_of_them
        # where its images are is told by their names, where those are recorded
        alike = f"{key}_images"
        others = [(who, other) for who, other in others if alike not in result or alike not in other]
        odd = next((who for who, other in others if other.get(key, result[key]) != result[key]), None)
        if odd:
            found.append(f"{first} and {odd} differ in {key}, too: a difference may come from that.")
    return found
