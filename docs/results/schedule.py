"""Draws the AP of trainings over their iterations, from the metrics.json that each leaves.

schedule.py schedule.png "600 iterations=output/bccd/600" "1200=output/bccd/1200"
"""

import argparse
import json
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers tell apart
STYLES = (("#0072b2", "o"), ("#d55e00", "s"), ("#e69f00", "D"), ("#009e73", "^"), ("#cc79a7", "v"))


def curve(folder: str) -> tuple[list[int], list[float]]:
    """Iterations and box AP (points) of the evaluations of a training."""
    records = [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]
    points = {record["iteration"]: record["bbox/AP"] for record in records if "bbox/AP" in record}
    return list(points), list(points.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", help="the picture, .png")
    parser.add_argument("runs", nargs="+", metavar="LABEL=FOLDER")
    args = parser.parse_args()
    if len(args.runs) > len(STYLES):
        parser.error(f"{len(args.runs)} runs, and there are styles for {len(STYLES)}: draw fewer")
    for run in args.runs:
        if "=" not in run or not Path(run.split("=", 1)[1], "metrics.json").is_file():
            parser.error(f"{run} is not LABEL=FOLDER with a metrics.json in the folder")
    with rc_context({"font.size": 13, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        for run, (color, marker) in zip(args.runs, STYLES):
            label, folder = run.split("=", 1)
            axes.plot(*curve(folder), color=color, marker=marker, label=label)
        axes.set(xlabel="iterations", ylabel="box AP on val (points)", title="Plain Faster R-CNN, trained on fit")
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(title="schedule", frameon=False)
        figure.savefig(args.output)


if __name__ == "__main__":
    main()
