"""Pretraining on a handful of made-up images: exact after interruptions, and into the detectors."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import asdict, replace

import forked_python
import numpy as np
import pytest
import torch
from foreign_weights import assert_equal_features, backbone_config, build_backbone, load
from PIL import Image
from reference_models import features
from timm.data import create_dataset

from sge_det import UserError
from sge_det.checkpoint import convert_file
from sge_det.data.classified import EpochSampler, Images, SeededImages, load_sets
from sge_det.engine.pretraining import loop
from sge_det.engine.pretraining.loop import build_model, pretrain
from sge_det.engine.pretraining.options import Pretraining
from sge_det.errors import Stopped
from sge_det.gain.classified import read_classified

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
    monkeypatch.setattr(loop, "asked", lambda: left.pop() if left else None)
    for number, stop in enumerate(stops):
        left[:] = [signal.SIGTERM, *[None] * (stop - 1)]
        with pytest.raises(Stopped) as stopped:
            pretrain(other, resume=number > 0)
        assert stopped.value.exit_code == 143
    monkeypatch.setattr(loop, "asked", lambda: None)
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
    compared = read_classified(run.folder)
    assert (100 * compared.hits.mean(0)).tolist() == pytest.approx([result["top1"], result["top5"]])
    assert (compared.images, compared.result["seed"]) == (predictions["images"], 0)
    assert result["ema"]["top5"] == 100


def test_final_weights_go_into_a_detector(images, tmp_path):
    run = Pretraining(
        str(images / "train"),
        str(images / "val"),
        str(tmp_path / "out"),
        model="sge_resnet50",
        model_kwargs=SLIM,
        stem_channels=32,
        groups=16,
        img_size=32,
        epochs=1,
        batch_size=4,
        lr=0.01,
        workers=0,
        device="cpu",
        scale=0.9,
    )
    pretrain(run)
    conversion = convert_file(str(run.folder / "model_final.pth"), str(tmp_path / "converted.pth"))
    assert conversion.source.kind == "timm-sge"
    model = build_model(run, 3).eval()
    model.load_state_dict(final(run.folder)["state_dict"])
    cfg = backbone_config(50, True)
    cfg.merge_from_list(["MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64])
    cfg.MODEL.SGE.GROUPS = 16
    backbone = load(build_backbone(cfg), tmp_path / "converted.pth")
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
    session = loop._Session(paper)
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
    data = loop._Session(run).train_set
    again = SeededImages(data.images, run.seed)
    other = SeededImages(data.images, run.seed + 1)
    assert torch.equal(data[0, 5][0], again[0, 5][0])
    assert not torch.equal(data[0, 5][0], data[1, 5][0])
    assert not torch.equal(data[0, 5][0], other[0, 5][0])


def test_a_tar_is_read_like_its_folder(run, images, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        archive.add(images / "val", ".")
    _, val, classes = load_sets(run.train, str(tmp_path / "val.tar"), run.seed)
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


def test_a_mistake_in_what_is_to_take_its_place_leaves_a_run(trained, tmp_path):
    run = replace(trained[0], output=str(tmp_path / "out"))
    shutil.copytree(trained[0].folder, run.folder)
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    with pytest.raises(UserError, match="--opt sdg is not taken by timm"):
        pretrain(replace(run, opt="sdg"), overwrite=True)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_images_may_move_and_may_not_be_others(trained, images, tmp_path):
    run = replace(trained[0], output=str(tmp_path / "out"), train=str(tmp_path / "moved"))
    shutil.copytree(trained[0].folder, run.folder)
    shutil.copytree(images / "train", tmp_path / "moved")
    assert pretrain(run, resume=True) == trained[1]
    (tmp_path / "moved/red/3.png").rename(tmp_path / "moved/green/12.png")
    with pytest.raises(
        UserError, match=r"made with other images than those of --train .*moved, whose files have other"
    ):
        pretrain(run, resume=True)
    with pytest.raises(UserError, match="made in 1 processes, not 2: give it as it was"):
        loop._compared(run.folder, {"processes": 2})


def test_without_a_schedule_the_rate_stays(trained, tmp_path):
    session = loop._Session(replace(trained[0], sched="none", lr=0.02, output=str(tmp_path / "out")))
    session._update(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    assert {group["lr"] for group in session.optimizer.param_groups} == {0.02}


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    run = Pretraining(
        str(images / "train"),
        str(images / "val"),
        str(tmp_path_factory.mktemp("trained") / "out"),
        model="resnet18",
        model_kwargs=SLIM,
        stem_channels=16,
        img_size=32,
        epochs=1,
        batch_size=36,
        workers=0,
        device="cpu",
    )
    return run, pretrain(run)


DAMAGED = {
    "result.json": ("[]", '{"top1": 1, "top5": 2, "ema": {"top1": "x"}}', "[" * 100_000, None),
    "pretraining.json": ("", "gone"),
    "model_final.pth": ("damaged",),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_told_and_what_is_advised_helps(trained, tmp_path, name):
    before, result = trained
    for number, content in enumerate(DAMAGED[name]):
        folder = tmp_path / str(number)
        shutil.copytree(before.folder, folder)
        run, file = replace(before, output=str(folder)), folder / name
        file.unlink()
        if content is None:
            file.mkdir()
        elif content != "gone":
            file.write_text(content)
        if name == "model_final.pth":
            (folder / "result.json").unlink()
        with pytest.raises(UserError, match=name.replace(".", r"\.")) as told:
            pretrain(run, resume=True)
        if name == "result.json":
            assert f"{file} " in str(told.value) and "remove it and give the same command with --resume" in str(
                told.value
            )
            file.rmdir() if content is None else file.unlink()
            again = pretrain(run, resume=True)
        else:
            assert "give --overwrite in place of --resume to start anew" in str(told.value)
            again = pretrain(run, overwrite=True)
        assert (again["top1"], again["top5"]) == (result["top1"], result["top5"])


def test_a_run_that_was_cut_off_after_its_result_leaves_no_checkpoint(trained, tmp_path):
    before, result = trained
    run = replace(before, output=str(tmp_path / "out"))
    shutil.copytree(before.folder, run.folder)
    (run.folder / "checkpoint.pth").write_bytes((run.folder / "model_final.pth").read_bytes())
    session = loop._Session.__new__(loop._Session)
    session.run = run
    assert session._finish()["top1"] == result["top1"]
    assert not (run.folder / "checkpoint.pth").exists()


def test_weights_that_are_no_numbers_are_not_saved_and_a_slower_new_run_is(trained, tmp_path, monkeypatch):
    run = replace(trained[0], output=str(tmp_path / "out"), epochs=2)
    update = loop._Session._update

    def explode(session, *given):
        loss = update(session, *given)
        if session.epoch == 1 and session.run.lr > 0.01:
            next(session.model.parameters()).data[0] = float("nan")
        return loss

    monkeypatch.setattr(loop._Session, "_update", explode)
    with pytest.raises(UserError, match=r"^conv1\.weight is no longer finite after epoch 2.*lower --lr 0\.1 ") as told:
        pretrain(run)
    assert "in a new run (--overwrite, or another --output)" in str(told.value)
    good = torch.load(run.folder / "checkpoint.pth", weights_only=True)
    assert good["epoch"] == 1 and all(value.isfinite().all() for value in good["state_dict"].values())
    pretrain(replace(run, lr=0.001), overwrite=True)
    assert all(value.isfinite().all() for value in final(run.folder)["state_dict"].values())


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
        ({"model": "vit_tiny_patch16_224", "model_kwargs": {}}, "no ResNet"),
        ({"model": "sge_resnet26d", "stem_channels": 48}, "--stem-channels needs a stem of one convolution"),
        ({"sched": "cosin"}, "--sched cosin is not taken by timm"),
        ({"opt": "sdg"}, "--opt sdg is not taken by timm"),
        ({"auto_augment": "much"}, "--auto-augment much is not taken by timm"),
        ({"device": "gpu"}, "--device gpu is not one of cuda, cpu"),
        ({"ema_decay": 1.0}, r"--ema-decay 1\.0 must be in \[0, 1\)"),
        ({"seed": -1}, "--seed -1 must be from 0 to 2147483647"),
        ({"amp": "float8"}, "--amp float8 is not one of bfloat16, float16"),
        ({"decay_epochs": 0.0}, r"--decay-epochs 0\.0 must be a number above 0"),
        ({"decay_rate": -1.0}, r"--decay-rate -1\.0 must be a number of at least 0"),
        ({"min_lr": float("nan")}, "--min-lr nan must be a number of at least 0"),
        ({"color_jitter": -1.0}, r"--color-jitter -1\.0 must be a number of at least 0"),
        ({"model_kwargs": {**SLIM, "in_chans": 1}}, "in_chans=1 is not taken by timm: "),
        (
            {"model_kwargs": {**SLIM, "checkpoint_path": "no.pth"}},
            "checkpoint_path.*cannot be built: FileNotFoundError",
        ),
        ({"opt": "adahessian"}, "--opt adahessian needs second derivatives"),
        ({"auto_augment": "augmix-a0"}, "--auto-augment augmix-a0 is not taken by timm: "),
        ({"batch_size": 1, "mixup": 0.0}, "--batch-size 1 is one image for each process, and --img-size 32 leaves"),
        ({"train": ""}, "--train  is not there"),
        ({"output": ""}, "--output is empty"),
        ({"output": "/proc/self/none"}, "--output /proc/self/none cannot be written: .*: name another"),
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


def test_images_that_are_not_sorted_into_classes(run, images, tmp_path):
    for command, words in (
        (["cp", "blue/0.png", "0.png"], r"--train .*: 0\.png is in no class's folder: move it into one"),
        (["rm", "-r", "0.png", "blue"], "differ in their classes: blue has images in --val alone; give both the same"),
        (["mv", "green", "red", ".."], "has no images in a folder for each class"),
    ):
        if not (tmp_path / "train").exists():
            shutil.copytree(images / "train", tmp_path / "train")
        subprocess.run(command, cwd=tmp_path / "train", check=True)
        with pytest.raises(UserError, match=words):
            load_sets(str(tmp_path / "train"), run.val, 0)
    one = str(tmp_path_with(tmp_path, "black"))
    with pytest.raises(UserError, match="has images of one class alone, black: give a folder"):
        load_sets(one, one, 0)
    with pytest.raises(UserError, match=r"--val .*val lies in --train .*, which so holds the images of both"):
        load_sets(str(images), run.val, 0)
    with tarfile.open(tmp_path / "train.tar.gz", "w:gz") as archive:
        archive.add(images / "train", ".")
    with pytest.raises(UserError, match=r"train\.tar\.gz is no folder and no \.tar: unpack it"):
        load_sets(str(tmp_path / "train.tar.gz"), run.val, 0)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_classes_are_told_apart_by_case_and_zeros_whatever_the_order_of_a_set(tmp_path, kind):
    """timm takes the labels of such names from the order of a set, which is another in each process."""
    names = ["1", "01", "B", "a", "A", "b"]
    for place, name in enumerate(names):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (place, 0, 0)).save(
            tmp_path / "set" / name / ("0.webp" if place % 2 else "0.bmp"), lossless=True
        )
    path = tmp_path / "set"
    if kind == "tar":
        path = tmp_path / "set.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(tmp_path / "set", ".")
    found = Images("train", str(path))
    assert found.classes == ["01", "1", "A", "a", "B", "b"]
    for index in range(6):
        image, label = found[index]
        folder = found.name(index).split("/")[-2]
        assert (found.classes[label], round(float(255 * image[0, 0, 0]))) == (folder, names.index(folder))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(run, images, tmp_path, workers):
    """timm's own data set would take the next image for it, whose label may be another."""
    shutil.copytree(images / "train", tmp_path / "train")
    (tmp_path / "train/green/7.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^--train .*: green/7\.png cannot be read as an image"):
        pretrain(replace(run, train=str(tmp_path / "train"), workers=workers))


def test_classes_are_in_the_order_of_their_labels(tmp_path):
    for name in ("class10", "class2"):
        tmp_path_with(tmp_path, name)
    found = Images("train", str(tmp_path / "set"))
    assert [found.classes[found[index][1]] for index in range(2)] == [
        found.reader.filename(index).split("/")[0] for index in range(2)
    ]


def tmp_path_with(folder, name):
    (folder / "set" / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "set" / name / "0.png")
    return folder / "set"


# In each of two processes: a run, and another that the second process alone is asked to end, which then goes on.
_TWO = """
import argparse, json, signal, sys
from dataclasses import replace
import torch
from detectron2.utils import comm
from sge_det.engine import launching
from sge_det.engine.pretraining import loop
from sge_det.engine.pretraining.options import Pretraining
from sge_det.errors import Stopped

def main(args):
    sessions = []
    made = loop._Session.__init__
    loop._Session.__init__ = lambda self, run: (sessions.append(self), made(self, run))[1]
    run = Pretraining(**json.loads(args.run))
    whole = loop.pretrain(run)
    other, steps = replace(run, output=run.output + "_other"), iter((None, signal.SIGTERM, signal.SIGTERM))
    for stop in (2, 3):  # of 3 steps
        loop.asked = lambda: next(steps) if comm.get_rank() == 1 else None
        try:
            loop.pretrain(other, resume=stop == 3)
            raise AssertionError("it was asked to stop")
        except Stopped:
            loop.asked = lambda: None
        assert comm.all_gather(sessions[-1].step) == [stop, stop]
    again = loop.pretrain(other, resume=True)
    assert {**whole, "seconds": 0, "output": ""} == {**again, "seconds": 0, "output": ""}
    for session in (sessions[0], sessions[-1]):
        for model in (session.model, session.ema.module):
            own = torch.cat([tensor.double().flatten() for tensor in model.state_dict().values()])
            assert all(torch.equal(own, of_other) for of_other in comm.all_gather(own))

args = argparse.Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url=None, timeout=300.0, run=sys.argv[1])
launching.launch(main, args)
"""


@pytest.mark.slow
def test_torchrun_ends_as_it_would_have_ended(run, tmp_path):
    run = replace(run, batch_size=12, epochs=1, mixup=0.0, model="sge_resnet18")
    (tmp_path / "two.py").write_text(_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "two.py"), json.dumps(asdict(run))]
    done = forked_python.run(command, timeout=300)  # torchrun, that is
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = final(run.folder), final(run.folder.with_name("out_other"))
    for weights in ("state_dict", "state_dict_ema"):
        assert all(torch.equal(before[weights][key], after[weights][key]) for key in before[weights])


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
