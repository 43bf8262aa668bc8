"""Detectors of mmdetection 2 and 3: what they compute, written out by hand, is what Detectron2 computes with them."""

import pytest
import torch
from conftest import TINY
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from foreign_weights import detector, load, mmdet2_state, mmdet_anchor_order, mmdet_state

from sge_det import UserError
from sge_det.checkpoint import convert_file, read_source
from sge_det.checkpoint.safe_load import load_file
from sge_det.engine.doctor import diagnose

META = {
    "2.25": {
        "mmdet_version": "2.25.0+abc",
        "config": "img_norm_cfg = dict(mean=[1.5, 2, 3], std=[4, 5, 6], to_rgb=False)",
    },
    "3.1": {"mmengine_version": "0.8.0", "cfg": "mean=[1.5, 2, 3],\nstd=[4, 5, 6], bgr_to_rgb=False)"},
}


def save(path, state, version="2.25"):
    torch.save({"state_dict": state, "meta": META[version], "optimizer": {"state": {}}}, path)
    return str(path)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet"])
def test_every_tensor_finds_its_place(tmp_path, name):
    cfg, model = detector(name)
    version = "3.1" if name in ("mask_rcnn", "retinanet") else "2.25"
    source = save(tmp_path / "epoch_12.pth", mmdet2_state(model, name), version)
    conversion = convert_file(source, str(tmp_path / "out.pth"), cfg=cfg)
    assert conversion.source.kind == f"mmdet2-{name.split('_')[0]}"
    assert not conversion.coverage.unfilled and not conversion.coverage.unused
    twin = load(build_model(cfg), tmp_path / "out.pth").state_dict()
    for key, value in model.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(twin[key], value), key
    metadata = load_file(tmp_path / "out.pth")["metadata"]
    assert (metadata["channel_order"], metadata["pixel_mean"], metadata["pixel_std"]) == ("BGR", [1.5, 2, 3], [4, 5, 6])
    assert metadata["heads"]["MODEL.ANCHOR_GENERATOR.OFFSET"] == 0.0
    pooled = [value for key, value in metadata["heads"].items() if key.endswith("POOLER_TYPE")]
    assert pooled == ["ROIAlignV2"] * {"retinanet": 0, "mask_rcnn": 2}.get(name, 1)
    assert "MODEL.ANCHOR_GENERATOR.OFFSET 0.0" in " ".join(conversion.lines())


def test_scores_and_boxes_are_those_of_mmdetections_head(tmp_path):
    """Its scores: softmax, the background last; its boxes: deltas times 0.1 and 0.2, no pixel more."""
    cfg, model = detector("faster_rcnn")
    state = mmdet2_state(model, "faster_rcnn")
    convert_file(save(tmp_path / "mm.pth", state), str(tmp_path / "out.pth"))
    predictor = load(build_model(cfg), tmp_path / "out.pth").roi_heads.box_predictor
    torch.manual_seed(2)
    features = torch.randn(5, state["roi_head.bbox_head.fc_cls.weight"].shape[1])
    corners = torch.rand(5, 2) * 40
    proposals = torch.cat([corners, corners + 5 + torch.rand(5, 2) * 30], dim=1)
    theirs = {
        part: features @ state[f"roi_head.bbox_head.fc_{part}.weight"].T + state[f"roi_head.bbox_head.fc_{part}.bias"]
        for part in ("cls", "reg")
    }
    found = [Instances((90, 90), proposal_boxes=Boxes(proposals))]
    with torch.no_grad():
        scores, deltas = predictor(features)
        (probabilities,) = predictor.predict_probs((scores, deltas), found)
        (boxes,) = predictor.predict_boxes((scores, deltas), found)
    assert torch.allclose(probabilities, theirs["cls"].softmax(1), atol=1e-5)
    moves = theirs["reg"].view(5, -1, 4) * torch.tensor([0.1, 0.1, 0.2, 0.2])
    size = (proposals[:, 2:] - proposals[:, :2])[:, None]
    centre = (proposals[:, None, :2] + proposals[:, None, 2:]) / 2 + moves[..., :2] * size
    size = size * moves[..., 2:].clamp(max=4.1).exp()
    assert torch.allclose(boxes.view(5, -1, 4), torch.cat([centre - size / 2, centre + size / 2], dim=2), rtol=1e-4)


@pytest.mark.parametrize("name", ["faster_rcnn", "retinanet"])
def test_anchors_are_mmdetections_with_the_offset_that_is_told(name):
    """Version 2 centres its anchors on the corners of the cells; the rows are put into Detectron2's order."""
    cfg, model = detector(name)
    generator = model.anchor_generator if name == "retinanet" else model.proposal_generator.anchor_generator
    order = mmdet_anchor_order(model) if name == "retinanet" else range(3)
    own = DefaultAnchorGenerator(
        sizes=cfg.MODEL.ANCHOR_GENERATOR.SIZES,
        aspect_ratios=cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS,
        strides=generator.strides,
        offset=0.0,
    )
    maps = [torch.zeros(1, 1, 2, 3) for _ in generator.strides]
    for level, (stride, anchors) in enumerate(zip(generator.strides, own(maps), strict=True)):
        sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES[level % len(cfg.MODEL.ANCHOR_GENERATOR.SIZES)]
        expected = [
            [x * stride - w / 2, y * stride - h / 2, x * stride + w / 2, y * stride + h / 2]
            for y in range(2)
            for x in range(3)
            for ratio in (0.5, 1.0, 2.0)
            for size in sizes
            for w, h in [(size / ratio**0.5, size * ratio**0.5)]
        ]
        number = 3 * len(sizes)
        ours = anchors.tensor.view(-1, number, 4)[:, list(order)]
        assert torch.allclose(ours, torch.tensor(expected).view(-1, number, 4), atol=1e-3)


def test_other_detectors_of_mmdetection_are_refused_by_their_heads(tmp_path):
    state = mmdet_state(detector("retinanet")[1], "retinanet")
    other = {key.replace("retina_cls", "conv_cls"): value for key, value in state.items()}
    with pytest.raises(UserError, match=r"none of Faster, Mask .*beside its backbone it has bbox_head, neck"):
        read_source(save(tmp_path / "fcos.pth", other))


def test_heads_of_another_version_are_refused(tmp_path):
    """Boxes for the background as well, under the later names: a mix that no version writes."""
    state = mmdet2_state(detector("faster_rcnn")[1], "faster_rcnn")
    for kind in ("weight", "bias"):
        boxes = state[f"roi_head.bbox_head.fc_reg.{kind}"]
        state[f"roi_head.bbox_head.fc_reg.{kind}"] = torch.cat([boxes, boxes[:4]])
    with pytest.raises(UserError, match="20 numbers of boxes for 5 scores"):
        convert_file(save(tmp_path / "mm.pth", state), str(tmp_path / "out.pth"))


def test_the_doctor_tells_of_other_anchors_and_poolers(tmp_path, sample_datasets):
    _, model = detector("faster_rcnn")
    state = mmdet2_state(model, "faster_rcnn")
    torch.save({"state_dict": state, "meta": {"mmdet_version": "2.25.0"}}, tmp_path / "mm.pth")
    convert_file(str(tmp_path / "mm.pth"), str(tmp_path / "out.pth"))

    def told(*overrides):
        weights = ["MODEL.FPN.NORM", "", "MODEL.WEIGHTS", str(tmp_path / "out.pth")]
        found = diagnose("sample/faster_rcnn_SGE_R_50_FPN.yaml", [*TINY, *weights, *overrides], sample_datasets)
        return [(finding.severity, finding.key) for finding in found]

    right = {
        "MODEL.ANCHOR_GENERATOR.OFFSET": "0.0",
        "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": "0",
    }
    assert told(*(word for pair in right.items() for word in pair)) == []
    assert told() == [("warning", key) for key in right]  # the sample's are the release's
