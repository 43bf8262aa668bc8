"""MODEL.SGE.IGNORE_PADDING: an image's gates and detections are those that it has alone."""

import copy
import pickle

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from sge_formula import reference
from torch import nn

import sge_det
from sge_det.engine.training import build_seeded_model
from sge_det.modeling.padding import Extents, OwnPixelsSGE

SIZES = ((64, 96), (50, 70), (97, 33))
KINDS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet")


def build(kind, *overrides):
    cfg = sge_det.get_config(f"sample/{kind}_SGE_R_50_FPN.yaml", [*TINY, "MODEL.WEIGHTS", "", *overrides])
    return start(build_seeded_model(cfg).eval())


def start(model):
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, sge_det.SpatialGroupEnhance):
            nn.init.normal_(module.weight, std=1.0, generator=generator)
        if name.endswith(("cls_score", "objectness_logits")):
            # scores of an untrained head are all but equal, and their order hangs on the last bit
            nn.init.normal_(module.weight, std=0.2, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5, generator=generator)  # so that the padding is not zero behind it
    return model


def images():
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)} for size in SIZES]


def detections(model, inputs):
    with torch.no_grad():
        return [entry["instances"] for entry in model(inputs)]


def largest_difference(model):
    alone = [detections(model, [entry])[0] for entry in images()]
    together = detections(model, images())
    assert all(len(found) > 3 for found in alone)
    if any(len(one) != len(other) for one, other in zip(alone, together, strict=True)):
        return float("inf")
    largest = 0.0
    for one, other in zip(alone, together, strict=True):
        for name, value in one.get_fields().items():
            found, expected = (getattr(v, "tensor", v).double() for v in (other.get(name), value))
            largest = max(largest, (found - expected).abs().max().item())
    return largest


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_those_of_each_image_alone(kind):
    assert largest_difference(build(kind, "MODEL.SGE.IGNORE_PADDING", "True")) < 2e-3  # px; scores are in 0-1
    assert largest_difference(build(kind)) > 2e-3, "the test would not notice"


def test_features_and_gates_are_those_of_each_image_alone():
    model = build("faster_rcnn", "MODEL.SGE.IGNORE_PADDING", "True", "MODEL.SGE.FPN", "True").double()
    alone = []
    with torch.no_grad(), sge_det.record_gates(model) as gates:
        for entry in images():
            features = model.backbone(model.preprocess_image([entry]).tensor.double())
            alone.append((features, dict(gates)))
        together = model.backbone(model.preprocess_image(images()).tensor.double())
    for place, (size, (features, own)) in enumerate(zip(SIZES, alone, strict=True)):
        for maps, others in ((features, together), (own, gates)):
            for name, map_ in maps.items():
                stride = 2 ** round(np.log2(128 / others[name].shape[2])) if maps is own else 2 ** int(name[1:])
                height, width = (-(-side // stride) for side in size)
                torch.testing.assert_close(
                    others[name][place, :, :height, :width], map_[0, :, :height, :width], rtol=1e-9, atol=1e-9
                )


def test_statistics_are_over_the_own_cells():
    rng = np.random.default_rng(3)
    x, weight, bias = rng.normal(size=(2, 8, 6, 5)), rng.normal(size=4), rng.normal(size=4)
    layer = OwnPixelsSGE(4).double()
    layer.extents = Extents()
    layer.weight.data, layer.bias.data = (torch.tensor(value).reshape(1, 4, 1, 1) for value in (weight, bias))
    batch = torch.ones(2, 3, 24, 20)
    batch[1, :, 13:], batch[1, :, :, 8:] = 0, 0  # 4 rows and 2 columns of cells of 4 pixels
    layer.extents.see(batch)
    y = layer(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(y[0], reference(x[:1], weight, bias, 4)[0], rtol=1e-9)
    np.testing.assert_allclose(y[1, :, :4, :2], reference(x[1:, :, :4, :2], weight, bias, 4)[0], rtol=1e-9)


def test_nothing_changes_for_an_image_without_padding():
    plain = build("faster_rcnn")
    model = build("faster_rcnn", "MODEL.SGE.IGNORE_PADDING", "True")
    assert list(model.state_dict()) == list(plain.state_dict())
    inputs = images()[:1]  # whose sides are multiples of 32
    for one, other in zip(detections(model, inputs), detections(plain, inputs), strict=True):
        torch.testing.assert_close(one.pred_boxes.tensor, other.pred_boxes.tensor, rtol=1e-4, atol=1e-3)


def test_detections_with_group_norms_and_a_head_of_three_outputs():
    cfg = model_zoo.get_config("COCO-Detection/fcos_R_50_FPN_1x.py").model
    cfg.backbone.bottom_up.stages = {"_target_": sge_det.make_sge_stages, "depth": 18, "groups": 4, "norm": "GN"}
    cfg.backbone.norm = "GN"
    cfg.backbone.out_channels = cfg.backbone.top_block.in_channels = 64
    cfg.head.input_shape, cfg.head.conv_dims = [ShapeSpec(channels=64)] * 5, [64]
    cfg.test_score_thresh = 0.0
    torch.manual_seed(0)
    model = start(instantiate(cfg)).eval()
    sge_det.ignore_padding(model)
    assert largest_difference(model) < 2e-3


def test_nothing_is_proposed_in_the_padding_by_a_trace_either(monkeypatch):
    model = build("faster_rcnn", "MODEL.SGE.IGNORE_PADDING", "True", "MODEL.RPN.POST_NMS_TOPK_TEST", "1000")

    def propose():
        images = model.preprocess_image([{"image": torch.full((3, 8, 9), 128.0)}])
        with torch.no_grad():
            return model.proposal_generator(images, model.backbone(images.tensor), None)[0][0].proposal_boxes.tensor

    expected = propose()
    # a trace of an image without padding lacks the branch that leaves infinite logits out
    monkeypatch.setattr(torch, "isfinite", lambda x: torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(propose(), expected)


def test_it_is_done_once_and_survives_copies():
    model = build("faster_rcnn", "MODEL.SGE.IGNORE_PADDING", "True")
    hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    sge_det.ignore_padding(model)
    assert hooks == sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    expected = detections(model, images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = detections(other, images())
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(found, expected, strict=True))
    model.train()
    assert "extents" not in model.state_dict()


def test_what_cannot_be_scripted_says_so():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    sge_det.ignore_padding(backbone)
    with pytest.raises(sge_det.UserError, match=r"IGNORE_PADDING works by hooks, which cannot be scripted: .*trace"):
        torch.jit.script(backbone)
