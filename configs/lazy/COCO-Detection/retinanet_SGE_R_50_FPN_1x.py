from ..common.recipe import dataloader, optimizer, schedule, train
from ..common.retinanet import model

optimizer.lr = 0.01
train.max_iter = 87960
lr_multiplier = schedule(train.max_iter, [58640, 80630])  # 8 and 11 of 12 epochs
