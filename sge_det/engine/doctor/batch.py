"""Whether images of the data sets come through the mapper: a batch as training takes it, and one image of each test."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ...data.dicts import dicts_fault
from ...data.loader import build_mapper, build_train_loader, map_image, proposal_files
from ...errors import UserError
from .build import culprit, failure, told, undisturbed
from .finding import Finding, finding_of

# Images of the first batch that are read: a fault of the config meets each of them.
_MOST = 4


def examine_batch(cfg: CfgNode, overrides: Sequence[str] = (), *, eval_only: bool = False) -> list[Finding]:
    """What keeps images from reaching the model of ``cfg``, one finding for each use: training, and each test set.

    Args:
        cfg: with the data sets that it names registered, and a model that can be built.
        overrides: KEY VALUE KEY VALUE ..., the keys that are suspected first.
        eval_only: nothing will be trained.
    """
    uses: list[Callable[[], tuple[str, Callable[[CfgNode], Any]]]] = []
    if not eval_only and cfg.DATASETS.TRAIN:
        uses.append(lambda: ("training", _training(cfg)))
    uses += [lambda name=name: (f"the test set {name}", _testing(cfg, name)) for name in cfg.DATASETS.TEST]
    findings = []
    with undisturbed():
        for use in uses:
            finding = _finding(use, cfg, overrides)
            findings += [finding] if finding else []
    return findings


def _finding(use: Callable, cfg: CfgNode, overrides: Sequence[str]) -> Finding | None:
    try:
        what, read = use()
    except UserError as error:
        return finding_of(error, "DATASETS")
    except Exception as error:  # functions that make data sets raise what they like
        text = " ".join(str(error).split())[:300]
        return Finding("error", "DATASETS", f"a data set cannot be loaded ({type(error).__name__}: {text})", "")
    error = failure(read, cfg)
    if error is None:
        return None
    suspect = culprit(read, cfg, overrides, ("INPUT.", "MODEL.KEYPOINT_ON", "MODEL.MASK_ON", "MODEL.LOAD_PROPOSALS"))
    if suspect is None and isinstance(error, UserError):
        return finding_of(error, "DATASETS")
    return told(error, suspect, f"an image for {what}", default_key="DATASETS", failed="cannot be read and augmented")


def _training(cfg: CfgNode) -> Callable[[CfgNode], Any]:
    try:
        loader = build_train_loader(cfg, max(cfg.SEED, 0), keep=True)
    except UserError:
        raise
    except Exception:
        for name in cfg.DATASETS.TRAIN:
            _check_dicts(name, DatasetCatalog.get(name), are_tested=False)
        raise
    examples = loader.dataset.examples
    _check_dicts(cfg.DATASETS.TRAIN[0], (examples[place] for place in range(len(examples))), are_tested=False)
    batch = next(loader.batches())[:_MOST]

    def read(trial: CfgNode) -> None:
        dataset = loader.dataset.with_mapper(build_mapper(trial, is_train=True))
        for key in batch:
            dataset[key]

    return read


def _check_dicts(name: str, dicts: Iterable[dict], *, are_tested: bool) -> None:
    """Checks what a function has made; COCO's files have been checked when they were read."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file"):
        return
    classes = metadata.get("thing_classes")
    if are_tested and not classes:
        raise UserError(f"the data set {name} has no thing_classes: set them with MetadataCatalog.get({name!r}).set")
    fault = dicts_fault(dicts, len(classes) if classes else None, are_tested=are_tested)
    if fault:
        raise UserError(f"the data set {name}: {fault}")


def _testing(cfg: CfgNode, name: str) -> Callable[[CfgNode], Any]:
    proposal_files(cfg, "TEST")
    dicts = DatasetCatalog.get(name)
    _check_dicts(name, dicts, are_tested=(MetadataCatalog.get(name).get("evaluator_type") or "coco") == "coco")
    if not dicts:
        raise UserError(f"the data set {name} is empty: there is nothing to test on")
    return lambda trial: map_image(build_mapper(trial, is_train=False), dicts[0])
