"""The tables of a report, as Markdown, HTML, CSV and LaTeX."""

import csv
import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..analysis import pointing
from ..evaluation.error_kinds import CALIBRATION, CONFUSION, TIDE
from ..markdown import escape
from .latex import escape_latex
from .parts import TASK_NAMES, Bounds, Cost, Difference, Report, Score

ABSENT = "absent"
_HOURS = {"hours": "hours", "gpu_hours": "GPU hours", "core_hours": "core hours"}


@dataclass
class Table:
    """A table of text; the first column is what the row is about."""

    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        header, *rows = ([escape(text) for text in line] for line in (self.header, *self.rows))
        lines = [header, *rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        padded = [
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:]))]
            for line in (header, rule, *rows)
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)

    def csv(self) -> str:
        """The table for a spreadsheet; text that one would take for a formula has an apostrophe before it."""
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([_inert(text) for text in row] for row in self._lines)
        return lines.getvalue()

    def latex(self) -> str:
        """The table as a ``tabular`` that needs no package."""
        header, *rows = (" & ".join(map(escape_latex, row)) + r" \\" for row in self._lines)
        lines = [rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}", r"\hline", header, r"\hline", *rows]
        return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"

    @property
    def _lines(self) -> list[list[str]]:
        return [self.header, *self.rows]

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(text)}</th>" for text in self.header)
        rows = "\n".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in self.rows)
        return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


def _inert(text: str) -> str:
    is_number = re.fullmatch(r"[+-]?[0-9.]+( to [+-]?[0-9.]+)?( ± [0-9.]+)?", text)
    return f"'{text}" if text[:1] in tuple("=+-@\t\r") and not is_number else text


def report_tables(report: Report) -> dict[str, Table]:
    """All tables of a report, by the names of their files."""
    tables = {"intervals": interval_table(report), "seeds": seed_table(report)}
    for task in report.tasks:
        tables[f"metrics_{task}"] = metric_table(report, task)
        if report.origins:
            tables |= {
                f"errors_{task}": origin_table(report, task),
                f"confusions_{task}": confusion_table(report, task),
            }
    of_arms: dict[str, list[tuple[str, Table]]] = {}
    for name, by_seed in report.gates.items():
        of_arms.setdefault("gates", []).append((name, gate_table(by_seed)))
    for name, by_seed in report.pointing.items():
        shapes = [shape for shape in pointing.SHAPES if shape in next(iter(by_seed.values()))]
        for shape, table in zip(shapes, pointing_tables(by_seed), strict=True):
            of_arms.setdefault(f"pointing_{shape}", []).append((name, table))
    for key, found in of_arms.items():
        tables[key] = Table(["arm", *found[0][1].header], [[name, *row] for name, table in found for row in table.rows])
    if report.cost:
        tables["cost"] = cost_table(report)
    return tables


def metrics_csv(report: Report) -> str:
    """A line for each arm, task, metric and seed, in points; empty where a metric is absent."""
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["arm", "task", "metric", "seed", "value"])
    for name, by_task in report.arms.items():
        for task, scores in by_task.items():
            for metric, score in scores.items():
                for seed, value in zip(report.seeds, score.values):
                    table.writerow([_inert(name), task, metric, seed, "" if math.isnan(value) else repr(float(value))])
    return lines.getvalue()


def decisive(report: Report, difference: Difference) -> Bounds | None:
    """The interval of a difference that :func:`.words.interval_name` names, if there is one."""
    of = difference.intervals
    if not report.several:
        return of.images
    return of.both if report.bootstrap_samples else of.seeds if report.question.paired else of.welch


def metric_table(report: Report, task: str, metrics: Sequence[str] | None = None) -> Table:
    """The metrics of all arms and their differences from the reference, in points; all ``metrics`` by default."""
    names = list(report.arms)
    has_interval = report.several or report.bootstrap_samples > 0
    header = ["metric", *names]
    for name in report.differences:
        header.append("difference" if len(names) == 2 else f"{name} - {report.reference}")
        header += ["95% interval"] if has_interval else []
    rows = []
    for metric in report.arms[report.reference][task] if metrics is None else metrics:
        row = [metric] + [_score(report.arms[name][task][metric], report.several) for name in names]
        for by_task in report.differences.values():
            difference = by_task[task][metric]
            row.append(_signed(difference.mean))
            row += [_span(decisive(report, difference))] if has_interval else []
        rows.append(row)
    return Table(header, rows)


def interval_table(report: Report) -> Table:
    """All intervals of the metric that was declared, by task and arm; the one that decides is marked."""
    metric = report.question.metric
    header = ["difference", "mean", "over seeds, paired", "over seeds, Welch", "over images", "over both (decides)"]
    header += ["correlation over seeds", "P(improvement)", "effect size"]
    rows = []
    for task in report.tasks:
        for name, by_task in report.differences.items():
            found = by_task[task][metric]
            what = "" if task == report.task else ", exploratory"
            row = [f"{name} - {report.reference}, {TASK_NAMES[task]} {metric}{what}", _signed(found.mean)]
            of = found.intervals
            row += map(_span, (of.seeds, of.welch, of.images, of.both))
            row += [_signed_if_known(found.seed_correlation), _number(found.probability_of_improvement)]
            rows.append([*row, _signed_if_known(found.effect_size)])
    return Table(header, rows)


def seed_table(report: Report) -> Table:
    """The declared metric of each run and the differences by seed with their intervals over the images."""
    metric = report.question.metric
    rows = []
    for task in report.tasks:
        what = f"{TASK_NAMES[task]} {metric}"
        for name, by_task in report.arms.items():
            rows.append([f"{name}, {what}", *map(_number, by_task[task][metric].values)])
        for name, by_task in report.differences.items():
            found = by_task[task][metric]
            rows.append([f"{name} - {report.reference}, {what}", *map(_signed, found.values)])
            if any(found.images_by_seed):
                rows.append(["over new images", *map(_span, found.images_by_seed)])
    return Table(["run", *(f"seed {seed}" for seed in report.seeds)], rows)


def _span(bounds: Bounds | None) -> str:
    return f"{bounds.low:+.2f} to {bounds.high:+.2f}" if bounds else ""


def _number(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.2f}"


def _signed_if_known(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2f}"


def _signed(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:+.2f}"


def _score(score: Score, several: bool) -> str:
    if math.isnan(score.mean):
        return ABSENT
    return f"{score.mean:.2f}" + (f" ± {score.sd:.2f}" if several else "")


def gate_table(by_seed: Mapping[str, Mapping[str, Any]]) -> Table:
    """Gamma, beta and the gates (0-1) of the runs of an arm, by stage."""
    header = ["run, stage", "gamma", "beta", "gate", "gate, spread over a map"]
    rows = []
    for seed, stages in by_seed.items():
        for stage, found in stages.items():
            numbers = [f"{found[key]['mean']:.4f} ± {found[key]['sd']:.4f}" for key in ("gamma", "beta", "gate")]
            rows.append([f"seed {seed}, {stage}", *numbers, f"{found['gate']['spatial_sd']:.4f}"])
    return Table(header, rows)


def origin_table(report: Report, task: str) -> Table:
    """The errors of all arms by kind, and their differences from the reference."""
    names, found = list(report.arms), report.origins
    header = ["", *names]
    for name in found.differences:
        header.append("difference" if len(names) == 2 else f"{name} - {report.reference}")
        header += ["95% interval over seeds"] if report.several else []
    rows = []
    for figure, meaning in (TIDE | CALIBRATION | CONFUSION).items():
        row = [meaning, *(_number(found.arms[name][task][figure].mean) for name in names)]
        for by_task in found.differences.values():
            difference = by_task[task][figure]
            row.append(_signed(difference.mean))
            row += [_span(difference.interval)] if report.several else []
        rows.append(row)
    return Table(header, rows)


def confusion_table(report: Report, task: str) -> Table:
    """The categories whose confusion differs most from the reference's, by arm."""
    header = ["arm", "objects", "taken for", report.reference, "this arm", "difference"]
    rows = []
    for name, by_task in report.origins.confusions.items():
        for pair in by_task[task]:
            row = [name, pair.category, pair.taken_for, _number(pair.reference), _number(pair.arm)]
            rows.append([*row, _signed(pair.mean), *([_span(pair.interval)] if report.several else [])])
    return Table([*header, *(["95% interval over seeds"] if report.several else [])], rows)


def cost_table(report: Report) -> Table:
    """What the arms cost, and all of them together."""
    costs = [*report.cost.items()]
    costs.append(("all", Cost(*(sum(getattr(cost, key) for _, cost in costs) for key in ("runs", *_HOURS)))))
    rows = [
        [name, str(cost.runs), *(_hours(getattr(cost, key)) for key in _HOURS), _hours(cost.hours / cost.runs)]
        for name, cost in costs
    ]
    return Table(["arm", "runs", *_HOURS.values(), "hours a run"], rows)


def _hours(hours: float) -> str:
    return "" if math.isnan(hours) else f"{hours:.2f}"


def pointing_tables(by_seed: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The pointing game's figures of an arm by stage and size, a table for boxes and one for masks."""
    runs = list(by_seed.values())
    tables = []
    for shape in pointing.SHAPES:
        if shape in runs[0]:
            rows = [
                [f"{stage}, {size}", *pointing.pointing_row([run[shape][stage][size] for run in runs])]
                for stage, sizes in runs[0][shape].items()
                for size in sizes
            ]
            tables.append(Table([f"in an object's {pointing.SHAPES[shape]}", *pointing.HEADER], rows))
    return tables
