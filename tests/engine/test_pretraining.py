"""Pretraining on a handful of made-up images: exact after interruptions, and into the detectors."""

import json
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from foreign_weights import assert_equal_features, backbone_config, build_backbone, load
from PIL import Image
from reference_models import features
from timm.data import create_dataset

from sge_det import UserError
from sge_det.checkpoint import convert_file
from sge_det.engine import pretraining
from sge_det.engine.pretraining import EpochSampler, Pretraining, SeededImages, build_model, pretrain
from sge_det.errors import Stopped

SLIM = {"channels": (16, 32, 64, 128)}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of different colour, 12 images each to train on and 5 to validate."""
    folder = tmp_path_factory.mktemp("classified")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for place, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (40, 48, 3), dtype=np.uint8)
                pixels[..., 2 - place] += 100
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def run(images, tmp_path):
    return Pretraining(
        str(images / "train"),
        str(images / "val"),
        str(tmp_path / "out"),
        model="sge_resnet26",
        model_kwargs=SLIM,
        groups=16,
        img_size=32,
        epochs=2,
        batch_size=8,
        lr=0.05,
        sched="cosine",
        workers=0,
        device="cpu",
        ema_decay=0.9,
        mixup=0.2,
        smoothing=0.1,
        auto_augment="rand-m5-n1",
        clip_grad=1.0,
    )


def final(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


@pytest.mark.parametrize("stops", [[1], [4, 3]], ids=["in the first epoch", "twice"])
def test_an_interrupted_run_ends_as_it_would_have_ended(run, tmp_path, monkeypatch, stops):
    whole = pretrain(run)
    other = replace(run, output=str(tmp_path / "other"), workers=1)
    left = []
    monkeypatch.setattr(pretraining, "asked", lambda: left.pop() if left else None)
    for number, stop in enumerate(stops):
        left[:] = [signal.SIGTERM, *[None] * (stop - 1)]
        with pytest.raises(Stopped) as stopped:
            pretrain(other, resume=number > 0)
        assert stopped.value.exit_code == 143
    monkeypatch.setattr(pretraining, "asked", lambda: None)
    resumed = pretrain(other, resume=True)
    before, after = final(run.folder), final(other.folder)
    for weights in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(before[weights][key], after[weights][key]) for key in before[weights])
    drop = ("seconds", "output")
    assert {k: v for k, v in whole.items() if k not in drop} == {k: v for k, v in resumed.items() if k not in drop}
    assert sorted(path.name for path in other.folder.iterdir() if not path.name.startswith(".")) == [
        "model_final.pth",
        "predictions.json",
        "pretraining.json",
        "result.json",
    ]


def test_the_result_is_what_the_final_weights_give(run):
    result = pretrain(replace(run, epochs=1))
    model = build_model(run, 3).eval()
    model.load_state_dict(final(run.folder)["state_dict"])
    hits = {}
    mean, std = (torch.tensor(final(run.folder)[key]).view(3, 1, 1) for key in ("mean", "std"))
    for place, name in enumerate(("blue", "green", "red")):
        for number in range(5):
            image = Image.open(f"{run.val}/{name}/{number}.png")
            # crop_pct 0.875 of 32: the shorter side is 36 before the crop; timm's resnet26 is bicubic
            image = image.resize((43, 36), Image.Resampling.BICUBIC).crop((6, 2, 38, 34))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
            with torch.no_grad():
                hits[f"{name}/{number}.png"] = int(model((pixels - mean)[None] / std).argmax() == place)
    predictions = json.loads((run.folder / "predictions.json").read_text())
    assert dict(zip(predictions["images"], predictions["top1"], strict=True)) == hits
    assert result["top1"] == pytest.approx(100 * sum(hits.values()) / 15)
    assert result["top5"] == 100
    assert result["ema"]["top5"] == 100


def test_final_weights_go_into_a_detector(images, tmp_path):
    run = Pretraining(
        str(images / "train"), str(images / "val"), str(tmp_path / "out"), model="sge_resnet50", img_size=32, epochs=1,
        model_kwargs={"base_width": 16}, batch_size=4, lr=0.01, workers=0, device="cpu", scale=0.9,
    )  # fmt: skip
    pretrain(run)
    conversion = convert_file(str(run.folder / "model_final.pth"), str(tmp_path / "converted.pth"))
    assert conversion.source.kind == "timm-sge"
    model = build_model(run, 3).eval()
    model.load_state_dict(final(run.folder)["state_dict"])
    backbone = load(build_backbone(backbone_config(50, True)), tmp_path / "converted.pth")
    assert_equal_features(lambda x: features(model, x), backbone)


def test_plain_and_sge_start_from_the_same_weights(run):
    with_sge, plain = build_model(run, 3).state_dict(), build_model(replace(run, model="resnet26"), 3).state_dict()
    assert all(torch.equal(with_sge[key], value) for key, value in plain.items())
    assert {value.shape[1] for key, value in with_sge.items() if key not in plain} == {16}
    assert len(with_sge) > len(plain)


def test_the_recipe_is_the_papers(run, images):
    recipe = Pretraining("a", "b", "c")
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.weight_decay) == (100, 256, 0.1, 1e-4)
    paper = replace(run, sched="step", epochs=100, lr=0.1, warmup_epochs=0, batch_size=36, ema_decay=0.0)
    session = pretraining._Session(paper)
    rates = []
    for epoch in (0, 29, 30, 59, 60, 89, 90, 99):
        session.scheduler.step_update(epoch * session.steps)
        rates.append(session.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_every_image_is_seen_once_an_epoch_in_an_order_of_its_own():
    sampler = EpochSampler(10, 2, seed=3)
    first = [index for _, index in sampler]
    sampler.epoch, sampler.start = 1, 2
    second = [index for _, index in sampler]
    sampler.start = 0
    assert sorted(first) == list(range(10))
    assert [index for _, index in sampler][4:] == second
    assert first[4:] != second


def test_augmentations_depend_on_seed_epoch_and_image(run):
    data = pretraining._Session(run).train_set
    again = SeededImages(data.dataset, run.seed)
    other = SeededImages(data.dataset, run.seed + 1)
    assert torch.equal(data[0, 5][0], again[0, 5][0])
    assert not torch.equal(data[0, 5][0], data[1, 5][0])
    assert not torch.equal(data[0, 5][0], other[0, 5][0])


def test_a_tar_is_read_like_its_folder(run, images, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(images / "val", ".")
    _, val, classes = pretraining._data(replace(run, val=str(tmp_path / "val.tar")))
    folder = create_dataset("", root=str(images / "val"))
    assert classes == ["blue", "green", "red"]
    assert sorted(val[i][1] for i in range(15)) == sorted(folder[i][1] for i in range(15))


def test_a_folder_with_a_run_is_not_written_over(run):
    run = replace(run, epochs=1)
    pretrain(run)
    before = (run.folder / "model_final.pth").read_bytes()
    with pytest.raises(UserError, match=r"holds a run .result\.json.*--resume .*--overwrite"):
        pretrain(run)
    with pytest.raises(UserError, match=r"made with --lr 0\.05, not 0\.5: give it as it was"):
        pretrain(replace(run, lr=0.5), resume=True)
    assert (run.folder / "model_final.pth").read_bytes() == before
    assert pretrain(run, resume=True)["history"][-1]["epoch"] == 1
    pretrain(replace(run, lr=0.5), overwrite=True)
    assert (run.folder / "model_final.pth").read_bytes() != before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "sge_vit_base_patch16_224"}, "no place for SGE|cannot be built"),
        ({"model": "sge_resnet51"}, "timm has no 'resnet51'"),
        ({"groups": 7}, "cannot be built: .*7 groups"),
        ({"model_kwargs": {"nonsense": 1}}, "cannot be built"),
        ({"epochs": 0}, "--epochs 0 must be at least 1"),
        ({"lr": float("nan")}, "--lr nan must be a number"),
        ({"batch_size": 100}, "--batch-size 100 is more than the 36 images"),
        ({"batch_size": 9}, "--mixup and --cutmix pair images"),
        ({"train": "nowhere"}, "--train nowhere is not there"),
        ({"amp": "float16"}, "float16 needs a GPU"),
        ({"scale": 0.0}, "--scale 0.0 must be above 0"),
    ],
)
def test_mistakes_are_told(run, change, words):
    with pytest.raises(UserError, match=words):
        pretrain(replace(run, **change))


def test_classes_that_differ_and_folders_without_images(run, tmp_path):
    with pytest.raises(UserError, match="differ in their classes: "):
        pretrain(replace(run, val=str(tmp_path_with(tmp_path, "black"))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images in a folder for each class"):
        pretrain(replace(run, train=str(tmp_path / "empty")))


def tmp_path_with(folder, name):
    (folder / "set" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "set" / name / "0.png")
    return folder / "set"


def test_the_tool_trains_in_two_processes(run, run_tool):
    options = (
        f"--train {run.train} --val {run.val} --model resnet18 --img-size 32 --epochs 1 --batch-size 12 --workers 0"
    )
    done = run_tool("pretrain.py", *options.split(), "--output", run.output, "--num-gpus", "2", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    result = json.loads((run.folder / "result.json").read_text())
    assert result["images"] == 15
    assert result["processes"] == 2
    assert f"top-1 {result['top1']:.2f}" in done.stdout
