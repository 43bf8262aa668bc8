"""What is wrong with running a config in so many processes, where it writes, or with resuming it."""

from dataclasses import replace

import torch
from detectron2.config import CfgNode

from ...checkpoint.checkpointer import checkpoints
from ...checkpoint.safe_load import load_file
from ...errors import UserError
from ...files import check_folder
from .finding import Finding, finding_of


def examine_run(cfg: CfgNode, *, processes: int, resume: bool = False) -> list[Finding]:
    """What is wrong with running ``cfg`` in so many processes, or resuming it."""
    return [*_sync_bn(cfg, processes), *(_resume(cfg) if resume else [])]


def examine_output(folder: str) -> list[Finding]:
    """What is wrong with an ``OUTPUT_DIR``; nothing is made there."""
    try:
        check_folder(folder, "OUTPUT_DIR")
    except UserError as error:
        return [finding_of(error, "OUTPUT_DIR")]
    return []


def _sync_bn(cfg: CfgNode, processes: int) -> list[Finding]:
    model = cfg.MODEL
    norms = {
        "MODEL.RESNETS.NORM": model.RESNETS.NORM,
        "MODEL.FPN.NORM": model.FPN.NORM,
        "MODEL.ROI_BOX_HEAD.NORM": model.ROI_BOX_HEAD.NORM,
        "MODEL.ROI_MASK_HEAD.NORM": model.ROI_MASK_HEAD.NORM,
        "MODEL.RETINANET.NORM": model.RETINANET.NORM,
    }
    sync = {key: norm for key, norm in norms.items() if "SyncBN" in norm}
    if processes == 1:
        remedy = "set {} BN or FrozenBN, or use more GPUs"
        return [
            Finding("warning", key, f"{norm} in one process is BN, of few images", remedy.format(key))
            for key, norm in sync.items()
        ]
    if model.DEVICE != "cpu" and torch.cuda.is_available():
        return []
    remedy = "set {} BN or FrozenBN"
    torchs = {key: norm for key, norm in sync.items() if not norm.startswith("naive")}  # Detectron2's own runs anywhere
    return [Finding("error", key, f"{norm} needs GPUs", remedy.format(key)) for key, norm in torchs.items()]


def _resume(cfg: CfgNode) -> list[Finding]:
    try:
        found = checkpoints(cfg.OUTPUT_DIR)
    except UserError as error:
        return [finding_of(error, "--resume")]
    if not found:
        return []
    path = found[0]
    try:
        checkpoint = load_file(path)
    except UserError as error:
        finding = finding_of(error, "--resume")
        older = found[1:]
        return [replace(finding, severity="warning", remedy=f"{older[0]} is tried then")] if older else [finding]
    iteration = checkpoint.get("iteration") if isinstance(checkpoint, dict) else None
    done = iteration + 1 if type(iteration) is int else 0
    if done < cfg.SOLVER.MAX_ITER:
        return []
    problem = f"{path} is already trained to iteration {done} of {cfg.SOLVER.MAX_ITER}: there is nothing to train"
    return [Finding("warning", "SOLVER.MAX_ITER", problem, f"set it above {done}, or another OUTPUT_DIR")]
