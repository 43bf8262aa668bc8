"""What a pretraining run is asked to do: the paper's ImageNet recipe by default; needs no timm."""

import argparse
import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError

# What a run leaves in its folder.
CHECKPOINT, FINAL, RESULT, PREDICTIONS, MADE_FROM = (
    "checkpoint.pth",
    "model_final.pth",
    "result.json",
    "predictions.json",
    "pretraining.json",
)


@dataclass(frozen=True)
class Pretraining:
    """A run. The defaults are the paper's ImageNet recipe (section 4.1, and the release): 100 epochs of SGD, 256 images
    a batch, a rate of 0.1 divided by ten every 30 epochs.

    Attributes:
        train, val: an image folder with a folder for each class, or a tar of one.
        output: folder of the run.
        model: one of timm's ResNets; ``sge_`` before its name puts SGE into its blocks.
        model_kwargs: of ``timm.create_model``: ``channels``, ``base_width``, ``stem_width``, ``drop_path_rate``, ...
        groups: channel groups of each SGE layer.
        stem_channels: channels of the first convolution, which timm has no argument for; 64 as in every ResNet.
        img_size: side of the images, px.
        epochs: passes over the training images.
        batch_size: images of a step, all processes together.
        opt, lr, weight_decay, sched, warmup_epochs, decay_epochs, decay_rate, min_lr: as timm names them; the schedule
            goes by steps.
        sge_lr_factor: the learning rate of SGE's parameters as a multiple of ``lr``.
        smoothing, mixup, cutmix, color_jitter, auto_augment, reprob, scale: as timm names them; scale is the least
            area of a random crop (0-1).
        crop_pct: share of the side that is kept where images are evaluated.
        ema_decay: of averaged weights, which are evaluated and saved too; 0 for none.
        clip_grad: greatest norm of the gradient; 0 for any.
        amp: ``"bfloat16"``, ``"float16"`` (CUDA) or ``""`` for float32.
        seed: of the start values, the order and the augmentations.
        checkpoint_epochs: epochs from one checkpoint to the next.
        workers: of each process's loader.
        device: ``"cuda"``, ``"cpu"``, or ``""`` for what there is.
        log_period: steps from one line of the log to the next.
    """

    train: str
    val: str
    output: str
    model: str = "sge_resnet50"
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    groups: int = 64
    stem_channels: int = 64
    img_size: int = 224
    epochs: int = 100
    batch_size: int = 256
    opt: str = "momentum"
    lr: float = 0.1
    weight_decay: float = 1e-4
    sched: str = "step"
    warmup_epochs: int = 0
    decay_epochs: float = 30
    decay_rate: float = 0.1
    min_lr: float = 0.0
    sge_lr_factor: float = 1.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str = ""
    reprob: float = 0.0
    scale: float = 0.08
    crop_pct: float = 0.875
    ema_decay: float = 0.0
    clip_grad: float = 0.0
    amp: str = ""
    seed: int = 0
    checkpoint_epochs: int = 1
    workers: int = 4
    device: str = ""
    log_period: int = 50

    @property
    def folder(self) -> Path:
        return Path(self.output)

    @property
    def torch_device(self) -> torch.device:
        """Where it is trained.

        Raises:
            UserError: there is no such device.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if name not in ("cuda", "cpu"):
            raise UserError(f"--device {name} is not one of cuda, cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; give --device cpu")
        return torch.device(name)

    def check(self, world: int = 1) -> None:
        """Checks what can be told before any image is read.

        Args:
            world: number of processes.

        Raises:
            UserError: a value that cannot be, with its name.
        """
        for name in ("epochs", "batch_size", "img_size", "groups", "stem_channels", "checkpoint_epochs", "log_period"):
            if getattr(self, name) < 1:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be at least 1")
        for name in (
            *("lr", "weight_decay", "warmup_epochs", "decay_rate", "min_lr", "sge_lr_factor", "mixup", "cutmix"),
            *("color_jitter", "clip_grad", "workers"),
        ):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be a number of at least 0")
        if not (math.isfinite(self.decay_epochs) and self.decay_epochs > 0):
            raise UserError(f"--decay-epochs {self.decay_epochs} must be a number above 0")
        for name in ("smoothing", "reprob", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be in [0, 1)")
        for name in ("scale", "crop_pct"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{flag(name)} {getattr(self, name)} must be above 0 and at most 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed {self.seed} must be from 0 to 2147483647")
        if self.amp not in ("", "bfloat16", "float16"):
            raise UserError(f"--amp {self.amp} is not one of bfloat16, float16")
        if self.amp == "float16" and self.torch_device.type != "cuda":
            raise UserError("--amp float16 needs a GPU: take bfloat16")
        if self.batch_size % world:
            raise UserError(f"--batch-size {self.batch_size} cannot be divided among {world} processes")
        if (self.mixup or self.cutmix) and self.batch_size // world % 2:
            raise UserError(f"--mixup and --cutmix pair images: {self.batch_size // world} a process is odd")
        for option, path in (("train", self.train), ("val", self.val)):
            if not path or not Path(path).exists():
                raise UserError(f"--{option} {path} is not there: give a folder with a folder for each class, or a tar")
        if not self.output:
            raise UserError("--output is empty: name a folder")


def flag(name: str) -> str:
    """A field's name as an option has it, without the dashes."""
    return name.replace("_", "-")


def parse_model_kwargs(pairs: list[str]) -> dict[str, Any]:
    """``["base_width=16", "channels=(16,32,64,128)"]`` as a dict; values are Python literals or else text.

    Raises:
        UserError: a pair without a "=".
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--model-kwargs {pair} must be NAME=VALUE, for instance base_width=16")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for each field of :class:`Pretraining`, with its default."""
    add = parser.add_argument
    add("--train", required=True, metavar="DIR|TAR", help="training images, a folder for each class, or a tar of it")
    add("--val", required=True, metavar="DIR|TAR", help="validation images, likewise")
    add("--output", required=True, metavar="DIR", help="folder of the run")
    add("--model-kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="of timm.create_model")
    taken = {"train", "val", "output", "model_kwargs"}
    for name, known in Pretraining.__dataclass_fields__.items():
        if name not in taken:
            kind = type(known.default)
            add(f"--{flag(name)}", type=kind, default=known.default, help=f"default {known.default!r}")


def from_options(args: argparse.Namespace) -> Pretraining:
    """The run that the options of :func:`add_options` ask for."""
    values = {name: getattr(args, name) for name in Pretraining.__dataclass_fields__}
    return replace(Pretraining(**values), model_kwargs=parse_model_kwargs(args.model_kwargs))
