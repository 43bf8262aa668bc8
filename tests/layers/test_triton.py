"""The Triton kernels beside the formula in float64, in Triton's interpreter."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sge_det.layers import sge_triton

TOLERANCES = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.5e-2}
NAMES = ("dtype", "layout", "tail", "on_chip", "shape")
BOTH = (True, False)
CASES = [
    *itertools.product(["float32"], ("contiguous", "channels_last"), BOTH, BOTH, [(2, 6, 5, 7)]),
    *itertools.product(("float16", "bfloat16"), ["contiguous"], [True], [True], [(2, 6, 5, 7)]),
    *itertools.product(("float16", "bfloat16"), ["channels_last"], [False], [False], [(2, 6, 5, 7)]),
    ("float32", "cropped", True, False, (1, 8, 9, 4)),
    ("float32", "contiguous", True, True, (1, 2, 4, 4)),
    ("float32", "contiguous", False, False, (1, 10, 1, 17)),
]
CASES = [dict(zip(NAMES, case, strict=True)) for case in CASES] + [
    dict(zip((*NAMES, "magnitude"), ("float32", "contiguous", False, True, (2, 8, 3, 5), 1e25), strict=True)),
    *(
        dict(zip((*NAMES, "needs"), ("float32", "contiguous", True, chip, (2, 8, 3, 5), needs), strict=True))
        for chip, needs in itertools.product(BOTH, ((True, False), (False, True), (False, False)))
    ),
]


@pytest.fixture(scope="module")
def results():
    here = Path(__file__).resolve().parent
    path = os.pathsep.join([str(here.parent), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here / "triton_cases.py"), json.dumps(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number].values())))
def test_kernels_are_the_formula(results, number):
    result = results[number]
    assert max(result["differences"]) < TOLERANCES[CASES[number]["dtype"]], result
    assert len(result["differences"]) >= 3  # the output, and the gradients of gamma and beta at the least
    assert result["repeated"] and result["in place"] and result["strides"]


def test_maps_of_one_position_equal_activations_and_empty_batches(results):
    assert results[-1] == [True] * 4


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("on_chip", BOTH)
def test_kernels_compile_for_a_gpu(dtype, on_chip):
    """With every option on, for a GPU that need not be there; a size or stride of 1 is a constant to Triton."""
    flags = {"TAIL": True, "NEEDS_X": True, "NEEDS_SHORTCUT": True, "ON_CHIP": on_chip}
    constants = flags | {"CHANNELS": 12, "BLOCK_C": 16, "BLOCK_M": 64, "stride_c" if on_chip else "stride_m": 1}
    activations = ("x", "shortcut", "out", "grad", "grad_x", "grad_shortcut")
    for kernel in (sge_triton._forward_rows, sge_triton._backward_rows):
        signature, values = {}, {}
        for number, name in enumerate(kernel.arg_names):
            if name in constants:
                signature[name], values[number,] = "constexpr", constants[name]
            elif name.endswith("_pointer"):
                signature[name] = "*" + (dtype if name.removesuffix("_pointer") in activations else "fp32")
            else:
                signature[name] = "fp32" if name == "eps" else "i32"
        source = ASTSource(kernel, signature, values)
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm
