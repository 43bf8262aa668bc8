import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from sge_formula import LAYOUTS, laid_out, make_layer, numpy_parameters, random, reference, textbook

import sge_det.layers.sge_eager
from sge_det.config import add_sge_config
from sge_det.layers import sge_compiled
from sge_det.layers.sge import SpatialGroupEnhance
from sge_det.modeling.resnet import build_sge_resnet_backbone


class Unalterable(set):
    """Fails a test in which a kernel gives up."""

    def add(self, kernel):
        raise


def uncompiled(monkeypatch):
    for name in ("_forward", "_backward"):
        monkeypatch.setattr(sge_compiled, f"_compiled{name}", getattr(sge_compiled, name))


@pytest.fixture(params=["eager", "one row a block", "compile", "plain"])
def path(request, monkeypatch):
    """The ways of an ordinary call, and the operators that compilers see.

    The eager kernel with blocks as they come and as small as they can be; what the kernel "compile" compiles, run as it
    is, which takes no compiler.
    """
    if request.param == "one row a block":
        monkeypatch.setattr(sge_det.layers.sge_eager, "_BLOCK_BYTES", 1)
        monkeypatch.setattr(sge_det.layers.sge_eager, "_SMALL_BYTES", 0)
    if request.param == "compile":
        uncompiled(monkeypatch)
        forward = sge_det.layers.kernels.forward
        monkeypatch.setattr(sge_det.layers.kernels, "forward", lambda _, *args: forward("compile", *args))
        monkeypatch.setattr(sge_det.layers.kernels, "_given_up", Unalterable())
    if request.param == "plain":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("shape, groups", [((2, 6, 4, 5), 2), ((3, 4, 1, 7), 4), ((2, 8, 1, 1), 2), ((1, 5, 6, 3), 1)])
def test_forward_is_the_formula(path, shape, groups, tail, layout):
    layer = make_layer(groups)
    x, shortcut = laid_out(random(*shape), layout), random(*shape, seed=1) if tail else None
    expected = reference(x.numpy(), *numpy_parameters(layer), groups, shortcut=None if not tail else shortcut.numpy())
    with torch.no_grad():
        y = layer.residual(x, shortcut) if tail else layer(x)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)
    recorded = layer.residual(x, shortcut) if tail else layer(x)
    assert torch.equal(recorded, y)


def test_gradient_is_the_formula_s(path):
    layer, shape, groups = make_layer(2), (2, 6, 3, 4), 2
    x, shortcut, upstream = (random(*shape, seed=seed) for seed in range(3))
    arrays = [x.numpy(), *numpy_parameters(layer), shortcut.numpy()]

    def loss():
        return (reference(*arrays[:3], groups, shortcut=arrays[3]) * upstream.numpy()).sum()

    differences = []
    for array in arrays:
        slope = np.empty(array.shape)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + 1e-6
            above = loss()
            array[index] = value - 1e-6
            slope[index] = (above - loss()) / 2e-6
            array[index] = value
        differences.append(slope)

    x, shortcut = x.requires_grad_(), shortcut.requires_grad_()
    layer.residual(x, shortcut).backward(upstream)
    for tensor, slope in zip((x, layer.weight, layer.bias, shortcut), differences, strict=True):
        np.testing.assert_allclose(tensor.grad.numpy().reshape(slope.shape), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("size", [(3, 4), (1, 1)])
def test_gradcheck(path, layout, tail, size):
    layer = make_layer(2)
    x = random(2, 4, *size).requires_grad_()
    shortcut = random(2, 4, *size, seed=1).requires_grad_()

    def function(x, shortcut, *_):
        x = laid_out(x, layout)
        return layer.residual(x, shortcut) if tail else layer(x)

    assert torch.autograd.gradcheck(function, (x, shortcut, layer.weight, layer.bias))


@pytest.mark.parametrize("constant", ["map", "zero"])
def test_gradcheck_where_all_similarities_are_equal(path, constant):
    # a large eps, since within a finite difference's step the std must stay small against it
    layer = make_layer(2, eps=0.5)
    x = random(2, 4, 3, 4)
    x[0, :2] = 0 if constant == "zero" else x[0, :2, :1, :1]
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


def test_gradcheck_of_a_layer_used_twice(path):
    layer = make_layer(2)
    x = random(2, 4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer.residual(layer(x), x), (x, layer.weight, layer.bias))


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("shape", [(2, 256, 20, 31), (2, 2048, 5, 7)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32_at_a_network_s_shapes(path, shape, tail, memory_format):
    layer = make_layer(64, dtype=torch.float32)
    tensors = [random(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
    x, shortcut, upstream = (tensor.contiguous(memory_format=memory_format) for tensor in tensors)
    x.requires_grad_(), shortcut.requires_grad_()
    y = layer.residual(x, shortcut) if tail else layer(x)
    y.backward(upstream)
    doubles = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias, shortcut)]
    expected = textbook(*doubles[:3], 64, shortcut=doubles[3] if tail else None)
    expected.backward(upstream.double())
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for tensor, double in zip((x, layer.weight, layer.bias, shortcut), doubles, strict=True):
        if double.grad is not None:
            scale = double.grad.abs().max().item()
            torch.testing.assert_close(tensor.grad.double(), double.grad, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=4)))
def test_gradients_for_what_is_trained_and_only_that(path, trained):
    def gradients(trained):
        layer = make_layer(2)
        tensors = [random(2, 6, 3, 4), random(2, 6, 3, 4, seed=1), layer.weight, layer.bias]
        for tensor, required in zip(tensors, trained, strict=True):
            tensor.requires_grad_(required)
        y = layer.residual(tensors[0], tensors[1])
        assert y.requires_grad == any(trained)
        if y.requires_grad:
            y.backward(random(2, 6, 3, 4, seed=2))
        return [tensor.grad for tensor in tensors]

    for gradient, expected, required in zip(gradients(trained), gradients((True,) * 4), trained, strict=True):
        assert (gradient is not None) == required
        if required:
            torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_of_another_layout(path, memory_format):
    layer, upstream = make_layer(2), random(2, 4, 3, 5, seed=2)
    gradients = []
    for gradient in (upstream, upstream.mT.contiguous().mT, upstream.contiguous(memory_format=torch.channels_last)):
        x, shortcut = (random(2, 4, 3, 5, seed=seed).contiguous(memory_format=memory_format) for seed in range(2))
        x.requires_grad_()
        layer.residual(x, shortcut).backward(gradient)
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_half_precision_keeps_its_statistics_in_float32(path, dtype, tolerance, autocast, tail):
    layer = make_layer(4, dtype=torch.float32)
    # x * g reaches 1e6: more than float16 holds
    x = (random(2, 16, 9, 8) * 1000).to(dtype).requires_grad_()
    shortcut = random(2, 16, 9, 8, seed=1).to(dtype)
    upstream = random(2, 16, 9, 8, seed=2).to(dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = layer.residual(x, shortcut) if tail else layer(x)
    y.backward(upstream)
    doubles = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = textbook(*doubles, 4, shortcut=shortcut.double() if tail else None)
    expected.backward(upstream.double())
    assert y.dtype == dtype and x.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32
    for value, double in ((y, expected), *((t.grad, d.grad) for t, d in zip((x, layer.weight, layer.bias), doubles))):
        scale = double.abs().max().item()
        torch.testing.assert_close(value.double(), double, rtol=tolerance, atol=tolerance * scale)


def test_autocast_leaves_float32_alone(path):
    layer, x, shortcut = make_layer(4, dtype=torch.float32), random(2, 16, 9, 8).float(), random(2, 16, 9, 8).float()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer.residual(x, shortcut)
    expected = reference(x.double().numpy(), *numpy_parameters(layer), 4, shortcut=shortcut.double().numpy())
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_input_and_shortcut_of_different_dtypes(path):
    layer = make_layer(2, dtype=torch.float32)
    x = random(2, 4, 3, 5).bfloat16().requires_grad_()
    shortcut = random(2, 4, 3, 5, seed=1).float().requires_grad_()
    y = layer.residual(x, shortcut)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16 and shortcut.grad.dtype == torch.float32
    assert torch.equal(shortcut.grad, (y > 0).float())


@pytest.mark.parametrize("channels_last", [False, True])
def test_empty_batch(path, channels_last):
    layer = make_layer(2, dtype=torch.float32)
    x = torch.empty(0, 4, 7, 7)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with torch.no_grad():
        assert layer(x).shape == x.shape
    x.requires_grad_()
    y = layer.residual(x, torch.empty(0, 4, 7, 7))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [[[[0.0]], [[0.0]]]]


@pytest.mark.parametrize("size", [(0, 3), (3, 0)])
def test_a_map_without_positions_leaves_finite_gradients(path, size):
    layer = make_layer(2, dtype=torch.float32)
    x = torch.empty(2, 4, *size, requires_grad=True)
    y = layer.residual(x, layer(x))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [[[[0.0]], [[0.0]]]]


def test_one_position_is_gated_by_the_bias(path):
    layer = make_layer(2, dtype=torch.float32)
    # so large that g . x and g . g, which are equal, differ by far more than eps after rounding
    x = (random(3, 70, 1, 1) * 1000).float().requires_grad_()
    y = layer(x)
    gate = torch.sigmoid(layer.bias).repeat_interleave(35, 1)
    torch.testing.assert_close(y, x * gate)
    y.sum().backward()
    torch.testing.assert_close(x.grad, gate.expand_as(x))
    assert layer.weight.grad.abs().sum() == 0


def test_in_place_changes_before_backward_raise():
    layer, shape = make_layer(2), (2, 4, 3, 5)
    for change in ("input", "output"):
        x = random(*shape).requires_grad_().clone()
        y = layer.residual(x, random(*shape, seed=1))
        (x if change == "input" else y).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    # without the ReLU the output is not needed
    x = random(*shape).requires_grad_()
    layer(x).mul_(2).sum().backward()
    expected = torch.autograd.grad(2 * layer(x).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)


def test_second_backward_raises():
    layer, x = make_layer(2), random(2, 4, 3, 5).requires_grad_()
    loss = layer(x).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_in_place_takes_the_input_s_memory_only_without_gradient(memory_format):
    layer = make_layer(2)
    original = random(2, 4, 3, 5).contiguous(memory_format=memory_format)
    shortcut = random(2, 4, 3, 5, seed=1)
    expected = layer.residual(original, shortcut).detach()
    x = original.clone()
    recorded = layer.residual(x, shortcut, inplace=True)
    assert recorded.requires_grad and torch.equal(x, original)
    with torch.no_grad():
        assert torch.equal(layer.residual(x, shortcut), expected) and torch.equal(x, original)
        y = layer.residual(x, shortcut, inplace=True)
    assert y.data_ptr() == x.data_ptr() and torch.equal(y, expected)


def test_in_place_change_of_a_recorded_input_raises():
    layer, leaf = make_layer(2), random(2, 4, 3, 5).requires_grad_()
    x = leaf.exp()
    with torch.no_grad():
        layer.residual(x, random(2, 4, 3, 5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_hooks_see_the_layer_and_an_input_that_stays():
    layer, x, shortcut = make_layer(2), random(2, 4, 3, 5), random(2, 4, 3, 5, seed=1)
    original, seen = x.clone(), []
    expected = reference(x.numpy(), *numpy_parameters(layer), 2)
    with torch.no_grad():
        fused = layer.residual(x, shortcut)
        with layer.register_forward_hook(lambda module, args, output: seen.append((args[0], output))):
            y = layer.residual(x, shortcut, inplace=True)
    ((argument, output),) = seen
    assert argument is x and torch.equal(x, original)
    np.testing.assert_allclose(output.numpy(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, fused)


def test_hooks_may_change_what_they_see():
    layer, x, shortcut = make_layer(2), random(2, 4, 3, 5).requires_grad_(), random(2, 4, 3, 5, seed=1)
    with layer.register_forward_hook(lambda module, args, output: 2 * output):
        torch.testing.assert_close(layer.residual(x, shortcut), F.relu(2 * layer.forward(x) + shortcut))
    with layer.register_forward_pre_hook(lambda module, args: (3 * args[0],)):
        torch.testing.assert_close(layer.residual(x, shortcut), F.relu(layer.forward(3 * x) + shortcut))
    gradients = []
    with layer.register_full_backward_hook(lambda module, inner, outer: gradients.append(inner[0])):
        layer.residual(x, shortcut).sum().backward()
    assert torch.equal(gradients[0], x.grad)


def test_observers_see_the_input_of_layer_and_tail():
    layer, x, seen = make_layer(2), random(2, 4, 3, 5), []
    layer.observers = (seen.append,)
    before = x.clone()
    with torch.no_grad():
        layer(x)
        layer.residual(x, x.clone(), inplace=True)
    assert seen[0] is x and seen[1] is x and not torch.equal(x, before)


@pytest.mark.parametrize("tail", [False, True])
def test_without_normalisation_the_similarities_are_the_gates_logits(tail):
    x, shortcut = random(2, 6, 4, 5), random(2, 6, 4, 5, seed=1)
    layer = SpatialGroupEnhance(3, normalize=False).double()
    layer.weight.data.copy_(random(1, 3, 1, 1, seed=2))
    v = x.numpy().reshape(2, 3, 2, 4, 5)
    s = (v * v.mean((3, 4), keepdims=True)).sum(2)
    a = layer.weight.detach().numpy() * s + 1
    y = (v / (1 + np.exp(-a))[:, :, None]).reshape(2, 6, 4, 5)
    expected = np.maximum(y + shortcut.numpy(), 0) if tail else y
    x.requires_grad_()
    found = layer.residual(x, shortcut) if tail else layer(x)
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(layer.gates(x).detach().numpy(), 1 / (1 + np.exp(-a)), atol=1e-12)
    assert torch.autograd.gradcheck(layer, (x,))
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted(x), layer(x))


def test_gates():
    layer, x = make_layer(2), random(2, 6, 3, 5)
    gates = layer.gates(x)
    assert gates.shape == (2, 2, 3, 5)
    torch.testing.assert_close(x * gates.repeat_interleave(3, 1), layer(x))
    assert layer.gates(x.half()).dtype == torch.float32


def test_starts_as_the_release_does():
    layer = SpatialGroupEnhance()
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (1, 64, 1, 1),
        "bias": (1, 64, 1, 1),
    }
    x = random(1, 64, 5, 5).float()
    torch.testing.assert_close(layer(x), 0.7310586 * x)
    assert repr(layer) == "SpatialGroupEnhance(groups=64, eps=1e-05)"


def test_errors_name_the_numbers():
    layer = SpatialGroupEnhance(4)
    with pytest.raises(ValueError, match="10 channels cannot be divided into 4 groups"):
        layer(torch.zeros(1, 10, 2, 2))
    with pytest.raises(ValueError, match="10 channels cannot be divided into 4 groups"):
        layer.gates(torch.zeros(1, 10, 2, 2))
    with pytest.raises(ValueError, match=r"\(N, C, H, W\), got 3 dimensions"):
        layer(torch.zeros(8, 2, 2))
    with pytest.raises(ValueError, match=r"\[1, 8, 2, 3\].*\[1, 8, 2, 2\]"):
        layer.residual(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 3))
    for groups in (0, 4.0, "4"):
        with pytest.raises(ValueError, match=f"a whole number of at least 1, got {groups!r}"):
            SpatialGroupEnhance(groups)
    for eps in (-1e-5, float("nan"), float("inf"), "1e-5"):
        with pytest.raises(ValueError, match=f"a finite number of at least 0, got {eps!r}"):
            SpatialGroupEnhance(4, eps=eps)
    assert SpatialGroupEnhance(np.int64(4), eps=np.float32(1e-5)).weight.shape == (1, 4, 1, 1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype):
    layer, x, wrong = SpatialGroupEnhance(2), torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2).to(dtype)
    for call in (layer, layer.gates, lambda x: layer.residual(x, x), lambda wrong: layer.residual(x, wrong)):
        with pytest.raises(TypeError, match=f"floating point of 16 bits or more, got {dtype}"):
            call(wrong)


@pytest.mark.parametrize("magnitude", [1e-8, 1e4, 1e10, 1e14, 1e17, 1e25, 1e30])
def test_large_activations_do_not_overflow(path, magnitude):
    layer = make_layer(2, dtype=torch.float32)
    x = (random(2, 8, 6, 7) * magnitude).float().requires_grad_()
    upstream = random(2, 8, 6, 7, seed=5).float()
    y = layer(x)
    doubles = [t.detach().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    expected = textbook(*doubles, 2)
    expected.backward(upstream.double())
    pairs = [(y, expected)]
    if path != "plain" or magnitude <= 1e17:  # autograd multiplies the gradient of a by x first
        y.backward(upstream)
        pairs += [(t.grad, d.grad) for t, d in zip((x, layer.weight, layer.bias), doubles, strict=True)]
    for value, double in pairs:
        torch.testing.assert_close(value.double(), double, rtol=1e-4, atol=1e-5 * double.abs().max().item())


def test_equal_large_activations_leave_finite_numbers(path):
    layer = make_layer(2, dtype=torch.float32)
    x = torch.full((1, 8, 6, 7), 1e17).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all() and layer.weight.grad.isfinite().all()


class Tail(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.sge = layer

    def forward(self, x, shortcut):
        return self.sge.residual(self.sge(x), shortcut)


SIZES = [(2, 8, 5, 6), (1, 8, 1, 1), (3, 8, 9, 4), (0, 8, 7, 7)]


def test_compile_makes_one_graph_for_all_sizes():
    cfg = get_cfg()
    add_sge_config(cfg)
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    torch.manual_seed(0)
    backbone = build_sge_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend=count)
    for shape in ((2, 3, 64, 96), (4, 3, 96, 64), (3, 3, 128, 160)):
        x = random(*shape, dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), backbone(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code_computes_the_same(backend):
    torch._dynamo.reset()
    tail = Tail(make_layer(4, dtype=torch.float32))
    compiled = torch.compile(tail, fullgraph=True, dynamic=True, backend=backend)
    for shape in (SIZES[0], SIZES[2]):
        results = []
        for function in (compiled, tail):
            tensors = [random(*shape, seed=seed, dtype=torch.float32) for seed in range(3)]
            if backend == "inductor":  # its C++ is the same for the gradient's operators, and slow to compile
                with torch.no_grad():
                    results.append([function(*tensors[:2])])
                continue
            inputs = [*(tensor.requires_grad_() for tensor in tensors[:2]), tail.sge.weight, tail.sge.bias]
            y = function(*inputs[:2])
            results.append([y, *torch.autograd.grad(y, inputs, tensors[2])])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
