"""COCO instance annotations as tools export them: read once, checked where they count, and taken as they are elsewhere.

What no training and no metric reads is not looked at: "info", "licenses", and whatever else an exporter writes. What
counts is checked strictly by type before any of it reaches compiled code, which would trust it.
"""

import functools
import gzip
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hotcoco
import numpy as np

from ..errors import UserError
from ..files import write_file

logger = logging.getLogger(__name__)

# COCO's largest file has half a GB; what is compressed may unfold without end.
_MOST_BYTES = 4 << 30
# Coordinates may leave their image by clumsy labelling, not by a hundred times its longer side: rasterising costs
# memory and time in proportion.
_MOST_SIDES = 100
_MOST_PIXELS, _MOST_SIDE = 1 << 31, 1 << 20
_MOST_ID = 1 << 53
_LONGEST_NAME = 4096
# Boxes are suspected where more than this share of them reach outside their image, of this many at least; and crowds,
# of which COCO and its kin have a few in a hundred objects.
_SUSPICIOUS_SHARE, _FEWEST_BOXES = 0.5, 4
# An area further than this factor above that of its box, or below it by its inverse where there is no mask.
_AREA_FACTOR = 2.0
_SHOWN = 3


@dataclass
class Annotations:
    """What counts in a file of COCO instance annotations.

    Attributes:
        path: the file.
        content: for hotcoco: "images" (id, file_name, height, width), "categories" (id, name, and keypoints where they
            are listed) and "annotations" (id, image_id, category_id, bbox, area, iscrowd, and segmentation where there
            is one).
        has_annotations: whether the file has a list of them: test sets need none.
        warnings: what may be meant and probably is not, each with what to do.
        notes: what was adjusted in reading, or is left out in training, each a sentence.
        readable: a file that others' readers of COCO's format take: ``path`` itself, or a copy with the adjustments.
    """

    path: str
    content: dict[str, list[dict]]
    has_annotations: bool = True
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    readable: str = ""

    @functools.cached_property
    def coco(self) -> hotcoco.COCO:
        """The content as hotcoco has it."""
        return hotcoco.COCO(self.content)

    @functools.cached_property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """(height, width) of each image, by its id."""
        return {image["id"]: (image["height"], image["width"]) for image in self.content["images"]}


def read_annotations(json_file: str | os.PathLike[str]) -> Annotations:
    """Reads COCO instance annotations, each state of a file once.

    Args:
        json_file: JSON, with a byte-order mark or not, or the same compressed by gzip.

    Raises:
        UserError: there is no such file, it is not of COCO's format, or an entry has a value that cannot be: names the
            entry, the field and the value.
    """
    path = str(json_file)
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        hint = ": that is an address; download the file" if "://" in path else ""
        raise UserError(f"there is no annotation file {path}{hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the annotation file {path[:200]} cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"the annotation file {path} is no regular file: name a JSON file")
    return _read(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)
def _read(path: str, time: int, size: int) -> Annotations:
    """``time`` and ``size`` tell states of the file apart."""
    data, notes = _bytes(path, size)
    repeats: list[tuple[dict, list[str]]] = []
    try:
        encoding = json.detect_encoding(data)
        if not encoding.startswith("utf-8"):
            notes.append(f"it was written in {encoding.upper()}")
        whole = json.loads(data, object_pairs_hook=functools.partial(_last_of_each, repeats))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON{_what_else(data)}: {str(error)[:200]}") from error
    del data
    reader = _Reader(path, whole, notes)
    reader.look_at_repeats(repeats)
    return reader.annotations()


def _last_of_each(repeats: list[tuple[dict, list[str]]], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, noted in ``repeats`` with the names that stand in it twice, with other values."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        # NaN is another than itself
        others = {name for name, value in pairs if value is not entry[name] and value != entry[name]}
        repeats.append((entry, sorted(others)))
    return entry


def _bytes(path: str, size: int) -> tuple[bytes, list[str]]:
    if size > _MOST_BYTES:
        raise UserError(f"the annotation file {path} has {size >> 30} GB: more than {_MOST_BYTES >> 30} are not read")
    notes = []
    try:
        data = Path(path).read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                data = file.read(_MOST_BYTES + 1)
            if len(data) > _MOST_BYTES:
                raise UserError(f"the annotation file {path} unfolds to more than {_MOST_BYTES >> 30} GB: not read")
            notes.append("it was compressed by gzip")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"the annotation file {path} cannot be read: {error}") from error
    if data[:3] == b"\xef\xbb\xbf":
        data = data[3:]
        notes.append("it began with a byte-order mark")
    return data, notes


# How files begin that are no JSON, and what to do with them.
_BEGINNINGS = {
    b"PK": "a zip archive: unpack it, and name the JSON file in it",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself with 'git lfs pull'",
    b"<": "XML or HTML: export COCO's format",
    b"{'": "Python's notation, with other quotes than JSON's: write it with json.dump",
    b"": "an empty file",
}


def _what_else(data: bytes) -> str:
    """What a file that is no JSON is instead, as far as its beginning tells: " but ..."."""
    start = data[:4096].lstrip()
    for beginning, what in _BEGINNINGS.items():
        if start.startswith(beginning) if beginning else not start:
            return f", but {what}"
    if re.match(rb"\d+( -?[\d.]+){4,}\s", start):
        return ", but lines of numbers as YOLO has them: export COCO's format"
    lines = [line for line in start.split(b"\n")[:2] if line.strip()]
    if len(lines) == 2 and all(line.strip()[:1] == b"{" and line.strip()[-1:] == b"}" for line in lines):
        return ", but a JSON value in each line (NDJSON, ODGT): convert it to COCO's format"
    return ""


# What other tools' own formats have in them, and COCO's has not; of lists, in their first entry.
_FORMATS = {
    "Label Studio's own JSON": ("data", "annotations"),
    "Labelme's": ("shapes", "imagePath"),
    "VIA's own project": ("_via_img_metadata",),
    "Supervisely's": ("objects", "size"),
    "V7 Darwin's": ("item", "annotations"),
    "Hasty's": ("project_name", "label_classes"),
    "Encord's": ("label_hash",),
    "Scale's": ("task_id", "response"),
    "Labelbox's": ("data_row", "projects"),
    "COCO's results, which are detections and no annotations": ("image_id", "score"),
    "predictions of Ultralytics": ("name", "confidence", "box"),
    "COCO's captions, which have no boxes": ("caption", "image_id"),
    "CreateML's": ("image", "annotations"),
    "Label Studio's JSON_MIN": ("image", "annotator"),
    "BDD100K's": ("name", "labels"),
    "Datumaro's own": ("categories", "items"),
    "FiftyOne's own": ("samples",),
    "SuperAnnotate's own": ("metadata", "instances"),
    "Kili's": ("externalId", "jsonResponse"),
    "Dataloop's": ("filename", "annotations"),
    "VoTT's": ("assets",),
    "VIA's own export": ("filename", "regions"),
    "mmdetection's own": ("data_list",),
    "YouTube-VIS's, which is of videos": ("videos",),
    "GeoJSON": ("features", "type"),
}


def _other_format(whole: Any) -> str:
    """Whose format a JSON value is in that is not COCO's, in a few words; "" where its keys do not tell."""
    samples = [whole[0] if isinstance(whole, list) and whole else whole]
    if isinstance(whole, list) and len(whole) == 1 and isinstance(whole[0], dict) and _READ.keys() <= whole[0].keys():
        return ", but that format in a list of one: take it out"
    if isinstance(whole, dict):
        entries = whole.get("annotations")
        samples += [next(iter(whole.values()), None), entries[0] if isinstance(entries, list) and entries else None]
    for sample in samples:
        keys = set(sample) if isinstance(sample, dict) else set()
        tool = next((tool for tool, marks in _FORMATS.items() if keys.issuperset(marks)), None)
        if tool:
            return f"; it looks like {tool}: export or convert it to COCO's"
    return ""


# Fields of COCO's other formats and of its kin.
_KINDS = {"segments_info": "COCO's panoptic format", "neg_category_ids": "LVIS's format"}


# What is read, of each list.
_READ = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name", "keypoints"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation", "keypoints"),
}


class _Reader:
    """One pass over what a file holds; entries that need an adjustment are changed in ``whole`` as well."""

    def __init__(self, path: str, whole: Any, notes: list[str]):
        self.path, self.whole, self.notes = path, whole, notes
        self.is_adjusted = bool(notes)
        self.adjusted: Counter[str] = Counter()
        self.told: dict[str, list[Any]] = {}

    def look_at_repeats(self, repeats: Sequence[tuple[dict, Sequence[str]]]) -> None:
        """Refuses objects in which a name that counts stands twice with other values: reading takes the last alone.

        Args:
            repeats: of the file, as :func:`_last_of_each` notes them.
        """
        if not repeats:
            return
        found = {id(entry): names for entry, names in repeats}
        counting = [("it", self.whole, tuple(_READ))]
        for key, fields in _READ.items():
            entries = self.whole.get(key) if isinstance(self.whole, dict) else None
            for place, entry in enumerate(entries if isinstance(entries, list) else ()):
                if isinstance(entry, dict):
                    counting.append((f"entry {place} of {key}", entry, fields))
                    counting.append(
                        (f"the mask of entry {place} of {key}", entry.get("segmentation"), ("size", "counts"))
                    )
        for where, entry, fields in counting:
            twice = [name for name in found.get(id(entry), ()) if name in fields]
            if twice:
                raise UserError(
                    f"{self.path}: {where} has {twice[0]!r} twice, with other values, of which reading takes the last: "
                    "leave one of them"
                )
        self.notes.append(f"names stand twice in {len(repeats)} of its JSON objects, and the last was taken")

    def annotations(self) -> Annotations:
        whole, has_annotations = self.whole, True
        if isinstance(whole, dict) and "annotations" not in whole:
            has_annotations = False
        for key in ("images", *(("annotations",) if has_annotations else ()), "categories"):
            if not isinstance(whole, dict) or not isinstance(whole.get(key), list):
                raise UserError(
                    f"{self.path} is not in COCO's instance format: it has no list {key!r}{_other_format(whole)}"
                )
        for key in ("images", "categories"):
            if not whole[key]:
                raise UserError(f"{self.path} has no {key}{_other_format(whole)}")
        images = [self._image(entry) for entry in self._entries("images", ("id", "file_name", "height", "width"))]
        categories = [self._category(entry) for entry in self._entries("categories", ("id", "name"))]
        sizes = self._unique("images", images, lambda image: (image["height"], image["width"]))
        names = self._unique("categories", categories, lambda category: category["name"])
        self._number_anew()
        self._look_at_files(images)
        self._look_at_names(categories)
        needed = ("id", "image_id", "category_id", "bbox")
        entries = self._entries("annotations", needed) if has_annotations else []
        objects = [self._object(entry, sizes, names) for entry in entries]
        self._unique("annotations", objects, lambda entry: None)
        content = {"images": images, "annotations": objects, "categories": categories}
        self._look_at_boxes(objects, sizes)
        self._count_what_is_dropped(content)
        if any(entry["id"] < 0 for entry in objects):  # hotcoco takes none, and no metric reads them
            for number, entry in enumerate(objects, 1):
                entry["id"] = number
        for what, count in self.adjusted.items():
            self.notes.append(f"{what} ({count})")
        warnings = [f"{what} ({_some(ids)})" for what, ids in self.told.items()]
        found = Annotations(self.path, content, has_annotations, warnings, self.notes, self.path)
        if self.is_adjusted or self.adjusted:
            found.readable = _adjusted_copy(self.path, whole)
        return found

    def _entries(self, key: str, fields: Sequence[str]) -> Iterable[dict]:
        for place, entry in enumerate(self.whole[key]):
            if not isinstance(entry, dict):
                raise UserError(
                    f"{self.path}: entry {place} of {key} is no object with names and values: {_shown(entry)}"
                )
            for name in fields:
                if name not in entry:
                    why = next((f", as {kind} has it" for mark, kind in _KINDS.items() if mark in entry), "")
                    raise UserError(f"{self.path}: entry {place} of {key} lacks {name!r}{why}: {_shown(entry)}")
            yield entry

    def _unique(self, key: str, entries: list[dict], value: Callable[[dict], Any]) -> dict[int, Any]:
        found = {entry["id"]: value(entry) for entry in entries}
        if len(found) < len(entries):
            twice = next(id_ for id_, count in Counter(entry["id"] for entry in entries).items() if count > 1)
            raise UserError(f"{self.path}: the ids of {key} are not unique, {twice} is there twice: number them anew")
        return found

    def _number_anew(self) -> None:
        """Numbers annotations whose ids are texts or huge, such as UUIDs: no training and no metric reads them."""
        entries = [entry for entry in self.whole.get("annotations", []) if isinstance(entry, dict)]
        ids = [entry.get("id") for entry in entries]
        found = {
            "texts": sum(isinstance(own, str) for own in ids),
            f"beyond {_MOST_ID}": sum(type(own) is int and abs(own) > _MOST_ID for own in ids),
        }
        if any(found.values()):
            for number, entry in enumerate(entries, 1):
                entry["id"] = number
        for what, count in found.items():
            if count:
                self.adjusted[f"annotations were numbered, as their ids are {what}"] = count

    def _look_at_files(self, images: list[dict]) -> None:
        files = [os.path.normpath(image["file_name"]) for image in images]
        names = Counter(files)
        twice = [image["id"] for image, file in zip(images, files, strict=True) if names[file] > 1]
        if twice:
            self.told["images share their file with another, whose objects they lack: merge them"] = twice

    def _look_at_names(self, categories: list[dict]) -> None:
        names = Counter(category["name"] for category in categories)
        for category in categories:
            if not category["name"].strip():
                self._tell("categories have no name: give them one", category["id"])
            elif names[category["name"]] > 1:
                self._tell("categories share their name with another, and count as others: merge them", category["id"])

    def _whole_number(self, entry: dict, name: str, where: str, least: int, most: int) -> int:
        value = entry[name]
        if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,14}", value) and name.endswith("id"):
            value = entry[name] = int(value)
            self.adjusted[f"ids written as texts were read as the numbers that they are, in the field {name!r}"] += 1
        if type(value) is float and value.is_integer():
            value = entry[name] = int(value)
            self.adjusted[f"whole numbers written with a point were read as whole numbers, in the field {name!r}"] += 1
        if type(value) is not int or not least <= value <= most:
            raise UserError(
                f"{self.path}: {where} has the {name} {_shown(value)}: a whole number from {least} to {most} is needed"
            )
        return value

    def _image(self, entry: dict) -> dict:
        number = self._whole_number(entry, "id", f"image {_shown(entry['file_name'])}", 0, _MOST_ID)
        name = entry["file_name"]
        if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or "\0" in name:
            raise UserError(f"{self.path}: image {number} has the file_name {_shown(name)}: a name is needed")
        height, width = (self._whole_number(entry, k, f"image {name}", 1, _MOST_SIDE) for k in ("height", "width"))
        if height * width > _MOST_PIXELS:
            raise UserError(f"{self.path}: image {name} is {width}x{height}: more pixels than any detector can take")
        return {"id": number, "file_name": name, "height": height, "width": width}

    def _category(self, entry: dict) -> dict:
        number = self._whole_number(entry, "id", f"category {_shown(entry['name'])}", 0, _MOST_ID)
        if not isinstance(entry["name"], str) or _has_half_characters(entry["name"]):
            raise UserError(f"{self.path}: category {number} has the name {_shown(entry['name'])}: a text is needed")
        points = entry.get("keypoints")
        are_names = isinstance(points, list) and points and all(isinstance(point, str) for point in points)
        return {"id": number, "name": entry["name"], **({"keypoints": points} if are_names else {})}

    def _object(self, entry: dict, sizes: dict[int, tuple[int, int]], names: dict[int, str]) -> dict:
        number = self._whole_number(entry, "id", f"annotation {_shown(entry['id'])}", -_MOST_ID, _MOST_ID)
        where = f"annotation {number}"
        image = self._whole_number(entry, "image_id", where, -_MOST_ID, _MOST_ID)
        category = self._whole_number(entry, "category_id", where, -_MOST_ID, _MOST_ID)
        if image not in sizes:
            raise UserError(f"{self.path}: {where} is of image {image}, which is not among the images")
        if category not in names:
            raise UserError(f"{self.path}: {where} is of category {category}, which is not among the categories")
        if entry.get("ignore", 0) not in (0, False):
            raise UserError(
                f"{self.path}: {where} has 'ignore': {_shown(entry['ignore'])}, which COCO's format has not and "
                "Detectron2 refuses: remove these annotations, or mark them by 'iscrowd': 1"
            )
        size = sizes[image]
        box = entry["bbox"]
        fault = box_fault(box, size)
        if fault:
            raise UserError(f"{self.path}: {where} has the bbox {_shown(box)}: {fault}")
        crowd = entry.get("iscrowd", 0)
        if type(crowd) is float and crowd.is_integer():
            crowd = self._whole_number(entry, "iscrowd", where, 0, 255)
        if type(crowd) not in (int, bool) or not 0 <= crowd <= 255:
            raise UserError(f"{self.path}: {where} has 'iscrowd': {_shown(crowd)}: 0 or 1 is needed")
        if crowd not in (0, 1):
            self._tell("'iscrowd' is neither 0 nor 1, and counts as 1: set it to one of them", number)
        found = {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": int(bool(crowd))}
        mask = entry.get("segmentation")
        if mask:
            fault = mask_fault(mask, size)
            if fault:
                raise UserError(f"{self.path}: {where}: {fault}")
            found["segmentation"] = mask
            if isinstance(mask, dict) and not _covers(mask["counts"]):
                self._tell("masks cover no pixel: remove them, or draw them anew", number)
        found["area"] = self._area(entry, box, bool(mask), number)
        return found

    def _area(self, entry: dict, box: list[float], has_mask: bool, number: int) -> float:
        area, of_box = entry.get("area"), float(box[2] * box[3])
        if "area" not in entry:
            entry["area"] = of_box
            self.adjusted["the area that annotations lack was taken to be that of their boxes"] += 1
            return of_box
        if not is_number(area) or not 0 <= area < float("inf"):
            what = "null" if area is None else "no number of at least 0"
            self._tell(
                f"areas are {what}, and that of the box is taken: by its area an object is small or large", number
            )
            entry["area"] = of_box
            self.is_adjusted = True
            return of_box
        if area > _AREA_FACTOR * of_box + 1 or (not has_mask and area < of_box / _AREA_FACTOR - 1):
            self._tell("areas are unlike their boxes: APs, APm and APl go by the area, so compute it anew", number)
        return float(area)

    def _look_at_boxes(self, objects: list[dict], sizes: dict[int, tuple[int, int]]) -> None:
        if len(objects) < _FEWEST_BOXES:
            return
        boxes = np.array([entry["bbox"] for entry in objects], dtype=float)
        height, width = np.array([sizes[entry["image_id"]] for entry in objects], dtype=float).T
        ids = [entry["id"] for entry in objects]
        if boxes.max() <= 1.01 and min(height.min(), width.min()) > 2:
            self.told["boxes lie between 0 and 1, as if relative to the image: COCO's are in pixels"] = ids
            return
        outside = (boxes[:, 0] + boxes[:, 2] > width + 1) | (boxes[:, 1] + boxes[:, 3] > height + 1)
        corners = (boxes[:, 2] >= boxes[:, 0]) & (boxes[:, 3] >= boxes[:, 1])
        if outside.mean() > _SUSPICIOUS_SHARE and corners.mean() > 0.95:
            where = np.array(ids)[outside].tolist()
            self.told["boxes look like x1, y1, x2, y2, COCO's are x, y, width, height: convert them"] = where

    def _count_what_is_dropped(self, content: dict[str, list[dict]]) -> None:
        """What Detectron2 leaves out in training without a word."""
        objects = content["annotations"]
        short = [
            entry["id"]
            for entry in objects
            if isinstance(entry.get("segmentation"), list)
            and any(len(polygon) < 6 or len(polygon) % 2 for polygon in entry["segmentation"])
        ]
        if short:
            self.told[
                "polygons have fewer than three points or an odd number of coordinates, and are left out, their boxes "
                "too where no other polygon is there: draw them anew, or make the segmentation an empty list"
            ] = short
        crowds = [entry["id"] for entry in objects if entry["iscrowd"]]
        if len(crowds) > _SUSPICIOUS_SHARE * len(objects) and len(objects) >= _FEWEST_BOXES:
            self.told[
                "most of the objects are crowd regions, on which nothing is trained: set 'iscrowd' to 0 where "
                "they are single objects (CVAT, for one, writes 1 for each mask)"
            ] = crowds
        with_objects = {entry["image_id"] for entry in objects if not entry["iscrowd"]}
        with_any = {entry["image_id"] for entry in objects}
        number = len(content["images"])
        if len(with_any) < number and objects:
            self.notes.append(f"{number - len(with_any)} of its {number} images have no object")
        if with_any - with_objects:
            self.notes.append(f"{len(with_any - with_objects)} of its images have crowd regions alone")

    def _tell(self, what: str, number: int) -> None:
        self.told.setdefault(what, []).append(number)


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that fits a float and is finite; True and False are none."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def box_fault(box: Any, size: Sequence[int]) -> str | None:
    """What is wrong with a box x, y, width, height in pixels, if anything.

    Args:
        size: height and width of its image; a box may lie outside of it, but not by more than ``_MOST_SIDES`` times.
    """
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return "four finite numbers x, y, width, height are needed"
    if box[2] < 0 or box[3] < 0:
        return "its width and height must not be negative"
    bound = _MOST_SIDES * max(size)
    if max(map(abs, box)) > bound:
        return f"it lies more than {_MOST_SIDES} times the image's size outside of it"
    return None


def mask_fault(segmentation: Any, size: Sequence[int]) -> str | None:
    """What is wrong with a mask in COCO's format, if anything; afterwards compiled code can decode it.

    Args:
        segmentation: polygons, or RLE with its counts as a list or in COCO's compressed form.
        size: height and width of its image.
    """
    if isinstance(segmentation, list):
        return _polygons_fault(segmentation, _MOST_SIDES * max(size))
    if not isinstance(segmentation, dict) or not isinstance(segmentation.get("counts"), str | list):
        return "its mask is neither a list of polygons nor RLE with size and counts"
    sides, counts = segmentation.get("size"), segmentation["counts"]
    if sides != list(size) or any(type(side) is not int for side in sides):
        return f"its mask has the size {_shown(sides)}, its image {list(size)} (height, width)"
    if isinstance(counts, str):
        if counts.startswith(("b'", 'b"')):
            return "its mask's counts are Python's notation of bytes, b'...': write them decoded as ASCII"
        counts = rle_counts(counts)
        if counts is None:
            return f"its mask's counts {_shown(segmentation['counts'])} are not COCO's compressed RLE"
    elif any(type(count) is not int or not 0 <= count <= size[0] * size[1] for count in counts):
        return f"its mask's counts {_shown(counts)} are not whole numbers from 0 to the pixels of its image"
    if any(count < 0 for count in counts) or sum(counts) != size[0] * size[1]:
        shown, pixels = _shown(segmentation["counts"]), size[0] * size[1]
        return f"its mask's counts {shown} do not add up to the {pixels} pixels of its image"
    return None


def _polygons_fault(polygons: list, bound: float) -> str | None:
    for polygon in polygons:
        if not isinstance(polygon, list):
            return "its mask is a list, but not of polygons: write [[x, y, x, y, ...]], a list for each of them"
        for value in polygon:
            if not is_number(value):
                return f"a polygon has the coordinate {_shown(value)}: finite numbers are needed, x, y, x, y, ..."
            if not -bound <= value <= bound:
                return f"a polygon reaches to {_shown(value)}, more than {_MOST_SIDES} times its image's size away"
    return None


def rle_counts(text: str) -> np.ndarray | None:
    """The run lengths of COCO's compressed RLE, (runs,); None for what is none.

    Each is written in groups of five bits from the lowest on, in a character from "0" on whose sixth bit says that
    another follows; from the fourth on it is the difference from the one two before.
    """
    if not text or not text.isascii():
        return None
    codes = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    if codes.min() < 0 or codes.max() > 63:
        return None
    ends = (codes & 32) == 0
    if not ends[-1]:
        return None
    last = np.flatnonzero(ends)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # 35 bits: no image has as many pixels
        return None
    counts = np.add.reduceat((codes & 31) << (5 * place), first)
    negative = (codes[last] & 16) != 0
    counts[negative] -= 1 << (5 * (place[last][negative] + 1))
    counts[1::2] = np.cumsum(counts[1::2])
    counts[2::2] = np.cumsum(counts[2::2])
    return counts


def _covers(counts: str | list[int]) -> bool:
    runs = rle_counts(counts) if isinstance(counts, str) else counts
    return any(runs[1::2])


def _has_half_characters(text: str) -> bool:
    """Whether it holds halves of UTF-16 characters, which JSON can write and no file can hold as text."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _adjusted_copy(path: str, whole: dict) -> str:
    """Writes the adjusted content where other readers of COCO's format find it; the same content goes to one file."""
    data = json.dumps(whole).encode()
    folder = Path(tempfile.gettempdir(), f"sge_det-{os.getuid()}")
    copy = folder / f"{hashlib.sha256(data).hexdigest()[:32]}-{Path(path).name.removesuffix('.gz')}"
    if not copy.is_file() or copy.stat().st_size != len(data):
        write_file(copy, data)
    return str(copy)


def _some(ids: Sequence[Any]) -> str:
    return f"{len(ids)}: ids {', '.join(map(str, ids[:_SHOWN]))}{', ...' if len(ids) > _SHOWN else ''}"


def _shown(value: Any) -> str:
    """A value as JSON has it, so that a text has its quotes."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = repr(type(value))
    return text if len(text) <= 80 else f"{text[:77]}..."
