"""SGE in models that somebody else has built: in place, at the end of each residual branch."""

import copy
import fnmatch
import math
import sys
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ..errors import UserError
from ..layers.attention import SGE as SGE_NAME
from ..layers.sge import SpatialGroupEnhance
from .blocks import exchange_blocks, is_exchangeable, sge_attention
from .hooks import Hook


@dataclass(frozen=True)
class Insertion:
    """One SGE layer that :func:`insert_sge` has put in.

    Attributes:
        layer: the layer's name in the model, and so in its state dict.
        after: the module whose output it gates.
        channels: how many channels that output has.
    """

    layer: str
    after: str
    channels: int


class _Hook(Hook):
    instead = (
        "SGE that insert_sge has put in stands behind a hook, which cannot be scripted: trace the model "
        "(torch.jit.trace), export it (torch.export.export), or script its graph, "
        "torch.jit.script(torch.fx.symbolic_trace(model))"
    )


class _Gate(_Hook):
    """A forward hook that passes a module's output on through an SGE layer; copies and pickles with the model."""

    def __init__(self, layer: SpatialGroupEnhance):
        self.layer = layer

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return self.layer(output)


class _Keeper(_Hook):
    """A hook before a block's forward that sees to it that the block's gate is computed, and once.

    Where a conversion has replaced the norm that had the gate, it is put back. ``torch.fx`` does not see the hooks of
    the modules that are its leaves: there the layer is called, so that the graph has it with its parameters.

    Args:
        target: the name in the block of the module whose output is gated.
    """

    def __init__(self, target: str):
        self.target = target
        self.in_graph = False

    def __call__(self, block: nn.Module, inputs: tuple) -> None:
        proxies = [value for value in inputs if isinstance(value, fx.Proxy)]
        if not proxies:
            self._keep(block)
        elif not isinstance(proxies[0].tracer, _Tracer):
            self._show(block)

    def _keep(self, block: nn.Module) -> None:
        target = block.get_submodule(self.target)
        if _is_gated(target) or _gated_module(block):
            return
        if self.in_graph:
            # the graph, which has the layer as a node, has this norm too: the block goes on with a norm of the same
            # parameters
            target = copy.copy(target)
            target._forward_hooks = target._forward_hooks.copy()
            holder, name = _holder(block, self.target)
            holder[name] = target
        target.register_forward_hook(_Gate(getattr(block, SGE_NAME)))

    def _show(self, block: nn.Module) -> None:
        self.target = _gated_module(block) or self.target
        self.in_graph = True
        target, layer = block.get_submodule(self.target), getattr(block, SGE_NAME)
        for key in [key for key, hook in target._forward_hooks.items() if isinstance(hook, _Gate)]:
            del target._forward_hooks[key]
        holder, name = _holder(block, self.target)
        holder[name] = lambda x: layer(target(x))

        def end(*_) -> None:
            holder[name] = target
            handle.remove()

        handle = block.register_forward_hook(end, always_call=True)


def _holder(block: nn.Module, target: str) -> tuple[dict[str, nn.Module], str]:
    """What holds the module ``target`` of ``block``, and its name there."""
    parent, _, name = target.rpartition(".")
    return block.get_submodule(parent)._modules, name


def _is_gated(module: nn.Module) -> bool:
    return any(isinstance(hook, _Gate) for hook in module._forward_hooks.values())


def _gated_module(block: nn.Module) -> str | None:
    """The name of the module of ``block`` that has the block's gate: fusing a norm into its convolution moves hooks."""
    layer = getattr(block, SGE_NAME)
    for name, module in block.named_modules():
        if any(isinstance(hook, _Gate) and hook.layer is layer for hook in module._forward_hooks.values()):
            return name
    return None


def insert_sge(
    model: nn.Module,
    groups: int = 64,
    stages: str | Collection[str] | None = None,
    where: str | Collection[str] | None = None,
    *,
    transplant: bool = False,
) -> list[Insertion]:
    """Puts SGE behind the last norm of each residual branch of ``model``, in place.

    Blocks are found by what they compute: a module that adds the output of a norm to something else (Detectron2's
    ResNets and RegNets, torchvision's and timm's ResNets, other blocks that ``torch.fx`` can trace). A layer is called
    "sge" in its block, or stands in the place that timm's blocks have for it. Parameters that were there keep their
    names, so that weights load before or afterwards. A block that has SGE is left as it is. A conversion of norms
    (``convert_sync_batchnorm``) before or afterwards changes nothing in this.

    Args:
        model: any model with residual blocks.
        groups: channel groups of each layer.
        stages: names of modules, for instance ("layer3", "layer4"): blocks elsewhere are left as they are.
        where: patterns of the names of the modules behind which SGE is to stand ("*.bn3"), for models whose blocks are
            not found; nothing is looked for then.
        transplant: scale the norm before each new layer so that the model computes what it did (in evaluation and
            training alike). Only for a model whose weights have been loaded.

    Returns:
        what was put in; empty where all is there already.

    Raises:
        UserError: there is no such block, the groups do not divide a block's channels, a timm block has another
            attention, or a norm has no scale and shift to transplant into. The model is unchanged then.
    """
    if type(groups) is not int:
        raise UserError(f"groups must be a whole number; got {groups!r:.100}")
    stages = [stages] if isinstance(stages, str) else stages
    places = _named(model, where) if where is not None else _found(model)
    places = [place for place in places if stages is None or set(place.after.split(".")) & set(stages)]
    if not places:
        what = f"module that matches {where!r}" if where is not None else "residual block whose branch ends in a norm"
        raise UserError(
            f"{type(model).__name__} has no {what}{f' in {sorted(stages)}' if stages is not None else ''}: name the "
            'modules behind which SGE is to stand, for instance insert_sge(model, where="*.bn3")'
        )
    new = [place for place in places if not place.has_sge]
    twice = [place for place in new if sum(place.block is other.block for other in new) > 1]
    if twice:
        raise UserError(
            f"{twice[0].after} and {twice[1].after} are in one block, which takes one SGE: narrow where={where!r}"
        )
    shared = [place for place in new if sum(place.target is other.target for other in places) > 1]
    if shared:
        raise UserError(
            f"{shared[0].after} is in several blocks, whose gates would all stand behind it: give each block its own"
        )
    for place in new:
        if groups < 1 or place.channels % groups:
            raise UserError(f"{groups} groups do not divide the {place.channels} channels of {place.after}")
        if place.is_timm and place.block.se is not None:
            raise UserError(
                f"{place.name} has {type(place.block.se).__name__} in the place of SGE: leave its stage out"
            )
        if transplant and (place.norm is None or getattr(place.norm, "bias", None) is None):
            raise UserError(
                f"{place.after} has no norm with a scale and a shift that could take the transplant's factor"
            )
    for place in places:
        if place.has_sge and place.is_lost:
            place.hook()
    return [_insert(model, place, groups, transplant) for place in new]


def with_sge(model: nn.Module, **kwargs) -> nn.Module:
    """``model``, after :func:`insert_sge` with ``kwargs``; for lazy configs, around a backbone that others build."""
    insert_sge(model, **kwargs)
    return model


@dataclass
class _Place:
    """Where a layer belongs: its block, and the module in it whose output it gates."""

    name: str
    block: nn.Module
    after: str
    target: nn.Module

    @property
    def norm(self) -> nn.Module | None:
        """What scales and shifts each channel just before the layer."""
        return getattr(self.target, "norm", None) if isinstance(self.target, nn.Conv2d) else self.target

    @property
    def channels(self) -> int:
        return _channels(self.target)

    @property
    def is_timm(self) -> bool:
        return "se" in dir(self.block) and type(self.block).__module__.startswith("timm.models.resnet")

    @property
    def has_sge(self) -> bool:
        names = ("se", SGE_NAME) if self.is_timm else (SGE_NAME,)
        return any(isinstance(getattr(self.block, name, None), SpatialGroupEnhance) for name in names)

    @property
    def is_lost(self) -> bool:
        return not (self.is_kept or _is_gated(self.target) or self.is_timm or hasattr(self.block, "attention_name"))

    @property
    def is_kept(self) -> bool:
        return any(isinstance(hook, _Keeper) for hook in self.block._forward_pre_hooks.values())

    def hook(self) -> None:
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # what was compiled before does not look for new hooks
        self.target.register_forward_hook(_Gate(getattr(self.block, SGE_NAME)))
        if not self.is_kept:
            target = self.after.removeprefix(f"{self.name}.") if self.name else self.after
            self.block.register_forward_pre_hook(_Keeper(target))


def _channels(module: nn.Module) -> int:
    for name in ("num_features", "num_channels", "out_channels"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    if isinstance(getattr(module, "weight", None), Tensor):
        return module.weight.shape[0]
    raise UserError(f"{type(module).__name__} does not say how many channels it has: no SGE can stand behind it")


def _insert(model: nn.Module, place: _Place, groups: int, transplant: bool) -> Insertion:
    layer = SGE_NAME
    like = next(place.target.parameters(), None)
    if like is None:
        like = next(place.target.buffers(), torch.zeros(()))
    norm = place.norm
    if is_exchangeable(place.block) and place.name and place.target is _last(place.block):
        holder = nn.Sequential(place.block)
        exchange_blocks(holder, sge_attention(groups))
        parent, _, child = place.name.rpartition(".")
        setattr(model.get_submodule(parent), child, holder[0])
        place.block = holder[0]
    elif place.is_timm:
        layer = "se"
        place.block.se = SpatialGroupEnhance(groups)
    else:
        place.block.add_module(SGE_NAME, SpatialGroupEnhance(groups))
        place.hook()
    getattr(place.block, layer).to(device=like.device, dtype=like.dtype)
    getattr(place.block, layer).train(place.block.training)
    if transplant:
        with torch.no_grad():
            # 1 / sigmoid(beta) at the start values, gamma 0 and beta 1
            for tensor in (norm.weight, norm.bias):
                tensor.mul_(1 + math.exp(-1.0))
    return Insertion(f"{place.name}.{layer}".lstrip("."), place.after, place.channels)


def _last(block: nn.Module) -> nn.Module:
    return block.conv3 if hasattr(block, "conv3") else block.conv2


def _named(model: nn.Module, where: str | Collection[str]) -> list[_Place]:
    patterns = [where] if isinstance(where, str) else list(where)
    places = []
    for name, module in model.named_modules():
        if name and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parent = name.rpartition(".")[0]
            places.append(_Place(parent, model.get_submodule(parent), name, module))
    return places


def _found(model: nn.Module) -> list[_Place]:
    ends = {name: _end_of_branch(module) for name, module in model.named_modules()}
    found = {name: target for name, target in ends.items() if target is not None}
    # what holds a single block computes the same as the block, which is meant
    innermost = [name for name in found if not any(other != name and _is_inside(other, name) for other in found)]
    return [
        _Place(name, block, f"{name}.{found[name]}".lstrip("."), block.get_submodule(found[name]))
        for name in innermost
        for block in [model.get_submodule(name)]
    ]


def _is_inside(name: str, other: str) -> bool:
    return not other or name.startswith(f"{other}.")


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return not _holds_norm(module) or _is_norm(module) or isinstance(module, nn.Conv2d)


def _is_norm(module: nn.Module) -> bool:
    """Whether it is a norm of maps (N, C, H, W); ``nn.LayerNorm`` has the channels last."""
    if type(module) is nn.LayerNorm or type(module).__name__ == "LayerNorm":
        return False
    # timm's norms hold their activation, which is none at the end of a branch
    is_alone = all(type(child) is nn.Identity for child in module.children())
    return "Norm" in type(module).__name__ and is_alone


def _holds_norm(module: nn.Module) -> bool:
    return any(_is_norm(part) for part in module.modules())


def _end_of_branch(module: nn.Module) -> str | None:
    """The name in ``module`` of the last norm of its residual branch; None where it is no residual block itself."""
    if hasattr(module, "attention_name") or is_exchangeable(module):
        return "conv3" if hasattr(module, "conv3") else "conv2"
    if not _holds_norm(module) or isinstance(module, nn.Conv2d | nn.Sequential) or _is_norm(module):
        return None
    try:
        graph = _Tracer().trace(module)
    except Exception:  # what cannot be traced is no block, but may hold some
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sums = [node for node in graph.nodes if _is_sum(node)]
    if len(inputs) != 1 or len(sums) != 1:
        return None
    first, second = (_source(module, argument) for argument in sums[0].args[:2])
    # the shortcut is the input itself or comes from it by fewer modules; the branch is the longer of the two
    ends = sorted((first, second), key=lambda end: end[1])
    (_, short), (name, long) = ends
    return name if name is not None and long > short else None


def _is_sum(node: fx.Node) -> bool:
    names = {"add", "iadd", "add_"}
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    tensors = [argument for argument in node.args if isinstance(argument, fx.Node)]
    return node.op in ("call_function", "call_method") and target in names and len(tensors) == 2


def _source(module: nn.Module, node: fx.Node) -> tuple[str | None, int]:
    """The module with a norm that gives ``node`` (past what neither convolves nor normalizes), and the modules on the
    way from the input to it."""
    name, count = None, 0
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if node.op == "call_module":
            part = module.get_submodule(node.target)
            is_end = _is_norm(part) or (isinstance(part, nn.Conv2d) and getattr(part, "norm", None) is not None)
            if name is None and is_end:
                name = node.target
            if is_end or any(isinstance(inner, nn.Conv2d) for inner in part.modules()):
                count += 1
        node = next(iter(node.all_input_nodes), None)
    return name, count
