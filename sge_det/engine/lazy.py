"""Runs of Detectron2's lazy configs: set up, trained and evaluated with what guards the runs of YAML configs."""

import argparse
import contextlib
import functools
import logging
import os
import re
import sys
import sysconfig
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf

from ..checkpoint.checkpointer import Checkpointer, check_weights_path, last_checkpoint
from ..config import LOADER_TIMEOUT, load_lazy_config
from ..data.datasets import check_datasets, class_names, register_datasets, register_sample
from ..data.loader import EvaluationLoader, map_image, seeded_loader
from ..errors import UserError
from ..files import write_file
from ..layers.attention import is_own_class
from ..solver import add_clipping
from . import doctor
from .claims import claimed_folder, keeps_config
from .evaluations import Settled
from .fingerprint import Contents, fingerprint_of, is_free, package_of
from .logs import start_logs
from .periodic import KeptCheckpoints
from .reporting import build_report_writer
from .stopping import waiting
from .switches import YAML_KEYS, switches_of
from .training import Trainer, faults_in_words

logger = logging.getLogger(__name__)

_SECTIONS = ("model", "optimizer", "lr_multiplier", "dataloader", "train")
# The sentences of runs name keys of YAML configs; these are a lazy config's for the same.
_KEYS = {
    **{theirs: ours for ours, theirs in YAML_KEYS.items()},
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "SOLVER.BASE_LR": "optimizer.lr",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "INPUT.PIXEL_RANGE (LOW, HIGH)": "train.pixel_range=[LOW,HIGH]",
    "MODEL.SGE.INIT": "its start values",
    "MODEL.SGE.ENABLED True, MODEL.SGE.ATTENTION sge and all STAGES": "stages to sge_det.make_sge_stages",
    "MODEL.SGE.GROUPS": "model.backbone.bottom_up.stages.groups",
    "MODEL.SGE": "model.backbone",
    "MODEL.BACKBONE.FREEZE_AT": "model.backbone.bottom_up.freeze_at",
    "MODEL.RESNETS.STRIDE_IN_1X1": "model.backbone.bottom_up.stages.stride_in_1x1",
    "MODEL.PIXEL_MEAN": "model.pixel_mean",
    "MODEL.PIXEL_STD": "model.pixel_std",
    "INPUT.FORMAT": "model.input_format",
    "MAX_ITER and STEPS": "train.max_iter and the lr_multiplier",
    "MODEL.RESNETS.DEPTH": "model.backbone.bottom_up.stages.depth",
}
_CONFIG_MODULE = r"\bdetectron2\._cfg_loader\w*\."
_WORDS = re.compile("|".join(rf"(?<!\w){re.escape(key)}(?!\w)" for key in sorted(_KEYS, key=len, reverse=True)))
_FREE = re.compile(r"train\.(output_dir|checkpointer|log_period)\b.*|.*\.num_workers")
_CHANGEABLE = re.compile(
    r"train\.(max_iter|eval_period|device|skip_nonfinite|early_stopping\..*)"
    r"|lr_multiplier\..*(milestones|num_updates|warmup_length).*"
    r"|dataloader\.(test|evaluator)\..*"
)


@contextlib.contextmanager
def lazy_words() -> Iterator[None]:
    """Within, the sentences of errors name a lazy config's keys."""
    try:
        yield
    except UserError as error:
        raise type(error)(in_lazy_words(str(error))) from error


def in_lazy_words(text: str) -> str:
    """``text`` with a lazy config's keys in the place of those of YAML configs."""
    return _WORDS.sub(lambda match: _KEYS[match[0]], text)


def setup_lazy_config(
    config_file: str,
    overrides: Sequence[str] = (),
    datasets: Sequence[Sequence[str]] = (),
    *,
    eval_only: bool = False,
    resume: bool = False,
) -> DictConfig:
    """Reads a lazy config, takes the data sets into it and checks what can be checked before a model is built.

    Besides Detectron2's keys, ``train`` may have those of :data:`..config.LAZY_KEYS`, whether the file has them or not.

    Args:
        config_file: a Python file, or the name of one that comes with sge_det.
        overrides: "key=value" ...
        datasets: (name, annotation JSON, image folder) triples to register; "train" in a name makes it a training set.
        eval_only: nothing will be trained, so that the training set need not be there.
        resume: as in :func:`.training.setup_config`.

    Returns:
        the config; ``train.device`` is "cpu" where there is no GPU.

    Raises:
        UserError: anything in it that cannot work, in one sentence.
    """
    register_sample()
    cfg = read_lazy_config(config_file, overrides)
    with lazy_words():
        doctor.tell(doctor.examine_switches(switches_of(cfg), eval_only=eval_only))
    if not (resume and last_checkpoint(cfg.train.output_dir)):
        check_init_checkpoint(cfg, eval_only=eval_only)
    use_lazy_datasets(cfg, datasets, eval_only=eval_only)
    return cfg


def read_lazy_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The first part of :func:`setup_lazy_config`, for which no other file is read."""
    if not config_file:
        raise UserError("give a lazy config with --config-file, lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py")
    cfg = load_lazy_config(config_file, list(overrides))
    lacking = [name for name in _SECTIONS if name not in cfg]
    if lacking:
        raise UserError(f"{config_file} has no {lacking[0]!r}: a run needs {', '.join(_SECTIONS)}")
    train = cfg.train
    if str(train.device).startswith("cuda") and not torch.cuda.is_available():
        train.device = "cpu"
    return cfg


def check_init_checkpoint(cfg: DictConfig, *, eval_only: bool = False) -> None:
    """:func:`.checkpointer.check_weights_path` for ``train.init_checkpoint``."""
    key = "train.init_checkpoint"
    check_weights_path(str(cfg.train.init_checkpoint or ""), key, "" if eval_only else f"{key}=''")


def use_lazy_datasets(cfg: DictConfig, datasets: Sequence[Sequence[str]], *, eval_only: bool = False) -> None:
    """Takes ``datasets``, as in :func:`setup_lazy_config`, into ``cfg`` and checks those that it names.

    Raises:
        UserError: one is not there, or has another number of classes than the model.
    """
    found = register_datasets(datasets)
    if found:
        train = [name for name in found if "train" in name] or list(found)[:1]
        cfg.dataloader.train.dataset.names = train
        cfg.dataloader.test.dataset.names = [name for name in found if name not in train] or train
        _set_classes(cfg.model, len(next(iter(found.values())).content["categories"]))
    names = dataset_names(cfg, eval_only=eval_only)
    check_datasets(names)
    classes = class_names(names[0]) if names else None
    for key, section in _sections_with_classes(cfg.model).items():
        if classes and len(classes) != section.num_classes:
            raise UserError(
                f"{key}.num_classes is {section.num_classes}, but {names[0]} has {len(classes)} categories: set it to "
                "that"
            )


def _set_classes(model: DictConfig, number: int) -> None:
    for section in _sections_with_classes(model).values():
        section.num_classes = number


def _sections_with_classes(model: DictConfig) -> dict[str, DictConfig]:
    sections = {"model": model, "model.roi_heads": model.get("roi_heads")}
    return {
        key: section
        for key, section in sections.items()
        if isinstance(section, DictConfig) and isinstance(section.get("num_classes"), int)
    }


def dataset_names(cfg: DictConfig, *, eval_only: bool = False) -> list[str]:
    """The names of the training sets, unless with ``eval_only``, and of the test sets."""
    names: list[str] = []
    for part in ("test",) if eval_only else ("train", "test"):
        # other packages' loaders need not have data sets by name
        own = OmegaConf.select(cfg, f"dataloader.{part}.dataset.names", default=[])
        names += [own] if isinstance(own, str) else list(own)
    return list(dict.fromkeys(names))


def _may_change(key: str) -> bool:
    return _CHANGEABLE.fullmatch(key) is not None


@contextlib.contextmanager
def claimed_lazily(cfg: DictConfig, *, resume: bool = False, overwrite: bool = False) -> Iterator[None]:
    """:func:`.claims.claimed` for a lazy config's ``train.output_dir``."""

    def made_from() -> dict:
        contents = Contents(coco_only=False).of_names(dataset_names(cfg), cfg.train.init_checkpoint)
        return fingerprint_of(_what_counts(cfg), contents, comm.get_world_size(), own_code(cfg))

    with claimed_folder(cfg.train.output_dir, made_from, resume=resume, overwrite=overwrite, changeable=_may_change):
        yield


def _what_counts(cfg: DictConfig) -> dict[str, str]:
    switches = switches_of(cfg)
    return {key: value for key, value in flat(cfg).items() if not is_free(YAML_KEYS.get(key, ""), switches)}


def flat(cfg: DictConfig) -> dict[str, str]:
    """What a run's outcome depends on, as {key: value in words}; functions and classes by their names."""
    found: dict[str, str] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, part in value.items():
                visit(part, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list) and any(isinstance(part, dict | list) for part in value):
            for place, part in enumerate(value):
                visit(part, f"{key}.{place}")
        elif not _FREE.fullmatch(key):
            name = getattr(value, "__qualname__", None)
            text = f"{value.__module__}.{name}" if name else repr(value)
            # without what differs from process to process: addresses, and the names that Detectron2 gives to configs
            found[key] = re.sub(rf" at 0x[0-9a-f]+|{_CONFIG_MODULE}", "", text)

    visit(OmegaConf.to_container(cfg, resolve=False), "")
    return found


def own_code(cfg: DictConfig) -> list[str]:
    """The user's own packages, or modules without one, whose code a run of ``cfg`` depends on.

    Those of attentions that the config names ("package.module:Class"), and those of its functions and classes that
    are not installed.
    """
    found: set[str] = set()

    def visit(value: Any, key: str = "") -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                visit(part, str(name))
        elif isinstance(value, list):
            for part in value:
                visit(part, key)
        elif is_own_class(value):
            found.add(package_of(value))
        else:
            if isinstance(value, str):
                value = _located(value) if key == "_target_" else None
            module = getattr(value, "__module__", None)
            if isinstance(module, str) and _is_own(module):
                found.add(package_of(module))

    visit(OmegaConf.to_container(cfg, resolve=False))
    return sorted(found)


def _located(name: str) -> Any:
    try:
        return locate(name)
    except Exception:  # what cannot be imported ends the run in its place
        return None


def _is_own(module: str) -> bool:
    """Whether a module is neither this package's, nor installed, nor Python's."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or module == "__main__" or module.split(".")[0] == __package__.split(".")[0]:
        return False
    installed = {sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib", "platstdlib")}
    return not any(Path(file).is_relative_to(folder) for folder in installed)


def start_lazy_run(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Makes ``train.output_dir`` with its config and logs.

    Raises:
        UserError: the folder cannot be written.
    """
    folder, seed = cfg.train.output_dir, switches_of(cfg).SEED
    start_logs(folder, args, "\n".join(f"{key} = {value}" for key, value in flat(cfg).items()))
    if comm.is_main_process() and not (args.eval_only and keeps_config(folder)):
        _save(cfg, Path(folder))
    seed_all_rng(None if seed < 0 else seed + comm.get_rank())


def _save(cfg: DictConfig, folder: Path) -> None:
    """Writes ``config.yaml``, and ``config.yaml.pkl`` where the config holds what YAML cannot say."""
    with tempfile.TemporaryDirectory() as scratch:
        LazyConfig.save(cfg, os.path.join(scratch, "config.yaml"))
        for path in Path(scratch).iterdir():
            write_file(folder / path.name, path.read_bytes())


def build_lazy_model(cfg: DictConfig, seed: int) -> torch.nn.Module:
    """The model of a lazy config on its device, with start values that follow from ``seed``.

    Raises:
        UserError: it cannot be built.
    """
    torch.manual_seed(seed)
    try:
        return instantiate(cfg.model).to(cfg.train.device)
    except UserError:
        raise
    except (AssertionError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"the model of this config cannot be built ({type(error).__name__}: {error})") from error


def lazy_target(section: DictConfig) -> Any:
    """The function or class that ``section`` calls."""
    target = section.get("_target_")
    return locate(target) if isinstance(target, str) else target


class LazyTrainer(Trainer):
    """:class:`.training.Trainer` of a lazy config."""

    def __init__(self, cfg: DictConfig):
        TrainerBase.__init__(self)
        self.cfg, self.switches = cfg, switches_of(cfg)
        seed = self.switches.SEED
        self.seed = seed if seed >= 0 else comm.shared_random_seed() % 2**31
        model = build_lazy_model(cfg, self.seed)
        cfg.optimizer.params.model = model
        try:
            optimizer = instantiate(cfg.optimizer)
        finally:
            del cfg.optimizer.params.model  # the config is saved and compared without it
        add_clipping(self.switches, optimizer)
        self._set_up(model, build_lazy_train_loader(cfg, self.seed), optimizer, **cfg.train.get("ddp", {}))
        self.scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), cfg.train.max_iter)
        self._set_up_saving()

    def resume_or_load(self, resume: bool = True) -> None:
        drawn = self.seed
        self.checkpointer.resume_or_load(self.cfg.train.init_checkpoint, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1
        if self.seed != drawn:
            self._trainer.reset_data_loader(lambda: build_lazy_train_loader(self.cfg, self.seed))
        if hasattr(self.data_loader, "start"):
            self.data_loader.start = self.start_iter
        self._begin()

    def _start_weights(self) -> None:
        """Those of the config and of its checkpoint."""

    def train(self) -> None:
        try:
            TrainerBase.train(self, self.start_iter, self.max_iter)
        except Settled:
            self.checkpointer.save("model_final", iteration=self.iter)

    def warn(self, text: str) -> None:
        super().warn(in_lazy_words(text))

    def build_report_writer(self) -> EventWriter | None:
        return build_report_writer(self.switches, flat(self.cfg))

    def build_hooks(self) -> list[HookBase]:
        train = self.cfg.train
        built: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if comm.is_main_process():
            built.append(KeptCheckpoints(self.checkpointer, **train.checkpointer))
        built.append(hooks.EvalHook(train.eval_period, self._evaluate))
        if comm.is_main_process():
            built.append(hooks.PeriodicWriter(self.build_writers(), period=train.log_period))
        return self._with_own(built)

    @classmethod
    def test(cls, cfg: DictConfig, model: torch.nn.Module, evaluators: None = None) -> OrderedDict:
        return _test(cfg, model)


def build_lazy_train_loader(cfg: DictConfig, seed: int) -> Any:
    """The training loader; Detectron2's own is replaced by one whose order and augmentations follow from ``seed``."""
    section = cfg.dataloader.train
    if lazy_target(section) is not build_detection_train_loader or section.get("sampler") is not None:
        logger.warning("this training loader is not Detectron2's with its usual sampler: resumed runs see other images")
        return instantiate(section)
    dicts = _instances(section)
    return seeded_loader(
        dicts,
        lazy_mapper(cfg, section),
        TrainingSampler(len(dicts), seed=seed),
        seed,
        section.total_batch_size,
        by_aspect=section.get("aspect_ratio_grouping", True),
        num_workers=section.get("num_workers", 0),
        timeout=cfg.train.get("loader_timeout", LOADER_TIMEOUT),
    )


def lazy_mapper(cfg: DictConfig, section: DictConfig) -> Any:
    """The mapper of a loader of ``cfg``, with what :func:`.map_image` takes from it: ``pixel_range``.

    Raises:
        UserError: ``train.pixel_range`` is no range.
    """
    mapper = instantiate(section.mapper)
    pixel_range = tuple(cfg.train.get("pixel_range", ()))
    if pixel_range and not (len(pixel_range) == 2 and pixel_range[0] < pixel_range[1]):
        raise UserError(f"train.pixel_range must be two numbers, the lower first; got {pixel_range!r:.100}")
    if pixel_range:
        mapper.pixel_range = pixel_range
    return mapper


def _instances(section: DictConfig) -> list[dict]:
    try:
        return list(instantiate(section.dataset))
    except AssertionError as error:
        raise UserError(f"DATASETS.TRAIN holds no image with an object: {error}") from error


def _test_loader(cfg: DictConfig) -> EvaluationLoader:
    section = cfg.dataloader.test
    arguments = {name: section[name] for name in section if name not in ("_target_", "mapper")}
    if lazy_target(section) is build_detection_test_loader:
        arguments = {name: instantiate(value) for name, value in arguments.items()}
        loader = build_detection_test_loader(
            mapper=functools.partial(map_image, lazy_mapper(cfg, section)), **arguments
        )
    else:
        loader = instantiate(section)
    return EvaluationLoader(loader, cfg.train.get("loader_timeout", LOADER_TIMEOUT))


def _test(cfg: DictConfig, model: torch.nn.Module) -> OrderedDict:
    """Evaluates on ``dataloader.test`` with ``dataloader.evaluator``; empty where the config has none."""
    if "evaluator" not in cfg.dataloader:
        return OrderedDict()
    section = cfg.dataloader.evaluator
    target = lazy_target(section)
    arguments: dict[str, Any] = {}
    if isinstance(target, type) and issubclass(target, COCOEvaluator):
        # those of its arguments without which nothing is written, or code is needed that not all builds have
        arguments = {"output_dir": os.path.join(cfg.train.output_dir, "inference"), "use_fast_impl": False}
    given = {name: instantiate(section[name]) for name in section if name != "_target_"}
    names = given.get("dataset_name")
    if isinstance(names, list | ListConfig):
        if len(names) != 1:
            raise UserError(f"dataloader.test.dataset.names has {len(names)} names: a lazy config tests on one")
        given["dataset_name"] = names[0]
    evaluator = target(**{**arguments, **given})
    with waiting(False) if comm.get_world_size() == 1 else contextlib.nullcontext():
        results = inference_on_dataset(model, _test_loader(cfg), evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results or OrderedDict()


def train_lazily(cfg: DictConfig, *, resume: bool = False) -> OrderedDict:
    """Trains a lazy config to its end and evaluates it; as :func:`.training.train`.

    Raises:
        UserError: the loss is no longer finite, the weights do not match, or there is nothing left to train.
    """
    with lazy_words(), faults_in_words(cfg.train.output_dir):
        trainer = LazyTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        return trainer.run()


def evaluate_lazily(cfg: DictConfig, *, resume: bool = False) -> OrderedDict:
    """Evaluates ``train.init_checkpoint``, or with ``resume`` the last checkpoint; as :func:`.training.evaluate`.

    Raises:
        UserError: there are no weights, or they do not fill the model.
    """
    folder, path = cfg.train.output_dir, cfg.train.init_checkpoint
    with lazy_words(), faults_in_words(folder):
        if not path and not (resume and last_checkpoint(folder)):
            raise UserError("there are no weights to evaluate: name them with MODEL.WEIGHTS")
        model = build_lazy_model(cfg, 0)
        Checkpointer(model, folder, whole_model=True).resume_or_load(path, resume=resume)
        return _test(cfg, model)
