"""The runs of a comparison on disk: ``OUTPUT/<arm>/seed<k>/``, resumed, divided among workers, never mixed."""

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import detectron2
import filelock
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from .. import __version__
from ..checkpoint import transplant_file
from ..config import find_config
from ..engine.doctor import tell
from ..engine.training import setup_config
from ..errors import UserError
from ..files import cannot_write, disk_full, is_disk_full, write_json
from .arms import Arm, choose_arms, examine_arms
from .run import RESULT_FILE, import_modules

FINGERPRINT_FILE = "fingerprint.json"
START_FILE = "start.pth"
# They say where and how fast a run goes, not what comes out of it.
_FREE_KEYS = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD", "VIS_PERIOD"),
    "MODEL.SGE.LOG_PERIOD",
)
# Points of the AP learning curve, where the config does not say how often to evaluate.
_EVALUATIONS = 4
_POLL_SECONDS = 0.5
# Between two lines of progress in a file.
_LOG_SECONDS = 30.0


class RunFailed(RuntimeError):
    """A run ended with an error that is not the user's: names the run, its log and the log's last line."""


@dataclass(frozen=True)
class Launch:
    """How each run is started; the fields are those of ``detectron2.engine.launch``.

    Attributes:
        imports: modules that each run imports first, for what they register.
    """

    num_gpus: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"
    imports: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this machine records the runs that it takes part in."""
        return self.machine_rank == 0


@dataclass
class Run:
    """One arm with one seed.

    Attributes:
        config: the resolved config.
        command: the arguments of :mod:`.run`.
        fingerprint: the config, the data sets and the versions that it is made from.
        reference: the run whose weights, transplanted, it starts from.
    """

    arm: Arm
    seed: int
    folder: Path
    config: CfgNode
    command: list[str]
    fingerprint: dict = field(repr=False)
    reference: "Run | None" = None

    @property
    def name(self) -> str:
        return f"{self.arm.name}/seed{self.seed}"

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT_FILE).is_file()

    @property
    def is_ready(self) -> bool:
        """Whether the weights that it starts from are there."""
        return self.reference is None or bool(self.reference.config.MODEL.WEIGHTS) or self.reference.finished

    @property
    def start(self) -> Path:
        """The transplanted weights that it starts from, if it is of an arm that does."""
        return self.folder / START_FILE

    def make_start(self) -> None:
        """Transplants the weights of its reference, unless that has been done.

        Raises:
            UserError: they are not there, or cannot be transplanted.
        """
        if self.reference is None or self.start.is_file():
            return
        weights = self.reference.config.MODEL.WEIGHTS or str(self.reference.folder / "model_final.pth")
        if "://" not in weights and not Path(weights).is_file():
            raise UserError(
                f"{self.name} starts from {weights}, which is not there: remove {self.reference.folder / RESULT_FILE} "
                "and run the same command again to train it anew"
            )
        transplant_file(weights, str(self.start), cfg=self.config)

    @property
    def iterations(self) -> int:
        return self.config.SOLVER.MAX_ITER

    @property
    def iterations_done(self) -> int:
        """Iterations that the run has logged; they are written every 20."""
        if self.finished:
            return self.iterations
        try:
            with open(self.folder / "metrics.json", "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(file.tell() - 8192, 0))
                logged = re.findall(rb'"iteration": (\d+)', file.read())
        except OSError:
            return 0
        return min(int(logged[-1]) + 1, self.iterations) if logged else 0

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    @property
    def predictions(self) -> Path:
        """The detections on the validation images, in COCO's result format."""
        return self.folder / "inference" / "coco_instances_results.json"

    def result(self) -> dict:
        """What the finished run recorded: ``{"schema", "seconds", "results", "gates", "pointing"}``."""
        return json.loads((self.folder / RESULT_FILE).read_text())

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """What the run logged: by "total_loss", "bbox/AP", "segm/AP" (points), pairs of iteration and value."""
        found: dict[str, dict[int, float]] = {}
        try:
            lines = (self.folder / "metrics.json").read_text(errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut off when the run was killed
                continue
            for key in ("total_loss", "bbox/AP", "segm/AP"):
                if key in record and math.isfinite(record[key]):
                    # iterations that were repeated after an interruption count once
                    found.setdefault(key, {})[min(record["iteration"] + 1, self.iterations)] = record[key]
        for task, metrics in self.result()["results"].items():
            if metrics.get("AP") is not None:
                found.setdefault(f"{task}/AP", {})[self.iterations] = metrics["AP"]
        return {key: sorted(points.items()) for key, points in found.items()}

    def check(self) -> None:
        """Checks that what lies in the folder was made by this very run.

        Raises:
            UserError: it was made from something else; names the first difference.
        """
        try:
            found = json.loads((self.folder / FINGERPRINT_FILE).read_text())
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / FINGERPRINT_FILE} cannot be read: {error}") from error
        difference = next(_differences(found, self.fingerprint), None)
        if difference:
            raise UserError(
                f"{self.folder} holds a run made with {difference}: give the same command, or name another --output"
            )


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
        launch: Launch = Launch(),
    ):
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
        hashes = _Hashes()
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
                fingerprint = {
                    "config": _what_counts(cfg),
                    "content": hashes.of(cfg),
                    "version": {
                        "sge_det": __version__,
                        "Detectron2": detectron2.__version__,
                        "torch": torch.__version__.split("+")[0],
                    },
                    "processes": launch.num_gpus * launch.num_machines,
                }
                if reference is not None:
                    fingerprint["start"] = reference.fingerprint["config"]
                    cfg.MODEL.WEIGHTS = str(folder / START_FILE)
                    command += ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS]
                self.runs.append(Run(arm, seed, folder, cfg, command, fingerprint, reference))
        for run in self.runs:
            run.check()

    @cached_property
    def annotation_file(self) -> Path:
        """The annotations of the validation set."""
        return Path(MetadataCatalog.get(self.config.DATASETS.TEST[0]).json_file)

    @cached_property
    def image_root(self) -> Path:
        """The images of the validation set."""
        return Path(MetadataCatalog.get(self.config.DATASETS.TEST[0]).image_root)

    def execute(self, jobs: int = 1) -> None:
        """Brings every run to its end, here or in other workers that share the folder.

        Shows the progress of all runs together, and a line for each that ends.

        Args:
            jobs: runs at once in this worker; they share the cores and the GPUs.

        Raises:
            UserError: a run found a mistake of the user's.
            RunFailed: a run failed otherwise. The others that this worker has going end; they can be resumed.
        """
        if jobs < 1:
            raise UserError(f"--jobs must be at least 1, got {jobs}")
        if self.launch.num_machines > 1 and jobs > 1:
            raise UserError("--jobs goes with one machine a run: leave out --num-machines, or --jobs")
        pending = [run for run in self.runs if not run.finished]
        for run in self.runs:
            if run.finished:
                print(f"kept {_summary(run)}", flush=True)
        if not pending:
            return
        active: dict[int, _Process] = {}
        waiting = False
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [process.stop() for process in active.values()])
            bar = stack.enter_context(_progress_bar(self.runs))
            while pending or active:
                for slot, process in list(active.items()):
                    if process.ended():
                        del active[slot]
                        bar.write(f"finished {_summary(process.run)}")
                for slot in [slot for slot in range(jobs) if slot not in active]:
                    process = self._claim(pending, slot, jobs)
                    if process is not None:
                        active[slot] = process
                        bar.write(f"started {process.run.name}, log in {process.run.log}")
                if pending and not active and not waiting:
                    bar.write(f"waiting for {', '.join(run.name for run in pending)}: another worker has them")
                    waiting = True
                bar.set_postfix_str(", ".join(_state(process.run) for process in active.values()), refresh=False)
                bar.update(sum(run.iterations_done for run in self.runs) - bar.n)
                if sys.stderr.isatty():
                    bar.refresh()  # so that the clock runs
                if pending or active:
                    time.sleep(_POLL_SECONDS)

    def _claim(self, pending: list[Run], slot: int, jobs: int) -> "_Process | None":
        """Starts the first pending run that no other worker has; takes those that are finished off the list."""
        for run in list(pending):
            if run.finished:
                pending.remove(run)
                continue
            if not run.is_ready or not (self.launch.is_main or run.reference is None or run.start.is_file()):
                continue
            lock = None
            try:
                run.folder.mkdir(parents=True, exist_ok=True)
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
                process = _Process(run, lock, self.launch, slot, jobs)
            except BaseException:
                if lock:
                    lock.release()
                raise
            pending.remove(run)
            return process
        return None


class _Process:
    """A run that is going on in a process of its own."""

    def __init__(self, run: Run, lock: filelock.BaseFileLock | None, launch: Launch, slot: int, jobs: int):
        self.run, self.lock = run, lock
        environment = os.environ.copy()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(cores // (jobs * max(launch.num_gpus, 1)), 1)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        gpus = torch.cuda.device_count()
        if jobs > 1 and gpus >= jobs * launch.num_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
            own = visible[slot * launch.num_gpus : (slot + 1) * launch.num_gpus]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        try:
            with open(run.log, "ab") as log:
                self.start_of_log = log.tell()
                # stdin stays open as long as this process lives; the run ends when it closes
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "sge_det.gain.run", *run.command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=environment,
                    start_new_session=True,
                )
        except OSError as error:
            raise cannot_write(run.log, error) from error

    def ended(self) -> bool:
        """Whether the run has ended well; its lock is free then.

        Raises:
            UserError, RunFailed: it has ended, but not well.
        """
        code = self.process.poll()
        if code is None:
            return False
        self._release()
        is_finished = self.run.finished or self.lock is None
        if code == 0 and is_finished:
            return True
        with open(self.run.log, "rb") as log:
            log.seek(self.start_of_log)
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if code == 2 and errors:
            raise UserError(f"{self.run.name}: {errors[-1]}")
        if is_disk_full(self.run.folder):
            raise disk_full(self.run.folder)
        what = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"failed (exit {code})"
        last = lines[-1].strip() if lines else "(empty)"
        raise RunFailed(f"{self.run.name} {what}; its log is {self.run.log}, which ends with: {last}")

    def stop(self) -> None:
        if self.process.poll() is None:  # otherwise its number may be another process's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._release()

    def _release(self) -> None:
        self.process.stdin.close()
        if self.lock is not None:
            self.lock.release()


class _Hashes:
    """Content hashes of data sets and weights, each read once."""

    def __init__(self):
        self.known: dict[str, str] = {}

    def of(self, cfg: CfgNode) -> dict[str, str]:
        """The hashes of what ``cfg`` trains from, by name."""
        hashes = {name: self._dataset(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)}
        weights = cfg.MODEL.WEIGHTS
        if weights and Path(weights).is_file():
            hashes["MODEL.WEIGHTS"] = self._file(weights)
        return hashes

    def _dataset(self, name: str) -> str:
        """Of the annotations, and of the names and sizes of their images."""
        if name not in self.known:
            metadata = MetadataCatalog.get(name)
            if metadata.get("json_file") is None or metadata.get("image_root") is None:
                raise UserError(
                    f"the data set {name} is not in COCO's format on disk: the gain cannot be measured on it"
                )
            digest = hashlib.sha256(self._file(metadata.json_file).encode())
            try:
                for image in json.loads(Path(metadata.json_file).read_bytes())["images"]:
                    size = os.stat(os.path.join(metadata.image_root, image["file_name"])).st_size
                    digest.update(f"{image['file_name']} {size}\n".encode())
            except FileNotFoundError as error:
                raise UserError(f"data set {name}: the image {error.filename} is not there") from error
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{metadata.json_file} is not in COCO's format: {error}") from error
            self.known[name] = digest.hexdigest()
        return self.known[name]

    def _file(self, path: str) -> str:
        if path not in self.known:
            try:
                with open(path, "rb") as file:
                    digest = hashlib.sha256()
                    while block := file.read(1 << 20):
                        digest.update(block)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            self.known[path] = digest.hexdigest()
        return self.known[path]


def _checked_seeds(seeds: Sequence[int]) -> list[int]:
    if not seeds:
        raise UserError("--seeds needs at least one seed")
    for seed in seeds:
        if seed < 0 or list(seeds).count(seed) > 1:
            raise UserError(f"--seeds must be different numbers from 0 on, got {' '.join(map(str, seeds))}")
    return list(seeds)


def _what_counts(cfg: CfgNode) -> dict[str, str]:
    """The keys that a run's outcome depends on: what tunes SGE does not touch a detector without it."""
    options, section = cfg.MODEL.SGE, "MODEL.SGE."
    if not options.ENABLED:
        own = {f"{section}ENABLED"}
    elif options.ATTENTION != "sge":
        own = {f"{section}{key}" for key in ("ENABLED", "ATTENTION", "STAGES")}
    else:
        own = {f"{section}{key}" for key in options}
    return {
        key: value for key, value in _flat(cfg) if key not in _FREE_KEYS and (key in own or not key.startswith(section))
    }


def _flat(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, repr(value)


def _differences(found: dict, wanted: dict) -> Iterator[str]:
    for part in ("config", "start", "content", "version"):
        there, here = found.get(part, {}), wanted.get(part, {})
        for key in [*here, *(key for key in there if key not in here)]:
            if there.get(key) != here.get(key):
                if part == "content":
                    yield f"another content of {key}"
                elif part == "start":
                    yield f"weights of a run with {key} {there.get(key, 'absent')}, here {here.get(key, 'absent')}"
                else:
                    yield f"{key} {there.get(key, 'absent')}, this command has {here.get(key, 'absent')}"
    if found.get("processes") != wanted["processes"]:
        yield f"{found.get('processes')} processes, this command has {wanted['processes']}"


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


def _summary(run: Run) -> str:
    if not run.finished:
        return run.name
    result = run.result()
    scores = [f"{task} AP {_points(values.get('AP'))}" for task, values in result["results"].items() if "AP" in values]
    return f"{run.name}: {', '.join(scores)}, {result['seconds'] / 60:.1f} min"


def _points(value: float | None) -> str:
    return "absent" if value is None else f"{value:.1f}"
