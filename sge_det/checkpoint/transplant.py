"""Plain weights into an SGE model, without a change of what it computes.

SGE starts as a constant gate: with gamma = 0 it multiplies by sigmoid(beta). The norm before it, a scale and a shift
of each channel, takes the reciprocal: 1 / sigmoid(1) = 1.3678794 for the paper's beta. Fine-tuning then starts from
the plain model's function.
"""

import math
import re

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor

from ..config import STAGES, sge_options
from ..errors import UserError
from ..layers.attention import SGE
from .convert import Conversion, convert_file
from .mapping import resnet_shape

# The paper's.
_GROUPS, _BETA = 64, 1.0


def sge_builder(name: str) -> str | None:
    """The SGE version of a backbone builder of Detectron2's that is blind to ``MODEL.SGE``; None for any other."""
    own = name.replace("resnet", "sge_resnet")
    return own if "sge" not in name and own in BACKBONE_REGISTRY else None


def check_has_sge(cfg: CfgNode) -> None:
    """Checks that the model of ``cfg`` has SGE to transplant into.

    Raises:
        UserError: it has not; says what to set.
    """
    options = sge_options(cfg)
    if not options.is_sge:
        raise UserError("the config has no SGE: set MODEL.SGE.ENABLED True and MODEL.SGE.ATTENTION sge")
    own = sge_builder(cfg.MODEL.BACKBONE.NAME)
    if own:
        raise UserError(f"the config has no SGE: MODEL.BACKBONE.NAME is {cfg.MODEL.BACKBONE.NAME}, set it to {own}")


def transplant_state(state: dict[str, Tensor], cfg: CfgNode | None, path: str) -> tuple[dict[str, Tensor], str]:
    """The SGE twin's weights that compute what ``state`` computes in the plain model.

    Works for every norm that scales and shifts (FrozenBN, BN, SyncBN, GN), in training too.

    Args:
        state: a plain backbone or detector, under Detectron2's names; is not changed.
        cfg: says the groups, the stages and beta (``MODEL.SGE.INIT``); None for the paper's.
        path: where the weights are from, for errors.

    Returns:
        the weights, and a sentence on what was added.

    Raises:
        UserError: there is SGE in them already, a block has no norm, or the groups do not divide its channels.
    """
    shape = resnet_shape(state, path)
    if shape.groups:
        raise UserError(f"{path} has SGE already: there is nothing to transplant")
    groups, beta, stages = _GROUPS, _BETA, STAGES
    if cfg is not None:
        check_has_sge(cfg)
        options = sge_options(cfg)
        groups, beta, stages = options.groups, float(options.init[1]), options.stages
    last = shape.last
    factor = 1 + math.exp(-beta)
    result, count = dict(state), 0
    pattern = rf"{re.escape(shape.prefix)}({'|'.join(stages)})\.\d+\.{last}\.weight" if stages else r"(?!)"
    for key in state:
        if not re.fullmatch(pattern, key):
            continue
        block = key.removesuffix(f".{last}.weight")
        channels = state[key].shape[0]
        if groups < 1 or channels % groups:
            raise UserError(
                f"{groups} groups do not divide the {channels} channels of {block}: set MODEL.SGE.GROUPS in the config "
                "that the weights are for (--config-file)"
            )
        for name in ("weight", "bias"):
            norm = f"{block}.{last}.norm.{name}"
            if norm not in state:
                raise UserError(f"{path}: {block}.{last} has no norm before SGE that could take its factor")
            result[norm] = state[norm] * factor
        result[f"{block}.{SGE}.weight"] = torch.zeros(1, groups, 1, 1)
        result[f"{block}.{SGE}.bias"] = torch.full((1, groups, 1, 1), beta)
        count += 1
    return result, f"added SGE to {count} blocks ({groups} groups), the norms before it times {factor:.7f}"


def transplant_file(
    source: str, output: str, *, cfg: CfgNode | None = None, weights_of: str | None = None
) -> Conversion:
    """Converts plain weights, a backbone's or a whole detector's, into those of the SGE twin of equal outputs.

    Args:
        source, output, weights_of: as in :func:`.convert.convert_file`.
        cfg: the config of the SGE model; the paper's groups, stages and beta without one.

    Raises:
        UserError: as :func:`.convert.convert_file` and :func:`transplant_state`.
    """
    return convert_file(source, output, cfg=cfg, change=transplant_state, weights_of=weights_of)
