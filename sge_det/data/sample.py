"""A small COCO-format detection set, drawn on the spot and the same for the same seed.

Four kinds of objects (person, car, boat, potted plant) are put together from parts on cluttered, noisy backgrounds,
among distractors that are single parts of the same objects: a wheel without a car, a head without a face, a flower
without a pot. The set is learnable from scratch within minutes, so training, evaluation and visualisation can be tried
without a download.
"""

import itertools
import json
import os
import shutil
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contourpy
import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ..errors import UserError
from ..files import publish_folder
from .sample_scenes import KINDS, DrawnObject, draw_scene

SPLITS = ("train", "val")
_FORMAT = 2  # Raised whenever the same arguments would draw something else.
_MIN_PIECE, _MIN_HOLE = 4, 12  # Square pixels; smaller pieces and holes of a visible area are not traced.

_COCO_SUPERCATEGORIES = [  # Each with the last category id that it has.
    *((1, "person"), (9, "vehicle"), (15, "outdoor"), (25, "animal"), (33, "accessory"), (43, "sports")),
    *((51, "kitchen"), (61, "food"), (70, "furniture"), (77, "electronic"), (82, "appliance"), (90, "indoor")),
]


def _simplified(ring: np.ndarray, tolerance: float = 0.2) -> np.ndarray:
    """Drops points of a ring that others describe within tolerance pixels (Douglas-Peucker, all chords at once).

    Args:
        ring: (N + 1, 2), the last point equal to the first.
        tolerance: Pixels.

    Returns:
        The points that stay, without the repeated last one.
    """
    kept = np.array([0, np.hypot(*(ring - ring[0]).T).argmax(), len(ring) - 1])
    while True:
        starts = kept[:-1]
        chord_of = np.repeat(np.arange(len(starts)), np.diff(kept))
        chord = ring[kept[1:]] - ring[starts]
        chord /= np.maximum(np.hypot(*chord.T), 1e-9)[:, None]
        along, offset = chord[chord_of], ring[:-1] - ring[starts][chord_of]
        away = np.abs(along[:, 0] * offset[:, 1] - along[:, 1] * offset[:, 0])
        farthest = np.maximum.reduceat(away, starts)[chord_of]
        added = np.flatnonzero((away == farthest) & (farthest > tolerance))
        if not added.size:
            return ring[starts]
        kept = np.sort(np.concatenate([kept, added]))


def _polygons(visible: np.ndarray, cut_holes: bool) -> tuple[list[list[float]], bool]:
    """Traces where visible is at least one half.

    Args:
        visible: Coverage of each pixel, float32 (H, W), 0 to 1.
        cut_holes: Whether an area with a hole is cut in two through the hole, so that none remains.

    Returns:
        COCO polygons, and whether the areas have holes, which polygons cannot say.
    """
    # The rim of zeros closes an outline at the image's border, exactly on the border.
    generator = contourpy.contour_generator(z=np.pad(visible, 1), fill_type="OuterOffset")
    polygons: list[list[float]] = []
    holes = False
    for points, offsets in zip(*generator.filled(0.5, 2.0)):
        outer, *inner = (points[a:b] - 0.5 for a, b in itertools.pairwise(offsets))
        if _ring_area(outer) < _MIN_PIECE:
            continue
        hole = max(inner, key=_ring_area, default=None)
        if hole is not None and _ring_area(hole) >= _MIN_HOLE:
            holes = True
            if cut_holes:
                right = np.arange(visible.shape[1]) >= round(float(hole[:, 0].mean()))
                return _polygons(visible * ~right, True)[0] + _polygons(visible * right, True)[0], False
        polygons.append(np.round(_simplified(outer), 2).ravel().tolist())
    return polygons, holes


def _ring_area(ring: np.ndarray) -> float:
    x, y = ring.T
    return abs(float(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def _counts(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask, bool (H, W): zeros first, down the columns."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flat]))).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def _annotation(item: DrawnObject, cut_holes: bool) -> dict[str, Any]:
    """COCO's segmentation, area, bbox and iscrowd of an object; area and bbox are those of the decoded mask."""
    height, width = item.visible.shape
    polygons, holes = _polygons(item.visible, cut_holes) if not item.crowd else ([], False)
    segmentation: Any = polygons
    if item.crowd or holes:
        mask = item.visible >= 0.5
        rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        rle["counts"] = rle["counts"].decode("ascii")
        segmentation = {"size": [height, width], "counts": _counts(mask)} if item.crowd else rle
    else:
        rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
    return {
        "segmentation": segmentation,
        "area": float(mask_utils.area(rle)),
        "bbox": mask_utils.toBbox(rle).tolist(),
        "iscrowd": int(item.crowd),
    }


def _coco_categories() -> list[dict[str, Any]]:
    """COCO's 80 categories, with the names and ids of Detectron2."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    last_ids = [last for last, _ in _COCO_SUPERCATEGORIES]
    return [
        {"supercategory": _COCO_SUPERCATEGORIES[bisect_left(last_ids, c["id"])][1], "id": c["id"], "name": c["name"]}
        for c in COCO_CATEGORIES
        if c["isthing"]
    ]


@dataclass(frozen=True)
class SampleSet:
    """Where a sample set lies.

    Attributes:
        root: The folder that holds the annotations and the images of both splits.
        coco_layout: Whether files and categories are named as in COCO 2017.
        created: False if the set was there already.
    """

    root: Path
    coco_layout: bool
    created: bool

    def image_dir(self, split: str) -> Path:
        """The folder of the images of a split, "train" or "val"."""
        return self.root / self._name(split)

    def annotation_file(self, split: str) -> Path:
        """The COCO annotations of a split, "train" or "val"."""
        return self.root / "annotations" / f"instances_{self._name(split)}.json"

    def _name(self, split: str) -> str:
        return f"{split}2017" if self.coco_layout else split


def make_sample_coco(
    output_dir: str | os.PathLike[str],
    train: int = 400,
    val: int = 100,
    size: int = 192,
    seed: int = 0,
    coco_layout: bool = False,
) -> SampleSet:
    """Draws a detection set and writes it in COCO's format.

    The same arguments give the same bytes, and an image depends only on the size, the seed, its split and its number:
    the 10 images of train=10 are the first 10 of train=20. A set of the same arguments that is already there is kept.
    Nothing half-written is left behind if writing fails.

    Args:
        output_dir: The folder to make. With coco_layout the set goes to its subfolder "coco", unless that is its name.
        train: Number of training images.
        val: Number of validation images.
        size: The longer side of the images in pixels.
        seed: Seed of the drawing.
        coco_layout: Whether to name the files as COCO 2017 does and to use its 80 categories, so that Detectron2's
            COCO configs run as they are. Single objects are polygons then, as in COCO; otherwise those with a hole are
            RLE, which a mask head reads with INPUT.MASK_FORMAT "bitmask".

    Returns:
        Where the set lies.

    Raises:
        UserError: If an argument is out of range, or the folder holds something else or cannot be written.
    """
    for flag, value, least in (("train", train, 1), ("val", val, 1), ("size", size, 64), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"--{flag} must be at least {least}, not {value}.")
    root = Path(output_dir)
    if coco_layout and root.resolve().name != "coco":
        root = root / "coco"
    made_by = {"format": _FORMAT, "train": train, "val": val, "size": size, "seed": seed, "coco_layout": coco_layout}
    partial = root.with_name(f".{root.name}.partial-{os.getpid()}")
    try:
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file; name a folder to make.")
        if root.exists() and any(root.iterdir()):
            if _is_complete(SampleSet(root, coco_layout, False), made_by):
                return SampleSet(root, coco_layout, created=False)
            raise UserError(
                f"{root} holds something other than the set of these arguments; remove it or name another folder."
            )
        partial.mkdir(parents=True)
        try:
            _write(SampleSet(partial, coco_layout, True), made_by)
            if root.exists():
                root.rmdir()
            publish_folder(partial, root)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{root} cannot be written: {error.strerror or error}.") from error
    return SampleSet(root, coco_layout, created=True)


def _is_complete(sample: SampleSet, made_by: dict[str, Any]) -> bool:
    for split in SPLITS:
        try:
            content = json.loads(sample.annotation_file(split).read_text())
            names = [image["file_name"] for image in content["images"]]
            if content["info"]["made_by"] != made_by:
                return False
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not all((sample.image_dir(split) / name).is_file() for name in names):
            return False
    return True


def _write(sample: SampleSet, made_by: dict[str, Any]) -> None:
    """Writes the images and annotations of both splits under the set's root, which exists."""
    if sample.coco_layout:
        categories = _coco_categories()
    else:
        categories = [
            {"supercategory": kind.supercategory, "id": i, "name": name}
            for i, (name, kind) in enumerate(KINDS.items(), 1)
        ]
    category_ids = {category["name"]: category["id"] for category in categories}
    sample.annotation_file("train").parent.mkdir()
    for split in SPLITS:
        folder = sample.image_dir(split)
        folder.mkdir()
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for pixels, objects in tqdm(_scenes(split, made_by), total=made_by[split], desc=split, unit="image"):
            image_id = len(images) + 1
            file_name = f"{image_id:012d}.jpg"
            height, width = pixels.shape[:2]
            images.append({"license": 1, "file_name": file_name, "height": height, "width": width, "id": image_id})
            for item in objects:
                place = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_ids[item.kind]}
                annotations.append(place | _annotation(item, cut_holes=sample.coco_layout))
            _write_image(folder / file_name, pixels)
        content = {
            "info": {"description": "Drawn sample set for object detection", "version": "1.0", "made_by": made_by},
            "licenses": [{"id": 1, "name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        sample.annotation_file(split).write_text(json.dumps(content))


def _scenes(split: str, made_by: dict[str, Any]) -> Iterator[tuple[np.ndarray, list[DrawnObject]]]:
    for index in range(made_by[split]):
        rng = np.random.default_rng([made_by["seed"], SPLITS.index(split), index])
        yield draw_scene(rng, made_by["size"], index)


def _write_image(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path, quality=90)
