"""The config doctor of lazy configs: what would ruin a run and raises no error, or raises it late."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..checkpoint.checksums import unusable as unusable_tensor
from ..checkpoint.convert import coverage, in_backbone
from ..checkpoint.mapping import to_detectron2
from ..checkpoint.sources import Recipe
from ..data.datasets import register_sample
from ..data.loader import map_image
from ..errors import UserError
from ..layers.attention import is_sge_key
from ..layers.sge import SpatialGroupEnhance
from ..modeling.gates import sge_layers
from .doctor.build import undisturbed
from .doctor.data import examine_dataset
from .doctor.finding import Finding
from .doctor.run import examine_output
from .doctor.settings import examine_switches, learning_rate
from .doctor.weights import contradicted, fitting, read_weights, without_sge
from .lazy import (
    check_init_checkpoint,
    dataset_names,
    flat,
    in_lazy_words,
    lazy_mapper,
    lazy_target,
    read_lazy_config,
    use_lazy_datasets,
)
from .switches import switches_of

# Images of each set that go through its mapper: a fault of the config meets each of them.
_MOST = 4


def diagnose_lazily(
    config_file: str,
    overrides: Sequence[str] = (),
    datasets: Sequence[Sequence[str]] = (),
    *,
    processes: int = 1,
    eval_only: bool = False,
    every_image: bool = False,
) -> list[Finding]:
    """All that is wrong with a lazy config and what it names; errors come first. As :func:`.doctor.diagnose`.

    Args:
        config_file, overrides, datasets, eval_only: as in :func:`.lazy.setup_lazy_config`.
        processes: how many it is to be trained in.
        every_image: open each image of the data sets, not a sample.
    """
    register_sample()
    try:
        cfg = read_lazy_config(config_file, overrides)
    except UserError as error:
        return [_finding(error, "--config-file")]
    findings = [
        *_checked("train.init_checkpoint", lambda: check_init_checkpoint(cfg, eval_only=eval_only)),
        *_checked("dataloader", lambda: use_lazy_datasets(cfg, datasets, eval_only=eval_only)),
    ]
    unusable = _checked("train", lambda: examine_switches(switches_of(cfg), eval_only=eval_only))
    findings += unusable or examine_output(switches_of(cfg).OUTPUT_DIR)
    weights_are_there = not any(finding.key == "train.init_checkpoint" for finding in findings)
    for name in dataset_names(cfg, eval_only=eval_only):
        if name in DatasetCatalog:
            findings += examine_dataset(name, every_image=every_image, pixel_range=cfg.train.get("pixel_range", ()))
    with undisturbed():
        model, unbuilt = _meta_model(cfg)
        findings += unbuilt
        if model is not None and weights_are_there:
            findings += _checked("train.init_checkpoint", lambda: _weights(cfg, model))
        if not eval_only:
            findings += _synchronized(cfg, processes)
            findings += _solver(cfg, with_rule=not datasets) if not unusable else []
        if not any(finding.severity == "error" for finding in findings):
            findings += _images(cfg, eval_only=eval_only)
    in_words = [
        replace(f, key=in_lazy_words(f.key), problem=in_lazy_words(f.problem), remedy=in_lazy_words(f.remedy))
        for f in findings
    ]
    return sorted(dict.fromkeys(in_words), key=lambda finding: finding.severity)


def _finding(error: Exception, key: str, what: str = "") -> Finding:
    text = " ".join(str(error).split())[:300]
    said = text if isinstance(error, UserError) else f"{what} ({type(error).__name__}: {text})"
    return Finding("error", key, said, "")


def _checked(key: str, check: Callable[[], list[Finding] | None]) -> list[Finding]:
    try:
        return check() or []
    except UserError as error:
        return [_finding(error, key)]


def _meta_model(cfg: DictConfig) -> tuple[nn.Module | None, list[Finding]]:
    try:
        with torch.device("meta"):
            return instantiate(cfg.model), []
    except Exception as error:
        # There is no list of what models of any package raise. Some need numbers to be built, which tensors on the
        # meta device have not: that is no fault of theirs.
        is_fault = isinstance(error, UserError) or "meta" not in str(error)
        return None, [_finding(error, "model", "the model cannot be built")] if is_fault else []


def _weights(cfg: DictConfig, model: nn.Module) -> list[Finding]:
    path, layers = cfg.train.init_checkpoint, sge_layers(model)
    frozen = [name for name, layer in layers.items() if not layer.bias.requires_grad]
    if not path:
        is_frozen = any(not p.requires_grad for name, p in model.named_parameters() if in_backbone(name))
        problem = "it freezes the backbone's first stages at their random start, as there are no weights"
        remedy = "set it to 0, or name weights in train.init_checkpoint"
        return [Finding("warning", "MODEL.BACKBONE.FREEZE_AT", problem, remedy)] if is_frozen else []
    if "://" in path:  # not fetched before it is needed
        return []
    source = read_weights(path)
    state = to_detectron2(source).state if source.kind == "caffe2" else source.state
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items() if value.is_floating_point()}
    fit = coverage(state, shapes, by_suffix=source.by_suffix)
    wrong = next(((name, fault) for name in fit.filled.values() if (fault := unusable_tensor(name, state[name]))), None)
    if wrong:
        return [Finding("error", "MODEL.WEIGHTS", f"in {path} {wrong[0]} {wrong[1]}", "take other weights")]
    findings = contradicted(path, source.recipe.contradictions_of(_recipe(cfg).overrides()))
    findings += fitting(path, source, fit, with_sge=bool(layers))
    if not layers or not source.kind or any(finding.severity == "error" for finding in findings):
        return findings
    sge = {key: state[name] for key, name in fit.filled.items() if is_sge_key(key)}
    if not sge:
        findings.append(without_sge(path))
    if frozen and not any(bool(sge[key].any()) for name in frozen if (key := f"{name}.weight") in sge):
        problem = f"it freezes {len(frozen)} SGE layers, which {path} has not trained: their gates stay constant"
        findings.append(Finding("warning", "MODEL.BACKBONE.FREEZE_AT", problem, "set it to 1, or take SGE weights"))
    return findings


def _recipe(cfg: DictConfig) -> Recipe:
    """What the model of ``cfg`` is given and where its strides are, as far as Detectron2's own keys say it."""

    def value(key: str) -> Any:
        found = OmegaConf.select(cfg, key)
        return tuple(map(float, found)) if OmegaConf.is_list(found) else found

    stages = "model.backbone.bottom_up.stages"
    has_bottlenecks = (value(f"{stages}.depth") or 0) >= 50
    stride = value(f"{stages}.stride_in_1x1") if has_bottlenecks else None
    return Recipe(value("model.input_format"), value("model.pixel_mean"), value("model.pixel_std"), stride)


def _synchronized(cfg: DictConfig, processes: int) -> list[Finding]:
    norms = {key: text.strip("'") for key, text in flat(cfg).items() if key.startswith("model.") and "SyncBN" in text}
    if processes == 1:
        remedy = "set BN or FrozenBN, or use more GPUs"
        return [
            Finding("warning", key, f"{norm} in one process is BN, of few images", remedy)
            for key, norm in norms.items()
        ]
    if str(cfg.train.device).startswith("cuda"):
        return []
    norms = {key: norm for key, norm in norms.items() if "naive" not in norm}
    return [Finding("error", key, f"{norm} needs GPUs", "set BN or FrozenBN") for key, norm in norms.items()]


def _solver(cfg: DictConfig, *, with_rule: bool) -> list[Finding]:
    """Whether optimizer and schedule can be built, and what the learning rates come to."""
    # any parameters do, as long as there are some of each kind
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), SpatialGroupEnhance(1))
    section = copy.deepcopy(cfg.optimizer)
    try:
        section.params.model = model
        optimizer = instantiate(section)
    except Exception as error:  # of any package
        return [_finding(error, "optimizer", "it cannot be built")]
    iterations = cfg.train.max_iter
    try:
        multiplier = instantiate(cfg.lr_multiplier)
        rates = [float(multiplier(place / iterations)) for place in (0, iterations // 2, iterations - 1)]
    except Exception as error:
        return [_finding(error, "lr_multiplier", "it cannot be built and followed")]
    if not all(0 <= rate < float("inf") for rate in rates):
        return [Finding("error", "lr_multiplier", f"it is {rates[0]!r} at the start and {rates[-1]!r} at the end", "")]
    names = dataset_names(cfg)
    is_coco = any(name.startswith(("coco_2014_", "coco_2017_")) for name in names)
    if not (with_rule and is_coco and isinstance(optimizer, torch.optim.SGD)):
        return []
    is_retinanet = getattr(lazy_target(cfg.model), "__name__", "") == "RetinaNet"
    images = cfg.dataloader.train.get("total_batch_size", 16)
    return learning_rate(cfg.optimizer.get("lr", optimizer.defaults["lr"]), images, is_retinanet=is_retinanet)


def _images(cfg: DictConfig, *, eval_only: bool) -> list[Finding]:
    """Whether images come through the mappers, of training and of the test."""
    findings = []
    for part in ("test",) if eval_only else ("train", "test"):
        section = cfg.dataloader[part]
        if "mapper" not in section or "dataset" not in section:
            continue  # another package's loader
        try:
            dicts: Iterable[dict] = instantiate(section.dataset)
            mapper = lazy_mapper(cfg, section)
            for entry in list(dicts)[:_MOST]:
                map_image(mapper, copy.deepcopy(entry))
        except Exception as error:  # augmentations of any package
            findings.append(_finding(error, f"dataloader.{part}", "its images cannot be read and augmented"))
    return findings
