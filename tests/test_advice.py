"""Whoever does what a sentence says is rid of it: each kind of advice is provoked, read, followed, and gone."""

import copy
import functools
import json
import os
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image
from reference_models import torchvision_resnet

from sge_det import UserError
from sge_det.checkpoint import convert_file, read_source, transplant_file
from sge_det.checkpoint.checkpointer import Checkpointer, last_checkpoint
from sge_det.checkpoint.safe_load import load_file
from sge_det.config import load_config, sge_options
from sge_det.data.annotations import read_annotations
from sge_det.data.datasets import check_datasets, register_sample, use_datasets
from sge_det.data.images import image_fault
from sge_det.engine.doctor import examine_settings
from sge_det.engine.doctor.data import examine_dataset
from sge_det.engine.doctor.run import examine_run
from sge_det.engine.doctor.settings import duplicate_keys
from sge_det.engine.doctor.values import unusable_values
from sge_det.engine.doctor.weights import examine_weights

FASTER, MASK = "sample/faster_rcnn_SGE_R_50_FPN.yaml", "sample/mask_rcnn_SGE_R_50_FPN.yaml"


def sentences(function, *arguments):
    """What a check that raises says."""
    try:
        function(*arguments)
    except UserError as error:
        return [str(error)]
    return []


def settings(overrides, datasets, config=FASTER):
    """What is said of a config without building anything."""
    register_sample()
    try:
        cfg = load_config(config, overrides)
    except UserError as error:
        return [str(error)]
    found = unusable_values(cfg) or examine_settings(cfg, config)
    return [*map(str, found), *sentences(use_datasets, cfg, datasets, overrides)]


# What provokes the sentence, the sentence, and what it says to do; {1} is what stands in its first group.
SETTINGS = {
    "AMP, its precision": ("SOLVER.AMP.ENABLED True", "set that to bfloat16", "SOLVER.AMP.PRECISION bfloat16"),
    "AMP, off": ("SOLVER.AMP.ENABLED True", "or this to False", "SOLVER.AMP.ENABLED False"),
    "passes": ("SOLVER.GRADIENT_ACCUMULATION_STEPS 3", "set a divisor of it", "SOLVER.GRADIENT_ACCUMULATION_STEPS 2"),
    "the best": (
        "SOLVER.BEST_CHECKPOINTER.ENABLED True TEST.EVAL_PERIOD 0",
        "set TEST.EVAL_PERIOD to a fraction",
        "TEST.EVAL_PERIOD 5 SOLVER.MAX_ITER 10",
    ),
    "early stopping": (
        "SOLVER.EARLY_STOPPING.PATIENCE 1 TEST.EVAL_PERIOD 0",
        "set TEST.EVAL_PERIOD to a fraction",
        "TEST.EVAL_PERIOD 5 SOLVER.MAX_ITER 10",
    ),
    "EMA, off": (
        "MODEL_EMA.ENABLED True TEST.PRECISE_BN.ENABLED True",
        "turn off one of them",
        "MODEL_EMA.ENABLED False",
    ),
    "precise BN, off": (
        "MODEL_EMA.ENABLED True TEST.PRECISE_BN.ENABLED True",
        "turn off one of them",
        "TEST.PRECISE_BN.ENABLED False",
    ),
    "a plain backbone": (
        "MODEL.BACKBONE.NAME build_resnet_fpn_backbone",
        r"set it to (\w+), or MODEL.SGE.ENABLED False",
        "MODEL.BACKBONE.NAME {1}",
    ),
    "a plain backbone, without SGE": (
        "MODEL.BACKBONE.NAME build_resnet_fpn_backbone",
        r"set it to \w+, or MODEL.SGE.ENABLED False",
        "MODEL.SGE.ENABLED False",
    ),
    "groups": ("MODEL.SGE.GROUPS 7", "set a divisor of them", "MODEL.SGE.GROUPS 8"),
    "groups of a stage": (
        "MODEL.SGE.GROUPS 128",
        "channels of res2.* or leave the stage out of MODEL.SGE.STAGES",
        "MODEL.SGE.STAGES ['res3','res4','res5']",
    ),
    "processes": ("SOLVER.REFERENCE_WORLD_SIZE 3", "set a divisor of it, or 0", "SOLVER.REFERENCE_WORLD_SIZE 0"),
    "the device": ("MODEL.DEVICE mps", "set cuda or cpu", "MODEL.DEVICE cpu"),
    "means": (
        "INPUT.FORMAT L MODEL.PIXEL_STD [1.0]",
        "MODEL.PIXEL_MEAN: it has 3 numbers, INPUT.FORMAT L has 1; set one each",
        "MODEL.PIXEL_MEAN [0.0]",
    ),
    "the learning rate": (
        "DATASETS.TRAIN ('coco_2017_train',) SOLVER.OPTIMIZER SGD SOLVER.BASE_LR 5.0",
        r"set SOLVER.BASE_LR ([\d.e-]+),",
        "SOLVER.BASE_LR {1}",
    ),
    "classes": (
        "MODEL.ROI_HEADS.NUM_CLASSES 3",
        r"has (\d+) categories: set it to that",
        "MODEL.ROI_HEADS.NUM_CLASSES {1}",
    ),
    "no weights": ("MODEL.WEIGHTS /nowhere.pth", "train from scratch with MODEL.WEIGHTS ''", "MODEL.WEIGHTS ''"),
    "a value of its kind": ("SOLVER.MAX_ITER -5", "set a whole number from (1) on", "SOLVER.MAX_ITER {1}"),
    "a choice": ("INPUT.FORMAT XYZ", r"set one of (\w+)", "INPUT.FORMAT {1}"),
    "a range of pixels": ("INPUT.PIXEL_RANGE (9,1)", r"set (\(\)), or the values", "INPUT.PIXEL_RANGE {1}"),
    "a section": (
        "MODEL.SGE 1",
        "MODEL.SGE holds keys and has no value of its own, set one of them",
        "MODEL.SGE.GROUPS 8",
    ),
    "a slip of the pen": ("MODEL.SGE.GROUPZ 8", r"did you mean (MODEL.SGE.GROUPS)\b", "{1} 8"),
    "a registered name": (
        "MODEL.META_ARCHITECTURE GeneralisedRCNN",
        "or correct the name",
        "MODEL.META_ARCHITECTURE GeneralizedRCNN",
    ),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings(sample_datasets, monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    provoking, pattern, following = SETTINGS[kind]
    before = settings([*TINY, *provoking.split()], sample_datasets)
    found = next(filter(None, (re.search(pattern, text) for text in before)), None)
    assert found, before
    followed = following.replace("{1}", found[1] if found.re.groups else "").replace("''", '""').split()
    followed = [word.strip('"') for word in followed]
    keys = {*followed[::2], *(("MODEL.SGE", "MODEL.SGE.GROUPZ") if "MODEL.SGE" in found[0] else ())}
    words = provoking.split()
    kept = [
        word for key, value in zip(words[::2], words[1::2], strict=True) if key not in keys for word in (key, value)
    ]
    after = settings([*TINY, *kept, *followed], sample_datasets)
    assert not [text for text in after if re.search(pattern, text)]
    assert set(after) <= set(before)


def test_a_set_that_is_not_registered(sample_datasets):
    overrides = [*TINY, "DATASETS.TRAIN", "('my_own',)", "DATASETS.TEST", "('my_own',)"]
    (said,) = settings(overrides, [])
    name = re.search(r"give it with --dataset (\w+) ANNOTATIONS.json IMAGE_FOLDER", said)[1]
    assert settings(overrides, [(name, *sample_datasets[0][1:])]) == []


def test_a_set_whose_files_are_not_there(sample, tmp_path):
    path = tmp_path / "mine.json"
    register_coco_instances("registered", {}, str(path), str(sample / "val"))
    try:
        (said,) = sentences(check_datasets, ["registered"])
        assert "put it there, or correct the path where the data set is registered" in said
        path.write_bytes((sample / "annotations/instances_val.json").read_bytes())
        assert sentences(check_datasets, ["registered"]) == []
    finally:
        DatasetCatalog.remove("registered")
        MetadataCatalog.remove("registered")


PIXELS = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
BARE = {"size": [40, 60], "counts": [2400]}


def coco(boxes=4):
    image = {"id": 1, "file_name": "a.png", "height": 40, "width": 60}
    box, square = [5, 5, 20, 20], [[5, 5, 25, 5, 25, 25, 5, 25]]
    entry = {"image_id": 1, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0, "segmentation": square}
    objects = [copy.deepcopy(entry) | {"id": number} for number in range(1, boxes + 1)]
    return {"images": [image], "annotations": objects, "categories": [{"id": 1, "name": "x"}]}


def each(**fields):
    """Sets fields of every annotation; None takes one away."""

    def change(content):
        for entry in content["annotations"]:
            entry |= fields
            for name in [name for name, value in fields.items() if value is None]:
                del entry[name]

    return change


def first(key, **fields):
    return lambda content: content[key][0].update(fields)


def only_first(content):
    content["annotations"] = content["annotations"][1:]


def merge_images(content):
    content["images"] = content["images"][:1]
    each(image_id=1)(content)


def with_twin(content):
    content["images"].append(content["images"][0] | {"id": 2})
    content["annotations"][0]["image_id"] = 2


# What spoils annotations, the sentence, and what it says to do with them.
ANNOTATIONS = {
    "ids": (first("annotations", id=2), "number them anew", first("annotations", id=9)),
    "ignored, removed": (first("annotations", ignore=1), "remove these annotations", only_first),
    "ignored, marked": (
        first("annotations", ignore=1),
        "or mark them by 'iscrowd': 1",
        first("annotations", ignore=0, iscrowd=1),
    ),
    "crowds": (first("annotations", iscrowd=3), "set it to one of them", first("annotations", iscrowd=1)),
    "areas": (each(area=9000), "so compute it anew", each(area=400)),
    "corners for sizes": (each(bbox=[35, 20, 58, 38], area=414), "convert them", each(bbox=[35, 20, 23, 18])),
    "relative boxes": (
        each(bbox=[0.1, 0.1, 0.3, 0.3], area=0.09),
        "COCO's are in pixels",
        each(bbox=[6, 4, 18, 12], area=216),
    ),
    "empty masks, removed": (first("annotations", segmentation=BARE), "remove them", only_first),
    "Python's bytes": (
        each(segmentation={"size": [40, 60], "counts": "b'0P`2'"}),
        "write them decoded as ASCII",
        each(segmentation={"size": [40, 60], "counts": [10, 400, 1990]}),
    ),
    "two images of a file": (with_twin, "merge them", merge_images),
    "boxes without size": (first("annotations", bbox=[5, 5, 0, 20], area=0), "remove them", only_first),
    "boxes outside": (
        first("annotations", bbox=[50, 5, 20, 20]),
        "clip them",
        first("annotations", bbox=[50, 5, 10, 20], area=200),
    ),
    "idle categories": (
        lambda content: content["categories"].append({"id": 2, "name": "y"}),
        "remove them, or add objects",
        lambda content: content["categories"].pop(),
    ),
    "folders by \\": (
        first("images", file_name="b\\a.png"),
        "write / in file_name",
        first("images", file_name="b/a.png"),
    ),
    "a folder too many": (
        first("images", file_name="c/a.png"),
        "or take c/ out of file_name",
        first("images", file_name="a.png"),
    ),
    "capitals": (first("images", file_name="A.png"), "rename one of them", first("images", file_name="a.png")),
    "an address": (
        first("images", file_name="http://x/a.png"),
        "let file_name be their names",
        first("images", file_name="a.png"),
    ),
}


@pytest.fixture
def own_set(tmp_path):
    """Registers annotations with their images as "advised"; returns all that is said of them."""
    (tmp_path / "images" / "b").mkdir(parents=True)
    for name in ("a.png", "b/a.png"):
        Image.fromarray(PIXELS).save(tmp_path / "images" / name)

    def said(content, config=FASTER, *overrides):
        path = tmp_path / f"{len(os.listdir(tmp_path))}.json"
        path.write_text(json.dumps(content))
        triple = ("advised", str(path), str(tmp_path / "images"))
        cfg = load_config(config, [*TINY, *overrides])
        found = sentences(use_datasets, cfg, [triple], [*TINY, *overrides])
        return found or [str(finding) for finding in examine_dataset("advised")]

    yield said
    DatasetCatalog.pop("advised", None)
    MetadataCatalog.pop("advised", None)


@pytest.mark.parametrize("kind", ANNOTATIONS)
def test_annotations(own_set, kind):
    spoil, advice, mend = ANNOTATIONS[kind]
    assert own_set(coco()) == []
    content = coco()
    spoil(content)
    before = own_set(content)
    assert any(advice in text for text in before), before
    mend(content)
    assert own_set(content) == []


MASKS = {
    "no masks": (each(segmentation=None), "set MODEL.MASK_ON False", ["MODEL.MASK_ON", "False"]),
    "RLE": (
        each(segmentation={"size": [40, 60], "counts": [10, 400, 1990]}),
        "set INPUT.MASK_FORMAT bitmask",
        ["INPUT.MASK_FORMAT", "bitmask"],
    ),
    "keypoints": (each(segmentation=None), "set MODEL.KEYPOINT_ON False", ["MODEL.KEYPOINT_ON", "False"]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_and_keypoints(own_set, kind):
    spoil, advice, follow = MASKS[kind]
    content = coco()
    spoil(content)
    config, *odd = (
        (FASTER, "MODEL.KEYPOINT_ON", "True") if kind == "keypoints" else (MASK, "INPUT.MASK_FORMAT", "polygon")
    )
    assert advice in own_set(content, config, *odd)[0]
    assert own_set(content, config, *odd, *follow) == []


def test_files_of_annotations(tmp_path):
    text = json.dumps(coco())
    (tmp_path / "a.json").write_text(text)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.json", "inner.json")
    (said,) = sentences(read_annotations, tmp_path / "a.zip")
    assert "unpack it, and name the JSON file in it" in said
    zipfile.ZipFile(tmp_path / "a.zip").extractall(tmp_path)
    assert read_annotations(tmp_path / "inner.json").warnings == []
    (tmp_path / "a.py").write_text(repr(coco()))
    (said,) = sentences(read_annotations, tmp_path / "a.py")
    assert "write it with json.dump" in said
    with open(tmp_path / "b.json", "w") as file:
        json.dump(eval((tmp_path / "a.py").read_text()), file)
    assert read_annotations(tmp_path / "b.json").warnings == []
    (tmp_path / "twice.json").write_text(text.replace('"width": 60', '"width": 60, "width": 61'))
    (said,) = sentences(read_annotations, tmp_path / "twice.json")
    assert "leave one of them" in said
    (tmp_path / "twice.json").write_text(text.replace('"width": 60', '"width": 60 '))
    assert read_annotations(tmp_path / "twice.json").warnings == []


def test_images(tmp_path):
    Image.fromarray(PIXELS[:1]).resize((3000, 2)).save(tmp_path / "thin.png")
    assert "cut it into pieces" in image_fault(tmp_path / "thin.png")
    Image.open(tmp_path / "thin.png").crop((0, 0, 300, 2)).save(tmp_path / "piece.png")
    assert image_fault(tmp_path / "piece.png", decode=True) is None
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "deep.png")
    key = re.search(r"set (INPUT.PIXEL_RANGE) \(LOW, HIGH\)", image_fault(tmp_path / "deep.png"))[1]
    pixel_range = load_config(FASTER, [key, "(0, 4095)"]).INPUT.PIXEL_RANGE
    assert image_fault(tmp_path / "deep.png", decode=True, pixel_range=pixel_range) is None


DEPTH_18 = [*TINY, "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.SGE.GROUPS", "16"]


def of_weights(overrides):
    cfg = load_config(FASTER, [*DEPTH_18, *overrides])
    return [str(finding) for finding in examine_weights(cfg, sge_options(cfg))]


@functools.cache
def state():
    return torchvision_resnet(18, False).state_dict()


def test_weights_step_by_step(tmp_path):
    """Torchvision's file, until nothing is said of it."""
    source, plain, final = (str(tmp_path / name) for name in ("r18.pth", "plain.pth", "final.pth"))
    torch.save(state(), source)
    (said,) = of_weights(["MODEL.WEIGHTS", source])
    assert f"convert it: tools/convert_weights.py {source} OUTPUT.pth" in said
    convert_file(source, plain)
    overrides = ["MODEL.WEIGHTS", plain, "INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]"]
    advice = [re.search(r"; set (\S+) (.*)$", text) for text in of_weights(overrides)]
    keys = [part for found in advice if found for part in (found[1], found[2])]
    assert {"INPUT.FORMAT", "MODEL.PIXEL_MEAN"} <= set(keys)
    (said,) = of_weights([*overrides, *keys])
    assert f"transplant it: tools/convert_weights.py {plain} OUTPUT.pth --transplant" in said
    fit = functools.partial(convert_file, plain, final)
    cfg = load_config(FASTER, [*DEPTH_18, *keys])
    (refused,) = sentences(lambda: fit(cfg=cfg))
    assert "convert it with --transplant, or set MODEL.SGE.ENABLED False" in refused
    assert sentences(lambda: fit(cfg=load_config(FASTER, [*DEPTH_18, *keys, "MODEL.SGE.ENABLED", "False"]))) == []
    transplant_file(plain, final, cfg=cfg)
    assert of_weights(["MODEL.WEIGHTS", final, *keys]) == []
    said = " ".join(of_weights(["MODEL.WEIGHTS", final, *keys, "MODEL.SGE.GROUPS", "8"]))
    key, groups = re.search(r"set (MODEL.SGE.GROUPS) (\d+)", said).groups()
    assert of_weights(["MODEL.WEIGHTS", final, *keys, key, groups]) == []

    frozen = ["MODEL.WEIGHTS", final, *keys, "MODEL.BACKBONE.FREEZE_AT", "2"]
    (said,) = of_weights(frozen)
    least = re.search(r"freezes the SGE of res2, .*; set it to (\d),", said)[1]
    assert of_weights([*frozen, "MODEL.BACKBONE.FREEZE_AT", least]) == []


def test_frozen_without_weights():
    frozen = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "2"]
    (said,) = of_weights(frozen)
    assert of_weights([*frozen, "MODEL.BACKBONE.FREEZE_AT", re.search(r"set it to (\d), or name", said)[1]]) == []


def test_norms_of_several_processes():
    cfg = load_config(FASTER, ["MODEL.RESNETS.NORM", "SyncBN"])
    for processes in (1, 2):
        (finding,) = examine_run(cfg, processes=processes)
        key, norm = re.search(r"set (\S+) (\w+) or FrozenBN", finding.remedy).groups()
        assert examine_run(load_config(FASTER, [key, norm]), processes=processes) == []


# A YAML file, what is said of it, and the file as the sentence has it.
FILES = {
    "a key twice": ("SEED: 1\nSEED: 2\n", "keep one of the two", "SEED: 2\n"),
    "a circle": ("_BASE_: own.yaml\nSEED: 1\n", "take one of them out", "SEED: 1\n"),
    "a tag": (
        'MODEL:\n  PIXEL_STD: !!python/object/apply:eval ["[1.0] * 3"]\n',
        "write the value out",
        "MODEL:\n  PIXEL_STD: [1.0, 1.0, 1.0]\n",
    ),
    "another machine": ("_BASE_: http://host/base.yaml\n", "copy it here, and name the copy", "_BASE_: base.yaml\n"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_of_configs(tmp_path, kind):
    text, advice, mended = FILES[kind]
    (tmp_path / "base.yaml").write_text("SEED: 3\n")
    path = tmp_path / "own.yaml"

    def said():
        return [*map(str, duplicate_keys(str(path))), *sentences(load_config, str(path))]

    path.write_text(text)
    assert any(advice in sentence for sentence in said()), said()
    path.write_text(mended)
    assert said() == []


def test_files_of_weights(tmp_path):
    source = str(tmp_path / "w.pth")
    torch.save(state(), source)
    assert "name another output" in sentences(convert_file, source, source)[0]
    assert "must end in .pth or .safetensors" in sentences(convert_file, source, str(tmp_path / "w.bin"))[0]
    assert sentences(convert_file, source, str(tmp_path / "other.pth")) == []
    (said,) = sentences(functools.partial(read_source, weights_of="ema"), source)
    assert "leave --weights-of ema out" in said
    assert read_source(source).kind == "plain-resnet"
    torch.save({"state_dict": state(), "it": Mine()}, tmp_path / "mine.pth")
    assert "save the dict of weights alone" in sentences(load_file, tmp_path / "mine.pth")[0]
    torch.save(torch.load(tmp_path / "mine.pth", weights_only=False)["state_dict"], source)
    assert read_source(source).kind == "plain-resnet"


class Mine:
    """What no reader of weights needs."""


def test_checkpoints_of_a_run(tmp_path):
    checkpointer = Checkpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("model_0000001", iteration=1)
    path = tmp_path / "model_0000001.pth"
    content = torch.load(path)
    torch.save(content | {"more": torch.ones(1)}, path)
    (said,) = sentences(load_file, path)
    os.remove(re.search(r"if you have changed them yourself, remove (\S+)$", said)[1])
    assert "more" in load_file(path)
    (tmp_path / "last_checkpoint").write_text("../model.pth")
    (said,) = sentences(last_checkpoint, tmp_path)
    assert "or remove it, and the newest checkpoint is used" in said
    (tmp_path / "last_checkpoint").unlink()
    assert last_checkpoint(tmp_path) == path
