"""The ``MODEL.SGE`` keys, and the configs that travel with the package."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml
from detectron2.config import CfgNode, get_cfg

from .errors import UserError
from .layers.attention import ATTENTIONS, SGE
from .layers.kernels import KERNELS

STAGES = ("res2", "res3", "res4", "res5")
LOADER_TIMEOUT = 600
OPTIMIZERS = ("SGD", "ADAMW")

# In a wheel the configs lie in the package, in a checkout beside it.
_CONFIG_DIRS = [folder / "configs" for folder in (Path(__file__).parent, Path(__file__).parent.parent)]


def add_sge_config(cfg: CfgNode) -> None:
    """Adds the ``MODEL.SGE`` keys and ours of ``SOLVER`` and ``DATALOADER``, with their defaults, to a config."""
    cfg.MODEL.SGE = _default_options()
    # "SGD", as everywhere in Detectron2, or "ADAMW"; BASE_LR, the decays and the clipping serve both.
    cfg.SOLVER.OPTIMIZER = OPTIMIZERS[0]
    # How many steps whose loss is not finite are passed over before training stops.
    cfg.SOLVER.SKIP_NONFINITE = 0
    # Seconds that a process waits for a batch of its loader's workers; 0 waits for ever.
    cfg.DATALOADER.TIMEOUT = LOADER_TIMEOUT


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
    # What stands in that place: "sge", or a rival from timm: "se", "eca", "cbam".
    options.ATTENTION = SGE
    # What computes SGE: "eager", "compile" (by torch.compile) or "triton" (GPUs). Where it cannot run a warning says so
    # once and "eager" takes its place.
    options.KERNEL = "eager"
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
    kernel: str
    log_period: int

    @property
    def is_sge(self) -> bool:
        """Whether SGE itself is asked for, no rival and no plain twin."""
        return self.enabled and self.attention == SGE


def sge_options(cfg: CfgNode) -> SGEOptions:
    """``cfg.MODEL.SGE``, checked; its defaults in a config that never heard of it.

    Raises:
        UserError: a stage, an attention or a kernel that does not exist, an INIT that is not two numbers, or a
            WEIGHT_DECAY that is no decay.
    """
    options = {**_default_options(), **(cfg.MODEL.get("SGE", None) or {})}
    for stage in options["STAGES"]:
        if stage not in STAGES:
            raise UserError(f"MODEL.SGE.STAGES names {stage!r}: the stages of a ResNet are {', '.join(STAGES)}")
    if options["ATTENTION"] not in ATTENTIONS:
        raise UserError(f"MODEL.SGE.ATTENTION {options['ATTENTION']!r} is not one of {', '.join(ATTENTIONS)}")
    if options["KERNEL"] not in KERNELS:
        raise UserError(f"MODEL.SGE.KERNEL {options['KERNEL']!r} is not one of {', '.join(KERNELS)}")
    init = options["INIT"]
    if len(init) != 2 or not all(isinstance(value, int | float) for value in init):
        raise UserError(f"MODEL.SGE.INIT must be two numbers, weight and bias; got {init}")
    decay = options["WEIGHT_DECAY"]
    if decay is not None and not (isinstance(decay, int | float) and decay >= 0):
        raise UserError(f"MODEL.SGE.WEIGHT_DECAY must be a number of at least 0, or None; got {decay!r}")
    return SGEOptions(
        enabled=options["ENABLED"],
        groups=options["GROUPS"],
        stages=tuple(options["STAGES"]),
        lr_factor=options["LR_FACTOR"],
        weight_decay=decay,
        init=tuple(init),
        reset=options["RESET"],
        attention=options["ATTENTION"],
        kernel=options["KERNEL"],
        log_period=options["LOG_PERIOD"],
    )


def optimizer_name(cfg: CfgNode) -> str:
    """``cfg.SOLVER.OPTIMIZER``, "SGD" in a config that never heard of it.

    Raises:
        UserError: an optimizer that does not exist.
    """
    name = cfg.SOLVER.get("OPTIMIZER", OPTIMIZERS[0])
    if name not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER {name!r} is not one of {', '.join(OPTIMIZERS)}")
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
    """The path of a config that comes with sge_det.

    Args:
        name: relative to ``configs/``, for instance "COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml".

    Raises:
        UserError: there is no such config; names the nearest ones.
    """
    for folder in _CONFIG_DIRS:
        if (folder / name).is_file():
            return str(folder / name)
    known = sorted({str(path.relative_to(d)) for d in _CONFIG_DIRS for path in d.rglob("*.yaml")})
    raise UserError(f"sge_det has no config {name!r}{_nearest(name, known)}")


def get_config(name: str, overrides: list[str] | tuple[str, ...] = ()) -> CfgNode:
    """The full config of one that comes with sge_det, ready for ``build_model``; see :func:`get_config_file`."""
    return load_config(get_config_file(name), overrides)


def find_config(path: str) -> str:
    """The path of a config given by its path, or by the name of one that comes with sge_det.

    Raises:
        UserError: there is neither.
    """
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
    cfg = get_cfg()
    add_sge_config(cfg)
    try:
        # allow_unsafe would run what a !!python tag says
        cfg.merge_from_file(path, allow_unsafe=False)
    except yaml.constructor.ConstructorError as error:
        raise UserError(f"{path} has a YAML tag that would run code; write the value out: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a config in YAML: {error}") from error
    except (KeyError, ValueError, AssertionError, OSError) as error:
        raise UserError(f"{path}: {_config_error(cfg, error)}") from error
    merge_overrides(cfg, overrides)
    sge_options(cfg)
    optimizer_name(cfg)
    skip_nonfinite(cfg)
    loader_timeout(cfg)
    return cfg


def merge_overrides(cfg: CfgNode, overrides: list[str] | tuple[str, ...]) -> None:
    """Merges KEY VALUE pairs into ``cfg``.

    Raises:
        UserError: a key that does not exist (names the nearest), a value of another type, or a key without a value.
    """
    if len(overrides) % 2:
        raise UserError(f"overrides come as KEY VALUE pairs, but {overrides[-1]!r} has no value")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except (KeyError, ValueError, AssertionError, AttributeError) as error:
            raise UserError(f"{key} {value}: {_config_error(cfg, error, key)}") from error


def _config_error(cfg: CfgNode, error: Exception, key: str = "") -> str:
    if isinstance(error, OSError):
        return f"cannot read {error.filename}: {error.strerror}"
    message = str(error.args[0] if error.args else error)
    if "Non-existent" in message:
        key = key or message.rsplit(" ", 1)[-1]
        return f"there is no config key {key}{_nearest(key, _keys(cfg))}"
    return message


def _keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f": did you mean {' or '.join(near)}?" if near else ""
