"""The files of a report: numbers, tables, page and figures."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from ..files import make_folder, write_file, write_json
from ..markdown import escape, escape_line
from . import plots, words
from .gallery import GalleryImage
from .measurement import Measurement
from .page import html_page
from .parts import TASK_NAMES, Report
from .schema import to_json
from .tables import (
    confusion_table,
    cost_table,
    gate_table,
    interval_table,
    metric_table,
    metrics_csv,
    origin_table,
    pointing_tables,
    report_tables,
    seed_table,
)

logger = logging.getLogger(__name__)


def write_report(
    output: Path, measurement: Measurement, draw_gallery: Callable[[str], Sequence[GalleryImage]] | None = None
) -> None:
    """Writes all but the figures into ``output``: numbers first, so that what goes wrong with a picture costs the
    picture.

    Args:
        draw_gallery: draws the images on which an arm differs most from the reference; None for no galleries.

    Raises:
        UserError: they cannot be written.
    """
    write_numbers(output, measurement.report)
    galleries: dict[str, Sequence[GalleryImage] | str] = {}
    for name in measurement.report.differences if draw_gallery else ():
        try:
            galleries[name] = draw_gallery(name)
        except Exception as error:  # whatever it is, the numbers and the other pictures are worth having
            logger.warning(f"the gallery of {name} could not be drawn: {error}")
            galleries[name] = str(error)
    write_file(output / "report.html", html_page(measurement, galleries))


def write_numbers(output: Path, report: Report) -> None:
    """Writes ``report.json``, ``report.md``, ``metrics.csv`` and ``tables/`` into ``output``.

    Raises:
        UserError: they cannot be written.
    """
    write_json(output / "report.json", to_json(report))
    write_file(output / "report.md", markdown(report))
    write_file(output / "metrics.csv", metrics_csv(report))
    make_folder(output / "tables")
    for name, table in report_tables(report).items():
        write_file(output / "tables" / f"{name}.csv", table.csv())
        write_file(output / "tables" / f"{name}.tex", table.latex())


def write_figures(output: Path, measurement: Measurement) -> None:
    """Writes the plots of the report as SVG and PDF into ``output/figures``.

    Raises:
        UserError: they cannot be written.
    """
    report = measurement.report
    figures = {"differences": plots.forest(report), "arms": plots.ap_by_arm(report)}
    if report.main_metric == "AP":
        figures["categories"] = plots.category_differences(report)
    if report.origins:
        figures["errors"] = plots.error_differences(report)
    if measurement.learning:
        figures["learning_curves"] = plots.learning_curves(report, measurement.learning)
    if measurement.curves:
        figures["precision_recall"] = plots.precision_recall(measurement)
    make_folder(output / "figures")
    for name, figure in figures.items():
        for kind in ("svg", "pdf"):
            write_file(output / "figures" / f"{name}.{kind}", plots.rendered(figure, kind))


def markdown(report: Report) -> str:
    """The report in words and tables, as Markdown."""
    parts = ["# Gain", *map(escape_line, report.lines), escape_line(words.explanation(report))]
    parts += ["## Intervals", interval_table(report).markdown(), words.DECIDES]
    parts += ["## Every seed", seed_table(report).markdown()]
    for task in report.tasks:
        parts += [f"## {escape(words.metrics_heading(report, task))}", metric_table(report, task).markdown()]
    for task in report.tasks if report.origins else ():
        parts += [f"## Where it comes from: {TASK_NAMES[task]}", words.ORIGINS, origin_table(report, task).markdown()]
        confusions = confusion_table(report, task)
        parts += [words.CONFUSIONS, confusions.markdown()] if confusions.rows else []
    for name, by_seed in report.gates.items():
        parts += [f"## Gates of {escape(name)}", gate_table(by_seed).markdown()]
    for name, by_seed in report.pointing.items():
        parts += [f"## Pointing game of {escape(name)}", words.pointing_explanation(by_seed)]
        parts += [table.markdown() for table in pointing_tables(by_seed)]
    if report.cost:
        parts += ["## Cost", cost_table(report).markdown(), words.COST]
    made_from = (f"- {escape(key)}: {escape(value)}" for key, value in report.provenance.items())
    parts += ["## Made from", "\n".join(made_from)]
    return "\n\n".join(parts) + "\n"
