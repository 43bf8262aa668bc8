"""``report.json``: the one place that knows its keys. Schema 2 is written and read; schema 1 can still be read."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from ..analysis.pointing import SHAPES
from ..errors import UserError
from ..evaluation.error_kinds import CALIBRATION, CONFUSION, TIDE
from .inference import (
    OUTCOMES,
    effect_size,
    probability_of_improvement,
    seed_correlation,
    seed_interval,
    welch_interval,
)
from .looks import Look, Looks
from .parts import (
    DECLARED,
    TASK_NAMES,
    Bounds,
    Confusion,
    Cost,
    Declared,
    Difference,
    ErrorDifference,
    ErrorScore,
    Intervals,
    Origins,
    Power,
    Question,
    Report,
    Score,
    Verdict,
)

SCHEMA = 2
_OLD = (
    "This report is of schema 1. Its intervals over the images were too narrow and are left out, so that none speaks "
    "of new seeds and new images both; its sentences stand as written, on the seeds alone or on those intervals."
)
_FIRST = ("reference", "seeds", "tasks", "images", "confidence", "bootstrap_samples")
_AS_THEY_ARE = ("differences", "gates", "verdicts", "notes", "verdict")
_MAYBE = ("origins", "look", "departures", "plan", "cost", "pointing", "provenance")
_KNOWN = {"schema", *_FIRST, "question", "arms", *_AS_THEY_ARE, *_MAYBE}

# What tables show of what runs recorded.
_GATES = {"gamma": ("mean", "sd"), "beta": ("mean", "sd"), "gate": ("mean", "sd", "spatial_sd")}
_POINTED = ("chance", "before", "after", "gate", "after_minus_before", "gate_minus_chance", "gate_ratio")
# Larger ones no table can show.
_LARGEST = 1e9
_ROUNDING = 1e-6

T = TypeVar("T")


def to_json(report: Report) -> dict[str, Any]:
    """What ``report.json`` holds (docs/measuring.md), of schema 2; NaN where the file has null."""
    parts = _lists(asdict(report))
    content = {"schema": SCHEMA} | {key: parts[key] for key in _FIRST}
    content["question"] = parts["question"] | {"task": report.task}
    content["arms"] = {name: {"seeds": parts["seeds"]} | by_task for name, by_task in parts["arms"].items()}
    content |= {key: parts[key] for key in _AS_THEY_ARE}
    if report.origins is not None:
        content["origins"] = parts["origins"]
    if report.look is not None:
        content["look"] = {"seeds": report.look.seeds, "level": report.look.level, **parts["look"]["looks"]}
    if report.declared is not None:
        content |= {key: parts["declared"][key] for key in ("departures", "plan")}
    if report.cost is not None:
        content["cost"] = parts["cost"]
    return {**content, "pointing": parts["pointing"], "provenance": parts["provenance"], **parts["others"]}


def from_json(content: Any) -> Report:
    """The report that ``report.json`` holds, of schema 2 or 1.

    Raises:
        KeyError, TypeError, ValueError: something is missing in it, or is not what it should be.
    """
    schema = _object(content).get("schema")
    if type(schema) is not int or schema not in (1, SCHEMA):
        raise ValueError(f"its schema is none of 1 and {SCHEMA}")
    whole = schema == SCHEMA
    reference, tasks = _text(content["reference"]), _several(content["tasks"], _text)
    arms = {
        name: {task: _by_name(_object(arm)[task], _score) for task in tasks}
        for name, arm in _object(content["arms"]).items()
    }
    if whole:
        differences = {
            name: {task: _by_name(_object(arm)[task], _difference) for task in tasks}
            for name, arm in _object(content["differences"]).items()
        }
    else:
        differences = {name: _from_scores(arms[reference], arms[name]) for name in _object(content["differences"])}
    report = Report(
        reference=reference,
        seeds=_several(content["seeds"], lambda seed: _count("a seed", seed)),
        tasks=tasks,
        images=_count("its number of images", content["images"], least=1),
        confidence=_confidence(content["confidence"]),
        bootstrap_samples=_count("bootstrap_samples", content["bootstrap_samples"]) if whole else 0,
        question=_question(content["question"]) if whole else DECLARED,
        arms=arms,
        differences=differences,
        gates=_by_name(content.get("gates", {}), lambda of: _by_name(of, lambda stages: _by_name(stages, _gates))),
        verdicts=_several(content["verdicts"], _verdict) if whole else (),
        notes=_several(content.get("notes", []), _text) if whole else (),
        verdict=_text(content["verdict"]) if whole else f"{_OLD}\n{_text(content['verdict'])}",
        origins=_optional(content.get("origins"), _origins),
        look=_optional(content.get("look"), _look),
        declared=_declared(content) if "departures" in content else None,
        cost=_optional(content.get("cost"), lambda cost: _by_name(cost, _cost)),
        pointing=_by_name(content.get("pointing", {}), _played),
        provenance=_by_name(content.get("provenance", {}), _text),
        others={key: value for key, value in content.items() if key not in _KNOWN},
    )
    _check(report)
    return report


def read_report(path: str | Path) -> Report:
    """The report in a file; schema 1 is brought to schema 2.

    Raises:
        UserError: it cannot be read, or is no report of these schemas.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return from_json(content)
    except KeyError as error:
        raise UserError(f"{path} is no whole report.json of measure_gain: it lacks {error}") from error
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise UserError(f"{path} is no report.json of measure_gain: {error}") from error


def _check(report: Report) -> None:
    """Checks that the parts belong together.

    Raises:
        ValueError: they do not.
    """
    if not report.tasks or not set(report.tasks) <= set(TASK_NAMES):
        raise ValueError(f"its tasks are {', '.join(report.tasks) or 'none'}, not of {', '.join(TASK_NAMES)}")
    if len(set(report.seeds)) != len(report.seeds):
        raise ValueError("one of its seeds is there twice")
    if not report.seeds or set(report.arms) - {report.reference} != set(report.differences) or not report.differences:
        raise ValueError("its arms, reference, seeds and differences do not belong together")
    for task in report.tasks:
        metrics = set(report.arms[report.reference][task])
        for name, by_task in (*report.arms.items(), *report.differences.items()):
            if set(by_task[task]) != metrics or not metrics:
                raise ValueError(f"the {task} metrics of {name} are not those of {report.reference}")
            if any(len(part.values) != len(report.seeds) for part in by_task[task].values()):
                raise ValueError(f"{name} does not have a value for each seed")
    for name, by_task in report.differences.items():
        by_seed = [part.images_by_seed for task in report.tasks for part in by_task[task].values()]
        if any(len(intervals) not in (0, len(report.seeds)) for intervals in by_seed):
            raise ValueError(f"{name} does not have an interval over the images for each seed")
    if report.question.metric not in report.arms[report.reference][report.task]:
        raise ValueError(f"its metric {report.question.metric} is not in it")
    if report.origins is not None:
        _check_origins(report, report.origins)


def _check_origins(report: Report, origins: Origins) -> None:
    """Checks that there is every figure of each arm and each difference.

    Raises:
        KeyError, ValueError: there is not.
    """
    for names, by_arm in ((report.arms, origins.arms), (report.differences, origins.differences)):
        for name in names:
            for task in report.tasks:
                for figure in (*TIDE, *CALIBRATION, *CONFUSION):
                    if len(by_arm[name][task][figure].values) != len(report.seeds):
                        raise ValueError(f"the {figure} of {name} does not have a value for each seed")
    if set(origins.confusions) != set(report.differences):
        raise ValueError("its confusions are not of its arms")
    for by_task in origins.confusions.values():
        for task in report.tasks:
            by_task[task]


def _from_scores(
    reference: Mapping[str, Mapping[str, Score]], arm: Mapping[str, Mapping[str, Score]]
) -> dict[str, dict[str, Difference]]:
    """By task and metric, what the values by seed alone tell of a difference."""
    return {
        task: {metric: _of_values(reference[task][metric].values, score.values) for metric, score in scores.items()}
        for task, scores in arm.items()
    }


def _of_values(theirs: Sequence[float], ours: Sequence[float]) -> Difference:
    values = tuple(b - a for a, b in zip(theirs, ours, strict=True))
    over_seeds = (Bounds.of(seed_interval(values)), Bounds.of(welch_interval(theirs, ours)))
    return Difference(
        sum(values) / len(values),
        values,
        seed_correlation(theirs, ours),
        Intervals(*over_seeds, images=None, both=None),
        (None,) * len(values),
        probability_of_improvement(theirs, ours),
        effect_size(theirs, ours),
    )


def _score(content: Any) -> Score:
    found = _object(content)
    return Score(_points(found["mean"]), _within("an sd", found["sd"], 0), _several(found["values"], _points))


def _difference(content: Any) -> Difference:
    found = _object(content)
    intervals = _object(found["intervals"])
    return Difference(
        _number(found["mean"]),
        _several(found["values"], _number),
        _within("a seed_correlation", found["seed_correlation"], -1, 1),
        Intervals(*(_bounds(intervals[name]) for name in ("seeds", "welch", "images", "both"))),
        _several(found["images_by_seed"], _bounds),
        _within("a probability_of_improvement", found["probability_of_improvement"], 0, 1),
        _number(found["effect_size"]),
    )


def _question(content: Any) -> Question:
    found = _object(content)
    margin, difference = (_within(f"the {key}", found[key], 0) for key in ("margin", "difference"))
    return Question(_text(found["metric"]), margin, _flag(found["paired"]), difference)


def _verdict(content: Any) -> Verdict:
    found = _object(content)
    if found["outcome"] not in OUTCOMES:
        raise ValueError(f"the outcome {_shown(found['outcome'])} is none of {', '.join(OUTCOMES)}")
    return Verdict(
        *(_text(found[key]) for key in ("arm", "task", "metric", "outcome")),
        _flag(found["primary"]),
        *(_within(f"a {key}", found[key], 0, 1) for key in ("p", "equivalence_p")),
        _optional(found["excludes_zero"], _flag),
        _optional(found["power"], _power),
        _text(found["sentence"]),
        # the first reports of schema 2 did not have them
        *(_number(found.get(key)) for key in ("low", "high")),
    )


def _power(content: Any) -> Power:
    found = _object(content)
    more = _optional(found["more_seeds"], lambda seeds: _count("more_seeds", seeds))
    return Power(_number(found["difference"]), _within("the power", found["probability"], 0, 1), more)


def _origins(content: Any) -> Origins:
    found = _object(content)

    def by_arm(part: str, of_task: Callable[[Any], T]) -> dict[str, dict[str, T]]:
        return _by_name(found[part], lambda by_task: _by_name(by_task, of_task))

    return Origins(
        by_arm("arms", lambda figures: _by_name(figures, _error_score)),
        by_arm("differences", lambda figures: _by_name(figures, _error_difference)),
        by_arm("confusions", lambda pairs: _several(pairs, _confusion)),
    )


def _error_score(content: Any) -> ErrorScore:
    found = _object(content)
    return ErrorScore(_number(found["mean"]), _several(found["values"], _number))


def _error_difference(content: Any) -> ErrorDifference:
    found = _object(content)
    return ErrorDifference(_number(found["mean"]), _several(found["values"], _number), _bounds(found["interval"]))


def _confusion(content: Any) -> Confusion:
    found = _object(content)
    return Confusion(
        *(_text(found[key]) for key in ("category", "taken_for")),
        *(_points(found[key]) for key in ("reference", "arm")),
        _number(found["mean"]),
        _several(found["values"], _number),
        _bounds(found["interval"]),
    )


def _look(content: Any) -> Look:
    found = _object(content)
    first, most, seeds = (_count(f"the look's {key}", found[key], least=1) for key in ("first", "most", "seeds"))
    looks = Looks(first, most, _within("the look's until", found["until"], 0), _flag(found["decide"]))
    return Look(seeds, _within("the look's level", found["level"], 0, 1), looks)


def _cost(content: Any) -> Cost:
    found = _object(content)
    hours = (_within(f"the {key} of an arm", found[key], 0) for key in ("hours", "gpu_hours", "core_hours"))
    return Cost(_count("the number of an arm's runs", found["runs"], least=1), *hours)


def _declared(content: Mapping[str, Any]) -> Declared:
    return Declared(_optional(content.get("plan"), _object), _several(content["departures"], _text))


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{_shown(value)} is no object")
    return value


def _by_name(value: Any, part: Callable[[Any], T]) -> dict[str, T]:
    return {name: part(each) for name, each in _object(value).items()}


def _several(value: Any, part: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{_shown(value)} is no list")
    return tuple(part(each) for each in value)


def _optional(value: Any, part: Callable[[Any], T]) -> T | None:
    return None if value is None else part(value)


def _bounds(value: Any) -> Bounds | None:
    if value is None:
        return None
    low, high = (_number(_object(value)[key]) for key in ("low", "high"))
    if low > high:
        raise ValueError(f"an interval begins at {low} and ends at {high}, below it")
    return Bounds(low, high)


def _number(value: Any) -> float:
    """A number, which may be whole; null is NaN."""
    if value is None:
        return math.nan
    if type(value) not in (int, float) or abs(value) >= _LARGEST:
        raise TypeError(f"{_shown(value)} is no number")
    return value


def _whole_number(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{_shown(value)} is no whole number")
    return value


def _within(what: str, value: Any, least: float, most: float = math.inf) -> float:
    """A number in these bounds, or NaN."""
    found = _number(value)
    if found < least or found > most:
        span = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{what} is {_shown(value)}: it must be {span}")
    return found


def _points(value: Any) -> float:
    """AP points or per cent."""
    # a mean is rounded
    return _within("a metric", value, -_ROUNDING, 100 + _ROUNDING)


def _count(what: str, value: Any, least: int = 0) -> int:
    return int(_within(what, _whole_number(value), least))


def _confidence(value: Any) -> float:
    if not 0 < _number(value) < 1:
        raise ValueError(f"the confidence is {_shown(value)}: it must lie between 0 and 1")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{_shown(value)} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_shown(value)} is no text")
    return value


def _gates(content: Any) -> dict[str, Any]:
    """What a run recorded of the gates of a stage, as tables show it."""
    found = _raw(_object(content))
    for key, figures in _GATES.items():
        for figure in figures:
            _within(f"the {figure} of a {key}", _object(found[key])[figure], -math.inf if figure == "mean" else 0)
    return found


def _played(content: Any) -> dict[str, Any]:
    """What the runs of an arm recorded of the pointing game, as tables show it: the same of all runs."""
    runs = _by_name(content, lambda run: _raw(_object(run)))
    places = []
    for run in runs.values():
        found = {
            shape: _by_name(run[shape], lambda sizes: _by_name(sizes, _pointed)) for shape in SHAPES if shape in run
        }
        places.append(
            [(shape, stage, size) for shape in found for stage in found[shape] for size in found[shape][stage]]
        )
    if not places or any(others != places[0] for others in places):
        raise ValueError("its runs do not have the same figures of the pointing game")
    return runs


def _pointed(content: Any) -> None:
    found = _object(content)
    _count("the images of the pointing game", found["images"])
    for figure in _POINTED:
        for key in ("mean", "low", "high"):
            _number(_object(found[figure])[key])


def _raw(value: Any) -> Any:
    """What another room recorded, with NaN for null."""
    if isinstance(value, dict):
        return {name: _raw(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_raw(part) for part in value]
    return math.nan if value is None else value


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(part) for name, part in value.items()}
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
