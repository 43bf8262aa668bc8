"""Images that reading would spoil or that nobody can read are told by one sentence with the file."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from PIL import Image

from sge_det import UserError
from sge_det.analysis.predict import predict
from sge_det.analysis.predictor import Predictor, Unreadable
from sge_det.checkpoint.safe_load import write_weights
from sge_det.config import load_config
from sge_det.data.datasets import register_dataset
from sge_det.data.images import image_fault, image_faults
from sge_det.data.loader import build_mapper, build_test_loader, build_train_loader, map_image
from sge_det.engine.doctor import diagnose
from sge_det.engine.doctor.data import examine_dataset
from sge_det.engine.training import setup_config

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
    with pytest.raises(UserError, match=rf"{name} .* set INPUT.PIXEL_RANGE"):
        map_image(lambda example: example, {"file_name": str(tmp_path / name)})
    with pytest.raises(Unreadable, match="more than 8 bits"):
        reader().read(tmp_path / name)


def reader(*overrides):
    return Predictor(load_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", overrides), torch.nn.Identity())


def save_deep(path, values):
    """``values`` in the depth of their type; Pillow writes no colours of 16 bits."""
    if values.ndim == 3:
        assert cv2.imwrite(str(path), values[..., ::-1])
    else:
        Image.fromarray(values).save(path)


@pytest.mark.parametrize(
    ("name", "dtype", "low", "high"),
    [
        ("a.png", np.uint16, 0, 65535),
        ("a.tif", np.uint16, 500, 4095),
        ("a.tiff", np.int32, -1000, 3000.5),
        ("a.tif", np.float32, -0.25, 0.75),
        ("colour.png", np.uint16, 100, 60_000),
        ("colour.tif", np.uint16, 0, 1023),
    ],
)
def test_deep_pixels_are_scaled_by_the_key(tmp_path, name, dtype, low, high):
    shape = (30, 40, 3) if name.startswith("colour") else (30, 40)
    values = np.random.default_rng(0).uniform(low - 0.2 * (high - low), 1.2 * high - 0.2 * low, shape)
    values = np.clip(values, 0, 65535).astype(dtype) if dtype == np.uint16 else values.astype(dtype)
    save_deep(tmp_path / name, values)
    exact = np.clip((values.astype(np.float64) - low) * 255 / (high - low), 0, 255)
    overrides = ("INPUT.PIXEL_RANGE", f"({low}, {high})", "INPUT.FORMAT", "RGB")
    read = reader(*overrides).read(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == (30, 40, 3)
    assert np.abs(read - exact.reshape(30, 40, -1)).max() <= 0.5 + 1e-9
    assert {0, 255} <= set(np.unique(read)) or low == 0
    cfg = load_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", [*overrides, "INPUT.MIN_SIZE_TEST", "0"])
    example = {"file_name": str(tmp_path / name), "height": 30, "width": 40}
    mapped = map_image(build_mapper(cfg, is_train=False), example)
    assert np.array_equal(mapped["image"].numpy().transpose(1, 2, 0), read)
    assert mapped["file_name"] == example["file_name"]


@pytest.fixture
def deep_sample(sample, tmp_path):
    """The sample set in grey of 8 bits, and the same sixteen times as bright in 16: ``--dataset`` triples of both."""
    sets = {}
    for kind in ("plain", "deep"):
        sets[kind] = []
        for split in ("train", "val"):
            content = json.loads((sample / f"annotations/instances_{split}.json").read_text())
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            for image in content["images"]:
                grey = np.asarray(Image.open(sample / split / image["file_name"]).convert("L"))
                image["file_name"] = f"{image['id']}.png"
                save_deep(folder / image["file_name"], grey if kind == "plain" else grey.astype(np.uint16) * 16)
            file = tmp_path / kind / f"{split}.json"
            file.write_text(json.dumps(content))
            sets[kind].append((f"of_depth_{split}", str(file), str(folder)))
    yield sets
    for name in ("of_depth_train", "of_depth_val"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_deep_set_trains_and_is_predicted_as_the_same_in_8_bits(deep_sample, tmp_path):
    found = {}
    for kind, datasets in deep_sample.items():
        overrides = [*TINY, "OUTPUT_DIR", str(tmp_path / f"out_{kind}"), "MODEL.RESNETS.DEPTH", "18"]
        overrides += [
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            "64",
            "MODEL.FPN.OUT_CHANNELS",
            "32",
            "MODEL.ROI_BOX_HEAD.FC_DIM",
            "32",
        ]
        overrides += ["INPUT.PIXEL_RANGE", "(0, 4080)"] if kind == "deep" else []
        cfg = setup_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", [*overrides, "SEED", "1"], datasets)
        if kind == "plain":
            write_weights(tmp_path / "weights.pth", build_model(cfg).state_dict(), {}, by_suffix=False)
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        batch = next(iter(build_train_loader(cfg, 1)))
        tested = next(iter(build_test_loader(cfg, "of_depth_val")))
        files = sorted(Path(datasets[1][2]).iterdir())[:1]
        predict(cfg, files, tmp_path / f"drawn_{kind}", confidence=0.0)
        found[kind] = (
            [example["image"].numpy() for example in (*batch, *tested)],
            json.loads((tmp_path / f"drawn_{kind}/predictions.json").read_text()),
        )
    assert all(map(np.array_equal, found["plain"][0], found["deep"][0]))
    assert found["plain"][1] == found["deep"][1] and found["plain"][1]["annotations"]


def test_a_deep_set_is_refused_without_its_key_by_every_tool(deep_sample):
    with pytest.raises(UserError, match=r"set INPUT.PIXEL_RANGE \(LOW, HIGH\)"):
        setup_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", TINY, deep_sample["deep"])
    for value in ("(4095,)", "(5, 5)", "(9, 1)", "(0, 1, 2)", "('a', 'b')"):
        findings = diagnose("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["INPUT.PIXEL_RANGE", value])
        assert any(f.key == "INPUT.PIXEL_RANGE" and f.severity == "error" for f in findings), value


def test_scaled_pixels_are_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.arange(1200, dtype=np.uint16).reshape(30, 40)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    read = reader("INPUT.PIXEL_RANGE", "(0, 2550)").read(tmp_path / "a.png")
    assert np.array_equal(read[..., 0], np.rint(np.rot90(values, -1) / 10))


def test_pixels_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.array([[0.5, np.nan]] * 2, np.float32)).save(tmp_path / "a.tif")
    assert "NaN" in image_fault(tmp_path / "a.tif", decode=True, pixel_range=(0, 1))
    with pytest.raises(Unreadable, match="NaN"):
        reader("INPUT.PIXEL_RANGE", "(0, 1)").read(tmp_path / "a.tif")


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
