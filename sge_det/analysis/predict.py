"""Detections on images and videos: drawn, and as COCO-format JSON."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image
from pycocotools import mask as mask_utils
from torch import nn
from tqdm import tqdm

from ..config import load_config
from ..data.datasets import read_annotations
from ..engine import doctor
from ..engine.training import load_model, setup_config
from ..errors import UserError
from ..files import cannot_write, write_file, write_json
from ..modeling.gates import LayerMaps, evaluating, find_layer, layer_maps, sge_layers
from .figures import captioned, draw_detections, even, overlay

logger = logging.getLogger(__name__)

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}
PREDICTIONS_FILE = "predictions.json"
_JOURNAL_FILE = ".predictions.jsonl"
# What Pillow writes in colour and without loss of quality by default; drawings of others become PNG.
_WRITTEN = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
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
    head = "RETINANET" if cfg.MODEL.META_ARCHITECTURE == "RetinaNet" else "ROI_HEADS"
    number = cfg.MODEL[head].NUM_CLASSES
    name = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    found: list[dict] = []
    if name in MetadataCatalog.list():
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("json_file")
        if json_file and Path(json_file).is_file():
            entries = sorted(read_annotations(json_file)["categories"], key=lambda entry: entry["id"])
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


def split_input(inputs: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts ``--input A B`` from the KEY VALUE pairs behind it, which argparse takes for inputs as well."""
    for place, word in enumerate(inputs):
        if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR", word) and not Path(word).exists():
            return list(inputs[:place]), [*inputs[place:], *overrides]
    return list(inputs), list(overrides)


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The images and videos that ``--input`` names.

    Args:
        inputs: files, folders (their images and videos, not those of folders in them) and globs.

    Raises:
        UserError: one of them names nothing.
    """
    found: list[Path] = []
    for word in inputs:
        path = Path(word).expanduser()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            fitting = sorted(entry for entry in path.iterdir() if _is_known(entry))
            if not fitting:
                raise UserError(f"--input {word}: there are no images or videos in this folder")
            found += fitting
        else:
            fitting = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if _is_known(Path(name)))
            if not fitting:
                raise UserError(f"--input {word}: there is no such file or folder, and no image or video matches it")
            found += fitting
    if not found:
        raise UserError("give images, folders, globs or videos with --input")
    return list(dict.fromkeys(found))


def _is_known(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGES | VIDEOS


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def common_folder(files: Sequence[Path]) -> Path:
    """The folder below which all ``files`` lie: what the names of outputs are relative to."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def output_files(files: Sequence[Path], output: Path) -> list[Path]:
    """Where the drawing of each file goes: ``output`` keeps the names, and the folders below the common one.

    Raises:
        UserError: a drawing would take the place of its input.
    """
    root = common_folder(files)
    targets = []
    for file in files:
        target = output / file.absolute().relative_to(root)
        suffix = ".mp4" if is_video(file) else ".png"
        kept = target.suffix.lower() == ".mp4" if is_video(file) else target.suffix.lower() in _WRITTEN
        target = target if kept else target.with_name(target.name + suffix)
        if target.resolve() == file.resolve():
            raise UserError(f"--output {output} would write over the input {file}: name another folder")
        targets.append(target)
    return targets


def make_folder(folder: Path) -> None:
    """Makes a folder for results.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error


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
        self.model = (load_model(cfg) if model is None else model).eval()
        self.layer = ""
        self._resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def read(self, file: Path) -> np.ndarray:
        """An image as the model takes it, (H, W, C) in the channel order of ``INPUT.FORMAT``, turned as EXIF says.

        Raises:
            Unreadable: it cannot be read.
        """
        try:
            return read_image(str(file), self.format)
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


@dataclass
class _Found:
    """What was found in one file: for each image or frame its size and detections, with contiguous class numbers."""

    frames: list[dict] = field(default_factory=list)

    def add(self, image: np.ndarray, instances: Instances) -> None:
        height, width = image.shape[:2]
        self.frames.append(
            {"height": height, "width": width, "annotations": instances_to_coco_json(instances, 0)},
        )


def predict(
    cfg: CfgNode,
    files: Sequence[Path],
    output: Path,
    *,
    confidence: float = 0.5,
    attention: bool = False,
    stage: str = "res5",
    block: int = -1,
) -> tuple[Path, dict[Path, str]]:
    """Draws the detections on images and videos into ``output`` and writes ``predictions.json`` there.

    The JSON is in COCO's instance format (``images``, ``categories``, ``annotations``), with the score of each
    annotation and, for mask heads, its mask as RLE; frames of videos are images with a ``video_id`` and a
    ``frame_id`` (from 0). Files that are finished are kept when the same call is made again after an interruption.

    Args:
        cfg: from :func:`setup_prediction`.
        files: from :func:`find_files`.
        output: a folder.
        confidence: least score, 0-1.
        attention: draw the mean gate of an SGE layer beside the detections.
        stage, block: of that layer, as in :func:`.modeling.gates.find_layer`.

    Returns:
        the JSON's path, and the files that could not be read (in full), each with the reason.

    Raises:
        UserError: something that the user can put right.
    """
    cfg = with_confidence(cfg, confidence)
    targets = output_files(files, output)
    classes = categories(cfg)
    predictor = Predictor(cfg)
    draw = _drawing(predictor, [entry["name"] for entry in classes], (stage, block) if attention else None)
    make_folder(output)
    settings = [cfg.dump(), attention and [stage, block], _state_of(Path(cfg.MODEL.WEIGHTS))]
    faults: dict[Path, str] = {}
    with _Journal(output / _JOURNAL_FILE, settings) as journal:
        for file, target in tqdm(list(zip(files, targets, strict=True)), desc="predicting", unit="file"):
            if journal.has(file) and target.is_file():
                continue
            found = _Found()
            try:
                fault = _one_video(file, target, predictor, draw, found) if is_video(file) else ""
                if not is_video(file):
                    image = predictor.read(file)
                    picture, instances = draw(image)
                    found.add(image, instances)
                    write_file(target, _encoded(target, picture))
            except Unreadable as error:
                fault = str(error)
            if fault:
                faults[file] = fault
            if found.frames:
                journal.add(file, found.frames, keep=not fault)
        path = output / PREDICTIONS_FILE
        write_json(path, _coco(files, journal, classes))
    journal.remove()
    return path, faults


def report_faults(faults: dict[Path, str], files: Sequence[Path], done: str) -> None:
    """Ends with what could not be read, when all else is done.

    Raises:
        UserError: there is such a file.
    """
    if faults:
        reasons = "; ".join(f"{file}: {reason.rstrip('.')}" for file, reason in faults.items())
        raise UserError(f"{len(faults)} of {len(files)} files cannot be read, {done}: {reasons}")


def _drawing(
    predictor: Predictor, names: Sequence[str], place: tuple[str, int] | None
) -> Callable[[np.ndarray], tuple[np.ndarray, Instances]]:
    """A function from an image, as the model takes it, to its drawing (RGB) and detections."""
    if place is None:

        def detections(image: np.ndarray) -> tuple[np.ndarray, Instances]:
            instances = predictor(image)
            return draw_detections(predictor.rgb(image), instances, names), instances

        return detections
    predictor.layer = find_layer(predictor.model, *place)
    low, high = gate_range(predictor.model, predictor.layer)

    def with_gates(image: np.ndarray) -> tuple[np.ndarray, Instances]:
        instances, maps = predictor.look(image)
        rgb = predictor.rgb(image)
        gates = overlay(rgb, maps.gates.mean(0), maps.covers, low, high)
        text = f"mean gate of {maps.label}, {low:.2f} to {high:.2f}"
        return captioned([(draw_detections(rgb, instances, names), "detections"), (gates, text)]), instances

    return with_gates


def _one_video(file: Path, target: Path, predictor: Predictor, draw: Callable, found: _Found) -> str:
    """Draws a video; returns what is wrong with it, "" where nothing is."""
    video = cv2.VideoCapture(str(file))
    part = target.with_name(f".{target.stem}.{os.getpid()}.part.mp4")
    writer = None
    announced = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    rate = video.get(cv2.CAP_PROP_FPS)
    make_folder(target.parent)
    try:
        with tqdm(total=announced or None, desc=file.name, unit="frame", leave=False) as bar:
            for frame in _frames(video):
                image = predictor.from_rgb(frame)
                picture, instances = draw(image)
                picture = even(picture)
                found.add(image, instances)
                if writer is None:
                    size = (picture.shape[1], picture.shape[0])
                    rate = rate if 0 < rate < 1000 else 25.0
                    writer = cv2.VideoWriter(str(part), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                    if not writer.isOpened():
                        raise UserError(f"{target} cannot be written: OpenCV has no encoder for MP4 here")
                writer.write(np.ascontiguousarray(picture[..., ::-1]))
                bar.update()
        if writer is None:
            raise Unreadable("no frame of it can be decoded")
        writer.release()
        os.replace(part, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        video.release()
        if writer is not None:
            writer.release()
        part.unlink(missing_ok=True)
    # containers announce the number by duration, which may be off by one
    if len(found.frames) < announced - 1:
        return f"only the first {len(found.frames)} of its {announced} frames can be decoded"
    return ""


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        there, frame = video.read()
        if not there:
            return
        yield np.ascontiguousarray(frame[..., ::-1])


def _encoded(target: Path, picture: np.ndarray) -> bytes:
    done, encoded = cv2.imencode(target.suffix.lower(), picture[..., ::-1])
    if not done:
        raise UserError(f"{target} cannot be encoded as {target.suffix}: give the input in another format")
    return encoded.tobytes()


def _state_of(file: Path) -> list:
    """What tells whether a file is still what it was."""
    with contextlib.suppress(OSError):
        stat = file.stat()
        return [str(file.absolute()), stat.st_size, stat.st_mtime_ns]
    return [str(file)]


class _Journal:
    """What has been found so far, a line for each file, so that an interrupted call can go on.

    Args:
        path: of the journal.
        settings: what the results depend on; a journal of others is begun anew.
    """

    def __init__(self, path: Path, settings: Any):
        self.path = path
        self.mark = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
        self.frames: dict[str, list[dict]] = {}

    def __enter__(self) -> "_Journal":
        with contextlib.suppress(OSError, ValueError, KeyError):
            lines = self.path.read_text().splitlines()
            if json.loads(lines[0]) == self.mark:
                for line in lines[1:]:
                    with contextlib.suppress(ValueError):  # cut off when the process was killed
                        entry = json.loads(line)
                        self.frames[entry["key"]] = entry["frames"]
        try:
            self._file = open(self.path, "w")
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._write(self.mark)
        for key, frames in self.frames.items():
            self._write({"key": key, "frames": frames})
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def has(self, file: Path) -> bool:
        return json.dumps(_state_of(file)) in self.frames

    def of(self, file: Path) -> list[dict]:
        return self.frames.get(json.dumps(_state_of(file)), [])

    def add(self, file: Path, frames: list[dict], keep: bool) -> None:
        """Notes what was found in ``file``; with ``keep`` for later calls too."""
        key = json.dumps(_state_of(file))
        self.frames[key] = frames
        if keep:
            self._write({"key": key, "frames": frames})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _write(self, content: Any) -> None:
        try:
            self._file.write(json.dumps(content) + "\n")
            self._file.flush()
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _coco(files: Sequence[Path], journal: _Journal, classes: Sequence[dict]) -> dict:
    root = common_folder(files)
    images: list[dict] = []
    videos: list[dict] = []
    annotations: list[dict] = []
    for file in files:
        name = file.absolute().relative_to(root).as_posix()
        frames = journal.of(file)
        if frames and is_video(file):
            videos.append({"id": len(videos) + 1, "name": name})
        for number, frame in enumerate(frames):
            image = {"id": len(images) + 1, "file_name": name, "height": frame["height"], "width": frame["width"]}
            if is_video(file):
                image |= {"video_id": len(videos), "frame_id": number}
            images.append(image)
            for found in frame["annotations"]:
                mask = found.get("segmentation")
                x, y, width, height = found["bbox"]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": classes[found["category_id"]]["id"],
                        "bbox": [x, y, width, height],
                        "score": found["score"],
                        "area": float(mask_utils.area(mask)) if mask else width * height,
                        "iscrowd": 0,
                        **({"segmentation": mask} if mask else {}),
                    }
                )
    content = {"images": images, "annotations": annotations, "categories": list(classes)}
    return content | ({"videos": videos} if videos else {})
