import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.samplers import TrainingSampler

import sge_det
from sge_det.data.datasets import register_dataset, register_datasets
from sge_det.data.loader import ReplayableLoader, build_test_loader, build_train_loader
from sge_det.engine.doctor.data import examine_dataset
from sge_det.engine.training import setup_config
from sge_det.gain import compare_results

CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


@pytest.fixture(autouse=True)
def _sets_go_with_their_files():
    before = {*DatasetCatalog.list()}
    yield
    for name in {*DatasetCatalog.list()} - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class Noise(torch.utils.data.Dataset):
    """Examples that show what they were drawn from."""

    def __len__(self):
        return 10

    def __getitem__(self, key):
        return key


def first_batches(loader, number):
    return list(itertools.islice(loader, number))


@pytest.mark.parametrize("wide", [None, [True, False, False, True, True, False, True, False, False, True]])
def test_an_interrupted_loader_goes_on_with_the_next_batch(wide):
    def loader():
        return ReplayableLoader(Noise(), TrainingSampler(10, seed=5), 3, wide=wide)

    whole = first_batches(loader(), 9)
    resumed = loader()
    resumed.start = 4
    assert first_batches(resumed, 5) == whole[4:]
    indices = [index for batch in whole for _, index in batch]
    assert len(set(indices)) == 10
    if wide:
        assert all(len({wide[index] for _, index in batch}) == 1 for batch in whole)


def test_order_and_augmentations_depend_on_the_seed_alone(sample_datasets):
    def batches(seed, workers, overrides=()):
        cfg = setup_config(CONFIG, ["DATALOADER.NUM_WORKERS", str(workers), *overrides], sample_datasets)
        np.random.seed(None)
        torch.seed()
        return [
            [(d["file_name"], d["image"], d["instances"].gt_boxes.tensor) for d in batch]
            for batch in first_batches(build_train_loader(cfg, seed), 3)
        ]

    def equal(a, b):
        return all(
            x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2])
            for first, second in zip(a, b)
            for x, y in zip(first, second)
        )

    reference = batches(1, 0)
    assert equal(reference, batches(1, 0, ["MODEL.SGE.ENABLED", "False"]))
    assert equal(reference, batches(1, 2))
    assert not equal(reference, batches(2, 0))


def test_classes_and_sets_follow_the_dataset(sample_datasets):
    cfg = setup_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml", ["MODEL.WEIGHTS", ""], sample_datasets)
    assert cfg.DATASETS.TRAIN == ("tiny_train",)
    assert cfg.DATASETS.TEST == ("tiny_val",)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 4
    assert len(MetadataCatalog.get("tiny_train").thing_classes) == 4


@pytest.mark.parametrize(
    ("by_hand", "train", "test"),
    [
        (["TRAIN", "('tiny_train',)"], ["tiny_train"], ["tiny_val"]),
        (["TRAIN", "('tiny_val',)"], ["tiny_val"], ["tiny_train"]),
        (["TRAIN", "('tiny_train','tiny_val')"], ["tiny_train", "tiny_val"], ["tiny_train", "tiny_val"]),
        (["TEST", "('tiny_train',)"], ["tiny_val"], ["tiny_train"]),
        (["TEST", "('tiny_train','tiny_val')"], ["tiny_train"], ["tiny_train", "tiny_val"]),
    ],
)
def test_where_one_use_is_set_by_hand_the_other_follows(sample_datasets, by_hand, train, test):
    cfg = setup_config(CONFIG, [f"DATASETS.{by_hand[0]}", by_hand[1]], sample_datasets)
    assert (list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)) == (train, test)


def test_what_is_set_by_hand_stays(sample_datasets):
    overrides = ["DATASETS.TRAIN", "('tiny_val',)", "DATASETS.TEST", "('tiny_train','tiny_val')"]
    cfg = setup_config(CONFIG, overrides, sample_datasets)
    assert cfg.DATASETS.TRAIN == ("tiny_val",)
    assert cfg.DATASETS.TEST == ("tiny_train", "tiny_val")
    with pytest.raises(sge_det.UserError, match="NUM_CLASSES is 7, but tiny_train has 4 categories"):
        setup_config(CONFIG, ["MODEL.ROI_HEADS.NUM_CLASSES", "7"], sample_datasets)


def change(content, key, **changes):
    content[key][0] |= changes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["images"].clear(), "has no images"),
        (lambda c: change(c, "annotations", category_id=99), "category 99"),
        (lambda c: change(c, "annotations", image_id=99), "image 99"),
        (lambda c: change(c, "annotations", bbox=[0, 0, float("nan"), 1]), "four finite numbers"),
        (lambda c: change(c, "annotations", bbox=[5, 5, -2, 1]), "must not be negative"),
        (lambda c: change(c, "annotations", bbox=None), "four finite numbers"),
        (lambda c: change(c, "annotations", image_id=[1]), "the image_id [1]: a whole number"),
        (lambda c: c["annotations"].append(7), "of annotations is no object"),
        (lambda c: change(c, "images", id="first"), 'has the id "first": a whole number'),
        (lambda c: c["annotations"][0].pop("bbox"), "lacks 'bbox'"),
        (lambda c: c["images"].append(c["images"][0]), "ids of images are not unique"),
        (lambda c: change(c, "images", file_name="elsewhere.jpg"), "elsewhere.jpg"),
    ],
)
def test_malformed_annotations_are_named(sample, tmp_path, damage, message):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    damage(content)
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(content))
    with pytest.raises(sge_det.UserError) as raised:
        register_dataset("damaged", str(path), str(sample / "val"))
    assert message in str(raised.value)
    assert "damaged" in str(raised.value)
    assert "damaged" not in DatasetCatalog


def test_missing_and_unreadable_files_are_named(sample, tmp_path):
    images = str(sample / "val")
    with pytest.raises(sge_det.UserError, match=r"no annotation file .*none\.json"):
        register_dataset("x", str(tmp_path / "none.json"), images)
    (tmp_path / "text.json").write_text("{not json")
    with pytest.raises(sge_det.UserError, match=r"text\.json is not JSON"):
        register_dataset("x", str(tmp_path / "text.json"), images)
    with pytest.raises(sge_det.UserError, match="no image folder"):
        register_dataset("x", str(sample / "annotations/instances_val.json"), str(tmp_path / "nowhere"))


def test_an_unregistered_data_set_is_told(sample_datasets):
    with pytest.raises(sge_det.UserError, match="'unheard_of' is not registered"):
        setup_config(CONFIG, ["DATASETS.TEST", "('unheard_of',)"], sample_datasets)


def test_coco_that_is_not_there_names_the_variable(tmp_path):
    with pytest.raises(sge_det.UserError, match="DETECTRON2_DATASETS"):
        setup_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml", ["MODEL.WEIGHTS", ""])


def with_changed_masks(sample, folder, segmentation):
    """The sample's training set with the mask of its first object as RLE; None: without any masks."""
    content = json.loads((sample / "annotations/instances_train.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    single = [entry for entry in content["annotations"] if not entry["iscrowd"]]
    for entry in single[:1] if segmentation else single:
        height, width = sizes[entry["image_id"]]
        entry["segmentation"] = segmentation and {"size": [height, width], "counts": [0, height * width]}
    (folder / "changed.json").write_text(json.dumps(content))
    return "changed_train", str(folder / "changed.json"), str(sample / "train")


NO_MASK, RLE_MASK = "has no mask.*set MODEL.MASK_ON False", "has an RLE mask: set INPUT.MASK_FORMAT bitmask"


@pytest.mark.parametrize(
    ("segmentation", "mask_format", "words"),
    [(None, "bitmask", NO_MASK), ("RLE", "polygon", RLE_MASK), ("RLE", "bitmask", None)],
)
def test_masks_that_a_mask_detector_cannot_read_are_told(sample, tmp_path, segmentation, mask_format, words):
    triple = with_changed_masks(sample, tmp_path, segmentation)
    if mask_format == "polygon" or words is None:
        # the sample has RLE masks of its own
        content = json.loads((tmp_path / "changed.json").read_text())
        content["annotations"] = [content["annotations"][0]]
        (tmp_path / "changed.json").write_text(json.dumps(content))
    overrides = ["INPUT.MASK_FORMAT", mask_format]
    if words is None:
        setup_config("sample/mask_rcnn_SGE_R_50_FPN.yaml", overrides, [triple])
        return
    with pytest.raises(sge_det.UserError, match=words):
        setup_config("sample/mask_rcnn_SGE_R_50_FPN.yaml", overrides, [triple])
    # a box detector reads no masks
    cfg = setup_config(CONFIG, overrides, [triple])
    # a set that was registered otherwise is seen when it is read
    cfg.MODEL.MASK_ON = True
    with pytest.raises(sge_det.UserError, match=words):
        build_train_loader(cfg, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_validation_image_is_named(sample, tmp_path, workers):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    shutil.copytree(sample / "val", tmp_path, dirs_exist_ok=True)
    triple = ("damaged_val", str(sample / "annotations/instances_val.json"), str(tmp_path))
    cfg = setup_config(CONFIG, ["DATALOADER.NUM_WORKERS", str(workers)], [triple])
    # after the doctor has looked
    for image in content["images"]:
        (tmp_path / image["file_name"]).write_bytes(b"\xff\xd8 not a picture")
    loader = build_test_loader(cfg, "damaged_val")
    assert len(loader) == len(content["images"])
    with pytest.raises(sge_det.UserError) as raised:
        next(iter(loader))
    assert str(raised.value).startswith(f"the image {tmp_path / content['images'][0]['file_name']} cannot be read")
    assert "\n" not in str(raised.value)


def test_a_test_loader_alone_has_all_images(sample_datasets, monkeypatch):
    cfg = setup_config(CONFIG, [], sample_datasets)
    monkeypatch.setattr("detectron2.data.samplers.distributed_sampler.comm.get_world_size", lambda: 2)
    assert [len(build_test_loader(cfg, "tiny_val", alone=alone)) for alone in (False, True)] == [2, 4]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(sample, tmp_path, workers):
    content = json.loads((sample / "annotations/instances_train.json").read_text())
    content["images"] = [i for i in content["images"] if any(a["image_id"] == i["id"] for a in content["annotations"])][
        :1
    ]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] == content["images"][0]["id"]]
    (tmp_path / "one.json").write_text(json.dumps(content))
    file = tmp_path / content["images"][0]["file_name"]
    shutil.copy(sample / "train" / file.name, file)
    cfg = setup_config(
        CONFIG, ["DATALOADER.NUM_WORKERS", str(workers)], [("one_train", str(tmp_path / "one.json"), str(tmp_path))]
    )
    file.write_bytes(b"\xff\xd8 not a picture")
    with pytest.raises(sge_det.UserError) as raised:
        first_batches(build_train_loader(cfg, 0), 1)
    assert str(raised.value).startswith("the image ")
    assert content["images"][0]["file_name"] in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", [5, None, "", "a\0.jpg", ["a.jpg"]])
def test_file_names_are_names(sample, tmp_path, name):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    content["images"][1]["file_name"] = name
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(sge_det.UserError, match="a name is needed"):
        register_dataset("nameless", str(tmp_path / "a.json"), str(sample / "val"))


@pytest.mark.parametrize("place", ["inside", "over a link", "up and down"])
def test_file_names_lead_where_detectron2_goes(sample, tmp_path, place):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    root = sample / "val"
    own = content["images"][1]["file_name"]
    if place == "over a link":
        root = tmp_path / "linked"
        root.symlink_to(sample / "val")
    name = f"../val/{own}" if place == "up and down" else str(sample / "val" / own)
    content["images"][1]["file_name"] = name
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_dataset("led", str(tmp_path / "a.json"), str(root))
    theirs = load_coco_json(str(tmp_path / "a.json"), str(root))
    assert [entry["file_name"] for entry in DatasetCatalog.get("led")] == [entry["file_name"] for entry in theirs]
    assert examine_dataset("led") == []


@pytest.mark.parametrize("name", ["other.jpg", "../other.jpg", "a/../../other.jpg"])
def test_file_names_that_lead_out_are_refused(sample, tmp_path, name):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    root, json_file = tmp_path / "images", str(tmp_path / "a.json")
    shutil.copytree(sample / "val", root)
    (root / "a").mkdir()
    shutil.copy(root / content["images"][1]["file_name"], tmp_path / "other.jpg")
    name = str(tmp_path / name) if name == "other.jpg" else name
    content["images"][1]["file_name"] = name
    Path(json_file).write_text(json.dumps(content))
    words = f"{json_file} names images outside of {root} (1: {name!a}): file names must stay in the image folder"
    with pytest.raises(sge_det.UserError, match=re.escape(words)):
        register_dataset("outside", json_file, str(root))
    (tmp_path / "found.json").write_text("[]")
    with pytest.raises(sge_det.UserError, match=re.escape(words)):
        arms = {"a": [tmp_path / "found.json"], "b": [tmp_path / "found.json"]}
        compare_results(json_file, arms, tmp_path / "report", image_root=root)
    # a set that somebody's own code registers is theirs
    register_coco_instances("own", {}, json_file, str(root))
    assert [(finding.severity, finding.problem) for finding in examine_dataset("own")] == [
        ("warning", f"{json_file} names images outside of {root} (1: {name})")
    ]


def test_absolute_names_of_another_machine_are_told_with_what_is_here(sample, tmp_path):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    for image in content["images"]:
        image["file_name"] = f"/home/somebody/sets/val/{image['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(content))
    words = r"val/\w+\.jpg is there; .* or take /home/somebody/sets/ out of file_name"
    with pytest.raises(sge_det.UserError, match=words):
        register_dataset("moved", str(tmp_path / "a.json"), str(sample))


def test_file_names_may_lead_over_links_and_folders(sample, tmp_path):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/linked").symlink_to(sample / "val")
    for image in content["images"]:
        image["file_name"] = f"linked/{image['file_name']}"
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_dataset("linked", str(tmp_path / "a.json"), str(tmp_path / "images"))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"images": 1' + "0" * 5000 + "}", "\ud800", "nul"])
def test_json_that_no_parser_takes_is_told(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(sge_det.UserError, match="is not JSON"):
        register_dataset("damaged", str(tmp_path / "a.json"), str(tmp_path))


def test_triples_that_are_no_data_sets_are_told(sample, sample_datasets):
    (_, train, images), (_, val, others) = sample_datasets
    for datasets, words in (
        ([("a", train, images), ("a", val, others)], "--dataset a is given 2 times"),
        ([("", train, images)], "give the data set a name"),
        ([("a", images, train)], "is a folder; give NAME JSON IMAGES in this order"),
        ([("a", "https://host/a.json", images)], "that is an address; download the file"),
        ([("a", train, str(sample))], rf"it is in {images}; name that folder"),
    ):
        with pytest.raises(sge_det.UserError, match=words):
            register_datasets(datasets)
