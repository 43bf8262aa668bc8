"""Which detections match which objects, as compact arrays that metrics of weighted images are made from.

COCO's protocol as in pycocotools' ``COCOeval.evaluateImg``. hotcoco and pycocotools hold the same in ``evalImgs``, as a
dictionary for each image, category and size, which takes a minute and gigabytes to read on a set like val2017.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import hotcoco
import numpy as np

# Least and largest area of an object of a size, in pixels, both inclusive.
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
THRESHOLDS = np.linspace(0.5, 0.95, 10)
MOST_DETECTIONS = 100


@dataclass(frozen=True)
class Matches:
    """The matches of a detector on a data set of I images and C categories, for A sizes and T IoU thresholds.

    Detections are in the order of their category, and in it of falling score.

    Attributes:
        image, category: (D,) places of the detections' images and categories.
        positive: (D, A, T) matched to an object of the size.
        ignored: (D, A, T) neither right nor wrong: matched to a crowd region or to an object of another size, or
            unmatched and of another size.
        objects: (I, A, C) numbers of objects to be found, as floats for products with weights.
    """

    image: np.ndarray
    category: np.ndarray
    positive: np.ndarray
    ignored: np.ndarray
    objects: np.ndarray


class Objects:
    """The objects and crowd regions of a data set as arrays, in the order of their category and image.

    Args:
        coco: the data set.
        task: "bbox" or "segm".
        content: what its file holds.
        areas: names of the sizes among ``AREAS`` to match for.
    """

    def __init__(self, coco: hotcoco.COCO, task: str, content: Mapping, areas: Sequence[str] = tuple(AREAS)):
        self.coco, self.task = coco, task
        self.images = np.sort([image["id"] for image in content["images"]])
        self.categories = np.sort([category["id"] for category in content["categories"]])
        entries = content["annotations"]
        groups = self.groups(entries)
        order = np.argsort(groups, kind="stable")
        entries = [entries[place] for place in order]
        self.group = groups[order]
        self.boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
        self.masks = [coco.ann_to_rle(entry) for entry in entries] if task == "segm" else None
        self.crowd = np.array([bool(entry.get("iscrowd")) for entry in entries], dtype=bool)
        area = np.array([entry["area"] for entry in entries], dtype=float)
        self.ranges = np.array([AREAS[name] for name in areas])
        # (objects, sizes): not to be found
        self.ignored = self.crowd[:, None] | self.outside(area)
        self.counts = np.zeros((len(self.images) * len(self.categories), len(areas)))
        np.add.at(self.counts, self.group, ~self.ignored)
        shape = len(self.categories), len(self.images), len(areas)
        self.counts = np.ascontiguousarray(self.counts.reshape(shape).transpose(1, 2, 0))

    def groups(self, entries: Sequence[Mapping]) -> np.ndarray:
        """(N,) a number for the category and the image of each annotation or detection, in this order."""
        image = np.searchsorted(self.images, [entry["image_id"] for entry in entries])
        category = np.searchsorted(self.categories, [entry["category_id"] for entry in entries])
        return category * len(self.images) + image

    def outside(self, area: np.ndarray) -> np.ndarray:
        """(N, A) which areas are outside of each size."""
        return (area[:, None] < self.ranges[:, 0]) | (area[:, None] > self.ranges[:, 1])

    def match(self, detections: Sequence[Mapping]) -> Matches:
        """Matches detections in COCO's result format; at most the 100 best of a category and an image count."""
        group = self.groups(detections)
        score = np.array([detection["score"] for detection in detections], dtype=float)
        order = np.lexsort((-score, group))
        group = group[order]
        first = np.searchsorted(group, group)
        order = order[np.arange(len(order)) - first < MOST_DETECTIONS]
        detections = [detections[place] for place in order]
        group, score = self.groups(detections), score[order]
        if self.task == "segm":
            # what ann_to_rle reads of an annotation
            shapes = [self.coco.ann_to_rle({"id": 1, "bbox": [0, 0, 0, 0], "area": 0, **entry}) for entry in detections]
            area = np.array(hotcoco.mask.area(shapes) if shapes else [], dtype=float)
        else:
            shapes = np.array([detection["bbox"] for detection in detections], dtype=float).reshape(-1, 4)
            area = shapes[:, 2] * shapes[:, 3]
        size = len(detections), len(self.ranges), len(THRESHOLDS)
        positive = np.zeros(size, dtype=bool)
        ignored = np.repeat(self.outside(area)[:, :, None], len(THRESHOLDS), axis=2)
        for rows, ious, objects in self._candidates(group, shapes):
            positive[rows], matched_ignored = _assign(
                rows, group[rows], ious, self.ignored[objects], self.crowd[objects]
            )
            ignored[rows] &= ~positive[rows]
            ignored[rows] |= matched_ignored
        category, image = np.divmod(group, len(self.images))
        order = np.lexsort((image, -score, category))
        return Matches(
            image[order].astype(np.int32),
            category[order].astype(np.int32),
            positive[order],
            ignored[order],
            self.counts,
        )

    def _candidates(self, group: np.ndarray, shapes) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The detections that overlap an object of their group enough to match it.

        Yields:
            for groups with a like number of objects: places of detections (N,), IoUs (N, K) and the places of their
            objects (N, K); -1 in the IoUs where a group has fewer than K objects.
        """
        start, end = (np.searchsorted(self.group, group, side) for side in ("left", "right"))
        number = end - start
        width, most = 1, int(number.max(initial=0))
        while width // 2 < most:
            rows = np.flatnonzero((number > width // 2) & (number <= width))
            objects = np.minimum(start[rows, None] + np.arange(width), len(self.group) - 1)
            ious = self._ious(rows, shapes, group, objects)
            ious[np.arange(width) >= number[rows, None]] = -1
            near = ious.max(1, initial=-1) >= THRESHOLDS[0]
            if near.any():
                yield rows[near], ious[near], objects[near]
            width *= 2

    def _ious(self, rows: np.ndarray, shapes, group: np.ndarray, objects: np.ndarray) -> np.ndarray:
        if self.task == "bbox":
            return _box_ious(shapes[rows][:, None], self.boxes[objects], self.crowd[objects])
        ious = np.full(objects.shape, -1.0)
        starts = np.flatnonzero(np.diff(group[rows], prepend=-1))
        for first, last in zip(starts, [*starts[1:], len(rows)]):
            places = np.flatnonzero(self.group[objects[first]] == group[rows[first]])
            ious[first:last, places] = hotcoco.mask.iou(
                [shapes[row] for row in rows[first:last]],
                [self.masks[place] for place in objects[first][places]],
                self.crowd[objects[first][places]].tolist(),
            )
        return ious


def _box_ious(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoUs of boxes (..., 4) x, y, width, height; over the area of ``a`` alone where ``b`` is a crowd region."""
    width = np.minimum(a[..., 0] + a[..., 2], b[..., 0] + b[..., 2]) - np.maximum(a[..., 0], b[..., 0])
    height = np.minimum(a[..., 1] + a[..., 3], b[..., 1] + b[..., 3]) - np.maximum(a[..., 1], b[..., 1])
    common = np.maximum(width, 0) * np.maximum(height, 0)
    area = a[..., 2] * a[..., 3]
    union = np.where(crowd, area, area + b[..., 2] * b[..., 3] - common)
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _assign(
    rows: np.ndarray, group: np.ndarray, ious: np.ndarray, ignored: np.ndarray, crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gives each detection, the best of each group first, the object that it overlaps most and that is still free.

    All groups take their k-th detection together. Objects that are to be found go first, the later of equal ones; one
    that is ignored is taken where there is none, and a crowd region stays free.

    Args:
        rows, group: (N,) places and groups of the detections, in the order of the groups and of falling scores.
        ious, ignored, crowd: (N, K), (N, K, A) and (N, K) of the objects of their group.

    Returns:
        (N, A, T) matched to an object to be found, and to an ignored one.
    """
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sizes = np.diff(starts, append=len(rows))
    by_size = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[by_size], sizes[by_size]
    found, lost = (np.zeros((len(rows), ignored.shape[2], len(THRESHOLDS)), dtype=bool) for _ in range(2))
    # (groups, sizes, thresholds, objects)
    skip = ignored[starts].transpose(0, 2, 1)[:, :, None]
    never = crowd[starts][:, None, None]
    free = np.ones((len(starts), ignored.shape[2], len(THRESHOLDS), ious.shape[1]), dtype=bool)
    for turn in range(sizes.max(initial=0)):
        going = int(np.searchsorted(-sizes, -turn, side="left"))
        row = starts[:going] + turn
        iou = np.broadcast_to(ious[row][:, None, None], free[:going].shape)
        open_to = free[:going] & (iou >= THRESHOLDS[:, None])
        wanted = open_to & ~skip[:going]
        found[row] = has = wanted.any(-1)
        others = open_to & skip[:going] & ~has[..., None]
        lost[row] = others.any(-1)
        choice = np.where(wanted | others, iou, -1.0)
        best = choice.shape[-1] - 1 - choice[..., ::-1].argmax(-1)
        taken = (has | lost[row])[..., None] & (np.arange(choice.shape[-1]) == best[..., None])
        free[:going] &= ~taken | never[:going]
    return found, lost
