"""Pretraining of (SGE-)ResNets on classified images: timm's models, transforms, optimizers and schedules, in one loop.

What an image looks like after augmentation depends on seed, epoch and its number alone, so that a run that goes on
after an interruption ends as it would have ended without it, with any number of loader workers.
"""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...checkpoint.checksums import first_not_finite
from ...checkpoint.safe_load import Unreadable, load_file
from ...data.loader import leave_signals_to_parent, with_plain_errors
from ...errors import Stopped, UserError, shortage
from ...files import make_output, read_json, remove_file, replacing, write_json
from ...solver import scale_sge_lr
from ..claims import check_still_there, locked
from ..stopping import asked, waiting
from .options import CHECKPOINT, FINAL, MADE_FROM, PREDICTIONS, RESULT, Pretraining, flag

try:
    import timm
    from timm.data import Mixup, create_transform, resolve_data_config
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, distribute_bn

    from ...data.classified import EpochSampler, load_sets
    from ...modeling.classifiers import build_classifier
except ImportError as error:
    raise UserError("pretraining needs timm, which is missing: pip install timm") from error

logger = logging.getLogger(__name__)

# Where a run is watched or computed may change on the way, and where its images are; what it is may not.
_CHANGEABLE = ("workers", "device", "output", "log_period")
# The entries that tell which images those of --train and --val are.
_IMAGES = {"train": "train_images", "val": "val_images"}


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
        session = _Session(run)
        comm.synchronize()
        return session.execute()
    if resume and overwrite:
        raise UserError("--resume goes on with a run and --overwrite removes it: give one of them")
    make_output(run.folder, "--output")
    with locked(run.folder, "--output"):
        before = _found(run, world, resume, overwrite)
        session = _Session(run)
        if before:
            _compare_images(run, before, session.made_from)
        elif overwrite:  # now that nothing is wrong with what is to take its place
            for name in (RESULT, PREDICTIONS, FINAL, CHECKPOINT, MADE_FROM):
                remove_file(run.folder / name)
        write_json(run.folder / MADE_FROM, session.made_from)
        comm.synchronize()
        result = session.execute()
        check_still_there(run.folder / MADE_FROM)
        return result


def rehearse(run: Pretraining) -> list[str]:
    """Builds on trial, on the CPU, what a run would train; returns the names of the classes.

    Raises:
        UserError: as :func:`pretrain` before the first step.
    """
    return _Session(replace(run, device="cpu")).classes


def _found(run: Pretraining, world: int, resume: bool, overwrite: bool) -> dict[str, Any]:
    """What the run that is to go on was made from; empty where none is."""
    found = next((name for name in (RESULT, FINAL, CHECKPOINT) if (run.folder / name).exists()), "")
    if found and resume:
        return _compared(run.folder, _made_from(run, world))
    if found and not overwrite:
        raise UserError(
            f"{run.folder} holds a run ({found}): give the same command with --resume to go on with it or with "
            "--overwrite to remove it, or name another --output"
        )
    if resume:
        logger.warning(f"--resume: {run.folder} has no checkpoint yet, the run starts at epoch 0")
    return {}


def _made_from(run: Pretraining, world: int) -> dict[str, Any]:
    made = {name: value for name, value in asdict(run).items() if name not in _CHANGEABLE}
    return {
        **json.loads(json.dumps(made)),
        "processes": world,
        "versions": {"timm": timm.__version__, "torch": torch.__version__},
    }


def _compared(folder: Path, made_from: dict[str, Any]) -> dict[str, Any]:
    """What a run was made from, as far as it can be told before the images are looked at, the same as ``made_from``."""
    path, remedy = folder / MADE_FROM, "put a copy back, or give --overwrite in place of --resume to start anew"
    try:
        before = read_json(path, remedy)
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there, so whether this is the same run cannot be told: {remedy}") from error
    for name, value in made_from.items():
        if name == "versions":
            if before.get(name) != value:
                logger.warning(f"the run goes on, but not to the bit: it was made with {before.get(name)}, not {value}")
        elif name in _IMAGES and before.get(_IMAGES[name]):
            continue  # its images may have moved
        elif before.get(name) != value:
            of = f"in {before.get(name)} {name}" if name == "processes" else f"with --{flag(name)} {before.get(name)}"
            raise UserError(
                f"{folder} holds a run made {of}, not {value}: give it as it was to go on with --resume, or name "
                "another --output"
            )
    return before


def _compare_images(run: Pretraining, before: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    for name, key in _IMAGES.items():
        if before.get(key, made_from[key]) != made_from[key]:
            raise UserError(
                f"{run.folder} holds a run made with other images than those of --{name} {getattr(run, name)}, whose "
                "files have other names: give those that it was made with to go on with --resume, or name another "
                "--output"
            )


class _Session:
    """The parts of a run in one process; nothing is written, or read from the run's folder, before it is executed."""

    def __init__(self, run: Pretraining):
        self.run = run
        self.device = run.torch_device
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.train_set, self.val_set, self.classes = load_sets(run.train, run.val, run.seed)
        self.share = run.batch_size // comm.get_world_size()
        self.steps = len(self.train_set) // run.batch_size
        if self.steps == 0:
            raise UserError(
                f"--batch-size {run.batch_size} is more than the {len(self.train_set)} images of {run.train}"
            )
        self.made_from = {
            **_made_from(run, comm.get_world_size()),
            "train_images": self.train_set.images.digest,
            "val_images": self.val_set.digest,
        }
        self.model = build_model(run, len(self.classes)).to(self.device)
        self._check_model()
        config = resolve_data_config({"img_size": run.img_size}, model=self.model, verbose=False)
        look = {name: config[name] for name in ("interpolation", "mean", "std")}
        self.metadata = {"mean": list(look["mean"]), "std": list(look["std"]), "img_size": run.img_size}
        with _named(f"--auto-augment {run.auto_augment}"):
            transform = create_transform(
                run.img_size,
                is_training=True,
                scale=(run.scale, 1.0),
                color_jitter=run.color_jitter or None,
                auto_augment=run.auto_augment or None,
                re_prob=run.reprob,
                **look,
            )
            transform(Image.new("RGB", (run.img_size, run.img_size)))  # what does not work is told now
        self.train_set.images.transform = transform
        self.val_set.transform = create_transform(run.img_size, crop_pct=run.crop_pct, **look)
        with _named(f"--opt {run.opt}"):
            self.optimizer = create_optimizer_v2(self.model, opt=run.opt, lr=run.lr, weight_decay=run.weight_decay)
        if getattr(self.optimizer, "is_second_order", False):
            raise UserError(f"--opt {run.opt} needs second derivatives, which are not computed here: take another")
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
        self.parallel = self.model

    def _check_model(self) -> None:
        run = self.run
        model = f"--model {run.model} with --model-kwargs {' '.join(f'{k}={v}' for k, v in run.model_kwargs.items())}"
        with _named(model), torch.inference_mode():
            scores = self.model.eval()(torch.zeros(1, 3, run.img_size, run.img_size, device=self.device))
            if scores.shape != (1, len(self.classes)):
                raise ValueError(f"it gives {tuple(scores.shape)} for an image, not a score for each class")
        # the least that batch norm takes are two values of a channel
        if self.share == 1 and run.img_size <= self.model.feature_info[-1]["reduction"]:
            raise UserError(
                f"--batch-size {run.batch_size} is one image for each process, and --img-size {run.img_size} leaves "
                "one position of it to the last norms, which need two values: raise one of them"
            )

    def execute(self) -> dict[str, Any]:
        self._load()
        if comm.get_world_size() > 1:
            places = {"device_ids": [self.device.index]} if self.device.type == "cuda" else {}
            self.parallel = nn.parallel.DistributedDataParallel(self.model, **places)
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
            if self.step == self.steps and comm.get_world_size() > 1:
                # before a checkpoint, which holds those of the first process alone
                distribute_bn(self.model, comm.get_world_size(), reduce=True)
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
        if self.scheduler is not None:  # --sched none
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
            result = _recorded(self.run.folder / RESULT)
            if comm.is_main_process():
                remove_file(self.run.folder / CHECKPOINT)  # left where the run was cut off just before
            return result
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
            **self.made_from,
        }
        if comm.is_main_process():
            folder = self.run.folder
            state = {"arch": self.run.model, "epoch": self.epoch, "state_dict": _on_cpu(self.model), **self.metadata}
            if self.ema is not None:
                state["state_dict_ema"] = _on_cpu(self.ema.module)
            _write(folder / FINAL, state)
            names = [self.val_set.name(index) for index, *_ in hits]
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
    """The model of ``run``, on the CPU, with the random weights of its seed."""
    return build_classifier(
        run.model,
        classes,
        seed=run.seed,
        groups=run.groups,
        stem_channels=run.stem_channels,
        model_kwargs=run.model_kwargs,
    )


@contextlib.contextmanager
def _named(option: str) -> Iterator[None]:
    """What timm does not take, as a sentence with the option's name."""
    try:
        yield
    except Exception as error:
        if shortage(error):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{option} is not taken by timm: {reason}") from error


def accuracies(hits: list[tuple[int, bool, bool]]) -> dict[str, float]:
    """Top-1 and top-5 accuracy (0-100) of what :meth:`_Session.evaluate` finds."""
    count = max(len(hits), 1)
    return {"top1": 100 * sum(hit[1] for hit in hits) / count, "top5": 100 * sum(hit[2] for hit in hits) / count}


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
