"""The layer and the block tail in PyTorch's eager operators, worked through block by block.

A block of the activation stays in the cache from its mean to its gated output, and the gradient recomputes the small
maps from x rather than keeping them. See ``sge.py`` for the equations and ``sge_plain.py`` for what ``scale`` is.
"""

import itertools

import torch
from torch import Tensor

# Bytes of activation that one round of passes covers on the CPU. A block, its shortcut and its output should fit the
# last-level cache; smaller blocks lose more to the cost of calling operators.
_BLOCK_BYTES = 8 << 20
# Up to here all is one block: the calls of operators take longer than what they do.
_SMALL_BYTES = 1 << 20


def forward(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float, inplace: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Computes SGE(x), or relu(SGE(x) + shortcut).

    Args:
        x: (N, C, H, W), dense in either memory format.
        shortcut: None, or as ``x`` in shape, dtype and strides.
        weight, bias: (1, G, 1, 1).
        inplace: the result takes the place of ``x``.

    Returns:
        the result; and for :func:`backward`, in the dtype of the computation: g of eq. 1 (rows, C / G, 1); scale, the
        scaled std of eq. 3 and the denominator, gamma and beta (rows, 1, 1); rows are N * G, or where all is one block
        (N, G), or (1, G) for gamma and beta.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x if inplace else torch.empty_like(x)
    gamma, beta = weight.to(compute), bias.to(compute)
    groups = weight.shape[1]
    if _is_one_block(groups, x):
        shape = _in_groups(groups, x)
        views = [None if tensor is None else tensor.view(shape) for tensor in (x, shortcut, out)]
        return out, (*_block_forward(*views, gamma, beta, eps), gamma, beta)
    gamma, beta = (p.expand(x.shape[0], -1, -1, -1).reshape(-1, 1, 1) for p in (gamma, beta))
    parts = _blocks(groups, x, shortcut, out, gamma, beta)
    return out, (*_joined([_block_forward(*block, eps) for block in parts]), gamma, beta)


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
    """The gradients of :func:`forward`.

    Args:
        x, weight, bias, eps: of the forward pass.
        grad: of the result; same strides as ``x``.
        out: the result where it went through the ReLU, else None.
        kept: what the forward pass returned for this.
        needs: whether the gradients of x and of the shortcut are wanted.

    Returns:
        the gradients of x and of the shortcut, or None; those of weight and bias in the dtype of the computation.
    """
    grad_x, grad_shortcut = (torch.empty_like(x) if need else None for need in needs)
    tensors = (x, grad, out, grad_x, grad_shortcut)
    if _is_one_block(weight.numel(), x):
        shape = _in_groups(weight.numel(), x)
        sums = _block_backward(*(None if tensor is None else tensor.view(shape) for tensor in tensors), *kept)
    else:
        parts = _blocks(weight.numel(), *tensors, *kept)
        sums = _joined([_block_backward(*block) for block in parts])
    return grad_x, grad_shortcut, *(rows.view(-1, *weight.shape[1:]).sum(0, keepdim=True) for rows in sums)


def _block_forward(
    x: Tensor, shortcut: Tensor | None, out: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = x.to(gamma.dtype)
    # of a map without positions 0, where a mean would be 0 / 0
    g = wide.mean(-1, keepdim=True) if x.shape[-1] else wide.sum(-1, keepdim=True)
    scale = g.abs().amax(-2, keepdim=True).clamp_(min=1).reciprocal_()
    gate = _centred_similarity(wide, g, scale)
    std = torch.linalg.vector_norm(gate, dim=-1, keepdim=True).mul_(max(x.shape[-1] - 1, 1) ** -0.5)
    denominator = (scale * scale).mul_(eps).add_(std).clamp_(min=torch.finfo(std.dtype).tiny)
    # Two passes over the map cost less than an addcmul, which is not vectorised where an operand is one number a row.
    gate = gate.mul_(gamma / denominator).add_(beta).sigmoid_().to(x.dtype)
    if shortcut is None:
        torch.mul(x, gate, out=out)
    else:
        torch.addcmul(shortcut, x, gate, out=out).relu_()
    return g, scale, std, denominator


def _block_backward(
    x: Tensor,
    grad: Tensor,
    out: Tensor | None,
    grad_x: Tensor | None,
    grad_shortcut: Tensor | None,
    g: Tensor,
    scale: Tensor,
    std: Tensor,
    denominator: Tensor,
    gamma: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:
    """Fills ``grad_x`` and ``grad_shortcut``, where wanted, and returns the gradients of each row's gamma and beta."""
    if out is not None:
        grad_shortcut = torch.empty_like(grad) if grad_shortcut is None else grad_shortcut
        grad = torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad_shortcut)
    wide, grad = x.to(g.dtype), grad.to(g.dtype)
    positions = x.shape[-1]
    u = _centred_similarity(wide, g, scale)
    slope = gamma / denominator
    gate = (u * slope).add_(beta).sigmoid_()
    product = grad_x if grad_x is not None and grad_x.dtype == g.dtype else torch.empty_like(wide)
    # As a product with a vector, the sum over a few channels is faster than ``sum``. The gradients of a and of u are
    # held multiplied by ``scale``, so that their products with x do not overflow.
    grad_a = _product(scale.expand(g.mT.shape), torch.mul(grad, wide, out=product))
    grad_a = torch.ops.aten.sigmoid_backward.grad_input(grad_a, gate, grad_input=grad_a)
    grad_beta = grad_a.sum(-1, keepdim=True)
    grad_gamma = (grad_a * u).sum(-1, keepdim=True).div_(denominator)
    if grad_x is not None:
        # Where all similarities are equal, u and the gradient of the std are 0: keep 0 / 0 out of it.
        through_std = grad_gamma / std.clamp(min=torch.finfo(std.dtype).tiny)
        grad_u = grad_a.sub_(grad_beta / positions).sub_(u.mul_(through_std.div_(max(positions - 1, 1))))
        slope = slope.mul_(scale)
        # What remains of the chain, the factor ``slope``, is cheaper on g than on the map.
        grad_g = _product(grad_u, wide.mT).mT
        torch.addcmul(grad_g * (slope / positions), grad, gate, out=product).addcmul_(g * slope, grad_u)
        if product is not grad_x:
            grad_x.copy_(product)
    return grad_gamma.div_(scale), grad_beta.div_(scale)


def _centred_similarity(x: Tensor, g: Tensor, scale: Tensor) -> Tensor:
    """s - mean(s) of eq. 2, multiplied by the square of ``scale``.

    Args:
        x: (rows, C / G, H * W) or (N, G, C / G, H * W).
        g: (..., C / G, 1).
        scale: (..., 1, 1).

    Returns:
        (..., 1, H * W).
    """
    if x.shape[-1] == 1:  # the two products differ by rounding
        return torch.zeros_like(scale)
    scaled = (g * scale).mul_(scale)  # the square by itself may vanish
    return _product(scaled.mT, x).sub_(scaled.mul_(g).sum(-2, keepdim=True))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices (..., I, J) and (..., J, K)."""
    # With an ``out`` it is one that autocast does not take to half precision.
    out = b.new_empty(*b.shape[:-2], a.shape[-2], b.shape[-1])
    if b.dim() == 3:
        return torch.bmm(a, b, out=out)
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _is_one_block(groups: int, x: Tensor) -> bool:
    """Whether all rows of ``x`` (N, C, H, W) are one block, which is worked through without cutting anything."""
    return x.is_contiguous() and _rows_in_block(groups, x, x.shape[0] * groups) >= x.shape[0] * groups


def _in_groups(groups: int, x: Tensor) -> tuple[int, int, int, int]:
    samples, channels, height, width = x.shape
    return samples, groups, channels // groups, height * width


def _rows_in_block(groups: int, x: Tensor, rows: int) -> int:
    """How many of ``rows`` rows of ``x`` (N, C, H, W) make a block."""
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or size <= _SMALL_BYTES:
        return rows
    channels = x.shape[1] // groups
    fitting = _BLOCK_BYTES // max(x.element_size() * channels * x.shape[2] * x.shape[3], 1)
    # A block's gate map, 1 / channels of it, should stay below a tenth of the activation.
    return max(min(fitting, rows * channels // 12), 1)


def _blocks(groups: int, *tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Cuts tensors into blocks of the N * G rows, a row being one group of one sample.

    Args:
        groups: G.
        tensors: the first is (N, C, H, W) and dense in either memory format, the others are the same in shape and
            strides, or (N * G, ..., ...), or None.

    Returns:
        for each block a tuple with, for each tensor, its view (rows, C / G, H * W) or (rows, ..., ...), or None.
    """
    x = tensors[0]
    samples, channels, height, width = x.shape
    # In channels_last the rows of different samples do not lie at one stride: a block cannot span samples.
    contiguous = x.is_contiguous()
    rows = samples * groups if contiguous else groups
    shape = (rows, channels // groups, height * width)
    step = _rows_in_block(groups, x, rows)

    def cut(tensor: Tensor | None):
        if tensor is None:
            return itertools.repeat(None)
        if contiguous:
            parts = [tensor.view(shape) if tensor.dim() == 4 else tensor]
        else:
            parts = [sample.view(shape) for sample in tensor] if tensor.dim() == 4 else tensor.split(groups)
        if step >= rows:
            return parts
        return [part[start : start + step] for part in parts for start in range(0, rows, step)]

    return list(zip(*map(cut, tensors), strict=False))


def _joined(results: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Joins what the blocks returned."""
    return results[0] if len(results) == 1 else tuple(map(torch.cat, zip(*results, strict=True)))
