"""What the release does and Detectron2 cannot say: a norm, a cascade's weights, RetinaNet's P7 and its normaliser.

Each is off by default and on in the ``*_paper.yaml`` configs; docs/recipe.md has the list.
"""

from collections.abc import Sequence

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, CascadeROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from ..config import STAGE_LOSS_WEIGHTS
from ..errors import UserError

EVAL_BN = "EvalBN"


class EvalBatchNorm2d(nn.BatchNorm2d):
    """BN that always uses the statistics that its weights came with, while its scale and shift train.

    ``MODEL.RESNETS.NORM "EvalBN"`` in the builders of this package. Detectron2's ``FrozenBN`` fixes scale and shift
    too, its ``BN`` takes the statistics of the batch.

    Args:
        num_features: channels.
    """

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.eval()

    def train(self, mode: bool = True) -> "EvalBatchNorm2d":
        return super().train(False)


def with_eval_bn(cfg: CfgNode) -> CfgNode:
    """``cfg`` with the class in the place of the name "EvalBN", which Detectron2's builders do not know."""
    if cfg.MODEL.RESNETS.NORM != EVAL_BN:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.RESNETS["NORM"] = EvalBatchNorm2d  # as an attribute it would have to be text
    return cfg


class LinearP6P7(LastLevelP6P7):
    """RetinaNet's P6 and P7 with nothing between the two convolutions, where Detectron2 has a ReLU."""

    @classmethod
    def of(cls, block: LastLevelP6P7) -> "LinearP6P7":
        """The block of this class that has the parameters of ``block``, which it takes over."""
        own = cls.__new__(cls)
        own.__dict__ = block.__dict__
        return own

    def forward(self, c5: Tensor) -> list[Tensor]:
        p6 = self.p6(c5)
        return [p6, self.p7(p6)]


@ROI_HEADS_REGISTRY.register()
class WeightedCascadeROIHeads(CascadeROIHeads):
    """Cascade heads whose stages' losses have weights, ``MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS``.

    As in the release, the gradient that a stage sends into the features is that of its weighted loss; Detectron2's
    ``CascadeROIHeads`` weighs all stages alike and scales that gradient down by the number of stages.

    Args:
        stage_loss_weights: one for each stage.
        kwargs: as in ``CascadeROIHeads``.
    """

    @configurable
    def __init__(self, *, stage_loss_weights: Sequence[float] = STAGE_LOSS_WEIGHTS, **kwargs):
        super().__init__(**kwargs)
        if len(stage_loss_weights) != self.num_cascade_stages:
            raise UserError(
                f"MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS has {len(stage_loss_weights)} numbers for "
                f"{self.num_cascade_stages} stages: give one for each"
            )
        self.stage_loss_weights = tuple(stage_loss_weights)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict:
        weights = cfg.MODEL.ROI_BOX_CASCADE_HEAD.get("STAGE_LOSS_WEIGHTS", STAGE_LOSS_WEIGHTS)
        return {**super().from_config(cfg, input_shape), "stage_loss_weights": weights}

    def _forward_box(self, features: dict[str, Tensor], proposals: list[Instances], targets=None):
        found = super()._forward_box(features, proposals, targets)
        if not self.training:
            return found
        return {name: loss * self.stage_loss_weights[int(name.rpartition("stage")[2])] for name, loss in found.items()}

    def _run_stage(self, features: list[Tensor], proposals: list[Instances], stage: int):
        pooled = self.box_pooler(features, [proposal.proposal_boxes for proposal in proposals])
        return self.box_predictor[stage](self.box_head[stage](pooled))


@META_ARCH_REGISTRY.register()
class PerBatchRetinaNet(RetinaNet):
    """RetinaNet whose losses are divided by the positive anchors of the batch at hand, as in the release.

    An image without positive anchors counts as one that has one. Detectron2's ``RetinaNet`` divides by a running
    average that starts at 100.
    """

    def losses(self, anchors, pred_logits, gt_labels: list[Tensor], pred_anchor_deltas, gt_boxes) -> dict[str, Tensor]:
        positives = (((labels >= 0) & (labels != self.num_classes)).sum() for labels in gt_labels)
        self._positives = sum(max(int(count), 1) for count in positives)
        return super().losses(anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes)

    def _ema_update(self, name: str, value: float, initial_value: float, momentum: float = 0.9) -> float:
        return self._positives
