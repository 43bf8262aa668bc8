import json
import math
import signal
import sys

import pytest
from conftest import ROOT, TINY
from started_tool import MICRO, Started

CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
SCHEDULE = [
    *("SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "2", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5"),
]
ARMS = ["--seeds", "3", "5", "--arm", "late", "MODEL.SGE.STAGES", "['res5']", "--arms", "plain", "late", "--jobs", "2"]


def datasets(triples):
    return [word for triple in triples for word in ("--dataset", *triple)]


def report_of(folder):
    return json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)


def test_arms_with_seeds_then_the_same_command_again(fork_tool, call_tool, sample_datasets, tmp_path):
    command = ["--config-file", CONFIG, "--output", "out", *datasets(sample_datasets), *ARMS, "--bootstrap", "200"]
    command += [*TINY, *SCHEDULE, *MICRO]
    first = fork_tool("measure_gain.py", *command)
    assert first.returncode == 0, first.stderr
    runs = [f"{arm}/seed{seed}" for arm in ("plain", "late") for seed in (3, 5)]
    assert sorted(str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.glob("out/*/*/result.json")) == (
        sorted(runs)
    )
    assert f"Report: {tmp_path / 'out/report.html'}" in first.stdout
    report = report_of(tmp_path / "out")
    assert report["reference"] == "plain" and list(report["differences"]) == ["late"]
    assert report["arms"]["late"]["seeds"] == [3, 5]
    for metric, row in report["arms"]["late"]["bbox"].items():
        shown = "absent" if row["mean"] is None else f"{row['mean']:.2f} ± {row['sd']:.2f}"
        (line,) = [line for line in first.stdout.splitlines() if line.startswith(f"| {metric} ")]
        assert shown in line
    assert report["verdict"].splitlines()[0] in first.stdout
    assert list(report["gates"]["late"]["3"]) == ["res5"]

    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/*/*") if path.suffix in (".pth", ".json")}
    again = fork_tool("measure_gain.py", *command)
    assert again.returncode == 0, again.stderr
    assert [line.split(":")[0] for line in again.stdout.splitlines() if line.startswith("kept ")] == [
        f"kept {arm}/seed{seed}" for seed in (3, 5) for arm in ("plain", "late")
    ]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert report_of(tmp_path / "out")["arms"] == report["arms"]

    other = call_tool("measure_gain.py", *command, "SOLVER.BASE_LR", "0.5")
    assert other.returncode == 2
    assert "holds a run made with SOLVER.BASE_LR" in other.stderr.strip().splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize(("signum", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_ends_the_steps_of_all_runs(sample_datasets, tmp_path, signum, code):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools/measure_gain.py"), "--config-file", CONFIG]
    command += ["--output", str(tmp_path / "out"), "--jobs", "2", *datasets(sample_datasets), *TINY, *MICRO]
    command += ["SOLVER.MAX_ITER", "100000"]
    tool = Started(command, tmp_path / "printed.txt")
    logs = [tmp_path / f"out/{arm}/seed0/log.txt" for arm in ("plain", "sge")]
    try:
        tool.wait_until(lambda: all(log.is_file() and "Starting training" in log.read_text() for log in logs))
        tool.process.send_signal(getattr(signal, signum))
        assert tool.end() == (code, "interrupted: run the same command again to go on")
    finally:
        tool.kill()
    for log in logs:
        assert (log.parent / "last_checkpoint").read_text().startswith("model_00")


@pytest.fixture
def results(sample, tmp_path):
    """Result files: all objects found, and all but every third."""
    truth = json.loads((sample / "annotations/instances_val.json").read_text())
    found = [
        {key: entry[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for entry in truth["annotations"]
        if not entry["iscrowd"]
    ]
    for name, entries in (("all", found), ("some", [entry for i, entry in enumerate(found) if i % 3])):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
        # another seed, which finds the same
        (tmp_path / f"{name}1.json").write_text(json.dumps([entry | {"score": 0.8} for entry in entries]))
    return sample / "annotations/instances_val.json", found


def test_compare_names_the_gain_and_draws_the_images(fork_tool, results, sample, tmp_path):
    done = fork_tool(
        "measure_gain.py",
        *("--compare", "--gt", results[0], "--images", sample / "val", "--output", "out", "--bootstrap", "200"),
        *("--arm-results", "base", "some.json", "some1.json", "--arm-results", "mine", "all.json", "all1.json"),
    )
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path / "out")
    assert report["seeds"] == [0, 1]
    assert report["arms"]["mine"]["bbox"]["AP"]["values"] == pytest.approx([100, 100])
    difference = report["differences"]["mine"]["bbox"]["AP"]
    assert difference["mean"] == pytest.approx(100 - report["arms"]["base"]["bbox"]["AP"]["mean"])
    assert f"mine - base = {difference['mean']:+.2f} box AP" in done.stdout
    assert (tmp_path / "out/report.html").read_text().count("<figure") > 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"score": math.nan}, "the score is not a finite number"),
        ({"image_id": 987654}, "image 987654 is not in the ground truth"),
        ({"category_id": 77}, "category 77 is not in the ground truth"),
        ({"bbox": [1, 1, -5, 4]}, "negative width or height"),
    ],
)
def test_bad_results_are_told_in_one_sentence(call_tool, results, tmp_path, change, words):
    truth, found = results
    (tmp_path / "bad.json").write_text(json.dumps([*found[:1], found[1] | change, *found[2:]]))
    done = call_tool(
        "measure_gain.py",
        *("--compare", "--gt", truth, "--output", "out", "--arm-results", "base", "all.json"),
        *("--arm-results", "mine", "bad.json"),
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: bad.json, detection 1") and words in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare"], "--compare needs --gt"),
        (["--compare", "--gt", "no.json", "--arm-results", "a", "a.json", "--arm-results", "b", "b.json"], "no.json"),
        (["--config-file", "no.yaml"], "no.yaml"),
        ([], "--config-file"),
        (["--config-file", CONFIG, "--gt", "x.json"], "go with --compare"),
        (["--compare", "--gt", "x.json", "--seeds", "1", "2"], "--compare trains nothing: leave out --seeds"),
        (["--compare", "--gt", "x.json", "--arms", "plain", "--jobs", "2"], "leave out --arms --jobs"),
        (["--config-file", CONFIG, "--bootstrap", "20"], "--bootstrap 20 is too few"),
        (["--config-file", CONFIG, "--cluster", "local", "--jobs", "2"], "leave out --jobs"),
        (["--config-file", CONFIG, "--cluster", "local", "--partition", "gpu"], "go with --cluster slurm"),
        (["--config-file", CONFIG, "--cluster", "local", "--hours", "0"], "--hours 0 must be how long"),
        (["--config-file", CONFIG, "--metric", "AP60"], "--metric AP60 is none of AP, AP50"),
        (["--config-file", CONFIG, "--margin", "-1"], "--margin must be a number of AP points"),
        (["--config-file", CONFIG, "--margin", "nan"], "--margin must be a number of AP points"),
        (["--config-file", CONFIG, "--against", "se"], "--against se: there is no such arm among plain, sge"),
        (["--config-file", CONFIG, "--arms", "plain", "sgee"], "there is no arm sgee"),
        (["--config-file", CONFIG, "--seeds", "1", "1"], "different numbers"),
        (["--config-file", CONFIG, "--seeds", "0", "1", "--run", "se", "0"], "there is no run se 0: the arms are"),
        (["--config-file", CONFIG, "MODEL.SGE.GROUPS", "7"], "does not divide"),
        (["--config-file", CONFIG, "MODEL.WEIGHTS", "no.pth"], "no.pth is not there"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(call_tool, sample_datasets, tmp_path, arguments, words):
    data = [] if "--compare" in arguments else datasets(sample_datasets)
    done = call_tool("measure_gain.py", "--output", "out", *data, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_unequal_numbers_of_files(call_tool, results, tmp_path):
    done = call_tool(
        "measure_gain.py",
        *("--compare", "--gt", results[0], "--output", "out", "--arm-results", "base", "all.json", "some.json"),
        *("--arm-results", "mine", "all.json"),
    )
    assert done.returncode == 2
    assert "arm mine has 1 result files and base has 2" in done.stderr


def test_a_report_is_drawn_again(call_tool, tmp_path):
    report = ROOT / "docs/results/attention.json"
    done = call_tool("measure_gain.py", "--draw", report, "--output", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    assert "This report is of schema 1" in done.stdout
    assert (tmp_path / "again/figures/differences.pdf").is_file()
    refused = call_tool("measure_gain.py", "--draw", report, "--output", tmp_path, "SEED", "1")
    assert refused.returncode == 2
    assert "--draw reads a report alone: leave out KEY VALUE" in refused.stderr
