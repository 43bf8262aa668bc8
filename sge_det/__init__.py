"""Spatial Group-wise Enhance for Detectron2. Importing the package registers its backbones."""

from .config import add_sge_config, get_config, get_config_file
from .data.datasets import register_sample
from .errors import UserError
from .layers.sge import SpatialGroupEnhance
from .modeling.gates import record_gates
from .modeling.resnet import (
    Attention,
    SGEBasicBlock,
    SGEBottleneckBlock,
    build_retinanet_sge_resnet_fpn_backbone,
    build_sge_resnet_backbone,
    build_sge_resnet_fpn_backbone,
)
from .solver import build_optimizer, scale_sge_lr

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "SGEBasicBlock",
    "SGEBottleneckBlock",
    "SpatialGroupEnhance",
    "UserError",
    "add_sge_config",
    "build_optimizer",
    "build_retinanet_sge_resnet_fpn_backbone",
    "build_sge_resnet_backbone",
    "build_sge_resnet_fpn_backbone",
    "get_config",
    "get_config_file",
    "record_gates",
    "scale_sge_lr",
]

register_sample()
