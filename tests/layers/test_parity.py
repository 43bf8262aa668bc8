"""One matrix: every way in which the layer can be run, in every dtype and layout, is the formula in float64."""

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from sge_formula import laid_out, make_layer, numpy_parameters, random, reference
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

GROUPS = 4
MADE_AT = (2, 8, 5, 6)
SIZES = [MADE_AT, (1, 8, 9, 4), (3, 8, 1, 1), (0, 8, 7, 7)]
LAYOUTS = ["contiguous", "channels_last", "cropped"]
TOLERANCES = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Chain(torch.nn.Module):
    """A layer and a block tail, one behind the other."""

    def __init__(self):
        super().__init__()
        self.sge = make_layer(GROUPS, dtype=torch.float32)

    def forward(self, x, shortcut):
        return self.sge.residual(self.sge(x), shortcut, inplace=True)


def inputs(shape, dtype, seed=3):
    return random(*shape, seed=seed).to(dtype), random(*shape, seed=seed + 1).to(dtype)


def formula(chain, x, shortcut):
    parameters = numpy_parameters(chain.sge)
    y = reference(x.double().numpy(), *parameters, GROUPS)
    return reference(y, *parameters, GROUPS, shortcut=shortcut.double().numpy())


def dynamic_sizes():
    batch, height, width = (torch.export.Dim(name, max=64) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: height, 3: width}
    return sizes, sizes


def recorded(chain, example):
    return lambda *args: chain(*(arg.clone().requires_grad_() for arg in args)).detach()


def traced(chain, example):
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        return torch.jit.trace(chain, example, check_trace=example[0].dtype.itemsize >= 4)


def scripted(chain, example):
    return torch.jit.script(chain)


def frozen(chain, example):
    return torch.jit.optimize_for_inference(torch.jit.script(chain.eval()))


def exported(chain, example):
    return torch.export.export(chain, example, dynamic_shapes=dynamic_sizes()).module()


def symbolic_graph(chain, example):
    parameters = dict(chain.named_parameters())
    graph = make_fx(lambda p, *args: functional_call(chain, p, args), tracing_mode="symbolic")(parameters, *example)
    return lambda *args: graph(parameters, *args)


def compiled(chain, example):
    torch._dynamo.reset()
    return torch.compile(chain, fullgraph=True, dynamic=True, backend="eager")


def mapped(chain, example):
    return vmap(lambda *args: chain(*(arg[None] for arg in args))[0])


def observed(chain, example):
    chain.sge.register_forward_hook(lambda module, args, output: None)
    return chain


def _onnx(chain, example, **options):
    file = io.BytesIO()
    names = {"input_names": ["x", "shortcut"], "output_names": ["y"]}
    torch.onnx.export(chain.eval(), example, file, verbose=False, **names, **options)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(x, shortcut):
        return torch.from_numpy(session.run(None, {"x": x.numpy(), "shortcut": shortcut.numpy()})[0])

    return run


def onnx_of_a_trace(chain, example):
    axes = {name: {0: "n", 2: "h", 3: "w"} for name in ("x", "shortcut", "y")}
    return _onnx(chain, example, dynamo=False, dynamic_axes=axes)


def onnx_of_an_export(chain, example):
    return _onnx(chain, example, dynamo=True, dynamic_shapes=dynamic_sizes())


EAGER = [lambda chain, example: chain, recorded, observed, mapped]
GRAPHS = [traced, scripted, frozen, exported, symbolic_graph, compiled, onnx_of_a_trace, onnx_of_an_export]
# vmap wants a sample, symbolic sizes are of 1 or 2 and more, and an ONNX reshape cannot infer the size of nothing.
NO_EMPTY_BATCH = [mapped, exported, compiled, onnx_of_a_trace, onnx_of_an_export]
# onnxruntime has no bfloat16 on the CPU, and inputs of ONNX are contiguous arrays
CASES = [
    pytest.param(
        way,
        dtype,
        id=f"{getattr(way, '__name__', 'way')}-{str(dtype)[6:]}".replace("<lambda>", "eager"),
        marks=[pytest.mark.slow] if way is compiled and dtype in (torch.float16, torch.float64) else [],
    )
    for way in EAGER + GRAPHS
    for dtype in TOLERANCES
    if not (way.__name__.startswith("onnx") and dtype == torch.bfloat16)
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("way, dtype", CASES)
def test_every_way_is_the_formula(way, dtype):
    chain = Chain()
    run = way(chain, inputs(MADE_AT, dtype))
    for shape in SIZES:
        if shape[0] == 0 and way in NO_EMPTY_BATCH:
            continue
        for layout in LAYOUTS:
            x, shortcut = inputs(shape, dtype)
            expected = formula(chain, x, shortcut)
            with torch.no_grad():
                y = run(laid_out(x.clone(), layout), shortcut.clone())
            assert y.dtype == dtype and y.shape == x.shape
            tolerance = TOLERANCES[dtype]
            np.testing.assert_allclose(y.double().numpy(), expected, rtol=tolerance, atol=tolerance)
