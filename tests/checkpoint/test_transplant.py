import copy
import math

import pytest
import torch
from detectron2.modeling import build_model
from foreign_weights import backbone_config, build_backbone, detector, load, mmdet_state
from reference_models import randomize, torchvision_resnet

from sge_det import SpatialGroupEnhance, UserError
from sge_det.checkpoint import transplant_file, transplant_state
from sge_det.checkpoint.safe_load import load_checkpoint
from sge_det.engine.training import plain_twin

DETECTORS = ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet"]


def plain_detector(name, norm):
    """The config of a small SGE detector, and its plain twin with weights of which all outputs depend."""
    cfg, _ = detector(
        name,
        *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", norm),
        *("TEST.DETECTIONS_PER_IMAGE", "20", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"),
    )
    model = randomize(build_model(plain_twin(cfg)), seed=2)
    torch.manual_seed(3)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if any(part in key for part in ("cls_score", "objectness", "predictor.weight")):
                value.normal_(0, 0.03 if name == "retinanet" else 0.1)
            elif any(part in key for part in ("bbox_pred", "anchor_deltas")):
                value.normal_(0, 0.01)
    return cfg, model


def detect(model, size):
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(3, *size, generator=generator) * 255
    with torch.no_grad():
        return model.eval()([{"image": image, "height": size[0], "width": size[1]}])[0]["instances"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
@pytest.mark.parametrize("name", DETECTORS)
def test_a_transplanted_detector_gives_the_plain_ones_detections(tmp_path, name, norm):
    cfg, plain = plain_detector(name, norm)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pth")
    conversion = transplant_file(str(tmp_path / "plain.pth"), str(tmp_path / "twin.pth"), cfg=cfg)
    assert not conversion.coverage.unfilled
    assert not conversion.coverage.unused
    twin = load(build_model(cfg), tmp_path / "twin.pth")
    assert sum(isinstance(module, SpatialGroupEnhance) for module in twin.modules()) == 8
    assert load_checkpoint(tmp_path / "twin.pth")["metadata"]["transplanted"] is True
    for size in ((96, 128), (101, 77)):
        expected, found = detect(plain, size), detect(twin, size)
        assert len(expected) >= 10
        assert len(found) == len(expected)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=0.05)
        assert torch.equal(found.pred_classes, expected.pred_classes)
        if name == "mask_rcnn":
            assert expected.pred_masks.any()
            assert (found.pred_masks != expected.pred_masks).float().mean() < 1e-3
    # and without the factor it does not
    state = twin.state_dict()
    state |= {key: value for key, value in plain.state_dict().items() if ".bottom_up." in key}
    twin.load_state_dict(state)
    expected, found = detect(plain, size).scores, detect(twin, size).scores
    assert len(found) != len(expected) or (found - expected).abs().max() > 1e-2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN"])
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("train", [False, True])
def test_features_are_the_plain_ones(norm, depth, train):
    if norm == "GN" and depth == 50:
        width = 32  # a multiple of GN's groups
    else:
        width = 16
    cfg, plain_cfg = backbone_config(depth, True, norm), backbone_config(depth, False, norm)
    cfg.MODEL.SGE.INIT = [0.7, -0.5]
    cfg.MODEL.SGE.STAGES = ["res3", "res5"]
    for config in (cfg, plain_cfg):
        config.MODEL.RESNETS.WIDTH_PER_GROUP = 64 if depth == 18 else width
        config.MODEL.BACKBONE.FREEZE_AT = 0
    plain, twin = randomize(build_backbone(plain_cfg)), build_backbone(cfg)
    state, note = transplant_state(plain.state_dict(), cfg, "plain.pth")
    assert f"times {1 + math.exp(0.5):.7f}" in note
    twin.load_state_dict(state)
    plain.train(train)
    twin.train(train)
    torch.manual_seed(5)
    for size in ((64, 64), (70, 93)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            # in training the running statistics move: on copies
            theirs, ours = copy.deepcopy(plain)(x), copy.deepcopy(twin)(x)
        for name, feature in theirs.items():
            assert (ours[name] - feature).abs().max() < 1e-4 * feature.abs().max()


def test_the_papers_groups_and_beta_without_a_config(tmp_path):
    model = torchvision_resnet(50, False)
    torch.save(model.state_dict(), tmp_path / "r50.pth")
    conversion = transplant_file(str(tmp_path / "r50.pth"), str(tmp_path / "out.pth"))
    assert "added SGE to 16 blocks (64 groups), the norms before it times 1.3678794" in conversion.lines()
    state = load_checkpoint(tmp_path / "out.pth")["model"]
    plain = model.state_dict()
    for stage, blocks in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for block in range(blocks):
            ours, theirs = f"res{stage}.{block}", f"layer{stage - 1}.{block}"
            assert state[f"{ours}.sge.weight"].shape == (1, 64, 1, 1)
            assert not state[f"{ours}.sge.weight"].any()
            assert (state[f"{ours}.sge.bias"] == 1).all()
            for part in ("weight", "bias"):
                torch.testing.assert_close(
                    state[f"{ours}.conv3.norm.{part}"], plain[f"{theirs}.bn3.{part}"] * 1.3678794411714423
                )
                assert torch.equal(state[f"{ours}.conv2.norm.{part}"], plain[f"{theirs}.bn2.{part}"])
            for part in ("running_mean", "running_var"):
                assert torch.equal(state[f"{ours}.conv3.norm.{part}"], plain[f"{theirs}.bn3.{part}"])


def test_a_detector_of_mmdetection_is_transplanted(tmp_path):
    cfg, plain = detector("faster_rcnn", "MODEL.SGE.ENABLED", "False")
    torch.save({"state_dict": mmdet_state(plain, "faster_rcnn")}, tmp_path / "mm.pth")
    cfg.MODEL.SGE.ENABLED = True
    transplant_file(str(tmp_path / "mm.pth"), str(tmp_path / "twin.safetensors"), cfg=cfg)
    twin = load(build_model(cfg), tmp_path / "twin.safetensors").eval()
    torch.manual_seed(6)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs, ours = plain.backbone(x), twin.backbone(x)
    for level, feature in theirs.items():
        assert (ours[level] - feature).abs().max() < 1e-4 * feature.abs().max()


@pytest.mark.parametrize(
    ("sge", "norm", "overrides", "words"),
    [
        (True, "BN", {}, "has SGE already"),
        (False, "", {}, "has no norm before SGE"),
        (False, "BN", {"GROUPS": 48}, "48 groups do not divide the 64 channels of res2.0"),
        (False, "BN", {"ENABLED": False}, "the config has no SGE"),
        (False, "BN", {"ATTENTION": "se"}, "the config has no SGE"),
    ],
)
def test_what_cannot_be_transplanted_is_told(sge, norm, overrides, words):
    state = build_backbone(backbone_config(18, sge, norm)).state_dict()
    cfg = backbone_config(18, True)
    for key, value in overrides.items():
        cfg.MODEL.SGE[key] = value
    with pytest.raises(UserError, match=words):
        transplant_state(state, cfg, "w.pth")


def test_a_backbone_of_detectron2s_own_has_no_place_for_sge():
    cfg = backbone_config(18, True)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    with pytest.raises(UserError, match="build_resnet_backbone, set it to build_sge_resnet_backbone"):
        transplant_state(build_backbone(backbone_config(18, False)).state_dict(), cfg, "w.pth")
