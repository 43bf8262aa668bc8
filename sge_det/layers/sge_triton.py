"""The layer and the block tail, and their gradient, as Triton kernels: one program for each row, a group of a sample.

Where a row fits on the chip it is read once, forward, and x and the gradient are, backward; else it is read again for
each step, from the cache at best. Statistics are in float32 whatever the dtype of the input. Sums over a row are taken
in one program and those over samples afterwards, in a fixed order, so that gradients do not differ between runs.

Nobody has timed these kernels yet: they are off by default. Their numbers are tested in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

# Numbers of a row that a program keeps, and those of a part of a row that is too long for that.
_ON_CHIP, _PART = 16384, 4096
_TINY = tl.constexpr(1.2e-38)


def forward(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float, inplace: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As :func:`sge_eager.forward`, for all dtypes but float64; what it keeps is g, scale and the scaled std."""
    _check(x)
    out = x if inplace else torch.empty_like(x)
    rows = x.shape[0] * weight.numel()
    g = x.new_empty(rows, x.shape[1] // weight.numel(), dtype=torch.float32)
    scale, std = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if out.numel():
        tensors = (x, x if shortcut is None else shortcut, out, weight, bias, g, scale, std)
        _forward_rows[(rows,)](*tensors, eps, *_sizes(x, weight), TAIL=shortcut is not None, **_blocks(g, x, 1))
    return out, (g, scale, std)


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
    _check(x)
    g, scale, std = kept
    grad_x, grad_shortcut = (torch.empty_like(x) if need else None for need in needs)
    grad_gamma, grad_beta = (torch.zeros_like(scale) for _ in range(2))
    if x.numel():
        filled = (x if grad_x is None else grad_x, x if grad_shortcut is None else grad_shortcut, grad_gamma, grad_beta)
        tensors = (x, grad, x if out is None else out, weight, bias, g, scale, std, *filled)
        flags = {"TAIL": out is not None, "NEEDS_X": needs[0], "NEEDS_SHORTCUT": needs[1]}
        _backward_rows[(len(scale),)](*tensors, eps, *_sizes(x, weight), **flags, **_blocks(g, x, 2))
    sums = (rows.view(-1, *weight.shape[1:]).sum(0, keepdim=True) for rows in (grad_gamma, grad_beta))
    return grad_x, grad_shortcut, *sums


def _check(x: Tensor) -> None:
    if not x.is_cuda and not isinstance(_forward_rows, InterpretedFunction):
        raise RuntimeError(f"Triton's kernels take tensors on a GPU, not on {x.device}")


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    """G, H * W, and the strides of samples, channels and positions."""
    _, channels, height, width = x.shape
    positions = height * width
    # Not those of x: where a size is 1 they may be anything.
    return weight.numel(), positions, channels * positions, *((positions, 1) if x.is_contiguous() else (1, channels))


def _blocks(g: Tensor, x: Tensor, tensors: int) -> dict[str, int | bool]:
    """The block that a program works on, where it holds as many activations at once as ``tensors`` says."""
    channels, positions = g.shape[1], x.shape[2] * x.shape[3]
    block_c, block_m = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    on_chip = block_c * block_m * tensors <= _ON_CHIP
    if not on_chip:
        block_m = min(max(_PART // (block_c * tensors), 16), block_m)
    warps = 8 if block_c * block_m * tensors >= _PART else 4
    return {"CHANNELS": channels, "BLOCK_C": block_c, "BLOCK_M": block_m, "ON_CHIP": on_chip, "num_warps": warps}


@triton.jit
def _part(
    pointer,
    base,
    start,
    positions,
    stride_c,
    stride_m,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Channels and positions from ``start`` on of a row, float32, 0 beyond its end."""
    c = tl.arange(0, BLOCK_C)[:, None]
    m = start + tl.arange(0, BLOCK_M)[None, :]
    inside = (c < CHANNELS) & (m < positions)
    return tl.load(pointer + base + c * stride_c + m.to(tl.int64) * stride_m, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_part(
    pointer,
    value,
    base,
    start,
    positions,
    stride_c,
    stride_m,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)[:, None]
    m = start + tl.arange(0, BLOCK_M)[None, :]
    inside = (c < CHANNELS) & (m < positions)
    tl.store(pointer + base + c * stride_c + m.to(tl.int64) * stride_m, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _centred_similarity(x, scaled, product, start, positions, BLOCK_M: tl.constexpr):
    """u of the formula for a part of a row: 0 beyond its end, and on a 1x1 map, where rounding would remain."""
    m = start + tl.arange(0, BLOCK_M)
    return tl.where((m < positions) & (positions > 1), tl.sum(x * scaled[:, None], 0) - product, 0.0)


@triton.jit
def _forward_rows(
    x_pointer,
    shortcut_pointer,
    out_pointer,
    weight_pointer,
    bias_pointer,
    g_pointer,
    scale_pointer,
    std_pointer,
    eps,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_m,
    TAIL: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ON_CHIP: tl.constexpr,
):
    row = tl.program_id(0)
    group = row % groups
    base = (row // groups).to(tl.int64) * stride_n + group * CHANNELS * stride_c
    c = tl.arange(0, BLOCK_C)
    if ON_CHIP:
        x = _part(x_pointer, base, 0, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
        g = tl.sum(x, 1) / positions
    else:
        total = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, positions, BLOCK_M):
            part = _part(x_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
            total += tl.sum(part, 1)
        g = total / positions
    scale = 1.0 / tl.maximum(tl.max(tl.abs(g), 0), 1.0)
    scaled = g * scale * scale
    product = tl.sum(scaled * g, 0)
    if ON_CHIP:
        u = _centred_similarity(x, scaled, product, 0, positions, BLOCK_M)
        squares = tl.sum(u * u, 0)
    else:
        squares = 0.0
        for start in range(0, positions, BLOCK_M):
            part = _part(x_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
            similarity = _centred_similarity(part, scaled, product, start, positions, BLOCK_M)
            squares += tl.sum(similarity * similarity, 0)
    std = tl.sqrt(squares / tl.maximum(positions - 1, 1))
    slope = tl.load(weight_pointer + group).to(tl.float32) / tl.maximum(std + eps * scale * scale, _TINY)
    beta = tl.load(bias_pointer + group).to(tl.float32)
    for start in range(0, positions, BLOCK_M):
        if ON_CHIP:
            y = x * tl.sigmoid(u * slope + beta)[None, :]
        else:
            part = _part(x_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
            similarity = _centred_similarity(part, scaled, product, start, positions, BLOCK_M)
            y = part * tl.sigmoid(similarity * slope + beta)[None, :]
        if TAIL:
            y += _part(shortcut_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
            y = tl.where(y <= 0.0, 0.0, y)  # not a maximum, which would take a NaN for 0
        _store_part(out_pointer, y, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
    tl.store(g_pointer + row * CHANNELS + c, g, mask=c < CHANNELS)
    tl.store(scale_pointer + row, scale)
    tl.store(std_pointer + row, std)


@triton.jit
def _upstream_part(
    grad_pointer,
    out_pointer,
    base,
    start,
    positions,
    stride_c,
    stride_m,
    TAIL: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The gradient of SGE(x): that of the result, 0 where the ReLU was."""
    grad = _part(grad_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
    if TAIL:
        out = _part(out_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
        grad = tl.where(out <= 0.0, 0.0, grad)
    return grad


@triton.jit
def _gradient_of_a(x, grad, gate, scale):
    """Of eq. 4's a, multiplied by ``scale`` so that its products with x do not overflow."""
    return tl.sum(x * scale * grad, 0) * gate * (1.0 - gate)


@triton.jit
def _backward_rows(
    x_pointer,
    grad_pointer,
    out_pointer,
    weight_pointer,
    bias_pointer,
    g_pointer,
    scale_pointer,
    std_pointer,
    grad_x_pointer,
    grad_shortcut_pointer,
    grad_gamma_pointer,
    grad_beta_pointer,
    eps,
    groups,
    positions,
    stride_n,
    stride_c,
    stride_m,
    TAIL: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_SHORTCUT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ON_CHIP: tl.constexpr,
):
    row = tl.program_id(0)
    group = row % groups
    base = (row // groups).to(tl.int64) * stride_n + group * CHANNELS * stride_c
    c = tl.arange(0, BLOCK_C)
    g = tl.load(g_pointer + row * CHANNELS + c, mask=c < CHANNELS, other=0.0)
    scale = tl.load(scale_pointer + row)
    std = tl.load(std_pointer + row)
    scaled = g * scale * scale
    product = tl.sum(scaled * g, 0)
    denominator = tl.maximum(std + eps * scale * scale, _TINY)
    slope = tl.load(weight_pointer + group).to(tl.float32) / denominator
    beta = tl.load(bias_pointer + group).to(tl.float32)
    sum_a, sum_au = 0.0, 0.0
    if ON_CHIP:
        x = _part(x_pointer, base, 0, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
        grad = _upstream_part(
            grad_pointer, out_pointer, base, 0, positions, stride_c, stride_m, TAIL, CHANNELS, BLOCK_C, BLOCK_M
        )
    for start in range(0, positions, BLOCK_M):
        if not ON_CHIP:
            x = _part(x_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
            grad = _upstream_part(
                grad_pointer, out_pointer, base, start, positions, stride_c, stride_m, TAIL, CHANNELS, BLOCK_C, BLOCK_M
            )
        u = _centred_similarity(x, scaled, product, start, positions, BLOCK_M)
        grad_a = _gradient_of_a(x, grad, tl.sigmoid(u * slope + beta), scale)
        sum_a += tl.sum(grad_a, 0)
        sum_au += tl.sum(grad_a * u, 0)
    grad_gamma = sum_au / denominator
    tl.store(grad_gamma_pointer + row, grad_gamma / scale)
    tl.store(grad_beta_pointer + row, sum_a / scale)
    # Where all similarities are equal, u and the gradient of the std are 0: keep 0 / 0 out of it.
    through_std = grad_gamma / tl.maximum(std, _TINY) / tl.maximum(positions - 1, 1)
    grad_g = tl.zeros((BLOCK_C,), tl.float32)
    if NEEDS_X:
        for start in range(0, positions, BLOCK_M):
            if not ON_CHIP:
                x = _part(x_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
                grad = _upstream_part(
                    grad_pointer,
                    out_pointer,
                    base,
                    start,
                    positions,
                    stride_c,
                    stride_m,
                    TAIL,
                    CHANNELS,
                    BLOCK_C,
                    BLOCK_M,
                )
            u = _centred_similarity(x, scaled, product, start, positions, BLOCK_M)
            grad_a = _gradient_of_a(x, grad, tl.sigmoid(u * slope + beta), scale)
            # x is 0 beyond the row's end, so that what stands there for the gradient of u counts for nothing
            grad_g += tl.sum(x * (grad_a - sum_a / positions - u * through_std)[None, :], 1)
    for start in range(0, positions, BLOCK_M):
        if not ON_CHIP:
            grad = _upstream_part(
                grad_pointer, out_pointer, base, start, positions, stride_c, stride_m, TAIL, CHANNELS, BLOCK_C, BLOCK_M
            )
        if NEEDS_SHORTCUT:
            _store_part(
                grad_shortcut_pointer, grad, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M
            )
        if NEEDS_X:
            if not ON_CHIP:
                x = _part(x_pointer, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
            u = _centred_similarity(x, scaled, product, start, positions, BLOCK_M)
            gate = tl.sigmoid(u * slope + beta)
            grad_u = _gradient_of_a(x, grad, gate, scale) - sum_a / positions - u * through_std
            direct = grad * gate[None, :] + (grad_g * (slope * scale / positions))[:, None]
            grad_x = direct + (g * slope * scale)[:, None] * grad_u[None, :]
            _store_part(grad_x_pointer, grad_x, base, start, positions, stride_c, stride_m, CHANNELS, BLOCK_C, BLOCK_M)
