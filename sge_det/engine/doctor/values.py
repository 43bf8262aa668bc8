"""Values of config keys that nothing can work with, told from the value alone."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from ...config import PRECISIONS, TRACKERS, add_sge_config
from ...files import is_plain_name
from .finding import Finding


@dataclass(frozen=True)
class Rule:
    """What a value must be: a test, and the words for it ("a whole number from 1 on")."""

    holds: Callable[[Any], bool]
    what: str


def _whole(low: int, high: int | None = None) -> Rule:
    span = f"from {low} on" if high is None else f"from {low} to {high}"
    return Rule(lambda v: type(v) is int and low <= v <= (_LARGEST if high is None else high), f"a whole number {span}")


def _real(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Rule:
    """A finite number; ``above``: ``low`` itself is none of them."""
    span = f" above {low:g}" if above else "" if low == -math.inf else f" of at least {low:g}"
    span += "" if high == math.inf else f" and at most {high:g}"

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > _LARGEST:
            return False
        return (value > low if above else value >= low) and value <= high

    return Rule(holds, f"a finite number{span}")


def _choice(*names: str) -> Rule:
    return Rule(
        lambda v: isinstance(v, str) and v in names, f"one of {', '.join(name or repr(name) for name in names)}"
    )


def _each(rule: Rule, *, fewest: int = 1, count: int | None = None) -> Rule:
    many = f"{count} entries" if count else "a list" if fewest == 0 else "a list of one or more"

    def holds(value: Any) -> bool:
        is_list = isinstance(value, list | tuple) and len(value) <= _LONGEST
        return is_list and len(value) >= fewest and count in (None, len(value)) and all(map(rule.holds, value))

    return Rule(holds, f"{many}, each {rule.what}")


def _or(rule: Rule, *values: Any) -> Rule:
    # the type counts: True is no 1
    def holds(value: Any) -> bool:
        return rule.holds(value) or any(type(value) is type(other) and value == other for other in values)

    return Rule(holds, f"{rule.what} or {' or '.join(map(repr, values))}")


# Counts and numbers beyond these are slips: what they measure would fit no machine and no life.
_LARGEST, _LONGEST = 10**12, 1000
_TEXT = Rule(lambda v: isinstance(v, str) and "\0" not in v, "a text")
_NAME = Rule(lambda v: _TEXT.holds(v) and v.strip() != "", "a name")
_SHARE = _real(0, 1)
_POSITIVE, _NOT_NEGATIVE = _real(0, above=True), _real(0)
_CHANNELS, _LAYERS = _whole(1, 1 << 16), _whole(0, 64)
_PIXELS = _whole(1, 30_000)
_CANDIDATES = _whole(1, 10**7)
_POOLED = _whole(1, 128)
_LABELS = Rule(lambda v: type(v) is int and v in (-1, 0, 1), "0, 1 or -1")
_BOX_WEIGHTS = _each(_POSITIVE, count=4)
_BOX_LOSS = _choice("smooth_l1", "giou", "diou", "ciou")
_POOLER = _choice("ROIAlign", "ROIAlignV2", "ROIPool")
_STAGES = _each(_choice("stem", "res2", "res3", "res4", "res5"))
# What torch and NumPy take as a seed, less some for the numbers of processes that Detectron2 adds.
_SEED = Rule(lambda v: type(v) is int and -_LARGEST < v < 2**32 - 2**16, "a whole number below 4294901760")

_RULES: dict[str, Rule] = {
    "VERSION": Rule(lambda v: v == 2, "2"),
    "OUTPUT_DIR": Rule(
        lambda v: _NAME.holds(v) and is_plain_name(v), "a name without ? and without characters that do not print"
    ),
    "SEED": _SEED,
    "VIS_PERIOD": _whole(0),
    "REPORT_TO": _choice("", *TRACKERS),
    "MODEL_EMA.DECAY": Rule(lambda v: _SHARE.holds(v) and v < 1, "a number from 0 to below 1"),
    "MODEL.META_ARCHITECTURE": _NAME,
    "MODEL.PIXEL_MEAN": _each(_real(-1e6, 1e6)),
    "MODEL.PIXEL_STD": _each(_real(0, 1e6, above=True)),
    "MODEL.BACKBONE.FREEZE_AT": _whole(0, 5),
    "MODEL.FPN.IN_FEATURES": _each(_NAME, fewest=0),
    "MODEL.FPN.OUT_CHANNELS": _CHANNELS,
    "MODEL.FPN.FUSE_TYPE": _choice("sum", "avg"),
    "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": _NOT_NEGATIVE,
    "MODEL.ANCHOR_GENERATOR.SIZES": _each(_each(_POSITIVE)),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _each(_each(_POSITIVE)),
    "MODEL.ANCHOR_GENERATOR.ANGLES": _each(_each(_real(-360, 360))),
    "MODEL.ANCHOR_GENERATOR.OFFSET": Rule(lambda v: _NOT_NEGATIVE.holds(v) and v < 1, "a number from 0 to below 1"),
    "MODEL.RPN.IN_FEATURES": _each(_NAME),
    "MODEL.RPN.BOUNDARY_THRESH": _whole(-1),
    "MODEL.RPN.IOU_THRESHOLDS": _each(_real(0, 1, above=True)),
    "MODEL.RPN.IOU_LABELS": _each(_LABELS),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": _CANDIDATES,
    "MODEL.RPN.POSITIVE_FRACTION": _SHARE,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.RPN.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RPN.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.RPN.LOSS_WEIGHT": _NOT_NEGATIVE,
    **{f"MODEL.RPN.{w}_NMS_TOPK_{s}": _CANDIDATES for w in ("PRE", "POST") for s in ("TRAIN", "TEST")},
    "MODEL.RPN.NMS_THRESH": _SHARE,
    "MODEL.RPN.CONV_DIMS": _each(_or(_CHANNELS, -1)),
    "MODEL.ROI_HEADS.NUM_CLASSES": _CHANNELS,
    "MODEL.ROI_HEADS.IN_FEATURES": _each(_NAME),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _each(_real(0, 1, above=True)),
    "MODEL.ROI_HEADS.IOU_LABELS": _each(_LABELS),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": _CANDIDATES,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": _SHARE,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _SHARE,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": _SHARE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.NUM_FC": _LAYERS,
    "MODEL.ROI_BOX_HEAD.FC_DIM": _CHANNELS,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": _NOT_NEGATIVE,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES": _CHANNELS,
    "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": _each(_BOX_WEIGHTS),
    "MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS": _each(_NOT_NEGATIVE),
    "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": _each(_real(0, 1, above=True)),
    **{
        f"MODEL.ROI_{head}_HEAD.{key}": rule
        for head in ("BOX", "MASK", "KEYPOINT")
        for key, rule in (
            ("POOLER_RESOLUTION", _POOLED),
            ("POOLER_SAMPLING_RATIO", _whole(0, 32)),
            ("POOLER_TYPE", _POOLER),
        )
    },
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": _or(_POOLER, ""),
    **{f"MODEL.ROI_{head}_HEAD.NUM_CONV": _LAYERS for head in ("BOX", "MASK")},
    **{f"MODEL.ROI_{head}_HEAD.CONV_DIM": _CHANNELS for head in ("BOX", "MASK")},
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": _each(_CHANNELS),
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": _CHANNELS,
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": _whole(0),
    "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": _each(_NAME),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": _CHANNELS,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": _CHANNELS,
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE": Rule(lambda v: v in (2, 4, 8, 16, 32), "2, 4, 8, 16 or 32"),
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH": _SHARE,
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": _NOT_NEGATIVE,
    "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": _SHARE,
    "MODEL.RETINANET.NUM_CLASSES": _CHANNELS,
    "MODEL.RETINANET.IN_FEATURES": _each(_NAME),
    "MODEL.RETINANET.NUM_CONVS": _LAYERS,
    "MODEL.RETINANET.IOU_THRESHOLDS": _each(_real(0, 1, above=True)),
    "MODEL.RETINANET.IOU_LABELS": _each(_LABELS),
    "MODEL.RETINANET.PRIOR_PROB": Rule(lambda v: _SHARE.holds(v) and 0 < v < 1, "a number between 0 and 1"),
    "MODEL.RETINANET.SCORE_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": _CANDIDATES,
    "MODEL.RETINANET.NMS_THRESH_TEST": _SHARE,
    "MODEL.RETINANET.BBOX_REG_WEIGHTS": _BOX_WEIGHTS,
    "MODEL.RETINANET.FOCAL_LOSS_GAMMA": _NOT_NEGATIVE,
    # below 0 there is no weighting, as in fvcore's focal loss
    "MODEL.RETINANET.FOCAL_LOSS_ALPHA": _real(-1, 1),
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _NOT_NEGATIVE,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RESNETS.DEPTH": _whole(1, 10_000),
    "MODEL.RESNETS.OUT_FEATURES": _STAGES,
    "MODEL.RESNETS.NUM_GROUPS": _CHANNELS,
    "MODEL.RESNETS.WIDTH_PER_GROUP": _CHANNELS,
    "MODEL.RESNETS.RES5_DILATION": Rule(lambda v: type(v) is int and v in (1, 2), "1 or 2"),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": _CHANNELS,
    "MODEL.RESNETS.DEFORM_ON_PER_STAGE": _each(Rule(lambda v: isinstance(v, bool), "True or False"), count=4),
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": _CHANNELS,
    "MODEL.SGE.GROUPS": _CHANNELS,
    "MODEL.SGE.STAGES": _each(_NAME, fewest=0),
    "MODEL.SGE.LR_FACTOR": _NOT_NEGATIVE,
    "MODEL.SGE.WEIGHT_DECAY": _or(_NOT_NEGATIVE, None),
    "MODEL.SGE.INIT": _each(_real(), count=2),
    "MODEL.SGE.LOG_PERIOD": _whole(0),
    "INPUT.MIN_SIZE_TRAIN": _each(_PIXELS),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": _choice("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": _PIXELS,
    # 0 leaves test images as they are
    "INPUT.MIN_SIZE_TEST": _whole(0, 30_000),
    "INPUT.MAX_SIZE_TEST": _PIXELS,
    "INPUT.RANDOM_FLIP": _choice("horizontal", "vertical", "none"),
    "INPUT.CROP.TYPE": _choice("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": _each(_real(0, 30_000, above=True), count=2),
    "INPUT.FORMAT": _choice("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.PIXEL_RANGE": Rule(
        lambda v: isinstance(v, list | tuple) and (not v or (_each(_real(), count=2).holds(v) and v[0] < v[1])),
        "(), or the values that are to become 0 and 255, (LOW, HIGH)",
    ),
    "INPUT.MASK_FORMAT": _choice("polygon", "bitmask"),
    **{f"DATASETS.{key}": _each(_NAME, fewest=0) for key in ("TRAIN", "TEST")},
    **{f"DATASETS.PROPOSAL_FILES_{key}": _each(_NAME, fewest=0) for key in ("TRAIN", "TEST")},
    **{f"DATASETS.PRECOMPUTED_PROPOSAL_TOPK_{key}": _CANDIDATES for key in ("TRAIN", "TEST")},
    "DATALOADER.NUM_WORKERS": _whole(0, max(64, 4 * (os.cpu_count() or 1))),
    "DATALOADER.SAMPLER_TRAIN": _choice("TrainingSampler", "RepeatFactorTrainingSampler"),
    "DATALOADER.REPEAT_THRESHOLD": _NOT_NEGATIVE,
    "SOLVER.LR_SCHEDULER_NAME": _choice(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR", "WarmupPolyLR"
    ),
    "SOLVER.MAX_ITER": _whole(1),
    "SOLVER.BASE_LR": _NOT_NEGATIVE,
    "SOLVER.BASE_LR_END": _NOT_NEGATIVE,
    "SOLVER.MOMENTUM": Rule(lambda v: _NOT_NEGATIVE.holds(v) and v < 1, "a number from 0 to below 1"),
    "SOLVER.WEIGHT_DECAY": _NOT_NEGATIVE,
    "SOLVER.WEIGHT_DECAY_NORM": _or(_NOT_NEGATIVE, None),
    "SOLVER.WEIGHT_DECAY_BIAS": _or(_NOT_NEGATIVE, None),
    "SOLVER.BIAS_LR_FACTOR": _or(_NOT_NEGATIVE, None),
    "SOLVER.GAMMA": _NOT_NEGATIVE,
    "SOLVER.STEPS": _each(_whole(0), fewest=0),
    "SOLVER.NUM_DECAYS": _whole(0, 1000),
    "SOLVER.WARMUP_FACTOR": _NOT_NEGATIVE,
    "SOLVER.WARMUP_ITERS": _whole(0),
    "SOLVER.WARMUP_METHOD": _choice("linear", "constant"),
    "SOLVER.CHECKPOINT_PERIOD": _whole(1),
    "SOLVER.IMS_PER_BATCH": _whole(1, 1 << 16),
    "SOLVER.REFERENCE_WORLD_SIZE": _whole(0, 1 << 16),
    "SOLVER.SKIP_NONFINITE": _whole(0),
    "SOLVER.AMP.PRECISION": _choice(*PRECISIONS),
    "SOLVER.GRADIENT_ACCUMULATION_STEPS": _whole(1, 1 << 16),
    "SOLVER.BEST_CHECKPOINTER.METRIC": _NAME,
    "SOLVER.EARLY_STOPPING.PATIENCE": _whole(0),
    "SOLVER.EARLY_STOPPING.MIN_DELTA": _NOT_NEGATIVE,
    "SOLVER.EARLY_STOPPING.METRIC": _NAME,
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": _choice("value", "norm", "full_model"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": _POSITIVE,
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Rule(
        lambda v: v == math.inf or _POSITIVE.holds(v), "a number above 0, or infinity"
    ),
    "TEST.EVAL_PERIOD": _whole(0),
    "TEST.EXPECTED_RESULTS": Rule(
        lambda v: isinstance(v, list | tuple) and all(map(_is_expectation, v)),
        "a list of [task, metric, value, margin]",
    ),
    "TEST.KEYPOINT_OKS_SIGMAS": _each(_POSITIVE, fewest=0),
    "TEST.DETECTIONS_PER_IMAGE": _CANDIDATES,
    "TEST.AUG.MIN_SIZES": _each(_PIXELS),
    "TEST.AUG.MAX_SIZE": _PIXELS,
    "TEST.PRECISE_BN.NUM_ITER": _whole(1),
}


def _is_expectation(entry: Any) -> bool:
    if not isinstance(entry, list | tuple) or len(entry) not in (4, 5) or not all(map(_TEXT.holds, entry[:2])):
        return False
    return all(map(_real().holds, entry[2:]))


def leaves(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each key of ``cfg`` that holds a value, dotted, with it."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def default_values() -> dict[str, Any]:
    """Each key of Detectron2's and SGE's defaults with its value."""
    cfg = get_cfg()
    add_sge_config(cfg)
    return dict(leaves(cfg))


def unusable_values(cfg: CfgNode) -> list[Finding]:
    """A finding for each key whose value nothing can work with, whatever the others are."""
    findings = []
    for key, value in leaves(cfg):
        rule = _RULES.get(key) or _of_kind(value)
        if not rule.holds(value):
            findings.append(Finding("error", key, f"it is {_told(value)}", f"set {rule.what}"))
    findings = findings or [*_channels(cfg), *_scaled_workers(cfg)]
    return [*findings, *_device(cfg.MODEL.DEVICE)]


def _of_kind(value: Any) -> Rule:
    # yacs has seen to the type, but lets None stand everywhere
    if isinstance(value, str):
        return _TEXT
    return _real() if type(value) in (int, float) else Rule(lambda v: isinstance(v, bool | list | tuple), "a value")


def _told(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _channels(cfg: CfgNode) -> list[Finding]:
    wanted = 1 if cfg.INPUT.FORMAT == "L" else 3
    return [
        Finding(
            "error", key, f"it has {len(value)} numbers, INPUT.FORMAT {cfg.INPUT.FORMAT} has {wanted}", "set one each"
        )
        for key, value in (("MODEL.PIXEL_MEAN", cfg.MODEL.PIXEL_MEAN), ("MODEL.PIXEL_STD", cfg.MODEL.PIXEL_STD))
        if len(value) != wanted
    ]


def _scaled_workers(cfg: CfgNode) -> list[Finding]:
    reference, images = cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if not reference or images % reference == 0:
        return []
    problem = f"it is {reference}, which does not divide SOLVER.IMS_PER_BATCH {images}"
    return [Finding("error", "SOLVER.REFERENCE_WORLD_SIZE", problem, "set a divisor of it, or 0")]


def _device(name: str) -> list[Finding]:
    def finding(problem: str) -> list[Finding]:
        return [Finding("error", "MODEL.DEVICE", f"it is {_told(name)}, {problem}", "set cuda or cpu")]

    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        return finding("which is no device of torch")
    if device.type not in ("cpu", "cuda"):
        return finding("and detectors are trained on cuda or cpu alone")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    # without any GPU the CPU takes its place
    if count and (device.index or 0) >= count:
        return finding(f"but there are {count}")
    return []
