"""The benchmark's ratios by and by, one row of a CSV file for each: who changes the layer sees what it was before."""

import csv
import datetime
import io
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files import write_file
from .benchmark import COPY, FLOOR_TENSORS, TEXTBOOK

COLUMNS = ("date", "commit", "device", "threads", "shape", "mode", "contestant", "ratio")
_ROOT = Path(__file__).resolve().parent.parent.parent


def append_history(path: Path, result: dict) -> int:
    """Appends the ratios of ``benchmark_layer`` (to the textbook) or ``benchmark_model`` (to plain) to a CSV file.

    Args:
        path: of the file, which is made where it is missing.
        result: of either function.

    Returns:
        how many rows were added.

    Raises:
        UserError: the file has other columns, or cannot be read.
    """
    before = _read(path)
    start = [datetime.date.today().isoformat(), _commit(), _device(result), result["threads"]]
    rows = [[*start, *row] for row in (_of_layer(result) if "shapes" in result else _of_model(result))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not before:
        writer.writerow(COLUMNS)
    writer.writerows(rows)
    write_file(path, before + text.getvalue())
    return len(rows)


def _read(path: Path) -> str:
    if not path.exists():
        return ""
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the history {path}: {error}") from error
    if before and before.splitlines()[0] != ",".join(COLUMNS):
        raise UserError(f"{path} is no history of benchmarks, its first line is not {','.join(COLUMNS)}: name another")
    return before if not before or before.endswith("\n") else before + "\n"


def _of_layer(result: dict) -> Iterator[list]:
    for entry in result["shapes"]:
        shape = "x".join(map(str, entry["shape"]))
        for mode, tensors in FLOOR_TENSORS.items():
            textbook = entry["contestants"][TEXTBOOK][mode]["median_ms"]
            floor = entry["contestants"][COPY]["forward"]["median_ms"] * tensors / 2
            yield [shape, mode, "floor", round(floor / textbook, 3)]
            for name, timed in entry["contestants"].items():
                if mode in timed and name not in (COPY, TEXTBOOK):
                    yield [shape, mode, name, round(timed[mode]["median_ms"] / textbook, 3)]


def _of_model(result: dict) -> Iterator[list]:
    shape = "x".join(map(str, (result["images"], 3, *result["size"])))
    for mode in ("inference", "training step"):
        plain = result[mode]["plain"]
        for name, timed in result[mode].items():
            if name != "plain" and isinstance(timed, dict):
                yield [shape, f"{mode}, time", name, round(timed["median_ms"] / plain["median_ms"], 3)]
                yield [shape, f"{mode}, peak memory", name, round(timed["peak_bytes"] / plain["peak_bytes"], 3)]


def _commit() -> str:
    """The checkout's commit, with a plus where it has changes; "" where this is none."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", _ROOT, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+" if changes else "")


def _device(result: dict) -> str:
    device = result.get("device", "cpu")
    if device != "cpu":
        return device
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "cpu"
