"""Each refusal of a data set by the smallest set that earns it, and what is like it and is taken."""

import gzip
import json
import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from sge_det import UserError, get_config
from sge_det.data import annotations as annotations_module
from sge_det.data.annotations import read_annotations
from sge_det.data.datasets import register_dataset, use_datasets
from sge_det.data.dicts import dicts_fault
from sge_det.data.loader import _is_wide, build_train_loader, proposal_files, seeded_loader
from sge_det.data.sample import make_sample_coco

CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
POINTS = ["nose", "left_eye", "right_eye"]


def write(folder, name="a", categories=("cat",), points=None, **changes):
    """A set of one image with one object; returns the ``--dataset`` triple."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30)).save(folder / "a.png")
    kinds = [{"id": number, "name": each} for number, each in enumerate(categories, 1)]
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 9], "area": 90, "iscrowd": 0}
    if points:
        kinds[0]["keypoints"] = points
        entry |= {"keypoints": [5, 6, 2] * len(points), "num_keypoints": len(points)}
    image = {"id": 1, "file_name": "a.png", "height": 30, "width": 40}
    content = {"images": [image], "categories": kinds, "annotations": [entry]} | changes
    (folder / f"{name}.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    return name, str(folder / f"{name}.json"), str(folder)


def use(*triples, overrides=(), **options):
    cfg = get_config(CONFIG, list(overrides))
    use_datasets(cfg, triples, list(overrides), **options)
    return cfg


def test_sets_that_do_not_go_together_or_teach_nothing(tmp_path):
    train, val = write(tmp_path / "a", "a_train"), write(tmp_path / "b", "b_val", ("cat", "dog"))
    with pytest.raises(UserError, match=r"the categories of b_val \(cat, dog\) are not those of a_train"):
        use(train, val)
    empty = write(tmp_path / "c", "c_train", annotations=None)
    with pytest.raises(UserError, match="has no list 'annotations', so there is nothing to train on"):
        use(empty, write(tmp_path / "d", "d_val"))
    with pytest.raises(UserError, match=r"NUM_CLASSES is 5, but a_train has 1 categories: set it to that"):
        use(train, overrides=("MODEL.ROI_HEADS.NUM_CLASSES", "5"))


def test_sets_that_the_config_names_itself_stay_where_it_has_them(tmp_path):
    first, second = write(tmp_path / "a", "one"), write(tmp_path / "b", "two_train")
    named = ("DATASETS.TRAIN", "('one',)", "DATASETS.TEST", "('two_train',)")
    cfg = get_config(CONFIG, list(named))
    use_datasets(cfg, [first, second], [])
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("one",), ("two_train",))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 1
    cfg = use(first, overrides=("DATASETS.TEST", "()"))
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("one",), ())


KEYPOINTS = ("MODEL.KEYPOINT_ON", "True")
NUMBER = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"


def test_keypoints_follow_the_set(tmp_path):
    triple = write(tmp_path / "a", "points", points=POINTS)
    cfg = use(triple, overrides=(*KEYPOINTS, "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]"))
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    assert MetadataCatalog.get("points").keypoint_flip_map == [("left_eye", "right_eye")]
    for overrides, words in (
        ((*KEYPOINTS, NUMBER, "9"), f"{NUMBER} is 9, but points has 3 keypoints: set it to that"),
        (KEYPOINTS, r"COCO's metric knows its own 17 alone: set TEST.KEYPOINT_OKS_SIGMAS to 3 numbers"),
    ):
        with pytest.raises(UserError, match=words):
            use(triple, overrides=overrides)
    with pytest.raises(UserError, match=r"no category of plain lists its keypoints.*set MODEL.KEYPOINT_ON False"):
        use(write(tmp_path / "b", "plain"), overrides=KEYPOINTS)


OBJECT = {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 1}
ENTRY = {"file_name": "a.jpg", "image_id": 1, "height": 4, "width": 4, "annotations": [OBJECT]}


@pytest.mark.parametrize(
    ("dicts", "fault"),
    [
        (3, "returns a int: a list of dicts"),
        ([3], "returns a list with a int"),
        ([{"image_id": 1}], "(without file_name): it lacks 'file_name'"),
        ([{**ENTRY, "height": 1} | {"width": 3}, {"file_name": "b", "image_id": 2, "height": 1}], "it lacks 'width'"),
        ([ENTRY | {"image_id": 1.5}], "its image_id 1.5 is neither a whole number nor a text"),
        ([ENTRY, ENTRY], "entry 1 (a.jpg): the image_id 1 is there twice"),
        ([ENTRY | {"annotations": 3}], "its annotations are a int"),
        ([ENTRY | {"annotations": [OBJECT, 3]}], "annotation 1 is a int: a dict is needed"),
        ([ENTRY | {"annotations": [{"bbox": [1, 2, 3, 4]}]}], "annotation 0 lacks 'bbox_mode'"),
        ([ENTRY | {"annotations": [OBJECT | {"bbox_mode": 9}]}], "has the bbox_mode 9"),
        ([ENTRY | {"annotations": [OBJECT | {"bbox": [1, 2, 3]}]}], "has the bbox [1, 2, 3]: 4 finite numbers"),
        ([ENTRY | {"annotations": [OBJECT | {"bbox": [1, 2, 3, float("nan")]}]}], "4 finite numbers are needed"),
        ([ENTRY | {"annotations": [OBJECT | {"category_id": 7}]}], "from 0 to 2"),
        ([ENTRY | {"annotations": [OBJECT | {"category_id": -1}]}], "the place of its class is needed, from 0 to 2"),
        ([ENTRY | {"annotations": [OBJECT | {"bbox": np.array([1.0, 2, 3, 4])}]}], None),
        ([ENTRY | {"annotations": [OBJECT | {"bbox": [1] * 5, "bbox_mode": BoxMode.XYWHA_ABS}]}], None),
    ],
)
def test_sets_that_a_function_makes(dicts, fault):
    found = dicts_fault(dicts, 3, are_tested=True)
    assert found is None if fault is None else fault in found


def test_sets_that_are_only_trained_on_need_no_ids():
    assert dicts_fault([{"file_name": "a"}, {"file_name": "a"}], None, are_tested=False) is None
    odd = [{"file_name": "a", "annotations": [OBJECT | {"category_id": "cat"}]}]
    assert "has the category_id 'cat': the place of its class is needed, from 0 on" in dicts_fault(
        odd, None, are_tested=False
    )


@pytest.fixture
def registered():
    names = []

    def register(name, made, **metadata):
        names.append(name)
        DatasetCatalog.register(name, lambda: made)
        MetadataCatalog.get(name).set(**metadata)
        return get_config(CONFIG, ["DATASETS.TRAIN", f"('{name}',)", "DATALOADER.NUM_WORKERS", "0"])

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_function_that_makes_no_list_or_no_object(registered):
    with pytest.raises(UserError, match=r"DATASETS.TRAIN \(.none.,\) cannot be trained on: "):
        build_train_loader(registered("none", []), 0)
    empty = registered("empty", [{**ENTRY, "annotations": []}], thing_classes=["cat"])
    with pytest.raises(UserError, match=r"DATASETS.TRAIN \('empty',\) cannot be trained on: "):
        build_train_loader(empty, 0)


def test_samplers_by_name(registered, tmp_path):
    name, file, root = write(tmp_path / "a", "sampled_train")
    register_dataset(name, file, root)
    base = ["DATASETS.TRAIN", f"('{name}',)", "DATALOADER.NUM_WORKERS", "0", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
    base += ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(32,)", "DATALOADER.REPEAT_THRESHOLD", "0.5"]
    cfg = get_config(CONFIG, [*base, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"])
    batch = next(iter(build_train_loader(cfg, 0)))
    assert [entry["file_name"] for entry in batch] == [os.path.join(root, "a.png")] * 2
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(UserError, match="RandomSubsetTrainingSampler is not supported: set TrainingSampler"):
        build_train_loader(cfg, 0)
    with pytest.raises(UserError, match=r"SOLVER\.IMS_PER_BATCH 0 is not a multiple of the 1 processes"):
        seeded_loader([ENTRY], None, None, 0, 0)


def test_proposals_are_a_file_for_each_set(tmp_path):
    (tmp_path / "boxes.pkl").write_bytes(b"")
    cfg = get_config(CONFIG, ["DATASETS.TRAIN", "('a', 'b')", "DATASETS.TEST", "('c',)"])
    assert proposal_files(cfg) is None
    cfg.MODEL.LOAD_PROPOSALS = True
    cfg.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "boxes.pkl"),)
    assert proposal_files(cfg, "TEST") == (str(tmp_path / "boxes.pkl"),)
    with pytest.raises(UserError, match="PROPOSAL_FILES_TRAIN names 0 files for 2 training sets: give one for each"):
        proposal_files(cfg)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = ("nowhere.pkl", "https://example.org/b.pkl")
    with pytest.raises(UserError, match=r"names nowhere\.pkl, which does not exist"):
        proposal_files(cfg)


def test_images_are_wide_as_they_are_seen(tmp_path):
    image = Image.new("RGB", (40, 30))
    image.save(tmp_path / "wide.jpg")
    turned = image.getexif()
    turned[274] = 6
    image.save(tmp_path / "turned.jpg", exif=turned)
    assert _is_wide({"file_name": tmp_path / "wide.jpg"})
    assert not _is_wide({"file_name": tmp_path / "turned.jpg"})
    assert not _is_wide({"file_name": "nowhere", "height": 3, "width": 2})
    with pytest.raises(UserError, match="the image nowhere cannot be read"):
        _is_wide({"file_name": "nowhere"})


def test_annotation_files_that_are_no_files_or_grow_without_end(tmp_path, monkeypatch):
    _, file, _ = write(tmp_path / "a")
    assert read_annotations(file).sizes == {1: (30, 40)}
    for path, words in (
        (str(tmp_path / "a" / "a.json" / "b"), "cannot be read: "),
        ("a\0b", "cannot be read: embedded null byte"),
        (str(tmp_path), "is no regular file"),
    ):
        with pytest.raises(UserError, match=words):
            read_annotations(path)
    whole = gzip.compress(b'{"images": []}')
    (tmp_path / "cut.json").write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"cut\.json cannot be read: "):
        read_annotations(tmp_path / "cut.json")
    monkeypatch.setattr(annotations_module, "_MOST_BYTES", 60)
    (tmp_path / "bomb.json").write_bytes(gzip.compress(b" " * 100))
    with pytest.raises(UserError, match=r"bomb\.json unfolds to more than 0 GB: not read"):
        read_annotations(tmp_path / "bomb.json")
    (tmp_path / "long.json").write_bytes(b" " * 100)
    with pytest.raises(UserError, match=r"long\.json has 0 GB: more than 0 are not read"):
        read_annotations(tmp_path / "long.json")


def test_images_larger_than_any_and_crowds_alone(tmp_path):
    image = {"id": 1, "file_name": "a.png", "height": 60_000, "width": 60_000}
    with pytest.raises(UserError, match=r"image a.png is 60000x60000: more pixels than any detector can take"):
        read_annotations(write(tmp_path / "a", images=[image])[1])
    crowd = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 10, 9], "area": 90, "iscrowd": 1}
    found = read_annotations(write(tmp_path / "b", annotations=[crowd])[1])
    assert any("1 of its images have crowd regions alone" in note for note in found.notes)


def test_a_sample_set_that_others_changed_is_not_taken_for_whole(tmp_path):
    made = make_sample_coco(tmp_path / "set", train=1, val=1, size=64, seed=1)
    assert made.created
    file = tmp_path / "set/annotations/instances_val.json"
    for content in ("{", "[]", '{"images": 3}'):
        file.write_text(content)
        with pytest.raises(UserError, match="holds something other than the set of these arguments; remove it"):
            make_sample_coco(tmp_path / "set", train=1, val=1, size=64, seed=1)
    (tmp_path / "empty").mkdir()
    assert make_sample_coco(tmp_path / "empty", train=1, val=1, size=64, seed=1).created
