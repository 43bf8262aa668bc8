from ..common.faster_rcnn import model
from ..common.recipe import dataloader, lr_multiplier, optimizer, train
