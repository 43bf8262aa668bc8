"""What a weights file is: its kind, told by its keys, and what its images must look like."""

import functools
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..errors import UserError
from ..layers.attention import is_sge_key
from .checksums import sha256
from .safe_load import check_address, load_checkpoint, what_is

# What the keys tell, and how it is said.
KINDS = {
    "sge-imagenet": "an SGE-ResNet of the release, trained on ImageNet",
    "timm-sge": "a timm ResNet with SGE built in",
    "plain-resnet": "a plain ResNet of torchvision or timm",
    "detectron2-backbone": "a Detectron2 backbone",
    "detectron2-detector": "a Detectron2 detector",
    "caffe2": "Caffe2 weights as Detectron2 reads them",
    "mmdet-faster": "the release's Faster R-CNN (mmdetection)",
    "mmdet-mask": "the release's Mask R-CNN (mmdetection)",
    "mmdet-cascade": "the release's Cascade R-CNN (mmdetection)",
    "mmdet-retinanet": "the release's RetinaNet (mmdetection)",
    "mmdet2-faster": "a Faster R-CNN of mmdetection 2 or 3",
    "mmdet2-mask": "a Mask R-CNN of mmdetection 2 or 3",
    "mmdet2-cascade": "a Cascade R-CNN of mmdetection 2 or 3",
    "mmdet2-retinanet": "a RetinaNet of mmdetection 2 or 3",
    "": "something else",
}


@dataclass(frozen=True)
class Recipe:
    """What weights expect of images and model; None where it is not known.

    Attributes:
        channel_order: "RGB" or "BGR".
        pixel_mean, pixel_std: three numbers of images in 0-255, in ``channel_order``.
        stride_in_1x1: a bottleneck's stride is in its first 1x1 convolution, not in its 3x3.
        heads: the config keys of ``HEADS`` that the heads of a detector were trained with, with their values.
    """

    channel_order: str | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    stride_in_1x1: bool | None = None
    heads: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_config(cls, cfg: CfgNode) -> "Recipe":
        """What a model trained with ``cfg`` expects."""
        return cls(
            cfg.INPUT.FORMAT,
            tuple(map(float, cfg.MODEL.PIXEL_MEAN)),
            tuple(map(float, cfg.MODEL.PIXEL_STD)),
            bool(cfg.MODEL.RESNETS.STRIDE_IN_1X1),
        )

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, Any]) -> "Recipe":
        """What the metadata of a file says; unknown where it says nothing."""
        values = {name: metadata.get(name) for name in cls.__dataclass_fields__ if name != "heads"}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**values, heads=dict(metadata.get("heads") or {}))

    def overrides(self) -> dict[str, Any]:
        """The config keys that hold what is known, with their values."""
        keys = {
            "INPUT.FORMAT": self.channel_order,
            "MODEL.PIXEL_MEAN": self.pixel_mean and list(self.pixel_mean),
            "MODEL.PIXEL_STD": self.pixel_std and list(self.pixel_std),
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
        }
        return {key: value for key, value in keys.items() if value is not None} | self.heads

    @property
    def is_whole(self) -> bool:
        """Whether all that images must look like is known."""
        return None not in (self.channel_order, self.pixel_mean, self.pixel_std, self.stride_in_1x1)

    def contradictions(self, cfg: CfgNode) -> dict[str, tuple[Any, Any]]:
        """The config keys that contradict what is known: key -> (value in ``cfg``, value it should have)."""
        have = Recipe.of_config(cfg).overrides()
        if cfg.MODEL.RESNETS.DEPTH < 50:
            have.pop("MODEL.RESNETS.STRIDE_IN_1X1", None)  # basic blocks have no 1x1 convolution
        for key in self.heads:
            have[key] = functools.reduce(lambda node, name: node[name], key.split("."), cfg)
        return self.contradictions_of(have)

    def contradictions_of(self, have: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """:meth:`contradictions` of the values in ``have``, by the keys of :meth:`overrides`; others are not known."""
        found = {}
        for key, value in self.overrides().items():
            if key not in have:
                continue
            near = have[key] == value
            if isinstance(value, list):
                near = all(abs(a - b) < 0.5 for a, b in zip(have[key], value, strict=True))
            if not near:
                found[key] = (have[key], value)
        return found

    def metadata(self) -> dict[str, Any]:
        """As :meth:`of_metadata` reads it."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        if not values["heads"]:
            del values["heads"]
        return values


_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
IMAGENET = Recipe("RGB", _MEAN, _STD, False)
MSRA = Recipe("BGR", _MEAN[::-1], (1.0, 1.0, 1.0), True)

# What training scripts put around their weights, and around the averages of them over the last steps.
_RAW = ("state_dict", "model_state_dict", "model", "net", "student")
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher")
_PAIRS = (
    *(("student.", "teacher."), ("model.", "ema."), ("model.", "model_ema."), ("model.", "ema_model.")),
    ("online_model.", "ema_model."),
)
_FIRST_BLOCK = "layer1.0.conv1.weight"
_OF_RESNET = re.compile(r"(conv1|bn1|layer[1-4])\.|fc\.(weight|bias)$")
# MoCo has its network twice; this one is trained.
_QUERY = "encoder_q."
# What stands beside the backbones of detectors of mmdetection.
_DETECTOR_HEADS = {"neck", "bbox_head", "rpn_head", "roi_head", "mask_head", "query_head", "panoptic_head"}
# Of other dicts with tensors, which are looked for below names that nobody knows.
_MOST_PLACES, _DEEPEST_PLACE = 20, 6
_PREFIXES = ("module.", "model.", "net.", "ema_model.")

# Where the heads look, and the values that are in use: what Detectron2's own files say nothing of, and a detector of
# another toolbox loses accuracy by without a word.
HEADS = {
    "MODEL.ANCHOR_GENERATOR.OFFSET": (0.0, 0.5),
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (0, 2),
    "MODEL.ROI_MASK_HEAD.POOLER_TYPE": ("ROIAlign", "ROIAlignV2"),
    "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": (0, 2),
}

# Of mmdetection's config, in characters; it is searched for a few words.
_LONGEST_CONFIG = 100_000

# Detectron2's own ImageNet files, by their place on its server.
_KNOWN_FILES = {
    r"torchvision/R-\d+\.pkl": IMAGENET,
    r"MSRA/R-\d+(\.pkl)?": MSRA,
    r"(R|FAIR/R)-\d+-GN(\.pkl)?": replace(MSRA, stride_in_1x1=False),
    r"X-101-32x8d(\.pkl)?": replace(MSRA, pixel_std=_STD[::-1], stride_in_1x1=False),
}


def known_recipe(path: str) -> Recipe | None:
    """The recipe of a file that Detectron2 publishes, told by its name or URL; None for any other."""
    for pattern, recipe in _KNOWN_FILES.items():
        if re.search(rf"(^|/){pattern}$", path):
            return recipe
    # names of the model zoo end in a part of their checksum
    name = path.rsplit("/", 1)[-1]
    if not re.fullmatch(r"model_final_\w{6,}\.pkl", name):
        return None
    # imported late: it warns of pkg_resources
    from detectron2 import model_zoo
    from detectron2.model_zoo.model_zoo import _ModelZooUrls

    for config, suffix in _ModelZooUrls.CONFIG_PATH_TO_URL_SUFFIX.items():
        if suffix.endswith(f"/{name}"):
            return Recipe.of_config(model_zoo.get_config(f"{config}.yaml"))
    return None


@dataclass(frozen=True)
class Source:
    """A weights file that was read and recognised.

    Attributes:
        path: the file on this disk.
        kind: a key of ``KINDS``.
        state: its tensors under its own names, less a "module." before all of them.
        recipe: what is known of the images it was trained on.
        by_suffix: Detectron2 matches its names by their ends.
        transplanted: it came out of a transplant.
        taken: which of its weights these are, in a sentence, where it holds averaged ones too.
    """

    path: str
    kind: str
    state: dict[str, Tensor]
    recipe: Recipe
    by_suffix: bool = False
    transplanted: bool = False
    taken: str = ""

    @property
    def description(self) -> str:
        """A few words, for instance "a plain ResNet of torchvision or timm"."""
        return KINDS[self.kind]

    @property
    def is_detector(self) -> bool:
        """It holds more than a backbone."""
        return self.kind == "detectron2-detector" or self.kind.startswith("mmdet")

    def metadata(self) -> dict[str, Any]:
        """What a converted file says of where it came from."""
        file = {"file": Path(self.path).name, "sha256": sha256(self.path)}
        return {"source": self.kind, **file, **self.recipe.metadata()}


def read_source(path: str, *, strict: bool = True, weights_of: str | None = None) -> Source:
    """Reads a weights file of any kind in ``KINDS``.

    Args:
        path: a file, or a URL that Detectron2 can fetch ("detectron2://...").
        strict: refuse what is of no known kind; its kind is "" otherwise.
        weights_of: "raw" or "ema" (averaged); None takes the averaged ones where there are any, which are the ones
            that training scripts evaluate.

    Raises:
        UserError: it cannot be read, would run code, or is of no known kind.
    """
    check_address(path)
    part = re.search(r"-\d{5}-of-(\d{5})\.\w+$", path)
    if part and int(part[1]) > 1:
        raise UserError(
            f"{path} is one of {int(part[1])} files that hold the weights together: save one dict of all their tensors "
            "with torch.save, and name that"
        )
    try:
        local = PathManager.get_local_path(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be fetched: {error}") from error
    checkpoint = load_checkpoint(local)
    _check_metadata(checkpoint, path)
    chosen, taken = _unwrap(checkpoint, path, weights_of)
    state = as_tensors(chosen, path)
    try:
        kind, state, left = _identify_part(state, path)
        kind = _mmdet_kind(kind, checkpoint)
        if left:
            told = f"took the ResNet alone, and left out {len(left)} tensors ({left[0]:.60}, ...)"
            taken = "; ".join(filter(None, (taken, told)))
    except UserError:
        if strict:
            raise
        kind = ""
    return Source(
        local,
        kind,
        state,
        known_recipe(path) or _recipe(kind, checkpoint, state),
        bool(checkpoint.get("matching_heuristics")),
        bool(_metadata(checkpoint).get("transplanted")),
        taken,
    )


def _identify_part(state: dict[str, Tensor], path: str) -> tuple[str, dict[str, Tensor], list[str]]:
    """:func:`identify`, also of a ResNet below one prefix, beside heads, a criterion or metrics of any kind.

    Returns:
        the kind, the tensors that are of it, and the names of the others.
    """
    try:
        return identify(state, path), state, []
    except UserError:
        places = [key.removesuffix(_FIRST_BLOCK) for key in state if key.endswith(_FIRST_BLOCK)]
        places = [prefix for prefix in places if prefix and f"{prefix}conv1.weight" in state]
        heads = {key.split(".")[0] for key in state}
        if len(places) != 1 and _QUERY in places:
            places = [_QUERY]
        if len(places) != 1 or heads & _DETECTOR_HEADS:
            raise
        start = len(places[0])
        own = {key for key in state if key.startswith(places[0]) and _OF_RESNET.match(key[start:])}
        part = {key[start:]: value for key, value in state.items() if key in own}
        return identify(part, path), part, [key for key in state if key not in own]


def _metadata(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """What we wrote into a file, or nothing: others have a "metadata" too."""
    metadata = checkpoint.get("metadata")
    return metadata if isinstance(metadata, Mapping) and "channel_order" in metadata else {}


def _check_metadata(checkpoint: Mapping[str, Any], path: str) -> None:
    """Raises a UserError where a file says of its images what nobody can set in a config."""
    metadata = _metadata(checkpoint)
    wanted = {
        "channel_order": (lambda value: value in ("RGB", "BGR"), "RGB or BGR"),
        "pixel_mean": (_are_three_numbers, "three numbers"),
        "pixel_std": (lambda value: _are_three_numbers(value) and all(value), "three numbers other than 0"),
        "stride_in_1x1": (lambda value: isinstance(value, bool), "true or false"),
        "transplanted": (lambda value: isinstance(value, bool), "true or false"),
        "heads": (_are_of_heads, f"a table of {', '.join(HEADS)}"),
    }
    for name, (holds, what) in wanted.items():
        value = metadata.get(name)
        if value is not None and not (isinstance(value, str | bool | list | tuple | dict) and holds(value)):
            raise UserError(f"{path}: its metadata has no {name} that can be used: {what} must stand there")


def _are_of_heads(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key in HEADS and type(own) in (int, float, str) and own in HEADS[key] for key, own in value.items()
    )


def _are_three_numbers(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 3
    return numbers and all(type(number) in (int, float) and abs(number) < 1e6 for number in value)


def _mmdet_kind(kind: str, checkpoint: Mapping[str, Any]) -> str:
    """RetinaNet's names are the same in all versions of mmdetection, its anchors are not: the metadata tell."""
    return kind.replace("mmdet-", "mmdet2-") if _mmdet_version(checkpoint) >= 2 else kind


def _mmdet_version(checkpoint: Mapping[str, Any]) -> int:
    """The first number of the version of mmdetection that wrote a file, 0 where it does not say."""
    meta = checkpoint["model"].get("meta")
    if not isinstance(meta, Mapping):
        return 0
    version = meta.get("mmdet_version")
    found = re.match(r"(\d{1,3})\.", version) if isinstance(version, str) else None
    return int(found[1]) if found else 3 if "mmengine_version" in meta else 0


def _unwrap(checkpoint: dict[str, Any], path: str, weights_of: str | None) -> tuple[Mapping[str, Any], str]:
    """The weights that are asked for, and which they are, in words, where there are averaged ones."""
    inner = _only_weights(checkpoint["model"], path)
    raw = next(((name, inner[name]) for name in _RAW if isinstance(inner.get(name), Mapping)), ("model", inner))[1]
    raw = _without_shell(raw)
    averaged = next(
        (
            (name, _without_shell(place[name]))
            for place in (inner, checkpoint)
            for name in _AVERAGED
            if isinstance(place.get(name), Mapping)
        ),
        None,
    )
    if averaged is None:
        raw, averaged = _split_averaged(raw)
    if averaged is None:
        if weights_of == "ema":
            raise UserError(f"{path} holds no averaged weights: leave --weights-of ema out")
        return raw, ""
    if weights_of == "raw":
        return raw, f"took the raw weights, not the averaged ones ({averaged[0]})"
    return averaged[1], f"took the averaged weights ({averaged[0]}); --weights-of raw takes the others"


def _only_weights(content: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The one dict of tensors below ``content`` where it has none by a known name, and no tensors of its own."""
    if any(isinstance(content.get(name), Mapping) for name in (*_RAW, *_AVERAGED)) or _holds_tensors(content):
        return content
    found: dict[str, Mapping[str, Any]] = {}
    steps: list[tuple[str, Any]] = [("", content)]
    while steps and len(found) < _MOST_PLACES:
        place, node = steps.pop(0)
        for name, value in node.items():
            if isinstance(value, Mapping) and isinstance(name, str):
                inner = f"{place}.{name}" if place else name
                if _holds_tensors(value):
                    found[inner] = value
                elif inner.count(".") < _DEEPEST_PLACE:
                    steps.append((inner, value))
    if len(found) > 1:
        raise UserError(
            f"{path} holds the tensors of {', '.join(found)[:200]}: save those of the network alone, under 'model'"
        )
    return next(iter(found.values()), content)


def _holds_tensors(content: Mapping[str, Any]) -> bool:
    return any(isinstance(value, Tensor | np.ndarray) and value.ndim for value in content.values())


def _without_shell(state: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(
        (state[name] for name in ("state_dict", "module", "model") if isinstance(state.get(name), Mapping)), state
    )


def _split_averaged(state: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, Mapping[str, Any]] | None]:
    """Raw and averaged weights that stand side by side in one dict, told by what is before their names."""
    for raw, averaged in _PAIRS:
        parts = {p: {k.removeprefix(p): v for k, v in state.items() if str(k).startswith(p)} for p in (raw, averaged)}
        others = [value for key, value in state.items() if not str(key).startswith((raw, averaged))]
        # counters of steps may stand beside them
        if parts[averaged] and not any(getattr(value, "ndim", 0) for value in others):
            return parts[raw] or parts[averaged], (averaged, parts[averaged])
    # mmcv writes no dots into the names of buffers
    names = {key: (f"ema_{key}", f"ema_{str(key).replace('.', '_')}") for key in state}
    found = {key: name for key, both in names.items() for name in both if name in state}
    own = {key: value for key, value in state.items() if key not in found.values()}
    return own, ("ema_", own | {key: state[name] for key, name in found.items()}) if found else None


def as_tensors(state: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """Tensors of a state dict (arrays become tensors), without a "module." before all names.

    Raises:
        UserError: an entry is no array of numbers.
    """
    tensors = {}
    for key, value in state.items():
        if not isinstance(key, str):
            raise UserError(f"{path}: the entry {key!r:.100} has no name, as it is a {type(key).__name__}")
        # a list could stand for any number of numbers, as lists in it may repeat each other
        if not isinstance(value, Tensor | np.ndarray | np.generic | int | float):
            raise UserError(f"{path}: the entry {key!r} is a {what_is(value)}, not a tensor")
        try:
            tensors[key] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: the entry {key!r} is a {type(value).__name__}, not a tensor") from error
    # torch.compile writes its own name anywhere, wrappers and Lightning theirs before all names
    tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
    while (
        prefix := next((p for p in _PREFIXES if tensors and all(key.startswith(p) for key in tensors)), None)
    ) is not None:
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def identify(state: Mapping[str, Tensor], path: str) -> str:
    """The kind of a state dict, by its keys.

    Raises:
        UserError: it is of no known kind; says what it has.
    """
    if "backbone.layer1.0.conv1.weight" in state:
        if "bbox_head.retina_cls.weight" in state:
            return "mmdet-retinanet"
        # from version 2 on the heads stand in one of their own
        for family, start in (("mmdet", ""), ("mmdet2", "roi_head.")):
            if f"{start}bbox_head.0.fc_cls.weight" in state:
                return f"{family}-cascade"
            if f"{start}bbox_head.fc_cls.weight" in state:
                return f"{family}-mask" if f"{start}mask_head.conv_logits.weight" in state else f"{family}-faster"
        heads = sorted({key.split(".")[0] for key in state} - {"backbone"})
        raise UserError(
            f"{path} is a detector of mmdetection that is none of Faster, Mask and Cascade R-CNN and RetinaNet (beside "
            f"its backbone it has {', '.join(heads)[:100] or 'nothing'}): it is not converted"
        )
    if "conv1.weight" in state and "layer1.0.conv1.weight" in state:
        if any(is_sge_key(key) for key in state):
            return "sge-imagenet"
        return "timm-sge" if any(re.fullmatch(r"layer\d\.\d+\.se\.weight", key) for key in state) else "plain-resnet"
    if "layer1.0.conv1.weight" in state:
        raise UserError(f"{path} is a ResNet with a deep stem (conv1.0): Detectron2's stem is one convolution")
    if "res2.0.conv1.weight" in state:
        return "detectron2-backbone"
    if any(key.endswith(".res2.0.conv1.weight") for key in state):
        return "detectron2-detector"
    if "res2_0_branch2a_w" in state:
        return "caffe2"
    some = ", ".join(list(state)[:3]) or "nothing"
    raise UserError(f"{path} is none of the kinds that can be converted (see docs/weights.md): it holds {some}, ...")


def _recipe(kind: str, checkpoint: Mapping[str, Any], state: Mapping[str, Tensor]) -> Recipe:
    if _metadata(checkpoint):
        return Recipe.of_metadata(_metadata(checkpoint))
    stem = state.get("conv1.weight")
    if kind == "plain-resnet" and stem is not None and stem.shape[1:2] != (3,):
        return Recipe(stride_in_1x1=False)
    if kind in ("sge-imagenet", "timm-sge", "plain-resnet") or checkpoint.get("__author__") == "torchvision":
        return IMAGENET
    if kind == "caffe2" and _is_msra(state):
        return MSRA
    if kind.startswith("mmdet"):
        return replace(_mmdet_recipe(checkpoint), heads=_mmdet_heads(kind))
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    if mean is not None and std is not None and mean.numel() == std.numel() == 3 and not mean.is_complex():
        mean, std = tuple(mean.flatten().tolist()), tuple(std.flatten().tolist())
        # red is the brightest channel of the means in use
        return Recipe("RGB" if mean[0] > mean[-1] else "BGR", mean, std)
    return Recipe()


def _is_msra(state: Mapping[str, Tensor]) -> bool:
    shape = state["res2_0_branch2b_w"].shape if "res2_0_branch2b_w" in state else ()
    grouped = shape[:1] != shape[1:2]
    return not grouped and any("_bn_" in key for key in state)


def _mmdet_heads(kind: str) -> dict[str, Any]:
    """Where the heads of mmdetection look: its anchors moved to the corners of the cells with version 2."""
    is_later = kind.startswith("mmdet2-")
    found: dict[str, Any] = {"MODEL.ANCHOR_GENERATOR.OFFSET": 0.0 if is_later else 0.5}
    for head in () if kind.endswith("retinanet") else ("BOX", "MASK") if kind.endswith("mask") else ("BOX",):
        found[f"MODEL.ROI_{head}_HEAD.POOLER_TYPE"] = "ROIAlignV2" if is_later else "ROIAlign"
        found[f"MODEL.ROI_{head}_HEAD.POOLER_SAMPLING_RATIO"] = 0 if is_later else 2
    return found


def _mmdet_recipe(checkpoint: Mapping[str, Any]) -> Recipe:
    # mmdetection keeps the text of its config; the release's are RGB, style "pytorch": stride in the 3x3
    meta = checkpoint["model"].get("meta")
    # "cfg" from version 3 on
    texts = [meta.get(name) for name in ("config", "cfg")] if isinstance(meta, Mapping) else []
    text = next((text[:_LONGEST_CONFIG] for text in texts if isinstance(text, str)), "")

    def numbers(name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        found = re.search(rf"\b{name}\s*=\s*[\[(]([^\])]{{0,200}})[\])]", text)
        values = tuple(map(float, re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)", found[1]))) if found else ()
        return values if len(values) == 3 else default

    return Recipe(
        "BGR" if re.search(r"to_rgb\s*=\s*False", text) else "RGB",
        numbers("mean", _MEAN),
        numbers("std", _STD),
        bool(re.search(r"style\s*=\s*['\"]caffe", text)),
    )
