"""What training scripts put around weights, which of two sets is taken, and tensors that no model can use."""

import copyreg
import datetime
import functools
import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from foreign_weights import detector, mmdet_state
from omegaconf import OmegaConf
from reference_models import torchvision_resnet

from sge_det import UserError
from sge_det.checkpoint import convert_file, read_source
from sge_det.checkpoint.checkpointer import Checkpointer
from sge_det.checkpoint.checksums import unusable
from sge_det.checkpoint.pickles import Refused, Stream, Unpickler
from sge_det.checkpoint.safe_load import load_file
from sge_det.engine.doctor import diagnose


@pytest.fixture(scope="module")
def two():
    """A ResNet-18's weights, and others of its shapes that stand for their average."""
    raw = torchvision_resnet(18, False).state_dict()
    return raw, {key: value + 1 if value.is_floating_point() else value for key, value in raw.items()}


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


def mmcv(state):
    return {f"ema_{key.replace('.', '_')}": value for key, value in state.items()}


SHELLS = {
    "model": lambda s: {"model": s, "epoch": 3},
    "state_dict": lambda s: {"state_dict": s},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {}},
    "net": lambda s: {"net": s, "acc": 90.0},
    "DDP": lambda s: {"state_dict": under("module.", s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled in DDP": lambda s: under("module._orig_mod.", s),
    "Lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.0"},
}

AVERAGES = {
    "state_dict_ema": lambda r, e: {"state_dict": r, "state_dict_ema": e},
    "model_ema": lambda r, e: {"model": r, "model_ema": e},
    "model_ema in a shell": lambda r, e: {"model": r, "model_ema": {"state_dict": under("module.", e)}},
    "ema": lambda r, e: {"state_dict": r, "ema": e},
    "ema_state_dict": lambda r, e: {"model_state_dict": r, "ema_state_dict": e},
    "teacher": lambda r, e: {"student": under("module.", r), "teacher": under("module.", e)},
    "ema_ before names": lambda r, e: {"state_dict": {**r, **under("ema_", e)}},
    "ema_ and no dots": lambda r, e: {"state_dict": {**r, **mmcv(e)}},
    "teacher. before names": lambda r, e: {"state_dict": {**under("student.", r), **under("teacher.", e)}},
    "ema. beside model.": lambda r, e: {"state_dict": {**under("model.", r), **under("ema.", e)}},
}


def stranger(monkeypatch, path, content, keywords=None):
    """A dict of a class that is not here, which pickles make by calling it."""
    module, _, name = path.rpartition(".")
    kind = type(name, (dict,), {"__module__": module})
    if keywords:
        kind.__reduce_ex__ = lambda self, _: (copyreg.__newobj_ex__, (kind, (), keywords), dict(self))
    for end in [place for place, letter in enumerate(f"{module}.") if letter == "."]:
        monkeypatch.setitem(sys.modules, module[:end], types.ModuleType(module[:end]))
    setattr(sys.modules[module], name, kind)
    return kind(content)


# What Lightning, mmengine and scripts with OmegaConf keep beside the weights.
BESIDE = {
    "path": lambda _: Path("data"),
    "date": lambda _: datetime.datetime(2020, 1, 1),
    "criterion": lambda _: torch.nn.CrossEntropyLoss(torch.ones(3)),
    "optimizer to be": lambda _: functools.partial(torch.optim.SGD, lr=0.1),
    "OmegaConf": lambda _: OmegaConf.create({"a": {"b": [1]}}),
    "Lightning": lambda patch: stranger(patch, "lightning.fabric.utilities.data.AttributeDict", {"lr": 1}),
    "mmengine": lambda patch: stranger(patch, "mmengine.logging.HistoryBuffer", {"log": np.ones(3)}, {"a": 1}),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_scripts_keep_beside_weights_is_passed_over(tmp_path, two, monkeypatch, kind, legacy):
    with monkeypatch.context() as patch:
        value = BESIDE[kind](patch)
        file = {"epoch": 1, "hyper_parameters": {"it": [value]}, "loops": {"fit_loop": {"state": {}}}}
        # by their classes, as Lightning had them up to 1.5
        file |= {"callbacks": {type(value): {"best": 1}}, "pytorch-lightning_version": "2.6", "optimizer_states": []}
        protocol = {"pickle_protocol": 4 if kind == "mmengine" else 2}  # the older knows no calls with keywords
        weights = {"state_dict": under("model.", two[0]) | {"criterion.weight": torch.ones(3)}}
        torch.save(weights | file, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy, **protocol)
        torch.save({"state_dict": two[0] | {"conv1.weight": value}}, tmp_path / "odd.ckpt", **protocol)
        torch.save(value, tmp_path / "alone.ckpt", **protocol)
    source = read_source(str(tmp_path / "w.ckpt"))
    assert source.kind == "plain-resnet"
    assert source.taken == "left out what is no part of the network (criterion.weight, ...)"
    assert_same(source.state, two[0])
    name = type(value).__name__
    with pytest.raises(UserError, match=rf"the entry 'conv1.weight' is a .*{name}, not a tensor"):
        read_source(str(tmp_path / "odd.ckpt"))
    with pytest.raises(UserError, match=rf"they are a .*{name}, not a dict of tensors"):
        read_source(str(tmp_path / "alone.ckpt"))
    # no run goes on from such a file
    with pytest.raises(UserError, match=r"to read it would call .*: save the dict of weights alone"):
        load_file(tmp_path / "w.ckpt")
    assert not {"lightning", "mmengine"} & set(sys.modules)


def test_what_is_nobodys_is_refused_by_its_name(tmp_path, two):
    for path in ("my_project.config.Config", "builtins.getattr", "pathlibber.Path"):
        module, _, name = path.rpartition(".")
        program = f"c{module}\n{name}\n(Vx\nVy\ntR.".encode()
        machine = Unpickler(Stream(io.BytesIO(program), len(program)), {}, beside=True)
        with pytest.raises(Refused, match=path):
            machine.load()


def assert_same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("shell", SHELLS)
def test_shells_are_taken_off(tmp_path, two, shell):
    torch.save(SHELLS[shell](two[0]), tmp_path / "w.pth")
    source = read_source(str(tmp_path / "w.pth"))
    assert (source.kind, source.taken) == ("plain-resnet", "")
    assert_same(source.state, two[0])
    with pytest.raises(UserError, match="holds no averaged weights"):
        read_source(str(tmp_path / "w.pth"), weights_of="ema")


@pytest.mark.parametrize("place", AVERAGES)
def test_averaged_weights_are_taken_and_told_unless_raw_ones_are_asked_for(tmp_path, two, place):
    torch.save(AVERAGES[place](*two), tmp_path / "w.pth")
    for which, expected, said in (
        (None, two[1], "took the averaged"),
        ("ema", two[1], "took the averaged"),
        ("raw", two[0], "took the raw"),
    ):
        source = read_source(str(tmp_path / "w.pth"), weights_of=which)
        assert said in source.taken
        assert_same(source.state, expected)


def test_the_tool_takes_what_is_asked_for(tmp_path, two, call_tool):
    torch.save({"model": two[0], "model_ema": two[1]}, tmp_path / "w.pth")
    done = call_tool("convert_weights.py", "w.pth", "raw.pth", "--weights-of", "raw")
    assert done.returncode == 0 and "took the raw weights" in done.stdout
    assert (
        "took the averaged weights (model_ema); --weights-of raw"
        in call_tool("convert_weights.py", "w.pth", "e.pth").stdout
    )
    raw, averaged = (torch.load(tmp_path / name)["model"]["stem.conv1.weight"] for name in ("raw.pth", "e.pth"))
    assert torch.equal(raw, two[0]["conv1.weight"]) and torch.equal(averaged, two[1]["conv1.weight"])


@pytest.mark.parametrize(
    ("meta", "kind", "offset"),
    [
        ({}, "mmdet-retinanet", 0.5),
        ({"mmdet_version": "0.6.0+d3a1", "config": ""}, "mmdet-retinanet", 0.5),
        ({"mmdet_version": "1.0.0", "config": ""}, "mmdet-retinanet", 0.5),
        ({"mmdet_version": "2.25.0"}, "mmdet2-retinanet", 0.0),
        ({"mmdet_version": "3.1.0", "mmengine_version": "0.8"}, "mmdet2-retinanet", 0.0),
        ({"mmengine_version": "0.8"}, "mmdet2-retinanet", 0.0),
    ],
)
def test_versions_of_mmdetection_are_told_apart_by_their_metadata(tmp_path, meta, kind, offset):
    """RetinaNet's keys are the same in all of them."""
    state = mmdet_state(detector("retinanet")[1], "retinanet")
    path = str(tmp_path / "w.pth")
    torch.save({"state_dict": state, "meta": meta}, path)
    source = read_source(path)
    assert source.kind == kind
    assert source.recipe.heads == {"MODEL.ANCHOR_GENERATOR.OFFSET": offset}


def integers(value):
    return value.to(torch.int64)


FAULTS = {
    "NaN": ("conv1", lambda v: v.clone().index_fill_(0, torch.tensor([0]), float("nan")), "NaN or infinity"),
    "infinity": ("conv1", lambda v: v / 0.0, "NaN or infinity"),
    "integers": ("conv1", integers, "int64"),
    "booleans": ("conv1", lambda v: v > 0, "bool"),
    "complex": ("conv1", lambda v: v.to(torch.complex64), "complex"),
    "variance": ("conv1.norm.running_var", lambda v: v - 1e6, "negative variance"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_that_no_model_can_use_are_named(tmp_path, two, sample_datasets, fault):
    place, spoil, words = FAULTS[fault]
    foreign = "bn1.running_var" if "running_var" in place else "conv1.weight"
    torch.save({**two[0], foreign: spoil(two[0][foreign])}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=f"{foreign} .*{words}"):
        convert_file(str(tmp_path / "w.pth"), str(tmp_path / "out.pth"))
    assert not (tmp_path / "out.pth").exists()

    model = detector("faster_rcnn", "MODEL.SGE.ENABLED", "False")[1]
    own = f"backbone.bottom_up.stem.{place if 'running_var' in place else 'conv1.weight'}"
    state = model.state_dict()
    for state_name in ("full", "bare"):
        key = own if state_name == "full" else own.removeprefix("backbone.bottom_up.")
        file = {
            "model": {k if state_name == "full" else k.removeprefix("backbone.bottom_up."): v for k, v in state.items()}
        }
        file["model"][key] = spoil(state[own])
        torch.save({**file, "matching_heuristics": state_name == "bare"}, tmp_path / "d.pth")
        before = {k: v.clone() for k, v in state.items()}
        with pytest.raises(UserError, match=f"{key} .*{words}"):
            Checkpointer(model).load(str(tmp_path / "d.pth"))
        assert_same(model.state_dict(), before)
        overrides = [
            *TINY,
            "MODEL.FPN.NORM",
            "",
            "MODEL.SGE.ENABLED",
            "False",
            "MODEL.WEIGHTS",
            str(tmp_path / "d.pth"),
        ]
        errors = [
            str(f)
            for f in diagnose("sample/faster_rcnn_SGE_R_50_FPN.yaml", overrides, sample_datasets)
            if f.severity == "error"
        ]
        assert len(errors) == 1 and key in errors[0] and words in errors[0]


def test_counters_and_small_floats_are_no_faults():
    assert unusable("a.num_batches_tracked", torch.tensor(3)) is None
    assert unusable("a.weight", torch.ones(2).to(torch.float8_e4m3fn)) is None
    assert unusable("a.weight", torch.ones(2, dtype=torch.float16)) is None
    assert unusable("a.running_var", torch.zeros(2)) is None
