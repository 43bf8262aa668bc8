"""The two ways to a report: train the arms, or take the results that there are."""

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import detectron2
import hotcoco
import torch

from .. import __version__
from ..errors import UserError
from .gallery import gallery
from .matrix import Matrix
from .report import Extras, write_report
from .statistics import GroundTruth, Measurement, measure


def measure_gain(matrix: Matrix, *, jobs: int = 1, bootstrap: int = 1000) -> Measurement:
    """Trains and evaluates every run of ``matrix`` that is not finished, and writes the report into its folder.

    Args:
        matrix: arms, seeds, config and folder.
        jobs: runs at once on this machine.
        bootstrap: samples of the image bootstrap; 0 for none.

    Raises:
        UserError: something that the user can put right.
        RunFailed: a run failed otherwise.
    """
    matrix.execute(jobs)
    truth = GroundTruth(matrix.annotation_file)
    files = {arm.name: [run.predictions for run in matrix.runs if run.arm == arm] for arm in matrix.arms}
    gates: dict[str, dict[int, dict]] = {}
    extras = Extras()
    for run in matrix.runs:
        extras.curves.setdefault(run.arm.name, {})[run.seed] = run.curves()
        result = run.result()
        if result["gates"]:
            gates.setdefault(run.arm.name, {})[run.seed] = result["gates"]
        if result.get("pointing"):
            extras.pointing.setdefault(run.arm.name, {})[str(run.seed)] = result["pointing"]
    measurement = measure(truth, files, seeds=matrix.seeds, bootstrap=bootstrap, gates=gates)
    cfg = matrix.config
    caveats = [caveat for caveat in (arm.caveat(cfg) for arm in matrix.arms) if caveat]
    measurement.report["verdict"] = "\n".join([measurement.report["verdict"], *caveats])
    minutes = sum(run.result()["seconds"] for run in matrix.runs) / 60
    extras.provenance = [
        ("config", matrix.config_file),
        *((f"arm {arm.name}", arm.describe(cfg)) for arm in matrix.arms),
        ("overrides of all arms", " ".join(matrix.overrides) or "none"),
        ("training set", ", ".join(cfg.DATASETS.TRAIN)),
        ("validation set", f"{cfg.DATASETS.TEST[0]} ({matrix.annotation_file})"),
        ("schedule", f"{cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images"),
        ("start weights", cfg.MODEL.WEIGHTS or "none, trained from scratch"),
        ("device", cfg.MODEL.DEVICE),
        ("training time of all runs", f"{minutes:.0f} min"),
        *_versions(),
    ]
    _draw_galleries(extras, measurement, truth, files, matrix.image_root)
    write_report(matrix.output, measurement, extras)
    return measurement


def compare_results(
    ground_truth: str | Path,
    arms: Mapping[str, Sequence[str | Path]],
    output: str | Path,
    *,
    bootstrap: int = 1000,
    image_root: str | Path | None = None,
) -> Measurement:
    """Compares detections that exist and writes the report into ``output``.

    Args:
        ground_truth: COCO instances.
        arms: for each arm, the first being the reference, a file in COCO's result format for each seed.
        output: folder of the report.
        bootstrap: samples of the image bootstrap; 0 for none.
        image_root: folder of the images, for the gallery; without it there is none.

    Raises:
        UserError: something that the user can put right.
    """
    if len(arms) < 2:
        raise UserError("a comparison needs at least two arms: give --arm-results twice, the reference first")
    truth = GroundTruth(ground_truth)
    measurement = measure(truth, arms, bootstrap=bootstrap, images=image_root is not None)
    extras = Extras(provenance=[("ground truth", str(ground_truth))])
    extras.provenance += [(f"arm {name}", ", ".join(map(str, files))) for name, files in arms.items()]
    extras.provenance += _versions()
    if image_root is not None:
        _draw_galleries(extras, measurement, truth, arms, Path(image_root))
    write_report(Path(output), measurement, extras)
    return measurement


def _draw_galleries(
    extras: Extras,
    measurement: Measurement,
    truth: GroundTruth,
    files: Mapping[str, Sequence[str | Path]],
    image_root: Path,
) -> None:
    for name in measurement.report["differences"]:
        extras.galleries[name] = gallery(measurement, name, truth, image_root, files)


def _versions() -> list[tuple[str, str]]:
    versions = {"sge_det": __version__, "Detectron2": detectron2.__version__, "torch": torch.__version__}
    versions["hotcoco"] = getattr(hotcoco, "__version__", None) or metadata.version("hotcoco")
    return [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
