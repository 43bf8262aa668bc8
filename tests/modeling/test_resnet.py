import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from test_config import LEAVES

import sge_det
from sge_det import SGEBasicBlock, SGEBottleneckBlock, SpatialGroupEnhance, build_sge_resnet_backbone

INPUT = ShapeSpec(channels=3)
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def resnet_config(depth=50, **resnets):
    cfg = get_cfg()
    sge_det.add_sge_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth < 50 else 256
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


def build_pair(cfg, seed=0):
    """The SGE model and its plain twin from the same start values."""
    models = []
    for enabled in (True, False):
        cfg.MODEL.SGE.ENABLED = enabled
        torch.manual_seed(seed)
        models.append(build_model(cfg))
    return models


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_config_builds_and_differs_from_its_twin_by_sge_alone(leaf):
    cfg = sge_det.get_config(leaf, ["MODEL.DEVICE", "cpu"])
    sge, plain = build_pair(cfg)
    layers = [module for module in sge.modules() if isinstance(module, SpatialGroupEnhance)]
    assert len(layers) == sum(BLOCKS[cfg.MODEL.RESNETS.DEPTH])
    extra = sum(p.numel() for p in sge.parameters()) - sum(p.numel() for p in plain.parameters())
    if leaf.startswith("COCO"):
        assert extra == {50: 2048, 101: 4224}[cfg.MODEL.RESNETS.DEPTH]
    assert extra == 2 * cfg.MODEL.SGE.GROUPS * len(layers)
    sge_state, plain_state = sge.state_dict(), plain.state_dict()
    added = set(sge_state) - set(plain_state)
    assert added == {
        f"backbone.bottom_up.{stage}.{block}.sge.{name}"
        for stage, blocks in zip(
            ("res2", "res3", "res4", "res5"), {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[cfg.MODEL.RESNETS.DEPTH]
        )
        for block in range(blocks)
        for name in ("weight", "bias")
    }
    assert set(plain_state) <= set(sge_state)
    assert all(torch.equal(plain_state[key], sge_state[key]) for key in plain_state)


@pytest.mark.parametrize(
    ("depth", "resnets"),
    [
        (18, {}),
        (34, {}),
        (50, {}),
        (50, {"NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4}),
        (50, {"STRIDE_IN_1X1": False, "RES5_DILATION": 2}),
        (101, {}),
        (152, {"NORM": "FrozenBN"}),
    ],
)
def test_twin_is_detectron2s_own_resnet(depth, resnets):
    cfg = resnet_config(depth, **resnets)
    cfg.MODEL.SGE.ENABLED = False
    torch.manual_seed(1)
    twin = build_sge_resnet_backbone(cfg, INPUT).eval()
    own = build_resnet_backbone(cfg, INPUT).eval()
    assert list(own.state_dict()) == list(twin.state_dict())
    own.load_state_dict(twin.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name, feature in own(x).items():
            assert torch.equal(feature, twin(x)[name])


@pytest.mark.parametrize("depth", [18, 50])
def test_block_is_branch_then_sge_then_shortcut_then_relu(depth):
    torch.manual_seed(2)
    block_class, kwargs = (SGEBasicBlock, {}) if depth == 18 else (SGEBottleneckBlock, {"bottleneck_channels": 32})
    block = block_class(64, 128, stride=2, **kwargs).eval()
    torch.nn.init.normal_(block.sge.weight)
    x = torch.randn(2, 64, 9, 11)
    with torch.no_grad():
        out = F.relu(block.conv1(x))
        out = block.conv2(out) if depth == 18 else block.conv3(F.relu(block.conv2(out)))
        channels = out.unflatten(1, (64, 2))
        similarity = (channels * channels.mean((3, 4), keepdim=True)).sum(2)
        t = similarity - similarity.mean((2, 3), keepdim=True)
        t = t / (similarity.std((2, 3), keepdim=True) + 1e-5)
        gate = torch.sigmoid(t * block.sge.weight + block.sge.bias)
        expected = F.relu((channels * gate.unsqueeze(2)).flatten(1, 2) + block.shortcut(x))
        torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("attention", ["sge", "se", "eca", "cbam", None])
@pytest.mark.parametrize("depth", [18, 50])
def test_blocks_can_be_scripted(depth, attention):
    cfg = resnet_config(depth)
    cfg.MODEL.SGE.ENABLED = attention is not None
    cfg.MODEL.SGE.ATTENTION = attention or "sge"
    torch.manual_seed(3)
    block = build_sge_resnet_backbone(cfg, INPUT).eval().res3[0]
    if attention == "sge":
        torch.nn.init.normal_(block.sge.weight)
    scripted = torch.jit.script(block)
    for size in ((2, 9, 11), (1, 16, 8)):
        x = torch.randn(size[0], block.in_channels, *size[1:])
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), block(x))


def test_default_stages_take_the_block_class():
    stages = ResNet.make_default_stages(50, block_class=SGEBottleneckBlock, norm="BN")
    assert all(isinstance(block.sge, SpatialGroupEnhance) for stage in stages for block in stage)
    plain = ResNet.make_default_stages(18, block_class=SGEBasicBlock, norm="BN", attention=None)
    assert not any(isinstance(m, SpatialGroupEnhance) for stage in plain for block in stage for m in block.modules())


def test_stages_groups_and_init_are_followed():
    cfg = resnet_config(18)
    cfg.MODEL.SGE.STAGES = ["res3", "res5"]
    cfg.MODEL.SGE.GROUPS = 8
    cfg.MODEL.SGE.INIT = [0.25, 2.0]
    state = build_sge_resnet_backbone(cfg, INPUT).state_dict()
    sge = {key: value for key, value in state.items() if ".sge." in key}
    assert {key.split(".")[0] for key in sge} == {"res3", "res5"}
    for key, value in sge.items():
        assert value.shape == (1, 8, 1, 1)
        assert torch.all(value == (0.25 if key.endswith("weight") else 2.0))


def test_groups_that_do_not_divide_name_the_stage():
    cfg = resnet_config(50)
    cfg.MODEL.SGE.GROUPS = 48
    with pytest.raises(sge_det.UserError, match=r"GROUPS = 48 does not divide the 256 channels of res2"):
        build_sge_resnet_backbone(cfg, INPUT)


def test_unknown_depth_is_told():
    with pytest.raises(sge_det.UserError, match="DEPTH 51"):
        build_sge_resnet_backbone(resnet_config(50, DEPTH=51), INPUT)


def test_deformable_stages_are_refused_not_ignored():
    with pytest.raises(sge_det.UserError, match="DEFORM_ON_PER_STAGE"):
        build_sge_resnet_backbone(resnet_config(50, DEFORM_ON_PER_STAGE=[False, False, True, True]), INPUT)


@pytest.mark.parametrize("name", ["faster_rcnn_R_50_FPN_1x", "retinanet_R_50_FPN_1x", "faster_rcnn_R_50_C4_1x"])
def test_backbones_work_in_a_config_that_never_heard_of_sge(name):
    cfg = model_zoo.get_config(f"COCO-Detection/{name}.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BACKBONE.NAME.replace("resnet", "sge_resnet")
    backbone = build_backbone(cfg)
    layers = [module for module in backbone.modules() if isinstance(module, SpatialGroupEnhance)]
    assert len(layers) == (13 if "C4" in name else 16)
    assert {layer.groups for layer in layers} == {64}


@pytest.mark.parametrize("attention", ["se", "eca", "cbam"])
def test_rivals_stand_in_the_same_place(attention):
    cfg = resnet_config(18)
    cfg.MODEL.SGE.ATTENTION = attention
    backbone = build_sge_resnet_backbone(cfg, INPUT).eval()
    block = backbone.res3[0]
    assert not any(isinstance(module, SpatialGroupEnhance) for module in backbone.modules())
    x = torch.randn(1, 64, 8, 8)
    with torch.no_grad():
        out = getattr(block, attention)(block.conv2(F.relu(block.conv1(x))))
        torch.testing.assert_close(block(x), F.relu(out + block.shortcut(x)))


def test_freeze_at_freezes_sge_with_its_stage():
    cfg = resnet_config(18)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    backbone = build_sge_resnet_backbone(cfg, INPUT)
    trainable = {name: p.requires_grad for name, p in backbone.named_parameters() if ".sge." in name}
    assert not trainable["res2.0.sge.weight"]
    assert trainable["res3.0.sge.weight"]
