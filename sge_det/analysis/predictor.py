"""A detector with the pre-processing of its config, for images that are not of a data set."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from ..config import load_config
from ..data.annotations import read_annotations
from ..data.datasets import head_section, register_sample
from ..data.images import image_fault, readable
from ..engine import doctor
from ..engine.training import load_model, setup_config
from ..errors import UserError
from ..modeling.gates import LayerMaps, evaluating, layer_maps, sge_layers

logger = logging.getLogger(__name__)

# Two standard deviations of eq. 3's t.
_USUAL_T = 2.0


def setup_prediction(
    config_file: str, overrides: Sequence[str] = (), datasets: Sequence[Sequence[str]] = ()
) -> CfgNode:
    """Reads a config for a model that is to look at files; the data sets that it names need not be there.

    Args:
        config_file, overrides, datasets: as in :func:`.engine.training.setup_config`; data sets give the classes'
            names.

    Raises:
        UserError: anything in it that cannot work, in one sentence.
    """
    if datasets or not config_file:
        return setup_config(config_file, list(overrides), list(datasets), eval_only=True)
    register_sample()
    cfg = load_config(config_file, list(overrides))
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    without_data = cfg.clone()
    without_data.DATASETS.TRAIN = without_data.DATASETS.TEST = ()
    doctor.tell(doctor.examine_settings(cfg, config_file, eval_only=True))
    doctor.tell(doctor.examine_files(without_data, eval_only=True))
    return cfg


def with_confidence(cfg: CfgNode, confidence: float) -> CfgNode:
    """A copy of ``cfg`` whose model gives detections with a score above ``confidence`` (0-1) only.

    Raises:
        UserError: it is no such number.
    """
    if not 0 <= confidence <= 1:
        raise UserError(f"--confidence must lie between 0 and 1, got {confidence:g}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = float(confidence)
    return cfg


def categories(cfg: CfgNode) -> list[dict]:
    """The model's classes in its order, as COCO's categories: ``[{"id": 1, "name": "person"}, ...]``.

    They are those of the first of ``DATASETS.TEST``; where that is not there, the classes go by their numbers.

    Raises:
        UserError: the data set has another number of classes than the model.
    """
    head = head_section(cfg)
    number = cfg.MODEL[head].NUM_CLASSES
    name = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    found: list[dict] = []
    if name in MetadataCatalog.list():
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if json_file and Path(json_file).is_file():
            entries = sorted(read_annotations(json_file).content["categories"], key=lambda entry: entry["id"])
            found = [{"id": entry["id"], "name": entry["name"]} for entry in entries]
        elif metadata.get("thing_classes"):
            ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
            ids = {place: identity for identity, place in ids.items()}
            found = [{"id": ids.get(k, k + 1), "name": text} for k, text in enumerate(metadata.thing_classes)]
    if not found:
        logger.warning(
            f"the data set {name or '(none)'} of DATASETS.TEST is not there, so classes go by their numbers: give one "
            "with --dataset NAME JSON IMAGES for their names"
        )
        return [{"id": k + 1, "name": f"class {k}"} for k in range(number)]
    if len(found) != number:
        raise UserError(f"MODEL.{head}.NUM_CLASSES is {number}, but {name} has {len(found)} categories: set it to that")
    return found


class Unreadable(Exception):
    """A file that cannot be read; the text says why."""


class Predictor:
    """A detector with the pre-processing of its config, for one image at a time.

    Args:
        cfg: of the model.
        model: by default the one of ``cfg``, with ``MODEL.WEIGHTS``.

    Attributes:
        layer: the name of the SGE layer that :meth:`look` looks at; set it first.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module | None = None):
        self.format = cfg.INPUT.FORMAT
        self.pixel_range = tuple(cfg.INPUT.get("PIXEL_RANGE", ()))
        self.model = (load_model(cfg) if model is None else model).eval()
        self.layer = ""
        self._resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def read(self, file: Path) -> np.ndarray:
        """An image as the model takes it, (H, W, C) in the channel order of ``INPUT.FORMAT``, turned as EXIF says.

        Raises:
            Unreadable: it cannot be read.
        """
        fault = image_fault(file, pixel_range=self.pixel_range)
        if fault:
            raise Unreadable(fault)
        try:
            return read_image(readable(file, self.pixel_range), self.format)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            raise Unreadable(str(error).split("\n")[0] or type(error).__name__) from error

    def from_rgb(self, frame: np.ndarray) -> np.ndarray:
        """A picture (H, W, 3) in RGB as :meth:`read` would give it."""
        if self.format == "RGB":
            return frame
        return frame[..., ::-1] if self.format == "BGR" else np.asarray(Image.fromarray(frame).convert(self.format))

    def rgb(self, image: np.ndarray) -> np.ndarray:
        """What :meth:`read` gave, as (H, W, 3), uint8, RGB."""
        return np.ascontiguousarray(convert_image_to_rgb(image, self.format))

    def __call__(self, image: np.ndarray) -> Instances:
        """The detections on an image, on the CPU, in its pixels."""
        with evaluating(self.model):
            return self.model([self._example(image)])[0]["instances"].to("cpu")

    def look(self, image: np.ndarray) -> tuple[Instances, LayerMaps]:
        """The detections, and what ``layer`` shows."""
        return layer_maps(self.model, self.layer, self._example(image))

    def _example(self, image: np.ndarray) -> dict:
        height, width = image.shape[:2]
        resized = self._resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.astype("float32").transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}


def gate_range(model: nn.Module, layer: str) -> tuple[float, float]:
    """Between which values the mean over a layer's groups of its gates usually lies, by its gamma and beta alone.

    Pictures of different images so have one colour scale, which no image needs to be seen for.
    """
    sge = sge_layers(model)[layer]
    gamma, beta = sge.weight.detach().abs(), sge.bias.detach()
    low, high = (torch.sigmoid(beta + sign * _USUAL_T * gamma).mean().item() for sign in (-1, 1))
    return low, high
