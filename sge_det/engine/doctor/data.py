"""What is wrong with a data set."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from detectron2.data import MetadataCatalog

from ...data.annotations import read_annotations
from ...data.datasets import missing_hint, missing_images, outside_images
from ...data.images import image_faults
from ...errors import UserError
from .finding import Finding

_WARNINGS = {
    "degenerate_bbox": ("boxes have no width or no height", "remove them"),
    "bbox_out_of_bounds": (
        "boxes reach outside their image",
        "clip them, and see that width and height are the image's",
    ),
    "zero_instance_category": ("categories have no object", "remove them, or add objects: their AP is undefined"),
}


# So many images are opened where not all of them are to be.
_SAMPLED = 50


def examine_dataset(name: str, *, every_image: bool = False, pixel_range: Sequence[float] = ()) -> list[Finding]:
    """Faults of a data set; of its images, a sample is opened, or each with ``every_image``.

    Args:
        pixel_range: ``INPUT.PIXEL_RANGE``.
    """
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("given_json_file") or metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type", "coco") != "coco":
        return []  # LVIS names its images otherwise, for one
    if not json_file or not image_root or not Path(json_file).is_file() or not Path(image_root).is_dir():
        return []  # not COCO's format, or use_datasets has said so
    stat = os.stat(json_file)
    most = None if every_image else _SAMPLED
    faults = _dataset_faults(json_file, image_root, most, tuple(pixel_range), stat.st_mtime_ns, stat.st_size)
    return [Finding(severity, f"data set {name}", problem, remedy) for severity, problem, remedy in faults]


@functools.lru_cache(maxsize=8)
def _dataset_faults(
    json_file: str, image_root: str, most: int | None, pixel_range: tuple[float, ...], time: int, size: int
) -> list[tuple[str, str, str]]:
    """Faults of a data set as (severity, problem, remedy); ``time`` and ``size`` tell states of the file apart."""
    try:
        annotations = read_annotations(json_file)
    except UserError as error:
        return [("error", str(error), "")]
    health, images = annotations.coco.healthcheck(), annotations.content["images"]
    faults = [("warning", f"in {json_file} {warning}", "") for warning in annotations.warnings]
    for entry in (*health["errors"], *health["warnings"]):
        if entry["code"] in _WARNINGS:
            ids = entry["affected_ids"]
            some = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
            problem, remedy = _WARNINGS[entry["code"]]
            faults.append(("warning", f"in {json_file} {problem} ({len(ids)}: ids {some})", remedy))
    missing = missing_images(images, image_root)
    if missing:
        hint = missing_hint(missing[0], image_root)
        problem = (
            f"{len(missing)} of the {len(images)} images of {json_file} are not in {image_root} "
            f"({missing[0][:200]}, ...){hint}"
        )
        faults.append(("error", problem, "put them there, or name the folder that holds them"))
        return faults
    outside = outside_images(images, image_root)
    if outside:
        problem = f"{json_file} names images outside of {image_root} ({len(outside)}: {outside[0][:200]})"
        faults.append(("warning", problem, "see that they are meant: reports show what is there"))
    damaged = image_faults(images, image_root, most, pixel_range=pixel_range)
    if damaged:
        file, fault = damaged[0]
        more = f" (and {len(damaged) - 1} more images cannot be used)" if len(damaged) > 1 else ""
        faults.append(("error", f"the image {file} {fault}{more}", ""))
    return faults
