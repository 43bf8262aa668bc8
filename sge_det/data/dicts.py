"""Data sets that a function makes, in Detectron2's own form: what ends a run later is found in them beforehand."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

# What Detectron2 converts to what it needs, with the numbers of a box.
_MODES = {BoxMode.XYXY_ABS: 4, BoxMode.XYWH_ABS: 4, BoxMode.XYWHA_ABS: 5}


def dicts_fault(dicts: Iterable[dict], classes: int | None, *, are_tested: bool) -> str | None:
    """What is wrong with a data set in Detectron2's form, if anything.

    Args:
        dicts: what its function returns.
        classes: how many classes it has, where that is known.
        are_tested: they are evaluated by COCO's metrics, which need ids and sizes of images.
    """
    if not isinstance(dicts, Iterable):
        return f"its function returns a {type(dicts).__name__}: a list of dicts is needed"
    seen = set()
    for place, entry in enumerate(dicts):
        if not isinstance(entry, dict):
            return f"its function returns a list with a {type(entry).__name__}: a list of dicts is needed"
        fault = _image_fault(entry, are_tested=are_tested) or _objects_fault(entry.get("annotations", []), classes)
        if fault is None and are_tested:
            if entry["image_id"] in seen:
                fault = f"the image_id {entry['image_id']!r:.60} is there twice"
            seen.add(entry["image_id"])
        if fault:
            return f"entry {place} ({str(entry.get('file_name', 'without file_name'))[:200]}): {fault}"
    return None


def _image_fault(entry: dict, *, are_tested: bool) -> str | None:
    if "file_name" not in entry:
        return "it lacks 'file_name'"
    if not are_tested:
        return None
    for key in ("image_id", "height", "width"):
        if key not in entry:
            return f"it lacks {key!r}, which COCO's metrics need"
    if type(entry["image_id"]) not in (int, str):
        return f"its image_id {entry['image_id']!r:.60} is neither a whole number nor a text"
    return None


def _objects_fault(objects: Any, classes: int | None) -> str | None:
    if not isinstance(objects, list | tuple):
        return f"its annotations are a {type(objects).__name__}: a list is needed"
    for number, entry in enumerate(objects):
        fault = _object_fault(entry, classes)
        if fault:
            return f"annotation {number} {fault}"
    return None


def _object_fault(entry: Any, classes: int | None) -> str | None:
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}: a dict is needed"
    for key in ("bbox", "bbox_mode", "category_id"):
        if key not in entry:
            return f"lacks {key!r}"
    mode, box, number = entry["bbox_mode"], entry["bbox"], entry["category_id"]
    if mode not in _MODES:
        return f"has the bbox_mode {mode!r:.60}: XYXY_ABS, XYWH_ABS and XYWHA_ABS can be used"
    values = box.tolist() if isinstance(box, np.ndarray) else box
    are_finite = isinstance(values, list | tuple) and all(_is_finite(value) for value in values)
    if not are_finite or len(values) != _MODES[mode]:
        return f"has the bbox {box!r:.100}: {_MODES[mode]} finite numbers are needed"
    if not isinstance(number, int | np.integer) or number < 0 or (classes is not None and number >= classes):
        span = "from 0 on" if classes is None else f"from 0 to {classes - 1}"
        return f"has the category_id {number!r:.60}: the place of its class is needed, {span}"
    return None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value) and abs(value) < 1e9
