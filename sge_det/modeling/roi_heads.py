"""ROI heads that hold a stage of the ResNet themselves."""

from detectron2.config import CfgNode
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from torch import nn

from .blocks import exchange_blocks
from .paper import with_eval_bn
from .resnet import build_attention


@ROI_HEADS_REGISTRY.register()
class SGERes5ROIHeads(Res5ROIHeads):
    """Detectron2's ``Res5ROIHeads`` (C4 detectors), whose res5 has ``MODEL.SGE`` in its blocks.

    Parameters have the names that they have in ``Res5ROIHeads``, SGE's are ``res5.N.sge.weight`` and ``bias``.

    Raises:
        UserError: the groups do not divide the channels of res5.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        stage, channels = super()._build_res5_block(with_eval_bn(cfg))
        exchange_blocks(stage, build_attention(cfg, "res5", channels))
        return stage, channels
