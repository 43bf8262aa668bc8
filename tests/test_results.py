"""docs/results.md and docs/results/older.md say what their tables and raw figures show."""

import hashlib
import json
import re
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from conftest import ROOT
from scipy.stats import ttest_1samp

from sge_det.gain.inference import seeds_needed
from sge_det.gain.power import from_pilot

PAGE = (ROOT / "docs/results.md").read_text(encoding="utf-8")
OLDER = (ROOT / "docs/results/older.md").read_text(encoding="utf-8")
RAW = {name: json.loads((ROOT / f"docs/results/{name}.json").read_bytes()) for name in ("faster_sge", "retinanet")}


def pointing_rows():
    head = OLDER.index("| stage | chance | before SGE")
    rows = re.findall(r"^\| (res\d) \|(.*)\|$", OLDER[head : OLDER.index("\n\n", head)], re.MULTILINE)
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
        re.search(r"hits an object in (\d+) to (\d+)% in res(\d) to res(\d), where chance is (\d+)%", OLDER).groups(),
    )
    of_them = [rows[f"res{stage}"] for stage in range(first, last + 1)]
    assert (round(min(row[3] for row in of_them)), round(max(row[3] for row in of_them))) == (low, high)
    assert {round(row[0]) for row in of_them} == {chance}
    assert all(row[3] > row[0] + 5 for row in of_them)
    assert all(abs(row[4] - 1) < 0.01 for row in rows.values())
    assert "do not open on objects" not in OLDER


@pytest.mark.parametrize(("name", "title"), [("faster_sge", "Faster R-CNN"), ("retinanet", "RetinaNet")])
def test_the_summary_has_students_intervals_of_the_raw_figures(name, title):
    values = RAW[name]["differences"]["sge"]["bbox"]["AP"]["values"]
    test = ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    row = f"| **{title}: SGE - plain** | {len(values)} | {np.mean(values):+.2f} | {low:+.2f} to {high:+.2f} |"
    assert row in OLDER
    # zero is inside, so that no gain is claimed
    assert low < 0 < high
    assert "**No gain of SGE is shown**" in OLDER


def test_intervals_are_counted():
    intervals = re.findall(r"[+-]\d+\.\d+ to [+-]\d+\.\d+", OLDER)
    assert "at least twelve such intervals" in " ".join(OLDER.split())
    assert "one of five such intervals" not in OLDER
    assert len(intervals) >= 12


def read(name):
    return json.loads((ROOT / f"docs/results/{name}.json").read_bytes())


def shown(interval):
    low, high = interval
    return f"{low:+.2f} to {high:+.2f}"


# reports of the seeds whose detections are lost, and of those that are kept: of all arms, and without plain
PLANNED = {
    "blood cells": (["constant"], "kept", "kept_attention"),
    "playing cards": ([], "cards", "cards_attention"),
}
PAIRS = {
    "SGE - plain": ("sge", "plain"),
    "learnt constant - plain": ("sge-constant", "plain"),
    "SGE - learnt constant": ("sge", "sge-constant"),
}


def values_of(place):
    """Box AP of each arm, of all seeds in their order."""
    lost, kept, _ = PLANNED[place]
    reports = [*map(read, lost), read(kept)]
    assert [seed for report in reports for seed in report["seeds"]] == [*range(sum(len(r["seeds"]) for r in reports))]
    return {
        arm: [value for report in reports for value in report["arms"][arm]["bbox"]["AP"]["values"]]
        for arm in reports[-1]["arms"]
    }


@pytest.mark.parametrize("place", PLANNED)
@pytest.mark.parametrize("title", PAIRS)
def test_a_planned_difference_is_that_of_the_raw_figures(place, title):
    """Each cell of its row: means and Student's intervals by SciPy, those over images by the reports."""
    arm, other = PAIRS[title]
    values = values_of(place)
    gains = np.subtract(values[arm], values[other])
    report = read(PLANNED[place][1 if other == "plain" else 2])
    found = report["differences"][arm]["bbox"]["AP"]
    kept = len(found["values"])
    assert found["values"] == pytest.approx(gains[-kept:])
    low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
    spans = [(found["intervals"][kind]["low"], found["intervals"][kind]["high"]) for kind in ("images", "both")]
    cells = [place, title, len(gains), f"{gains.mean():+.2f}", shown((low, high))]
    cells += [kept, f"{np.mean(found['values']):+.2f}", *map(shown, spans)]
    assert f"| {' | '.join(map(str, cells))} |" in PAGE
    assert all(low < 0 < high for low, high in [(low, high), spans[1]]) and "All are **undecided**" in PAGE


@pytest.mark.parametrize("place", PLANNED)
def test_each_run_of_the_planned_comparisons_is_in_a_table(place):
    for arm, values in values_of(place).items():
        assert f"| {arm} | {' | '.join(f'{value:.2f}' for value in (*values, np.mean(values)))} |" in PAGE


def test_what_is_said_of_the_cells_seeds_follows_from_them():
    values = values_of("blood cells")
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
    both = read("constant")["differences"]["sge"]["bbox"]["AP"]["intervals"]["both"]
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


@pytest.mark.parametrize(("name", "report"), [("bccd_faster", "kept"), ("cards_faster", "cards")])
def test_the_archive_holds_the_runs_of_the_kept_seeds(name, report, tmp_path):
    with tarfile.open(ROOT / f"docs/results/{name}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    report = read(report)
    for arm, figures in report["arms"].items():
        for seed, value in zip(report["seeds"], figures["bbox"]["AP"]["values"], strict=True):
            run = tmp_path / arm / f"seed{seed}"
            result = json.loads((run / "result.json").read_bytes())
            assert result["results"]["bbox"]["AP"] == pytest.approx(value, abs=1e-6)
            detections = (run / "inference/coco_instances_results.json").read_bytes()
            assert hashlib.sha256(detections).hexdigest() == result["predictions"]
            assert (run / "fingerprint.json").is_file() and (run / "config.yaml").is_file()


def test_what_is_said_of_the_cards_follows_from_their_runs(tmp_path):
    report, prose = read("cards"), " ".join(PAGE.split())
    with tarfile.open(ROOT / "docs/results/cards_faster.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    rises = {}
    for arm in report["arms"]:
        rises[arm] = []
        for seed in report["seeds"]:
            records = map(json.loads, (tmp_path / arm / f"seed{seed}/metrics.json").read_text().splitlines())
            curve = [record["bbox/AP"] for record in records if "bbox/AP" in record]
            rises[arm].append(curve[-1] - curve[-2])
    plain, sge, constant = (f"{np.mean(rises[arm]):.1f}" for arm in ("plain", "sge", "sge-constant"))
    assert f"plain rose by {plain} on average, SGE by {sge}, the constant by {constant}" in prose
    values = values_of("playing cards")
    gains, constants = (np.subtract(values[arm], values["plain"]) for arm in ("sge", "sge-constant"))
    leads = f"ahead in {(constants > 0).sum()} and in {(gains > 0).sum()} of {len(gains)} seeds"
    assert f"it has {constants.mean():+.2f} on average and SGE {gains.mean():+.2f}, {leads}" in prose
    assert f"SGE is {(gains - constants).mean():+.2f} from the constant" in prose
    first, *others = gains
    said = f"{', '.join(f'{gain:+.2f}' for gain in others[:-1])} and {others[-1]:+.2f}"
    assert f"**One seed showed {first:+.2f}.** The three after it are {said}" in prose
    of_first = report["differences"]["sge"]["bbox"]["AP"]["images_by_seed"][0]
    assert f"the first alone excluded zero ({shown((of_first['low'], of_first['high']))})" in prose
    assert f"four seeds, whose differences go from {gains.min():+.2f} to {gains.max():+.2f}" in prose
    ratios = [
        stage["all"]["gate_ratio"]["mean"]
        for run in report["pointing"]["sge"].values()
        for stage in run["bbox"].values()
    ]
    assert f"as open beside cards as on them ({min(ratios):.3f} to {max(ratios):.3f} by stage and seed)" in prose
    spreads = [stage["gate"]["spatial_sd"] for run in report["gates"]["sge"].values() for stage in run.values()]
    assert f"move over a map (spread {min(spreads):.2f} to {max(spreads):.2f})" in prose
    (outlook, *_) = from_pilot(ROOT / "docs/results/cards.json")
    assert f"takes {seeds_needed(outlook.design, 1.0, alpha=0.05 / 2)} seeds" in prose


def test_the_zoo_has_the_planned_differences():
    zoo = (ROOT / "MODEL_ZOO.md").read_text(encoding="utf-8")
    for place in PLANNED:
        plain, sge = (np.array(values_of(place)[arm]) for arm in ("plain", "sge"))
        low, high = ttest_1samp(sge - plain, 0).confidence_interval(0.95)
        cells = [
            len(sge),
            f"{plain.mean():.2f}",
            f"{sge.mean():.2f}",
            f"{(sge - plain).mean():+.2f} ({shown((low, high))})",
        ]
        assert f"| {' | '.join(map(str, cells))} |" in zoo


VOC = "<annotation><size><width>{}</width><height>{}</height></size>{}</annotation>"
VOC_BOX = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_sets(folder, *arguments):
    python = [sys.executable, str(ROOT / "docs/results/sets.py")]
    return subprocess.run([*python, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_the_cards_are_written_as_coco(tmp_path):
    """Two of their photographs, with boxes as published; the second has no box that has an extent."""
    for part, boxes in (("train", [("ace", 97, 136, 275, 368), ("nine", 5, 6, 20, 40)]), ("test", [])):
        (tmp_path / "images" / part).mkdir(parents=True)
        for name in ("IMG_1", "cam_2"):
            empty = VOC_BOX.format("king", 4, 4, 4, 9)
            objects = "".join(VOC_BOX.format(*box) for box in boxes) if name == "IMG_1" else empty
            (tmp_path / "images" / part / f"{name}.xml").write_text(VOC.format(378, 504, objects))
            (tmp_path / "images" / part / f"{name}.JPG").write_bytes(part.encode())
    done = write_sets(tmp_path, "cards", "images", "out")
    assert done.returncode == 0, done.stderr
    train = json.loads((tmp_path / "out/train.json").read_bytes())
    assert [(image["id"], image["file_name"]) for image in train["images"]] == [
        (1, "train_IMG_1.JPG"),
        (2, "train_cam_2.JPG"),
    ]
    assert [(entry["image_id"], entry["category_id"], entry["bbox"]) for entry in train["annotations"]] == [
        (1, 6, [97, 136, 178, 232]),
        (1, 1, [5, 6, 15, 34]),
    ]
    assert (tmp_path / "out/images/test_IMG_1.JPG").read_bytes() == b"test"
    (tmp_path / "images/test/cam_2.JPG").unlink()
    done = write_sets(tmp_path, "cards", "images", "again")
    assert "no photograph of that name" in done.stderr and "Traceback" not in done.stderr


def test_the_cells_are_split_as_their_authors_did(tmp_path):
    (tmp_path / "BCCD/Annotations").mkdir(parents=True)
    (tmp_path / "BCCD/ImageSets/Main").mkdir(parents=True)
    for number in range(6):
        text = VOC.format(640, 480, VOC_BOX.format("RBC", 1, 2, 3 + number, 9))
        (tmp_path / f"BCCD/Annotations/B{number}.xml").write_text(text)
    (tmp_path / "BCCD/ImageSets/Main/test.txt").write_text("B1\nB3\n")
    done = write_sets(tmp_path, "bccd", "BCCD", "out")
    assert done.returncode == 0, done.stderr
    ids = {
        name: [image["id"] for image in json.loads((tmp_path / f"out/{name}.json").read_bytes())["images"]]
        for name in ("train", "test", "fit", "val")
    }
    assert ids == {"train": [1, 3, 5, 6], "test": [2, 4], "fit": [1, 3, 6], "val": [5]}
    assert write_sets(tmp_path, "bccd", ".", "out").returncode == 2
    (tmp_path / "BCCD/ImageSets/Main/test.txt").write_text("")
    done = write_sets(tmp_path, "bccd", "BCCD", "again")
    assert done.returncode == 2 and "has no boxes (.xml) of the test images" in done.stderr
