"""The ``MODEL.SGE`` keys, and the configs that travel with the package."""

import builtins
import difflib
import importlib
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg
from detectron2.config.compat import downgrade_config, guess_version, upgrade_config
from omegaconf import DictConfig, ListConfig, OmegaConf

from .errors import UserError
from .layers.attention import SGE, attention_kind
from .layers.kernels import KERNELS

STAGES = ("res2", "res3", "res4", "res5")
LOADER_TIMEOUT = 600
OPTIMIZERS = ("SGD", "ADAMW")
# The release's; Detectron2's heads weigh all stages alike.
STAGE_LOSS_WEIGHTS = (1.0, 0.5, 0.25)
PRECISIONS = ("float16", "bfloat16")
TRACKERS = ("wandb", "mlflow", "trackio")

# Sections of lazy configs that mirror one of YAML configs, and the keys of both.
LAZY_SECTIONS = {
    "train.amp": ("SOLVER.AMP", ("enabled", "precision")),
    "train.model_ema": ("MODEL_EMA", ("enabled", "decay")),
    "train.best_checkpointer": ("SOLVER.BEST_CHECKPOINTER", ("enabled", "metric")),
    "train.early_stopping": ("SOLVER.EARLY_STOPPING", ("patience", "min_delta", "metric")),
    "train.clip_gradients": ("SOLVER.CLIP_GRADIENTS", ("enabled", "clip_type", "clip_value", "norm_type")),
}
# Keys of lazy configs, whose files need not have them, and the YAML key that each stands for.
LAZY_KEYS = {
    f"{section}.{name}": f"{theirs}.{name.upper()}"
    for section, (theirs, names) in LAZY_SECTIONS.items()
    for name in names
} | {
    "train.gradient_accumulation_steps": "SOLVER.GRADIENT_ACCUMULATION_STEPS",
    "train.skip_nonfinite": "SOLVER.SKIP_NONFINITE",
    "train.loader_timeout": "DATALOADER.TIMEOUT",
    "train.sge_log_period": "MODEL.SGE.LOG_PERIOD",
    "train.pixel_range": "INPUT.PIXEL_RANGE",
    "train.report_to": "REPORT_TO",
    "train.seed": "SEED",
}

# A config is a page of text: what is longer, deeper or grows beyond this is none.
_LONGEST, _MOST_NODES = 1 << 20, 100_000
_MOST_BASES = 50
_BASE = "_BASE_"
# Before a _BASE_ that is one of Detectron2's own configs.
_ZOO_PREFIX = "model_zoo:"
# Detectron2's projects whose keys are added where a config needs them, with what their parts' names hold.
_PROJECTS = (
    ("detectron2.projects.deeplab", "add_deeplab_config", ("deeplab", "DeepLab")),
    ("detectron2.projects.point_rend", "add_pointrend_config", ("PointRend", "CoarseMaskHead")),
)

# In a wheel the configs lie in the package, in a checkout beside it.
_CONFIG_DIRS = [folder / "configs" for folder in (Path(__file__).parent, Path(__file__).parent.parent)]
# Detectron2's own configs, which are as trusted as its code.
_ZOO = Path(detectron2.__file__).resolve().parent / "model_zoo" / "configs"


def add_sge_config(cfg: CfgNode) -> None:
    """Adds the ``MODEL.SGE`` keys and our others, with their defaults, to a config; what it has of them stays."""
    _add_missing(cfg, _defaults())


def _add_missing(cfg: CfgNode, defaults: CfgNode) -> None:
    for key, value in defaults.items():
        if key not in cfg:
            setattr(cfg, key, value)
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            _add_missing(cfg[key], value)


def _defaults() -> CfgNode:
    cfg = CfgNode(
        {"MODEL": {"ROI_BOX_CASCADE_HEAD": {}, "FPN": {}}, "INPUT": {}, "SOLVER": {"AMP": {}}, "DATALOADER": {}}
    )
    cfg.MODEL.SGE = _default_options()
    # The weights of the stages' losses in ROI heads of the name WeightedCascadeROIHeads.
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS = STAGE_LOSS_WEIGHTS
    # False leaves out the ReLU between RetinaNet's P6 and P7, as the release does.
    cfg.MODEL.FPN.P7_RELU = True
    # The values that become 0 and 255, (LOW, HIGH), of images whose pixels have more than 8 bits (16-bit, int32,
    # float); without it they are refused. Images of 8 bits stay as they are.
    cfg.INPUT.PIXEL_RANGE = ()
    # "SGD", as everywhere in Detectron2, or "ADAMW"; BASE_LR, the decays and the clipping serve both.
    cfg.SOLVER.OPTIMIZER = OPTIMIZERS[0]
    # How many steps whose loss is not finite are passed over before training stops.
    cfg.SOLVER.SKIP_NONFINITE = 0
    # Seconds that a process waits for a batch of its loader's workers; 0 waits for ever.
    cfg.DATALOADER.TIMEOUT = LOADER_TIMEOUT
    # What SOLVER.AMP.ENABLED computes in: "float16" (GPUs), or "bfloat16" (GPUs and CPUs).
    cfg.SOLVER.AMP.PRECISION = PRECISIONS[0]
    # Passes that make up a step. SOLVER.IMS_PER_BATCH stays the images of a step, of which each pass has its share.
    cfg.SOLVER.GRADIENT_ACCUMULATION_STEPS = 1
    # An exponential moving average of the weights, which is what is evaluated and what a checkpoint's "model" is.
    cfg.MODEL_EMA = CfgNode({"ENABLED": False, "DECAY": 0.999})
    # Keeps model_best.pth, the weights with the highest METRIC of all evaluations.
    cfg.SOLVER.BEST_CHECKPOINTER = CfgNode({"ENABLED": False, "METRIC": "bbox/AP"})
    # Ends the training once METRIC has not risen by more than MIN_DELTA in PATIENCE evaluations; 0 never does.
    cfg.SOLVER.EARLY_STOPPING = CfgNode({"PATIENCE": 0, "MIN_DELTA": 0.0, "METRIC": "bbox/AP"})
    # Who else is told what is logged: "wandb", "mlflow" or "trackio"; "" is nobody.
    cfg.REPORT_TO = ""
    return cfg


def _default_options() -> CfgNode:
    options = CfgNode()
    # The one switch between an SGE detector and its plain twin, which the same builder builds.
    options.ENABLED = True
    # Channel groups of each layer; must divide the channels of every stage in STAGES. The paper uses 64.
    options.GROUPS = 64
    # The stages whose residual blocks end in SGE.
    options.STAGES = list(STAGES)
    # The learning rate of SGE's own parameters as a multiple of the learning rate that they would have; 0 holds the
    # gates at their start.
    options.LR_FACTOR = 1.0
    # The weight decay of SGE's own parameters; None follows SOLVER.WEIGHT_DECAY. LR_FACTOR multiplies its effect too.
    options.WEIGHT_DECAY = None
    # Start values of weight (gamma) and bias (beta).
    options.INIT = [0.0, 1.0]
    # Training starts from INIT even where MODEL.WEIGHTS holds SGE parameters.
    options.RESET = False
    # What stands in that place: "sge"; a rival from timm, "se", "eca", "cbam" and others (layers/attention.py); or a
    # class of your own, "package.module:Class", whose constructor takes the number of channels.
    options.ATTENTION = SGE
    # Gamma is held at 0 while beta learns: gates that are the same all over a map, the control of what attention adds.
    options.CONSTANT = False
    # False leaves eq. 3 out, the normalisation of the similarities, to measure what it is worth.
    options.NORMALIZE = True
    # SGE after each output convolution of the FPN too, as the release offers.
    options.FPN = False
    # Nothing is computed from the padding of a batch: gates come from an image's own pixels, and detections do not
    # depend on its batch-mates. Off in the release; costs time.
    options.IGNORE_PADDING = False
    # What computes SGE: "eager", "compile" (by torch.compile) or "triton" (GPUs). Where it cannot run a warning says so
    # once and "eager" takes its place.
    options.KERNEL = "eager"
    # In training SGE's input is computed again in the backward pass, by the block's last convolution and norm, rather
    # than kept: less memory, more time. RESNETS.NORM is then "FrozenBN", "BN", "EvalBN", "GN" or "".
    options.SAVE_MEMORY = False
    # Training logs the gates' statistics every so many iterations; 0 turns it off.
    options.LOG_PERIOD = 200
    return options


@dataclass(frozen=True)
class SGEOptions:
    """The keys of ``MODEL.SGE``, checked; each attribute is the key of that name in capitals."""

    enabled: bool
    groups: int
    stages: tuple[str, ...]
    lr_factor: float
    weight_decay: float | None
    init: tuple[float, float]
    reset: bool
    attention: str
    constant: bool
    normalize: bool
    fpn: bool
    ignore_padding: bool
    kernel: str
    save_memory: bool
    log_period: int

    @property
    def is_sge(self) -> bool:
        """Whether SGE itself is asked for, no rival and no plain twin."""
        return self.enabled and self.attention == SGE


def sge_options(cfg: CfgNode) -> SGEOptions:
    """``cfg.MODEL.SGE``, checked; its defaults in a config that never heard of it.

    Raises:
        UserError: a stage, an attention or a kernel that does not exist, an INIT that is not two numbers or
            contradicts CONSTANT, or a WEIGHT_DECAY that is no decay.
    """
    options = {**_default_options(), **(cfg.MODEL.get("SGE", None) or {})}
    for stage in options["STAGES"]:
        if stage not in STAGES:
            raise UserError(f"MODEL.SGE.STAGES names {stage!r:.100}: the stages of a ResNet are {', '.join(STAGES)}")
    try:
        attention_kind(options["ATTENTION"])
    except ValueError as error:
        raise UserError(f"MODEL.SGE.ATTENTION {error}") from error
    if options["KERNEL"] not in KERNELS:
        raise UserError(f"MODEL.SGE.KERNEL {options['KERNEL']!r:.100} is not one of {', '.join(KERNELS)}")
    init = options["INIT"]
    if len(init) != 2 or not all(isinstance(value, int | float) for value in init):
        raise UserError(f"MODEL.SGE.INIT must be two numbers, weight and bias; got {init!r:.100}")
    if options["CONSTANT"] and init[0] != 0:
        raise UserError(f"MODEL.SGE.CONSTANT holds gamma at 0, but INIT {init!r:.100} starts it at another number")
    if not options["NORMALIZE"] and options["KERNEL"] != "eager":
        raise UserError(f"MODEL.SGE.NORMALIZE False goes with the KERNEL 'eager' alone, not with {options['KERNEL']!r}")
    if options["FPN"] and options["ATTENTION"] != SGE:
        raise UserError(f"MODEL.SGE.FPN goes with the ATTENTION 'sge' alone, not with {options['ATTENTION']!r}")
    for key, value in (("ATTENTION", SGE), ("NORMALIZE", True), ("IGNORE_PADDING", False)):
        if options["SAVE_MEMORY"] and options[key] != value:
            raise UserError(f"MODEL.SGE.SAVE_MEMORY goes with {key} {value!r} alone, not with {options[key]!r:.100}")
    decay = options["WEIGHT_DECAY"]
    if decay is not None and not (isinstance(decay, int | float) and decay >= 0):
        raise UserError(f"MODEL.SGE.WEIGHT_DECAY must be a number of at least 0, or None; got {decay!r:.100}")
    return SGEOptions(
        enabled=options["ENABLED"],
        groups=options["GROUPS"],
        stages=tuple(options["STAGES"]),
        lr_factor=options["LR_FACTOR"],
        weight_decay=decay,
        init=tuple(init),
        reset=options["RESET"],
        attention=options["ATTENTION"],
        constant=options["CONSTANT"],
        normalize=options["NORMALIZE"],
        fpn=options["FPN"],
        ignore_padding=options["IGNORE_PADDING"],
        kernel=options["KERNEL"],
        save_memory=options["SAVE_MEMORY"],
        log_period=options["LOG_PERIOD"],
    )


def optimizer_name(cfg: CfgNode) -> str:
    """``cfg.SOLVER.OPTIMIZER``, "SGD" in a config that never heard of it.

    Raises:
        UserError: an optimizer that does not exist.
    """
    name = cfg.SOLVER.get("OPTIMIZER", OPTIMIZERS[0])
    if name not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER {name!r:.100} is not one of {', '.join(OPTIMIZERS)}")
    return name


def skip_nonfinite(cfg: CfgNode) -> int:
    """``cfg.SOLVER.SKIP_NONFINITE``, 0 in a config that never heard of it.

    Raises:
        UserError: it is negative.
    """
    count = cfg.SOLVER.get("SKIP_NONFINITE", 0)
    if count < 0:
        raise UserError(f"SOLVER.SKIP_NONFINITE {count} must be the number of steps that may be passed over, from 0 on")
    return count


def ema_decay(cfg: CfgNode) -> float | None:
    """``cfg.MODEL_EMA.DECAY``; None where the weights are not averaged.

    Raises:
        UserError: it goes with something that it does not go with.
    """
    section = cfg.get("MODEL_EMA", None)
    if section is None or not section.ENABLED:
        return None
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise UserError(
            "MODEL_EMA averages the norms' statistics, which TEST.PRECISE_BN counts anew: turn off one of them"
        )
    return section.DECAY


def loader_timeout(cfg: CfgNode) -> int:
    """``cfg.DATALOADER.TIMEOUT`` in seconds, its default in a config that never heard of it.

    Raises:
        UserError: it is negative.
    """
    seconds = cfg.DATALOADER.get("TIMEOUT", LOADER_TIMEOUT)
    if seconds < 0:
        raise UserError(f"DATALOADER.TIMEOUT {seconds} must be a number of seconds, or 0 to wait for ever")
    return seconds


def get_config_file(name: str) -> str:
    """The path of a config that comes with sge_det, or with Detectron2's model zoo.

    Args:
        name: relative to ``configs/``, for instance "COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml".

    Raises:
        UserError: there is no such config; names the nearest ones.
    """
    for folder in (*_CONFIG_DIRS, _ZOO):
        if (folder / name).is_file():
            return str(folder / name)
    folders = (*_CONFIG_DIRS, _ZOO)
    known = sorted(
        {str(path.relative_to(d)) for d in folders for end in ("yaml", "py") for path in d.rglob(f"*.{end}")}
    )
    raise UserError(f"sge_det has no config {name!r}{_nearest(name, known)}")


def get_config(name: str, overrides: list[str] | tuple[str, ...] = ()) -> Any:
    """The full config of one that comes with sge_det; see :func:`get_config_file`.

    Returns:
        of a YAML config a ``CfgNode``, ready for ``build_model``; of a lazy one ("lazy/...py", whose overrides are
        "key=value") a ``DictConfig``, whose parts go to ``instantiate``.
    """
    path = get_config_file(name)
    return load_lazy_config(path, overrides) if path.endswith(".py") else load_config(path, overrides)


def find_config(path: str) -> str:
    """The path of a config given by its path, or by the name of one that comes with sge_det.

    Raises:
        UserError: there is neither.
    """
    if Path(path).is_dir():
        raise UserError(f"the config {path} is a folder: name a file in it")
    return path if Path(path).is_file() else get_config_file(path.removeprefix("configs/"))


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> CfgNode:
    """Reads a YAML config over Detectron2's and SGE's defaults.

    Args:
        path: a YAML file, or the name of one that comes with sge_det.
        overrides: KEY VALUE KEY VALUE ..., as on the command line.

    Raises:
        UserError: the file, a key or a value is wrong; names it.
    """
    path = find_config(path)
    if path.endswith(".py"):
        raise UserError(f"{path} is a lazy config, a program: tools/lazy_train_net.py trains it, this takes YAML")
    cfg = get_cfg()
    add_sge_config(cfg)
    try:
        loaded = _with_bases(path, ())
        _add_projects(cfg, loaded, overrides)
        _merge(cfg, CfgNode(loaded), path)
    except yaml.constructor.ConstructorError as error:
        if "constructor for the tag" not in str(error.problem):
            raise UserError(f"{path} is not a config in YAML: {error}") from error
        raise UserError(
            f"{path} has a YAML tag that would run code, which only files inside the detectron2 package may do; write "
            f"the value out: {error.problem}"
        ) from error
    except UserError:
        raise
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a config in YAML: {error}") from error
    except (KeyError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"{path}: {_config_error(cfg, error)}") from error
    merge_overrides(cfg, overrides)
    sge_options(cfg)
    optimizer_name(cfg)
    skip_nonfinite(cfg)
    loader_timeout(cfg)
    return cfg


def _add_projects(cfg: CfgNode, loaded: dict, overrides: list[str] | tuple[str, ...]) -> None:
    """Adds the keys of those of Detectron2's projects that a config needs: that name one of their keys or parts."""
    pairs = [*_pairs(loaded), *zip(overrides[::2], overrides[1::2], strict=False)]
    unknown = {key for key, _ in pairs} - set(_keys(cfg))
    names = [value for _, value in pairs if isinstance(value, str)]
    for module, function, marks in _PROJECTS:
        is_named = any(mark in name for name in names for mark in marks)
        if not is_named and not unknown:
            continue
        try:
            add = getattr(importlib.import_module(module), function)
        except ImportError:
            continue  # what it would register or read is then told as unknown
        own = get_cfg()
        add(own)
        if is_named or unknown & set(_keys(own)):
            add(cfg)


def _pairs(loaded: dict, prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in loaded.items():
        pairs += _pairs(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def load_lazy_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> DictConfig:
    """Runs a lazy config, a Python file, or reads one that ``LazyConfig.save`` wrote.

    Args:
        path: the file, or the name of one that comes with sge_det ("lazy/...py").
        overrides: "key=value" in Hydra's grammar, "+key=value" for a key that is not there.

    Raises:
        UserError: the file fails, or a key or a value is wrong; names it.
    """
    path = find_config(path)
    importer = builtins.__import__
    try:
        cfg = LazyConfig.load(path)
    except UserError:
        raise
    except Exception as error:  # a program fails in any way
        raise UserError(f"{path} is no lazy config that runs ({type(error).__name__}: {error})") from error
    finally:
        builtins.__import__ = importer  # which Detectron2 leaves replaced where the file fails
    if not isinstance(cfg, DictConfig):
        raise UserError(f"{path} is no lazy config: it holds no keys with values")
    _check_no_options(overrides, "key=value")
    for override in overrides:
        _override_lazy(cfg, override)
    return cfg


def _override_lazy(cfg: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise UserError(f"overrides of a lazy config come as key=value, but {override!r} has no value")
    name = key.removeprefix("+")
    parent, _, last = name.rpartition(".")
    try:
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not key.startswith("+") and name not in LAZY_KEYS and (node is None or last not in _lazy_names(node)):
            near = _nearest(name, [*_lazy_keys(cfg), *LAZY_KEYS])
            raise UserError(f"there is no config key {name}{near or f': +{override} adds it'}")
        LazyConfig.apply_overrides(cfg, [override if name not in LAZY_KEYS or key != name else f"+{override}"])
    except UserError:
        raise
    except Exception as error:  # of Hydra's grammar and OmegaConf's checks, a dozen kinds
        raise UserError(f"{override}: {' '.join(str(error).split())[:300]}") from error


def _lazy_names(node: Any) -> list[str]:
    if isinstance(node, ListConfig):
        return [str(place) for place in range(len(node))]
    return [str(name) for name in node] if isinstance(node, DictConfig) else []


def _lazy_keys(cfg: Any, prefix: str = "") -> list[str]:
    keys = []
    for name in _lazy_names(cfg):
        keys.append(prefix + name)
        value = cfg._get_node(int(name) if isinstance(cfg, ListConfig) else name)
        keys += _lazy_keys(value, f"{prefix}{name}.")
    return keys


def _merge(cfg: CfgNode, loaded: CfgNode, path: str) -> None:
    """Detectron2's ``merge_from_file`` for what is read already; configs of its old versions are upgraded."""
    try:
        version = loaded.get("VERSION", None) or guess_version(loaded, path)
    except TypeError:  # a value where keys should be, of which the merge tells
        version = cfg.VERSION
    if version == cfg.VERSION:
        cfg.merge_from_other_cfg(loaded)
        return
    if version not in range(1, cfg.VERSION):
        raise UserError(f"{path} is of config VERSION {version!r}, Detectron2's is {cfg.VERSION}")
    old = downgrade_config(cfg, to_version=version)
    old.merge_from_other_cfg(loaded)
    upgraded = upgrade_config(old)
    cfg.clear()
    cfg.update(upgraded)


def _with_bases(path: str, above: tuple[str, ...]) -> dict:
    """What a config file holds, over what the files in its ``_BASE_`` hold."""
    real = os.path.realpath(path)
    if real in above:
        raise UserError(f"{path} is its own {_BASE}, by way of {' and '.join(above)}: take one of them out")
    if len(above) > _MOST_BASES:
        raise UserError(f"{path} stands on more than {_MOST_BASES} configs, each the {_BASE} of the one before")
    root = compose_config(path)
    # A tag may run code, which is in order for files that come with the code that is run anyway.
    loader = yaml.UnsafeLoader if _ZOO in Path(real).parents else yaml.SafeLoader
    own = loader("")
    try:
        content = own.construct_document(root) if root is not None else {}
    finally:
        own.dispose()
    if not isinstance(content, dict):
        raise TypeError("it holds no keys with values")
    bases = content.pop(_BASE, [])
    merged: dict = {}
    for base in bases if isinstance(bases, list) else [bases]:
        below = _base_path(path, base)
        if not os.path.exists(below):
            raise UserError(f"{path}: its {_BASE} {below} does not exist")
        _overlay(merged, _with_bases(below, (*above, real)))
    _overlay(merged, content)
    return merged


def _base_path(path: str, base: Any) -> str:
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: {_BASE} is {base!r}, it must be the path of a config")
    if base.startswith(_ZOO_PREFIX):
        return str(_ZOO / base.removeprefix(_ZOO_PREFIX))
    if "://" in base:
        raise UserError(f"{path}: {_BASE} {base} lies on another machine: copy it here, and name the copy")
    return os.path.join(os.path.dirname(path), os.path.expanduser(base))


def _overlay(below: dict, above: dict) -> None:
    for key, value in above.items():
        if not isinstance(key, str):
            raise TypeError(f"its key {key!r:.100} is no name")
        if isinstance(value, dict):
            if not isinstance(below.setdefault(key, {}), dict):
                raise ValueError(f"{key} holds keys, but in {_BASE} it holds a value")
            _overlay(below[key], value)
        else:
            below[key] = value


def compose_config(path: str) -> yaml.Node | None:
    """The YAML of a config file as nodes, from which nothing is built yet; None where it is empty.

    Raises:
        UserError: it cannot be read, is no YAML, or would grow beyond all measure (aliases, depth, length).
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is a folder or a device, no config")
        if status.st_size > _LONGEST:
            raise UserError(f"{path} has {status.st_size} bytes: it is no config")
        with open(path, encoding="utf-8") as file:
            root = yaml.compose(file, yaml.SafeLoader)
        _grown(root, {}) if root is not None else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a config in YAML: {error}") from error
    except RecursionError as error:
        raise UserError(f"{path} is not a config in YAML: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{path} is not a config in YAML: {error}") from error
    return root


def _grown(node: yaml.Node, known: dict[int, int | None]) -> int:
    """The number of nodes below ``node`` with aliases written out."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError(f"an alias in line {node.start_mark.line + 1} stands for what it stands in")
        return count
    known[id(node)] = None
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    count = 1 + sum(_grown(part, known) for part in parts)
    if count > _MOST_NODES:
        raise ValueError(f"its aliases stand for more than {_MOST_NODES} entries")
    known[id(node)] = count
    return count


def merge_overrides(cfg: CfgNode, overrides: list[str] | tuple[str, ...]) -> None:
    """Merges KEY VALUE pairs into ``cfg``.

    Raises:
        UserError: a key that does not exist (names the nearest), a value of another type, a key without a value, or an
            option of the command line among them.
    """
    _check_no_options(overrides, "KEY VALUE")
    if len(overrides) % 2:
        raise UserError(f"overrides come as KEY VALUE pairs, but {overrides[-1]!r} has no value")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        if _holds_keys(cfg, key):
            raise UserError(f"{key} {value}: {key} holds keys and has no value of its own, set one of them")
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, AttributeError, TypeError, RecursionError, MemoryError) as error:
            raise UserError(f"{key} {value}: {_config_error(cfg, error, key)}") from error


def _check_no_options(overrides: Sequence[Any], kind: str) -> None:
    """Tells of an option that a tool took for a key or a value, as it stands behind the first of them."""
    for word in overrides:
        if re.match("--[a-z]", str(word)):
            raise UserError(f"{word} stands behind {kind}, where options are not looked for: put it before them")


def _holds_keys(cfg: CfgNode, key: str) -> bool:
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, CfgNode) else None
    return isinstance(node, CfgNode)


def _config_error(cfg: CfgNode, error: Exception, key: str = "") -> str:
    if isinstance(error, OSError):
        return f"cannot read {error.filename}: {error.strerror}"
    message = str(error.args[0] if error.args else error)
    if "Non-existent" in message:
        written, key = not key, key or message.rsplit(" ", 1)[-1]
        if written and "." in key and key in _keys(cfg):
            return f"{key} is written as one name: write each of {', '.join(key.split('.'))} below the one before"
        return f"there is no config key {key}{_nearest(key, _keys(cfg))}"
    if found := re.search(r"values \((.*) vs\. (.*)\) for config key: (\S+)", message, re.DOTALL):
        if "\n" in found[1]:
            return f"{found[3]} holds keys and has no value of its own, and {found[2][:80]} stands there"
        return f"{found[3]} must be a value like {found[1]}, not {found[2][:80]}"
    return message or type(error).__name__


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _nearest(name: str, known: list[str]) -> str:
    alike = [other for other in known if other.casefold() == name.strip().casefold()]
    near = alike or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""
