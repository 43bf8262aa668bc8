"""The layer under what differentiates, maps, records or compiles a model: equal to the textbook under the same."""

import pytest
import torch
from sge_formula import make_layer, random, textbook
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.sge = make_layer(2)

    def forward(self, x, shortcut):
        return self.sge(x) if shortcut is None else self.sge.residual(x, shortcut)


@pytest.fixture(params=[True, False], ids=["tail", "layer"])
def case(request):
    """The module, the textbook and their arguments: x, shortcut (or None), weight and bias."""
    module = Tail()
    x, shortcut = (random(2, 4, 3, 5, seed=seed).requires_grad_() for seed in range(2))

    def ours(x, shortcut, weight, bias):
        return functional_call(module, {"sge.weight": weight, "sge.bias": bias}, (x, shortcut))

    def theirs(x, shortcut, weight, bias):
        return textbook(x, weight, bias, 2, shortcut=shortcut)

    return ours, theirs, (x, shortcut if request.param else None, module.sge.weight, module.sge.bias)


def loss_of(function):
    return lambda *args: (function(*args).square() * 0.5).sum()


def differentiable(args):
    return [arg for arg in args if arg is not None]


def gradient_penalty(function, args):
    slope = torch.autograd.grad(loss_of(function)(*args), args[0], create_graph=True)[0]
    return torch.autograd.grad(slope.square().sum(), differentiable(args), allow_unused=True)


def third_derivative(function, args):
    first = torch.autograd.grad(loss_of(function)(*args), args[0], create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), args[2], create_graph=True)[0]
    return torch.autograd.grad(second.sum(), differentiable(args), allow_unused=True)


def hessian_vector_product(function, args):
    return torch.autograd.functional.hvp(lambda x: loss_of(function)(x, *args[1:]), args[0], torch.ones_like(args[0]))


def many_gradients_at_once(function, args):
    upstream = random(3, *args[0].shape, seed=7)
    return torch.autograd.grad(function(*args), differentiable(args), upstream, is_grads_batched=True)


def functional_gradient(function, args):
    return grad(loss_of(function), 0)(*args), grad(loss_of(function), (2, 3))(*args)


def per_sample_gradients(function, args):
    def loss(weight, bias, x, shortcut):
        return loss_of(function)(x[None], None if shortcut is None else shortcut[None], weight, bias)

    sizes = (None, None, 0, None if args[1] is None else 0)
    return vmap(grad(loss, (0, 1)), sizes)(args[2], args[3], args[0], args[1])


def ensemble(function, args):
    weights = torch.stack([args[2], 2 * args[2], -args[2]])
    return vmap(function, (None, None, 0, None))(args[0], args[1], weights, args[3])


def jacobians(function, args):
    def of_weight(weight):
        return function(args[0][:1], None if args[1] is None else args[1][:1], weight, args[3])

    return jacrev(of_weight)(args[2]), jacfwd(of_weight)(args[2])


def hessians(function, args):
    return hessian(lambda weight: loss_of(function)(args[0], args[1], weight, args[3]))(args[2])


def directional_derivative(function, args):
    def of_x_and_weight(x, weight):
        return function(x, args[1], weight, args[3])

    return jvp(of_x_and_weight, (args[0], args[2]), (random(2, 4, 3, 5, seed=8), torch.ones_like(args[2])))


def forward_mode(function, args):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(args[0].detach(), random(2, 4, 3, 5, seed=8))
        return forward_ad.unpack_dual(function(dual, *args[1:])).tangent


def graph(function, args):
    return make_fx(lambda *args: function(*args))(*args)(*args)


def graph_of_the_gradient(function, args):
    def gradient(*args):
        return torch.autograd.grad(loss_of(function)(*args), differentiable(args))

    return make_fx(gradient)(*args)(*args)


def checkpointed(function, args):
    y = checkpoint(function, *args, use_reentrant=False)
    return torch.autograd.grad(y.square().sum(), differentiable(args))


def while_operators_are_counted(function, args):
    with FlopCounterMode(display=False):
        y = loss_of(function)(*args)
    return torch.autograd.grad(y, differentiable(args))


USES = [
    *(gradient_penalty, third_derivative, hessian_vector_product, many_gradients_at_once, functional_gradient),
    *(per_sample_gradients, ensemble, jacobians, hessians, directional_derivative, forward_mode, graph),
    *(graph_of_the_gradient, checkpointed, while_operators_are_counted),
]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_use_is_the_textbooks(case, use):
    ours, theirs, args = case
    result, expected = use(ours, args), use(theirs, args)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert any(tensor.abs().max() > 1e-3 for tensor in torch.utils._pytree.tree_leaves(expected) if tensor is not None)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (3,), (0, 1), (2, 3)], ids=str)
def test_second_derivatives_of_what_is_trained(case, trained):
    ours, theirs, args = case
    if args[1] is None and 1 in trained:
        trained = (0,)
    results = []
    for function in (ours, theirs):
        leaves = [arg if arg is None else arg.detach().requires_grad_(i in trained) for i, arg in enumerate(args)]
        wanted = [leaves[index] for index in trained]
        slopes = torch.autograd.grad(loss_of(function)(*leaves), wanted, create_graph=True)
        results.append(torch.autograd.grad(sum(slope.square().sum() for slope in slopes), wanted))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(3, 4), (1, 1)])
def test_second_derivatives_are_finite_differences(size):
    module = Tail()
    x, shortcut = (random(1, 4, *size, seed=seed).requires_grad_() for seed in range(2))
    arguments = (x, shortcut, module.sge.weight, module.sge.bias)
    assert torch.autograd.gradgradcheck(lambda x, shortcut, *_: module(x, shortcut), arguments)


def test_meta_device_and_inference_mode():
    layer = make_layer(2, dtype=torch.float32)
    x = random(2, 4, 3, 5).float()
    with torch.no_grad():
        expected = layer.residual(x, x)
    with torch.inference_mode():
        assert torch.equal(layer.residual(x, x), expected)
    empty = torch.empty(2, 4, 3, 5, device="meta")
    assert layer.to("meta").residual(empty, empty).shape == (2, 4, 3, 5)


@pytest.mark.parametrize("call", ["layer", "tail", "inner"])
def test_hooks_after_compilation_are_called(call):
    torch._dynamo.reset()
    module = Tail()
    x, shortcut, seen = random(2, 4, 3, 5), None if call != "tail" else random(2, 4, 3, 5, seed=1), []
    compiled = torch.compile(module.sge if call == "layer" else module, backend="eager", fullgraph=True)
    args = (x,) if call == "layer" else (x, shortcut)
    with torch.no_grad():
        expected = compiled(*args)
        with module.sge.register_forward_hook(lambda _, args, output: seen.append(output)):
            torch.testing.assert_close(compiled(*args), expected)
            torch.testing.assert_close(seen[0], module.sge.forward(x))
        compiled(*args)
    assert len(seen) == 1
