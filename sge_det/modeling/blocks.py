"""Detectron2's residual blocks with an attention at the end of the residual branch.

Place (paper, section 3; release): last convolution -> its norm -> attention -> add the shortcut -> ReLU. A block
without attention computes what Detectron2's own block does, from the same parameters under the same names.
"""

import functools
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, DeformBottleneckBlock
from detectron2.utils.registry import locate
from torch import Tensor, nn

from ..config import STAGES
from ..errors import UserError
from ..layers.attention import SGE as SGE_NAME
from ..layers.attention import attention_kind, build_rival
from ..layers.sge import SpatialGroupEnhance
from .recompute import forget_input


@dataclass(frozen=True)
class Attention:
    """What stands at the end of a residual block.

    Attributes:
        name: the submodule's name in the block and so in state dicts, for instance "sge".
        build: makes the module for a number of channels; the module maps (N, C, H, W) to the same shape.
        save_memory: its input is computed again in the backward pass rather than kept; for SGE alone.
    """

    name: str
    build: Callable[[int], nn.Module]
    save_memory: bool = False


def sge_attention(
    groups: int = 64,
    init: Sequence[float] = (0.0, 1.0),
    kernel: str = "eager",
    *,
    constant: bool = False,
    normalize: bool = True,
    save_memory: bool = False,
) -> Attention:
    """SGE as blocks take it; can be pickled, and written into a lazy config.

    Args:
        groups: channel groups of each layer; must divide the block's output channels.
        init: start values of weight (gamma) and bias (beta).
        kernel, normalize: as in ``SpatialGroupEnhance``.
        constant: gamma is held at its start, so that with 0 the gates are the same all over a map.
        save_memory: in training the block's last convolution and norm are computed again in the backward pass, and
            SGE's input is not kept. Blocks whose last norm is one of processes together (SyncBN) keep it.
    """
    build = functools.partial(
        _build_sge, groups=groups, init=tuple(init), kernel=kernel, constant=constant, normalize=normalize
    )
    return Attention(SGE_NAME, build, save_memory)


def _build_sge(
    channels: int,
    *,
    groups: int,
    init: tuple[float, float],
    kernel: str,
    constant: bool,
    normalize: bool,
) -> SpatialGroupEnhance:
    if not isinstance(groups, numbers.Integral) or groups < 1 or channels % groups:
        raise UserError(f"{groups!r:.100} groups do not divide the block's {channels} channels: give a divisor of them")
    layer = SpatialGroupEnhance(groups, kernel=kernel, normalize=normalize)
    start_sge(layer, init)
    layer.weight.requires_grad_(not constant)
    return layer


def rival_attention(kind: str) -> Attention:
    """A rival of SGE as blocks take it; can be pickled.

    Args:
        kind: as ``MODEL.SGE.ATTENTION``: one of timm's ("se", "eca", "cbam", ...), or "package.module:Class".

    Raises:
        UserError: there is no such kind. What cannot be built of it is told by the block that is to have it.
    """
    try:
        return Attention(attention_kind(kind).key, functools.partial(_build_rival, kind))
    except ValueError as error:
        raise UserError(f"the attention {error}") from error


def _build_rival(kind: str, channels: int) -> nn.Module:
    try:
        return build_rival(kind, channels)
    except ImportError as error:
        raise UserError(f"the attention {kind} comes from timm, which is missing: pip install timm") from error
    except ValueError as error:
        raise UserError(f"the attention {error}") from error


def start_sge(model: nn.Module, init: Sequence[float]) -> None:
    """Sets weight and bias of all SGE layers of ``model`` to the two numbers of ``init`` (``MODEL.SGE.INIT``)."""
    for layer in model.modules():
        if isinstance(layer, SpatialGroupEnhance):
            nn.init.constant_(layer.weight, init[0])
            nn.init.constant_(layer.bias, init[1])


def hold_gates_constant(model: nn.Module) -> None:
    """Sets gamma of all SGE layers of ``model`` to 0: the same gate all over a map (``MODEL.SGE.CONSTANT``)."""
    for layer in model.modules():
        if isinstance(layer, SpatialGroupEnhance):
            nn.init.zeros_(layer.weight)


class _Attentive:
    """Adds the attention and the block's tail to a Detectron2 block class; ``attention=None`` is the plain block."""

    def __init__(self, in_channels: int, out_channels: int, *, attention: Attention | None = None, **kwargs):
        super().__init__(in_channels, out_channels, **kwargs)
        self._attend(attention)

    @classmethod
    def of(cls, block: nn.Module, attention: Attention | None) -> "_Attentive":
        """The block of this class that has the parameters of ``block``, one of Detectron2's, which it takes over."""
        own = cls.__new__(cls)
        own.__dict__ = block.__dict__
        own._attend(attention)
        return own

    def _attend(self, attention: Attention | None) -> None:
        self.attention_name = None if attention is None else attention.name
        self.save_memory = attention is not None and attention.save_memory
        if attention is not None:
            self.add_module(attention.name, attention.build(self.out_channels))

    def _inner(self, x: Tensor) -> Tensor:
        """What the last convolution of the branch gets."""
        raise NotImplementedError

    def _branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @torch.jit.unused
    def _is_lean(self) -> bool:
        # Compilers decide themselves what is kept.
        looked_at = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return self.save_memory and torch.is_grad_enabled() and not looked_at

    @torch.jit.unused
    def _lean_forward(self, x: Tensor) -> Tensor:
        last, inner = self.conv3 if hasattr(self, "conv3") else self.conv2, self._inner(x)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        result = self.sge.residual(last(inner), shortcut)
        forget_input(result, last, inner)
        return result

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self._is_lean():
            return self._lean_forward(x)
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
        elif hasattr(self, "attention"):
            return F.relu_(self.attention(out) + shortcut)
        else:
            attention = getattr(self, self.attention_name)
            if isinstance(attention, SpatialGroupEnhance):
                return attention.residual(out, shortcut, inplace=True)
            return F.relu_(attention(out) + shortcut)


class _WithSGE:
    """Gives an attentive block SGE as its attention."""

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int = 64, attention: Attention | None = None, **kwargs
    ):
        super().__init__(in_channels, out_channels, attention=attention or sge_attention(groups), **kwargs)


class AttentiveBasicBlock(_Attentive, BasicBlock):
    """Detectron2's ``BasicBlock`` (ResNet-18 and -34) with an attention after conv2's norm.

    Args:
        attention: what ends the residual branch; None for the plain block.
        in_channels, out_channels, stride, norm: as in ``BasicBlock``.
    """

    def _inner(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv1(x))

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv2(self._inner(x))


class AttentiveBottleneckBlock(_Attentive, BottleneckBlock):
    """Detectron2's ``BottleneckBlock`` (ResNet-50, -101, -152, ResNeXt) with an attention after conv3's norm.

    Args:
        attention: what ends the residual branch; None for the plain block.
        in_channels, out_channels, bottleneck_channels, ...: as in ``BottleneckBlock``.
    """

    def _inner(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv2(F.relu_(self.conv1(x))))

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv3(self._inner(x))


class AttentiveDeformBottleneckBlock(_Attentive, DeformBottleneckBlock):
    """Detectron2's ``DeformBottleneckBlock`` with an attention after conv3's norm.

    Args:
        attention: what ends the residual branch; None for the plain block.
        in_channels, out_channels, bottleneck_channels, ...: as in ``DeformBottleneckBlock``.
    """

    def _inner(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        offset = self.conv2_offset(out)
        if self.deform_modulated:
            offset_x, offset_y, mask = torch.chunk(offset, 3, dim=1)
            out = self.conv2(out, torch.cat((offset_x, offset_y), dim=1), mask.sigmoid())
        else:
            out = self.conv2(out, offset)
        return F.relu_(out)

    def _branch(self, x: Tensor) -> Tensor:
        return self.conv3(self._inner(x))


class SGEBasicBlock(_WithSGE, AttentiveBasicBlock):
    """``AttentiveBasicBlock`` with SGE of ``groups`` channel groups, 64 by default."""


class SGEBottleneckBlock(_WithSGE, AttentiveBottleneckBlock):
    """``AttentiveBottleneckBlock`` with SGE of ``groups`` channel groups, 64 by default."""


class SGEDeformBottleneckBlock(_WithSGE, AttentiveDeformBottleneckBlock):
    """``AttentiveDeformBottleneckBlock`` with SGE of ``groups`` channel groups, 64 by default."""


class SGEConv2d(Conv2d):
    """Detectron2's ``Conv2d`` with SGE behind its norm: an output convolution of an FPN."""

    @classmethod
    def of(cls, conv: Conv2d, layer: nn.Module) -> "SGEConv2d":
        """The convolution that has the parameters of ``conv``, which it takes over, and ``layer`` as its "sge"."""
        own = cls.__new__(cls)
        own.__dict__ = conv.__dict__
        own.add_module(SGE_NAME, layer)
        return own

    def forward(self, x: Tensor) -> Tensor:
        x = self._conv_forward(x, self.weight, self.bias)
        if self.norm is not None:
            x = self.norm(x)
        return self.sge(x)


# Detectron2's block class -> with any attention, with SGE.
_ATTENTIVE = {
    BasicBlock: (AttentiveBasicBlock, SGEBasicBlock),
    BottleneckBlock: (AttentiveBottleneckBlock, SGEBottleneckBlock),
    DeformBottleneckBlock: (AttentiveDeformBottleneckBlock, SGEDeformBottleneckBlock),
}


def is_exchangeable(block: nn.Module) -> bool:
    """Whether ``block`` is a residual block of Detectron2's that :func:`exchange_blocks` knows."""
    return type(block) in _ATTENTIVE


def exchange_blocks(stage: nn.Sequential, attention: Attention | None) -> None:
    """Gives all blocks of ``stage``, Detectron2's own, ``attention``; parameters and their names stay."""
    if attention is None:
        return
    for place, block in enumerate(stage):
        stage[place] = _ATTENTIVE[type(block)][attention.name == SGE_NAME].of(block, attention)


def make_sge_stages(
    depth: int,
    block_class: type | str | None = None,
    *,
    groups: int = 64,
    stages: Sequence[str] = STAGES,
    attention: Attention | str | None = None,
    **kwargs,
) -> list[list[nn.Module]]:
    """Detectron2's ``ResNet.make_default_stages`` with SGE in the blocks, for lazy configs.

    Args:
        depth: 18, 34, 50, 101 or 152.
        block_class: a Detectron2 block class or its dotted name; that of the depth by default. Blocks that have an
            attention of their own (``SGEBottleneckBlock``) keep theirs.
        groups: channel groups of each SGE layer.
        stages: the stages whose blocks end in SGE.
        attention: takes the place of SGE; also by its name, as in :func:`rival_attention`.
        kwargs: as in ``ResNet.make_default_stages``.

    Raises:
        UserError: a stage, a class or an attention that does not exist, a class that cannot take attention, groups
            that do not divide a stage's channels, or an attention that does not fit them.
    """
    unknown = sorted(set(stages) - set(STAGES))
    if unknown:
        raise UserError(f"there is no stage {unknown[0]!r}: the stages of a ResNet are {', '.join(STAGES)}")
    if isinstance(block_class, str):
        try:
            block_class = locate(block_class)
        except ImportError as error:
            raise UserError(f"the block class {block_class!r} cannot be imported: {error}") from error
    if depth < 50:
        kwargs.pop("stride_in_1x1", None)  # basic blocks have no 1x1 convolution
    made = ResNet.make_default_stages(depth, block_class, **kwargs)
    if isinstance(attention, str) and attention != SGE_NAME:
        attention = rival_attention(attention)
    elif not isinstance(attention, Attention):
        attention = sge_attention(groups)
    result = []
    for name, blocks in zip(STAGES, made, strict=True):
        blocks = nn.Sequential(*blocks)
        if name in stages and not isinstance(blocks[0], _Attentive):
            if not is_exchangeable(blocks[0]):
                raise UserError(
                    f"a block of the class {type(blocks[0]).__name__} cannot take SGE: see sge_det.insert_sge"
                )
            exchange_blocks(blocks, attention)
        result.append(list(blocks))
    return result
