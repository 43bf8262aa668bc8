"""Where a difference comes from: kinds of errors, calibration and confusion of each arm, and how they differ."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.error_kinds import Errors
from .inference import seed_interval, welch_interval

# So many pairs of categories are shown, those whose confusion differs most.
_MOST_PAIRS = 10


def origins(
    found: Mapping[str, Mapping[str, Sequence[Errors]]], categories: Sequence[str], *, paired: bool
) -> dict[str, Any]:
    """The errors of all arms and their differences from the reference, with intervals over the seeds.

    Args:
        found: by task and arm, the first being the reference, the errors of each seed.
        categories: the names of the K categories, in the order of ``Errors.confusion``.
        paired: whether the runs of a seed belong together: Student's interval, otherwise Welch's.

    Returns:
        ``report.json``'s "origins" (docs/measuring.md); NaN where JSON has null.
    """
    result: dict[str, Any] = {"arms": {}, "differences": {}, "confusions": {}}
    for task, arms in found.items():
        reference, *others = arms
        for name, errors in arms.items():
            values = {figure: [of_seed.figures[figure] for of_seed in errors] for figure in errors[0].figures}
            result["arms"].setdefault(name, {})[task] = {
                figure: {"mean": float(np.mean(by_seed)), "values": by_seed} for figure, by_seed in values.items()
            }
        for name in others:
            theirs, ours = (result["arms"][of][task] for of in (reference, name))
            result["differences"].setdefault(name, {})[task] = {
                figure: _difference(theirs[figure]["values"], ours[figure]["values"], paired) for figure in theirs
            }
            confusions = _confusions(arms[reference], arms[name], categories, paired)
            result["confusions"].setdefault(name, {})[task] = confusions
    return result


def _difference(theirs: Sequence[float], ours: Sequence[float], paired: bool) -> dict[str, Any]:
    values = np.subtract(ours, theirs)
    found = seed_interval(values) if paired else welch_interval(theirs, ours)
    interval = None if found is None else {"low": found.low, "high": found.high}
    return {"mean": float(values.mean()), "values": values.tolist(), "interval": interval}


def _confusions(
    theirs: Sequence[Errors], ours: Sequence[Errors], categories: Sequence[str], paired: bool
) -> list[dict[str, Any]]:
    """The pairs of categories whose confusion differs most in the mean."""
    before, after = (np.stack([errors.confusion for errors in of]) for of in (theirs, ours))
    mean = np.nan_to_num((after - before).mean(0))
    order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, mean.shape)) if mean[row, column]]
    return [
        {"category": categories[row], "taken_for": categories[column]}
        | {"reference": float(before[:, row, column].mean()), "arm": float(after[:, row, column].mean())}
        | _difference(before[:, row, column].tolist(), after[:, row, column].tolist(), paired)
        for row, column in pairs
    ]
