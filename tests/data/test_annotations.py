"""What tools export is taken in, and what would harm is refused by its name, before any compiled code sees it."""

import codecs
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from exports import EXPORTERS, roboflow
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sge_det import UserError
from sge_det.analysis.pointing import Objects
from sge_det.data.annotations import mask_fault, read_annotations
from sge_det.data.datasets import register_dataset
from sge_det.engine.doctor.data import examine_dataset
from sge_det.evaluation.coco import evaluate_detections
from sge_det.gain.input import GroundTruth


@pytest.fixture
def content(sample):
    return json.loads((sample / "annotations/instances_train.json").read_text())


@pytest.fixture
def write(tmp_path):
    def write(content, name="annotations.json"):
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    return write


@pytest.fixture
def forget():
    names = []
    yield names.append
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


@pytest.mark.parametrize("export", EXPORTERS, ids=lambda export: export.__name__)
def test_exports_are_taken_in(content, write, sample, export, forget):
    path = write(export(content))
    forget("exported")
    register_dataset("exported", str(path), str(sample / "train"))
    assert [finding for finding in examine_dataset("exported") if finding.severity == "error"] == []
    objects = sum(not entry["iscrowd"] for entry in content["annotations"])
    dicts = DatasetCatalog.get("exported")
    assert len(dicts) == len(content["images"])
    taken = [entry for example in dicts for entry in example["annotations"] if not entry.get("iscrowd")]
    expected = len(content["annotations"]) if export is roboflow else objects
    assert len(taken) == expected
    truth = GroundTruth(path)
    assert len(truth.annotations) == len(content["annotations"])
    first = next(entry for entry in truth.annotations if not entry["iscrowd"])
    assert Objects(path).has_any(first["image_id"])


@pytest.mark.parametrize("export", EXPORTERS, ids=lambda export: export.__name__)
def test_exports_have_pycocotools_metrics(content, write, export):
    path = write(export(content))
    truth = GroundTruth(path)
    rng = np.random.default_rng(0)
    results = [
        {
            **{key: entry[key] for key in ("image_id", "category_id")},
            "bbox": (np.array(entry["bbox"]) + rng.normal(0, 2, 4)).clip(0.1).tolist(),
            "score": float(rng.uniform()),
        }
        for entry in truth.annotations
    ]
    ours = evaluate_detections(truth.coco, results, "bbox").stats
    exported = json.loads(path.read_text())
    for entry in exported["annotations"]:
        entry["id"] += 1  # a match with the annotation 0 counts as none in pycocotools
    theirs = COCO(str(write(exported, "from_1.json")))
    evaluation = COCOeval(theirs, theirs.loadRes([dict(result) for result in results]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    np.testing.assert_allclose(ours[:12], evaluation.stats, atol=1e-9)


def test_what_a_byte_order_mark_or_gzip_hides_is_read(content, tmp_path, sample, forget):
    text = json.dumps(content).encode()
    for name, data in (("bom.json", codecs.BOM_UTF8 + text), ("a.json.gz", gzip.compress(text))):
        (tmp_path / name).write_bytes(data)
        forget(name)
        found = register_dataset(name, str(tmp_path / name), str(sample / "train"))
        assert len(found.notes) >= 1 and len(DatasetCatalog.get(name)) == len(content["images"])
    assert "byte-order mark" in read_annotations(tmp_path / "bom.json").notes[0]
    assert "gzip" in read_annotations(tmp_path / "a.json.gz").notes[0]


def test_areas_that_are_missing_are_those_of_the_boxes(content, write):
    for entry in content["annotations"]:
        del entry["area"]
    found = read_annotations(write(content))
    for entry in found.content["annotations"]:
        assert entry["area"] == entry["bbox"][2] * entry["bbox"][3]
    assert any("area" in note for note in found.notes)
    assert all("area" in entry for entry in json.loads(Path(found.readable).read_text())["annotations"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("area", None, "areas are null"),
        ("area", -4, "no number of at least 0"),
        ("area", float("nan"), "no number of at least 0"),
        ("area", "12", "no number of at least 0"),
        ("area", 1e6, "unlike their boxes"),
        ("iscrowd", 2, "neither 0 nor 1"),
    ],
)
def test_what_may_be_meant_is_warned_of(content, write, field, value, words):
    entry = next(entry for entry in content["annotations"] if not entry["iscrowd"])
    entry[field] = value
    found = read_annotations(write(content))
    assert [warning for warning in found.warnings if words in warning and str(entry["id"]) in warning]
    assert all(np.isfinite(entry["area"]) and entry["area"] >= 0 for entry in found.content["annotations"])


def corners(entry, image):
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x, y, x + width, y + height]
    entry["area"] = entry["bbox"][2] * entry["bbox"][3]


def relative(entry, image):
    scale = [image["width"], image["height"]] * 2
    entry["bbox"] = [value / side for value, side in zip(entry["bbox"], scale, strict=True)]


@pytest.mark.parametrize(("spoil", "words"), [(corners, "x1, y1, x2, y2"), (relative, "between 0 and 1")])
def test_boxes_of_another_kind_are_suspected(content, write, spoil, words):
    assert not [text for text in read_annotations(write(content)).warnings if words in text]
    images = {image["id"]: image for image in content["images"]}
    for entry in content["annotations"]:
        # in the lower right half, where corners leave the image
        image = images[entry["image_id"]]
        entry["bbox"] = [image["width"] / 2, image["height"] / 2, image["width"] / 4, image["height"] / 4]
        spoil(entry, image)
    assert [text for text in read_annotations(write(content, "spoilt.json")).warnings if words in text]


HOSTILE_NUMBERS = [1e9, -1e9, 1e8, 2**64, 10**400, float("inf"), float("nan"), True, "5", None, [5]]


@pytest.mark.parametrize("value", HOSTILE_NUMBERS, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize("where", ["bbox", "polygon"])
def test_numbers_that_would_take_the_machine_down_are_refused(content, write, value, where):
    entry = next(entry for entry in content["annotations"] if isinstance(entry["segmentation"], list))
    if where == "bbox":
        entry["bbox"][1] = value
    else:
        entry["segmentation"][0][3] = value
    with pytest.raises(UserError, match=f"annotation {entry['id']}") as raised:
        read_annotations(write(content))
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("key", "field", "value"),
    [
        *(("images", "id", value) for value in (True, "one", None, 1.5, 10**400, [1])),
        *(("images", "width", value) for value in (True, "96", None, 0, -5, 96.5, 10**9)),
        *(("images", "file_name", value) for value in (None, 7, "", "a" * 5000, "a\0b")),
        *(("categories", "id", value) for value in (False, "one", None)),
        *(("categories", "name", value) for value in (None, 3)),
        *(("annotations", "id", value) for value in (True, None, {})),
        *(("annotations", "image_id", value) for value in (True, "one", None, 10**6)),
        *(("annotations", "category_id", value) for value in (True, "one", None, 10**6)),
        *(("annotations", "iscrowd", value) for value in ("0", None, -1, 0.5)),
        *(("annotations", "ignore", value) for value in (1, True, "yes", [0])),
        *(("annotations", "bbox", value) for value in ([[1, 2], [3, 4]], "1 2 3 4", {}, [1, 2, 3], [1, 2, 3, 4, 5])),
        *(("annotations", "segmentation", value) for value in ("polygon", 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [["1"]])),
    ],
)
def test_values_of_another_type_are_refused_by_name(content, write, key, field, value):
    content[key][0][field] = value
    words = {"file_name": "names? the image|file_name", "segmentation": "mask|polygon"}
    words |= {"image_id": "image_id|is of image 1000000", "category_id": "category_id|is of category 1000000"}
    with pytest.raises(UserError, match=words.get(field, field)) as raised:
        read_annotations(write(content))
    assert "annotations.json" in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize("text", ["true", "1e400", "NaN", "-Infinity"])
def test_numbers_that_only_json_of_python_has(content, write, text):
    path = write(content)
    box = json.dumps(content["annotations"][0]["bbox"])
    path.write_text(path.read_text().replace(f'"bbox": {box}', f'"bbox": [{text}, 1, 2, 3]', 1))
    with pytest.raises(UserError, match="four finite numbers"):
        read_annotations(path)


def test_ids_of_annotations_may_be_negative(content, write):
    content["annotations"][1]["id"] = -7
    found = read_annotations(write(content))
    assert len(found.coco.get_ann_ids()) == len(content["annotations"])


def test_files_that_are_none_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(UserError, match="no regular file"):
            read_annotations(path)


def random_masks(number=200):
    rng = np.random.default_rng(1)
    for _ in range(number):
        height, width = rng.integers(1, 40, 2)
        yield np.asfortranarray(rng.random((height, width)) < rng.choice([0, 0.1, 0.5, 0.9, 1]), dtype=np.uint8)


def test_sound_rle_passes_and_damaged_does_not():
    """pycocotools encodes; what is taken for sound decodes to as many pixels as the image has."""
    rng = np.random.default_rng(2)
    for mask in random_masks():
        rle = mask_utils.encode(mask)
        text = rle["counts"].decode()
        assert mask_fault({"size": list(mask.shape), "counts": text}, mask.shape) is None
        place = rng.integers(len(text))
        for damaged in (
            text[:place],
            text[:place] + chr(rng.integers(35, 126)) + text[place + 1 :],
            str(rle["counts"]),
        ):
            fault = mask_fault({"size": list(mask.shape), "counts": damaged}, mask.shape)
            if fault is None:  # a character may stand for itself or give another sound mask
                decoded = mask_utils.decode({"size": list(mask.shape), "counts": damaged})
                assert decoded.shape == mask.shape and set(np.unique(decoded)) <= {0, 1}


@pytest.mark.parametrize(
    "counts",
    [[-5, 1e9], [-5, 10**9], [100.0], [True] * 100, ["100"], "", "b'1234'", "garbage\x00", "x" * 10_000, [99], [101]],
)
def test_rle_that_would_harm_is_refused(content, write, counts):
    image = content["images"][0]
    entry = next(entry for entry in content["annotations"] if entry["image_id"] == image["id"])
    entry["segmentation"] = {"size": [image["height"], image["width"]], "counts": counts}
    with pytest.raises(UserError, match=rf"annotation {entry['id']}: its (RLE|mask)"):
        read_annotations(write(content))


def test_masks_that_cover_nothing_are_told(content, write):
    image = content["images"][0]
    entry = next(entry for entry in content["annotations"] if entry["image_id"] == image["id"])
    entry["segmentation"] = {"size": [image["height"], image["width"]], "counts": [image["height"] * image["width"]]}
    assert any("cover no pixel" in warning for warning in read_annotations(write(content)).warnings)


def test_what_detectron2_drops_without_a_word_is_told(content, write):
    entry = next(entry for entry in content["annotations"] if isinstance(entry["segmentation"], list))
    entry["segmentation"].append([1.0, 2.0, 3.0, 4.0])
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != content["images"][-1]["id"]]
    found = read_annotations(write(content))
    assert any("fewer than three points" in warning for warning in found.warnings)
    assert any("have no object" in note for note in found.notes)


def test_what_a_copy_no_longer_shows_is_told_of_the_file_that_was_given(content, write, sample, forget):
    content["annotations"][0]["area"] = None
    forget("adjusted")
    path = write(content)
    register_dataset("adjusted", str(path), str(sample / "train"))
    assert MetadataCatalog.get("adjusted").json_file != str(path)
    (finding,) = [finding for finding in examine_dataset("adjusted") if "areas are null" in str(finding)]
    assert f"in {path} " in str(finding)


def test_a_set_of_crowds_is_told(content, write):
    assert not any("crowd" in warning for warning in read_annotations(write(content)).warnings)
    for entry in content["annotations"]:
        entry["iscrowd"] = 1.0
    (warning,) = [text for text in read_annotations(write(content, "crowds.json")).warnings if "crowd" in text]
    assert "set 'iscrowd' to 0" in warning and f"({len(content['annotations'])}: ids" in warning


def test_categories_that_cannot_be_told_apart_are_told(content, write):
    content["categories"][1]["name"] = content["categories"][0]["name"]
    content["categories"].append({"id": 99, "name": " "})
    warnings = read_annotations(write(content)).warnings
    ids = [entry["id"] for entry in content["categories"][:2]]
    assert any("share their name" in text and f"(2: ids {ids[0]}, {ids[1]})" in text for text in warnings)
    assert any("have no name" in text and "(1: ids 99)" in text for text in warnings)


def test_huge_ids_of_annotations_are_numbered(content, write):
    for number, entry in enumerate(content["annotations"]):
        entry["id"] = (number + 1) << 100
    found = read_annotations(write(content))
    assert [entry["id"] for entry in found.content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert any("annotations were numbered" in note for note in found.notes)


def test_a_test_set_needs_no_annotations(content, write, sample, forget):
    del content["annotations"]
    forget("unannotated")
    path = write(content)
    assert not register_dataset("unannotated", str(path), str(sample / "train")).has_annotations
    assert examine_dataset("unannotated") == [] or all(f.severity == "warning" for f in examine_dataset("unannotated"))
    with pytest.raises(UserError, match="no list 'annotations'"):
        GroundTruth(path)
