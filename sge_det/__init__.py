"""Spatial Group-wise Enhance for Detectron2. Importing the package registers its backbones."""

from .config import add_sge_config, get_config, get_config_file
from .errors import UserError
from .hub import from_pretrained, push_to_hub, save_pretrained
from .layers.sge import SpatialGroupEnhance
from .modeling.blocks import (
    Attention,
    AttentiveBasicBlock,
    AttentiveBottleneckBlock,
    AttentiveDeformBottleneckBlock,
    SGEBasicBlock,
    SGEBottleneckBlock,
    SGEDeformBottleneckBlock,
    make_sge_stages,
    rival_attention,
    sge_attention,
)
from .modeling.gates import record_gates
from .modeling.insert import Insertion, insert_sge, with_sge
from .modeling.padding import ignore_padding
from .modeling.paper import EvalBatchNorm2d, LinearP6P7, PerBatchRetinaNet, WeightedCascadeROIHeads
from .modeling.resnet import (
    build_retinanet_sge_resnet_fpn_backbone,
    build_sge_resnet_backbone,
    build_sge_resnet_deeplab_backbone,
    build_sge_resnet_fpn_backbone,
)
from .modeling.roi_heads import SGERes5ROIHeads
from .solver import build_optimizer, scale_sge_lr

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentiveBasicBlock",
    "AttentiveBottleneckBlock",
    "AttentiveDeformBottleneckBlock",
    "EvalBatchNorm2d",
    "Insertion",
    "LinearP6P7",
    "PerBatchRetinaNet",
    "SGEBasicBlock",
    "SGEBottleneckBlock",
    "SGEDeformBottleneckBlock",
    "SGERes5ROIHeads",
    "SpatialGroupEnhance",
    "UserError",
    "WeightedCascadeROIHeads",
    "add_sge_config",
    "build_optimizer",
    "build_retinanet_sge_resnet_fpn_backbone",
    "build_sge_resnet_backbone",
    "build_sge_resnet_deeplab_backbone",
    "build_sge_resnet_fpn_backbone",
    "from_pretrained",
    "get_config",
    "get_config_file",
    "ignore_padding",
    "insert_sge",
    "make_sge_stages",
    "push_to_hub",
    "record_gates",
    "rival_attention",
    "save_pretrained",
    "scale_sge_lr",
    "sge_attention",
    "with_sge",
]
