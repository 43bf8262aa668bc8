"""The config doctor: faults of a config, its weights and its data that cost a run and raise no error themselves."""

import functools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hotcoco
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from detectron2.utils import comm

from ..checkpoint.checkpointer import check_weights_exist, checkpoints
from ..checkpoint.convert import Coverage, coverage, in_backbone, model_shapes
from ..checkpoint.mapping import to_detectron2
from ..checkpoint.safe_load import load_file
from ..checkpoint.sources import Recipe, Source, known_recipe, read_source
from ..checkpoint.transplant import sge_builder
from ..config import ATTENTIONS, STAGES, find_config, load_config, optimizer_name, sge_options
from ..data.datasets import check_file_names, missing_images, use_datasets
from ..errors import UserError

logger = logging.getLogger(__name__)

# The learning rate of the paper's recipe for 16 images; another number of images scales it (the linear rule).
_BASE_LR, _RETINANET_BASE_LR = 0.02, 0.01
# Learning rates further than this factor from the rule are reported.
_LR_FACTOR = 1.5

_DATA_ERRORS = {
    "duplicate_image_id": ("two images have the same id", "give each image its own"),
    "duplicate_ann_id": ("two annotations have the same id", "give each annotation its own"),
    "duplicate_category_id": ("two categories have the same id", "give each category its own"),
    "orphan_image_id": ("annotations are of images that are not in it", "remove them, or add the images"),
    "orphan_category_id": ("annotations are of categories that are not in it", "remove them, or add the categories"),
}
_DATA_WARNINGS = {
    "degenerate_bbox": ("boxes have no width or no height", "remove them"),
    "bbox_out_of_bounds": (
        "boxes reach outside their image",
        "clip them, and see that width and height are the image's",
    ),
    "zero_instance_category": ("categories have no object", "remove them, or add objects: their AP is undefined"),
}


@dataclass(frozen=True)
class Finding:
    """Something wrong with a config.

    Attributes:
        severity: "error": it cannot work or ruins the result; "warning": it may be meant.
        key: the config key or option that it is about.
        problem: what is wrong.
        remedy: what to set or do.
    """

    severity: str
    key: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}{f'; {self.remedy}' if self.remedy else ''}"


def diagnose(
    config_file: str,
    overrides: Sequence[str] = (),
    datasets: Sequence[Sequence[str]] = (),
    *,
    processes: int = 1,
    resume: bool = False,
    eval_only: bool = False,
) -> list[Finding]:
    """All that is wrong with a config and what it names; errors come first.

    Args:
        config_file, overrides, datasets, eval_only: as in :func:`.training.setup_config`.
        processes: how many it is to be trained in.
        resume: whether it is to go on from ``OUTPUT_DIR``.
    """
    try:
        cfg = load_config(config_file, overrides)
    except UserError as error:
        return [*_duplicate_keys(config_file), _finding(error, "--config-file")]
    findings = examine_settings(cfg, config_file, eval_only=eval_only)
    try:
        use_datasets(cfg, datasets, overrides, eval_only=eval_only)
    except UserError as error:
        findings.append(_finding(error, "DATASETS"))
    findings += examine_files(cfg, eval_only=eval_only)
    if not eval_only:
        findings += examine_run(cfg, processes=processes, resume=resume)
    unique = list(dict.fromkeys(findings))
    return sorted(unique, key=lambda finding: finding.severity)


def tell(findings: Sequence[Finding]) -> None:
    """Logs each warning once a process, and ends where there are errors.

    Raises:
        UserError: the first error, and how many more there are.
    """
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more: tools/check_config.py lists them)" if len(errors) > 1 else ""
        raise UserError(f"{errors[0]}{more}")
    # the process that started this one has told them
    if comm.get_world_size() == 1:
        for finding in findings:
            _warn(str(finding))


@functools.cache
def _warn(text: str) -> None:
    logger.warning(text)


def examine_settings(cfg: CfgNode, config_file: str = "", *, eval_only: bool = False) -> list[Finding]:
    """What is wrong with the settings themselves; reads no file but the config."""
    return [
        *_duplicate_keys(config_file),
        *_mixed_precision(cfg),
        *_unregistered(cfg),
        *_backbone_without_sge(cfg),
        *_groups(cfg),
        *_missing_weights(cfg),
        *([] if eval_only else _learning_rate(cfg)),
    ]


def examine_files(cfg: CfgNode, *, eval_only: bool = False) -> list[Finding]:
    """What is wrong with the weights and the data sets of ``cfg``, or with it in their light."""
    names = dict.fromkeys((*(() if eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST))
    findings = [finding for name in names if name in DatasetCatalog for finding in _dataset(name)]
    if not _unregistered(cfg) and not _groups(cfg) and not _missing_weights(cfg):
        findings += _weights(cfg)
    return [f for f in findings if not (eval_only and f.key == "MODEL.BACKBONE.FREEZE_AT")]


def examine_run(cfg: CfgNode, *, processes: int, resume: bool = False) -> list[Finding]:
    """What is wrong with running ``cfg`` in so many processes, or resuming it."""
    return [*_sync_bn(cfg, processes), *(_resume(cfg) if resume else [])]


def _finding(error: UserError, default_key: str) -> Finding:
    message = str(error)
    key = re.search(r"\b[A-Z]+(\.[A-Z][A-Z0-9_]*)+", message)
    return Finding("error", key[0] if key else default_key, message, "")


def _duplicate_keys(config_file: str) -> list[Finding]:
    found, seen, queue = [], set(), [config_file]
    while queue:
        try:
            path = find_config(queue.pop())
            if path in seen:
                continue
            seen.add(path)
            root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        except (UserError, yaml.YAMLError, OSError, UnicodeDecodeError):
            continue  # load_config says so
        for key, line in _repeated(root):
            found.append(
                Finding("error", key, f"{path} sets it twice, the second time in line {line}", "keep one of the two")
            )
        for key, value in root.value if isinstance(root, yaml.MappingNode) else []:
            if key.value == "_BASE_":
                bases = value.value if isinstance(value, yaml.SequenceNode) else [value]
                queue += [str(Path(path).parent / base.value) for base in bases]
    return found


def _repeated(node: yaml.Node, prefix: str = "") -> list[tuple[str, int]]:
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
    if not cfg.SOLVER.AMP.ENABLED or (cfg.MODEL.DEVICE != "cpu" and torch.cuda.is_available()):
        return []
    problem = "SOLVER.AMP.ENABLED True needs a GPU: Detectron2 trains with mixed precision on GPUs only"
    return [Finding("error", "SOLVER.AMP.ENABLED", problem, "set it to False")]


def _unregistered(cfg: CfgNode) -> list[Finding]:
    names = (
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
    )
    return [
        Finding(
            "error",
            key,
            f"{name!r} is not registered",
            "import the package that defines it (import sge_det for SGE's), or correct the name",
        )
        for key, name, registry in names
        if name not in registry
    ]


def _backbone_without_sge(cfg: CfgNode) -> list[Finding]:
    name = cfg.MODEL.BACKBONE.NAME
    own = sge_builder(name)
    if own is None or not sge_options(cfg).ENABLED:
        return []
    return [
        Finding(
            "warning",
            "MODEL.BACKBONE.NAME",
            f"{name} builds a plain ResNet whatever MODEL.SGE says",
            f"set it to {own}, or MODEL.SGE.ENABLED False",
        )
    ]


def _has_sge(cfg: CfgNode) -> bool:
    options = sge_options(cfg)
    return "sge" in cfg.MODEL.BACKBONE.NAME and options.ENABLED and options.ATTENTION == "sge"


def _groups(cfg: CfgNode) -> list[Finding]:
    if not _has_sge(cfg):
        return []
    options = sge_options(cfg)
    for stage in options.STAGES:
        channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS << STAGES.index(stage)
        if options.GROUPS < 1 or channels % options.GROUPS:
            return [
                Finding(
                    "error",
                    "MODEL.SGE.GROUPS",
                    f"{options.GROUPS} does not divide the {channels} channels of {stage}",
                    "set a divisor of them, or leave the stage out of MODEL.SGE.STAGES",
                )
            ]
    return []


def _missing_weights(cfg: CfgNode) -> list[Finding]:
    try:
        check_weights_exist(cfg)
    except UserError as error:
        return [_finding(error, "MODEL.WEIGHTS")]
    return []


def _learning_rate(cfg: CfgNode) -> list[Finding]:
    solver = cfg.SOLVER
    is_recipe = any(name.startswith("coco_") for name in cfg.DATASETS.TRAIN) and optimizer_name(cfg) == "SGD"
    if not is_recipe or solver.IMS_PER_BATCH < 1:
        return []
    base = _RETINANET_BASE_LR if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else _BASE_LR
    rule = base * solver.IMS_PER_BATCH / 16
    if rule / _LR_FACTOR <= solver.BASE_LR <= rule * _LR_FACTOR:
        return []
    return [
        Finding(
            "warning",
            "SOLVER.BASE_LR",
            f"{solver.BASE_LR:g} at SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is {solver.BASE_LR / rule:.2g} times "
            f"the recipe's ({base:g} for 16 images, in proportion)",
            f"set SOLVER.BASE_LR {rule:g}, and MAX_ITER and STEPS for as many epochs",
        )
    ]


def _dataset(name: str) -> list[Finding]:
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if not json_file or not image_root or not Path(json_file).is_file() or not Path(image_root).is_dir():
        return []  # not COCO's format, or use_datasets has said so
    stat = os.stat(json_file)
    faults = _dataset_faults(json_file, image_root, stat.st_mtime_ns, stat.st_size)
    return [Finding(severity, f"data set {name}", problem, remedy) for severity, problem, remedy in faults]


@functools.lru_cache(maxsize=8)
def _dataset_faults(json_file: str, image_root: str, time: int, size: int) -> list[tuple[str, str, str]]:
    """Faults of a data set as (severity, problem, remedy); ``time`` and ``size`` tell states of the file apart."""
    try:
        coco = hotcoco.COCO(json_file)
        health = coco.healthcheck()
        images = coco.load_imgs(coco.get_img_ids())
    except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
        return [("error", f"{json_file} is not in COCO's instance format: {error}", "write it anew")]
    faults = []
    for severity, known in (("error", _DATA_ERRORS), ("warning", _DATA_WARNINGS)):
        for entry in (*health["errors"], *health["warnings"]):
            if entry["code"] in known:
                ids = entry["affected_ids"]
                some = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
                problem, remedy = known[entry["code"]]
                faults.append((severity, f"in {json_file} {problem} ({len(ids)}: ids {some})", remedy))
    try:
        check_file_names(json_file, images)
    except UserError as error:
        return [*faults, ("error", str(error), "")]
    missing = missing_images(images, image_root)
    if missing:
        problem = (
            f"{len(missing)} of the {len(images)} images of {json_file} are not in {image_root} ({missing[0]}, ...)"
        )
        faults.append(("error", problem, "put them there, or name the folder that holds them"))
    return faults


def _weights(cfg: CfgNode) -> list[Finding]:
    path = cfg.MODEL.WEIGHTS
    if not path:
        return _frozen(cfg, None)
    if "://" in path:  # not fetched before it is needed: judged by its name alone
        recipe = known_recipe(path)
        if recipe is None:
            return []
        findings = _contradictions(cfg, recipe)
        return findings + _plain(cfg, {}) + _frozen(cfg, {}) if _has_sge(cfg) else findings
    try:
        source = read_source(path, strict=False)
        if source.kind and source.kind not in ("detectron2-backbone", "detectron2-detector", "caffe2"):
            remedy = f"convert it: tools/convert_weights.py {path} OUTPUT.pth"
            return [
                Finding("error", "MODEL.WEIGHTS", f"{path} is {source.description}, not Detectron2's format", remedy)
            ]
        state, filled = source.state, {}
        if source.kind == "caffe2":
            renamed = to_detectron2(source)
            state, filled = renamed.state, renamed.filled
        fit = coverage(state, model_shapes(cfg), by_suffix=source.by_suffix)
    except UserError as error:
        return [_finding(error, "MODEL.WEIGHTS")]
    norm = cfg.MODEL.RESNETS.NORM
    if filled and norm != "FrozenBN":
        problem = f"it is {norm or 'no norm'}, but {path} has norms without statistics, which FrozenBN alone can take"
        return [Finding("error", "MODEL.RESNETS.NORM", problem, "set it to FrozenBN, or take other weights")]
    findings = _contradictions(cfg, source.recipe) + _coverage(cfg, source, fit)
    if not any(finding.severity == "error" for finding in findings) and source.kind and _has_sge(cfg):
        sge = {key: state[name] for key, name in fit.filled.items() if ".sge." in key}
        findings += [*_plain(cfg, sge), *_frozen(cfg, sge)]
    return findings


def _contradictions(cfg: CfgNode, recipe: Recipe) -> list[Finding]:
    return [
        Finding("error", key, f"it is {have}, but {cfg.MODEL.WEIGHTS} was trained with {want}", f"set {key} {want}")
        for key, (have, want) in recipe.contradictions(cfg).items()
    ]


def _coverage(cfg: CfgNode, source: Source, fit: Coverage) -> list[Finding]:
    path = cfg.MODEL.WEIGHTS
    groups = next((shapes for key, shapes in fit.misshapen.items() if ".sge." in key), None)
    if groups:
        have, want = groups
        if max(have) == max(want):
            problem, remedy = f"{path} has SGE of the shape {have}", f"tools/convert_weights.py {path} OUTPUT.pth"
            return [Finding("error", "MODEL.WEIGHTS", f"{problem}, the model of {want}", f"convert it: {remedy}")]
        problem = f"{path} has SGE of {max(have)} groups, the model of {max(want)}"
        return [Finding("error", "MODEL.SGE.GROUPS", problem, f"set MODEL.SGE.GROUPS {max(have)}")]
    attention = tuple(f".{name}." for name in ATTENTIONS)
    everything = (*fit.filled, *fit.unfilled)
    own = [key for key in everything if in_backbone(key) and not any(name in key for name in attention)]
    lacking = [key for key in own if key not in fit.filled]
    if lacking and (source.kind or not fit.filled):
        shapes = "{} there and {} in the model".format(*fit.misshapen.get(lacking[0], ("absent", "wanted")))
        return [
            Finding(
                "error",
                "MODEL.WEIGHTS",
                f"{path} fills {len(own) - len(lacking)} of the {len(own)} tensors of the backbone "
                f"({lacking[0]}: {shapes})",
                "name the weights of this model, or set the config to theirs (MODEL.RESNETS.DEPTH, NORM)",
            )
        ]
    findings = []
    left_out = [key for key in fit.unused if ".sge." in key]
    if left_out:
        problem = f"{path} has SGE ({len(left_out)} tensors), the model has no place for it: it is left out"
        remedy = "set MODEL.SGE.ENABLED True, MODEL.SGE.ATTENTION sge and all STAGES, or take plain weights"
        findings.append(Finding("warning", "MODEL.SGE", problem, remedy))
    # heads are not looked for in a backbone file, and SGE without any weights has a finding of its own
    has_heads = any(not in_backbone(key) for key in (*fit.filled, *fit.misshapen))
    is_plain = _has_sge(cfg) and not any(".sge." in key for key in fit.filled)
    meant = [key for key in everything if (not (is_plain and ".sge." in key) if in_backbone(key) else has_heads)]
    unfilled = [key for key in meant if key not in fit.filled]
    if unfilled:
        whole = "model" if has_heads else "backbone"
        problem = f"{path} fills {len(meant) - len(unfilled)} of the {len(meant)} tensors of the {whole}: {unfilled[0]}"
        if unfilled[0] in fit.misshapen:
            have, want = fit.misshapen[unfilled[0]]
            problem += f" is {have} there and {want} in the model, and"
        remedy = "see that this is meant (other classes for instance)"
        findings.append(Finding("warning", "MODEL.WEIGHTS", f"{problem} starts anew", remedy))
    return findings


def _plain(cfg: CfgNode, sge: dict[str, torch.Tensor]) -> list[Finding]:
    if sge or not sge_options(cfg).STAGES:
        return []
    path = cfg.MODEL.WEIGHTS
    return [
        Finding(
            "warning",
            "MODEL.WEIGHTS",
            f"{path} has no SGE, and the model does not compute what it was trained for",
            f"transplant it: tools/convert_weights.py {path} OUTPUT.pth --transplant, or take SGE weights",
        )
    ]


def _frozen(cfg: CfgNode, sge: dict[str, torch.Tensor] | None) -> list[Finding]:
    """``sge``: the SGE parameters in the weights by the model's names; None where there are no weights at all."""
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if sge is None and freeze_at > 0 and "resnet" in cfg.MODEL.BACKBONE.NAME:
        problem = f"{freeze_at} freezes the backbone's first stages at their random start, as there are no weights"
        return [
            Finding("warning", "MODEL.BACKBONE.FREEZE_AT", problem, "set it to 0, or name weights in MODEL.WEIGHTS")
        ]
    if sge is None or not _has_sge(cfg):
        return []
    frozen = [stage for stage in sge_options(cfg).STAGES if STAGES.index(stage) + 2 <= freeze_at]
    weights = [value for key, value in sge.items() if key.endswith("weight") and any(f".{s}." in key for s in frozen)]
    is_trained = any(bool(value.any()) for value in weights) and not sge_options(cfg).get("RESET", False)
    if not frozen or is_trained:
        return []
    return [
        Finding(
            "warning",
            "MODEL.BACKBONE.FREEZE_AT",
            f"{freeze_at} freezes the SGE of {' and '.join(frozen)}, which {cfg.MODEL.WEIGHTS} has not trained: its "
            "gates stay constant",
            "set it to 1, or take SGE weights",
        )
    ]


def _sync_bn(cfg: CfgNode, processes: int) -> list[Finding]:
    model = cfg.MODEL
    norms = {
        "MODEL.RESNETS.NORM": model.RESNETS.NORM,
        "MODEL.FPN.NORM": model.FPN.NORM,
        "MODEL.ROI_BOX_HEAD.NORM": model.ROI_BOX_HEAD.NORM,
        "MODEL.ROI_MASK_HEAD.NORM": model.ROI_MASK_HEAD.NORM,
        "MODEL.RETINANET.NORM": model.RETINANET.NORM,
    }
    sync = {key: norm for key, norm in norms.items() if "SyncBN" in norm}
    if processes == 1:
        remedy = "set {} BN or FrozenBN, or use more GPUs"
        return [
            Finding("warning", key, f"{norm} in one process is BN, of few images", remedy.format(key))
            for key, norm in sync.items()
        ]
    if model.DEVICE != "cpu" and torch.cuda.is_available():
        return []
    remedy = "set {} BN or FrozenBN"
    torchs = {key: norm for key, norm in sync.items() if not norm.startswith("naive")}  # Detectron2's own runs anywhere
    return [Finding("error", key, f"{norm} needs GPUs", remedy.format(key)) for key, norm in torchs.items()]


def _resume(cfg: CfgNode) -> list[Finding]:
    try:
        found = checkpoints(cfg.OUTPUT_DIR)
    except UserError as error:
        return [_finding(error, "--resume")]
    if not found:
        return []
    path = found[0]
    try:
        checkpoint = load_file(path)
    except UserError as error:
        finding = _finding(error, "--resume")
        older = found[1:]
        return [replace(finding, severity="warning", remedy=f"{older[0]} is tried then")] if older else [finding]
    iteration = checkpoint.get("iteration") if isinstance(checkpoint, dict) else None
    done = iteration + 1 if type(iteration) is int else 0
    if done < cfg.SOLVER.MAX_ITER:
        return []
    problem = f"{path} is already trained to iteration {done} of {cfg.SOLVER.MAX_ITER}: there is nothing to train"
    return [Finding("warning", "SOLVER.MAX_ITER", problem, f"set it above {done}, or another OUTPUT_DIR")]
