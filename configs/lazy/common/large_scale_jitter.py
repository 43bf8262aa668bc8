# Detectron2's new_baselines (large-scale jitter, from scratch, SyncBN) with SGE in the backbone.
from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from sge_det import make_sge_stages, with_sge
from sge_det.evaluation.coco import HotcocoEvaluator


def baseline(name, groups=64):
    """A config of Detectron2's new_baselines, with SGE; unlike Detectron2's it can be saved as YAML."""
    cfg = model_zoo.get_config(f"new_baselines/{name}.py")
    resnet = cfg.model.backbone.bottom_up
    if "stages" in resnet:
        resnet.stages._target_ = make_sge_stages
        resnet.stages.groups = groups
    else:
        cfg.model.backbone.in_features = resnet.out_features
        cfg.model.backbone.bottom_up = L(with_sge)(model=resnet, groups=groups)
    # the layer that Detectron2's lambda makes, by its name
    cfg.model.roi_heads.box_head.conv_norm = cfg.model.roi_heads.mask_head.conv_norm = "naiveSyncBN_N"
    cfg.dataloader.evaluator._target_ = HotcocoEvaluator
    return cfg.dataloader, cfg.lr_multiplier, cfg.model, cfg.optimizer, cfg.train
