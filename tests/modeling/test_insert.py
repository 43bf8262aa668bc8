import copy
import pickle
import re

import pytest
import timm
import torch
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.regnet import AnyNet
from detectron2.modeling.backbone.resnet import BasicStem
from reference_models import regnet
from torch import fx, nn
from torch.ao.quantization import fuse_modules
from torch.fx.experimental.optimization import fuse
from torchvision.models.resnet import BasicBlock

import sge_det
from sge_det import SpatialGroupEnhance, insert_sge


class OwnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GroupNorm(4, channels))

    def forward(self, x):
        return torch.relu(x + self.last(self.body(x)))


def detectron2_resnet():
    stages = ResNet.make_default_stages(18, norm="BN")
    return ResNet(BasicStem(3, 64, "BN"), stages, out_features=["res5"])


# the model, its blocks, where the first layer stands and behind what
MODELS = {
    "detectron2": (detectron2_resnet, 8, "res2.0.sge", "res2.0.conv2"),
    "regnet": (regnet, 3, "s1.b1.sge", "s1.b1.f.c_bn"),
    "torchvision 18": (torchvision.models.resnet18, 8, "layer1.0.sge", "layer1.0.bn2"),
    "torchvision 50": (torchvision.models.resnet50, 16, "layer1.0.sge", "layer1.0.bn3"),
    "timm 18": (lambda: timm.create_model("resnet18", zero_init_last=False), 8, "layer1.0.se", "layer1.0.bn2"),
    "own": (lambda: nn.Sequential(nn.Conv2d(3, 16, 1), OwnBlock(16), OwnBlock(16)), 2, "1.sge", "1.last.1"),
}


def run(model):
    torch.manual_seed(7)
    with torch.no_grad():
        out = model(torch.randn(2, 3, 64, 64))
    return next(iter(out.values())) if isinstance(out, dict) else out


def randomize_gates(model):
    for module in model.modules():
        if isinstance(module, SpatialGroupEnhance):
            nn.init.normal_(module.weight)


@pytest.fixture(params=MODELS)
def kind(request):
    build, *rest = MODELS[request.param]
    torch.manual_seed(1)
    return build().eval(), *rest


def test_each_block_gets_one_layer_and_keeps_its_parameters(kind):
    model, blocks, layer, after = kind
    plain, before = copy.deepcopy(model), run(model)
    done = insert_sge(model, groups=8)
    assert len(done) == blocks
    assert (done[0].layer, done[0].after) == (layer, after)
    assert insert_sge(model, groups=8) == []
    keys = {f"{insertion.layer}.{name}" for insertion in done for name in ("weight", "bias")}
    assert set(model.state_dict()) - set(plain.state_dict()) == keys
    assert set(plain.state_dict()) < set(model.state_dict())
    assert not torch.equal(run(model), before)
    # gates that are open everywhere leave the plain model
    for module in model.modules():
        if isinstance(module, SpatialGroupEnhance):
            nn.init.constant_(module.bias, 50.0)
    torch.testing.assert_close(run(model), before)


def test_a_transplant_computes_what_the_model_did(kind):
    model, *_ = kind
    before = run(model)
    insert_sge(model, groups=8, transplant=True)
    torch.testing.assert_close(run(model), before, rtol=1e-4, atol=1e-4)


def test_copies_pickles_and_loaded_states_compute_the_same(kind):
    model, *_ = kind
    plain = copy.deepcopy(model)
    insert_sge(model, groups=8)
    randomize_gates(model)
    expected = run(model)
    assert torch.equal(run(copy.deepcopy(model)), expected)
    if not isinstance(model, AnyNet):  # its activation here is a lambda
        assert torch.equal(run(pickle.loads(pickle.dumps(model))), expected)
    insert_sge(plain, groups=8)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(plain), expected)


def test_the_layer_stands_between_norm_and_sum():
    model = OwnBlock(16).eval()
    insert_sge(model, groups=4)
    nn.init.normal_(model.sge.weight)
    x = torch.randn(2, 16, 9, 9)
    with torch.no_grad():
        body = model.body
        inner = torch.relu(nn.functional.group_norm(body[0](x), 4, body[1].weight, body[1].bias))
        last = nn.functional.group_norm(model.last[0](inner), 4, model.last[1].weight, model.last[1].bias)
        torch.testing.assert_close(model(x), torch.relu(x + model.sge(last)))


def test_stages_and_patterns_choose():
    model = torchvision.models.resnet18()
    done = insert_sge(model, groups=8, stages=["layer3"])
    assert [insertion.layer for insertion in done] == ["layer3.0.sge", "layer3.1.sge"]
    done = insert_sge(model, groups=8, where=["layer1.*.bn2", "layer3.*.bn2"])
    assert [insertion.after for insertion in done] == ["layer1.0.bn2", "layer1.1.bn2"]


@pytest.mark.parametrize(
    "convert", [FrozenBatchNorm2d.convert_frozen_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm]
)
@pytest.mark.parametrize("name", ["torchvision 18", "regnet", "timm 18", "detectron2"])
def test_gates_survive_a_conversion_of_norms(name, convert):
    model = MODELS[name][0]().eval()
    insert_sge(model, groups=8)
    randomize_gates(model)
    expected = run(model)
    model = convert(model).eval()
    torch.testing.assert_close(run(model), expected)
    assert insert_sge(model, groups=8) == []
    torch.testing.assert_close(run(model), expected)


def shared_norm():
    model = nn.Sequential(OwnBlock(16), OwnBlock(16))
    model[1].last[1] = model[0].last[1]
    return model


def channels_last_norms():
    return timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(16, 16, 16, 16))


def test_what_was_compiled_before_has_it():
    model = OwnBlock(16).eval()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        before = compiled(x)
        insert_sge(model, groups=4)
        nn.init.normal_(model.sge.weight)
        torch.testing.assert_close(compiled(x), model(x))
        assert not torch.equal(compiled(x), before)


def test_a_stage_by_its_name_alone():
    done = insert_sge(torchvision.models.resnet18(), groups=8, stages="layer3")
    assert [insertion.layer for insertion in done] == ["layer3.0.sge", "layer3.1.sge"]


def test_compiled_models_have_it():
    model = OwnBlock(16).eval()
    insert_sge(model, groups=4)
    x = torch.randn(1, 16, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


@pytest.mark.parametrize("name", ["torchvision 18", "timm 18", "own"])
def test_graphs_of_torch_fx_have_the_layers_with_their_parameters(name):
    model = MODELS[name][0]().eval()
    insert_sge(model, groups=8)
    randomize_gates(model)
    expected, keys = run(model), list(model.state_dict())
    for _ in range(2):
        graph = fx.symbolic_trace(model)
        assert sorted(graph.state_dict()) == sorted(keys)
        for module in (graph, model, copy.deepcopy(graph), copy.deepcopy(model)):
            assert torch.equal(run(module), expected)
    assert insert_sge(model, groups=8) == []
    randomize_gates(graph)
    assert not torch.equal(run(graph), expected)
    assert torch.equal(run(graph), run(model))
    with sge_det.record_gates(graph) as gates:
        run(graph)
    assert len(gates) == MODELS[name][1]


def test_a_model_that_cannot_be_scripted_says_what_works():
    model = MODELS["own"][0]().eval()
    insert_sge(model, groups=8)
    randomize_gates(model)
    expected, x = run(model), torch.randn(2, 3, 64, 64)
    with pytest.raises(sge_det.UserError) as told:
        torch.jit.script(model)
    assert "cannot be scripted" in str(told.value) and "\n" not in str(told.value)
    named = re.findall(r"torch\.[a-z.]+(?:\(.*\)$)?", str(told.value))
    assert named == ["torch.jit.trace", "torch.export.export", "torch.jit.script(torch.fx.symbolic_trace(model))"]
    with torch.no_grad():
        made = [
            torch.jit.trace(model, x),
            torch.export.export(model, (x,)).module(),
            torch.jit.script(fx.symbolic_trace(model)),
        ]
    for other in made:
        torch.testing.assert_close(run(other), expected)


def test_a_trace_that_fails_leaves_the_model_as_it_was():
    class Failing(fx.Tracer):
        def call_module(self, module, *arguments):
            if self.path_of_module(module) == "1.last.1":
                raise RuntimeError
            return super().call_module(module, *arguments)

    model = MODELS["own"][0]().eval()
    insert_sge(model, groups=8)
    randomize_gates(model)
    expected = run(model)
    with pytest.raises(RuntimeError):
        Failing().trace(model)
    assert isinstance(model[1].last[1], nn.GroupNorm)
    assert torch.equal(run(model), expected)


def test_norms_that_are_fused_into_their_convolutions_leave_one_gate():
    model = torchvision.models.resnet18().eval()
    insert_sge(model, groups=8)
    randomize_gates(model)
    expected = run(model)
    torch.testing.assert_close(run(fuse(copy.deepcopy(model))), expected, rtol=1e-4, atol=1e-4)
    for module in model.modules():
        if isinstance(module, BasicBlock):
            fuse_modules(module, [["conv1", "bn1"], ["conv2", "bn2"]], inplace=True)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(fx.symbolic_trace(model)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("skresnet18", [f"layer{n}.{i}.conv2.bn" for n in (1, 2, 3, 4) for i in (0, 1)]), ("regnetx_002", None)],
)
def test_norms_of_timms_end_branches(name, blocks):
    with torch.device("meta"):
        model = timm.create_model(name)
    found = [insertion.after for insertion in insert_sge(model, groups=4)]
    assert found == (blocks or [name for name, _ in model.named_modules() if name.endswith("conv3.bn")])


@pytest.mark.parametrize(
    ("build", "arguments", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), {}, "no residual block"),
        (torchvision.models.resnet18, {"groups": 48}, "48 groups do not divide the 64 channels of layer1.0.bn2"),
        (torchvision.models.resnet18, {"stages": ["res2"]}, "res2"),
        (torchvision.models.resnet18, {"where": "*.bn9"}, "bn9"),
        (torchvision.models.resnet18, {"where": "layer*.bn[12]"}, "layer1.0.bn1 and layer1.0.bn2 are in one block"),
        (lambda: timm.create_model("seresnet18"), {}, "layer1.0 has SEModule"),
        (shared_norm, {"groups": 4}, "0.last.1 is in several blocks"),
        (torchvision.models.resnet18, {"groups": "8"}, "groups must be a whole number; got '8'"),
        (channels_last_norms, {"groups": 8}, "no residual block"),
        (lambda: nn.Sequential(Conv2d(3, 64, 1)), {"where": "0", "transplant": True}, "no norm"),
    ],
)
def test_what_cannot_be_is_told_and_changes_nothing(build, arguments, reason):
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(sge_det.UserError, match=reason):
        insert_sge(model, **arguments)
    assert list(model.state_dict()) == keys
