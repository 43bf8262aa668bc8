"""Pretraining of (SGE-)ResNets on classified images: timm's models, transforms, optimizers and schedules, in one loop.

What an image looks like after augmentation depends on seed, epoch and its number alone, so that a run that goes on
after an interruption ends as it would have ended without it, with any number of loader workers.
"""

import argparse
import ast
import contextlib
import json
import logging
import math
import random
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import ToTensor
from tqdm import tqdm

from ..checkpoint.checksums import first_not_finite
from ..checkpoint.safe_load import Unreadable, load_file
from ..data.images import is_clipped
from ..data.loader import leave_signals_to_parent, with_plain_errors
from ..errors import Stopped, UserError
from ..files import make_folder, read_json, remove_file, replacing, write_json
from ..solver import scale_sge_lr
from .claims import locked
from .stopping import asked, waiting

try:
    import timm
    from timm.data import Mixup, create_transform, resolve_data_config
    from timm.data.readers import create_reader
    from timm.loss import SoftTargetCrossEntropy
    from timm.models.resnet import ResNet, downsample_conv
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, distribute_bn

    from ..modeling.timm import SGEAttention
except ImportError as error:
    raise UserError("pretraining needs timm, which is missing: pip install timm") from error

logger = logging.getLogger(__name__)

CHECKPOINT, FINAL, RESULT, PREDICTIONS, MADE_FROM = (
    "checkpoint.pth",
    "model_final.pth",
    "result.json",
    "predictions.json",
    "pretraining.json",
)
# Where a run is watched or computed may change on the way; what it is may not.
_CHANGEABLE = ("workers", "device", "output", "log_period")


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
                raise UserError(f"--{_flag(name)} {getattr(self, name)} must be at least 1")
        for name in ("lr", "weight_decay", "warmup_epochs", "mixup", "cutmix", "clip_grad", "workers", "sge_lr_factor"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"--{_flag(name)} {getattr(self, name)} must be a number of at least 0")
        for name in ("smoothing", "reprob", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{_flag(name)} {getattr(self, name)} must be in [0, 1)")
        for name in ("scale", "crop_pct"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"--{_flag(name)} {getattr(self, name)} must be above 0 and at most 1")
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
            if not Path(path).exists():
                raise UserError(f"--{option} {path} is not there: give a folder with a folder for each class, or a tar")


def _flag(name: str) -> str:
    return name.replace("_", "-")


def pretrain(run: Pretraining, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Trains and evaluates, in all processes of the group that this one is in.

    Args:
        run: what to do.
        resume: the run in ``run.output`` goes on.
        overwrite: the run in ``run.output`` is removed first.

    Returns:
        what ``result.json`` holds: ``top1`` and ``top5`` (0-100) of the last weights on ``val`` (``ema`` has those of
        the averaged ones), ``seconds`` of training over all stretches, and what the run was made of.

    Raises:
        UserError: something that the user can put right.
        Stopped: a signal asked for the end; a checkpoint is there.
    """
    world = comm.get_world_size()
    run.check(world)
    if not comm.is_main_process():
        comm.synchronize()
        return _Session(run).execute()
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: give one of them")
    make_folder(run.folder)
    with locked(run.folder):
        _claim(run, world, resume, overwrite)
        comm.synchronize()
        return _Session(run).execute()


def _claim(run: Pretraining, world: int, resume: bool, overwrite: bool) -> None:
    made_from = _made_from(run, world)
    found = next((name for name in (RESULT, FINAL, CHECKPOINT) if (run.folder / name).exists()), "")
    if found and overwrite:
        for name in (RESULT, PREDICTIONS, FINAL, CHECKPOINT, MADE_FROM):
            remove_file(run.folder / name)
    elif found and resume:
        _compare(run.folder, made_from)
    elif found:
        raise UserError(
            f"{run.folder} holds a run ({found}): give the same command with --resume to go on with it or with "
            "--overwrite to remove it, or name another --output"
        )
    elif resume:
        logger.warning(f"--resume: {run.folder} has no checkpoint yet, the run starts at epoch 0")
    write_json(run.folder / MADE_FROM, made_from)


def _made_from(run: Pretraining, world: int) -> dict[str, Any]:
    made = {name: value for name, value in asdict(run).items() if name not in _CHANGEABLE}
    return {
        **json.loads(json.dumps(made)),
        "processes": world,
        "versions": {"timm": timm.__version__, "torch": torch.__version__},
    }


def _compare(folder: Path, made_from: dict[str, Any]) -> None:
    path, remedy = folder / MADE_FROM, "put a copy back, or give --overwrite in place of --resume to start anew"
    try:
        before = read_json(path, remedy)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there, so whether this is the same run cannot be told: {remedy}") from error
    for name, value in made_from.items():
        if name == "versions":
            if before.get(name) != value:
                logger.warning(f"the run goes on, but not to the bit: it was made with {before.get(name)}, not {value}")
        elif before.get(name) != value:
            raise UserError(
                f"{folder} holds a run made with --{_flag(name)} {before.get(name)}, not {value}: give it as it was to "
                "go on with --resume, or name another --output"
            )


class Images(Dataset):
    """Classified images as timm finds them. timm's own data set takes the next image for one that cannot be read.

    Args:
        option: what the path was given as, ``"train"`` or ``"val"``.
        path: a folder with a folder for each class, or a tar of it.

    Attributes:
        classes: their names, in the order of the labels.
        transform: from PIL's image to a tensor.

    Raises:
        UserError: there are no such images.
    """

    def __init__(self, option: str, path: str):
        self.option, self.path = option, path
        try:
            self.reader = create_reader("", root=path)
        except (OSError, RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
            raise UserError(f"--{option} {path} has no images in a folder for each class: {error}") from error
        if len(self.reader) == 0:
            raise UserError(f"--{option} {path} has no images in a folder for each class")
        # timm's names for it, of folders and of tars
        found = getattr(self.reader, "class_to_idx", None) or self.reader.class_name_to_idx
        self.classes = sorted(found, key=found.get)
        self.transform: Callable[[Image.Image], Tensor] = ToTensor()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            file, label = self.reader[index]
            with file:
                image = Image.open(file)
                if is_clipped(image):
                    raise ValueError("its pixels have more than 8 bits")
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"--{self.option} {self.path}: {self.reader.filename(index)} cannot be read as an image ({error}): "
                "mend or remove it"
            ) from error
        return self.transform(image), label


class SeededImages(Dataset):
    """Images whose augmentations depend on (seed, epoch, image) alone.

    Args:
        images: with their transform.
        seed: of the run.
    """

    def __init__(self, images: Images, seed: int):
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        state = np.random.SeedSequence((self.seed, epoch, index)).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(state[1])
        torch.manual_seed(int(state[2]))
        return self.images[index]


class EpochSampler(Sampler):
    """This process's images of an epoch, as (epoch, image), from a step on.

    Args:
        count: images in the set.
        batch: images of a step in all processes; what does not fill one is left out.
        seed: of the run; with the epoch, of the order.
    """

    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch, self.seed = count, batch, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        steps = order[: len(self) * comm.get_world_size()].reshape(-1, self.batch)[self.start :]
        own = steps[:, comm.get_rank() :: comm.get_world_size()]
        return ((self.epoch, int(index)) for index in own.reshape(-1))

    def __len__(self) -> int:
        return self.count // self.batch * self.batch // comm.get_world_size()


class _Session:
    """The parts of a run in one process."""

    def __init__(self, run: Pretraining):
        self.run = run
        self.device = run.torch_device
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.train_set, self.val_set, self.classes = _data(run)
        self.share = run.batch_size // comm.get_world_size()
        self.steps = len(self.train_set) // run.batch_size
        if self.steps == 0:
            raise UserError(
                f"--batch-size {run.batch_size} is more than the {len(self.train_set)} images of {run.train}"
            )
        self.model = build_model(run, len(self.classes)).to(self.device)
        config = resolve_data_config({"img_size": run.img_size}, model=self.model, verbose=False)
        look = {name: config[name] for name in ("interpolation", "mean", "std")}
        self.metadata = {"mean": list(look["mean"]), "std": list(look["std"]), "img_size": run.img_size}
        with _named(f"--auto-augment {run.auto_augment}"):
            self.train_set.images.transform = create_transform(
                run.img_size,
                is_training=True,
                scale=(run.scale, 1.0),
                color_jitter=run.color_jitter or None,
                auto_augment=run.auto_augment or None,
                re_prob=run.reprob,
                **look,
            )
        self.val_set.transform = create_transform(run.img_size, crop_pct=run.crop_pct, **look)
        with _named(f"--opt {run.opt}"):
            self.optimizer = create_optimizer_v2(self.model, opt=run.opt, lr=run.lr, weight_decay=run.weight_decay)
        scale_sge_lr(self.optimizer, self.model, run.sge_lr_factor)
        with _named(f"--sched {run.sched}"):
            self.scheduler, _ = create_scheduler_v2(
                self.optimizer,
                sched=run.sched,
                num_epochs=run.epochs,
                decay_epochs=run.decay_epochs,
                decay_rate=run.decay_rate,
                warmup_epochs=run.warmup_epochs,
                min_lr=run.min_lr,
                step_on_epochs=False,
                updates_per_epoch=self.steps,
            )
        self.ema = ModelEmaV3(self.model, decay=run.ema_decay, use_warmup=True) if run.ema_decay else None
        self.scaler = torch.amp.GradScaler("cuda", enabled=run.amp == "float16")
        self.mixup = None
        if run.mixup or run.cutmix:
            self.mixup = Mixup(run.mixup, run.cutmix, label_smoothing=run.smoothing, num_classes=len(self.classes))
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.history: list[dict[str, float]] = []
        self.hits: list[tuple[int, bool, bool]] | None = None
        self._load()
        self.parallel = self.model
        if comm.get_world_size() > 1:
            places = {"device_ids": [self.device.index]} if self.device.type == "cuda" else {}
            self.parallel = nn.parallel.DistributedDataParallel(self.model, **places)

    def execute(self) -> dict[str, Any]:
        with waiting():
            while self.epoch < self.run.epochs:
                self._train_epoch()
                self._evaluate_epoch()
                if self.epoch % self.run.checkpoint_epochs == 0 or self.epoch == self.run.epochs:
                    self._save()
        return self._finish()

    def _train_epoch(self) -> None:
        run = self.run
        sampler = EpochSampler(len(self.train_set), run.batch_size, run.seed)
        sampler.epoch, sampler.start = self.epoch, self.step
        loader = self._loader(self.train_set, sampler)
        self.model.train()
        began, images, loss_sum, first = time.monotonic(), 0, 0.0, self.step
        for inputs, labels in with_plain_errors(loader):
            loss = self._update(inputs.to(self.device), labels.to(self.device))
            self.step += 1
            images += run.batch_size
            loss_sum += loss
            if self.step % run.log_period == 0 or self.step == self.steps:
                spent, done = time.monotonic() - began, self.step - first
                left = (run.epochs - self.epoch) * self.steps - self.step
                logger.info(
                    f"epoch {self.epoch + 1}/{run.epochs} step {self.step}/{self.steps}  loss {loss_sum / done:.4f}  "
                    f"lr {self.optimizer.param_groups[0]['lr']:.5f}  {images / spent:.0f} images/s  "
                    f"eta {_clock(left * spent / done)}"
                )
            if signum := _asked_anywhere(self.device):
                self.seconds += time.monotonic() - began
                self._save()
                raise Stopped(signum)
        self.seconds += time.monotonic() - began
        self.epoch, self.step = self.epoch + 1, 0

    def _loader(self, images: Dataset, sampler: Iterable) -> DataLoader:
        return DataLoader(
            images,
            self.share,
            sampler=sampler,
            num_workers=self.run.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals_to_parent,
        )

    def _update(self, inputs: Tensor, labels: Tensor) -> float:
        run = self.run
        number = self.epoch * self.steps + self.step
        self.scheduler.step_update(number)
        # drop path and mixup draw from these
        state = np.random.SeedSequence((run.seed, 1 << 32, number, comm.get_rank())).generate_state(2)
        np.random.seed(state[0])
        torch.manual_seed(int(state[1]))
        if self.mixup is not None:
            inputs, labels = self.mixup(inputs, labels)
        with torch.autocast(self.device.type, getattr(torch, run.amp or "bfloat16"), enabled=bool(run.amp)):
            scores = self.parallel(inputs)
            if self.mixup is not None:
                loss = SoftTargetCrossEntropy()(scores, labels)
            else:
                loss = F.cross_entropy(scores, labels, label_smoothing=run.smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise UserError(f"the loss is {value} at epoch {self.epoch + 1}, step {self.step + 1}: {self._slower()}")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if run.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), run.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, number + 1)
        return value

    def _evaluate_epoch(self) -> None:
        if comm.get_world_size() > 1:
            distribute_bn(self.model, comm.get_world_size(), reduce=True)
        self.hits = self.evaluate(self.model)
        found = accuracies(self.hits)
        self.history.append({"epoch": self.epoch, **found})
        logger.info(f"epoch {self.epoch}/{self.run.epochs}: top-1 {found['top1']:.2f}, top-5 {found['top5']:.2f}")

    def evaluate(self, model: nn.Module) -> list[tuple[int, bool, bool]]:
        """(image, its class is the first of the scores, is among the first five) for each validation image."""
        model.eval()
        own = range(comm.get_rank(), len(self.val_set), comm.get_world_size())
        loader = self._loader(self.val_set, list(own))
        hits: list[tuple[bool, bool]] = []
        with torch.inference_mode():
            for inputs, labels in tqdm(with_plain_errors(loader), "evaluation", len(loader), leave=False, disable=None):
                with torch.autocast(
                    self.device.type, getattr(torch, self.run.amp or "bfloat16"), enabled=bool(self.run.amp)
                ):
                    scores = model(inputs.to(self.device)).float().cpu()
                ranks = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
                hits += list(zip(ranks[:, 0].tolist(), ranks.any(1).tolist(), strict=True))
        gathered = comm.all_gather([(index, *hit) for index, hit in zip(own, hits, strict=True)])
        return sorted(entry for part in gathered for entry in part)

    def _finish(self) -> dict[str, Any]:
        if (self.run.folder / RESULT).exists():
            return _recorded(self.run.folder / RESULT)
        hits = self.evaluate(self.model) if self.hits is None else self.hits
        ema = None
        if self.ema is not None:
            if comm.get_world_size() > 1:
                # each process has averaged its own statistics; those of the first are saved
                distribute_bn(self.ema.module, comm.get_world_size(), reduce=False)
            ema = accuracies(self.evaluate(self.ema.module))
        result = {
            **accuracies(hits),
            "ema": ema,
            "history": self.history,
            "seconds": round(self.seconds, 1),
            "images": len(hits),
            "classes": self.classes,
            **_made_from(self.run, comm.get_world_size()),
        }
        if comm.is_main_process():
            folder = self.run.folder
            state = {"arch": self.run.model, "epoch": self.epoch, "state_dict": _on_cpu(self.model), **self.metadata}
            if self.ema is not None:
                state["state_dict_ema"] = _on_cpu(self.ema.module)
            _write(folder / FINAL, state)
            names = [self.val_set.reader.filename(index) for index, *_ in hits]
            predictions = {
                "model": self.run.model,
                "seed": self.run.seed,  # else two runs that get the same images right were one
                "images": names,
                "top1": [int(hit[1]) for hit in hits],
                "top5": [int(hit[2]) for hit in hits],
            }
            write_json(folder / PREDICTIONS, predictions)
            write_json(folder / RESULT, result)
            remove_file(folder / CHECKPOINT)
        comm.synchronize()
        return result

    def _check_finite(self) -> None:
        """In all processes, so that none waits for one that ends here."""
        models = {"state_dict": self.model, **({"state_dict_ema": self.ema.module} if self.ema is not None else {})}
        wrong = first_not_finite({name: model.state_dict() for name, model in models.items()})
        if wrong is not None:
            raise UserError(
                f"{wrong.partition('/')[2]} is no longer finite after epoch {self.epoch + bool(self.step)}, so it is "
                f"not saved: {self._slower()}"
            )

    def _slower(self) -> str:
        run = self.run
        return (
            f"in a new run (--overwrite, or another --output) lower --lr {run.lr:g} or give a --warmup-epochs; "
            f"{run.folder} has the last good checkpoint, if there was one"
        )

    def _save(self) -> None:
        self._check_finite()
        if comm.is_main_process():
            state = {
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "step": self.step,
                "seconds": self.seconds,
                "history": self.history,
            }
            if self.ema is not None:
                state["state_dict_ema"] = self.ema.module.state_dict()
            _write(self.run.folder / CHECKPOINT, state)
        comm.synchronize()

    def _load(self) -> None:
        folder = self.run.folder
        path = folder / (CHECKPOINT if (folder / CHECKPOINT).exists() else FINAL)
        if not path.exists():
            return
        try:
            state = load_file(path)
            self.model.load_state_dict(_tensors(state["state_dict"]))
            if self.ema is not None:
                self.ema.module.load_state_dict(_tensors(state["state_dict_ema"]))
            self.epoch = state["epoch"]
            if path.name == FINAL:  # trained, but cut off before the result was written
                return
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        except (Unreadable, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} cannot be gone on from ({reason}): give --overwrite in place of --resume to start anew"
            ) from error
        if comm.is_main_process():
            logger.info(f"going on at epoch {self.epoch + 1}, step {self.step + 1}")


def build_model(run: Pretraining, classes: int) -> nn.Module:
    """The model of ``run`` with random weights from its seed; an SGE model and its plain twin share them.

    Raises:
        UserError: timm has no such ResNet or does not take its arguments.
    """
    name = run.model.removeprefix("sge_")
    if not timm.is_model(name):
        near = ", ".join(sorted(timm.list_models("resnet[0-9]*", module="resnet"))[:12])
        raise UserError(f"--model {run.model}: timm has no {name!r}; for instance {near}, with sge_ before for SGE")
    kwargs = dict(run.model_kwargs)
    torch.manual_seed(run.seed)
    try:
        plain = timm.create_model(name, num_classes=classes, **kwargs)
        if not isinstance(plain, ResNet):
            raise UserError(
                f"--model {run.model}: timm's {name} is no ResNet, so it has no place for SGE in its blocks"
            )
        plain = _with_stem(plain, run.stem_channels)
        if name == run.model:
            return plain
        attention = {"attn_layer": _Grouped(run.groups)}
        model = timm.create_model(name, num_classes=classes, **kwargs, block_args=attention)
        model = _with_stem(model, run.stem_channels)
    except UserError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"--model {run.model} {kwargs or ''} cannot be built: {error}") from error
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    if unexpected or not missing:
        raise UserError(f"--model {run.model}: timm's {name} has no place for SGE in its blocks; take a ResNet")
    return model


def _with_stem(model: nn.Module, channels: int) -> nn.Module:
    """The model with another number of channels between its stem and its first stage."""
    stem = getattr(model, "conv1", None)
    if channels == 64:
        return model
    if not isinstance(stem, nn.Conv2d):
        raise ValueError("--stem-channels needs a stem of one convolution")
    first = model.layer1[0]
    model.conv1 = _resized(stem, stem.in_channels, channels)
    model.bn1 = type(model.bn1)(channels)
    first.conv1 = _resized(first.conv1, channels, first.conv1.out_channels)
    # where the widths were equal there was none
    first.downsample = first.downsample or downsample_conv(64, model.feature_info[1]["num_chs"], 1)
    first.downsample[0] = _resized(first.downsample[0], channels, first.downsample[0].out_channels)
    return model


def _resized(conv: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    new = nn.Conv2d(inputs, outputs, conv.kernel_size, conv.stride, conv.padding, bias=False)
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm starts its ResNets
    return new


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """What timm does not take, as a sentence with the option's name."""
    try:
        yield
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"{option} is not taken by timm: {' '.join(str(error).split())[:200]}") from error


class _Grouped:
    """Builds SGE with a number of groups, as timm calls an attention's class."""

    def __init__(self, groups: int):
        self.groups = groups

    def __call__(self, channels: int, **kwargs) -> SGEAttention:
        return SGEAttention(channels, self.groups, **kwargs)


def accuracies(hits: list[tuple[int, bool, bool]]) -> dict[str, float]:
    """Top-1 and top-5 accuracy (0-100) of what :meth:`_Session.evaluate` finds."""
    count = max(len(hits), 1)
    return {"top1": 100 * sum(hit[1] for hit in hits) / count, "top5": 100 * sum(hit[2] for hit in hits) / count}


def _data(run: Pretraining) -> tuple[SeededImages, "Images", list[str]]:
    train, val = Images("train", run.train), Images("val", run.val)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--train {run.train} and --val {run.val} differ in their classes: {', '.join(odd[:5])}")
    return SeededImages(train, run.seed), val, train.classes


def _asked_anywhere(device: torch.device) -> int:
    signum = asked() or 0
    if comm.get_world_size() > 1:
        together = torch.tensor(signum, device=device)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX)
        signum = int(together)
    return signum


def _recorded(path: Path) -> dict[str, Any]:
    remedy = "remove it and give the same command with --resume, which records the run anew"
    result = read_json(path, remedy)
    found = [result, result["ema"]] if isinstance(result.get("ema"), dict) else [result]
    if any(type(each.get(metric)) not in (int, float) for each in found for metric in ("top1", "top5")):
        raise UserError(f"{path} is not what a run records: {remedy}")
    return {"ema": None, **result}


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value) for key, value in state.items()}


def _on_cpu(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in model.state_dict().items()}


def _write(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as part:
        torch.save(state, part)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


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
            add(f"--{_flag(name)}", type=kind, default=known.default, help=f"default {known.default!r}")


def from_options(args: argparse.Namespace) -> Pretraining:
    """The run that the options of :func:`add_options` ask for."""
    values = {name: getattr(args, name) for name in Pretraining.__dataclass_fields__}
    return replace(Pretraining(**values), model_kwargs=parse_model_kwargs(args.model_kwargs))
