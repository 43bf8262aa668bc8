"""What ``tools/measure_gain.py`` is asked for: which options go together, and what is done with them.

Everything here takes the options as ``argparse`` leaves them, so that a program can ask as the tool does.
"""

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.utils.logger import setup_logger

from ..engine.launching import TIMEOUT_SECONDS, check_launch
from ..errors import UserError
from .api import decide_gain, measure_classified_gain, measure_gain, report_gain
from .classified import METRICS as CLASSIFIED
from .cluster import Cluster
from .existing import compare_classified, compare_results, draw_report
from .looks import FIRST_SEEDS, MOST_SEEDS, Looks
from .matrix import Matrix
from .measurement import Measurement
from .parts import Question
from .plan import declare, declared
from .power import check_wanted, from_pilot, given, in_words, published, tables
from .processes import Launch
from .run import Run

_QUESTION = {"metric", "margin", "difference", "unpaired", "against", "bootstrap"}
_LAUNCH = {"num_gpus", "num_machines", "machine_rank", "dist_url"}
_EXISTING = {"gt", "images", "arm_results"}
_PLANNING = {"pilot", "sd", "correlation", "image_error", "image_count"}
# What each kind of call takes; what it does not is refused, since it would have no effect.
_TAKES = {
    "plan": {"plan", *_PLANNING, "metric", "unpaired", "difference", "max_seeds", "hours"},
    "draw": {"draw", "output", "figures"},
    "compare": {"compare", "output", "figures", *_QUESTION, *_EXISTING},
    "classify": {"pretrain", "output", "figures", "seeds", "arms", "arm", *_QUESTION, *_LAUNCH},
}
_REFUSES = {
    "plan": "--plan trains nothing: leave out {}",
    "draw": "--draw reads a report alone: leave out {}",
    "compare": "--compare trains nothing: leave out {}",
    "classify": "--pretrain trains classifiers one after the other: leave out {}",
}
# What training does not take.
_ELSEWHERE = (
    (_PLANNING, "{} goes with --plan"),
    (_EXISTING, "--gt, --arm-results and --images go with --compare"),
)


def perform(
    args: argparse.Namespace, defaults: Mapping[str, Any], overrides: Sequence[str] = (), command: Sequence[str] = ()
) -> Measurement | str | None:
    """Does what the options ask for.

    Args:
        args: the options.
        defaults: their values where nothing is given.
        overrides: KEY VALUE ..., for all runs.
        command: the words that start a job of a cluster, without the options of the cluster.

    Returns:
        what was measured; of a plan its words, in Markdown. None for one run alone, and where other workers still have
        runs.

    Raises:
        UserError: options that do not go together, or something else that the user can put right.
        RunFailed, Stopped: as :func:`.api.measure_gain`.
    """
    kind = kind_of(args)
    check_options(kind, args, defaults, overrides)
    does: dict[str, Callable[[], Measurement | str | None]] = {
        "plan": lambda: plan(args),
        "draw": lambda: draw_report(args.draw, args.output),
        "compare": lambda: compare(args),
        "classify": lambda: classify(args),
        "train": lambda: train(args, overrides, command),
    }
    return does[kind]()


def kind_of(args: argparse.Namespace) -> str:
    """What is asked for: "plan", "draw", "compare", "classify" or "train"."""
    for kind in ("plan", "draw", "compare"):
        if getattr(args, kind):
            return kind
    return "classify" if args.metric in CLASSIFIED or args.pretrain is not None else "train"


def check_options(
    kind: str, args: argparse.Namespace, defaults: Mapping[str, Any], overrides: Sequence[str] = ()
) -> None:
    """Checks that options go together, as far as they tell by themselves.

    Args:
        kind: as :func:`kind_of` has it.
        args, defaults, overrides: as in :func:`perform`.

    Raises:
        UserError: they do not.
    """
    found = [name for name, value in vars(args).items() if name in defaults and repr(value) != repr(defaults[name])]
    if kind != "plan" and args.output is None:
        raise UserError("give the folder of the runs and the report with --output DIR")
    if kind == "classify" and args.metric not in CLASSIFIED:
        raise UserError(f"--pretrain trains classifiers: give --metric {' or '.join(CLASSIFIED)}")
    if kind == "classify" and args.pretrain is None:
        raise UserError(
            f"--metric {args.metric} is of classifiers: train them by --pretrain and options of tools/pretrain.py, or "
            "give --compare and --arm-results NAME FOLDER for each arm"
        )
    if kind in _TAKES:
        idle = [_option(name) for name in found if name not in _TAKES[kind]] + ["KEY VALUE"] * bool(overrides)
        if idle:
            raise UserError(_REFUSES[kind].format((" " if kind == "compare" else ", ").join(idle)))
        return
    for names, sentence in _ELSEWHERE:
        if idle := [_option(name) for name in found if name in names]:
            raise UserError(sentence.format(", ".join(idle)))
    if args.cluster is None and "hours" in found:
        raise UserError("--hours goes with --plan or --cluster")
    if args.decide is not None and "margin" in found:
        raise UserError("--decide names the margin: leave out --margin")
    for alone in ("report_only", "run"):
        if getattr(args, alone) and "jobs" in found:
            raise UserError(f"{_option(alone)} goes without --jobs")


def _option(name: str) -> str:
    return "--import" if name == "imports" else f"--{name.replace('_', '-')}"


def question_of(args: argparse.Namespace) -> Question:
    """What is to be answered."""
    margin = args.margin if args.decide is None else args.decide
    return Question(args.metric, margin, not args.unpaired, args.difference)


def looks_of(args: argparse.Namespace) -> Looks | None:
    """The rule by which seeds are added; None for those that are given.

    Raises:
        UserError: the rule is none, or something does not go with it.
    """
    alone = {"--run": args.run, "--report-only": args.report_only}
    alone |= {"--no-wait": args.no_wait, "--keep-going": args.keep_going}
    if args.until == 0 and args.decide is None:
        if args.max_seeds is not None:
            raise UserError("--max-seeds goes with --until or --decide")
        chosen = [option for option, value in alone.items() if value]
        if (args.run and len(chosen) > 1) or (args.report_only and len(chosen) > 1):
            raise UserError(f"{chosen[0]} goes without {', '.join(chosen[1:])}")
        return None
    if given := [option for option, value in alone.items() if value]:
        raise UserError(f"--until and --decide train whatever is needed: leave out {', '.join(given)}")
    if args.num_machines > 1:
        raise UserError("--until and --decide go with one machine a run: the others do not see the answers")
    if args.decide is not None and not args.decide > 0:
        raise UserError(f"--decide {args.decide} must be a difference in AP points above 0")
    looks = Looks(
        len(args.seeds) if args.seeds else FIRST_SEEDS,
        MOST_SEEDS if args.max_seeds is None else args.max_seeds,
        args.until,
        args.decide is not None,
    )
    looks.check()
    return looks


def seeds_of(args: argparse.Namespace, looks: Looks | None) -> list[int]:
    """The seeds: those that are given, or declared, or the first ones, with those that may be added.

    Raises:
        UserError: what was declared cannot be read.
    """
    seeds = args.seeds or _default_seeds(args, looks)
    if looks is None:
        return seeds
    return [*seeds, *(seed for seed in range(max(seeds) + 1 + looks.most) if seed not in seeds)][: looks.most]


def _default_seeds(args: argparse.Namespace, looks: Looks | None) -> list[int]:
    if args.run and args.run[1].isdecimal():
        return [int(args.run[1])]
    if looks:
        return list(range(looks.first))
    plan = declared(args.output) if args.report_only else None
    return plan["seeds"] if plan else [0]


def cluster_of(args: argparse.Namespace, overrides: Sequence[str], command: Sequence[str]) -> Cluster | None:
    """Where the runs go as jobs; None for this machine.

    Args:
        overrides, command: as in :func:`perform`.

    Raises:
        UserError: something does not go with jobs.
    """
    if args.cluster != "slurm" and (args.partition or args.sbatch):
        raise UserError("--partition and --sbatch go with --cluster slurm")
    if args.cluster is None:
        return None
    alone = {"--run": args.run, "--report-only": args.report_only, "--num-machines": args.num_machines > 1}
    alone |= {"--until": args.until, "--decide": args.decide is not None, "--jobs": args.jobs > 1}
    if given := [option for option, value in alone.items() if value]:
        raise UserError(f"--cluster makes a job of each run: leave out {', '.join(given)}")
    hours = 24.0 if math.isnan(args.hours) else args.hours
    if not 0 < hours < 24 * 365:
        raise UserError(f"--hours {args.hours:g} must be how long a job may take, above 0")
    sbatch = tuple((name, value) for name, value in args.sbatch)
    return Cluster(args.cluster, tuple(command), tuple(overrides), hours, args.num_gpus, args.partition, sbatch)


def train(args: argparse.Namespace, overrides: Sequence[str], command: Sequence[str]) -> Measurement | None:
    """Trains detectors, or reports those that there are; as :func:`perform`."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("measure_gain starts the processes of its runs itself: start it without torchrun")
    args.timeout = TIMEOUT_SECONDS
    cluster = cluster_of(args, overrides, command)
    if cluster is None:
        check_launch(args, None)
    launch = Launch(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url or "auto", tuple(args.imports))
    looks = looks_of(args)
    matrix = Matrix(
        args.config_file,
        args.output,
        arm_names=args.arms or ["plain", "sge"],
        custom_arms=args.arm,
        seeds=seeds_of(args, looks),
        overrides=overrides,
        datasets=args.dataset,
        launch=launch,
        report_only=args.report_only,
    )
    how = {"bootstrap": args.bootstrap, "question": question_of(args), "against": args.against}
    if args.run:
        wanted = _run_asked(matrix, *args.run)  # before anything is declared
        if args.seeds and launch.is_main:
            declare(matrix, how["question"], against=args.against)
        return _run_one(matrix, wanted)
    if not launch.is_main:
        matrix.execute(args.jobs)
        return None
    if args.report_only:
        return report_gain(matrix, **how)
    if looks:
        return decide_gain(matrix, looks, jobs=args.jobs, **how)
    return measure_gain(
        matrix, jobs=args.jobs, wait=not args.no_wait, keep_going=args.keep_going, cluster=cluster, **how
    )


def _run_asked(matrix: Matrix, arm: str, seed: str) -> Run:
    if not seed.isdecimal():
        raise UserError(f"--run {arm} {seed}: give an arm and a seed, for instance --run sge 0")
    return matrix.run_of(arm, int(seed))


def _run_one(matrix: Matrix, wanted: Run) -> None:
    if not wanted.is_ready:
        raise UserError(f"{wanted.name} starts from {wanted.reference.name}, which has not finished: run that first")
    if matrix.execute(runs=[wanted], wait=False).left:
        raise UserError(f"{wanted.name} is being trained by another process: wait for it, or end it")


def classify(args: argparse.Namespace) -> Measurement:
    """Trains classifiers; as :func:`perform`."""
    args.timeout = TIMEOUT_SECONDS
    check_launch(args, None)
    from .pretraining import PretrainingMatrix  # needs timm

    setup_logger(name="sge_det")
    seeds = [0] if args.seeds is None else args.seeds
    arms = {"arm_names": args.arms or ["plain", "sge"], "custom_arms": args.arm, "seeds": seeds}
    matrix = PretrainingMatrix(args.pretrain, args.output, **arms)
    how = {"bootstrap": args.bootstrap, "question": question_of(args), "against": args.against}
    return measure_classified_gain(matrix, args, **how)


def plan(args: argparse.Namespace) -> str:
    """How many seeds a comparison takes, in Markdown; as :func:`perform`."""
    check_wanted(args.difference, args.max_seeds, args.hours)
    paired = not args.unpaired
    if args.pilot and args.sd:
        raise UserError("--pilot shows the spread and --sd gives it: leave out one of them")
    if not args.sd and (args.correlation or args.image_error):
        raise UserError("--correlation and --image-error go with --sd")
    if args.pilot:
        outlooks = from_pilot(args.pilot, args.metric, paired=paired)
    elif args.sd:
        numbers = (args.correlation, args.image_error, args.image_count, 2 * args.hours)
        outlooks = [given(args.sd, *numbers, paired=paired)]
    else:
        outlooks = published(2 * args.hours, paired=paired)
    arms, parts = len(outlooks) if args.pilot else 1, []
    for outlook in outlooks:
        parts.append(in_words(outlook))
        parts += [table.markdown() for table in tables(outlook, args.difference, args.max_seeds, arms)]
    return "\n\n".join(parts)


def compare(args: argparse.Namespace) -> Measurement:
    """Compares what exists; as :func:`perform`."""
    classified = args.metric in CLASSIFIED
    if classified and (args.gt or args.images):
        raise UserError(f"--metric {args.metric} is of classified images: leave out --gt and --images")
    if not (args.gt or classified) or not args.arm_results:
        needed = "--arm-results NAME FOLDER" if classified else "--gt INSTANCES.json and --arm-results NAME PRED.json"
        raise UserError(f"--compare needs {needed} for each arm")
    names = [name for name, *_ in args.arm_results]
    if len(set(names)) < len(names):
        raise UserError("--arm-results gives an arm twice: name all files of an arm in one")
    arms = {name: files for name, *files in args.arm_results}
    how = {"bootstrap": args.bootstrap, "question": question_of(args), "against": args.against}
    if classified:
        return compare_classified(arms, args.output, **how)
    return compare_results(args.gt, arms, args.output, image_root=args.images, **how)
