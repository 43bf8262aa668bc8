"""Ends the tools at every single operation on files, follows the advice that they print, and compares what comes out.

    torture.py --results output/torture.jsonl             # all of it; run again, it goes on
    torture.py --programs train convert --every 50        # a sample

For training, evaluation, pretraining, measure_gain and convert_weights, one run is recorded first: its n operations
(faulty_files.py says which). Then for k = 1 ... n, in an empty folder each time:

kill     the process is killed in the middle of operation k: what the k - 1 before it made is there, and half of a write
ENOSPC   operation k fails, and so does all after it that takes room; of a write, half is there
EIO      operation k fails, once
power    the power goes after operation k: only what was synced outlasts it, files and names
names    the same, but names outlast it whether they were synced or not: files that were not are empty

A tool that is not killed must end well, or with one sentence and exit code 2. Then what it advises is done: the same
command again, or with --resume where it says so. A point is survived where that ends well, and where the weights, their
checksums, results and reports are those of a run that nothing happened to, to the byte, and no other file is left.
Times differ, and so do logs; of metrics.json every line must be whole.

Each run is a process that is forked from one that has imported everything. The model is a ResNet-50 with one block a
stage and 8 to 64 channels, which changes nothing in what is done to files but the number of writes to a checkpoint. For
"kill", "power" and "names" the files are laid out from the record, which is checked to give what really lies there in
the end; "SIGKILL" sends the signal. What is done from files that are the same, logs aside, is done once.
"""

import argparse
import contextlib
import ctypes
import hashlib
import importlib
import io
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter as Tally
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import matplotlib.figure  # noqa: F401  imported by the tools when they need it
import torch
import torch.utils.tensorboard
from detectron2.modeling.backbone import ResNet
from faulty_files import Counter, Disk, Faults, read_record
from forked_python import leave
from PIL import Image
from safetensors import safe_open

import sge_det.engine.logs
import sge_det.gain.matrix
import sge_det.gain.processes
from sge_det.data.sample import make_sample_coco
from sge_det.gain import worker

ROOT = Path(__file__).resolve().parents[2]
# What becomes of the files themselves, and whether only names, and bytes, that were synced are left.
LAID_OUT = {"kill": (False, False), "power": (True, True), "names": (False, True)}
KINDS = ("kill", "ENOSPC", "EIO", "power", "names")
LONGEST_SECONDS = 180
TIMES = ("seconds", "stretches", "device_seconds", "cost")
# Logs, locks, and a file of Detectron2's that nobody reads. All else outlasts a power cut once a tool has ended.
NOT_SYNCED = ("log.txt", "metrics.json", ".run.lock", ".claim.lock", "instances_predictions.pth")
ATTEMPTS = 3

MICRO = [
    *(
        "INPUT.MIN_SIZE_TRAIN",
        "(64,)",
        "INPUT.MIN_SIZE_TEST",
        "64",
        "SOLVER.IMS_PER_BATCH",
        "2",
        "SOLVER.OPTIMIZER",
        "SGD",
    ),
    *("SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "MODEL.FPN.OUT_CHANNELS", "8", "MODEL.SGE.GROUPS", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"),
    *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "2", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "10"),
    *("MODEL.RPN.POST_NMS_TOPK_TEST", "5"),
]
CONFIG = ["--config-file", "sample/faster_rcnn_SGE_R_50_FPN.yaml"]


@dataclass(frozen=True)
class Program:
    """A tool with its arguments; it runs in a folder of its own.

    Attributes:
        before: files that it starts from -> where they come from.
    """

    tool: str
    arguments: tuple[str, ...]
    before: tuple[tuple[str, str], ...] = ()


def programs(data: Path) -> dict[str, Program]:
    datasets = []
    for split in ("train", "val"):
        datasets += ["--dataset", f"tiny_{split}", str(data / f"set/annotations/instances_{split}.json")]
        datasets += [str(data / "set" / split)]
    trained = ("weights.pth", str(data / "trained.pth")), ("weights.pth.sha256.json", str(data / "trained.json"))
    plain = (("plain.pth", str(data / "plain.pth")),)
    transplant = (*CONFIG, "--transplant")
    return {
        "train": Program("train_net", (*CONFIG, *datasets, *MICRO, "OUTPUT_DIR", "out")),
        "overwrite": Program(
            "train_net",
            (*CONFIG, *datasets, *MICRO, "SEED", "1", "OUTPUT_DIR", "out", "--overwrite"),
            tuple((f"out/{path.name}", str(path)) for path in (data / "other").glob("*") if path.is_file()),
        ),
        "evaluate": Program(
            "train_net",
            (*CONFIG, *datasets, "--eval-only", *MICRO, "MODEL.WEIGHTS", "weights.pth", "OUTPUT_DIR", "out"),
            trained,
        ),
        "convert": Program("convert_weights", ("plain.pth", "made/sge.pth", *transplant, *MICRO), plain),
        "convert_st": Program("convert_weights", ("plain.pth", "made/sge.safetensors", *transplant, *MICRO), plain),
        "pretrain": Program(
            "pretrain",
            (
                *("--train", str(data / "classified/train"), "--val", str(data / "classified/val"), "--output", "out"),
                *("--model", "sge_resnet18", "--model-kwargs", "channels=(8,8,8,8)", "--stem-channels", "8"),
                *("--groups", "4", "--img-size", "32", "--epochs", "2", "--batch-size", "4", "--lr", "0.01"),
                *("--ema-decay", "0.9", "--workers", "0", "--device", "cpu"),
            ),
        ),
        "measure": Program(
            "measure_gain",
            (*CONFIG, *datasets, "--output", "out", "--seeds", "0", "--bootstrap", "0", *MICRO),
        ),
    }


# ---- processes


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative: a signal's number), what it printed, its operations."""

    code: int
    text: str
    errors: str
    operations: int

    @property
    def last(self) -> str:
        """The error that it printed to stderr, or its last line where there is none."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        lines = [line for line in lines if line.startswith("error: ")] or lines
        return lines[-1] if lines else "(it says nothing)"


def note_imports(main: Callable, file: Path) -> Callable:
    """``main``, which writes down in the end what it has imported."""

    def noting(arguments: list[str]) -> None:
        before = set(sys.modules)
        try:
            main(arguments)
        finally:
            file.write_text("\n".join(name for name in sys.modules if name not in before))

    return noting


def to_the_end(main: Callable, arguments: list[str]) -> None:
    """What an interpreter does from a script's first line on; does not return."""
    code = 0
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


class Forked:
    """Stands for ``subprocess.Popen`` of a worker of measure_gain, which would import everything anew."""

    faults: Faults

    def __init__(self, command, *, stdin, stdout, stderr, env, start_new_session):
        read, write = os.pipe()
        self.returncode = None
        self.pid = os.fork()
        if not self.pid:
            os.close(write)
            os.setsid()
            for descriptor in map(int, os.listdir("/proc/self/fd")):
                with contextlib.suppress(OSError):  # a real process would not have the parent's locks
                    if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".claim.lock"):
                        os.close(descriptor)
            os.dup2(read, 0)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(stderr.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = self.faults._opened(2, "w", buffering=1, closefd=False)
            to_the_end(worker.main, list(command[3:]))
        os.close(read)
        self.stdin = io.FileIO(write, "w")

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode


class Bench:
    """Where one point after the other is tried.

    Args:
        folder: for its files.
        data: the data set and weights that the programs start from.
    """

    def __init__(self, folder: Path, data: Path):
        self.folder, self.box = folder, folder / "box"
        folder.mkdir(parents=True, exist_ok=True)
        self.programs = programs(data)
        self._known: dict[tuple, str] = {}
        self.mains: dict[str, Callable] = {}
        sys.path.insert(0, str(ROOT / "tools"))
        for program in self.programs.values():
            if program.tool not in self.mains:
                self.mains[program.tool] = runpy.run_path(str(ROOT / "tools" / f"{program.tool}.py"))["main"]

    def empty_box(self, name: str) -> None:
        """Makes the folder what the program starts from."""
        shutil.rmtree(self.box, ignore_errors=True)
        (self.box / "tmp").mkdir(parents=True)
        for there, source in self.programs[name].before:
            (self.box / there).parent.mkdir(exist_ok=True)
            shutil.copy(source, self.box / there)

    def run(self, name: str, extra: tuple[str, ...] = (), **faults) -> Ended:
        """Runs the program in the folder as it is; ``--resume`` stands in place of ``--overwrite``."""
        program = self.programs[name]
        arguments = [word for word in program.arguments if word != "--overwrite" or "--resume" not in extra]
        output = self.folder / "printed.txt"
        counter = Counter()
        pid = os.fork()
        if not pid:
            try:
                self._become(output, Faults(self.box, counter=counter, **faults))
                to_the_end(self.mains[program.tool], [*arguments, *extra])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(99)
        code, texts = _wait(pid), [path.read_text(errors="replace") for path in (output, output.with_suffix(".err"))]
        return Ended(code, *texts, counter.value)

    def _become(self, output: Path, faults: Faults) -> None:
        os.setsid()
        os.chdir(self.box)
        os.environ["TMPDIR"], tempfile.tempdir = str(self.box / "tmp"), None
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, file in ((1, output), (2, output.with_suffix(".err"))):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        Forked.faults = faults
        sge_det.gain.processes.subprocess = type("subprocess", (), {"Popen": Forked, "PIPE": -1, "DEVNULL": -3})
        faults.install()

    def reference(self, name: str) -> "Reference":
        """A run that nothing happens to."""
        self.empty_box(name)
        start = self.folder / f"start_{name}"
        shutil.rmtree(start, ignore_errors=True)
        shutil.copytree(self.box, start)
        record = self.folder / f"record_{name}"
        record.unlink(missing_ok=True)
        ended = self.run(name, record=record)
        if ended.code:
            raise RuntimeError(f"{name} fails by itself: {ended.errors}")
        entries = list(read_record(record))
        if len(entries) != ended.operations:
            raise RuntimeError(f"{name}: {ended.operations} operations, {len(entries)} recorded")
        made, disk = {path: path.read_bytes() for path in self.box.rglob("*") if path.is_file()}, Disk(start)
        for entry in entries:
            disk.apply(*entry)
        found = outcome(self.box)
        self._lay_out(disk, "kill")
        if made != {path: path.read_bytes() for path in self.box.rglob("*") if path.is_file()}:
            raise RuntimeError(f"{name}: the record does not give the files that there are")
        self._lay_out(disk, "power")
        lost = [place for place in found if place.rpartition("/")[2] not in NOT_SYNCED]
        lost = [place for place in lost if outcome(self.box).get(place) != found[place]]
        if lost:
            raise RuntimeError(f"{name}: a power cut after its end loses {lost}")
        return Reference(start, entries, found)

    def attempt(self, name: str, reference: "Reference", kind: str, at: int) -> str:
        """Tries a point; returns what is wrong, "" where it is survived."""
        first = self._fail(name, reference, kind, at)
        if first is not None and first.code == 0:
            # what could not be written was no reason to end
            return _differences(reference.outcome, outcome(self.box))
        if first is not None and kind != "SIGKILL":
            wrong = _untold(first)
            if wrong:
                return wrong
        extra = ("--resume",) if first is not None and "--resume" in first.last else ()
        key = name, extra, fingerprint(self.box)
        if key not in self._known:
            self._known[key] = self._go_on(name, reference, extra)
        return self._known[key]

    def _go_on(self, name: str, reference: "Reference", extra: tuple[str, ...]) -> str:
        """Does what is advised until it ends well; returns what is wrong with what comes out."""
        for _ in range(ATTEMPTS):
            ended = self.run(name, extra)
            if ended.code == 0:
                return _differences(reference.outcome, outcome(self.box))
            if ended.code != 2 or "give the same command with --resume to go on with it" not in ended.last or extra:
                return f"does not go on: exit {ended.code}, {ended.last}"
            extra = ("--resume",)
        return "does not come to an end"

    def _fail(self, name: str, reference: "Reference", kind: str, at: int) -> Ended | None:
        if kind not in LAID_OUT:
            self.empty_box(name)
            return self.run(name, kind=kind, at=at)
        disk = Disk(reference.start)
        for entry in reference.entries[: at - (kind == "kill")]:
            disk.apply(*entry)
        if kind == "kill" and reference.entries[at - 1][0] == "write":
            *place, data = reference.entries[at - 1]
            disk.apply(*place, data[: len(data) // 2])
        self._lay_out(disk, kind)
        return None

    def _lay_out(self, disk: Disk, kind: str) -> None:
        shutil.rmtree(self.box, ignore_errors=True)
        self.box.mkdir()
        names_synced, bytes_synced = LAID_OUT[kind]
        disk.lay_out(self.box, names_synced=names_synced, bytes_synced=bytes_synced)


def _untold(ended: Ended) -> str:
    """What is wrong with how a tool tells a fault."""
    if "Traceback" in ended.text + ended.errors:
        return "a traceback: " + ended.last
    if ended.code != 2 or not ended.last.startswith("error: "):
        return f"no sentence, but exit {ended.code}: {ended.last}"
    if not re.search(r"to go on$|the same command again", ended.last):
        return f"no advice: {ended.last}"
    return ""


def _wait(pid: int) -> int:
    """The exit code of a process, once it and all that it left have ended."""
    deadline, code = time.monotonic() + LONGEST_SECONDS, None
    while True:
        with contextlib.suppress(ChildProcessError):
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == pid:
                code = os.waitstatus_to_exitcode(status)
            if not ended:
                if time.monotonic() > deadline:
                    for child in _children():
                        os.kill(child, signal.SIGKILL)
                time.sleep(0.01)
            continue
        return -1 if code is None else code


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


# ---- what came out


@dataclass(frozen=True)
class Reference:
    """What the program does and makes where nothing happens."""

    start: Path
    entries: list[tuple]
    outcome: dict[str, object]


def outcome(box: Path) -> dict[str, object]:
    """What must be the same, by file."""
    found: dict[str, object] = {}
    for path in sorted(box.rglob("*")):
        place = str(path.relative_to(box))
        if path.is_dir() or path.name.startswith("events.out.tfevents."):
            continue
        content = path.read_bytes()
        if path.name in ("log.txt", "stretches.json", "cost.csv", "cost.tex", "instances_predictions.pth"):
            found[place] = "a log, times, or what nobody reads"
        elif path.name == "metrics.json":
            found[place] = _metrics(content)
        elif path.name in ("result.json", "report.json"):
            found[place] = _without_times(json.loads(content))
        elif path.name == "report.md":
            found[place] = re.sub(rb"## Cost\n.*?(?=\n## |\Z)", b"", content, flags=re.S)
        elif path.name == "report.html":
            found[place] = content.rstrip().endswith(b"</html>")
        elif path.suffix == ".safetensors":
            # their order in the file is another each time
            with safe_open(path, "pt") as file:
                found[place] = file.metadata(), {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
        else:
            found[place] = content
    return found


def fingerprint(box: Path) -> str:
    """Of all files but logs, which are not read."""
    digest = hashlib.sha256()
    for path in sorted(box.rglob("*")):
        if path.name == "log.txt" or path.name.startswith("events.out.tfevents."):
            continue
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "a folder"
        digest.update(f"{path.relative_to(box)}\0{content}\0".encode())
    return digest.hexdigest()


def _metrics(content: bytes) -> object:
    lines = content.decode().splitlines()
    try:
        records = [json.loads(line) for line in lines]
    except ValueError:
        return "a line that is not whole"
    # losses are medians of the iterations since the start, or since the run went on
    return {key: value for record in records for key, value in record.items() if key.startswith(("bbox/", "segm/"))}


def _without_times(content: object) -> object:
    if isinstance(content, dict):
        return {key: _without_times(value) for key, value in content.items() if key not in TIMES}
    return [_without_times(value) for value in content] if isinstance(content, list) else content


def _differences(wanted: dict[str, object], found: dict[str, object]) -> str:
    told = [f"{place} is lacking" for place in wanted if place not in found]
    told += [f"{place} is left" for place in found if place not in wanted]
    told += [
        f"{place} is another" + (f" ({found[place]})" if place.endswith("metrics.json") else "")
        for place in wanted
        if place in found and wanted[place] != found[place]
    ]
    return "; ".join(told)


# ---- all points


def prepare(folder: Path) -> Path:
    """The data set and the weights that the programs start from."""
    data = folder / "data"
    make_sample_coco(data / "set", train=4, val=2, size=64, seed=3)
    make_classified(data / "classified")
    bench = Bench(folder / "prepare", data)
    main = bench.mains["train_net"]
    for overrides, name in (((), "trained"), (("MODEL.SGE.ENABLED", "False"), "plain")):
        bench.empty_box("train")
        bench.mains["train_net"] = note_imports(main, folder / "imports")
        ended = bench.run("train", overrides)
        if ended.code:
            raise RuntimeError(ended.errors)
        shutil.copytree(bench.box / "out", data / "other", dirs_exist_ok=True)
        shutil.copy(bench.box / "out/model_final.pth", data / f"{name}.pth")
        shutil.copy(bench.box / "out/model_final.pth.sha256.json", data / f"{name}.json")
    for module in (folder / "imports").read_text().split():
        with contextlib.suppress(Exception):  # so that no other run has to
            importlib.import_module(module)
    beside = data / "trained.json"
    beside.write_text(beside.read_text().replace("model_final.pth", "weights.pth"))
    return data


def make_classified(folder: Path) -> None:
    """Images in two classes: red and blue ones."""
    for split in ("train", "val"):
        for channel, name in ((0, "red"), (2, "blue")):
            (folder / split / name).mkdir(parents=True)
            for number in range(4):
                colour = [40 * number] * 3
                colour[channel] = 200
                Image.new("RGB", (40, 40), tuple(colour)).save(folder / split / name / f"{number}.png")


def points(counts: dict[str, int], kinds: list[str], every: int) -> list[tuple[str, str, int]]:
    """All of them; or of each program and kind each so many-th, of each kind others. Shuffled: a part is a sample."""
    chosen = [
        (name, kind, at)
        for name, count in counts.items()
        for place, kind in enumerate(kinds)
        for at in range(1 + place * every // len(kinds), count + 1, every)
    ]
    random.Random(0).shuffle(chosen)
    return chosen


def work(number: int, jobs: int, args: argparse.Namespace, folder: Path, data: Path) -> None:
    """Tries every ``jobs``-th point, and appends what became of it to the results."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: what a killed process leaves is waited for
    bench = Bench(folder / str(number), data)
    references = {name: bench.reference(name) for name in args.programs}
    counts = {name: len(reference.entries) for name, reference in references.items()}
    if number == 0:
        print("operations: " + ", ".join(f"{name} {count}" for name, count in counts.items()), flush=True)
    done = {(name, kind, at) for name, kind, at, wrong in read_results(args.results) if not wrong}
    for place, point in enumerate(points(counts, args.kinds, args.every)):
        if place % jobs != number or point in done or (args.at and point[2] not in args.at):
            continue
        name, kind, at = point
        wrong = bench.attempt(name, references[name], kind, at)
        entry = " ".join(
            str(part) if not isinstance(part, bytes) else "" for part in references[name].entries[at - 1][:2]
        )
        line = json.dumps([name, kind, at, f"{wrong} [{entry}]" if wrong else ""]) + "\n"
        with open(args.results, "a") as file:
            file.write(line)
        if wrong:
            print(line, end="", flush=True)


def read_results(path: Path) -> list[list]:
    if not path.is_file():
        return []
    found = {}
    for line in path.read_text().splitlines():
        name, kind, at, wrong = json.loads(line)
        found[name, kind, at] = wrong
    return [[*point, wrong] for point, wrong in found.items()]


def table(results: list[list]) -> str:
    """Points tried and survived, by program and kind."""
    tried = Tally((name, kind) for name, kind, _, _ in results)
    survived = Tally((name, kind) for name, kind, _, wrong in results if not wrong)
    names = list(dict.fromkeys(name for name, *_ in results))
    kinds = [*dict.fromkeys(kind for _, kind, *_ in results), "all"]
    rows = [["survived of tried", *kinds]]
    for name in [*names, "all"]:
        cells = []
        for kind in kinds:
            keys = [key for key in tried if name in (key[0], "all") and kind in (key[1], "all")]
            cells.append(f"{sum(survived[key] for key in keys)} of {sum(tried[key] for key in keys)}")
        rows.append([name, *cells])
    return "\n".join("  ".join(f"{cell:>18}" for cell in row) for row in rows)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", default=list(programs(Path())))
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, "SIGKILL"), default=list(KINDS))
    parser.add_argument("--every", type=int, default=1, help="each so many-th operation alone")
    parser.add_argument("--at", type=int, nargs="+", help="these operations alone")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a file that grows, so that the same command goes on")
    parser.add_argument("--folder", type=Path, help="for the files of the points, removed at the end")
    return parser.parse_args(argv)


def make_small() -> None:
    """Has the tools do less that takes time."""
    torch.set_num_threads(1)
    sge_det.engine.logs.collect_env_info = lambda: "the environment"
    sge_det.gain.matrix._POLL_SECONDS = 0.02
    make_stage = ResNet.make_stage
    ResNet.make_stage = staticmethod(
        lambda *given, **keys: make_stage(
            *given, **keys | {"num_blocks": 1, "stride_per_block": keys["stride_per_block"][:1]}
        )
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    make_small()
    folder = Path(tempfile.mkdtemp(dir=args.folder))  # a TemporaryDirectory would be removed by each child
    args.results = (args.results or folder / "results.jsonl").absolute()
    try:
        codes = in_processes(args, folder, prepare(folder))
        results = [result for result in read_results(args.results) if result[0] in args.programs]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(table(results))
    lost = [result for result in results if result[3]]
    for name, kind, at, wrong in lost:
        print(f"{name} {kind} {at}: {wrong}")
    print(f"{len(results)} points, {len(results) - len(lost)} survived")
    return int(bool(lost) or any(codes))


def in_processes(args: argparse.Namespace, folder: Path, data: Path) -> list[int]:
    """Shares the points among processes; returns their exit codes."""
    workers = []
    for number in range(args.jobs):
        pid = os.fork()
        if not pid:
            try:
                work(number, args.jobs, args, folder, data)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        workers.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in workers]


if __name__ == "__main__":
    sys.exit(main())
