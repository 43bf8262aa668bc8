"""Slim detectors that compute, each from a YAML config and from its lazy twin."""

from sge_det.engine.lazy import setup_lazy_config

SLIM = {
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.SGE.GROUPS": "8",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.RESNETS.NORM": "BN",
    "SEED": "3",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "16",
    "MODEL.RETINANET.NUM_CONVS": "1",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "32",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MASK_FORMAT": "bitmask",
    "SOLVER.IMS_PER_BATCH": "2",
    "DATALOADER.NUM_WORKERS": "0",
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
}
SLIM_YAML = [part for pair in SLIM.items() for part in pair]


def slim_lazy(kind):
    backbone = "model.backbone"
    common = [
        *(f"{backbone}.bottom_up.stages.depth=18", f"{backbone}.bottom_up.stages.groups=8"),
        *(f"{backbone}.bottom_up.stages.norm=BN", f"{backbone}.bottom_up.stem.norm=BN"),
        *(f"{backbone}.bottom_up.freeze_at=0", f"{backbone}.out_channels=32", "train.init_checkpoint=''"),
        *("+train.seed=3", "dataloader.train.total_batch_size=2", "train.max_iter=3", "+train.sge_log_period=2"),
        *("dataloader.train.num_workers=0", "dataloader.test.num_workers=0", "train.device=cpu", "optimizer.lr=0.002"),
        *("lr_multiplier.scheduler.num_updates=3", "lr_multiplier.scheduler.values=[1.0]"),
        *("lr_multiplier.scheduler.milestones=[]", "lr_multiplier.warmup_length=1.0", "train.checkpointer.period=100"),
        "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ]
    if kind == "retinanet":
        return [*common, f"{backbone}.top_block.in_channels=512", "model.head.conv_dims=[32]"], []
    heads = [f"model.roi_heads.box_head{s}" for s in (("s.0", "s.1", "s.2") if kind == "cascade" else ("",))]
    heads = [f"{head}.fc_dims=[32,32]" for head in heads]
    predictors = [f"model.roi_heads.box_predictor{s}" for s in (("s.0", "s.1", "s.2") if kind == "cascade" else ("",))]
    masks = ["model.roi_heads.mask_head.conv_dims=[16,16,16,16,16]"] if kind == "mask" else []
    masks += ["+dataloader.train.mapper.instance_mask_format=bitmask"]
    return [
        *common,
        *heads,
        *masks,
        "model.proposal_generator.head.in_channels=32",
        "model.roi_heads.batch_size_per_image=32",
    ], predictors


NAMES = {
    "faster": "COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x",
    "mask": "COCO-InstanceSegmentation/mask_rcnn_SGE_R_50_FPN_1x",
    "cascade": "COCO-Detection/cascade_rcnn_SGE_R_50_FPN_20e",
    "retinanet": "COCO-Detection/retinanet_SGE_R_50_FPN_1x",
}


def lazy_config(kind, datasets, folder, *overrides):
    from detectron2.layers import ShapeSpec

    lines, predictors = slim_lazy(kind)
    output = f"train.output_dir={folder}"
    cfg = setup_lazy_config(f"lazy/{NAMES[kind]}.py", [*lines, output, *overrides], datasets)
    if kind == "retinanet":
        cfg.model.head.input_shape = [ShapeSpec(channels=32)] * 5
        return cfg
    boxes = cfg.model.roi_heads.box_heads if kind == "cascade" else [cfg.model.roi_heads.box_head]
    for head in boxes:
        head.input_shape = ShapeSpec(channels=32, height=7, width=7)
    for predictor in predictors:
        section = cfg
        for part in predictor.split("."):
            section = section[int(part)] if part.isdigit() else section[part]
        section.input_shape = ShapeSpec(channels=32)
    if kind == "mask":
        cfg.model.roi_heads.mask_head.input_shape = ShapeSpec(channels=32, width=14, height=14)
    return cfg
