"""ResNets whose residual blocks may end in Spatial Group-wise Enhance, and their FPN backbones.

Place (paper, section 3; release): last convolution -> its norm -> SGE -> add the shortcut -> ReLU. A block without
attention is Detectron2's own block: the same parameters under the same names, the same function.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn

from ..config import STAGES, sge_options
from ..errors import UserError
from ..layers.attention import SGE as SGE_NAME
from ..layers.attention import build_rival
from ..layers.sge import SpatialGroupEnhance

# Blocks of each stage (He et al., "Deep Residual Learning", table 1).
_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@dataclass(frozen=True)
class Attention:
    """What stands at the end of a residual block.

    Attributes:
        name: the submodule's name in the block and so in state dicts, for instance "sge".
        build: makes the module for a number of channels; the module maps (N, C, H, W) to the same shape.
    """

    name: str
    build: Callable[[int], nn.Module]


SGE = Attention(SGE_NAME, lambda channels: SpatialGroupEnhance())


class _AttentiveBlock:
    """Adds the attention and the block's tail to a Detectron2 block class; ``attention=None`` is the plain block."""

    def __init__(self, in_channels: int, out_channels: int, *, attention: Attention | None = SGE, **kwargs):
        super().__init__(in_channels, out_channels, **kwargs)
        self.attention_name = None if attention is None else attention.name
        if attention is not None:
            self.add_module(attention.name, attention.build(out_channels))

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self._branch(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.attention_name is None:
            return F.relu_(out.add_(shortcut))
        # TorchScript finds an attribute only by a literal name, and compiles no branch for one that is not there.
        if hasattr(self, "sge"):
            if hasattr(self.sge, "residual"):
                return self.sge.residual(out, shortcut, inplace=True)
            return F.relu_(self.sge(out) + shortcut)
        elif hasattr(self, "se"):
            return F.relu_(self.se(out) + shortcut)
        elif hasattr(self, "eca"):
            return F.relu_(self.eca(out) + shortcut)
        elif hasattr(self, "cbam"):
            return F.relu_(self.cbam(out) + shortcut)
        else:
            attention = getattr(self, self.attention_name)
            if isinstance(attention, SpatialGroupEnhance):
                return attention.residual(out, shortcut, inplace=True)
            return F.relu_(attention(out) + shortcut)


class SGEBasicBlock(_AttentiveBlock, BasicBlock):
    """Detectron2's ``BasicBlock`` (ResNet-18 and -34) with SGE after conv2's norm.

    Args:
        attention: what ends the residual branch; SGE with 64 groups by default, None for the plain block.
        in_channels, out_channels, stride, norm: as in ``BasicBlock``.
    """

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu_(self.conv1(x)))


class SGEBottleneckBlock(_AttentiveBlock, BottleneckBlock):
    """Detectron2's ``BottleneckBlock`` (ResNet-50, -101, -152, ResNeXt) with SGE after conv3's norm.

    Args:
        attention: what ends the residual branch; SGE with 64 groups by default, None for the plain block.
        in_channels, out_channels, bottleneck_channels, ...: as in ``BottleneckBlock``.
    """

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu_(self.conv2(F.relu_(self.conv1(x)))))


def build_attention(cfg: CfgNode, stage: str, channels: int) -> Attention | None:
    """What ``cfg.MODEL.SGE`` puts at the end of the blocks of ``stage`` ("res2" ... "res5") with ``channels`` channels.

    Raises:
        UserError: the groups do not divide the channels, or ``MODEL.SGE.ATTENTION`` cannot be built.
    """
    options = sge_options(cfg)
    if not options.enabled or stage not in options.stages:
        return None
    if not options.is_sge:
        return Attention(options.attention, lambda channels: _rival(options.attention, channels))
    if options.groups < 1 or channels % options.groups:
        raise UserError(
            f"MODEL.SGE.GROUPS = {options.groups} does not divide the {channels} channels of {stage}: "
            "set a divisor of them, or leave the stage out of MODEL.SGE.STAGES"
        )

    def build(channels: int) -> SpatialGroupEnhance:
        layer = SpatialGroupEnhance(options.groups, kernel=options.kernel)
        start_sge(layer, options.init)
        return layer

    return Attention(SGE_NAME, build)


def start_sge(model: nn.Module, init: Sequence[float]) -> None:
    """Sets weight and bias of all SGE layers of ``model`` to the two numbers of ``init`` (``MODEL.SGE.INIT``)."""
    for layer in model.modules():
        if isinstance(layer, SpatialGroupEnhance):
            nn.init.constant_(layer.weight, init[0])
            nn.init.constant_(layer.bias, init[1])


def _rival(kind: str, channels: int) -> nn.Module:
    try:
        return build_rival(kind, channels)
    except ImportError as error:
        raise UserError(f"MODEL.SGE.ATTENTION {kind} comes from timm, which is missing: pip install timm") from error


@BACKBONE_REGISTRY.register()
def build_sge_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet from ``MODEL.RESNETS`` with ``MODEL.SGE`` in its blocks (its defaults where the key is absent).

    With ``MODEL.SGE.ENABLED False`` it is the plain ResNet of ``build_resnet_backbone``, key for key.

    Raises:
        UserError: ``MODEL.RESNETS.DEPTH`` is not a ResNet's, a stage is deformable, or the groups do not divide a
            stage's channels.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in _BLOCKS:
        raise UserError(f"MODEL.RESNETS.DEPTH {resnets.DEPTH} is not one of {', '.join(map(str, _BLOCKS))}")
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise UserError("MODEL.RESNETS.DEFORM_ON_PER_STAGE is not supported with SGE: set it to [False] * 4")
    stem = BasicStem(input_shape.channels, resnets.STEM_OUT_CHANNELS, norm=resnets.NORM)
    in_channels, out_channels = resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS
    bottleneck_channels = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
    stages = []
    for index, (name, blocks) in enumerate(zip(STAGES, _BLOCKS[resnets.DEPTH], strict=True)):
        dilation = resnets.RES5_DILATION if name == "res5" else 1
        first_stride = 1 if index == 0 or dilation == 2 else 2
        options = {
            "stride_per_block": [first_stride] + [1] * (blocks - 1),
            "norm": resnets.NORM,
            "attention": build_attention(cfg, name, out_channels),
        }
        block_class = SGEBasicBlock
        if resnets.DEPTH >= 50:
            block_class = SGEBottleneckBlock
            options |= {
                "bottleneck_channels": bottleneck_channels << index,
                "num_groups": resnets.NUM_GROUPS,
                "stride_in_1x1": resnets.STRIDE_IN_1X1,
                "dilation": dilation,
            }
        stages.append(
            ResNet.make_stage(block_class, blocks, in_channels=in_channels, out_channels=out_channels, **options)
        )
        in_channels, out_channels = out_channels, out_channels * 2
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_sge_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The SGE version of ``build_resnet_fpn_backbone``: FPN over res2-res5, with p6 pooled from p5."""
    return _build_fpn(cfg, build_sge_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_sge_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The SGE version of ``build_retinanet_resnet_fpn_backbone``: FPN over res3-res5, p6 and p7 convolved from res5."""
    bottom_up = build_sge_resnet_backbone(cfg, input_shape)
    channels = bottom_up.output_shape()["res5"].channels
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _build_fpn(cfg: CfgNode, bottom_up: ResNet, top_block: nn.Module) -> FPN:
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, fpn.NORM, top_block, fpn.FUSE_TYPE)
