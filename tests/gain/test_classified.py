"""Classifiers compared by the images that each got right; numbers by hand."""

import json

import numpy as np
import pytest
from scipy import stats

from sge_det import UserError
from sge_det.gain import compare_classified, to_json
from sge_det.gain.parts import Question


def write_run(folder, right, *, second=(), images=200, **made):
    """A run that gets the images ``right`` by its first score, and those and ``second`` by its first five."""
    folder.mkdir(parents=True)
    top1 = [int(number in set(right)) for number in range(images)]
    top5 = [int(number in {*right, *second}) for number in range(images)]
    names = [f"class/{number}.png" for number in range(images)]
    (folder / "predictions.json").write_text(json.dumps({"images": names, "top1": top1, "top5": top5}))
    if made:
        history = [{"epoch": 1, "top1": 10.0, "top5": 50.0}]
        (folder / "result.json").write_text(json.dumps({"seconds": 60, "history": history, **made}))
    return folder


@pytest.fixture
def arms(tmp_path):
    """Four seeds; SGE has 10, 12, 9 and 11 images of 200 more, 5 points or so."""
    found = {"plain": [], "sge": []}
    for seed, more in enumerate((10, 12, 9, 11)):
        base = range(seed, 100 + seed)
        alike = {"seed": seed, "epochs": 2, "model_kwargs": {}}
        found["plain"].append(write_run(tmp_path / f"plain/{seed}", base, second=range(150), model="r", **alike))
        right = range(seed, 100 + seed + more)
        found["sge"].append(write_run(tmp_path / f"sge/{seed}", right, second=range(150), model="sge_r", **alike))
    return found


def test_top1_by_hand(arms, tmp_path):
    compare_classified(arms, tmp_path / "out", bootstrap=4000)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (report["schema"], report["tasks"], report["images"]) == (2, ["classification"], 200)
    assert report["seeds"] == [0, 1, 2, 3]
    assert report["arms"]["plain"]["classification"]["top1"]["values"] == [50.0] * 4
    assert list(report["arms"]["sge"]["classification"]) == ["top1", "top5"]
    found = report["differences"]["sge"]["classification"]["top1"]
    values = [5.0, 6.0, 4.5, 5.5]
    assert found["values"] == values
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found["intervals"]["seeds"] == pytest.approx({"low": low, "high": high})
    # the mean over seeds is a mean over images of the share of seeds that gained each
    gained = np.zeros(200)
    for seed, more in enumerate((10, 12, 9, 11)):
        gained[100 + seed : 100 + seed + more] += 25
    low, high = stats.t.interval(0.95, 199, gained.mean(), stats.sem(gained))
    assert found["intervals"]["images"] == pytest.approx({"low": low, "high": high}, abs=0.15)
    assert found["intervals"]["both"]["low"] < found["intervals"]["seeds"]["low"]
    (verdict,) = report["verdicts"]
    assert (verdict["metric"], verdict["outcome"]) == ("top1", "gain")
    assert "sge - plain = +5.25 classification top1" in report["verdict"]
    page = (tmp_path / "out/report.html").read_text()
    assert "shares of images that are classified right" in page
    assert "Precision and recall" not in page and "COCO" not in page
    assert page.count("<figure") == 3  # differences, arms, learning curves


def test_the_tool_compares_folders(arms, call_tool, tmp_path):
    done = call_tool(
        "measure_gain.py", "--compare", "--metric", "top5", "--output", "out", "--bootstrap", "200",
        "--arm-results", "plain", *arms["plain"], "--arm-results", "sge", *(f / "result.json" for f in arms["sge"]),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Classification metrics, in points (0-100)" in done.stdout
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["question"]["metric"] == "top5"
    assert report["provenance"]["training time of sge"] == "4 min"
    assert "model sge_r, model_kwargs {}, epochs 2" in report["provenance"]["sge is"]


def test_runs_that_are_not_alike(arms, tmp_path):
    other = write_run(tmp_path / "sge/longer", range(120), seed=3, epochs=9, model="sge_r", model_kwargs={})
    unlike = {"plain": arms["plain"], "sge": [*arms["sge"][:3], other]}
    verdict = to_json(compare_classified(unlike, tmp_path / "out", bootstrap=0).report)["verdict"]
    assert f"{arms['plain'][0]} and {other} differ in epochs, too: a difference may come from that." in verdict
    shuffled = {"plain": arms["plain"], "sge": arms["sge"][::-1]}
    with pytest.raises(UserError, match="the runs of sge have the seeds 3, 2, 1, 0 and those of plain 0, 1, 2, 3"):
        compare_classified(shuffled, tmp_path / "out", bootstrap=0)
    few = write_run(tmp_path / "few", range(50), images=100)
    with pytest.raises(UserError, match="are of other validation images"):
        compare_classified({"plain": arms["plain"][:1], "sge": [few]}, tmp_path / "out", bootstrap=0)
    with pytest.raises(UserError, match="have the same content, so they are one run"):
        compare_classified({"plain": arms["plain"][:1] * 2, "sge": arms["sge"][:2]}, tmp_path / "out", bootstrap=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"images": []}', "no list 'images'"),
        ('{"images": ["a"], "top1": [2], "top5": [1]}', "'top1' must be a list of 0 or 1"),
        ('{"images": ["a"], "top1": [1], "top5": []}', "'top5' must be a list of 0 or 1"),
        ('{"images": ["a"], "top1": [1], "top5": [0]}', "right by top1 and wrong by top5"),
    ],
)
def test_malformed_predictions_are_told(arms, tmp_path, content, words):
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(UserError, match=words):
        compare_classified({"plain": arms["plain"][:1], "sge": [tmp_path / "odd.json"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("made", [{"history": None}, {"history": [{"epoch": 1}]}, {"history": 3}, {"seconds": "long"}])
def test_what_a_run_recorded_of_itself_is_checked_too(tmp_path, made):
    runs = {name: [write_run(tmp_path / name, range(count), **made)] for name, count in (("plain", 5), ("sge", 9))}
    with pytest.raises(UserError, match=r"plain/result\.json: 'history' must be a list of objects"):
        compare_classified(runs, tmp_path / "out", bootstrap=0)
    assert not (tmp_path / "out").exists()


def test_folders_without_a_finished_run_and_other_metrics(arms, tmp_path, call_tool):
    (tmp_path / "begun").mkdir()
    with pytest.raises(
        UserError, match=r"begun/predictions\.json: give a folder in which tools/pretrain.py has finished"
    ):
        compare_classified({"plain": arms["plain"][:1], "sge": [tmp_path / "begun"]}, tmp_path / "out")
    with pytest.raises(UserError, match="--metric AP is none of top1, top5"):
        compare_classified(arms, tmp_path / "out", question=Question())
    for arguments, words in (
        (["--metric", "top1", "--config-file", "x.yaml"], "train them by --pretrain"),
        (["--metric", "top1", "--compare", "--gt", "x.json"], "leave out --gt"),
        (["--metric", "top1", "--compare"], "--compare needs --arm-results NAME FOLDER"),
    ):
        done = call_tool("measure_gain.py", "--output", "out", *arguments)
        assert done.returncode == 2 and words in done.stderr
