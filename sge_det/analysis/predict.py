"""Detections on images and videos: drawn, and as COCO-format JSON."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from pycocotools import mask as mask_utils
from tqdm import tqdm

from ..errors import UserError
from ..files import cannot_write, make_folder, publish_file, write_file, write_json
from ..modeling.gates import find_layer
from .figures import captioned, draw_detections, even, overlay
from .inputs import common_folder, is_video
from .predictor import Predictor, Unreadable, categories, gate_range, with_confidence

PREDICTIONS_FILE = "predictions.json"
_JOURNAL_FILE = ".predictions.jsonl"
# What Pillow writes in colour and without loss of quality by default; drawings of others become PNG.
_WRITTEN = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def output_files(files: Sequence[Path], output: Path) -> list[Path]:
    """Where the drawing of each file goes: ``output`` keeps the names, and the folders below the common one.

    Raises:
        UserError: a drawing would take the place of its input, or of another.
    """
    root = common_folder(files)
    drawn: dict[Path, Path] = {}
    for file in files:
        target = output / file.absolute().relative_to(root)
        suffix = ".mp4" if is_video(file) else ".png"
        kept = target.suffix.lower() == ".mp4" if is_video(file) else target.suffix.lower() in _WRITTEN
        target = target if kept else target.with_name(target.name + suffix)
        if target.resolve() == file.resolve():
            raise UserError(f"--output {output} would write over the input {file}: name another folder")
        if target in drawn:
            raise UserError(f"{drawn[target]} and {file} would both be drawn as {target}: give them in two calls")
        drawn[target] = file
    return list(drawn)


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
        cfg: from :func:`.predictor.setup_prediction`.
        files: from :func:`.inputs.find_files`.
        output: a folder.
        confidence: least score, 0-1.
        attention: draw the mean gate of an SGE layer beside the detections.
        stage, block: of that layer, as in :func:`.modeling.gates.find_layer`.

    Returns:
        the JSON's path, and the files that could not be read (in full), each with the reason. Where nothing could be
        read no JSON is written, and one that was there stays.

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
                    picture, instances = _drawn(draw, image)
                    found.add(image, instances)
                    write_file(target, _encoded(target, picture))
            except Unreadable as error:
                fault = str(error)
            if fault:
                faults[file] = fault
            if found.frames:
                journal.add(file, found.frames, keep=not fault)
        path = output / PREDICTIONS_FILE
        if any(journal.of(file) for file in files):
            write_json(path, _coco(files, journal, classes))
    journal.remove()
    return path, faults


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


def _drawn(draw: Callable, image: np.ndarray) -> tuple[np.ndarray, Instances]:
    """``draw(image)``; what an image's size or content does to the model must not end the other files' turn.

    Raises:
        Unreadable: it failed.
    """
    try:
        return draw(image)
    except (RuntimeError, MemoryError, ArithmeticError, cv2.error) as error:
        text = str(error).split("\n")[0] or type(error).__name__
        raise Unreadable(f"the model cannot take it ({image.shape[1]}x{image.shape[0]}): {text}") from error


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
        publish_file(part, target)
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
        known = [self.mark, *({"key": key, "frames": frames} for key, frames in self.frames.items())]
        # whole at once: being killed here must not lose what was found before
        write_file(self.path, "".join(json.dumps(line) + "\n" for line in known))
        try:
            self._file = open(self.path, "a")
        except OSError as error:
            raise cannot_write(self.path, error) from error
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
