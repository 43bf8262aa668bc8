"""``report.html``: the report as one page that needs nothing but itself."""

import base64
import html
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.coco import METRICS
from . import plots, words
from .gallery import SCORE, GalleryImage
from .measurement import Measurement
from .parts import TASK_NAMES, Report
from .tables import (
    Table,
    confusion_table,
    cost_table,
    gate_table,
    interval_table,
    metric_table,
    origin_table,
    pointing_tables,
    seed_table,
)

# Tables of more categories are folded.
_FEW_CATEGORIES = 20
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


def html_page(measurement: Measurement, galleries: Mapping[str, Sequence[GalleryImage] | str]) -> str:
    """The report as one HTML page that needs nothing but itself.

    Args:
        galleries: by arm, the images on which it differs most from the reference, or why they could not be drawn.
    """
    report = measurement.report
    title = f"Gain: {' and '.join(report.differences)} against {report.reference}"
    verdict = "".join(f"<p>{html.escape(line)}</p>" for line in report.lines)
    parts = [f"<h1>{html.escape(title)}</h1>", f'<div class="verdict">{verdict}</div>']
    parts.append(f"<p>{html.escape(words.explanation(report))}</p>")
    parts += ["<h2>Intervals</h2>", interval_table(report).html(), f'<p class="note">{html.escape(words.DECIDES)}</p>']
    parts += ["<h2>Every seed</h2>", seed_table(report).html()]
    parts.append("<h2>Differences</h2>")
    many = " Small dots are the single seeds." if report.several else ""
    caption = f"Difference from {report.reference}. Bars: {words.interval_name(report)}.{many}"
    parts.append(_figure(plots.forest(report), "Differences with their intervals", caption))
    for task in report.tasks:
        parts += [f"<h2>{html.escape(words.metrics_heading(report, task))}</h2>"]
        parts.append(metric_table(report, task, plots.summary_metrics(report, task)).html())
    parts.append("<h2>Arms and seeds</h2>")
    metric = report.main_metric
    caption = f"{metric} of each run; bars are means, thin lines join the runs of a seed."
    parts.append(_figure(plots.ap_by_arm(report), f"{metric} per arm, every seed as a dot", caption))
    if metric == "AP":
        parts += _categories(report, many)
    if measurement.learning:
        parts.append("<h2>Learning curves</h2>")
        caption = f"A line for each run; {metric} on the validation images."
        caption += " The loss is the median since the last point." if metric == "AP" else ""
        parts.append(
            _figure(plots.learning_curves(report, measurement.learning), f"{metric} while they learn", caption)
        )
    if measurement.curves:
        parts.append("<h2>Precision and recall</h2>")
        caption = f"Mean over the categories{' and seeds; thin lines are the seeds' if many else ''}."
        parts.append(_figure(plots.precision_recall(measurement), "Precision over recall", caption))
    if report.origins:
        parts += _origins(report)
    for name, by_seed in report.gates.items():
        parts.append(f"<h2>Gates of {html.escape(name)}</h2>")
        parts.append(
            "<p>Over all validation images: mean ± standard deviation over positions, groups and blocks of a stage. "
            "Only what varies over a map is spatial attention; gates start constant, at sigmoid(beta).</p>"
        )
        parts.append(gate_table(by_seed).html())
    for name, by_seed in report.pointing.items():
        parts.append(f"<h2>Pointing game of {html.escape(name)}</h2>")
        parts.append(f"<p>{html.escape(words.pointing_explanation(by_seed))}</p>")
        parts += [table.html() for table in pointing_tables(by_seed)]
    for name, pictures in galleries.items():
        if isinstance(pictures, str):
            parts.append(f"<p>The gallery of {html.escape(name)} could not be drawn: {html.escape(pictures)}</p>")
        else:
            parts += _gallery(report, name, pictures)
    if report.cost:
        parts += ["<h2>Cost</h2>", cost_table(report).html(), f'<p class="note">{html.escape(words.COST)}</p>']
    parts.append("<h2>Made from</h2>")
    parts.append(Table(["", ""], [[key, value] for key, value in report.provenance.items()]).html())
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{_CSS}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _origins(report: Report) -> list[str]:
    several = " Small dots are the single seeds; bars are 95% intervals over seeds." if report.several else ""
    parts = ["<h2>Where the difference comes from</h2>", f'<p class="note">{html.escape(words.ORIGINS)}</p>']
    caption = f"Difference from {report.reference} by kind of error.{several}"
    parts.append(_figure(plots.error_differences(report), "Differences by kind of error", caption))
    for task in report.tasks:
        parts += [f"<h3>{TASK_NAMES[task].capitalize()}</h3>", origin_table(report, task).html()]
        confusions = confusion_table(report, task)
        if confusions.rows:
            parts += [f'<p class="note">{html.escape(words.CONFUSIONS)}</p>', confusions.html()]
    return parts


def _categories(report: Report, many: str) -> list[str]:
    caption = f"AP difference from {report.reference} by category.{many}"
    parts = ["<h2>Categories</h2>", _figure(plots.category_differences(report), "Differences by category", caption)]
    for task in report.tasks:
        by_category = [metric for metric in report.arms[report.reference][task] if metric not in METRICS]
        is_open = " open" if len(by_category) <= _FEW_CATEGORIES else ""
        parts.append(f"<details{is_open}><summary>{TASK_NAMES[task].capitalize()} AP by category</summary>")
        parts.append(metric_table(report, task, by_category).html() + "</details>")
    return parts


def _gallery(report: Report, name: str, pictures: Sequence[GalleryImage]) -> list[str]:
    parts = [f"<h2>Where {html.escape(name)} and {html.escape(report.reference)} differ most</h2>"]
    several = report.several
    task = TASK_NAMES[report.tasks[0]]
    mean, drawn = (", mean over the seeds", "the seed that shows it most") if several else ("", "the seed")
    parts.append(
        f'<p class="note">The {len(pictures)} validation images whose own {task} AP50 differs most{mean}, gains and '
        f"losses alike; drawn are the detections of {drawn} with a score of at least {SCORE:g}. Green: objects. Blue: "
        "detections that meet an object (box IoU 0.5). Orange, dashed: false ones.</p>"
    )
    for picture in pictures:
        caption = f"{picture.file_name}: AP50 "
        caption += f"{picture.reference[picture.place]:.0f} with {report.reference}, "
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
