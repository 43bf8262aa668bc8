"""Measures what an attention module gains: arms, seeds, intervals, a report."""

from .api import decide_gain, measure_classified_gain, measure_gain, report_gain
from .arms import Arm, choose_arms
from .cluster import Cluster
from .existing import compare_classified, compare_results, draw_report
from .inference import Interval, both_interval, image_interval, outcomes, seed_interval, welch_interval
from .looks import Looks
from .matrix import Matrix
from .measurement import Measurement, measure
from .parts import Question, Report
from .processes import Launch, RunFailed
from .report import write_figures
from .run import Run
from .schema import from_json, read_report, to_json

__all__ = [
    "Arm",
    "Cluster",
    "Interval",
    "Launch",
    "Looks",
    "Matrix",
    "Measurement",
    "Question",
    "Report",
    "Run",
    "RunFailed",
    "both_interval",
    "choose_arms",
    "compare_classified",
    "compare_results",
    "decide_gain",
    "draw_report",
    "from_json",
    "image_interval",
    "measure",
    "measure_classified_gain",
    "measure_gain",
    "outcomes",
    "read_report",
    "report_gain",
    "seed_interval",
    "to_json",
    "welch_interval",
    "write_figures",
]
