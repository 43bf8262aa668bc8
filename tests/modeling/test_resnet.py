import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import ResNet, build_resnet_backbone
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.projects.deeplab import add_deeplab_config, build_resnet_deeplab_backbone
from omegaconf import OmegaConf
from test_config import LEAVES
from torchvision.ops import deform_conv2d

import sge_det
from sge_det import (
    AttentiveBasicBlock,
    SGEBasicBlock,
    SGEBottleneckBlock,
    SpatialGroupEnhance,
    build_sge_resnet_backbone,
)

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


@pytest.mark.sampled(3)
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
    plain = ResNet.make_default_stages(18, block_class=AttentiveBasicBlock, norm="BN")
    assert not any(isinstance(m, SpatialGroupEnhance) for stage in plain for block in stage for m in block.modules())
    plain = ResNet.make_default_stages(50, block_class=SGEBottleneckBlock, norm="BN", groups=16)
    assert {block.sge.groups for stage in plain for block in stage} == {16}


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


@pytest.mark.parametrize(
    ("depth", "resnets", "reason"),
    [
        (18, {"RES2_OUT_CHANNELS": 32}, "RES2_OUT_CHANNELS = 64 for R18/R34"),
        (34, {"NUM_GROUPS": 2}, "NUM_GROUPS = 1 for R18/R34"),
        (18, {"RES5_DILATION": 2}, "RES5_DILATION = 1 for R18/R34"),
        (50, {"RES5_DILATION": 4}, "res5_dilation cannot be 4"),
    ],
)
@pytest.mark.parametrize("enabled", [True, False])
def test_what_detectron2_refuses_is_refused(depth, resnets, reason, enabled):
    cfg = resnet_config(depth, **resnets)
    cfg.MODEL.SGE.ENABLED = enabled
    with pytest.raises(sge_det.UserError, match=reason):
        build_sge_resnet_backbone(cfg, INPUT)


def deeplab_config(**resnets):
    cfg = resnet_config(50)
    add_deeplab_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_sge_resnet_deeplab_backbone"
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return cfg


@pytest.mark.parametrize(
    ("key", "value"), [("STEM_TYPE", "deeplab"), ("RES4_DILATION", 2), ("RES5_MULTI_GRID", [1, 2, 4]), ("OWN", 1)]
)
@pytest.mark.parametrize(
    "name", ["build_sge_resnet_backbone", "build_sge_resnet_fpn_backbone", "build_retinanet_sge_resnet_fpn_backbone"]
)
def test_a_key_that_is_not_read_is_never_ignored(key, value, name):
    cfg = deeplab_config(STEM_TYPE="basic", RES5_MULTI_GRID=[1, 1, 1])
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert build_backbone(cfg)
    cfg.MODEL.RESNETS[key] = value
    with pytest.raises(sge_det.UserError, match=rf"MODEL.RESNETS.{key}"):
        build_backbone(cfg)


def geometry(model):
    return {
        name: (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d)
    }


@pytest.mark.parametrize(
    "resnets",
    [
        {},
        {"STEM_TYPE": "basic", "RES5_MULTI_GRID": [1, 1, 1]},
        {"RES4_DILATION": 2, "RES5_DILATION": 4, "OUT_FEATURES": ["res2", "res5"]},
        {"RES5_DILATION": 2, "STEM_OUT_CHANNELS": 128},
        {"OUT_FEATURES": ["res2", "res3", "res4"]},
    ],
)
def test_deeplabs_backbone_is_detectron2s_with_sge(resnets):
    cfg = deeplab_config(**resnets)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    ours = build_backbone(cfg).eval()
    own = build_resnet_deeplab_backbone(cfg, INPUT).eval()
    added = set(ours.state_dict()) - set(own.state_dict())
    stages = 4 if "res5" in cfg.MODEL.RESNETS.OUT_FEATURES else 3
    assert len(added) == 2 * sum(BLOCKS[50][:stages])
    assert all(".sge." in key for key in added)
    assert set(own.state_dict()) < set(ours.state_dict())
    assert geometry(ours) == geometry(own)
    assert ours.output_shape() == own.output_shape()
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen - added == {name for name, p in own.named_parameters() if not p.requires_grad}
    assert {name.split(".")[0] for name in frozen & added} == {"res2"}
    cfg.MODEL.SGE.ENABLED = False
    twin = build_backbone(cfg).eval()
    twin.load_state_dict(own.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, feature in own(x).items():
            assert torch.equal(feature, twin(x)[name])


@pytest.mark.parametrize(
    ("resnets", "reason"),
    [
        ({"RES4_DILATION": 2, "RES5_DILATION": 2}, "RES5_DILATION 4"),
        ({"STEM_TYPE": "other"}, "other"),
        ({"DEPTH": 18}, "DEPTH 18"),
    ],
)
def test_what_deeplabs_builder_refuses_is_refused(resnets, reason):
    with pytest.raises(sge_det.UserError, match=reason):
        build_backbone(deeplab_config(**resnets))


def test_deeplabs_keys_must_be_there():
    with pytest.raises(sge_det.UserError, match="add_deeplab_config"):
        sge_det.build_sge_resnet_deeplab_backbone(resnet_config(50), INPUT)


DEFORMABLE = {"DEFORM_ON_PER_STAGE": [False, True, False, True], "WIDTH_PER_GROUP": 8, "RES2_OUT_CHANNELS": 64}


class TorchvisionDeformConv(torch.nn.Module):
    """torchvision's deformable convolution under the interface of Detectron2's."""

    def __init__(self, in_channels, out_channels, kernel_size, stride, padding, bias, groups, dilation, **kwargs):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size))
        self.bias = None
        self.norm = kwargs["norm"]
        self.geometry = (stride, padding, dilation)

    def forward(self, x, offset, mask=None):
        return self.norm(deform_conv2d(x, offset, self.weight, None, *self.geometry, mask))


@pytest.fixture
def operators(monkeypatch):
    """Detectron2's own may not have been compiled here."""
    monkeypatch.setattr("sge_det.modeling.resnet.has_operators", lambda: True)
    for name in ("DeformConv", "ModulatedDeformConv"):
        monkeypatch.setattr(f"detectron2.modeling.backbone.resnet.{name}", TorchvisionDeformConv)


def test_deformable_stages_without_the_operators_are_told(monkeypatch):
    monkeypatch.setattr("sge_det.modeling.resnet.has_operators", lambda: False)
    with pytest.raises(sge_det.UserError, match=r"DEFORM_ON_PER_STAGE needs .*detectron2._C"):
        build_sge_resnet_backbone(resnet_config(50, **DEFORMABLE), INPUT)


@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_blocks_take_sge(operators, modulated):
    cfg = resnet_config(50, **DEFORMABLE, DEFORM_MODULATED=modulated)
    backbone = build_sge_resnet_backbone(cfg, INPUT).eval()
    own = build_resnet_backbone(cfg, INPUT).eval()
    kinds = {name: type(stage[0]) for name, stage in zip(backbone.stage_names, backbone.stages)}
    deformable, plain = sge_det.SGEDeformBottleneckBlock, SGEBottleneckBlock
    assert list(kinds.values()) == [plain, deformable, plain, deformable]
    for module in backbone.modules():
        if isinstance(module, deformable):
            torch.nn.init.normal_(module.conv2_offset.weight, std=0.1)
    own.load_state_dict(backbone.state_dict(), strict=False)
    # a gate that is open everywhere leaves Detectron2's block
    for module in backbone.modules():
        if isinstance(module, SpatialGroupEnhance):
            torch.nn.init.constant_(module.bias, 50.0)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name, feature in own(x).items():
            torch.testing.assert_close(backbone(x)[name], feature)


def test_blocks_are_called_after_their_attention():
    cfg = resnet_config(18)
    for attention, block_class in (("sge", SGEBasicBlock), ("se", AttentiveBasicBlock)):
        cfg.MODEL.SGE.ATTENTION = attention
        assert type(build_sge_resnet_backbone(cfg, INPUT).res3[0]) is block_class
    cfg.MODEL.SGE.ENABLED = False
    assert type(build_sge_resnet_backbone(cfg, INPUT).res3[0]) is BasicBlock


def test_attentions_and_models_can_be_pickled_and_copied():
    attention = pickle.loads(pickle.dumps(sge_det.sge_attention(8, (0.5, 2.0))))
    block = AttentiveBasicBlock(16, 16, attention=attention)
    assert (block.sge.groups, block.sge.weight.mean(), block.sge.bias.mean()) == (8, 0.5, 2.0)
    backbone = build_sge_resnet_backbone(resnet_config(18), INPUT).eval()
    x = torch.randn(1, 3, 64, 64)
    for again in (pickle.loads(pickle.dumps(backbone)), copy.deepcopy(backbone)):
        with torch.no_grad():
            assert all(torch.equal(again(x)[name], feature) for name, feature in backbone(x).items())


def test_default_stages_by_the_classs_name_and_from_a_lazy_config(tmp_path):
    node = LazyCall(sge_det.make_sge_stages)(
        depth=18, block_class="detectron2.modeling.backbone.resnet.BasicBlock", groups=16, stages=["res4"], norm="BN"
    )
    LazyConfig.save(OmegaConf.create({"stages": node}), str(tmp_path / "stages.yaml"))
    stages = instantiate(LazyConfig.load(str(tmp_path / "stages.yaml")).stages)
    groups = [{m.groups for b in stage for m in b.modules() if isinstance(m, SpatialGroupEnhance)} for stage in stages]
    assert groups == [set(), set(), {16}, set()]
    own = sge_det.make_sge_stages(50, "sge_det.SGEBottleneckBlock", norm="BN")
    assert all(block.sge.groups == 64 for stage in own for block in stage)
    for arguments, reason in (
        ({"block_class": "sge_det.NoBlock"}, "NoBlock"),
        ({"stages": ["res1"]}, "res1"),
        ({"groups": 48}, "48 groups do not divide"),
        ({"groups": "16"}, "'16' groups do not divide"),
        ({"groups": 16.0}, "16.0 groups do not divide"),
    ):
        with pytest.raises(sge_det.UserError, match=reason):
            sge_det.make_sge_stages(**{"depth": 18, "norm": "BN", **arguments})


def c4_config(*, mask=False):
    cfg = resnet_config(50, OUT_FEATURES=["res4"], WIDTH_PER_GROUP=8, RES2_OUT_CHANNELS=64)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    cfg.MODEL.BACKBONE.NAME = "build_sge_resnet_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "SGERes5ROIHeads"
    cfg.MODEL.MASK_ON = mask
    return cfg


@pytest.mark.parametrize("mask", [False, True])
def test_c4_has_sge_in_all_its_stages(mask):
    cfg = c4_config(mask=mask)
    sge, plain = build_pair(cfg)
    added = set(sge.state_dict()) - set(plain.state_dict())
    assert {key for key in added if key.startswith("roi_heads")} == {
        f"roi_heads.res5.{block}.sge.{name}" for block in range(3) for name in ("weight", "bias")
    }
    assert len(added) == 2 * 16
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    own = build_model(cfg)
    assert list(own.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, sge.roi_heads.res5[0].in_channels, 14, 14)
    plain.roi_heads.load_state_dict(own.roi_heads.state_dict())
    with torch.no_grad():
        assert torch.equal(plain.roi_heads.res5(x), own.roi_heads.res5(x))
        assert not torch.equal(sge.roi_heads.res5(x), own.roi_heads.res5(x))


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


@pytest.mark.parametrize("kind", ["faster_rcnn", "retinanet"])
def test_sge_behind_the_outputs_of_the_fpn(kind):
    def build(fpn):
        overrides = ["MODEL.SGE.FPN", fpn, "MODEL.DEVICE", "cpu", "MODEL.FPN.NORM", "GN"]
        return build_model(sge_det.get_config(f"sample/{kind}_SGE_R_50_FPN.yaml", overrides)).eval()

    torch.manual_seed(0)
    plain, model = build("False").backbone, build("True").backbone
    levels = [name for name, _ in plain.named_children() if name.startswith("fpn_output")]
    keys = {f"{name}.sge.{parameter}" for name in levels for parameter in ("weight", "bias")}
    assert set(model.state_dict()) - set(plain.state_dict()) == keys
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for name in levels:
            torch.nn.init.normal_(getattr(model, name).sge.weight)
        before, after = plain(x), model(x)
        for name in levels:
            level = f"p{name.removeprefix('fpn_output')}"
            torch.testing.assert_close(after[level], getattr(model, name).sge(before[level]))
    if kind == "retinanet":
        assert torch.equal(after["p6"], before["p6"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.FPN.OUT_CHANNELS", "40"], "16 does not divide the 40 channels of MODEL.FPN.OUT_CHANNELS"),
        (["MODEL.SGE.ATTENTION", "se"], "MODEL.SGE.FPN goes with the ATTENTION 'sge' alone"),
    ],
)
def test_sge_behind_the_fpn_that_cannot_be(overrides, message):
    with pytest.raises(sge_det.UserError, match=message):
        build_model(
            sge_det.get_config(
                "sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.FPN", "True", "MODEL.DEVICE", "cpu", *overrides]
            )
        )
