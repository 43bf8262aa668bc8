"""What the paper's configs say beyond Detectron2's keys, against values computed by hand."""

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

import sge_det
from sge_det import EvalBatchNorm2d, UserError
from sge_det.engine.training import build_seeded_model

SLIM = [*TINY, "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "2"]


def build(name, *overrides):
    return build_seeded_model(sge_det.get_config(f"sample/{name}_SGE_R_50_FPN.yaml", [*SLIM, *overrides]))


def example(boxes, size=(64, 96), seed=0):
    image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    instances = Instances(size, gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return {"image": image, "instances": instances, "height": size[0], "width": size[1]}


BATCH = [example([[8.0, 8.0, 40.0, 40.0], [50.0, 20.0, 90.0, 60.0]]), example([[5.0, 5.0, 60.0, 50.0]], seed=1)]


def test_eval_bn_in_training_uses_its_statistics_and_learns_its_affine():
    norm = EvalBatchNorm2d(3)
    rng = np.random.default_rng(0)
    mean, scale, shift = rng.normal(size=(3, 3, 1, 1))
    var = np.array([0.5, 2.0, 9.0]).reshape(3, 1, 1)
    state = {"running_mean": mean, "running_var": var, "weight": scale, "bias": shift}
    norm.load_state_dict({key: torch.tensor(value.reshape(3)) for key, value in state.items()}, strict=False)
    norm.train()
    x = rng.normal(size=(2, 3, 5, 4))
    y = norm(torch.tensor(x, dtype=torch.float32))
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale + shift
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    normalized = ((x - mean) / np.sqrt(var + 1e-5)).sum((0, 2, 3))
    np.testing.assert_allclose(norm.weight.grad.numpy(), normalized, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.bias.grad.numpy(), 40.0)
    np.testing.assert_allclose(norm.running_mean.numpy(), mean.reshape(3), rtol=1e-6)
    assert not norm.training


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_eval_bn_is_in_the_stages_that_train(enabled):
    model = build("faster_rcnn", "MODEL.RESNETS.NORM", "EvalBN", "MODEL.SGE.ENABLED", enabled)
    plain = build("faster_rcnn", "MODEL.RESNETS.NORM", "BN", "MODEL.SGE.ENABLED", enabled)
    assert list(model.state_dict()) == list(plain.state_dict())
    body = model.train().backbone.bottom_up
    for stage in (body.stem, body.res2):
        norms = [module for module in stage.modules() if "Norm" in type(module).__name__]
        assert norms and all(isinstance(norm, FrozenBatchNorm2d) for norm in norms)
    for stage in (body.res3, body.res4, body.res5):
        norms = [module for module in stage.modules() if "Norm" in type(module).__name__]
        assert norms and all(isinstance(norm, EvalBatchNorm2d) and not norm.training for norm in norms)
        assert all(norm.weight.requires_grad and norm.bias.requires_grad for norm in norms)


def test_eval_bn_is_in_c4s_heads_too():
    overrides = ["MODEL.ROI_HEADS.NAME", "SGERes5ROIHeads", "MODEL.BACKBONE.NAME", "build_sge_resnet_backbone"]
    overrides += ["MODEL.RESNETS.OUT_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"]
    overrides += ["MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    model = build("faster_rcnn", *overrides, "MODEL.RESNETS.NORM", "EvalBN")
    assert isinstance(model.roi_heads.res5[0].conv1.norm, EvalBatchNorm2d)


@pytest.mark.parametrize("relu", [True, False])
def test_p7_is_a_convolution_of_p6(relu):
    model = build("retinanet", "MODEL.FPN.P7_RELU", str(relu)).double().eval()
    with torch.no_grad():
        features = model.backbone(torch.randn(1, 3, 64, 96, dtype=torch.double))
    top = model.backbone.top_block
    p6 = features["p6"].clamp(min=0) if relu else features["p6"]
    expected = F.conv2d(p6, top.p7.weight, top.p7.bias, stride=2, padding=1)
    assert (features["p6"] < 0).any()
    torch.testing.assert_close(features["p7"], expected)


def cascade_losses(name, *overrides):
    """The losses of a cascade's heads, and the features on which they are computed."""
    model = build("cascade_rcnn", "MODEL.ROI_HEADS.NAME", name, *overrides).train()
    images = model.preprocess_image(BATCH)
    targets = [entry["instances"] for entry in BATCH]
    generator = torch.Generator().manual_seed(1)
    features = {
        level: torch.randn(2, 64, 64 // 2**n, 96 // 2**n, generator=generator).requires_grad_()
        for n, level in ((2, "p2"), (3, "p3"), (4, "p4"), (5, "p5"))
    }
    proposals = []
    for _ in targets:
        corner = torch.rand(40, 2, generator=generator) * 40
        boxes = torch.cat([corner, corner + 8 + torch.rand(40, 2, generator=generator) * 24], 1)
        proposals.append(Instances((64, 96), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(40)))
    torch.manual_seed(2)
    with EventStorage():
        _, losses = model.roi_heads(images, features, proposals, targets)
    return losses, features


def test_stages_of_a_cascade_have_weights():
    plain, plain_features = cascade_losses("CascadeROIHeads")
    weighted, features = cascade_losses("WeightedCascadeROIHeads")
    weights = {"stage0": 1.0, "stage1": 0.5, "stage2": 0.25}
    assert len(weighted) == 6
    for name, loss in weighted.items():
        torch.testing.assert_close(loss, plain[name] * weights[name.split("_")[-1]])
    # Detectron2 divides the gradient of each stage by 3 on its way into the features, the release does not
    maps = list(plain_features.values())
    expected = [torch.zeros_like(x) for x in maps]
    for name, loss in plain.items():
        for total, part in zip(expected, torch.autograd.grad(loss, maps, retain_graph=True), strict=True):
            total += 3 * weights[name.split("_")[-1]] * part
    found = torch.autograd.grad(sum(weighted.values()), list(features.values()))
    assert sum(gradient.abs().sum() for gradient in found) > 0
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_cascade_without_a_weight_for_each_stage_is_refused():
    key = "MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS"
    with pytest.raises(UserError, match="has 2 numbers for 3 stages"):
        build("cascade_rcnn", "MODEL.ROI_HEADS.NAME", "WeightedCascadeROIHeads", key, "(1.0, 0.5)")


def test_retinanets_losses_are_divided_by_the_batchs_positives():
    losses, positives = {}, []
    batch = [BATCH[0], example([], seed=3)]  # the second image has no object, and counts as one positive
    for name in ("RetinaNet", "PerBatchRetinaNet"):
        model = build("retinanet", "MODEL.META_ARCHITECTURE", name).train()
        with EventStorage():
            losses[name] = model(batch)
        with torch.no_grad():
            features = model.backbone(model.preprocess_image(batch).tensor)
            anchors = model.anchor_generator([features[level] for level in model.head_in_features])
            labels, _ = model.label_anchors(anchors, [entry["instances"] for entry in batch])
        positives = [int(((one >= 0) & (one != model.num_classes)).sum()) for one in labels]
    assert positives[0] > 1 and positives[1] == 0
    average = 0.9 * 100 + 0.1 * positives[0]
    for name, loss in losses["PerBatchRetinaNet"].items():
        torch.testing.assert_close(loss, losses["RetinaNet"][name] * average / (positives[0] + 1))
