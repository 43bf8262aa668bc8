"""How many seeds it takes, against simulated experiments and a report."""

import json
import math

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from sge_det import UserError
from sge_det.files import write_json
from sge_det.gain import Question, to_json
from sge_det.gain.inference import Design, seeds_suffice
from sge_det.gain.measurement import compared
from sge_det.gain.power import from_pilot, given, in_words, published, tables


def rows(table):
    return {row[0]: row[1:] for row in table.rows}


def test_seeds_are_what_simulated_experiments_need():
    outlook = given([0.5, 0.7], correlation=0.3)
    by_difference, by_seeds = tables(outlook, 0.8, 12)
    needed = int(rows(by_difference)["0.8"][0])
    spread = math.sqrt(0.5**2 + 0.7**2 - 2 * 0.3 * 0.5 * 0.7)
    assert outlook.spread == pytest.approx(spread)
    rng = np.random.default_rng(0)

    def seen(seeds):
        draws = 0.8 + spread * rng.standard_normal((20_000, seeds))
        return (ttest_1samp(draws, 0, axis=1).pvalue <= 0.05).mean()

    assert seen(needed) > 0.79
    assert seen(needed - 1) < 0.81
    assert float(rows(by_seeds)["12"][1]) == pytest.approx(seen(12), abs=0.01)


def test_more_arms_need_more_seeds_and_hours_are_counted():
    outlook = given([0.5], hours=2.0)
    one, six = (int(rows(tables(outlook, 0.5, arms=arms)[0])["0.5"][0]) for arms in (1, 6))
    assert six > one
    assert rows(tables(outlook, 0.5)[0])["0.5"][1] == f"{2.0 * one:.1f}"


def test_where_images_are_the_noise_no_number_of_seeds_suffices():
    table = rows(tables(given([0.3], image_error=0.5, images=72), 1.0)[0])
    assert table["1"][0] == "none suffices: more images"


def write_pilot(path, values):
    """A report on the values of AP by arm and seed."""
    found = {name: [{"AP": value} for value in of_arm] for name, of_arm in values.items()}
    seeds = range(len(values["plain"]))
    content = to_json(compared({"bbox": found}, {}, seeds=seeds, images=101, bootstrap=0, question=Question()))
    content["differences"]["sge"]["bbox"]["AP"]["intervals"]["images"] = {"low": -1.0, "high": 3.0}
    write_json(path, content)


def test_of_the_images_noise_a_pilot_counts_what_seeds_share(pilot):
    """Draws of new images: each moves all seeds alike by 0.5, and each seed by itself by 1."""
    path = pilot / "report.json"
    content = json.loads(path.read_bytes())
    generator = np.random.default_rng(0)
    moves = generator.normal(0, 1, (200_000, 3)) + generator.normal(0, 0.5, (200_000, 1))
    factor = 1.98397  # a half-width is so many standard errors with 100 degrees of freedom
    (mean,), by_seed = (
        [{"low": -factor * error, "high": factor * error} for error in np.atleast_1d(of.std(0))]
        for of in (moves.mean(1), moves)
    )
    found = content["differences"]["sge"]["bbox"]["AP"]
    found["intervals"]["images"], found["images_by_seed"] = mean, by_seed
    write_json(path, content)
    assert from_pilot(pilot)[0].design.image_error == pytest.approx(0.5, abs=0.02)
    # of seeds that share nothing, more of them lessen all of it
    found["intervals"]["images"] = {"low": -factor / 3**0.5, "high": factor / 3**0.5}
    found["images_by_seed"] = [{"low": -factor * 1.01, "high": factor * 1.01}] * 3
    write_json(path, content)
    shown, other = from_pilot(pilot)
    assert shown.design.image_error == 0 and "no noise of the 101 images is seen that the seeds share" in in_words(
        shown
    )
    assert "not known and left out" in in_words(other)


@pytest.fixture
def pilot(tmp_path):
    values = {"plain": (50.0, 51.0, 50.5), "sge": (51.0, 51.5, 51.75), "se": (50.0, 50.0, 50.0)}
    write_pilot(tmp_path / "report.json", values)
    return tmp_path


def test_a_pilot_shows_its_spread(pilot):
    sge, se = from_pilot(pilot)
    assert sge.spread == pytest.approx(np.std([1.0, 0.5, 1.25], ddof=1))
    assert se.spread == pytest.approx(np.std([50.0, 51.0, 50.5], ddof=1))
    # a half-width of 2 is 1.984 standard errors with 100 degrees of freedom
    assert sge.design.image_error == pytest.approx(2 / 1.98397, rel=1e-4)
    low, high = sge.spread_range()
    assert low < sge.spread < high
    assert "of 3 seeds, which tell it badly" in in_words(sge)
    assert math.isnan(sge.hours)
    for arm in ("plain", "sge"):
        for seed in range(3):
            (pilot / arm / f"seed{seed}").mkdir(parents=True)
            (pilot / arm / f"seed{seed}" / "result.json").write_text(json.dumps({"seconds": 1800.0}))
    assert from_pilot(pilot)[0].hours == pytest.approx(1.0)
    assert math.isnan(from_pilot(pilot / "report.json")[1].hours)


def test_pilots_that_tell_nothing(pilot, tmp_path):
    report = json.loads((pilot / "report.json").read_text())
    alike = {"mean": 1.0, "sd": 0.0, "values": [1.0] * 3}
    with pytest.raises(UserError, match="--metric AP99 is none of the pilot's: AP"):
        from_pilot(pilot, "AP99")
    for change, words in (
        ({"arms": {name: {"bbox": {"AP": alike}} for name in report["arms"]}}, "no spread"),
        ({"tasks": []}, "no report.json of measure_gain"),
        ({"differences": 3}, "no report.json of measure_gain"),
    ):
        (tmp_path / "other.json").write_text(json.dumps(report | change))
        with pytest.raises(UserError, match=words):
            from_pilot(tmp_path / "other.json")
    write_pilot(tmp_path / "shifted.json", {"plain": (50.1, 51.3, 50.7), "sge": (51.1, 52.3, 51.7)})
    with pytest.raises(UserError, match="all seeds differ by the same between plain and sge, which shows no spread"):
        from_pilot(tmp_path / "shifted.json")
    assert from_pilot(tmp_path / "shifted.json", paired=False)[0].design.paired is False
    write_pilot(tmp_path / "one.json", {"plain": (50.0,), "sge": (51.0,)})
    with pytest.raises(UserError, match="has one seed, which shows no spread"):
        from_pilot(tmp_path / "one.json")
    (tmp_path / "none.json").write_text("[]")
    for name, words in (("none", "is no report.json of measure_gain"), ("absent", "cannot be read: No such file")):
        with pytest.raises(UserError, match=rf"--pilot .*{name}\.json {words}"):
            from_pilot(tmp_path / f"{name}.json")


def test_what_takes_too_many_seeds_is_not_for_want_of_images():
    """0.8 takes 2.8 standard errors: the images let it through where theirs is less than the difference by that."""
    rows_of = rows(tables(given([0.5]), 0.00025)[0])
    assert rows_of["0.00025"][0] == "more than 1000"
    assert seeds_suffice(Design(0.5, 0.5, image_error=0.2, images=10_000), 0.6)
    assert not seeds_suffice(Design(0.5, 0.5, image_error=0.2, images=10_000), 0.5)
    with pytest.raises(UserError, match="leaves no spread of the difference"):
        given([0.5], correlation=1.0)


@pytest.mark.parametrize("arguments", [([0.0],), ([1, 2, 3],), ([1.0], 2.0), ([1.0], 0.0, -1.0), ([1.0], 0, 0, 1)])
def test_numbers_that_cannot_be(arguments):
    with pytest.raises(UserError, match=r"--sd|--correlation|--image"):
        given(*arguments)


def test_the_tool_plans(call_tool, pilot):
    for arguments in ((), ("--sd", 0.5), ("--pilot", pilot)):
        done = call_tool("measure_gain.py", "--plan", *arguments, "--difference", 0.7, "--max-seeds", 4)
        assert done.returncode == 0, done.stderr
        assert "| 0.7 " in done.stdout and "\n| 4 " in done.stdout
    assert done.stdout.count("standard deviation over seeds is") == 2
    assert len(published()) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--plan --sd 1 --pilot x", "leave out one of them"),
        ("--plan --sd 1 --difference 0", "--difference 0.0 must be a number of AP points above 0"),
        ("--plan --sd 1 --difference nan", "--difference nan must be a number"),
        ("--plan --sd 1 --max-seeds -3", "--max-seeds -3 must be at least 2"),
        ("--plan --sd 1 --hours -1", "--hours -1.0 must be a number above 0"),
        ("--plan --sd 1 --decide 1", "--plan trains nothing: leave out --decide"),
        ("--plan --config-file x", "--plan trains nothing: leave out --config-file"),
        ("--sd 1 --output x", "--sd goes with --plan"),
        ("--config-file x", "give the folder of the runs and the report with --output"),
        ("--output x --config-file y --until 1 --report-only", "leave out --report-only"),
        ("--output x --config-file y --until 1 --num-machines 2 --dist-url tcp://h:1", "one machine a run"),
        ("--output x --config-file y --decide 0", "--decide 0.0 must be a difference"),
        ("--output x --config-file y --max-seeds 5", "--max-seeds goes with --until or --decide"),
        ("--output x --config-file y --report-only --no-wait", "--report-only goes without --no-wait"),
    ],
)
def test_the_tool_refuses_what_does_not_go_together(call_tool, arguments, words):
    done = call_tool("measure_gain.py", *arguments.split())
    assert done.returncode == 2
    assert words in done.stderr
