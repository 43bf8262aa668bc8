import json
import re

import pytest
from conftest import TINY

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


def dataset_arguments(datasets):
    return [word for name, json_file, images in datasets for word in ("--dataset", name, json_file, images)]


@pytest.mark.slow
def test_two_processes_train_and_evaluate_on_cpus(run_tool, sample_datasets, tmp_path):
    run = run_tool(
        "train_net.py",
        *("--config-file", FASTER, "--num-gpus", "2", *dataset_arguments(sample_datasets)),
        *(*TINY, "SOLVER.MAX_ITER", "2", "OUTPUT_DIR", tmp_path / "out"),
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "model_final.pth").is_file()
    results = json.loads((tmp_path / "out/inference/coco_instances_results.json").read_text())
    assert isinstance(results, list)
    assert "AP50" in run.stdout + run.stderr
    assert re.search(r"the metrics of \d+ detections \(bbox\) took \d", run.stdout + run.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml"),
        ([], "--config-file"),
        (["--config-file", "COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml"], "sge_resnet50.pth"),
        (["--config-file", FASTER, "MODEL.SGE.GROUPS", "7"], "GROUPS: 7 does not divide"),
        (["--config-file", FASTER, "OUTPUT_DIR", "/dev/null/run"], "OUTPUT_DIR /dev/null/run: /dev/null is a file"),
        (["--config-file", FASTER, "--dataset", "mine", "none.json", "."], "none.json"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(call_tool, sample_datasets, arguments, message):
    if "--dataset" not in arguments and arguments:
        arguments = [*dataset_arguments(sample_datasets), *arguments]
    run = call_tool("train_net.py", *arguments)
    assert run.returncode == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in run.stderr


def test_a_mistake_in_one_of_the_processes_is_told_the_same_way(fork_tool, sample_datasets, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"not weights")
    run = fork_tool(
        "train_net.py",
        *("--config-file", FASTER, "--num-gpus", "2", *dataset_arguments(sample_datasets)),
        *(*TINY, "OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", tmp_path / "w.pth"),
    )
    assert run.returncode == 2
    assert "w.pth cannot be read" in run.stderr.strip().splitlines()[-1]
