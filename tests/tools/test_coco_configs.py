"""The COCO configs as they are, but for sizes and iterations, on a set in COCO's layout."""

import json
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from test_config import EXPECTED_COCO

SMALL = [
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "96"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()", "SOLVER.IMS_PER_BATCH", "1"),
    *("MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0"),
    # narrow: at their own widths all are built in tests/modeling/test_resnet.py
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "16", "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.ROI_BOX_HEAD.FC_DIM", "64"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.POST_NMS_TOPK_TEST", "30"),
]
# one process for all, since the start of each takes longer than what it does
SCRIPT = """
import json, pathlib, runpy, sys
import torch
sys.path.insert(0, str(pathlib.Path(sys.argv[1]).parent))
tool = runpy.run_path(sys.argv[1])
for leaf in sys.argv[3:]:
    tool["main"](["--config-file", leaf, *json.loads(sys.argv[2]), "OUTPUT_DIR", f"out/{leaf}"])
    checkpoint = torch.load(f"out/{leaf}/model_final.pth", weights_only=True, mmap=True)
    shapes = {name: list(value.shape) for name, value in checkpoint["model"].items()}
    pathlib.Path(f"out/{leaf}/shapes.json").write_text(json.dumps(shapes))
    pathlib.Path(f"out/{leaf}/model_final.pth").unlink()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    from sge_det.data.sample import make_sample_coco

    folder = tmp_path_factory.mktemp("coco")
    make_sample_coco(folder / "datasets", train=2, val=2, size=96, seed=1, coco_layout=True)
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        str(ROOT / "tools/train_net.py"),
        json.dumps(SMALL),
        *sorted(EXPECTED_COCO),
    ]
    environment = {**os.environ, "DETECTRON2_DATASETS": str(folder / "datasets")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "out"


@pytest.mark.parametrize("leaf", sorted(EXPECTED_COCO))
def test_it_trains_and_evaluates(outputs, leaf):
    folder = outputs / leaf
    logged = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    losses = [entry["total_loss"] for entry in logged if "total_loss" in entry]
    assert losses and all(map(math.isfinite, losses))
    tasks = {"bbox", "segm"} if "mask" in leaf else {"bbox"}
    assert {key.split("/")[0] for entry in logged for key in entry if key.endswith("/AP")} == tasks
    assert isinstance(json.loads((folder / "inference/coco_instances_results.json").read_text()), list)
    shapes = json.loads((folder / "shapes.json").read_text())
    assert sum(".sge." in name for name in shapes) == 2 * {"50": 16, "101": 33}[leaf.split("_R_")[1].split("_")[0]]
    # 80 classes, and the background where there is one
    head = {name: shape[0] for name, shape in shapes.items() if name.endswith(("cls_score.weight", "cls_score.bias"))}
    assert set(head.values()) == ({9 * 80} if "retinanet" in leaf else {81})
