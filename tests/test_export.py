"""Detectors and backbones, exported and run again from their files, beside the model itself."""

import json
import sys

import onnxruntime
import pytest
import torch
from torch import nn

import sge_det.export
from sge_det.engine.training import build_seeded_model
from sge_det.export import Check, Export, export_model, report
from sge_det.modeling.gates import sge_layers

SIZES = [(64, 96), (96, 64), (128, 96), (75, 110)]
SLIM = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18"]


def build(name):
    """A slim detector whose gates are not constant and whose scores differ, so that it finds objects in any order."""
    cfg = sge_det.get_config(f"sample/{name}_SGE_R_50_FPN.yaml", SLIM)
    model = build_seeded_model(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in sge_layers(model).values():
        nn.init.normal_(layer.weight, std=0.5, generator=generator)
    for path, module in model.named_modules():
        if path.endswith("cls_score"):
            nn.init.normal_(module.weight, std=3.0 if name == "retinanet" else 0.3, generator=generator)
    return model


@pytest.mark.parametrize(
    "name, way",
    [("faster_rcnn", "scripted"), ("mask_rcnn", "scripted"), ("cascade_rcnn", "traced"), ("retinanet", "scripted")],
)
def test_torchscript_is_the_detector(name, way, tmp_path):
    model = build(name)
    detector, backbone = export_model(model, tmp_path, "torchscript", sizes=SIZES)
    assert detector.way == way and detector.holds and backbone.holds, report([detector, backbone])
    assert {check.size for check in detector.checks} == set(SIZES)
    assert {check.batch for check in backbone.checks} == {1, 2, 3}
    assert ("pred_masks" in detector.outputs) == (name == "mask_rcnn")
    # read again without the package's help
    x = torch.rand(1, 3, 160, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = model.backbone(x)
        for found, feature in zip(torch.jit.load(tmp_path / "backbone.ts")(x), expected.values(), strict=True):
            torch.testing.assert_close(found, feature, rtol=1e-4, atol=1e-4)
    assert [entry["holds"] for entry in json.loads((tmp_path / "export.json").read_text())] == [True, True]


def test_onnx_is_the_detector(tmp_path):
    model = build("retinanet")
    detector, backbone = export_model(model, tmp_path, "onnx", sizes=SIZES)
    assert detector.holds and backbone.holds, report([detector, backbone])
    session = onnxruntime.InferenceSession(tmp_path / "detector.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == detector.outputs
    assert detector.outputs == ["pred_boxes", "scores", "pred_classes"]


def test_what_cannot_be_exported_is_told_and_the_backbone_is(tmp_path, monkeypatch):
    def fail(model, image):
        raise RuntimeError("Could not guard on data-dependent expression\nand more")

    # torch.export's own words, which it takes half a minute to find
    monkeypatch.setattr(sge_det.export, "_exported_detector", fail)
    model = build("faster_rcnn")
    detector, backbone = export_model(model, tmp_path, "exported_program", sizes=SIZES[:3])
    assert detector.file is None and not detector.holds and "cannot be exported" in detector.reason
    assert backbone.holds and {check.size for check in backbone.checks} == set(SIZES[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backbone.pt2", "export.json"]
    assert detector.reason in report([detector, backbone])


def test_an_image_on_which_nothing_is_found_shows_nothing(tmp_path):
    model = build("retinanet")
    model.test_score_thresh = 1.0
    detector, backbone = export_model(model, tmp_path, "torchscript", sizes=SIZES[:1], image=torch.zeros(3, 50, 50))
    assert detector.difference == 0 and not detector.holds and backbone.holds
    assert "nothing was compared" in report([detector])


def test_a_difference_is_none_that_holds():
    same = Check((64, 64), 1, 1e-6, 3)
    assert Export("detector", "onnx", "traced", "detector.onnx", checks=[same]).holds
    for other in (Check((32, 64), 1, 0.1, 3), Check((32, 64), 1, float("inf"), 3), Check((32, 64), 1, float("nan"), 3)):
        export = Export("detector", "onnx", "traced", "detector.onnx", checks=[same, other])
        assert not export.holds and "DIFFERS" in report([export])


def test_a_wrong_model_is_noticed(tmp_path, monkeypatch):
    """A backbone whose size is fixed in the trace, as one that takes a Python number from a shape."""
    model = build("faster_rcnn")
    forward = type(model.backbone).forward

    def baked(self, x):
        return {name: feature * float(x.shape[-1] / 64) for name, feature in forward(self, x).items()}

    monkeypatch.setattr(type(model.backbone), "forward", baked)
    _, backbone = export_model(model, tmp_path, "torchscript", sizes=SIZES[:2])
    assert not backbone.holds and backbone.difference > 0.1


def test_mistakes_are_told(tmp_path, monkeypatch):
    model = build("faster_rcnn")
    with pytest.raises(sge_det.UserError, match="'caffe2' is not one of torchscript, onnx, exported_program"):
        export_model(model, tmp_path, "caffe2")
    with pytest.raises(sge_det.UserError, match="Linear is no detector that can be exported"):
        export_model(nn.Linear(1, 1), tmp_path, "torchscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(sge_det.UserError, match="onnxruntime is missing: pip install onnx onnxruntime onnxscript"):
        export_model(model, tmp_path, "onnx")
    assert not list(tmp_path.iterdir())


def test_tool(call_tool, tmp_path):
    weights = tmp_path / "weights.pth"
    torch.save({"model": build("faster_rcnn").state_dict()}, weights)
    arguments = ["--config-file", "sample/faster_rcnn_SGE_R_50_FPN.yaml", "--format", "torchscript", "--output", "out"]
    arguments += ["--size", "64,96", "--size", "96,64", *SLIM, "MODEL.WEIGHTS", weights]
    done = call_tool("export_model.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert "| detector | torchscript | scripted |" in done.stdout and (tmp_path / "out" / "detector.ts").is_file()
    done = call_tool("export_model.py", *arguments, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "1.0")
    assert done.returncode == 1 and "nothing was compared" in done.stdout
    done = call_tool("export_model.py", *arguments, "--image", "missing.jpg")
    assert done.returncode == 2 and "cannot read the image missing.jpg" in done.stderr
