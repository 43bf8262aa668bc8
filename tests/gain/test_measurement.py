import json
import math
import re

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from sge_det import UserError
from sge_det.evaluation.coco import metric_names
from sge_det.gain import compare_results, seed_interval, to_json, welch_interval
from sge_det.gain.gallery import hits, most_different
from sge_det.gain.input import GroundTruth
from sge_det.gain.measurement import measure
from sge_det.gain.parts import Question

CATEGORIES = [{"id": 3, "name": "cup"}, {"id": 7, "name": "spoon"}, {"id": 8, "name": "fork"}]


@pytest.fixture
def truth_file(tmp_path):
    """Twelve images with a small cup and a small spoon each; no fork, nothing large, no masks."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 100, "width": 100} for i in range(12)]
    annotations = []
    for i in range(12):
        for category, x in ((3, 5), (7, 50)):
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": category, "iscrowd": 0}
            annotations.append(entry | {"bbox": [x, 10, 20, 20], "area": 400})
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path


def detections(path, found, **changes):
    """Finds the cups of the first ``found`` images, and all spoons.

    A spoon too many, of the lowest score and so without effect, makes each file's content its own.
    """
    entries = [{"image_id": i, "category_id": 7, "bbox": [50, 10, 20, 20], "score": 0.9} for i in range(12)]
    entries += [{"image_id": i, "category_id": 3, "bbox": [5, 10, 20, 20], "score": 0.8} for i in range(found)]
    unlike = {"image_id": 0, "category_id": 7, "bbox": [0, 90, 1, 1], "score": sum(path.name.encode()) * 1e-9}
    entries.append(unlike)
    entries[5] |= changes
    path.write_text(json.dumps(entries))
    return path


def cup_ap(found):
    """By hand: precision 1 up to the recall found / 12, sampled at 101 recalls."""
    return 100 * (math.floor(100 * found / 12 + 1e-9) + 1) / 101


def test_differences_are_paired_by_seed(truth_file, tmp_path):
    files = {
        "plain": [detections(tmp_path / f"p{i}.json", found) for i, found in enumerate((3, 6))],
        "sge": [detections(tmp_path / f"s{i}.json", found) for i, found in enumerate((6, 8))],
    }
    report = to_json(measure(GroundTruth(truth_file), files, bootstrap=200).report)
    plain, sge = ([cup_ap(found) for found in seeds] for seeds in ((3, 6), (6, 8)))
    cup = report["arms"]["plain"]["bbox"]["AP-cup"]
    assert cup["values"] == pytest.approx(plain)
    assert (cup["mean"], cup["sd"]) == pytest.approx((np.mean(plain), abs(plain[0] - plain[1]) / 2**0.5))
    by_hand = [(b - a) / 2 for a, b in zip(plain, sge)]  # the spoons are the same
    difference = report["differences"]["sge"]["bbox"]["AP"]
    assert difference["values"] == pytest.approx(by_hand)
    assert difference["mean"] == pytest.approx(sum(by_hand) / 2)
    half = 12.706205 * abs(by_hand[0] - by_hand[1]) / 2
    seeds = difference["intervals"]["seeds"]
    assert (seeds["low"], seeds["high"]) == pytest.approx((difference["mean"] - half, difference["mean"] + half))
    assert math.isnan(difference["seed_correlation"])  # of two seeds it would be 1 or -1, whatever they are
    arms = [report["arms"][name]["bbox"]["AP"]["values"] for name in ("plain", "sge")]
    welch = welch_interval(*arms)
    assert difference["intervals"]["welch"] == {"low": welch.low, "high": welch.high}
    for interval, value in zip(difference["images_by_seed"], difference["values"]):
        assert interval["low"] <= value <= interval["high"]
        assert interval["low"] < interval["high"]


def test_intervals_over_images_by_hand(truth_file, tmp_path):
    """Cups: AP is nearly linear in the share of found images, so Student's interval of that share is near."""
    files = {
        "plain": [detections(tmp_path / f"p{i}.json", found) for i, found in enumerate((3, 4, 3))],
        "sge": [detections(tmp_path / f"s{i}.json", found) for i, found in enumerate((8, 8, 7))],
    }
    report = to_json(measure(GroundTruth(truth_file), files, bootstrap=2000).report)
    difference = report["differences"]["sge"]["bbox"]["AP-cup"]
    # images found by sge alone, as shares of the seeds
    gained = np.array([0, 0, 0, 2 / 3, 1, 1, 1, 2 / 3, 0, 0, 0, 0]) * 100
    images = seed_interval(gained)
    assert difference["mean"] == pytest.approx(gained.mean(), abs=1)
    assert tuple(difference["intervals"]["images"].values()) == pytest.approx((images.low, images.high), abs=2.5)
    alone = seed_interval(difference["values"])
    both = difference["intervals"]["both"]
    assert alone.half_width < (both["high"] - both["low"]) / 2
    assert (both["low"] + both["high"]) / 2 == pytest.approx(difference["mean"])
    again = to_json(measure(GroundTruth(truth_file), files, bootstrap=2000).report)
    assert again["differences"]["sge"]["bbox"]["AP-cup"] == difference
    without = to_json(measure(GroundTruth(truth_file), files, bootstrap=0).report)
    kept = without["differences"]["sge"]["bbox"]["AP-cup"]["intervals"]
    assert (kept["images"], kept["both"]) == (None, None)
    assert kept["seeds"] == difference["intervals"]["seeds"]


def test_undefined_metrics_have_no_interval(truth_file, tmp_path):
    files = {name: [detections(tmp_path / f"{name}.json", found)] for name, found in (("plain", 3), ("sge", 6))}
    report = to_json(measure(GroundTruth(truth_file), files, bootstrap=200).report)
    for absent in ("APl", "AP-fork"):
        assert math.isnan(report["arms"]["sge"]["bbox"][absent]["mean"])
        assert report["differences"]["sge"]["bbox"][absent]["images_by_seed"] == [None]
        assert set(report["differences"]["sge"]["bbox"][absent]["intervals"].values()) == {None}
    absent = compare_results(truth_file, files, tmp_path / "out", bootstrap=0, question=Question("APl")).report
    assert "box APl is absent" in absent.verdict
    assert not re.search(
        r"\bnan\b", (tmp_path / "out/report.md").read_text() + (tmp_path / "out/report.html").read_text()
    )


def compared(truth_file, folder, arms, **options):
    """The report on arms that find the cups of so many images by seed."""
    files = {
        name: [detections(folder / f"{name}{i}.json", number) for i, number in enumerate(found)]
        for name, found in arms.items()
    }
    return to_json(measure(GroundTruth(truth_file), files, **options).report)


@pytest.mark.parametrize(
    ("plain", "sge", "outcome", "words"),
    [
        ((0, 1, 0), (12, 11, 12), "gain", "zero is excluded, a gain (p 0.0"),
        ((12, 11, 12), (0, 1, 0), "loss", "zero is excluded, a loss (p 0.0"),
        ((2, 2), (8, 8), "undecided", "without a spread there is no interval"),
        ((5, 6, 6), (6, 8, 5), "undecided", "undecided: neither zero (p 0."),
        ((3,), (6,), "undecided", "seed noise was not measured"),
        ((3, 4), (6, 9), "undecided", "Two seeds tell next to nothing"),
    ],
)
def test_verdict(truth_file, tmp_path, plain, sge, outcome, words):
    report = compared(truth_file, tmp_path, {"plain": plain, "sge": sge}, bootstrap=400)
    (verdict,) = report["verdicts"]
    assert (verdict["outcome"], verdict["primary"], verdict["metric"]) == (outcome, True, "AP")
    assert words in report["verdict"]
    mean = np.mean([cup_ap(b) - cup_ap(a) for a, b in zip(plain, sge)]) / 2
    if 0 not in (*plain, *sge):
        assert f"sge - plain = {mean:+.2f} box AP" in report["verdict"]
    assert "attention" not in report["verdict"]


def test_a_verdict_stands_on_new_images_too(truth_file, tmp_path):
    """Seeds alone leave zero out, for these twelve images; what two images of twelve gain does not hold for others."""
    report = compared(truth_file, tmp_path, {"plain": (5, 6, 6, 6), "sge": (7, 8, 8, 7)}, bootstrap=400)
    intervals = report["differences"]["sge"]["bbox"]["AP"]["intervals"]
    assert intervals["seeds"]["low"] > 0 > intervals["both"]["low"]
    assert report["verdicts"][0]["outcome"] == "undecided"
    without = compared(truth_file, tmp_path, {"plain": (5, 6, 6, 6), "sge": (7, 8, 8, 7)}, bootstrap=0)
    assert without["verdicts"][0]["outcome"] == "undecided"
    assert "without --bootstrap nothing is known of new images" in without["verdict"]


def test_the_pairing_that_was_declared_decides(truth_file, tmp_path):
    """Seeds that rise and fall together: paired, the difference is steady, unpaired it drowns."""
    arms = {"plain": (1, 6, 3, 9), "sge": (3, 8, 6, 12)}
    paired, welch = (
        compared(truth_file, tmp_path, arms, bootstrap=400, question=Question(paired=paired))
        for paired in (True, False)
    )
    difference = paired["differences"]["sge"]["bbox"]["AP-cup"]
    values = [[cup_ap(found) for found in arms[name]] for name in arms]
    assert difference["seed_correlation"] == pytest.approx(np.corrcoef(values)[0, 1])
    other = welch["differences"]["sge"]["bbox"]["AP-cup"]
    assert other["intervals"]["seeds"] == difference["intervals"]["seeds"]
    assert other["intervals"]["welch"] == difference["intervals"]["welch"]
    width = {
        name: found["intervals"]["both"]["high"] - found["mean"]
        for name, found in (("paired", difference), ("welch", other))
    }
    assert width["paired"] < 0.7 * width["welch"]
    assert (paired["question"]["paired"], welch["question"]["paired"]) == (True, False)


def test_arms_are_corrected_together(truth_file, tmp_path):
    """Holm by hand: the smaller p-value counts twice, the larger at least as much."""
    arms = {"plain": (1, 2, 1), "sge": (8, 11, 9), "se": (7, 11, 11)}
    together = compared(truth_file, tmp_path, arms, bootstrap=400)["verdicts"]
    alone = [
        compared(truth_file, tmp_path, {"plain": arms["plain"], name: arms[name]}, bootstrap=400)["verdicts"][0]["p"]
        for name in ("sge", "se")
    ]
    small, large = sorted(alone)
    expected = {small: min(1, 2 * small), large: max(2 * small, large)}
    assert [verdict["p"] for verdict in together] == pytest.approx([expected[p] for p in alone])
    assert all(
        "Holm's correction for 2 arms" in verdict["sentence"] or verdict["outcome"] == "undecided"
        for verdict in together
    )


def test_the_metric_that_is_declared_is_the_one_that_counts(truth_file, tmp_path):
    arms = {"plain": (3, 6, 5), "sge": (6, 8, 9)}
    report = compared(truth_file, tmp_path, arms, bootstrap=200, question=Question(metric="AP-cup"))
    (verdict,) = report["verdicts"]
    assert verdict["metric"] == "AP-cup" and verdict["primary"]
    with pytest.raises(UserError, match="--metric AP60 is none of AP, AP50"):
        compared(truth_file, tmp_path, arms, bootstrap=200, question=Question(metric="AP60"))


def test_power_is_that_of_the_noise_that_was_measured(truth_file, tmp_path):
    """A true difference as large as the interval's half width is seen in half of all repetitions, a little more often
    with few degrees of freedom, whose factor falls with the error that is found."""
    arms = {"plain": (3, 6, 5), "sge": (6, 8, 9)}
    found = compared(truth_file, tmp_path, arms, bootstrap=400)["differences"]["sge"]["bbox"]["AP"]
    half = found["intervals"]["both"]["high"] - found["mean"]
    for factor, low, high in ((1, 0.5, 0.7), (0.2, 0.05, 0.15), (3, 0.95, 1)):
        question = Question(difference=factor * half)
        report = compared(truth_file, tmp_path, arms, bootstrap=400, question=question)
        seen = report["verdicts"][0]["power"]
        assert low < seen["probability"] <= high
        assert (seen["more_seeds"] == 0) is (seen["probability"] >= 0.8)
        assert f"would have been seen with probability {seen['probability']:.2f}" in report["verdict"]


def test_arms_that_get_nothing_right_are_told(truth_file, tmp_path):
    far = [{"image_id": 0, "category_id": 7, "bbox": [0, 90, 1, 1], "score": score / 10} for score in range(1, 5)]
    files = {name: [] for name in ("plain", "sge")}
    for place, entry in enumerate(far):
        path = tmp_path / f"{place}.json"
        path.write_text(json.dumps([entry]))
        files["plain" if place % 2 else "sge"].append(path)
    report = to_json(measure(GroundTruth(truth_file), files, bootstrap=200).report)
    assert report["verdicts"][0]["outcome"] == "undecided"
    assert "Neither gets anything right that counts here" in report["verdict"]
    assert "has detections for 1 of the 12 images" in report["verdict"]


def test_detectors_that_are_the_same_on_every_draw_of_the_images_are_told(truth_file, tmp_path):
    """The same runs in another order: there are images enough, and none of them makes a difference."""
    runs = [detections(tmp_path / f"{i}.json", found) for i, found in enumerate((3, 6, 8))]
    report = to_json(
        measure(GroundTruth(truth_file), {"plain": runs, "sge": runs[1:] + runs[:1]}, bootstrap=200).report
    )
    assert report["verdicts"][0]["outcome"] == "undecided"
    assert "the mean difference is the same whichever images are drawn" in report["verdict"]
    assert "too few images" not in report["verdict"]


def test_an_annotation_of_id_0_is_told_and_counts(truth_file, tmp_path):
    """pycocotools takes a match to it for none: one of the twelve cups would be missed."""
    content = json.loads(truth_file.read_text())
    for entry in content["annotations"]:
        entry["id"] -= 1
    zero = tmp_path / "zero.json"
    zero.write_text(json.dumps(content))
    files = {"plain": [detections(tmp_path / "p.json", 3)], "sge": [detections(tmp_path / "s.json", 6)]}
    report, usual = (to_json(measure(GroundTruth(path), files, bootstrap=0).report) for path in (zero, truth_file))
    note = "An annotation has the id 0: pycocotools counts a match to it as none, here it is one."
    assert (note in report["notes"], note in report["verdict"], note in usual["verdict"]) == (True, True, False)
    for arm, found in report["arms"].items():
        assert found["bbox"]["AP"]["values"] == usual["arms"][arm]["bbox"]["AP"]["values"]


def test_few_samples_of_the_images_are_refused(truth_file, tmp_path):
    for samples in (-1, 1, 199):
        with pytest.raises(UserError, match=f"--bootstrap {samples} is too few"):
            compared(truth_file, tmp_path, {"plain": (3,), "sge": (6,)}, bootstrap=samples)


def test_one_file_is_no_two_seeds(truth_file, tmp_path):
    a, b = detections(tmp_path / "a.json", 3), detections(tmp_path / "b.json", 6)
    copy = tmp_path / "copy.json"
    copy.write_bytes(a.read_bytes())
    for files in ([a, a], [a, copy]):
        with pytest.raises(UserError, match="have the same content, so they are one run and not two seeds"):
            measure(GroundTruth(truth_file), {"plain": files, "sge": [b, tmp_path / "x.json"]}, bootstrap=0)
    report = to_json(measure(GroundTruth(truth_file), {"plain": [a], "sge": [copy]}, bootstrap=0).report)
    assert "copy.json of sge has the same content as" in report["verdict"]


@pytest.mark.parametrize(("spread", "constant"), [(0.001, True), (0.08, False)])
def test_verdict_knows_constant_gates(truth_file, tmp_path, spread, constant):
    files = {"plain": [detections(tmp_path / "p.json", 3)], "sge": [detections(tmp_path / "s.json", 6)]}
    stage = {"gamma": {}, "beta": {}, "gate": {"mean": 0.731, "sd": spread, "spatial_sd": spread}}
    gates = {"sge": {0: {"res2": stage, "res3": stage | {"gate": {"mean": 0.7, "sd": 0.2, "spatial_sd": 0.0}}}}}
    report = to_json(measure(GroundTruth(truth_file), files, bootstrap=0, gates=gates).report)
    assert ("cannot come from attention" in report["verdict"]) is constant


def test_constant_gates_of_the_reference_and_of_some_seeds_are_told(truth_file, tmp_path):
    def stages(spread):
        return {"res2": {"gamma": {}, "beta": {}, "gate": {"mean": 0.731, "sd": 0.1, "spatial_sd": spread}}}

    gates = {"plain": {0: stages(0.001), 1: stages(0.002)}, "sge": {0: stages(0.2), 1: stages(0.003)}}
    lines = compared(truth_file, tmp_path, {"plain": (3, 4), "sge": (6, 8)}, bootstrap=0, gates=gates)["verdict"]
    assert "The gates of plain hardly vary over a map (standard deviation 0.0020 at most, mean 0.731): the ref" in lines
    assert "The gates of sge with seed 1 hardly vary over a map (standard deviation 0.0030 at most" in lines


def test_bad_files_are_named(truth_file, tmp_path):
    good = detections(tmp_path / "good.json", 3)
    cut = tmp_path / "cut.json"
    cut.write_text(good.read_text()[:100])
    folder = tmp_path / "object.json"
    folder.write_text("{}")
    for bad, words in ((cut, "not JSON"), (folder, "must be a list"), (tmp_path / "no.json", "no result file")):
        with pytest.raises(UserError, match=words):
            compare_results(truth_file, {"a": [good], "b": [bad]}, tmp_path / "out")
    for bad, words in (
        (tmp_path / "no.json", "no annotation file"),
        (folder, "instance format"),
        (cut, "not JSON"),
    ):
        with pytest.raises(UserError, match=words):
            compare_results(bad, {"a": [good], "b": [good]}, tmp_path / "out")
    with pytest.raises(UserError, match="b has 1 result files and a has 2"):
        compare_results(truth_file, {"a": [good, good], "b": [good]}, tmp_path / "out")
    with pytest.raises(UserError, match="two arms"):
        compare_results(truth_file, {"a": [good]}, tmp_path / "out")


def test_an_empty_file_is_a_detector_without_detections(tmp_path):
    """It scores 0 in whatever the other files hold, boxes and masks."""
    square = [[10, 10, 30, 10, 30, 30, 10, 30]]
    box = {"image_id": 1, "category_id": 3, "bbox": [10, 10, 20, 20]}
    truth = {"images": [{"id": 1, "file_name": "1.jpg", "height": 100, "width": 100}], "categories": CATEGORIES}
    truth["annotations"] = [box | {"id": 1, "area": 400, "iscrowd": 0, "segmentation": square}]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    rle = mask_utils.merge(mask_utils.frPyObjects(square, 100, 100))
    found = box | {"score": 0.9, "segmentation": rle | {"counts": rle["counts"].decode()}}
    for name, entries in (("none", []), ("some", [found]), ("boxes", [box | {"score": 0.9}])):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    none, some, boxes = (tmp_path / f"{name}.json" for name in ("none", "some", "boxes"))
    report = to_json(
        measure(GroundTruth(tmp_path / "truth.json"), {"a": [none, some], "b": [some, none]}, bootstrap=0).report
    )
    assert report["tasks"] == ["bbox", "segm"]
    for task in report["tasks"]:
        assert report["arms"]["a"][task]["AP"]["values"] == pytest.approx([0, 100])
        assert report["arms"]["b"][task]["AP"]["values"] == pytest.approx([100, 0])
    with pytest.raises(UserError, match=r"boxes\.json has no masks, but others have"):
        measure(GroundTruth(tmp_path / "truth.json"), {"a": [some], "b": [boxes]}, bootstrap=0)


def test_the_gallery_takes_the_images_that_differ_in_the_mean_and_the_seed_that_shows_it(truth_file):
    truth = GroundTruth(truth_file)
    same = dict.fromkeys(range(12), 0.5)
    scores = {
        "plain": [same | {3: 0.0, 4: 1.0, 5: 1.0}, same | {3: 0.4, 4: 1.0, 5: 0.0}],
        # image 3: +0.2 and +0.6; image 4: -1 and -0.5; image 5: -1 and +1, no difference in the mean
        "sge": [same | {3: 0.2, 4: 0.0, 5: 0.0}, same | {3: 1.0, 4: 0.5, 5: 1.0}],
    }
    assert most_different(scores["plain"], scores["sge"], truth, 2) == [(4, 0), (3, 1)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bbox": None}, "four finite numbers"),
        ({"image_id": 99}, "image 99, which is not among the images"),
        ({"category_id": 1}, "category 1, which is not among the categories"),
        ({"id": 2}, "ids of annotations are not unique"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"has the size \[9, 9\], its image \[100, 100\]"),
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, "not of polygons"),
    ],
)
def test_bad_ground_truth_is_named(truth_file, changes, words):
    content = json.loads(truth_file.read_text())
    content["annotations"][0] |= changes
    truth_file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        GroundTruth(truth_file)


def test_categories_of_one_name_are_told_apart(truth_file, tmp_path):
    content = json.loads(truth_file.read_text())
    content["categories"][1]["name"] = "cup"
    truth_file.write_text(json.dumps(content))
    files = {name: [detections(tmp_path / f"{name}.json", found)] for name, found in (("a", 3), ("b", 6))}
    scores = to_json(measure(GroundTruth(truth_file), files, bootstrap=0).report)["arms"]["a"]["bbox"]
    assert scores["AP-cup 3"]["mean"] == pytest.approx(cup_ap(3))
    assert scores["AP-cup 7"]["mean"] == pytest.approx(100)
    assert "AP-fork" in scores and "AP-cup" not in scores


def test_categories_whose_names_are_those_that_told_others_apart(truth_file):
    content = json.loads(truth_file.read_text())
    content["categories"] = [{"id": 3, "name": "cup"}, {"id": 7, "name": "cup"}, {"id": 9, "name": "cup 3"}]
    names = metric_names(content["categories"])[-3:]
    assert names == ["AP-cup 3 3", "AP-cup 7", "AP-cup 3 9"]


def test_hits_meet_each_object_once():
    objects = [{"category_id": 1, "bbox": [0, 0, 10, 10]}, {"category_id": 1, "bbox": [50, 0, 40, 40], "iscrowd": 1}]
    found = [
        {"category_id": 1, "bbox": [1, 0, 10, 10], "score": 0.6},  # second best for the object
        {"category_id": 1, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"category_id": 2, "bbox": [0, 0, 10, 10], "score": 0.9},  # another category
        {"category_id": 1, "bbox": [60, 10, 5, 5], "score": 0.5},  # in the crowd
        {"category_id": 1, "bbox": [70, 10, 5, 5], "score": 0.4},  # in the crowd too
        {"category_id": 1, "bbox": [20, 60, 5, 5], "score": 0.4},
    ]
    assert hits(found, objects) == [False, True, False, True, True, False]
    assert hits(found, []) == [False] * 6
