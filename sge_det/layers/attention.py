"""The kinds of attention that can stand at the end of a residual block: one table, SGE first, its rivals after it."""

import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .sge import SpatialGroupEnhance

SGE = "sge"
# The submodule of a block that holds an attention without a name of its own there.
_UNNAMED = "attention"
# Height and width of the map on which a class of the user's own is tried: not square, divisible by nothing.
_TRIAL = (7, 5)


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention.

    Attributes:
        name: as ``MODEL.SGE.ATTENTION`` names it.
        build: makes the module, which maps (N, C, H, W) to the same shape, for C channels and a number of groups, of
            which SGE alone makes use. Raises ImportError where the package that it comes from is missing.
        key: the submodule's name in the block and so in state dicts.
        parameters: the names of its parameters, where they are known.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    key: str = _UNNAMED
    parameters: tuple[str, ...] = ()


def _build_timm(kind: str, channels: int, groups: int) -> nn.Module:
    import timm
    from timm.layers import create_attn

    try:
        return create_attn(kind, channels)
    except AssertionError as error:
        raise ValueError(f"{kind} is unknown to timm {timm.__version__}: pip install -U timm") from error


# What timm calls lightweight attention, each with its own defaults: it gates what goes through a block.
_TIMM = ["se", "ese", "eca", "ecam", "ceca", "gc", "gca", "cbam", "lcbam", "coord", "scoord", "ela", "strip"]
_NAMED = (SGE, "se", "eca", "cbam")
ATTENTIONS = {
    kind.name: kind
    for kind in (
        AttentionKind(SGE, lambda channels, groups: SpatialGroupEnhance(groups), SGE, ("weight", "bias")),
        *(
            AttentionKind(name, functools.partial(_build_timm, name), name if name in _NAMED else _UNNAMED)
            for name in _TIMM
        ),
    )
}
KEYS = frozenset(kind.key for kind in ATTENTIONS.values())

_REPLACES = "stands in the place of a convolution, not behind one"
_UNFIT = {
    "ge": "cannot be built by timm's create_attn for a number of channels",
    "sk": _REPLACES,
    "splat": _REPLACES,
    "lambda": _REPLACES,
    "bottleneck": f"{_REPLACES}, and is made for maps of one size",
    "halo": f"{_REPLACES}, and takes maps alone whose sides are multiples of its window's",
    "nl": "compares all positions of a map with each other, which is more memory than there is for detectors' maps",
    "bat": "takes maps alone whose sides are multiples of its blocks'",
}


def attention_kind(name: str) -> AttentionKind:
    """The kind that ``MODEL.SGE.ATTENTION`` names: of the table, or a class of the user's own.

    Args:
        name: a key of :data:`ATTENTIONS`, or "package.module:Class", which is imported when it is built.

    Raises:
        ValueError: it is neither; says why as a sentence that begins with the name.
    """
    if name in ATTENTIONS:
        return ATTENTIONS[name]
    if is_own_class(name):
        return AttentionKind(name, functools.partial(_build_own, name))
    if name in _UNFIT:
        raise ValueError(f"{name!r} is an attention of timm's that {_UNFIT[name]}: take one of {', '.join(ATTENTIONS)}")
    raise ValueError(f"{name!r:.100} is not one of {', '.join(ATTENTIONS)}, nor a class as package.module:Class")


def is_own_class(name: str) -> bool:
    """Whether ``name`` has the form of a class of the user's own, "package.module:Class"."""
    dotted = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
    return isinstance(name, str) and bool(re.fullmatch(f"{dotted}:{dotted}", name))


def is_sge_key(key: str) -> bool:
    """Whether a tensor of a state dict is a parameter of an SGE layer of ours, by its name."""
    return f".{SGE}." in f".{key}"


def build_rival(kind: str, channels: int) -> nn.Module:
    """The attention ``kind`` for a number of channels, with its own defaults.

    Raises:
        ImportError: the package that it comes from is missing.
        ValueError: there is no such kind, or the user's own class does not fit; begins with the name.
    """
    return attention_kind(kind).build(channels, 1)


def _build_own(name: str, channels: int, groups: int) -> nn.Module:
    build = _own_class(name)
    try:
        layer = build(channels)
    except Exception as error:  # of a class that is not ours
        raise ValueError(
            f"{name} cannot be made for {channels} channels ({_told(error)}): its constructor is called with that "
            "number and nothing else"
        ) from error
    _try(name, layer, channels)
    return layer


def _own_class(name: str) -> Callable[[int], nn.Module]:
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module fails in any way
        raise ValueError(
            f"{name} cannot be imported ({_told(error)}): its folder must be in PYTHONPATH, or the package installed"
        ) from error
    try:
        found = functools.reduce(getattr, path.split("."), found)
    except AttributeError as error:
        raise ValueError(f"{name} cannot be imported: the module {module} has no {path}") from error
    # no other is called: a config is data, and a name in it starts no program
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        what = "another class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ValueError(f"{name} is no class of torch.nn.Module, but {what}")
    return found


def _try(name: str, layer: nn.Module, channels: int) -> None:
    """Passes zeros through ``layer``; a wrong shape would end a training with torch's words for it."""
    like = next(layer.parameters(), torch.zeros(()))
    x = torch.zeros(2, channels, *_TRIAL, device=like.device, dtype=like.dtype)
    was_training = layer.training
    try:
        with torch.no_grad():
            out = layer.eval()(x)
    except Exception as error:
        raise ValueError(f"{name} fails on a map of the shape {tuple(x.shape)}: {_told(error)}") from error
    finally:
        layer.train(was_training)
    if not isinstance(out, Tensor) or out.shape != x.shape:
        made = tuple(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise ValueError(f"{name} makes {made} of a map of the shape {tuple(x.shape)}: it must keep the shape")


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
