"""SGE-ResNets for timm: ``import sge_det.modeling.timm`` and ``timm.create_model("sge_resnet50")`` builds one.

``python -m sge_det.modeling.timm SCRIPT ...`` runs a script, timm's train.py for instance, with these models
registered.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, user_errors
from ..layers.sge import SpatialGroupEnhance

try:
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet
except ImportError as error:
    message = "sge_det.modeling.timm registers models with timm, which is missing: pip install timm"
    if __name__ == "__main__":
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise UserError(message) from error


class SGEAttention(SpatialGroupEnhance):
    """SGE as timm builds attention: a class that takes the channels.

    Any of timm's ResNets takes it: ``create_model("resnet26", block_args={"attn_layer": SGEAttention})``.

    Args:
        channels: channels of the block's output, a multiple of ``groups``.
        groups, eps: as in ``SpatialGroupEnhance``.
        device, dtype: of the parameters.

    Raises:
        ValueError: the groups do not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        groups: int = 64,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(groups, eps)
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} groups")
        self.to(device=device, dtype=dtype)


default_cfgs = generate_default_cfgs(
    {
        f"sge_resnet{depth}": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for depth in (18, 34, 50, 101, 152)
    }
)


def _build(name: str, block: type, layers: tuple[int, ...], pretrained: bool, kwargs: dict[str, Any]) -> ResNet:
    arguments = {"block": block, "layers": layers, "block_args": {"attn_layer": SGEAttention}}
    return build_model_with_cfg(ResNet, name, pretrained, **(arguments | kwargs))


@register_model
def sge_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """SGE-ResNet-18."""
    return _build("sge_resnet18", BasicBlock, (2, 2, 2, 2), pretrained, kwargs)


@register_model
def sge_resnet34(pretrained: bool = False, **kwargs) -> ResNet:
    """SGE-ResNet-34."""
    return _build("sge_resnet34", BasicBlock, (3, 4, 6, 3), pretrained, kwargs)


@register_model
def sge_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """SGE-ResNet-50."""
    return _build("sge_resnet50", Bottleneck, (3, 4, 6, 3), pretrained, kwargs)


@register_model
def sge_resnet101(pretrained: bool = False, **kwargs) -> ResNet:
    """SGE-ResNet-101."""
    return _build("sge_resnet101", Bottleneck, (3, 4, 23, 3), pretrained, kwargs)


@register_model
def sge_resnet152(pretrained: bool = False, **kwargs) -> ResNet:
    """SGE-ResNet-152."""
    return _build("sge_resnet152", Bottleneck, (3, 8, 36, 3), pretrained, kwargs)


@user_errors
def _main(argv: list[str]) -> None:
    if not argv or not Path(argv[0]).is_file():
        raise UserError("give a script: python -m sge_det.modeling.timm SCRIPT ..., for instance timm's train.py")
    sys.argv = argv
    sys.path.insert(0, str(Path(argv[0]).resolve().parent))
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1:])
