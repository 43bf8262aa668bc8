"""Detections that do not depend on an image's batch-mates: nothing is computed from the padding of a batch.

Detectron2 pads the images of a batch with zeros to one size. Behind the first norm the padding is no longer zero, so
that what is found near an image's border, and with SGE the gates of the whole image, depend on the batch. Here the
padding is zero before every convolution, as it is at the border of an image that is alone; gates and GroupNorm's
statistics come from an image's own pixels; RoIs pool from maps whose border is continued; and no object is proposed
from cells in the padding.
"""

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.proposal_generator import RPN
from torch import Tensor, nn

from ..layers.sge import SpatialGroupEnhance
from .gates import map_stride
from .hooks import Hook

# A box delta by which a width and height are multiplied by 0, its exponential; finite, as Detectron2's boxes must be.
_EMPTY = -1e4


class Extents:
    """Which cells of the maps of the batch at hand lie in its images; seen from the zeros of the padding.

    Rows and columns at an image's end that are zero in all channels count as padding. No pixel of 0-255 is zero
    behind means that are no whole numbers, as those of ImageNet.
    """

    def __init__(self):
        self._valid: tuple[Tensor, Tensor] | None = None
        self._padded = (0, 0)

    def see(self, x: Tensor) -> None:
        """Takes the batch (N, C, H, W) that the backbone is given."""
        content = (x != 0).any(1)
        self._valid = _last(content.any(2)), _last(content.any(1))
        self._padded = (x.shape[2], x.shape[3])

    def cells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """For a map (N, ..., h, w) of that batch: how many of its rows and columns begin in each image, two (N,)."""
        assert self._valid is not None, "the backbone has not seen a batch"
        strides = [map_stride(cells, padded) for cells, padded in zip(x.shape[-2:], self._padded, strict=True)]
        height, width = ((valid + stride - 1) // stride for valid, stride in zip(self._valid, strides, strict=True))
        return height, width

    def mask(self, x: Tensor) -> Tensor:
        """For a map (N, C, h, w) of that batch: whether a cell lies in its image, (N, 1, h, w)."""
        height, width = self.cells(x)
        rows = torch.arange(x.shape[2], device=x.device) < height[:, None]
        columns = torch.arange(x.shape[3], device=x.device) < width[:, None]
        return (rows[:, :, None] & columns[:, None, :])[:, None]


def _last(content: Tensor) -> Tensor:
    """For each row of (N, L) the number of entries up to the last that is true; L where none is."""
    length = content.shape[1]
    places = torch.arange(1, length + 1, device=content.device)
    last = (content * places).amax(1)
    return torch.where(last > 0, last, length)


class _Hook(Hook):
    instead = (
        "MODEL.SGE.IGNORE_PADDING works by hooks, which cannot be scripted: set it False, or trace the model "
        "(torch.jit.trace)"
    )


class _See(_Hook):
    def __init__(self, extents: Extents):
        self.extents = extents

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.extents.see(inputs[0])


class _Zero(_Hook):
    """Before a convolution: its input with zeros in the padding."""

    def __init__(self, extents: Extents):
        self.extents = extents

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        return (x.masked_fill(~self.extents.mask(x), 0), *inputs[1:])


class _ZeroAfter(_Zero):
    """After a convolution of the stem, whose maps are pooled: zeros in the padding."""

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        return output.masked_fill(~self.extents.mask(output), 0)


class _Continue(_Hook):
    """After the backbone: maps whose last row and column in an image go on into the padding, as RoIAlign goes on."""

    def __init__(self, extents: Extents):
        self.extents = extents

    def __call__(self, module: nn.Module, inputs: tuple, maps: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._continued(x) for name, x in maps.items()}

    def _continued(self, x: Tensor) -> Tensor:
        height, width = self.extents.cells(x)
        rows = torch.minimum(torch.arange(x.shape[2], device=x.device), height[:, None] - 1)[:, None, :, None]
        columns = torch.minimum(torch.arange(x.shape[3], device=x.device), width[:, None] - 1)[:, None, None, :]
        return x.gather(2, rows.expand(x.shape)).gather(3, columns.expand(x.shape))


class _Exclude(_Hook):
    """After a head over all cells: in the padding, logits and boxes of which no object comes; in training they stay.

    The boxes are empty ones: Detectron2 leaves out infinite logits on a branch that a trace of an image without padding
    has not, empty boxes always.
    """

    def __init__(self, extents: Extents):
        self.extents = extents

    def __call__(self, module: nn.Module, inputs: tuple, outputs: tuple) -> tuple:
        if module.training:
            return outputs
        logits, deltas, *others = outputs
        return self._filled(logits, -torch.inf), self._filled(deltas, _EMPTY), *others

    def _filled(self, maps: list[Tensor], value: float) -> list[Tensor]:
        return [x.masked_fill(~self.extents.mask(x), value) for x in maps]


class OwnPixelsSGE(SpatialGroupEnhance):
    """SGE with the statistics of an image's own cells, by plain operators.

    Attributes:
        extents: of the batch at hand; set by :func:`ignore_padding`.
    """

    extents: Extents

    def gates(self, x: Tensor) -> Tensor:
        self._check(x, None)
        return self._own_gates(x)

    def _own_gates(self, x: Tensor) -> Tensor:
        """Eq. 1-4 over the cells of each image, and the sigmoid: (N, G, h, w); elsewhere numbers without meaning."""
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        mask = self.extents.mask(x).to(compute)
        count = mask.sum((2, 3), keepdim=True)
        vectors = (x.to(compute) * mask).unflatten(1, (self.groups, -1))
        g = vectors.sum((3, 4), keepdim=True) / count.unsqueeze(1)
        if not self.normalize:
            return torch.sigmoid((vectors * g).sum(2) * self.weight.to(compute) + self.bias.to(compute))
        scale = g.detach().abs().amax(2, keepdim=True).clamp(min=1).reciprocal()
        scaled = g * scale * scale
        u = ((vectors * scaled).sum(2) - (g * scaled).sum(2)) * mask * (count - 1).clamp(max=1)
        squares = u.square().sum((2, 3), keepdim=True).clamp(min=2.3e-308 if compute == torch.float64 else 1.2e-38)
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        t = u / (std + self.eps * scale.squeeze(2) ** 2)
        return torch.sigmoid(t * self.weight.to(compute) + self.bias.to(compute))

    @torch.jit.unused
    def _enhance(self, x: Tensor, shortcut: Tensor | None, inplace: bool) -> Tensor:
        for see in self.observers:
            see(x)
        gates = self._own_gates(x).to(x.dtype).unsqueeze(2)
        y = (x.unflatten(1, (self.groups, -1)) * gates).reshape_as(x)
        return y if shortcut is None else torch.relu(y + shortcut)


class OwnPixelsGroupNorm(nn.GroupNorm):
    """GroupNorm with the statistics of an image's own cells.

    Attributes:
        extents: of the batch at hand; set by :func:`ignore_padding`.
    """

    extents: Extents

    def forward(self, x: Tensor) -> Tensor:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        mask = self.extents.mask(x).to(compute).unsqueeze(1)
        vectors = x.to(compute).unflatten(1, (self.num_groups, -1))
        count = mask.sum((2, 3, 4), keepdim=True) * (x.shape[1] // self.num_groups)
        centred = vectors - (vectors * mask).sum((2, 3, 4), keepdim=True) / count
        variance = (centred * mask).square().sum((2, 3, 4), keepdim=True) / count
        y = (centred * (variance + self.eps).rsqrt()).reshape_as(x)
        if self.affine:
            y = y * self.weight[:, None, None].to(compute) + self.bias[:, None, None].to(compute)
        return y.to(x.dtype)


def ignore_padding(model: nn.Module) -> None:
    """Makes a Detectron2 detector, or a backbone alone, compute nothing from the padding of a batch; in place.

    Parameters and their names stay. A detector's detections are then, but for rounding, those of each image alone;
    in training its losses are still over all anchors, those in the padding too. Calling it again changes nothing.
    ``MODEL.SGE.IGNORE_PADDING`` calls it for the backbones of this package and for the models of its tools; after
    Detectron2's own ``build_model``, call it for the heads.

    Args:
        model: ``GeneralizedRCNN``, or ``RetinaNet``, ``FCOS`` and their kind, or a ``Backbone``.
    """
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "extents"):
        backbone.extents = _ignore_in_backbone(backbone)
    if backbone is model or hasattr(model, "extents"):
        return
    model.extents = backbone.extents
    generator = getattr(model, "proposal_generator", None)
    for head in (
        generator.rpn_head if isinstance(generator, RPN) else None,
        model.head if isinstance(model, DenseDetector) else None,
    ):
        if head is not None:
            _zero_before_convolutions(head, model.extents)
            _norm_own_pixels(head, model.extents)
            head.register_forward_hook(_Exclude(model.extents))


def _ignore_in_backbone(backbone: nn.Module) -> Extents:
    extents = Extents()
    _zero_before_convolutions(backbone, extents)
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] == "stem":
            for part in module.modules():
                if isinstance(part, nn.Conv2d):
                    part.register_forward_hook(_ZeroAfter(extents))
        if isinstance(module, SpatialGroupEnhance):
            module.__class__, module.extents = OwnPixelsSGE, extents
    _norm_own_pixels(backbone, extents)
    backbone.register_forward_pre_hook(_See(extents))
    backbone.register_forward_hook(_Continue(extents))
    return extents


def _norm_own_pixels(model: nn.Module, extents: Extents) -> None:
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__, module.extents = OwnPixelsGroupNorm, extents


def _zero_before_convolutions(model: nn.Module, extents: Extents) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1:
            module.register_forward_pre_hook(_Zero(extents))
