from ..common.recipe import dataloader, lr_multiplier, optimizer, train
from ..common.retinanet import model

optimizer.lr = 0.01
