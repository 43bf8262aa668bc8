"""The layer and the block tail, and their analytic gradient, compiled by ``torch.compile``.

The gradient that a compiler derives from the formula passes over the activation many times; the analytic one it fuses.
Sizes are (rows, C / G, H * W), each one symbol: where one is a product or a quotient of others, the inner loops divide.
So one graph serves all sizes, and there are further ones for a map of one position, another dtype or memory format, a
call without a shortcut and one in place.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

_TINY = {torch.float32: 1.2e-38, torch.float64: 2.3e-308}


def forward(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float, inplace: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As :func:`sge_eager.forward`; what it keeps is g, scale and the scaled std."""
    out = x if inplace else torch.empty_like(x)
    rows, with_it, filled = _in_rows(weight.shape[1], x, shortcut, out)
    # one tensor, not two that share memory
    filled = rows if inplace else filled
    arguments = (rows, with_it, filled, _of_rows(rows, weight, bias), eps)
    if torch.is_autocast_enabled(x.device.type):  # compiled code would depend on it
        with torch.autocast(x.device.type, enabled=False):
            *kept, _ = _compiled_forward(*arguments)
    else:
        *kept, _ = _compiled_forward(*arguments)
    if inplace:
        increment_version(x)
    return out, tuple(kept)


def backward(
    x: Tensor,
    grad: Tensor,
    out: Tensor | None,
    kept: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """As :func:`sge_eager.backward`."""
    rows = _in_rows(weight.shape[1], x, grad, out)
    grad_x, grad_shortcut, of_rows = _compiled_backward(*rows, *kept, _of_rows(rows[0], weight, bias), eps)
    sums = of_rows.view(2, -1, *weight.shape[1:]).sum(1).split(1)
    return _whole(grad_x, x) if needs[0] else None, _whole(grad_shortcut, x) if needs[1] else None, *sums


def _in_rows(groups: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors (N, C, H, W) of one dense memory format in another shape, on the same memory.

    They are none of autograd's views: compiled code would depend on what they are views of.

    Returns:
        (N * G, C / G, H * W); in channels_last, where samples and groups do not lie at one stride,
        (N, G, C / G, H * W).
    """
    samples, channels, height, width = tensors[0].shape
    if tensors[0].is_contiguous():
        shape = (samples * groups, channels // groups, height * width)
        return [None if tensor is None else tensor.view(shape).data for tensor in tensors]
    shape = (samples, height * width, groups, channels // groups)
    return [
        None if tensor is None else tensor.permute(0, 2, 3, 1).view(shape).permute(0, 2, 3, 1).data
        for tensor in tensors
    ]


def _whole(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of :func:`_in_rows`, in the memory format of ``like``."""
    if rows.dim() == 3:
        return rows.reshape(like.shape)
    samples, channels, height, width = like.shape
    return rows.permute(0, 3, 1, 2).reshape(samples, height, width, channels).permute(0, 3, 1, 2)


def _of_rows(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Weight and bias, (1, G, 1, 1), for each row, in the dtype of the computation.

    Small maps are done sooner than a few calls of operators: here it is one that copies.

    Returns:
        (2, N * G, 1, 1), in channels_last (2, 1, G, 1, 1).
    """
    compute = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if rows.dim() == 4:
        return torch.stack((weight, bias)).to(compute)
    samples = rows.shape[0] // weight.numel()
    return torch.cat((weight,) * samples + (bias,) * samples).view(2, -1, 1, 1).data.to(compute)


def _forward(
    x: Tensor, shortcut: Tensor | None, out: Tensor, parameters: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills ``out``; returns g, scale, the scaled std and the gate."""
    gamma, beta = parameters.unbind()
    wide = x.to(gamma.dtype)
    g = wide.mean(-1, keepdim=True)
    scale = g.abs().amax(-2, keepdim=True).clamp(min=1).reciprocal()
    u = _centred_similarity(wide, g, scale)
    std = (u.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)).sqrt()
    gate = torch.sigmoid(u * (gamma / _denominator(std, scale, eps)) + beta).to(x.dtype)
    y = x * gate
    out.copy_(y if shortcut is None else torch.relu(y + shortcut))
    # What is returned is computed once; as a mere step on the way, the gate would be for each channel.
    return g, scale, std, gate


def _backward(
    x: Tensor,
    grad: Tensor,
    out: Tensor | None,
    g: Tensor,
    scale: Tensor,
    std: Tensor,
    parameters: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and the shortcut, and those of gamma and beta for each row, as the parameters come.

    See ``sge_eager.py`` for the chain.
    """
    gamma, beta = parameters.unbind()
    if out is not None:
        grad = torch.where(out <= 0, torch.zeros_like(grad), grad)
    wide, upstream = x.to(g.dtype), grad.to(g.dtype)
    positions = x.shape[-1]
    u = _centred_similarity(wide, g, scale)
    denominator = _denominator(std, scale, eps)
    slope = gamma / denominator
    gate = torch.sigmoid(u * slope + beta)
    grad_a = (upstream * (wide * scale)).sum(-2, keepdim=True) * gate * (1 - gate)
    grad_beta = grad_a.sum(-1, keepdim=True)
    grad_gamma = (grad_a * u).sum(-1, keepdim=True) / denominator
    through_std = grad_gamma / std.clamp(min=_TINY[g.dtype]) / max(positions - 1, 1)
    grad_u = grad_a - grad_beta / positions - u * through_std
    grad_g = (wide * grad_u).sum(-1, keepdim=True)
    slope = slope * scale
    grad_x = upstream * gate + grad_g * (slope / positions) + g * slope * grad_u
    return grad_x.to(x.dtype), grad, torch.stack((grad_gamma, grad_beta)) / scale


def _centred_similarity(x: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    if x.shape[-1] == 1:  # the two sums differ by rounding
        return torch.zeros_like(scale)
    scaled = g * scale * scale
    return (x * scaled).sum(-2, keepdim=True) - (g * scaled).sum(-2, keepdim=True)


def _denominator(std: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (std + eps * scale * scale).clamp(min=_TINY[std.dtype])


_compiled_forward, _compiled_backward = (
    torch.compile(function, dynamic=True, fullgraph=True) for function in (_forward, _backward)
)
