# Detectron2's RetinaNet with SGE and the paper's recipe; configs/Base-SGE-RetinaNet.yaml.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from sge_det import make_sge_stages

model = model_zoo.get_config("common/models/retinanet.py").model
model.input_format = "RGB"
model.pixel_mean = [123.675, 116.28, 103.53]
model.pixel_std = [58.395, 57.12, 57.375]
model.backbone.bottom_up.freeze_at = 2
model.backbone.bottom_up.stages = L(make_sge_stages)(depth=50, stride_in_1x1=False, norm="FrozenBN", groups=64)
model.anchor_generator.offset = 0.5
model.smooth_l1_beta = 0.11
