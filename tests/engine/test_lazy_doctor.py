"""Each finding of the doctor of lazy configs with a config that triggers it and a near one that does not."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from PIL import Image

from sge_det.config import load_lazy_config
from sge_det.engine.lazy_doctor import diagnose_lazily

FASTER = "lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py"
BOTTOM = "model.backbone.bottom_up"
SCRATCH = ["train.init_checkpoint=''", f"{BOTTOM}.freeze_at=0"]
SMALL = [
    *(f"{BOTTOM}.stages.depth=18", f"{BOTTOM}.stages.groups=8", "dataloader.train.num_workers=0"),
    *("model.backbone.out_channels=16", "model.roi_heads.box_head.fc_dims=[16,16]"),
    "dataloader.train.mapper.augmentations.0.short_edge_length=[64]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=64",
]


@pytest.fixture
def examine(sample_datasets):
    def run(*overrides, datasets=sample_datasets, **options):
        found = diagnose_lazily(FASTER, [*SMALL, *overrides], datasets, **options)
        return [(finding.severity, str(finding)) for finding in found]

    return run


def only(findings, severity, *words):
    assert [found[0] for found in findings] == [severity], findings
    for word in words:
        assert word in findings[0][1], findings


def save(path, groups=8, sge=True):
    """Random weights of the small detector's, with trained gates or without any."""
    cfg = load_lazy_config(FASTER, [*SMALL, f"{BOTTOM}.stages.groups={groups}", "model.roi_heads.num_classes=4"])
    state = instantiate(cfg.model).state_dict()
    state = {key: torch.ones_like(value) if ".sge." in key else value for key, value in state.items()}
    state = {key: value for key, value in state.items() if sge or ".sge." not in key}
    torch.save({"model": state}, path)
    return f"train.init_checkpoint={path}"


def test_a_sound_config_has_no_findings(examine):
    assert examine(*SCRATCH) == []


@pytest.mark.parametrize(
    ("overrides", "severity", "words"),
    [
        (["optimizer.lrr=1"], "error", ["--config-file: there is no config key optimizer.lrr"]),
        ([f"{BOTTOM}.freeze_at=0", "train.init_checkpoint=no.pth"], "error", ["train.init_checkpoint no.pth is not"]),
        (["train.init_checkpoint=''"], "warning", [f"{BOTTOM}.freeze_at: ", "no weights"]),
        ([*SCRATCH, f"{BOTTOM}.stages.groups=48"], "error", ["model: 48 groups do not divide", "64 channels"]),
        ([*SCRATCH, "model.roi_heads.pooling=7"], "error", ["pooling"]),
        ([*SCRATCH, f"{BOTTOM}.stages.norm=SyncBN"], "warning", [f"{BOTTOM}.stages.norm: SyncBN in one process"]),
        ([*SCRATCH, "train.max_iter=0"], "error", ["train.max_iter: it is 0; set a whole number"]),
        ([*SCRATCH, "train.output_dir=/dev/null/run"], "error", ["train.output_dir: ", "/dev/null is a file"]),
        ([*SCRATCH, "optimizer.optimizer._target_=torch.optim.Sgd"], "error", ["optimizer"]),
        (
            [*SCRATCH, "dataloader.train.mapper.augmentations.0.max_size=a"],
            "error",
            ["dataloader.train: its images cannot be read and augmented"],
        ),
    ],
)
def test_a_fault_and_its_finding(examine, overrides, severity, words):
    only(examine(*overrides), severity, *words)


def test_classes_and_data_sets(examine, sample_datasets):
    (name, *_), (other, *_) = sample_datasets
    names = [f"dataloader.train.dataset.names={name}", f"dataloader.test.dataset.names={other}"]
    only(examine(*SCRATCH, *names, datasets=()), "error", "model.roi_heads.num_classes is 80, but tiny_train has 4")
    assert examine(*SCRATCH, *names, "model.roi_heads.num_classes=4", datasets=()) == []


def test_the_learning_rate_against_the_batch(examine):
    batch = [*SCRATCH, "dataloader.train.total_batch_size=2"]
    words = [text for _, text in examine(*batch, datasets=()) if "optimizer.lr" in text]
    assert words and "0.02 at dataloader.train.total_batch_size 2 is 8 times the recipe's" in words[0]
    assert not any("optimizer.lr:" in text for _, text in examine(*batch, "optimizer.lr=0.0025", datasets=()))


def test_weights(examine, tmp_path):
    assert examine(save(tmp_path / "sge.pth")) == []
    plain = save(tmp_path / "plain.pth", sge=False)
    found = examine(plain, f"{BOTTOM}.freeze_at=1")
    only(found, "warning", "train.init_checkpoint: ", "plain.pth has no SGE", "--transplant")
    assert any("freezes 2 SGE layers" in text for _, text in examine(plain, f"{BOTTOM}.freeze_at=2"))
    found = examine(save(tmp_path / "groups.pth", groups=16))
    only(found, "error", f"{BOTTOM}.stages.groups: ", "has SGE of 16 groups, the model of 8")
    found = examine(f"train.init_checkpoint={tmp_path / 'sge.pth'}", f"{BOTTOM}.stages.depth=34")
    only(found, "error", "train.init_checkpoint: ", "tensors of the backbone")


def test_the_tool(call_tool, sample_datasets):
    words = [word for name, *paths in sample_datasets for word in ("--dataset", name, *paths)]
    done = call_tool("check_config.py", "--config-file", FASTER, *words, *SMALL, *SCRATCH)
    assert (done.returncode, done.stdout) == (0, f"{FASTER}: 0 errors, 0 warnings\n"), done
    done = call_tool("check_config.py", "--config-file", FASTER, *words, *SMALL, *SCRATCH, "train.max_iter=0")
    assert done.returncode == 2 and done.stdout.endswith("1 errors, 0 warnings\n")


def test_deep_images_are_taken_with_their_range(sample, tmp_path):
    """As by training: refused without train.pixel_range, and not with it."""
    datasets = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        truth = json.loads((sample / f"annotations/instances_{split}.json").read_text())
        for image in truth["images"]:
            grey = np.asarray(Image.open(sample / split / image["file_name"]).convert("L"), np.uint16)
            image["file_name"] = f"{image['id']}.png"
            Image.fromarray(grey * 256).save(tmp_path / split / image["file_name"])
        (tmp_path / f"{split}.json").write_text(json.dumps(truth))
        datasets.append((f"deep_{split}", str(tmp_path / f"{split}.json"), str(tmp_path / split)))
    refused = diagnose_lazily(FASTER, [*SMALL, *SCRATCH], datasets)
    assert refused and all("train.pixel_range=[LOW,HIGH]" in str(finding) for finding in refused)
    assert diagnose_lazily(FASTER, [*SMALL, *SCRATCH, "train.pixel_range=[0,65535]"], datasets) == []
