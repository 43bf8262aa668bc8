"""How many seeds? Power, seeds and hours of a comparison, before it is run."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.stats
from scipy.special import stdtrit

from ..errors import UserError
from .inference import (
    ALPHA,
    POWER,
    Design,
    measured_design,
    minimal_detectable_difference,
    power,
    seed_interval,
    seeds_needed,
    seeds_suffice,
    welch_interval,
)
from .parts import Bounds, Difference, Report
from .run import RESULT_FILE
from .schema import read_report
from .tables import Table

# Standard deviations of an arm's box AP over seeds, in AP points.
PUBLISHED = (
    ("ViTDet-B on COCO, 5 seeds (Li et al., 2022)", 0.10),
    ("what Detectron2's maintainers expect on COCO", 0.2),
    ("small Faster R-CNN on BCCD, 5 seeds (docs/results.md)", 0.34),
    ("small RetinaNet on BCCD, 5 seeds (docs/results.md)", 1.12),
)
_DIFFERENCES = (0.25, 0.5, 1.0, 2.0)
_SEEDS = (2, 3, 5, 8, 10, 15, 20)
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Outlook:
    """What is known of a comparison before it is run.

    Attributes:
        name: of the comparison, or of where the spread is from.
        design: its noise.
        hours: of a pair of runs, the reference's and the arm's; NaN where it is not known.
        pilot_seeds: from which the spread is known; 0 where it was given.
        images_known: whether the images' noise is; else it is left out.
    """

    name: str
    design: Design
    hours: float = math.nan
    pilot_seeds: int = 0
    images_known: bool = False

    @property
    def spread(self) -> float:
        """The standard deviation of the difference over seeds, AP points."""
        a, b = self.design.reference_sd, self.design.arm_sd
        return math.sqrt(max(a**2 + b**2 - 2 * self.design.correlation * a * b, 0.0))

    def spread_range(self) -> tuple[float, float] | None:
        """The 80% interval of the spread, which few pilot seeds tell badly (chi-squared); None where it was given."""
        dof = self.pilot_seeds - 1
        if dof < 1:
            return None
        low, high = scipy.stats.chi2.ppf([0.1, 0.9], dof)
        return self.spread * math.sqrt(dof / high), self.spread * math.sqrt(dof / low)


def given(
    sd: Sequence[float],
    correlation: float = 0.0,
    image_error: float = 0.0,
    images: int = 5000,
    hours: float = math.nan,
    *,
    paired: bool = True,
) -> Outlook:
    """The outlook from numbers that the user knows.

    Args:
        sd: the standard deviation of the metric over seeds, AP points: one for both arms, or the reference's and the
            arm's.
        correlation: of the arms over seeds.
        image_error: the standard error of the difference that the images add.
        images: of the validation set.
        hours: of a pair of runs.
        paired: by seed; else two independent sets of seeds.

    Raises:
        UserError: a number that cannot be.
    """
    if len(sd) not in (1, 2) or not all(0 < value < 100 for value in sd):
        raise UserError(
            f"--sd takes one or two standard deviations in AP points, above 0, got {' '.join(map(str, sd))}"
        )
    if not -1 <= correlation <= 1:
        raise UserError(f"--correlation {correlation} must be from -1 to 1")
    if not 0 <= image_error < 100 or images < 2:
        raise UserError("--image-error must be a number of AP points from 0 on, and --image-count at least 2")
    if correlation and not paired:
        raise UserError("--correlation is of arms that are paired by seed: leave out --unpaired")
    outlook = Outlook("as given", Design(sd[0], sd[-1], correlation, paired, image_error, images), hours)
    if not outlook.spread:
        raise UserError(f"--sd with --correlation {correlation:g} leaves no spread of the difference")
    return outlook


def check_wanted(difference: float, seeds: int | None, hours: float) -> None:
    """Checks what a plan is asked for.

    Args:
        difference: to be seen, AP points.
        seeds: that can be paid for; None for no number.
        hours: of a run; NaN where it is not known.

    Raises:
        UserError: a number for which there is no answer.
    """
    if not 0 < difference <= 100:
        raise UserError(
            f"--difference {difference} must be a number of AP points above 0: no seeds show a difference of 0"
        )
    if seeds is not None and seeds < 2:
        raise UserError(f"--max-seeds {seeds} must be at least 2: one seed shows no spread")
    if hours <= 0 or math.isinf(hours):
        raise UserError(f"--hours {hours} must be a number above 0")


def published(hours: float = math.nan, *, paired: bool = True) -> list[Outlook]:
    """Outlooks from spreads that others have seen, for who has no pilot."""
    return [Outlook(name, Design(sd, sd, paired=paired), hours) for name, sd in PUBLISHED]


def from_pilot(path: str | Path, metric: str = "AP", *, paired: bool = True) -> list[Outlook]:
    """An outlook for each arm of a finished comparison.

    Args:
        path: its ``report.json``, or the folder that holds it and the runs, whose times are taken then.
        metric: the primary one, of the first task.
        paired: by seed.

    Raises:
        UserError: there is no report there, it is of one seed, or it does not know the metric.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        report = read_report(file)
    except UserError as error:
        raise UserError(f"--pilot {error}") from error
    return _outlooks(report, file, metric, paired)


def _outlooks(report: Report, file: Path, metric: str, paired: bool) -> list[Outlook]:
    theirs = report.arms[report.reference][report.task]
    if metric not in theirs:
        raise UserError(f"--metric {metric} is none of the pilot's: {', '.join(list(theirs)[:40])}")
    if not report.several:
        raise UserError(f"--pilot {file} has one seed, which shows no spread: give it two at least, or --sd")
    found = []
    for arm, tasks in report.differences.items():
        a, b = theirs[metric].values, report.arms[arm][report.task][metric].values
        if not all(map(math.isfinite, (*a, *b))):
            raise UserError(f"--pilot {file}: {metric} is absent in it")
        design = measured_design(a, b, None, report.images, paired=paired)
        if (seed_interval(np.subtract(b, a)) if paired else welch_interval(a, b)) is None:
            alike = f"differ by the same between {report.reference} and {arm}" if paired else "are equal in both arms"
            raise UserError(f"--pilot {file}: all seeds {alike}, which shows no spread: give --sd")
        difference = tasks[report.task][metric]
        design = replace(design, image_error=_image_error(difference, report.images))
        hours = _hours(file.parent, (report.reference, arm), report.seeds)
        known = difference.intervals.images is not None
        found.append(Outlook(f"{arm} - {report.reference}, {metric}", design, hours, len(report.seeds), known))
    return found


def _image_error(difference: Difference, images: int) -> float:
    """The standard error that the images add to all seeds alike, from the intervals over images.

    What they add to each seed by itself is in the spread over seeds as well, and more seeds lessen it: the variance of
    the mean of n seeds is the shared part and an n-th of the other, that of one seed their sum.
    """
    # a report does not tell how many of its images hold what the metric is of: with fewer this is a little too large
    factor = float(stdtrit(images - 1, 0.975))

    def variance(bounds: Bounds) -> float:
        return ((bounds.high - bounds.low) / 2 / factor) ** 2

    if difference.intervals.images is None:
        return 0.0
    of_mean = variance(difference.intervals.images)
    of_seeds = [variance(bounds) for bounds in difference.images_by_seed if bounds is not None]
    seeds = len(of_seeds)
    if seeds < 2:
        return math.sqrt(of_mean)
    return math.sqrt(max(seeds * of_mean - sum(of_seeds) / seeds, 0.0) / (seeds - 1))


def _hours(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> float:
    """Hours of a pair of runs, the mean over the seeds; NaN where the runs are not there."""
    seconds = 0.0
    for arm in arms:
        for seed in seeds:
            try:
                seconds += json.loads((folder / arm / f"seed{seed}" / RESULT_FILE).read_bytes())["seconds"]
            except (OSError, ValueError, KeyError, TypeError):
                return math.nan
    return seconds / len(seeds) / 3600


def tables(outlook: Outlook, difference: float, seeds: int | None = None, arms: int = 1) -> list[Table]:
    """Seeds and hours by difference, and the least difference that is seen by seeds.

    Args:
        outlook: of the comparison.
        difference: that the user wants to see, AP points; some others stand beside it.
        seeds: that the user can pay for; some others stand beside them.
        arms: that are compared with the reference, and corrected together.
    """
    design, alpha = outlook.design, ALPHA / arms
    by_difference = []
    for value in sorted({*_DIFFERENCES, difference}):
        needed = seeds_needed(design, value, alpha=alpha, most=_MOST_SEEDS)
        few = f"more than {_MOST_SEEDS}" if seeds_suffice(design, value, alpha=alpha) else "none suffices: more images"
        row = [f"{value:g}", few if needed is None else str(needed)]
        by_difference.append([*row, _cost(outlook, needed)])
    by_seeds = []
    for count in sorted({*_SEEDS, *([seeds] if seeds else [])}):
        least = minimal_detectable_difference(design, count, alpha=alpha)
        chance = power(design, difference, count, alpha)
        by_seeds.append([str(count), f"{least:.2f}", f"{chance:.2f}", _cost(outlook, count)])
    return [
        Table(
            ["true difference (AP)", f"seeds an arm, to see it with {POWER:.0%}", "hours of a pair of arms"],
            by_difference,
        ),
        Table(
            [
                "seeds an arm",
                f"least difference seen with {POWER:.0%}",
                f"chance to see {difference:g}",
                "hours of a pair of arms",
            ],
            by_seeds,
        ),
    ]


def _cost(outlook: Outlook, seeds: int | None) -> str:
    return "" if seeds is None or not math.isfinite(outlook.hours) else f"{seeds * outlook.hours:.1f}"


def in_words(outlook: Outlook) -> str:
    """What the outlook stands on."""
    text = f"{outlook.name}: the difference's standard deviation over seeds is {outlook.spread:.2f} AP"
    if outlook.pilot_seeds:
        low, high = outlook.spread_range() or (0.0, math.inf)
        text += f" (of {outlook.pilot_seeds} seeds, which tell it badly: 80% interval {low:.2f} to {high:.2f})"
    if outlook.design.image_error:
        text += (
            f"; the {outlook.design.images} images add a standard error of {outlook.design.image_error:.2f}, which no "
            "number of seeds lessens"
        )
    elif outlook.images_known:
        text += (
            f"; no noise of the {outlook.design.images} images is seen that the seeds share, so more seeds lessen it"
        )
    else:
        text += "; the images' own noise is not known and left out, so these numbers speak of one validation set"
    return f"{text}."
