# Detectron2's Mask R-CNN with SGE and the paper's recipe; configs/Base-SGE-RCNN-FPN.yaml.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from sge_det import make_sge_stages

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stages = L(make_sge_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN", groups=64)

rpn = model.proposal_generator
rpn.anchor_generator.offset = 0.5
rpn.pre_nms_topk = (2000, 2000)
rpn.post_nms_topk = (2000, 2000)
rpn.anchor_boundary_thresh = 0
rpn.smooth_l1_beta = 0.1111

heads = model.roi_heads
for pooler in (heads.box_pooler, heads.mask_pooler):
    pooler.pooler_type = "ROIAlign"
    pooler.sampling_ratio = 2
heads.box_predictor.smooth_l1_beta = 1.0
