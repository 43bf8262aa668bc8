"""Steps of several passes, and in mixed precision on any device."""

import contextlib
import time
from collections.abc import Iterable, Sequence

import torch
from detectron2.config import CfgNode
from detectron2.engine.train_loop import AMPTrainer, SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError


def build_steps(
    cfg: CfgNode, model: nn.Module, data_loader: Iterable, optimizer: torch.optim.Optimizer
) -> SimpleTrainer:
    """What makes the steps of a run: Detectron2's own trainer where it can, otherwise :class:`StepTrainer`.

    Raises:
        UserError: the images of a step cannot be divided among its passes.
    """
    passes, images = cfg.SOLVER.get("GRADIENT_ACCUMULATION_STEPS", 1), cfg.SOLVER.IMS_PER_BATCH
    if images % (passes * comm.get_world_size()):
        raise UserError(
            f"SOLVER.GRADIENT_ACCUMULATION_STEPS {passes}: SOLVER.IMS_PER_BATCH {images} is not a multiple of "
            f"{passes} passes in {comm.get_world_size()} processes"
        )
    precision = cfg.SOLVER.AMP.get("PRECISION", "float16") if cfg.SOLVER.AMP.ENABLED else ""
    if passes == 1 and precision in ("", "float16"):
        return (AMPTrainer if precision else SimpleTrainer)(model, data_loader, optimizer)
    return StepTrainer(model, data_loader, optimizer, passes=passes, precision=precision, device=cfg.MODEL.DEVICE)


class StepTrainer(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` whose step may be several passes, each in mixed precision.

    The gradient is the mean of the passes': that of the whole batch, where a loss is a mean over images or over equal
    numbers of samples of each.

    Args:
        model, data_loader, optimizer: as in ``SimpleTrainer``; a batch is of one step.
        passes: into how many parts each batch is cut.
        precision: "float16", "bfloat16", or "" for float32.
        device: the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        passes: int = 1,
        precision: str = "",
        device: str = "cpu",
    ):
        super().__init__(model, data_loader, optimizer)
        self.passes = passes
        self.device_type = torch.device(device).type
        self.precision = getattr(torch, precision) if precision else None
        # the gradients of bfloat16, which has the range of float32, need no scaling
        self.grad_scaler = torch.amp.GradScaler(self.device_type, enabled=precision == "float16")

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        self.optimizer.zero_grad()
        means: dict[str, torch.Tensor] = {}
        parts = cut(batch, self.passes)
        for number, part in enumerate(parts):
            with self._alone(number + 1 < len(parts)):
                share = len(part) / len(batch)
                with torch.autocast(self.device_type, self.precision, enabled=self.precision is not None):
                    losses = self.model(part)
                losses = losses if isinstance(losses, dict) else {"total_loss": losses}
                self.grad_scaler.scale(sum(losses.values()) * share).backward()
            for name, loss in losses.items():
                means[name] = means.get(name, 0.0) + loss.detach() * share
        self.after_backward()
        self._write_metrics(means, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _alone(self, is_alone: bool) -> contextlib.AbstractContextManager:
        """Within, processes do not exchange gradients, which the last pass of a step does for all of it."""
        if is_alone and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    def state_dict(self) -> dict:
        scaler = {"grad_scaler": self.grad_scaler.state_dict()} if self.grad_scaler.is_enabled() else {}
        return super().state_dict() | scaler

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


def cut(batch: Sequence, count: int) -> list[Sequence]:
    """``batch`` in ``count`` parts of one size, in order; in as many as it has entries where those are fewer."""
    size = -(-len(batch) // count)
    return [batch[start : start + size] for start in range(0, len(batch), size)]
