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


def build(name, *overrides):
    """A slim detector whose gates are not constant and whose scores differ, so that it finds objects in any order."""
    leaf = name if name.endswith(".yaml") else f"sample/{name}_SGE_R_50_FPN.yaml"
    cfg = sge_det.get_config(leaf, [*SLIM, *overrides])
    model = build_seeded_model(cfg).eval()
    generator = torch.Generator().manual_seed(1)
    for layer in sge_layers(model).values():
        nn.init.normal_(layer.weight, std=0.5, generator=generator)
    for path, module in model.named_modules():
        if path.endswith("cls_score"):
            nn.init.normal_(module.weight, std=3.0 if name == "retinanet" else 0.3, generator=generator)
    return model


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name, way",
    [("faster_rcnn", "scripted"), ("mask_rcnn", "scripted"), ("cascade_rcnn", "traced"), ("retinanet", "scripted")],
)
def test_torchscript_is_the_detector(name, way, tmp_path):
    model = build(name)
    modules = list(model.modules())
    detector, backbone = export_model(model, tmp_path, "torchscript", sizes=SIZES)
    assert all(one is other for one, other in zip(modules, model.modules(), strict=True)), "the model is as it was"
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


class Sizes(nn.Module):
    """Something that goes by the size of a map behind SGE, as anchors do."""

    def __init__(self):
        super().__init__()
        self.sge = sge_det.SpatialGroupEnhance(4)

    def forward(self, x):
        y = self.sge(x)
        return torch.arange(y.shape[2])[:, None] * torch.arange(y.shape[3])


def test_no_size_of_a_map_is_fixed_in_onnx(tmp_path):
    torch.onnx.export(
        Sizes().eval(),
        (torch.zeros(1, 8, 6, 5),),
        tmp_path / "sizes.onnx",
        dynamo=False,
        input_names=["x"],
        dynamic_axes={"x": {0: "n", 2: "h", 3: "w"}},
    )
    session = onnxruntime.InferenceSession(tmp_path / "sizes.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": torch.zeros(2, 8, 3, 7).numpy()})[0].shape == (3, 7)


SEGMENTED = [
    "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "32",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
    "3",
    "MODEL.FPN.OUT_CHANNELS",
    "32",
]
NARROW = [
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RPN.POST_NMS_TOPK_TEST", "50", "MODEL.WEIGHTS", ""),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_HEADS.NUM_CLASSES", "4"),
]
POINTS = ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16,)", "MODEL.ROI_HEADS.NUM_CLASSES", "1"]
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_SGE_R_50_1x.yaml"
KEYPOINTS = "COCO-Keypoints/keypoint_rcnn_SGE_R_50_FPN_1x.yaml"


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("leaf", "overrides", "way", "outputs"),
    [
        (PANOPTIC, SEGMENTED, "traced", {"pred_masks", "sem_seg"}),
        ("Misc/semantic_SGE_R_50_FPN_1x.yaml", SEGMENTED, "traced", {"sem_seg"}),
        (KEYPOINTS, POINTS, "scripted", {"pred_keypoints"}),
        ("faster_rcnn", ["MODEL.SGE.FPN", "True"], "scripted", {"pred_boxes"}),
        # an image is smaller than what it is padded to: gates are those of its own pixels
        ("faster_rcnn", ["MODEL.SGE.IGNORE_PADDING", "True"], "traced", {"pred_boxes"}),
    ],
)
def test_other_models_are_exported(leaf, overrides, way, outputs, tmp_path):
    narrow = NARROW if leaf.endswith(".yaml") else []
    model = build(leaf, *narrow, *overrides)
    detector, backbone = export_model(model, tmp_path, "torchscript", sizes=[SIZES[0], SIZES[3]])
    assert detector.holds and backbone.holds, report([detector, backbone])
    assert detector.way == way and outputs <= set(detector.outputs)


class Whole(nn.Module):
    """A model of a project's own around a backbone of ours."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


def test_of_an_unknown_model_the_backbone_is_exported(tmp_path):
    model = Whole(build("retinanet").backbone)
    detector, backbone = export_model(model, tmp_path, "torchscript", sizes=SIZES[:2])
    assert backbone.holds and not detector.file and "Whole is not exported whole" in detector.reason


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


@pytest.mark.parametrize("wrong", [lambda x: x[1:], lambda x: x * float("nan")], ids=["fewer", "no numbers"])
def test_outputs_that_cannot_be_compared_are_told(wrong, tmp_path, monkeypatch):
    model = Whole(build("retinanet").backbone)

    def make(backbone, x, divisor):
        return b"graph", lambda content: lambda x: [wrong(feature) for feature in backbone(x)]

    monkeypatch.setattr(sge_det.export, "_traced_backbone", make)
    exports = export_model(model, tmp_path, "torchscript", sizes=SIZES[:1])
    assert exports[1].difference == float("inf") and not exports[1].holds and "DIFFERS" in report(exports)
    backbone = json.loads((tmp_path / "export.json").read_text())[1]
    assert backbone["checks"][0]["difference"] is None and backbone["holds"] is False


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
    assert done.returncode == 2 and "the image missing.jpg cannot be read" in done.stderr
    done = call_tool("export_model.py", *arguments, "--size", "0,64")
    assert done.returncode == 2 and "invalid size value: '0,64'" in done.stderr
