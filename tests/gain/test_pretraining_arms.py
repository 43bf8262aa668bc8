"""Arms and seeds of classifiers, trained and compared in one call."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image

from sge_det import UserError
from sge_det.errors import Stopped
from sge_det.gain import Question, measure_classified_gain, to_json
from sge_det.gain import pretraining as arms_of_classifiers
from sge_det.gain.pretraining import PretrainingMatrix

ONE = argparse.Namespace(num_gpus=1, num_machines=1)


@pytest.fixture
def options(tmp_path):
    """Images of two classes, 8 to train on and 10 to validate, and a model that is small enough for a test."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 5)):
        for place, name in enumerate(("dark", "light")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(100 * place, 100 * place + 150, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    return [
        *("--train", str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--model", "sge_resnet18"),
        *("--model-kwargs", "channels=(8,16,32,64)", "--stem-channels", "8", "--groups", "8"),
        *(
            "--img-size",
            "16",
            "--epochs",
            "1",
            "--batch-size",
            "4",
            "--lr",
            "0.01",
            "--workers",
            "0",
            "--device",
            "cpu",
        ),
    ]


def test_arms_and_seeds_are_trained_and_compared(options, tmp_path, monkeypatch):
    matrix = PretrainingMatrix(options, tmp_path / "out", custom_arms=[["few", "groups", "2"]], seeds=(3, 5))
    made = []
    pretrain = arms_of_classifiers.pretrain

    def interrupted(run, **how):
        if len(made) == 4:
            raise Stopped(15)
        made.append(run)
        return pretrain(run, **how)

    monkeypatch.setattr(arms_of_classifiers, "pretrain", interrupted)
    with pytest.raises(Stopped):
        measure_classified_gain(matrix, ONE, bootstrap=200)
    assert [(run.model, run.groups, run.seed) for run in made] == [
        *(("resnet18", 8, 3), ("sge_resnet18", 8, 3), ("sge_resnet18", 2, 3), ("resnet18", 8, 5)),
    ]
    times = {run.folder: (run.folder / "model_final.pth").stat().st_mtime_ns for run in made}
    monkeypatch.setattr(arms_of_classifiers, "pretrain", pretrain)
    measure_classified_gain(matrix, ONE, bootstrap=200, against="sge")
    assert times == {folder: (folder / "model_final.pth").stat().st_mtime_ns for folder in times}
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (list(report["arms"]), report["seeds"]) == (["sge", "plain", "few"], [3, 5])
    for name in report["arms"]:
        alone = [json.loads((tmp_path / f"out/{name}/seed{k}/result.json").read_text())["top1"] for k in (3, 5)]
        assert report["arms"][name]["classification"]["top1"]["values"] == pytest.approx(alone)
    assert report["plan"]["metric"] == "top1" and report["plan"]["finished_before"] == []
    assert "differ in" not in report["verdict"]


def test_a_question_that_was_not_declared_is_told(options, tmp_path):
    matrix = PretrainingMatrix(options, tmp_path / "out")
    measure_classified_gain(matrix, ONE, bootstrap=0)
    other = Question(metric="top1", margin=3.0)
    report = to_json(measure_classified_gain(matrix, ONE, bootstrap=0, question=other).report)
    assert "before the first run and is 3.0 here" in report["verdict"]
    with pytest.raises(UserError, match="of 2 classes every image is right by top5: give --metric top1"):
        measure_classified_gain(matrix, ONE, bootstrap=0, question=Question(metric="top5"))
    other = PretrainingMatrix([*options, "--lr", "0.02"], tmp_path / "out")
    with pytest.raises(UserError, match=r"made with --lr 0\.01, not 0\.02"):
        measure_classified_gain(other, ONE, bootstrap=0)


def test_what_an_arm_gets_wrong_is_told_before_the_first_trains(options, tmp_path):
    matrix = PretrainingMatrix(options, tmp_path / "out", custom_arms=[["few", "groups", "3"]])
    with pytest.raises(UserError, match=r"^arm few: --model sge_resnet18 .* cannot be built: .*3 groups"):
        measure_classified_gain(matrix, ONE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "how", "words"),
    [
        (["--epoch", "1"], {}, "unrecognized arguments: --epoch 1"),
        (["--seed", "1"], {}, "--seed is set for each run"),
        (["--output=x"], {}, "--output=x is set for each run"),
        ([], {"arm_names": ["plain", "se"]}, "there is no arm se of classifiers among plain, sge"),
        ([], {"arm_names": ["plain"]}, "name at least two arms"),
        ([], {"custom_arms": [["few", "groups"]]}, "pairs of OPTION VALUE"),
        ([], {"seeds": (1, 1)}, "must be different numbers"),
        ([], {"custom_arms": [["again", "groups", "8"]]}, "the arms sge and again would train the same"),
        (["--model", "resnet18"], {"custom_arms": [["few", "groups", "2"]]}, "--arm few model sge_resnet18"),
        ([], {"custom_arms": [["../few", "groups", "4"]]}, "the arm name '../few' does not fit a folder"),
        ([], {"custom_arms": [["few", "seed", "4"]]}, "--arm few seed 4: seed is set for each run"),
        ([], {"custom_arms": [["few", "groups", "x"]]}, "^arm few: .*argument --groups: invalid int value: 'x'"),
        (["--num-gpus", "2"], {}, "--num-gpus is of all runs: give it before --pretrain"),
        (["--overwrite"], {}, "--overwrite is of a single run: leave it out after --pretrain"),
        (["--seeds", "1"], {}, "after those of measure_gain.py: unrecognized arguments: --seeds 1"),
    ],
)
def test_mistakes_are_told(options, tmp_path, more, how, words):
    with pytest.raises(UserError, match=words):
        PretrainingMatrix([*options, *more], tmp_path / "out", **how)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--metric", "AP", "--pretrain", "--train", "x"], "--pretrain trains classifiers: give --metric top1"),
        (["--metric", "top1", "--jobs", "2", "--pretrain"], "one after the other: leave out --jobs"),
        (["--metric", "top1", "--pretrain", "--val", "x"], "the following arguments are required: --train"),
        (["--metric", "top1", "--pretrain", "--train", "no", "--val", "x"], "--train no is not there"),
    ],
)
def test_the_tool_tells_mistakes(call_tool, arguments, words):
    done = call_tool("measure_gain.py", "--output", "out", *arguments)
    assert done.returncode == 2 and words in done.stderr, done.stderr
