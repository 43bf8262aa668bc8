"""Numbers of a comparison: metrics per arm and seed, paired differences, intervals, a verdict."""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
import scipy.stats
from tqdm import tqdm

from ..data.datasets import check_annotations, mask_fault, read_annotations
from ..errors import UserError
from ..evaluation.coco import TASKS, coco_metrics, evaluate_detections

SCHEMA = 1
CONFIDENCE = 0.95
TASK_NAMES = {"bbox": "box", "segm": "mask"}
# Gates whose standard deviation over the positions of a map is less than this multiply all positions alike.
CONSTANT_GATES = 0.01
# Samples that tell how long the others will take.
_PILOT_SAMPLES = 5
_PILOT_DETECTIONS = 20_000


@dataclass
class Measurement:
    """A comparison in numbers.

    Attributes:
        report: what report.json holds (docs/measuring.md has the schema); NaN where JSON has null.
        curves: by task, arm: for each seed the precisions (0-1) at the recalls ``curves["recall"]`` for IoU 0.5 and
            0.75: ``{"0.50": [...], "0.75": [...]}``.
        image_scores: by task, arm: for each seed AP50 (0-1) by image id.
    """

    report: dict[str, Any]
    recall: list[float] = field(default_factory=list)
    curves: dict[str, dict[str, list[dict[str, list[float]]]]] = field(default_factory=dict)
    image_scores: dict[str, dict[str, list[dict[int, float]]]] = field(default_factory=dict)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t-interval of the mean of ``values``; (nan, nan) for fewer than two."""
    if len(values) < 2:
        return math.nan, math.nan
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return mean, mean
    low, high = scipy.stats.t.interval(confidence, len(values) - 1, loc=mean, scale=error)
    return float(low), float(high)


def measure(
    truth: "GroundTruth",
    detections: Mapping[str, Sequence[str | Path]],
    *,
    seeds: Sequence[int] | None = None,
    bootstrap: int = 1000,
    gates: Mapping[str, Mapping[int, dict]] | None = None,
    images: bool = True,
) -> Measurement:
    """Compares arms by their detections on one validation set; shows its progress.

    Args:
        truth: the annotations of that set.
        detections: for each arm, the first being the reference, a file in COCO's result format for each seed.
        seeds: of the files; 0, 1, ... by default.
        bootstrap: samples of the image bootstrap of each difference; 0 for none.
        gates: by arm and seed, the statistics of :func:`sge_det.modeling.gates.gate_statistics`.
        images: also score each image, which the gallery needs.

    Raises:
        UserError: a file is missing or malformed, or the arms do not have the same number of files.
    """
    reference, *others = detections
    count = len(detections[reference])
    seeds = list(range(count)) if seeds is None else list(seeds)
    for name, files in detections.items():
        if len(files) != count or not count:
            raise UserError(
                f"arm {name} has {len(files)} result files and {reference} has {count}: paired differences need one "
                "file for each seed in every arm, in the order of the seeds"
            )
    if bootstrap < 0:
        raise UserError(f"--bootstrap must not be negative, got {bootstrap}")
    found: dict[str, dict[str, list]] = {}
    intervals: dict[str, dict[str, list]] = {}
    result = Measurement(report={})
    tasks = _tasks(truth, [path for files in detections.values() for path in files])
    steps = count * len(detections)
    with tqdm(total=steps, desc="metrics", unit="run", leave=False) as bar:
        for place, seed in enumerate(seeds):
            references: dict[str, hotcoco.COCOeval] = {}
            for name, files in detections.items():
                boxes = truth.read_detections(files[place])
                for task in tasks:
                    if task == "segm" and boxes and not _has_masks(boxes):
                        raise UserError(f"{files[place]} has no masks, but others have: compare like with like")
                    evaluation = evaluate_detections(truth.coco, boxes, task)
                    found.setdefault(task, {}).setdefault(name, []).append(coco_metrics(evaluation))
                    _collect(result, task, name, evaluation, images)
                    if name == reference:
                        references[task] = evaluation
                    elif bootstrap:
                        what = f"bootstrap {name} seed {seed} {TASK_NAMES[task]}"
                        interval = _image_bootstrap(references[task], evaluation, bootstrap, seed, what, len(boxes))
                        intervals.setdefault(task, {}).setdefault(name, []).append(interval)
                bar.update()
    report = {"schema": SCHEMA, "reference": reference, "seeds": seeds, "tasks": list(found)}
    report |= {"images": len(truth.images), "confidence": CONFIDENCE, "bootstrap_samples": bootstrap}
    report["arms"] = {
        name: {"seeds": seeds} | {task: _summary(found[task][name]) for task in found} for name in detections
    }
    report["differences"] = {
        name: {
            task: _differences(found[task][reference], found[task][name], intervals.get(task, {}).get(name, []))
            for task in found
        }
        for name in others
    }
    report["gates"] = {name: {str(seed): stages for seed, stages in of.items()} for name, of in (gates or {}).items()}
    report["verdicts"], sentences = [], []
    for name in others:
        verdicts = [_verdict(report, name, task) for task in found]
        report["verdicts"] += verdicts
        sentences += [verdict["sentence"] for verdict in verdicts] + [_gates_sentence(report, name)]
    report["verdict"] = "\n".join(sentence for sentence in sentences if sentence)
    result.report = report
    return result


class GroundTruth:
    """The annotations of a validation set: ``images`` and names of ``categories`` by id, ``annotations``, ``coco``.

    Raises:
        UserError: they cannot be read.
    """

    def __init__(self, path: str | Path):
        content = read_annotations(str(path))
        check_annotations(str(path), content)
        self.images: dict[int, dict] = {image["id"]: image for image in content["images"]}
        self.categories: dict[int, str] = {entry["id"]: entry["name"] for entry in content["categories"]}
        self.annotations: list[dict] = content["annotations"]
        self.has_masks = any(entry.get("segmentation") for entry in self.annotations)
        try:
            self.coco = hotcoco.COCO(str(path))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{path} is not in COCO's instance format: {error}") from error

    def annotations_of(self, image_id: int) -> list[dict]:
        """The objects and crowd regions of an image."""
        return [entry for entry in self.annotations if entry["image_id"] == image_id]

    def read_detections(self, path: str | Path) -> list[dict]:
        """Reads detections in COCO's result format and checks them.

        Raises:
            UserError: the file is missing or malformed, names an image or a category that is not annotated, or has a
                score that is no number or a box of negative size; says at which place of the list.
        """
        try:
            detections = json.loads(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"there is no result file {path}") from error
        except OSError as error:
            raise UserError(f"the result file {path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from error
        if not isinstance(detections, list):
            raise UserError(f"{path} is not in COCO's result format: it must be a list of detections")
        try:
            for place, detection in enumerate(detections):
                if detection["image_id"] not in self.images:
                    raise UserError(
                        f"{path}, detection {place}: image {detection['image_id']!r} is not in the ground truth; these "
                        "results are of another data set"
                    )
                if detection["category_id"] not in self.categories:
                    raise UserError(
                        f"{path}, detection {place}: category {detection['category_id']!r} is not in the ground truth; "
                        "COCO's own category ids are needed, not contiguous ones"
                    )
                if not isinstance(detection["score"], int | float):
                    raise UserError(f"{path}, detection {place}: the score {detection['score']!r} is not a number")
                if "segmentation" in detection:
                    image = self.images[detection["image_id"]]
                    fault = mask_fault(detection["segmentation"], (image["height"], image["width"]))
                    if fault:
                        raise UserError(f"{path}, detection {place} (image {image['id']}): {fault}")
            scores = np.array([detection["score"] for detection in detections], dtype=float)
            boxes = np.array([detection["bbox"] for detection in detections], dtype=float).reshape(-1, 4)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{path} is not in COCO's result format: each detection needs image_id, category_id, score and a bbox "
                f"of four numbers ({error!r})"
            ) from error
        if len(boxes) != len(scores):
            raise UserError(f"{path} is not in COCO's result format: a bbox is not four numbers")
        for wrong, what in (
            (~np.isfinite(scores), "the score is not a finite number"),
            (~np.isfinite(boxes).all(1), "the box is not four finite numbers"),
            ((boxes[:, 2:] < 0).any(1), "the box has a negative width or height; boxes are x, y, width, height"),
        ):
            if wrong.any():
                place = int(np.flatnonzero(wrong)[0])
                detection = detections[place]
                raise UserError(
                    f"{path}, detection {place} (image {detection['image_id']}): {what}; it has the score "
                    f"{detection['score']} and the box {detection['bbox']}"
                )
        return detections


def _has_masks(detections: Sequence[dict]) -> bool:
    return bool(detections) and all("segmentation" in detection for detection in detections)


def _tasks(truth: GroundTruth, files: Sequence[str | Path]) -> tuple[str, ...]:
    """What is compared, by the first file that holds detections: an empty one does not tell."""
    boxes = next(filter(None, map(truth.read_detections, files)), [])
    return TASKS if truth.has_masks and _has_masks(boxes) else TASKS[:1]


def _collect(result: Measurement, task: str, name: str, evaluation: hotcoco.COCOeval, images: bool) -> None:
    curves = evaluation.report()["curves"]
    result.recall = curves["rec_thrs"]
    by_seed = result.curves.setdefault(task, {}).setdefault(name, [])
    by_seed.append({iou: curves[f"pr@{iou}"] for iou in ("0.50", "0.75")})
    if not images:
        return
    scores = {image: summary["ap"] for image, summary in evaluation.image_diagnostics()["img_summary"].items()}
    result.image_scores.setdefault(task, {}).setdefault(name, []).append(scores)


def _image_bootstrap(
    a: hotcoco.COCOeval, b: hotcoco.COCOeval, samples: int, seed: int, what: str, detections: int
) -> dict[str, tuple[float, float]]:
    """Intervals of b - a over images, in points, by metric.

    The samples are drawn in one call that tells nothing until it is done, so on large sets the bar follows the clock,
    at the pace of a few samples before.
    """
    if detections < _PILOT_DETECTIONS:
        return _intervals(hotcoco.compare(a, b, n_bootstrap=samples, seed=seed, confidence=CONFIDENCE))
    start = time.monotonic()
    hotcoco.compare(a, b, n_bootstrap=_PILOT_SAMPLES, seed=seed)
    pace = (time.monotonic() - start) / _PILOT_SAMPLES
    done: list[dict] = []
    thread = threading.Thread(
        target=lambda: done.append(hotcoco.compare(a, b, n_bootstrap=samples, seed=seed, confidence=CONFIDENCE)),
        daemon=True,
    )
    start = time.monotonic()
    with tqdm(total=samples, desc=f"{what} (estimated)", unit="sample", leave=False) as bar:
        thread.start()
        while thread.is_alive():
            thread.join(1)
            bar.n = min(int((time.monotonic() - start) / pace), samples - 1)
            bar.refresh()
    if not done:
        raise RuntimeError(f"{what} failed")
    return _intervals(done[0])


def _intervals(compared: dict) -> dict[str, tuple[float, float]]:
    return {name: (ci["lower"] * 100, ci["upper"] * 100) for name, ci in compared["ci"].items()}


def _summary(by_seed: Sequence[dict[str, float]]) -> dict[str, dict]:
    summary = {}
    for metric in by_seed[0]:
        values = [metrics[metric] for metrics in by_seed]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        summary[metric] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    return summary


def _differences(
    reference: Sequence[dict[str, float]], arm: Sequence[dict[str, float]], intervals: Sequence[dict]
) -> dict[str, dict]:
    differences = {}
    for metric in reference[0]:
        values = [ours[metric] - theirs[metric] for ours, theirs in zip(arm, reference)]
        low, high = t_interval(values)
        images = [
            dict(zip(("low", "high"), interval[metric]))
            for interval in intervals
            if metric in interval and not math.isnan(values[0])
        ]
        differences[metric] = {
            "mean": float(np.mean(values)),
            "low": low,
            "high": high,
            "values": values,
            "image_bootstrap": images,
        }
    return differences


def _verdict(report: dict, name: str, task: str) -> dict[str, Any]:
    """What the AP difference of an arm shows, as a sentence and as a flag."""
    reference, seeds = report["reference"], report["seeds"]
    difference = report["differences"][name][task]["AP"]
    verdict = {"arm": name, "task": task, "metric": "AP", "excludes_zero": None}
    what = f"{TASK_NAMES[task]} AP"
    if math.isnan(difference["mean"]):
        return verdict | {"sentence": f"{name} against {reference}: {what} is absent, the ground truth has no objects."}
    sentence = f"{name} - {reference} = {difference['mean']:+.2f} {what}"
    percent = f"{CONFIDENCE:.0%}"
    if len(seeds) > 1:
        low, high = difference["low"], difference["high"]
        verdict["excludes_zero"] = excludes = low > 0 or high < 0
        kind = "a gain" if difference["mean"] > 0 else "a loss"
        sentence += f" (mean of {len(seeds)} seeds, {percent} interval {low:+.2f} to {high:+.2f}): "
        sentence += f"zero is excluded, {kind}." if excludes else "zero is not excluded, no gain or loss is shown."
    else:
        sentence += f" (seed {seeds[0]}"
        if difference["image_bootstrap"]:
            low, high = difference["image_bootstrap"][0].values()
            sentence += f"; {percent} interval over the images {low:+.2f} to {high:+.2f}, "
            sentence += "zero is excluded" if low > 0 or high < 0 else "zero is not excluded"
        sentence += "): with one seed, seed noise was not measured, so no gain or loss is shown; give more seeds."
    return verdict | {"sentence": sentence}


def constant_gates(report: dict, name: str) -> bool | None:
    """Whether the gates of an arm hardly depend on the position, in any stage of any run; None without SGE."""
    spreads = [_spatial_sd(stages) for stages in report["gates"].get(name, {}).values() if stages]
    return max(spreads) < CONSTANT_GATES if spreads else None


def _spatial_sd(stages: Mapping[str, dict]) -> float:
    return max(stage["gate"]["spatial_sd"] for stage in stages.values())


def _gates_sentence(report: dict, name: str) -> str | None:
    if not constant_gates(report, name):
        return None
    spread = max(_spatial_sd(stages) for stages in report["gates"][name].values())
    means = [stage["gate"]["mean"] for stages in report["gates"][name].values() for stage in stages.values()]
    return (
        f"The gates of {name} hardly vary over a map (standard deviation {spread:.4f} at most, mean "
        f"{float(np.mean(means)):.3f}), so its difference cannot come from attention."
    )
