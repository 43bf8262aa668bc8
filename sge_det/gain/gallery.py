"""The validation images on which two arms differ most: ground truth, reference and arm side by side."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_utils

from ..errors import UserError
from .statistics import GroundTruth, Measurement

# Detections below this score are not drawn.
SCORE = 0.5
_PANEL = 380  # pixels, the longer side of each of the three
_GAP, _HEAD = 8, 26  # pixels
_OBJECT, _HIT, _FALSE = "#009e73", "#0072b2", "#d55e00"
_FONT = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))  # comes with matplotlib


@dataclass(frozen=True)
class GalleryImage:
    """One picture of the gallery.

    Attributes:
        reference, arm: AP50 of the image in points (0-100), mean over the seeds.
        png: the three panels.
    """

    file_name: str
    reference: float
    arm: float
    png: bytes


def most_different(measurement: Measurement, task: str, name: str, truth: GroundTruth, count: int) -> list[int]:
    """The ids of the ``count`` images with objects on which the AP50 of an arm differs most from the reference's."""
    reference = measurement.image_scores[task][measurement.report["reference"]]
    arm = measurement.image_scores[task][name]
    with_objects = {entry["image_id"] for entry in truth.annotations if not entry.get("iscrowd")}
    images = [image for image in sorted(with_objects) if image in arm and image in reference]
    return sorted(images, key=lambda image: -abs(arm[image] - reference[image]))[:count]


def gallery(
    measurement: Measurement,
    name: str,
    truth: GroundTruth,
    image_root: Path,
    detections: tuple[Sequence[dict], Sequence[dict]],
    count: int = 6,
) -> list[GalleryImage]:
    """Draws the images on which an arm differs most from the reference.

    Args:
        name: the arm.
        image_root: the folder of the validation images.
        detections: of the reference and of the arm, of one seed.
        count: pictures at most.

    Raises:
        UserError: an image cannot be read.
    """
    report = measurement.report
    task = report["tasks"][0]
    pictures = []
    for image_id in most_different(measurement, task, name, truth, count):
        info = truth.images[image_id]
        path = image_root / info["file_name"]
        try:
            photo = Image.open(path).convert("RGB")
        except OSError as error:
            raise UserError(f"the image {path} cannot be read: {error}") from error
        scale = _PANEL / max(photo.size)
        photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
        entries = truth.annotations_of(image_id)
        marks = [
            (_OBJECT, False, truth.categories[entry["category_id"]], entry)
            for entry in entries
            if not entry.get("iscrowd")
        ]
        panels = [_panel(photo, "ground truth", marks, scale)]
        for title, found in zip((report["reference"], name), detections):
            shown = [entry for entry in found if entry["image_id"] == image_id and entry["score"] >= SCORE]
            marks = []
            for entry, hit in zip(shown, hits(shown, entries)):
                label = f"{truth.categories[entry['category_id']]} {entry['score']:.2f}"
                marks.append((_HIT if hit else _FALSE, not hit, label, entry))
            panels.append(_panel(photo, title, marks, scale))
        sheet = Image.new("RGB", (sum(p.width + _GAP for p in panels) - _GAP, panels[0].height), "white")
        for place, panel in enumerate(panels):
            sheet.paste(panel, (place * (panel.width + _GAP), 0))
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        scores = [measurement.image_scores[task][arm][image_id] * 100 for arm in (report["reference"], name)]
        pictures.append(GalleryImage(info["file_name"], *scores, buffer.getvalue()))
    return pictures


def hits(detections: Sequence[dict], objects: Sequence[dict]) -> list[bool]:
    """Whether each detection of an image meets an object of its category with a box IoU of at least 0.5.

    As in COCO each object is met once, by the detection with the highest score; a detection in a crowd region counts
    as met.
    """
    result = [False] * len(detections)
    taken = set()
    crowds = [int(bool(entry.get("iscrowd"))) for entry in objects]
    for place in sorted(range(len(detections)), key=lambda place: -detections[place]["score"]):
        detection = detections[place]
        if not objects:
            break
        overlaps = mask_utils.iou([detection["bbox"]], [entry["bbox"] for entry in objects], crowds)[0]
        fits = [
            number
            for number, entry in enumerate(objects)
            if entry["category_id"] == detection["category_id"] and overlaps[number] >= 0.5 and number not in taken
        ]
        if fits:
            best = max(fits, key=lambda number: (not crowds[number], overlaps[number]))
            result[place] = True
            if not crowds[best]:
                taken.add(best)
    return result


def _panel(photo: Image.Image, title: str, marks: Sequence[tuple[str, bool, str, dict]], scale: float) -> Image.Image:
    """A photo with its title and its boxes: (colour, dashed, label, entry in COCO's format)."""
    panel = Image.new("RGB", (photo.width, photo.height + _HEAD), "white")
    photo = photo.copy()
    draw = ImageDraw.Draw(photo)
    font = _font(14)
    for color, dashed, _, entry in marks:
        x, y, width, height = (value * scale for value in entry["bbox"])
        _box(draw, (x, y, x + width, y + height), color, dashed)
    for color, _, label, entry in marks:
        x, y = entry["bbox"][0] * scale, entry["bbox"][1] * scale
        left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
        width, height = right - left + 6, bottom - top + 5
        x = min(max(x, 0), photo.width - width)
        y = y - height if y >= height else y
        draw.rectangle((x, y, x + width, y + height), fill=color)
        draw.text((x + 3 - left, y + 2 - top), label, fill="white", font=font)
    panel.paste(photo, (0, _HEAD))
    ImageDraw.Draw(panel).text((0, 3), title, fill="black", font=_font(17))
    return panel


def _box(draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], color: str, dashed: bool) -> None:
    x0, y0, x1, y1 = corners
    if not dashed:
        draw.rectangle(corners, outline=color, width=3)
        return
    for start, end in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
        length = float(np.hypot(end[0] - start[0], end[1] - start[1]))
        steps = np.arange(0, length, 12) / max(length, 1e-6)
        for step in steps:
            stop = min(step + 7 / max(length, 1e-6), 1)
            points = [tuple(np.array(start) + (np.array(end) - start) * at) for at in (step, stop)]
            draw.line(points, fill=color, width=3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_FONT, size)
