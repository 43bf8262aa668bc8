"""Data sets by name or by file: registered with Detectron2 after a look at what is in them."""

import logging
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from ..errors import UserError
from .annotations import Annotations, read_annotations

logger = logging.getLogger(__name__)

# Models without a head for objects, whose classes would have to agree with the data set's.
_WITHOUT_OBJECTS = ("SemanticSegmentor", "PanopticDeepLab")
# What Detectron2's own data sets and evaluators read, in the metadata of a data set.
_FILES = ("json_file", "panoptic_json")
_FOLDERS = ("image_root", "image_dir", "gt_dir", "dirname", "panoptic_root", "sem_seg_root")


def register_sample() -> None:
    """Registers ``sge_sample_train`` and ``sge_sample_val``: what tools/make_sample_coco.py makes, where it is asked
    to make it in ``$DETECTRON2_DATASETS/sge_sample``."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "sge_sample"
    for split in ("train", "val"):
        name = f"sge_sample_{split}"
        if name not in DatasetCatalog:
            register_coco_instances(name, {}, str(root / f"annotations/instances_{split}.json"), str(root / split))


def register_datasets(datasets: Sequence[Sequence[str]]) -> dict[str, Annotations]:
    """:func:`register_dataset` for ``--dataset`` triples; by their names.

    Raises:
        UserError: one of them cannot be used, or two have one name.
    """
    names = [name for name, _, _ in datasets]
    for name, json_file, image_root in datasets:
        if not name.strip():
            raise UserError(f"--dataset {name!r} {json_file} {image_root}: give the data set a name")
        if names.count(name) > 1:
            raise UserError(
                f"--dataset {name} is given {names.count(name)} times: give each data set a name of its own"
            )
        if Path(json_file).is_dir():
            raise UserError(f"--dataset {name}: {json_file} is a folder; give NAME JSON IMAGES in this order")
    return {name: register_dataset(name, json_file, image_root) for name, json_file, image_root in datasets}


def register_dataset(name: str, json_file: str, image_root: str) -> Annotations:
    """Registers a COCO-format detection set with Detectron2 after a look at its files.

    Args:
        name: its name in ``DATASETS.TRAIN`` and ``DATASETS.TEST``. A name that exists is taken over.
        json_file: COCO instance annotations.
        image_root: the folder to which those file names in ``json_file`` that are not absolute are relative.

    Returns:
        what ``json_file`` holds that counts.

    Raises:
        UserError: a file is missing or malformed, or an image outside of the folder.
    """
    annotations = read_annotations(json_file)
    content = annotations.content
    if not Path(image_root).is_dir():
        raise UserError(f"data set {name}: there is no image folder {image_root}")
    missing = missing_images(content["images"], image_root)
    if missing:
        raise UserError(
            f"data set {name}: {len(missing)} of {len(content['images'])} images that {json_file} names are not in "
            f"{image_root}, the first is {missing[0][:200]}{missing_hint(missing[0], image_root)}"
        )
    check_places(json_file, content["images"], image_root)
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, annotations.readable, image_root)
    for note in annotations.notes:
        logger.info(f"data set {name}: {note}")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    # what was given, where Detectron2 reads a copy with adjustments
    MetadataCatalog.get(name).set(thing_classes=names, given_json_file=json_file)
    points = next((category["keypoints"] for category in categories if category.get("keypoints")), None)
    if points:
        MetadataCatalog.get(name).set(keypoint_names=list(points), keypoint_flip_map=_mirrored(points))
    return annotations


def _mirrored(points: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of keypoints that change places in a mirrored image: those named left and right of the same."""
    pairs = ((point, point.replace("left", "right")) for point in points if "left" in point)
    return [(left, right) for left, right in pairs if right in points]


def missing_images(images: Sequence[dict], image_root: str) -> list[str]:
    """The file names of those of COCO's ``images`` that are not in ``image_root``."""
    return [image["file_name"] for image in images if not Path(image_root, image["file_name"]).is_file()]


def outside_images(images: Sequence[dict], image_root: str | Path) -> list[str]:
    """The file names of those of COCO's ``images`` that lead out of ``image_root``, by themselves and not by a link."""
    root = Path(image_root)

    def is_outside(name: str) -> bool:
        if not name.startswith("/") and ".." not in name:
            return False
        path = root / name
        if ".." not in path.parts and path.absolute().is_relative_to(root.absolute()):
            return False
        return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))

    return [image["file_name"] for image in images if is_outside(image["file_name"])]


def check_places(json_file: str | Path, images: Sequence[dict], image_root: str | Path) -> None:
    """Checks that images stay in their folder: annotations may come from a stranger, and reports show images.

    Raises:
        UserError: one of them leads out of the folder.
    """
    outside = outside_images(images, image_root)
    if outside:
        raise UserError(
            f"{json_file} names images outside of {image_root} ({len(outside)}: {outside[0][:200]!a}): file names must "
            "stay in the image folder; name the folder above, or link the images into it"
        )


def missing_hint(name: str, image_root: str) -> str:
    """Why an image may be missing, behind a colon; "" where nothing tells."""
    path, root = Path(image_root, name), Path(image_root)
    base = name.replace("\\", "/").rsplit("/", 1)[-1]
    if "://" in name:
        return ": that is an address; download the images, and let file_name be their names"
    if path.is_symlink():
        return ": it is a link that leads nowhere"
    if path.is_dir():
        return ": it is a folder"
    if "\\" in name:
        return ": its folders are parted by \\; write / in file_name"
    parts = [part for part in name.split("/") if part]
    end = next((end for place in range(1, len(parts)) if (root / (end := "/".join(parts[place:]))).is_file()), None)
    if end is not None:
        rest = name.removesuffix(end)
        return f": {end} is there; name the folder above, or take {rest[:200]} out of file_name"
    below = next((folder for folder in sorted(root.glob("*/")) if (folder / name).is_file()), None)
    if below is not None:
        return f": it is in {below}; name that folder"
    if (root / unquote(name)).is_file():
        return f": {unquote(name)} is there; write file_name so, not as in an address"
    like = unicodedata.normalize("NFC", base.strip()).casefold()
    folder = path.parent
    near = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = next((other for other in near if unicodedata.normalize("NFC", other).casefold() == like), None)
    if found is not None:
        return f": {found} is there, written otherwise (capitals, spaces or accents); rename one of them"
    stem = next((other for other in near if Path(other).stem == Path(base).stem), None)
    return f": {stem} is there, which ends otherwise" if stem else ""


def use_datasets(
    cfg: CfgNode, datasets: Sequence[Sequence[str]], overrides: Sequence[str], *, eval_only: bool = False
) -> None:
    """Registers ``--dataset`` triples (name, json, images) and lets ``cfg`` follow them where it was not set by hand.

    Unless the config names these data sets itself, those with "train" in their name train (the first one where none
    says so) and the others test (a lone one does both). Of ``DATASETS.TRAIN`` and ``TEST``, what ``overrides`` set
    stays.
    ``NUM_CLASSES`` becomes the number of the data sets' categories. With ``eval_only``, ``DATASETS.TRAIN`` need not be
    there.

    Raises:
        UserError: a data set cannot be used, or ``NUM_CLASSES`` was set by hand to something else.
    """
    found = register_datasets(datasets)
    names = list(found)
    by_hand = set(overrides[::2])
    left = [key for key in ("TRAIN", "TEST") if f"DATASETS.{key}" not in by_hand]
    if names and left and not any(set(names) & set(cfg.DATASETS[key]) for key in left):
        if "TRAIN" in left:
            # what tests by hand trains only where there is no other
            others = [name for name in names if "TEST" in left or name not in cfg.DATASETS.TEST] or names
            cfg.DATASETS.TRAIN = tuple(name for name in others if "train" in name) or tuple(others[:1])
        if "TEST" in left:
            cfg.DATASETS.TEST = tuple(name for name in names if name not in cfg.DATASETS.TRAIN) or tuple(names)
        logger.info(f"training on {', '.join(cfg.DATASETS.TRAIN)}, testing on {', '.join(cfg.DATASETS.TEST)}")
    used = (*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST)
    check_datasets(used)
    for name in [] if eval_only else set(found) & set(cfg.DATASETS.TRAIN):
        if not found[name].has_annotations:
            raise UserError(f"{found[name].path} has no list 'annotations', so there is nothing to train on")
    if cfg.MODEL.META_ARCHITECTURE in _WITHOUT_OBJECTS:
        return
    classes = class_names(used[0]) if used else None
    head = head_section(cfg)
    key = f"MODEL.{head}.NUM_CLASSES"
    if classes and key not in by_hand and set(names) & set(used):
        cfg.MODEL[head].NUM_CLASSES = len(classes)
    number = cfg.MODEL[head].NUM_CLASSES
    if classes and len(classes) != number:
        raise UserError(f"{key} is {number}, but {used[0]} has {len(classes)} categories: set it to that")
    if cfg.MODEL.KEYPOINT_ON:
        given = used[:1] if set(names) & set(used) else ()
        for name in dict.fromkeys((*given, *(() if eval_only else cfg.DATASETS.TRAIN))):
            _use_keypoints(cfg, name, by_hand, is_given=name in names)
    for name in set(names) & set(used) if cfg.MODEL.MASK_ON else ():
        entries = ((f"annotation {entry['id']} of {name}", entry) for entry in found[name].content["annotations"])
        check_masks(cfg, entries, are_trained=name in cfg.DATASETS.TRAIN and not eval_only)


def head_section(cfg: CfgNode) -> str:
    """The section of ``cfg.MODEL`` that has the number of classes: "RETINANET", or "ROI_HEADS"."""
    return "RETINANET" if cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet") else "ROI_HEADS"


def _use_keypoints(cfg: CfgNode, name: str, by_hand: set[str], *, is_given: bool) -> None:
    """Lets ``NUM_KEYPOINTS`` follow the data set ``name``, if it is given, where it was not set by hand.

    Raises:
        UserError: the data set has no keypoints, or another number of them than was set by hand.
    """
    points = MetadataCatalog.get(name).get("keypoint_names")
    if not points:
        lacking = f"no category of {name} lists its keypoints" if is_given else f"{name} has no keypoint_names"
        remedy = (
            "give the category its list 'keypoints'"
            if is_given
            else f"give it them where it is registered, with MetadataCatalog.get({name!r}).set(keypoint_names=..., "
            "keypoint_flip_map=...)"
        )
        raise UserError(
            f"{lacking}, and this config is of a keypoint detector: set MODEL.KEYPOINT_ON False, or {remedy}"
        )
    key = "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"
    if key not in by_hand and is_given:
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = len(points)
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if number != len(points):
        raise UserError(f"{key} is {number}, but {name} has {len(points)} keypoints: set it to that")
    if not cfg.TEST.KEYPOINT_OKS_SIGMAS and number != 17 and cfg.DATASETS.TEST:
        raise UserError(
            f"{name} has {number} keypoints, and COCO's metric knows its own 17 alone: set TEST.KEYPOINT_OKS_SIGMAS to "
            f"{number} numbers"
        )


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
        for path in map(metadata.get, (*_FILES, *_FOLDERS)):
            if path is not None and not Path(path).exists():
                root = os.getenv("DETECTRON2_DATASETS", "datasets")
                if name.startswith("sge_sample"):
                    how = f"make it with tools/make_sample_coco.py {Path(metadata.image_root).parent}"
                elif Path(path).is_relative_to(root):
                    how = "set the environment variable DETECTRON2_DATASETS to the folder that holds it"
                else:
                    how = "put it there, or correct the path where the data set is registered"
                raise UserError(f"the data set {name} is not there, {path} does not exist: {how}")
    classes = {name: class_names(name) for name in names}
    for name, own in classes.items():
        first = next(iter(classes))
        if own and classes[first] and own != classes[first]:
            raise UserError(f"the categories of {name} ({', '.join(own)}) are not those of {first}")


def class_names(name: str) -> list[str] | None:
    """The names of a data set's classes, in their order; None where it says nothing of them."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None and metadata.get("json_file"):
        categories = read_annotations(metadata.json_file).content["categories"]
        metadata.thing_classes = [c["name"] for c in sorted(categories, key=lambda category: category["id"])]
    return metadata.get("thing_classes")
