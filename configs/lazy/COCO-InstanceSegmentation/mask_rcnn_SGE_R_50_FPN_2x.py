from ..common.rcnn import model
from ..common.recipe import dataloader, lr_multiplier, optimizer, train

dataloader.train.mapper.use_instance_mask = True
