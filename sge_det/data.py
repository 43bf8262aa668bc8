"""Data sets by name or by file, and a training loader whose order depends on the seed alone."""

import functools
import itertools
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm

from .errors import UserError

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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{json_file} is not in COCO's instance format: it has no list {key!r}")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{json_file} has no {key}")
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
        _check_masks(cfg, entries, are_trained=name in cfg.DATASETS.TRAIN and not eval_only)


def _check_masks(cfg: CfgNode, entries: Iterable[tuple[str, dict]], *, are_trained: bool) -> None:
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


def build_train_loader(cfg: CfgNode, seed: int) -> "ReplayableLoader":
    """The training loader of ``cfg``, with the order and the augmentations that ``seed`` determines.

    Raises:
        UserError: there is nothing to train on, or the batch cannot be divided among the processes.
    """
    try:
        dicts = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    except AssertionError as error:
        raise UserError(f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} holds no image with an object: {error}") from error
    if cfg.MODEL.MASK_ON:
        entries = ((f"an object in {d['file_name']}", entry) for d in dicts for entry in d["annotations"])
        _check_masks(cfg, entries, are_trained=True)
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        sampler = TrainingSampler(len(dicts), seed=seed)
    elif name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN {name} is not supported: set TrainingSampler or RepeatFactorTrainingSampler"
        )
    world = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH < 1 or cfg.SOLVER.IMS_PER_BATCH % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is not a multiple of the {world} processes")
    wide = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        wide = [d["width"] > d["height"] for d in dicts]
    return ReplayableLoader(
        _SeededDataset(DatasetFromList(dicts, copy=False), DatasetMapper(cfg, is_train=True), seed),
        sampler,
        cfg.SOLVER.IMS_PER_BATCH // world,
        wide=wide,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


class ReplayableLoader:
    """An endless loader of batches that depend on nothing but the seed and the batch's number.

    Neither the model, nor the number of workers, nor an interruption changes them: set ``start`` to the number of
    batches already used and it goes on with the next one.

    Args:
        dataset: maps (position, index) to an example.
        sampler: yields indices without end, the same at each iteration over it.
        batch_size: examples in a batch of this process.
        wide: for each index, whether the image is wider than high; batches then hold images of one kind. None: mixed.
        num_workers: processes that load; 0 loads in this one.
    """

    def __init__(self, dataset, sampler, batch_size: int, *, wide: Sequence[bool] | None = None, num_workers: int = 0):
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.wide = wide
        self.num_workers = num_workers
        self.start = 0

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yields batches as lists of (position in the stream, index in the data set), from ``start`` on."""
        return itertools.islice(self._all_batches(), self.start, None)

    def _all_batches(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = comm.get_rank(), comm.get_world_size()
        waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for count, index in enumerate(self.sampler):
            batch = waiting[self.wide is not None and self.wide[index]]
            batch.append((count * world + rank, index))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()

    def __iter__(self) -> Iterator[list[dict]]:
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=_Batches(self),
            num_workers=self.num_workers,
            collate_fn=list,
            # else the loader's start would draw from the generator that the heads sample with
            generator=torch.Generator(),
        )
        yield from _with_plain_errors(loader)


def _with_plain_errors(loader: Iterable[list[dict]]) -> Iterator[list[dict]]:
    try:
        yield from loader
    except UserError as error:
        # a worker's error arrives with its traceback as its text
        raise UserError(str(error).rsplit("UserError: ", 1)[-1].strip()) from None


def build_test_loader(cfg: CfgNode, name: str, *, alone: bool = False) -> "EvaluationLoader":
    """Detectron2's loader of a test set, which tells of an image that cannot be read as :func:`map_image` does.

    Args:
        alone: this process gets all images; otherwise its share of them.
    """
    mapper = functools.partial(map_image, DatasetMapper(cfg, is_train=False))
    sampler = {"sampler": range(len(DatasetCatalog.get(name)))} if alone else {}
    return EvaluationLoader(build_detection_test_loader(cfg, name, mapper=mapper, **sampler))


class EvaluationLoader:
    """Batches of ``loader``; the errors of its workers are one sentence."""

    def __init__(self, loader: torch.utils.data.DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        return _with_plain_errors(self.loader)


class _Batches:
    def __init__(self, loader: ReplayableLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.loader.batches()


class _SeededDataset(torch.utils.data.Dataset):
    """Examples whose augmentation is drawn from the seed and their position in the stream."""

    def __init__(self, examples: Sequence[dict], mapper: DatasetMapper, seed: int):
        self.examples = examples
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        # Detectron2's augmentations draw from this generator
        np.random.seed((self.seed * 1_000_003 + position) % 2**32)
        example = self.examples[index]
        return map_image(self.mapper, example)


def map_image(mapper: DatasetMapper, example: dict) -> dict:
    """``mapper(example)``, with a sentence that names the image where it cannot be read.

    Raises:
        UserError: the image is missing, damaged, or not of the size that the annotations say.
    """
    try:
        return mapper(example)
    except (OSError, SyntaxError) as error:
        raise UserError(f"the image {example['file_name']} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ == "SizeMismatchError":
            raise UserError(f"the image {example['file_name']} is not of the annotated size: {error}") from error
        raise
