import argparse
import pickle

import numpy as np
import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_resnet_backbone
from foreign_weights import (
    assert_equal_features,
    backbone_config,
    build_backbone,
    caffe2_names,
    detector,
    load,
    mmdet_state,
)
from reference_models import PaperSGE, features, randomize, torchvision_resnet
from safetensors.torch import save_file

from sge_det import UserError
from sge_det.checkpoint import convert_file, read_source
from sge_det.checkpoint.checkpointer import Checkpointer
from sge_det.checkpoint.checksums import sha256
from sge_det.checkpoint.safe_load import load_checkpoint, load_file

IMAGENET = {
    "channel_order": "RGB",
    "pixel_mean": [123.675, 116.28, 103.53],
    "pixel_std": [58.395, 57.12, 57.375],
    "stride_in_1x1": False,
}


def assert_all_accounted_for(conversion):
    renamed = conversion.renamed
    assert set(renamed.names) | set(renamed.dropped) == set(conversion.source.state)
    assert not set(renamed.names) & set(renamed.dropped)
    assert set(renamed.state) == set(renamed.names.values()) | set(renamed.filled)
    assert len(set(renamed.names.values())) == len(renamed.names)


def save_release(state, path):
    state = {f"module.{key}": value for key, value in state.items()}
    torch.save({"epoch": 99, "state_dict": state, "acc": 77.6, "best_acc": 77.6, "optimizer": {"state": {}}}, path)


def save_timm_training(state, path):
    start = {key: torch.zeros_like(value) for key, value in state.items()}
    args = argparse.Namespace(model="resnet18", lr=0.1, betas=(0.9, 0.999))
    torch.save({"epoch": 1, "arch": "resnet18", "state_dict": start, "state_dict_ema": state, "args": args}, path)


def timm_plain():
    return randomize(timm.create_model("resnet18"))


def timm_with_paper_sge():
    return randomize(timm.create_model("resnet18", block_args={"attn_layer": PaperSGE}))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("make", "save", "name", "kind", "depth", "sge"),
    [
        (lambda: torchvision_resnet(50, True), save_release, "r50.pth.tar", "sge-imagenet", 50, True),
        (lambda: torchvision_resnet(18, True), torch.save, "r18.pth", "sge-imagenet", 18, True),
        (lambda: torchvision_resnet(50, False), torch.save, "r50.pth", "plain-resnet", 50, False),
        (lambda: torchvision_resnet(18, False), torch.save, "r18.pth", "plain-resnet", 18, False),
        (timm_plain, save_timm_training, "model_best.pth.tar", "plain-resnet", 18, False),
        (timm_plain, save_file, "model.safetensors", "plain-resnet", 18, False),
        (timm_with_paper_sge, save_file, "model.safetensors", "timm-sge", 18, True),
    ],
)
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_imagenet_weights_give_equal_features(tmp_path, make, save, name, kind, depth, sge, ending):
    model = make()
    save(model.state_dict(), str(tmp_path / name))
    cfg = backbone_config(depth, sge)
    conversion = convert_file(str(tmp_path / name), str(tmp_path / f"out{ending}"))
    assert conversion.source.kind == kind
    assert_all_accounted_for(conversion)
    reasons = set(conversion.renamed.dropped.values())
    assert reasons == {"the ImageNet classifier", "a counter that no detector reads"}
    assert_equal_features(lambda x: features(model, x), load(build_backbone(cfg), tmp_path / f"out{ending}"))
    metadata = load_checkpoint(tmp_path / f"out{ending}")["metadata"]
    expected = {"source": kind, "file": name, "sha256": sha256(tmp_path / name), "transplanted": False, **IMAGENET}
    assert metadata == expected


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "GN"])
def test_detectron2s_own_backbone(tmp_path, norm):
    cfg = backbone_config(18, False, norm)
    model = randomize(build_resnet_backbone(cfg, ShapeSpec(channels=3)))
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    source = tmp_path / "R-18.pkl"
    source.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}))
    conversion = convert_file(str(source), str(tmp_path / "out.pth"))
    assert conversion.source.kind == "detectron2-backbone"
    assert_all_accounted_for(conversion)
    assert_equal_features(model, load(build_backbone(cfg), tmp_path / "out.pth"))
    assert load_file(tmp_path / "out.pth")["metadata"]["channel_order"] == "RGB"  # the author says so


def test_caffe2_weights(tmp_path):
    model = torchvision_resnet(50, False)
    for name, value in model.state_dict().items():
        if "running" in name:
            value.fill_(0.0 if name.endswith("mean") else 1.0)
    blobs = caffe2_names(model)
    source = tmp_path / "R-50.pkl"
    source.write_bytes(pickle.dumps({"blobs": blobs}, protocol=2))
    conversion = convert_file(str(source), str(tmp_path / "out.pth"))
    assert conversion.source.kind == "caffe2"
    assert_all_accounted_for(conversion)
    assert set(conversion.renamed.names) | set(conversion.renamed.dropped) == set(blobs)
    assert len(conversion.renamed.filled) == 2 * 53
    metadata = load_file(tmp_path / "out.pth")["metadata"]
    assert (metadata["channel_order"], metadata["pixel_std"], metadata["stride_in_1x1"]) == ("BGR", [1.0] * 3, True)
    cfg = backbone_config(50, False)
    for path in (tmp_path / "out.pth", source):
        backbone = build_backbone(cfg)
        Checkpointer(backbone, whole_model=path != source).load(str(path))
        assert_equal_features(lambda x: features(model, x), backbone)


@pytest.mark.parametrize("shape", [(64,), (1, 64, 1, 1), (1, 1, 1, 64)])
def test_foreign_shapes_of_sge(tmp_path, shape):
    model = torchvision_resnet(18, True)
    state = {key: value.reshape(shape) if ".sge." in key else value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "foreign.pth")
    conversion = convert_file(str(tmp_path / "foreign.pth"), str(tmp_path / "out.pth"))
    assert "SGE-ResNet-18 (64 groups), BN" in conversion.lines()[0]
    assert_equal_features(
        lambda x: features(model, x), load(build_backbone(backbone_config(18, True)), tmp_path / "out.pth")
    )


# Detectors


CONFIG_TEXT = """
img_norm_cfg = dict(
    mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
model = dict(backbone=dict(type='ResNet', style='caffe'), bbox_head=dict(target_means=[0., 0., 0., 0.]))
"""


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet"])
@pytest.mark.parametrize("sge", [True, False])
def test_mmdetection_detectors(tmp_path, name, sge):
    cfg, model = detector(name, "MODEL.SGE.ENABLED", str(sge))
    source = tmp_path / "epoch_24.pth"
    theirs = mmdet_state(model, name)
    meta = {"epoch": 24, "config": "" if sge else CONFIG_TEXT}
    torch.save({"meta": meta, "state_dict": theirs, "optimizer": {"state": {}}}, source)
    conversion = convert_file(str(source), str(tmp_path / "out.pth"), cfg=cfg)
    assert conversion.source.kind == f"mmdet-{name.split('_')[0]}"
    assert_all_accounted_for(conversion)
    assert not conversion.coverage.unfilled
    assert not conversion.coverage.unused
    assert set(conversion.renamed.dropped.values()) == {"a counter that no detector reads"}
    twin = load(build_model(cfg), tmp_path / "out.pth").state_dict()
    for key, value in model.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(twin[key], value), key
    metadata = load_file(tmp_path / "out.pth")["metadata"]
    if sge:
        assert {key: metadata[key] for key in IMAGENET} == IMAGENET
    else:
        assert (metadata["channel_order"], metadata["stride_in_1x1"]) == ("BGR", True)
        assert metadata["pixel_mean"] == [102.9801, 115.9465, 122.7717]
        assert metadata["pixel_std"] == [1.0, 1.0, 1.0]


def test_cascade_mask_heads_are_dropped_for_a_reason(tmp_path):
    _, model = detector("cascade_rcnn")
    state = mmdet_state(model, "cascade_rcnn") | {"mask_head.0.conv_logits.weight": torch.zeros(5, 64, 1, 1)}
    torch.save({"state_dict": state}, tmp_path / "mm.pth")
    conversion = convert_file(str(tmp_path / "mm.pth"), str(tmp_path / "out.pth"))
    assert "one mask head of each cascade stage" in conversion.renamed.dropped["mask_head.0.conv_logits.weight"]


def test_softmax_rpn_is_refused(tmp_path):
    _, model = detector("faster_rcnn")
    state = mmdet_state(model, "faster_rcnn")
    state["rpn_head.rpn_cls.weight"] = state["rpn_head.rpn_cls.weight"].repeat(2, 1, 1, 1)
    torch.save({"state_dict": state}, tmp_path / "mm.pth")
    with pytest.raises(UserError, match="RPN of 6 scores for 3 anchors"):
        convert_file(str(tmp_path / "mm.pth"), str(tmp_path / "out.pth"))


def test_detectron2_detectors(tmp_path):
    cfg, model = detector("mask_rcnn")
    arrays = {key: value.numpy() for key, value in model.state_dict().items()}
    arrays |= {"pixel_mean": np.array([[[103.53]], [[116.28]], [[123.675]]]), "pixel_std": np.ones((3, 1, 1))}
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4))
    source = tmp_path / "model_final.pkl"
    source.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    conversion = convert_file(str(source), str(tmp_path / "out.safetensors"), cfg=cfg)
    assert conversion.source.kind == "detectron2-detector"
    assert_all_accounted_for(conversion)
    assert not conversion.coverage.unfilled
    assert "the config has INPUT.FORMAT RGB, but these weights need BGR" in conversion.lines()
    twin = load(build_model(cfg), tmp_path / "out.safetensors").state_dict()
    for key, value in model.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(twin[key], value), key
    metadata = load_checkpoint(tmp_path / "out.safetensors")["metadata"]
    assert metadata["source"] == "detectron2-detector"
    assert (metadata["channel_order"], metadata["stride_in_1x1"]) == ("BGR", None)


def test_a_converted_backbone_goes_into_detectron2s_own_checkpointer(tmp_path):
    model = torchvision_resnet(50, True)
    save_release(model.state_dict(), tmp_path / "r50.pth.tar")
    convert_file(str(tmp_path / "r50.pth.tar"), str(tmp_path / "out.pth"))
    cfg, fpn = detector(
        "faster_rcnn",
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "256", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.SGE.GROUPS", "64"),
    )
    assert cfg.MODEL.RESNETS.WIDTH_PER_GROUP == 16
    DetectionCheckpointer(fpn).load(str(tmp_path / "out.pth"))
    assert_equal_features(lambda x: features(model, x), fpn.backbone.bottom_up)


def test_every_tensor_of_the_model_is_told(tmp_path):
    cfg, _ = detector("faster_rcnn", "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64")
    cfg.MODEL.SGE.GROUPS = 64
    save_release(torchvision_resnet(18, True).state_dict(), tmp_path / "r18.pth.tar")
    conversion = convert_file(str(tmp_path / "r18.pth.tar"), str(tmp_path / "out.pth"), cfg=cfg)
    lines, renamed = conversion.lines(), len(conversion.renamed.names)
    told = {line.removeprefix("  at its random start: ") for line in lines}
    heads = [key for key in build_model(cfg).state_dict() if ".bottom_up." not in key]
    assert heads
    assert told >= set(heads)
    assert f"they fill {renamed} of the {renamed + len(heads)} tensors of the model" in lines


def without(state, part):
    return {key: value for key, value in state.items() if part not in key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"layer1.0.se.fc1.weight": torch.zeros(4)}, r"layer1\.0\.se\.fc1\.weight has no place"),
        (lambda s: s | {"layer5.0.conv1.weight": torch.zeros(4)}, r"layer5\.0\.conv1\.weight has no place"),
        (lambda s: without(s, "layer2.1.bn2.running_var"), r"lacks res3\.1\.conv2\.norm\.running_var"),
        (lambda s: without(s, "layer3.0.downsample"), r"lacks res4\.0\.shortcut\.weight"),
        (lambda s: without(s, "layer4"), r"lacks the block res5\.0"),
        (lambda s: without(s, "layer2.1.sge.bias"), r"lacks res3\.1\.sge\.bias"),
        (lambda s: s | {"layer2.1.sge.bias": torch.zeros(32)}, "64 weights for 32 biases"),
        (
            lambda s: s | {f"layer2.1.sge.{n}": torch.zeros(48) for n in ("weight", "bias")},
            "48 groups of .* 128 channels",
        ),
        (lambda s: s | {"layer2.1.sge.bias": torch.zeros(8, 8)}, r"shape \(8, 8\)"),
        (lambda s: {"layer1.0.conv1.weight": torch.zeros(1), "conv1.0.weight": torch.zeros(1)}, "deep stem"),
        (lambda s: {"encoder.weight": torch.zeros(1)}, "none of the kinds .* encoder.weight"),
        (lambda s: {}, "none of the kinds"),
        (lambda s: s | {"name": "x"}, "entry 'name' is a str"),
        (lambda s: [s], "they are a list, not a dict"),
        (lambda s: {"model": s["conv1.weight"]}, "they are a Tensor, not a dict"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(tmp_path, change, words):
    torch.save(change(dict(torchvision_resnet(18, True).state_dict())), tmp_path / "odd.pth")
    with pytest.raises(UserError, match=words):
        convert_file(str(tmp_path / "odd.pth"), str(tmp_path / "out.pth"))
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pth"]


def test_a_config_of_another_model_is_told(tmp_path):
    torch.save(torchvision_resnet(18, True).state_dict(), tmp_path / "r18.pth")
    cfg, _ = detector("faster_rcnn")
    with pytest.raises(UserError, match=r"fills \d+ of the \d+ tensors of the model's backbone: .* has the shape"):
        convert_file(str(tmp_path / "r18.pth"), str(tmp_path / "out.pth"), cfg=cfg)
    torch.save(torchvision_resnet(18, False).state_dict(), tmp_path / "plain.pth")
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 18, 64
    with pytest.raises(UserError, match="has no SGE but the model of the config has: convert it with --transplant"):
        convert_file(str(tmp_path / "plain.pth"), str(tmp_path / "out.pth"), cfg=cfg)


@pytest.mark.parametrize(
    ("path", "order", "stride"),
    [
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", "RGB", False),
        ("detectron2://ImageNetPretrained/MSRA/R-101.pkl", "BGR", True),
        ("detectron2://ImageNetPretrained/FAIR/R-50-GN.pkl", "BGR", False),
        ("/cache/COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl", "BGR", True),
    ],
)
def test_detectron2s_files_are_known_by_name(path, order, stride):
    from sge_det.checkpoint.sources import known_recipe

    recipe = known_recipe(path)
    assert (recipe.channel_order, recipe.stride_in_1x1) == (order, stride)
    assert known_recipe("my/R-50.pth") is None


def test_a_converted_file_can_be_converted_again(tmp_path):
    save_release(torchvision_resnet(18, True).state_dict(), tmp_path / "a.pth.tar")
    convert_file(str(tmp_path / "a.pth.tar"), str(tmp_path / "b.pth"))
    convert_file(str(tmp_path / "b.pth"), str(tmp_path / "c.safetensors"))
    first, second = (load_checkpoint(tmp_path / name) for name in ("b.pth", "c.safetensors"))
    assert second["metadata"]["channel_order"] == "RGB"
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(first["model"][key], value) for key, value in second["model"].items())
    with pytest.raises(UserError, match="is the source itself"):
        convert_file(str(tmp_path / "b.pth"), str(tmp_path / "b.pth"))
    assert read_source(str(tmp_path / "b.pth")).kind == "detectron2-backbone"
