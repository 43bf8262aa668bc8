"""Classifiers trained arm by arm and seed by seed, in ``OUTPUT/<arm>/seed<k>/``, and what is compared of them."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from ..engine.launching import launch
from ..engine.pretraining.loop import pretrain, rehearse
from ..engine.pretraining.options import RESULT, Pretraining, add_options, from_options
from ..errors import UserError
from .arms import check_name
from .classified import check_tells

_SGE = "sge_"
# Of an arm, what each run of it has of its own; of tools/pretrain.py, what is no option of a run.
_OF_A_RUN = ("seed", "output")
_LAUNCH = ("--num-gpus", "--num-machines", "--machine-rank", "--dist-url")
_GOING_ON = ("--resume", "--overwrite")


@dataclass(frozen=True)
class PretrainingArm:
    """An arm: its name, and options of ``tools/pretrain.py`` that are its own, without the dashes."""

    name: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class PretrainingRun:
    """An arm with a seed."""

    arm: PretrainingArm
    seed: int
    pretraining: Pretraining

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed{self.seed}"

    @property
    def finished(self) -> bool:
        return (self.pretraining.folder / RESULT).is_file()


class PretrainingMatrix:
    """All runs of a comparison of classifiers: arms times seeds.

    Args:
        options: of ``tools/pretrain.py``, that the arms share.
        output: the folder of the comparison.
        arm_names: of "plain", "sge", and those of ``custom_arms``; the first is the reference.
        custom_arms: (name, option, value, ...), the options without dashes.
        seeds: a run of each arm for each.

    Raises:
        UserError: an option, an arm or a seed that cannot be.
    """

    def __init__(
        self,
        options: Sequence[str],
        output: str | Path,
        *,
        arm_names: Sequence[str] = ("plain", "sge"),
        custom_arms: Sequence[Sequence[str]] = (),
        seeds: Sequence[int] = (0,),
    ):
        self.output = Path(output)
        self.seeds = list(seeds)
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds {' '.join(map(str, self.seeds))} must be different numbers")
        for word in options:
            option = word.split("=")[0]
            if option in (f"--{name}" for name in _OF_A_RUN):
                raise UserError(f"{word} is set for each run: leave it out after --pretrain")
            if option in _LAUNCH:
                raise UserError(f"{word} is of all runs: give it before --pretrain")
            if option in _GOING_ON:
                raise UserError(
                    f"{word} is of a single run: leave it out after --pretrain, since the same command goes on where "
                    "it stopped, and another --output starts anew"
                )
        shared = _parsed(options)
        model = shared.model.removeprefix(_SGE)
        known = {
            "plain": PretrainingArm("plain", ("model", model)),
            "sge": PretrainingArm("sge", ("model", _SGE + model)),
        }
        for name, *own in custom_arms:
            if len(own) % 2 or name in known:
                raise UserError(f"--arm {' '.join((name, *own))}: give a name of its own and pairs of OPTION VALUE")
            check_name(name)
            if taken := [key for key in own[::2] if key in _OF_A_RUN]:
                raise UserError(f"--arm {' '.join((name, *own))}: {taken[0]} is set for each run, leave it out")
            known[name] = PretrainingArm(name, tuple(own))
        names = [*arm_names, *(name for name, *_ in custom_arms if name not in arm_names)]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--arms: there is no arm {', '.join(unknown)} of classifiers among {', '.join(known)}")
        if len(set(names)) < len(names) or len(names) < 2:
            raise UserError(f"--arms {' '.join(names)}: name at least two arms, each once")
        self.arms = [known[name] for name in names]
        self._check_arms_differ(options, model)
        self.runs = [PretrainingRun(arm, seed, self._run(options, arm, seed)) for seed in seeds for arm in self.arms]

    def _check_arms_differ(self, options: Sequence[str], model: str) -> None:
        seen: dict[str, PretrainingArm] = {}
        for arm in self.arms:
            run = replace(self._run(options, arm, 0), output="")
            if not run.model.startswith(_SGE):
                run = replace(run, groups=0, sge_lr_factor=0.0)  # without SGE they say nothing
            same = seen.setdefault(repr(run), arm)
            if same is not arm:
                raise UserError(
                    f"the arms {same.name} and {arm.name} would train the same: there is nothing to compare (what "
                    f"tunes SGE goes with the model that has it: --arm {arm.name} model {_SGE}{model} ...)"
                )

    def _run(self, options: Sequence[str], arm: PretrainingArm, seed: int) -> Pretraining:
        own = [word for key, value in zip(arm.options[::2], arm.options[1::2]) for word in (f"--{key}", value)]
        try:
            run = _parsed([*options, *own])
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from error
        return replace(run, seed=seed, output=str(self.output / arm.name / f"seed{seed}"))

    def check(self, launch_options: argparse.Namespace, metric: str) -> None:
        """Builds on trial what the arms would train, before the first of them takes its hours.

        Args:
            launch_options: as :meth:`execute` takes them.
            metric: that is to be compared.

        Raises:
            UserError: something that the user can put right.
        """
        for run in self.runs:
            run.pretraining.check(launch_options.num_gpus * launch_options.num_machines)
        for arm in self.arms:
            left = next((run for run in self.runs if run.arm == arm and not run.finished), None)
            if left is None:
                continue
            try:
                classes = rehearse(left.pretraining)
            except UserError as error:
                raise UserError(f"arm {arm.name}: {error}") from error
            check_tells(metric, classes)

    def execute(self, launch_options: argparse.Namespace) -> None:
        """Trains what is not finished, one after the other; runs that were interrupted go on.

        Args:
            launch_options: as of ``tools/pretrain.py``: ``num_gpus``, ``num_machines``, ...

        Raises:
            UserError: something that the user can put right.
            Stopped: a signal asked for the end; a checkpoint is there.
        """
        world = launch_options.num_gpus * launch_options.num_machines
        for run in self.runs:
            launch_options.pretraining = run.pretraining
            if world == 1:
                _train(launch_options)
            else:
                launch(_train, launch_options)

    def folders(self, names: Sequence[str]) -> dict[str, list[Path]]:
        """The folders of the runs by arm, in the order of the seeds."""
        return {name: [run.pretraining.folder for run in self.runs if run.arm.name == name] for name in names}


def _train(args: argparse.Namespace) -> None:
    pretrain(args.pretraining, resume=True)


def _parsed(options: Sequence[str]) -> Pretraining:
    parser = _Options(add_help=False, allow_abbrev=False)
    add_options(parser)
    return from_options(parser.parse_args([*options, "--output", "-"]))


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"--pretrain takes the options of tools/pretrain.py, after those of measure_gain.py: {message}")
