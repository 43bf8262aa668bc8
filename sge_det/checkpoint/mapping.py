"""Names and layouts: from each kind of weights to Detectron2's."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from ..config import STAGES
from ..errors import UserError
from ..layers.attention import SGE, is_sge_key
from .sources import Source

_COUNTER = "a counter that no detector reads"
_MOMENTUM = "the optimizer's momentum"
_CLASSIFIER = "the ImageNet classifier"
_FROM_CONFIG = "follows from the config"

# What has no place in Detectron2, by the end of its name, and why.
_DROPPED = (
    (r"(.*\.)?num_batches_tracked", _COUNTER),
    (r".*\.momentum", _MOMENTUM),
    (r"(stem\.)?(fc|fc1000|linear|pred)\.(weight|bias)", _CLASSIFIER),
    (r"(.*\.)?anchor_generator\.cell_anchors\.\d+|pixel_mean|pixel_std", _FROM_CONFIG),
    (r"stem\.conv1\.bias", "Detectron2's stem has a norm in its place"),
)

# Anchors of each RetinaNet location: aspect ratios times sizes within an octave.
_RATIOS = 3

Transform = Callable[[Tensor], Tensor]


@dataclass
class Renamed:
    """Weights under Detectron2's names, and what became of each of the source's.

    Attributes:
        state: the tensors.
        names: the source's name -> Detectron2's.
        dropped: the source's name -> why it has no place.
        filled: Detectron2's name -> why it has a value that is not the source's.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ResNetShape:
    """What the names and shapes of a state dict tell about its ResNet.

    Attributes:
        prefix: what stands before "stem" and "res2", e.g. "backbone.bottom_up.".
        depth: the number of its layers, 18, 34, 50, 101 or 152 for those that Detectron2 builds.
        last: "conv2" or "conv3", the last convolution of its blocks.
        norm: "BN" (frozen or not) or "GN", or "" where there is none.
        groups: the groups of its SGE layers; empty where it has none.
    """

    prefix: str
    depth: int
    last: str
    norm: str
    groups: frozenset[int]

    def __str__(self) -> str:
        sge = f"SGE-ResNet-{self.depth} ({'/'.join(map(str, sorted(self.groups)))} groups)"
        return f"{sge if self.groups else f'ResNet-{self.depth}'}, {self.norm or 'no norm'}"


def to_detectron2(source: Source) -> Renamed:
    """Renames and rearranges the weights of ``source`` for Detectron2.

    Backbone files get bare names ("stem.conv1.weight"), which Detectron2 matches by suffix; detectors get full ones.

    Raises:
        UserError: an entry that has no place is not known to be dispensable, or a layout is not what it should be.
    """
    state = source.state
    if source.kind == "caffe2":
        state, origins = convert_c2_detectron_names(dict(state))
    else:
        origins = {key: key for key in state}
    rename = _mmdet_rename(source) if source.kind.startswith("mmdet") else _RENAME[source.kind]
    result = Renamed()
    for key, value in state.items():
        reason = next((why for pattern, why in _DROPPED if re.fullmatch(pattern, key)), None)
        target = (None, reason) if reason else rename(key, value)
        if target is None:
            raise UserError(
                f"{source.path} is {source.description}, but {key} has no place in Detectron2: it is another model"
            )
        name, change = target
        if name is None:
            result.dropped[origins[key]] = change
            continue
        result.names[origins[key]] = name
        try:
            changed = change(value) if change else value
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{source.path} is {source.description}, but {key} has the shape {tuple(value.shape)}: it is another "
                "model"
            ) from error
        result.state[name] = _sge_shape(name, changed)
    if _COUNTER in result.dropped.values() and not any(key.endswith("running_mean") for key in result.state):
        raise UserError(
            f"{source.path} has norms' counters, but not their running means and variances: save the whole state_dict, "
            "not its parameters alone"
        )
    if source.kind == "caffe2" and any("_bn_" in key for key in origins.values()):
        _complete_affine_norms(result)
    return result


def _sizes(state: Mapping[str, Tensor], key: str, path: str, rank: int = 1) -> tuple[int, ...]:
    """The first ``rank`` sizes of a tensor that has to be there, none of them 0."""
    if key not in state:
        raise UserError(f"{path} lacks {key}: it is no whole model")
    sizes = tuple(state[key].shape[:rank])
    if len(sizes) < rank or 0 in sizes:
        raise UserError(f"{path}: {key} has the shape {tuple(state[key].shape)}, which is no layer's")
    return sizes


def _complete_affine_norms(result: Renamed) -> None:
    """Gives norms that are a scale and a shift alone the statistics that Detectron2 gives them."""
    for key in [key for key in result.state if re.search(r"(^|\.)(stem|res\d\.\d+)\.\w+\.norm\.weight$", key)]:
        for statistic, value in (("running_mean", 0.0), ("running_var", 1.0)):
            name = key.removesuffix("weight") + statistic
            if name not in result.state:
                result.state[name] = torch.full_like(result.state[key], value)
                result.filled[name] = "the source's norm is a scale and a shift alone"


def _resnet_name(key: str) -> str | None:
    if key == "conv1.weight":
        return "stem.conv1.weight"
    if found := re.fullmatch(r"bn1\.(weight|bias|running_mean|running_var)", key):
        return f"stem.conv1.norm.{found[1]}"
    found = re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", key)
    if found is None:
        return None
    block, rest = f"res{int(found[1]) + 1}.{found[2]}", found[3]
    if part := re.fullmatch(r"conv([1-3])\.weight", rest):
        return f"{block}.conv{part[1]}.weight"
    if part := re.fullmatch(r"bn([1-3])\.(weight|bias|running_mean|running_var)", rest):
        return f"{block}.conv{part[1]}.norm.{part[2]}"
    if rest == "downsample.0.weight":
        return f"{block}.shortcut.weight"
    if part := re.fullmatch(r"downsample\.1\.(weight|bias|running_mean|running_var)", rest):
        return f"{block}.shortcut.norm.{part[1]}"
    if part := re.fullmatch(r"(?:sge|se)\.(weight|bias)", rest):
        return f"{block}.{SGE}.{part[1]}"
    return None


def _rename_resnet(key: str, value: Tensor) -> tuple[str, None] | None:
    name = _resnet_name(key)
    # timm's "d" models pool before a convolution that stands at the norm's place
    if name is None or (".shortcut.norm." in name and value.dim() != 1):
        return None
    return name, None


def _keep(key: str, value: Tensor) -> tuple[str, None]:
    return key, None


_RENAME = {
    "sge-imagenet": _rename_resnet,
    "timm-sge": _rename_resnet,
    "plain-resnet": _rename_resnet,
    "detectron2-backbone": _keep,
    "detectron2-detector": _keep,
    "caffe2": _keep,
}


def _mmdet_rename(source: Source) -> Callable[[str, Tensor], tuple[str, Transform | None] | tuple[None, str] | None]:
    retinanet, cascade = source.kind.endswith("-retinanet"), source.kind.endswith("-cascade")
    # from version 2 on the background is the last class, as in Detectron2, and has neither box nor mask
    is_later = source.kind.startswith("mmdet2-")
    scores_of, boxes_of, masks_of = (
        (None, None, None) if is_later else (_background_last, _without_background_box, _without_background)
    )
    start = "roi_head." if is_later and not retinanet else ""
    first_level = 3 if retinanet else 2
    state = source.state
    anchors = _RATIOS
    if retinanet:
        anchors = _sizes(state, "bbox_head.retina_reg.weight", source.path)[0] // 4
        if anchors < 1 or anchors % _RATIOS:
            raise UserError(f"{source.path} has {anchors} anchors a location, no multiple of {_RATIOS} aspect ratios")
    elif "rpn_head.rpn_cls.weight" in state:
        scores, deltas = (_sizes(state, f"rpn_head.rpn_{name}.weight", source.path)[0] for name in ("cls", "reg"))
        if 4 * scores != deltas:
            raise UserError(f"{source.path} has an RPN of {scores} scores for {deltas // 4} anchors: not a sigmoid's")

    def neck(part: str, level: int, rest: str) -> str | None:
        rest = rest.replace("conv.", "").replace("bn.", "norm.").replace("gn.", "norm.")
        if part == "lateral":
            return f"backbone.fpn_lateral{first_level + level}.{rest}"
        if level < (3 if retinanet else 4):
            return f"backbone.fpn_output{first_level + level}.{rest}"
        # only RetinaNet has convolutions beyond the pyramid
        return f"backbone.top_block.p{level + 3}.{rest}" if retinanet and level < 5 else None

    def box_head(key: str) -> tuple[str, Transform | None] | None:
        found = re.fullmatch(r"bbox_head\.(?:(\d+)\.)?(.+)\.(weight|bias)", key)
        if found is None or (found[1] is not None) != cascade:
            return None
        stage, layer, kind = ("" if found[1] is None else f"{found[1]}."), found[2], found[3]
        if part := re.fullmatch(r"shared_fcs\.(\d+)", layer):
            return f"roi_heads.box_head.{stage}fc{int(part[1]) + 1}.{kind}", None
        if layer == "fc_cls":
            return f"roi_heads.box_predictor.{stage}cls_score.{kind}", scores_of
        if layer == "fc_reg":
            own = f"{start}{key}"
            boxes, scores = (_sizes(state, name, source.path)[0] for name in (own, own.replace("fc_reg", "fc_cls")))
            if boxes not in (4, 4 * (scores - is_later)):
                raise UserError(
                    f"{source.path} is {source.description}, but has {boxes} numbers of boxes for {scores} scores: it "
                    "is another model"
                )
            return f"roi_heads.box_predictor.{stage}bbox_pred.{kind}", None if boxes == 4 else boxes_of
        return None

    def retina_head(key: str) -> tuple[str, Transform | None] | None:
        if part := re.fullmatch(r"bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.(weight|bias)", key):
            subnet = "cls_subnet" if part[1] == "cls" else "bbox_subnet"
            return f"head.{subnet}.{2 * int(part[2])}.{part[3]}", None
        if part := re.fullmatch(r"bbox_head\.retina_(cls|reg)\.(weight|bias)", key):
            name = "cls_score" if part[1] == "cls" else "bbox_pred"
            return f"head.{name}.{part[2]}", lambda value: _scales_first(value, anchors)
        return None

    def mask_head(key: str) -> tuple[str, Transform | None] | tuple[None, str] | None:
        if re.match(r"mask_head\.\d+\.", key):
            return None, "one mask head of each cascade stage, where Detectron2 has one for all"
        if part := re.fullmatch(r"mask_head\.convs\.(\d+)\.conv\.(weight|bias)", key):
            return f"roi_heads.mask_head.mask_fcn{int(part[1]) + 1}.{part[2]}", None
        if part := re.fullmatch(r"mask_head\.upsample\.(weight|bias)", key):
            return f"roi_heads.mask_head.deconv.{part[1]}", None
        if part := re.fullmatch(r"mask_head\.conv_logits\.(weight|bias)", key):
            agnostic = _sizes(state, f"{start}{key}", source.path)[0] == 1
            return f"roi_heads.mask_head.predictor.{part[1]}", None if agnostic else masks_of
        return None

    def rename(key: str, value: Tensor) -> tuple[str, Transform | None] | tuple[None, str] | None:
        if key.startswith("backbone."):
            if re.fullmatch(r"backbone\.fc\.\w+", key):
                return None, _CLASSIFIER
            bare = _rename_resnet(key.removeprefix("backbone."), value)
            return bare and (f"backbone.bottom_up.{bare[0]}", None)
        if part := re.fullmatch(r"neck\.(lateral|fpn)_convs\.(\d+)\.((?:conv|bn|gn)\.\w+)", key):
            name = neck(part[1], int(part[2]), part[3])
            return name and (name, None)
        if part := re.fullmatch(r"rpn_head\.rpn_(conv|cls|reg)\.(weight|bias)", key):
            name = {"conv": "conv", "cls": "objectness_logits", "reg": "anchor_deltas"}[part[1]]
            return f"proposal_generator.rpn_head.{name}.{part[2]}", None
        if not key.startswith(start):
            return None
        key = key.removeprefix(start)
        if key.startswith("bbox_head."):
            return retina_head(key) if retinanet else box_head(key)
        return mask_head(key) if key.startswith("mask_head.") else None

    return rename


def _background_last(rows: Tensor) -> Tensor:
    return torch.cat([rows[1:], rows[:1]])


def _without_background_box(rows: Tensor) -> Tensor:
    return rows[4:]


def _without_background(rows: Tensor) -> Tensor:
    return rows[1:]


def _scales_first(rows: Tensor, anchors: int) -> Tensor:
    """From anchors in the order ratio, scale to scale, ratio; the rows of an anchor stay together."""
    each = rows.unflatten(0, (_RATIOS, anchors // _RATIOS, -1))
    return each.transpose(0, 1).flatten(0, 2)


def _sge_shape(name: str, value: Tensor) -> Tensor:
    """Gives an SGE parameter of shape (G,), (1, G, 1, 1) or (1, 1, 1, G) the shape (1, G, 1, 1)."""
    if not re.search(r"\.sge\.(weight|bias)$", name):
        return value
    if value.dim() not in (1, 4) or value.numel() != max(value.shape, default=0):
        raise UserError(f"{name} has the shape {tuple(value.shape)}: SGE has one number for each group")
    return value.reshape(1, -1, 1, 1)


def resnet_shape(state: dict[str, Tensor], path: str) -> ResNetShape:
    """What ResNet lies in ``state`` (Detectron2's names), after a check that no block of it is missing.

    Args:
        state: tensors or meta tensors.
        path: named in errors.

    Raises:
        UserError: there is none, or only parts of one.
    """
    stem = next((key for key in state if key.endswith("stem.conv1.weight")), None)
    if stem is None:
        raise UserError(f"{path} holds no stem of a ResNet (stem.conv1.weight)")
    prefix = stem.removesuffix("stem.conv1.weight")
    last = 3 if f"{prefix}res2.0.conv3.weight" in state else 2
    norm = {key.rsplit(".", 1)[1] for key in state if key.startswith(f"{prefix}stem.conv1.norm.")}
    norm.discard("num_batches_tracked")
    convolutions, groups = 0, set()
    for stage in STAGES:
        blocks = {
            int(found[1])
            for key in state
            if (found := re.fullmatch(rf"{re.escape(prefix)}{stage}\.(\d+)\.conv1\.weight", key))
        }
        if stage == "res5" and not blocks and any(".res5." in key for key in state):
            convolutions += 3 * last  # a C4 detector has its res5 in the heads
            continue
        if not blocks or blocks != set(range(len(blocks))):
            missing = min(set(range(len(blocks) + 1)) - blocks)
            raise UserError(f"{path} lacks the block {stage}.{missing}: it is no whole ResNet")
        convolutions += len(blocks) * last
        has_sge = any(key.startswith(f"{prefix}{stage}.") and is_sge_key(key) for key in state)
        for block in (f"{prefix}{stage}.{number}" for number in sorted(blocks)):

            def find(name: str, rank: int = 1, block: str = block) -> tuple[int, ...]:
                return _sizes(state, f"{block}.{name}", path, rank)

            convs = [f"conv{number}" for number in range(1, last + 1)]
            channels = find(f"conv{last}.weight", 4)[0]
            if find("conv1.weight", 4)[1] != channels:
                convs.append("shortcut")
            for name in convs:
                find(f"{name}.weight")
                for part in sorted(norm):
                    find(f"{name}.norm.{part}")
            if has_sge:
                weight, bias = (math.prod(find(f"sge.{part}", 4)) for part in ("weight", "bias"))
                if weight != bias:
                    raise UserError(f"{path}: {block}.sge has {weight} weights for {bias} biases")
                if channels % weight:
                    raise UserError(f"{path}: the {weight} groups of {block}.sge do not divide its {channels} channels")
                groups.add(weight)
    kind = "BN" if "running_mean" in norm else "GN" if norm else ""
    return ResNetShape(prefix, convolutions + 2, f"conv{last}", kind, frozenset(groups))
