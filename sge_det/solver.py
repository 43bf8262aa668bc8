"""The optimizer: a learning rate of their own for SGE's parameters, and the clipping of the paper's recipe."""

from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler as build_plain_lr_scheduler
from detectron2.solver import build_optimizer as build_plain_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import nn

from .config import optimizer_name, sge_options
from .errors import UserError
from .layers.sge import SpatialGroupEnhance


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Detectron2's ``build_optimizer``, honouring three more things.

    ``MODEL.SGE.LR_FACTOR`` and ``WEIGHT_DECAY``, through :func:`scale_sge_lr`; ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE
    "full_model"``, which clips the norm of the gradient of all parameters together, as the release does: Detectron2's
    own types clip each parameter by itself; and ``SOLVER.OPTIMIZER``, "SGD" or "ADAMW".

    Raises:
        UserError: there is no such optimizer.
    """
    options = sge_options(cfg)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    whole = clip.ENABLED and clip.CLIP_TYPE == "full_model"
    if whole:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = build_plain_optimizer(cfg, model) if optimizer_name(cfg) == "SGD" else _build_adamw(cfg, model)
    if whole:
        clip_whole_gradient(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    scale_sge_lr(optimizer, model, options.lr_factor, options.weight_decay)
    return optimizer


def _build_adamw(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, lr=cfg.SOLVER.BASE_LR)


def clip_whole_gradient(optimizer: torch.optim.Optimizer, max_norm: float, norm_type: float = 2.0) -> None:
    """Makes every step of ``optimizer`` scale the gradient of all its parameters down to ``max_norm`` first."""

    def clip(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip)


def add_clipping(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer that is there clip as ``SOLVER.CLIP_GRADIENTS`` says."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "full_model":
        clip_whole_gradient(optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    else:
        maybe_add_gradient_clipping(cfg, optimizer)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Detectron2's ``build_lr_scheduler``, which knows DeepLab's ``WarmupPolyLR`` too."""
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR":
        from detectron2.projects.deeplab import build_lr_scheduler as build

        return build(cfg, optimizer)
    return build_plain_lr_scheduler(cfg, optimizer)


def build_clipped(
    params: Iterable, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, max_norm: float = 35.0, **kwargs
) -> torch.optim.Optimizer:
    """An optimizer that clips as :func:`clip_whole_gradient`, for lazy configs.

    Args:
        params: parameters, or groups of them.
        optimizer: its class.
        max_norm: the largest L2 norm of the gradient of all parameters together.
        kwargs: the optimizer's.
    """
    made = optimizer(params, **kwargs)
    clip_whole_gradient(made, max_norm)
    return made


def scale_sge_lr(
    optimizer: torch.optim.Optimizer, model: nn.Module, factor: float, weight_decay: float | None = None
) -> None:
    """Multiplies the learning rate of the SGE parameters of ``model`` by ``factor``, in any optimizer that holds them.

    With ``weight_decay`` they decay by that instead of what they had. SGD and AdamW take learning rate times decay off
    a parameter in each step, so that a factor without a decay of its own draws gamma and beta to zero as much faster.

    Raises:
        UserError: a learning-rate scheduler was built for ``optimizer`` before. It holds the rates that it found, one
            for each group of parameters, and would undo the factor or fail. Or the optimizer takes a single group
            (LBFGS), or no ``weight_decay``.
    """
    if factor == 1.0 and weight_decay is None:
        return
    if any("initial_lr" in group for group in optimizer.param_groups):  # which schedulers write
        raise UserError(
            "scale_sge_lr must come before the learning-rate scheduler is built, since the scheduler keeps the rates "
            "that it finds: call it right after the optimizer was made"
        )
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(f"{name} has one rate for all parameters, so that SGE's can have none of their own")
    if weight_decay is not None and any("weight_decay" not in group for group in optimizer.param_groups):
        raise UserError(
            f"{name} has no weight decay, so that SGE's parameters can have none of their own: leave it out"
        )
    sge = {p for module in model.modules() if isinstance(module, SpatialGroupEnhance) for p in module.parameters()}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if parameter in sge]
        if not own:
            continue
        group["params"] = [parameter for parameter in group["params"] if parameter not in sge]
        decay = {} if weight_decay is None else {"weight_decay": weight_decay}
        optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * factor, **decay})
