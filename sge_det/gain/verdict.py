"""What a comparison shows, in one of four answers and in words: of the one metric that was declared, for all arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .inference import ALPHA, MARGIN, POWER, Interval, Outcome, measured_design, outcomes, power, seeds_needed

TASK_NAMES = {"bbox": "box", "segm": "mask", "classification": "classification"}
# Gates whose standard deviation over the positions of a map is less than this multiply all positions alike.
CONSTANT_GATES = 0.01
# A difference that is spoken of where power is told, in AP points.
DIFFERENCE = 1.0
# More seeds than this nobody trains: that they are needed says as much as how many.
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Question:
    """What a comparison is to answer, named before its results are seen.

    Attributes:
        metric: the primary one, of the first task; all else is exploratory.
        margin: the least difference that matters, in AP points; 0 for no test of equivalence.
        paired: by seed: runs of a seed share their images and start values. Else Welch's interval decides.
        difference: of which the power is told, in AP points.
    """

    metric: str = "AP"
    margin: float = MARGIN
    paired: bool = True
    difference: float = DIFFERENCE


DECLARED = Question()


@dataclass(frozen=True)
class Evidence:
    """What is known of a metric of an arm, against the reference's.

    Attributes:
        reference, arm: the metric by seed, in points.
        seeds, both: the intervals over new seeds, and over new seeds and new images, paired or not as declared.
        images: of the validation set.
    """

    reference: Sequence[float]
    arm: Sequence[float]
    seeds: Interval | None
    both: Interval | None
    images: int

    @property
    def mean(self) -> float:
        """The difference, arm minus reference."""
        return float(np.mean(np.subtract(self.arm, self.reference)))


@dataclass(frozen=True)
class Power:
    """What could have been seen: ``probability`` of seeing a true ``difference`` (AP points) with the seeds that there
    are, and how many ``more_seeds`` an arm see it with 80%; None where no number that one can train does."""

    difference: float
    probability: float
    more_seeds: int | None


@dataclass(frozen=True)
class Verdict:
    """What a metric of an arm shows.

    Attributes:
        outcome: one of ``inference.OUTCOMES``.
        primary: whether it is the metric that was declared; what others show is exploratory.
        p, equivalence_p: corrected over the arms; NaN without an interval.
        excludes_zero: of the interval over both, without any correction; None without it.
        power: of the primary metric alone.
        low, high: of the interval over both that the outcome follows from, in AP points, at 95% or, with looks at
            growing numbers of seeds, at the confidence of this look; NaN without it.
    """

    arm: str
    task: str
    metric: str
    outcome: str
    primary: bool
    p: float
    equivalence_p: float
    excludes_zero: bool | None
    power: Power | None
    sentence: str
    low: float
    high: float


def judge(
    evidence: Mapping[str, Evidence],
    reference: str,
    task: str,
    metric: str,
    question: Question,
    *,
    primary: bool,
    bootstrap: int,
    level: float = ALPHA,
) -> list[dict[str, Any]]:
    """The verdicts of a metric for all arms, corrected together, as report.json holds them.

    Args:
        evidence: by arm.
        primary: whether the metric is the one that was declared.
        bootstrap: samples; 0 says why there are no intervals over the images.
        level: at which zero and the margin are excluded; of this look, where seeds are added until there is an answer.
    """
    found = []
    if level != ALPHA:
        evidence = {name: replace(each, both=each.both and each.both.at(1 - level)) for name, each in evidence.items()}
    corrected = outcomes([each.both for each in evidence.values()], question.margin, level)
    for (name, each), outcome in zip(evidence.items(), corrected):
        seen = _power(each, question, level / len(evidence)) if primary else None
        sentence = f"{name} - {reference} = {each.mean:+.2f} {TASK_NAMES[task]} {metric}"
        if math.isnan(each.mean):
            sentence = f"{name} against {reference}: {TASK_NAMES[task]} {metric} is absent, the ground truth has none."
        elif not any([*each.reference, *each.arm]):
            sentence += ": both are 0 with every seed. Neither detects anything, so there is nothing to compare."
        else:
            sentence += _of_seeds(each) + _what_it_shows(each, outcome, question, len(evidence), bootstrap, level)
            sentence += _in_words(seen, len(each.arm))
        if not primary:
            sentence = f"Exploratory, counted with nothing else: {sentence}"
        excludes = None if each.both is None else each.both.low > 0 or each.both.high < 0
        found.append(
            asdict(
                Verdict(
                    *(name, task, metric, outcome.outcome, primary, outcome.p, outcome.equivalence_p, excludes, seen),
                    sentence,
                    math.nan if each.both is None else each.both.low,
                    math.nan if each.both is None else each.both.high,
                )
            )
        )
    return found


def _of_seeds(each: Evidence) -> str:
    count = len(each.arm)
    if count == 1:
        return " (one seed): "
    if each.both is None:
        return f" (mean of {count} seeds): "
    return (
        f" (mean of {count} seeds, {100 * each.both.confidence:.3g}% interval over new seeds and new images "
        f"{each.both.low:+.2f} to {each.both.high:+.2f}): "
    )


def _what_it_shows(
    each: Evidence, outcome: Outcome, question: Question, arms: int, bootstrap: int, level: float
) -> str:
    if len(each.arm) == 1:
        return "with one seed, seed noise was not measured, so no gain or loss is shown; give more seeds."
    if each.seeds is None:
        return "all seeds differ by the same, and without a spread there is no interval, so nothing is shown."
    if each.both is None and not bootstrap:
        return (
            f"over new seeds alone {each.seeds.low:+.2f} to {each.seeds.high:+.2f}; without --bootstrap nothing is "
            "known of new images, so it is undecided."
        )
    if each.both is None:
        return "too few images have such objects for an interval over images, so it is undecided."
    p = f"p {outcome.p:.3f}" + (f" after Holm's correction for {arms} arms" if arms > 1 else "")
    margin = f"{question.margin:g} points"
    if outcome.outcome in ("gain", "loss"):
        text = f"zero is excluded, a {outcome.outcome} ({p})"
        text += f", though one of less than {margin}." if outcome.within_margin else "."
    elif outcome.outcome == "no relevant difference":
        text = f"no relevant difference: one of {margin} or more is excluded."
    elif outcome.p <= level:
        text = "it rounds to 0.00, which is no gain or loss."
    else:
        text = f"undecided: neither zero ({p}) nor a difference of {margin} is excluded."
        if not question.margin:
            text = f"undecided: zero is not excluded ({p})."
    if len(each.arm) == 2:
        text += " Two seeds tell next to nothing: their interval reaches 9 standard deviations to each side."
    return text


def _power(each: Evidence, question: Question, alpha: float) -> Power | None:
    if each.both is None or not question.difference:
        return None
    design = measured_design(each.reference, each.arm, each.both, each.images, paired=question.paired)
    count = len(each.arm)
    needed = seeds_needed(design, question.difference, alpha=alpha, most=_MOST_SEEDS)
    probability = power(design, question.difference, count, alpha)
    return Power(question.difference, probability, None if needed is None else max(needed - count, 0))


def _in_words(seen: Power | None, count: int) -> str:
    if seen is None:
        return ""
    text = f" A true difference of {seen.difference:g} would have been seen with probability {seen.probability:.2f}"
    if seen.more_seeds is None:
        return f"{text}; no number of seeds makes it {POWER:g}, more images are needed."
    more = f"; {seen.more_seeds} more seed{'s' if seen.more_seeds > 1 else ''} for {POWER:g}" if seen.more_seeds else ""
    return f"{text}{more}."


def still_learning(report: dict, curves: Mapping[str, Mapping[int, Mapping[str, Sequence]]]) -> list[str]:
    """A sentence where AP still rises at the end of the schedule: a difference may be one of speed of learning.

    Args:
        curves: by arm and seed, points (iteration, value) of "<task>/AP".
    """
    key = f"{report['tasks'][0]}/AP"
    rising = {}
    for name, by_seed in curves.items():
        steps = [logged[key][-1][1] - logged[key][-2][1] for logged in by_seed.values() if len(logged.get(key, ())) > 1]
        if steps and np.mean(steps) > report["question"]["margin"]:
            rising[name] = float(np.mean(steps))
    if not rising:
        return []
    how = ", ".join(f"{name} by {step:.1f}" for name, step in rising.items())
    return [
        f"AP still rose between the last two evaluations ({how}): a difference may be one of how fast the arms learn. "
        "A longer schedule would tell."
    ]


def constant_gates(report: dict, name: str) -> bool | None:
    """Whether the gates of an arm hardly depend on the position, in any stage of any run; None without SGE."""
    spreads = _spatial_sds(report, name)
    return max(spreads.values()) < CONSTANT_GATES if spreads else None


def gates_sentence(report: dict, name: str) -> str:
    """What constant gates of all or of some seeds of an arm, the reference too, say of its differences; maybe ""."""
    spreads = _spatial_sds(report, name)
    constant = [seed for seed, spread in spreads.items() if spread < CONSTANT_GATES]
    if not constant:
        return ""
    spread = max(spreads[seed] for seed in constant)
    means = [stage["gate"]["mean"] for seed in constant for stage in report["gates"][name][seed].values()]
    which = "" if len(constant) == len(spreads) else f" with seed{'s' if len(constant) > 1 else ''} "
    which += ", ".join(constant) if which else ""
    text = (
        f"The gates of {name}{which} hardly vary over a map (standard deviation {spread:.4f} at most, mean "
        f"{float(np.mean(means)):.3f})"
    )
    if which:
        return f"{text}: what these runs add to a difference cannot come from attention."
    if name == report["reference"]:
        return f"{text}: the reference is scaled alike in all places, so it stands for a detector without attention."
    return f"{text}, so its difference cannot come from attention."


def _spatial_sds(report: dict, name: str) -> dict[str, float]:
    """By seed, the largest standard deviation of the gates over a map."""
    return {
        seed: max(stage["gate"]["spatial_sd"] for stage in stages.values())
        for seed, stages in report["gates"].get(name, {}).items()
        if stages
    }
