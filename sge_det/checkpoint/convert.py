"""From a weights file of any known kind to one for ``MODEL.WEIGHTS``, with an account of every tensor."""

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..errors import UserError
from ..layers.attention import is_sge_key
from .checksums import unusable
from .mapping import Renamed, resnet_shape, to_detectron2
from .safe_load import check_output, write_weights
from .sources import Source, read_source

# Returns the changed weights and a sentence on what changed.
Change = Callable[[dict[str, Tensor], CfgNode | None, str], tuple[dict[str, Tensor], str]]


@dataclass(frozen=True)
class Coverage:
    """How weights and a model fit.

    Attributes:
        filled: the model's tensors that the weights fill -> the weights' names of them.
        missing: the model's tensors that they do not.
        misshapen: the model's tensors that have another shape there -> (shape in the weights, shape in the model).
        unused: tensors of the weights that the model has no place for.
    """

    filled: dict[str, str]
    missing: list[str]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unused: list[str]

    @property
    def total(self) -> int:
        """The number of the model's tensors."""
        return len(self.filled) + len(self.missing) + len(self.misshapen)

    @property
    def unfilled(self) -> list[str]:
        """The model's tensors that stay at their start values."""
        return [*self.misshapen, *self.missing]


def build_meta_model(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg`` on the meta device: names and shapes, no memory."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


def model_shapes(cfg: CfgNode) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the tensors that a checkpoint of the model of ``cfg`` must have; allocates no memory.

    Raises:
        UserError: the config does not describe a model that can be built.
    """
    try:
        model = build_meta_model(cfg)
    except (AssertionError, KeyError) as error:
        raise UserError(f"Detectron2 cannot build the model of this config: {error}") from error
    # counters and tables of indices are no weights
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if value.is_floating_point()}


def coverage(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, by_suffix: bool) -> Coverage:
    """Matches weights with a model as Detectron2's checkpointer does.

    Args:
        state: the weights, under Detectron2's names.
        shapes: from :func:`model_shapes`.
        by_suffix: names match that are the ends of the model's, the longest first ("matching_heuristics").
    """
    filled, missing, misshapen = {}, [], {}
    for key, shape in shapes.items():
        parts = key.split(".")
        candidates = [".".join(parts[i:]) for i in range(len(parts))] if by_suffix else [key]
        name = next((candidate for candidate in candidates if candidate in state), None)
        if name is None:
            missing.append(key)
        elif tuple(state[name].shape) != shape:
            misshapen[key] = (tuple(state[name].shape), shape)
        else:
            filled[key] = name
    used = {*filled.values(), *misshapen}
    return Coverage(filled, missing, misshapen, [key for key in state if key not in used and not _is_counter(key)])


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def in_backbone(key: str) -> bool:
    """Whether a tensor of a detector is its ResNet's."""
    return ".bottom_up." in key or key.startswith(("backbone.stem.", "backbone.res"))


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert_file` did.

    Attributes:
        source: what was read.
        output: the file that was written.
        renamed: the fate of every tensor of the source.
        model: the ResNet in it, in words.
        coverage: how the file fills the model of the config; None without one.
        notes: further sentences.
    """

    source: Source
    output: str
    renamed: Renamed
    model: str
    coverage: Coverage | None = None
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The account, for people."""
        source, renamed = self.source, self.renamed
        lines = [f"{source.path} is {source.description}: {self.model}"]
        lines += [source.taken] if source.taken else []
        lines.append(f"{len(source.state)} tensors: {len(renamed.names)} renamed, {len(renamed.dropped)} dropped")
        for reason, count in Counter(renamed.dropped.values()).items():
            example = next(key for key, why in renamed.dropped.items() if why == reason)
            lines.append(f"  dropped {count}: {reason} ({example})")
        for reason, count in Counter(renamed.filled.values()).items():
            lines.append(f"  set {count}: {reason}")
        if self.coverage is not None:
            lines.append(f"they fill {len(self.coverage.filled)} of the {self.coverage.total} tensors of the model")
            lines += [f"  at its random start: {key}" for key in self.coverage.missing]
            for key, (have, want) in self.coverage.misshapen.items():
                lines.append(f"  at its random start: {key}, {have} in the source and {want} in the model")
            lines += [f"  without a place in the model: {key}" for key in self.coverage.unused]
        lines += self.notes
        lines.append(f"wrote {self.output}")
        known = source.recipe.overrides()
        if known:
            values = " ".join(f"{key} {shlex.quote(str(value).replace(' ', ''))}" for key, value in known.items())
            lines.append(f"use it with: {values}")
        if not source.recipe.is_whole:
            lines.append("the file does not say all of channel order, mean/std and stride: set what it had")
        return lines


def convert_file(
    source: str, output: str, *, cfg: CfgNode | None = None, change: Change | None = None, weights_of: str | None = None
) -> Conversion:
    """Converts a weights file into one for ``MODEL.WEIGHTS``.

    Args:
        source: a file of any kind in :data:`.sources.KINDS`, or a URL of Detectron2's.
        output: the file to write, .pth or .safetensors; nothing is written where anything is wrong.
        cfg: the config whose model the weights are for, if its fit is to be checked.
        weights_of: "raw" or "ema", where a file holds both; as :func:`.sources.read_source`.
        change: what to do to the weights after they are renamed, e.g. :func:`.transplant.transplant_state`.

    Raises:
        UserError: the source is no weights file that is known, some of it has no place, or it does not fill the
            backbone of ``cfg``.
    """
    check_output(output)
    found = read_source(source, weights_of=weights_of)
    if Path(output).exists() and Path(output).samefile(found.path):
        raise UserError(f"{output} is the source itself: name another output")
    renamed = to_detectron2(found)
    for own, name in renamed.names.items():
        wrong = unusable(name, renamed.state[name])
        if wrong:
            raise UserError(f"{source}: {own} {wrong}: no model can use that")
    shape = resnet_shape(renamed.state, source)
    state, notes, metadata = renamed.state, [], found.metadata()
    if change is not None:
        state, note = change(state, cfg, source)
        notes.append(note)
    metadata["transplanted"] = found.transplanted or change is not None
    by_suffix = not found.is_detector
    fit = None
    if cfg is not None:
        fit = coverage(state, model_shapes(cfg), by_suffix=by_suffix)
        _check_backbone(fit, source)
        for key, (have, want) in found.recipe.contradictions(cfg).items():
            notes.append(f"the config has {key} {have}, but these weights need {want}")
    write_weights(output, state, metadata, by_suffix=by_suffix)
    return Conversion(found, str(output), renamed, str(shape), fit, notes)


def _check_backbone(fit: Coverage, source: str) -> None:
    lacking = [key for key in fit.unfilled if in_backbone(key)]
    plain = [key for key in lacking if is_sge_key(key) and key in fit.missing]
    if plain and len(plain) == len(lacking):
        raise UserError(
            f"{source} has no SGE but the model of the config has: convert it with --transplant, or set "
            "MODEL.SGE.ENABLED False"
        )
    if lacking:
        key = lacking[0]
        shapes = "has the shape {} there and {} in the model".format(*fit.misshapen.get(key, ("", "")))
        total = sum(in_backbone(name) for name in (*fit.filled, *fit.unfilled))
        raise UserError(
            f"{source} fills {total - len(lacking)} of the {total} tensors of the model's backbone: {key} "
            f"{shapes if key in fit.misshapen else 'is not in it'}; give the config of a model like it"
        )
