"""Detectron2's other families: a config beside Detectron2's own, with SGE; slim, they train and evaluate."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.data.datasets.cityscapes import load_cityscapes_instances
from detectron2.data.datasets.lvis import load_lvis_json
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from PIL import Image
from test_config import FAMILIES

import sge_det
from sge_det.engine.training import setup_config, train
from sge_det.evaluation.coco import build_evaluator

# the layers with SGE, of the blocks of a ResNet
LAYERS = {"C4": 16, "X_101": 33}


def on_meta(cfg):
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def shared(theirs, ours):
    """The values of ours under the keys that Detectron2 knows."""
    return {key: shared(value, ours[key]) if isinstance(value, dict) else ours[key] for key, value in theirs.items()}


@pytest.mark.parametrize("leaf", sorted(FAMILIES))
def test_a_familys_model_is_detectron2s_with_sge(leaf):
    cfg = sge_det.get_config(leaf)
    model = on_meta(cfg)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layers = {key.rpartition(".")[0] for key in shapes if ".sge." in key}
    assert len(layers) == next((count for name, count in LAYERS.items() if name in leaf), 16)
    if leaf.startswith(("PointRend", "DeepLab")):
        own = {"PointRend": "build_resnet_fpn_backbone", "DeepLab": "build_resnet_deeplab_backbone"}
        plain = cfg.clone()
        plain.MODEL.BACKBONE.NAME = own[leaf.split("/")[0]]
    else:
        plain = model_zoo.get_config(re.sub("SGE_", "", leaf))
        plain.MODEL.RESNETS.STRIDE_IN_1X1 = cfg.MODEL.RESNETS.STRIDE_IN_1X1
        assert plain.SOLVER == shared(plain.SOLVER, cfg.SOLVER)
        assert plain.DATASETS.TRAIN == cfg.DATASETS.TRAIN
    expected = {key: tuple(value.shape) for key, value in on_meta(plain).state_dict().items()}
    assert {key: shape for key, shape in shapes.items() if ".sge." not in key} == expected


def test_keys_of_projects_are_there_where_they_are_named():
    assert "POINT_HEAD" not in sge_det.get_config("sample/mask_rcnn_SGE_R_50_FPN.yaml").MODEL
    cfg = sge_det.get_config("sample/mask_rcnn_SGE_R_50_FPN.yaml", ["MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", "True"])
    assert cfg.MODEL.POINT_HEAD.NUM_FC == 3
    assert "STEM_TYPE" not in cfg.MODEL.RESNETS
    cfg = sge_det.get_config("sample/mask_rcnn_SGE_R_50_FPN.yaml", ["MODEL.RESNETS.STEM_TYPE", "basic"])
    assert cfg.MODEL.RESNETS.RES4_DILATION == 1


# From start to end, slim

SLIM = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "32",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "32",
    "MODEL.SGE.GROUPS": "16",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "32",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": "32",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "50",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "INPUT.MASK_FORMAT": "bitmask",
    "TEST.PRECISE_BN.NUM_ITER": "1",
    "SOLVER.MAX_ITER": "1",
    "SOLVER.BASE_LR": "0.0001",
    "DATALOADER.NUM_WORKERS": "0",
}
NARROW = {"MODEL.RESNETS.NUM_GROUPS": "4", "MODEL.RESNETS.WIDTH_PER_GROUP": "8", "MODEL.RESNETS.DEPTH": "50"}
POINTS = {"MODEL.ROI_MASK_HEAD.FC_DIM": "32", "MODEL.POINT_HEAD.FC_DIM": "32", "MODEL.POINT_HEAD.NUM_CLASSES": "4"}
# the config, what it needs to be slim, and what is evaluated
RUNS = {
    "C4 with masks": ("COCO-InstanceSegmentation/mask_rcnn_SGE_R_50_C4_1x.yaml", {}, {"bbox", "segm"}),
    "DC5": ("COCO-Detection/faster_rcnn_SGE_R_50_DC5_1x.yaml", {}, {"bbox"}),
    "ResNeXt": ("COCO-Detection/faster_rcnn_SGE_X_101_32x8d_FPN_3x.yaml", NARROW, {"bbox"}),
    "GN": ("Misc/mask_rcnn_SGE_R_50_FPN_3x_gn.yaml", {}, {"bbox", "segm"}),
    "SyncBN": ("Misc/mask_rcnn_SGE_R_50_FPN_3x_syncbn.yaml", {}, {"bbox", "segm"}),
    "PointRend": ("PointRend/pointrend_rcnn_SGE_R_50_FPN_1x_coco.yaml", POINTS, {"bbox", "segm"}),
}


def configure(leaf, folder, datasets=(), **keys):
    overrides = [*TINY, *(part for pair in {**SLIM, **keys, "OUTPUT_DIR": str(folder)}.items() for part in pair)]
    return setup_config(leaf, overrides, datasets)


@pytest.mark.parametrize("family", RUNS)
def test_a_family_trains_and_evaluates(family, sample_datasets, tmp_path):
    leaf, slim, tasks = RUNS[family]
    results = train(configure(leaf, tmp_path, sample_datasets, **slim))
    assert set(results) == tasks
    assert all(0 <= results[task]["AP"] <= 100 for task in tasks)


@pytest.fixture
def register():
    names = []

    def add(name, load, **metadata):
        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def on(name, test=None):
    return {"DATASETS.TRAIN": f"('{name}',)", "DATASETS.TEST": str(tuple(test or (name,)))}


def test_lvis_trains_and_evaluates(register, sample, tmp_path):
    content = json.loads((sample / "annotations/instances_train.json").read_text())
    for category, frequency in zip(content["categories"], "rcff", strict=True):
        category |= {"frequency": frequency, "synset": f"{category['name']}.n.01", "image_count": 1}
        category |= {"instance_count": 1, "synonyms": [category["name"]], "def": ""}
    for image in content["images"]:
        image |= {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
        # as in LVIS, whose images have no file names
        image["coco_url"] = f"http://images/train/{image.pop('file_name')}"
    ids = sorted(category["id"] for category in content["categories"])
    places = {key: place + 1 for place, key in enumerate(ids)}  # LVIS's ids are 1, 2, ...
    for entry in (*content["annotations"], *content["categories"]):
        key = "category_id" if "category_id" in entry else "id"
        entry[key] = places[entry[key]]
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        entry["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    path = tmp_path / "lvis.json"
    path.write_text(json.dumps(content))
    name = "tiny_lvis"
    classes = [category["name"] for category in sorted(content["categories"], key=lambda category: category["id"])]
    register(
        name,
        lambda: load_lvis_json(str(path), f"{sample}/", None),
        json_file=str(path),
        image_root=f"{sample}/",
        evaluator_type="lvis",
        thing_classes=classes,
    )
    leaf = "LVISv1-InstanceSegmentation/mask_rcnn_SGE_R_50_FPN_1x.yaml"
    keys = {"MODEL.ROI_HEADS.NUM_CLASSES": "4", "INPUT.MASK_FORMAT": "polygon", **on(name)}
    results = train(configure(leaf, tmp_path / "run", **keys))
    assert {"bbox", "segm"} <= set(results)
    assert {"APr", "APc", "APf"} <= set(results["bbox"])


def make_cityscapes(folder):
    """Two images in Cityscapes' layout, with a car (26) and a person (24) each on a road (7)."""
    rng = np.random.default_rng(0)
    for part in ("leftImg8bit", "gtFine"):
        (folder / part / "val" / "town").mkdir(parents=True)
    for number in range(2):
        stem = f"town_{number:06}_000019"
        Image.fromarray(rng.integers(0, 255, (64, 128, 3), dtype=np.uint8)).save(
            folder / "leftImg8bit/val/town" / f"{stem}_leftImg8bit.png"
        )
        instances = np.full((64, 128), 7, np.uint16)
        instances[10:50, 10:60], instances[20:60, 80:110] = 26000, 24000
        target = folder / "gtFine/val/town"
        Image.fromarray(instances).save(target / f"{stem}_gtFine_instanceIds.png")
        labels = np.where(instances >= 1000, instances // 1000, instances).astype(np.uint8)
        Image.fromarray(labels).save(target / f"{stem}_gtFine_labelIds.png")
        (target / f"{stem}_gtFine_polygons.json").write_text(json.dumps({"imgHeight": 64, "imgWidth": 128}))
    return folder / "leftImg8bit/val", folder / "gtFine/val"


def test_cityscapes_trains_and_evaluates(register, tmp_path):
    images, truth = make_cityscapes(tmp_path / "cityscapes")
    from cityscapesscripts.helpers.labels import labels

    register(
        "tiny_cityscapes",
        lambda: load_cityscapes_instances(str(images), str(truth), from_json=False, to_polygons=False),
        image_dir=str(images),
        gt_dir=str(truth),
        evaluator_type="cityscapes_instance",
        thing_classes=[label.name for label in labels if label.hasInstances and not label.ignoreInEval],
    )
    leaf = "Cityscapes/mask_rcnn_SGE_R_50_FPN.yaml"
    results = train(configure(leaf, tmp_path / "run", **on("tiny_cityscapes")))
    assert set(results["segm"]) == {"AP", "AP50"}


def test_cityscapes_labels_have_the_metrics_that_were_computed_by_hand(register, tmp_path):
    """The persons are taken for cars: 2 of 3 classes are found, one of them with the persons' pixels too."""
    images, truth = make_cityscapes(tmp_path / "cityscapes")
    facts = {"image_dir": str(images), "gt_dir": str(truth), "stuff_classes": ["a"], "ignore_label": 255}
    name = register("tiny_labels", list, evaluator_type="cityscapes_sem_seg", **facts)
    cfg = sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["DATASETS.TEST", f"('{name}',)"])
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    scores = torch.zeros(19, 64, 128)
    scores[0] = 1
    scores[13, 10:50, 10:60] = scores[13, 20:60, 80:110] = 2
    for image in sorted((images / "town").iterdir()):
        evaluator.process([{"file_name": str(image)}], [{"sem_seg": scores}])
    cars, persons = 40 * 50, 40 * 30
    assert evaluator.evaluate()["sem_seg"]["IoU"] == pytest.approx(100 * (1 + cars / (cars + persons) + 0) / 3)


def make_voc(folder):
    """Three images in Pascal VOC's layout, each with a dog and the second with a difficult cat.

    As labelling tools export it: without a pose or whether it is truncated, which VOC's own files have.
    """
    for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    thing = (
        "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>11.0</xmin><ymin>21</ymin><xmax>50</xmax>"
        "<ymax>60</ymax></bndbox></object>"
    )
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(folder / f"JPEGImages/{number}.jpg")
        things = thing.format("dog", 0) + (thing.format("cat", 1) if number == 1 else "")
        size = "<size><width>80</width><height>64</height><depth>3</depth></size>"
        (folder / f"Annotations/{number}.xml").write_text(f"<annotation>{size}{things}</annotation>")
    (folder / "ImageSets/Main/val.txt").write_text("0\n1\n2\n")


def test_pascal_voc_trains_and_evaluates(tmp_path):
    make_voc(tmp_path / "voc")
    register_pascal_voc("tiny_voc", str(tmp_path / "voc"), "val", 2012, ["dog", "cat"])
    try:
        MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
        keys = {"MODEL.ROI_HEADS.NUM_CLASSES": "2", **on("tiny_voc")}
        cfg = configure("sample/faster_rcnn_SGE_R_50_FPN.yaml", tmp_path / "run", **keys)
        assert set(train(cfg)["bbox"]) == {"AP", "AP50", "AP75"}
        evaluator = build_evaluator(cfg, "tiny_voc")
        evaluator.reset()
        # two of three dogs, with a score above and one below that of a box where none is: recall 1/3 at a precision of
        # 1, 2/3 at 2/3; the cat is difficult, and its class has nothing to find
        for number, (x, score) in enumerate([(10.0, 0.9), (40.0, 0.8), (10.0, 0.7)]):
            found = Instances((64, 80), pred_boxes=Boxes(torch.tensor([[x, 20.0, x + 40, 60.0]])))
            found.scores, found.pred_classes = torch.tensor([score]), torch.tensor([0])
            evaluator.process([{"image_id": str(number)}], [{"instances": found}])
        results = evaluator.evaluate()["bbox"]
    finally:
        DatasetCatalog.remove("tiny_voc")
        MetadataCatalog.remove("tiny_voc")
    dogs = 100 * (1 / 3 + 1 / 3 * 2 / 3)
    assert results == pytest.approx({"AP": dogs / 2, "AP50": dogs / 2, "AP75": dogs / 2})


def test_panoptic_fpn_trains_and_evaluates(register, sample, tmp_path):
    register_coco_instances("tiny_things", {}, str(sample / "annotations/instances_train.json"), str(sample / "train"))
    try:
        dicts = DatasetCatalog.get("tiny_things")
        rng = np.random.default_rng(0)
        for entry in dicts:
            path = tmp_path / f"{entry['image_id']}.png"
            Image.fromarray(rng.integers(0, 3, (entry["height"], entry["width"]), dtype=np.uint8)).save(path)
            entry["sem_seg_file_name"] = str(path)
        classes = MetadataCatalog.get("tiny_things").thing_classes
        facts = {"stuff_classes": ["things", "a", "b"], "ignore_label": 255, "thing_classes": classes}
        register("tiny_panoptic", lambda: [dict(entry) for entry in dicts], evaluator_type="sem_seg", **facts)
        keys = {"MODEL.ROI_HEADS.NUM_CLASSES": "4", "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "3"}
        keys |= on("tiny_panoptic", ["tiny_things", "tiny_panoptic"])
        leaf = "COCO-PanopticSegmentation/panoptic_fpn_SGE_R_50_1x.yaml"
        results = train(configure(leaf, tmp_path / "run", **keys))
    finally:
        DatasetCatalog.remove("tiny_things")
        MetadataCatalog.remove("tiny_things")
    assert set(results["tiny_things"]) == {"bbox", "segm"}
    assert 0 <= results["tiny_panoptic"]["sem_seg"]["mIoU"] <= 100


def test_deeplab_trains_and_evaluates(register, tmp_path):
    rng = np.random.default_rng(0)
    dicts = []
    for number in range(2):
        image, labels = tmp_path / f"{number}.png", tmp_path / f"{number}_labels.png"
        Image.fromarray(rng.integers(0, 255, (64, 128, 3), dtype=np.uint8)).save(image)
        Image.fromarray(rng.integers(0, 3, (64, 128), dtype=np.uint8)).save(labels)
        size = {"height": 64, "width": 128}
        dicts.append({"file_name": str(image), "sem_seg_file_name": str(labels), "image_id": number, **size})
    facts = {"stuff_classes": ["a", "b", "c"], "ignore_label": 255, "evaluator_type": "sem_seg"}
    register("tiny_deeplab", lambda: [dict(entry) for entry in dicts], **facts)
    keys = {"MODEL.SEM_SEG_HEAD.NUM_CLASSES": "3", "INPUT.CROP.SIZE": "[64, 64]", **on("tiny_deeplab")}
    keys |= {"MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": "16", "MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS": "[8]"}
    results = train(
        configure("DeepLab/deeplab_v3_plus_SGE_R_50_os16_mg124_poly_90k_bs16.yaml", tmp_path / "run", **keys)
    )
    assert 0 <= results["sem_seg"]["mIoU"] <= 100


@pytest.mark.parametrize(
    ("kind", "package", "command"),
    [
        ("lvis", "lvis", "pip install lvis"),
        ("cityscapes_sem_seg", "cityscapesscripts", "pip install cityscapesscripts"),
        ("coco_panoptic_seg", "panopticapi", r"pip install git\+https://github.com/cocodataset/panopticapi"),
    ],
)
def test_a_missing_package_is_told_before_training(register, tmp_path, monkeypatch, kind, package, command):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    name = register("tiny_set", list, evaluator_type=kind)
    message = (
        rf"tiny_set is evaluated as {kind}, for which the package {package} is missing: {command}, or set DATASETS"
    )
    with pytest.raises(sge_det.UserError, match=message):
        configure("sample/faster_rcnn_SGE_R_50_FPN.yaml", tmp_path, **on(name))
