import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from sge_det.gain import inference
from sge_det.gain.inference import (
    Design,
    Interval,
    both_interval,
    effect_size,
    holm,
    image_interval,
    measured_design,
    minimal_detectable_difference,
    outcome,
    outcomes,
    power,
    probability_of_improvement,
    seed_correlation,
    seed_interval,
    seeds_needed,
    sequential_levels,
    welch_interval,
)

A, B = [40.1, 40.9, 40.3, 41.2], [40.8, 41.1, 41.4, 41.6]


def test_seed_interval_by_hand():
    # t(0.975, 2 degrees of freedom) = 4.302653, standard error 1 / sqrt(3)
    interval = seed_interval([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-5)
    # t(0.975, 1) = 12.706205: two seeds have a half-width of nine standard deviations
    interval = seed_interval([0.0, 2.0])
    assert (interval.mean, interval.half_width) == pytest.approx((1, 12.706205), abs=1e-5)
    assert interval.half_width / np.std([0, 2], ddof=1) == pytest.approx(8.98, abs=0.01)


@pytest.mark.parametrize("values", [[], [4.0], [1.14, 1.14, 1.14], [0.1 + 0.2, 0.3], [1.0, math.nan, 2.0]])
def test_no_spread_no_interval(values):
    assert seed_interval(values) is None


@pytest.mark.parametrize("confidence", [0.95, 0.9])
def test_intervals_over_seeds_equal_scipys(confidence):
    paired = scipy.stats.ttest_rel(B, A)
    interval = seed_interval(np.subtract(B, A), confidence)
    assert (interval.low, interval.high) == pytest.approx(tuple(paired.confidence_interval(confidence)))
    assert interval.p == pytest.approx(paired.pvalue)
    welch = scipy.stats.ttest_ind(B[:3], A, equal_var=False)
    interval = welch_interval(A, B[:3], confidence)
    assert (interval.low, interval.high) == pytest.approx(tuple(welch.confidence_interval(confidence)))
    assert (interval.p, interval.dof) == pytest.approx((welch.pvalue, welch.df))
    assert seed_correlation(A, B) == pytest.approx(scipy.stats.pearsonr(A, B)[0])


def test_welch_without_spread():
    assert welch_interval([1.0, 1.0], [2.0, 2.0]) is None
    assert welch_interval([1.0], [2.0, 3.0]) is None
    assert welch_interval([1.0, math.nan], [2.0, 3.0]) is None
    # one arm that never differs: the other one's degrees of freedom remain
    assert welch_interval([1.0, 1.0, 1.0], [2.0, 3.0]).dof == pytest.approx(1)
    assert math.isnan(seed_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))
    assert math.isnan(seed_correlation([1.0, 2.0], [1.0, 2.0]))


def test_image_interval_of_a_mean_is_students():
    """Of a mean over images, where the bootstrap's spread is known: that of the values without Bessel's correction."""
    values = np.array([1.0, 0.0, 2.0, 7.0, 3.0, 1.0])
    drawn = np.random.default_rng(1).multinomial(6, [1 / 6] * 6, 200_000)
    interval = image_interval(values.mean(), drawn @ values / 6, 6)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval()
    assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=0.02)


def test_image_interval_without_a_value():
    assert image_interval(math.nan, [1.0, 2.0], 5) is None
    assert image_interval(1.0, [1.0, 1.0], 5) is None
    assert image_interval(1.0, [1.0, 2.0], 1) is None
    assert image_interval(1.0, [1.0, 2.0, math.nan, math.nan, math.nan], 5) is None
    defined = image_interval(1.0, [1.0, 2.0, math.nan], 5)
    assert defined.error == pytest.approx(math.sqrt(0.5 * 5 / 4))


@pytest.mark.parametrize("paired", [True, False])
def test_both_interval_by_its_parts(paired):
    """Means over images of seed + image + their own noise, each part of the error reckoned from the tables."""
    generator = np.random.default_rng(3)
    seeds, images = 4, 30
    shared = generator.normal(0, 3, images)
    a, b = (
        generator.normal(50, 1, (seeds, 1)) + part + generator.normal(0, 2, (seeds, images))
        for part in (0 * shared, shared)
    )
    weights = generator.multinomial(images, [1 / images] * images, 40_000) / images
    interval = both_interval(a.mean(1), b.mean(1), a @ weights.T, b @ weights.T, images, paired=paired)
    of_seeds = [(b - a).mean(1).var(ddof=1)] if paired else [x.mean(1).var(ddof=1) for x in (a, b)]
    tables = [b - a] if paired else [a, b]
    own = sum((table - table.mean(0)).var(1, ddof=1).sum() / (seeds - 1) for table in tables) / images / seeds
    of_images = (b - a).mean(0).var(ddof=1) / images - own
    parts = [variance / seeds for variance in of_seeds]
    assert interval.mean == pytest.approx((b - a).mean())
    assert interval.error == pytest.approx(math.sqrt(sum(parts) + of_images), rel=0.01)
    alone = seed_interval((b - a).mean(1)) if paired else welch_interval(a.mean(1), b.mean(1))
    dof = interval.error**2 / (sum(parts) / alone.dof + of_images / (images - 1))
    assert interval.dof == pytest.approx(dof, rel=0.02)
    assert seeds - 1 < interval.dof < images
    assert interval.error > alone.error


def test_both_is_never_narrower_than_seeds_alone():
    """Three seeds that differ, on images that hardly do: more degrees of freedom would make up for the images."""
    generator = np.random.default_rng(0)
    shared = generator.normal(0, 0.4, 500)
    a, b = np.array([40.0, 41.0, 42.0]), np.array([42.5, 42.0, 44.0])
    samples = a[:, None] + 0 * shared, b[:, None] + shared
    both = both_interval(a, b, *samples, 1000)
    alone = seed_interval(b - a)
    assert Interval(both.mean, both.error, both.dof).half_width < alone.half_width
    for confidence in (0.8, 0.95, 0.99):
        wide = both.at(confidence)
        assert wide.half_width >= alone.at(confidence).half_width
        # the p-value and the interval agree on zero
        assert (wide.p < 1 - confidence) == (wide.low > 0)
    assert both.p >= alone.p
    assert both.equivalence_p(9) >= alone.equivalence_p(9)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("of_images", [0.1, 1.0])
def test_both_covers(seeds, of_images):
    """Normal noise of known spreads, the hardest with few seeds and a little of the images."""
    generator = np.random.default_rng(5)
    covered, equal, trials = 0, 0, 3000
    weights = generator.normal(0, 1, 200)
    for _ in range(trials):
        shift = generator.normal(0, math.sqrt(of_images / seeds))
        values = generator.normal(shift, 1, seeds)
        samples = np.tile(math.sqrt(of_images / seeds) * weights, (seeds, 1))
        interval = both_interval(0 * values, values, 0 * samples, samples, 10_000)
        covered += interval.low <= 0 <= interval.high
        # as if the truth were just as large as the margin
        shifted = replace(interval, mean=interval.mean + 5, least=replace(interval.least, mean=interval.mean + 5))
        equal += shifted.equivalence_p(5) <= 0.05
    assert 0.94 <= covered / trials <= 0.975
    assert equal / trials <= 0.06


def test_images_that_hold_nothing_tell_nothing():
    """A mean over 3 of 100 images: taken for 100 its interval covers about 80%, for 3 what it promises."""
    generator = np.random.default_rng(0)
    covered = {3: 0, 100: 0}
    for _ in range(300):
        values = generator.standard_normal(3)
        weights = generator.multinomial(100, [0.01] * 100, size=200)[:, :3].astype(float)
        drawn = weights.sum(1)
        samples = np.divide(weights @ values, drawn, out=np.full(200, np.nan), where=drawn > 0)
        for images in covered:
            interval = inference.image_interval(values.mean(), samples, images)
            covered[images] += interval.low <= 0 <= interval.high
    assert covered[3] >= 0.92 * 300
    assert covered[100] <= 0.88 * 300


def test_samples_that_do_not_differ_are_no_interval():
    """One object in all images: each sample that has it shows the same, which tells nothing of other images."""
    same = np.tile([[50.0], [51.0], [49.5]], (1, 300))
    assert inference.both_interval([50, 51, 49.5], [52, 54, 53], same, same + np.array([[2], [3], [3.5]]), 12) is None


def test_both_interval_needs_both():
    samples = np.random.default_rng(0).normal(size=(3, 100))
    assert both_interval([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], samples, samples + 1, 10) is None
    assert both_interval([1.0], [2.0], samples[:1], samples[1:2], 10) is None
    assert both_interval([1.0, 2.0, 4.0], [2.0, 2.5, 3.0], samples * math.nan, samples, 10) is None


def test_holm_by_hand():
    # sorted 0.01, 0.02, 0.03, 0.04: times 4, 3, 2, 1, never falling
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "error", "expected"),
    [
        (1.0, 0.1, "gain"),
        (-1.0, 0.1, "loss"),
        (0.1, 0.1, "no relevant difference"),
        (-0.1, 0.1, "no relevant difference"),
        (0.4, 0.3, "undecided"),
        (0.004, 0.0001, "no relevant difference"),  # rounds to 0.00
        (-0.004, 0.0001, "no relevant difference"),
        (0.2, 0.05, "gain"),  # small, but not nothing
    ],
)
def test_outcome(mean, error, expected):
    interval = Interval(mean, error, 10)
    assert outcome(interval, margin=0.5) == expected
    assert expected in inference.OUTCOMES


def test_outcome_agrees_with_the_intervals():
    """Zero outside the 95% interval; the 90% interval inside the margin (Schuirmann)."""
    for mean in np.linspace(-1.5, 1.5, 61):
        interval = Interval(mean, 0.15, 6)
        found = outcomes([interval], margin=0.5)[0]
        within = interval.at(0.9)
        assert found.within_margin == (-0.5 < within.low and within.high < 0.5)
        assert (found.outcome in ("gain", "loss")) == (interval.low > 0 or interval.high < 0)
    assert outcome(None) == "undecided"
    assert outcome(Interval(0.0, 0.01, 10), margin=0) == "undecided"


def test_arms_are_corrected_together():
    # p = 0.03 each: enough alone, not for two
    interval = Interval(scipy.stats.t.isf(0.015, 10), 1.0, 10)
    assert outcome(interval) == "gain"
    assert [found.outcome for found in outcomes([interval, interval, None])] == ["undecided"] * 3
    strong = Interval(10.0, 1.0, 10)
    found = outcomes([interval, strong])
    assert [each.outcome for each in found] == ["gain", "gain"]  # Holm: after the strong one the weak one stands alone
    assert [each.p for each in found] == pytest.approx([0.03, 2 * strong.p])


def test_power_against_tables():
    """Cohen's d = 0.5: 34 pairs, or 64 in each group, have power 0.8 (0.8078, 0.8015)."""
    pairs = Design(1.0, 1.0, correlation=0.5)  # differences with a standard deviation of 1
    assert power(pairs, 0.5, 34) == pytest.approx(0.8078, abs=1e-4)
    assert seeds_needed(pairs, 0.5) == 34
    groups = Design(1.0, 1.0, paired=False)
    assert power(groups, 0.5, 64) == pytest.approx(0.8015, abs=2e-4)  # the table is of one spread for both groups
    assert seeds_needed(groups, 0.5) == 64
    assert minimal_detectable_difference(pairs, 34) == pytest.approx(0.4944, abs=2e-3)
    assert power(pairs, 0, 5) == pytest.approx(0.05)
    assert power(pairs, 1, 1) == 0
    assert minimal_detectable_difference(pairs, 1) == math.inf


def test_power_by_simulation():
    generator = np.random.default_rng(2)
    differences = generator.normal(1.0, 0.8, (4000, 5))
    seen = np.mean(scipy.stats.ttest_1samp(differences, 0, axis=1).pvalue < 0.05)
    assert power(Design(0.8, 0.0), 1.0, 5) == pytest.approx(seen, abs=0.025)


@pytest.mark.parametrize(("sds", "seeds"), [((0.5, 0.5), 3), ((0.5, 1.0), 3), ((0.1, 1.5), 5), ((0.5, 0.5), 10)])
def test_unpaired_power_by_simulation(sds, seeds):
    """Welch's degrees of freedom are found anew by each experiment: those that are expected promise 0.46 for the first
    case, and 0.37 is seen."""
    generator = np.random.default_rng(3)
    reference, arm = (generator.normal(0.0, sd, (40_000, seeds)) for sd in sds)
    for difference in (0.0, 1.0):
        seen = np.mean(scipy.stats.ttest_ind(reference, arm + difference, axis=1, equal_var=False).pvalue < 0.05)
        assert power(Design(*sds, paired=False), difference, seeds) == pytest.approx(seen, abs=0.01)


def test_images_limit_what_seeds_can_show():
    noisy = Design(0.1, 0.1, image_error=0.5, images=100)
    assert seeds_needed(noisy, 1.0) is None
    assert seeds_needed(noisy, 2.0) is not None
    assert minimal_detectable_difference(noisy, 1000) > (1.96 + 0.84) * 0.5
    still = Design(0.0, 0.0)
    assert (power(still, 0.1, 3), minimal_detectable_difference(still, 3)) == (1.0, 0.0)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("seeds", [2, 4])
def test_measured_design_expects_what_was_measured(paired, seeds):
    samples = np.random.default_rng(1).normal(0, 0.4, (2, seeds, 500))
    samples[1] += np.random.default_rng(2).normal(0, 0.5, 500)
    a, b = A[:seeds], B[:seeds]
    both = both_interval(a, b, *samples, 300, paired=paired)
    design = measured_design(a, b, both, 300, paired=paired)
    assert design.image_error == pytest.approx(0.5, abs=0.1)
    expected = design.interval(seeds)
    assert expected.error == pytest.approx(both.error)
    if paired:
        assert expected.dof == pytest.approx(both.dof)
    alone = measured_design(a, b, None, 300, paired=paired).interval(seeds)
    assert alone.error == pytest.approx(both.least.error)


def test_improvement_and_effect():
    assert probability_of_improvement([1.0, 2.0], [2.0, 3.0]) == (1 + 1 + 0.5 + 1) / 4
    by_scipy = scipy.stats.mannwhitneyu(B, A).statistic / 16
    assert probability_of_improvement(A, B) == pytest.approx(by_scipy)
    # d = 2 / 1 with 4 degrees of freedom, Hedges 1 - 3 / 15
    assert effect_size([1.0, 2.0, 3.0], [3.0, 4.0, 5.0]) == pytest.approx(2 * 0.8)
    assert math.isnan(effect_size([1.0], [2.0]))
    assert math.isnan(effect_size([1.0, 1.0], [2.0, 2.0]))


@pytest.mark.parametrize("looks", [(3, 4, 5, 6, 8), (2, 4, 10)])
def test_all_looks_together_keep_their_level(looks):
    levels = sequential_levels(looks)
    assert sequential_levels((5,)) == pytest.approx((0.05,), abs=0.002)
    assert all(0 < level < 0.05 for level in levels)
    draws = np.random.default_rng(7).standard_normal((20_000, looks[-1]))
    crossed = np.zeros(len(draws), dtype=bool)
    naive = crossed.copy()
    for look, level in zip(looks, levels):
        p = scipy.stats.ttest_1samp(draws[:, :look], 0, axis=1).pvalue
        crossed |= p < level
        naive |= p < 0.05
    assert crossed.mean() == pytest.approx(0.05, abs=0.006)
    assert naive.mean() > 0.08


@pytest.mark.parametrize("looks", [(), (1, 2), (3, 3), (5, 4)])
def test_looks_must_grow(looks):
    with pytest.raises(ValueError, match="growing"):
        sequential_levels(looks)
