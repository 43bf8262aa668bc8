import os
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

import sge_det
from sge_det.config import load_config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Of Detectron2's other families, by the folders and names of Detectron2's model zoo: test_families.py.
FAMILIES = {
    *(f"COCO-Detection/faster_rcnn_SGE_{name}.yaml" for name in ("R_50_C4_1x", "R_50_DC5_1x", "X_101_32x8d_FPN_3x")),
    "COCO-InstanceSegmentation/mask_rcnn_SGE_R_50_C4_1x.yaml",
    "PascalVOC-Detection/faster_rcnn_SGE_R_50_C4.yaml",
    "COCO-Keypoints/keypoint_rcnn_SGE_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_SGE_R_50_1x.yaml",
    "Misc/semantic_SGE_R_50_FPN_1x.yaml",
    "Misc/mask_rcnn_SGE_R_50_FPN_3x_gn.yaml",
    "Misc/mask_rcnn_SGE_R_50_FPN_3x_syncbn.yaml",
    "LVISv1-InstanceSegmentation/mask_rcnn_SGE_R_50_FPN_1x.yaml",
    "Cityscapes/mask_rcnn_SGE_R_50_FPN.yaml",
    "PointRend/pointrend_rcnn_SGE_R_50_FPN_1x_coco.yaml",
    "DeepLab/deeplab_v3_plus_SGE_R_50_os16_mg124_poly_90k_bs16.yaml",
}
ALL = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml") if not path.name.startswith("Base-")}
LEAVES = sorted(ALL - FAMILIES)

EXPECTED_COCO = {
    *(f"COCO-Detection/{d}_SGE_R_{n}_FPN_2x.yaml" for d in ("faster_rcnn", "retinanet") for n in (50, 101)),
    *(f"COCO-Detection/cascade_rcnn_SGE_R_{n}_FPN_20e.yaml" for n in (50, 101)),
    *(f"COCO-InstanceSegmentation/mask_rcnn_SGE_R_{n}_FPN_2x.yaml" for n in (50, 101)),
    "COCO-InstanceSegmentation/cascade_mask_rcnn_SGE_R_50_FPN_20e.yaml",
    "COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_SGE_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_SGE_R_50_FPN_1x.yaml",
}
# With what Detectron2 cannot say, too.
EXPECTED_PAPER = {
    *(f"COCO-Detection/{d}_SGE_R_{n}_FPN_2x_paper.yaml" for d in ("faster_rcnn", "retinanet") for n in (50, 101)),
    *(f"COCO-Detection/cascade_rcnn_SGE_R_{n}_FPN_20e_paper.yaml" for n in (50, 101)),
    *(f"COCO-InstanceSegmentation/mask_rcnn_SGE_R_{n}_FPN_2x_paper.yaml" for n in (50, 101)),
}


def test_every_promised_coco_config_is_there():
    assert {leaf for leaf in LEAVES if leaf.startswith("COCO")} == EXPECTED_COCO | EXPECTED_PAPER
    assert FAMILIES < ALL


@pytest.mark.parametrize("leaf", sorted(EXPECTED_PAPER))
def test_a_paper_config_differs_by_what_detectron2_cannot_say(leaf):
    paper, base = sge_det.get_config(leaf), sge_det.get_config(leaf.replace("_paper", ""))
    assert paper.MODEL.RESNETS.NORM == "EvalBN"
    paper.MODEL.RESNETS.NORM = base.MODEL.RESNETS.NORM
    if "retinanet" in leaf:
        assert paper.MODEL.META_ARCHITECTURE == "PerBatchRetinaNet"
        assert (paper.MODEL.FPN.P7_RELU, base.MODEL.FPN.P7_RELU) == (False, True)
        paper.MODEL.META_ARCHITECTURE, paper.MODEL.FPN.P7_RELU = "RetinaNet", True
    if "cascade" in leaf:
        assert paper.MODEL.ROI_HEADS.NAME == "WeightedCascadeROIHeads"
        assert paper.MODEL.ROI_BOX_CASCADE_HEAD.STAGE_LOSS_WEIGHTS == (1.0, 0.5, 0.25)
        paper.MODEL.ROI_HEADS.NAME = "CascadeROIHeads"
    assert paper == base


@pytest.mark.parametrize("leaf", sorted(EXPECTED_COCO))
def test_schedules_are_the_recipes_epochs(leaf):
    cfg = sge_det.get_config(leaf)
    per_epoch = 7330 * 16 // cfg.SOLVER.IMS_PER_BATCH
    epochs, drops = {"1x": (12, (8, 11)), "2x": (24, (16, 22)), "20e": (20, (16, 19))}[leaf[:-5].rsplit("_", 1)[1]]
    assert cfg.SOLVER.MAX_ITER == epochs * per_epoch
    assert cfg.SOLVER.STEPS == tuple(drop * per_epoch for drop in drops)
    # the linear rule: 0.02 (RetinaNet 0.01) for 16 images
    assert cfg.SOLVER.BASE_LR == pytest.approx((0.01 if "retinanet" in leaf else 0.02) * cfg.SOLVER.IMS_PER_BATCH / 16)
    assert cfg.MODEL.RESNETS.DEPTH == int(leaf.split("_R_")[1].split("_")[0])
    assert cfg.MODEL.MASK_ON == ("mask" in leaf)


def test_recipe_of_the_paper():
    cfg = sge_det.get_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml")
    assert (cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ("RGB", (800,), 1333)
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 2
    assert cfg.SOLVER.WEIGHT_DECAY_NORM == cfg.SOLVER.WEIGHT_DECAY == 1e-4
    clip = cfg.SOLVER.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE) == (True, "full_model", 35.0, 2.0)
    retinanet = sge_det.get_config("COCO-Detection/retinanet_SGE_R_50_FPN_2x.yaml")
    expected = [[size * 2 ** (octave / 3) for octave in range(3)] for size in (32, 64, 128, 256, 512)]
    assert retinanet.MODEL.ANCHOR_GENERATOR.SIZES == [pytest.approx(sizes) for sizes in expected]


def test_add_sge_config_defaults():
    cfg = get_cfg()
    sge_det.add_sge_config(cfg)
    options = cfg.MODEL.SGE
    assert options.ENABLED is True
    assert options.GROUPS == 64
    assert options.STAGES == ["res2", "res3", "res4", "res5"]
    assert options.LR_FACTOR == 1.0
    assert options.WEIGHT_DECAY is None
    assert options.INIT == [0.0, 1.0]


def test_add_sge_config_again_adds_what_is_missing_alone():
    cfg = get_cfg()
    cfg.MODEL.SGE = CfgNode({"GROUPS": 16})
    cfg.MODEL.FPN.P7_RELU = False
    cfg.MODEL_EMA = CfgNode({"ENABLED": True, "USE_WARMUP": True})
    cfg.SOLVER.AMP.ENABLED = True
    sge_det.add_sge_config(cfg)
    assert (cfg.MODEL.SGE.GROUPS, cfg.MODEL.SGE.ENABLED, cfg.MODEL.FPN.P7_RELU) == (16, True, False)
    assert cfg.MODEL_EMA == {"ENABLED": True, "USE_WARMUP": True, "DECAY": 0.999}
    assert cfg.SOLVER.AMP == {"ENABLED": True, "PRECISION": "float16"}
    cfg.merge_from_list(["MODEL.SGE.ENABLED", "False", "SOLVER.OPTIMIZER", "ADAMW", "REPORT_TO", "wandb"])
    before = cfg.dump()
    cfg.freeze()
    sge_det.add_sge_config(cfg)
    assert cfg.dump() == before


def test_get_config_file_is_absolute_or_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = sge_det.get_config_file("sample/faster_rcnn_SGE_R_50_FPN.yaml")
    assert Path(path).is_file()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("COCO-Detection/faster_rcnn_SGE_R_50_FPN_3x.yaml", [], "faster_rcnn_SGE_R_50_FPN_2x.yaml"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.GROUP", "8"], "did you mean MODEL.SGE.GROUPS"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["model.sge.groups", "8"], "did you mean MODEL.SGE.GROUPS?"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.GROUPS", "many"], "MODEL.SGE.GROUPS many"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.GROUPS"], "has no value"),
        (
            "sample/faster_rcnn_SGE_R_50_FPN.yaml",
            ["SEED", "1", "--num-gpus", "2"],
            "--num-gpus stands behind KEY VALUE",
        ),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["SEED", "1", "--eval-only"], "--eval-only stands behind KEY VALUE"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.STAGES", "['res6']"], "'res6'"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.INIT", "[0.0]"], "MODEL.SGE.INIT"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.WEIGHT_DECAY", "none"], "MODEL.SGE.WEIGHT_DECAY"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.WEIGHT_DECAY", "-0.1"], "at least 0"),
        ("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.ATTENTION", "sag"], "'sag'"),
    ],
)
def test_mistakes_are_told_in_a_sentence(name, overrides, message):
    with pytest.raises(sge_det.UserError) as raised:
        sge_det.get_config(name, overrides)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: [unclosed", "is not a config in YAML"),
        ("just a sentence", "is not a config in YAML"),
        ("MODEL:\n  SEG:\n    GROUPS: 8\n", "no config key"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml"),
        ("MODEL:\n  SGE:\n    GROUPS: some\n", "GROUPS"),
        ("MODEL.SGE.GROUPS: 32\n", "MODEL.SGE.GROUPS is written as one name: write each of MODEL, SGE, GROUPS below"),
        ("model:\n  WEIGHTS: x\n", "no config key model: did you mean MODEL?"),
        ("MODEL:\n  SGE: {1: 2}\n", "its key 1 is no name"),
        ("MODEL:\n  ? [a, b]\n  : 1\n", "is not a config in YAML: while constructing a mapping"),
        ("MODEL:\n  PIXEL_MEAN: !!python/tuple [1]\n", "would run code"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(sge_det.UserError) as raised:
        load_config(str(path))
    assert message in str(raised.value)
    assert "mine.yaml" in str(raised.value)


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(sge_det.UserError, match="is a folder: name a file in it"):
        load_config(str(tmp_path))


def test_nothing_in_a_config_is_executed(tmp_path):
    path = tmp_path / "evil.yaml"
    marker = tmp_path / "executed"
    path.write_text(
        f'OUTPUT_DIR: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ["{marker}"]]\n'
    )
    with pytest.raises(sge_det.UserError):
        load_config(str(path))
    assert not marker.exists()


# The model zoo of Detectron2


@pytest.mark.parametrize(
    "name", ["COCO-Detection/retinanet_R_50_FPN_1x.yaml", "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"]
)
def test_the_model_zoos_configs_by_name_and_by_path(name):
    from detectron2 import model_zoo

    expected = model_zoo.get_config(name)
    sge_det.add_sge_config(expected)
    for own in (sge_det.get_config(name), load_config(model_zoo.get_config_file(name))):
        own.MODEL.WEIGHTS = expected.MODEL.WEIGHTS
        assert own == expected


def test_a_config_of_ones_own_may_stand_on_the_zoos(tmp_path):
    from detectron2 import model_zoo

    zoo = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {zoo}\nSEED: 5\n")
    cfg = load_config(str(tmp_path / "mine.yaml"))
    assert cfg.SEED == 5
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == pytest.approx([32, 32 * 2 ** (1 / 3), 32 * 2 ** (2 / 3)])


def test_a_copy_of_the_zoos_tag_is_refused_elsewhere(tmp_path):
    from detectron2 import model_zoo

    base = Path(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")).parent.parent
    (tmp_path / "copy.yaml").write_text((base / "Base-RetinaNet.yaml").read_text())
    with pytest.raises(sge_det.UserError, match="only files inside the detectron2 package may"):
        load_config(str(tmp_path / "copy.yaml"))


# Files that are no configs


def alias_bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_BASE_: mine.yaml\n", "is its own _BASE_"),
        ("_BASE_: ./link.yaml\n", "is its own _BASE_"),
        ("_BASE_: http://127.0.0.1:9/base.yaml\n", "lies on another machine"),
        ("_BASE_: s3://bucket/base.yaml\n", "lies on another machine"),
        ("_BASE_: 5\n", "must be the path of a config"),
        ("_BASE_: [[a.yaml]]\n", "must be the path of a config"),
        ("MODEL: &a\n  SGE: *a\n", "stands for what it stands in"),
        ("MODEL: &a [*a]\n", "stands for what it stands in"),
        (alias_bomb(), "aliases stand for more than"),
        ("A: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("1: 2\n", "mine.yaml"),
        ("VERSION: 7\n", "VERSION 7"),
        ("MODEL: 5\n", "MODEL holds keys"),
        (
            "MODEL:\n  SGE:\n    GROUPS: [8, 16, 32, 64]\n",
            "MODEL.SGE.GROUPS must be a value like 64, not [8, 16, 32, 64]",
        ),
    ],
)
def test_files_that_lead_nowhere(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    (tmp_path / "link.yaml").symlink_to(path)
    with pytest.raises(sge_det.UserError) as raised:
        load_config(str(path))
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000
    # the doctor looks at these files itself, for keys that stand there twice
    from sge_det.engine.doctor import diagnose

    assert [finding.severity for finding in diagnose(str(path))] == ["error"]


def test_files_that_never_end(tmp_path):
    fifo, long = tmp_path / "fifo.yaml", tmp_path / "long.yaml"
    os.mkfifo(fifo)
    long.write_bytes(b"#" * (2 << 20))
    for path, message in ((fifo, "folder or a device"), ("/dev/zero", "folder or a device"), (long, "it is no config")):
        base = tmp_path / "base.yaml"
        base.write_text(f"_BASE_: {path}\n")
        with pytest.raises(sge_det.UserError, match=message):
            load_config(str(base))
        with pytest.raises(sge_det.UserError):
            load_config(str(path))


@pytest.mark.parametrize(
    "override", [("MODEL", "{}"), ("SOLVER.AMP", "None"), ("SEED", "(" * 3000), ("MODEL.FPN.X.Y", "1")]
)
def test_overrides_that_would_break_the_config(override):
    with pytest.raises(sge_det.UserError, match=override[0].split(".")[0]):
        sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", override)
