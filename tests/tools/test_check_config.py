import json

from conftest import TINY
from PIL import Image

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


def dataset_arguments(datasets):
    return [word for name, json_file, images in datasets for word in ("--dataset", name, json_file, images)]


def test_a_sound_config(call_tool, sample_datasets):
    run = call_tool("check_config.py", "--config-file", FASTER, *dataset_arguments(sample_datasets), *TINY)
    assert (run.returncode, run.stdout) == (0, f"{FASTER}: 0 errors, 0 warnings\n")


def test_every_error_and_warning_is_printed(run_tool, sample_datasets):
    faults = ["MODEL.SGE.GROUPS", "48", "MODEL.WEIGHTS", "nowhere.pth", "MODEL.FPN.NORM", "SyncBN"]
    run = run_tool("check_config.py", "--config-file", FASTER, *dataset_arguments(sample_datasets), *TINY, *faults)
    assert run.returncode == 2
    lines = run.stdout.splitlines()
    assert lines[0].startswith("error: MODEL.SGE.GROUPS: 48 does not divide the 64 channels of res2")
    assert lines[1].startswith("error: MODEL.WEIGHTS: nowhere.pth is not there")
    assert lines[2].startswith("warning: MODEL.FPN.NORM: SyncBN in one process is BN")
    assert lines[3:] == [f"{FASTER}: 2 errors, 1 warnings"]
    assert "Traceback" not in run.stderr


def test_warnings_alone_do_not_fail(call_tool, sample_datasets):
    command = ("--config-file", FASTER, *dataset_arguments(sample_datasets), *TINY, "MODEL.BACKBONE.FREEZE_AT", "2")
    run = call_tool("check_config.py", *command)
    assert run.returncode == 0
    assert run.stdout.startswith("warning: MODEL.BACKBONE.FREEZE_AT: 2 freezes")
    assert run.stdout.endswith(f"{FASTER}: 0 errors, 1 warnings\n")


def test_the_processes_are_those_of_the_arguments(call_tool, sample_datasets):
    command = ("--config-file", FASTER, *dataset_arguments(sample_datasets), *TINY, "MODEL.FPN.NORM", "naiveSyncBN")
    run = call_tool("check_config.py", *command)
    assert run.stdout.startswith("warning: MODEL.FPN.NORM: naiveSyncBN in one process is BN")
    assert call_tool("check_config.py", "--num-gpus", "2", *command).stdout == f"{FASTER}: 0 errors, 0 warnings\n"


def test_images_opens_every_image(call_tool, tmp_path):
    """Of 52 images the one that the sample of 50 passes by is damaged."""
    for number in range(52):
        Image.new("RGB", (40, 30)).save(tmp_path / f"{number}.png")
    (tmp_path / "25.png").write_bytes((tmp_path / "25.png").read_bytes()[:60])
    images = [{"id": n, "file_name": f"{n}.png", "height": 30, "width": 40} for n in range(52)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [3, 3, 20, 20]} for n in range(52)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "thing"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    command = ("--config-file", FASTER, "--dataset", "own", tmp_path / "a.json", tmp_path, *TINY)
    run = call_tool("check_config.py", *command)
    assert (run.returncode, run.stdout) == (0, f"{FASTER}: 0 errors, 0 warnings\n")
    run = call_tool("check_config.py", "--images", *command)
    assert run.returncode == 2
    assert f"error: data set own: the image {tmp_path / '25.png'} cannot be read" in run.stdout


def test_no_config(call_tool):
    run = call_tool("check_config.py")
    assert run.returncode == 2
    example = "configs/sample/faster_rcnn_SGE_R_50_FPN.yaml"
    assert run.stderr == f"error: give a config with --config-file, for instance {example}\n"


def test_the_same_findings_stop_train_net(fork_tool, sample_datasets):
    run = fork_tool(
        "train_net.py",
        *("--config-file", FASTER, *dataset_arguments(sample_datasets), *TINY, "MODEL.SGE.GROUPS", "48"),
    )
    assert run.returncode == 2
    assert "error: MODEL.SGE.GROUPS: 48 does not divide" in run.stderr


def test_the_same_findings_stop_measure_gain(fork_tool, sample_datasets, tmp_path):
    run = fork_tool(
        "measure_gain.py",
        *("--config-file", FASTER, "--output", tmp_path / "out", *dataset_arguments(sample_datasets), *TINY),
        *("MODEL.WEIGHTS", "nowhere.pth"),
    )
    assert run.returncode == 2
    assert "error: MODEL.WEIGHTS: nowhere.pth is not there" in run.stderr
    assert not (tmp_path / "out").exists()
