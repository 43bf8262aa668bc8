"""What differences of metrics show: intervals, corrected p-values, outcomes, power and looks, as functions on arrays.

Everything here is in AP points (0-100) and about one metric of an arm and of a reference. Three sources of noise are
told apart by what would be drawn anew: the seeds (:func:`seed_interval`, :func:`welch_interval`: these images), the
images (:func:`image_interval`: these detectors), and both (:func:`both_interval`), on which a verdict stands.
``tools/simulate_coverage.py`` shows how often each holds.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
ALPHA = 0.05
MARGIN = 0.5
POWER = 0.8
OUTCOMES = ("gain", "loss", "no relevant difference", "undecided")
# A difference that is less is 0.00 in two decimals.
_ROUNDS_TO_ZERO = 0.005
# A spread below this share of the values is rounding.
_NO_SPREAD = 1e-12
# A metric that is undefined in more bootstrap samples than this share has no interval over the images.
_MOST_UNDEFINED = 0.5
_SEQUENCES = 400_000
# Of the integral over how two arms share their squares.
_NODES = 64
_MOST_SEEDS = 10_000
_UNLIMITED = 10**7


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a mean difference, from Student's t.

    Attributes:
        mean: the difference, arm minus reference, in AP points.
        error: its standard error, above 0.
        dof: the degrees of freedom of the error, maybe fractional.
        confidence: of ``low`` to ``high``.
        least: an interval of the same mean, if any, than which this one is never narrower.
    """

    mean: float
    error: float
    dof: float
    confidence: float = CONFIDENCE
    least: "Interval | None" = None

    @property
    def half_width(self) -> float:
        own = float(stdtrit(self.dof, (1 + self.confidence) / 2)) * self.error
        return max(own, self.least.at(self.confidence).half_width) if self.least else own

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def p(self) -> float:
        """The two-sided p-value of no difference."""
        own = 2 * float(stdtr(self.dof, -abs(self.mean) / self.error))
        return max(own, self.least.p) if self.least else own

    def at(self, confidence: float) -> "Interval":
        """The same interval with another confidence."""
        return replace(self, confidence=confidence)

    def equivalence_p(self, margin: float) -> float:
        """The p-value of "the difference is at least ``margin`` in size", by two one-sided tests.

        Schuirmann, "A comparison of the two one-sided tests procedure and the power approach for assessing the
        equivalence of average bioavailability", 1987.
        """
        own = float(stdtr(self.dof, (abs(self.mean) - margin) / self.error))
        return max(own, self.least.equivalence_p(margin)) if self.least else own


def seed_interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Student's t-interval of a mean of paired differences: new seeds, these images.

    Args:
        differences: (n,), arm minus reference for each seed, in AP points.

    Returns:
        None for fewer than two, where one is NaN, and where all are equal: no spread is no evidence of none.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2 or not _spreads(values):
        return None
    error = math.sqrt(values.var(ddof=1) / len(values))
    return Interval(float(values.mean()), error, len(values) - 1, confidence)


def welch_interval(reference: Sequence[float], arm: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Welch's t-interval of a difference of means, arm minus reference: new seeds that are not paired, these images.

    Welch, "The generalization of Student's problem when several different population variances are involved",
    Biometrika 1947.

    Args:
        reference, arm: (n,) and (m,), the metric for each seed, in AP points.

    Returns:
        None for fewer than two seeds in one of them, where a value is NaN, and where neither has a spread.
    """
    a, b = np.asarray(reference, dtype=float), np.asarray(arm, dtype=float)
    if min(len(a), len(b)) < 2 or not (_spreads(a) or _spreads(b)) or not np.isfinite([a.sum(), b.sum()]).all():
        return None
    parts = [(values.var(ddof=1) / len(values), len(values) - 1) for values in (a, b)]
    return _welch(float(b.mean() - a.mean()), parts, confidence)


def seed_correlation(reference: Sequence[float], arm: Sequence[float]) -> float:
    """Pearson's correlation of two arms over the seeds; NaN for fewer than three, and where one has no spread.

    Pairing narrows the interval where it is positive, and costs degrees of freedom where it is not.
    """
    a, b = np.asarray(reference, dtype=float), np.asarray(arm, dtype=float)
    if len(a) != len(b) or len(a) < 3 or not (_spreads(a) and _spreads(b)):
        return math.nan
    return float(np.corrcoef(a, b)[0, 1])


def image_interval(
    mean: float, samples: Sequence[float], images: int, confidence: float = CONFIDENCE
) -> Interval | None:
    """The interval of a difference over the images: these detectors, new images.

    The bootstrap's standard error with Student's factor for as many images. Percentiles of the samples are narrower
    by that factor and by sqrt((images - 1) / images), which few images feel.

    Args:
        mean: the difference on the images themselves, of a seed or of the mean over seeds.
        samples: (B,), the same difference for each bootstrap sample; NaN where it is undefined.
        images: that hold what the metric is of: a thousand images with two such objects tell as much as two.

    Returns:
        None where the metric is undefined, on the images or in half of the samples, and where no sample differs.
    """
    error = _image_variance(np.asarray(samples, dtype=float), images)
    if not math.isfinite(mean) or not error > 0:
        return None
    return Interval(float(mean), math.sqrt(error), images - 1, confidence)


def both_interval(
    reference: Sequence[float],
    arm: Sequence[float],
    reference_samples: np.ndarray,
    arm_samples: np.ndarray,
    images: int,
    *,
    paired: bool = True,
    confidence: float = CONFIDENCE,
) -> Interval | None:
    """The interval of a difference over new seeds and new images.

    A difference varies with the seeds, with the images in a way that all seeds share, and with the pair of them. The
    variance over seeds holds the first and the last, the image bootstrap's variance of the mean over seeds the second
    and the last. So the last, which the bootstrap shows in how the seeds move apart, is taken away once:

        error^2 = s^2 / n + image variance of the mean - (image variance between seeds) / n

    The degrees of freedom are the harmonic mean of those of the two parts, weighted by their shares of error^2, and the
    interval is never narrower than that over the seeds alone. (Satterthwaite's degrees of freedom come out too large
    where few seeds agree by chance: false claims rise to 7% with three seeds, and further with several arms.)

    Args:
        reference, arm: (n,) and (m,), the metric for each seed on the images themselves, in AP points.
        reference_samples, arm_samples: (n, B) and (m, B), the same for each bootstrap sample of the images, both with
            the same images in a sample; NaN where it is undefined.
        images: as in :func:`image_interval`.
        paired: by seed (n = m), as in :func:`seed_interval`; else as in :func:`welch_interval`.

    Returns:
        None where the interval over the seeds or the bootstrap has no value, and where no sample of the images differs,
        which tells of few such images and not of none that differ.
    """
    a, b = np.asarray(reference, dtype=float), np.asarray(arm, dtype=float)
    a_samples, b_samples = np.asarray(reference_samples, dtype=float), np.asarray(arm_samples, dtype=float)
    seeds = seed_interval(b - a) if paired else welch_interval(a, b)
    if seeds is None:
        return None
    of_images = _image_variance(b_samples.mean(0) - a_samples.mean(0), images)
    if not of_images > 0:
        return None
    tables = [b_samples - a_samples] if paired else [a_samples, b_samples]
    own = sum(_interaction(samples, images) / len(samples) for samples in tables)
    return _with_images(seeds, max(of_images - own, 0.0), images, confidence)


def _with_images(seeds: Interval, variance: float, images: int, confidence: float) -> Interval:
    """The interval over new seeds and new images, from that over seeds and what the images add to its variance."""
    of_seeds = seeds.error**2
    dof = (of_seeds + variance) / (of_seeds / seeds.dof + variance / (images - 1))
    return Interval(seeds.mean, math.sqrt(of_seeds + variance), dof, confidence, seeds)


def _spreads(values: np.ndarray) -> bool:
    return bool(np.ptp(values) > _NO_SPREAD * max(1.0, np.abs(values).max()))


def _welch(mean: float, parts: Sequence[tuple[float, float]], confidence: float = CONFIDENCE) -> Interval:
    """An interval from independent parts of its variance, each with its degrees of freedom."""
    variance = sum(part for part, _ in parts)
    dof = variance**2 / sum(part**2 / dof for part, dof in parts)
    return Interval(mean, math.sqrt(variance), dof, confidence)


def _image_variance(samples: np.ndarray, images: int) -> float:
    """The variance of a figure over the images, from bootstrap samples (B,), free of the bootstrap's bias."""
    defined = samples[np.isfinite(samples)]
    if images < 2 or len(defined) < 2 or len(defined) < _MOST_UNDEFINED * len(samples):
        return math.nan
    if not _spreads(defined):
        return 0.0
    return float(defined.var(ddof=1)) * images / (images - 1)


def _interaction(samples: np.ndarray, images: int) -> float:
    """The mean variance over images of what a seed has of its own, from (n, B)."""
    count, drawn = samples.shape
    apart = samples - samples.mean(0)
    if images > 1 and drawn > 1 and np.isfinite(apart).all():
        return float(apart.var(axis=1, ddof=1).sum()) * images / (images - 1) / (count - 1)
    return sum(_image_variance(row, images) for row in apart) / (count - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, so that all that are at most alpha are false together with at most alpha.

    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979. It holds
    whatever the arms share. (Dunnett's test of many arms against one is a little stronger, but knows one spread for
    all arms, independent seeds and no images.)
    """
    order = np.argsort(p_values)
    adjusted, largest = [0.0] * len(order), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - place) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class Outcome:
    """What a difference shows.

    Attributes:
        outcome: one of ``OUTCOMES``.
        p: of no difference, corrected for the arms; NaN without an interval.
        equivalence_p: of a difference of the margin or more, corrected for the arms; NaN without an interval.
        within_margin: the whole difference is smaller than the margin, which a gain can be, too.
    """

    outcome: str
    p: float = math.nan
    equivalence_p: float = math.nan
    within_margin: bool = False


def outcomes(intervals: Sequence[Interval | None], margin: float = MARGIN, alpha: float = ALPHA) -> list[Outcome]:
    """What the differences of several arms from one reference show, corrected together.

    A gain or a loss: zero is excluded and the difference does not round to 0.00. No relevant difference: not so, and a
    difference of ``margin`` AP points or more is excluded. The chance of any false gain or loss among the arms is at
    most ``alpha``, and so is that of any false "no relevant difference" (both at once cannot be false of an arm).

    Args:
        intervals: of the primary metric for each arm; None where there is none, which is undecided.
        margin: the least difference that matters, in AP points; 0 for no test of equivalence.
        alpha: with looks at growing numbers of seeds, the level of this one (:func:`sequential_levels`).
    """
    known = [interval for interval in intervals if interval is not None]
    corrected = zip(holm([i.p for i in known]), holm([i.equivalence_p(margin) for i in known]))
    return [Outcome("undecided") if i is None else _outcome(i, *next(corrected), alpha) for i in intervals]


def outcome(interval: Interval | None, margin: float = MARGIN, alpha: float = ALPHA) -> str:
    """The one of ``OUTCOMES`` that a single arm's difference shows; see :func:`outcomes`."""
    return outcomes([interval], margin, alpha)[0].outcome


def _outcome(interval: Interval, p: float, equivalence_p: float, alpha: float) -> Outcome:
    within = equivalence_p <= alpha
    if p <= alpha and abs(interval.mean) >= _ROUNDS_TO_ZERO:
        name = "gain" if interval.mean > 0 else "loss"
    else:
        name = "no relevant difference" if within else "undecided"
    return Outcome(name, p, equivalence_p, within)


def probability_of_improvement(reference: Sequence[float], arm: Sequence[float]) -> float:
    """The chance that a run of the arm beats a run of the reference: the share of all pairs, ties count half.

    Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021 (rliable);
    Mann and Whitney's U, divided by the number of pairs.
    """
    apart = np.subtract.outer(np.asarray(arm, dtype=float), np.asarray(reference, dtype=float))
    return float((np.sign(apart).mean() + 1) / 2)


def effect_size(reference: Sequence[float], arm: Sequence[float]) -> float:
    """The difference of the means in standard deviations between runs: Cohen's d with Hedges' correction.

    NaN for fewer than two seeds in one of them, and where there is no spread.
    """
    a, b = np.asarray(reference, dtype=float), np.asarray(arm, dtype=float)
    dof = len(a) + len(b) - 2
    if min(len(a), len(b)) < 2 or not (_spreads(a) or _spreads(b)):
        return math.nan
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / dof)
    return float(b.mean() - a.mean()) / pooled * (1 - 3 / (4 * dof - 1))


@dataclass(frozen=True)
class Design:
    """The noise of an experiment that compares an arm with a reference, for reckoning before it or after it.

    Attributes:
        reference_sd, arm_sd: standard deviations of the metric over seeds, in AP points.
        correlation: of the arms over seeds, where ``paired``.
        paired: by seed; else two independent sets of seeds (Welch).
        image_error: the standard error of the difference from the images that all seeds share; 0 to speak of these
            images alone. No number of seeds lessens it.
        images: of the validation set, where ``image_error`` counts.
    """

    reference_sd: float
    arm_sd: float
    correlation: float = 0.0
    paired: bool = True
    image_error: float = 0.0
    images: int = 5000

    def interval(self, seeds: int) -> Interval | None:
        """What is to be expected with so many seeds an arm, around 0; None without any noise."""
        a, b = self.reference_sd**2, self.arm_sd**2
        if self.paired:
            a += b - 2 * self.correlation * self.reference_sd * self.arm_sd
            b = 0.0
        if a + b:
            of_seeds = _welch(0.0, [(a / seeds, seeds - 1), (b / seeds, seeds - 1)])
            return _with_images(of_seeds, self.image_error**2, self.images, CONFIDENCE)
        return Interval(0.0, self.image_error, self.images - 1) if self.image_error else None


def measured_design(
    reference: Sequence[float], arm: Sequence[float], both: Interval | None, images: int, *, paired: bool = True
) -> Design:
    """The noise that a finished comparison had, for reckoning what more seeds would show.

    Args:
        reference, arm: the metric for each seed, two seeds an arm at least, in AP points.
        both: their :func:`both_interval`; without it the images' noise is left out.
    """
    a, b = (float(np.std(values, ddof=1)) for values in (reference, arm))
    correlation = seed_correlation(reference, arm) if paired else 0.0
    if paired and not math.isfinite(correlation):
        # two seeds, or an arm without a spread: that of the differences, which is what counts
        spread = float(np.std(np.subtract(arm, reference), ddof=1))
        correlation = (a**2 + b**2 - spread**2) / (2 * a * b) if a * b else 0.0
    of_images = both.error**2 - both.least.error**2 if both and both.least else 0.0
    return Design(a, b, correlation, paired, math.sqrt(max(of_images, 0.0)), images)


def power(design: Design, difference: float, seeds: int, alpha: float = ALPHA) -> float:
    """The probability that a true ``difference`` is seen (two-sided, level ``alpha``), from the noncentral t.

    0 for fewer than two seeds. With several arms give ``alpha`` divided by their number, which is what the largest
    needs under :func:`holm`. Exact of these images, paired or not; where the images count, a point or two too high with
    three seeds, as the degrees of freedom are those that are expected.
    """
    if seeds < 2:
        return 0.0
    expected = design.interval(seeds)
    if expected is None:
        return float(difference != 0)
    seen = _power(expected, difference, alpha)
    if expected.least is None:
        return seen
    of_seeds = (
        _power(expected.least, difference, alpha) if design.paired else _welch_power(design, difference, seeds, alpha)
    )
    return min(seen, of_seeds) if design.image_error else of_seeds


def _power(interval: Interval, difference: float, alpha: float) -> float:
    critical = stdtrit(interval.dof, 1 - alpha / 2)
    return float(_tails(critical, interval.dof, abs(difference) / interval.error))


def _welch_power(design: Design, difference: float, seeds: int, alpha: float) -> float:
    """The power of Welch's test, whose degrees of freedom are those of the spreads that happen to be found.

    The sum of the arms' squares, in their own variances, is chi-squared and independent of the first arm's share of
    it, which has a beta distribution. Given the share, the test holds a noncentral t of both arms' degrees of freedom
    against a bound that is known.
    """
    dof = seeds - 1
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    share = scipy.special.betaincinv(dof / 2, dof / 2, (nodes + 1) / 2)
    a, b = 2 * share * design.reference_sd**2, 2 * (1 - share) * design.arm_sd**2
    variance = design.reference_sd**2 + design.arm_sd**2
    critical = stdtrit(dof * (a + b) ** 2 / (a**2 + b**2), 1 - alpha / 2) * np.sqrt((a + b) / variance)
    return float(weights / 2 @ _tails(critical, 2 * dof, abs(difference) / math.sqrt(variance / seeds)))


def _tails(critical: float | np.ndarray, dof: float, shift: float) -> float | np.ndarray:
    """How often a noncentral t is beyond ``critical`` to either side."""
    upper, lower = scipy.stats.nct.sf(critical, dof, shift), scipy.stats.nct.cdf(-critical, dof, shift)
    # far out scipy has NaN for what is 0 or 1
    return np.nan_to_num(upper, nan=1.0) + np.nan_to_num(lower, nan=0.0)


def minimal_detectable_difference(design: Design, seeds: int, wanted: float = POWER, alpha: float = ALPHA) -> float:
    """The least true difference that is seen with probability ``wanted``, in AP points; infinite below two seeds."""
    if seeds < 2:
        return math.inf
    expected = design.interval(seeds)
    if expected is None:
        return 0.0
    high = expected.error
    while power(design, high, seeds, alpha) < wanted:
        high *= 2
    return float(
        scipy.optimize.brentq(lambda difference: power(design, difference, seeds, alpha) - wanted, 0, high, xtol=1e-6)
    )


def seeds_needed(
    design: Design, difference: float, wanted: float = POWER, alpha: float = ALPHA, most: int = _MOST_SEEDS
) -> int | None:
    """The least number of seeds an arm with which a true ``difference`` is seen with probability ``wanted``.

    None where more than ``most`` are needed, or none suffices because the images alone are too noisy.
    """
    if power(design, difference, most, alpha) < wanted:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(design, difference, middle, alpha) >= wanted else (middle, high)
    return high


def seeds_suffice(design: Design, difference: float, wanted: float = POWER, alpha: float = ALPHA) -> bool:
    """Whether some number of seeds shows a true ``difference`` with probability ``wanted``."""
    return not design.image_error or power(design, difference, _UNLIMITED, alpha) >= wanted


@functools.cache
def sequential_levels(looks: tuple[int, ...], alpha: float = ALPHA) -> tuple[float, ...]:
    """The level at which to test at each look at a growing number of seeds, so that all looks together keep ``alpha``.

    At look k the intervals have the confidence 1 - level and p-values are held against the level. Up to a look with n
    of N seeds, alpha (n / N)^2 is spent (Lan and DeMets, "Discrete sequential boundaries for clinical trials",
    Biometrika 1983; the power family of Kim and DeMets, Biometrika 1987), and the levels follow from the joint
    distribution of Student's t of the first n of N normal differences, drawn 400,000 times with a fixed generator.
    As all intervals hold at once with probability 1 - alpha, one may stop by any rule: a width, an outcome, or want of
    time (repeated confidence intervals; Jennison and Turnbull, JRSS B 1989). What the images add is the same at every
    look, which only makes the looks more alike.

    Args:
        looks: numbers of seeds, growing, at least 2; the last is the most that will be run.
    """
    if not looks or looks[0] < 2 or any(a >= b for a, b in itertools.pairwise(looks)):
        raise ValueError(f"looks must be growing numbers of seeds from 2 on, got {looks}")
    generator = np.random.default_rng(0)
    going = np.ones(_SEQUENCES, dtype=bool)
    total, squares, drawn, spent = np.zeros(_SEQUENCES), np.zeros(_SEQUENCES), 0, 0.0
    levels = []
    for look in looks:
        for _ in range(look - drawn):
            draw = generator.standard_normal(_SEQUENCES)
            total += draw
            squares += draw**2
        drawn = look
        mean = total / look
        statistic = np.abs(mean) / np.sqrt((squares / look - mean**2) / (look - 1))
        spending = alpha * (look / looks[-1]) ** 2
        rejected = round((spending - spent) * _SEQUENCES)
        remaining = np.sort(statistic[going])
        critical = remaining[len(remaining) - 1 - rejected]
        going &= statistic <= critical
        spent = 1 - going.mean()
        levels.append(2 * float(stdtr(look - 1, -critical)))
    return tuple(levels)
