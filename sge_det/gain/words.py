"""What a report says around its tables and pictures."""

from collections.abc import Sized

from ..analysis import pointing
from ..evaluation.error_kinds import CONFIDENT
from .parts import TASK_NAMES, Report
from .tables import ABSENT

DECIDES = (
    "Over seeds: new seeds, these images. Over images: these detectors, new images. Over both: new seeds and new "
    "images; a verdict stands on it. Only the metric that was declared is judged; among all others some interval "
    "leaves zero out by chance, so they are exploratory."
)

ORIGINS = (
    "Exploratory. Kinds of errors at IoU 0.5 are TIDE's: the points of AP50 that are lost to each, so that less is "
    "better; they do not add up. Calibration errors are the points by which scores differ from the share of true "
    "detections, absent where scores are not from 0 to 1. The last four rows are per cent, of objects and of "
    f"detections with a score of at least {CONFIDENT:g}. Intervals are over new seeds, for these images."
)
CONFUSIONS = "The categories whose confusion differs most, per cent of their objects:"
COST = (
    "Training and evaluation of all runs of an arm, what was done twice after an interruption included; a core counts "
    "for each thread of torch."
)


def interval_name(report: Report) -> str:
    """What the intervals of tables and pictures are over: new seeds and new images, if those are there."""
    percent = f"{report.confidence:.0%}"
    if report.several and report.bootstrap_samples:
        return f"{percent} interval over new seeds and new images"
    if report.several:
        return f"{percent} interval over new seeds, for these images"
    if report.bootstrap_samples:
        return f"{percent} interval over new images, for these detectors"
    return "no interval: one seed and no bootstrap"


def explanation(report: Report) -> str:
    """What was compared, and what the numbers are."""
    pairing = "paired by seed" if report.question.paired else "not paired (Welch)"
    runs = f"{len(report.seeds)} seeds" if report.several else "one seed"
    spread = "; mean ± standard deviation over the seeds" if report.several else ""
    of_boxes = report.main_metric == "AP"
    what = "Metrics are COCO's" if of_boxes else "Metrics are the shares of images that are classified right"
    absent = f' "{ABSENT}": the validation set has no such objects.' if of_boxes else ""
    return (
        f"{len(report.arms)} arms, {runs}, {report.images} validation images. {what}, in points "
        f"(0-100){spread}; differences are {pairing}; {interval_name(report)}.{absent}"
    )


def metrics_heading(report: Report, task: str) -> str:
    """Above the table of a task's metrics."""
    but = f"all but {report.question.metric} are " if task == report.task else ""
    return f"{TASK_NAMES[task].capitalize()} metrics ({but}exploratory)"


def pointing_explanation(by_seed: Sized) -> str:
    """What the tables of the pointing game show, of so many seeds."""
    return pointing.EXPLANATION + (pointing.OVER_SEEDS if len(by_seed) > 1 else pointing.OVER_IMAGES)
