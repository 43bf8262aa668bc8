"""Spatial Group-wise Enhance (arXiv 1905.09646, section 3) and the fused tail of a residual block.

Per sample and group, with the c channels of a group as the vector x_i at position i of M = H * W:

    g   = mean_i x_i                          eq. 1
    s_i = g . x_i                             eq. 2
    t_i = (s_i - mean(s)) / (std(s) + eps)    eq. 3, unbiased std
    a_i = gamma * t_i + beta                  eq. 4
    y_i = x_i * sigmoid(a_i)                  eq. 5

mean(s) is g . g, so no pass over the similarities is spent on it. Ordinary calls go through a kernel with an analytic
gradient (``kernels.py``). Whatever must see operators one by one, or differentiates more than once, gets the plain
ones of ``sge_plain.py``.
"""

import numbers
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from . import kernels, sge_plain


class SpatialGroupEnhance(nn.Module):
    """Gates each position of each channel group by its similarity to the group's mean (eq. 1-5).

    Statistics are taken in float32 (float64 for float64 input) whatever the input's dtype; the output has the
    input's. A 1x1 map, whose unbiased std does not exist, has t = 0 and so the gate sigmoid(beta).

    Args:
        groups: number of channel groups G; the input's channels must be a multiple of it.
        eps: added to the standard deviation, outside the root.
        kernel: what computes ordinary calls, see ``kernels.py``: "eager", "compile" or "triton". Where one cannot run
            a warning says so once and "eager" takes its place.
        normalize: False leaves eq. 3 out, t = s, to measure what it is worth. Plain operators compute it, in more
            time and memory.

    Attributes:
        weight: gamma of eq. 4, shape (1, G, 1, 1), starts at 0.
        bias: beta of eq. 4, shape (1, G, 1, 1), starts at 1: the gate starts at sigmoid(1) = 0.731 everywhere.
        observers: functions that are called with each input (N, C, H, W). Unlike hooks they do not part the block
            tail into layer, sum and ReLU, whose roundings differ from the tail's.
    """

    observers: tuple = ()

    def __init__(self, groups: int = 64, eps: float = 1e-5, kernel: str = "eager", normalize: bool = True):
        super().__init__()
        if not isinstance(groups, numbers.Integral) or groups < 1:
            raise ValueError(f"groups must be a whole number of at least 1, got {groups!r:.100}")
        if not isinstance(eps, numbers.Real) or not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be a finite number of at least 0, got {eps!r:.100}")
        if kernel not in kernels.KERNELS:
            raise ValueError(f"the kernel {kernel!r} is not one of {', '.join(kernels.KERNELS)}")
        self.kernel = kernel
        self.normalize = normalize
        self.groups = int(groups)
        self.eps = float(eps)
        self.weight = nn.Parameter(torch.zeros(1, self.groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, self.groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns SGE(x).

        Args:
            x: (N, C, H, W), any memory format; float16, bfloat16, float32 or float64; N may be 0.

        Raises:
            TypeError: x is of another dtype.
            ValueError: C is not a multiple of the number of groups.
        """
        if not torch.jit.is_scripting() and self._is_symbolic(x):
            return self._node(x)
        self._check(x, None)
        if torch.jit.is_scripting():
            return sge_plain.enhance(x, None, self.weight, self.bias, self.eps, self.normalize)
        return self._enhance(x, None, False)

    def residual(self, x: Tensor, shortcut: Tensor, inplace: bool = False) -> Tensor:
        """Returns relu(SGE(x) + shortcut), the tail of a residual block, with the fewest passes over memory.

        Where the layer has hooks, it is called, so that they see x and SGE(x); the sum and the ReLU follow.

        Args:
            x: as in :meth:`forward`.
            shortcut: (N, C, H, W).
            inplace: the result may take the place of ``x`` where no gradient is recorded.

        Raises:
            TypeError, ValueError: as in :meth:`forward`, or the shapes differ.
        """
        if not torch.jit.is_scripting() and self._is_symbolic(x):
            return torch.relu(self(x) + shortcut)
        self._check(x, shortcut)
        if torch.jit.is_scripting():
            return sge_plain.enhance(x, shortcut, self.weight, self.bias, self.eps, self.normalize)
        if has_hooks(self):
            return torch.relu(self(x) + shortcut)
        return self._enhance(x, shortcut, inplace)

    def gates(self, x: Tensor) -> Tensor:
        """Returns the gates sigmoid(a) of eq. 5 for ``x`` (N, C, H, W): (N, G, H, W), float32 or float64."""
        self._check(x, None)
        return sge_plain.gates(x, self.weight, self.bias, self.eps, self.normalize)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps={self.eps}{'' if self.normalize else ', normalize=False'}"

    @torch.jit.unused
    def _is_symbolic(self, x: Tensor) -> bool:
        return isinstance(x, fx.Proxy) and x.tracer.root is not self

    @torch.jit.unused
    def _node(self, x: Tensor) -> Tensor:
        # ``torch.fx`` looks into all modules that are not torch's own; as one node the layer keeps its kernel
        return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})

    def _check(self, x: Tensor, shortcut: Tensor | None) -> None:
        if x.dim() != 4:
            raise ValueError(f"SpatialGroupEnhance takes (N, C, H, W), got {x.dim()} dimensions")
        _check_dtype(x)
        if shortcut is not None:
            _check_dtype(shortcut)
        if torch.jit.is_tracing():  # sizes are tensors there, and a branch on them would be fixed in the trace
            return
        if x.shape[1] % self.groups != 0:
            raise ValueError(f"{x.shape[1]} channels cannot be divided into {self.groups} groups")
        if shortcut is not None and shortcut.shape != x.shape:
            raise ValueError(f"the shortcut has the shape {shortcut.shape}, the input {x.shape}")

    @torch.jit.unused
    def _enhance(self, x: Tensor, shortcut: Tensor | None, inplace: bool) -> Tensor:
        for see in self.observers:
            see(x)
        if torch.compiler.is_compiling():
            has_hooks(self)  # compiled code is made anew only where what was asked for has changed
        weight, bias, eps = self.weight, self.bias, self.eps
        tensors = [tensor for tensor in (x, shortcut, weight, bias) if tensor is not None]
        if not self.normalize or _must_see_operators(*tensors):
            return sge_plain.enhance(x, shortcut, weight, bias, eps, self.normalize)
        if shortcut is not None and shortcut.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, shortcut.dtype)
            x, shortcut = x.to(dtype), shortcut.to(dtype)
        x = _dense(x)
        if shortcut is not None:
            shortcut = _laid_out_like(shortcut, x)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return _Enhance.apply(x, shortcut, weight, bias, eps, self.kernel)
        return kernels.forward(self.kernel, x, shortcut, weight, bias, eps, inplace)[0]


class _Enhance(torch.autograd.Function):
    """The layer with its analytic gradient; keeps x, the output where there is a ReLU, and O(N * C) numbers."""

    @staticmethod
    def forward(ctx, x, shortcut, weight, bias, eps, kernel):
        out, kept, kernel = kernels.forward(kernel, x, shortcut, weight, bias, eps, False)
        mask = None if shortcut is None else out
        if any(ctx.needs_input_grad[i] for i in (0, 2, 3)):
            ctx.save_for_backward(x, mask, weight, bias, *kept)
        else:
            ctx.save_for_backward(None, mask, None, None)
        ctx.eps, ctx.kernel = eps, kernel
        return out

    @staticmethod
    def backward(ctx, grad):
        x, out, weight, bias, *kept = ctx.saved_tensors
        needs_x, needs_shortcut, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        if x is None:
            return None, torch.ops.aten.threshold_backward(grad, out, 0), None, None, None, None
        # Gradients are recorded here where this gradient is to be differentiated in its turn.
        if torch.is_grad_enabled() or _must_see_operators(grad):
            if out is not None:
                grad = torch.ops.aten.threshold_backward(grad, out, 0)
            found = _plain_gradients(ctx, x, weight, bias, grad)
            return found[0], grad if needs_shortcut else None, found[1], found[2], None, None
        grad_x, grad_shortcut, grad_weight, grad_bias = kernels.backward(
            ctx.kernel, x, _laid_out_like(grad, x), out, kept, weight, bias, ctx.eps, (needs_x, needs_shortcut)
        )
        grad_weight = grad_weight.to(weight.dtype) if needs_weight else None
        grad_bias = grad_bias.to(bias.dtype) if needs_bias else None
        return grad_x, grad_shortcut, grad_weight, grad_bias, None, None


def replace_saved_input(result: Tensor, again: Callable[[], Tensor]) -> bool:
    """Lets the gradient of a layer's result compute the layer's input again rather than keep it.

    Args:
        result: what the layer or the block tail returned.
        again: returns the input (N, C, H, W) as it was; it is called in each backward pass, recording no gradient.

    Returns:
        whether that is so now. It is not where no input is kept, plain operators computed the result, or all saved
        tensors are in other hands (checkpointing, offloading).
    """
    node = result.grad_fn
    if not isinstance(node, _Enhance._backward_cls) or node._raw_saved_tensors[0] is None:
        return False
    try:
        node._raw_saved_tensors[0].register_hooks(lambda x: (again, x.dtype, x.stride()), _computed_again)
    except RuntimeError:  # hooks of somebody else are there
        return False
    return True


def _computed_again(packed: tuple[Callable[[], Tensor], torch.dtype, tuple[int, ...]]) -> Tensor:
    again, dtype, strides = packed
    x = again().to(dtype)
    return x if x.stride() == strides else x.new_empty_strided(x.shape, strides).copy_(x)


def _plain_gradients(ctx, x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor | None]:
    """The gradients of x, weight and bias, where needed, by operators that autograd can differentiate again."""
    inputs = (x, weight, bias)
    wanted = [tensor for tensor, index in zip(inputs, (0, 2, 3), strict=True) if ctx.needs_input_grad[index]]
    differentiated_again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = sge_plain.enhance(x, None, weight, bias, ctx.eps)
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=differentiated_again))
    return [next(found) if ctx.needs_input_grad[index] else None for index in (0, 2, 3)]


def _check_dtype(tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(f"SpatialGroupEnhance takes floating point of 16 bits or more, got {tensor.dtype}")


def _must_see_operators(*tensors: Tensor) -> bool:
    """Whether something looks on that has to see plain operators.

    That is a tracer, a compiler, a transform of ``torch.func``, forward-mode differentiation, a dispatch mode (which
    records, counts or replaces operators), a tensor of a class of its own or one that stands for a batch.
    """
    return (
        torch.jit.is_tracing()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or any(type(tensor) not in (Tensor, nn.Parameter) or is_legacy_batchedtensor(tensor) for tensor in tensors)
    )


def has_hooks(layer: nn.Module) -> bool:
    """Whether a call of the layer runs more than its ``forward``."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _laid_out_like(tensor: Tensor, x: Tensor) -> Tensor:
    if tensor.stride() == x.stride():
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)
