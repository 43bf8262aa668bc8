"""Random detectors for the sample set that several test files share."""

import torch
from conftest import TINY
from torch import nn

from sge_det.analysis.predictor import setup_prediction
from sge_det.engine.training import build_seeded_model
from sge_det.modeling.gates import sge_layers

FASTER, MASK = "sample/faster_rcnn_SGE_R_50_FPN.yaml", "sample/mask_rcnn_SGE_R_50_FPN.yaml"


def save_weights(config, path, datasets):
    """A random detector whose gates vary, and which is sure of nothing."""
    cfg = setup_prediction(config, [*TINY, "MODEL.WEIGHTS", ""], datasets)
    model = build_seeded_model(cfg)
    generator = torch.Generator().manual_seed(0)
    for layer in sge_layers(model).values():
        nn.init.normal_(layer.weight, std=0.5, generator=generator)
    torch.save({"model": model.state_dict()}, path)
