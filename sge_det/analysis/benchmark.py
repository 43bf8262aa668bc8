"""What SGE costs: the layer beside its rivals, and a whole detector beside its plain twin.

Absolute times differ between machines and hours; the contestants are timed in turn, round after round, in one process,
and the ratios of their medians are the result.
"""

import ctypes
import functools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from ..config import sge_options
from ..data.datasets import head_section
from ..errors import UserError
from ..layers.attention import build_rival
from ..layers.sge import SpatialGroupEnhance, replace_saved_input
from ..modeling.blocks import AttentiveBasicBlock, AttentiveBottleneckBlock
from ..modeling.padding import ignore_padding

# The outputs of R-50's four stages for two images of 400x608 and for one of 800x1216.
SHAPES = [
    *((2, 256, 100, 152), (2, 512, 50, 76), (2, 1024, 25, 38), (2, 2048, 13, 19)),
    *((1, 256, 200, 304), (1, 512, 100, 152), (1, 1024, 50, 76), (1, 2048, 25, 38)),
]
QUICK_SHAPES = [SHAPES[1], SHAPES[3]]

# Of the rivals, those that the paper compares SGE with, and ECA.
RIVALS = ("se", "eca", "cbam")
COPY, NONE, TEXTBOOK, LAYER, TAIL = "copy", "no attention", "textbook", "layer", "block tail"
COMPILED_TEXTBOOK, COMPILED_LAYER, COMPILED_TAIL = "compiled textbook", "compiled layer", "KERNEL compile"
# Passes over a tensor of the activation's size that the block tail cannot do without when each tensor is read from
# memory once and written once: x and the shortcut in, the output out; backward x, the output and its gradient in, two
# gradients out.
FLOOR_TENSORS = {"forward": 3, "forward+backward": 8}

Tail = Callable[[Tensor, Tensor], Tensor]


class TextbookSGE(nn.Module):
    """The five equations as one would write them down; the yardstick of the layer benchmark.

    Args:
        groups: number of channel groups G.
    """

    def __init__(self, groups: int = 64):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.zeros(1, groups, 1, 1))
        self.bias = nn.Parameter(torch.ones(1, groups, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Returns SGE(x) for x of shape (N, C, H, W)."""
        vectors = x.unflatten(1, (self.groups, -1))
        g = vectors.mean((3, 4), keepdim=True)
        s = (vectors * g).sum(2)
        t = (s - s.mean((2, 3), keepdim=True)) / (s.std((2, 3), keepdim=True) + 1e-5)
        a = self.weight * t + self.bias
        return (vectors * torch.sigmoid(a).unsqueeze(2)).flatten(1, 2)


def keep_memory(size: int) -> bool:
    """Makes the C library keep freed memory, and touches ``size`` bytes of it, so that no timed call waits for pages.

    A fresh page costs far more than what is written into it, and whether a tensor lies in fresh pages depends on what
    was freed before. For the rest of the process large blocks come from the heap, and the heap never shrinks.

    Returns:
        whether it could be done: it cannot without glibc.
    """
    mmap_max, trim_threshold = -4, -1
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or not (mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)):
        return False
    torch.empty(min(size, 2**30), dtype=torch.uint8).fill_(0)
    return True


def timm_attention(kind: str, channels: int) -> nn.Module:
    """timm's attention module "se", "eca" or "cbam" for a number of channels.

    Raises:
        UserError: timm is not installed.
    """
    try:
        return build_rival(kind, channels)
    except ImportError as error:
        raise UserError("the rivals come from timm, which is missing: pip install timm") from error


def contestants(channels: int, compiled: bool = False) -> dict[str, tuple[nn.Module | None, Tail]]:
    """What is timed: name to (module with the parameters, block tail of x and shortcut).

    Args:
        channels: C.
        compiled: textbook and layer by ``torch.compile``, as a user would, and the tail by the kernel "compile" too.

    Raises:
        UserError: timm is not installed.
    """
    textbook, layer = TextbookSGE(), SpatialGroupEnhance()

    def in_place_of_sge(module: nn.Module) -> tuple[nn.Module, Tail]:
        return module, lambda x, shortcut: F.relu_(module(x) + shortcut)

    found = {
        NONE: (None, lambda x, shortcut: F.relu_(x + shortcut)),
        TEXTBOOK: (textbook, lambda x, shortcut: F.relu(textbook(x) + shortcut)),
        LAYER: in_place_of_sge(layer),
        TAIL: (layer, lambda x, shortcut: layer.residual(x, shortcut, inplace=True)),
        **{f"timm {kind}": in_place_of_sge(timm_attention(kind, channels)) for kind in RIVALS},
    }
    if compiled:
        kernel = SpatialGroupEnhance(kernel="compile")
        found[COMPILED_TEXTBOOK] = (textbook, torch.compile(found[TEXTBOOK][1]))
        found[COMPILED_LAYER] = (layer, torch.compile(found[LAYER][1]))
        found[COMPILED_TAIL] = (kernel, lambda x, shortcut: kernel.residual(x, shortcut, inplace=True))
    return found


def saved_bytes(tail: Tail, x: Tensor, shortcut: Tensor, module: nn.Module | None = None) -> int:
    """Bytes that autograd keeps for the backward pass of ``tail``, each storage counted once, parameters not at all."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = tail(x, shortcut)
    for parameter in () if module is None else module.parameters():
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def peak_bytes(function: Callable[[], object]) -> int:
    """The most CPU memory that ``function`` holds at one time, its result included, in bytes, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    del result
    allocations = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def interleaved_times(functions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Calls each function once a round, after an unrecorded round; each returns the seconds that it took.

    Each round has an order of its own, the same in each run of the program: a contestant finds in the cache what the
    one before it has left there, and must not always follow the same other.
    """
    order = random.Random(0)
    times = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name in order.sample(list(functions), len(functions)):
            seconds = functions[name]()
            if index:
                times[name].append(seconds)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    low, median, high = statistics.quantiles([1e3 * seconds for seconds in times], n=4, method="inclusive")
    return {"median_ms": median, "quartiles_ms": [low, high]}


def benchmark_layer(shapes: list[tuple[int, int, int, int]], rounds: int, compiled: bool = False) -> dict:
    """Times the block tails at each shape, float32 on the CPU.

    Args:
        shapes: (N, C, H, W), C a multiple of 64.
        rounds: how often each contestant is timed in each mode; at least 2.
        compiled: compiled contestants too; how long their first calls take is told apart.

    Returns:
        ``{"threads", "rounds", "memory_kept", "shapes": [{"shape", "bytes", "contestants": {name: {"forward":
        {"median_ms", "quartiles_ms", "first_call_s"}, "forward+backward": ..., "saved": activations, "temporary":
        activations}}}]}``.

    Raises:
        UserError: 64 groups do not divide the channels, or timm is not installed.
    """
    for shape in shapes:
        if len(shape) != 4 or min(shape) < 1 or shape[1] % 64:
            raise UserError(f"a shape is N,C,H,W with C a multiple of the 64 groups; got {','.join(map(str, shape))}")
    largest = max(4 * torch.Size(shape).numel() for shape in shapes)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "memory_kept": keep_memory(24 * largest),
        "shapes": [_benchmark_shape(shape, rounds, compiled) for shape in shapes],
    }


def _benchmark_shape(shape: tuple[int, int, int, int], rounds: int, compiled: bool) -> dict:
    torch.manual_seed(0)
    torch.compiler.reset()  # what was compiled for another shape
    original, shortcut, upstream = (torch.randn(shape) for _ in range(3))
    x, target = original.clone(), torch.empty(shape)
    size = x.untyped_storage().nbytes()
    tails = contestants(shape[1], compiled)

    def copy() -> float:
        x.copy_(original)
        start = time.perf_counter()
        target.copy_(x)
        return time.perf_counter() - start

    def forward(tail: Tail) -> Callable[[], float]:
        def run() -> float:
            # As after the norm before it: x is new, and a tail may take its place.
            x.copy_(original)
            with torch.no_grad():
                start = time.perf_counter()
                tail(x, shortcut)
                return time.perf_counter() - start

        return run

    def both(tail: Tail, module: nn.Module | None) -> Callable[[], float]:
        def run() -> float:
            x.copy_(original)
            leaves = [x.detach().requires_grad_(), shortcut.detach().requires_grad_()]
            parameters = [] if module is None else list(module.parameters())
            start = time.perf_counter()
            # Not backward(): it would also copy the gradients into the leaves, which no block of a network does.
            torch.autograd.grad(tail(*leaves), leaves + parameters, upstream)
            return time.perf_counter() - start

        return run

    times = {
        "forward": {COPY: copy} | {name: forward(tail) for name, (_, tail) in tails.items()},
        "forward+backward": {name: both(tail, module) for name, (module, tail) in tails.items()},
    }
    results = {name: {} for name in (COPY, *tails)}
    for mode, functions in times.items():
        first = {name: function() for name, function in functions.items()}
        for name, seconds in interleaved_times(functions, rounds).items():
            results[name][mode] = summary(seconds) | {"first_call_s": first[name]}
    kept = {
        name: saved_bytes(tail, original.clone().requires_grad_(), shortcut.clone().requires_grad_(), module)
        for name, (module, tail) in tails.items()
    }
    for name, (_, tail) in tails.items():
        x.copy_(original)
        with torch.no_grad():
            peak = peak_bytes(lambda tail=tail: tail(x, shortcut))
            in_place = tail(x, shortcut).data_ptr() == x.data_ptr()
        results[name]["saved"] = (kept[name] - kept[NONE]) / size
        results[name]["temporary"] = (peak - (0 if in_place else size)) / size
    return {"shape": list(shape), "bytes": size, "contestants": results}


def layer_report(result: dict) -> str:
    """The tables of :func:`benchmark_layer`'s result, in Markdown."""
    names = list(result["shapes"][0]["contestants"])
    labels = ["x".join(map(str, entry["shape"])) for entry in result["shapes"]]
    sections = [f"float32, CPU, {result['threads']} threads, {result['rounds']} rounds, torch {result['torch']}"]
    if not result["memory_kept"]:
        sections.append("The C library could not be told to keep memory: times include the cost of fresh pages.")

    def table(title: str, rows: list[list], headers: list[str]) -> None:
        sections.append(f"### {title}\n\n" + tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))

    for mode, tensors in FLOOR_TENSORS.items():
        rows, floors = [], []
        for label, entry in zip(labels, result["shapes"], strict=True):
            timed = {name: entry["contestants"][name].get(mode) for name in names}
            textbook = timed[TEXTBOOK]["median_ms"]
            rows.append(
                [label, textbook]
                + [_with_spread(timed[name], textbook) for name in names if name not in (COPY, TEXTBOOK)]
            )
            # A copy moves two tensors.
            floor = entry["contestants"][COPY]["forward"]["median_ms"] * tensors / 2
            floors.append([label, floor, floor / textbook, timed[TAIL]["median_ms"] / floor])
        others = [name for name in names if name not in (COPY, TEXTBOOK)]
        table(f"{mode}: ratios to the textbook (quartiles)", rows, ["N, C, H, W", "textbook, ms", *others])
        table(
            f"{mode}: the floor, {tensors} tensors moved at the speed of a copy",
            floors,
            ["N, C, H, W", "floor, ms", "floor / textbook", f"{TAIL} / floor"],
        )
    compiled = [name for name in (COMPILED_TEXTBOOK, COMPILED_LAYER, COMPILED_TAIL) if name in names]
    if compiled:
        rows = [
            [label, mode, *(entry["contestants"][name][mode]["first_call_s"] for name in compiled)]
            for label, entry in zip(labels, result["shapes"], strict=True)
            for mode in FLOOR_TENSORS
        ]
        table("seconds of the first call, which compiles", rows, ["N, C, H, W", "", *compiled])
    for key, title in (
        ("saved", "kept for backward beyond the block without attention, in activations"),
        ("temporary", "peak memory in forward beyond the output, in activations"),
    ):
        shown = [name for name in names if name not in (COPY, NONE)]
        rows = [
            [label] + [entry["contestants"][name][key] for name in shown]
            for label, entry in zip(labels, result["shapes"], strict=True)
        ]
        table(title, rows, ["N, C, H, W", *shown])
    return "\n\n".join(sections)


def _with_spread(timed: dict, unit: float) -> str:
    low, high = timed["quartiles_ms"]
    return f"{timed['median_ms'] / unit:.2f} ({low / unit:.2f}-{high / unit:.2f})"


def benchmark_model(cfg: CfgNode, rounds: int, images: int, size: tuple[int, int], others: Sequence[str] = ()) -> dict:
    """Times a detector and its plain twin, with the same random weights, on the same generated images.

    Args:
        cfg: the detector with SGE; ``MODEL.DEVICE`` is where it runs, weights are not loaded.
        rounds: how often each is timed in each mode; at least 2.
        images: images in a batch.
        size: height and width of the images in pixels.
        others: more contestants, of ``OTHERS``.

    Returns:
        ``{"device", "threads", "rounds", "images", "size", "memory_kept", "inference", "training step"}``, the last
        two ``{"sge", "plain" or another: {"median_ms", "quartiles_ms", "first_call_s", "peak_bytes"}, "time_ratio",
        "memory_ratio"}`` with sge's ratios. Peak bytes are beyond weights and inputs on the CPU, everything on a GPU.

    Raises:
        UserError: ``cfg`` is the plain detector itself.
    """
    if not sge_options(cfg).enabled:
        raise UserError("MODEL.SGE.ENABLED is False: give the config with SGE, the plain twin is made from it")
    device = torch.device(cfg.MODEL.DEVICE)
    kept = device.type == "cpu" and keep_memory(2**30)
    models = _twins(cfg) | {name: _other(cfg, name) for name in others}
    for name in others:
        models[name].load_state_dict(models["plain"].state_dict(), strict=False)
    batch = _generated_batch(cfg, images, size)
    modes = {
        "inference": {name: _inference(model, batch) for name, model in models.items()},
        "training step": {name: _training_step(model, batch) for name, model in models.items()},
    }
    result = {
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "images": images,
        "size": list(size),
        "memory_kept": kept,
    }
    for mode, functions in modes.items():
        timed = {name: _timed(function, device) for name, function in functions.items()}
        first = {name: function() for name, function in timed.items()}
        times = interleaved_times(timed, rounds)
        entry = {
            name: summary(times[name]) | {"first_call_s": first[name], "peak_bytes": _peak(function, device)}
            for name, function in functions.items()
        }
        entry["time_ratio"] = entry["sge"]["median_ms"] / entry["plain"]["median_ms"]
        entry["memory_ratio"] = entry["sge"]["peak_bytes"] / entry["plain"]["peak_bytes"]
        result[mode] = entry
    return result


def _twins(cfg: CfgNode) -> dict[str, nn.Module]:
    models = {}
    for name, enabled in (("plain", False), ("sge", True)):
        twin = cfg.clone()
        twin.defrost()
        twin.MODEL.SGE.ENABLED = enabled
        torch.manual_seed(0)
        models[name] = build_model(twin)
        if sge_options(twin).ignore_padding:
            ignore_padding(models[name])
    models["sge"].load_state_dict(models["plain"].state_dict(), strict=False)
    return models


# More contestants of a detector: its overrides, and what of it is compiled.
OTHERS: dict[str, tuple[list, str | None]] = {
    "save memory": (["MODEL.SGE.SAVE_MEMORY", True], None),
    "kernel compile": (["MODEL.SGE.KERNEL", "compile"], None),
    "plain, backbone compiled": (["MODEL.SGE.ENABLED", False], "backbone"),
    "backbone compiled": ([], "backbone"),
    "detector compiled": ([], "detector"),
    "blocks checkpointed": ([], "checkpoint"),
    "x in bfloat16": ([], "bfloat16"),
    "ignore padding": (["MODEL.SGE.IGNORE_PADDING", True], None),
}


def _other(cfg: CfgNode, name: str) -> nn.Module:
    overrides, change = OTHERS[name]
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(overrides)
    model = build_model(cfg)
    if sge_options(cfg).ignore_padding:
        ignore_padding(model)
    if change == "backbone":
        model.backbone.compile()
    elif change == "detector":
        model.compile()
    elif change == "checkpoint":
        _exchange_forwards(model, lambda block: functools.partial(checkpoint, block.forward, use_reentrant=False))
    elif change == "bfloat16":
        _exchange_forwards(model, _input_in_half)
    return model


def _exchange_forwards(model: nn.Module, forward: Callable[[nn.Module], Callable]) -> None:
    for block in model.modules():
        if isinstance(block, AttentiveBasicBlock | AttentiveBottleneckBlock):
            block.forward = forward(block)


def _input_in_half(block: nn.Module) -> Callable[[Tensor], Tensor]:
    """The block's forward pass; SGE's input is kept in bfloat16, which is not what was gated."""
    residual = block.sge.residual

    def lean(x: Tensor, shortcut: Tensor, inplace: bool = False) -> Tensor:
        result = residual(x, shortcut)
        half = x.detach().bfloat16()
        if result.requires_grad:
            replace_saved_input(result, half.clone)
        return result

    block.sge.residual = lean
    return block.forward


def _generated_batch(cfg: CfgNode, images: int, size: tuple[int, int]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    height, width = size
    classes = cfg.MODEL.RETINANET.NUM_CLASSES if head_section(cfg) == "RETINANET" else None
    classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES if classes is None else classes
    batch = []
    for _ in range(images):
        corners = torch.rand(8, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        sides = (torch.rand(8, 2, generator=generator) * 0.4 + 0.1) * torch.tensor([width, height])
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], 1))
        instances.gt_classes = torch.randint(classes, (8,), generator=generator)
        if cfg.MODEL.MASK_ON:
            instances.gt_masks = BitMasks(torch.ones(8, height, width, dtype=torch.bool))
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def _inference(model: nn.Module, batch: list[dict]) -> Callable[[], object]:
    def run() -> object:
        model.eval()
        with torch.no_grad():
            return model(batch)

    return run


def _training_step(model: nn.Module, batch: list[dict]) -> Callable[[], object]:
    # The step is taken, at a rate of 0: every round computes the same.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def run() -> None:
        model.train()
        torch.manual_seed(0)
        optimizer.zero_grad()
        with EventStorage():
            sum(model(batch).values()).backward()
        optimizer.step()

    return run


def _timed(function: Callable[[], object], device: torch.device) -> Callable[[], float]:
    def run() -> float:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        return time.perf_counter() - start

    return run


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(function: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        return peak_bytes(function)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device)


def model_report(result: dict) -> str:
    """The table of :func:`benchmark_model`'s result, in Markdown."""
    height, width = result["size"]
    rows = []
    for mode in ("inference", "training step"):
        contestants = {name: entry for name, entry in result[mode].items() if isinstance(entry, dict)}
        plain = contestants["plain"]
        for name, entry in contestants.items():
            ratio = entry["peak_bytes"] / plain["peak_bytes"]
            time = _with_spread(entry, plain["median_ms"])
            rows.append([mode, name, entry["median_ms"], time, entry["peak_bytes"] / 2**20, ratio])
    headers = ["", "", "ms", "to plain (quartiles)", "peak MiB", "to plain"]
    return (
        f"{result['images']} image(s) of {height}x{width}, {result['device']}, {result['threads']} threads, "
        f"{result['rounds']} rounds, torch {result['torch']}\n\n"
        + tabulate(rows, headers, tablefmt="github", floatfmt=("", "", ".0f", "", ".0f", ".3f"))
    )
