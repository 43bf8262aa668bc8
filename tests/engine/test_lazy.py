"""Lazy configs: twins of the YAML ones, saved and read again, and their runs with the guards of train_net.py."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils.events import EventStorage
from PIL import Image
from slim_twins import NAMES, SLIM_YAML, lazy_config
from test_config import EXPECTED_COCO
from torch import nn

import sge_det
from sge_det import UserError
from sge_det.config import load_config, load_lazy_config
from sge_det.data.loader import build_train_loader, map_image
from sge_det.engine.lazy import (
    LazyTrainer,
    build_lazy_train_loader,
    claimed_lazily,
    evaluate_lazily,
    flat,
    lazy_mapper,
    lazy_words,
    own_code,
    setup_lazy_config,
    train_lazily,
)
from sge_det.engine.training import setup_config
from sge_det.solver import build_optimizer

LAZY = ROOT / "configs" / "lazy"
LEAVES = sorted(str(path.relative_to(LAZY)) for path in LAZY.glob("COCO-*/*.py"))
BASELINES = sorted(str(path.relative_to(LAZY)) for path in LAZY.glob("new_baselines/*.py"))


def on_meta(cfg):
    with torch.device("meta"):
        return instantiate(cfg.model) if "model" in cfg else build_model(cfg)


def described(model):
    return [(name, tuple(tensor.shape), tensor.requires_grad) for name, tensor in sorted(model.named_parameters())]


def test_each_yaml_config_of_the_paper_has_a_lazy_twin():
    assert EXPECTED_COCO == {leaf.replace(".py", ".yaml") for leaf in LEAVES}


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_lazy_twin_is_the_yaml_config(leaf):
    yaml = sge_det.get_config(leaf.replace(".py", ".yaml"), ["MODEL.DEVICE", "meta"])
    lazy = sge_det.get_config(f"lazy/{leaf}")
    assert described(on_meta(lazy)) == described(on_meta(yaml))
    solver, loader = yaml.SOLVER, lazy.dataloader.train
    assert (lazy.train.init_checkpoint, lazy.train.max_iter) == (yaml.MODEL.WEIGHTS, solver.MAX_ITER)
    assert loader.total_batch_size == solver.IMS_PER_BATCH
    assert loader.mapper.use_instance_mask == yaml.MODEL.MASK_ON
    # the same learning rates, decays and momenta for each parameter, at each point of the schedule
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), sge_det.SpatialGroupEnhance(1))
    lazy.optimizer.params.model = model
    optimizers = instantiate(lazy.optimizer), build_optimizer(yaml, model)
    for ours, theirs in zip(optimizers[0].param_groups, optimizers[1].param_groups, strict=True):
        assert {**ours, "params": 0, "foreach": 0} == {**theirs, "params": 0, "foreach": 0}
    multiplier, scheduler = instantiate(lazy.lr_multiplier), build_lr_scheduler(yaml, optimizers[1])
    for iteration in (0, 250, 499, 500, *(step + offset for step in solver.STEPS for offset in (-1, 0)), -1):
        scheduler.last_epoch = iteration % solver.MAX_ITER
        rate = solver.BASE_LR * multiplier(scheduler.last_epoch / solver.MAX_ITER)
        assert rate == pytest.approx(scheduler.get_lr()[0], rel=1e-9)


@pytest.mark.parametrize("leaf", ["COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py", *BASELINES[:1], *BASELINES[-1:]])
def test_saved_and_read_again_it_is_the_same(leaf, tmp_path):
    cfg = load_lazy_config(f"lazy/{leaf}")
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"], "nothing in it that YAML cannot say"
    assert described(on_meta(load_lazy_config(str(tmp_path / "saved.yaml")))) == described(on_meta(cfg))


@pytest.mark.parametrize("leaf", BASELINES)
def test_a_new_baseline_is_detectron2s_with_sge(leaf):
    from detectron2 import model_zoo

    ours = load_lazy_config(f"lazy/{leaf}")
    plain = model_zoo.get_config(f"new_baselines/{leaf.split('/')[1].replace('SGE_', '')}")
    found, expected = described(on_meta(ours)), described(on_meta(plain))
    assert [entry for entry in found if ".sge." not in entry[0]] == expected
    assert sum(".sge." in entry[0] for entry in found) > 30
    keys, own = flat(plain), flat(ours)
    parts = ("optimizer", "lr_multiplier", "train", "dataloader.train", "dataloader.test")
    assert all(own[key] == value for key, value in keys.items() if key.startswith(parts))


def test_blocks_by_their_names_and_by_detectron2s_own_function(tmp_path):
    name = "lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py"
    expected = described(on_meta(load_lazy_config(name)))
    cfg = load_lazy_config(name, ["+model.backbone.bottom_up.stages.block_class=sge_det.SGEBottleneckBlock"])
    assert described(on_meta(cfg)) == expected
    from detectron2.modeling.backbone import ResNet

    stages = cfg.model.backbone.bottom_up.stages
    del stages["groups"]
    stages._target_, stages.block_class = ResNet.make_default_stages, sge_det.SGEBottleneckBlock
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    assert described(on_meta(load_lazy_config(str(tmp_path / "saved.yaml")))) == expected


@pytest.mark.parametrize("kind", NAMES)
def test_losses_and_detections_are_the_yaml_configs(kind, sample_datasets, tmp_path):
    lazy_cfg = lazy_config(kind, sample_datasets, tmp_path / "run")
    yaml_cfg = setup_config(f"{NAMES[kind]}.yaml", SLIM_YAML, sample_datasets)
    lazy, yaml = instantiate(lazy_cfg.model), build_model(yaml_cfg)
    torch.manual_seed(0)
    for name, parameter in yaml.named_parameters():
        if ".sge." in name:
            nn.init.normal_(parameter)
        if "cls_score" in name:  # else no score is above the threshold
            nn.init.normal_(parameter, std=0.3)
    lazy.load_state_dict(yaml.state_dict())
    batches = [next(iter(loader)) for loader in (build_lazy_train_loader(lazy_cfg, 3), build_train_loader(yaml_cfg, 3))]
    assert [example["file_name"] for example in batches[0]] == [example["file_name"] for example in batches[1]]
    losses = []
    for model, batch in zip((lazy, yaml), batches, strict=True):
        torch.manual_seed(1)
        with EventStorage():
            losses.append({name: loss.item() for name, loss in model(batch).items()})
    assert losses[0] == losses[1]
    with torch.no_grad():
        found = [model.eval()(batch)[0]["instances"] for model, batch in zip((lazy, yaml), batches, strict=True)]
    assert len(found[0]) > 0
    for name, value in found[1].get_fields().items():
        own = found[0].get(name)
        assert torch.equal(getattr(own, "tensor", own), getattr(value, "tensor", value)), name


@pytest.fixture(scope="module")
def trained(sample_datasets, tmp_path_factory):
    """A run of a lazy config from start to end, and its results."""
    folder = tmp_path_factory.mktemp("lazy") / "run"
    cfg = lazy_config("faster", sample_datasets, folder, "train.eval_period=3")
    with claimed_lazily(cfg):
        return cfg, folder, train_lazily(cfg)


def test_a_run_leaves_what_train_net_leaves(trained):
    _, folder, results = trained
    assert "bbox" in results
    names = {path.name for path in folder.iterdir()}
    assert {"model_final.pth", "model_final.pth.sha256.json", "fingerprint.json", "metrics.json"} <= names
    assert (folder / "inference" / "coco_instances_results.json").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert any("sge/res5_gate_mean" in line for line in lines)


def test_a_resumed_run_ends_like_one_that_was_not_interrupted(trained, sample_datasets, tmp_path):
    _, folder, _ = trained
    first = lazy_config("faster", sample_datasets, tmp_path / "run", "train.eval_period=0")
    with claimed_lazily(first):
        trainer = LazyTrainer(first)
        trainer.resume_or_load(resume=False)
        trainer.max_iter = 2
        trainer.train()
    second = lazy_config("faster", sample_datasets, tmp_path / "run", "train.eval_period=0")
    with claimed_lazily(second, resume=True):
        train_lazily(second, resume=True)
    ends = [torch.load(path / "model_final.pth", weights_only=False) for path in (folder, tmp_path / "run")]
    assert ends[0]["iteration"] == ends[1]["iteration"] == 2
    assert all(torch.equal(tensor, ends[1]["model"][name]) for name, tensor in ends[0]["model"].items())


def test_weights_are_evaluated(trained, sample_datasets, tmp_path):
    _, folder, results = trained
    weights = f"train.init_checkpoint={folder / 'model_final.pth'}"
    cfg = lazy_config("faster", sample_datasets, tmp_path / "test", weights)
    assert evaluate_lazily(cfg)["bbox"]["AP"] == pytest.approx(results["bbox"]["AP"], nan_ok=True)
    with pytest.raises(UserError, match=r"no weights to evaluate: name them with train\.init_checkpoint"):
        evaluate_lazily(lazy_config("faster", sample_datasets, tmp_path / "test"))


def test_folders_are_guarded(trained, sample_datasets):
    cfg, folder, _ = trained
    with pytest.raises(UserError, match=r"holds a run \(model_final\.pth\)"), claimed_lazily(cfg):
        pass
    changed = lazy_config("faster", sample_datasets, folder, "optimizer.lr=0.5")
    told = pytest.raises(UserError, match=r"made with optimizer.lr 0.002, this command has 0.5")
    with told, claimed_lazily(changed, resume=True):
        pass
    longer = lazy_config("faster", sample_datasets, folder, "train.max_iter=9", "train.log_period=3")
    with claimed_lazily(longer, resume=True):
        pass


OWN = """
from detectron2.config import LazyCall as L
from sge_det.config import load_lazy_config
from my_optimizers import build

def schedule(first):
    return lambda place: first

cfg = load_lazy_config("lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py")
dataloader, model, optimizer, train = cfg.dataloader, cfg.model, cfg.optimizer, cfg.train
optimizer._target_ = build
lr_multiplier = L(schedule)(first=0.1)
"""


def test_code_of_the_users_own_is_in_the_fingerprint(sample_datasets, tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_gate.py").write_text("import torch\nclass Gate(torch.nn.Module): pass\n")
    (tmp_path / "my_optimizers.py").write_text("from sge_det.solver import build_clipped\ndef build(**k): pass\n")
    config = tmp_path / "config.py"
    config.write_text(OWN)
    overrides = ["train.init_checkpoint=''", f"train.output_dir={tmp_path / 'run'}"]
    attention = "+model.backbone.bottom_up.stages.attention=my_gate:Gate"

    def claim(resume=True):
        caplog.clear()
        cfg = setup_lazy_config(str(config), [*overrides, attention], sample_datasets)
        with claimed_lazily(cfg, resume=resume):
            return own_code(cfg)

    assert own_code(load_lazy_config(f"lazy/{NAMES['faster']}.py")) == []
    assert claim(resume=False) == ["my_gate", "my_optimizers"]
    (tmp_path / "run" / "model_0000001.pth").touch()
    assert claim() and not caplog.messages, "read again, it is the same"
    (tmp_path / "my_gate.py").write_text("import torch\nclass Gate(torch.nn.Module): x = 1\n")
    assert claim() and "it was made with other source code of my_gate" in caplog.text


FASTER = f"lazy/{NAMES['faster']}.py"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "there is no config key optimizer.lrr: did you mean optimizer.lr"),
        (["optimizer.lr"], "has no value"),
        (["optimizer.lr=[1"], r"optimizer.lr=\[1"),
        (["optimizer.lr=1", "--num-gpus", "2"], "--num-gpus stands behind key=value"),
        (["train.amp.enabled=True"], "train.amp.enabled True needs a GPU .* set that to bfloat16"),
        (["train.init_checkpoint=/nowhere.pth"], "/nowhere.pth is not there"),
        (["train.init_checkpoint=''", "dataloader.train.dataset.names=nowhere"], "'nowhere' is not registered"),
    ],
)
def test_mistakes_are_sentences(overrides, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        setup_lazy_config(FASTER, overrides)


def test_weights_that_a_run_began_with_may_go(tmp_path, sample_datasets):
    overrides = ["train.init_checkpoint=/nowhere.pth", f"train.output_dir={tmp_path}"]
    with pytest.raises(UserError, match=r"or train from scratch with train\.init_checkpoint=''"):
        setup_lazy_config(FASTER, overrides, sample_datasets, resume=True)
    with pytest.raises(
        UserError, match=r"or name others with train\.init_checkpoint$"
    ):  # which nothing can be evaluated without
        setup_lazy_config(FASTER, overrides, sample_datasets, eval_only=True)
    (tmp_path / "model_0000004.pth").touch()
    setup_lazy_config(FASTER, overrides, sample_datasets, resume=True)


def test_own_keys_are_taken_where_the_file_has_them_and_where_not(tmp_path):
    twice = ["train.skip_nonfinite=2", "train.skip_nonfinite=3", "+train.loader_timeout=7"]
    train = load_lazy_config(FASTER, twice).train
    assert (train.skip_nonfinite, train.loader_timeout) == (3, 7)
    Image.fromarray(np.full((30, 40), 1000, np.uint16)).save(tmp_path / "deep.png")
    cfg = load_lazy_config(FASTER, ["train.pixel_range=[0,2550]"])
    example = {"file_name": str(tmp_path / "deep.png"), "height": 30, "width": 40}
    image = map_image(lazy_mapper(cfg, cfg.dataloader.test), example)["image"]
    assert (image == 100).all()
    with pytest.raises(UserError, match=r"set train.pixel_range=\[LOW,HIGH\]"), lazy_words():
        map_image(instantiate(cfg.dataloader.test.mapper), example)
    cfg = load_lazy_config(FASTER, ["train.pixel_range=[5]"])
    with pytest.raises(UserError, match=r"train.pixel_range must be two numbers"):
        lazy_mapper(cfg, cfg.dataloader.test)


def test_a_file_that_fails_leaves_imports_alone(tmp_path):
    import builtins

    before = builtins.__import__
    (tmp_path / "mine.py").write_text("model = nothing_of_that_name\n")
    with pytest.raises(UserError, match=r"mine\.py is no lazy config that runs \(NameError"):
        load_lazy_config(str(tmp_path / "mine.py"))
    assert builtins.__import__ is before
    with pytest.raises(UserError, match="has no 'model'"):
        (tmp_path / "mine.py").write_text("train = dict(output_dir='x')\n")
        setup_lazy_config(str(tmp_path / "mine.py"))


def test_a_tool_for_yaml_names_the_one_for_lazy_configs():
    with pytest.raises(UserError, match=r"tools/lazy_train_net\.py"):
        load_config(FASTER)
