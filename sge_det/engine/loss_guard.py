"""Steps whose loss is not finite: told with the images that gave it, or passed over."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from ..errors import UserError

logger = logging.getLogger(__name__)


class NonFiniteLossError(FloatingPointError):
    """The loss terms of a step, and its images, in words; raised before anything is computed from that loss."""


class LossGuard:
    """Watches the losses of a model in training, those of all processes together.

    Its hooks end a step whose loss is not finite before the gradient is computed, so that no process has changed
    anything. Gradients that overflow in mixed precision are no business of it: the scaler passes over those.

    Args:
        model: returns a dict of losses in training.
        limit: how many such steps are passed over, as if they had not been.
    """

    def __init__(self, model: nn.Module, limit: int):
        self.limit = limit
        self.passed_over = 0
        self._images: list[str] = []
        self._voted = False
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._check)

    def begin_step(self) -> None:
        """The next forward pass is the first of a step."""
        self._buffers = []

    def _begin(self, module: nn.Module, arguments: tuple) -> None:
        batch = arguments[0] if arguments else None
        self._images = [str(image.get("file_name")) for image in batch or () if isinstance(image, dict)]
        self._voted = False
        if module.training and self.passed_over < self.limit and not self._buffers:
            # norms take the step's statistics into theirs before its loss is there
            self._buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def _check(self, module: nn.Module, arguments: tuple, losses: Any) -> None:
        if not module.training or not isinstance(losses, dict | torch.Tensor):
            return
        terms = losses if isinstance(losses, dict) else {"total_loss": losses}
        values = torch.stack([term.detach().float().reshape(()) for term in terms.values()] or [torch.zeros(())])
        is_finite = bool(values.sum().isfinite())
        said = ", ".join(f"{name} {value:.4g}" for name, value in zip(terms, values.tolist(), strict=False))
        self._vote(None if is_finite else said, values.device)

    def _vote(self, wrong: str | None, device: torch.device | str) -> None:
        """Raises in all processes where the loss is not finite in one."""
        self._voted = True
        count = torch.tensor(float(wrong is not None), device=device)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
        if not count:
            return
        reports = comm.all_gather((wrong, self._images))
        wrong, images = next(report for report in reports if report[0] is not None)
        raise NonFiniteLossError(f"{wrong}; images {', '.join(images) or 'unknown'}")

    def handle(self, error: FloatingPointError, iteration: int, device: torch.device | str, last: Callable) -> None:
        """Passes over the step that raised ``error``, as long as there are not too many.

        Args:
            error: what the step raised: this guard, or the model in its forward pass.
            iteration: the number of the step.
            device: the model's.
            last: returns the words that name the last good checkpoint.

        Raises:
            UserError: there have been ``limit`` such steps before.
        """
        if not self._voted:
            # the model raised before its losses were there; the other processes wait for this one's vote
            try:
                self._vote(str(error).strip().split("\n")[0], device)
            except NonFiniteLossError as voted:
                error = voted
        if self.passed_over < self.limit:
            self.passed_over += 1
            for buffer, before in self._buffers:
                buffer.copy_(before)
            logger.warning(
                f"the loss of iteration {iteration} is not finite ({error}): passed over, {self.passed_over} of the "
                f"{self.limit} times that SOLVER.SKIP_NONFINITE allows"
            )
            return
        # nothing has been learned at the first step
        slower = "lower SOLVER.BASE_LR in a new run, " if iteration > 0 else ""
        before = f" after {self.passed_over} that were passed over" if self.passed_over else ""
        raise UserError(
            f"the loss is no longer finite at iteration {iteration}{before} ({' '.join(str(error).split())}): look at "
            f"these images' annotations, {slower}or pass over such steps with SOLVER.SKIP_NONFINITE "
            f"{self.limit + 1} and --resume; {last()}"
        ) from error
