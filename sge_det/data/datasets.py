"""Data sets by name or by file: registered with Detectron2 after a look at what is in them."""

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError

logger = logging.getLogger(__name__)


def register_sample() -> None:
    """Registers ``sge_sample_train`` and ``sge_sample_val``: what tools/make_sample_coco.py makes, where it is asked
    to make it in ``$DETECTRON2_DATASETS/sge_sample``."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "sge_sample"
    for split in ("train", "val"):
        name = f"sge_sample_{split}"
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, str(root / f"annotations/instances_{split}.json"), str(root / split))


def register_dataset(name: str, json_file: str, image_root: str) -> dict:
    """Registers a COCO-format detection set with Detectron2 after a look at its files.

    Args:
        name: its name in ``DATASETS.TRAIN`` and ``DATASETS.TEST``. A name that exists is taken over.
        json_file: COCO instance annotations.
        image_root: the folder to which the file names in ``json_file`` are relative.

    Returns:
        what ``json_file`` holds.

    Raises:
        UserError: a file is missing or malformed.
    """
    content = read_annotations(json_file)
    check_annotations(json_file, content)
    if not Path(image_root).is_dir():
        raise UserError(f"data set {name}: there is no image folder {image_root}")
    missing = missing_images(content["images"], image_root)
    if missing:
        raise UserError(
            f"data set {name}: {len(missing)} of {len(content['images'])} images that {json_file} names are not in "
            f"{image_root}, the first is {missing[0]}"
        )
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, json_file, image_root)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    MetadataCatalog.get(name).set(thing_classes=[category["name"] for category in categories])
    return content


def missing_images(images: Sequence[dict], image_root: str) -> list[str]:
    """The file names of those of COCO's ``images`` that are not in ``image_root``."""
    return [image["file_name"] for image in images if not Path(image_root, image["file_name"]).is_file()]


def check_file_names(json_file: str, images: Sequence[Any]) -> None:
    """Checks that COCO's ``images`` stay inside their folder: an annotation file may come from a stranger.

    What is a link in that folder may lead anywhere, as its owner has made it.

    Raises:
        UserError: a file name is none, or one that leads out of the folder; names the first.
    """
    for image in images:
        name = image.get("file_name", "") if isinstance(image, dict) else ""
        if not isinstance(name, str) or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(
                f"{json_file} names the image {str(name)[:100]!a}: file names must be relative to the image folder and "
                "stay in it"
            )


def read_annotations(json_file: str) -> dict:
    """Reads COCO instance annotations.

    Raises:
        UserError: there is no such file, it is no JSON, or it lacks a list that COCO's format has.
    """
    try:
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no annotation file {json_file}") from error
    except OSError as error:
        raise UserError(f"the annotation file {json_file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{json_file} is not in COCO's instance format: it has no list {key!r}")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{json_file} has no {key}")
    check_file_names(json_file, content["images"])
    return content


def check_annotations(json_file: str, content: dict) -> None:
    """Checks what :func:`read_annotations` read.

    Raises:
        UserError: an entry lacks a field, refers to nothing, or has a value that is none; names the first.
    """

    def ids(key: str, fields: Sequence[str]) -> set:
        for entry in content[key]:
            if not isinstance(entry, dict):
                raise UserError(f"{json_file}: an entry of {key} is no object with names and values: {str(entry)[:80]}")
            lacking = [field for field in ("id", *fields) if field not in entry]
            if lacking:
                raise UserError(f"{json_file}: an entry of {key} lacks {lacking[0]!r}: {str(entry)[:80]}")
        wrong = [entry["id"] for entry in content[key] if not isinstance(entry["id"], int)]
        if wrong:
            raise UserError(f"{json_file}: an id of {key} is {wrong[0]!r}: ids are whole numbers")
        found = {entry["id"] for entry in content[key]}
        if len(found) < len(content[key]):
            raise UserError(f"{json_file}: the ids of {key} are not unique")
        return found

    images = ids("images", ("file_name", "height", "width"))
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    categories = ids("categories", ("name",))
    ids("annotations", ("image_id", "category_id", "bbox", "area"))
    for entry in content["annotations"]:
        where = f"{json_file}: annotation {entry['id']}"
        if not isinstance(entry["image_id"], int) or entry["image_id"] not in images:
            raise UserError(f"{where} is of image {entry['image_id']}, which is not among the images")
        if not isinstance(entry["category_id"], int) or entry["category_id"] not in categories:
            raise UserError(f"{where} is of category {entry['category_id']}, which is not among the categories")
        box = entry["bbox"]
        is_four = isinstance(box, list) and len(box) == 4
        is_finite = is_four and all(isinstance(value, int | float) and math.isfinite(value) for value in box)
        if not is_finite or box[2] < 0 or box[3] < 0:
            raise UserError(f"{where} has the box {box}; four finite numbers x, y, width, height are needed")
        fault = mask_fault(entry.get("segmentation") or [], sizes[entry["image_id"]])
        if fault:
            raise UserError(f"{where}: {fault}")


def mask_fault(segmentation: Any, size: Sequence[int]) -> str | None:
    """What is wrong with a mask in COCO's format, if anything; ``size``: height and width of its image.

    Looks at its form, not at each number.
    """
    if isinstance(segmentation, list):
        is_sound = all(isinstance(polygon, list) for polygon in segmentation)
        return None if is_sound else "its mask is a list, but not of polygons [x, y, x, y, ...]"
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str | list):
        return "its mask is neither a list of polygons nor RLE with size and counts"
    if segmentation.get("size") != list(size):
        return f"its mask has the size {segmentation.get('size')}, its image {list(size)} (height, width)"
    return None


def use_datasets(
    cfg: CfgNode, datasets: Sequence[Sequence[str]], overrides: Sequence[str], *, eval_only: bool = False
) -> None:
    """Registers ``--dataset`` triples (name, json, images) and lets ``cfg`` follow them where it was not set by hand.

    Unless ``overrides`` set ``DATASETS.TRAIN`` or ``TEST``, or the config names these data sets itself, those with
    "train" in their name train (the first one where none says so) and the others test (a lone one does both).
    ``NUM_CLASSES`` becomes the number of the data sets' categories. With ``eval_only``, ``DATASETS.TRAIN`` need not be
    there.

    Raises:
        UserError: a data set cannot be used, or ``NUM_CLASSES`` was set by hand to something else.
    """
    contents = {name: register_dataset(name, json_file, image_root) for name, json_file, image_root in datasets}
    names = list(contents)
    by_hand = set(overrides[::2])
    if names and not set(names) & {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}:
        train = tuple(name for name in names if "train" in name) or tuple(names[:1])
        test = tuple(name for name in names if name not in train) or train
        if "DATASETS.TRAIN" not in by_hand:
            cfg.DATASETS.TRAIN = train
        if "DATASETS.TEST" not in by_hand:
            cfg.DATASETS.TEST = test
        logger.info(f"training on {', '.join(cfg.DATASETS.TRAIN)}, testing on {', '.join(cfg.DATASETS.TEST)}")
    used = (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
    check_datasets(used)
    classes = _classes(used[0]) if used else None
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    key = f"MODEL.{head}.NUM_CLASSES"
    if classes and key not in by_hand and set(names) & set(used):
        cfg.MODEL[head].NUM_CLASSES = len(classes)
    number = cfg.MODEL[head].NUM_CLASSES
    if classes and len(classes) != number:
        raise UserError(f"{key} is {number}, but {used[0]} has {len(classes)} categories: set it to that")
    for name in set(names) & set(used) if cfg.MODEL.MASK_ON else ():
        entries = ((f"annotation {entry['id']} of {name}", entry) for entry in contents[name]["annotations"])
        check_masks(cfg, entries, are_trained=name in cfg.DATASETS.TRAIN and not eval_only)


def check_masks(cfg: CfgNode, entries: Iterable[tuple[str, dict]], *, are_trained: bool) -> None:
    """Checks that objects, as (where, annotation), have masks of the kind that ``cfg`` reads."""
    for where, entry in entries:
        if entry.get("iscrowd"):
            continue
        if not entry.get("segmentation"):
            raise UserError(
                f"{where} has no mask, and this config is of a mask detector: set MODEL.MASK_ON False, or give the "
                "annotations a segmentation"
            )
        if are_trained and cfg.INPUT.MASK_FORMAT == "polygon" and isinstance(entry["segmentation"], dict):
            raise UserError(f"{where} has an RLE mask: set INPUT.MASK_FORMAT bitmask")


def check_datasets(names: Sequence[str]) -> None:
    """Checks that data sets are registered, that their files are there and that their classes agree.

    Raises:
        UserError: one is not; names it and says how to get it.
    """
    for name in names:
        if name not in DatasetCatalog:
            raise UserError(
                f"the data set {name!r} is not registered: give it with --dataset {name} ANNOTATIONS.json IMAGE_FOLDER"
            )
        metadata = MetadataCatalog.get(name)
        for path in (metadata.get("json_file"), metadata.get("image_root")):
            if path is not None and not Path(path).exists():
                how = (
                    f"make it with tools/make_sample_coco.py {Path(metadata.image_root).parent}"
                    if name.startswith("sge_sample")
                    else "set the environment variable DETECTRON2_DATASETS to the folder that holds it"
                )
                raise UserError(f"the data set {name} is not there, {path} does not exist: {how}")
    classes = {name: _classes(name) for name in names}
    for name, own in classes.items():
        first = next(iter(classes))
        if own and classes[first] and own != classes[first]:
            raise UserError(f"the categories of {name} ({', '.join(own)}) are not those of {first}")


def _classes(name: str) -> list[str] | None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None and metadata.get("json_file"):
        categories = read_annotations(metadata.json_file)["categories"]
        try:
            metadata.thing_classes = [c["name"] for c in sorted(categories, key=lambda category: category["id"])]
        except (KeyError, TypeError) as error:
            raise UserError(f"{metadata.json_file}: a category lacks its id or its name ({error!r})") from error
    return metadata.get("thing_classes")
