import numpy as np
import pytest

from sge_det import UserError
from sge_det.gain.simulation import ARMS, EFFECTS, NOISES, SEEDS, Population, Tally, coverage_report, simulate


@pytest.fixture(scope="module")
def population():
    return Population(arms=3, detectors=10, images=400, seed=1)


@pytest.fixture(scope="module")
def tally(population):
    found = Tally()
    for counts in simulate(population, 30, 6, 5, samples=60, seed=2):
        found.merge(counts)
    return found


@pytest.mark.parametrize("noise", NOISES)
def test_the_truth_of_an_experiment_is_known(population, noise):
    """By many seeds: the mean difference of their true AP, and their correlation."""
    shifts = [0.0, population.shift(noise, 1, 1.0)]
    a, b = population.seeds(noise, shifts, 0.7, (20_000,), np.random.default_rng(0))
    reference, arm = population.ap[0, a], population.ap[1, b]
    assert arm.mean() - reference.mean() == pytest.approx(1.0, abs=0.03)
    assert np.corrcoef(a, b)[0, 1] == pytest.approx(0.7, abs=0.12)
    assert population.shares(noise, shifts[1]).sum() == pytest.approx(1)
    skewness = ((a - a.mean()) ** 3).mean() / a.std() ** 3
    assert skewness < -0.7 if noise == "skewed" else abs(skewness) < 0.2


def test_better_skill_is_better_ap(population):
    assert 20 < population.ap.mean() < 60
    for arm in population.ap:
        assert np.corrcoef(population.skills, arm)[0, 1] > 0.7


def test_draws_scatter_around_the_truth(population):
    generator = np.random.default_rng(3)
    drawn, all_of_them = population.draw(400, 100, generator), np.arange(10)
    ap = np.stack([drawn.ap(arm, all_of_them) for arm in range(3)])
    resampled = np.stack([drawn.resampled(arm, all_of_them) for arm in range(3)])
    assert resampled.shape == (3, 10, 100)
    # as many images as the population has, with a standard error of some points each
    assert np.abs(ap - population.ap).mean() < 5
    assert np.abs(resampled.mean(2) - ap).mean() < 1


def test_intervals_hold_in_a_few_experiments(tally):
    """Hundreds of experiments in all, so bounds that only a fault breaks; the full run is in docs/measuring.md."""

    def share(name):
        cells = [cell for cell in tally.hits if cell.endswith(f"|{name}") and "|two arms|" in cell]
        assert len(cells) == len(NOISES) * len(EFFECTS) * 3 * len(SEEDS)
        return np.mean([tally.rate(cell)[0] for cell in cells])

    assert 0.88 < share("covers: seeds") < 0.99
    assert 0.88 < share("covers: welch") < 0.99
    assert 0.85 < share("covers: images")
    assert 0.88 < share("covers: both")
    assert share("covers: both") > share("covers: seeds, of new images")
    assert share("gain: paired") + share("loss: paired") < 0.2
    for noise in NOISES:
        for arms in ARMS[:2]:
            cell = f"30|arms|{noise}|{arms}"
            assert tally.rate(f"{cell}|Holm")[0] <= tally.rate(f"{cell}|uncorrected")[0]
        looks = f"30|looks|{noise}|0.0|covers: "
        assert tally.rate(f"{looks}with levels")[0] >= tally.rate(f"{looks}without")[0]


def test_tally_knows_that_draws_are_alike():
    tally, other = Tally(), Tally()
    tally.add("x", [True] * 10)
    other.add("x", [False] * 10)
    tally.merge(other)
    # two draws, not twenty experiments
    assert tally.rate("x") == pytest.approx((0.5, 0.5))


def test_report_has_a_row_for_each_kind(tally):
    report = coverage_report(tally)
    assert report.count("\n## ") == 4
    tables = [part for part in report.split("\n\n") if part.startswith("|")]
    assert [len(table.splitlines()) - 2 for table in tables] == [6, 6, 6, 4]
    assert all(row.split("|")[1].strip() == "30" for table in tables for row in table.splitlines()[2:])


@pytest.mark.parametrize(
    ("effect", "false"),
    [(0.0, 1 + 2), (0.25, 2), (0.5, 2 + 4), (1.0, 2 + 4), (-0.25, 1), (-1.0, 1 + 4)],
)
def test_what_is_false_with_looks_depends_on_the_truth(effect, false):
    """One experiment in a hundred is told as a gain, two as a loss, four as no relevant difference (of 0.5)."""
    tally = Tally()
    for which, count in (("gain", 1), ("loss", 2), ("no relevant difference", 4)):
        tally.add(f"60|looks|normal|{effect}|{which}: with levels", [place < count for place in range(100)])
    for name in ("covers", "before 10 seeds"):
        tally.add(f"60|looks|normal|{effect}|{name}: with levels", [True] * 100)
    for how in ("without", "until a width"):
        for name in ("gain", "loss", "no relevant difference", "covers", "before 10 seeds"):
            tally.add(f"60|looks|normal|{effect}|{name}: {how}", [False] * 100)
    (row,) = [line for line in coverage_report(tally).splitlines() if "normal" in line]
    assert float(row.split("|")[4]) == false


@pytest.mark.parametrize("effect", [50.0, -50.0, float("nan")])
def test_an_effect_that_no_detectors_have_is_told(population, effect):
    with pytest.raises(UserError, match="give --effects between"):
        population.shift("normal", 1, effect)
