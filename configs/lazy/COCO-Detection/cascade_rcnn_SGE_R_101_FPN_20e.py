from ..common.cascade_rcnn import model
from ..common.recipe import dataloader, optimizer, schedule, train

for part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(part)
model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "weights/sge_resnet101.pth"
dataloader.train.total_batch_size = 8  # as in the release
optimizer.lr = 0.01
train.max_iter = 293200
lr_multiplier = schedule(train.max_iter, [234560, 278540])  # 16 and 19 of 20 epochs
