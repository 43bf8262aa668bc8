"""What a run cost: it may come to its end in several stretches, some of which were cut off without a word."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from .parts import Cost

STRETCHES_FILE = "stretches.json"
# A run writes them as it goes on, so that the last one written tells when one that was killed was last alive.
_WRITTEN = ("metrics.json", "last_checkpoint", "inference/coco_instances_results.json")


def begin(folder: Path, unit: str, count: int) -> None:
    """Notes that a run begins or goes on.

    Args:
        folder: the run's.
        unit: what it keeps busy, "GPU" or "core".
        count: how many of them.

    Raises:
        UserError: the folder cannot be written.
    """
    stretches = _closed(_read(folder), _last_alive(folder))
    _write(folder, [*stretches, {"start": time.time(), "seconds": None, "unit": unit, "count": count}])


def end(folder: Path) -> dict[str, Any]:
    """Notes that the run has ended.

    Returns:
        what ``result.json`` says of its cost: ``{"seconds", "stretches", "device_seconds": {unit: seconds}}``, where
        ``seconds`` is the wall time of all stretches together, what was done twice after a kill included.

    Raises:
        UserError: the folder cannot be written.
    """
    stretches = _closed(_read(folder), time.time())
    _write(folder, stretches)
    devices: dict[str, float] = {}
    for stretch in stretches:
        devices[stretch["unit"]] = devices.get(stretch["unit"], 0.0) + stretch["seconds"] * stretch["count"]
    return {
        "seconds": round(sum(stretch["seconds"] for stretch in stretches), 1),
        "stretches": len(stretches),
        "device_seconds": {unit: round(seconds, 1) for unit, seconds in devices.items()},
    }


def of_arm(results: Sequence[dict]) -> Cost:
    """What the runs of an arm cost together.

    Args:
        results: what their ``result.json`` hold.
    """

    def hours(unit: str) -> float:
        known = (
            result["device_seconds"].get(unit, 0.0) if "device_seconds" in result else math.nan for result in results
        )
        return sum(known) / 3600

    wall = sum(result["seconds"] for result in results) / 3600
    return Cost(len(results), wall, gpu_hours=hours("GPU"), core_hours=hours("core"))


def _closed(stretches: list[dict], now: float) -> list[dict]:
    """With the last one, if it is open, ended at ``now``; a clock that was set back makes no negative time."""
    return [
        stretch if stretch["seconds"] is not None else {**stretch, "seconds": max(now - stretch["start"], 0.0)}
        for stretch in stretches
    ]


def _last_alive(folder: Path) -> float:
    return max((os.stat(folder / name).st_mtime for name in _WRITTEN if (folder / name).is_file()), default=0.0)


def _read(folder: Path) -> list[dict]:
    try:
        found = json.loads((folder / STRETCHES_FILE).read_text())["stretches"]
        return [{name: stretch[name] for name in ("start", "seconds", "unit", "count")} for stretch in found]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or of no use: no reason to lose a run
        return []


def _write(folder: Path, stretches: list[dict]) -> None:
    write_json(folder / STRETCHES_FILE, {"schema": 1, "stretches": stretches})
