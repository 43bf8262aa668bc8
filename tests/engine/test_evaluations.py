"""The best checkpoint and the early end, by evaluations whose results are given."""

import json

import pytest
import torch
from conftest import TINY
from started_tool import NARROW

from sge_det.engine.claims import claimed
from sge_det.engine.evaluations import Evaluations
from sge_det.engine.training import Trainer, setup_config, train
from sge_det.errors import UserError

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
WATCHED = [
    *("TEST.EVAL_PERIOD", "1", "SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "1"),
    *("SOLVER.BEST_CHECKPOINTER.ENABLED", "True", "SOLVER.EARLY_STOPPING.PATIENCE", "2"),
]
NAME = "backbone.bottom_up.res5.1.sge.bias"


def config(folder, datasets, *overrides):
    micro = [*TINY, *NARROW, "OUTPUT_DIR", str(folder), *WATCHED]
    return setup_config(FASTER, [*micro, *overrides], datasets)


@pytest.fixture
def results(monkeypatch):
    """AP by the number of the evaluation; "cut" ends it as a power cut would."""
    given = {}
    evaluations = []

    def test(cls, cfg, model, evaluators=None):
        value = given[len(evaluations)]
        if value == "cut":
            given[len(evaluations)] = given["instead"]
            raise KeyboardInterrupt
        evaluations.append(model.state_dict()[NAME].clone())
        return {"bbox": {"AP": value}}

    monkeypatch.setattr(Trainer, "test", classmethod(test))

    def give(*values, instead=None):
        evaluations.clear()
        given.clear()
        given.update(dict(enumerate(values)) | {"instead": instead})
        return evaluations

    return give


def test_the_best_is_kept_and_the_run_ends_when_nothing_is_better(tmp_path, sample_datasets, results):
    seen = results(1.0, 3.0, 3.0, 2.0, 9.0, 9.0)
    cfg = config(tmp_path, sample_datasets)
    assert train(cfg) == {"bbox": {"AP": 2.0}}
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert len(seen) == 4
    assert torch.equal(best["model"][NAME], seen[1])
    assert best["iteration"] == 1
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == 3
    assert torch.equal(final["model"][NAME], seen[3])
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # once more: it has ended, and is evaluated
    results(5.0)
    assert train(cfg, resume=True) == {"bbox": {"AP": 5.0}}
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 3
    # more patience: it goes on
    results(2.0, 4.0)
    patient = config(tmp_path, sample_datasets, "SOLVER.EARLY_STOPPING.PATIENCE", "5")
    assert train(patient, resume=True) == {"bbox": {"AP": 4.0}}
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 5
    assert [entry["bbox/AP"] for entry in json.loads((tmp_path / "evaluations.json").read_text()).values()] == [
        *(1.0, 3.0, 3.0, 2.0, 2.0, 4.0)
    ]


def test_an_evaluation_that_was_cut_off_is_done_again(tmp_path, sample_datasets, results):
    values = (1.0, 4.0, 2.0, 3.0)
    results(*values)
    train(config(tmp_path / "whole", sample_datasets))
    results(1.0, "cut", 2.0, 3.0, instead=4.0)
    cfg = config(tmp_path / "parts", sample_datasets)
    with claimed(cfg), pytest.raises(KeyboardInterrupt):
        train(cfg)
    with claimed(cfg, resume=True):
        train(cfg, resume=True)
    assert (tmp_path / "whole/evaluations.json").read_text() == (tmp_path / "parts/evaluations.json").read_text()
    for name in ("model_best.pth", "model_final.pth"):
        whole, parts = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "parts"))
        assert whole["iteration"] == parts["iteration"]
        assert all(torch.equal(value, parts["model"][key]) for key, value in whole["model"].items())
    # a run that starts anew there knows nothing of it
    results(*values)
    with claimed(cfg, overwrite=True):
        assert not (tmp_path / "parts/evaluations.json").exists()
        assert not (tmp_path / "parts/model_best.pth").exists()


def test_rules_by_hand(tmp_path):
    evaluations = Evaluations(tmp_path)
    for done, value in enumerate([float("nan"), 5.0, 5.3, 5.4, float("nan"), 5.6], 1):
        evaluations.add(done, {"bbox/AP": value})
    evaluations.read(6)
    assert evaluations.best("bbox/AP") == (6, 5.6)
    assert evaluations.best("segm/AP") is None
    # with a step of 0.5 the values after 5.0 are no better until 5.6, three later
    assert not evaluations.are_settled("bbox/AP", 4, 0.5)
    assert evaluations.are_settled("bbox/AP", 3, 0.5)
    assert not evaluations.are_settled("bbox/AP", 2, 0.0)
    assert not evaluations.are_settled("bbox/AP", 0, 0.5)
    evaluations.read(3)
    assert evaluations.best("bbox/AP") == (3, 5.3)
    (tmp_path / "evaluations.json").write_text("[]")
    with pytest.raises(UserError, match=r"evaluations\.json cannot be read"):
        evaluations.read(6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["TEST.EVAL_PERIOD", "0"], "TEST.EVAL_PERIOD 0 gives none before the last"),
        (["TEST.EVAL_PERIOD", "6"], "TEST.EVAL_PERIOD 6 gives none before the last"),
        (["SOLVER.EARLY_STOPPING.PATIENCE", "-1"], "a whole number from 0 on"),
        (["SOLVER.EARLY_STOPPING.MIN_DELTA", "-1.0"], "a finite number of at least 0"),
    ],
)
def test_rules_that_cannot_be(tmp_path, sample_datasets, overrides, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, sample_datasets, *overrides)


def test_a_metric_that_no_evaluation_gives(tmp_path, sample_datasets, results):
    results(1.0)
    with pytest.raises(UserError, match="METRIC segm/AP is not what the evaluation gives: bbox/AP"):
        train(config(tmp_path, sample_datasets, "SOLVER.EARLY_STOPPING.METRIC", "segm/AP"))
