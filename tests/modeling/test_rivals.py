"""SGE's rivals: each of timm's that fits a block, and classes of the user's own."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from detectron2.config import LazyCall, LazyConfig, instantiate
from omegaconf import OmegaConf
from timm.layers import create_attn

import sge_det
from sge_det import AttentiveBasicBlock, AttentiveBottleneckBlock, UserError
from sge_det.config import load_config
from sge_det.engine.doctor import examine_files
from sge_det.engine.fingerprint import Contents, fingerprint
from sge_det.engine.training import build_seeded_model, setup_config, train
from sge_det.gain import choose_arms
from sge_det.layers.attention import ATTENTIONS

RIVALS = [name for name in ATTENTIONS if name != "sge"]
CONFIG = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
OWN = """
import torch

class Gate(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x):
        return x * torch.sigmoid(self.scale)

class Greedy(Gate):
    def __init__(self, channels, hidden):
        super().__init__(channels)

class Halving(Gate):
    def forward(self, x):
        return x[:, :, ::2]

class Pair(Gate):
    def forward(self, x):
        return x, x

class Failing(Gate):
    def forward(self, x):
        return x.view(2, -1, 11, 13)

def nothing(channels):
    return channels

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module with classes of the user's own; its name."""
    folder = tmp_path / "own"
    folder.mkdir()
    name = f"own_attention_{tmp_path.name}".replace("-", "_")
    (folder / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(folder)
    return name


def test_all_that_fit_are_known():
    assert RIVALS == [
        "se",
        "ese",
        "eca",
        "ecam",
        "ceca",
        "gc",
        "gca",
        "cbam",
        "lcbam",
        "coord",
        "scoord",
        "ela",
        "strip",
    ]


@pytest.mark.parametrize("kind", RIVALS)
@pytest.mark.parametrize(
    ("block_class", "kwargs"), [(AttentiveBasicBlock, {}), (AttentiveBottleneckBlock, {"bottleneck_channels": 16})]
)
def test_a_block_with_a_rival_trains(kind, block_class, kwargs):
    torch.manual_seed(0)
    block = block_class(16, 64, stride=2, attention=sge_det.rival_attention(kind), **kwargs)
    layer = getattr(block, block.attention_name)
    assert type(layer) is type(create_attn(kind, 64))
    x = torch.randn(2, 16, 13, 10)
    before = {name: tensor.clone() for name, tensor in layer.named_parameters()}
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    block(x).square().mean().backward()
    optimizer.step()
    moved = [name for name, tensor in layer.named_parameters() if not torch.equal(tensor, before[name])]
    assert moved
    assert all(torch.isfinite(parameter).all() for parameter in block.parameters())
    block.eval()
    with torch.no_grad():
        branch = block.conv2(F.relu(block.conv1(x)))
        if block_class is AttentiveBottleneckBlock:
            branch = block.conv3(F.relu(branch))
        expected = F.relu(layer(branch) + block.shortcut(x))
        torch.testing.assert_close(block(x), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(block))(x), expected)
        torch.testing.assert_close(torch.jit.script(block)(x), expected)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ge", "cannot be built by timm's create_attn"),
        ("sk", "stands in the place of a convolution"),
        ("nl", "compares all positions"),
        ("bat", "sides are multiples"),
        ("sEe", "nor a class as package.module:Class"),
        ("a:", "nor a class as package.module:Class"),
        ("a/b.py:C", "nor a class as package.module:Class"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(kind, reason):
    with pytest.raises(UserError, match=f"MODEL.SGE.ATTENTION '{kind}'.*{reason}"):
        load_config(CONFIG, ["MODEL.SGE.ATTENTION", kind])
    with pytest.raises(UserError, match=reason):
        sge_det.rival_attention(kind)


def test_what_is_refused_fits_no_block():
    """The reasons that are given are those of timm."""
    with pytest.raises(TypeError):
        create_attn("ge", 64)
    for kind in ("bat", "halo"):
        with pytest.raises(AssertionError):
            create_attn(kind, 64)(torch.zeros(2, 64, 9, 11))
    with pytest.raises(AssertionError, match="feature size"):
        create_attn("bottleneck", 64)


def test_a_class_of_ones_own_is_an_arm_that_trains(own, sample_datasets, tmp_path):
    cfg = setup_config(CONFIG, [*TINY, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(tmp_path / "run")], sample_datasets)
    arms = choose_arms(cfg, ["plain"], [["mine", "MODEL.SGE.ATTENTION", f"{own}:Gate"]])
    cfg = arms[1].config(cfg)
    start = build_seeded_model(cfg).state_dict()
    gates = [key for key in start if key.endswith("attention.scale")]
    assert len(gates) == 16
    train(cfg)
    end = torch.load(tmp_path / "run/model_final.pth", weights_only=True)["model"]
    moved = [key for key in gates if not torch.equal(end[key], start[key])]
    assert moved
    assert all(end[key].abs().max() < 1 for key in moved)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Greedy", "cannot be made for .* channels .*missing 1 required positional argument: 'hidden'"),
        ("Halving", r"makes \(2, \d+, 4, 5\) of a map of the shape \(2, \d+, 7, 5\): it must keep the shape"),
        ("Pair", "makes a tuple of a map"),
        ("Failing", "fails on a map of the shape"),
        ("nothing", "is no class of torch.nn.Module, but a function"),
        ("number", "is no class of torch.nn.Module, but a int"),
        ("Gone", "has no Gone"),
        ("elsewhere", "cannot be imported .*No module named"),
    ],
)
def test_the_doctor_finds_a_class_that_does_not_fit(own, sample_datasets, name, reason):
    cfg = setup_config(CONFIG, TINY, sample_datasets)
    cfg.MODEL.SGE.ATTENTION = "no_such_module.at_all:Gate" if name == "elsewhere" else f"{own}:{name}"
    (finding,) = [finding for finding in examine_files(cfg) if finding.severity == "error"]
    assert finding.key == "MODEL.SGE.ATTENTION"
    with pytest.raises(UserError, match=reason) as raised:
        sge_det.rival_attention(cfg.MODEL.SGE.ATTENTION).build(64)
    assert str(raised.value).count("\n") == 0


@pytest.mark.parametrize("name", ["sys:exit", "os:system", "builtins:open", "pathlib:Path"])
def test_what_is_no_layer_is_not_called(name):
    with pytest.raises(UserError, match="is no class of torch"):
        sge_det.rival_attention(name).build(64)


def test_rivals_in_lazy_configs(own, tmp_path):
    for kind, key in (("ese", "attention.fc.weight"), ("se", "se.fc1.weight"), (f"{own}:Gate", "attention.scale")):
        node = LazyCall(sge_det.make_sge_stages)(depth=18, stages=["res4"], norm="BN", attention=kind)
        LazyConfig.save(OmegaConf.create({"stages": node}), str(tmp_path / "stages.yaml"))
        stages = instantiate(LazyConfig.load(str(tmp_path / "stages.yaml")).stages)
        found = [any(name.endswith(key) for block in stage for name in block.state_dict()) for stage in stages]
        assert found == [False, False, True, False]
        pickle.loads(pickle.dumps(sge_det.rival_attention(kind))).build(32)
    with pytest.raises(UserError, match="the attention 'sea' is not one of"):
        sge_det.make_sge_stages(18, attention="sea")


def test_a_changed_class_is_another_run(own, sample_datasets, tmp_path):
    cfg = setup_config(CONFIG, TINY, sample_datasets)
    before = fingerprint(cfg, Contents(), 1)["source"]
    cfg.MODEL.SGE.ATTENTION = f"{own}:Gate"
    found = [fingerprint(cfg, Contents(), 1)["source"]]
    (tmp_path / "own" / f"{own}.py").write_text(OWN + "\n# edited")
    found.append(fingerprint(cfg, Contents(), 1)["source"])
    assert set(before) == {"sge_det"}
    assert [set(source) for source in found] == [{"sge_det", own}] * 2
    assert found[0][own] != found[1][own]
