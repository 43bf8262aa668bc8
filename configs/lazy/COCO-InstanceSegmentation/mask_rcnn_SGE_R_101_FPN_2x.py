from ..common.rcnn import model
from ..common.recipe import dataloader, optimizer, schedule, train

dataloader.train.mapper.use_instance_mask = True
model.backbone.bottom_up.stages.depth = 101
train.init_checkpoint = "weights/sge_resnet101.pth"
dataloader.train.total_batch_size = 8  # as in the release
optimizer.lr = 0.01
train.max_iter = 351840
lr_multiplier = schedule(train.max_iter, [234560, 322520])  # 16 and 22 of 24 epochs
