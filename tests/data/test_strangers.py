"""What strangers bring for annotations and images: taken in as Detectron2 would, or refused by what it is."""

import copy
import functools
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from sge_det import UserError
from sge_det.data.annotations import read_annotations
from sge_det.data.datasets import register_dataset
from sge_det.data.images import image_fault

PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)


def coco(name="a.jpg", **annotation):
    image = {"id": 1, "file_name": name, "height": 40, "width": 60}
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 20, 20], "area": 400, "iscrowd": 0}
    return {"images": [image], "annotations": [entry | annotation], "categories": [{"id": 1, "name": "Käse"}]}


def read(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return read_annotations(path)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.json", json.dumps(coco()))
    return file.getvalue()


OTHER = {
    "Supervisely": ({"description": "", "tags": [], "size": {"height": 4, "width": 6}, "objects": []}, "Supervisely's"),
    "V7 Darwin": ({"version": "2.0", "item": {"name": "a.jpg"}, "annotations": []}, "V7 Darwin's"),
    "Hasty": ({"project_name": "p", "label_classes": [], "images": []}, "Hasty's"),
    "Encord": ([{"label_hash": "x", "data_title": "a.jpg", "data_units": {}}], "Encord's"),
    "Scale": ([{"task_id": "1", "response": {"annotations": []}}], "Scale's"),
    "Labelbox": ([{"data_row": {"id": "1"}, "projects": {}}], "Labelbox's"),
    "Label Studio": ([{"id": 1, "data": {"image": "a.jpg"}, "annotations": []}], "Label Studio's own"),
    "Labelme": ({"version": "5.0", "shapes": [], "imagePath": "a.jpg"}, "Labelme's"),
    "VIA": ({"_via_settings": {}, "_via_img_metadata": {}}, "VIA's own"),
    "results": ([{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}], "detections and no annot"),
    "Ultralytics": ([{"name": "x", "class": 0, "confidence": 0.9, "box": {"x1": 1}}], "predictions of Ultralytics"),
    "captions": ({"images": [], "annotations": [{"image_id": 1, "caption": "a"}]}, "COCO's captions"),
    "captions, no categories": (
        coco() | {"annotations": [{"image_id": 1, "caption": "a"}], "categories": []},
        "captions",
    ),
    "CreateML": ([{"image": "a.jpg", "annotations": [{"label": "x", "coordinates": {}}]}], "CreateML's"),
    "Label Studio, JSON_MIN": ([{"image": "a.jpg", "id": 1, "label": [], "annotator": 1}], "Label Studio's JSON_MIN"),
    "BDD100K": ([{"name": "a.jpg", "labels": [{"category": "car"}]}], "BDD100K's"),
    "Datumaro": ({"info": {}, "categories": {"label": {}}, "items": []}, "Datumaro's own"),
    "FiftyOne": ({"samples": [{"filepath": "a.jpg"}]}, "FiftyOne's own"),
    "SuperAnnotate": ({"metadata": {"name": "a.jpg"}, "instances": [], "tags": []}, "SuperAnnotate's own"),
    "Kili": ([{"id": "x", "externalId": "a.jpg", "jsonResponse": {}}], "Kili's"),
    "Dataloop": ({"annotations": [{"id": "a"}], "filename": "/a.jpg", "metadata": {}}, "Dataloop's"),
    "VoTT": ({"assets": {}, "name": "p", "version": "2"}, "VoTT's"),
    "VIA, exported": ({"a.jpg12": {"filename": "a.jpg", "size": 12, "regions": []}}, "VIA's own export"),
    "mmdetection": ({"metainfo": {}, "data_list": []}, "mmdetection's own"),
    "YouTube-VIS": ({"videos": [], "annotations": [], "categories": []}, "YouTube-VIS's"),
    "GeoJSON": ({"type": "FeatureCollection", "features": []}, "GeoJSON"),
    "COCO in a list": ([coco()], "that format in a list of one: take it out"),
    "YOLO": (b"0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.1 0.1\n", "lines of numbers as YOLO has them"),
    "panoptic": (coco() | {"annotations": [{"segments_info": [], "image_id": 1}]}, "COCO's panoptic format"),
    "LVIS": (coco() | {"images": [{"id": 1, "coco_url": "", "neg_category_ids": []}]}, "LVIS's format"),
    "wrapped": ({"coco": coco()}, "no list 'images'"),
    "NDJSON": (b'{"data_row": {}}\n{"data_row": {}}\n', "a JSON value in each line"),
    "ODGT": (b'{"ID": "a", "gtboxes": []}\r\n{"ID": "b", "gtboxes": []}\r\n', "a JSON value in each line"),
    "CSV": (b"x,1,2,3,4,a.jpg,60,40\n", "is not JSON"),
    "XML": (b"<annotation><object/></annotation>", "XML or HTML"),
    "web page": (b"\n<!DOCTYPE html><title>404</title>", "XML or HTML"),
    "zip": (zipped(), "a zip archive: unpack it"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n", "git lfs pull"),
    "Python": (str(coco()).encode(), "Python's notation"),
    "empty": (b" \n", "an empty file"),
    "cut off": (json.dumps(coco()).encode()[:150], "is not JSON"),
    "trailing comma": (json.dumps(coco()).encode()[:-1] + b",}", "is not JSON"),
    "Latin-1": (json.dumps(coco(), ensure_ascii=False).encode("latin-1"), "is not JSON"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_not_cocos_format_is_refused_by_what_it_is(tmp_path, kind):
    content, words = OTHER[kind]
    with pytest.raises(UserError, match=words) as told:
        read(tmp_path, content)
    assert "a.json" in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (json.dumps(coco()).encode("utf-16"), "UTF-16"),
        (json.dumps(coco()).encode("utf-16-le"), "UTF-16-LE"),
        (json.dumps(coco()).encode("utf-32"), "UTF-32"),
        (json.dumps(coco(), indent=1).replace("\n", "\r\n").encode(), ""),
        (coco(id="3f2a-uuid"), "annotations were numbered"),
        (coco(category_id="1", image_id="1"), "ids written as texts were read as the numbers"),
    ],
)
def test_what_hides_coco_is_taken_off_and_told(tmp_path, content, note):
    found = read(tmp_path, content)
    assert note in " ".join(found.notes) and found.content["categories"][0]["name"] == "Käse"
    (entry,) = found.content["annotations"]
    assert (entry["id"], entry["image_id"], entry["category_id"]) == (1, 1, 1)
    # what Detectron2 reads is the same
    assert json.loads(Path(found.readable).read_text())["annotations"][0]["category_id"] == 1


@pytest.mark.parametrize("name", ["0012", "1.0", " 1", "-1", "a1"])
def test_texts_that_are_no_numbers_are_no_ids(tmp_path, name):
    with pytest.raises(UserError, match="image_id"):
        read(tmp_path, coco(image_id=name))


def test_images_that_share_a_file_are_told(tmp_path):
    content = coco()
    content["images"].append(content["images"][0] | {"id": 2})
    assert any("share their file" in warning and "ids 1, 2" in warning for warning in read(tmp_path, content).warnings)


def test_a_file_by_two_names_is_told(tmp_path):
    content = coco()
    content["images"].append(content["images"][0] | {"id": 2, "file_name": f"./{content['images'][0]['file_name']}"})
    assert any("share their file" in warning for warning in read(tmp_path, content).warnings)


def twice(content, part, name, value):
    """The JSON of ``content``, in whose part of a name stands a second one of that name, before the one there is."""
    owner = functools.reduce(lambda node, key: node[key], part, content)
    marked = {"?": 0, **owner}
    if part:
        functools.reduce(lambda node, key: node[key], part[:-1], content)[part[-1]] = marked
    else:
        content = marked
    return json.dumps(content).replace('"?": 0', f"{json.dumps(name)}: {json.dumps(value)}")


@pytest.mark.parametrize(
    ("part", "name", "value", "where"),
    [
        ((), "annotations", [], "it"),
        ((), "images", [{"id": 7}], "it"),
        (("images", 0), "file_name", "b.jpg", "entry 0 of images"),
        (("categories", 0), "id", 9, "entry 0 of categories"),
        (("annotations", 0), "bbox", [0, 0, 1, 1], "entry 0 of annotations"),
        (("annotations", 0, "segmentation"), "counts", "0", "the mask of entry 0 of annotations"),
    ],
)
def test_names_that_stand_twice_are_refused_where_they_count(tmp_path, part, name, value, where):
    content = coco()
    image = content["images"][0]
    pixels = image["height"] * image["width"]
    content["annotations"][0]["segmentation"] = {"size": [image["height"], image["width"]], "counts": [0, pixels]}
    (tmp_path / "a.json").write_text(twice(copy.deepcopy(content), part, name, value))
    with pytest.raises(UserError, match=f"a.json: {where} has '{name}' twice, with other values"):
        read_annotations(tmp_path / "a.json")
    # the same twice is no harm, nor is what nobody reads
    own = functools.reduce(lambda node, key: node[key], part, content)[name]
    (tmp_path / "b.json").write_text(twice(copy.deepcopy(content), part, name, own))
    (tmp_path / "c.json").write_text(twice(content | {"info": {"year": 2020}}, ("info",), "year", 2021))
    for file in ("b.json", "c.json"):
        assert "names stand twice in 1 of its JSON objects" in read_annotations(tmp_path / file).notes[0]


MISSING = {
    "images\\a.jpg": "write / in file_name",
    "C:\\Users\\me\\a.jpg": "write / in file_name",
    "https://example.com/x/a.jpg": "download the images",
    "s3://bucket/a.jpg": "download the images",
    "images/a.jpg": "a.jpg is there; name the folder above",
    "a.JPG": "a.jpg is there, written otherwise",
    " a.jpg": "a.jpg is there, written otherwise",
    "e\u0301.jpg": "\u00e9.jpg is there, written otherwise",
    "a%2Ejpg": "a.jpg is there; write file_name so",
    "a": "a.jpg is there, which ends otherwise",
    "a.png": "a.jpg is there, which ends otherwise",
    "loop.jpg": "a link that leads nowhere",
    "folder.jpg": "it is a folder",
    "b.jpg": "the first is b.jpg",
}


@pytest.mark.parametrize("name", MISSING)
def test_why_an_image_may_be_missing_is_told(tmp_path, name):
    images = tmp_path / "im"
    (images / "folder.jpg").mkdir(parents=True)
    os.symlink("loop.jpg", images / "loop.jpg")
    for file in ("a.jpg", "\u00e9.jpg"):
        Image.fromarray(PIXELS).save(images / file)
    (tmp_path / "a.json").write_text(json.dumps(coco(name)))
    with pytest.raises(UserError, match="1 of 1 images") as told:
        register_dataset("stranger", str(tmp_path / "a.json"), str(images))
    assert MISSING[name] in str(told.value)


def turned(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


def frames(image, path):
    image.save(path, save_all=True, append_images=[Image.new(image.mode, image.size)])


TAKEN = {
    "cmyk.jpg": lambda image, path: image.convert("CMYK").save(path),
    "palette.png": lambda image, path: image.convert("P").save(path),
    "transparent.png": lambda image, path: image.convert("P").save(path, transparency=bytes(128)),
    "animated.gif": frames,
    "animated.webp": frames,
    "pages.tif": frames,
    "bilevel.png": lambda image, path: image.convert("1").save(path),
    "lab.tif": lambda image, path: image.convert("LAB").save(path),
    "ycbcr.tif": lambda image, path: image.convert("YCbCr").save(path),
    "jpeg.png": lambda image, path: image.save(path, format="JPEG"),
    "UPPER.JPG": lambda image, path: image.save(path, format="JPEG"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_images_of_odd_kinds_are_read(tmp_path, name):
    TAKEN[name](Image.fromarray(PIXELS), tmp_path / name)
    assert image_fault(tmp_path / name, (40, 60), decode=True) is None
    assert read_image(str(tmp_path / name), "BGR").shape == (40, 60, 3)


@pytest.mark.parametrize("name", ["a.heic", "a.svg", "a.npy", "a.dcm", "a.mp4", "a.pdf", "empty.jpg"])
def test_files_that_are_no_images_of_pillow_are_refused(tmp_path, name):
    """By their first bytes."""
    beginnings = {
        "a.heic": b"\0\0\0\x18ftypheic",
        "a.svg": b"<svg/>",
        "a.npy": b"\x93NUMPY",
        "a.dcm": bytes(128) + b"DICM",
    }
    content = beginnings.get(name, b"\0\0\0\x18ftypisom" if name == "a.mp4" else b"%PDF-1.4")
    (tmp_path / name).write_bytes(b"" if name == "empty.jpg" else content + bytes(100))
    fault = image_fault(tmp_path / name, (40, 60), decode=True)
    assert fault.startswith("cannot be read: ") and ("it is empty" in fault) is (name == "empty.jpg")


def test_a_turned_image_says_so(tmp_path):
    turned(Image.fromarray(PIXELS), tmp_path / "a.jpg")
    assert image_fault(tmp_path / "a.jpg", (60, 40)) is None
    assert "it is 40x60, as its EXIF orientation turns it, its annotations say 60x40" in image_fault(
        tmp_path / "a.jpg", (40, 60)
    )


@pytest.fixture(autouse=True)
def forget():
    yield
    if "stranger" in DatasetCatalog:
        DatasetCatalog.remove("stranger")
        MetadataCatalog.remove("stranger")
