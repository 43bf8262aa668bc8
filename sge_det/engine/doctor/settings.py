"""What is wrong with the settings themselves: no file is read but the config."""

import importlib.util
from pathlib import Path

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ...checkpoint.checkpointer import check_weights_path
from ...checkpoint.transplant import sge_builder
from ...config import STAGES, SGEOptions, compose_config, ema_decay, find_config, optimizer_name, sge_options
from ...data.datasets import head_section
from ...errors import UserError
from .finding import Finding, finding_of
from .model import examine_model, has_sge
from .values import unusable_values

# The learning rate of the paper's recipe for 16 images; another number of images scales it (the linear rule).
_BASE_LR, _RETINANET_BASE_LR = 0.02, 0.01
# Learning rates further than this factor from the rule are reported.
_LR_FACTOR = 1.5


def examine_settings(
    cfg: CfgNode, config_file: str = "", *, eval_only: bool = False, own_data: bool = False, resumed: bool = False
) -> list[Finding]:
    """What is wrong with the settings themselves; reads no file but the config.

    Args:
        own_data: data sets were given besides the config, so that advice for COCO does not fit.
        resumed: a checkpoint is there to go on from, so that nobody reads ``MODEL.WEIGHTS``.
    """
    unusable = unusable_values(cfg)
    if unusable:  # nothing can be computed from them
        return [*duplicate_keys(config_file), *unusable]
    options = sge_options(cfg)
    return [
        *duplicate_keys(config_file),
        *_switches(cfg, eval_only),
        *unregistered(cfg),
        *_backbone_without_sge(cfg, options),
        *wrong_groups(cfg, options),
        *([] if unregistered(cfg) else examine_model(cfg)),
        *([] if resumed else missing_weights(cfg, eval_only=eval_only)),
        *([] if eval_only or own_data else _learning_rate(cfg)),
    ]


def examine_switches(cfg: CfgNode, *, eval_only: bool = False) -> list[Finding]:
    """What is wrong with the trainer's own settings, whatever the model is."""
    return unusable_values(cfg) or _switches(cfg, eval_only)


def _switches(cfg: CfgNode, eval_only: bool) -> list[Finding]:
    if eval_only:
        return _mixed_precision(cfg)
    return [*_mixed_precision(cfg), *_accumulation(cfg), *_averaging(cfg), *_evaluations(cfg), *_tracker(cfg)]


def duplicate_keys(config_file: str) -> list[Finding]:
    found, seen, queue = [], set(), [config_file]
    while queue:
        try:
            path = find_config(queue.pop())
            if path in seen:
                continue
            seen.add(path)
            root = compose_config(path)
        except UserError:
            continue  # load_config says so
        for key, line in _repeated(root):
            found.append(
                Finding("error", key, f"{path} sets it twice, the second time in line {line}", "keep one of the two")
            )
        for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
            if key.value == "_BASE_":
                bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
                queue += [str(Path(path).parent / base.value) for base in bases if isinstance(base, yaml.ScalarNode)]
    return found


def _repeated(node: yaml.Node | None, prefix: str = "") -> list[tuple[str, int]]:
    """The dotted keys that a mapping of ``node`` has more than once, with the line (from 1) of the repetition."""
    if not isinstance(node, yaml.MappingNode):
        return []
    repeated, keys = [], set()
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name in keys:
            repeated.append((name, key.start_mark.line + 1))
        keys.add(name)
        repeated += _repeated(value, f"{name}.")
    return repeated


def _mixed_precision(cfg: CfgNode) -> list[Finding]:
    amp = cfg.SOLVER.AMP
    has_gpu = cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available()
    if not amp.ENABLED or amp.PRECISION == "bfloat16" or has_gpu:
        return []
    problem = f"SOLVER.AMP.ENABLED True needs a GPU for SOLVER.AMP.PRECISION {amp.PRECISION}"
    return [Finding("error", "SOLVER.AMP.ENABLED", problem, "set that to bfloat16, or this to False")]


def _accumulation(cfg: CfgNode) -> list[Finding]:
    passes, images = cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS, cfg.SOLVER.IMS_PER_BATCH
    if images % passes == 0:
        return []
    problem = f"it is {passes}, which does not divide SOLVER.IMS_PER_BATCH {images}, the images of a step"
    return [Finding("error", "SOLVER.GRADIENT_ACCUMULATION_STEPS", problem, "set a divisor of it")]


def _averaging(cfg: CfgNode) -> list[Finding]:
    try:
        ema_decay(cfg)
    except UserError as error:
        return [finding_of(error, "MODEL_EMA.ENABLED")]
    return []


def _evaluations(cfg: CfgNode) -> list[Finding]:
    """What goes by evaluations needs some, on one known set of names."""
    solver, found = cfg.SOLVER, []
    asked = {
        "SOLVER.BEST_CHECKPOINTER.ENABLED": solver.BEST_CHECKPOINTER.ENABLED,
        "SOLVER.EARLY_STOPPING.PATIENCE": solver.EARLY_STOPPING.PATIENCE > 0,
    }
    for key in (key for key, is_on in asked.items() if is_on):
        if not 0 < cfg.TEST.EVAL_PERIOD < solver.MAX_ITER:
            problem = f"it goes by evaluations, but TEST.EVAL_PERIOD {cfg.TEST.EVAL_PERIOD} gives none before the last"
            found.append(Finding("error", key, problem, "set TEST.EVAL_PERIOD to a fraction of SOLVER.MAX_ITER"))
    return found


def _tracker(cfg: CfgNode) -> list[Finding]:
    if not cfg.REPORT_TO or importlib.util.find_spec(cfg.REPORT_TO) is not None:
        return []
    return [Finding("error", "REPORT_TO", f"{cfg.REPORT_TO} is not installed", f"pip install {cfg.REPORT_TO}")]


def unregistered(cfg: CfgNode) -> list[Finding]:
    names = (
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
    )
    return [
        Finding(
            "error",
            key,
            f"{name!r:.100} is not registered",
            "import the package that defines it (import sge_det for SGE's), or correct the name",
        )
        for key, name, registry in names
        if name not in registry
    ]


def _backbone_without_sge(cfg: CfgNode, options: SGEOptions) -> list[Finding]:
    name = cfg.MODEL.BACKBONE.NAME
    own = sge_builder(name)
    if own is None or not options.enabled:
        return []
    return [
        Finding(
            "warning",
            "MODEL.BACKBONE.NAME",
            f"{name} builds a plain ResNet whatever MODEL.SGE says",
            f"set it to {own}, or MODEL.SGE.ENABLED False",
        )
    ]


def wrong_groups(cfg: CfgNode, options: SGEOptions) -> list[Finding]:
    if not has_sge(cfg, options):
        return []
    for stage in options.stages:
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS << STAGES.index(stage)
        if options.groups < 1 or channels % options.groups:
            return [
                Finding(
                    "error",
                    "MODEL.SGE.GROUPS",
                    f"{options.groups} does not divide the {channels} channels of {stage}",
                    "set a divisor of them, or leave the stage out of MODEL.SGE.STAGES",
                )
            ]
    return []


def missing_weights(cfg: CfgNode, *, eval_only: bool = False) -> list[Finding]:
    key = "MODEL.WEIGHTS"
    try:
        check_weights_path(cfg.MODEL.WEIGHTS, key, "" if eval_only else f"{key} ''")
    except UserError as error:
        return [Finding("error", key, str(error).removeprefix(f"{key} "), "")]
    return []


def _learning_rate(cfg: CfgNode) -> list[Finding]:
    solver = cfg.SOLVER
    is_recipe = (
        any(name.startswith(("coco_2014_", "coco_2017_")) for name in cfg.DATASETS.TRAIN)
        and optimizer_name(cfg) == "SGD"
    )
    if not is_recipe or solver.IMS_PER_BATCH < 1:
        return []
    return learning_rate(solver.BASE_LR, solver.IMS_PER_BATCH, is_retinanet=head_section(cfg) == "RETINANET")


def learning_rate(rate: float, images: int, *, is_retinanet: bool) -> list[Finding]:
    """Whether a learning rate for so many images a step is far from the recipe's on COCO, in proportion."""
    base = _RETINANET_BASE_LR if is_retinanet else _BASE_LR
    rule = base * images / 16
    if rule / _LR_FACTOR <= rate <= rule * _LR_FACTOR:
        return []
    return [
        Finding(
            "warning",
            "SOLVER.BASE_LR",
            f"{rate:g} at SOLVER.IMS_PER_BATCH {images} is {rate / rule:.2g} times "
            f"the recipe's ({base:g} for 16 images, in proportion)",
            f"set SOLVER.BASE_LR {rule:g}, and MAX_ITER and STEPS for as many epochs",
        )
    ]
