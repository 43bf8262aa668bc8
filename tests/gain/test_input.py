import json
import math

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from sge_det import UserError
from sge_det.data.annotations import rle_counts
from sge_det.gain import compare_results
from sge_det.gain.input import GroundTruth

SIZE = (30, 40)


@pytest.fixture
def truth_file(tmp_path):
    """Four images with a cup each."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]} for i in range(4)]
    entry = {"category_id": 3, "iscrowd": 0, "bbox": [5, 10, 20, 10], "area": 200}
    content = {"images": images, "categories": [{"id": 3, "name": "cup"}]}
    content["annotations"] = [entry | {"id": i + 1, "image_id": i} for i in range(4)]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content))
    return path


def results(**changes):
    entries = [{"image_id": i, "category_id": 3, "bbox": [5, 10, 20, 10], "score": 0.9 - i / 10} for i in range(4)]
    entries[2] |= changes
    return entries


def rle(counts):
    return {"size": list(SIZE), "counts": counts}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_id": 99}, "image 99 is not in the ground truth"),
        ({"image_id": True}, "the image_id True is not a whole number"),
        ({"image_id": "2"}, "the image_id '2' is not a whole number"),
        ({"image_id": [2]}, "the image_id .* is not a whole number"),
        ({"image_id": 2.0}, "the image_id 2.0 is not a whole number"),
        ({"category_id": 1}, "category 1 is not in the ground truth"),
        ({"category_id": True}, "the category_id True is not a whole number"),
        ({"score": math.nan}, "the score is not a finite number"),
        ({"score": math.inf}, "the score is not a finite number"),
        ({"score": True}, "the score True is not a number"),
        ({"score": None}, "the score None is not a number"),
        ({"score": "0.5"}, "the score '0.5' is not a number"),
        ({"score": int("9" * 400)}, "the score 9+... is not a number"),
        ({"bbox": [0, 0, -4, 5]}, "negative width or height"),
        ({"bbox": [0, 0, math.inf, 5]}, "not four finite numbers"),
        ({"bbox": [0, 0, 5]}, "not four numbers"),
        ({"bbox": ["0", "0", "5", "5"]}, "not four numbers"),
        ({"bbox": [[1, 2], [3, 4]]}, "not four numbers"),
        ({"bbox": [True, 0, 5, 5]}, "not four numbers"),
        ({"bbox": None}, "not four numbers"),
        ({"bbox": {"x": 1}}, "not four numbers"),
        ({"segmentation": 5}, "its mask is neither"),
        ({"segmentation": []}, "but not of polygons"),
        ({"segmentation": [["1", "2", "3", "4", "5", "6"]]}, "but not of polygons"),
        ({"segmentation": [[1, 2, 3, 4]]}, "but not of polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "but not of polygons"),
        ({"segmentation": [[1, 2, 3, 4, 5, math.nan]]}, "but not of polygons"),
        ({"segmentation": {"size": [9, 9], "counts": "1"}}, r"has the size \[9, 9\], its image \[30, 40\]"),
        ({"segmentation": {"size": [True, 40], "counts": "1"}}, "has the size"),
        ({"segmentation": rle([-5, 1e9])}, "not whole numbers from 0"),
        ({"segmentation": rle([-5, 1205])}, "not whole numbers from 0"),
        ({"segmentation": rle([5, 5])}, "do not add up to the 1200 pixels"),
        ({"segmentation": rle("")}, "not COCO's compressed RLE"),
        ({"segmentation": rle("garbage!!")}, "not COCO's compressed RLE"),
        ({"segmentation": rle("o" * 40)}, "not COCO's compressed RLE"),
        ({"segmentation": rle("15")}, "do not add up to the 1200 pixels"),
    ],
)
def test_bad_detections_are_named(truth_file, tmp_path, changes, words):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text(json.dumps(results()))
    bad.write_text(json.dumps(results(**changes)))
    with pytest.raises(UserError, match=r"bad.json, detection 2.*" + words) as error:
        compare_results(truth_file, {"plain": [good], "sge": [bad]}, tmp_path / "out", bootstrap=0)
    assert len(str(error.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "detection 0: it is 1, not an object"),
        ('[{"image_id": 1}]', "it lacks 'category_id'"),
        ("9" * 5000, "is not JSON|must be a list"),
        ("null", "must be a list"),
    ],
)
def test_what_is_no_result_file_is_told(truth_file, tmp_path, text, words):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        GroundTruth(truth_file).read_detections(path)


def test_run_lengths_are_those_of_pycocotools():
    generator = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 0.98, 1.0):
        for size in (SIZE, (1, 1), (300, 500)):
            mask = np.asfortranarray(generator.random(size) < share)
            mask[: size[0] // 2] = False
            flat = mask.ravel(order="F")
            changes = np.flatnonzero(np.diff(flat, prepend=False))
            by_hand = np.diff(np.concatenate([[0], changes, [flat.size]]))
            found = rle_counts(mask_utils.encode(mask.astype(np.uint8))["counts"].decode())
            assert found.sum() == flat.size
            assert found[: len(by_hand)].tolist() == by_hand.tolist()


def scaled(entries, scale):
    return [entry | {"bbox": [value * scale for value in entry["bbox"]]} for entry in entries]


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (results(), None),
        ([], "holds no detection at all"),
        (results()[:1], "has detections for 1 of the 4 images"),
        (results() * 2, "4 of the 8 detections of it are given twice"),
        (scaled(results(), 1 / 50), "look normalised"),
        ([*results(), results()[0] | {"score": 0.1}], None),
        ([entry | {"bbox": [20, 12, 38, 28]} for entry in results()], "look like corners x1, y1, x2, y2"),
        (results(score=55.0), "has scores from 0.6 to 55"),
    ],
)
def test_what_is_suspected_is_told_and_no_more(truth_file, entries, words):
    found = GroundTruth(truth_file).suspicions("it", entries)
    if words is None:
        assert found == []
    else:
        assert len(found) == 1 and words in found[0]


def test_checks_come_before_the_work(truth_file, tmp_path):
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    good.write_text(json.dumps(results()))
    other.write_text(json.dumps(results(score=0.05)))
    arms = {"plain": [good], "sge": [other]}
    with pytest.raises(UserError, match=r"--images .*no: there is no such folder"):
        compare_results(tmp_path / "absent.json", arms, tmp_path / "out", image_root=tmp_path / "no")
    for output in (good, good / "deeper"):
        with pytest.raises(UserError, match="is a file; name a folder"):
            compare_results(tmp_path / "absent.json", arms, output)
    with pytest.raises(UserError, match="--against mine: there is no such arm"):
        compare_results(tmp_path / "absent.json", arms, tmp_path / "out", against="mine")
    for name in ("", " ", "a\nb"):
        with pytest.raises(UserError, match="cannot be shown"):
            compare_results(truth_file, {"plain": [good], name: [other]}, tmp_path / "out", bootstrap=0)


def test_images_by_metric_are_counted_by_hand(truth_file):
    content = json.loads(truth_file.read_text())
    content["categories"].append({"id": 5, "name": "fork"})
    large = {"bbox": [0, 0, 40, 30], "area": 9999}
    content["annotations"] += [
        large | {"id": 10, "image_id": 0, "category_id": 5, "iscrowd": 0},
        large | {"id": 11, "image_id": 0, "category_id": 3, "iscrowd": 0},
        # a crowd is no object
        large | {"id": 12, "image_id": 1, "category_id": 5, "iscrowd": 1},
    ]
    content["images"].append(content["images"][0] | {"id": 4, "file_name": "empty.jpg"})
    truth_file.write_text(json.dumps(content))
    assert GroundTruth(truth_file).images_by_metric() == {
        **dict.fromkeys(("AP", "AP50", "AP75", "APs", "AR100", "AP-cup"), 4),
        **{"APm": 0, "APl": 1, "AP-fork": 1},
    }


def test_a_lost_gallery_costs_the_gallery(truth_file, tmp_path):
    """The folder is there, its images are not."""
    good, other = tmp_path / "good.json", tmp_path / "other.json"
    good.write_text(json.dumps(results()))
    other.write_text(json.dumps(results()[:2]))
    (tmp_path / "images").mkdir()
    compare_results(
        truth_file,
        {"a": [good], "b": [other]},
        tmp_path / "out",
        bootstrap=0,
        image_root=tmp_path / "images",
        against="b",
    )
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["reference"] == "b" and list(report["differences"]) == ["a"]
    assert "The gallery of a could not be drawn" in (tmp_path / "out/report.html").read_text()
    lines = (tmp_path / "out/metrics.csv").read_text().splitlines()
    assert "a,bbox,AP,0,100.0" in lines and "a,bbox,APl,0," in lines
