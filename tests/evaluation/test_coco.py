import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from generated_coco import SIZE, generated, slow_metrics
from hotcoco import COCO
from pycocotools import mask as mask_utils

from sge_det.data.datasets import register_dataset
from sge_det.evaluation.coco import HotcocoEvaluator, build_evaluator, coco_metrics, evaluate_detections


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_equal_pycocotools(task, seed):
    truth, detections = generated(seed, large=seed < 2)
    metrics = coco_metrics(evaluate_detections(COCO(truth), detections, task))
    wanted = slow_metrics(truth, detections, task)
    assert list(metrics) == list(wanted)
    assert np.isnan(metrics["AP-kind9"])
    assert np.isnan(metrics["APl"]) == (seed == 2)
    assert 1 < metrics["AP"] < 99
    for name in wanted:
        assert metrics[name] == pytest.approx(wanted[name], abs=1e-6, nan_ok=True), name


def test_no_detections_score_zero():
    truth, _ = generated(0)
    metrics = coco_metrics(evaluate_detections(COCO(truth), [], "segm"))
    assert metrics["AP"] == metrics["AP-kind1"] == 0
    assert np.isnan(metrics["AP-kind9"])


@pytest.fixture
def registered(tmp_path):
    truth, detections = generated(3)
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(truth))
    for image in truth["images"]:
        (tmp_path / image["file_name"]).touch()
    register_dataset("generated_val", str(file), str(tmp_path))
    ids = {category["id"]: place for place, category in enumerate(truth["categories"])}
    MetadataCatalog.get("generated_val").set(thing_dataset_id_to_contiguous_id=ids)
    inputs, outputs = [], []
    for image in truth["images"]:
        own = [entry for entry in detections if entry["image_id"] == image["id"]]
        instances = Instances((SIZE, SIZE))
        boxes = torch.tensor([entry["bbox"] for entry in own], dtype=torch.float32).reshape(-1, 4)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
        instances.scores = torch.tensor([entry["score"] for entry in own])
        instances.pred_classes = torch.tensor([ids[entry["category_id"]] for entry in own], dtype=torch.int64)
        masks = [mask_utils.decode(entry["segmentation"]) for entry in own]
        instances.pred_masks = torch.from_numpy(np.array(masks).reshape(-1, SIZE, SIZE)).bool()
        inputs.append({"image_id": image["id"]})
        outputs.append({"instances": instances})
    return inputs, outputs


def evaluated(evaluator, inputs, outputs):
    evaluator.reset()
    evaluator.process(inputs, outputs)
    return evaluator.evaluate()


def test_evaluator_gives_detectron2s_results_and_file(registered, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tasks = ("bbox", "segm")
    ours = evaluated(HotcocoEvaluator("generated_val", tasks, False, str(tmp_path / "a")), *registered)
    theirs = evaluated(
        COCOEvaluator("generated_val", tasks, False, str(tmp_path / "b"), use_fast_impl=False), *registered
    )
    assert list(ours) == list(theirs) == ["bbox", "segm"]
    for task in tasks:
        assert ours[task] == pytest.approx(theirs[task], abs=1e-6, nan_ok=True)
    files = [json.loads((tmp_path / folder / "coco_instances_results.json").read_text()) for folder in "ab"]
    assert files[0] == files[1]
    assert {entry["category_id"] for entry in files[0]} == {1, 4, 5, 9}
    assert "Per-category segm AP" in caplog.text
    assert "took" in caplog.text


def test_evaluator_on_some_images(registered, tmp_path):
    ids = [10, 13, 16, 31]
    results = []
    for kind, folder in ((HotcocoEvaluator, "a"), (COCOEvaluator, "b")):
        evaluator = kind("generated_val", ("bbox",), False, str(tmp_path / folder))
        evaluator.reset()
        evaluator.process(*registered)
        results.append(evaluator.evaluate(ids)["bbox"])
    assert results[0] == pytest.approx(results[1], abs=1e-6, nan_ok=True)


def test_evaluator_of_a_config_has_its_tasks(registered, tmp_path):
    from sge_det import get_config

    cfg = get_config("sample/mask_rcnn_SGE_R_50_FPN.yaml", ["OUTPUT_DIR", str(tmp_path)])
    results = evaluated(
        build_evaluator(cfg, "generated_val"), registered[0], [{"instances": o["instances"][:0]} for o in registered[1]]
    )
    assert results["bbox"]["AP"] == results["segm"]["AP"] == 0


def test_a_set_without_annotations_has_detections_and_no_metrics(registered, tmp_path):
    inputs, outputs = registered
    truth = json.loads((tmp_path / "instances.json").read_text())
    del truth["annotations"]
    (tmp_path / "unannotated.json").write_text(json.dumps(truth))
    register_dataset("generated_unannotated", str(tmp_path / "unannotated.json"), str(tmp_path))
    ids = MetadataCatalog.get("generated_val").thing_dataset_id_to_contiguous_id
    MetadataCatalog.get("generated_unannotated").set(thing_dataset_id_to_contiguous_id=ids)
    evaluator = HotcocoEvaluator("generated_unannotated", ("bbox",), False, str(tmp_path / "out"), use_fast_impl=False)
    assert evaluated(evaluator, inputs, outputs) == {}
    found = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert len(found) == sum(len(output["instances"]) for output in outputs) > 0
