"""Spatial Group-wise Enhance (arXiv 1905.09646, section 3): the layer, its gradient and the fused block tail.

Per sample and group, with the c channels of a group as the vector x_i at position i of M = H * W:

    g   = mean_i x_i                          eq. 1
    s_i = g . x_i                             eq. 2
    t_i = (s_i - mean(s)) / (std(s) + eps)    eq. 3, unbiased std
    a_i = gamma * t_i + beta                  eq. 4
    y_i = x_i * sigmoid(a_i)                  eq. 5

mean(s) is g . g, so no pass over the similarities is spent on it. Eager mode computes the layer block by block, so
that a block of the activation stays in the cache from its mean to its gated output, and the gradient recomputes the
small maps from x rather than keeping them. Tracing, scripting, ``torch.compile`` and export see plain operators.
"""

import itertools

import torch
from torch import Tensor, nn

# Bytes of activation that one round of passes covers on the CPU. A block, its shortcut and its output should fit the
# last-level cache; smaller blocks lose more to the cost of calling operators.
_BLOCK_BYTES = 8 << 20


class SpatialGroupEnhance(nn.Module):
    """Gates each position of each channel group by its similarity to the group's mean (eq. 1-5).

    Statistics are taken in float32 (float64 for float64 input) whatever the input's dtype; the output has the
    input's. A 1x1 map, whose unbiased std does not exist, has t = 0 and so the gate sigmoid(beta).

    Args:
        groups: number of channel groups G; the input's channels must be a multiple of it.
        eps: added to the standard deviation, outside the root.

    Attributes:
        weight: gamma of eq. 4, shape (1, G, 1, 1), starts at 0.
        bias: beta of eq. 4, shape (1, G, 1, 1), starts at 1: the gate starts at sigmoid(1) = 0.731 everywhere.
    """

    def __init__(self, groups: int = 64, eps: float = 1e-5):
        super().__init__()
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, groups, 1, 1))

    def forward(self, x: Tensor, shortcut: Tensor | None = None, inplace: bool = False) -> Tensor:
        """Returns SGE(x), or relu(SGE(x) + shortcut) where a shortcut is given.

        Args:
            x: (N, C, H, W), any floating dtype and memory format; N may be 0.
            shortcut: (N, C, H, W) or None.
            inplace: the result may take the place of ``x`` where no gradient is recorded.

        Raises:
            ValueError: C is not a multiple of the number of groups, or the shapes differ.
        """
        self._check(x, shortcut)
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return self._plain(x, shortcut)
        return self._eager(x, shortcut, inplace)

    def residual(self, x: Tensor, shortcut: Tensor, inplace: bool = False) -> Tensor:
        """Returns relu(SGE(x) + shortcut), the tail of a residual block, with the fewest passes over memory.

        It goes through ``forward``, so that hooks on the layer see it. Arguments are those of :meth:`forward`.
        """
        return self(x, shortcut, inplace)

    def gates(self, x: Tensor) -> Tensor:
        """Returns the gates sigmoid(a) of eq. 5 for ``x`` (N, C, H, W): (N, G, H, W), float32 or float64."""
        self._check(x, None)
        return self._plain_gates(x)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}"

    def _check(self, x: Tensor, shortcut: Tensor | None) -> None:
        if x.dim() != 4:
            raise ValueError(f"SpatialGroupEnhance takes (N, C, H, W), got {x.dim()} dimensions")
        if torch.jit.is_tracing():  # sizes are tensors there, and a branch on them would be fixed in the trace
            return
        if x.shape[1] % self.groups != 0:
            raise ValueError(f"{x.shape[1]} channels cannot be divided into {self.groups} groups")
        if shortcut is not None and shortcut.shape != x.shape:
            raise ValueError(f"the shortcut has the shape {shortcut.shape}, the input {x.shape}")

    def _plain(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        gates = self._plain_gates(x).to(x.dtype).unsqueeze(2)
        y = (x.unflatten(1, (self.groups, -1)) * gates).flatten(1, 2)
        return y if shortcut is None else torch.relu(y + shortcut)

    def _plain_gates(self, x: Tensor) -> Tensor:
        # Operators only, no Python number from a shape: traces stay valid for other sizes. A product and a sum, not a
        # matmul, since autocast would take a matmul to half precision.
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.to(compute).unflatten(1, (self.groups, -1))
        g = x.mean((3, 4), keepdim=True)
        s = (x * g).sum(2)
        u = s - (g * g).sum(2)
        freedom = torch.ones_like(u[:1, :1]).sum((2, 3), keepdim=True) - 1
        # The norm's gradient is 0, not NaN, where all similarities are equal.
        std = torch.linalg.vector_norm(u, dim=(2, 3), keepdim=True) / freedom.clamp(min=1).sqrt()
        # On a 1x1 map u is only what rounding leaves of it.
        t = u * freedom.clamp(max=1) / (std + self.eps)
        return torch.sigmoid(t * self.weight.to(compute) + self.bias.to(compute))

    @torch.jit.unused
    def _eager(self, x: Tensor, shortcut: Tensor | None, inplace: bool) -> Tensor:
        if any(isinstance(size, torch.SymInt) for size in x.shape):  # the number of blocks would be fixed in the graph
            return self._plain(x, shortcut)
        if shortcut is not None and shortcut.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, shortcut.dtype)
            x, shortcut = x.to(dtype), shortcut.to(dtype)
        x = _dense(x)
        if shortcut is not None:
            shortcut = _laid_out_like(shortcut, x)
        tensors = (x, shortcut, self.weight, self.bias)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return _Enhance.apply(x, shortcut, self.weight, self.bias, self.eps)
        out = x if inplace else torch.empty_like(x)
        _enhance(x, shortcut, self.weight, self.bias, self.eps, out)
        return out


class _Enhance(torch.autograd.Function):
    """The layer with its analytic gradient; keeps x, the output where there is a ReLU, and O(N * C) numbers."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, eps):
        out = torch.empty_like(x)
        rows = _enhance(x, shortcut, weight, bias, eps, out)
        mask = None if shortcut is None else out
        if any(ctx.needs_input_grad[i] for i in (0, 2, 3)):
            ctx.save_for_backward(x, mask, *rows)
        else:
            ctx.save_for_backward(None, mask)
        ctx.parameter_shape = weight.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, out, *rows = ctx.saved_tensors
        needs_x, needs_shortcut, needs_weight, needs_bias, _ = ctx.needs_input_grad
        if x is None:
            return None, torch.ops.aten.threshold_backward(grad, out, 0), None, None, None
        grad_x = torch.empty_like(x) if needs_x else None
        grad_shortcut = torch.empty_like(x) if needs_shortcut else None
        blocks = _blocks(ctx.parameter_shape[1], x, _laid_out_like(grad, x), out, grad_x, grad_shortcut, *rows)
        grad_gamma, grad_beta = _cat([_block_backward(*block) for block in blocks])
        grad_weight = grad_gamma.view(-1, *ctx.parameter_shape[1:]).sum(0, keepdim=True) if needs_weight else None
        grad_bias = grad_beta.view(-1, *ctx.parameter_shape[1:]).sum(0, keepdim=True) if needs_bias else None
        return grad_x, grad_shortcut, grad_weight, grad_bias, None


def _enhance(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> tuple[Tensor, ...]:
    """Writes SGE(x), or relu(SGE(x) + shortcut), into ``out``, which may be ``x`` itself.

    Returns:
        for each of the N * G rows, in the dtype of the computation: g of eq. 1 (rows, C / G, 1); the std of eq. 3,
        std + eps, gamma and beta (rows, 1, 1).
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma, beta = (p.to(compute).expand(x.shape[0], -1, -1, -1).reshape(-1, 1, 1) for p in (weight, bias))
    blocks = _blocks(weight.numel(), x, shortcut, out, gamma, beta)
    return *_cat([_block_forward(*block, eps) for block in blocks]), gamma, beta


def _block_forward(
    x: Tensor, shortcut: Tensor | None, out: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(gamma.dtype)
    g = wide.mean(2, keepdim=True)
    gate = _centred_similarity(wide, g)
    std = torch.linalg.vector_norm(gate, dim=2, keepdim=True).div_(max(x.shape[2] - 1, 1) ** 0.5)
    denominator = std + eps
    # Two passes over the map cost less than an addcmul, which is not vectorised where an operand is one number a row.
    gate = gate.mul_(gamma / denominator).add_(beta).sigmoid_().to(x.dtype)
    if shortcut is None:
        torch.mul(x, gate, out=out)
    else:
        torch.addcmul(shortcut, x, gate, out=out).relu_()
    return g, std, denominator


def _block_backward(
    x: Tensor,
    grad: Tensor,
    out: Tensor | None,
    grad_x: Tensor | None,
    grad_shortcut: Tensor | None,
    g: Tensor,
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
    positions = x.shape[2]
    u = _centred_similarity(wide, g)
    scale = gamma / denominator
    gate = (u * scale).add_(beta).sigmoid_()
    product = grad_x if grad_x is not None and grad_x.dtype == g.dtype else torch.empty_like(wide)
    # As a product with ones, the sum over a few channels is faster than ``sum``.
    grad_a = torch.bmm(g.new_ones(g.mT.shape), torch.mul(grad, wide, out=product), out=torch.empty_like(u))
    grad_a = torch.ops.aten.sigmoid_backward.grad_input(grad_a, gate, grad_input=grad_a)
    grad_beta = grad_a.sum(2, keepdim=True)
    grad_gamma = (grad_a * u).sum(2, keepdim=True).div_(denominator)
    if grad_x is not None:
        # Where all similarities are equal, u and the gradient of the std are 0: keep 0 / 0 out of it.
        through_std = grad_gamma / std.clamp(min=torch.finfo(std.dtype).tiny)
        grad_u = grad_a.sub_(grad_beta / positions).sub_(u.mul_(through_std.div_(max(positions - 1, 1))))
        # What remains of the chain, the factor ``scale``, is cheaper on g than on the map.
        grad_g = torch.bmm(grad_u, wide.mT, out=torch.empty_like(g.mT)).mT
        torch.addcmul(grad_g * (scale / positions), grad, gate, out=product).addcmul_(g * scale, grad_u)
        if product is not grad_x:
            grad_x.copy_(product)
    return grad_gamma, grad_beta


def _centred_similarity(x: Tensor, g: Tensor) -> Tensor:
    """s - mean(s) of eq. 2 for rows x (rows, C / G, H * W) and g (rows, C / G, 1): (rows, 1, H * W)."""
    u = x.new_empty(x.shape[0], 1, x.shape[2])
    if x.shape[2] == 1:  # the two products differ by rounding
        return u.zero_()
    # A product with an ``out`` is one that autocast does not take to half precision.
    return torch.bmm(g.mT, x, out=u).sub_(g.square().sum(1, keepdim=True))


def _blocks(groups: int, *tensors: Tensor | None) -> list[tuple[Tensor | None, ...]]:
    """Cuts tensors into blocks of the N * G rows, a row being one group of one sample.

    Args:
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
    step = rows
    if x.device.type == "cpu":
        fitting = _BLOCK_BYTES // max(x.element_size() * shape[1] * shape[2], 1)
        # A block's gate map, 1 / shape[1] of it, should stay below a tenth of the activation.
        step = max(min(fitting, rows * shape[1] // 12), 1)

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


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _laid_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)


def _cat(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Joins what the blocks returned."""
    return blocks[0] if len(blocks) == 1 else tuple(map(torch.cat, zip(*blocks, strict=True)))
