"""What is wrong with the model itself: it is built on the meta device, and what is there is counted."""

import functools
import re

from detectron2.config import CfgNode
from torch import nn

from ...checkpoint.convert import build_meta_model
from ...config import STAGES, SGEOptions, sge_options
from ...layers.sge import SpatialGroupEnhance
from .finding import Finding

_BLOCK = re.compile(rf"(?:(?P<head>.+)\.)?(?P<stage>{'|'.join(STAGES)})\.\d+")


def examine_model(cfg: CfgNode) -> list[Finding]:
    """Tells of the stages of ``MODEL.SGE.STAGES`` in which the model of ``cfg`` has blocks without SGE, or no blocks.

    A config whose model cannot be built has nothing found here: building it says why.
    """
    options = sge_options(cfg)
    found = _stages(cfg)
    # a backbone that is blind to MODEL.SGE may be meant
    if not options.is_sge or found is None or not any(map(any, found.values())):
        return []
    findings = []
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


def has_sge(cfg: CfgNode, options: SGEOptions) -> bool:
    """Whether the model of ``cfg`` has SGE layers; where it cannot be built, whether its backbone's name says so."""
    if not options.is_sge:
        return False
    found = _stages(cfg)
    return "sge" in cfg.MODEL.BACKBONE.NAME if found is None else any(map(any, found.values()))


def _stages(cfg: CfgNode) -> dict[str, list[bool]] | None:
    """:func:`stages_of` the model of ``cfg``; None where it cannot be built on the meta device."""
    text = _Text(repr(cfg))  # as YAML it would take 0.1 s, each time that anybody asks
    text.cfg = cfg
    return _stages_of(text)


class _Text(str):
    """A config as text, by which what was found of it is kept, with the config itself."""

    cfg: CfgNode


@functools.lru_cache(maxsize=8)
def _stages_of(text: _Text) -> dict[str, list[bool]] | None:
    try:
        model = build_meta_model(text.cfg)
    except Exception:  # whatever is the matter, the model's builder says so in its place
        return None
    return stages_of(model)


def stages_of(model: nn.Module) -> dict[str, list[bool]]:
    """For each stage, by its module's name: whether each of its blocks has SGE; layers elsewhere under ""."""
    found: dict[str, list[bool]] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if _BLOCK.fullmatch(name):
            layers = {part for part in module.modules() if isinstance(part, SpatialGroupEnhance)}
            found.setdefault(name.rpartition(".")[0], []).append(bool(layers))
            inside |= layers
    elsewhere = [part for part in model.modules() if isinstance(part, SpatialGroupEnhance) and part not in inside]
    return {**found, **({"": [True] * len(elsewhere)} if elsewhere else {})}
