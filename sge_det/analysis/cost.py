"""What SGE adds to a model: parameters, operations and activations, beside the plain twin and the paper's figures.

A multiply-add counts as one operation, as in fvcore, which counts convolutions, linear layers and norms.
"""

import contextlib
import math
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import Tensor, nn

from ..config import STAGES, sge_options
from ..engine.training import build_seeded_model, plain_twin
from ..errors import UserError
from ..layers.attention import SGE
from ..layers.sge import SpatialGroupEnhance
from ..modeling.gates import sge_layers
from ..modeling.resnet import build_sge_resnet_backbone

# Below it, the last stage of a ResNet with its FPN is a single position.
_LEAST_SIDE = 32
_IMAGENET_SIDE, _IMAGENET_CLASSES = 224, 1000

# By depth: (plain, SGE). GFLOPs of the classifier at 224x224 and of the backbone at 1333x800; parameters in millions.
_PAPER = {
    50: {"parameters": (25.56, 25.56), "classifier": (4.122, 4.127), "backbone": (88.0, 88.1)},
    101: {"parameters": (44.55, 44.55), "classifier": (7.849, 7.858), "backbone": (167.9, 168.1)},
}

Handles = dict[str, Callable[[list, list], int]]


@dataclass(frozen=True)
class Cost:
    """Attributes:
    parameters: learnt numbers; weight and bias of frozen norms, which are no parameters to torch, are among them.
    flops: operations of one image's forward pass, a multiply-add being one.
    activations: numbers in the outputs of convolutions, linear layers and SGE.
    """

    parameters: int
    flops: int
    activations: int


@dataclass(frozen=True)
class PaperFigure:
    """A figure of the paper beside ours, for the plain network and with SGE.

    Attributes:
        published: as printed.
        recounted: ours, counted in the paper's way.
        ours: in fvcore's way with all of SGE's operations.
    """

    name: str
    unit: str
    published: tuple[float, float]
    recounted: tuple[float, float]
    ours: tuple[float, float]


@dataclass(frozen=True)
class Analysis:
    """A model and its plain twin in numbers.

    Attributes:
        height, width: of the image, in pixels.
        costs: by part of the model ("backbone.bottom_up" is the ResNet, "total" the whole): (model, plain twin).
        paper: empty where the paper has no such network.
    """

    height: int
    width: int
    costs: dict[str, tuple[Cost, Cost]]
    paper: list[PaperFigure]


def sge_flops(samples: int, channels: int, groups: int, positions: int) -> int:
    """The operations of one SGE layer, a multiply-add being one, counted off the equations.

    With C channels, G groups and M positions, a sample costs: the mean (eq. 1) C * M; the similarity (eq. 2) C * M;
    the mean of the similarities, g . g, C; subtracting it, the std and the division by it (eq. 3) G * M each; gamma
    and beta (eq. 4) G * M; the sigmoid G * M and the product with x C * M (eq. 5).
    """
    return samples * (3 * channels * positions + 5 * groups * positions + channels)


def analyze(cfg: CfgNode, height: int = 800, width: int = 1333) -> Analysis:
    """Counts the model of ``cfg`` and its plain twin on one image.

    The count of the heads depends on how many boxes reach them: here as many as the config allows.

    Args:
        cfg: a detector with SGE.
        height, width: of the image, in pixels.

    Raises:
        UserError: the image is too small, or the model has no SGE or cannot be built.
    """
    if min(height, width) < _LEAST_SIDE:
        raise UserError(f"--height {height} --width {width} is too small: give at least {_LEAST_SIDE} pixels each")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RPN.NMS_THRESH = 1.0
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    # A mask head gets the best boxes of all classes: suppression that leaves few is quick, and leaves enough.
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.0
    model = _without_weights(cfg)
    if not sge_options(cfg).enabled or _same_as(model, twin := _without_weights(plain_twin(cfg))):
        raise UserError("the model has no attention, so it is its own plain twin: set MODEL.SGE.ENABLED to True")
    image = [{"image": torch.rand(3, height, width, generator=torch.Generator().manual_seed(0)) * 255}]
    ours, plain = _costs(model, image), _costs(twin, image)
    return Analysis(height, width, {part: (ours[part], plain[part]) for part in ours}, _paper_figures(cfg))


def _without_weights(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg`` with zeros for parameters: its proposals are anchors, as many as there may be.

    Random weights under frozen norms grow from block to block, in deep networks beyond what float32 holds.
    """
    model = build_seeded_model(cfg).eval()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def _same_as(model: nn.Module, twin: nn.Module) -> bool:
    return model.state_dict().keys() == twin.state_dict().keys()


def _costs(model: nn.Module, image: list[dict]) -> dict[str, Cost]:
    flops = count_flops(model, image)
    activations = _count(ActivationCountAnalysis, model, image, {_SGE_OPERATOR: _output_size})
    costs = {
        part: Cost(_parameters(model.get_submodule(part)), flops[part], activations[part]) for part in _parts(model)
    }
    whole = Cost(_parameters(model), flops[""], activations[""])
    rest = [
        getattr(whole, name) - sum(getattr(cost, name) for cost in costs.values())
        for name in ("parameters", "flops", "activations")
    ]
    if any(rest):
        costs["backbone, FPN" if "backbone.bottom_up" in costs else "the rest"] = Cost(*rest)
    return costs | {"total": whole}


def _parts(model: nn.Module) -> list[str]:
    """The submodules that are told apart: the ResNet, and what stands beside the backbone."""
    children = [name for name, child in model.named_children() if name != "backbone" and _parameters(child)]
    backbone = model.backbone
    own = [f"backbone.{name}" for name, _ in backbone.named_children() if name == "bottom_up"] or ["backbone"]
    return [*own, *children]


def _parameters(module: nn.Module) -> int:
    frozen = (norm for norm in module.modules() if isinstance(norm, FrozenBatchNorm2d))
    return sum(p.numel() for p in module.parameters()) + sum(n.weight.numel() + n.bias.numel() for n in frozen)


def count_flops(model: nn.Module, inputs: list[dict] | Tensor, handles: Handles | None = None) -> Counter:
    """fvcore's count of the operations of ``model(inputs)`` by module name, with SGE's; "" is the whole model.

    Args:
        handles: counts of further operators, or other counts of known ones.
    """
    return _count(FlopCountAnalysis, model, inputs, {_SGE_OPERATOR: _sge_count, **(handles or {})})


def _count(
    analysis: type[JitModelAnalysis], model: nn.Module, inputs: list[dict] | Tensor, handles: Handles
) -> Counter:
    with _sge_as_one_operator(model), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapper = TracingAdapter(model, inputs, allow_non_tensor=True)
        counter = analysis(wrapper, wrapper.flattened_inputs)
        counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        counts = counter.set_op_handle(**handles).by_module()
    return Counter({name.removeprefix("model").removeprefix("."): int(value) for name, value in counts.items()})


class _Enhance(torch.autograd.Function):
    """Stands for a whole SGE layer in a trace, with its input and its weight for the count; computes nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        return x.clone()


_SGE_OPERATOR = f"prim::PythonOp.{_Enhance.__name__}"


def _traced_forward(layer: SpatialGroupEnhance, x: Tensor) -> Tensor:
    return _Enhance.apply(x, layer.weight)


def _traced_residual(layer: SpatialGroupEnhance, x: Tensor, shortcut: Tensor, inplace: bool = False) -> Tensor:
    return torch.relu(layer(x) + shortcut)


@contextlib.contextmanager
def _sge_as_one_operator(model: nn.Module) -> Iterator[None]:
    """Lets each SGE layer of ``model`` appear in traces as one operator.

    fvcore's handles see an operator's name and shapes; of the operators that SGE is made of many are those of the
    rest of the model too. The layers pass x on as it is, so that the model computes what its plain twin does.
    """
    layers = list(sge_layers(model).values())
    for layer in layers:
        layer.forward = types.MethodType(_traced_forward, layer)
        layer.residual = types.MethodType(_traced_residual, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward, layer.residual


def _sge_count(inputs: list, outputs: list) -> int:
    samples, channels, *size = get_shape(inputs[0])
    return sge_flops(samples, channels, get_shape(inputs[1])[1], math.prod(size))


def _input_size(inputs: list, outputs: list) -> int:
    return math.prod(get_shape(inputs[0]))


def _output_size(inputs: list, outputs: list) -> int:
    return math.prod(get_shape(outputs[0]))


# The paper's figures come out to the last digit if ReLUs and poolings count one operation an element, and of SGE
# alone its average pooling does: what a counter makes of it that knows torch's modules and not its functions.
_PAPER_HANDLES: Handles = {
    _SGE_OPERATOR: _input_size,
    "aten::relu": _input_size,
    "aten::relu_": _input_size,
    "aten::max_pool2d": _input_size,
}


class _Classifier(nn.Module):
    """A backbone with the classifier of ImageNet, whose channels are those of res5."""

    def __init__(self, backbone: nn.Module, channels: int):
        super().__init__()
        self.backbone = backbone
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, _IMAGENET_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.backbone(x)["res5"]).flatten(1))


def _paper_figures(cfg: CfgNode) -> list[PaperFigure]:
    """The paper's figures beside ours; empty where ``cfg`` is none of its networks."""
    if not _is_in_paper(cfg):
        return []
    depth = cfg.MODEL.RESNETS.DEPTH
    recounted: dict[str, list[float]] = {"parameters": [], "classifier": [], "backbone": []}
    ours: dict[str, list[float]] = {"parameters": [], "classifier": [], "backbone": []}
    for config in (plain_twin(cfg), cfg):
        backbone = build_sge_resnet_backbone(config, ShapeSpec(channels=3)).eval()
        classifier = _Classifier(backbone, backbone.output_shape()["res5"].channels).eval()
        parameters = _parameters(classifier) / 1e6
        recounted["parameters"].append(parameters)
        ours["parameters"].append(parameters)
        side = _IMAGENET_SIDE
        for name, module, size in (("classifier", classifier, (side, side)), ("backbone", backbone, (800, 1333))):
            image = torch.zeros(1, 3, *size)
            ours[name].append(count_flops(module, image)[""] / 1e9)
            recounted[name].append(count_flops(module, image, _PAPER_HANDLES)[""] / 1e9)
    names = {
        "parameters": (f"parameters of ResNet-{depth} with classifier", "M"),
        "classifier": (f"ResNet-{depth} with classifier at 224x224", "GFLOPs"),
        "backbone": (f"ResNet-{depth} without it at 1333x800", "GFLOPs"),
    }
    return [
        PaperFigure(*names[key], _PAPER[depth][key], tuple(recounted[key]), tuple(ours[key])) for key in _PAPER[depth]
    ]


def _is_in_paper(cfg: CfgNode) -> bool:
    resnets, options = cfg.MODEL.RESNETS, sge_options(cfg)
    widths = (resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS)
    return (
        resnets.DEPTH in _PAPER
        and widths == (1, 64, 64, 256)
        and resnets.RES5_DILATION == 1
        and (options.attention, options.groups, options.stages) == (SGE, 64, STAGES)
    )


def analysis_report(analysis: Analysis) -> str:
    """The analysis as Markdown tables with the words that they need."""
    kinds = {"parameters": ("parameters", 1), "flops": ("MFLOPs", 10**6), "activations": ("activations", 1)}
    parts = [f"One image of {analysis.height}x{analysis.width} (height x width, pixels); a multiply-add is one FLOP."]
    for kind, (title, unit) in kinds.items():
        rows = []
        for part, costs in analysis.costs.items():
            ours, plain = (getattr(cost, kind) for cost in costs)
            percent = f"{(ours - plain) / plain:+.3%}" if plain else ""
            digits = ",.2f" if unit > 1 else ",d"
            values = [value / unit if unit > 1 else value for value in (plain, ours, ours - plain)]
            texts = [f"{value:{digits}}" for value in values[:2]] + [f"{values[2]:+{digits}}"]
            rows.append([part, *texts, percent])
        header = [title, "plain twin", "model", "difference", "per cent"]
        parts.append(_table(header, rows))
    parts.append(
        "backbone.bottom_up is the ResNet. Weights and biases of frozen norms count as parameters. FLOPs are those of "
        "convolutions, linear layers and norms, by fvcore, and all of SGE's; the heads' are at the most boxes that the "
        "config lets through. Activations are the outputs of convolutions, linear layers and SGE."
    )
    if analysis.paper:
        rows = []
        for figure in analysis.paper:
            digits = 2 if figure.unit == "M" else 3
            for place, network in enumerate(("plain", "SGE")):
                published = str(figure.published[place])
                numbers = (figure.recounted[place], figure.ours[place])
                rows.append(
                    [f"{figure.name}, {network} ({figure.unit})", published, *(f"{n:.{digits}f}" for n in numbers)]
                )
        parts.append(_table(["figure", "paper", "ours, the paper's count", "ours"], rows))
        parts.append(
            "The paper's count adds one operation an element for each ReLU and pooling, and of SGE it knows the "
            "average pooling alone: one operation for each of SGE's inputs. Ours leaves ReLUs and max pooling out, as "
            "fvcore does, and counts all that SGE computes: for each input three operations (mean, similarity, "
            "gating), and five for each gate. These figures are of 1333x800 as it is; detectors, and so the tables "
            "above, pad to a multiple of 32."
        )
    return "\n\n".join(parts)


def _table(header: list[str], rows: list[list[str]]) -> str:
    align = ("left", *("right",) * (len(header) - 1))
    return tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True)
