# configs/Base-SGE-Cascade-RCNN-FPN.yaml, with masks.
from detectron2 import model_zoo

from .rcnn import model

heads = model_zoo.get_config("common/models/cascade_rcnn.py").model.roi_heads
for part in ("box_pooler", "mask_pooler"):
    heads[part] = model.roi_heads[part]
for predictor in heads.box_predictors:
    predictor.smooth_l1_beta = 1.0
heads.box_predictors[2].box2box_transform.weights = (30.3, 30.3, 14.9, 14.9)
model.roi_heads = heads
