"""The moving average of the weights, against the recursion in float64."""

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2.engine import HookBase
from started_tool import NARROW

from sge_det.engine.training import Trainer, evaluate, setup_config
from sge_det.errors import UserError

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
EMA = ["MODEL_EMA.ENABLED", "True", "MODEL_EMA.DECAY", "0.6", "SOLVER.MAX_ITER", "4", "MODEL.RESNETS.NORM", "BN"]
NAMES = ["backbone.bottom_up.res5.1.sge.bias", "backbone.bottom_up.stem.conv1.norm.running_var"]


class Watch(HookBase):
    def __init__(self):
        self.seen = {name: [] for name in NAMES}

    def look(self):
        state = self.trainer.model.state_dict()
        for name in NAMES:
            self.seen[name].append(state[name].double().numpy().copy())

    before_train = look
    after_step = look


def config(folder, datasets, *overrides):
    micro = [*TINY, *NARROW, "OUTPUT_DIR", str(folder), *EMA]
    return setup_config(FASTER, [*micro, *overrides], datasets)


def run(cfg, stop=None):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    watch = Watch()
    trainer.register_hooks([watch])
    trainer.max_iter = stop or trainer.max_iter
    trainer.train()
    return watch.seen


def test_what_is_evaluated_and_saved_is_the_average(tmp_path, sample_datasets, monkeypatch):
    evaluated = []

    def look(cls, cfg, model, evaluators=None):
        evaluated.append({name: model.state_dict()[name].clone() for name in NAMES})
        return {}

    monkeypatch.setattr(Trainer, "test", classmethod(look))
    cfg = config(tmp_path / "whole", sample_datasets)
    seen = run(cfg)
    saved = torch.load(tmp_path / "whole/model_final.pth", weights_only=True)
    for name in NAMES:
        average = seen[name][0]
        for value in seen[name][1:]:
            average = 0.6 * average + 0.4 * value
        assert np.abs(seen[name][-1] - seen[name][0]).max() > 1e-6
        for found in (saved["model"][name], evaluated[-1][name]):
            np.testing.assert_allclose(found.numpy(), average, rtol=1e-5, atol=1e-7)
        assert np.array_equal(saved["trained"][name].double().numpy(), seen[name][-1])
    # a run that was cut off goes on with both
    parts = config(tmp_path / "parts", sample_datasets, "SOLVER.CHECKPOINT_PERIOD", "2")
    run(parts, stop=2)
    run(parts)
    again = torch.load(tmp_path / "parts/model_final.pth", weights_only=True)
    for part in ("model", "trained"):
        assert all(torch.equal(value, again[part][name]) for name, value in saved[part].items())
    # whoever loads the file gets what was evaluated
    evaluated.clear()
    evaluate(config(tmp_path / "test", sample_datasets, "MODEL.WEIGHTS", str(tmp_path / "whole/model_final.pth")))
    assert all(torch.equal(evaluated[-1][name], saved["model"][name]) for name in NAMES)


def test_statistics_are_not_counted_anew_beside_their_average(tmp_path, sample_datasets):
    with pytest.raises(UserError, match=r"TEST\.PRECISE_BN"):
        config(tmp_path, sample_datasets, "TEST.PRECISE_BN.ENABLED", "True")


@pytest.mark.parametrize("decay", ["1.0", "-0.1"])
def test_decays_that_average_nothing(tmp_path, sample_datasets, decay):
    with pytest.raises(UserError, match=r"MODEL_EMA.DECAY.*a number from 0 to below 1"):
        config(tmp_path, sample_datasets, "MODEL_EMA.DECAY", decay)
