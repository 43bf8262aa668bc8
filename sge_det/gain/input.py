"""What a comparison is given: ground truth and results, checked strictly by type; suspicions are told."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.annotations import mask_fault, read_annotations
from ..errors import UserError
from ..evaluation.coco import METRICS, TASKS, metric_names

# COCO's, in pixels of area.
_SIZES = {"APs": (0, 32**2), "APm": (32**2, 96**2), "APl": (96**2, math.inf)}
_ALL_SIZES = [metric for metric in METRICS if metric not in _SIZES]
# A suspicion is told where more than this share of the detections, or of the images, gives cause to it.
_MOST = 0.5
# Boxes may leave their image by so many pixels, which rounding does.
_OUTSIDE = 1.0


class GroundTruth:
    """The annotations of a validation set: ``images`` and names of ``categories`` by id, ``annotations``, ``coco``.

    Raises:
        UserError: they cannot be read.
    """

    def __init__(self, path: str | Path):
        annotations = read_annotations(path)
        if not annotations.has_annotations:
            raise UserError(f"{path} has no list 'annotations': there is nothing to compare the detections with")
        self.content = content = annotations.content
        self.images: dict[int, dict] = {image["id"]: image for image in content["images"]}
        self.categories: dict[int, str] = {entry["id"]: entry["name"] for entry in content["categories"]}
        self.annotations: list[dict] = content["annotations"]
        self.has_masks = any(entry.get("segmentation") for entry in self.annotations)
        self.coco = annotations.coco

    def annotations_of(self, image_id: int) -> list[dict]:
        """The objects and crowd regions of an image."""
        return [entry for entry in self.annotations if entry["image_id"] == image_id]

    def images_by_metric(self) -> dict[str, int]:
        """By metric, the number of images with an object that it is of: of its size or category; crowds are none."""
        metrics = metric_names(self.content["categories"])
        by_category = dict(zip(sorted(self.categories), metrics[len(METRICS) :], strict=True))
        images: dict[str, set[int]] = {metric: set() for metric in metrics}
        for entry in self.annotations:
            if not entry.get("iscrowd"):
                sizes = [size for size, (least, most) in _SIZES.items() if least <= entry["area"] <= most]
                for metric in (*_ALL_SIZES, *sizes, by_category[entry["category_id"]]):
                    images[metric].add(entry["image_id"])
        return {metric: len(of_metric) for metric, of_metric in images.items()}

    def read_detections(self, path: str | Path) -> list[dict]:
        """Reads detections in COCO's result format and checks them.

        Raises:
            UserError: the file is missing or malformed, names an image or a category that is not annotated, or has a
                score, a box or a mask that is none; says at which place of the list.
        """
        detections = _read_list(path)
        for place, detection in enumerate(detections):
            fault = self._fault(detection)
            if fault:
                image = detection.get("image_id") if isinstance(detection, dict) else None
                where = f" (image {image})" if type(image) is int and image in self.images else ""
                raise UserError(f"{path}, detection {place}{where}: {fault}")
        return detections

    def _fault(self, detection: Any) -> str | None:
        """What is wrong with a detection, if anything."""
        if not isinstance(detection, dict):
            return f"it is {_shown(detection)}, not an object with image_id, category_id, bbox and score"
        for key in ("image_id", "category_id", "bbox", "score"):
            if key not in detection:
                return f"it lacks {key!r}, so this is not in COCO's result format"
        for key in ("image_id", "category_id"):
            if type(detection[key]) is not int:
                return f"the {key} {_shown(detection[key])} is not a whole number"
        if detection["image_id"] not in self.images:
            return f"image {detection['image_id']} is not in the ground truth; these results are of another data set"
        if detection["category_id"] not in self.categories:
            return (
                f"category {detection['category_id']} is not in the ground truth; COCO's own category ids are needed, "
                "not contiguous ones"
            )
        if not _is_number(detection["score"]):
            return f"the score {_shown(detection['score'])} is not a number"
        if not math.isfinite(detection["score"]):
            return f"the score is not a finite number, but {detection['score']}"
        box = detection["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return f"the bbox {_shown(box)} is not four numbers x, y, width, height"
        if not all(map(math.isfinite, box)):
            return f"the bbox {_shown(box)} is not four finite numbers"
        if box[2] < 0 or box[3] < 0:
            return f"the box {_shown(box)} has a negative width or height; boxes are x, y, width, height"
        if "segmentation" not in detection:
            return None
        image = self.images[detection["image_id"]]
        return result_mask_fault(detection["segmentation"], (image["height"], image["width"]))

    def suspicions(self, name: str, detections: Sequence[Mapping]) -> list[str]:
        """What looks wrong with the detections of a file that are well-formed, a sentence for each; ``name`` it."""
        if not detections:
            return [f"{name} holds no detection at all: it scores 0."]
        found = []
        boxes = np.array([detection["bbox"] for detection in detections], dtype=float)
        scores = np.array([detection["score"] for detection in detections], dtype=float)
        of_images = [self.images[detection["image_id"]] for detection in detections]
        sizes = np.array([(image["width"], image["height"]) for image in of_images], dtype=float)
        if scores.min() < 0 or scores.max() > 1:
            found.append(f"{name} has scores from {scores.min():g} to {scores.max():g}, where 0 to 1 is usual.")
        if boxes.max() <= 1 and sizes.min() > 2:
            found.append(f"The boxes of {name} are at most 1 pixel: they look normalised, and pixels are needed.")
        leaves = (boxes[:, :2] + boxes[:, 2:] > sizes + _OUTSIDE).any(1)
        as_corners = (boxes[:, 2:] >= boxes[:, :2]).all(1) & (boxes[:, 2:] <= sizes + _OUTSIDE).all(1)
        if (leaves & as_corners).mean() > _MOST / 2 and as_corners.mean() > 1 - _MOST / 10:
            found.append(
                f"{leaves.mean():.0%} of the boxes of {name} leave their image: they look like corners x1, y1, x2, y2, "
                "and x, y, width, height are needed."
            )
        same = len(detections) - len(
            {(d["image_id"], d["category_id"], d["score"], *d["bbox"], str(d.get("segmentation"))) for d in detections}
        )
        if same >= _MOST * len(detections):
            found.append(f"{same} of the {len(detections)} detections of {name} are given twice.")
        with_objects = {entry["image_id"] for entry in self.annotations}
        seen = with_objects & {detection["image_id"] for detection in detections}
        if len(seen) < _MOST * len(with_objects):
            found.append(f"{name} has detections for {len(seen)} of the {len(with_objects)} images with objects.")
        return found


@dataclass(frozen=True)
class ResultFile:
    """A file of detections of a run: ``arm``, ``seed``, ``path``, and the SHA-256 of its content."""

    arm: str
    seed: int
    path: Path
    digest: str


def result_files(detections: Mapping[str, Sequence[str | Path]], seeds: Sequence[int]) -> list[ResultFile]:
    """The files of a comparison; looks at their content alone, not at what it means.

    Raises:
        UserError: a name is none, the arms do not have the same number of files, a file cannot be read, or an arm has
            the same file twice, by name or by content: one run is no two seeds.
    """
    reference = next(iter(detections))
    for name, files in detections.items():
        if not name.strip() or not name.isprintable():
            raise UserError(f"the arm name {name!r} cannot be shown: give one of letters that print")
        if len(files) != len(seeds) or not files:
            raise UserError(
                f"arm {name} has {len(files)} result files and {reference} has {len(detections[reference])}: a "
                "comparison, paired or not, needs one file for each seed in every arm, in the order of the seeds"
            )
    found = []
    for name, files in detections.items():
        own: dict[str, Path] = {}
        for seed, path in zip(seeds, map(Path, files)):
            digest = hashlib.sha256(_read(path)).hexdigest()
            if digest in own:
                raise UserError(
                    f"arm {name}: {path} and {own[digest]} have the same content, so they are one run and not two "
                    "seeds; give a file of another seed"
                )
            own[digest] = path
            found.append(ResultFile(name, seed, path, digest))
    return found


def equal_files(files: Sequence[ResultFile]) -> list[str]:
    """A sentence for each file that two arms share by content."""
    first: dict[str, ResultFile] = {}
    found = []
    for file in files:
        other = first.setdefault(file.digest, file)
        if other is not file:
            found.append(
                f"{file.path} of {file.arm} has the same content as {other.path} of {other.arm}: it is the same "
                "detector under two names."
            )
    return found


def tasks_of(truth: GroundTruth, files: Sequence[ResultFile]) -> tuple[str, ...]:
    """What is compared, by the first file that holds detections: an empty one does not tell."""
    boxes = next(filter(None, (truth.read_detections(file.path) for file in files)), [])
    return TASKS if truth.has_masks and has_masks(boxes) else TASKS[:1]


def has_masks(detections: Sequence[Mapping]) -> bool:
    """Whether all detections have masks."""
    return bool(detections) and all("segmentation" in detection for detection in detections)


def result_mask_fault(mask: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with the mask of a detection, if anything; ``size``: height and width of its image."""
    if isinstance(mask, list):
        is_sound = bool(mask) and all(map(_is_polygon, mask))
        return None if is_sound else "its mask is a list, but not of polygons [x, y, x, y, ...] of at least 3 points"
    return mask_fault(mask, size)


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(_is_number(value) and math.isfinite(value) for value in points)
    )


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold; True and False are none."""
    if type(value) is int:
        return abs(value) < 1 << 1023
    return type(value) is float


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"there is no result file {path}") from error
    except OSError as error:
        raise UserError(f"the result file {path} cannot be read: {error.strerror}") from error


def _read_list(path: str | Path) -> list:
    try:
        content = json.loads(_read(Path(path)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(content, list):
        raise UserError(f"{path} is not in COCO's result format: it must be a list of detections")
    return content


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
