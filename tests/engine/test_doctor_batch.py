"""The doctor takes a batch of a person's own images through the mapper, and tells what would end the training."""

import copy

import pytest
from conftest import TINY
from detectron2.data import DatasetCatalog, MetadataCatalog

from sge_det import UserError
from sge_det.data.loader import build_train_loader
from sge_det.engine.doctor import diagnose
from sge_det.engine.training import setup_config

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


@pytest.fixture
def registered(sample_datasets):
    """Registers what a function makes of the sample's training dicts; returns overrides that train on it."""
    names = []

    def add(change=lambda dicts: dicts, name="by_function"):
        setup_config(FASTER, TINY, sample_datasets)
        dicts = copy.deepcopy(DatasetCatalog.get("tiny_train"))
        classes = MetadataCatalog.get("tiny_train").thing_classes
        calls = []

        def load():
            calls.append(name)
            return change(copy.deepcopy(dicts))

        DatasetCatalog.register(name, load)
        MetadataCatalog.get(name).set(thing_classes=list(classes))
        names.append(name)
        number = ["MODEL.ROI_HEADS.NUM_CLASSES", str(len(classes))]
        return [*TINY, "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", "()", *number], calls

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def without(key):
    def change(dicts):
        for entry in dicts:
            for annotation in entry["annotations"]:
                del annotation[key]
        return dicts

    return change


def fails(dicts):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("bbox_mode"), "annotation 0 lacks 'bbox_mode'"),
        (without("category_id"), "annotation 0 lacks 'category_id'"),
        (fails, "a data set cannot be loaded (KeyError: 'no such column')"),
        (lambda dicts: [], "cannot be trained on: Dataset 'by_function' is empty"),
        (lambda dicts: [entry | {"width": 5} for entry in dicts], "is not of the annotated size"),
        (
            lambda dicts: [entry | {"file_name": "nowhere.jpg"} for entry in dicts],
            "the image nowhere.jpg cannot be read",
        ),
        (lambda dicts: [{k: v for k, v in d.items() if k != "file_name"} for d in dicts], "'file_name'"),
        (lambda dicts: 3, "its function returns a int: a list of dicts is needed"),
    ],
)
def test_what_would_end_the_first_iteration_is_a_finding(registered, change, words):
    overrides, _ = registered(change)
    (found,) = [finding for finding in diagnose(FASTER, overrides) if finding.severity == "error"]
    assert words in str(found)


def test_train_net_refuses_what_check_config_refuses(registered):
    overrides, _ = registered(without("bbox_mode"))
    with pytest.raises(UserError, match=r"by_function: entry 0 .* annotation 0 lacks 'bbox_mode'"):
        setup_config(FASTER, overrides)


def test_test_sets_are_tried_too(registered):
    overrides, _ = registered(lambda dicts: [entry | {"height": 7} for entry in dicts])
    overrides[overrides.index("DATASETS.TRAIN") + 1] = "('tiny_train',)"
    overrides[overrides.index("DATASETS.TEST") + 1] = "('by_function',)"
    (found,) = [finding for finding in diagnose(FASTER, overrides) if finding.severity == "error"]
    assert "is not of the annotated size" in str(found)
    assert [f for f in diagnose(FASTER, overrides, eval_only=True) if f.severity == "error"] == [found]


def test_the_key_in_the_way_is_named(registered):
    def crowded(dicts):
        for entry in dicts:
            entry["annotations"][0]["segmentation"] = [[1.0, 2.0, 9.0, 2.0, 9.0, 8.0]]
            for annotation in entry["annotations"][1:]:
                annotation["segmentation"] = "no mask"
        return dicts

    overrides, _ = registered(crowded)
    assert not [finding for finding in diagnose(FASTER, overrides) if finding.severity == "error"]
    mask = [*overrides, "MODEL.MASK_ON", "True"]
    (found,) = [finding for finding in diagnose(FASTER, mask) if finding.severity == "error"]
    assert found.key == "MODEL.MASK_ON"
    assert "an image for training cannot be read" in found.problem


def test_what_the_doctor_has_read_is_not_read_again(registered):
    overrides, calls = registered()
    cfg = setup_config(FASTER, overrides)
    loader = build_train_loader(cfg, 0)
    assert calls == ["by_function"] and len(loader.dataset) == 8
    build_train_loader(cfg, 0)
    assert len(calls) == 2  # held once, not for ever


def test_proposals_of_test_sets_are_asked_for(registered):
    overrides, _ = registered()
    overrides[overrides.index("DATASETS.TEST") + 1] = "('by_function',)"
    findings = diagnose(FASTER, [*overrides, "MODEL.LOAD_PROPOSALS", "True"])
    words = " ".join(str(finding) for finding in findings)
    assert "PROPOSAL_FILES_TRAIN names 0 files for 1 training sets" in words
    assert "PROPOSAL_FILES_TEST names 0 files for 1 test sets" in words


@pytest.mark.parametrize("sound", [True, False])
def test_no_word_of_default_data_sets_beside_a_data_set_of_ones_own(sample_datasets, tmp_path, sound):
    """COCO's recipe asks for other learning rates, and its files are not here: neither is this person's matter."""
    _, json_file, images = sample_datasets[0]
    own = ("coco_mine_train", json_file if sound else str(tmp_path / "no.json"), images)
    weights = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "SOLVER.BASE_LR", "0.5"]
    findings = diagnose("COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml", [*TINY, *weights], [own])
    assert not [finding for finding in findings if "coco_2017" in str(finding) or finding.key == "SOLVER.BASE_LR"]
    assert [finding.severity for finding in findings] == ([] if sound else ["error"])
