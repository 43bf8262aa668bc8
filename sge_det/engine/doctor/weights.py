"""What is wrong with the weights of a config, or with the config in their light."""

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode

from ...checkpoint.checksums import unusable
from ...checkpoint.convert import Coverage, coverage, in_backbone, model_shapes
from ...checkpoint.mapping import to_detectron2
from ...checkpoint.sources import HEADS, Source, known_recipe, read_source
from ...config import STAGES, SGEOptions
from ...errors import UserError
from ...layers.attention import KEYS, is_sge_key
from .finding import Finding, finding_of
from .model import has_sge


def examine_weights(cfg: CfgNode, options: SGEOptions) -> list[Finding]:
    path = cfg.MODEL.WEIGHTS
    with_sge = has_sge(cfg, options)
    if not path:
        return _frozen(cfg, options, None)
    if "://" in path:  # not fetched before it is needed: judged by its name alone
        recipe = known_recipe(path)
        if recipe is None:
            return []
        findings = contradicted(path, recipe.contradictions(cfg))
        return findings + _plain(path, options, {}) + _frozen(cfg, options, {}) if with_sge else findings
    try:
        source = read_weights(path)
        state, filled = source.state, {}
        if source.kind == "caffe2":
            renamed = to_detectron2(source)
            state, filled = renamed.state, renamed.filled
        fit = coverage(state, model_shapes(cfg), by_suffix=source.by_suffix)
    except UserError as error:
        return [finding_of(error, "MODEL.WEIGHTS")]
    for name in fit.filled.values():
        wrong = unusable(name, state[name])
        if wrong:
            return [Finding("error", "MODEL.WEIGHTS", f"in {path} {name} {wrong}", "take other weights")]
    norm = cfg.MODEL.RESNETS.NORM
    if filled and norm != "FrozenBN":
        problem = f"it is {norm or 'no norm'}, but {path} has norms without statistics, which FrozenBN alone can take"
        return [Finding("error", "MODEL.RESNETS.NORM", problem, "set it to FrozenBN, or take other weights")]
    findings = contradicted(path, source.recipe.contradictions(cfg)) + fitting(path, source, fit, with_sge=with_sge)
    if not any(finding.severity == "error" for finding in findings) and source.kind and with_sge:
        sge = {key: state[name] for key, name in fit.filled.items() if is_sge_key(key)}
        findings += [*_plain(path, options, sge), *_frozen(cfg, options, sge)]
    return findings


def read_weights(path: str) -> Source:
    """The weights of a file, as they are loaded.

    Raises:
        UserError: it cannot be read, or must be converted before it can be loaded.
    """
    source = read_source(path, strict=False, weights_of="raw")
    if source.kind and source.kind not in ("detectron2-backbone", "detectron2-detector", "caffe2"):
        raise UserError(
            f"{path} is {source.description}, not Detectron2's format; convert it: "
            f"tools/convert_weights.py {path} OUTPUT.pth"
        )
    return source


def contradicted(path: str, found: Mapping[str, tuple[Any, Any]]) -> list[Finding]:
    """What the weights of ``path`` were trained with and a config is not set to: key -> (has, should have)."""
    # heads adapt to other anchors and poolers where they are trained on
    return [
        Finding(
            "warning" if key in HEADS else "error",
            key,
            f"it is {have}, but {path} was trained with {want}",
            f"set {key} {want}",
        )
        for key, (have, want) in found.items()
    ]


def fitting(path: str, source: Source, fit: Coverage, *, with_sge: bool) -> list[Finding]:
    """What is wrong with how the weights of ``path`` fill a model; ``with_sge``: it has SGE."""
    groups = next((shapes for key, shapes in fit.misshapen.items() if is_sge_key(key)), None)
    if groups:
        have, want = groups
        if max(have) == max(want):
            problem, remedy = f"{path} has SGE of the shape {have}", f"tools/convert_weights.py {path} OUTPUT.pth"
            return [Finding("error", "MODEL.WEIGHTS", f"{problem}, the model of {want}", f"convert it: {remedy}")]
        problem = f"{path} has SGE of {max(have)} groups, the model of {max(want)}"
        return [Finding("error", "MODEL.SGE.GROUPS", problem, f"set MODEL.SGE.GROUPS {max(have)}")]
    attention = tuple(f".{name}." for name in KEYS)
    everything = (*fit.filled, *fit.unfilled)
    own = [key for key in everything if in_backbone(key) and not any(name in key for name in attention)]
    lacking = [key for key in own if key not in fit.filled]
    if lacking and (source.kind or not fit.filled):
        shapes = "{} there and {} in the model".format(*fit.misshapen.get(lacking[0], ("absent", "wanted")))
        return [
            Finding(
                "error",
                "MODEL.WEIGHTS",
                f"{path} fills {len(own) - len(lacking)} of the {len(own)} tensors of the backbone "
                f"({lacking[0]}: {shapes})",
                "name the weights of this model, or set the config to theirs (MODEL.RESNETS.DEPTH, NORM)",
            )
        ]
    findings = []
    left_out = [key for key in fit.unused if is_sge_key(key)]
    if left_out:
        problem = f"{path} has SGE ({len(left_out)} tensors), the model has no place for it: it is left out"
        remedy = "set MODEL.SGE.ENABLED True, MODEL.SGE.ATTENTION sge and all STAGES, or take plain weights"
        findings.append(Finding("warning", "MODEL.SGE", problem, remedy))
    # heads are not looked for in a backbone file, and SGE without any weights has a finding of its own
    has_heads = any(not in_backbone(key) for key in (*fit.filled, *fit.misshapen))
    is_plain = with_sge and not any(is_sge_key(key) for key in fit.filled)
    meant = [key for key in everything if (not (is_plain and is_sge_key(key)) if in_backbone(key) else has_heads)]
    unfilled = [key for key in meant if key not in fit.filled]
    if unfilled:
        whole = "model" if has_heads else "backbone"
        problem = f"{path} fills {len(meant) - len(unfilled)} of the {len(meant)} tensors of the {whole}: {unfilled[0]}"
        if unfilled[0] in fit.misshapen:
            have, want = fit.misshapen[unfilled[0]]
            problem += f" is {have} there and {want} in the model, and"
        remedy = "see that this is meant (other classes for instance)"
        findings.append(Finding("warning", "MODEL.WEIGHTS", f"{problem} starts anew", remedy))
    return findings


def _plain(path: str, options: SGEOptions, sge: Mapping[str, torch.Tensor]) -> list[Finding]:
    return [] if sge or not options.stages else [without_sge(path)]


def without_sge(path: str) -> Finding:
    """That plain weights are to fill a model with SGE."""
    return Finding(
        "warning",
        "MODEL.WEIGHTS",
        f"{path} has no SGE, and the model does not compute what it was trained for",
        f"transplant it: tools/convert_weights.py {path} OUTPUT.pth --transplant, or take SGE weights",
    )


def _frozen(cfg: CfgNode, options: SGEOptions, sge: dict[str, torch.Tensor] | None) -> list[Finding]:
    """``sge``: the SGE parameters in the weights by the model's names; None where there are no weights at all."""
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if sge is None and freeze_at > 0 and "resnet" in cfg.MODEL.BACKBONE.NAME:
        problem = f"{freeze_at} freezes the backbone's first stages at their random start, as there are no weights"
        return [
            Finding("warning", "MODEL.BACKBONE.FREEZE_AT", problem, "set it to 0, or name weights in MODEL.WEIGHTS")
        ]
    if sge is None or not has_sge(cfg, options):
        return []
    frozen = [stage for stage in options.stages if STAGES.index(stage) + 2 <= freeze_at]
    weights = [value for key, value in sge.items() if key.endswith("weight") and any(f".{s}." in key for s in frozen)]
    is_trained = any(bool(value.any()) for value in weights) and not options.reset
    if not frozen or is_trained:
        return []
    return [
        Finding(
            "warning",
            "MODEL.BACKBONE.FREEZE_AT",
            f"{freeze_at} freezes the SGE of {' and '.join(frozen)}, which {cfg.MODEL.WEIGHTS} has not trained: its "
            "gates stay constant",
            "set it to 1, or take SGE weights",
        )
    ]
