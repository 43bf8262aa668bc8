"""Steps of several passes and steps in bfloat16."""

import json

import pytest
import torch
from conftest import TINY
from started_tool import NARROW

from sge_det.engine.steps import cut
from sge_det.engine.training import Trainer, setup_config
from sge_det.errors import UserError

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
# Nothing is drawn, and each image counts the same: all anchors of an image are in its loss.
NOTHING_DRAWN = [
    *("MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "1100"),
    *("MODEL.RPN.POSITIVE_FRACTION", "1.0", "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "GN"),
    *("MODEL.FPN.OUT_CHANNELS", "32"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.05", "SOLVER.OPTIMIZER", "SGD", "SOLVER.MAX_ITER", "3"),
]


def trained(folder, datasets, *overrides):
    micro = [*TINY, *NARROW, "OUTPUT_DIR", str(folder), *overrides]
    cfg = setup_config(FASTER, micro, datasets)
    cfg.DATASETS.TEST = ()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    start = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    return start, dict(trainer.model.named_parameters())


def test_a_step_of_two_passes_is_the_step_of_both_together(tmp_path, sample_datasets):
    start, whole = trained(tmp_path / "whole", sample_datasets, *NOTHING_DRAWN)
    passes = ["SOLVER.GRADIENT_ACCUMULATION_STEPS", "2"]
    _, two = trained(tmp_path / "two", sample_datasets, *NOTHING_DRAWN, *passes)
    _, half = trained(tmp_path / "half", sample_datasets, *NOTHING_DRAWN, "SOLVER.IMS_PER_BATCH", "2")
    moved = 0
    for name, value in whole.items():
        way = (value - start[name]).abs().max()
        assert (value - two[name]).abs().max() <= 1e-4 * way, name
        moved += int((value - half[name]).abs().max() > 1e-3 * way)
    assert moved > 20
    lines = [(tmp_path / name / "metrics.json").read_text().splitlines()[-1] for name in ("whole", "two")]
    losses = [json.loads(line)["total_loss"] for line in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_is_cut_in_order():
    assert cut([1, 2, 3, 4], 2) == [[1, 2], [3, 4]]
    assert cut([1, 2, 3, 4], 1) == [[1, 2, 3, 4]]
    assert cut([1, 2], 4) == [[1], [2]]


def test_passes_that_do_not_divide_the_images_of_a_step(sample_datasets, tmp_path):
    with pytest.raises(UserError, match=r"ACCUMULATION_STEPS: it is 3, which does not divide SOLVER.IMS_PER_BATCH 2"):
        trained(tmp_path, sample_datasets, "SOLVER.GRADIENT_ACCUMULATION_STEPS", "3")


def test_bfloat16_trains_on_cpus(tmp_path, sample_datasets, monkeypatch):
    seen = set()
    convolve = torch.nn.functional.conv2d

    def watched(*args, **kwargs):
        out = convolve(*args, **kwargs)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    amp = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16", "SOLVER.MAX_ITER", "2"]
    start, end = trained(tmp_path / "half", sample_datasets, *amp)
    assert torch.bfloat16 in seen
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in end.values())
    name = "backbone.bottom_up.res5.1.sge.bias"
    assert not torch.equal(start[name], end[name])
    trained(tmp_path / "full", sample_datasets, "SOLVER.MAX_ITER", "2")
    lines = [(tmp_path / name / "metrics.json").read_text().splitlines()[-1] for name in ("half", "full")]
    half, full = (json.loads(line)["total_loss"] for line in lines)
    assert half != full
    assert half == pytest.approx(full, rel=0.05)


def test_float16_needs_a_gpu(sample_datasets, tmp_path):
    with pytest.raises(UserError, match="float16; set that to bfloat16"):
        trained(tmp_path, sample_datasets, "SOLVER.AMP.ENABLED", "True")
