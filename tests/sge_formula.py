"""The layer's formula, written twice without the package, and inputs to try it on."""

import itertools

import numpy as np
import torch
import torch.nn.functional as F

from sge_det.layers.sge import SpatialGroupEnhance

LAYOUTS = ["contiguous", "channels_last", "cropped", "transposed", "expanded"]


def reference(x, weight, bias, groups, eps=1e-5, shortcut=None):
    """Equations 1-5 in NumPy, one sample and one group at a time."""
    y = np.empty_like(x)
    for sample, group in itertools.product(range(x.shape[0]), range(groups)):
        members = slice(group * x.shape[1] // groups, (group + 1) * x.shape[1] // groups)
        vectors = x[sample, members]
        s = np.tensordot(vectors.mean((1, 2)), vectors, 1)
        std = s.std(ddof=1) if s.size > 1 else 0.0
        a = weight[group] * (s - s.mean()) / (std + eps) + bias[group]
        y[sample, members] = vectors / (1 + np.exp(-a))
    return y if shortcut is None else np.maximum(y + shortcut, 0)


def textbook(x, weight, bias, groups, eps=1e-5, shortcut=None):
    """The same in PyTorch, for gradients by autograd where finite differences would take too long."""
    v = x.unflatten(1, (groups, -1))
    s = (v * v.mean((3, 4), keepdim=True)).sum(2)
    t = (s - s.mean((2, 3), keepdim=True)) / (s.std((2, 3), keepdim=True) + eps)
    y = (v * torch.sigmoid(weight * t + bias).unsqueeze(2)).flatten(1, 2)
    return y if shortcut is None else F.relu(y + shortcut)


def make_layer(groups=2, eps=1e-5, dtype=torch.float64, seed=0, kernel="eager"):
    generator = torch.Generator().manual_seed(seed)
    layer = SpatialGroupEnhance(groups, eps, kernel).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(1, groups, 1, 1, generator=generator))
        layer.bias.copy_(torch.randn(1, groups, 1, 1, generator=generator))
    return layer


def random(*shape, seed=0, dtype=torch.float64, mean=0.5):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean).to(dtype)


def laid_out(x, layout):
    """The values of ``x`` in the memory layout ``layout``; "expanded" repeats the first sample."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "cropped":
        return F.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2]
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x


def numpy_parameters(layer):
    return layer.weight.detach().double().flatten().numpy(), layer.bias.detach().double().flatten().numpy()
