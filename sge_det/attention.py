"""What the gates of an SGE detector do."""

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layer import SpatialGroupEnhance


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


def gate_statistics(model: nn.Module, loader: Iterable[list[dict]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and spread of SGE's parameters and gates over images, for each stage.

    Args:
        model: a Detectron2 detector; its backbone runs on the images, in evaluation mode.
        loader: batches as Detectron2's test loaders give them.

    Returns:
        ``{"res2": {"gamma": {"mean", "sd"}, "beta": {"mean", "sd"}, "gate": {"mean", "sd", "spatial_sd"}}, ...}``,
        empty for a model without SGE. Gates lie in 0-1. ``sd`` is over all positions, groups, blocks and images;
        ``spatial_sd`` is the root of the mean variance within a map, i.e. what depends on the position: 0 where the
        gates are a mere scaling of the channels.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SpatialGroupEnhance)}
    if not layers:
        return {}
    stages = {name: match[0] if (match := re.search(r"res\d", name)) else "all" for name in layers}
    gates = {stage: _Moments() for stage in stages.values()}
    variances = {stage: _Moments() for stage in stages.values()}
    gamma = {stage: _Moments() for stage in stages.values()}
    beta = {stage: _Moments() for stage in stages.values()}
    for name, layer in layers.items():
        gamma[stages[name]].add(layer.weight.detach())
        beta[stages[name]].add(layer.bias.detach())

    def hook(stage: str):
        def record(layer: SpatialGroupEnhance, inputs: tuple) -> None:
            values = layer.gates(inputs[0])
            gates[stage].add(values)
            variances[stage].add(values.double().var((2, 3), unbiased=False))

        return record

    handles = [layer.register_forward_pre_hook(hook(stages[name])) for name, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                model.backbone(model.preprocess_image(batch).tensor)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {
        stage: {
            "gamma": {"mean": gamma[stage].mean, "sd": gamma[stage].sd},
            "beta": {"mean": beta[stage].mean, "sd": beta[stage].sd},
            "gate": {
                "mean": gates[stage].mean,
                "sd": gates[stage].sd,
                "spatial_sd": math.sqrt(variances[stage].mean) if variances[stage].count else math.nan,
            },
        }
        for stage in sorted(set(stages.values()))
    }
