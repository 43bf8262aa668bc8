"""report.json, report.md, report.html and the table on the screen."""

import base64
import csv
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..analysis import pointing
from ..evaluation.coco import METRICS
from ..evaluation.error_kinds import CALIBRATION, CONFIDENT, CONFUSION, TIDE
from ..files import make_folder, write_file, write_json
from ..markdown import escape, escape_line
from . import plots
from .gallery import SCORE, GalleryImage
from .latex import escape_latex
from .measurement import Measurement
from .verdict import TASK_NAMES

ABSENT = "absent"
_HOURS = {"hours": "hours", "gpu_hours": "GPU hours", "core_hours": "core hours"}
# Tables of more categories are folded in the page.
_FEW_CATEGORIES = 20
_DECIDES = (
    "Over seeds: new seeds, these images. Over images: these detectors, new images. Over both: new seeds and new "
    "images; a verdict stands on it. Only the metric that was declared is judged; among all others some interval "
    "leaves zero out by chance, so they are exploratory."
)

_ORIGINS = (
    "Exploratory. Kinds of errors at IoU 0.5 are TIDE's: the points of AP50 that are lost to each, so that less is "
    "better; they do not add up. Calibration errors are the points by which scores differ from the share of true "
    "detections. The last four rows are per cent, of objects and of detections with a score of at least "
    f"{CONFIDENT:g}. Intervals are over new seeds, for these images."
)
_CONFUSIONS = "The categories whose confusion differs most, per cent of their objects:"
_COST = (
    "Training and evaluation of all runs of an arm, what was done twice after an interruption included; a core counts "
    "for each thread of torch."
)

_CSS = """
body { font: 16px/1.5 "DejaVu Sans", Verdana, sans-serif; color: #1a1a1a; max-width: 1060px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.7em } h2 { font-size: 1.3em; margin-top: 2em; border-bottom: 1px solid #ccc }
.verdict { background: #eef4fa; border-left: 5px solid #0072b2; padding: .8em 1.2em }
.verdict p { margin: .3em 0 }
table { border-collapse: collapse; margin: 1em 0; font-size: .88em }
th, td { padding: .25em .65em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto }
img { max-width: 100%; display: block; margin: 1em 0 .2em }
summary { cursor: pointer }
figure { margin: 1.2em 0 } figcaption, .note { color: #444; font-size: .9em }
"""


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


@dataclass
class Extras:
    """What a report shows besides the numbers of a :class:`Measurement`.

    Attributes:
        curves: by arm and seed, what the run logged (``Run.curves``).
        galleries: by arm, the images on which it differs most from the reference.
        pointing: by arm and seed, what :func:`sge_det.analysis.pointing.play` returns.
        lost: by arm, why its gallery could not be drawn.
        provenance: what was compared, and with what: (name, value) pairs.
    """

    curves: plots.Curves = field(default_factory=dict)
    galleries: dict[str, list[GalleryImage]] = field(default_factory=dict)
    pointing: dict[str, dict[str, dict]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    provenance: list[tuple[str, str]] = field(default_factory=list)


def write_numbers(output: Path, measurement: Measurement, extras: Extras) -> None:
    """Writes ``report.json``, ``report.md``, ``metrics.csv`` and ``tables/`` into ``output``.

    Raises:
        UserError: they cannot be written.
    """
    measurement.report["pointing"] = extras.pointing
    measurement.report["provenance"] = dict(extras.provenance)
    write_json(output / "report.json", measurement.report)
    write_file(output / "report.md", markdown(measurement.report))
    write_file(output / "metrics.csv", metrics_csv(measurement.report))
    make_folder(output / "tables")
    for name, table in report_tables(measurement.report).items():
        write_file(output / "tables" / f"{name}.csv", table.csv())
        write_file(output / "tables" / f"{name}.tex", table.latex())


def write_page(output: Path, measurement: Measurement, extras: Extras) -> None:
    """Draws the pictures and writes ``report.html`` into ``output``.

    Raises:
        UserError: it cannot be written.
    """
    write_file(output / "report.html", html_page(measurement, extras))


def write_figures(output: Path, measurement: Measurement) -> None:
    """Writes the plots of the report as SVG and PDF into ``output/figures``.

    Raises:
        UserError: they cannot be written.
    """
    report = measurement.report
    figures = {"differences": plots.forest(report), "arms": plots.ap_by_arm(report)}
    if plots.main_metric(report) == "AP":
        figures["categories"] = plots.category_differences(report)
    if report.get("origins"):
        figures["errors"] = plots.error_differences(report)
    if measurement.learning:
        figures["learning_curves"] = plots.learning_curves(report, measurement.learning)
    if measurement.curves:
        figures["precision_recall"] = plots.precision_recall(measurement)
    make_folder(output / "figures")
    for name, figure in figures.items():
        for kind in ("svg", "pdf"):
            write_file(output / "figures" / f"{name}.{kind}", plots.rendered(figure, kind))


def report_tables(report: dict) -> dict[str, Table]:
    """All tables of a report, by the names of their files."""
    tables = {"intervals": interval_table(report), "seeds": seed_table(report)}
    for task in report["tasks"]:
        tables[f"metrics_{task}"] = metric_table(report, task)
        if report.get("origins"):
            tables |= {
                f"errors_{task}": origin_table(report, task),
                f"confusions_{task}": confusion_table(report, task),
            }
    of_arms: dict[str, list[tuple[str, Table]]] = {}
    for name, by_seed in report["gates"].items():
        of_arms.setdefault("gates", []).append((name, gate_table(by_seed)))
    for name, by_seed in report["pointing"].items():
        shapes = [shape for shape in pointing.SHAPES if shape in next(iter(by_seed.values()))]
        for shape, table in zip(shapes, pointing_tables(by_seed), strict=True):
            of_arms.setdefault(f"pointing_{shape}", []).append((name, table))
    for key, found in of_arms.items():
        tables[key] = Table(["arm", *found[0][1].header], [[name, *row] for name, table in found for row in table.rows])
    if report.get("cost"):
        tables["cost"] = cost_table(report)
    return tables


def metrics_csv(report: dict) -> str:
    """A line for each arm, task, metric and seed, in points; empty where a metric is absent."""
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(["arm", "task", "metric", "seed", "value"])
    for name, arm in report["arms"].items():
        for task in report["tasks"]:
            for metric, score in arm[task].items():
                for seed, value in zip(report["seeds"], score["values"]):
                    table.writerow([name, task, metric, seed, "" if math.isnan(value) else repr(float(value))])
    return lines.getvalue()


def markdown(report: dict) -> str:
    """The report in words and tables, as Markdown."""
    parts = ["# Gain", *map(escape_line, report["verdict"].split("\n")), escape_line(_explanation(report))]
    parts += ["## Intervals", interval_table(report).markdown(), _DECIDES]
    parts += ["## Every seed", seed_table(report).markdown()]
    for task in report["tasks"]:
        parts += [f"## {_metrics_heading(report, task)}", metric_table(report, task).markdown()]
    for task in report["tasks"] if report.get("origins") else ():
        parts += [f"## Where it comes from: {TASK_NAMES[task]}", _ORIGINS, origin_table(report, task).markdown()]
        confusions = confusion_table(report, task)
        parts += [_CONFUSIONS, confusions.markdown()] if confusions.rows else []
    for name, by_seed in report["gates"].items():
        parts += [f"## Gates of {escape(name)}", gate_table(by_seed).markdown()]
    for name, by_seed in report["pointing"].items():
        parts += [f"## Pointing game of {escape(name)}", _pointing_explanation(by_seed)]
        parts += [table.markdown() for table in pointing_tables(by_seed)]
    if report.get("cost"):
        parts += ["## Cost", cost_table(report).markdown(), _COST]
    made_from = report.get("provenance", {}).items()
    parts += ["## Made from", "\n".join(f"- {escape(key)}: {escape(value)}" for key, value in made_from)]
    return "\n\n".join(parts) + "\n"


def _metrics_heading(report: dict, task: str) -> str:
    question = report["question"]
    but = f"all but {question['metric']} are " if task == question["task"] else ""
    return f"{TASK_NAMES[task].capitalize()} metrics ({but}exploratory)"


def metric_table(report: dict, task: str, metrics: Sequence[str] | None = None) -> Table:
    """The metrics of all arms and their differences from the reference, in points; all ``metrics`` by default."""
    names, several = list(report["arms"]), len(report["seeds"]) > 1
    has_interval = several or report["bootstrap_samples"] > 0
    header = ["metric", *names]
    for name in report["differences"]:
        header.append("difference" if len(names) == 2 else f"{name} - {report['reference']}")
        header += ["95% interval"] if has_interval else []
    rows = []
    for metric in report["arms"][report["reference"]][task] if metrics is None else metrics:
        row = [metric] + [_score(report["arms"][name][task][metric], several) for name in names]
        for differences in report["differences"].values():
            difference = differences[task][metric]
            row.append(ABSENT if math.isnan(difference["mean"]) else f"{difference['mean']:+.2f}")
            row += [_span(*plots.interval(report, difference))] if has_interval else []
        rows.append(row)
    return Table(header, rows)


def interval_table(report: dict) -> Table:
    """All intervals of the metric that was declared, by task and arm; the one that decides is marked."""
    names = ("seeds", "welch", "images", "both")
    metric = report["question"]["metric"]
    header = ["difference", "mean", "over seeds, paired", "over seeds, Welch", "over images", "over both (decides)"]
    header += ["correlation over seeds", "P(improvement)", "effect size"]
    rows = []
    for task in report["tasks"]:
        for name, differences in report["differences"].items():
            found = differences[task][metric]
            what = "" if task == report["question"]["task"] else ", exploratory"
            row = [f"{name} - {report['reference']}, {TASK_NAMES[task]} {metric}{what}", _signed(found["mean"])]
            bounds = (found["intervals"][name] or {"low": math.nan, "high": math.nan} for name in names)
            row += [_span(bound["low"], bound["high"]) for bound in bounds]
            row += [_signed_if_known(found["seed_correlation"]), f"{found['probability_of_improvement']:.2f}"]
            rows.append([*row, _signed_if_known(found["effect_size"])])
    return Table(header, rows)


def seed_table(report: dict) -> Table:
    """The declared metric of each run and the differences by seed with their intervals over the images."""
    metric = report["question"]["metric"]
    rows = []
    for task in report["tasks"]:
        what = f"{TASK_NAMES[task]} {metric}"
        for name, arm in report["arms"].items():
            rows.append([f"{name}, {what}", *(_number(value) for value in arm[task][metric]["values"])])
        for name, differences in report["differences"].items():
            found = differences[task][metric]
            rows.append([f"{name} - {report['reference']}, {what}", *map(_signed, found["values"])])
            if any(found["images_by_seed"]):
                bounds = (bound or {"low": math.nan, "high": math.nan} for bound in found["images_by_seed"])
                rows.append(["over new images", *(_span(bound["low"], bound["high"]) for bound in bounds)])
    return Table(["run", *(f"seed {seed}" for seed in report["seeds"])], rows)


def _span(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{low:+.2f} to {high:+.2f}"


def _number(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:.2f}"


def _signed_if_known(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.2f}"


def _signed(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{value:+.2f}"


def gate_table(by_seed: dict[str, dict]) -> Table:
    """Gamma, beta and the gates (0-1) of the runs of an arm, by stage."""
    header = ["run, stage", "gamma", "beta", "gate", "gate, spread over a map"]
    rows = []
    for seed, stages in by_seed.items():
        for stage, found in stages.items():
            numbers = [f"{found[key]['mean']:.4f} ± {found[key]['sd']:.4f}" for key in ("gamma", "beta", "gate")]
            rows.append([f"seed {seed}, {stage}", *numbers, f"{found['gate']['spatial_sd']:.4f}"])
    return Table(header, rows)


def origin_table(report: dict, task: str) -> Table:
    """The errors of all arms by kind, and their differences from the reference."""
    names, found, several = list(report["arms"]), report["origins"], len(report["seeds"]) > 1
    header = ["", *names]
    for name in found["differences"]:
        header.append("difference" if len(names) == 2 else f"{name} - {report['reference']}")
        header += ["95% interval over seeds"] if several else []
    rows = []
    for figure, meaning in (TIDE | CALIBRATION | CONFUSION).items():
        row = [meaning, *(_number(found["arms"][name][task][figure]["mean"]) for name in names)]
        for differences in found["differences"].values():
            difference = differences[task][figure]
            row.append(_signed(difference["mean"]))
            row += [_bounds(difference["interval"])] if several else []
        rows.append(row)
    return Table(header, rows)


def confusion_table(report: dict, task: str) -> Table:
    """The categories whose confusion differs most from the reference's, by arm."""
    several = len(report["seeds"]) > 1
    header = ["arm", "objects", "taken for", report["reference"], "this arm", "difference"]
    rows = []
    for name, by_task in report["origins"]["confusions"].items():
        for pair in by_task[task]:
            row = [name, pair["category"], pair["taken_for"], _number(pair["reference"]), _number(pair["arm"])]
            rows.append([*row, _signed(pair["mean"]), *([_bounds(pair["interval"])] if several else [])])
    return Table([*header, *(["95% interval over seeds"] if several else [])], rows)


def _bounds(interval: dict | None) -> str:
    return _span(interval["low"], interval["high"]) if interval else ""


def cost_table(report: dict) -> Table:
    """What the arms cost, and all of them together."""
    rows = []
    for name, cost in report["cost"].items():
        rows.append([name, str(cost["runs"]), *(_hours(cost[key]) for key in _HOURS)])
        rows[-1].append(_hours(cost["hours"] / cost["runs"]))
    sums = {key: sum(cost[key] for cost in report["cost"].values()) for key in ("runs", *_HOURS)}
    rows.append(
        ["all", str(sums["runs"]), *(_hours(sums[key]) for key in _HOURS), _hours(sums["hours"] / sums["runs"])]
    )
    return Table(["arm", "runs", *_HOURS.values(), "hours a run"], rows)


def _hours(hours: float) -> str:
    return "" if math.isnan(hours) else f"{hours:.2f}"


def pointing_tables(by_seed: dict[str, dict]) -> list[Table]:
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


def _pointing_explanation(by_seed: dict[str, dict]) -> str:
    return pointing.EXPLANATION + (pointing.OVER_SEEDS if len(by_seed) > 1 else pointing.OVER_IMAGES)


def _score(score: dict, several: bool) -> str:
    if math.isnan(score["mean"]):
        return ABSENT
    return f"{score['mean']:.2f}" + (f" ± {score['sd']:.2f}" if several else "")


def _explanation(report: dict) -> str:
    pairing = "paired by seed" if report["question"]["paired"] else "not paired (Welch)"
    runs = f"{len(report['seeds'])} seeds" if len(report["seeds"]) > 1 else "one seed"
    spread = "; mean ± standard deviation over the seeds" if len(report["seeds"]) > 1 else ""
    of_boxes = plots.main_metric(report) == "AP"
    what = "Metrics are COCO's" if of_boxes else "Metrics are the shares of images that are classified right"
    absent = f' "{ABSENT}": the validation set has no such objects.' if of_boxes else ""
    return (
        f"{len(report['arms'])} arms, {runs}, {report['images']} validation images. {what}, in points "
        f"(0-100){spread}; differences are {pairing}; {plots.interval_name(report)}.{absent}"
    )


def html_page(measurement: Measurement, extras: Extras) -> str:
    """The report as one HTML page that needs nothing but itself."""
    report = measurement.report
    title = f"Gain: {' and '.join(report['differences'])} against {report['reference']}"
    verdict = "".join(f"<p>{html.escape(line)}</p>" for line in report["verdict"].split("\n"))
    parts = [f"<h1>{html.escape(title)}</h1>", f'<div class="verdict">{verdict}</div>']
    parts.append(f"<p>{html.escape(_explanation(report))}</p>")
    parts += ["<h2>Intervals</h2>", interval_table(report).html(), f'<p class="note">{html.escape(_DECIDES)}</p>']
    parts += ["<h2>Every seed</h2>", seed_table(report).html()]
    parts.append("<h2>Differences</h2>")
    many = " Small dots are the single seeds." if len(report["seeds"]) > 1 else ""
    caption = f"Difference from {report['reference']}. Bars: {plots.interval_name(report)}.{many}"
    parts.append(_figure(plots.forest(report), "Differences with their intervals", caption))
    for task in report["tasks"]:
        parts += [f"<h2>{_metrics_heading(report, task)}</h2>"]
        parts.append(metric_table(report, task, plots.summary_metrics(report, task)).html())
    parts.append("<h2>Arms and seeds</h2>")
    metric = plots.main_metric(report)
    caption = f"{metric} of each run; bars are means, thin lines join the runs of a seed."
    parts.append(_figure(plots.ap_by_arm(report), f"{metric} per arm, every seed as a dot", caption))
    if metric == "AP":
        parts += _categories(report, many)
    if extras.curves:
        parts.append("<h2>Learning curves</h2>")
        caption = f"A line for each run; {metric} on the validation images."
        caption += " The loss is the median since the last point." if metric == "AP" else ""
        parts.append(_figure(plots.learning_curves(report, extras.curves), f"{metric} while they learn", caption))
    if measurement.curves:
        parts.append("<h2>Precision and recall</h2>")
        caption = f"Mean over the categories{' and seeds; thin lines are the seeds' if many else ''}."
        parts.append(_figure(plots.precision_recall(measurement), "Precision over recall", caption))
    if report.get("origins"):
        parts += _origins(report)
    for name, by_seed in report["gates"].items():
        parts.append(f"<h2>Gates of {html.escape(name)}</h2>")
        parts.append(
            "<p>Over all validation images: mean ± standard deviation over positions, groups and blocks of a stage. "
            "Only what varies over a map is spatial attention; gates start constant, at sigmoid(beta).</p>"
        )
        parts.append(gate_table(by_seed).html())
    for name, by_seed in report["pointing"].items():
        parts.append(f"<h2>Pointing game of {html.escape(name)}</h2>")
        parts.append(f"<p>{html.escape(_pointing_explanation(by_seed))}</p>")
        parts += [table.html() for table in pointing_tables(by_seed)]
    for name, pictures in extras.galleries.items():
        parts += _gallery(report, name, pictures)
    for name, reason in extras.lost.items():
        parts.append(f"<p>The gallery of {html.escape(name)} could not be drawn: {html.escape(reason)}</p>")
    if report.get("cost"):
        parts += ["<h2>Cost</h2>", cost_table(report).html(), f'<p class="note">{html.escape(_COST)}</p>']
    parts.append("<h2>Made from</h2>")
    parts.append(Table(["", ""], [[key, value] for key, value in extras.provenance]).html())
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _origins(report: dict) -> list[str]:
    several = " Small dots are the single seeds; bars are 95% intervals over seeds." if len(report["seeds"]) > 1 else ""
    parts = ["<h2>Where the difference comes from</h2>", f'<p class="note">{html.escape(_ORIGINS)}</p>']
    caption = f"Difference from {report['reference']} by kind of error.{several}"
    parts.append(_figure(plots.error_differences(report), "Differences by kind of error", caption))
    for task in report["tasks"]:
        parts += [f"<h3>{TASK_NAMES[task].capitalize()}</h3>", origin_table(report, task).html()]
        confusions = confusion_table(report, task)
        if confusions.rows:
            parts += [f'<p class="note">{html.escape(_CONFUSIONS)}</p>', confusions.html()]
    return parts


def _categories(report: dict, many: str) -> list[str]:
    caption = f"AP difference from {report['reference']} by category.{many}"
    parts = ["<h2>Categories</h2>", _figure(plots.category_differences(report), "Differences by category", caption)]
    for task in report["tasks"]:
        by_category = [metric for metric in report["arms"][report["reference"]][task] if metric not in METRICS]
        is_open = " open" if len(by_category) <= _FEW_CATEGORIES else ""
        parts.append(f"<details{is_open}><summary>{TASK_NAMES[task].capitalize()} AP by category</summary>")
        parts.append(metric_table(report, task, by_category).html() + "</details>")
    return parts


def _gallery(report: dict, name: str, pictures: Sequence[GalleryImage]) -> list[str]:
    parts = [f"<h2>Where {html.escape(name)} and {html.escape(report['reference'])} differ most</h2>"]
    several = len(report["seeds"]) > 1
    task = TASK_NAMES[report["tasks"][0]]
    mean, drawn = (", mean over the seeds", "the seed that shows it most") if several else ("", "the seed")
    parts.append(
        f'<p class="note">The {len(pictures)} validation images whose own {task} AP50 differs most{mean}, gains and '
        f"losses alike; drawn are the detections of {drawn} with a score of at least {SCORE:g}. Green: objects. Blue: "
        "detections that meet an object (box IoU 0.5). Orange, dashed: false ones.</p>"
    )
    for picture in pictures:
        caption = f"{picture.file_name}: AP50 "
        caption += f"{picture.reference[picture.place]:.0f} with {report['reference']}, "
        caption += f"{picture.arm[picture.place]:.0f} with {name}"
        if several:
            means = (float(np.mean(picture.reference)), float(np.mean(picture.arm)))
            caption += f" (seed {picture.seed}); mean over the seeds {means[0]:.0f} and {means[1]:.0f}"
        parts.append(_figure(picture.png, picture.file_name, caption))
    return parts


def _figure(picture: Figure | bytes, alt: str, caption: str) -> str:
    png = plots.rendered(picture) if isinstance(picture, Figure) else picture
    source = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
