"""Generated COCO data, and pycocotools' metrics of it."""

import json

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO as SlowCOCO
from pycocotools.cocoeval import COCOeval

from sge_det.evaluation.coco import METRICS

SIZE = 160


def box_mask(box):
    x, y, width, height = (round(value) for value in box)
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    mask[y : y + height // 3, x : x + width // 3] = 0
    rle = mask_utils.encode(mask)
    return rle | {"counts": rle["counts"].decode()}


def generated(seed, large=True):
    """Crowds, tied scores, empty images, a category without objects, images with more than 100 detections."""
    rng = np.random.default_rng(seed)
    images = [{"id": 10 + 3 * i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE} for i in range(24)]
    categories = [{"id": i, "name": f"kind{i}"} for i in (1, 4, 5, 9)]
    annotations, detections = [], []

    def add(image, category, box, score):
        detections.append(
            {
                "image_id": image["id"],
                "category_id": int(category),
                "bbox": box,
                "score": round(float(score), 1),  # ties
                "segmentation": box_mask(box),
            }
        )

    for place, image in enumerate(images):
        for _ in range(0 if place % 6 == 5 else rng.integers(1, 9)):
            width, height = rng.integers(6, 130 if large else 60, 2).tolist()
            box = [int(rng.integers(0, SIZE - width)), int(rng.integers(0, SIZE - height)), width, height]
            mask = box_mask(box)
            category, crowd = int(rng.choice([1, 4, 5])), int(rng.random() < 0.15)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": float(mask_utils.area(mask)),
                    "iscrowd": crowd,
                    "segmentation": mask,
                }
            )
            for _ in range(rng.integers(0, 4)):
                x, y = (max(value + int(rng.integers(-4, 5)), 0) for value in box[:2])
                add(image, category, [x, y, width, height], rng.random())
        for _ in range(120 if place == 7 else 3):
            width, height = rng.integers(5, 80, 2).tolist()
            box = [*rng.integers(0, SIZE - 80, 2).tolist(), width, height]
            add(image, rng.choice([1, 4, 5, 9]), box, rng.random())
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def slow_metrics(truth, detections, task):
    """pycocotools, read off as its own summary does."""
    coco = SlowCOCO()
    coco.dataset = json.loads(json.dumps(truth))
    coco.createIndex()
    drop = "bbox" if task == "segm" else "segmentation"
    found = [{key: value for key, value in entry.items() if key != drop} for entry in detections]
    evaluation = COCOeval(coco, coco.loadRes(json.loads(json.dumps(found))), task)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    metrics = {name: evaluation.stats[place] for name, place in METRICS.items()}
    for place, category in enumerate(truth["categories"]):
        precision = evaluation.eval["precision"][:, :, place, 0, 2]
        metrics[f"AP-{category['name']}"] = precision.mean() if (precision > -1).all() else -1
    return {name: value * 100 if value >= 0 else float("nan") for name, value in metrics.items()}
