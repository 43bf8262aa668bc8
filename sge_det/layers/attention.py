"""The kinds of attention that can stand at the end of a residual block: one table, SGE first, its rivals after it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .sge import SpatialGroupEnhance


def _timm(kind: str) -> Callable[[int, int], nn.Module]:
    def build(channels: int, groups: int) -> nn.Module:
        from timm.layers import create_attn

        return create_attn(kind, channels)

    return build


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention.

    Attributes:
        name: as ``MODEL.SGE.ATTENTION`` names it, and the submodule's name in the block and so in state dicts.
        build: makes the module, which maps (N, C, H, W) to the same shape, for C channels and a number of groups, of
            which SGE alone makes use. Raises ImportError where the package that it comes from is missing.
        parameters: the names of its parameters, where they are known.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    parameters: tuple[str, ...] = ()


SGE = "sge"
ATTENTIONS = {
    kind.name: kind
    for kind in (
        AttentionKind(SGE, lambda channels, groups: SpatialGroupEnhance(groups), ("weight", "bias")),
        *(AttentionKind(name, _timm(name)) for name in ("se", "eca", "cbam")),
    )
}


def is_sge_key(key: str) -> bool:
    """Whether a tensor of a state dict is a parameter of an SGE layer of ours, by its name."""
    return f".{SGE}." in f".{key}"


def build_rival(kind: str, channels: int) -> nn.Module:
    """The attention ``kind`` for a number of channels, with its own defaults.

    Raises:
        ImportError: the package that it comes from is missing.
    """
    return ATTENTIONS[kind].build(channels, 1)
