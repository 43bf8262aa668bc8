"""Which implementation of the layer's forward pass and gradient a call gets, and what happens where one cannot run.

A kernel is a module with ``forward`` and ``backward`` as in ``sge_eager.py``, which is the one that runs everywhere.
"""

import functools
import importlib
import warnings
from types import ModuleType

import torch
from torch import Tensor

from . import sge_eager

_MODULES = {"eager": "sge_eager", "compile": "sge_compiled", "triton": "sge_triton"}
KERNELS = tuple(_MODULES)
# Kernels that could not run on a type of device; it is told once, and the eager one has taken their place since.
_given_up: set[tuple[str, str]] = set()


def forward(
    kernel: str,
    x: Tensor,
    shortcut: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    inplace: bool,
) -> tuple[Tensor, tuple[Tensor, ...], str]:
    """The result, what the gradient needs of it, and the name of the kernel that ran; see :func:`sge_eager.forward`."""
    arguments = (x, shortcut, weight, bias, eps, inplace)
    # the statistics of Triton's are in float32
    if (kernel == "triton" and x.dtype == torch.float64) or x.numel() == 0:
        kernel = "eager"
    result = _attempt(kernel, "forward", x, *arguments[1:])
    return (*sge_eager.forward(*arguments), "eager") if result is None else (*result, kernel)


def backward(
    kernel: str,
    x: Tensor,
    grad: Tensor,
    out: Tensor | None,
    kept: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of :func:`forward` by the kernel that ran; see :func:`sge_eager.backward`."""
    result = _attempt(kernel, "backward", x, grad, out, kept, weight, bias, eps, needs)
    if result is not None:
        return result
    if kernel != "eager":
        kept = sge_eager.forward(x, None, weight, bias, eps, False)[1]
    return sge_eager.backward(x, grad, out, kept, weight, bias, eps, needs)


@functools.cache
def _module(kernel: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[kernel]}", __package__)


def cannot_run(kernel: str, device_type: str) -> bool:
    """Whether a kernel was tried on a type of device and gave up."""
    return (kernel, device_type) in _given_up


def _attempt(kernel: str, function: str, x: Tensor, *arguments) -> tuple | None:
    """What a function of the kernel's module returns; None where the eager kernel has to do it."""
    if kernel == "eager" or cannot_run(kernel, x.device.type):
        return None
    try:
        return getattr(_module(kernel), function)(x, *arguments)
    except torch.OutOfMemoryError:
        raise
    # Compilers fail in ways of their own: no C++ compiler, a device or a Python that they do not know.
    except Exception as error:
        _given_up.add((kernel, x.device.type))
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(
            f"SGE's {kernel!r} kernel cannot run on {x.device.type} here and 'eager' takes its place ({reason})",
            RuntimeWarning,
            2,
        )
        return None
