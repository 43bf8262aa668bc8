"""Each kind of data set gets its evaluator, and models of each kind train and evaluate on small generated sets."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2 import evaluation
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from sge_det import UserError
from sge_det.data.loader import build_train_loader
from sge_det.engine.training import setup_config, train
from sge_det.evaluation.coco import HotcocoEvaluator, build_evaluator

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
SLIM = [*TINY, "MODEL.RESNETS.DEPTH", "18", "SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture
def register():
    """Registers sets for the time of a test."""
    names = []

    def add(name, dicts=list, **metadata):
        DatasetCatalog.register(name, dicts)
        MetadataCatalog.get(name).set(**metadata)
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("kind", "evaluator"),
    [("coco", HotcocoEvaluator), (None, HotcocoEvaluator), ("sem_seg", evaluation.SemSegEvaluator)],
)
def test_each_type_has_its_evaluator(register, sample, sample_datasets, tmp_path, kind, evaluator):
    cfg = setup_config(FASTER, [*SLIM, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    metadata = {
        "json_file": str(sample / "annotations/instances_val.json"),
        "stuff_classes": ["a"],
        "ignore_label": 255,
    }
    name = register("typed", **metadata, **({"evaluator_type": kind} if kind else {}))
    assert type(build_evaluator(cfg, name)) is evaluator


def test_pascals_evaluator_is_detectron2s(register, sample_datasets, tmp_path):
    cfg = setup_config(FASTER, [*SLIM, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    (tmp_path / "voc").mkdir()
    facts = {"dirname": str(tmp_path / "voc"), "year": 2007, "split": "test", "thing_classes": ["a"]}
    name = register("voc", evaluator_type="pascal_voc", **facts)
    assert isinstance(build_evaluator(cfg, name), evaluation.PascalVOCDetectionEvaluator)


def test_an_unknown_type_is_told(register, sample_datasets, tmp_path):
    cfg = setup_config(FASTER, [*SLIM, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    name = register("unknown", evaluator_type="odd")
    with pytest.raises(UserError, match="unknown has the evaluator_type 'odd'"):
        build_evaluator(cfg, name)


def test_semantic_segmentation_trains_and_evaluates(register, tmp_path):
    generator = np.random.default_rng(0)
    dicts = []
    for index in range(3):
        image, labels = tmp_path / f"{index}.png", tmp_path / f"{index}_labels.png"
        Image.fromarray(generator.integers(0, 255, (64, 80, 3), dtype=np.uint8)).save(image)
        Image.fromarray(generator.integers(0, 3, (64, 80), dtype=np.uint8)).save(labels)
        # neither width nor height, which Detectron2's loader takes from the image
        dicts.append({"file_name": str(image), "sem_seg_file_name": str(labels), "image_id": index})
    facts = {"stuff_classes": ["a", "b", "c"], "ignore_label": 255, "evaluator_type": "sem_seg"}
    name = register("semantic", lambda: [dict(entry) for entry in dicts], **facts)
    overrides = ["MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]
    overrides += [
        "DATASETS.TRAIN",
        f"('{name}',)",
        "DATASETS.TEST",
        f"('{name}',)",
        "OUTPUT_DIR",
        str(tmp_path / "run"),
    ]
    cfg = setup_config(FASTER, [*SLIM, *overrides])
    results = train(cfg)
    assert 0 <= results["sem_seg"]["mIoU"] <= 100


@pytest.fixture
def with_keypoints(sample, tmp_path):
    """The sample as a set of keypoints: two for each object of one image, one for the others."""
    content = json.loads((sample / "annotations/instances_train.json").read_text())
    rich = content["annotations"][0]["image_id"]
    content["categories"] = [{"id": 1, "name": "thing", "keypoints": ["left_end", "right_end"], "skeleton": [[1, 2]]}]
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        seen = 2 if entry["image_id"] == rich else 0
        entry |= {"category_id": 1, "iscrowd": 0, "num_keypoints": 1 + seen // 2}
        entry["keypoints"] = [x + width / 4, y + height / 2, 2, x + width / 2, y + height / 2, seen]
    path = tmp_path / "keypoints.json"
    path.write_text(json.dumps(content))
    count = sum(2 if entry["image_id"] == rich else 1 for entry in content["annotations"] if entry["image_id"] == rich)
    return ("tiny_points", str(path), str(sample / "train")), count


KEYPOINTS = [*SLIM, "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"]


def test_keypoints_of_a_data_set_by_file_train_and_evaluate(with_keypoints, tmp_path):
    triple, _ = with_keypoints
    sigmas = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]", "OUTPUT_DIR", str(tmp_path / "run")]
    cfg = setup_config(FASTER, [*KEYPOINTS, *sigmas], [triple])
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 2
    assert MetadataCatalog.get("tiny_points").keypoint_flip_map == [("left_end", "right_end")]
    results = train(cfg)
    assert set(results) == {"bbox", "keypoints"}


def test_keypoints_that_do_not_fit_are_told(with_keypoints, sample_datasets):
    triple, _ = with_keypoints
    with pytest.raises(UserError, match=r"tiny_points has 2 keypoints.*KEYPOINT_OKS_SIGMAS"):
        setup_config(FASTER, KEYPOINTS, [triple])
    with pytest.raises(UserError, match="NUM_KEYPOINTS is 5, but tiny_points has 2"):
        setup_config(FASTER, [*KEYPOINTS, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5"], [triple])
    with pytest.raises(UserError, match="no category of tiny_train lists its keypoints"):
        setup_config(FASTER, KEYPOINTS, sample_datasets)


def test_images_with_few_keypoints_do_not_train(with_keypoints):
    triple, count = with_keypoints
    least = ["MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", str(count), "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]"]
    cfg = setup_config(FASTER, [*KEYPOINTS, *least], [triple])
    loader = build_train_loader(cfg, 0)
    points = [
        sum(sum(seen > 0 for seen in entry["keypoints"][2::3]) for entry in example["annotations"])
        for example in loader.dataset.examples
    ]
    assert points and min(points) >= count
    assert len(points) < len(DatasetCatalog.get("tiny_points"))


def test_proposals_reach_the_training_loader(sample_datasets, tmp_path):
    cfg = setup_config(FASTER, SLIM, sample_datasets)
    ids = [example["image_id"] for example in DatasetCatalog.get("tiny_train")]
    boxes = np.array([[4.0, 6.0, 30.0, 40.0], [10.0, 10.0, 50.0, 60.0]], dtype=np.float32)
    scores = np.array([0.5, 0.25], dtype=np.float32)
    file = tmp_path / "proposals.pkl"
    found = {"ids": ids, "boxes": [boxes] * len(ids), "objectness_logits": [scores] * len(ids), "bbox_mode": 0}
    file.write_bytes(pickle.dumps(found))
    cfg.MODEL.LOAD_PROPOSALS = True
    for files, reason in (((), "names 0 files for 1"), ((str(tmp_path / "no.pkl"),), "no.pkl, which does not exist")):
        cfg.DATASETS.PROPOSAL_FILES_TRAIN = files
        with pytest.raises(UserError, match=reason):
            build_train_loader(cfg, 0)
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(file),)
    batch = next(iter(build_train_loader(cfg, 0)))
    assert [example["proposals"].proposal_boxes.tensor.shape for example in batch] == [(2, 4)] * 2


def test_c4_trains_and_evaluates(sample_datasets, tmp_path):
    c4 = ["MODEL.BACKBONE.NAME", "build_sge_resnet_backbone", "MODEL.ROI_HEADS.NAME", "SGERes5ROIHeads"]
    c4 += ["MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"]
    c4 += ["MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    short = [*TINY, "SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path)]
    cfg = setup_config(FASTER, [*short, *c4], sample_datasets)
    assert set(train(cfg)) == {"bbox"}


IDS = {"texts": "image-{}".format, "huge": (10**30).__add__, "negative": (-9).__add__, "plain": (1).__add__}


@pytest.mark.parametrize("ids", IDS)
def test_a_set_by_a_function_evaluates_as_in_detectron2(register, sample_datasets, tmp_path, ids):
    """Whatever its images' ids: the metrics are those of Detectron2's own evaluator, and so is what is written."""
    cfg = setup_config(FASTER, [*SLIM, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    dicts = DatasetCatalog.get("tiny_val")
    for number, entry in enumerate(dicts):
        entry["image_id"] = IDS[ids](number)
    name = register("by_function", lambda: copy.deepcopy(dicts), thing_classes=["a", "b", "c", "d"])
    metrics = []
    for evaluator in (build_evaluator(cfg, name), COCOEvaluator(name, ("bbox",), output_dir=str(tmp_path / "theirs"))):
        evaluator.reset()
        for entry in dicts:
            found = Instances((entry["height"], entry["width"]))
            boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in entry["annotations"]]
            found.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4) + 1)
            found.pred_classes = torch.tensor([a["category_id"] for a in entry["annotations"]], dtype=torch.long)
            found.scores = torch.linspace(0.9, 0.3, len(boxes))
            evaluator.process([entry], [{"instances": found}])
        metrics.append(evaluator.evaluate()["bbox"])
    ours, theirs = metrics
    assert 20 < ours["AP"] < 100
    assert ours == pytest.approx(theirs, nan_ok=True)
    written = json.loads((tmp_path / "inference/coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in written} <= {entry["image_id"] for entry in dicts}


def test_a_set_by_a_function_trains_and_evaluates(register, sample_datasets, tmp_path):
    setup_config(FASTER, SLIM, sample_datasets)
    dicts = [entry | {"image_id": f"id {n}"} for n, entry in enumerate(DatasetCatalog.get("tiny_val"))]
    name = register("by_function", lambda: copy.deepcopy(dicts), thing_classes=["a", "b", "c", "d"])
    sets = ["DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)", "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    cfg = setup_config(FASTER, [*SLIM, *sets, "OUTPUT_DIR", str(tmp_path)])
    assert set(train(cfg)) == {"bbox"}
    assert MetadataCatalog.get(name).get("json_file") is None
    dicts[1]["annotations"][0]["bbox"] = [1, 2, float("nan"), 4]
    with pytest.raises(UserError, match=r"by_function: entry 1 .*annotation 0 has the bbox"):
        setup_config(FASTER, [*SLIM, *sets, "OUTPUT_DIR", str(tmp_path)])


def test_a_test_set_that_cannot_be_converted_ends_a_run_before_its_first_iteration(register, sample_datasets, tmp_path):
    cfg = setup_config(FASTER, [*SLIM, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    dicts = DatasetCatalog.get("tiny_val")
    dicts[2]["annotations"][0]["segmentation"] = "no mask"
    cfg.DATASETS.TEST = (register("by_function", lambda: dicts, thing_classes=["a", "b", "c", "d"]),)
    with pytest.raises(UserError, match=r"the test set by_function cannot be evaluated \(TypeError"):
        train(cfg)
    assert not list(tmp_path.glob("*.pth"))
