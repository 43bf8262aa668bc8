import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model

import sge_det
from sge_det.checkpoint.checkpointer import Checkpointer, last_checkpoint
from sge_det.data.datasets import register_dataset
from sge_det.engine.periodic import KeptCheckpoints
from sge_det.engine.training import (
    Trainer,
    argument_parser,
    build_seeded_model,
    evaluate,
    plain_twin,
    setup_config,
    start_run,
    train,
)
from sge_det.errors import Resumable, Stopped

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


def tiny_config(tmp_path, datasets, *overrides, config=FASTER):
    return setup_config(config, [*TINY, "OUTPUT_DIR", str(tmp_path), *overrides], datasets)


@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet"])
def test_sample_detectors_train_and_evaluate(tmp_path, sample_datasets, detector):
    cfg = tiny_config(tmp_path, sample_datasets, "SOLVER.MAX_ITER", "2", config=f"sample/{detector}_SGE_R_50_FPN.yaml")
    start = build_seeded_model(cfg).state_dict()
    results = train(cfg)
    assert set(results) == {"bbox", "segm"} if detector == "mask_rcnn" else {"bbox"}
    assert {"AP", "AP50", "AP75", "APs", "APm", "APl"} <= set(results["bbox"])
    end = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert set(end) == set(start)
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    for name in ("backbone.bottom_up.stem.conv1.weight", "backbone.bottom_up.res5.2.sge.bias"):
        assert name in moved
    losses = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert all(torch.isfinite(torch.tensor(entry["total_loss"])) for entry in losses if "total_loss" in entry)


@pytest.mark.parametrize("attention", ["sge", "se"])
def test_arms_start_from_the_same_shared_values(sample_datasets, tmp_path, attention):
    cfg = tiny_config(tmp_path, sample_datasets, "MODEL.SGE.ATTENTION", attention, "SEED", "7")
    model, twin = build_seeded_model(cfg), build_seeded_model(plain_twin(cfg))
    shared = twin.state_dict()
    state = model.state_dict()
    assert len(state) > len(shared)
    assert all(torch.equal(state[key], value) for key, value in shared.items())
    other = build_seeded_model(tiny_config(tmp_path, sample_datasets, "SEED", "8")).state_dict()
    assert not torch.equal(
        other["backbone.bottom_up.stem.conv1.weight"], shared["backbone.bottom_up.stem.conv1.weight"]
    )


def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path, sample_datasets):
    def run(folder, stop=None):
        cfg = tiny_config(folder, sample_datasets, "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2")
        cfg.DATASETS.TEST = ()
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        if stop:
            trainer.max_iter = stop
        trainer.train()
        return trainer.model.state_dict()

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=2)
    (tmp_path / "parts" / "model_final.pth").unlink(missing_ok=True)
    (tmp_path / "parts" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = run(tmp_path / "parts")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_run_cut_off_in_its_last_file_is_finished(tmp_path, sample_datasets):
    cfg = tiny_config(tmp_path, sample_datasets, "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "2")
    cfg.DATASETS.TEST = ()
    train(cfg)
    final, part = tmp_path / "model_final.pth", tmp_path / ".model_final.pth.part"
    whole = torch.load(final, weights_only=True)
    part.write_bytes(final.read_bytes()[:1000])
    final.unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    train(cfg, resume=True)
    again = torch.load(final, weights_only=True)
    assert all(torch.equal(value, again["model"][key]) for key, value in whole.pop("model").items())
    assert whole["iteration"] == again["iteration"] == 1
    assert whole["trainer"]["iteration"] == again["trainer"]["iteration"] == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert not part.exists()


def test_checkpoints_are_whole_or_absent(tmp_path, monkeypatch):
    checkpointer = Checkpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("first")

    def full_disk(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(
        sge_det.UserError, match=r"second\.pth cannot be written \(the disk is full\), .*first\.pth: free some space"
    ):
        checkpointer.save("second")
    assert (tmp_path / "last_checkpoint").read_text() == "first.pth"
    names = ["first.pth", "first.pth.sha256.json", "last_checkpoint"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


SMALL = (
    *("MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1"),
)


def evaluations(folder):
    """The iterations whose metrics stand in the log."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["iteration"] for line in lines if "bbox/AP" in line]


def test_a_seed_that_was_drawn_is_the_runs(tmp_path, sample_datasets):
    cfg = tiny_config(tmp_path, sample_datasets, *SMALL, "SEED", "-1", "SOLVER.MAX_ITER", "1")
    cfg.DATASETS.TEST = ()
    first = Trainer(cfg)
    first.resume_or_load(resume=True)
    first.train()
    cfg.SOLVER.MAX_ITER = 3
    resumed, other = Trainer(cfg), Trainer(cfg)
    resumed.resume_or_load(resume=True)
    other.resume_or_load(resume=False)
    assert resumed.seed == first.seed != other.seed
    # what the first would have gone on with, in the order and with the augmentations of its seed
    first.data_loader.start = 1
    here, there = (next(iter(trainer.data_loader)) for trainer in (resumed, first))
    assert [image["file_name"] for image in here] == [image["file_name"] for image in there]
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("cut_off", [0, 1, 2], ids=["first", "second", "last"])
def test_an_evaluation_that_is_cut_off_is_made_up_for(tmp_path, sample_datasets, monkeypatch, cut_off):
    cfg = tiny_config(tmp_path, sample_datasets, *SMALL, "SOLVER.MAX_ITER", "3")
    test, calls = Trainer.test.__func__, []

    def stop(cls, *arguments):
        calls.append(arguments)
        if len(calls) == cut_off + 1:
            raise Stopped(15)
        return test(cls, *arguments)

    monkeypatch.setattr(Trainer, "test", classmethod(stop))
    with pytest.raises(Stopped):
        train(cfg)
    # what was measured before is there
    assert evaluations(tmp_path) == [0, 1][:cut_off]
    assert train(cfg, resume=True)["bbox"].keys() >= {"AP"}
    assert evaluations(tmp_path) == [0, 1, 3]


@pytest.mark.parametrize(("asked", "kept"), [(None, 4), (3, 3), (1, 2)])
def test_the_last_two_checkpoints_are_always_kept(tmp_path, asked, kept):
    hook = KeptCheckpoints(Checkpointer(torch.nn.Linear(2, 2), str(tmp_path)), 1, max_to_keep=asked)
    for iteration in range(4):
        hook.step(iteration)
    names = [f"model_{iteration:07d}.pth" for iteration in range(4)][-kept:]
    assert sorted(path.name for path in tmp_path.glob("model*")) == sorted(
        [*names, *(f"{name}.sha256.json" for name in names)]
    )


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("gone", ["val/000000000001.jpg", "annotations/instances_val.json", "train"])
def test_a_file_that_goes_while_a_run_goes_on_is_told(tmp_path, sample, monkeypatch, gone, workers):
    own = tmp_path / "set"
    shutil.copytree(sample, own)
    datasets = [(f"own_{part}", own / f"annotations/instances_{part}.json", own / part) for part in ("train", "val")]
    cfg = tiny_config(tmp_path / "out", datasets, *SMALL, "SOLVER.MAX_ITER", "9", "DATALOADER.NUM_WORKERS", workers)
    step = Trainer.run_step

    def take_away(trainer):
        step(trainer)
        if (own / gone).exists():
            (own / gone).rename(tmp_path / "away")

    monkeypatch.setattr(Trainer, "run_step", take_away)
    with pytest.raises(
        Resumable, match=r"^[^\n]*(is not there any more|cannot be read, it is not there): put it back$"
    ):
        train(cfg)
    assert last_checkpoint(tmp_path / "out") is not None


def test_a_line_that_was_cut_off_is_no_part_of_the_next(tmp_path, sample_datasets):
    cfg = tiny_config(tmp_path, sample_datasets, *SMALL, "SOLVER.MAX_ITER", "1")
    train(cfg)
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('{"iteration": 1, "tot')
    cfg.SOLVER.MAX_ITER = 2
    train(cfg, resume=True)
    assert evaluations(tmp_path) == [1, 2]


@pytest.mark.parametrize("thread", [False, True], ids=["metrics.json", "TensorBoard"])
def test_a_log_on_a_full_disk_is_told_and_nothing_else(tmp_path, sample_datasets, monkeypatch, capfd, thread):
    """TensorBoard's writer has a thread of its own, whose traceback would be printed."""

    def full(*arguments):
        raise OSError(28, "No space left on device")

    if thread:
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    else:
        monkeypatch.setattr("detectron2.utils.events.JSONWriter.write", full)
    cfg = tiny_config(tmp_path, sample_datasets, *SMALL, "SOLVER.MAX_ITER", "1")
    with pytest.raises(sge_det.UserError, match="is full: free some space"):
        train(cfg)
    assert "Traceback" not in capfd.readouterr().err
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_evaluation_loads_what_training_wrote(tmp_path, sample_datasets):
    cfg = tiny_config(tmp_path, sample_datasets, "SOLVER.MAX_ITER", "1")
    trained = train(cfg)
    cfg = tiny_config(tmp_path / "again", sample_datasets, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth"))
    assert evaluate(cfg)["bbox"]["AP"] == pytest.approx(trained["bbox"]["AP"], nan_ok=True)
    with pytest.raises(sge_det.UserError, match="no weights to evaluate"):
        evaluate(tiny_config(tmp_path / "none", sample_datasets))


def test_weights_of_another_model_are_refused(tmp_path, sample_datasets):
    other = tiny_config(tmp_path, sample_datasets, "MODEL.RESNETS.DEPTH", "101", "MODEL.SGE.GROUPS", "8")
    path = tmp_path / "other.pth"
    torch.save({"model": build_model(other).state_dict()}, path)
    with pytest.raises(sge_det.UserError, match=r"other\.pth"):
        tiny_config(tmp_path, sample_datasets, "MODEL.WEIGHTS", str(path))
    # without the doctor, as somebody else's trainer would load them
    cfg = tiny_config(tmp_path, sample_datasets, "MODEL.RESNETS.WIDTH_PER_GROUP", "8")
    with pytest.raises(sge_det.UserError, match=r"other\.pth do not match the model.*shape"):
        Checkpointer(build_model(cfg)).load(str(path))


def test_weights_of_another_number_of_classes_are_a_start_but_no_evaluation(tmp_path, sample_datasets):
    cfg = tiny_config(tmp_path, sample_datasets)
    state = build_seeded_model(cfg).state_dict()
    state["roi_heads.box_predictor.cls_score.weight"] = torch.zeros(9, 256)
    torch.save({"model": state}, tmp_path / "nine.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "nine.pth")
    Trainer(cfg).resume_or_load(resume=False)
    with pytest.raises(sge_det.UserError, match=r"nine\.pth do not match.*cls_score.*as many classes"):
        evaluate(cfg)


def test_damaged_weights_are_named(tmp_path, sample_datasets):
    (tmp_path / "damaged.pth").write_bytes(b"not weights")
    with pytest.raises(sge_det.UserError, match=r"damaged\.pth cannot be read") as raised:
        tiny_config(tmp_path, sample_datasets, "MODEL.WEIGHTS", str(tmp_path / "damaged.pth"))
    assert "weights_only" not in str(raised.value)


def test_weights_that_are_not_there_are_told_before_anything_is_built(sample_datasets):
    with pytest.raises(sge_det.UserError, match=r"weights/sge_resnet50\.pth is not there.*MODEL\.WEIGHTS ''"):
        setup_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml", [], sample_datasets)


@pytest.mark.parametrize("reset", [True, False])
def test_reset_starts_sge_anew_from_weights_that_have_it(tmp_path, sample_datasets, reset):
    state = build_seeded_model(tiny_config(tmp_path, sample_datasets, "MODEL.SGE.INIT", "[0.7, 0.3]")).state_dict()
    torch.save({"model": state}, tmp_path / "sge.pth")
    cfg = tiny_config(tmp_path / "out", sample_datasets, "MODEL.SGE.RESET", str(reset), "SEED", "1")
    cfg.MODEL.WEIGHTS, cfg.SOLVER.MAX_ITER = str(tmp_path / "sge.pth"), 2
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    start = trainer.model.state_dict()
    for key, value in state.items():
        if ".sge." in key and reset:
            value = torch.full_like(value, 0.0 if key.endswith("weight") else 1.0)
        assert torch.equal(start[key], value)
    trainer.iter = 0
    trainer.model.state_dict()["backbone.bottom_up.res2.0.sge.weight"].fill_(0.25)
    trainer.checkpointer.save("model_0000000", iteration=0)
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert (resumed.model.state_dict()["backbone.bottom_up.res2.0.sge.weight"] == 0.25).all()


def test_time_augmentation_and_expected_results_are_honoured(tmp_path, sample_datasets):
    augmented = [
        *("TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)", "TEST.AUG.MAX_SIZE", "96"),
        *("SOLVER.MAX_ITER", "1", "TEST.EVAL_PERIOD", "0"),
    ]
    results = train(tiny_config(tmp_path, sample_datasets, *augmented))
    assert list(results) == ["bbox", "bbox_TTA"]
    assert (tmp_path / "inference_TTA/coco_instances_results.json").is_file()
    wrong = [*augmented, "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    wrong += ["TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 150.0, 0.1]]"]
    with pytest.raises(SystemExit):
        evaluate(tiny_config(tmp_path, sample_datasets, *wrong))


def test_an_output_folder_that_cannot_be_made_is_told(sample_datasets):
    cfg = tiny_config("/dev/null/out", sample_datasets)
    with pytest.raises(sge_det.UserError, match="OUTPUT_DIR /dev/null/out cannot be written"):
        start_run(cfg, argument_parser().parse_args([]))


def test_a_mistake_found_in_training_leaves_no_traceback_in_the_log(tmp_path, sample_datasets, caplog):
    cfg = tiny_config(tmp_path, sample_datasets, "SOLVER.MAX_ITER", "2")
    for image in json.loads(Path(sample_datasets[0][1]).read_text())["images"]:
        (tmp_path / image["file_name"]).write_bytes(b"\xff\xd8 not a picture")
    cfg.DATASETS.TRAIN = ("damaged_train",)
    register_dataset("damaged_train", sample_datasets[0][1], str(tmp_path))
    with pytest.raises(sge_det.UserError, match="cannot be read"):
        train(cfg)
    assert not any(record.exc_info for record in caplog.records)


def test_a_diverging_loss_is_told(tmp_path, sample_datasets, caplog):
    cfg = tiny_config(tmp_path, sample_datasets, "SOLVER.BASE_LR", "1e12", "SOLVER.MAX_ITER", "20")
    with pytest.raises(sge_det.UserError, match=r"lower SOLVER\.BASE_LR"):
        train(cfg)
    assert not any(record.exc_info for record in caplog.records)


def test_five_lines_of_the_readme_work(tmp_path, sample_datasets, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"<!-- tested -->\n```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)  # the README's own text
    assert any(isinstance(module, sge_det.SpatialGroupEnhance) for module in scope["model"].modules())


def test_data_sets_keep_their_classes(sample_datasets, tmp_path):
    tiny_config(tmp_path, sample_datasets)
    assert MetadataCatalog.get("tiny_val").thing_classes == MetadataCatalog.get("tiny_train").thing_classes
