"""What was declared before the first run, in ``plan.json``, and where what was done differs from it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import make_folder, write_json
from .looks import Look, Looks
from .parts import Question

if TYPE_CHECKING:
    from .matrix import Matrix
    from .pretraining import PretrainingMatrix

PLAN_FILE = "plan.json"


@dataclass(frozen=True)
class Departure:
    """A way in which what was done is not what was declared.

    Attributes:
        sentence: that tells it.
        exploratory: whether error rates do not hold any more, so that no verdict is primary.
    """

    sentence: str
    exploratory: bool = True


def declare(
    matrix: "Matrix | PretrainingMatrix", question: Question, looks: Looks | None = None, against: str | None = None
) -> dict:
    """The plan of a comparison: that of its first call, which writes it before any run.

    Args:
        looks: the rule by which seeds are added; None for a fixed number.
        against: the arm that the others are compared with; the first by default.

    Raises:
        UserError: it cannot be read or written.
    """
    plan = declared(matrix.output)
    if plan is not None:
        return plan
    plan = {"schema": 1, **asdict(question)}
    plan |= {"reference": against or matrix.arms[0].name}
    plan |= {"arms": [arm.name for arm in matrix.arms], "seeds": matrix.seeds}
    plan["looks"] = None if looks is None else asdict(looks)
    plan["finished_before"] = [run.name for run in matrix.runs if run.finished]
    make_folder(matrix.output)
    write_json(matrix.output / PLAN_FILE, plan)
    return plan


def declared(folder: str | Path) -> dict | None:
    """The plan that lies in a folder; None where there is none.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(folder) / PLAN_FILE
    try:
        return _checked(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, UserError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read ({str(error)[:200]}): put a copy back, or remove it, and the report says that "
            "there were runs before the plan"
        ) from error


def declared_look(plan: dict, seeds: Sequence[int], comparisons: int) -> Look | None:
    """The look that ``plan`` declares at these seeds; None where it declares none.

    Its verdict holds whether an answer was there before or not: the intervals of all looks hold at once.

    Args:
        comparisons: arms that are compared with the reference.
    """
    if plan["looks"] is None or list(seeds) != plan["seeds"][: len(seeds)]:
        return None
    looks = Looks(**plan["looks"])
    return next((Look(n, level, looks) for n, level in looks.levels(comparisons) if n == len(seeds)), None)


def _checked(plan: object) -> dict:
    """The plan, if it is one.

    Raises:
        ValueError, TypeError: it is none.
    """
    if not isinstance(plan, dict):
        raise ValueError("it is no plan")
    for key in ("seeds", "arms", "finished_before"):
        if not isinstance(plan.setdefault(key, []), list):
            raise ValueError(f"its {key} are no list")
    if not plan["seeds"] or any(type(seed) is not int for seed in plan["seeds"]):
        raise ValueError("its seeds are no whole numbers")
    if not all(isinstance(name, str) for name in (*plan["arms"], *plan["finished_before"])):
        raise ValueError("its arms or runs have names that are no text")
    if plan.setdefault("looks", None) is not None:
        looks = Looks(**plan["looks"])
        if type(looks.first) is not int or type(looks.most) is not int:
            raise ValueError("its looks are at no whole numbers of seeds")
        looks.check()
    return plan


def asks_another_question(plan: dict, question: Question, reference: str) -> bool:
    """Whether ``question`` is not the one that was declared, or is asked against another reference."""
    asked = asdict(question) | {"reference": reference}
    return any(plan.get(name, here) != here for name, here in asked.items() if name != "difference")


def departures(
    plan: dict, question: Question, arms: Sequence[str], seeds: Sequence[int], looks: Looks | None = None
) -> list[Departure]:
    """Each way in which what was done is not what ``plan`` declares.

    Args:
        arms: the reference first.
        seeds: that the report is of.
    """
    found = []
    if plan["looks"] != (None if looks is None else asdict(looks)):
        sentence = (
            "The rule by which seeds are added is not the one that was declared before the first run: error rates do "
            "not hold under it."
        )
        found.append(Departure(sentence))
    for name, here in (asdict(question) | {"reference": arms[0]}).items():
        if name != "difference" and plan.get(name, here) != here:
            sentence = f"The {name} was declared as {plan[name]} before the first run and is {here} here."
            found.append(Departure(sentence))
    added, left_out = _apart(plan["seeds"], seeds)
    if added:
        sentence = (
            f"The seeds {added} were added to those that were declared, {', '.join(map(str, plan['seeds']))}: where "
            "that was done because of what these showed, false claims are more frequent than 5%."
        )
        found.append(Departure(sentence))
    if left_out and looks is None:
        found.append(Departure(f"The seeds {left_out} were declared and are left out here."))
    added, left_out = _apart(plan["arms"] or arms, arms)
    if added:
        # they are corrected for, so what is claimed of the others holds
        found.append(Departure(f"The arms {added} were added to those that were declared.", exploratory=False))
    if left_out:
        sentence = f"The arms {left_out} were declared and are left out here, where they count no more."
        found.append(Departure(sentence))
    if plan["finished_before"]:
        sentence = f"The plan was written when there were runs already: {', '.join(plan['finished_before'])}."
        found.append(Departure(sentence, exploratory=False))
    return found


def in_words(plan: dict) -> str:
    """What was declared, as a report tells it."""
    looks = plan.get("looks")
    adding = f"; {Looks(**looks).in_words()}" if isinstance(looks, dict) else ""
    return (
        f"primary metric {plan.get('metric')}, margin {plan.get('margin')} points, "
        f"{'paired by seed' if plan.get('paired') else 'not paired'}, arms {', '.join(plan['arms'])}, reference "
        f"{plan.get('reference', 'the first')}, seeds {', '.join(map(str, plan['seeds']))}{adding}"
    )


def _apart(declared: Sequence, done: Sequence) -> tuple[str, str]:
    """What was done beyond what was declared, and what was declared and not done, as lists in words."""
    return tuple(
        ", ".join(str(each) for each in some if each not in others)
        for some, others in ((done, declared), (declared, done))
    )
