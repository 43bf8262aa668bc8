"""The shapes in which annotation tools export COCO's instance format, as far as they differ from COCO 2017's own.

Each function takes a content (images, annotations, categories) to what the tool would have written of it.
"""

import copy

LICENSE = {"id": 1, "name": "CC BY 4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}


def _with(content, info=None, licenses=None, image=None, annotation=None, category=None, **rest):
    content = copy.deepcopy(content)
    for key in ("info", "licenses"):
        content.pop(key, None)
    for key, extra in (("images", image), ("annotations", annotation), ("categories", category)):
        for entry in content[key]:
            entry.update(copy.deepcopy(extra or {}))
    return {**({"info": info} if info is not None else {}), **rest, "licenses": licenses, **content}


def roboflow(content):
    """Years as text; ids from 0 on; a category 0 that groups the others and has no objects; no masks."""
    info = {"year": "2021", "version": "1", "description": "Exported from roboflow.ai", "contributor": "", "url": ""}
    info["date_created"] = "2021-02-23T14:34:18+00:00"
    image = {"license": 1, "date_captured": "2021-02-23T14:34:18+00:00", "extra": {"name": "a.jpg"}}
    content = _with(content, info, [LICENSE], image, {"segmentation": []})
    images = {entry["id"]: number for number, entry in enumerate(content["images"])}
    for entry in content["images"]:
        entry["id"] = images[entry["id"]]
    for number, entry in enumerate(content["annotations"]):
        entry |= {"id": number, "image_id": images[entry["image_id"]], "iscrowd": 0}
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})
    return content


def cvat(content):
    """Texts where COCO has numbers, a number where it has a date, attributes of each annotation."""
    info = dict.fromkeys(("contributor", "date_created", "description", "url", "version", "year"), "")
    image = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0}
    return _with(content, info, [{"name": "", "id": 0, "url": ""}], image, {"attributes": {"occluded": False}})


def datumaro(content):
    """Much as CVAT's, with nested attributes and ids of the source beside."""
    info = {"contributor": "", "date_created": "", "description": "", "url": "", "version": "", "year": ""}
    attributes = {"is_crowd": False, "rotation": 0.0, "track_id": None, "keyframe": [True]}
    return _with(content, info, [], {"license": 0, "date_captured": 0}, {"attributes": attributes})


def label_studio(content):
    """No licenses; "ignore" that ignores nothing."""
    info = {"year": 2024, "version": "1.0", "description": "", "contributor": "Label Studio", "url": ""}
    found = _with(content, info, None, None, {"ignore": 0})
    found.pop("licenses")
    return found


def fiftyone(content):
    """Nulls for what is not known."""
    info = {"year": "", "version": "", "description": "Exported from FiftyOne", "contributor": "", "url": ""}
    image = {"license": None, "coco_url": None}
    return _with(content, info, [], image, None, {"supercategory": None})


def labelme2coco(content):
    """Nothing but the three lists, and whole numbers as numbers with a point."""
    found = _with(content)
    found.pop("licenses")
    for entry in found["images"]:
        entry["height"], entry["width"] = float(entry["height"]), float(entry["width"])
    for entry in found["annotations"]:
        entry["id"], entry["category_id"] = float(entry["id"]), float(entry["category_id"])
    return found


def via(content):
    """Settings of the project beside the lists; a license that is unknown."""
    info = {"year": 2024, "version": "1.0", "description": "VIA project exported to COCO format", "contributor": ""}
    info["date_created"] = "Tue Mar 05 2024 10:00:00 GMT+0100"
    image = {"license": 0, "flickr_url": "", "coco_url": "", "date_captured": ""}
    return _with(content, info, [{"id": 0, "name": "Unknown License", "url": ""}], image)


def coco_annotator(content):
    """The state of its own data base in each entry."""
    image = {"dataset_id": 3, "path": "/datasets/a.jpg", "annotated": True, "annotating": [], "num_annotations": 2}
    image |= {"metadata": {}, "deleted": False, "milliseconds": 1234, "events": [], "regenerate_thumbnail": False}
    annotation = {"isbbox": False, "color": "#a1b2c3", "metadata": {}, "creator": "admin"}
    return _with(content, None, None, image, annotation, {"color": "#112233", "keypoint_colors": [], "metadata": {}})


def superannotate(content):
    """Texts and lists in the place of numbers."""
    info = {"description": "SuperAnnotate", "url": "", "version": 1.0, "year": None, "contributor": ["a", "b"]}
    return _with(content, info, [LICENSE], {"license": "1", "date_captured": None}, {"instance_id": None})


def detectron2(content):
    """``convert_to_coco_json``: licenses are null, boxes are rounded."""
    info = {"date_created": "2024-03-05 10:00:00", "description": "Automatically generated COCO json file"}
    found = _with(content, info, None)
    for entry in found["annotations"]:
        entry["bbox"] = [round(float(value), 3) for value in entry["bbox"]]
    return found


EXPORTERS = (
    *(roboflow, cvat, datumaro, label_studio, fiftyone, labelme2coco, via, coco_annotator, superannotate),
    detectron2,
)
