"""The input of SGE in training, computed again in the backward pass rather than kept from the forward pass.

In a residual block it is the output of the last convolution and its norm; what they got is kept anyway.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

from ..layers.sge import has_hooks, replace_saved_input
from .paper import EVAL_BN, EvalBatchNorm2d


def forget_input(result: Tensor, last: nn.Module, inner: Tensor) -> None:
    """Lets the gradient of ``result = sge.residual(last(inner), shortcut)`` compute ``last(inner)`` again.

    It is kept as ever where another call might not give the same: ``last`` or its norm has hooks or is of a class that
    is not known here, for instance a norm that processes compute together.

    Args:
        result: (N, C, H, W).
        last: the block's last convolution with its norm.
        inner: (N, C', H', W'), what ``last`` got.
    """
    norm = getattr(last, "norm", None)
    known = type(last) is Conv2d and (norm is None or type(norm) in _NORMS) and last.activation is None
    if known and not has_hooks(last) and (norm is None or not has_hooks(norm)):
        replace_saved_input(result, _again(last, inner.detach()))


def can_be_again(norm: str | type) -> bool:
    """Whether :func:`forget_input` knows a norm, as ``MODEL.RESNETS.NORM`` has it."""
    return norm in ("", "FrozenBN", "BN", "GN", EVAL_BN, EvalBatchNorm2d)


def _again(last: Conv2d, inner: Tensor) -> Callable[[], Tensor]:
    """``last(inner)`` once more, whenever it is called: the same operators on the same numbers."""
    device = inner.device.type
    autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False)
    weight, bias = last.weight.detach(), None if last.bias is None else last.bias.detach().clone()
    settings = (last.stride, last.padding, last.dilation, last.groups)
    normalize = None if last.norm is None else _NORMS[type(last.norm)](last.norm)
    versions = inner._version, weight._version

    def again() -> Tensor:
        if versions != (inner._version, weight._version):
            raise RuntimeError(
                "a block with SAVE_MEMORY computes SGE's input again in the backward pass, but its last convolution's "
                "input or weight has been modified in place since the forward pass"
            )
        with torch.no_grad(), torch.autocast(*autocast):
            x = F.conv2d(inner, weight, bias, *settings)
            return x if normalize is None else normalize(x)

    return again


# Each norm as it is now, by copies of its numbers, which are few and may change before the backward pass.


@torch.no_grad()
def _frozen(norm: FrozenBatchNorm2d) -> Callable[[Tensor], Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shift = norm.bias - norm.running_mean * scale
    scale, shift = scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)
    return lambda x: x.mul_(scale.to(x.dtype)).add_(shift.to(x.dtype))


def _batch(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """Statistics of the batch where the forward pass took them; the running ones are not updated a second time."""
    weight, bias, mean, var = map(_copy, (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    if norm.training or mean is None:
        return lambda x: F.batch_norm(x, None, None, weight, bias, True, 0.0, norm.eps)
    return lambda x: F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def _group(norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
    weight, bias = _copy(norm.weight), _copy(norm.bias)
    return lambda x: F.group_norm(x, norm.num_groups, weight, bias, norm.eps)


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


_NORMS = {FrozenBatchNorm2d: _frozen, nn.BatchNorm2d: _batch, EvalBatchNorm2d: _batch, nn.GroupNorm: _group}
