"""Report files as they were written, of this schema and the one before, so that they can be drawn again."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from .inference import (
    Interval,
    effect_size,
    probability_of_improvement,
    seed_correlation,
    seed_interval,
    welch_interval,
)
from .verdict import DECLARED

SCHEMA = 2
_OLD = (
    "This report is of schema 1. Its intervals over the images were too narrow and are left out, so that none speaks "
    "of new seeds and new images both; its sentences stand as written, on the seeds alone or on those intervals."
)
# null is "there is none" here, and "not a number" everywhere else
_MAY_LACK = ("seeds", "welch", "images", "both", "interval", "images_by_seed", "excludes_zero")


def read_report(path: str | Path) -> dict[str, Any]:
    """What ``report.json`` holds, as :attr:`.measurement.Measurement.report` has it; schema 1 is brought to schema 2.

    Raises:
        UserError: it cannot be read, or is no report of these schemas.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema not in (1, SCHEMA) or not {"arms", "differences", "reference", "tasks", "seeds"} <= set(report):
        raise UserError(f"{path} is no report.json of measure_gain of the schema 1 or {SCHEMA}")
    report = _with_nan(report)
    try:
        return _upgraded(report) if schema == 1 else report
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no whole report.json of measure_gain: {error!r} is missing in it") from error


def _with_nan(value: Any, key: str = "") -> Any:
    if value is None:
        return None if key in _MAY_LACK else math.nan
    if isinstance(value, dict):
        return {name: _with_nan(part, name) for name, part in value.items()}
    return [_with_nan(part, key) for part in value] if isinstance(value, list) else value


def _upgraded(report: dict[str, Any]) -> dict[str, Any]:
    reference = report["reference"]
    differences = {
        name: {
            task: {
                metric: _difference(report["arms"][reference][task][metric]["values"], score["values"])
                for metric, score in report["arms"][name][task].items()
            }
            for task in by_task
        }
        for name, by_task in report["differences"].items()
    }
    new = {"schema": SCHEMA, "differences": differences, "bootstrap_samples": 0}
    new["question"] = asdict(DECLARED) | {"task": report["tasks"][0]}
    new |= {"verdicts": [], "notes": [], "verdict": f"{_OLD}\n{report['verdict']}"}
    return {"gates": {}, "pointing": {}, **report, **new}


def _difference(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    values = [b - a for a, b in zip(theirs, ours, strict=True)]
    intervals = {"seeds": seed_interval(values), "welch": welch_interval(theirs, ours), "images": None, "both": None}
    return {
        "mean": sum(values) / len(values),
        "values": values,
        "seed_correlation": seed_correlation(theirs, ours),
        "intervals": {name: _bounds(interval) for name, interval in intervals.items()},
        "images_by_seed": [None] * len(values),
        "probability_of_improvement": probability_of_improvement(theirs, ours),
        "effect_size": effect_size(theirs, ours),
    }


def _bounds(interval: Interval | None) -> dict[str, float] | None:
    return {"low": interval.low, "high": interval.high} if interval else None
