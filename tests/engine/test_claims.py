"""A folder belongs to one run: what may go on in it, and what is refused."""

import argparse
import errno
import json
import logging
import os
import shutil

import pytest
from conftest import TINY
from omegaconf import OmegaConf

from sge_det.engine import lazy, training
from sge_det.engine.claims import claimed
from sge_det.engine.training import setup_config
from sge_det.errors import UserError

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


@pytest.fixture
def config(tmp_path, sample_datasets):
    def make(*overrides):
        return setup_config(FASTER, [*TINY, "OUTPUT_DIR", str(tmp_path / "run"), *overrides], sample_datasets)

    return make


@pytest.fixture
def run(tmp_path, config):
    """A folder with what a run leaves."""
    with claimed(config()):
        pass
    folder = tmp_path / "run"
    for name in ("model_0000004.pth", "model_0000004.pth.sha256.json", "metrics.json", "log.txt"):
        (folder / name).write_text(name)
    (folder / "last_checkpoint").write_text("model_0000004.pth")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_not_written_over_by_accident(config, run):
    before = contents(run)
    with (
        pytest.raises(UserError, match=r"holds a run \(model_0000004\.pth\).*--resume.*--overwrite"),
        claimed(config()),
    ):
        pass
    assert contents(run) == before


@pytest.mark.parametrize("tag", [None, "", "model_0000009.pth"])
def test_a_run_without_a_good_tag_is_a_run_too(config, run, tag):
    (run / "last_checkpoint").unlink()
    if tag is not None:
        (run / "last_checkpoint").write_text(tag)
    with pytest.raises(UserError, match="holds a run"), claimed(config()):
        pass


def test_overwrite_removes_what_a_run_would_go_on_from_and_no_more(config, run):
    (run / "notes.txt").write_text("mine")
    with claimed(config("SEED", "9"), overwrite=True):
        assert set(contents(run)) == {"notes.txt", "log.txt", "fingerprint.json", ".run.lock"}
    assert json.loads((run / "fingerprint.json").read_text())["config"]["SEED"] == "9"


def test_resume_and_overwrite_exclude_each_other(config, run):
    with pytest.raises(UserError, match="give one of them"), claimed(config(), resume=True, overwrite=True):
        pass


CHANGED = {
    "SOLVER.MAX_ITER": "77",
    "SOLVER.STEPS": "(5,)",
    "SOLVER.CHECKPOINT_PERIOD": "3",
    "TEST.EVAL_PERIOD": "3",
    "DATALOADER.NUM_WORKERS": "3",
    "DATALOADER.TIMEOUT": "3",
    "TEST.DETECTIONS_PER_IMAGE": "7",
    "INPUT.MIN_SIZE_TEST": "96",
    "DATASETS.TEST": "()",
}


@pytest.mark.parametrize("key", CHANGED)
def test_what_may_change_on_resume(config, run, key):
    with claimed(config(key, CHANGED[key]), resume=True):
        pass


FIXED = {
    "SEED": ("0", "5"),
    "SOLVER.BASE_LR": ("0.02", "0.5"),
    "SOLVER.OPTIMIZER": ("'ADAMW'", "'SGD'"),
    "SOLVER.IMS_PER_BATCH": ("2", "4"),
    "MODEL.SGE.GROUPS": ("64", "32"),
    "MODEL.FPN.OUT_CHANNELS": ("256", "128"),
}


@pytest.mark.parametrize("key", FIXED)
def test_what_may_not_change_on_resume_is_named_with_both_values(config, run, key):
    before = contents(run)
    new = FIXED[key][1]
    with (
        pytest.raises(UserError, match=f"made with {key} .*, this command has {new}"),
        claimed(config(key, new.strip("'")), resume=True),
    ):
        pass
    assert contents(run) == before


def test_another_data_set_is_refused(config, run):
    path = run / "fingerprint.json"
    made = json.loads(path.read_text())
    made["content"]["tiny_train"] = "0" * 64
    path.write_text(json.dumps(made))
    with pytest.raises(UserError, match="another content of tiny_train"), claimed(config(), resume=True):
        pass


def test_a_run_goes_on_without_the_weights_that_it_began_with(tmp_path, run, sample_datasets):
    path, weights = run / "fingerprint.json", ["MODEL.WEIGHTS", "/gone.pth"]
    made = json.loads(path.read_text())
    made["config"]["MODEL.WEIGHTS"], made["content"]["MODEL.WEIGHTS"] = "'/gone.pth'", "0" * 64
    path.write_text(json.dumps(made))

    def set_up(folder, **how):
        return setup_config(FASTER, [*TINY, "OUTPUT_DIR", str(folder), *weights], sample_datasets, **how)

    with claimed(set_up(run, resume=True), resume=True):
        pass
    for folder, how, told in (
        (tmp_path / "none", {"resume": True}, r"MODEL\.WEIGHTS: /gone\.pth is not there.* from scratch"),
        (run, {}, "from scratch with MODEL.WEIGHTS ''"),
        (run, {"eval_only": True}, r"or name others with MODEL\.WEIGHTS$"),
    ):
        with pytest.raises(UserError, match=told):
            set_up(folder, **how)


def test_an_evaluation_leaves_the_config_of_a_run(config, run, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "start_logs", lambda folder, *_: os.makedirs(folder, exist_ok=True))
    monkeypatch.setattr(lazy, "start_logs", training.start_logs)

    def start(folder, eval_only):
        args = argparse.Namespace(eval_only=eval_only)
        training.start_run(config("OUTPUT_DIR", str(folder), "SEED", "5"), args)
        return (folder / "config.yaml").read_text()

    (run / "config.yaml").write_text("the run's")
    assert start(run, True) == "the run's"
    lazy.start_lazy_run(OmegaConf.create({"train": {"output_dir": str(run)}}), argparse.Namespace(eval_only=True))
    assert (run / "config.yaml").read_text() == "the run's"
    assert "SEED: 5" in start(run, False)
    for _ in range(2):  # the config of an evaluation is no run's
        assert "SEED: 5" in start(tmp_path / "evaluated", True)
        (tmp_path / "evaluated/config.yaml").write_text("another evaluation's")


def test_another_version_is_said_and_goes_on(config, run, caplog):
    path = run / "fingerprint.json"
    made = json.loads(path.read_text())
    made["version"]["torch"] = "1.0"
    path.write_text(json.dumps(made))
    with caplog.at_level(logging.WARNING), claimed(config(), resume=True):
        pass
    assert "torch 1.0" in caplog.text


@pytest.mark.parametrize("text", ["", "[]", "{", '{"config": 3}'])
def test_a_damaged_fingerprint_is_told(config, run, text):
    (run / "fingerprint.json").write_text(text)
    with pytest.raises(UserError, match=r"fingerprint\.json cannot be read"), claimed(config(), resume=True):
        pass


def test_resume_without_a_checkpoint_is_no_silent_start(config, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), claimed(config(), resume=True):
        pass
    assert "no checkpoint yet, the run starts at iteration 0" in caplog.text


def test_a_folder_that_vanishes_in_the_middle_is_told(config, tmp_path):
    with (
        pytest.raises(
            UserError, match=r"run was removed while the run was writing there.*with --overwrite in place of"
        ),
        claimed(config()),
    ):
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()  # by what is written next
        (tmp_path / "run/model_final.pth").write_text("whole")
    with claimed(config(), overwrite=True):
        pass
    assert not (tmp_path / "run/model_final.pth").exists()


def test_two_at_once_in_a_folder_are_refused(config):
    with claimed(config()), pytest.raises(UserError, match="is being trained by another process"), claimed(config()):
        pass


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, r"the disk that holds .*run is full: free some space"),
        (errno.EROFS, r"run cannot be written: Read-only file system; see to its disk"),
        (errno.EACCES, r"OUTPUT_DIR .*run cannot be written: Permission denied: name another"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told(config, monkeypatch, number, told):
    def fail(lock, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with pytest.raises(UserError, match=f"^{'.*' if told.startswith('run') else ''}{told}$"), claimed(config()):
        pass
