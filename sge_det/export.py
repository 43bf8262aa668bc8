"""Trained detectors and backbones out of Detectron2: TorchScript, ONNX and exported programs, each run and compared.

What is exported goes through Detectron2's own adapters and torch's exporters. It is read back from its file and run on
other sizes and batches than those it was made with; the largest difference to the model is the result.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

import torch
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet, SemanticSegmentor
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import Tensor, nn

from .errors import UserError
from .files import write_file, write_json

FORMATS = ("torchscript", "onnx", "exported_program")
_ENDINGS = {"torchscript": "ts", "onnx": "onnx", "exported_program": "pt2"}
# Images that differ from the first, at which graphs are made, in size, shape and divisibility.
SIZES = ((320, 416), (256, 320), (416, 288), (224, 500))
# Of features, and of boxes in pixels, scores and masks.
TOLERANCES = {"backbone": 1e-4, "detector": 1e-3}
_ONNX_OPSET = 16
# What is compared of detections. Heat maps of key points, whose greatest cells are the points, are left out.
_FIELDS = ("pred_boxes", "scores", "pred_classes", "pred_masks", "pred_keypoints")

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """An exported model beside the model itself.

    Attributes:
        size: of the images, (height, width) in pixels.
        batch: images in it.
        difference: the largest of an output, relative to the largest output where that is above 1; infinite where the
            shapes differ, as when another number of objects is found, or where one is no number (NaN).
        detections: objects that were found and compared; None for a backbone and for semantic segmentation.
    """

    size: tuple[int, int]
    batch: int
    difference: float
    detections: int | None = None


@dataclass
class Export:
    """What became of one part of a model in one format.

    Attributes:
        part: "detector" or "backbone".
        format: of :data:`FORMATS`.
        way: by which it was exported, "scripted" or "traced" for instance.
        file: where it was written, or None.
        reason: why there is no file, or why another way was taken; else "".
        outputs: the names of the outputs, in order.
        checks: each size and batch that was tried.
    """

    part: str
    format: str
    way: str = ""
    file: str | None = None
    reason: str = ""
    outputs: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def difference(self) -> float:
        """The largest difference, NaN where nothing was compared."""
        return max((check.difference for check in self.checks), default=math.nan)

    @property
    def compared(self) -> bool:
        """Whether there was something to compare: a detector that finds nothing shows nothing."""
        return bool(self.checks) and all(check.detections != 0 for check in self.checks)

    @property
    def holds(self) -> bool:
        """Whether it is the model within the tolerance, on each size."""
        return self.compared and all(check.difference <= TOLERANCES[self.part] for check in self.checks)


def export_model(
    model: nn.Module,
    folder: Path,
    format: str,
    *,
    sizes: Sequence[tuple[int, int]] = SIZES,
    image: Tensor | None = None,
) -> list[Export]:
    """Exports a detector and its backbone, reads both back, runs them and compares them with the model.

    Args:
        model: a Detectron2 model on the CPU: ``GeneralizedRCNN``, ``PanopticFPN``, ``RetinaNet``,
            ``SemanticSegmentor``, or another one, whose ``backbone`` is exported alone.
        folder: where ``detector.*``, ``backbone.*`` and ``export.json`` are written.
        format: of :data:`FORMATS`.
        sizes: (height, width) in pixels; graphs are made at the first.
        image: (3, H, W) on which the model finds objects, as the model takes it; noise by default.

    Returns:
        the detector's export and the backbone's. Where Detectron2 or an exporter cannot export the detector, its
        ``reason`` says so and the backbone is exported all the same.

    Raises:
        UserError: there is no such format, the model has no backbone, or ONNX's packages are missing.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r} is not one of {', '.join(FORMATS)}")
    if format == "onnx":
        _require_onnx()
    if not isinstance(getattr(model, "backbone", None), Backbone):
        raise UserError(f"{type(model).__name__} is no detector that can be exported: it has no Detectron2 backbone")
    model = model.eval()
    images = [_image(size, number, image) for number, size in enumerate(sizes)]
    with torch.no_grad(), warnings.catch_warnings():
        # tracers and exporters tell of each branch that they fix; the comparison tells what that came to
        warnings.simplefilter("ignore")
        exports = [_export_detector(model, folder, format, images), _export_backbone(model, folder, format, sizes)]
    write_json(folder / "export.json", [asdict(export) | {"holds": export.holds} for export in exports])
    return exports


def report(exports: Sequence[Export]) -> str:
    """A table of exports in Markdown, with what could not be done below it."""
    rows = []
    for export in exports:
        tried = ", ".join(f"{check.batch}x{check.size[0]}x{check.size[1]}" for check in export.checks)
        found = f"{export.difference:.1e}" if export.checks else "-"
        state = "holds" if export.holds else ("DIFFERS" if export.compared else "nothing was compared")
        rows.append([export.part, export.format, export.way or "-", found, tried or "-", state if export.file else "-"])
    headers = ["part", "format", "way", "largest difference", "sizes tried", ""]
    notes = [f"{export.part}: {export.reason}" for export in exports if export.reason]
    return "\n\n".join([tabulate(rows, headers, tablefmt="github"), *notes])


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install onnx onnxruntime onnxscript") from error


def _image(size: tuple[int, int], seed: int, image: Tensor | None) -> Tensor:
    if image is None:
        return torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) * 255
    return nn.functional.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)[0]


def _export_detector(model: nn.Module, folder: Path, format: str, images: list[Tensor]) -> Export:
    if not isinstance(model, GeneralizedRCNN | RetinaNet | SemanticSegmentor):
        known = "GeneralizedRCNN, PanopticFPN, RetinaNet and SemanticSegmentor are"
        return Export("detector", format, reason=f"{type(model).__name__} is not exported whole: {known}")
    # those whose inference is written for TorchScript
    is_scriptable = not isinstance(model, PanopticFPN | SemanticSegmentor)
    scripted = [("scripted", _scripted_detector)] if is_scriptable else []
    ways = {
        "torchscript": [*scripted, ("traced", _traced_detector)],
        "onnx": [("traced", _onnx_detector)],
        "exported_program": [("exported", _exported_detector)],
    }[format]
    export = Export("detector", format)
    for way, make in ways:
        try:
            content, load = make(model, images[0])
        # Exporters fail in ways of their own where a model has what they do not know.
        except Exception as error:
            export.reason = f"it cannot be {way}: {_first_line(error)}"
            continue
        export.way, export.file = way, f"detector.{_ENDINGS[format]}"
        write_file(folder / export.file, content)
        run, batches = load((folder / export.file).read_bytes()), [1, 2] if way == "scripted" else [1]
        for image in images:
            expected = _predictions(model, image)
            objects = len(expected["scores"]) if "scores" in expected else None
            export.outputs = list(expected)
            for batch in batches:
                found = run([image] * batch)
                difference = max(_difference(one, expected) for one in found)
                export.checks.append(Check(tuple(image.shape[1:]), batch, difference, objects))
        break
    return export


def _export_backbone(model: nn.Module, folder: Path, format: str, sizes: Sequence[tuple[int, int]]) -> Export:
    make = {"torchscript": _traced_backbone, "onnx": _onnx_backbone, "exported_program": _exported_backbone}[format]
    divisor = max(model.backbone.size_divisibility, 1)
    sizes = [tuple(-(-side // divisor) * divisor for side in size) for size in sizes]
    backbone = _Features(model.backbone).eval()
    inputs = [_features_input(size, 1 + (number + 1) % 3, number) for number, size in enumerate(sizes)]
    content, load = make(backbone, inputs[0], divisor)
    file = f"backbone.{_ENDINGS[format]}"
    way = "exported" if format == "exported_program" else "traced"
    export = Export("backbone", format, way, file, outputs=list(model.backbone(inputs[0])))
    write_file(folder / file, content)
    run = load((folder / file).read_bytes())
    for x in inputs:
        found = dict(zip(export.outputs, run(x), strict=True))
        difference = _difference(found, model.backbone(x))
        export.checks.append(Check(tuple(x.shape[2:]), x.shape[0], difference))
    return export


def _features_input(size: tuple[int, int], batch: int, seed: int) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def _difference(found: Outputs, expected: Outputs) -> float:
    largest = 0.0
    for name, tensor in expected.items():
        other = found[name]
        if other.shape != tensor.shape:
            return math.inf
        if tensor.numel():
            difference = (other.double() - tensor.double()).abs().max().item()
            if not math.isfinite(difference):  # ``max`` passes NaN over
                return math.inf
            largest = max(largest, difference / max(tensor.double().abs().max().item(), 1.0))
    return largest


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class _Features(nn.Module):
    """A backbone whose features come as a tuple, in the order of its own dict."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(x).values())


def _predictions(model: nn.Module, image: Tensor) -> Outputs:
    """What the model finds in an image (3, H, W): boxes in its pixels, masks and logits as the heads give them."""
    inputs = [{"image": image}]
    if isinstance(model, SemanticSegmentor):
        return {"sem_seg": model(inputs)[0]["sem_seg"]}
    if isinstance(model, PanopticFPN):
        instances, sem_seg = model.inference(inputs, do_postprocess=False)
        return {**_fields(instances[0]), "sem_seg": sem_seg[0]}
    if isinstance(model, GeneralizedRCNN):
        return _fields(model.inference(inputs, do_postprocess=False)[0])
    images = model.preprocess_image(inputs)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    return _fields(model.forward_inference(images, features, model.head(features))[0])


def _fields(instances: Instances) -> Outputs:
    fields = {name: instances.get(name) for name in _FIELDS if instances.has(name)}
    return {name: value.tensor if isinstance(value, Boxes) else value for name, value in fields.items()}


class _ScriptableDetector(nn.Module):
    """From a list of ``{"image": (3, H, W)}`` to a list of dicts of tensors, for any batch."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


class _ScriptableRCNN(_ScriptableDetector):
    def forward(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        instances = self.model.inference(inputs, do_postprocess=False)
        return [i.get_fields() for i in instances]


class _ScriptableRetinaNet(_ScriptableDetector):
    def forward(self, inputs: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        instances = self.model(inputs)
        return [i.get_fields() for i in instances]


Loader = Callable[[bytes], Callable]


def _scripted_detector(model: nn.Module, image: Tensor) -> tuple[bytes, Loader]:
    fields = {
        **{"proposal_boxes": Boxes, "objectness_logits": Tensor, "pred_boxes": Boxes, "scores": Tensor},
        **{"pred_classes": Tensor, "pred_masks": Tensor, "pred_keypoints": Tensor, "pred_keypoint_heatmaps": Tensor},
    }
    wrapper = _ScriptableRCNN if isinstance(model, GeneralizedRCNN) else _ScriptableRetinaNet
    # of a copy: scripting puts other modules in the place of a model's
    scripted = scripting_with_instances(wrapper(copy.deepcopy(model)).eval(), fields)

    def load(content: bytes) -> Callable:
        loaded = torch.jit.load(io.BytesIO(content))
        return lambda images: loaded([{"image": image} for image in images])

    return _torchscript_bytes(scripted), load


def _tracing_adapter(model: nn.Module, image: Tensor) -> tuple[nn.Module, list[str]]:
    names = list(_predictions(model, image))

    def inference(model: nn.Module, inputs: list[dict]) -> tuple[Tensor, ...]:
        found = _predictions(model, inputs[0]["image"])
        return tuple(found[name] for name in names)

    return TracingAdapter(model, [{"image": image}], inference).eval(), names


def _traced_detector(model: nn.Module, image: Tensor) -> tuple[bytes, Loader]:
    adapter, names = _tracing_adapter(model, image)
    traced = torch.jit.trace(adapter, (image,), check_trace=False)

    def load(content: bytes) -> Callable:
        loaded = torch.jit.load(io.BytesIO(content))
        return lambda images: [dict(zip(names, loaded(image), strict=True)) for image in images]

    return _torchscript_bytes(traced), load


def _onnx_detector(model: nn.Module, image: Tensor) -> tuple[bytes, Loader]:
    adapter, names = _tracing_adapter(model, image)
    axes = {"image": {1: "height", 2: "width"}, **{name: {0: "objects"} for name in names}}
    axes |= {name: {1: f"{name}_height", 2: f"{name}_width"} for name in names if name == "sem_seg"}
    content = _onnx_bytes(adapter, image, "image", names, axes)

    def load(content: bytes) -> Callable:
        run = _onnx_session(content)
        return lambda images: [dict(zip(names, run(image), strict=True)) for image in images]

    return content, load


def _exported_detector(model: nn.Module, image: Tensor) -> tuple[bytes, Loader]:
    adapter, names = _tracing_adapter(model, image)
    program = torch.export.export(adapter, (image,))

    def load(content: bytes) -> Callable:
        loaded = torch.export.load(io.BytesIO(content)).module()
        return lambda images: [dict(zip(names, loaded(image), strict=True)) for image in images]

    return _program_bytes(program), load


def _traced_backbone(backbone: nn.Module, x: Tensor, divisor: int) -> tuple[bytes, Loader]:
    traced = torch.jit.trace(backbone, (x,), check_trace=False)
    return _torchscript_bytes(traced), lambda content: torch.jit.load(io.BytesIO(content))


def _onnx_backbone(backbone: nn.Module, x: Tensor, divisor: int) -> tuple[bytes, Loader]:
    names = [f"feature{number}" for number in range(len(backbone(x)))]
    axes = {name: {0: "batch", 2: f"{name}_height", 3: f"{name}_width"} for name in ("x", *names)}
    return _onnx_bytes(backbone, x, "x", names, axes), _onnx_session


def _exported_backbone(backbone: nn.Module, x: Tensor, divisor: int) -> tuple[bytes, Loader]:
    # FPN adds a map to one that is twice as fine: both sides must be multiples of what it divides them by.
    height, width = (torch.export.Dim(name, min=2, max=4096 // divisor) for name in ("height", "width"))
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 2: divisor * height, 3: divisor * width}
    # A graph that is made with a map of one cell would be one for such maps alone.
    x = _features_input(tuple(max(side, 8 * divisor) for side in x.shape[2:]), 2, 0)
    program = torch.export.export(backbone, (x,), dynamic_shapes=(sizes,), strict=True)
    return _program_bytes(program), lambda content: torch.export.load(io.BytesIO(content)).module()


def _torchscript_bytes(module: torch.jit.ScriptModule) -> bytes:
    file = io.BytesIO()
    torch.jit.save(module, file)
    return file.getvalue()


def _program_bytes(program: torch.export.ExportedProgram) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx_bytes(module: nn.Module, x: Tensor, name: str, outputs: list[str], axes: dict[str, dict[int, str]]) -> bytes:
    file = io.BytesIO()
    # torch turns on a log there and never off; it prints the graph, thousands of lines, where the exporter fails
    with mock.patch.object(torch._C, "_jit_onnx_log", create=True):
        torch.onnx.export(
            module,
            (x,),
            file,
            dynamo=False,
            opset_version=_ONNX_OPSET,
            input_names=[name],
            output_names=outputs,
            dynamic_axes=axes,
        )
    return file.getvalue()


def _onnx_session(content: bytes) -> Callable:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (name,) = [argument.name for argument in session.get_inputs()]
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {name: x.numpy()})]
