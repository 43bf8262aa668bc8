from ..common.cascade_rcnn import model
from ..common.recipe import dataloader, optimizer, schedule, train

for part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(part)
train.max_iter = 146600
lr_multiplier = schedule(train.max_iter, [117280, 139270])  # 16 and 19 of 20 epochs
