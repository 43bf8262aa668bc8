"""docs/results.md says what its tables and raw figures show."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import ttest_1samp

PAGE = (ROOT / "docs/results.md").read_text(encoding="utf-8")
RAW = {name: json.loads((ROOT / f"docs/results/{name}.json").read_bytes()) for name in ("faster_sge", "retinanet")}


def pointing_rows():
    head = PAGE.index("| stage | chance | before SGE")
    rows = re.findall(r"^\| (res\d) \|(.*)\|$", PAGE[head : PAGE.index("\n\n", head)], re.MULTILINE)
    return {stage: [float(value) for value in values.split("|")] for stage, values in rows}


def test_the_pointing_game_is_that_of_the_raw_figures():
    runs = list(RAW["faster_sge"]["pointing"]["sge"].values())
    rows = pointing_rows()
    assert len(rows) == 4
    for stage, found in rows.items():
        figures = [run["bbox"][stage]["all"] for run in runs]
        shares = [
            100 * np.mean([each[key]["mean"] for each in figures]) for key in ("chance", "before", "after", "gate")
        ]
        ratio = np.mean([each["gate_ratio"]["mean"] for each in figures])
        assert found == pytest.approx([*np.round(shares, 1), round(ratio, 3)], abs=0.051)


def test_what_is_said_of_the_gates_follows_from_their_table():
    """The strongest gate opens on objects more often than chance; the mean one does not."""
    rows = pointing_rows()
    low, high, first, last, chance = map(
        int,
        re.search(r"hits an object in (\d+) to (\d+)% in res(\d) to res(\d), where chance is (\d+)%", PAGE).groups(),
    )
    of_them = [rows[f"res{stage}"] for stage in range(first, last + 1)]
    assert (round(min(row[3] for row in of_them)), round(max(row[3] for row in of_them))) == (low, high)
    assert {round(row[0]) for row in of_them} == {chance}
    assert all(row[3] > row[0] + 5 for row in of_them)
    assert all(abs(row[4] - 1) < 0.01 for row in rows.values())
    assert "do not open on objects" not in PAGE


@pytest.mark.parametrize(("name", "title"), [("faster_sge", "Faster R-CNN"), ("retinanet", "RetinaNet")])
def test_the_summary_has_students_intervals_of_the_raw_figures(name, title):
    values = RAW[name]["differences"]["sge"]["bbox"]["AP"]["values"]
    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    row = f"| **{title}: SGE - plain** | {len(values)} | {np.mean(values):+.2f} | {low:+.2f} to {high:+.2f} |"
    assert row in PAGE
    # zero is inside, so that no gain is claimed
    assert low < 0 < high
    assert "**No gain of SGE is shown**" in PAGE


def test_intervals_are_counted():
    intervals = re.findall(r"[+-]\d+\.\d+ to [+-]\d+\.\d+", PAGE)
    assert "at least twelve such intervals" in " ".join(PAGE.split())
    assert "one of five such intervals" not in PAGE
    assert len(intervals) >= 12


def test_the_planned_comparison_is_that_of_the_raw_figures():
    """Each cell of its two tables: means and Student's intervals by SciPy, the others as the report has them."""
    named = {
        "SGE - plain": ("constant", "sge"),
        "SGE with a learnt constant - plain": ("constant", "sge-constant"),
        "SGE - SGE with a learnt constant": ("constant_attention", "sge"),
    }
    for title, (name, arm) in named.items():
        found = json.loads((ROOT / f"docs/results/{name}.json").read_bytes())["differences"][arm]["bbox"]["AP"]
        spans = [found["intervals"][kind] for kind in ("seeds", "images", "both")]
        shown = " | ".join(f"{span['low']:+.2f} to {span['high']:+.2f}" for span in spans)
        assert f"| {title} | 3 | {np.mean(found['values']):+.2f} | {shown} | undecided" in PAGE
        low, high = ttest_1samp(found["values"], 0).confidence_interval(0.95)
        assert (low, high) == pytest.approx((spans[0]["low"], spans[0]["high"]))
    arms = json.loads((ROOT / "docs/results/constant.json").read_bytes())["arms"]
    for name, arm in arms.items():
        values = arm["bbox"]["AP"]["values"]
        assert f"| {name} | {' | '.join(f'{value:.2f}' for value in (*values, np.mean(values)))} |" in PAGE
