"""The pictures of a report: colours that colour-blind readers tell apart, markers beside them."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis.figures import COLORS
from ..evaluation.coco import METRICS
from ..evaluation.error_kinds import CALIBRATION, CONFUSION, TIDE
from .measurement import Measurement
from .parts import TASK_NAMES, Report
from .tables import decisive

# The other arms have Okabe and Ito's palette.
REFERENCE_COLOR = "#5a5a5a"
_MARKERS = ("o", "s", "D", "^", "v", "P")
# Large enough to be read at half the size.
# Names from outside may hold a $, which is no formula.
_STYLE = rc_context({"font.size": 13, "axes.titlesize": 14, "font.family": "DejaVu Sans", "text.parse_math": False})
_WIDTH = 10.0  # inches
_DPI = 120
# More than 65,535 pixels no picture has.
_TALLEST = 500.0  # inches
# Categories that are shown where there are more: half of them the best, half the worst.
_MOST_CATEGORIES = 30

Curves = Mapping[str, Mapping[int, Mapping[str, Sequence[tuple[int, float]]]]]


def arm_color(report: Report, name: str) -> str:
    """The colour of an arm in all pictures."""
    place = list(report.arms).index(name)
    return REFERENCE_COLOR if place == 0 else COLORS[(place - 1) % len(COLORS)]


def _marker(report: Report, name: str) -> str:
    return _MARKERS[list(report.arms).index(name) % len(_MARKERS)]


def summary_metrics(report: Report, task: str) -> list[str]:
    """The metrics of all categories together."""
    metrics = list(report.arms[report.reference][task])
    return [metric for metric in metrics if metric in METRICS] or metrics


@_STYLE
def forest(report: Report) -> Figure:
    """Differences from the reference with their intervals, for each metric and arm."""
    primary = report.question.metric
    rows = summary_metrics(report, report.tasks[0])
    rows = rows if primary in rows else [primary, *rows]
    arms = list(report.differences)
    step = 0.8 / len(arms)
    figure, axes = _figure(1.6 + len(rows) * max(0.42, 0.24 * len(arms)), len(report.tasks), sharey=True)
    for ax, task in zip(axes, report.tasks):
        for number, name in enumerate(arms):
            color = arm_color(report, name)
            for row, metric in enumerate(rows):
                difference = report.differences[name][task][metric]
                y = row - 0.4 + step * (number + 0.5)
                if math.isnan(difference.mean):
                    if number == 0:
                        ax.text(
                            0,
                            row,
                            "absent",
                            va="center",
                            ha="center",
                            color="#777777",
                            style="italic",
                            backgroundcolor="white",
                        )
                    continue
                if found := decisive(report, difference):
                    ax.plot([found.low, found.high], [y, y], color=color, lw=3.5, alpha=0.55, solid_capstyle="butt")
                if len(difference.values) > 1:
                    ax.plot(difference.values, [y] * len(difference.values), ".", color=color, ms=7, alpha=0.8)
                label = _label(name) if row == 0 else None
                marker = _marker(report, name)
                ax.plot(difference.mean, y, marker, color=color, ms=9, mec="white", mew=1.2, label=label, zorder=4)
                text = f"{difference.mean:+.1f}"
                ax.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", color=color)
        ax.axvline(0, color="black", lw=1, zorder=0)
        ax.set_title(TASK_NAMES[task])
        ax.set_xlabel(f"difference from {report.reference} (points)")
        ax.grid(axis="x", alpha=0.3)
        for edge in range(1, len(rows)):
            ax.axhline(edge - 0.5, color="#dddddd", lw=0.8, zorder=0)
    axes[0].set_yticks(range(len(rows)), [f"{row} (primary)" if row == primary else row for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    axes[0].set_ylabel(f"all but {primary} are exploratory")
    _legend(figure, axes[0])
    return figure


@_STYLE
def ap_by_arm(report: Report) -> Figure:
    """AP or top-1 of each arm, a dot for each seed; thin lines join the runs of a seed."""
    names, metric = list(report.arms), report.main_metric
    figure, axes = _figure(4.6, len(report.tasks))
    for ax, task in zip(axes, report.tasks):
        values = np.array([report.arms[name][task][metric].values for name in names])
        ax.plot(values, color="#bbbbbb", lw=1, zorder=1)
        for place, name in enumerate(names):
            color, marker = arm_color(report, name), _marker(report, name)
            ax.plot([place] * values.shape[1], values[place], marker, color=color, ms=9, mec="white", mew=0.8, zorder=3)
            mean = values[place].mean()
            ax.plot([place - 0.22, place + 0.22], [mean, mean], color=color, lw=3, zorder=2)
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1}
            ax.annotate(f"{mean:.1f}", (place + 0.25, mean), va="center", color=color, bbox=behind)
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.5, len(names) - 0.25)
        ax.set_ylabel(f"{TASK_NAMES[task]} {metric} (points)")
        ax.margins(y=0.15)
        ax.grid(axis="y", alpha=0.3)
    return figure


@_STYLE
def category_differences(report: Report) -> Figure:
    """Differences from the reference by category; of many categories the best and the worst."""
    arms, tasks = list(report.differences), report.tasks
    first = report.differences[arms[0]][tasks[0]]
    names = [metric for metric in first if metric.startswith("AP-") and not math.isnan(first[metric].mean)]
    names.sort(key=lambda metric: -first[metric].mean)
    all_of_them = len(names)
    if len(names) > _MOST_CATEGORIES:
        names = names[: _MOST_CATEGORIES // 2] + names[-_MOST_CATEGORIES // 2 :]
    figure, axes = _figure(1.6 + max(len(names), 2) * max(0.34, 0.2 * len(arms)), len(tasks), sharey=True)
    step = 0.8 / len(arms)
    for ax, task in zip(axes, tasks):
        for number, name in enumerate(arms):
            color, marker = arm_color(report, name), _marker(report, name)
            for row, metric in enumerate(names):
                difference = report.differences[name][task][metric]
                y = row - 0.4 + step * (number + 0.5)
                ax.plot([0, difference.mean], [y, y], color=color, lw=2, alpha=0.45)
                if len(difference.values) > 1:
                    ax.plot(difference.values, [y] * len(difference.values), ".", color=color, ms=6, alpha=0.8)
                label = _label(name) if row == 0 else None
                ax.plot(difference.mean, y, marker, color=color, ms=8, mec="white", mew=1, label=label)
        ax.axvline(0, color="black", lw=1, zorder=0)
        of_all = f", {len(names)} of {all_of_them} categories" if len(names) < all_of_them else ""
        ax.set_title(TASK_NAMES[task] + of_all)
        ax.set_xlabel(f"AP difference from {report.reference} (points)")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), [metric.removeprefix("AP-") for metric in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    _legend(figure, axes[0])
    return figure


@_STYLE
def error_differences(report: Report) -> Figure:
    """Differences from the reference by kind of error, with their intervals over the seeds."""
    rows = TIDE | CALIBRATION | CONFUSION
    arms = list(report.differences)
    step = 0.8 / len(arms)
    figure, axes = _figure(1.6 + len(rows) * max(0.42, 0.24 * len(arms)), len(report.tasks), sharey=True)
    for ax, task in zip(axes, report.tasks):
        for number, name in enumerate(arms):
            color, marker = arm_color(report, name), _marker(report, name)
            for row, kind in enumerate(rows):
                difference = report.origins.differences[name][task][kind]
                y = row - 0.4 + step * (number + 0.5)
                if found := difference.interval:
                    ax.plot([found.low, found.high], [y, y], color=color, lw=3.5, alpha=0.55, solid_capstyle="butt")
                if len(difference.values) > 1:
                    ax.plot(difference.values, [y] * len(difference.values), ".", color=color, ms=7, alpha=0.8)
                label = _label(name) if row == 0 else None
                ax.plot(difference.mean, y, marker, color=color, ms=9, mec="white", mew=1.2, label=label, zorder=4)
        ax.axvline(0, color="black", lw=1, zorder=0)
        for edge in (len(TIDE), len(TIDE) + len(CALIBRATION)):
            ax.axhline(edge - 0.5, color="#888888", lw=0.8, zorder=0)
        ax.set_title(TASK_NAMES[task])
        ax.set_xlabel(f"difference from {report.reference} (points)")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(rows)), rows.values())
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    _legend(figure, axes[0])
    return figure


@_STYLE
def learning_curves(report: Report, curves: Curves) -> Figure:
    """Training loss and validation AP over the iterations, or top-1 over the epochs, a line for each run."""
    metric = report.main_metric
    keys = ["total_loss", *(f"{task}/{metric}" for task in report.tasks)]
    labels = ["training loss", *(f"{TASK_NAMES[task]} {metric} (points)" for task in report.tasks)]
    if metric != "AP":
        keys, labels = keys[1:], labels[1:]
    figure, axes = _figure(4.4, len(keys))
    for ax, key, label in zip(axes, keys, labels):
        for name, by_seed in curves.items():
            for number, logged in enumerate(by_seed.values()):
                points = np.array(logged.get(key, [])).reshape(-1, 2)
                style = {"color": arm_color(report, name), "lw": 1.6, "alpha": 0.85}
                if key != "total_loss":
                    style |= {"marker": _marker(report, name), "ms": 6, "mec": "white", "mew": 0.6}
                ax.plot(points[:, 0], points[:, 1], label=_label(name) if number == 0 else None, **style)
        ax.set_xlabel("iteration" if metric == "AP" else "epoch")
        ax.set_ylabel(label)
        ax.grid(alpha=0.3)
        ax.set_ylim(bottom=0)
    _legend(figure, axes[0])
    return figure


@_STYLE
def precision_recall(measurement: Measurement) -> Figure:
    """Precision over recall at IoU 0.5 and 0.75, mean over the categories; thin lines are the seeds."""
    report = measurement.report
    panels = [(task, iou) for task in report.tasks for iou in ("0.50", "0.75")]
    rows = len(report.tasks)
    figure, axes = _figure(4.4 * rows, 2, rows, sharey=True, sharex=True)
    for ax, (task, iou) in zip(axes, panels):
        for name, by_seed in measurement.curves[task].items():
            color = arm_color(report, name)
            lines = np.array([curve[iou] for curve in by_seed])
            dashes = "--" if name == report.reference else "-"
            if len(lines) > 1:
                ax.plot(measurement.recall, lines.T, color=color, lw=0.8, alpha=0.4)
            ax.plot(measurement.recall, lines.mean(0), dashes, color=color, lw=2.4, label=_label(name))
        ax.set_title(f"{TASK_NAMES[task]}, IoU {float(iou):g}")
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
        ax.label_outer()
    for ax in axes[-2:]:
        ax.set_xlabel("recall")
    for ax in axes[::2]:
        ax.set_ylabel("precision")
    _legend(figure, axes[0])
    return figure


def _figure(height: float, columns: int, rows: int = 1, **shared) -> tuple[Figure, list[Axes]]:
    size = (_WIDTH if columns > 1 else 0.7 * _WIDTH, min(height, _TALLEST))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # else the last number of an axis meets the first of the next
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def _legend(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False)


def _label(name: str) -> str:
    """The name of an arm for the legend, which leaves out what begins with "_"."""
    return f" {name}" if name.startswith("_") else name


@rc_context({"pdf.fonttype": 42, "svg.hashsalt": "sge_det"})
def rendered(figure: Figure, kind: str = "png") -> bytes:
    """A picture as the content of a file: "png", "svg" or "pdf", the same for the same picture."""
    buffer = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(buffer, format=kind, facecolor="white", metadata=dates.get(kind))
    return buffer.getvalue()
