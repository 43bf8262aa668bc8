"""What verdicts say, from a few numbers."""

import math

import pytest

from sge_det.gain.inference import Interval
from sge_det.gain.parts import Question
from sge_det.gain.verdict import Evidence, judge, still_learning

AP50 = Question("AP50")


def judged(both, question=AP50, reference=(50.0, 50.4, 50.2), arm=(50.5, 51.0, 50.6), **options):
    """The one verdict on an arm whose interval over new seeds and new images is given."""
    evidence = {"sge": Evidence(reference, arm, both, both, 100)}
    (verdict,) = judge(evidence, "plain", "bbox", "AP50", question, primary=True, bootstrap=1000, **options)
    return verdict


@pytest.mark.parametrize(
    ("mean", "error", "outcome", "words"),
    [
        (0.5, 0.05, "gain", "zero is excluded, a gain (p < 0.001)."),
        (0.2, 0.02, "gain", "a gain (p < 0.001), though one of less than 0.5 points."),
        (-0.5, 0.05, "loss", "zero is excluded, a loss (p < 0.001)."),
        (0.1, 0.15, "no relevant difference", "no relevant difference: one of 0.5 points or more is excluded."),
        (0.4, 0.5, "undecided", "undecided: neither zero (p 0.426) nor a difference of 0.5 points is excluded."),
        (0.004, 0.0001, "no relevant difference", "no relevant difference"),
    ],
)
def test_four_answers(mean, error, outcome, words):
    verdict = judged(Interval(mean, error, 99))
    assert verdict.outcome == outcome
    assert words in verdict.sentence


def test_a_difference_that_rounds_to_nothing_is_no_gain():
    verdict = judged(Interval(0.004, 0.0001, 99), Question("AP50", margin=0.0))
    assert (verdict.outcome, verdict.excludes_zero) == ("undecided", True)
    assert "it rounds to 0.00, which is no gain or loss." in verdict.sentence


@pytest.mark.parametrize(
    ("error", "of_images", "words"),
    [(0.02, 0.0, None), (8.0, 0.1, "; 0.8 takes more than 1000 seeds."), (8.0, 7.9, "no number of seeds makes it 0.8")],
)
def test_more_seeds_or_more_images(error, of_images, words):
    """A difference of 1: seeds suffice where the images' own standard error is less than 1 / 2.8."""
    of_seeds = Interval(0.5, math.sqrt(error**2 - of_images**2), 2)
    both = Interval(0.5, error, 10, least=of_seeds)
    spread = of_seeds.error * math.sqrt(3)
    sentence = judged(both, arm=(50 + 0.5 - spread, 50.4 + 0.5, 50.2 + 0.5 + spread)).sentence
    assert words in sentence if words else sentence.count(";") == 0


def test_a_look_has_a_level_of_its_own():
    """Zero is excluded at 5% and not at 1%; the power is that of the level too."""
    interval = Interval(0.5, 0.22, 50)
    fixed, look = judged(interval), judged(interval, level=0.01)
    assert (fixed.outcome, look.outcome) == ("gain", "undecided")
    assert "99% interval" in look.sentence and "95% interval" in fixed.sentence
    assert look.low < 0 < fixed.low
    assert look.power.probability < fixed.power.probability


def test_what_two_seeds_tell_is_that_of_the_interval_and_the_level():
    """Student's t of one degree of freedom, over the root of two; Welch's has up to two degrees."""
    two = {"reference": (50.0, 50.4), "arm": (50.5, 51.0)}
    interval = Interval(0.55, 0.3, 1)
    assert "to nothing of other seeds: their interval reaches 9 standard" in judged(interval, **two).sentence
    assert "their interval reaches 45 standard" in judged(interval, **two, level=0.01).sentence
    unpaired = judged(interval, Question("AP50", paired=False), **two).sentence
    assert "to nothing of other seeds. A true" in unpaired


@pytest.mark.parametrize(("level", "told"), [(0.05, "95%"), (0.012, "98.8%"), (0.00011, "99.989%"), (2e-5, "99.998%")])
def test_no_interval_is_of_100_per_cent(level, told):
    assert f"seeds, {told} interval over" in judged(Interval(0.5, 0.22, 50), level=level).sentence


def curves(*last):
    return {"bbox/AP": [(100, 10.0), *((200 + 100 * place, value) for place, value in enumerate(last))]}


@pytest.mark.parametrize(
    ("plain", "sge", "told"),
    [
        ([curves(20.0, 20.1)], [curves(20.0, 20.2)], None),
        ([curves(20.0, 20.1)], [curves(20.0, 23.0), curves(20.0, 21.0)], "(sge by 2.0)"),
        ([curves(20.0, 25.5)], [curves(20.0, 21.0)], "(plain by 5.5, sge by 1.0)"),
        # up with one seed and down with another
        ([curves(20.0, 18.0), curves(20.0, 22.2)], [curves(20.0, 20.0)], None),
        # a single evaluation shows no slope, nor does none
        ([{"bbox/AP": [(100, 10.0)]}], [{}], None),
    ],
)
def test_ap_that_still_rises_is_told(plain, sge, told):
    by_arm = {name: dict(enumerate(runs)) for name, runs in (("plain", plain), ("sge", sge))}
    found = still_learning("bbox", 0.5, by_arm)
    assert len(found) == (told is not None)
    if told:
        assert f"AP still rose between the last two evaluations {told}: a difference may be one of how fast" in found[0]
