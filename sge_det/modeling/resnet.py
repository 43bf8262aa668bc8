"""Backbones that Detectron2 itself builds, whose residual blocks are then exchanged for those with ``MODEL.SGE``."""

import importlib.util
from collections.abc import Callable

from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    LastLevelP6P7,
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from ..config import SGEOptions, sge_options
from ..errors import UserError
from .blocks import Attention, SGEConv2d, exchange_blocks, rival_attention, sge_attention
from .padding import ignore_padding
from .paper import LinearP6P7, with_eval_bn
from .recompute import can_be_again

_DEPTHS, _DEEPLAB_DEPTHS = (18, 34, 50, 101, 152), (50, 101, 152)
# What only DeepLab's builder reads, with the values at which there is nothing to read.
_DEEPLAB_KEYS = {"STEM_TYPE": "basic", "RES4_DILATION": 1, "RES5_MULTI_GRID": (1, 1, 1)}


def build_attention(cfg: CfgNode, stage: str, channels: int) -> Attention | None:
    """What ``cfg.MODEL.SGE`` puts at the end of the blocks of ``stage`` ("res2" ... "res5") with ``channels`` channels.

    Raises:
        UserError: the groups do not divide the channels, or ``MODEL.SGE.ATTENTION`` cannot be built.
    """
    options = sge_options(cfg)
    if not options.enabled or stage not in options.stages:
        return None
    if not options.is_sge:
        return rival_attention(options.attention)
    if options.groups < 1 or channels % options.groups:
        raise UserError(
            f"MODEL.SGE.GROUPS = {options.groups} does not divide the {channels} channels of {stage}: "
            "set a divisor of them, or leave the stage out of MODEL.SGE.STAGES"
        )
    norm = cfg.MODEL.RESNETS.NORM
    if options.save_memory and not can_be_again(norm):
        raise UserError(
            f"MODEL.SGE.SAVE_MEMORY True cannot compute a norm of MODEL.RESNETS.NORM {norm!r:.100} a second time: set "
            "NORM to 'FrozenBN', 'BN', 'EvalBN', 'GN' or '', or SAVE_MEMORY to False"
        )
    return _sge(options)


def _sge(options: SGEOptions) -> Attention:
    return sge_attention(
        options.groups,
        options.init,
        options.kernel,
        constant=options.constant,
        normalize=options.normalize,
        save_memory=options.save_memory,
    )


@BACKBONE_REGISTRY.register()
def build_sge_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet from ``MODEL.RESNETS`` with ``MODEL.SGE`` in its blocks (its defaults where the key is absent).

    With ``MODEL.SGE.ENABLED False`` it is the plain ResNet of ``build_resnet_backbone``.

    Raises:
        UserError: Detectron2's builder refuses ``MODEL.RESNETS`` or does not read one of its keys, a stage is
            deformable and Detectron2 lacks the operator, or the groups do not divide a stage's channels.
    """
    _check_keys(cfg)
    resnet = _build(build_resnet_backbone, cfg, input_shape)
    _enhance(resnet, cfg)
    return _without_padding(resnet, cfg)


@BACKBONE_REGISTRY.register()
def build_sge_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The SGE version of ``build_resnet_fpn_backbone``: FPN over res2-res5, with p6 pooled from p5."""
    return _build_fpn(build_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_retinanet_sge_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The SGE version of ``build_retinanet_resnet_fpn_backbone``: FPN over res3-res5, p6 and p7 convolved from res5."""
    return _build_fpn(build_retinanet_resnet_fpn_backbone, cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_sge_resnet_deeplab_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The SGE version of DeepLab's ``build_resnet_deeplab_backbone``, with its stem, dilations and multi-grid.

    Raises:
        UserError: as :func:`build_sge_resnet_backbone`; or this Detectron2 has no ``projects.deeplab``, or its keys
            were not added to the config.
    """
    try:
        from detectron2.projects.deeplab import build_resnet_deeplab_backbone
    except ImportError as error:
        raise UserError(
            f"that backbone wraps detectron2.projects.deeplab, which this Detectron2 lacks: {error}"
        ) from error
    lacking = [key for key in _DEEPLAB_KEYS if key not in cfg.MODEL.RESNETS]
    if lacking:
        raise UserError(
            f"the config has no MODEL.RESNETS.{lacking[0]}, which build_sge_resnet_deeplab_backbone reads: call "
            "detectron2.projects.deeplab.add_deeplab_config(cfg) before the file is merged"
        )
    resnet = _build(build_resnet_deeplab_backbone, cfg, input_shape, depths=_DEEPLAB_DEPTHS)
    _enhance(resnet, cfg)
    return _without_padding(resnet, cfg)


def _build_fpn(build: Callable[[CfgNode, ShapeSpec], FPN], cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    _check_keys(cfg)
    fpn = _build(build, cfg, input_shape)
    _enhance(fpn.bottom_up, cfg)
    _enhance_outputs(fpn, sge_options(cfg))
    if isinstance(fpn.top_block, LastLevelP6P7) and not cfg.MODEL.FPN.get("P7_RELU", True):
        fpn.top_block = LinearP6P7.of(fpn.top_block)
    return _without_padding(fpn, cfg)


def _enhance_outputs(fpn: FPN, options: SGEOptions) -> None:
    """Puts SGE behind the output convolutions of ``fpn``; p6 and p7 come from others."""
    if not (options.is_sge and options.fpn):
        return
    channels = fpn.output_convs[0].out_channels
    if channels % options.groups:
        raise UserError(
            f"MODEL.SGE.GROUPS = {options.groups} does not divide the {channels} channels of MODEL.FPN.OUT_CHANNELS: "
            "set a divisor of them, or MODEL.SGE.FPN False"
        )
    attention = _sge(options)
    for name, module in list(fpn.named_children()):
        if name.startswith("fpn_output"):
            setattr(fpn, name, SGEConv2d.of(module, attention.build(channels)))
            # the list in which FPN keeps them besides
            fpn.output_convs[fpn.output_convs.index(module)] = getattr(fpn, name)


def _without_padding(backbone: Backbone, cfg: CfgNode) -> Backbone:
    if sge_options(cfg).ignore_padding:
        ignore_padding(backbone)
    return backbone


def _check_keys(cfg: CfgNode) -> None:
    """Checks that Detectron2's builder reads all that ``MODEL.RESNETS`` says.

    Raises:
        UserError: it does not; names the key.
    """
    known = get_cfg().MODEL.RESNETS
    for key, value in cfg.MODEL.RESNETS.items():
        if key in known:
            continue
        if key not in _DEEPLAB_KEYS:
            raise UserError(
                f"MODEL.RESNETS.{key} is a key that {cfg.MODEL.BACKBONE.NAME} does not read: take it out of the config"
            )
        plain = _DEEPLAB_KEYS[key]
        if (tuple(value) if isinstance(value, list | tuple) else value) != plain:
            raise UserError(
                f"MODEL.RESNETS.{key} {value} is read by MODEL.BACKBONE.NAME build_sge_resnet_deeplab_backbone alone: "
                f"set that, or {key} {list(plain) if isinstance(plain, tuple) else plain}"
            )


def _build(
    build: Callable[[CfgNode, ShapeSpec], Backbone],
    cfg: CfgNode,
    input_shape: ShapeSpec,
    *,
    depths: tuple[int, ...] = _DEPTHS,
) -> Backbone:
    """What Detectron2's ``build`` makes of ``cfg``; its asserts are sentences."""
    resnets = cfg.MODEL.RESNETS
    if resnets.DEPTH not in depths:
        raise UserError(f"MODEL.RESNETS.DEPTH {resnets.DEPTH} is not one of {', '.join(map(str, depths))}")
    if any(resnets.DEFORM_ON_PER_STAGE) and not has_operators():
        raise UserError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE needs Detectron2's compiled operators (detectron2._C), which this "
            "installation lacks: install Detectron2 with them, or set it to [False, False, False, False]"
        )
    try:
        return build(with_eval_bn(cfg), input_shape)
    except (AssertionError, KeyError, ValueError) as error:
        reason = str(error) or "RES4_DILATION 2 goes with RES5_DILATION 4 alone"
        raise UserError(f"Detectron2 builds no {cfg.MODEL.BACKBONE.NAME} of MODEL.RESNETS: {reason}") from error


def has_operators() -> bool:
    """Whether this Detectron2 has its compiled operators, of which the deformable convolutions are."""
    return importlib.util.find_spec("detectron2._C") is not None


def _enhance(resnet: ResNet, cfg: CfgNode) -> None:
    for name, stage in zip(resnet.stage_names, resnet.stages, strict=True):
        exchange_blocks(stage, build_attention(cfg, name, stage[-1].out_channels))
    # a frozen stage is frozen with its attention
    resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
