"""Each finding of the doctor with a config that triggers it and a near one that does not."""

import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone
from foreign_weights import caffe2_names
from reference_models import torchvision_resnet

from sge_det import UserError, get_config
from sge_det.checkpoint import convert_file, transplant_file
from sge_det.checkpoint.safe_load import write_weights
from sge_det.checkpoint.sources import Recipe
from sge_det.config import load_config
from sge_det.engine.doctor import Finding, diagnose, examine_run, examine_settings, finding, tell
from sge_det.engine.doctor.data import examine_dataset
from sge_det.modeling.resnet import build_sge_resnet_fpn_backbone

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
COCO = "COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml"
# A ResNet-18 as torchvision has it in the sample's detector.
R18 = [
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.SGE.GROUPS", "64"),
    *("MODEL.RESNETS.NORM", "FrozenBN"),
]


@pytest.fixture
def examine(sample_datasets):
    """Findings about the sample's detector with overrides, as (severity, text)."""

    def run(*overrides, config=FASTER, datasets=sample_datasets, **options):
        found = diagnose(config, [*TINY, *map(str, overrides)], datasets, **options)
        return [(finding.severity, str(finding)) for finding in found]

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Files of a ResNet-18: with trained SGE, plain, transplanted."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(torchvision_resnet(18, True).state_dict(), folder / "release.pth")
    torch.save(torchvision_resnet(18, False).state_dict(), folder / "torchvision.pth")
    convert_file(str(folder / "release.pth"), str(folder / "sge.pth"))
    convert_file(str(folder / "torchvision.pth"), str(folder / "plain.pth"))
    transplant_file(str(folder / "torchvision.pth"), str(folder / "transplanted.pth"))
    return folder


def only(findings, severity, *words):
    """Checks that there is this one finding."""
    assert [found[0] for found in findings] == [severity], findings
    for word in words:
        assert word in findings[0][1]


def test_a_sound_config_has_no_findings(examine, weights):
    assert examine() == []
    assert examine(*R18, "MODEL.WEIGHTS", weights / "sge.pth") == []


# YAML


@pytest.mark.parametrize("through_base", [False, True])
def test_duplicate_keys(tmp_path, examine, through_base):
    (tmp_path / "twice.yaml").write_text(
        f"_BASE_: '{get_path()}'\nINPUT:\n  FORMAT: RGB\n  MIN_SIZE_TEST: 64\n  FORMAT: RGB\n"
    )
    (tmp_path / "leaf.yaml").write_text("_BASE_: twice.yaml\nSEED: 1\n")
    found = examine(config=str(tmp_path / ("leaf.yaml" if through_base else "twice.yaml")))
    only(found, "error", "INPUT.FORMAT: ", "twice.yaml sets it twice, the second time in line 5")


def test_keys_in_a_base_and_in_its_leaf_are_no_duplicates(tmp_path, examine):
    (tmp_path / "base.yaml").write_text(f"_BASE_: '{get_path()}'\nSEED: 1\nTEST:\n  EVAL_PERIOD: 5\n")
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\nSEED: 2\nINPUT:\n  FORMAT: RGB\n")
    assert examine(config=str(tmp_path / "leaf.yaml")) == []


def get_path():
    from sge_det import get_config_file

    return get_config_file(FASTER)


def test_unknown_keys(tmp_path, examine):
    (tmp_path / "odd.yaml").write_text(f"_BASE_: '{get_path()}'\nMODEL:\n  SGE:\n    GROPS: 32\n")
    only(
        examine(config=str(tmp_path / "odd.yaml")),
        "error",
        "no config key MODEL.SGE.GROPS: did you mean MODEL.SGE.GROUPS",
    )
    only(examine("SOLVER.BASE_LRR", "1"), "error", "no config key SOLVER.BASE_LRR")
    (tmp_path / "odd.yaml").write_text(f"_BASE_: '{get_path()}'\nMODEL:\n  SGE:\n    GROUPS: 32\n")
    assert examine(config=str(tmp_path / "odd.yaml")) == []


# Weights and what they expect


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("INPUT.FORMAT", "BGR", "RGB"),
        ("MODEL.PIXEL_MEAN", "[103.53, 116.28, 123.675]", "[123.7, 116.3, 103.5]"),
        ("MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]", "[58.4, 57.1, 57.4]"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", "True", "False"),
    ],
)
def test_what_contradicts_the_metadata_of_the_weights(examine, tmp_path, key, wrong, right):
    cfg = load_config(FASTER, TINY)
    state = build_model(cfg).state_dict()
    write_weights(tmp_path / "w.pth", state, Recipe.of_config(cfg).metadata(), by_suffix=False)
    weights = ("MODEL.WEIGHTS", tmp_path / "w.pth")
    only(examine(*weights, key, wrong), "error", f"{key}: it is {wrong}", "w.pth was trained with", f"set {key}")
    assert examine(*weights, key, right) == []


def test_the_stride_of_basic_blocks_is_no_matter(examine, weights):
    assert examine(*R18, "MODEL.WEIGHTS", weights / "sge.pth", "MODEL.RESNETS.STRIDE_IN_1X1", "True") == []


def test_what_contradicts_detectron2s_files(examine):
    plain = ("MODEL.SGE.ENABLED", "False")
    msra = ("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    found = examine(*plain, *msra)
    assert [text.split(":")[0] for _, text in found] == [
        *("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1")
    ]
    assert {severity for severity, _ in found} == {"error"}
    to_msra = ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]", "MODEL.PIXEL_STD", "[1.0,1.0,1.0]"]
    assert examine(*plain, *msra, *to_msra, "MODEL.RESNETS.STRIDE_IN_1X1", "True") == []
    assert examine(*plain, "MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl") == []


@pytest.mark.parametrize(
    ("name", "freeze_at", "stages"),
    [
        ("transplanted", 2, "res2"),
        ("transplanted", 3, "res2 and res3"),
        ("transplanted", 1, ""),
        ("sge", 2, ""),
    ],
)
def test_sge_that_is_frozen_before_it_learnt(examine, weights, name, freeze_at, stages):
    found = examine(*R18, "MODEL.WEIGHTS", weights / f"{name}.pth", "MODEL.BACKBONE.FREEZE_AT", freeze_at)
    if stages:
        only(
            found, "warning", f"MODEL.BACKBONE.FREEZE_AT: {freeze_at} freezes the SGE of {stages}, which", "set it to 1"
        )
    else:
        assert found == []


def test_trained_sge_that_is_reset_and_frozen(examine, weights):
    frozen = (*R18, "MODEL.WEIGHTS", weights / "sge.pth", "MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.SGE.RESET")
    only(examine(*frozen, "True"), "warning", "BACKBONE.FREEZE_AT: 2 freezes the SGE of res2")
    assert examine(*frozen, "False") == []


def test_a_frozen_stage_without_sge_is_no_matter(examine, weights):
    frozen = ("MODEL.BACKBONE.FREEZE_AT", "2", "MODEL.WEIGHTS", weights / "transplanted.pth")
    found = examine(*R18, *frozen, "MODEL.SGE.STAGES", "('res3', 'res4', 'res5')")
    assert not [text for _, text in found if "FREEZE_AT" in text]


def test_frozen_random_stages(examine):
    only(examine("MODEL.BACKBONE.FREEZE_AT", "2"), "warning", "MODEL.BACKBONE.FREEZE_AT: 2 freezes", "random start")
    assert examine("MODEL.BACKBONE.FREEZE_AT", "0") == []


def test_plain_weights_in_an_sge_model(examine, weights):
    found = examine(*R18, "MODEL.WEIGHTS", weights / "plain.pth")
    only(found, "warning", "MODEL.WEIGHTS: ", "plain.pth has no SGE", "--transplant")
    assert examine(*R18, "MODEL.WEIGHTS", weights / "transplanted.pth") == []
    assert examine(*R18, "MODEL.WEIGHTS", weights / "plain.pth", "MODEL.SGE.ENABLED", "False") == []
    url = ("MODEL.WEIGHTS", "detectron2://ImageNetPretrained/torchvision/R-50.pkl")
    only(examine(*url), "warning", "has no SGE")


def test_weights_that_were_not_converted(examine, weights):
    found = examine(*R18, "MODEL.WEIGHTS", weights / "release.pth")
    only(found, "error", "release.pth is an SGE-ResNet of the release", "convert it: tools/convert_weights.py")


def test_sge_of_another_shape_or_number_of_groups(examine, weights, tmp_path):
    found = examine(*R18, "MODEL.WEIGHTS", weights / "sge.pth", "MODEL.SGE.GROUPS", "32")
    only(found, "error", "MODEL.SGE.GROUPS: ", "has SGE of 64 groups, the model of 32", "set MODEL.SGE.GROUPS 64")
    content = torch.load(weights / "sge.pth")
    content["model"] = {k: v.flatten() if ".sge." in k else v for k, v in content["model"].items()}
    torch.save(content, tmp_path / "flat.pth")
    only(examine(*R18, "MODEL.WEIGHTS", tmp_path / "flat.pth"), "error", "shape (64,)", "convert it")


def test_sge_weights_without_a_place(examine, weights):
    found = examine(*R18, "MODEL.WEIGHTS", weights / "sge.pth", "MODEL.SGE.ENABLED", "False")
    only(found, "warning", "MODEL.SGE: ", "has SGE (16 tensors), the model has no place for it")
    found = examine(*R18, "MODEL.WEIGHTS", weights / "sge.pth", "MODEL.SGE.STAGES", "('res5',)")
    only(found, "warning", "has SGE (12 tensors)")


def test_weights_that_fill_a_part_of_the_backbone(examine, weights, tmp_path):
    found = examine(*R18, "MODEL.WEIGHTS", weights / "sge.pth", "MODEL.RESNETS.DEPTH", "34")
    only(found, "error", "fills 100 of the 180 tensors of the backbone", "MODEL.RESNETS.DEPTH")
    content = torch.load(weights / "sge.pth")
    content["model"] = {k: v for k, v in content["model"].items() if "res5.1.sge" not in k}
    torch.save(content, tmp_path / "part.pth")
    found = examine(*R18, "MODEL.WEIGHTS", tmp_path / "part.pth")
    only(
        found,
        "warning",
        "fills 114 of the 116 tensors of the backbone: backbone.bottom_up.res5.1.sge.weight starts anew",
    )
    rival = (*R18, "MODEL.SGE.ATTENTION", "se", "MODEL.WEIGHTS", weights / "plain.pth")
    only(examine(*rival), "warning", "fills 100 of the 132 tensors", ".se.fc1.weight starts anew")


def test_weights_that_fill_a_part_of_the_detector(examine, tmp_path):
    cfg = load_config(FASTER, TINY)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 9
    state = build_model(cfg).state_dict()
    total = sum(not key.endswith("num_batches_tracked") for key in state)
    write_weights(tmp_path / "w.pth", state, {}, by_suffix=False)
    found = examine("MODEL.WEIGHTS", tmp_path / "w.pth")
    only(found, "warning", f"fills {total - 4} of the {total} tensors of the model", "is (10, 256) there and (5, 256)")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 4
    write_weights(tmp_path / "w.pth", build_model(cfg).state_dict(), {}, by_suffix=False)
    assert examine("MODEL.WEIGHTS", tmp_path / "w.pth") == []


def test_norms_without_statistics(examine, tmp_path):
    model = torchvision_resnet(50, False)
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(caffe2_names(model)))
    options = [
        *("MODEL.WEIGHTS", tmp_path / "R-50.pkl", "MODEL.SGE.ENABLED", "False", "INPUT.FORMAT", "BGR"),
        *("MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]", "MODEL.PIXEL_STD", "[1.0,1.0,1.0]"),
        *("MODEL.RESNETS.STRIDE_IN_1X1", "True", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "256"),
    ]
    only(examine(*options), "error", "MODEL.RESNETS.NORM: it is BN", "FrozenBN alone can take")
    assert examine(*options, "MODEL.RESNETS.NORM", "FrozenBN") == []


def test_weights_that_are_not_there_or_damaged(examine, tmp_path):
    only(examine("MODEL.WEIGHTS", "nowhere.pth"), "error", "MODEL.WEIGHTS: nowhere.pth is not there")
    (tmp_path / "w.pth").write_bytes(b"not weights")
    only(examine("MODEL.WEIGHTS", tmp_path / "w.pth"), "error", "w.pth cannot be read")
    torch.save({"encoder": torch.zeros(2)}, tmp_path / "w.pth")
    only(examine("MODEL.WEIGHTS", tmp_path / "w.pth"), "error", "fills 0 of the")


# Settings


def test_groups_that_do_not_divide_a_stage(examine):
    only(examine("MODEL.SGE.GROUPS", "48"), "error", "MODEL.SGE.GROUPS: 48 does not divide the 64 channels of res2")
    assert examine("MODEL.SGE.GROUPS", "32") == []
    assert examine("MODEL.SGE.GROUPS", "128", "MODEL.SGE.STAGES", "('res3', 'res5')") == []
    assert examine("MODEL.SGE.GROUPS", "48", "MODEL.SGE.ENABLED", "False") == []


def test_backbones_that_are_not_registered(examine):
    found = examine("MODEL.BACKBONE.NAME", "build_my_resnet_fpn_backbone")
    only(found, "error", "MODEL.BACKBONE.NAME: 'build_my_resnet_fpn_backbone' is not registered", "import sge_det")
    only(examine("MODEL.META_ARCHITECTURE", "FasterRCNN"), "error", "MODEL.META_ARCHITECTURE: 'FasterRCNN'")


def test_a_backbone_that_has_no_sge(examine):
    own = ("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    only(examine(*own), "warning", "builds a plain ResNet whatever MODEL.SGE says", "build_sge_resnet_fpn_backbone")
    assert examine(*own, "MODEL.SGE.ENABLED", "False") == []


def test_a_backbone_of_the_users_own_is_looked_into(examine, weights):
    plain = ("MODEL.WEIGHTS", weights / "plain.pth", *R18)
    for name, build, has_layers in (
        ("build_my_fpn_backbone", build_sge_resnet_fpn_backbone, True),
        ("build_message_fpn_backbone", build_resnet_fpn_backbone, False),  # "sge" is in its name alone
    ):
        BACKBONE_REGISTRY._do_register(name, build)
        try:
            found = examine("MODEL.BACKBONE.NAME", name, *plain)
        finally:
            del BACKBONE_REGISTRY._obj_map[name]
        assert any("has no SGE" in text for _, text in found) == has_layers, found


@pytest.mark.parametrize(
    ("config", "lr", "batch", "right"),
    [
        (COCO, 0.02, 2, 0.0025),
        (COCO, 0.0025, 2, None),
        (COCO, 0.02, 16, None),
        (COCO, 0.2, 16, 0.02),
        ("COCO-Detection/retinanet_SGE_R_50_FPN_2x.yaml", 0.01, 16, None),
        ("COCO-Detection/retinanet_SGE_R_50_FPN_2x.yaml", 0.02, 16, 0.01),
        ("COCO-Detection/faster_rcnn_SGE_R_101_FPN_2x.yaml", None, None, None),
        (FASTER, 0.002, 4, None),
    ],
)
def test_the_learning_rate_against_the_batch(config, lr, batch, right):
    overrides = [] if lr is None else ["SOLVER.BASE_LR", str(lr), "SOLVER.IMS_PER_BATCH", str(batch)]
    findings = examine_settings(get_config(config, [*overrides, "MODEL.WEIGHTS", ""]))
    if right is None:
        assert findings == []
        return
    (finding,) = findings
    assert (finding.severity, finding.key) == ("warning", "SOLVER.BASE_LR")
    assert f"set SOLVER.BASE_LR {right:g}," in finding.remedy
    assert examine_settings(get_config(config, [*overrides, "MODEL.WEIGHTS", "", "SOLVER.OPTIMIZER", "ADAMW"])) == []


def test_mixed_precision_without_a_gpu(examine):
    only(examine("SOLVER.AMP.ENABLED", "True"), "error", "SOLVER.AMP.ENABLED: ", "needs a GPU")


@pytest.mark.parametrize("key", ["MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM"])
def test_sync_bn(examine, key):
    found = examine(key, "SyncBN")
    only(found, "warning", f"{key}: SyncBN in one process is BN", f"set {key} BN or FrozenBN")
    only(examine(key, "SyncBN", processes=2), "error", f"{key}: SyncBN needs GPUs")
    assert examine(key, "naiveSyncBN", processes=2) == []
    assert examine(key, "SyncBN", eval_only=True) == []
    assert examine(key, "BN") == []


def test_resuming_past_the_end(examine, tmp_path):
    torch.save({"model": {}, "iteration": 99}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    run = ("OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER")
    found = examine(*run, 100, resume=True)
    only(
        found, "warning", "SOLVER.MAX_ITER: ", "model_final.pth is already trained to iteration 100 of 100", "above 100"
    )
    assert examine(*run, 101, resume=True) == []
    assert examine(*run, 100) == []
    (tmp_path / "last_checkpoint").write_text("gone.pth")
    only(examine(*run, 101, resume=True), "warning", "--resume: there is no weights file", "model_final.pth is tried")
    (tmp_path / "model_final.pth").unlink()
    only(examine(*run, 101, resume=True), "error", "--resume: there is no weights file")
    (tmp_path / "last_checkpoint").write_text("../gone.pth")
    only(examine(*run, 101, resume=True), "error", "must name a .pth file in its own folder")
    assert examine("OUTPUT_DIR", tmp_path / "new", resume=True) == []


def test_output_folders_that_cannot_be_written(examine, tmp_path):
    (tmp_path / "file").touch()
    for folder, words in (
        (tmp_path / "file", "file is a file; name a folder"),
        (tmp_path / "file/run", "file is a file; name a folder"),
        ("/proc/run", "/proc/run cannot be written"),
    ):
        for eval_only in (False, True):
            only(examine("OUTPUT_DIR", folder, eval_only=eval_only), "error", "OUTPUT_DIR: ", words)
    assert examine("OUTPUT_DIR", tmp_path / "run") == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# Data


def test_keypoints_that_a_set_has_not_are_told_once(examine, registered, tmp_path):
    keypoints = ("MODEL.KEYPOINT_ON", "True")
    only(examine(*keypoints), "error", "MODEL.KEYPOINT_ON: no category of tiny_train lists its keypoints")
    name = registered(lambda content: None, tmp_path)
    own = (*keypoints, "MODEL.ROI_HEADS.NUM_CLASSES", "4", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "1")
    own += ("DATASETS.TRAIN", (name,), "DATASETS.TEST", ())
    only(examine(*own, datasets=()), "error", f"MODEL.KEYPOINT_ON: {name} has no keypoint_names", "keypoint_flip_map=")
    MetadataCatalog.get(name).set(keypoint_names=["tip"], keypoint_flip_map=[])
    assert not any("keypoint_names" in text for _, text in examine(*own, datasets=()))


def test_the_number_of_classes(examine):
    found = examine("MODEL.ROI_HEADS.NUM_CLASSES", "80")
    only(found, "error", "MODEL.ROI_HEADS.NUM_CLASSES", "is 80, but tiny_train has 4 categories")
    retina = {"config": "sample/retinanet_SGE_R_50_FPN.yaml"}
    only(examine("MODEL.RETINANET.NUM_CLASSES", "3", **retina), "error", "MODEL.RETINANET.NUM_CLASSES is 3")
    assert examine("MODEL.ROI_HEADS.NUM_CLASSES", "4") == []
    assert examine("MODEL.RETINANET.NUM_CLASSES", "80") == []


def first_image(content):
    return content["images"][0]


def widen(content):
    box = content["annotations"][0]
    image = next(image for image in content["images"] if image["id"] == box["image_id"])
    box["bbox"] = [image["width"] - 5, 3, 20, 10]


def flatten(content):
    content["annotations"][0]["bbox"][2] = 0


def add_category(content):
    content["categories"].append({"id": 99, "name": "nobody"})


def repeat_annotation(content):
    content["annotations"].append(dict(content["annotations"][0]))


def repeat_image(content):
    content["images"].append(dict(first_image(content)))


def repeat_category(content):
    content["categories"].append({**content["categories"][0], "name": "again"})


def lose_image_entry(content):
    content["images"] = [entry for entry in content["images"] if entry["id"] != content["annotations"][0]["image_id"]]


def lose_category(content):
    content["annotations"][0]["category_id"] = 77


def rename_image(content):
    first_image(content)["file_name"] = "gone.jpg"


@pytest.fixture
def registered(sample_datasets):
    """Registers a changed copy of the sample's training set as Detectron2's users do; returns its name."""
    names = []

    def register(change, folder):
        _, json_file, images = sample_datasets[0]
        content = json.loads(Path(json_file).read_text())
        change(content)
        (folder / "changed.json").write_text(json.dumps(content))
        names.append("changed_train")
        register_coco_instances("changed_train", {}, str(folder / "changed.json"), images)
        return "changed_train"

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("change", "severity", "words"),
    [
        (repeat_image, "error", "the ids of images are not unique, "),
        (repeat_annotation, "error", "the ids of annotations are not unique, "),
        (repeat_category, "error", "the ids of categories are not unique, "),
        (lose_image_entry, "error", "which is not among the images"),
        (lose_category, "error", "which is not among the categories"),
        (rename_image, "error", "1 of the 8 images of"),
        (flatten, "warning", "boxes have no width or no height (1: ids "),
        (widen, "warning", "boxes reach outside their image (1: ids "),
        (add_category, "warning", "categories have no object (1: ids 99)"),
        (lambda content: None, None, None),
    ],
)
def test_the_health_of_annotations(registered, tmp_path, change, severity, words):
    name = registered(change, tmp_path)
    findings = [(finding.severity, str(finding)) for finding in examine_dataset(name)]
    if severity is None:
        assert findings == []
        return
    fitting = [text for found, text in findings if found == severity and words in text]
    assert len(fitting) == 1, findings
    assert fitting[0].startswith(f"data set {name}: ")
    assert "changed.json" in fitting[0]


def test_unhealthy_data_stops_the_run(registered, tmp_path, examine):
    name = registered(rename_image, tmp_path)
    found = examine("DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)", datasets=[])
    assert [severity for severity, text in found if "gone.jpg" in text] == ["error"]


def test_a_data_set_that_is_repaired_is_read_again(registered, tmp_path, sample_datasets):
    name = registered(widen, tmp_path)
    assert examine_dataset(name)
    shutil.copy(sample_datasets[0][1], tmp_path / "changed.json")
    assert examine_dataset(name) == []


def test_annotations_that_are_no_coco(registered, tmp_path):
    name = registered(lambda content: None, tmp_path)
    (tmp_path / "changed.json").write_text("[1, 2")
    (finding,) = examine_dataset(name)
    assert finding.severity == "error"
    assert "changed.json is not JSON" in finding.problem


def test_bad_data_on_the_command_line(examine, sample_datasets):
    found = examine(datasets=[(*sample_datasets[0][:1], "none.json", "."), sample_datasets[1]])
    assert found[0] == ("error", "DATASETS: there is no annotation file none.json")


# How findings are told


def test_errors_stop_and_warnings_are_told_once(caplog):
    error, other = (Finding("error", key, "is wrong", "mend it") for key in ("A.B", "C.D"))
    warning = Finding("warning", "E.F", "is odd", "look at it")
    with pytest.raises(UserError, match=r"^A\.B: is wrong; mend it \(and 1 more: tools/check_config\.py lists them\)$"):
        tell([warning, error, other])
    with pytest.raises(UserError, match=r"mend it$"):
        tell([error])
    finding._warn.cache_clear()
    logging.getLogger("sge_det").propagate = True
    with caplog.at_level(logging.WARNING):
        tell([warning])
        tell([warning])
    assert [record.getMessage() for record in caplog.records] == ["E.F: is odd; look at it"]


def test_errors_come_first_and_findings_once(examine, weights):
    found = examine(
        *R18, "MODEL.WEIGHTS", weights / "plain.pth", "SOLVER.AMP.ENABLED", "True", "MODEL.FPN.NORM", "SyncBN"
    )
    assert [severity for severity, _ in found] == ["error", "warning", "warning"]
    assert len(set(found)) == len(found)


def test_findings_do_not_change_the_config():
    cfg = get_config(FASTER, ["MODEL.WEIGHTS", ""])
    before = cfg.dump()
    examine_settings(cfg, FASTER)
    examine_run(cfg, processes=1)
    assert cfg.dump() == before


C4 = [
    *("MODEL.BACKBONE.NAME", "build_sge_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.RPN.IN_FEATURES", "['res4']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"),
]


def test_a_head_that_leaves_its_stage_out(examine):
    assert not examine(*C4, "MODEL.ROI_HEADS.NAME", "SGERes5ROIHeads")
    found = examine(*C4, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads")
    only(found, "warning", "MODEL.SGE.STAGES", "roi_heads.res5 has 3 of 3 blocks without SGE", "SGERes5ROIHeads")
    assert not examine(*C4, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.SGE.STAGES", "['res4']")
    assert not examine(*C4, "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.SGE.ENABLED", "False")


def test_a_stage_that_the_model_has_not(examine):
    heads = ("MODEL.ROI_HEADS.NAME", "StandardROIHeads")
    only(examine(*C4, *heads), "warning", "MODEL.SGE.STAGES", "names res5, of which this model has no block")
    assert not examine(*C4, *heads, "MODEL.SGE.STAGES", "['res2', 'res3', 'res4']")
