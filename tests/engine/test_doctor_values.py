"""Values that cannot work: each is told by its key, before training, by setup_config and the doctor alike."""

import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY
from detectron2 import model_zoo

from sge_det import UserError, get_config, get_config_file
from sge_det.config import load_config
from sge_det.engine.doctor import diagnose
from sge_det.engine.doctor.build import examine_build
from sge_det.engine.doctor.values import default_values, unusable_values
from sge_det.engine.training import setup_config

sys.path.insert(0, str(ROOT / "tests" / "torture"))
import fuzz_configs

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"

UNUSABLE = [
    ("MODEL.RESNETS.NORM", "GroupNorm"),
    ("MODEL.FPN.NORM", "GN2"),
    ("SEED", 4294967296),
    ("SEED", 2**70),
    ("INPUT.FORMAT", "XYZ"),
    ("INPUT.MIN_SIZE_TRAIN", ()),
    ("INPUT.MIN_SIZE_TRAIN", (0,)),
    ("INPUT.MIN_SIZE_TRAIN", ("64",)),
    ("INPUT.RANDOM_FLIP", "diagonal"),
    ("SOLVER.LR_SCHEDULER_NAME", "nonsense"),
    ("SOLVER.WARMUP_METHOD", "nonsense"),
    ("MODEL.DEVICE", "mps"),
    ("MODEL.DEVICE", "nonsense"),
    ("MODEL.DEVICE", "meta"),
    ("MODEL.FPN.OUT_CHANNELS", 0),
    ("MODEL.FPN.OUT_CHANNELS", 10**9),
    ("MODEL.FPN.IN_FEATURES", ["res9"]),
    ("MODEL.RPN.HEAD_NAME", "NoHead"),
    ("MODEL.ROI_HEADS.NAME", "NoHeads"),
    ("MODEL.ROI_HEADS.IOU_LABELS", [1]),
    ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0),
    ("MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE", "l3"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[0]]),
    ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]),
    ("MODEL.PIXEL_MEAN", [0.0]),
    ("MODEL.SGE.LR_FACTOR", -1.0),
    ("MODEL.SGE.INIT", [float("nan"), 1.0]),
    ("SOLVER.WEIGHT_DECAY", -1.0),
    ("SOLVER.BASE_LR", -0.1),
    ("SOLVER.BASE_LR", float("nan")),
    ("SOLVER.BASE_LR", float("inf")),
    ("SOLVER.MAX_ITER", -1),
    ("SOLVER.MAX_ITER", None),
    ("SOLVER.IMS_PER_BATCH", 0),
    ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"),
    ("SOLVER.REFERENCE_WORLD_SIZE", 3),
    ("DATALOADER.NUM_WORKERS", -1),
    ("DATALOADER.SAMPLER_TRAIN", "nonsense"),
    ("TEST.EXPECTED_RESULTS", [["bbox", "AP"]]),
    ("OUTPUT_DIR", ""),
    ("OUTPUT_DIR", "what?"),
    ("OUTPUT_DIR", "a\nb"),
    ("OUTPUT_DIR", " a"),
    ("OUTPUT_DIR", "a\udcff"),
    ("MODEL.WEIGHTS", "x" * 5000),
]


@pytest.mark.parametrize(("key", "value"), UNUSABLE)
def test_unusable_values_are_named(tmp_path, sample_datasets, key, value):
    content = {"_BASE_": get_config_file(FASTER)}
    node = content
    for name in key.split(".")[:-1]:
        node = node.setdefault(name, {})
    node[key.split(".")[-1]] = list(value) if isinstance(value, tuple) else value
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    tiny = [word for pair in zip(TINY[::2], TINY[1::2], strict=True) if pair[0] != key for word in pair]
    errors = [f for f in diagnose(str(tmp_path / "mine.yaml"), tiny, sample_datasets) if f.severity == "error"]
    assert [finding.key for finding in errors] == [key], list(map(str, errors))
    with pytest.raises(UserError, match=f"^{key}[: ]"):
        setup_config(str(tmp_path / "mine.yaml"), tiny, sample_datasets)


def test_what_only_does_not_go_together_is_named_too():
    cfg = get_config(FASTER, ["MODEL.FPN.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "40"])
    (finding,) = examine_build(cfg, ["MODEL.FPN.OUT_CHANNELS", "40"])
    assert (finding.severity, finding.key) == ("error", "MODEL.FPN.OUT_CHANNELS")
    cfg = get_config(FASTER, ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(30, 20)"])
    assert [finding.key for finding in examine_build(cfg)] == ["SOLVER.STEPS"]
    assert examine_build(cfg, eval_only=True) == []


def test_a_model_that_no_memory_holds():
    huge = ["MODEL.ROI_BOX_HEAD.FC_DIM", "65536", "MODEL.ROI_BOX_HEAD.NUM_FC", "60"]
    (finding,) = examine_build(get_config(FASTER, huge), huge)
    assert finding.key in huge and "of memory" in finding.problem


def test_configs_in_use_have_no_unusable_value():
    names = Path(model_zoo.get_config_file("Base-RCNN-FPN.yaml")).parent.rglob("*.yaml")
    configs = [load_config(str(path)) for path in (*names, *(ROOT / "configs").rglob("*.yaml"))]
    assert len(configs) > 90
    assert [finding for cfg in configs for finding in unusable_values(cfg)] == []


def test_building_on_trial_draws_no_random_numbers():
    import numpy as np
    import torch

    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(3), np.random.seed(3)
    assert examine_build(get_config(FASTER)) == []
    assert torch.equal(expected[0], torch.rand(3)) and (expected[1] == np.random.rand(3)).all()


def test_a_sample_of_the_fuzz():
    keys = list(default_values())[::9]
    tally, wrong = fuzz_configs.run(len(keys), keys=keys, seed=4)
    assert wrong == []
    assert tally["refused"] > 5 and tally["taken"] > 3
