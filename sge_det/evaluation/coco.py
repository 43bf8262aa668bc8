"""COCO metrics of boxes and masks, by hotcoco: pycocotools' numbers, in a fraction of its time."""

import contextlib
import functools
import importlib
import importlib.util
import itertools
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import hotcoco
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.evaluation.coco_evaluation import _evaluate_predictions_on_coco
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from PIL import Image

from ..errors import UserError
from ..files import make_folder, write_file

logger = logging.getLogger(__name__)

TASKS = ("bbox", "segm")
_PACKAGES = {
    "lvis": "lvis",
    "cityscapes_instance": "cityscapesscripts",
    "cityscapes_sem_seg": "cityscapesscripts",
    "coco_panoptic_seg": "panopticapi",
}
# PyPI has no panopticapi.
_SOURCES = {"panopticapi": "git+https://github.com/cocodataset/panopticapi"}
# The places of the summary metrics in COCO's list of twelve.
METRICS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}


def evaluate_detections(
    ground_truth: hotcoco.COCO, detections: Sequence[dict], task: str, image_ids: Sequence[int] | None = None
) -> hotcoco.COCOeval:
    """Evaluates detections under COCO's protocol (at most 100 an image).

    Args:
        ground_truth: COCO instances.
        detections: in COCO's result format; may be empty.
        task: "bbox" or "segm". Detections count as small, medium or large by the area of what is evaluated.
        image_ids: the images to evaluate on; all by default.

    Returns:
        the evaluation, accumulated and summarized.
    """
    used = ("image_id", "category_id", "score", "segmentation" if task == "segm" else "bbox")
    results = ground_truth.load_res([{key: detection[key] for key in used} for detection in detections])
    evaluation = hotcoco.COCOeval(ground_truth, results, task)
    if image_ids is not None:
        evaluation.params.img_ids = list(image_ids)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summary_lines()
    return evaluation


def coco_metrics(evaluation: hotcoco.COCOeval) -> dict[str, float]:
    """The metrics of an evaluation, in points (0-100).

    Returns:
        AP, AP50, AP75, APs, APm, APl, AR100 and "AP-" + name for each category (and its id, where several have that
        name), in the order of the category ids. NaN where the data set has no object of that size or category.
    """
    metrics = {name: _points(evaluation.stats[place]) for name, place in METRICS.items()}
    # (IoU thresholds, recalls, categories, sizes, numbers of detections); the first size is all, the last number 100
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    names = metric_names(evaluation.coco_gt.dataset["categories"])[len(METRICS) :]
    for place, name in enumerate(names):
        values = precision[:, :, place]
        values = values[values > -1]
        metrics[name] = _points(values.mean() if values.size else -1)
    return metrics


def metric_names(categories: Sequence[dict]) -> list[str]:
    """The names of the metrics of :func:`coco_metrics` for COCO's ``categories``, in its order, each different."""
    by_id = {category["id"]: str(category["name"]) for category in categories}
    while len(set(by_id.values())) < len(by_id):
        counts = Counter(by_id.values())
        by_id = {key: f"{name} {key}" if counts[name] > 1 else name for key, name in by_id.items()}
    return [*METRICS, *(f"AP-{by_id[key]}" for key in sorted(by_id))]


def _points(fraction: float) -> float:
    return float(fraction) * 100 if fraction >= 0 else float("nan")


# Of an image's id; above it numbers of floating point leave some out.
_MOST_ID = 1 << 53
_COUNTING = {
    "images": ("id", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"),
}


class HotcocoEvaluator(COCOEvaluator):
    """Detectron2's ``COCOEvaluator`` with the metrics of boxes and masks from hotcoco.

    Files, tables and results are Detectron2's; so are the metrics of keypoints, of proposals, and of another number
    of detections an image than 100. A model that detects nothing at all has AP 0, as in COCO, not NaN.
    """

    def __init__(self, dataset_name: str, *args, **kwargs):
        metadata = MetadataCatalog.get(dataset_name)
        is_by_function = not metadata.get("json_file")
        super().__init__(dataset_name, *args, **kwargs)
        if is_by_function:
            # the file that it was converted to is this run's alone, and another's may not find it
            del metadata.json_file

    def evaluate(self, img_ids: Sequence[int] | None = None) -> dict:
        if self._output_dir and comm.is_main_process():
            make_folder(Path(self._output_dir))  # one that Detectron2 makes might not outlast a power cut
        return super().evaluate(img_ids)

    def _eval_predictions(self, predictions: list[dict], img_ids: Sequence[int] | None = None) -> None:
        results = list(itertools.chain(*(prediction["instances"] for prediction in predictions)))
        tasks = sorted(self._tasks or self._tasks_from_predictions(results))
        contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if contiguous is not None:
            dataset_ids = {value: key for key, value in contiguous.items()}
            for result in results:
                result["category_id"] = dataset_ids[result["category_id"]]
        if self._output_dir:
            write_file(Path(self._output_dir, "coco_instances_results.json"), json.dumps(results))
        if not self._do_evaluation:
            logger.info("the data set has no annotations to evaluate against")
            return
        start = time.perf_counter()
        evaluations = {task: self._evaluate(results, task, img_ids) for task in tasks}
        seconds = time.perf_counter() - start
        for task, evaluation in evaluations.items():
            names = self._metadata.get("thing_classes")
            self._results[task] = self._derive_coco_results(evaluation, task, class_names=names)
        logger.info(f"the metrics of {len(results)} detections ({', '.join(tasks)}) took {seconds:.2f} s")

    def _evaluate(self, results: list[dict], task: str, img_ids: Sequence[int] | None):
        if task in TASKS and self._max_dets_per_image[-1] == 100:
            content, results, img_ids = _for_hotcoco(self._coco_api.dataset, results, img_ids)
            return evaluate_detections(hotcoco.COCO(content), results, task, img_ids)
        if not results:
            return None
        return _evaluate_predictions_on_coco(
            self._coco_api,
            results,
            task,
            kpt_oks_sigmas=self._kpt_oks_sigmas,
            img_ids=img_ids,
            max_dets_per_image=self._max_dets_per_image,
        )


def _for_hotcoco(
    content: dict, results: Sequence[dict], image_ids: Sequence | None
) -> tuple[dict, Sequence[dict], Sequence[int] | None]:
    """Ground truth, detections and images as hotcoco takes them: what counts alone, and whole numbers for ids.

    It parses all that a file holds against fixed types, which exporters do not keep; and sets that a function makes
    have ids of any kind, which are numbered in the order of the images.
    """
    ids = [image["id"] for image in content["images"]]
    are_plain = all(type(number) is int and 0 <= number <= _MOST_ID for number in ids)
    numbers = dict(zip(ids, ids if are_plain else range(len(ids)), strict=True))

    def taken(key: str) -> list[dict]:
        return [{name: entry[name] for name in _COUNTING[key] if name in entry} for entry in content[key]]

    def numbered(entries: Sequence[dict]) -> Sequence[dict]:
        return [{**entry, "image_id": numbers[entry["image_id"]]} for entry in entries]

    objects = numbered(taken("annotations"))
    if not all(type(entry["id"]) is int and 0 <= entry["id"] <= _MOST_ID for entry in objects):
        objects = [{**entry, "id": number} for number, entry in enumerate(objects, 1)]
    images = [{**image, "id": numbers[image["id"]]} for image in taken("images")]
    plain = {"images": images, "annotations": objects, "categories": taken("categories")}
    if are_plain:
        return plain, results, image_ids
    return plain, numbered(results), None if image_ids is None else [numbers[own] for own in image_ids]


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str = "inference") -> DatasetEvaluator:
    """The evaluator for the ``evaluator_type`` of a data set.

    COCO's is :class:`HotcocoEvaluator` (boxes, and masks and keypoints where the model has them), which serves sets
    without a type too; "pascal_voc", "lvis", "cityscapes_instance", "cityscapes_sem_seg", "sem_seg" and
    "coco_panoptic_seg" get Detectron2's own. It writes to ``folder`` in ``OUTPUT_DIR``, with several test sets to a
    folder for each in it.

    Raises:
        UserError: there is no evaluator of that type, or a package that it needs is missing.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, folder)
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type") or "coco"
    try:
        evaluators = _evaluators(kind, cfg, dataset_name, folder)
    except ImportError as error:
        raise UserError(f"{dataset_name} is evaluated as {kind}, for which a package is missing: {error}") from error
    if not evaluators:
        raise UserError(
            f"the data set {dataset_name} has the evaluator_type {kind!r}, which is none of coco, pascal_voc, lvis, "
            "cityscapes_instance, cityscapes_sem_seg, sem_seg and coco_panoptic_seg"
        )
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def check_packages(names: Sequence[str]) -> None:
    """Checks that the packages are there with which data sets are evaluated, which Detectron2 imports late.

    Raises:
        UserError: one is missing.
    """
    for name in names:
        kind = MetadataCatalog.get(name).get("evaluator_type") or "coco"
        package = _PACKAGES.get(kind)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(
                f"the data set {name} is evaluated as {kind}, for which the package {package} is missing: "
                f"pip install {_SOURCES.get(package, package)}, or set DATASETS.TEST ()"
            )


def _read_labels(path: str, copy: bool = False, dtype: type | None = None) -> np.ndarray:
    """A picture of labels, (H, W); Detectron2's own reader asks for it without a copy, which NumPy 2 refuses."""
    with PathManager.open(path, "rb") as file:
        return np.asarray(Image.open(file), dtype=dtype)


class _CityscapesInstanceEvaluator(CityscapesInstanceEvaluator):
    """Detectron2's, whose package writes a file into the working folder, which fails where NumPy is new."""

    def evaluate(self) -> dict | None:
        import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as script

        write = script.writeDict2JSON
        script.writeDict2JSON = lambda content, file: None if file == "matches.json" else write(content, file)
        try:
            with _old_numpy():
                return super().evaluate()
        finally:
            script.writeDict2JSON = write


class _CityscapesSemSegEvaluator(CityscapesSemSegEvaluator):
    def evaluate(self) -> dict | None:
        with _old_numpy():
            return super().evaluate()


class _PascalVOCEvaluator(PascalVOCDetectionEvaluator):
    """Detectron2's, whose reader of XML wants fields that no metric reads and labelling tools leave out."""

    def evaluate(self) -> dict | None:
        script = importlib.import_module(PascalVOCDetectionEvaluator.__module__)
        parse = script.parse_rec
        script.parse_rec = functools.cache(_voc_objects)
        try:
            return super().evaluate()
        finally:
            script.parse_rec = parse


def _voc_objects(file: str) -> list[dict]:
    """The objects of an XML file of Pascal VOC, as Detectron2's evaluation takes them."""
    with PathManager.open(file) as opened:
        found = ElementTree.parse(opened).findall("object")
    return [
        {
            "name": entry.findtext("name"),
            "difficult": int(entry.findtext("difficult") or 0),
            "bbox": [float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")],
        }
        for entry in found
    ]


class _LVISEvaluator(LVISEvaluator):
    def evaluate(self) -> dict | None:
        with _old_numpy():
            return super().evaluate()


@contextlib.contextmanager
def _old_numpy() -> Iterator[None]:
    """Names that the packages of LVIS and Cityscapes call, and that new NumPys have no more."""
    added = {name: value for name, value in (("in1d", np.isin), ("float", float)) if name not in vars(np)}
    for name, value in added.items():
        setattr(np, name, value)
    try:
        yield
    finally:
        for name in added:
            delattr(np, name)


def _evaluators(kind: str, cfg: CfgNode, name: str, folder: str) -> list[DatasetEvaluator]:
    evaluators: list[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluator(name, output_dir=folder, sem_seg_loading_fn=_read_labels))
    if kind in ("coco", "coco_panoptic_seg"):
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        tasks = model_tasks(cfg)
        # a file that an earlier run converted may be of another state of the data set
        options = {"use_fast_impl": False, "kpt_oks_sigmas": sigmas, "allow_cached_coco": False}
        evaluators.append(HotcocoEvaluator(name, tasks, output_dir=folder, **options))
    if kind == "coco_panoptic_seg":
        evaluators.append(COCOPanopticEvaluator(name, folder))
    if kind == "cityscapes_instance":
        evaluators.append(_CityscapesInstanceEvaluator(name))
    if kind == "cityscapes_sem_seg":
        evaluators.append(_CityscapesSemSegEvaluator(name))
    if kind == "pascal_voc":
        evaluators.append(_PascalVOCEvaluator(name))
    if kind == "lvis":
        evaluators.append(_LVISEvaluator(name, model_tasks(cfg), output_dir=folder))
    return evaluators


def model_tasks(cfg: CfgNode) -> tuple[str, ...]:
    """What the model of ``cfg`` predicts: "bbox", and "segm" and "keypoints" where it has those heads."""
    heads = {"segm": cfg.MODEL.MASK_ON, "keypoints": cfg.MODEL.KEYPOINT_ON}
    return ("bbox", *(task for task, has in heads.items() if has))
