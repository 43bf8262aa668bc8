"""The layer's kernels on a device: checked against the formula in float64, then timed beside their rivals.

One call does all of it, so that whoever has a GPU can measure there; on a CPU it goes as far as a CPU goes.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import Tensor, nn

from ..layers import sge_plain
from ..layers.kernels import KERNELS, cannot_run
from ..layers.sge import SpatialGroupEnhance
from .benchmark import (
    FLOOR_TENSORS,
    NONE,
    SHAPES,
    TEXTBOOK,
    Tail,
    TextbookSGE,
    benchmark_model,
    interleaved_times,
    peak_bytes,
    summary,
    timm_attention,
)

# Some roundings of each dtype.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def benchmark_kernels(
    device: torch.device,
    cfg: CfgNode | None,
    *,
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    rounds: int = 20,
    model_rounds: int = 5,
    images: int = 2,
    size: tuple[int, int] = (800, 1216),
) -> dict:
    """Checks all kernels on ``device``, then times them, the textbook and timm's rivals, and a detector with each.

    Args:
        device: where it runs.
        cfg: a detector with SGE, or None for the layer alone.
        shapes: (N, C, H, W), C a multiple of 64.
        rounds, model_rounds: how often each is timed; at least 2.
        images, size: the detector's batch, and height and width in pixels.

    Returns:
        ``{"device", "torch", "checks": [...], "layer": [...], "detector": [...]}``; each entry names its kernel, dtype
        and shape. A kernel that cannot run on the device has ``"runs": False`` in its check and is not timed.

    Raises:
        UserError: timm is missing.
    """
    checks = [
        _check(kernel, device, dtype, channels_last)
        for kernel in KERNELS
        for dtype in TOLERANCES
        for channels_last in (False, True)
    ]
    running = [kernel for kernel in KERNELS if all(check["runs"] for check in checks if check["kernel"] == kernel)]
    dtypes = (torch.float32, torch.float16) if device.type == "cuda" else (torch.float32, torch.bfloat16)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "checks": checks,
        "layer": [_time_shape(running, device, shape, dtype, rounds) for dtype in dtypes for shape in shapes],
        "detector": []
        if cfg is None
        else [
            _time_detector(cfg, kernel, device, dtype, model_rounds, images, size)
            for dtype in ((None, dtypes[1]) if device.type == "cuda" else (None,))  # detectors want float32 on the CPU
            for kernel in running
        ],
    }


def report(result: dict) -> str:
    """The tables of :func:`benchmark_kernels`, in Markdown."""
    checks = [
        [check["kernel"], check["dtype"], check["layout"], check["largest"] if check["runs"] else "cannot run"]
        for check in result["checks"]
    ]
    sections = [
        f"{result['device']}, torch {result['torch']}",
        "### largest relative difference to float64, output and gradients\n\n"
        + tabulate(checks, ["kernel", "dtype", "layout", "difference"], tablefmt="github", floatfmt=".1e"),
    ]
    for mode in FLOOR_TENSORS:
        rows = []
        for entry in result["layer"]:
            textbook = entry["contestants"][TEXTBOOK][mode]["median_ms"]
            floor = entry["copy_ms"] * FLOOR_TENSORS[mode] / 2
            ratios = [found[mode]["median_ms"] / textbook for found in entry["contestants"].values()]
            rows.append([entry["dtype"], "x".join(map(str, entry["shape"])), textbook, floor / textbook, *ratios])
        names = list(result["layer"][0]["contestants"]) if result["layer"] else []
        table = tabulate(
            rows, ["dtype", "N, C, H, W", "textbook, ms", "floor", *names], tablefmt="github", floatfmt=".2f"
        )
        sections.append(f"### {mode}: ratios to the textbook\n\n{table}")
    rows = [
        [
            entry["kernel"],
            entry["autocast"],
            mode,
            timed["plain"]["median_ms"],
            timed["time_ratio"],
            timed["memory_ratio"],
        ]
        for entry in result["detector"]
        for mode, timed in ((mode, entry[mode]) for mode in ("inference", "training step"))
    ]
    if rows:
        headers = ["kernel", "autocast", "", "plain, ms", "SGE / plain", "SGE / plain, peak memory"]
        sections.append("### detector\n\n" + tabulate(rows, headers, tablefmt="github", floatfmt=".3f"))
    return "\n\n".join(sections)


def failures(result: dict) -> list[str]:
    """The kernels whose numbers are wrong, in words."""
    return [
        f"{check['kernel']}, {check['dtype']}, {check['layout']}: {check['largest']:.1e}"
        for check in result["checks"]
        if check["runs"] and not check["holds"]
    ]


def _layer(kernel: str, device: torch.device) -> SpatialGroupEnhance:
    layer = SpatialGroupEnhance(kernel=kernel)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    return layer.to(device)


def _check(kernel: str, device: torch.device, dtype: torch.dtype, channels_last: bool) -> dict:
    generator = torch.Generator().manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    found = {"kernel": kernel, "dtype": str(dtype)[6:], "layout": str(layout)[6:], "runs": True}
    layer, largest = _layer(kernel, device), 0.0
    # a row that is too long for a chip, and one that is not
    for shape in ((1, 256, 80, 61), (2, 1024, 13, 19)):
        numbers = [torch.randn(shape, generator=generator) for _ in range(3)]
        numbers[1] = numbers[1].sign() * 8  # no output so near to 0 that rounding decides what the ReLU does
        x, shortcut, upstream = (t.to(device, dtype).contiguous(memory_format=layout) for t in numbers)
        inputs = [x.requires_grad_(), shortcut.requires_grad_(), layer.weight, layer.bias]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a kernel that cannot run, which is in the result
            y = layer.residual(x, shortcut)
            values = [y, *torch.autograd.grad(y, inputs, upstream)]
        doubles = [tensor.detach().double().requires_grad_() for tensor in inputs]
        y = sge_plain.enhance(*doubles, layer.eps)
        expected = [y, *torch.autograd.grad(y, doubles, upstream.double())]
        for value, double in zip(values, expected, strict=True):
            largest = max(largest, ((value.double() - double).abs().max() / double.abs().max()).item())
    found["runs"] = not cannot_run(kernel, device.type)
    return found | {"largest": largest, "holds": largest <= TOLERANCES[dtype]}


def _contestants(kernels: Sequence[str], channels: int, device: torch.device) -> dict[str, tuple[nn.Module, Tail]]:
    def tail_of(module: nn.Module) -> tuple[nn.Module, Tail]:
        module = module.to(device)
        return module, lambda x, shortcut: F.relu_(module(x) + shortcut)

    layers = {kernel: _layer(kernel, device) for kernel in kernels}
    return {
        NONE: tail_of(nn.Identity()),
        TEXTBOOK: tail_of(TextbookSGE()),
        **{kernel: (layer, layer.residual) for kernel, layer in layers.items()},
        **{f"timm {kind}": tail_of(timm_attention(kind, channels)) for kind in ("se", "eca", "cbam")},
    }


def _time_shape(
    kernels: Sequence[str], device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, rounds: int
) -> dict:
    x, shortcut, upstream = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    target = torch.empty_like(x)
    contestants = _contestants(kernels, shape[1], device)
    # Under autocast parameters stay float32, as in training by mixed precision.
    half = contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    leaves = [x.clone().requires_grad_(), shortcut.clone().requires_grad_()]

    def forward(tail: Tail) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad(), half:
                return tail(x, shortcut)

        return run

    def both(module: nn.Module, tail: Tail) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            with half:
                y = tail(*leaves)
            return torch.autograd.grad(y, [*leaves, *module.parameters()], upstream.to(y.dtype))

        return run

    functions = {
        "forward": {name: forward(tail) for name, (_, tail) in contestants.items()},
        "forward+backward": {name: both(*contestant) for name, contestant in contestants.items()},
    }
    found: dict[str, dict] = {name: {} for name in contestants}
    for mode, of_mode in functions.items():
        timed = {name: _timed(function, device) for name, function in of_mode.items()}
        for name, times in interleaved_times(timed, rounds).items():
            found[name][mode] = summary(times) | {"peak_bytes": _peak(of_mode[name], device)}
    (copies,) = interleaved_times({"copy": _timed(lambda: target.copy_(x), device)}, rounds).values()
    return {
        "shape": list(shape),
        "dtype": str(dtype)[6:],
        "copy_ms": summary(copies)["median_ms"],
        "contestants": found,
    }


def _timed(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    def on_gpu() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def on_cpu() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return on_gpu if device.type == "cuda" else on_cpu


def _peak(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``function`` takes beyond what was held before, in bytes."""
    if device.type != "cuda":
        return peak_bytes(function)
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - held


def _time_detector(
    cfg: CfgNode,
    kernel: str,
    device: torch.device,
    dtype: torch.dtype | None,
    rounds: int,
    images: int,
    size: tuple[int, int],
) -> dict:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = str(device)
    cfg.MODEL.SGE.KERNEL = kernel
    half = contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)
    with half:
        result = benchmark_model(cfg, rounds, images, size)
    return result | {"kernel": kernel, "autocast": "none" if dtype is None else str(dtype)[6:]}
