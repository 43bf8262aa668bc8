"""Images that reading would spoil or that nobody can read are told by one sentence with the file."""

import json
import os
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from PIL import Image

from sge_det import UserError
from sge_det.analysis.predictor import Predictor, Unreadable
from sge_det.data.datasets import register_dataset
from sge_det.data.images import image_fault, image_faults
from sge_det.data.loader import map_image
from sge_det.engine.doctor.data import examine_dataset

DEEP = {
    "uint16.png": np.full((30, 40), 1000, np.uint16),
    "uint16.tif": np.full((30, 40), 1000, np.uint16),
    "int32.tif": np.full((30, 40), 70_000, np.int32),
    "float.tif": np.full((30, 40), 0.5, np.float32),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pixels_are_refused_because_reading_clips_them(tmp_path, name):
    Image.fromarray(DEEP[name]).save(tmp_path / name)
    assert set(np.unique(read_image(str(tmp_path / name), "BGR"))) <= {0, 255}
    assert "more than 8 bits" in image_fault(tmp_path / name)
    with pytest.raises(UserError, match=name):
        map_image(lambda example: example, {"file_name": str(tmp_path / name)})
    with pytest.raises(Unreadable, match="more than 8 bits"):
        Predictor.read(None, tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
def test_usual_pixels_pass(tmp_path, mode):
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (40, 30)).save(file)
    assert image_fault(file, (30, 40), decode=True) is None


@pytest.mark.parametrize(("size", "fault"), [((20_000, 20), True), ((2, 3000), True), ((400, 2), False)])
def test_shapes_that_cannot_be_resized_are_refused(tmp_path, size, fault):
    Image.new("L", size).save(tmp_path / "a.png")
    assert (image_fault(tmp_path / "a.png") is not None) is fault


def test_files_that_are_no_images_are_told(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:5000])
    for name in ("pipe.png", "text.png", "cut.png", "absent.png", "a" * 5000, "a\0b"):
        assert image_fault(str(tmp_path / name), decode=True), name
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "bomb" in image_fault(tmp_path / "whole.png")


def test_sizes_are_compared_as_exif_turns_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(str(tmp_path / "a.jpg"), "BGR").shape[:2] == (40, 30)
    assert image_fault(tmp_path / "a.jpg", (40, 30)) is None
    assert "40x30" in image_fault(tmp_path / "a.jpg", (30, 40))


def test_the_doctor_opens_images(sample, tmp_path):
    file = sample / "annotations/instances_train.json"
    images = json.loads(file.read_text())["images"]
    shutil.copytree(sample / "train", tmp_path / "images")
    register_dataset("opened", str(file), str(tmp_path / "images"))
    try:
        assert not [f for f in examine_dataset("opened", every_image=True) if f.severity == "error"]
        last = tmp_path / "images" / images[-1]["file_name"]
        last.unlink()
        Image.new("RGB", (7, 9)).save(last)
        assert image_faults(images, str(tmp_path / "images"), most=1) == []
        assert [name for name, _ in image_faults(images, str(tmp_path / "images"))] == [str(last)]
    finally:
        DatasetCatalog.remove("opened")
        MetadataCatalog.remove("opened")
