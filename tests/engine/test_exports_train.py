"""A detector trains and evaluates on what each annotation tool exports, as it stands."""

import json
import math
import sys
from pathlib import Path

import pytest
from conftest import TINY

from sge_det.engine.training import setup_config, train

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from exports import EXPORTERS

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
SLIM = [
    *TINY,
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "SOLVER.MAX_ITER", "2", "DATALOADER.NUM_WORKERS", "0"),
    *("MODEL.SGE.LOG_PERIOD", "0", "SOLVER.CHECKPOINT_PERIOD", "100"),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("export", EXPORTERS, ids=lambda export: export.__name__)
def test_a_detector_trains_on_an_export(sample, tmp_path, export):
    content = json.loads((sample / "annotations/instances_val.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps(export(content)))
    triple = ("exported", str(tmp_path / "export.json"), str(sample / "val"))
    cfg = setup_config(FASTER, [*SLIM, "OUTPUT_DIR", str(tmp_path / "run")], [triple])
    results = train(cfg)["bbox"]
    assert math.isfinite(results["AP"])
    named = {name.removeprefix("AP-") for name in results if name.startswith("AP-")}
    assert named == {category["name"] for category in content["categories"]} | (
        {"things"} if "roboflow" in str(export) else set()
    )
    assert (tmp_path / "run/model_final.pth").is_file()
