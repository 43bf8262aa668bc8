"""Measures what an attention module gains: arms, seeds, intervals, a report."""

from .api import (
    compare_classified,
    compare_results,
    decide_gain,
    draw_report,
    measure_classified_gain,
    measure_gain,
    report_gain,
)
from .arms import Arm, choose_arms
from .cluster import Cluster
from .inference import Interval, both_interval, image_interval, outcomes, seed_interval, welch_interval
from .looks import Looks
from .matrix import Matrix
from .measurement import Measurement, measure
from .processes import Launch, RunFailed
from .report import write_figures
from .run import Run
from .verdict import Question

__all__ = [
    "Arm",
    "Cluster",
    "Interval",
    "Launch",
    "Looks",
    "Matrix",
    "Measurement",
    "Question",
    "Run",
    "RunFailed",
    "both_interval",
    "choose_arms",
    "compare_classified",
    "compare_results",
    "decide_gain",
    "draw_report",
    "image_interval",
    "measure",
    "measure_classified_gain",
    "measure_gain",
    "outcomes",
    "report_gain",
    "seed_interval",
    "welch_interval",
    "write_figures",
]
