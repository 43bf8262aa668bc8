from ..common.faster_rcnn import model
from ..common.recipe import dataloader, optimizer, schedule, train

train.max_iter = 87960
lr_multiplier = schedule(train.max_iter, [58640, 80630])  # 8 and 11 of 12 epochs
