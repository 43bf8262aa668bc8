"""Arms: what differs between the detectors that are compared, as config overrides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from ..checkpoint import check_weights_exist
from ..config import ATTENTIONS, merge_overrides, sge_options
from ..errors import UserError

BUILT_IN = ("plain", "sge", "sge-fixed", *(name for name in ATTENTIONS if name != "sge"))


@dataclass(frozen=True)
class Arm:
    """One of the detectors that are compared.

    Attributes:
        name: also its folder's name.
        overrides: KEY VALUE KEY VALUE ..., over the config that all arms share.
    """

    name: str
    overrides: tuple[str, ...] = ()

    def config(self, cfg: CfgNode) -> CfgNode:
        """``cfg`` with the overrides of this arm.

        Raises:
            UserError: an override is wrong; names the arm.
        """
        result = cfg.clone()
        result.defrost()
        try:
            merge_overrides(result, self.overrides)
            sge_options(result)
            check_weights_exist(result)
        except UserError as error:
            raise UserError(f"arm {self.name}: {error}") from error
        return result


def choose_arms(cfg: CfgNode, names: Sequence[str], custom: Sequence[Sequence[str]] = ()) -> list[Arm]:
    """The arms of a comparison; the first is the reference.

    Args:
        cfg: the config that they share.
        names: built-in arms, or those of ``custom``.
        custom: (NAME, KEY, VALUE, ...) for each arm of one's own; one that is not in ``names`` comes after them.

    Raises:
        UserError: a name that is unknown, unfit for a folder or given twice; fewer than two arms; two equal arms.
    """
    own = {}
    for name, *overrides in custom:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
            raise UserError(f"the arm name {name!r} does not fit a folder: use letters, digits and _ . + -")
        if name in BUILT_IN or name in own:
            raise UserError(f"there is an arm {name} already: give yours another name")
        own[name] = Arm(name, tuple(overrides))
    order = [*names, *(name for name in own if name not in names)]
    for name in order:
        if name not in own and name not in BUILT_IN:
            raise UserError(
                f"there is no arm {name}: the built-in ones are {', '.join(BUILT_IN)}; define others with --arm NAME "
                "KEY VALUE ..."
            )
        if order.count(name) > 1:
            raise UserError(f"the arm {name} is given twice")
    if len(order) < 2:
        raise UserError("a comparison needs at least two arms, the first is the reference: --arms plain sge")
    arms = [own[name] if name in own else _built_in(name, cfg) for name in order]
    seen = {}
    for arm in arms:
        same = seen.setdefault(arm.config(cfg).dump(), arm)
        if same is not arm:
            raise UserError(f"the arms {same.name} and {arm.name} are the same config: there is nothing to compare")
    return arms


def _built_in(name: str, cfg: CfgNode) -> Arm:
    if name == "plain":
        return Arm(name, ("MODEL.SGE.ENABLED", "False"))
    attention = name.removesuffix("-fixed")
    overrides = ("MODEL.SGE.ENABLED", "True", "MODEL.SGE.ATTENTION", attention)
    if name == "sge-fixed":
        # with a weight of 0 the gates are constant, and a learning rate of 0 keeps them so
        bias = sge_options(cfg).INIT[1]
        overrides += ("MODEL.SGE.LR_FACTOR", "0.0", "MODEL.SGE.INIT", f"[0.0, {bias}]")
    return Arm(name, overrides)
