"""SAVE_MEMORY: SGE's input computed again in the backward pass; beside the same block that keeps it."""

import contextlib
import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sge_det
from sge_det.analysis.benchmark import _generated_batch, peak_bytes
from sge_det.layers import kernels, sge_compiled
from sge_det.modeling.blocks import AttentiveBasicBlock, AttentiveBottleneckBlock, sge_attention
from sge_det.modeling.paper import EvalBatchNorm2d


def block(save_memory, norm="FrozenBN", cls=AttentiveBottleneckBlock, kernel="eager", channels=16):
    torch.manual_seed(0)
    more = {"bottleneck_channels": 32} if cls is AttentiveBottleneckBlock else {}
    made = cls(
        channels,
        64,
        norm=norm,
        stride=1 if channels == 64 else 2,
        attention=sge_attention(4, kernel=kernel, save_memory=save_memory),
        **more,
    )
    torch.nn.init.normal_(made.sge.weight)
    last = made.conv3 if more else made.conv2
    if norm == "GN":
        last.norm.weight.data.uniform_(0.5, 1.5)
    elif norm:
        for tensor in (last.norm.weight.data, last.norm.running_var):
            tensor.uniform_(0.5, 1.5)
        last.norm.running_mean.normal_()
    return made


def image(layout=torch.contiguous_format, channels=16):
    x = torch.randn(2, channels, 9, 14, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=layout).requires_grad_()


def gradients(module, x, autocast=contextlib.nullcontext):
    with autocast():
        y = module(x)
    wanted = [x, *(parameter for parameter in module.parameters() if parameter.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [AttentiveBasicBlock, AttentiveBottleneckBlock])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", EvalBatchNorm2d, "GN", ""])
def test_gradients_and_statistics_are_those_of_the_default(norm, cls, half):
    layout = torch.channels_last if half else torch.contiguous_format

    def autocast():
        return torch.autocast("cpu", half, enabled=half is not None)

    lean, default = block(True, norm, cls), block(False, norm, cls)
    for training in (True, False):
        for module in (lean, default):
            module.train(training)
        assert_same(gradients(lean, image(layout), autocast), gradients(default, image(layout), autocast))
    assert_same(list(lean.state_dict().values()), list(default.state_dict().values()))


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", ""])
def test_the_input_is_not_kept(norm):
    def held(save_memory):
        stage = torch.nn.Sequential(*(block(save_memory, norm, channels=64) for _ in range(4)))
        return peak_bytes(lambda: stage(x))

    x = torch.randn(4, 64, 24, 24, requires_grad=True)
    activation = 4 * x.numel()
    # all but the last block's, and while that is computed its norm may hold one more
    assert 2.9 * activation < held(False) - held(True) < 4.1 * activation


def test_compiled_kernel_and_double_backward_and_twice(monkeypatch):
    monkeypatch.setattr(kernels, "_given_up", set())
    for name in ("_forward", "_backward"):  # as they are, which takes no compiler
        monkeypatch.setattr(sge_compiled, f"_compiled{name}", getattr(sge_compiled, name))
    assert_same(gradients(block(True, kernel="compile"), image()), gradients(block(False, kernel="compile"), image()))
    assert kernels._given_up == set()
    found = []
    for save_memory in (True, False):
        made, x = block(save_memory), image()
        y = made(x)
        slope = torch.autograd.grad(y.square().sum(), x, create_graph=True)[0]
        penalty = torch.autograd.grad(slope.square().sum(), [x, *made.parameters()], retain_graph=True)
        found.append([slope, *penalty, *torch.autograd.grad(y.sum(), [x, made.sge.weight])])
    assert_same(*found)


def test_what_else_decides_about_saved_tensors_goes_first():
    expected = gradients(block(False, "BN"), image())
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(block(True, "BN"), image()), expected)
    lean, frozen = block(True), block(False)
    assert_same(gradients(_Checkpointed(lean), image()), gradients(frozen, image()))
    compiled = torch.compile(block(True), backend="eager", fullgraph=True)
    assert_same(gradients(compiled, image())[1:], gradients(frozen, image())[1:])
    traced = torch.jit.trace(lean, image(), check_trace=False)
    torch.testing.assert_close(traced(image()), frozen(image()))
    torch.testing.assert_close(torch.jit.script(lean.eval())(image()), frozen(image()))
    with torch.no_grad():
        torch.testing.assert_close(lean(image()), frozen(image()))


class _Checkpointed(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_what_hooks_and_other_classes_do_is_kept():
    def doubled(module, inputs, output):
        return 2 * output

    for attach in (
        lambda made: made.conv3.register_forward_hook(doubled),
        lambda made: made.conv3.norm.register_forward_hook(doubled),
        lambda made: made.sge.register_forward_hook(doubled),
        lambda made: torch.nn.utils.parametrizations.spectral_norm(made.conv3),
    ):
        pair = [block(save_memory) for save_memory in (True, False)]
        for made in pair:
            torch.manual_seed(0)
            attach(made)
        assert_same(*(gradients(made, image()) for made in pair))


def test_changes_between_forward_and_backward():
    lean, default = block(True, "BN"), block(False, "BN")
    results = []
    for made in (lean, default):
        x = image()
        y = made.eval()(x) + made.train()(x)
        made.conv3.norm.bias.data.mul_(2)
        results.append(torch.autograd.grad(y.square().sum(), [x, made.sge.weight]))
    assert_same(*results)
    y = lean(image())
    with torch.no_grad():
        lean.conv3.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        y.sum().backward()


def test_detector_trains_as_by_default():
    results = []
    for save_memory in (True, False):
        overrides = ["MODEL.DEVICE", "cpu", "MODEL.SGE.SAVE_MEMORY", save_memory, "MODEL.SGE.INIT", "[0.5, 1.0]"]
        cfg = sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", overrides)
        torch.manual_seed(0)
        model = build_model(cfg).train()
        with EventStorage():
            sum(model(_generated_batch(cfg, 2, (64, 96))).values()).backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
        assert any(getattr(module, "save_memory", False) for module in model.modules()) == save_memory
    assert_same(*results)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_training(group, static_graph):
    made = torch.nn.Sequential(block(True, "BN"), block(True, "BN", channels=64))
    alone = copy.deepcopy(made)
    wrapped = DistributedDataParallel(made, static_graph=static_graph)
    for module in (wrapped, alone):
        for _ in range(2):
            module(image()).square().sum().backward()
    assert_same([p.grad for p in made.parameters()], [p.grad for p in alone.parameters()])
    assert_same(list(made.state_dict().values()), list(alone.state_dict().values()))


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["MODEL.RESNETS.NORM", "SyncBN"], "cannot compute a norm of MODEL.RESNETS.NORM 'SyncBN' a second time"),
        (["MODEL.SGE.NORMALIZE", "False"], "goes with NORMALIZE True alone, not with False"),
        (["MODEL.SGE.ATTENTION", "se"], "goes with ATTENTION 'sge' alone, not with 'se'"),
        (["MODEL.SGE.IGNORE_PADDING", "True"], "goes with IGNORE_PADDING False alone, not with True"),
    ],
)
def test_what_it_does_not_go_with_is_told(overrides, reason):
    with pytest.raises(sge_det.UserError, match=reason):
        cfg = sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", [*overrides, "MODEL.SGE.SAVE_MEMORY", "True"])
        sge_det.build_sge_resnet_backbone(cfg, ShapeSpec(channels=3))
