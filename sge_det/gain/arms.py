"""Arms: what differs between the detectors that are compared, as config overrides."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from detectron2.config import CfgNode

from ..checkpoint import read_source, transplant_state
from ..checkpoint.checkpointer import check_weights_exist
from ..checkpoint.mapping import to_detectron2
from ..checkpoint.transplant import check_has_sge
from ..config import merge_overrides, sge_options
from ..engine.doctor import Finding, examine_files, examine_settings
from ..errors import UserError
from ..layers.attention import ATTENTIONS, SGE

TRANSPLANT = "sge-transplant"
BUILT_IN = ("plain", "sge", "sge-constant", "sge-fixed", TRANSPLANT, *(name for name in ATTENTIONS if name != SGE))


@dataclass(frozen=True)
class Arm:
    """One of the detectors that are compared.

    Attributes:
        name: also its folder's name.
        overrides: KEY VALUE KEY VALUE ..., over the config that all arms share.
        transplants: the arm whose weights, transplanted, this one starts from; None: it starts from ``MODEL.WEIGHTS``.
            They are that arm's start weights if it has any, otherwise its final ones of the same seed.
    """

    name: str
    overrides: tuple[str, ...] = ()
    transplants: "Arm | None" = None

    def describe(self, cfg: CfgNode) -> str:
        """The arm in words: its overrides and, where they are another arm's, its start weights."""
        text = " ".join(self.overrides) or "the config as it is"
        if self.transplants is None:
            return text
        whose = "start" if self.transplants.config(cfg).MODEL.WEIGHTS else "final"
        return f"{text}, from the transplanted {whose} weights of {self.transplants.name}"

    def caveat(self, cfg: CfgNode) -> str:
        """What must be known to read a difference from the reference; empty for most arms."""
        if self.transplants is None or self.transplants.config(cfg).MODEL.WEIGHTS:
            return ""
        return (
            f"{self.name} went on from the final weights of {self.transplants.name}, so that its weights were trained "
            f"for twice the {cfg.SOLVER.MAX_ITER} iterations: longer training alone may explain a difference."
        )

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
        UserError: a name that is unknown, unfit for a folder or given twice; fewer than two arms; two equal arms; a
            transplant from a reference that has SGE.
    """
    own = {}
    for name, *overrides in custom:
        check_name(name)
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
    if TRANSPLANT in order:
        arms[order.index(TRANSPLANT)] = _transplant(arms[0], cfg)
    seen = {}
    for arm in arms:
        same = seen.setdefault((arm.config(cfg).dump(), arm.transplants), arm)
        if same is not arm:
            raise UserError(f"the arms {same.name} and {arm.name} are the same config: there is nothing to compare")
    return arms


def check_name(name: str) -> None:
    """Checks the name of an arm of one's own.

    Raises:
        UserError: it does not fit a folder.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name):
        raise UserError(f"the arm name {name!r} does not fit a folder: use letters, digits and _ . + -")


def examine_arms(arms: Sequence[Arm], cfg: CfgNode) -> list[Finding]:
    """What the doctor finds in each of ``arms``, but for what it finds in ``cfg`` itself."""
    shared = [*examine_settings(cfg), *examine_files(cfg)]
    found = []
    for arm in arms:
        own = arm.config(cfg)
        for finding in (*examine_settings(own), *examine_files(own)):
            # the weights of a transplant are plain until its run makes them
            expected = arm.transplants is not None and (finding.severity, finding.key) == ("warning", "MODEL.WEIGHTS")
            if finding not in shared and not expected:
                found.append(replace(finding, key=f"arm {arm.name}: {finding.key}"))
    return found


def _built_in(name: str, cfg: CfgNode) -> Arm:
    if name == "plain":
        return Arm(name, ("MODEL.SGE.ENABLED", "False"))
    attention = SGE if name in ("sge-constant", "sge-fixed") else name
    overrides = ("MODEL.SGE.ENABLED", "True", "MODEL.SGE.ATTENTION", attention)
    if name == "sge-constant":
        bias = sge_options(cfg).init[1]
        overrides += ("MODEL.SGE.CONSTANT", "True", "MODEL.SGE.INIT", f"[0.0, {bias}]")
    if name == "sge-fixed":
        # with a weight of 0 the gates are constant, and a learning rate of 0 keeps them so; start weights may hold
        # others, which would be attention
        bias = sge_options(cfg).init[1]
        overrides += ("MODEL.SGE.LR_FACTOR", "0.0", "MODEL.SGE.INIT", f"[0.0, {bias}]", "MODEL.SGE.RESET", "True")
    return Arm(name, overrides)


def _transplant(reference: Arm, cfg: CfgNode) -> Arm:
    if reference.name == TRANSPLANT:
        raise UserError(f"{TRANSPLANT} starts from the reference arm's weights: name that one first, --arms plain ...")
    theirs = reference.config(cfg)
    if "sge" in theirs.MODEL.BACKBONE.NAME and sge_options(theirs).enabled:
        raise UserError(
            f"{TRANSPLANT} starts from the reference arm's weights, but {reference.name} has an attention already: "
            "let a plain arm be the first"
        )
    # later overrides win: the two differ in the attention alone
    overrides = (*reference.overrides, "MODEL.SGE.ENABLED", "True", "MODEL.SGE.ATTENTION", SGE)
    arm = Arm(TRANSPLANT, overrides, reference)
    check_has_sge(arm.config(cfg))
    weights = theirs.MODEL.WEIGHTS
    if weights and "://" not in weights:
        # what cannot be transplanted is told now, not when the run's turn has come
        transplant_state(to_detectron2(read_source(weights)).state, arm.config(cfg), weights)
    return arm
