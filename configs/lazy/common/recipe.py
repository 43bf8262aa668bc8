# The paper's common recipe, that of configs/Base-SGE.yaml: loader, optimizer, schedule and run.
import detectron2.data.transforms as T
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from sge_det.evaluation.coco import HotcocoEvaluator
from sge_det.solver import build_clipped

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations = [
    L(T.ResizeShortestEdge)(short_edge_length=(800,), sample_style="choice", max_size=1333),
    L(T.RandomFlip)(horizontal=True),
]
dataloader.evaluator._target_ = HotcocoEvaluator

optimizer = model_zoo.get_config("common/optim.py").SGD
optimizer._target_ = build_clipped
optimizer.optimizer = torch.optim.SGD
optimizer.max_norm = 35.0
optimizer.params.weight_decay_norm = 1e-4

train = model_zoo.get_config("common/train.py").train
train.init_checkpoint = "weights/sge_resnet50.pth"


def schedule(iterations, drops):
    """The learning rate is a tenth from each of two drops on; 500 iterations of warmup from a third."""
    return L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=drops, num_updates=iterations),
        warmup_factor=0.3333,
        warmup_length=500 / iterations,
        warmup_method="linear",
    )


# 7,330 iterations an epoch at 16 images a batch
train.max_iter = 175920
lr_multiplier = schedule(train.max_iter, [117280, 161260])
