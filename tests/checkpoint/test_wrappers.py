"""What training scripts put around weights, which of two sets is taken, and tensors that no model can use."""

import copyreg
import datetime
import functools
import gzip
import io
import pickle
import re
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY
from foreign_weights import detector, mmdet_state
from omegaconf import OmegaConf
from reference_models import torchvision_resnet

from sge_det import UserError, get_config
from sge_det.checkpoint import convert_file, read_source
from sge_det.checkpoint.checkpointer import Checkpointer, check_weights_exist, check_weights_path
from sge_det.checkpoint.checksums import unusable
from sge_det.checkpoint.pickles import Refused, Stream, Unpickler
from sge_det.checkpoint.safe_load import load_file
from sge_det.engine.doctor import diagnose
from sge_det.engine.lazy import check_init_checkpoint


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
    "ema-pytorch": lambda r, e: {
        **{**under("online_model.", r), **under("ema_model.", e)},
        **{"step": torch.tensor(5), "initted": torch.tensor(True)},
    },
    "ema. beside model.": lambda r, e: {"state_dict": {**under("model.", r), **under("ema.", e)}},
}


RESNET = {"conv1.weight": torch.ones(4, 3, 7, 7), "bn1.bias": torch.ones(4), "layer1.0.conv1.weight": torch.ones(4)}
ONE = torch.ones(1)

# How others keep a ResNet, and what is left out of it.
RESNETS = {
    "mmpretrain": ({"meta": {}, "state_dict": under("backbone.", RESNET) | {"head.fc.weight": ONE}}, "head.fc.weight"),
    "mmdetection, the backbone": ({"state_dict": under("backbone.", RESNET)}, ""),
    "Lightning": ({"state_dict": under("encoder.", RESNET), "loops": {}}, ""),
    "MoCo": (
        {"state_dict": under("module.encoder_q.", RESNET) | under("module.encoder_k.", RESNET) | {"module.queue": ONE}},
        "encoder_k.conv1.weight",
    ),
    "SimSiam": ({"state_dict": under("module.encoder.", RESNET) | {"module.encoder.fc.0.weight": ONE}}, "encoder.fc.0"),
    "DINO": ({"student": {"a": ONE}, "teacher": under("backbone.", RESNET) | {"head.mlp.0.weight": ONE}}, "head.mlp.0"),
    "Barlow Twins": ({"model": under("module.backbone.", RESNET) | {"module.projector.0.weight": ONE}}, "projector.0"),
    "VISSL": ({"classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", RESNET)}}}}, ""),
    "torchvision's detectors": (under("backbone.body.", RESNET) | {"rpn.head.conv.0.0.weight": ONE}, "rpn.head"),
    "DETR": ({"model": under("backbone.0.body.", RESNET) | {"class_embed.weight": ONE}}, "class_embed.weight"),
    "torchvision's segmentation": (under("backbone.", RESNET) | {"classifier.4.weight": ONE}, "classifier.4"),
    "params": ({"params": RESNET, "step": 3}, ""),
    "network": ({"network": RESNET, "optimizer": {"state": {}, "param_groups": []}}, ""),
    "DeepSpeed": ({"module": RESNET, "ds_version": "0.9", "optimizer": None}, ""),
}


@pytest.mark.parametrize("who", RESNETS)
def test_a_resnet_is_found_wherever_it_is_kept(tmp_path, who):
    content, left_out = RESNETS[who]
    torch.save(content, tmp_path / "w.pth")
    source = read_source(str(tmp_path / "w.pth"))
    assert source.kind == "plain-resnet"
    assert_same(source.state, RESNET)
    assert ("took the ResNet alone, and left out" in source.taken) == bool(left_out)
    assert left_out in source.taken


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"online": RESNET, "target": RESNET}, "holds the tensors of online, target: save those of the network alone"),
        ({"state": {}, "param_groups": [{"lr": 0.1}]}, "the entry 'state' is a dict, not a tensor"),
        (
            under("backbone.", RESNET) | {"neck.a": ONE, "bbox_head.b": ONE},
            "is a detector of mmdetection that is none of",
        ),
        (under("a.", RESNET) | under("b.", RESNET), "none of the kinds"),
        ({"cls_token": ONE, "patch_embed.proj.weight": ONE}, "none of the kinds .* it holds cls_token"),
    ],
)
def test_what_holds_no_single_resnet_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        read_source(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("address", ["s3://bucket/x.pth", "hf://timm/resnet50", "C://x.pth"])
def test_addresses_that_nobody_fetches_are_told(address):
    for check in (lambda: read_source(address), lambda: check_weights_path(address, "MODEL.WEIGHTS", "")):
        with pytest.raises(
            UserError, match=f"the weights {address} cannot be fetched: .* download the file, and name it"
        ):
            check()


def test_weights_that_nothing_can_be_done_without_are_told_by_their_option(tmp_path):
    told = r"^--compare-weights \S+no is not there: put .*, or name others with --compare-weights$"
    with pytest.raises(UserError, match=told):
        check_weights_path(str(tmp_path / "no"), "--compare-weights", "")


def archive(kind, name="a.txt"):
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo(name))
    else:
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr(name, "x")
    return file.getvalue()


FILES = {
    "keras.pth": (b"\x89HDF\r\n\x1a\n" + bytes(99), "it is HDF5, as Keras writes it"),
    "login.pth": (b"\n<!DOCTYPE html><html>Sign in</html>", "it is a web page: fetch the file itself"),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "packed.pth": (gzip.compress(b"x"), "compressed by gzip: unpack it"),
    "model.safetensors.index.json": (b'{"weight_map": {}}', "several, save one dict of all of theirs with torch.save"),
    "x.gguf": (b"GGUF" + bytes(99), "it is GGUF"),
    "x.onnx": (b"\x08\x07\x12\x07pytorch", "it is a model of ONNX"),
    "x.pdparams": (pickle.dumps({"a": np.ones(1)}), "it is of Paddle"),
    "x.npz": (archive("zip", "a.npy"), "it is an archive of NumPy arrays"),
    "x.zip": (archive("zip"), "it is a zip archive: unpack it"),
    "x.pth.tar": (archive("tar"), "it is a tar archive: unpack it"),
    "x.msgpack": (b"\x81\xa6params", "it is of Flax"),
    "x.pth": (b"", "it is empty: fetch"),
    "array.npy": (
        b"\x93NUMPY\1\0" + bytes(99),
        "it is a single array of NumPy: save a dict of all arrays with pickle.dump",
    ),
    "photo.pth": (b"\xff\xd8\xff\xe0\0\x10JFIF", "it is an image or a video"),
    "scan.pkl": (b"II*\0\x08\0\0\0", "it is an image or a video"),
    "error.safetensors": (b"\xef\xbb\xbf<html>", "it is a web page: fetch the file itself"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
    "answer.pth": (b"Not Found\n", "it is text ('Not Found'): fetch the file itself"),
    "answer.pkl": ("Nicht da".encode("utf-16"), "it is text ('Nicht da')"),
    "table.pth": (b"epoch,ap\n1,2\n", "it is text ('epoch,ap 1,2')"),
    "config.yaml": (b"MODEL:\n  MASK_ON: True\n", "it is a config, or a program: name its weights"),
    "cut.pth": (archive("zip")[:60], "it is an archive that is damaged or cut off: fetch or copy it again"),
    "renamed.pth": (safetensors.torch.save({"a": torch.zeros(2)}), "give it a name that ends in .safetensors"),
    "zeros.pth": (bytes(600), "it begins with zeros alone"),
    "packed.pkl": (b"BZh91AY&SY\xff", "compressed by bzip2: unpack it"),
    "program.pt": (archive("zip", "program/constants.pkl"), "it is a TorchScript program"),
    "model-00001-of-00002.safetensors": (b"", "one of 2 files that hold the weights together: save one dict"),
    "arrays.bin": (pickle.dumps({"a": np.ones(1)}), "name a pickle of NumPy arrays so that it ends in .pkl"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_weights_are_refused_by_what_they_are(tmp_path, name):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(words)):
        read_source(str(tmp_path / name))


def test_an_answer_that_was_kept_as_the_file_is_to_be_removed(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(b"<html>Sign in</html>")
    for cache, is_kept in ((tmp_path, True), (tmp_path / "elsewhere", False)):
        monkeypatch.setenv("FVCORE_CACHE", str(cache))
        with pytest.raises(UserError) as raised:
            load_file(tmp_path / "w.pth")
        assert str(raised.value).endswith("and remove this one, which would be taken again") == is_kept


def test_a_file_that_names_weights_is_told_with_them(tmp_path):
    (tmp_path / "model_0000004.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    with pytest.raises(UserError, match=r"it names model_0000004\.pth, which is beside it: name that$"):
        load_file(tmp_path / "last_checkpoint")


def test_texts_that_are_pickles_are_read(tmp_path):
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": 1.5}, protocol=0))
    assert load_file(tmp_path / "w.pkl") == {"a": 1.5}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"a": 1.5}, protocol=0)[:-1])
    with pytest.raises(UserError, match="it ends early"):
        load_file(tmp_path / "w.pkl")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model_0000004.pth", "model_final.pth", "config.yaml"], "name the file, {}/model_final.pth"),
        (["model_0000004.pth", "model_0000009.pth", "last_checkpoint"], "name the file, {}/model_0000004.pth"),
        (["model_0000004.pth", "model_0000009.pth"], "name the file, {}/model_0000009.pth"),
        (["config.yaml", "model.safetensors"], "name the file, {}/model.safetensors"),
        (["config.yaml"], "it is a folder without weights: name a file"),
    ],
)
def test_a_folder_is_told_with_the_file_in_it(tmp_path, files, words):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("model_0000004.pth")
    cfg = get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.WEIGHTS", str(folder)])
    lazy = OmegaConf.create({"train": {"init_checkpoint": str(folder)}})
    told = re.escape(words.format(folder))
    for check, key in (
        (lambda: check_weights_exist(cfg), "MODEL.WEIGHTS"),
        (lambda: check_init_checkpoint(lazy), "train.init_checkpoint"),
        (lambda: read_source(str(folder)), "there is no weights file"),
    ):
        with pytest.raises(UserError, match=f"^{key} .*: it is a folder.*{told}$" if "{}" in words else told):
            check()


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
    assert source.taken == "took the ResNet alone, and left out 1 tensors (criterion.weight, ...)"
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


def test_parameters_of_norms_without_their_statistics_are_no_group_norms(tmp_path, two):
    torch.save({key: value for key, value in two[0].items() if "running" not in key}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="not their running means and variances: save the whole state_dict"):
        convert_file(str(tmp_path / "w.pth"), str(tmp_path / "out.pth"))


def test_what_takes_other_than_three_channels_has_no_mean_of_three(tmp_path, two):
    torch.save(two[0] | {"conv1.weight": two[0]["conv1.weight"].sum(1, keepdim=True)}, tmp_path / "w.pth")
    assert set(read_source(str(tmp_path / "w.pth")).recipe.overrides()) == {"MODEL.RESNETS.STRIDE_IN_1X1"}


def test_what_only_looks_averaged_is_not_passed_over(tmp_path, two):
    torch.save(two[0] | {"ema_decay.table": ONE}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="has no place in Detectron2"):
        convert_file(str(tmp_path / "w.pth"), str(tmp_path / "out.pth"))
