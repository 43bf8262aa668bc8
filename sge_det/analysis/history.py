"""The benchmark's ratios by and by, one row of a CSV file for each: who changes the layer sees what it was before."""

import csv
import datetime
import io
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import UserError
from ..files import write_file
from .benchmark import COPY, FLOOR_TENSORS, TEXTBOOK

COLUMNS = ("date", "commit", "device", "threads", "shape", "mode", "contestant", "ratio")
# In the order of the picture, ours last.
_COLORS = {
    "floor": "#bbbbbb",
    "no attention": "#888888",
    "timm eca": "#8fb8de",
    "timm se": "#4a86c5",
    "timm cbam": "#1f4e8c",
    "layer": "#f2b48a",
    "block tail": "#d9541e",
    "KERNEL compile": "#8c2d04",
}
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


def history_figure(path: Path) -> bytes:
    """The layer's latest ratios of a history as a picture: time of the block tail, its rivals and the floor, in PNG.

    Raises:
        UserError: the file is no history, or holds no ratios of the layer.
    """
    rows = [row for row in csv.DictReader(io.StringIO(_read(path))) if row["mode"] in FLOOR_TENSORS]
    if not rows:
        raise UserError(f"{path} holds no ratios of the layer: benchmark.py layer --history {path} appends some")
    latest = {(row["mode"], row["shape"], row["contestant"]): float(row["ratio"]) for row in rows}
    shapes = list(dict.fromkeys(row["shape"] for row in rows))[:4]
    figure = Figure(figsize=(9, 6), layout="constrained")
    for ax, mode in zip(figure.subplots(2), FLOOR_TENSORS, strict=True):
        names = [name for name in _COLORS if any((mode, shape, name) in latest for shape in shapes)]
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            heights = [latest.get((mode, shape, name), 0.0) for shape in shapes]
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(shapes))]
            ax.bar(places, heights, width * 0.92, color=_COLORS[name], label=name)
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
        ax.set_xticks(range(len(shapes)), shapes)
        ax.set_ylabel("time, textbook = 1")
        ax.set_title(mode, loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(ncols=len(names), fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.1))
    figure.supxlabel("N x C x H x W at the ends of R-50's stages", fontsize=9)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
