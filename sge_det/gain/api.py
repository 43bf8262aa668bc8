"""Trains the arms of a comparison, or reports those that have been trained."""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import UserError
from ..evaluation.coco import coco_metrics, evaluate_detections, metric_names
from .classified import METRICS as CLASSIFIED
from .classified import TOP1
from .cluster import Cluster
from .cost import of_arm
from .existing import compare_classified, held_against, reference_first, versions
from .gallery import gallery
from .input import GroundTruth
from .looks import Look, Looks
from .matrix import Matrix
from .measurement import Measurement, check_question, measure
from .parts import DECLARED, Question
from .plan import asks_another_question, declare, declared_look, departures, in_words
from .processes import RunFailed, check_jobs
from .report import write_report
from .verdict import still_learning

if TYPE_CHECKING:  # it needs timm
    from .pretraining import PretrainingMatrix


def measure_gain(
    matrix: Matrix,
    *,
    jobs: int = 1,
    bootstrap: int = 1000,
    question: Question = DECLARED,
    against: str | None = None,
    wait: bool = True,
    keep_going: bool = False,
    cluster: Cluster | None = None,
) -> Measurement | None:
    """Trains and evaluates every run of ``matrix`` that is not finished, and writes the report into its folder.

    Args:
        matrix: arms, seeds, config and folder.
        jobs: runs at once on this machine.
        bootstrap: samples of the image bootstrap, at least 200; 0 for none.
        question: what is to be answered; the first call's is kept in ``plan.json`` and shown beside this one.
        against: the arm that the others are compared with; the first by default.
        wait: for runs that other workers have.
        keep_going: a run that fails does not end the others; the report is of the seeds that are complete.
        cluster: makes each run a job of a scheduler's, in place of a process on this machine.

    Returns:
        None where other workers still have runs and ``wait`` is off; they are named on the screen.

    Raises:
        UserError: something that the user can put right.
        RunFailed: a run failed otherwise, or any with ``keep_going``, after the report was written.
    """
    _check(matrix, question, bootstrap, against)
    if cluster is None:
        check_jobs(matrix.launch, jobs, matrix.config.MODEL.DEVICE)
    declare(matrix, question, against=against)
    if cluster is None:
        done = matrix.execute(jobs, wait=wait, keep_going=keep_going)
    else:
        done = cluster.execute(matrix, wait=wait, keep_going=keep_going)
    if done.left:
        print(f"left to other workers: {', '.join(done.left)}; --report-only reports when they have finished")
    measurement = None
    if matrix.complete_seeds() and not done.left:
        measurement = report_gain(matrix, bootstrap=bootstrap, question=question, against=against)
    if done.failed:
        raise RunFailed(
            f"{len(done.failed)} of {len(matrix.runs)} runs failed: {'; '.join(done.failed.values())}. Run the same "
            "command again to go on with them"
        )
    return measurement


def decide_gain(
    matrix: Matrix,
    looks: Looks,
    *,
    jobs: int = 1,
    bootstrap: int = 1000,
    question: Question = DECLARED,
    against: str | None = None,
) -> Measurement:
    """Like :func:`measure_gain`, but adds seeds until the answer is in; all looks together keep the error rates.

    Args:
        matrix: its seeds are those of the last look, in the order in which they are added.
        looks: the rule.
        jobs, bootstrap, question, against: as in :func:`measure_gain`; without a bootstrap nothing can be decided.

    Raises:
        UserError, RunFailed: as :func:`measure_gain`.
    """
    looks.check()
    if not bootstrap:
        raise UserError("verdicts stand on new images too: --until and --decide need --bootstrap")
    _check(matrix, question, bootstrap, against)
    check_jobs(matrix.launch, jobs, matrix.config.MODEL.DEVICE)
    plan = declare(matrix, question, looks, against)
    if asks_another_question(plan, question, against or matrix.arms[0].name):
        raise UserError(
            f"{matrix.output} was begun with another question ({in_words(plan)}): give that, or name another --output"
        )
    for count, level in looks.levels(len(matrix.arms) - 1):
        seeds = matrix.seeds[:count]
        matrix.execute(jobs, runs=[run for run in matrix.runs if run.seed in seeds])
        look = Look(count, level, looks)
        measurement = report_gain(
            matrix, seeds=seeds, bootstrap=bootstrap, question=question, against=against, look=look
        )
        report = measurement.report
        print(f"{count} seeds: {report.lines[0]}", flush=True)
        # whether they are primary is another matter: a rule that was not declared ends all the same
        asked = [verdict for verdict in report.verdicts if verdict.task == report.task]
        if looks.answered([each.outcome for each in asked], [each.high - each.low for each in asked]):
            break
    return measurement


def report_gain(
    matrix: Matrix,
    *,
    seeds: Sequence[int] | None = None,
    bootstrap: int = 1000,
    question: Question = DECLARED,
    against: str | None = None,
    look: Look | None = None,
) -> Measurement:
    """Writes the report of the runs of ``matrix`` that are finished, and trains nothing.

    Args:
        matrix: arms, seeds, config and folder.
        seeds: those to report; by default all that are complete. What is left out is told.
        bootstrap, question, against: as in :func:`measure_gain`.
        look: which look it is, where seeds are added until there is an answer.

    Raises:
        UserError: no seed is complete, or something else that the user can put right.
    """
    names = reference_first([arm.name for arm in matrix.arms], against)
    truth = GroundTruth(matrix.annotation_file)
    check_question(question, bootstrap, metric_names(truth.content["categories"]))
    complete = matrix.complete_seeds()
    seeds = complete if seeds is None else list(seeds)
    unfinished = [run.name for run in matrix.runs if not run.finished]
    if not seeds:
        raise UserError(f"no seed has finished in every arm, so there is nothing to report: {', '.join(unfinished)}")
    plan = declare(matrix, question, look.looks if look else None, against)
    look = look or declared_look(plan, seeds, len(names) - 1)
    looks = look.looks if look else None
    arms = {arm.name: arm for arm in matrix.arms}
    runs = {name: [run for run in matrix.runs if run.arm == arms[name] and run.seed in seeds] for name in names}
    files = {name: [run.predictions for run in of_arm] for name, of_arm in runs.items()}
    results = {name: {run.seed: run.result() for run in of_arm} for name, of_arm in runs.items()}
    for run in itertools.chain(*runs.values()):
        run.check_predictions(results[run.arm.name][run.seed])
    level = {} if look is None else {"level": look.level}
    gates = _recorded(results, "gates")
    measurement = measure(truth, files, seeds=seeds, bootstrap=bootstrap, gates=gates, question=question, **level)
    measurement.learning = {name: {run.seed: run.curves() for run in of_arm} for name, of_arm in runs.items()}
    caveats = [caveat for caveat in (arm.caveat(matrix.config) for arm in matrix.arms) if caveat]
    departed = departures(plan, question, names, seeds, looks)
    caveats += [departure.sentence for departure in departed]
    if look is not None:
        caveats.append(
            f"Looked at {look.looks.in_words()}: the verdict of this look, at {look.seeds}, is taken at the level "
            f"{look.level:.4f}, so that all looks together keep 5%."
        )
    elif unfinished and any(seed not in seeds for seed in matrix.seeds):
        caveats.append(f"Not finished, so that their seeds are left out: {', '.join(unfinished)}.")
    caveats += still_learning(measurement.report.task, question.margin, measurement.learning)
    report = held_against(measurement.report, plan, departed, caveats)
    played = _recorded(results, "pointing")
    measurement.report = replace(
        report,
        look=look,
        cost={name: of_arm(list(of_seeds.values())) for name, of_seeds in results.items()},
        pointing={name: {str(seed): found for seed, found in by_seed.items()} for name, by_seed in played.items()},
        provenance=_provenance(matrix, names, plan),
    )
    write_report(matrix.output, measurement, lambda name: gallery(measurement, name, truth, matrix.image_root, files))
    return measurement


def _recorded(results: Mapping[str, Mapping[int, Mapping]], part: str) -> dict[str, dict[int, dict]]:
    """A part of what runs recorded, by arm and seed, of those that recorded it."""
    found = {
        name: {seed: result[part] for seed, result in by_seed.items() if result.get(part)}
        for name, by_seed in results.items()
    }
    return {name: by_seed for name, by_seed in found.items() if by_seed}


def _provenance(matrix: Matrix, names: Sequence[str], plan: dict) -> dict[str, str]:
    cfg = matrix.config
    arms = {arm.name: arm for arm in matrix.arms}
    return {
        "config": matrix.config_file,
        **{f"arm {name}": arms[name].describe(cfg) for name in names},
        "overrides of all arms": " ".join(matrix.overrides) or "none",
        "training set": ", ".join(cfg.DATASETS.TRAIN),
        "validation set": f"{cfg.DATASETS.TEST[0]} ({matrix.annotation_file})",
        "schedule": f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images",
        "start weights": cfg.MODEL.WEIGHTS or "none, trained from scratch",
        "device": cfg.MODEL.DEVICE,
        "declared before the first run": in_words(plan),
        **versions(),
    }


def _check(matrix: Matrix, question: Question, bootstrap: int, against: str | None) -> None:
    """What would be found only after the training, before it."""
    reference_first([arm.name for arm in matrix.arms], against)
    truth = GroundTruth(matrix.annotation_file)
    check_question(question, bootstrap, metric_names(truth.content["categories"]))
    if math.isnan(coco_metrics(evaluate_detections(truth.coco, [], "bbox"))[question.metric]):
        raise UserError(f"--metric {question.metric} is absent in {matrix.annotation_file}: it has no such objects")


def measure_classified_gain(
    matrix: "PretrainingMatrix",
    launch_options: argparse.Namespace,
    *,
    bootstrap: int = 1000,
    question: Question = TOP1,
    against: str | None = None,
) -> Measurement:
    """Trains every classifier of ``matrix`` that is not finished, and writes the report into its folder.

    Args:
        matrix: arms, seeds, options of ``tools/pretrain.py`` and folder.
        launch_options: ``num_gpus`` and so on, as ``tools/pretrain.py`` has them.
        bootstrap, question, against: as in :func:`compare_classified`.

    Raises:
        UserError: something that the user can put right.
        Stopped: a signal asked for the end; the same call goes on.
    """
    ordered = reference_first([arm.name for arm in matrix.arms], against)
    check_question(question, bootstrap, CLASSIFIED)
    matrix.check(launch_options, question.metric)
    plan = declare(matrix, question, against=against)
    matrix.execute(launch_options)
    departed = departures(plan, question, ordered, matrix.seeds)
    how = {"bootstrap": bootstrap, "question": question, "plan": plan, "departed": departed}
    return compare_classified(matrix.folders(ordered), matrix.output, **how)
