"""The scripts that look at images: predict.py and visualize_attention.py."""

import json
import shutil

import pytest
from conftest import TINY
from PIL import Image
from sample_detectors import FASTER, save_weights


@pytest.fixture(scope="module")
def weights(sample_datasets, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    save_weights(FASTER, path, sample_datasets)
    return path


def test_predict(run_tool, sample, sample_datasets, weights, tmp_path):
    for number, picture in enumerate(sorted((sample / "val").glob("*.jpg"))[:2]):
        shutil.copy(picture, tmp_path / f"{number}.jpg")
    (tmp_path / "00.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:300])
    done = run_tool(
        "predict.py", "--config-file", FASTER, "--dataset", *sample_datasets[1], "--attention", "--output", "out",
        "--confidence", "0.05", "--input", "*.jpg", *TINY, "MODEL.WEIGHTS", weights,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "2 files drawn into out, detections in out/predictions.json" in done.stdout
    assert "error: 1 of 3 files cannot be read, the others are done: 00.jpg: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["0.jpg", "1.jpg"]
    for name in ("0.jpg", "1.jpg"):
        with Image.open(tmp_path / "out" / name) as drawn:
            drawn.load()


def test_visualize_attention(run_tool, sample, sample_datasets, weights, tmp_path):
    picture = sorted((sample / "val").glob("*.jpg"))[0]
    done = run_tool(
        "visualize_attention.py", "--config-file", FASTER, "--dataset", *sample_datasets[1], "--output", "out",
        "--groups", "top:2", "--limit", "1", "--input", picture, *TINY, "MODEL.WEIGHTS", weights,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"out/{picture.stem}_res5.2.png", "out/blocks.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{picture.stem}_res5.2.png", "blocks.png", "blocks.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("predict.py", ["--input", "nothing.jpg"], "nothing.jpg: there is no such file"),
        ("predict.py", ["--input", "here.jpg", "MODEL.WEIGHTS", "none.pth"], "none.pth is not there"),
        ("visualize_attention.py", [], "sge_sample_val is not there"),
    ],
)
def test_mistakes_end_with_a_sentence_and_code_2(fork_tool, tmp_path, tool, arguments, message):
    (tmp_path / "here.jpg").write_bytes(b"")
    done = fork_tool(tool, "--config-file", FASTER, "--output", "out", *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
