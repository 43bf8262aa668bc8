"""SGE in what other Detectron2 projects build: Panoptic-DeepLab, RegNet in an FPN, blocks as TridentNet's."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, Backbone
from reference_models import regnet
from torch import nn

import sge_det
from sge_det import add_sge_config, insert_sge
from sge_det.export import export_model, report
from sge_det.modeling.gates import sge_layers

SIZES = [(64, 96), (96, 64), (128, 96), (64, 64)]


@pytest.fixture
def panopticapi(monkeypatch):
    """Stands for the package, of which the project's mapper imports this function, and its model nothing."""
    utils = types.ModuleType("panopticapi.utils")
    utils.rgb2id = lambda color: color[..., 0] + 256 * color[..., 1] + 256**2 * color[..., 2]
    monkeypatch.setitem(sys.modules, "panopticapi", types.ModuleType("panopticapi"))
    monkeypatch.setitem(sys.modules, "panopticapi.utils", utils)


def panoptic_deeplab(backbone):
    """Slim, as projects/Panoptic-DeepLab's script sets it up."""
    from detectron2.projects.panoptic_deeplab import add_panoptic_deeplab_config

    cfg = get_cfg()
    add_panoptic_deeplab_config(cfg)
    add_sge_config(cfg)
    model, head, instances = cfg.MODEL, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.INS_EMBED_HEAD
    model.META_ARCHITECTURE, model.DEVICE, model.BACKBONE.NAME, model.BACKBONE.FREEZE_AT = (
        "PanopticDeepLab",
        "cpu",
        backbone,
        0,
    )
    model.PIXEL_MEAN, model.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    model.RESNETS.DEPTH, model.RESNETS.NORM, model.RESNETS.STEM_TYPE = 50, "BN", "deeplab"
    model.RESNETS.RES2_OUT_CHANNELS, model.RESNETS.WIDTH_PER_GROUP, model.RESNETS.STEM_OUT_CHANNELS = 64, 16, 32
    model.RESNETS.OUT_FEATURES, model.RESNETS.RES5_MULTI_GRID = ["res2", "res3", "res5"], [1, 2, 4]
    model.SGE.GROUPS = 16
    cfg.INPUT.CROP.SIZE = [64, 64]
    cfg.DATASETS.TRAIN = ("panoptic_of_two_things",)
    things = {category: category for category in (11, 12)}
    MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).set(label_divisor=1000, thing_dataset_id_to_contiguous_id=things)
    head.NAME, head.NUM_CLASSES, head.LOSS_TYPE = "PanopticDeepLabSemSegHead", 19, "hard_pixel_mining"
    for part in (head, instances):
        part.IN_FEATURES, part.PROJECT_FEATURES, part.PROJECT_CHANNELS = (
            ["res2", "res3", "res5"],
            ["res2", "res3"],
            [8, 8],
        )
        part.ASPP_CHANNELS, part.CONVS_DIM, part.HEAD_CHANNELS, part.NORM, part.COMMON_STRIDE = 16, 16, 16, "BN", 4
    head.ASPP_DILATIONS = [6, 12, 18]
    return cfg


def test_panoptic_deeplab_trains_a_step_and_finds_segments(panopticapi):
    cfg = panoptic_deeplab("build_sge_resnet_deeplab_backbone")
    torch.manual_seed(0)
    model = build_model(cfg).train()
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 19, (64, 64), generator=generator)
    example = {
        "image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator),
        "sem_seg": classes,
        "sem_seg_weights": torch.ones(64, 64),
        "center": torch.rand(64, 64, generator=generator),
        "center_weights": torch.ones(64, 64),
        "offset": torch.randn(2, 64, 64, generator=generator),
        "offset_weights": torch.ones(64, 64),
    }
    losses = model([example, example])
    assert set(losses) == {"loss_sem_seg", "loss_center", "loss_offset"}
    sum(losses.values()).backward()
    layers = sge_layers(model)
    assert len(layers) == 16
    assert all(layer.weight.grad.abs().sum() > 0 for layer in layers.values())
    with torch.no_grad():
        (found,) = model.eval()([{"image": example["image"], "height": 64, "width": 64}])
    assert found["panoptic_seg"][0].shape == (64, 64) and found["sem_seg"].shape == (19, 64, 64)
    plain = build_model(panoptic_deeplab("build_resnet_deeplab_backbone")).state_dict()
    assert [key for key in model.state_dict() if ".sge." not in key] == list(plain)


class TridentBlock(nn.Module):
    """As TridentNet's: three branches with one set of weights and a dilation each, as a list of maps."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = Conv2d(channels, 8, 1, bias=False, norm=nn.BatchNorm2d(8))
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.conv3 = Conv2d(8, channels, 1, bias=False, norm=nn.BatchNorm2d(channels))

    def forward(self, xs):
        xs = xs if isinstance(xs, list) else [xs] * 3
        inner = [F.relu(self.conv1(x)) for x in xs]
        inner = [
            F.relu(F.conv2d(x, self.conv2.weight, padding=dilation, dilation=dilation))
            for x, dilation in zip(inner, (1, 2, 3), strict=True)
        ]
        return [F.relu(self.conv3(y) + x) for x, y in zip(xs, inner, strict=True)]


class Trident(Backbone):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.blocks = nn.Sequential(TridentBlock(16), TridentBlock(16))
        self._out_features, self._out_feature_channels, self._out_feature_strides = ["t"], {"t": 16}, {"t": 4}

    def forward(self, x):
        return {f"t{place}": map_ for place, map_ in enumerate(self.blocks(self.stem(x)))}


def regnet_in_fpn():
    return FPN(regnet(), ["s2"], 16)


class Project(nn.Module):
    """A model of a project's own around a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize(
    ("build", "where", "count"), [(Trident, "*.conv3", 2), (regnet_in_fpn, None, 3)], ids=["trident", "regnet"]
)
def test_a_projects_backbone_is_transplanted_trained_and_exported(build, where, count, tmp_path):
    torch.manual_seed(0)
    backbone = build()
    plain = copy.deepcopy(backbone).eval()
    assert len(insert_sge(backbone, groups=4, where=where, transplant=True)) == count
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for name, expected in plain(x).items():
            torch.testing.assert_close(backbone.eval()(x)[name], expected, rtol=1e-4, atol=1e-5)
    backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1)
    sum(map_.square().mean() for map_ in backbone(x).values()).backward()
    optimizer.step()
    assert all(layer.weight.abs().sum() > 0 for layer in sge_layers(backbone).values())
    for format in ("torchscript", "onnx"):
        _, exported = export_model(Project(backbone), tmp_path, format, sizes=SIZES)
        assert exported.holds, report([exported])


def test_blocks_that_are_not_found_are_told():
    with pytest.raises(sge_det.UserError, match=r"no residual block whose branch ends in a norm.*where="):
        insert_sge(Trident(), groups=4)
