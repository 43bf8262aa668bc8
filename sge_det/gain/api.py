"""The two ways to a report: train the arms, or take the results that there are."""

import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import detectron2
import hotcoco
import torch

from .. import __version__
from ..errors import UserError
from .gallery import gallery
from .input import GroundTruth
from .matrix import Matrix
from .measurement import Measurement, check_question, measure
from .plan import declare, departures
from .processes import check_jobs
from .report import Extras, write_numbers, write_page
from .verdict import DECLARED, Question, still_learning

logger = logging.getLogger(__name__)


def measure_gain(
    matrix: Matrix,
    *,
    jobs: int = 1,
    bootstrap: int = 1000,
    question: Question = DECLARED,
    against: str | None = None,
) -> Measurement:
    """Trains and evaluates every run of ``matrix`` that is not finished, and writes the report into its folder.

    Args:
        matrix: arms, seeds, config and folder.
        jobs: runs at once on this machine.
        bootstrap: samples of the image bootstrap, at least 200; 0 for none.
        question: what is to be answered; the first call's is kept in ``plan.json`` and shown beside this one.
        against: the arm that the others are compared with; the first by default.

    Raises:
        UserError: something that the user can put right.
        RunFailed: a run failed otherwise.
    """
    names = _reference_first([arm.name for arm in matrix.arms], against)
    truth = GroundTruth(matrix.annotation_file)
    check_question(question, bootstrap, truth)
    check_jobs(matrix.launch, jobs, matrix.config.MODEL.DEVICE)
    plan = declare(matrix, question)
    matrix.execute(jobs)
    arms = {arm.name: arm for arm in matrix.arms}
    files = {name: [run.predictions for run in matrix.runs if run.arm == arms[name]] for name in names}
    gates: dict[str, dict[int, dict]] = {}
    extras = Extras()
    seconds = dict.fromkeys(names, 0.0)
    for run in matrix.runs:
        extras.curves.setdefault(run.arm.name, {})[run.seed] = run.curves()
        result = run.result()
        seconds[run.arm.name] += result["seconds"]
        if result["gates"]:
            gates.setdefault(run.arm.name, {})[run.seed] = result["gates"]
        if result.get("pointing"):
            extras.pointing.setdefault(run.arm.name, {})[str(run.seed)] = result["pointing"]
    measurement = measure(truth, files, seeds=matrix.seeds, bootstrap=bootstrap, gates=gates, question=question)
    cfg = matrix.config
    caveats = [caveat for caveat in (arm.caveat(cfg) for arm in matrix.arms) if caveat]
    caveats += departures(plan, question, [arm.name for arm in matrix.arms], matrix.seeds)
    caveats += still_learning(measurement.report, extras.curves)
    measurement.report["verdict"] = "\n".join([measurement.report["verdict"], *caveats])
    measurement.report["plan"] = plan
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
        *((f"training time of {name}", f"{seconds[name] / 60:.0f} min") for name in names),
        ("training time of all runs", f"{sum(seconds.values()) / 60:.0f} min"),
        *_versions(),
    ]
    _write(matrix.output, measurement, extras, truth, files, matrix.image_root)
    return measurement


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
    if len(arms) < 2:
        raise UserError("a comparison needs at least two arms: give --arm-results twice, the reference first")
    arms = {name: arms[name] for name in _reference_first(list(arms), against)}
    output = Path(output)
    taken = next((path for path in (output, *output.parents) if path.exists()), output)
    if taken.exists() and not taken.is_dir():
        raise UserError(f"--output {output}: {taken} is a file; name a folder")
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
    return (
        f"primary metric {plan.get('metric')}, margin {plan.get('margin')} points, "
        f"{'paired by seed' if plan.get('paired') else 'not paired'}, arms {', '.join(plan.get('arms', []))}, seeds "
        f"{', '.join(map(str, plan['seeds']))}"
    )


def _versions() -> list[tuple[str, str]]:
    versions = {"sge_det": __version__, "Detectron2": detectron2.__version__, "torch": torch.__version__}
    versions["hotcoco"] = getattr(hotcoco, "__version__", None) or metadata.version("hotcoco")
    return [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
