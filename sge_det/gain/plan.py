"""What was declared before the first run, in ``plan.json``, and where what was done differs from it."""

import json
from dataclasses import asdict

from ..errors import UserError
from ..files import make_folder, write_json
from .looks import Looks
from .matrix import Matrix
from .verdict import Question

PLAN_FILE = "plan.json"


def declare(matrix: Matrix, question: Question, looks: Looks | None = None) -> dict:
    """The plan of a comparison: that of its first call, which writes it before any run.

    Args:
        looks: the rule by which seeds are added; None for a fixed number.

    Raises:
        UserError: it cannot be read or written.
    """
    path = matrix.output / PLAN_FILE
    try:
        plan = json.loads(path.read_text())
        if not isinstance(plan, dict) or not isinstance(plan.get("seeds"), list):
            raise ValueError("it is no plan")
        return plan
    except FileNotFoundError:
        pass
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    plan = {"schema": 1, **asdict(question)}
    plan |= {"arms": [arm.name for arm in matrix.arms], "seeds": matrix.seeds}
    plan["looks"] = None if looks is None else asdict(looks)
    plan["finished_before"] = [run.name for run in matrix.runs if run.finished]
    make_folder(matrix.output)
    write_json(path, plan)
    return plan


def asks_another_question(plan: dict, question: Question) -> bool:
    """Whether ``question`` is not the one that was declared, so that its answer is exploratory."""
    return any(plan.get(name, here) != here for name, here in asdict(question).items() if name != "difference")


def departures(
    plan: dict, question: Question, arms: list[str], seeds: list[int], looks: Looks | None = None
) -> list[str]:
    """A sentence for each way in which what was done is not what ``plan`` declares."""
    found = []
    if plan.get("looks") != (None if looks is None else asdict(looks)):
        found.append(
            "The rule by which seeds are added is not the one that was declared before the first run: error rates do "
            "not hold under it."
        )
    for name, here in asdict(question).items():
        if name != "difference" and plan.get(name, here) != here:
            found.append(
                f"The {name} was declared as {plan[name]} before the first run and is {here} here: take this verdict "
                "as exploratory."
            )
    added = [str(seed) for seed in seeds if seed not in plan["seeds"]]
    left_out = [str(seed) for seed in plan["seeds"] if seed not in seeds]
    if added:
        found.append(
            f"The seeds {', '.join(added)} were added to those that were declared, "
            f"{', '.join(map(str, plan['seeds']))}: where that was done because of what these showed, false claims are "
            "more frequent than 5%."
        )
    if left_out and looks is None:
        found.append(f"The seeds {', '.join(left_out)} were declared and are left out here.")
    declared = plan.get("arms", arms)
    added, left_out = ([name for name in a if name not in b] for a, b in ((arms, declared), (declared, arms)))
    if added:
        found.append(f"The arms {', '.join(added)} were added to those that were declared.")
    if left_out:
        found.append(f"The arms {', '.join(left_out)} were declared and are left out here, where they count no more.")
    if plan.get("finished_before"):
        found.append(f"The plan was written when there were runs already: {', '.join(plan['finished_before'])}.")
    return found
