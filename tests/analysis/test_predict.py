import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools.coco import COCO
from sample_detectors import FASTER, MASK, save_weights

from sge_det.analysis import predict as predict_module
from sge_det.analysis.figures import captioned, draw_detections, overlay
from sge_det.analysis.inputs import find_files, report_faults, split_input
from sge_det.analysis.predict import output_files, predict
from sge_det.analysis.predictor import Predictor, categories, gate_range, setup_prediction, with_confidence
from sge_det.errors import UserError
from sge_det.modeling.gates import sge_layers


@pytest.fixture(scope="module")
def weights(sample_datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    save_weights(FASTER, folder / "faster.pth", sample_datasets)
    save_weights(MASK, folder / "mask.pth", sample_datasets)
    return folder


def config(name, weights, datasets):
    return setup_prediction(name, [*TINY, "MODEL.WEIGHTS", str(weights)], datasets)


def write_video(path, frames):
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (width, height))
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


@pytest.fixture
def inputs(sample, tmp_path):
    """Two images, one of them damaged, a text and a video of three frames."""
    folder = tmp_path / "in"
    folder.mkdir()
    pictures = sorted((sample / "val").glob("*.jpg"))
    shutil.copy(pictures[0], folder / "a.jpg")
    (folder / "b.jpg").write_bytes(pictures[1].read_bytes()[:400])
    Image.open(pictures[2]).save(folder / "c.png")
    (folder / "notes.txt").write_text("no image")
    write_video(folder / "d.avi", [np.asarray(Image.open(pictures[0]).resize((96, 64)).convert("RGB"))] * 3)
    return folder


def test_a_folder_with_a_damaged_file(inputs, weights, sample_datasets, tmp_path):
    output = tmp_path / "out"
    cfg = config(MASK, weights / "mask.pth", sample_datasets)
    files = find_files([str(inputs)])
    assert [file.name for file in files] == ["a.jpg", "b.jpg", "c.png", "d.avi"]
    path, faults = predict(cfg, files, output, confidence=0.05)
    assert list(faults) == [inputs / "b.jpg"]
    with pytest.raises(UserError, match=r"1 of 4 files cannot be read, the others are done: .*b\.jpg: "):
        report_faults(faults, files, "the others are done")
    assert sorted(file.name for file in output.iterdir()) == ["a.jpg", "c.png", "d.avi.mp4", "predictions.json"]
    for name in ("a.jpg", "c.png"):
        with Image.open(output / name) as drawn, Image.open(inputs / name) as original:
            assert drawn.size == original.size
            assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(original.convert("RGB"), dtype=int)).max() > 50

    content = json.loads(path.read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "c.png", *["d.avi"] * 3]
    assert [image.get("frame_id") for image in content["images"]] == [None, None, 0, 1, 2]
    assert content["videos"] == [{"id": 1, "name": "d.avi"}]
    assert (content["images"][2]["width"], content["images"][2]["height"]) == (96, 64)
    truth = json.loads(Path(sample_datasets[1][1]).read_text())
    assert content["categories"] == [{"id": c["id"], "name": c["name"]} for c in truth["categories"]]
    coco = COCO(str(path))
    assert len(coco.anns) == len(content["annotations"]) > 0
    for entry in coco.anns.values():
        image = coco.imgs[entry["image_id"]]
        mask = coco.annToMask(entry)
        assert mask.shape == (image["height"], image["width"])
        assert entry["area"] == mask.sum()
        assert entry["category_id"] in coco.cats
        assert entry["score"] >= 0.05
        x, y, width, height = entry["bbox"]
        assert 0 <= x <= x + width <= image["width"]
        assert 0 <= y <= y + height <= image["height"]
    # the results of the model itself, through the same file of results that COCO's tools take
    results = [{key: a[key] for key in ("image_id", "category_id", "bbox", "score")} for a in content["annotations"]]
    assert len(coco.loadRes(results).anns) == len(results)

    video = cv2.VideoCapture(str(output / "d.avi.mp4"))
    frames = []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert len(frames) == 3
    assert frames[0].shape == (64, 96, 3)
    assert video.get(cv2.CAP_PROP_FPS) == 5


def test_what_was_found_before_stays_where_nothing_can_be_read(inputs, weights, sample_datasets, tmp_path):
    cfg = config(MASK, weights / "mask.pth", sample_datasets)
    path, _ = predict(cfg, [inputs / "a.jpg"], tmp_path / "out")
    before = path.read_bytes()
    path, faults = predict(cfg, [inputs / "b.jpg"], tmp_path / "out")
    assert list(faults) == [inputs / "b.jpg"] and path.read_bytes() == before
    path, _ = predict(cfg, [inputs / "b.jpg"], tmp_path / "other")
    assert not list((tmp_path / "other").iterdir()) and not path.exists()


def test_detections_are_those_of_the_model(inputs, weights, sample_datasets, tmp_path):
    cfg = config(FASTER, weights / "faster.pth", sample_datasets)
    path, _ = predict(cfg, [inputs / "c.png"], tmp_path / "out", confidence=0.05)
    predictor = Predictor(with_confidence(cfg, 0.05))
    with Image.open(inputs / "c.png") as picture:
        rgb = np.asarray(picture.convert("RGB"))
    assert cfg.INPUT.FORMAT == "RGB"
    assert np.array_equal(predictor.rgb(predictor.read(inputs / "c.png")), rgb)
    instances = predictor(rgb)
    found = json.loads(path.read_text())["annotations"]
    assert [entry["score"] for entry in found] == pytest.approx(instances.scores.tolist())
    corners = [[x, y, x + w, y + h] for x, y, w, h in (entry["bbox"] for entry in found)]
    np.testing.assert_allclose(corners, instances.pred_boxes.tensor.numpy(), atol=1e-3)
    # Detectron2's own predictor, with the weights in its own way
    from detectron2.engine import DefaultPredictor

    default = DefaultPredictor(with_confidence(cfg, 0.05))(rgb[..., ::-1])["instances"]
    assert torch.equal(default.scores.cpu(), instances.scores)


def test_an_interrupted_call_goes_on(inputs, weights, sample_datasets, tmp_path, monkeypatch):
    cfg = config(FASTER, weights / "faster.pth", sample_datasets)
    files = [inputs / name for name in ("a.jpg", "c.png", "d.avi")]
    whole = json.loads(predict(cfg, files, tmp_path / "whole", confidence=0.05)[0].read_text())
    calls = []
    call = Predictor.__call__

    def interrupted(self, image):
        calls.append(image.shape)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(self, image)

    monkeypatch.setattr(Predictor, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(cfg, files, tmp_path / "out", confidence=0.05)
    assert not (tmp_path / "out/predictions.json").exists()
    assert not list((tmp_path / "out").glob("*mp4"))
    path, faults = predict(cfg, files, tmp_path / "out", confidence=0.05)
    assert faults == {}
    assert len(calls) == 3 + 3  # the images are kept, the video's three frames are done anew
    assert json.loads(path.read_text()) == whole
    assert not list((tmp_path / "out").glob(".*"))


def test_another_confidence_begins_anew(inputs, weights, sample_datasets, tmp_path):
    cfg = config(FASTER, weights / "faster.pth", sample_datasets)
    journal = predict_module._Journal(tmp_path / "j", ["a"])
    with journal:
        journal.add(inputs / "a.jpg", [], keep=True)
    with predict_module._Journal(tmp_path / "j", ["a"]) as same:
        assert same.has(inputs / "a.jpg")
    with predict_module._Journal(tmp_path / "j", ["b"]) as other:
        assert not other.has(inputs / "a.jpg")
    (path, _) = predict(cfg, [inputs / "a.jpg"], tmp_path / "out", confidence=1.0)
    content = json.loads(path.read_text())
    assert (len(content["images"]), content["annotations"]) == (1, [])
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="--confidence must lie between 0 and 1"):
            predict(cfg, [inputs / "a.jpg"], tmp_path / "out", confidence=wrong)


def test_attention_is_drawn_beside(inputs, weights, sample_datasets, tmp_path):
    cfg = config(FASTER, weights / "faster.pth", sample_datasets)
    files = [inputs / "a.jpg", inputs / "d.avi"]
    _, faults = predict(cfg, files, tmp_path / "out", attention=True, stage="res4", block=0)
    assert faults == {}
    with Image.open(inputs / "a.jpg") as original, Image.open(tmp_path / "out/a.jpg") as drawn:
        assert drawn.width > 2 * original.width
        assert drawn.height > original.height
    assert cv2.VideoCapture(str(tmp_path / "out/d.avi.mp4")).read()[0]
    with pytest.raises(UserError, match=r"res5 has no block 7"):
        predict(cfg, files, tmp_path / "out", attention=True, block=7)
    plain = cfg.clone()
    plain.MODEL.SGE.ENABLED = False
    with pytest.raises(UserError, match="the model has no SGE"):
        predict(plain, files, tmp_path / "out", attention=True)


def test_the_gates_range_is_the_formulas(weights, sample_datasets):
    cfg = config(FASTER, weights / "faster.pth", sample_datasets)
    model = Predictor(cfg).model
    name = "backbone.bottom_up.res3.1.sge"
    gamma, beta = (
        p.detach().double().numpy().ravel() for p in (sge_layers(model)[name].weight, sge_layers(model)[name].bias)
    )
    low, high = gate_range(model, name)
    assert low == pytest.approx(np.mean(1 / (1 + np.exp(-(beta - 2 * np.abs(gamma))))), abs=1e-6)
    assert high == pytest.approx(np.mean(1 / (1 + np.exp(-(beta + 2 * np.abs(gamma))))), abs=1e-6)


def test_a_map_lies_where_it_belongs():
    image = np.full((40, 64, 3), 128, dtype=np.uint8)
    values = np.zeros((2, 2))
    values[0, 1] = 1
    shown = overlay(image, values, (64.0, 64.0), 0, 1)  # its lower quarter and more is padding
    assert shown.shape == image.shape
    brightness = shown.sum(2)
    y, x = np.unravel_index(brightness.argmax(), brightness.shape)
    assert y <= 16
    assert x >= 47
    # the centre of the bright cell, (48, 16), is brighter than that of the others
    assert brightness[16, 48] > brightness[16, 16]
    assert brightness[16, 48] > brightness[39, 48]


def test_drawings():
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 20.0, 50.0, 40.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([1])
    drawn = draw_detections(image, instances, ["a", "b"], scale=2.0)
    assert drawn.shape == (120, 160, 3)
    # the left edge of the box is vermilion, #d55e00; the middle of the box is untouched
    red, green, blue = drawn[70, 18:23].max(0)
    assert red > 60
    assert red > green > blue
    assert drawn[70, 60].sum() == 0
    both = captioned([(image, "one"), (image, "two")])
    assert both.shape[0] % 2 == both.shape[1] % 2 == 0
    assert np.array_equal(both[-60:, :80], image) or np.array_equal(both[-61:-1, :80], image)


def test_an_image_that_the_model_cannot_take_costs_that_image(inputs, weights, sample_datasets, tmp_path, monkeypatch):
    draw = predict_module.draw_detections

    def failing(image, *arguments):
        if failing.is_first:
            failing.is_first = False
            raise RuntimeError("no room\nat all")
        return draw(image, *arguments)

    failing.is_first = True
    monkeypatch.setattr(predict_module, "draw_detections", failing)
    files = [inputs / "a.jpg", inputs / "c.png"]
    path, faults = predict(config(FASTER, weights / "faster.pth", sample_datasets), files, tmp_path / "out")
    assert list(faults) == files[:1]
    assert "the model cannot take it (" in faults[files[0]] and faults[files[0]].endswith("): no room")
    assert [image["file_name"] for image in json.loads(path.read_text())["images"]] == ["c.png"]
    assert not (tmp_path / "out/a.jpg").exists()


def test_inputs_and_outputs_have_names(inputs, tmp_path):
    assert [f.name for f in find_files([str(inputs / "*.png"), str(inputs / "notes.txt")])] == ["c.png", "notes.txt"]
    assert [f.name for f in find_files([str(tmp_path / "**/*.jpg")])] == ["a.jpg", "b.jpg"]
    deeper = inputs / "more/a.jpg"
    deeper.parent.mkdir()
    shutil.copy(inputs / "a.jpg", deeper)
    targets = output_files([inputs / "a.jpg", deeper, inputs / "x.gif"], tmp_path / "out")
    assert targets == [tmp_path / "out/a.jpg", tmp_path / "out/more/a.jpg", tmp_path / "out/x.gif.png"]
    with pytest.raises(UserError, match=r"x\.gif and \S+x\.gif\.png would both be drawn as"):
        output_files([inputs / "x.gif", inputs / "x.gif.png"], tmp_path / "out")
    again = [str(inputs / "a.jpg"), str(inputs / "c.png"), str(inputs / "more/../a.jpg"), str(inputs / "*.jpg")]
    assert find_files(again) == [inputs / "a.jpg", inputs / "c.png", inputs / "b.jpg"]
    with pytest.raises(UserError, match=r"^1 of 1 files cannot be read: a: torn$"):
        report_faults({Path("a"): "torn"}, [Path("a")], "the others are done")
    with pytest.raises(UserError, match="would write over the input"):
        output_files([inputs / "a.jpg"], inputs)
    (tmp_path / "empty").mkdir()
    for word, message in (("no*.jpg", "no image or video matches"), (str(tmp_path / "empty"), "no images or videos")):
        with pytest.raises(UserError, match=message):
            find_files([word])
    assert split_input(["a.jpg", "MODEL.WEIGHTS", "w.pth"], ["SEED", "1"]) == (
        ["a.jpg"],
        ["MODEL.WEIGHTS", "w.pth", "SEED", "1"],
    )


def test_the_data_set_need_not_be_there(inputs, weights, sample_datasets, tmp_path, caplog):
    """As for somebody who was given a config and weights."""
    overrides = [*TINY, "MODEL.WEIGHTS", str(weights / "faster.pth"), "DATASETS.TEST", "('nowhere_val',)"]
    cfg = setup_prediction(FASTER, overrides)
    assert [entry["name"] for entry in categories(cfg)] == [f"class {k}" for k in range(4)]
    assert "nowhere_val of DATASETS.TEST is not there" in caplog.text
    # Detectron2 knows COCO's classes, and their ids with gaps, without its files
    coco = setup_prediction(FASTER, [*overrides[:-1], "('coco_2017_val',)"])
    with pytest.raises(UserError, match="NUM_CLASSES is 4, but coco_2017_val has 80 categories"):
        categories(coco)
    coco.MODEL.ROI_HEADS.NUM_CLASSES = 80
    assert categories(coco)[-1] == {"id": 90, "name": "toothbrush"}


def test_boxes_and_masks_agree_with_their_areas(inputs, weights, sample_datasets, tmp_path):
    cfg = config(FASTER, weights / "faster.pth", sample_datasets)
    path, _ = predict(cfg, [inputs / "a.jpg"], tmp_path / "out", confidence=0.05)
    for entry in json.loads(path.read_text())["annotations"]:
        assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3])
        assert "segmentation" not in entry
