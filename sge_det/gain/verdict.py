"""What a comparison shows, in one of four answers and in words: of the one metric that was declared, for all arms."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from .inference import ALPHA, POWER, Interval, Outcome, measured_design, outcomes, power, seeds_needed, seeds_suffice
from .parts import TASK_NAMES, Power, Question, Verdict

# Gates whose standard deviation over the positions of a map is less than this multiply all positions alike.
CONSTANT_GATES = 0.01
# More seeds than this nobody trains: that they are needed says as much as how many.
_MOST_SEEDS = 1000


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
) -> list[Verdict]:
    """The verdicts of a metric for all arms, corrected together.

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
        seen, power_sentence = _power(each, question, level / len(evidence)) if primary else (None, "")
        sentence = f"{name} - {reference} = {each.mean:+.2f} {TASK_NAMES[task]} {metric}"
        if math.isnan(each.mean):
            sentence = f"{name} against {reference}: {TASK_NAMES[task]} {metric} is absent, the ground truth has none."
        elif not any([*each.reference, *each.arm]):
            sentence += (
                ": both are 0 with every seed. Neither gets anything right that counts here: nothing to compare."
            )
        else:
            sentence += _of_seeds(each) + _what_it_shows(each, outcome, question, len(evidence), bootstrap, level)
            sentence += power_sentence
            if not any(each.reference):
                sentence += f" {reference} is 0 with every seed: it gets nothing right that counts here."
        if not primary:
            sentence = f"Exploratory, counted with nothing else: {sentence}"
        excludes = None if each.both is None else each.both.low > 0 or each.both.high < 0
        found.append(
            Verdict(
                *(name, task, metric, outcome.outcome, primary, outcome.p, outcome.equivalence_p, excludes, seen),
                sentence,
                math.nan if each.both is None else each.both.low,
                math.nan if each.both is None else each.both.high,
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
        f" (mean of {count} seeds, {_percent(each.both.confidence)} interval over new seeds and new images "
        f"{each.both.low:+.2f} to {each.both.high:+.2f}): "
    )


def _percent(confidence: float) -> str:
    # two digits of what is left of 100, which no interval has
    decimals = max(1 - math.floor(math.log10(100 * (1 - confidence))), 1)
    return f"{100 * confidence:.{decimals}f}".rstrip("0").rstrip(".") + "%"


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
    if each.both is None and each.images < 2:
        return "too few images have such objects for an interval over images, so it is undecided."
    if each.both is None:
        return (
            "the mean difference is the same whichever images are drawn, so there is no interval over images, and it "
            "is undecided."
        )
    p = _p(outcome.p) + (f" after Holm's correction for {arms} arms" if arms > 1 else "")
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
        text += " Two seeds tell next to nothing of other seeds"
        if question.paired:
            reach = float(stdtrit(1, 1 - level / 2)) / math.sqrt(2)
            text += f": their interval reaches {reach:.0f} standard deviations to each side"
        text += "."
    return text


def _power(each: Evidence, question: Question, alpha: float) -> tuple[Power | None, str]:
    """What could have been seen, and the sentence that tells it."""
    if each.both is None or not question.difference:
        return None, ""
    design = measured_design(each.reference, each.arm, each.both, each.images, paired=question.paired)
    count, difference = len(each.arm), question.difference
    needed = seeds_needed(design, difference, alpha=alpha, most=_MOST_SEEDS)
    more = None if needed is None else max(needed - count, 0)
    probability = power(design, difference, count, alpha)
    text = f" A true difference of {difference:g} would have been seen with probability {probability:.2f}"
    if more:
        text += f"; {more} more seed{'s' if more > 1 else ''} for {POWER:g}"
    elif more is None and seeds_suffice(design, difference, alpha=alpha):
        text += f"; {POWER:g} takes more than {_MOST_SEEDS} seeds"
    elif more is None:
        text += f"; no number of seeds makes it {POWER:g}, more images are needed"
    return Power(difference, probability, more), f"{text}."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"


def still_learning(task: str, margin: float, curves: Mapping[str, Mapping[int, Mapping[str, Sequence]]]) -> list[str]:
    """A sentence where AP still rises at the end of the schedule: a difference may be one of speed of learning.

    Args:
        task: whose AP it is.
        margin: AP points; a rise of less does not count.
        curves: by arm and seed, points (iteration, value) of "<task>/AP".
    """
    key = f"{task}/AP"
    rising = {}
    for name, by_seed in curves.items():
        steps = [logged[key][-1][1] - logged[key][-2][1] for logged in by_seed.values() if len(logged.get(key, ())) > 1]
        if steps and np.mean(steps) > margin:
            rising[name] = float(np.mean(steps))
    if not rising:
        return []
    how = ", ".join(f"{name} by {step:.1f}" for name, step in rising.items())
    return [
        f"AP still rose between the last two evaluations ({how}): a difference may be one of how fast the arms learn. "
        "A longer schedule would tell."
    ]


def gates_sentence(name: str, by_seed: Mapping[str, Mapping[str, Any]], *, is_reference: bool) -> str:
    """What constant gates of all or of some seeds of an arm say of its differences; maybe "".

    Args:
        by_seed: by seed and stage, the statistics of :func:`sge_det.modeling.gates.gate_statistics`.
    """
    spreads = {
        seed: max(stage["gate"]["spatial_sd"] for stage in stages.values())
        for seed, stages in by_seed.items()
        if stages
    }
    constant = [seed for seed, spread in spreads.items() if spread < CONSTANT_GATES]
    if not constant:
        return ""
    spread = max(spreads[seed] for seed in constant)
    means = [stage["gate"]["mean"] for seed in constant for stage in by_seed[seed].values()]
    which = "" if len(constant) == len(spreads) else f" with seed{'s' if len(constant) > 1 else ''} "
    which += ", ".join(constant) if which else ""
    text = (
        f"The gates of {name}{which} hardly vary over a map (standard deviation {spread:.4f} at most, mean "
        f"{float(np.mean(means)):.3f})"
    )
    if which:
        return f"{text}: what these runs add to a difference cannot come from attention."
    if is_reference:
        return f"{text}: the reference is scaled alike in all places, so it stands for a detector without attention."
    return f"{text}, so its difference cannot come from attention."
