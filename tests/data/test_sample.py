import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from sge_det import UserError
from sge_det.data import sample
from sge_det.data.preview import contact_sheet
from sge_det.data.sample import SPLITS, make_sample_coco

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_sample_coco.py"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The 20 validation images include one without objects and one with a crowd."""
    return make_sample_coco(tmp_path_factory.mktemp("sample") / "set", train=8, val=20)


@pytest.fixture(scope="module", params=["own", "coco"])
def coco(request, made, tmp_path_factory):
    if request.param == "coco":
        made = make_sample_coco(tmp_path_factory.mktemp("sample"), train=1, val=20, coco_layout=True)
    return COCO(str(made.annotation_file("val")))


def test_same_arguments_same_bytes(made, tmp_path):
    again = make_sample_coco(tmp_path / "again", train=8, val=20)
    assert files(again.root) == files(made.root)
    other = make_sample_coco(tmp_path / "other", train=1, val=1, seed=1)
    assert (other.image_dir("train") / "000000000001.jpg").read_bytes() != (
        made.image_dir("train") / "000000000001.jpg"
    ).read_bytes()


def test_fewer_images_are_a_prefix(made, tmp_path):
    short = make_sample_coco(tmp_path / "short", train=6, val=2)
    for split, count in (("train", 6), ("val", 2)):
        images, all_images = files(short.image_dir(split)), files(made.image_dir(split))
        assert images == dict(list(all_images.items())[:count])
        some, whole = (json.loads(s.annotation_file(split).read_text()) for s in (short, made))
        assert some["images"] == whole["images"][:count]
        assert some["annotations"] == [a for a in whole["annotations"] if a["image_id"] <= count]


def test_splits_differ(made):
    train, val = (files(made.image_dir(split)) for split in SPLITS)
    assert not set(train.values()) & set(val.values())


def test_images_are_as_listed(made):
    content = json.loads(made.annotation_file("train").read_text())
    assert len({(image["width"], image["height"]) for image in content["images"]}) > 5
    for image in content["images"]:
        with Image.open(made.image_dir("train") / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            assert max(picture.size) == 192


def test_area_and_box_are_those_of_the_mask(coco):
    assert list(coco.anns) == list(range(1, len(coco.anns) + 1))
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y, w, h = annotation["bbox"]
        assert annotation["area"] == pytest.approx(mask.sum(), abs=1)
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert [x, y, x + w, y + h] == pytest.approx(box, abs=1)
        assert min(w, h) >= 8 and annotation["area"] >= 40


def test_polygons_are_closely_the_drawn_mask():
    for number, (_, objects) in enumerate(sample._scenes("val", {"val": 18, "size": 192, "seed": 3})):
        for item in objects:
            for cut_holes in (False, True):
                annotation = sample._annotation(item, cut_holes)
                segmentation, (height, width) = annotation["segmentation"], item.visible.shape
                if isinstance(segmentation, list):
                    segmentation = mask_utils.merge(mask_utils.frPyObjects(segmentation, height, width))
                elif isinstance(segmentation["counts"], list):
                    segmentation = mask_utils.frPyObjects(segmentation, height, width)
                decoded, drawn = mask_utils.decode(segmentation).astype(bool), item.visible >= 0.5
                overlap = (decoded & drawn).sum() / (decoded | drawn).sum()
                assert overlap > 0.9, (number, item.kind, cut_holes)
                assert annotation["area"] == pytest.approx(drawn.sum(), rel=0.08, abs=4)


def test_masks_of_single_objects_are_disjoint(coco):
    overlapping = 0
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image_id] if not a["iscrowd"]]
        for i, mask in enumerate(masks):
            for other in masks[:i]:
                overlapping += bool((mask & other).any())
                # Rasterised polygons share at most some of their border, and holes too small to be traced.
                assert (mask & other).sum() <= 0.06 * min(mask.sum(), other.sum()) + 12
    assert overlapping  # Some objects do touch, else this says nothing.


def test_all_sizes_crowds_and_empty_images_are_there():
    scenes = [objects for _, objects in sample._scenes("val", {"val": 60, "size": 192, "seed": 0})]
    areas = np.array([(o.visible >= 0.5).sum() for objects in scenes for o in objects if not o.crowd])
    shares = np.histogram(areas, [0, 32**2, 96**2, 10**6])[0] / len(areas)
    assert (shares >= 0.15).all(), shares
    assert sum(not objects for objects in scenes) == 3
    assert sum(any(o.crowd for o in objects) for objects in scenes) == 3
    kinds = [o.kind for objects in scenes for o in objects]
    assert min(kinds.count(kind) for kind in set(kinds)) > 0.15 * len(kinds) and len(set(kinds)) == 4


def test_segmentation_formats(made):
    annotations = json.loads(made.annotation_file("val").read_text())["annotations"]
    crowds = [a for a in annotations if a["iscrowd"]]
    assert crowds and all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    single = [a["segmentation"] for a in annotations if not a["iscrowd"]]
    polygons = [s for s in single if isinstance(s, list)]
    assert all(len(p) >= 6 and len(p) % 2 == 0 for s in polygons for p in s)
    assert 0.5 * len(single) < len(polygons) < len(single)
    assert all(isinstance(s["counts"], str) for s in single if isinstance(s, dict))


def test_a_hole_is_rle_or_cut():
    visible = np.zeros((40, 50), np.float32)
    visible[5:35, 0:40] = 1
    visible[12:25, 9:22] = 0
    item = sample.DrawnObject("car", False, visible, visible.sum())
    rle, cut = (sample._annotation(item, cut_holes) for cut_holes in (False, True))
    assert isinstance(rle["segmentation"], dict) and len(cut["segmentation"]) == 2
    decoded = mask_utils.decode(mask_utils.merge(mask_utils.frPyObjects(cut["segmentation"], 40, 50)))
    assert np.array_equal(mask_utils.decode(rle["segmentation"]), visible)
    assert np.abs(decoded - visible).sum() <= 8  # Corners of polygons are cut.
    assert rle["bbox"] == cut["bbox"] == [0, 5, 40, 30]


def test_coco_layout(tmp_path):
    from detectron2.data.datasets.builtin_meta import _get_coco_instances_meta
    from detectron2.data.datasets.coco import load_coco_json

    made = make_sample_coco(tmp_path, train=2, val=20, coco_layout=True)
    assert made.root == tmp_path / "coco"
    assert sorted(p.name for p in made.root.iterdir()) == ["annotations", "train2017", "val2017"]
    assert make_sample_coco(made.root, train=2, val=20, coco_layout=True).root == made.root  # Not coco/coco.
    content = json.loads((made.root / "annotations" / "instances_val2017.json").read_text())
    categories = {c["id"]: c for c in content["categories"]}
    meta = _get_coco_instances_meta()
    assert list(categories) == list(meta["thing_dataset_id_to_contiguous_id"]) and len(categories) == 80
    assert [c["name"] for c in categories.values()] == meta["thing_classes"]
    known = {
        "traffic light": "outdoor",
        "kite": "sports",
        "bowl": "kitchen",
        "toilet": "furniture",
        "oven": "appliance",
    }
    named = {c["name"]: c["supercategory"] for c in categories.values()}
    assert {name: named[name] for name in known} == known and len(set(named.values())) == 12
    # A mask head of the default INPUT.MASK_FORMAT reads polygons alone.
    assert all(isinstance(a["segmentation"], list) for a in content["annotations"] if not a["iscrowd"])
    loaded = load_coco_json(str(made.annotation_file("val")), str(made.image_dir("val")))
    assert len(loaded) == 20 and Path(loaded[0]["file_name"]).is_file()


def test_second_call_keeps_the_set(tmp_path):
    root = tmp_path / "set"
    assert make_sample_coco(root, train=1, val=1).created
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert not make_sample_coco(root, train=1, val=1).created
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    with pytest.raises(UserError, match="set holds something other"):
        make_sample_coco(root, train=2, val=1)
    (root / "val" / "000000000001.jpg").unlink()
    with pytest.raises(UserError, match="remove it or name another"):
        make_sample_coco(root, train=1, val=1)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_interrupted_call_leaves_nothing(tmp_path, monkeypatch, error):
    write, calls = sample._write_image, []

    def fail_at_third(path, pixels):
        calls.append(path)
        if len(calls) == 3:
            raise error("stopped")
        write(path, pixels)

    monkeypatch.setattr(sample, "_write_image", fail_at_third)
    with pytest.raises(UserError if error is OSError else error, match="stopped"):
        make_sample_coco(tmp_path / "set", train=2, val=2)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, words",
    [({"train": 0}, "--train"), ({"val": -1}, "--val"), ({"size": 63}, "--size"), ({"seed": -1}, "--seed")],
)
def test_bad_values(tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        make_sample_coco(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_output_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=str(path)):
            make_sample_coco(path, train=1, val=1)


def test_tool_tells_a_mistake_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", TOOL, tmp_path / "set", "--size", "5"], capture_output=True, text=True
    )
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and "--size" in lines[0] and "Traceback" not in done.stderr


def test_contact_sheet(made, tmp_path):
    sheet = tmp_path / "sheet.png"
    contact_sheet(made.image_dir("val"), made.annotation_file("val"), sheet, rows=2, cols=3)
    with Image.open(sheet) as picture:
        assert picture.format == "PNG"
        assert picture.width == pytest.approx(3 * 300, rel=0.03) and picture.height > 300
    with pytest.raises(UserError, match="cannot be made"):
        contact_sheet(made.image_dir("train") / "nowhere", made.annotation_file("val"), sheet)
