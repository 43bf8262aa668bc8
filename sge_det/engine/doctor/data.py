"""What is wrong with a data set."""

import functools
import os
from pathlib import Path

import hotcoco
from detectron2.data import MetadataCatalog

from ...data.datasets import check_file_names, missing_images
from ...errors import UserError
from .finding import Finding

_DATA_ERRORS = {
    "duplicate_image_id": ("two images have the same id", "give each image its own"),
    "duplicate_ann_id": ("two annotations have the same id", "give each annotation its own"),
    "duplicate_category_id": ("two categories have the same id", "give each category its own"),
    "orphan_image_id": ("annotations are of images that are not in it", "remove them, or add the images"),
    "orphan_category_id": ("annotations are of categories that are not in it", "remove them, or add the categories"),
}
_DATA_WARNINGS = {
    "degenerate_bbox": ("boxes have no width or no height", "remove them"),
    "bbox_out_of_bounds": (
        "boxes reach outside their image",
        "clip them, and see that width and height are the image's",
    ),
    "zero_instance_category": ("categories have no object", "remove them, or add objects: their AP is undefined"),
}


def examine_dataset(name: str) -> list[Finding]:
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not image_root or not Path(json_file).is_file() or not Path(image_root).is_dir():
        return []  # not COCO's format, or use_datasets has said so
    stat = os.stat(json_file)
    faults = _dataset_faults(json_file, image_root, stat.st_mtime_ns, stat.st_size)
    return [Finding(severity, f"data set {name}", problem, remedy) for severity, problem, remedy in faults]


@functools.lru_cache(maxsize=8)
def _dataset_faults(json_file: str, image_root: str, time: int, size: int) -> list[tuple[str, str, str]]:
    """Faults of a data set as (severity, problem, remedy); ``time`` and ``size`` tell states of the file apart."""
    try:
        coco = hotcoco.COCO(json_file)
        health = coco.healthcheck()
        images = coco.load_imgs(coco.get_img_ids())
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        return [("error", f"{json_file} is not in COCO's instance format: {error}", "write it anew")]
    faults = []
    for severity, known in (("error", _DATA_ERRORS), ("warning", _DATA_WARNINGS)):
        for entry in (*health["errors"], *health["warnings"]):
            if entry["code"] in known:
                ids = entry["affected_ids"]
                some = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
                problem, remedy = known[entry["code"]]
                faults.append((severity, f"in {json_file} {problem} ({len(ids)}: ids {some})", remedy))
    try:
        check_file_names(json_file, images)
    except UserError as error:
        return [*faults, ("error", str(error), "")]
    missing = missing_images(images, image_root)
    if missing:
        problem = (
            f"{len(missing)} of the {len(images)} images of {json_file} are not in {image_root} ({missing[0]}, ...)"
        )
        faults.append(("error", problem, "put them there, or name the folder that holds them"))
    return faults
