"""Measures what an attention module gains: arms, seeds, intervals, a report."""

from .api import compare_results, measure_gain
from .arms import Arm, choose_arms
from .matrix import Launch, Matrix, RunFailed
from .statistics import Measurement, measure, t_interval

__all__ = [
    "Arm",
    "Launch",
    "Matrix",
    "Measurement",
    "RunFailed",
    "choose_arms",
    "compare_results",
    "measure",
    "measure_gain",
    "t_interval",
]
