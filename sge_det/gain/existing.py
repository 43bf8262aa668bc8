"""Reports of what exists: detections, classifiers that were trained, and reports that were written before."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import detectron2
import hotcoco
import torch

from .. import __version__
from ..data.datasets import check_places
from ..errors import UserError
from ..files import check_folder
from .classified import TASK, TOP1, measure_classified
from .gallery import GalleryImage, gallery
from .input import GroundTruth
from .measurement import Measurement, check_question, measure
from .parts import DECLARED, Declared, Question, Report
from .plan import Departure, in_words
from .report import write_figures, write_report
from .schema import read_report


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
    if image_root is not None:
        check_places(ground_truth, list(truth.images.values()), image_root)
    measurement = measure(truth, arms, bootstrap=bootstrap, images=image_root is not None, question=question)
    provenance = {f"arm {name}": ", ".join(map(str, files)) for name, files in arms.items()}
    provenance = {"ground truth": str(ground_truth), **provenance, **versions()}
    measurement.report = replace(measurement.report, provenance=provenance)

    def draw_gallery(name: str) -> list[GalleryImage]:
        return gallery(measurement, name, truth, Path(image_root), arms)

    write_report(output, measurement, None if image_root is None else draw_gallery)
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
    found = read_report(report)
    measurement = Measurement(replace(found, provenance={**found.provenance, "drawn again from": str(report)}))
    write_report(output, measurement)
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
    provenance = {} if plan is None else {"declared before the first run": in_words(plan)}
    for name, tried in runs.items():
        provenance[f"arm {name}"] = ", ".join(str(run.path.parent) for run in tried)
        made = tried[0].result
        if made:
            keys = ("model", "model_kwargs", "groups", "train", "val", "img_size", "epochs", "batch_size", "opt", "lr")
            provenance[f"{name} is"] = ", ".join(f"{key} {made[key]}" for key in keys if key in made)
            measurement.learning[name] = {
                seed: {f"{TASK}/top1": [(point["epoch"], point["top1"]) for point in run.result.get("history", ())]}
                for seed, run in zip(measurement.report.seeds, tried, strict=True)
            }
            spent = sum(run.result.get("seconds", 0) for run in tried)
            provenance[f"training time of {name}"] = f"{spent / 60:.0f} min"
    report = held_against(measurement.report, plan, departed, [departure.sentence for departure in departed])
    measurement.report = replace(report, provenance={**provenance, **versions()})
    write_report(output, measurement)
    return measurement


def held_against(report: Report, plan: dict | None, departed: Sequence[Departure], caveats: Sequence[str]) -> Report:
    """The report beside what was declared: where it is something else, no verdict is primary.

    Args:
        plan: what was declared before the first run, if anything.
        departed: in what this is something else.
        caveats: sentences that go to the verdict.
    """
    caveats = list(caveats)
    if any(departure.exploratory for departure in departed):
        caveats.append("What was done is not what was declared, so these verdicts are exploratory and none is primary.")
        report = replace(report, verdicts=tuple(replace(verdict, primary=False) for verdict in report.verdicts))
    declared = Declared(plan, tuple(departure.sentence for departure in departed))
    return replace(report, declared=declared, verdict="\n".join([report.verdict, *caveats]))


def _comparable(
    arms: Mapping[str, Sequence[str | Path]], output: str | Path, against: str | None
) -> tuple[dict[str, Sequence[str | Path]], Path]:
    """The arms, the reference first, and the folder of their report, which can be one."""
    if len(arms) < 2:
        raise UserError("a comparison needs at least two arms: give --arm-results twice, the reference first")
    check_folder(output, "--output")
    return {name: arms[name] for name in reference_first(list(arms), against)}, Path(output)


def reference_first(names: list[str], against: str | None) -> list[str]:
    """The names of the arms in the order of a report.

    Args:
        against: the reference; the first by default.

    Raises:
        UserError: there is no such arm.
    """
    if against is None:
        return names
    if against not in names:
        raise UserError(f"--against {against}: there is no such arm among {', '.join(names)}")
    return [against, *(name for name in names if name != against)]


def versions() -> dict[str, str]:
    """What a report is made with, for its provenance."""
    found = {"sge_det": __version__, "Detectron2": detectron2.__version__, "torch": torch.__version__}
    found["hotcoco"] = getattr(hotcoco, "__version__", None) or metadata.version("hotcoco")
    return {"versions": ", ".join(f"{name} {version}" for name, version in found.items())}
