"""Where a difference comes from: kinds of errors, calibration and confusion of each arm, and how they differ."""

from collections.abc import Mapping, Sequence

import numpy as np

from ..evaluation.error_kinds import Errors
from .inference import seed_interval, welch_interval
from .parts import Bounds, Confusion, ErrorDifference, ErrorScore, Origins

# So many pairs of categories are shown, those whose confusion differs most.
_MOST_PAIRS = 10


def origins(found: Mapping[str, Mapping[str, Sequence[Errors]]], categories: Sequence[str], *, paired: bool) -> Origins:
    """The errors of all arms and their differences from the reference, with intervals over the seeds.

    Args:
        found: by task and arm, the first being the reference, the errors of each seed.
        categories: the names of the K categories, in the order of ``Errors.confusion``.
        paired: whether the runs of a seed belong together: Student's interval, otherwise Welch's.
    """
    scores: dict[str, dict[str, dict[str, ErrorScore]]] = {}
    differences: dict[str, dict[str, dict[str, ErrorDifference]]] = {}
    confusions: dict[str, dict[str, tuple[Confusion, ...]]] = {}
    for task, arms in found.items():
        reference, *others = arms
        for name, errors in arms.items():
            values = {figure: tuple(of_seed.figures[figure] for of_seed in errors) for figure in errors[0].figures}
            scores.setdefault(name, {})[task] = {
                figure: ErrorScore(float(np.mean(by_seed)), by_seed) for figure, by_seed in values.items()
            }
        for name in others:
            theirs, ours = (scores[of][task] for of in (reference, name))
            differences.setdefault(name, {})[task] = {
                figure: ErrorDifference(*_difference(theirs[figure].values, ours[figure].values, paired))
                for figure in theirs
            }
            confusions.setdefault(name, {})[task] = _confusions(arms[reference], arms[name], categories, paired)
    return Origins(scores, differences, confusions)


def _difference(
    theirs: Sequence[float], ours: Sequence[float], paired: bool
) -> tuple[float, tuple[float, ...], Bounds | None]:
    """Mean, values by seed, and the interval of the mean over new seeds."""
    values = np.subtract(ours, theirs)
    found = seed_interval(values) if paired else welch_interval(theirs, ours)
    return float(values.mean()), tuple(values.tolist()), Bounds.of(found)


def _confusions(
    theirs: Sequence[Errors], ours: Sequence[Errors], categories: Sequence[str], paired: bool
) -> tuple[Confusion, ...]:
    """The pairs of categories whose confusion differs most in the mean."""
    before, after = (np.stack([errors.confusion for errors in of]) for of in (theirs, ours))
    mean = np.nan_to_num((after - before).mean(0))
    order = np.argsort(-np.abs(mean), axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [(int(row), int(column)) for row, column in zip(*np.unravel_index(order, mean.shape)) if mean[row, column]]
    return tuple(
        Confusion(
            categories[row],
            categories[column],
            float(before[:, row, column].mean()),
            float(after[:, row, column].mean()),
            *_difference(before[:, row, column].tolist(), after[:, row, column].tolist(), paired),
        )
        for row, column in pairs
    )
