"""Numbers of a comparison: metrics per arm and seed, differences, their intervals, and what they show."""

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import hotcoco
import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..evaluation.bootstrap import bootstrap_metrics, image_weights
from ..evaluation.coco import METRICS, coco_metrics, evaluate_detections, metric_names
from ..evaluation.error_kinds import Errors, errors_of
from ..evaluation.matching import Matches, Objects
from .inference import (
    ALPHA,
    CONFIDENCE,
    Interval,
    both_interval,
    effect_size,
    image_interval,
    probability_of_improvement,
    seed_correlation,
    seed_interval,
    welch_interval,
)
from .input import GroundTruth, equal_files, has_masks, result_files, tasks_of
from .origins import origins
from .parts import DECLARED, Bounds, Difference, Intervals, Question, Report, Score, Verdict
from .verdict import Evidence, gates_sentence, judge

# Fewer samples of the images than these tell a standard error too badly.
_LEAST_SAMPLES = 200


@dataclass
class Measurement:
    """A comparison in numbers.

    Attributes:
        report: what ``report.json`` holds.
        curves: by task, arm: for each seed the precisions (0-1) at the recalls ``curves["recall"]`` for IoU 0.5 and
            0.75: ``{"0.50": [...], "0.75": [...]}``.
        image_scores: by task, arm: for each seed AP50 (0-1) by image id.
        learning: by arm and seed, what the run logged (``Run.curves``), where arms were trained.
    """

    report: Report
    recall: list[float] = field(default_factory=list)
    curves: dict[str, dict[str, list[dict[str, list[float]]]]] = field(default_factory=dict)
    image_scores: dict[str, dict[str, list[dict[int, float]]]] = field(default_factory=dict)
    learning: dict[str, dict[int, dict[str, list[tuple[int, float]]]]] = field(default_factory=dict)


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


def check_question(question: Question, bootstrap: int, known: Sequence[str] = ()) -> None:
    """Checks what can be asked, before any work.

    Args:
        known: names of the metrics; none where they are not known yet.

    Raises:
        UserError: too few bootstrap samples, a margin or a difference that is none, or a metric that does not exist.
    """
    if bootstrap != 0 and bootstrap < _LEAST_SAMPLES:
        raise UserError(
            f"--bootstrap {bootstrap} is too few to tell an interval: give at least {_LEAST_SAMPLES}, or 0 for none"
        )
    for name, value in (("--margin", question.margin), ("--difference", question.difference)):
        if not 0 <= value <= 100:
            raise UserError(f"{name} must be a number of AP points from 0 to 100, got {value}")
    if known and question.metric not in known:
        raise UserError(f"--metric {question.metric} is none of {', '.join(known[:40])}")


@_collector_paused()
def measure(
    truth: GroundTruth,
    detections: Mapping[str, Sequence[str | Path]],
    *,
    seeds: Sequence[int] | None = None,
    bootstrap: int = 1000,
    gates: Mapping[str, Mapping[int, dict]] | None = None,
    images: bool = True,
    question: Question = DECLARED,
    level: float = ALPHA,
) -> Measurement:
    """Compares arms by their detections on one validation set; shows its progress.

    Args:
        truth: the annotations of that set.
        detections: for each arm, the first being the reference, a file in COCO's result format for each seed.
        seeds: of the files; 0, 1, ... by default.
        bootstrap: samples of the image bootstrap of each difference, at least 200; 0 for none.
        gates: by arm and seed, the statistics of :func:`sge_det.modeling.gates.gate_statistics`.
        images: also score each image, which the gallery needs.
        question: what is to be answered.
        level: of the verdicts, as in :func:`.verdict.judge`.

    Raises:
        UserError: a file is missing, malformed or given twice, the arms do not have the same number of files, or the
            question is none.
    """
    check_question(question, bootstrap, metric_names(truth.content["categories"]))
    count = len(next(iter(detections.values())))
    seeds = list(range(count)) if seeds is None else list(seeds)
    given = result_files(detections, seeds)
    notes = equal_files(given)
    runs: dict[str, dict[str, list[_Evaluated]]] = {}
    tasks = tasks_of(truth, given)
    objects = {task: Objects(truth.coco, task, truth.content) for task in tasks} if bootstrap else {}
    with tqdm(total=len(given), desc="metrics", unit="run", leave=False) as bar:
        for file in sorted(given, key=lambda file: seeds.index(file.seed)):
            boxes = truth.read_detections(file.path)
            notes += truth.suspicions(str(file.path), boxes)
            for task in tasks:
                if task == "segm" and boxes and not has_masks(boxes):
                    raise UserError(f"{file.path} has no masks, but others have: compare like with like")
                run = _evaluated(evaluate_detections(truth.coco, boxes, task), images)
                if bootstrap:
                    run = replace(run, matches=objects[task].match(boxes))
                runs.setdefault(task, {}).setdefault(file.arm, []).append(run)
            bar.update()
    if any(entry["id"] == 0 for entry in truth.annotations):
        notes.append("An annotation has the id 0: pycocotools counts a match to it as none, here it is one.")
    report = compared(
        _each(runs, "metrics"),
        _bootstrap(_each(runs, "matches"), len(truth.images), bootstrap),
        seeds=seeds,
        images=len(truth.images),
        informative=truth.images_by_metric(),
        bootstrap=bootstrap,
        question=question,
        level=level,
        gates=gates,
        notes=notes,
    )
    names = [name.removeprefix("AP-") for name in metric_names(truth.content["categories"])[len(METRICS) :]]
    report = replace(report, origins=origins(_each(runs, "errors"), names, paired=question.paired))
    image_scores = _each(runs, "image_scores") if images else {}
    return Measurement(report, run.recall, _each(runs, "curves"), image_scores)


@dataclass(frozen=True)
class _Evaluated:
    """What is kept of the evaluation of a run; see :class:`Measurement`."""

    metrics: dict[str, float]
    errors: Errors
    recall: list[float]
    curves: dict[str, list[float]]
    image_scores: dict[int, float]
    matches: Matches | None = None


def _evaluated(evaluation: hotcoco.COCOeval, images: bool) -> _Evaluated:
    curves = evaluation.report()["curves"]
    scores = evaluation.image_diagnostics()["img_summary"] if images else {}
    return _Evaluated(
        coco_metrics(evaluation),
        errors_of(evaluation),
        curves["rec_thrs"],
        {iou: curves[f"pr@{iou}"] for iou in ("0.50", "0.75")},
        {image: summary["ap"] for image, summary in scores.items()},
    )


def _each(runs: Mapping[str, Mapping[str, Sequence[_Evaluated]]], part: str) -> dict[str, dict[str, list]]:
    """A part of each run, by task and arm."""
    return {
        task: {name: [getattr(run, part) for run in of_arm] for name, of_arm in arms.items()}
        for task, arms in runs.items()
    }


def compared(
    found: Mapping[str, Mapping[str, Sequence[dict[str, float]]]],
    samples: Mapping[str, Mapping[str, np.ndarray]],
    *,
    seeds: Sequence[int],
    images: int,
    bootstrap: int,
    question: Question,
    level: float = ALPHA,
    gates: Mapping[str, Mapping[int, dict]] | None = None,
    notes: Sequence[str] = (),
    informative: Mapping[str, int] | None = None,
) -> Report:
    """The report on metrics of whatever kind.

    Args:
        found: by task and arm, the metrics of each seed, in points; the first task's first arm is the reference.
        samples: by task and arm, the same for each sample of the images (seeds, samples, metrics); empty for none.
        images: of the validation set.
        bootstrap: number of samples.
        notes: sentences on what was given.
        informative: by metric, the images that hold what it is of; all by default.
    """
    tasks = list(found)
    counts = dict.fromkeys(found[tasks[0]][next(iter(found[tasks[0]]))][0], images) | dict(informative or {})
    reference, *others = names = list(found[tasks[0]])
    by_seed = {name: {str(seed): stages for seed, stages in of.items()} for name, of in (gates or {}).items()}
    differences: dict[str, dict[str, dict[str, Difference]]] = {name: {} for name in others}
    verdicts: list[Verdict] = []
    for task in tasks:
        evidence = {}
        for name in others:
            pair = [found[task][of] for of in (reference, name)]
            drawn = [samples[task][of] if samples else None for of in (reference, name)]
            differences[name][task], of_arm = _differences(*pair, *drawn, counts, question.paired)
            evidence[name] = of_arm[question.metric]
        primary = task == tasks[0]
        verdicts += judge(
            evidence, reference, task, question.metric, question, primary=primary, bootstrap=bootstrap, level=level
        )
    sentences = [verdict.sentence for verdict in verdicts]
    sentences += [gates_sentence(name, by_seed.get(name, {}), is_reference=name == reference) for name in names]
    return Report(
        reference=reference,
        seeds=tuple(seeds),
        tasks=tuple(tasks),
        images=images,
        confidence=CONFIDENCE,
        bootstrap_samples=bootstrap,
        question=question,
        arms={name: {task: _scores(found[task][name]) for task in tasks} for name in names},
        differences=differences,
        gates=by_seed,
        verdicts=tuple(verdicts),
        notes=tuple(notes),
        verdict="\n".join(sentence for sentence in (*sentences, *notes) if sentence),
    )


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


def _scores(by_seed: Sequence[dict[str, float]]) -> dict[str, Score]:
    scores = {}
    for metric in by_seed[0]:
        values = tuple(metrics[metric] for metrics in by_seed)
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        scores[metric] = Score(float(np.mean(values)), sd, values)
    return scores


def _differences(
    reference: Sequence[dict[str, float]],
    arm: Sequence[dict[str, float]],
    reference_samples: np.ndarray | None,
    arm_samples: np.ndarray | None,
    counts: Mapping[str, int],
    paired: bool,
) -> tuple[dict[str, Difference], dict[str, Evidence]]:
    """By metric, a difference, and what a verdict needs of it."""
    differences, evidence = {}, {}
    for place, metric in enumerate(reference[0]):
        theirs, ours = ([metrics[metric] for metrics in by_seed] for by_seed in (reference, arm))
        images = counts[metric]
        values = np.subtract(ours, theirs)
        seeds, welch = seed_interval(values), welch_interval(theirs, ours)
        of_images: list[Interval | None] = []
        both = over_images = None
        if reference_samples is not None and arm_samples is not None:
            a, b = reference_samples[:, :, place], arm_samples[:, :, place]
            of_images = [image_interval(value, sample, images) for value, sample in zip(values, b - a)]
            over_images = image_interval(float(values.mean()), (b - a).mean(0), images)
            both = both_interval(theirs, ours, a, b, images, paired=paired)
        differences[metric] = Difference(
            float(values.mean()),
            tuple(values.tolist()),
            seed_correlation(theirs, ours),
            Intervals(*map(Bounds.of, (seeds, welch, over_images, both))),
            tuple(map(Bounds.of, of_images)),
            probability_of_improvement(theirs, ours),
            effect_size(theirs, ours),
        )
        evidence[metric] = Evidence(theirs, ours, seeds if paired else welch, both, images)
    return differences, evidence
