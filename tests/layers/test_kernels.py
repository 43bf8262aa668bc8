"""The kernels other than the eager one: compiled for real, and what happens where one cannot run."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from sge_formula import make_layer, random, textbook

import sge_det
from sge_det.analysis.benchmark import _generated_batch
from sge_det.layers import kernels, sge_compiled
from sge_det.layers.sge import SpatialGroupEnhance


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled by and by; they are run operator by operator."""
    made = []
    monkeypatch.setattr(kernels, "_given_up", set())

    def count(graph, inputs):
        made.append(graph)
        return graph

    torch._dynamo.reset()
    for name in ("_forward", "_backward"):
        compiled = torch.compile(getattr(sge_compiled, name), dynamic=True, fullgraph=True, backend=count)
        monkeypatch.setattr(sge_compiled, f"_compiled{name}", compiled)
    yield made
    torch._dynamo.reset()


def gradients(layer, shape, dtype=torch.float32, layout=torch.contiguous_format):
    x, shortcut, upstream = (random(*shape, seed=seed).to(dtype).contiguous(memory_format=layout) for seed in range(3))
    inputs = [x.requires_grad_(), shortcut.requires_grad_(), layer.weight, layer.bias]
    y = layer.residual(x, shortcut)
    found = [y, *torch.autograd.grad(y, inputs, upstream)]
    doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
    y = textbook(doubles[0], doubles[2], doubles[3], layer.groups, shortcut=doubles[1])
    return found, [y, *torch.autograd.grad(y, doubles, upstream.double())]


def assert_close(found, expected):
    for value, double in zip(found, expected, strict=True):
        torch.testing.assert_close(value.double(), double, rtol=1e-4, atol=1e-5 * double.abs().max().item())


@pytest.mark.filterwarnings("error:SGE's:RuntimeWarning")
def test_compiled_code_is_the_formula():
    torch._dynamo.reset()
    layer = make_layer(4, dtype=torch.float32, kernel="compile")
    for shape in ((2, 16, 9, 7), (3, 32, 5, 20)):
        assert_close(*gradients(layer, shape))
    assert len(torch._dynamo.utils.counters["stats"]) and kernels._given_up == set()


@pytest.mark.filterwarnings("error:SGE's:RuntimeWarning")
def test_multi_scale_training_compiles_once(graphs):
    cfg = sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.KERNEL", "compile"])
    layers = [make_layer(4, dtype=torch.float32, kernel=cfg.MODEL.SGE.KERNEL) for _ in range(3)]
    for size in ((8, 12), (9, 12), (16, 7), (5, 20), (10, 10)):
        for layer, channels in zip(layers, (16, 32, 64), strict=True):
            for samples in (2, 3, 1):
                assert_close(*gradients(layer, (samples, channels, *size)))
    assert len(graphs) == 2  # forward and backward


@pytest.mark.filterwarnings("error:SGE's:RuntimeWarning")
def test_what_compiles_again_is_little(graphs):
    layer = make_layer(4, dtype=torch.float32, kernel="compile")
    for _ in range(2):
        for shape in ((2, 16, 9, 7), (1, 16, 5, 5)):
            x, shortcut = random(*shape).float(), random(*shape, seed=1).float()
            gradients(layer, shape)
            gradients(layer, shape, torch.bfloat16)
            with torch.no_grad():
                layer(x)
                layer.residual(x.clone(), shortcut, inplace=True)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    layer.residual(x, shortcut)
        made = len(graphs)
    # two dtypes, each forward and backward; without a shortcut; in place; under autocast
    assert made == len(graphs) <= 8


@pytest.mark.filterwarnings("error:SGE's:RuntimeWarning")
def test_channels_last_is_compiled_too(graphs):
    layer = make_layer(4, dtype=torch.float32, kernel="compile")
    for shape in ((2, 16, 9, 7), (3, 32, 5, 20)):
        found, expected = gradients(layer, shape, layout=torch.channels_last)
        assert_close(found, expected)
        assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert len(graphs) <= 4  # sizes that are equal by chance are taken for one the first time


def test_second_derivatives_and_transforms_with_a_kernel(graphs):
    layer = make_layer(2, kernel="compile")
    x = random(2, 4, 3, 5).requires_grad_()
    slope = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]
    penalty = torch.autograd.grad(slope.square().sum(), (x, layer.weight))
    reference = make_layer(2)
    slope = torch.autograd.grad(reference(x).square().sum(), x, create_graph=True)[0]
    torch.testing.assert_close(penalty, torch.autograd.grad(slope.square().sum(), (x, reference.weight)))
    mapped = torch.func.vmap(lambda x: layer(x[None])[0])(x)
    torch.testing.assert_close(mapped, reference(x))


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("kernel", ["compile", "triton"])
def test_a_kernel_that_cannot_run_says_so_once(monkeypatch, kernel, when):
    monkeypatch.setattr(kernels, "_given_up", set())

    def fail(*args):
        raise RuntimeError("no compiler\nfound")

    if kernel == "compile":
        for name in ("_forward", "_backward"):
            monkeypatch.setattr(sge_compiled, f"_compiled{name}", getattr(sge_compiled, name))
        monkeypatch.setattr(sge_compiled, when, fail)
    layer = make_layer(4, dtype=torch.float32, kernel=kernel)
    with pytest.warns(
        RuntimeWarning, match=f"'{kernel}' kernel cannot run on cpu here and 'eager' takes its place"
    ) as told:
        assert_close(*gradients(layer, (2, 16, 9, 7)))
        assert_close(*gradients(layer, (1, 8, 3, 3)))
    assert len(told) == 1 and "\n" not in str(told[0].message)


def test_memory_that_is_short_is_no_reason_to_change_the_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "_given_up", set())

    def fail(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sge_compiled, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        make_layer(2, kernel="compile")(random(1, 4, 3, 3))
    assert kernels._given_up == set()


def test_unknown_kernels_are_named():
    with pytest.raises(ValueError, match="'cuda' is not one of eager, compile, triton"):
        SpatialGroupEnhance(kernel="cuda")
    with pytest.raises(sge_det.UserError, match=r"MODEL\.SGE\.KERNEL 'cuda' is not one of eager, compile, triton"):
        sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.KERNEL", "cuda"])


def test_the_config_chooses_the_kernel():
    cfg = sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.SGE.KERNEL", "compile"])
    attention = sge_det.modeling.resnet.build_attention(cfg, "res2", 64)
    assert attention.build(64).kernel == "compile"


@pytest.mark.filterwarnings("error:SGE's:RuntimeWarning")
def test_detector_trains_with_the_compiled_kernel_as_without(graphs):
    models = []
    for kernel in ("compile", "eager"):
        overrides = ["MODEL.DEVICE", "cpu", "MODEL.SGE.KERNEL", kernel, "MODEL.SGE.INIT", "[0.5, 1.0]"]
        cfg = sge_det.get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", overrides)
        torch.manual_seed(0)
        models.append(build_model(cfg).train())
    made = []
    for size, half in (((64, 96), False), ((96, 64), False), ((64, 64), True)):
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = models[0](_generated_batch(cfg, 1, size))
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        made.append(len(graphs))
    # one graph for all scales, forward and backward, for each dtype; sizes that are equal by chance may take one more
    assert made[0] == made[1] <= 4 and made[2] <= 8
