"""Where a difference comes from: hand-computed kinds of errors, calibration and confusion, and their intervals."""

import json
import math
import re

import hotcoco
import numpy as np
import pytest
from scipy import stats

from sge_det.evaluation.coco import evaluate_detections
from sge_det.evaluation.error_kinds import errors_of
from sge_det.gain import compare_results, to_json

IMAGES, CUP, SPOON = 10, 3, 7
PLACES = {CUP: [5, 10, 20, 20], SPOON: [50, 10, 20, 20]}


@pytest.fixture
def truth_file(tmp_path):
    """Ten images with a cup and a spoon each; no fork."""
    names = ((CUP, "cup"), (SPOON, "spoon|x"), (8, "fork"))
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(IMAGES)],
        "categories": [{"id": key, "name": name} for key, name in names],
        "annotations": [
            {"id": 2 * i + n + 1, "image_id": i, "category_id": key, "bbox": box, "area": 400, "iscrowd": 0}
            for i in range(IMAGES)
            for n, (key, box) in enumerate(PLACES.items())
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path


def detection(image, category, box=None, score=0.9):
    return {"image_id": image, "category_id": category, "bbox": box or PLACES[category], "score": score}


def perfect():
    return [detection(i, category) for i in range(IMAGES) for category in PLACES]


def errors(truth_file, found):
    return errors_of(evaluate_detections(hotcoco.COCO(str(truth_file)), found, "bbox"))


def lost(found):
    """AP50 that is lost, where so many of ten objects of one of two categories are found: COCO's 101 recalls."""
    return (100 - 100 * np.mean(np.linspace(0, 1, 101) <= found / 10)) / 2


def test_perfect_detections_have_no_errors_but_of_their_scores(truth_file):
    found = errors(truth_file, perfect())
    kinds = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN")
    assert [found.figures[kind] for kind in kinds] == pytest.approx([0] * 8)
    assert (found.figures["ECE"], found.figures["MCE"]) == pytest.approx((10, 10))  # 0.9 sure, always right
    shares = {name: found.figures[name] for name in ("found", "confused", "unfound", "background")}
    assert shares == pytest.approx({"found": 100, "confused": 0, "unfound": 0, "background": 0})
    assert (found.confusion[:2] == 0).all()
    assert np.isnan(found.confusion[2, :2]).all()


def test_missed_objects(truth_file):
    found = errors(truth_file, [d for d in perfect() if d["category_id"] == CUP or d["image_id"] >= 3])
    assert found.figures["Miss"] == pytest.approx(lost(7))
    assert found.figures["FN"] == pytest.approx(lost(7))
    assert [found.figures[kind] for kind in ("Cls", "Loc", "Both", "Dupe", "Bkg")] == pytest.approx([0] * 5)
    assert (found.figures["found"], found.figures["unfound"]) == pytest.approx((85, 15))


def test_badly_placed_detections(truth_file):
    """IoU 10 / 30 with the spoon: too little to find it, too much for background."""
    moved = [
        d | {"bbox": [60, 10, 20, 20]} if d["category_id"] == SPOON and d["image_id"] < 3 else d for d in perfect()
    ]
    found = errors(truth_file, moved)
    assert found.figures["Loc"] > 5
    assert [found.figures[kind] for kind in ("Cls", "Both", "Dupe", "Bkg")] == pytest.approx([0] * 4)
    # of ten spoons and their detections three are wrong, all with a score of 0.9; of all 20 detections 17 are right
    assert found.figures["ECE"] == pytest.approx(abs(90 - 85))


def test_confusion_by_hand(truth_file):
    taken = [d | {"category_id": CUP} if d["category_id"] == SPOON and d["image_id"] < 4 else d for d in perfect()]
    taken += [detection(0, CUP, [70, 70, 20, 20]), detection(1, CUP, [70, 70, 20, 20], score=0.4)]  # not confident
    found = errors(truth_file, taken)
    assert found.confusion[1, 0] == pytest.approx(40)
    assert found.confusion[0, 1] == 0
    assert found.figures["confused"] == pytest.approx(100 * 4 / 20)
    assert found.figures["found"] == pytest.approx(100 * 16 / 20)
    assert found.figures["background"] == pytest.approx(100 * 1 / 21)
    assert found.figures["Cls"] > 0


def test_no_detection_at_all(truth_file):
    found = errors(truth_file, []).figures
    assert found["unfound"] == 100
    assert math.isnan(found["ECE"]) and math.isnan(found["background"])


def test_scores_that_are_no_shares_have_no_calibration(truth_file):
    """Logits: AP, and with it TIDE, goes by their order alone."""
    found = [detection(i, category, score=4.0 - i) for i in range(IMAGES) for category in PLACES]
    figures = errors(truth_file, found).figures
    assert math.isnan(figures["ECE"]) and math.isnan(figures["MCE"])
    assert (figures["Miss"], figures["found"]) == (pytest.approx(0), 40)  # four images have scores of 0.5 or more


def test_differences_have_intervals_over_the_seeds(truth_file, tmp_path):
    def file(name, missed, taken):
        entries = [d for d in perfect() if not (d["category_id"] == SPOON and d["image_id"] < missed)]
        for entry in entries:
            if entry["category_id"] == SPOON and entry["image_id"] >= IMAGES - taken:
                entry["category_id"] = CUP
        entries.append(detection(0, CUP, [90, 90, 1, 1], score=sum(name.encode()) * 1e-9))
        (tmp_path / name).write_text(json.dumps(entries))
        return tmp_path / name

    seeds = {"plain": [(3, 1), (4, 1), (2, 2)], "sge": [(1, 2), (3, 3), (0, 5)]}
    files = {arm: [file(f"{arm}{n}.json", *numbers) for n, numbers in enumerate(runs)] for arm, runs in seeds.items()}
    report = to_json(compare_results(truth_file, files, tmp_path / "out", bootstrap=0).report)
    missed = {arm: [100 * a / 20 for a, _ in runs] for arm, runs in seeds.items()}
    taken = {arm: [100 * b / 10 for _, b in runs] for arm, runs in seeds.items()}
    origins = report["origins"]
    assert origins["arms"]["sge"]["bbox"]["unfound"]["values"] == pytest.approx(missed["sge"])
    difference = origins["differences"]["sge"]["bbox"]["unfound"]
    expected = stats.ttest_rel(missed["sge"], missed["plain"]).confidence_interval(0.95)
    assert difference["mean"] == pytest.approx(np.mean(missed["sge"]) - np.mean(missed["plain"]))
    assert (difference["interval"]["low"], difference["interval"]["high"]) == pytest.approx(tuple(expected))
    (pair,) = origins["confusions"]["sge"]["bbox"]
    assert (pair["category"], pair["taken_for"]) == ("spoon|x", "cup")
    assert (pair["reference"], pair["arm"]) == pytest.approx((np.mean(taken["plain"]), np.mean(taken["sge"])))
    expected = stats.ttest_rel(taken["sge"], taken["plain"]).confidence_interval(0.95)
    assert (pair["interval"]["low"], pair["interval"]["high"]) == pytest.approx(tuple(expected))

    written = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)
    assert written["origins"]["confusions"]["sge"]["bbox"][0]["mean"] == pytest.approx(pair["mean"])
    text = (tmp_path / "out/report.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| objects not found "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    low, high = difference["interval"]["low"], difference["interval"]["high"]
    assert cells[1:] == ["15.00", "6.67", f"{difference['mean']:+.2f}", f"{low:+.2f} to {high:+.2f}"]
    assert r"spoon\|x" in text
    page = (tmp_path / "out/report.html").read_text()
    assert "Where the difference comes from" in page
    assert re.search(r"<td>spoon\|x</td><td>cup</td>", page)


def test_one_seed_has_no_interval(truth_file, tmp_path):
    files = {}
    for name, found in (("plain", perfect()[:12]), ("sge", perfect())):
        files[name] = [tmp_path / f"{name}.json"]
        files[name][0].write_text(json.dumps(found))
    report = to_json(compare_results(truth_file, files, tmp_path / "out", bootstrap=0).report)
    difference = report["origins"]["differences"]["sge"]["bbox"]["unfound"]
    assert (difference["mean"], difference["interval"]) == (pytest.approx(-40), None)
