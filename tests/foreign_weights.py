"""Models and weights as others name and lay them out, by hand, that several test files share."""

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from reference_models import randomize, torchvision_names

import sge_det
from sge_det.checkpoint.checkpointer import Checkpointer

SIZES = [(64, 64), (70, 93)]
OUT = ["res2", "res3", "res4", "res5"]


def backbone_config(depth, sge, norm="FrozenBN"):
    cfg = get_cfg()
    sge_det.add_sge_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SGE.ENABLED = sge
    cfg.MODEL.BACKBONE.NAME = "build_sge_resnet_backbone"
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NORM, resnets.OUT_FEATURES, resnets.STRIDE_IN_1X1 = depth, norm, OUT, False
    if depth == 18:
        resnets.RES2_OUT_CHANNELS = 64
    else:
        resnets.WIDTH_PER_GROUP = 16
    return cfg


def build_backbone(cfg):
    return sge_det.build_sge_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


def load(model, path):
    """Loads ``path`` into every tensor of ``model``, or fails."""
    Checkpointer(model, whole_model=True).load(str(path))
    return model


def assert_equal_features(expected, backbone):
    """``expected`` maps images to features."""
    torch.manual_seed(1)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        theirs = expected(x)
        with torch.no_grad():
            ours = backbone(x)
        for name in OUT:
            error = (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()
            assert error < 1e-4, (name, size, error)


def caffe2_names(model):
    """A torchvision ResNet-50's weights as Caffe2 holds them: norms are a scale and a shift alone."""
    blobs = {"conv1_b": np.zeros(64, np.float32), "pred_w": np.zeros((10, 2048), np.float32)}
    parts = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "downsample.0": "branch1"}
    norms = {"bn1": "branch2a", "bn2": "branch2b", "bn3": "branch2c", "downsample.1": "branch1"}
    for key, value in model.state_dict().items():
        value, (module, kind) = value.numpy(), key.rsplit(".", 1)
        if key.startswith("fc") or kind not in ("weight", "bias"):
            continue
        if module == "conv1":
            name = "conv1_w"
        elif module == "bn1":
            name = f"res_conv1_bn_{'s' if kind == 'weight' else 'b'}"
        else:
            stage, block, part = module.split(".", 2)
            start = f"res{int(stage[5:]) + 1}_{block}"
            if part in parts:
                name = f"{start}_{parts[part]}_w"
            else:
                name = f"{start}_{norms[part]}_bn_{'s' if kind == 'weight' else 'b'}"
        blobs[name] = value
        blobs[f"{name}_momentum"] = np.zeros_like(value)
    return blobs


def detector(name, *overrides):
    cfg = sge_det.get_config(
        f"sample/{name}_SGE_R_50_FPN.yaml",
        ["MODEL.DEVICE", "cpu", "MODEL.FPN.NORM", "", *overrides],
    )
    torch.manual_seed(0)
    return cfg, randomize(build_model(cfg))


def mmdet_state(model, name):
    """The weights of a Detectron2 detector under mmdetection's names and in its layouts, by hand."""
    state = dict(model.state_dict())
    prefix = "backbone.bottom_up."
    bare = {key.removeprefix(prefix): state.pop(key) for key in list(state) if key.startswith(prefix)}
    found = {f"backbone.{key}": value for key, value in torchvision_names(bare).items()}
    first = 3 if name == "retinanet" else 2
    for kind in ("weight", "bias"):
        for level in range(first, 6):
            for ours, theirs in (("fpn_lateral", "lateral_convs"), ("fpn_output", "fpn_convs")):
                found[f"neck.{theirs}.{level - first}.conv.{kind}"] = state.pop(f"backbone.{ours}{level}.{kind}")
        if name == "retinanet":
            found[f"neck.fpn_convs.3.conv.{kind}"] = state.pop(f"backbone.top_block.p6.{kind}")
            found[f"neck.fpn_convs.4.conv.{kind}"] = state.pop(f"backbone.top_block.p7.{kind}")
            for layer in range(2):
                found[f"bbox_head.cls_convs.{layer}.conv.{kind}"] = state.pop(f"head.cls_subnet.{2 * layer}.{kind}")
                found[f"bbox_head.reg_convs.{layer}.conv.{kind}"] = state.pop(f"head.bbox_subnet.{2 * layer}.{kind}")
            order = mmdet_anchor_order(model)
            for ours, theirs in (("cls_score", "retina_cls"), ("bbox_pred", "retina_reg")):
                rows = state.pop(f"head.{ours}.{kind}").chunk(9)
                found[f"bbox_head.{theirs}.{kind}"] = torch.cat([rows[index] for index in order])
            continue
        rpn = "proposal_generator.rpn_head."
        found[f"rpn_head.rpn_conv.{kind}"] = state.pop(f"{rpn}conv.{kind}")
        found[f"rpn_head.rpn_cls.{kind}"] = state.pop(f"{rpn}objectness_logits.{kind}")
        found[f"rpn_head.rpn_reg.{kind}"] = state.pop(f"{rpn}anchor_deltas.{kind}")
        for stage in ("0.", "1.", "2.") if name == "cascade_rcnn" else ("",):
            head, predictor = f"roi_heads.box_head.{stage}fc", f"roi_heads.box_predictor.{stage}"
            for layer in (1, 2):
                found[f"bbox_head.{stage}shared_fcs.{layer - 1}.{kind}"] = state.pop(f"{head}{layer}.{kind}")
            scores, boxes = (state.pop(f"{predictor}{part}.{kind}") for part in ("cls_score", "bbox_pred"))
            found[f"bbox_head.{stage}fc_cls.{kind}"] = background_first(scores)
            if name != "cascade_rcnn":  # class-agnostic boxes have no background's
                boxes = torch.cat([torch.full_like(boxes[:4], 9.0), boxes])
            found[f"bbox_head.{stage}fc_reg.{kind}"] = boxes
        if name == "mask_rcnn":
            mask = "roi_heads.mask_head."
            for layer in (1, 2):
                found[f"mask_head.convs.{layer - 1}.conv.{kind}"] = state.pop(f"{mask}mask_fcn{layer}.{kind}")
            found[f"mask_head.upsample.{kind}"] = state.pop(f"{mask}deconv.{kind}")
            logits = state.pop(f"{mask}predictor.{kind}")
            found[f"mask_head.conv_logits.{kind}"] = torch.cat([torch.full_like(logits[:1], 9.0), logits])
    assert not [key for key in state if "pixel" not in key and "num_batches" not in key]
    return found


def mmdet2_state(model, name):
    """The same as mmdetection 2 and 3 have it: heads in one of their own, the background last and without a box."""
    found, ours = mmdet_state(model, name), model.state_dict()
    if name == "retinanet":
        return found
    later = {}
    for key, value in found.items():
        part, kind = key.rsplit(".", 1)
        stage = f"{part.split('.')[1]}." if part.count(".") == 2 else ""
        if part.endswith("fc_cls"):
            value = ours[f"roi_heads.box_predictor.{stage}cls_score.{kind}"]
        elif part.endswith("fc_reg"):
            value = ours[f"roi_heads.box_predictor.{stage}bbox_pred.{kind}"]
        elif part.endswith("conv_logits"):
            value = ours[f"roi_heads.mask_head.predictor.{kind}"]
        later[f"roi_head.{key}" if key.startswith(("bbox_head", "mask_head")) else key] = value
    return later


def background_first(rows):
    return torch.cat([rows[-1:], rows[:-1]])


def mmdet_anchor_order(model):
    """For each anchor in mmdetection's order, its index in Detectron2's, found by the anchors' shapes."""
    cells = next(iter(model.anchor_generator.cell_anchors))
    sizes = torch.stack([cells[:, 2] - cells[:, 0], cells[:, 3] - cells[:, 1]], 1)
    order = []
    for ratio in (0.5, 1.0, 2.0):  # height / width
        for octave in range(3):
            area = 16.0 * 2 ** (octave / 3)
            wanted = torch.tensor([area / ratio**0.5, area * ratio**0.5])
            distance = (sizes - wanted).abs().sum(1)
            assert distance.min() < 1e-3
            order.append(int(distance.argmin()))
    assert sorted(order) == list(range(9)) != order
    return order
