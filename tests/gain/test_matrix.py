import contextlib
import io
import json
import logging
import multiprocessing
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from conftest import ROOT, TINY

from sge_det import UserError
from sge_det.gain import Launch, Matrix, Run, RunFailed, processes
from sge_det.gain.worker import parser as run_parser

CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
SCHEDULE = [
    *("SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "4"),
    # so few iterations teach nothing: detections all the same, to compare
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
]
RUNS = ["plain/seed0", "sge/seed0"]


def matrix(output, datasets, *overrides, **options):
    return Matrix(CONFIG, output, overrides=[*TINY, *SCHEDULE, *overrides], datasets=datasets, **options)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def finished(sample_datasets, tmp_path_factory):
    """A matrix that two workers made together, and what they printed; the one is the tool, the other this process."""
    output = tmp_path_factory.mktemp("matrix") / "out"
    datasets = [word for triple in sample_datasets for word in ("--dataset", *triple)]
    command = [sys.executable, str(ROOT / "tools/measure_gain.py"), "--config-file", CONFIG, *datasets]
    command += ["--bootstrap", "200", "--output", str(output), "--seeds", "0", *TINY, *SCHEDULE]
    tool = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    own = io.StringIO()
    with contextlib.redirect_stdout(own):
        matrix(output, sample_datasets).execute()
    printed = tool.communicate(timeout=300)[0]
    assert tool.returncode == 0, printed
    return output, [own.getvalue(), printed]


def results(output):
    """By run, Detectron2's metrics and all detections."""
    found = {
        name: (
            json.loads((output / name / "result.json").read_text())["results"],
            json.loads((output / name / "inference/coco_instances_results.json").read_text()),
        )
        for name in RUNS
    }
    assert all(len(detections) >= 4 for _, detections in found.values())
    return found


def test_workers_divide_the_runs(finished):
    output, printed = finished
    for name in RUNS:
        assert (output / name / "log.txt").read_text().count("Starting training from iteration") == 1
        assert sum(f"started {name}," in text for text in printed) == 1


def test_what_a_run_leaves(finished):
    output, _ = finished
    for name in RUNS:
        folder = output / name
        for file in ("config.yaml", "metrics.json", "log.txt", "result.json", "inference/coco_instances_results.json"):
            assert (folder / file).stat().st_size > 0, file
        assert (folder / "last_checkpoint").read_text() == "model_final.pth"
        assert [path.name for path in folder.glob("*.pth")] == ["model_final.pth"]
        assert not list(folder.rglob("*.part"))
        result = json.loads((folder / "result.json").read_text())
        assert result["stretches"] == 1
        assert result["device_seconds"] == {"core": pytest.approx(result["seconds"], abs=0.2)}  # of one thread
        assert result["seconds"] > 0.5
    gates = {name: json.loads((output / name / "result.json").read_text())["gates"] for name in RUNS}
    assert gates["plain/seed0"] == {}
    assert list(gates["sge/seed0"]) == ["res2", "res3", "res4", "res5"]
    report = json.loads((output / "report.json").read_text())
    assert {name: found["runs"] for name, found in report["cost"].items()} == {"plain": 1, "sge": 1}
    assert report["cost"]["sge"]["core_hours"] == pytest.approx(report["cost"]["sge"]["hours"], abs=1e-4)
    assert "| all   |    2 |" in (output / "report.md").read_text()
    assert list(report["gates"]) == list(report["pointing"]) == ["sge"]
    played = report["pointing"]["sge"]["0"]
    assert played == json.loads((output / "sge/seed0/result.json").read_text())["pointing"]
    assert played["bbox"]["res2"]["all"]["images"] > 0
    assert "## Pointing game of sge" in (output / "report.md").read_text()
    assert (output / "report.html").read_text().count("<img") >= 5
    points = Run.curves(_run(output / RUNS[0]))
    assert [iteration for iteration, _ in points["bbox/AP"]] == [4, 8]
    assert points["total_loss"]


def _run(folder):
    run = Run.__new__(Run)
    run.folder = folder
    run.config = type("Config", (), {"SOLVER": type("Solver", (), {"MAX_ITER": 8})})
    return run


def trainings(output):
    return sum(log.read_text().count("Starting training from iteration") for log in output.glob("*/*/log.txt"))


@pytest.mark.slow
def test_killed_at_random_and_run_again(finished, sample_datasets, tmp_path):
    output = tmp_path / "out"
    made = matrix(output, sample_datasets)
    chance = random.Random()
    for is_training in (True, False, True):
        before, deadline = trainings(output), time.time() + 60
        worker = multiprocessing.get_context("fork").Process(target=made.execute, kwargs={"jobs": 2})
        worker.start()
        while is_training and worker.is_alive() and trainings(output) == before and time.time() < deadline:
            time.sleep(0.1)
        # a run that trains takes longer than half a second from there
        time.sleep(chance.uniform(0, 0.5 if is_training else 2.5))
        worker.kill()  # SIGKILL, to the worker alone: its runs must end by themselves
        worker.join()
    assert trainings(output) >= 2
    made.execute(jobs=2)
    assert results(output) == results(finished[0])
    assert [path.name for path in output.glob("*/*/*.pth")] == ["model_final.pth"] * 2
    stretches = [json.loads(file.read_text())["stretches"] for file in output.glob("*/*/stretches.json")]
    assert sum(map(len, stretches)) > 2  # what was killed is counted


def test_finished_runs_are_kept(finished, sample_datasets, capsys):
    before = {
        path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.is_file() and path.suffix == ".pth"
    }
    matrix(finished[0], sample_datasets).execute()
    assert capsys.readouterr().out.count("kept ") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_runs_are_refused(finished, sample_datasets, tmp_path, monkeypatch):
    output = finished[0]
    with pytest.raises(UserError, match=r"seed0 holds a run made with SOLVER.BASE_LR 0.002, this command has 0.01"):
        matrix(output, sample_datasets, "SOLVER.BASE_LR", "0.01")
    name, file, images = sample_datasets[1]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(Path(file).read_text()) | {"info": {"changed": True}}))
    with pytest.raises(UserError, match=f"another content of {name}"):
        matrix(output, [sample_datasets[0], (name, str(other), images)])
    matrix(output, sample_datasets, seeds=[1])  # another seed has a folder of its own
    groups = ["MODEL.SGE.GROUPS", "8"]
    with pytest.raises(UserError, match=r"sge/seed0 holds a run made with MODEL.SGE.GROUPS 16, this command has 8"):
        matrix(output, sample_datasets, *groups)
    matrix(output, sample_datasets, *groups, arm_names=["plain", "se"])
    for package, place in {
        "sge_det": "sge_det.engine.fingerprint",
        "Detectron2": "detectron2",
        "torch": "torch",
    }.items():
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=rf"{package} \S+, this command has 0\.0\.0"),
        ):
            patch.setattr(f"{place}.__version__", "0.0.0")
            matrix(output, sample_datasets)


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["MODEL.SGE.GROUPS", "8"], ["sge", "sge-fixed"]),
        (["MODEL.SGE.LR_FACTOR", "3.0"], ["sge"]),  # sge-fixed has a factor of its own, 0
        (["MODEL.SGE.STAGES", "['res5']"], ["sge", "sge-fixed", "se"]),
        (["MODEL.SGE.LOG_PERIOD", "7"], []),
        (["SOLVER.BASE_LR", "0.01"], ["plain", "sge", "sge-fixed", "se"]),
    ],
)
def test_only_keys_that_touch_an_arm_make_another_run_of_it(sample_datasets, tmp_path, overrides, changed):
    arms = ["plain", "sge", "sge-fixed", "se"]

    def made(*keys):
        return [run.fingerprint for run in matrix(tmp_path, sample_datasets, *keys, arm_names=arms).runs]

    assert [arm for arm, a, b in zip(arms, made(), made(*overrides)) if a != b] == changed


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        (["OUTPUT_DIR", "x"], {}, "--output"),
        (["SEED", "1"], {}, "--seeds"),
        (
            ["DATASETS.TRAIN", "('tiny_train',)", "DATASETS.TEST", "('tiny_val', 'tiny_train')"],
            {},
            "one validation set",
        ),
        ([], {"seeds": []}, "at least one seed"),
        ([], {"seeds": [1, 1]}, "different numbers"),
        ([], {"arm_names": ["plain", "x"]}, "there is no arm x"),
    ],
)
def test_bad_commands(tmp_path, sample_datasets, overrides, options, words):
    with pytest.raises(UserError, match=words):
        matrix(tmp_path / "out", sample_datasets, *overrides, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["what?", "a\nb", "a\udcff"])
def test_an_output_that_libraries_do_not_take_as_it_is_is_told_first(sample_datasets, tmp_path, name):
    with pytest.raises(UserError, match=r"^--output \S+: name a folder without \? ") as told:
        matrix(tmp_path / name, sample_datasets)
    assert str(told.value).isprintable()


def test_an_output_that_is_a_file_is_told_first(sample_datasets, tmp_path):
    taken = tmp_path / "results.txt"
    taken.write_text("mine")
    for output in (taken, taken / "gain"):
        with pytest.raises(UserError, match=r"--output .*results.txt is a file; name a folder"):
            Matrix("no/such/config.yaml", output, datasets=sample_datasets)
    assert taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("gpus", "jobs", "each", "device", "least"),
    [
        (1, 2, 1, "cuda", 1),
        (4, 3, 2, "cuda:0", 2),
        (4, 2, 2, "cuda", None),
        (1, 2, 1, "cpu", None),
        (0, 8, 1, "cuda", None),
    ],
)
def test_more_jobs_than_gpus_are_refused(monkeypatch, gpus, jobs, each, device, least):
    """They would all share the first ones."""
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: gpus)
    if least is None:
        processes.check_jobs(processes.Launch(num_gpus=each), jobs, device)
    else:
        with pytest.raises(UserError, match=f"need {jobs * each}, but there are {gpus}: give --jobs {least}$"):
            processes.check_jobs(processes.Launch(num_gpus=each), jobs, device)


def test_mistakes_in_an_arm_are_told_before_anything_is_trained(sample_datasets, tmp_path, caplog):
    odd = [["odd", "MODEL.SGE.GROUPS", "7"]]
    with pytest.raises(UserError, match=r"^arm odd: MODEL.SGE.GROUPS: 7 does not divide the 64 channels of res2"):
        matrix(tmp_path / "out", sample_datasets, arm_names=["plain"], custom_arms=odd)
    frozen = [["frozen", "MODEL.BACKBONE.FREEZE_AT", "2"]]
    with caplog.at_level(logging.WARNING, "sge_det"):
        matrix(tmp_path / "out", sample_datasets, arm_names=["plain"], custom_arms=frozen)
    assert [record.getMessage()[:45] for record in caplog.records] == ["arm frozen: MODEL.BACKBONE.FREEZE_AT: 2 freez"]
    assert not (tmp_path / "out").exists()


def test_launch_arguments_are_handed_to_each_run(tmp_path, sample_datasets):
    launch = Launch(num_gpus=2, num_machines=1, machine_rank=0, dist_url="tcp://127.0.0.1:29999", imports=("json",))
    made = matrix(tmp_path / "out", sample_datasets, launch=launch)
    for run in made.runs:
        args = run_parser().parse_args(run.command)
        assert (args.num_gpus, args.num_machines, args.machine_rank) == (2, 1, 0)
        assert (args.dist_url, args.imports) == ("tcp://127.0.0.1:29999", ["json"])
        assert run.fingerprint["processes"] == 2


def test_mistakes_that_a_run_finds_are_told(forked_runs, sample, sample_datasets, tmp_path):
    shutil.copytree(sample / "train", tmp_path / "train")
    (name, file, _), val = sample_datasets
    made = matrix(tmp_path / "out", [(name, file, str(tmp_path / "train")), val])
    # behind the back of the set-up, which looks at images too
    for image in (tmp_path / "train").iterdir():
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^plain/seed0: .*the image \S+ "):
        made.execute()


@pytest.mark.parametrize(
    ("ending", "kind", "words"),
    [
        ("echo 'error: the key is wrong' >&2; exit 2", UserError, r"^plain/seed0: the key is wrong$"),
        (
            "echo RuntimeError: boom >&2; exit 1",
            RunFailed,
            r"failed \(exit 1\); its log is .*log.txt, .*RuntimeError: boom$",
        ),
        ("kill -9 $$", RunFailed, r"plain/seed0 was killed by signal 9 \(SIGKILL\)"),
        ("exit 0", RunFailed, r"plain/seed0 failed \(exit 0\)"),
        # as where somebody removed the folder, and the run made it again
        (
            'rm "$(dirname "$0")/out/plain/seed0/fingerprint.json"; exit 1',
            UserError,
            "seed0 was removed while plain/seed0 was writing there: remove what is left of it and run the same command",
        ),
    ],
)
def test_how_runs_end(tmp_path, sample_datasets, monkeypatch, ending, kind, words):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{ending}\n")
    script.chmod(0o755)
    made = matrix(tmp_path / "out", sample_datasets)
    monkeypatch.setattr("sge_det.gain.processes.sys.executable", str(script))
    with pytest.raises(kind, match=words):
        made.execute()
    assert not (made.runs[0].folder / "result.json").exists()
    with filelock.FileLock(made.runs[0].folder / ".claim.lock", blocking=False):
        pass  # free again


def test_jobs_split_the_cores(tmp_path, sample_datasets, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "threads: $OMP_NUM_THREADS" >&2\nexit 3\n')
    script.chmod(0o755)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("sge_det.gain.processes.sys.executable", str(script))
    monkeypatch.setattr("sge_det.gain.processes.os.sched_getaffinity", lambda process: set(range(8)))
    for jobs, threads in ((1, 8), (2, 4)):
        made = matrix(tmp_path / f"out{jobs}", sample_datasets)
        with pytest.raises(RunFailed, match=f"ends with: threads: {threads}$"):
            made.execute(jobs)


def test_full_disk_is_told(tmp_path, sample_datasets, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    made = matrix(tmp_path / "out", sample_datasets)
    monkeypatch.setattr("sge_det.gain.processes.sys.executable", str(script))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"the disk that holds .*plain/seed0 is full: free some space"):
        made.execute()


def test_a_run_that_another_worker_has_is_waited_for(tmp_path, sample_datasets, monkeypatch, capsys):
    made = matrix(tmp_path / "out", sample_datasets)
    done = json.dumps({"schema": 1, "seconds": 1, "results": {"bbox": {"AP": 1}}, "gates": {}})
    polls = []
    held = filelock.FileLock(made.runs[0].folder / ".claim.lock")
    for run in made.runs:
        run.folder.mkdir(parents=True)
    (made.runs[1].folder / "result.json").write_text(done)
    held.acquire()

    def other_worker(seconds):
        polls.append(seconds)
        if len(polls) == 3:
            (made.runs[0].folder / "result.json").write_text(done)
            held.release()

    monkeypatch.setattr("sge_det.gain.matrix.time.sleep", other_worker)
    monkeypatch.setattr("sge_det.gain.processes.sys.executable", "/no/python")
    made.execute()
    assert len(polls) == 3
    assert "waiting for plain/seed0: another worker has them" in capsys.readouterr().out
