import pytest

FASTER = "lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py"
NO_DATA = ["dataloader.train.dataset.names=[]", "dataloader.test.dataset.names=[]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config-file"),
        (["--config-file", "lazy/nowhere.py"], "lazy/nowhere.py"),
        (["--config-file", FASTER], "train.init_checkpoint weights/sge_resnet50.pth is not there"),
        (["--config-file", FASTER, "optimizer.lrr=1"], "did you mean optimizer.lr"),
        (
            ["--config-file", FASTER, "train.init_checkpoint=''", "train.output_dir=/dev/null/run", *NO_DATA],
            "train.output_dir /dev/null/run: /dev/null is a file",
        ),
        (["--config-file", FASTER, "--eval-only", "--overwrite"], "--overwrite is for training"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(call_tool, arguments, message):
    run = call_tool("lazy_train_net.py", *arguments)
    assert run.returncode == 2, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_the_tool_for_yaml_names_this_one(call_tool):
    run = call_tool("train_net.py", "--config-file", FASTER)
    assert run.returncode != 0
    assert "tools/lazy_train_net.py" in run.stdout + run.stderr
