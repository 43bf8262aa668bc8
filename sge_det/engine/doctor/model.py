"""What is wrong with the model itself: it is built on the meta device, and what is there is counted."""

import re

from detectron2.config import CfgNode
from torch import nn

from ...checkpoint.convert import build_meta_model
from ...config import STAGES, sge_options
from ...layers.sge import SpatialGroupEnhance
from .finding import Finding

_BLOCK = re.compile(rf"(?:(?P<head>.+)\.)?(?P<stage>{'|'.join(STAGES)})\.\d+")


def examine_model(cfg: CfgNode) -> list[Finding]:
    """Tells of the stages of ``MODEL.SGE.STAGES`` in which the model of ``cfg`` has blocks without SGE, or no blocks.

    A config whose model cannot be built has nothing found here: building it says why.
    """
    options = sge_options(cfg)
    # a backbone that is blind to MODEL.SGE is told of by its name, and may be meant
    if not options.is_sge or "sge" not in cfg.MODEL.BACKBONE.NAME:
        return []
    model = build_on_meta(cfg)
    if model is None:
        return []
    findings = []
    found = stages_of(model)
    for stage in options.stages:
        places = {place: enhanced for place, enhanced in found.items() if place.rpartition(".")[2] == stage}
        if not places:
            problem, remedy = f"names {stage}, of which this model has no block", f"leave {stage} out of it"
            findings.append(Finding("warning", "MODEL.SGE.STAGES", problem, remedy))
        for place, enhanced in places.items():
            if not all(enhanced):
                problem = f"{place} has {len(enhanced) - sum(enhanced)} of {len(enhanced)} blocks without SGE"
                findings.append(Finding("warning", "MODEL.SGE.STAGES", problem, _remedy(cfg, place)))
    return findings


def _remedy(cfg: CfgNode, place: str) -> str:
    stage = place.rpartition(".")[2]
    if place.startswith("roi_heads.") and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
        return "set MODEL.ROI_HEADS.NAME SGERes5ROIHeads"
    return f"leave {stage} out of MODEL.SGE.STAGES if that is meant"


def build_on_meta(cfg: CfgNode) -> nn.Module | None:
    """The model of ``cfg`` without memory for its tensors; None where it cannot be built so."""
    try:
        return build_meta_model(cfg)
    except Exception:  # whatever is the matter, the model's builder says so in its place
        return None


def stages_of(model: nn.Module) -> dict[str, list[bool]]:
    """For each stage, by its module's name: whether each of its blocks has SGE."""
    found: dict[str, list[bool]] = {}
    for name, module in model.named_modules():
        match = _BLOCK.fullmatch(name)
        if match:
            has_sge = any(isinstance(part, SpatialGroupEnhance) for part in module.modules())
            found.setdefault(name.rpartition(".")[0], []).append(has_sge)
    return found
