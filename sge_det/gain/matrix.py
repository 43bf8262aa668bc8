"""The runs of a comparison: planned, divided among workers, never mixed. ``OUTPUT/<arm>/seed<k>/`` holds each."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import filelock
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from ..config import find_config
from ..engine.doctor import tell
from ..engine.fingerprint import FINGERPRINT_FILE, Contents, fingerprint
from ..engine.stopping import asked, waiting
from ..engine.training import setup_config
from ..errors import Stopped, UserError
from ..files import cannot_write, check_folder, make_folder, write_json
from .arms import choose_arms, examine_arms
from .processes import Launch, RunFailed, RunProcess
from .run import START_FILE, Run
from .worker import import_modules

# Points of the AP learning curve, where the config does not say how often to evaluate.
_EVALUATIONS = 4
_POLL_SECONDS = 0.5
# Between two lines of progress in a file.
_LOG_SECONDS = 30.0


@dataclass
class Execution:
    """What was not brought to its end by :meth:`Matrix.execute`.

    Attributes:
        failed: the errors by the name of the run, where others were to go on nevertheless.
        left: the runs that another worker has, or that wait for one of those, where they were not to be waited for.
    """

    failed: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class Matrix:
    """All runs of a comparison: arms times seeds.

    Args:
        config_file: the config that the arms share.
        output: the folder of the comparison.
        arm_names, custom_arms: as in :func:`.arms.choose_arms`.
        seeds: a run of each arm for each.
        overrides: KEY VALUE ..., for all runs.
        datasets: (name, annotation JSON, image folder) triples.
        launch: how each run is started.
        report_only: nothing is to be trained: what is there may be of another version, if it is all of the same.

    Raises:
        UserError: anything that cannot work, as far as it can be known before training; a folder that holds a run of
            another config, data set or version.
    """

    def __init__(
        self,
        config_file: str,
        output: str | Path,
        *,
        arm_names: Sequence[str] = ("plain", "sge"),
        custom_arms: Sequence[Sequence[str]] = (),
        seeds: Sequence[int] = (0,),
        overrides: Sequence[str] = (),
        datasets: Sequence[Sequence[str]] = (),
        launch: Launch | None = None,
        report_only: bool = False,
    ):
        launch = launch or Launch()
        check_folder(output, "--output")
        import_modules(list(launch.imports))
        self.output = Path(output)
        self.overrides = list(overrides)
        self.launch = launch
        self.seeds = _checked_seeds(seeds)
        config_file = find_config(config_file) if config_file else config_file
        self.config_file = config_file
        self.config = setup_config(config_file, overrides, datasets)
        for key in ("OUTPUT_DIR", "SEED"):
            if key in overrides[::2]:
                raise UserError(f"{key} is set for each run: use {'--output' if key == 'OUTPUT_DIR' else '--seeds'}")
        if len(self.config.DATASETS.TEST) != 1:
            raise UserError(
                f"the gain is measured on one validation set: set DATASETS.TEST, {self.config.DATASETS.TEST}, to one"
            )
        if self.config.TEST.EVAL_PERIOD == 0:
            period = max(-(-self.config.SOLVER.MAX_ITER // _EVALUATIONS), 1)
            overrides = [*overrides, "TEST.EVAL_PERIOD", str(period)]
            self.config.TEST.EVAL_PERIOD = period
        self.arms = choose_arms(self.config, arm_names, custom_arms)
        tell(examine_arms(self.arms, self.config))
        contents = Contents()
        self.runs = []
        # seed by seed, so that pairs are complete as early as can be
        for seed in self.seeds:
            for arm in self.arms:
                folder = self.output / arm.name / f"seed{seed}"
                cfg = arm.config(self.config)
                cfg.SEED, cfg.OUTPUT_DIR = seed, str(folder)
                own = ["OUTPUT_DIR", str(folder), "SEED", str(seed)]
                reference = self.runs[-self.arms.index(arm)] if arm.transplants else None
                command = ["--config-file", config_file, "--num-gpus", str(launch.num_gpus)]
                command += ["--num-machines", str(launch.num_machines), "--machine-rank", str(launch.machine_rank)]
                command += ["--dist-url", launch.dist_url]
                command += [item for name in launch.imports for item in ("--import", name)]
                command += [item for triple in datasets for item in ("--dataset", *triple)]
                command += [*overrides, *arm.overrides, *own]
                made_from = fingerprint(cfg, contents, launch.num_gpus * launch.num_machines, launch.imports)
                if reference is not None:
                    made_from["start"] = reference.fingerprint["config"]
                    cfg.MODEL.WEIGHTS = str(folder / START_FILE)
                    command += ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS]
                self.runs.append(Run(arm, seed, folder, cfg, command, made_from, reference))
        code = self._common_code() if report_only else None
        for run in self.runs:
            run.check(code)

    def _common_code(self) -> dict:
        """The versions and sources of the first run that there is, which need not be those of here to be reported."""
        for run in self.runs:
            if run.finished and (found := run.made_with()):
                return {part: found[part] for part in ("version", "source") if part in found}
        return {}

    @cached_property
    def annotation_file(self) -> Path:
        """The annotations of the validation set."""
        return Path(MetadataCatalog.get(self.config.DATASETS.TEST[0]).json_file)

    @cached_property
    def image_root(self) -> Path:
        """The images of the validation set."""
        return Path(MetadataCatalog.get(self.config.DATASETS.TEST[0]).image_root)

    def run_of(self, arm: str, seed: int) -> Run:
        """The run of an arm and a seed.

        Raises:
            UserError: there is none.
        """
        for run in self.runs:
            if (run.arm.name, run.seed) == (arm, seed):
                return run
        raise UserError(
            f"there is no run {arm} {seed}: the arms are {', '.join(arm.name for arm in self.arms)}, the seeds "
            f"{', '.join(map(str, self.seeds))}"
        )

    def complete_seeds(self) -> list[int]:
        """The seeds of which every arm has finished."""
        return [seed for seed in self.seeds if all(run.finished for run in self.runs if run.seed == seed)]

    def execute(
        self, jobs: int = 1, *, runs: Sequence[Run] | None = None, wait: bool = True, keep_going: bool = False
    ) -> Execution:
        """Brings every run to its end, here or in other workers that share the folder.

        Shows the progress of all runs together, and a line for each that ends.

        Args:
            jobs: runs at once in this worker; they share the cores and the GPUs.
            runs: those that are wanted; all by default.
            wait: for the runs that other workers have.
            keep_going: a run that fails does not end the others.

        Raises:
            UserError: a run found a mistake of the user's.
            RunFailed: a run failed otherwise. The others that this worker has going end; they can be resumed. With
                ``keep_going`` neither is raised.
            Stopped: a signal asked for it, and the steps that were going on have ended with checkpoints.
        """
        if jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {jobs}")
        if self.launch.num_machines > 1 and jobs > 1:
            raise UserError("--jobs goes with one machine a run: leave out --num-machines, or --jobs")
        result = Execution()
        wanted = self.runs if runs is None else list(runs)
        pending = [run for run in wanted if not run.finished]
        for run in wanted:
            if run.finished:
                print(f"kept {summary(run)}", flush=True)
        if not pending:
            return result
        active: dict[int, RunProcess] = {}
        told = False
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [process.stop() for process in active.values()])
            bar = stack.enter_context(_progress_bar(wanted))
            stack.enter_context(waiting())
            while pending or active:
                if asked() is not None:
                    self._end_early(active)
                for slot, process in list(active.items()):
                    try:
                        if process.ended():
                            del active[slot]
                            bar.write(f"finished {summary(process.run)}")
                    except (UserError, RunFailed) as error:
                        if not keep_going:
                            raise
                        del active[slot]
                        result.failed[process.run.name] = str(error)
                        bar.write(f"failed, the others go on: {error}")
                for slot in [slot for slot in range(jobs) if slot not in active]:
                    process = self._claim(pending, slot, jobs, result.failed if keep_going else None)
                    if process is not None:
                        active[slot] = process
                        bar.write(f"started {process.run.name}, log in {process.run.log}")
                if pending and not active and not wait:
                    result.left = [run.name for run in pending]
                    break
                if pending and not active and not told:
                    bar.write(f"waiting for {', '.join(run.name for run in pending)}: another worker has them")
                    told = True
                bar.set_postfix_str(", ".join(_state(process.run) for process in active.values()), refresh=False)
                bar.update(sum(run.iterations_done for run in wanted) - bar.n)
                if sys.stderr.isatty():
                    bar.refresh()  # so that the clock runs
                if pending or active:
                    time.sleep(_POLL_SECONDS)
        return result

    def _end_early(self, active: dict[int, RunProcess]) -> None:
        for process in active.values():
            process.ask_to_stop()
        while active:
            for slot, process in list(active.items()):
                if process.ended():
                    del active[slot]
            time.sleep(_POLL_SECONDS)
        raise Stopped(asked())

    def _claim(
        self, pending: list[Run], slot: int, jobs: int, failed: dict[str, str] | None = None
    ) -> "RunProcess | None":
        """Starts the first pending run that no other worker has; takes those that are finished off the list.

        Args:
            failed: takes the errors of runs that cannot be started, in place of raising them.
        """
        for run in list(pending):
            if run.finished:
                pending.remove(run)
                continue
            if failed and run.reference is not None and run.reference.name in failed:
                pending.remove(run)
                failed[run.name] = f"{run.name} starts from {run.reference.name}, which has failed"
                continue
            if not run.is_ready or not (self.launch.is_main or run.reference is None or run.start.is_file()):
                continue
            lock = None
            try:
                make_folder(run.folder)
                if self.launch.is_main:
                    lock = filelock.FileLock(run.folder / ".claim.lock")
                    lock.acquire(blocking=False)
            except filelock.Timeout:
                continue
            except OSError as error:
                raise cannot_write(run.folder, error) from error
            try:
                if run.finished:  # by another worker, just now
                    pending.remove(run)
                    if lock:
                        lock.release()
                    continue
                run.check()
                if self.launch.is_main:
                    write_json(run.folder / FINGERPRINT_FILE, run.fingerprint)
                    run.make_start()
                process = RunProcess(run, lock, self.launch, slot, jobs)
            except BaseException as error:
                if lock:
                    lock.release()
                if failed is None or not isinstance(error, UserError):
                    raise
                pending.remove(run)
                failed[run.name] = str(error)
                continue
            pending.remove(run)
            return process
        return None


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    if not seeds:
        raise UserError("--seeds needs at least one seed")
    for seed in seeds:
        if seed < 0 or list(seeds).count(seed) > 1:
            raise UserError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, seeds))}")
    return list(seeds)


def _progress_bar(runs: list[Run]) -> tqdm:
    # smoothing=0: the rate that the ETA follows is the mean over all that this worker has seen
    return tqdm(
        total=sum(run.iterations for run in runs),
        initial=sum(run.iterations_done for run in runs),
        smoothing=0,
        unit="it",
        desc=f"{len(runs)} runs",
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else _LOG_SECONDS,
        miniters=0,
    )


def _state(run: Run) -> str:
    done = run.iterations_done
    return f"{run.name} {'evaluating' if done == run.iterations else f'{done}/{run.iterations}'}"


def summary(run: Run) -> str:
    """A run in a line: its scores and how long it took, once it has finished."""
    if not run.finished:
        return run.name
    result = run.result()
    scores = [f"{task} AP {_points(values.get('AP'))}" for task, values in result["results"].items() if "AP" in values]
    return f"{run.name}: {', '.join(scores)}, {result['seconds'] / 60:.1f} min"


def _points(value: float | None) -> str:
    return "absent" if value is None else f"{value:.1f}"
