"""Runs the Triton kernels in Triton's interpreter and prints how far each case is from the formula, as JSON.

A process of its own, since the variable TRITON_INTERPRET counts when Triton's functions are made.
"""

import json
import sys
import warnings

import torch
from sge_formula import laid_out, make_layer, random, textbook

from sge_det.layers import sge_triton

GROUPS = 2
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def difference(value, expected):
    return ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def run(dtype, layout, tail, on_chip, shape, magnitude=1.0, needs=(True, True)):
    sge_triton._ON_CHIP, sge_triton._PART = (16384, 4096) if on_chip else (0, 64)
    layer = make_layer(GROUPS, dtype=torch.float32, kernel="triton")
    x, shortcut, upstream = (
        laid_out((random(*shape, seed=seed) * (magnitude if seed == 0 else 1)).to(DTYPES[dtype]), layout).detach()
        for seed in range(3)
    )
    inputs = [x.requires_grad_(needs[0]), layer.weight, layer.bias]
    inputs += [shortcut.requires_grad_(needs[1])] if tail else []
    y = layer.residual(x, shortcut) if tail else layer(x)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = [y, *torch.autograd.grad(y, wanted, upstream)]
    again = torch.autograd.grad(layer.residual(x, shortcut) if tail else layer(x), wanted, upstream)
    doubles = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in inputs]
    expected = textbook(*doubles[:3], GROUPS, shortcut=doubles[3] if tail else None)
    wanted = [tensor for tensor in doubles if tensor.requires_grad]
    expected = [expected, *torch.autograd.grad(expected, wanted, upstream.double())]
    with torch.no_grad():
        place = x.detach().clone()
        kept = layer.residual(place, shortcut, inplace=True) if tail else y
    return {
        "differences": [difference(*pair) for pair in zip(found, expected, strict=True)],
        "repeated": all(torch.equal(*pair) for pair in zip(found[1:], again, strict=True)),
        "in place": torch.equal(kept, y) and (not tail or kept.data_ptr() == place.data_ptr()),
        "strides": (layout == "cropped" or y.stride() == x.stride()) and y.dtype == x.dtype,
    }


def degenerate():
    """A map of one position, whose gate is sigmoid(beta), equal activations, and an empty batch."""
    layer = make_layer(GROUPS, dtype=torch.float32, kernel="triton")
    x = (random(3, 8, 1, 1) * 1000).float().requires_grad_()
    y = layer(x)
    y.sum().backward()
    gate = torch.sigmoid(layer.bias).repeat_interleave(8 // GROUPS, 1)
    single = torch.allclose(y, x * gate) and torch.allclose(x.grad, gate.expand_as(x))
    single = single and layer.weight.grad.abs().max().item() == 0
    flat = torch.full((1, 8, 3, 5), 2.0).requires_grad_()
    layer(flat).sum().backward()
    empty = torch.empty(0, 8, 3, 5).requires_grad_()
    layer.residual(empty, empty.detach()).sum().backward()
    double = random(2, 8, 3, 5)
    eager = make_layer(GROUPS, kernel="eager")
    wide = torch.equal(make_layer(GROUPS, kernel="triton")(double), eager(double))
    return [single, flat.grad.isfinite().all().item(), empty.grad.shape == empty.shape, wide]


if __name__ == "__main__":
    warnings.simplefilter("error", RuntimeWarning)
    print(json.dumps([run(**case) for case in json.loads(sys.argv[1])] + [degenerate()]))
