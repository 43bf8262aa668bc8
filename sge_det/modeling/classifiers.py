"""timm's ResNets to pretrain, plain and with SGE, of any width."""

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models.resnet import ResNet, downsample_conv
from torch import nn

from ..errors import UserError
from .timm import SGEAttention


def build_classifier(
    arch: str,
    classes: int,
    *,
    seed: int,
    groups: int = 64,
    stem_channels: int = 64,
    model_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A model with random weights from a seed; an SGE model and its plain twin share them.

    Args:
        arch: one of timm's ResNets; ``sge_`` before its name puts SGE into its blocks.
        classes: of its last layer.
        seed: of the weights.
        groups: channel groups of each SGE layer.
        stem_channels: channels of the first convolution, which timm has no argument for.
        model_kwargs: of ``timm.create_model``.

    Raises:
        UserError: timm has no such ResNet or does not take its arguments.
    """
    name = arch.removeprefix("sge_")
    if not timm.is_model(name):
        near = ", ".join(sorted(timm.list_models("resnet[0-9]*", module="resnet"))[:12])
        raise UserError(f"--model {arch}: timm has no {name!r}; for instance {near}, with sge_ before for SGE")
    kwargs = dict(model_kwargs or {})
    torch.manual_seed(seed)
    try:
        plain = timm.create_model(name, num_classes=classes, **kwargs)
        if not isinstance(plain, ResNet):
            raise UserError(f"--model {arch}: timm's {name} is no ResNet, so it has no place for SGE in its blocks")
        plain = _with_stem(plain, stem_channels)
        if name == arch:
            return plain
        attention = {"attn_layer": _Grouped(groups)}
        model = timm.create_model(name, num_classes=classes, **kwargs, block_args=attention)
        model = _with_stem(model, stem_channels)
    except UserError:
        raise
    except Exception as error:  # what goes to timm as it was given fails there in any way
        reason = str(error) or type(error).__name__
        raise UserError(f"--model {arch} {kwargs or ''} cannot be built: {reason}") from error
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    if unexpected or not missing:
        raise UserError(f"--model {arch}: timm's {name} has no place for SGE in its blocks; take a ResNet")
    return model


def _with_stem(model: nn.Module, channels: int) -> nn.Module:
    """The model with another number of channels between its stem and its first stage."""
    stem = getattr(model, "conv1", None)
    if channels == 64:
        return model
    if not isinstance(stem, nn.Conv2d):
        raise ValueError("--stem-channels needs a stem of one convolution")
    first = model.layer1[0]
    model.conv1 = _resized(stem, stem.in_channels, channels)
    model.bn1 = type(model.bn1)(channels)
    first.conv1 = _resized(first.conv1, channels, first.conv1.out_channels)
    # where the widths were equal there was none
    first.downsample = first.downsample or downsample_conv(64, model.feature_info[1]["num_chs"], 1)
    first.downsample[0] = _resized(first.downsample[0], channels, first.downsample[0].out_channels)
    return model


def _resized(conv: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    new = nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm starts its ResNets
    return new


class _Grouped:
    """Builds SGE with a number of groups, as timm calls an attention's class."""

    def __init__(self, groups: int):
        self.groups = groups

    def __call__(self, channels: int, **kwargs) -> SGEAttention:
        return SGEAttention(channels, self.groups, **kwargs)
