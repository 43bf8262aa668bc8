"""docs/results.md says what its tables and raw figures show."""

import hashlib
import json
import re
import runpy
import tarfile

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


def read(name):
    return json.loads((ROOT / f"docs/results/{name}.json").read_bytes())


def shown(interval):
    low, high = interval
    return f"{low:+.2f} to {high:+.2f}"


def test_the_planned_comparison_is_that_of_the_raw_figures():
    """Each cell of its two tables: means and Student's intervals by SciPy, those over images by the reports."""
    first, kept = read("constant"), read("kept")
    named = {
        "SGE - plain": ("sge", "plain", kept),
        "SGE with a learnt constant - plain": ("sge-constant", "plain", kept),
        "SGE - SGE with a learnt constant": ("sge", "sge-constant", read("kept_attention")),
    }
    values = {
        name: [*first["arms"][name]["bbox"]["AP"]["values"], *arm["bbox"]["AP"]["values"]]
        for name, arm in kept["arms"].items()
    }
    assert [*first["seeds"], *kept["seeds"]] == [*range(len(values["plain"]))]
    for title, (arm, other, report) in named.items():
        gains = np.subtract(values[arm], values[other])
        found = report["differences"][arm]["bbox"]["AP"]
        assert found["values"] == pytest.approx(gains[len(first["seeds"]) :])
        low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
        assert low < 0 < high and "All are **undecided**" in PAGE
        spans = [(found["intervals"][kind]["low"], found["intervals"][kind]["high"]) for kind in ("images", "both")]
        cells = [len(gains), f"{gains.mean():+.2f}", shown((low, high))]
        cells += [len(kept["seeds"]), f"{np.mean(found['values']):+.2f}", *map(shown, spans)]
        assert f"| {title} | {' | '.join(map(str, cells))} |" in PAGE
    for name, of_arm in values.items():
        assert f"| {name} | {' | '.join(f'{value:.2f}' for value in (*of_arm, np.mean(of_arm)))} |" in PAGE
    gains, constants = (np.subtract(values[arm], values["plain"]) for arm in ("sge", "sge-constant"))
    prose = " ".join(PAGE.split())
    leads = f"in {(gains > 0).sum()} of {len(gains)} seeds, the learnt constant in {(constants > 0).sum()}"
    means = f"on average they are {gains.mean():+.2f} and {constants.mean():+.2f} points from plain"
    assert f"SGE leads plain {leads}: {means}" in prose
    low, high = ttest_1samp(gains[:5], 0).confidence_interval(0.95)
    assert (
        f"SGE ahead by {gains[:5].mean():.2f}, the last three have it behind by {-gains[5:].mean():.2f}; a page of "
        f"five seeds would have told another story ({shown((low, high))})" in prose
    )
    assert ttest_1samp(gains, 0).confidence_interval(0.95)[1] < 1, "a whole point is beyond the interval"
    both = first["differences"]["sge"]["bbox"]["AP"]["intervals"]["both"]
    assert f"images {shown((both['low'], both['high']))} for SGE" in PAGE


def test_the_picture_is_drawn_from_the_reports(tmp_path, monkeypatch):
    folder = ROOT / "docs/results"
    drawing = runpy.run_path(str(folder / "planned.py"))
    reports = f"{folder / 'constant.json'},{folder / 'kept.json'}"
    assert len(drawing["box_ap"](reports)["sge"]) == 8
    monkeypatch.setattr("sys.argv", ["planned.py", str(tmp_path / "planned.png"), f"blood cells={reports}"])
    drawing["main"]()
    assert (tmp_path / "planned.png").stat().st_size > 10_000


def test_what_is_said_of_the_kept_seeds_gates_is_in_their_report():
    kept = read("kept")
    runs = kept["gates"]["sge"]
    spreads = {seed: [stage["gate"]["spatial_sd"] for stage in stages.values()] for seed, stages in runs.items()}
    ratios = [
        stage["all"]["gate_ratio"]["mean"] for run in kept["pointing"]["sge"].values() for stage in run["bbox"].values()
    ]
    gains = kept["differences"]["sge"]["bbox"]["AP"]["values"]
    means = [np.mean(spreads[str(seed)]) for seed in kept["seeds"]]
    assert set(np.argsort(means)[-2:]) == set(np.argsort(gains)[:2]), "the two whose gates move most lost most"
    flat = np.concatenate(list(spreads.values()))
    prose = " ".join(PAGE.split())
    assert f"spread is {flat.min():.2f} to {flat.max():.2f} by stage and seed" in prose
    assert f"as open on objects as beside them ({min(ratios):.3f} to {max(ratios):.3f})" in prose
    assert f"correlation of spread and gain {np.corrcoef(means, gains)[0, 1]:.2f}" in prose


def test_the_archive_holds_the_runs_of_the_kept_seeds(tmp_path):
    with tarfile.open(ROOT / "docs/results/bccd_faster.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    report = read("kept")
    for arm, figures in report["arms"].items():
        for seed, value in zip(report["seeds"], figures["bbox"]["AP"]["values"], strict=True):
            run = tmp_path / arm / f"seed{seed}"
            result = json.loads((run / "result.json").read_bytes())
            assert result["results"]["bbox"]["AP"] == pytest.approx(value, abs=1e-6)
            detections = (run / "inference/coco_instances_results.json").read_bytes()
            assert hashlib.sha256(detections).hexdigest() == result["predictions"]
            assert (run / "fingerprint.json").is_file() and (run / "config.yaml").is_file()


def test_the_cards_figures_are_those_of_their_archive(tmp_path):
    with tarfile.open(ROOT / "docs/results/cards_faster.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    values, rises = {}, {}
    for arm in ("plain", "sge"):
        run = tmp_path / arm / "seed0"
        result = json.loads((run / "result.json").read_bytes())
        detections = (run / "inference/coco_instances_results.json").read_bytes()
        assert result["predictions"] == hashlib.sha256(detections).hexdigest()
        records = map(json.loads, (run / "metrics.json").read_text().splitlines())
        curve = [record["bbox/AP"] for record in records if "bbox/AP" in record]
        values[arm], rises[arm] = result["results"]["bbox"]["AP"], curve[-1] - curve[-2]
    prose = " ".join(PAGE.split())
    gain = values["sge"] - values["plain"]
    assert f"plain {values['plain']:.2f}, SGE {values['sge']:.2f}, a difference of {gain:+.2f}" in prose
    stages = read("cards")["pointing"]["sge"]["0"]["bbox"].values()
    ratios = [stage["all"]["gate_ratio"]["mean"] for stage in stages]
    assert f"as open beside cards as on them ({min(ratios):.3f} to {max(ratios):.3f}, by stage)" in prose
    of_report = read("cards")["differences"]["sge"]["bbox"]["AP"]
    assert of_report["values"] == pytest.approx([gain])
    images = of_report["intervals"]["images"]
    assert f"on new images {shown((images['low'], images['high']))}" in prose
    assert f"plain by {rises['plain']:.1f} in its last quarter, SGE by {rises['sge']:.1f}" in prose
