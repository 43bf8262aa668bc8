"""The two ways to a report: train the arms, or take the results that there are."""

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import detectron2
import hotcoco
import torch

from .. import __version__
from ..errors import UserError
from ..evaluation.coco import metric_names
from ..files import check_folder
from .classified import METRICS as CLASSIFIED
from .classified import TASK, TOP1, measure_classified
from .cluster import Cluster
from .cost import of_arm
from .gallery import gallery
from .input import GroundTruth
from .looks import Look, Looks
from .matrix import Matrix
from .measurement import Measurement, check_question, measure
from .plan import Departure, asks_another_question, declare, declared_look, departures
from .processes import RunFailed, check_jobs
from .report import Extras, write_figures, write_numbers, write_page
from .schema import read_report
from .verdict import DECLARED, Question, still_learning

if TYPE_CHECKING:  # it needs timm
    from .pretraining import PretrainingMatrix

logger = logging.getLogger(__name__)


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
            f"{matrix.output} was begun with another question ({_in_words(plan)}): give that, or name another --output"
        )
    for count, level in looks.levels(len(matrix.arms) - 1):
        seeds = matrix.seeds[:count]
        matrix.execute(jobs, runs=[run for run in matrix.runs if run.seed in seeds])
        look = Look(count, level, looks)
        measurement = report_gain(
            matrix, seeds=seeds, bootstrap=bootstrap, question=question, against=against, look=look
        )
        print(f"{count} seeds: {measurement.report['verdict'].splitlines()[0]}", flush=True)
        if looks.answered(measurement.report):
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
    names = _reference_first([arm.name for arm in matrix.arms], against)
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
    runs = [run for run in matrix.runs if run.seed in seeds]
    files = {name: [run.predictions for run in runs if run.arm == arms[name]] for name in names}
    gates: dict[str, dict[int, dict]] = {}
    extras = Extras()
    results: dict[str, list[dict]] = {name: [] for name in names}
    for run in runs:
        extras.curves.setdefault(run.arm.name, {})[run.seed] = run.curves()
        result = run.result()
        run.check_predictions(result)
        results[run.arm.name].append(result)
        if result.get("gates"):
            gates.setdefault(run.arm.name, {})[run.seed] = result["gates"]
        if result.get("pointing"):
            extras.pointing.setdefault(run.arm.name, {})[str(run.seed)] = result["pointing"]
    level = {} if look is None else {"level": look.level}
    measurement = measure(truth, files, seeds=seeds, bootstrap=bootstrap, gates=gates, question=question, **level)
    measurement.learning = extras.curves
    cfg = matrix.config
    report = measurement.report
    caveats = [caveat for caveat in (arm.caveat(cfg) for arm in matrix.arms) if caveat]
    departed = departures(plan, question, names, seeds, looks)
    caveats += [departure.sentence for departure in departed]
    if look is not None:
        report["look"] = {"seeds": look.seeds, "level": look.level, **asdict(look.looks)}
        caveats.append(
            f"Looked at {look.looks.in_words()}: the verdict of this look, at {look.seeds}, is taken at the level "
            f"{look.level:.4f}, so that all looks together keep 5%."
        )
    elif unfinished and any(seed not in seeds for seed in matrix.seeds):
        caveats.append(f"Not finished, so that their seeds are left out: {', '.join(unfinished)}.")
    caveats += still_learning(report, extras.curves)
    caveats += _of_departures(report, departed)
    report["verdict"] = "\n".join([report["verdict"], *caveats])
    report["plan"] = plan
    report["cost"] = {name: of_arm(found) for name, found in results.items()}
    extras.provenance = [
        ("config", matrix.config_file),
        *((f"arm {name}", arms[name].describe(cfg)) for name in names),
        ("overrides of all arms", " ".join(matrix.overrides) or "none"),
        ("training set", ", ".join(cfg.DATASETS.TRAIN)),
        ("validation set", f"{cfg.DATASETS.TEST[0]} ({matrix.annotation_file})"),
        ("schedule", f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"),
        ("start weights", cfg.MODEL.WEIGHTS or "none, trained from scratch"),
        ("device", cfg.MODEL.DEVICE),
        ("declared before the first run", _in_words(plan)),
        *_versions(),
    ]
    _write(matrix.output, measurement, extras, truth, files, matrix.image_root)
    return measurement


def _check(matrix: Matrix, question: Question, bootstrap: int, against: str | None) -> None:
    """What would be found only after the training, before it."""
    _reference_first([arm.name for arm in matrix.arms], against)
    check_question(question, bootstrap, metric_names(GroundTruth(matrix.annotation_file).content["categories"]))


def compare_results(
    ground_truth: str | Path,
    arms: Mapping[str, Sequence[str | Path]],
    output: str | Path,
    *,
    bootstrap: int = 1000,
    image_root: str | Path | None = None,
    question: Question = DECLARED,
    against: str | None = None,
) -> Measurement:
    """Compares detections that exist and writes the report into ``output``.

    Args:
        ground_truth: COCO instances.
        arms: for each arm, the first being the reference, a file in COCO's result format for each seed.
        output: folder of the report.
        bootstrap: samples of the image bootstrap, at least 200; 0 for none.
        image_root: folder of the images, for the gallery; without it there is none.
        question: what is to be answered.
        against: the arm that the others are compared with; the first by default.

    Raises:
        UserError: something that the user can put right.
    """
    arms, output = _comparable(arms, output, against)
    if image_root is not None and not Path(image_root).is_dir():
        raise UserError(f"--images {image_root}: there is no such folder")
    check_question(question, bootstrap)
    truth = GroundTruth(ground_truth)
    measurement = measure(truth, arms, bootstrap=bootstrap, images=image_root is not None, question=question)
    extras = Extras(provenance=[("ground truth", str(ground_truth))])
    extras.provenance += [(f"arm {name}", ", ".join(map(str, files))) for name, files in arms.items()]
    extras.provenance += _versions()
    _write(output, measurement, extras, truth, arms, None if image_root is None else Path(image_root))
    return measurement


def draw_report(report: str | Path, output: str | Path) -> Measurement:
    """Writes pages, tables and figures of a ``report.json`` that exists, of schema 1 or 2.

    What is in no report is not drawn: galleries, learning curves, precision and recall.

    Args:
        report: the file.
        output: folder of what is written; not that of the file, which would be written over.

    Raises:
        UserError: the file is no report, or something cannot be written.
    """
    output = Path(output)
    check_folder(output, "--output")
    if output.resolve() == Path(report).resolve().parent:
        raise UserError(f"--draw {report} writes a report.json of its own: name another --output")
    measurement = Measurement(read_report(report))
    extras = Extras(pointing=measurement.report["pointing"])
    extras.provenance = [*measurement.report.get("provenance", {}).items(), ("drawn again from", str(report))]
    write_numbers(output, measurement, extras)
    write_page(output, measurement, extras)
    write_figures(output, measurement)
    return measurement


def compare_classified(
    arms: Mapping[str, Sequence[str | Path]],
    output: str | Path,
    *,
    bootstrap: int = 1000,
    question: Question = TOP1,
    against: str | None = None,
    plan: dict | None = None,
    departed: Sequence[Departure] = (),
) -> Measurement:
    """Compares classifiers that ``tools/pretrain.py`` trained and writes the report into ``output``.

    Args:
        arms: for each arm, the first being the reference, the folder of a run for each seed.
        output: folder of the report.
        bootstrap: samples of the image bootstrap, at least 200; 0 for none.
        question: what is to be answered, of "top1" or "top5".
        against: the arm that the others are compared with; the first by default.
        plan, departed: what was declared before the runs, and in what this is something else.

    Raises:
        UserError: something that the user can put right.
    """
    arms, output = _comparable(arms, output, against)
    measurement, runs = measure_classified(arms, bootstrap=bootstrap, question=question)
    report = measurement.report
    caveats = [*(departure.sentence for departure in departed), *_of_departures(report, departed)]
    report["verdict"] = "\n".join([report["verdict"], *caveats])
    report["plan"] = plan
    extras = Extras()
    if plan is not None:
        extras.provenance.append(("declared before the first run", _in_words(plan)))
    for name, tried in runs.items():
        extras.provenance.append((f"arm {name}", ", ".join(str(run.path.parent) for run in tried)))
        made = tried[0].result
        if made:
            keys = ("model", "model_kwargs", "groups", "train", "val", "img_size", "epochs", "batch_size", "opt", "lr")
            extras.provenance.append((f"{name} is", ", ".join(f"{key} {made[key]}" for key in keys if key in made)))
            extras.curves[name] = {
                seed: {f"{TASK}/top1": [(point["epoch"], point["top1"]) for point in run.result.get("history", ())]}
                for seed, run in zip(measurement.report["seeds"], tried, strict=True)
            }
            spent = sum(run.result.get("seconds", 0) for run in tried)
            extras.provenance.append((f"training time of {name}", f"{spent / 60:.0f} min"))
    extras.provenance += _versions()
    measurement.learning = extras.curves
    write_numbers(output, measurement, extras)
    write_page(output, measurement, extras)
    return measurement


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
    ordered = _reference_first([arm.name for arm in matrix.arms], against)
    check_question(question, bootstrap, CLASSIFIED)
    plan = declare(matrix, question, against=against)
    matrix.execute(launch_options)
    departed = departures(plan, question, ordered, matrix.seeds)
    how = {"bootstrap": bootstrap, "question": question, "plan": plan, "departed": departed}
    return compare_classified(matrix.folders(ordered), matrix.output, **how)


def _of_departures(report: dict, departed: Sequence[Departure]) -> list[str]:
    """What is said where what was done is not what was declared: no verdict of ``report`` is primary then."""
    report["departures"] = [departure.sentence for departure in departed]
    if not any(departure.exploratory for departure in departed):
        return []
    for verdict in report["verdicts"]:
        verdict["primary"] = False
    return ["What was done is not what was declared, so these verdicts are exploratory and none is primary."]


def _comparable(
    arms: Mapping[str, Sequence[str | Path]], output: str | Path, against: str | None
) -> tuple[dict[str, Sequence[str | Path]], Path]:
    """The arms, the reference first, and the folder of their report, which can be one."""
    if len(arms) < 2:
        raise UserError("a comparison needs at least two arms: give --arm-results twice, the reference first")
    check_folder(output, "--output")
    return {name: arms[name] for name in _reference_first(list(arms), against)}, Path(output)


def _reference_first(names: list[str], against: str | None) -> list[str]:
    if against is None:
        return names
    if against not in names:
        raise UserError(f"--against {against}: there is no such arm among {', '.join(names)}")
    return [against, *(name for name in names if name != against)]


def _write(
    output: Path,
    measurement: Measurement,
    extras: Extras,
    truth: GroundTruth,
    files: Mapping[str, Sequence[str | Path]],
    image_root: Path | None,
) -> None:
    """Numbers first, so that what goes wrong with a picture costs the picture."""
    write_numbers(output, measurement, extras)
    if image_root is not None:
        for name in measurement.report["differences"]:
            try:
                extras.galleries[name] = gallery(measurement, name, truth, image_root, files)
            except Exception as error:  # whatever it is, the numbers and the other pictures are worth having
                logger.warning(f"the gallery of {name} could not be drawn: {error}")
                extras.lost[name] = str(error)
    write_page(output, measurement, extras)


def _in_words(plan: dict) -> str:
    looks = plan.get("looks")
    adding = f"; {Looks(**looks).in_words()}" if isinstance(looks, dict) else ""
    return (
        f"primary metric {plan.get('metric')}, margin {plan.get('margin')} points, "
        f"{'paired by seed' if plan.get('paired') else 'not paired'}, arms {', '.join(plan['arms'])}, reference "
        f"{plan.get('reference', 'the first')}, seeds {', '.join(map(str, plan['seeds']))}{adding}"
    )


def _versions() -> list[tuple[str, str]]:
    versions = {"sge_det": __version__, "Detectron2": detectron2.__version__, "torch": torch.__version__}
    versions["hotcoco"] = getattr(hotcoco, "__version__", None) or metadata.version("hotcoco")
    return [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
