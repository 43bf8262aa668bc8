"""What the gates of an SGE detector do: recorded in any forward pass, summed up over images, logged in training."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.structures import Instances
from torch import Tensor, nn

from ..errors import UserError
from ..layers.sge import SpatialGroupEnhance


def sge_layers(model: nn.Module) -> dict[str, SpatialGroupEnhance]:
    """The SGE layers of ``model`` by name, in the order in which they were built; empty for a model without SGE.

    Names do not show that the model or a part of it was compiled by ``torch.compile``.
    """
    return {
        name.replace("_orig_mod.", ""): module
        for name, module in model.named_modules()
        if isinstance(module, SpatialGroupEnhance)
    }


def stage_of(name: str) -> str:
    """The stage of a layer, "res2" ... "res5", by its name; "all" for a layer outside of a ResNet."""
    match = re.search(r"res\d", name)
    return match[0] if match else "all"


def blocks(model: nn.Module) -> dict[str, str]:
    """The short names of the SGE layers of ``model``: ``{"backbone.bottom_up.res5.2.sge": "res5.2", ...}``.

    The number counts the SGE layers of the stage.
    """
    counts: dict[str, int] = {}
    labels = {}
    for name in sge_layers(model):
        stage = stage_of(name)
        counts[stage] = counts.get(stage, -1) + 1
        labels[name] = f"{stage}.{counts[stage]}"
    return labels


def find_layer(model: nn.Module, stage: str, block: int = -1) -> str:
    """The name of an SGE layer.

    Args:
        stage: "res2" ... "res5".
        block: its place in the stage; negative numbers count from the end.

    Raises:
        UserError: there is no such stage or block, names those that there are; or the model has no SGE.
    """
    stages: dict[str, list[str]] = {}
    for name in required_layers(model):
        stages.setdefault(stage_of(name), []).append(name)
    if stage not in stages:
        raise UserError(f"the model has no SGE in {stage!r}: it has in {', '.join(stages)}")
    names = stages[stage]
    if not -len(names) <= block < len(names):
        raise UserError(
            f"{stage} has no block {block}: its {len(names)} blocks with SGE are 0 to {len(names) - 1}, or -1 to "
            f"-{len(names)} from the end"
        )
    return names[block]


@contextlib.contextmanager
def observe(model: nn.Module, see: Callable[[str, SpatialGroupEnhance, Tensor], None]) -> Iterator[None]:
    """Calls ``see(name, layer, x)`` before each call of an SGE layer of ``model``, without gradients.

    ``x`` is the layer's input (N, C, H, W); it may be overwritten after ``see`` returns. What of the model is compiled
    by ``torch.compile`` runs uncompiled meanwhile, since compiled code calls nothing that was not there when it was
    made.
    """

    def observer(name: str, layer: SpatialGroupEnhance) -> Callable[[Tensor], None]:
        def observe_input(x: Tensor) -> None:
            with torch.no_grad():
                see(name, layer, x)

        return observe_input

    added = [(layer, observer(name, layer)) for name, layer in sge_layers(model).items()]
    for layer, function in added:
        layer.observers = (*layer.observers, function)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for layer, function in added:
            layer.observers = tuple(other for other in layer.observers if other is not function)


@contextlib.contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Records the gates (eq. 5's sigmoid) of the forward passes within it; costs nothing outside of it.

        with sge_det.record_gates(model) as gates:
            model(inputs)
        gates["backbone.bottom_up.res5.2.sge"]  # (N, G, H, W), in 0-1

    Yields:
        a dict that the forward passes fill: layer name to gates (N, G, H, W), float32 (float64 for float64 input), on
        the layer's device and without gradient. A layer that is called again replaces its gates.

    Raises:
        UserError: the model has no SGE, or was exported.
    """
    required_layers(model)
    gates: dict[str, Tensor] = {}

    def see(name: str, layer: SpatialGroupEnhance, x: Tensor) -> None:
        gates[name] = layer.gates(x)

    with observe(model, see):
        yield gates


def required_layers(model: nn.Module) -> dict[str, SpatialGroupEnhance]:
    """:func:`sge_layers` of a model that must have some.

    Raises:
        UserError: it has none, or it was exported, by which its layers became operators.
    """
    layers = sge_layers(model)
    if not layers and isinstance(model, torch.jit.ScriptModule | torch.fx.GraphModule):
        raise UserError(
            "an exported model (traced, scripted or a graph of operators) computes no gates that could be seen: give "
            "the model that was exported"
        )
    if not layers:
        raise UserError(
            "the model has no SGE, so there are no gates: give a config whose MODEL.SGE.ENABLED is True and whose "
            'MODEL.SGE.ATTENTION is "sge"'
        )
    return layers


def map_stride(cells: int, padded: int) -> int:
    """The pixels between two cells of a map: the least power of two with which they cover the padded image.

    Args:
        cells: of the map, along one axis.
        padded: pixels of the image as the backbone sees it, along the same axis.
    """
    stride = 1
    while stride * cells < padded:
        stride *= 2
    return stride


@dataclass(frozen=True)
class LayerMaps:
    """What an SGE layer shows on one image, cells that lie in the padding alone left out.

    Attributes:
        label: the block's short name, "res5.2".
        stride: between two cells, in pixels of the image as the backbone sees it.
        gates: eq. 5's sigmoid, (G, H, W), float32, in 0-1.
        before, after: the mean over all channels of the layer's input and output, (H, W), float32.
        covers: (width, height) in pixels of the original image, at least as large as that; they begin together.
    """

    label: str
    stride: int
    gates: np.ndarray
    before: np.ndarray
    after: np.ndarray
    covers: tuple[float, float]


def layer_maps(model: nn.Module, name: str, example: dict) -> tuple[Instances, LayerMaps]:
    """Runs a detector on one image and looks at one of its SGE layers.

    Args:
        model: a Detectron2 detector.
        name: of the layer, as from :func:`find_layer`.
        example: an input of the detector: "image" (3, H, W), and "height" and "width" of the original image.

    Returns:
        the detections, on the CPU, and the layer's maps.
    """
    seen: dict[str, np.ndarray] = {}

    def see(called: str, layer: SpatialGroupEnhance, x: Tensor) -> None:
        if called != name:
            return
        gates = layer.gates(x)
        wide = x.to(gates.dtype)
        of_groups = wide.unflatten(1, (layer.groups, -1)).mean(2)
        for key, maps in {"gates": gates, "before": wide.mean(1), "after": (of_groups * gates).mean(1)}.items():
            seen[key] = maps[0].float().cpu().numpy()

    with observe(model, see), evaluating(model):
        padded = model.preprocess_image([example]).tensor.shape[-2:]
        instances = model([example])[0]["instances"].to("cpu")
    resized, original = example["image"].shape[-2:], (example["height"], example["width"])
    stride = map_stride(seen["before"].shape[0], padded[0])
    cells = [-(-side // stride) for side in resized]
    covers = [count * stride * out / side for count, out, side in zip(cells, original, resized, strict=True)]
    cut = {key: maps[..., : cells[0], : cells[1]] for key, maps in seen.items()}
    return instances, LayerMaps(blocks(model)[name], stride, covers=(covers[1], covers[0]), **cut)


def rank_groups(gates: np.ndarray) -> list[int]:
    """All groups, those first whose gates (G, H, W) vary most over the image (standard deviation)."""
    return np.argsort(-gates.reshape(len(gates), -1).std(1), kind="stable").tolist()


def choose_groups(text: str, gates: np.ndarray) -> list[int]:
    """The groups that ``text`` names.

    Args:
        text: "top:N", the N that vary most over the image, or all if there are fewer; "all"; or numbers, "3,17".
        gates: (G, H, W).

    Raises:
        UserError: it names none, or one that does not exist.
    """
    count = len(gates)
    if text == "all":
        return list(range(count))
    top = re.fullmatch(r"top:(\d+)", text)
    if top and int(top[1]) > 0:
        return rank_groups(gates)[: int(top[1])]
    if top or not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--groups {text} names no groups: give top:8, all, or numbers as in 3,17")
    groups = list(dict.fromkeys(map(int, text.split(","))))
    missing = [group for group in groups if group >= count]
    if missing:
        raise UserError(f"--groups {text}: there is no group {missing[0]}, the layer has the groups 0 to {count - 1}")
    return groups


class _Moments:
    """Running mean and standard deviation of numbers in [0, 1] or of that order, summed in float64."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, 0.0, 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        self.count += values.numel()
        self.sum += values.sum().item()
        self.squares += values.square().sum().item()

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else math.nan

    @property
    def sd(self) -> float:
        return math.sqrt(max(self.squares / self.count - self.mean**2, 0.0)) if self.count else math.nan


class GateStatistics:
    """Mean and spread of SGE's parameters and gates, summed up over forward passes.

    Args:
        layers: SGE layers by name.
        key: maps a layer's name to what it is counted under; its stage by default.
    """

    def __init__(self, layers: dict[str, SpatialGroupEnhance], key: Callable[[str], str] = stage_of):
        self.layers, self.key = layers, key
        self._gates = {key(name): _Moments() for name in layers}
        self._variances = {key(name): _Moments() for name in layers}

    def see(self, name: str, layer: SpatialGroupEnhance, x: Tensor) -> None:
        """Counts the gates of a layer for its input ``x`` (N, C, H, W); for :func:`observe`."""
        gates = layer.gates(x)
        self._gates[self.key(name)].add(gates)
        self._variances[self.key(name)].add(gates.double().var((2, 3), unbiased=False))

    def summary(self) -> dict[str, dict[str, dict[str, float]]]:
        """What was counted, as :func:`gate_statistics` returns it."""
        result = {}
        for key, gates in self._gates.items():
            gamma, beta = _Moments(), _Moments()
            for name, layer in self.layers.items():
                if self.key(name) == key:
                    gamma.add(layer.weight.detach())
                    beta.add(layer.bias.detach())
            variances = self._variances[key]
            result[key] = {
                "gamma": {"mean": gamma.mean, "sd": gamma.sd},
                "beta": {"mean": beta.mean, "sd": beta.sd},
                "gate": {
                    "mean": gates.mean,
                    "sd": gates.sd,
                    "spatial_sd": math.sqrt(variances.mean) if variances.count else math.nan,
                },
            }
        return result


def gate_statistics(
    model: nn.Module, loader: Iterable[list[dict]], *, per_block: bool = False
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread of SGE's parameters and gates over images, for each stage or block.

    Args:
        model: a Detectron2 detector; its backbone runs on the images, in evaluation mode.
        loader: batches as Detectron2's test loaders give them.
        per_block: for each block ("res2.0", "res2.1", ...) instead of for each stage.

    Returns:
        ``{"res2": {"gamma": {"mean", "sd"}, "beta": {"mean", "sd"}, "gate": {"mean", "sd", "spatial_sd"}}, ...}``,
        empty for a model without SGE. Gates lie in 0-1. ``sd`` is over all positions, groups, blocks and images;
        ``spatial_sd`` is the root of the mean variance within a map, i.e. what depends on the position: 0 where the
        gates are a mere scaling of the channels.
    """
    layers = sge_layers(model)
    if not layers:
        return {}
    statistics = GateStatistics(layers, blocks(model).__getitem__ if per_block else stage_of)
    with observe(model, statistics.see), evaluating(model):
        for batch in loader:
            model.backbone(model.preprocess_image(batch).tensor)
    return statistics.summary()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts ``model`` into evaluation mode, without gradients, and back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class GateWriter(HookBase):
    """Logs gate statistics of each stage, of the training batch at hand, among Detectron2's scalars.

    The names are "sge/res5_gate_mean", "..._gate_sd", "..._gate_spatial_sd", "..._gamma_mean", "..._gamma_sd",
    "..._beta_mean" and "..._beta_sd"; their meaning is that in :func:`gate_statistics`. They read what the iteration
    computes and change nothing in it.

    Args:
        model: the trained model.
        period: iterations between two records.
    """

    def __init__(self, model: nn.Module, period: int):
        self.model, self.period = model, period
        self._observation = contextlib.ExitStack()

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self._statistics = GateStatistics(sge_layers(self.model))
            self._observation.enter_context(observe(self.model, self._statistics.see))

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period:
            return
        self._observation.close()
        for stage, found in self._statistics.summary().items():
            for what, numbers in found.items():
                for name, value in numbers.items():
                    self.trainer.storage.put_scalar(f"sge/{stage}_{what}_{name}", value, smoothing_hint=False)

    def after_train(self) -> None:
        self._observation.close()
