"""Draws the differences of each seed, their mean and its interval over seeds, from the reports of a comparison.

planned.py planned.png "blood cells=constant.json,kept.json" "cards=cards.json"
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import ttest_1samp

PAIRS = (
    ("sge", "plain", "SGE - plain", "#d55e00"),
    ("sge-constant", "plain", "learnt constant - plain", "#0072b2"),
    ("sge", "sge-constant", "SGE - learnt constant", "#009e73"),
)


def box_ap(reports: str) -> dict[str, list[float]]:
    """Box AP (points) of each arm, one value a seed, of the arms that all of the reports have."""
    found = [json.loads(Path(report).read_bytes())["arms"] for report in reports.split(",")]
    arms = set.intersection(*map(set, found))
    return {arm: [value for report in found for value in report[arm]["bbox"]["AP"]["values"]] for arm in arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the picture, .png")
    parser.add_argument("comparisons", nargs="+", metavar="NAME=REPORT,...")
    args = parser.parse_args()
    rows = []
    for comparison in args.comparisons:
        name, _, reports = comparison.partition("=")
        if not reports or not all(Path(report).is_file() for report in reports.split(",")):
            parser.error(f"{comparison} is not NAME=REPORT,... with reports that are there")
        values = box_ap(reports)
        rows += [
            (f"{name}: {title}", np.subtract(values[arm], values[other]), color)
            for arm, other, title, color in PAIRS
            if {arm, other} <= set(values)
        ]
    with rc_context({"font.size": 13, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(9.5, 1.1 + 0.62 * len(rows)), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        for place, (_, gains, color) in enumerate(rows):
            low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
            axes.plot([low, high], [place, place], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot(gains.mean(), place, marker="D", markersize=9, color=color)
            axes.plot(gains, np.full(len(gains), place + 0.27), "o", markersize=5, color=color, alpha=0.5)
        axes.axvline(0, color="black", linewidth=1)
        axes.axvspan(1, 2, color="0.92", zorder=0)
        axes.set_yticks(range(len(rows)), [f"{title} ({len(gains)})" for title, gains, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.5)
        axes.set_xlabel("difference of box AP, points")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.savefig(args.output)


if __name__ == "__main__":
    main()
