"""What cannot be built: the doctor builds what training would build, and says which key is in the way."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.detection_utils import build_augmentation, convert_PIL_to_numpy
from detectron2.data.transforms import AugInput
from PIL import Image

from ...checkpoint.convert import build_meta_model
from ...errors import UserError
from ...solver import build_lr_scheduler, build_optimizer
from .finding import Finding
from .values import default_values

# More keys than these are not tried one after the other to find the one in the way.
_MOST_SUSPECTS = 60
# Height and width of the image that goes through the augmentations.
_SIZE = (96, 128)


def examine_build(cfg: CfgNode, overrides: Sequence[str] = (), *, eval_only: bool = False) -> list[Finding]:
    """What of a run of ``cfg`` cannot be built: model, optimizer, schedule, augmentations, one finding each.

    Args:
        cfg: with the data sets that it names registered.
        overrides: KEY VALUE KEY VALUE ..., the keys that are suspected first.
        eval_only: nothing will be trained.
    """
    parts: list[tuple[Callable[[CfgNode], Any], tuple[str, ...], str]] = [
        (_build_model, ("MODEL.", "INPUT.", "TEST.", "DATASETS."), "the model"),
        (lambda cfg: _augment(cfg, is_train=False), ("INPUT.",), "the augmentations of test images"),
    ]
    if not eval_only:
        parts += [
            (_build_schedule, ("SOLVER.", "MODEL.SGE."), "the optimizer and its schedule"),
            (lambda cfg: _augment(cfg, is_train=True), ("INPUT.",), "the augmentations"),
            (_build_mapper, ("INPUT.", "MODEL.", "DATASETS."), "the mapper of images"),
        ]
    findings = []
    with undisturbed():
        for build, sections, what in parts:
            error = failure(build, cfg)
            if error is not None:
                suspect = culprit(build, cfg, overrides, sections)
                findings.append(told(error, suspect, what, default_key=sections[0].rstrip(".")))
    return findings


def told(
    error: Exception,
    suspect: tuple[str, Any] | None,
    what: str,
    *,
    default_key: str,
    failed: str = "cannot be built",
) -> Finding:
    """The finding that ``what`` ``failed``, under the key that :func:`culprit` found or else ``default_key``."""
    text = " ".join(str(error).split())[:300]
    said = text if isinstance(error, UserError) else f"{what} {failed} ({type(error).__name__}: {text})"
    if suspect is None:
        return Finding("error", default_key, said, "")
    key, value = suspect
    return Finding("error", key, f"with {value!r:.100} {said}", f"Detectron2's default is {default_values()[key]!r}")


def failure(build: Callable[[CfgNode], Any], cfg: CfgNode) -> Exception | None:
    """What ``build`` raises, if anything."""
    try:
        build(cfg)
    except Exception as error:
        # There is no list of what models and augmentations of any package raise. Some need numbers to be built, which
        # tensors on the meta device have not: that is no fault of theirs.
        return None if re.search(r"\bmeta\b", str(error)) else error
    return None


def culprit(
    build: Callable[[CfgNode], Any], cfg: CfgNode, overrides: Sequence[str], sections: tuple[str, ...]
) -> tuple[str, Any] | None:
    """The first key without whose value ``build`` works, with that value.

    Those whose value the error names are tried first, then those of ``overrides``. A value that is named may be one of
    several faults: that its error goes with it is enough.
    """
    first = str(failure(build, cfg))
    suspects = []
    for key, default in default_values().items():
        value = _get(cfg, key)
        if key.startswith(sections) and value != default:
            # another model builds, whatever is wrong with this one, and is named in the errors of its parts
            is_structure = key.endswith(("NAME", "META_ARCHITECTURE"))
            is_named = _names(first, value) and (not is_structure or "No object named" in first)
            suspects.append(((not is_named, key not in overrides[::2], is_structure), key, value, default))
    suspects.sort(key=lambda suspect: suspect[0])
    for (is_unnamed, *_), key, value, default in suspects[:_MOST_SUSPECTS]:
        trial = cfg.clone()
        trial.defrost()
        _set(trial, key, default)
        error = failure(build, trial)
        if error is None or (not is_unnamed and str(error) != first):
            return key, value
    return None


def _names(text: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_names(text, entry) for entry in value)
    return isinstance(value, str) and len(value) > 2 and value in text


def _get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _set(cfg: CfgNode, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        cfg = cfg[name]
    cfg[last] = value


def _build_model(cfg: CfgNode) -> torch.nn.Module:
    model = build_meta_model(cfg)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(
            f"the model has {size / 2**30:.3g} GB of parameters, this machine {memory / 2**30:.3g} of memory"
        )
    return model


def _build_schedule(cfg: CfgNode) -> None:
    # any parameters do, as long as there are some of each kind
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1, device="meta"), torch.nn.BatchNorm2d(1, device="meta"))
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    solver = cfg.SOLVER
    for iteration in {0, min(solver.WARMUP_ITERS, solver.MAX_ITER), *solver.STEPS, solver.MAX_ITER - 1}:
        scheduler.last_epoch = min(iteration, solver.MAX_ITER - 1)
        rates = scheduler.get_lr()
        if not all(0 <= rate < float("inf") for rate in rates):
            raise UserError(f"the learning rate of iteration {scheduler.last_epoch} is {rates[0]!r}")


def _augment(cfg: CfgNode, *, is_train: bool) -> None:
    image = convert_PIL_to_numpy(Image.new("RGB", _SIZE[::-1]), cfg.INPUT.FORMAT)
    augmentations = build_augmentation(cfg, is_train)
    if is_train:
        augmentations = DatasetMapper(_without_data(cfg), is_train=True).augmentations.augs
    for augmentation in augmentations:
        data = AugInput(image)
        augmentation(data)
        image = data.image
    if min(image.shape[:2]) < 1:
        raise UserError(
            f"an image of {_SIZE[1]} x {_SIZE[0]} pixels becomes one of {image.shape[1]} x {image.shape[0]}"
        )


def _build_mapper(cfg: CfgNode) -> None:
    points = [MetadataCatalog.get(name).get("keypoint_names") for name in cfg.DATASETS.TRAIN]
    # that a set has none is told where data sets are taken in
    DatasetMapper(cfg if all(points) else _without_data(cfg), is_train=True)


def _without_data(cfg: CfgNode) -> CfgNode:
    """``cfg`` for boxes, as masks and key points need data sets that describe them."""
    trial = cfg.clone()
    trial.defrost()
    trial.MODEL.KEYPOINT_ON = trial.MODEL.LOAD_PROPOSALS = False
    return trial


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the random numbers of a run as they were, and Detectron2's log without what is built on trial."""
    state, seed = np.random.get_state(), torch.random.get_rng_state()
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(disabled)
        np.random.set_state(state)
        torch.random.set_rng_state(seed)
