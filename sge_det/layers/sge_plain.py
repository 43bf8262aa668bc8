"""Equations 1-5 and the block tail in plain operators: what tracers, compilers and transforms see, at any size.

No Python number is taken from the size of a map, so that a trace is valid for other sizes.
"""

import torch
from torch import Tensor


def gates(x: Tensor, weight: Tensor, bias: Tensor, eps: float, normalize: bool = True) -> Tensor:
    """The gates sigmoid(a) of eq. 5.

    Args:
        x: (N, C, H, W), floating point.
        weight, bias: gamma and beta of eq. 4, (1, G, 1, 1); G divides C.
        eps: of eq. 3.
        normalize: False leaves eq. 3 out (the paper's ablation, table 3): t = s.

    Returns:
        (N, G, H, W), float64 for float64 input, else float32.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    # One number for each sample and group with as many ones as there are positions. It is taken from x: taken from a
    # tensor computed from it, ONNX's exporter makes a constant of it.
    freedom = torch.ones_like(x[:1, :1], dtype=compute).sum((2, 3), keepdim=True) - 1
    vectors = x.to(compute).unflatten(1, (weight.shape[1], -1))
    g = vectors.mean((3, 4), keepdim=True)
    if not normalize:
        return torch.sigmoid((vectors * g).sum(2) * weight.to(compute) + bias.to(compute))
    # t does not change when u, std and eps are all multiplied by one number. Where activations are large, one that
    # makes u a moderate number keeps its squares from overflowing.
    scale = g.detach().abs().amax(2, keepdim=True).clamp(min=1).reciprocal()
    scaled = g * scale * scale
    # A product and a sum, not a matmul, since autocast would take a matmul to half precision.
    u = (vectors * scaled).sum(2) - (g * scaled).sum(2)
    scale = scale.squeeze(2)
    # Where all similarities are equal, on a 1x1 map for one, u is what rounding leaves of 0 or 0 itself. The least sum
    # of squares keeps the derivatives of the root, of any order, finite there.
    u = u * freedom.clamp(max=1)
    squares = u.square().sum((2, 3), keepdim=True).clamp(min=2.3e-308 if compute == torch.float64 else 1.2e-38)
    std = (squares / freedom.clamp(min=1)).sqrt()
    t = u / (std + eps * scale * scale)
    return torch.sigmoid(t * weight.to(compute) + bias.to(compute))


def enhance(
    x: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor, eps: float, normalize: bool = True
) -> Tensor:
    """SGE(x), or relu(SGE(x) + shortcut) where a shortcut (N, C, H, W) is given; arguments as in :func:`gates`."""
    found = gates(x, weight, bias, eps, normalize).to(x.dtype).unsqueeze(2)
    # The shape is x's: that of a flattened product is a constant to ONNX's exporter.
    y = (x.unflatten(1, (weight.shape[1], -1)) * found).reshape_as(x)
    return y if shortcut is None else torch.relu(y + shortcut)
