"""Numbers of a comparison: metrics per arm and seed, paired differences, intervals, a verdict."""

import contextlib
import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np
from tqdm import tqdm

from ..data.annotations import mask_fault, read_annotations
from ..errors import UserError
from ..evaluation.bootstrap import bootstrap_metrics, image_weights
from ..evaluation.coco import TASKS, coco_metrics, evaluate_detections
from ..evaluation.matching import Matches, Objects
from .inference import (
    CONFIDENCE,
    Interval,
    both_interval,
    image_interval,
    seed_correlation,
    seed_interval,
    welch_interval,
)

SCHEMA = 1
TASK_NAMES = {"bbox": "box", "segm": "mask"}
# Gates whose standard deviation over the positions of a map is less than this multiply all positions alike.
CONSTANT_GATES = 0.01


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


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Millions of dictionaries without a cycle among them: looking for some takes half of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@_collector_paused()
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
    matches: dict[str, dict[str, list[Matches]]] = {}
    result = Measurement(report={})
    tasks = _tasks(truth, [path for files in detections.values() for path in files])
    objects = {task: Objects(truth.coco, task, truth.content) for task in tasks} if bootstrap else {}
    steps = count * len(detections)
    with tqdm(total=steps, desc="metrics", unit="run", leave=False) as bar:
        for place in range(count):
            for name, files in detections.items():
                boxes = truth.read_detections(files[place])
                for task in tasks:
                    if task == "segm" and boxes and not _has_masks(boxes):
                        raise UserError(f"{files[place]} has no masks, but others have: compare like with like")
                    evaluation = evaluate_detections(truth.coco, boxes, task)
                    found.setdefault(task, {}).setdefault(name, []).append(coco_metrics(evaluation))
                    _collect(result, task, name, evaluation, images)
                    if bootstrap:
                        matches.setdefault(task, {}).setdefault(name, []).append(objects[task].match(boxes))
                bar.update()
    samples = _bootstrap(matches, len(truth.images), bootstrap)
    report = {"schema": SCHEMA, "reference": reference, "seeds": seeds, "tasks": list(found)}
    report |= {"images": len(truth.images), "confidence": CONFIDENCE, "bootstrap_samples": bootstrap}
    report["arms"] = {
        name: {"seeds": seeds} | {task: _summary(found[task][name]) for task in found} for name in detections
    }
    report["differences"] = {
        name: {
            task: _differences(
                *(found[task][of] for of in (reference, name)),
                *(samples[task][of] if samples else None for of in (reference, name)),
                len(truth.images),
            )
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
        annotations = read_annotations(path)
        if not annotations.has_annotations:
            raise UserError(f"{path} has no list 'annotations': there is nothing to compare the detections with")
        self.content = content = annotations.content
        self.images: dict[int, dict] = {image["id"]: image for image in content["images"]}
        self.categories: dict[int, str] = {entry["id"]: entry["name"] for entry in content["categories"]}
        self.annotations: list[dict] = content["annotations"]
        self.has_masks = any(entry.get("segmentation") for entry in self.annotations)
        self.coco = annotations.coco

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


def _bootstrap(
    matches: Mapping[str, Mapping[str, Sequence[Matches]]], images: int, samples: int
) -> dict[str, dict[str, np.ndarray]]:
    """The metrics for each sample of the images: by task and arm (seeds, samples, metrics), in points."""
    if not samples:
        return {}
    weights = image_weights(images, samples)
    runs = sum(len(of_seeds) for arms in matches.values() for of_seeds in arms.values())
    found: dict[str, dict[str, np.ndarray]] = {}
    with tqdm(total=runs * samples, desc="bootstrap", unit="sample", leave=False) as bar:
        for task, arms in matches.items():
            for name, of_seeds in arms.items():
                found.setdefault(task, {})[name] = bootstrap_metrics(of_seeds, weights, bar.update)
    return found


def _summary(by_seed: Sequence[dict[str, float]]) -> dict[str, dict]:
    summary = {}
    for metric in by_seed[0]:
        values = [metrics[metric] for metrics in by_seed]
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        summary[metric] = {"mean": float(np.mean(values)), "sd": sd, "values": values}
    return summary


def _differences(
    reference: Sequence[dict[str, float]],
    arm: Sequence[dict[str, float]],
    reference_samples: np.ndarray | None,
    arm_samples: np.ndarray | None,
    images: int,
) -> dict[str, dict]:
    differences = {}
    for place, metric in enumerate(reference[0]):
        theirs, ours = ([metrics[metric] for metrics in by_seed] for by_seed in (reference, arm))
        values = np.subtract(ours, theirs)
        seeds = seed_interval(values)
        of_images: list[Interval | None] = []
        both = over_images = None
        if reference_samples is not None and arm_samples is not None:
            a, b = reference_samples[:, :, place], arm_samples[:, :, place]
            of_images = [image_interval(value, sample, images) for value, sample in zip(values, b - a)]
            over_images = image_interval(float(values.mean()), (b - a).mean(0), images)
            both = both_interval(theirs, ours, a, b, images)
        found = {"seeds": seeds, "welch": welch_interval(theirs, ours), "images": over_images, "both": both}
        differences[metric] = {
            "mean": float(values.mean()),
            "low": seeds.low if seeds else math.nan,
            "high": seeds.high if seeds else math.nan,
            "values": values.tolist(),
            "seed_correlation": seed_correlation(theirs, ours),
            "intervals": {name: _bounds(interval) for name, interval in found.items()},
            "image_bootstrap": [_bounds(interval) for interval in of_images if interval],
        }
    return differences


def _bounds(interval: Interval | None) -> dict[str, float] | None:
    return {"low": interval.low, "high": interval.high} if interval else None


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
    if len(seeds) > 1 and math.isnan(difference["low"]):
        sentence += f" for all of {len(seeds)} seeds: without a spread there is no interval, so nothing is shown."
    elif len(seeds) > 1:
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
