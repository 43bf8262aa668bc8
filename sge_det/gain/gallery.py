"""The validation images on which two arms differ most: ground truth, reference and arm side by side."""

import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as mask_utils

from ..data.images import scaled_image
from ..errors import UserError
from .input import GroundTruth
from .measurement import Measurement

# Detections below this score are not drawn.
SCORE = 0.5
_PANEL = 380  # pixels, the longer side of each of the three
_GAP, _HEAD = 8, 26  # pixels
_MASK_ALPHA = 110  # of 255
_OBJECT, _HIT, _FALSE = "#009e73", "#0072b2", "#d55e00"
_FONT = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))  # comes with matplotlib


@dataclass(frozen=True)
class GalleryImage:
    """One picture of the gallery.

    Attributes:
        seed: of the detections that are drawn.
        reference, arm: AP50 of the image by seed, in points (0-100).
        place: the place of ``seed`` among them.
        png: the three panels.
    """

    file_name: str
    seed: int
    reference: list[float]
    arm: list[float]
    place: int
    png: bytes


def most_different(
    reference: Sequence[Mapping[int, float]], arm: Sequence[Mapping[int, float]], truth: GroundTruth, count: int
) -> list[tuple[int, int]]:
    """The images with objects whose AP50, mean over the seeds, differs most between an arm and the reference.

    Args:
        reference, arm: for each seed AP50 by image id.

    Returns:
        ``count`` pairs at most: the image's id, and the place of the seed that shows the difference most clearly.
    """
    pairs = list(zip(arm, reference, strict=True))
    with_objects = sorted({entry["image_id"] for entry in truth.annotations if not entry.get("iscrowd")})
    by_seed = {
        image: [ours[image] - theirs[image] for ours, theirs in pairs]
        for image in with_objects
        if all(image in ours and image in theirs for ours, theirs in pairs)
    }
    chosen = sorted(by_seed, key=lambda image: -abs(sum(by_seed[image])))[:count]
    return [
        (image, max(range(len(pairs)), key=lambda place: by_seed[image][place] * sum(by_seed[image])))
        for image in chosen
    ]


def gallery(
    measurement: Measurement,
    name: str,
    truth: GroundTruth,
    image_root: Path,
    files: Mapping[str, Sequence[str | Path]],
    count: int = 6,
) -> list[GalleryImage]:
    """Draws the images on which an arm differs most from the reference.

    Args:
        name: the arm.
        image_root: the folder of the validation images.
        files: the result files by arm, in the order of the seeds.
        count: pictures at most.

    Raises:
        UserError: an image cannot be read.
    """
    report = measurement.report
    arms = (report.reference, name)
    scores = measurement.image_scores[report.task]
    chosen = most_different(*(scores[arm] for arm in arms), truth, count)
    found = {
        (arm, place): _shown(truth.read_detections(files[arm][place]), [image for image, of in chosen if of == place])
        for arm in arms
        for place in {place for _, place in chosen}
    }
    pictures = []
    for image_id, place in chosen:
        info = truth.images[image_id]
        path = image_root / info["file_name"]
        try:
            photo = scaled_image(path).convert("RGB")
        except OSError as error:
            raise UserError(f"the image {path} cannot be read: {error}") from error
        draw = functools.partial(_panel, photo, size=(info["width"], info["height"]), masks="segm" in report.tasks)
        entries = truth.annotations_of(image_id)
        objects = [entry for entry in entries if not entry.get("iscrowd")]
        panels = [draw("ground truth", [_Mark(_OBJECT, truth.categories[e["category_id"]], e) for e in objects])]
        for arm in arms:
            shown = [entry for entry in found[arm, place] if entry["image_id"] == image_id]
            marks = [
                _Mark(_HIT if hit else _FALSE, f"{truth.categories[e['category_id']]} {e['score']:.2f}", e, not hit)
                for e, hit in zip(shown, hits(shown, entries))
            ]
            panels.append(draw(arm, marks))
        sheet = Image.new("RGB", (sum(p.width + _GAP for p in panels) - _GAP, panels[0].height), "white")
        for number, panel in enumerate(panels):
            sheet.paste(panel, (number * (panel.width + _GAP), 0))
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG", optimize=True)
        reference, own = ([by_image[image_id] * 100 for by_image in scores[arm]] for arm in arms)
        seed = report.seeds[place]
        pictures.append(GalleryImage(info["file_name"], seed, reference, own, place, buffer.getvalue()))
    return pictures


def _shown(detections: Sequence[dict], images: Sequence[int]) -> list[dict]:
    return [entry for entry in detections if entry["image_id"] in images and entry["score"] >= SCORE]


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


@dataclass(frozen=True)
class _Mark:
    """What is drawn of an object or a detection: an entry in COCO's format."""

    color: str
    label: str
    entry: dict
    dashed: bool = False


def _panel(
    photo: Image.Image, title: str, marks: Sequence[_Mark], *, size: tuple[int, int], masks: bool
) -> Image.Image:
    """A photo with its title, its boxes and its masks; ``size``: width and height that the marks are in."""
    scale = _PANEL / max(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.LANCZOS)
    if masks:
        for mark in marks:
            shape = Image.fromarray(_mask(mark.entry, *size) * _MASK_ALPHA).resize(photo.size)
            photo.paste(Image.new("RGB", photo.size, mark.color), mask=shape)
    draw = ImageDraw.Draw(photo)
    scale = photo.width / size[0]
    for mark in marks:
        x, y, width, height = (value * scale for value in mark.entry["bbox"])
        _box(draw, (x, y, x + width, y + height), mark.color, mark.dashed)
    taken: list[tuple[float, float, float, float]] = []
    for mark in sorted(marks, key=lambda mark: mark.entry["bbox"][2] * mark.entry["bbox"][3]):
        _label(draw, mark, [value * scale for value in mark.entry["bbox"]], photo.size, taken)
    panel = Image.new("RGB", (photo.width, photo.height + _HEAD), "white")
    panel.paste(photo, (0, _HEAD))
    ImageDraw.Draw(panel).text((0, 3), title, fill="black", font=_font(17))
    return panel


def _mask(entry: dict, width: int, height: int) -> np.ndarray:
    """The mask of an entry in COCO's format, uint8 (height, width); all 0 where it has none."""
    shape = entry.get("segmentation")
    if not shape:
        return np.zeros((height, width), np.uint8)
    if isinstance(shape, list):
        shape = mask_utils.merge(mask_utils.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        shape = mask_utils.frPyObjects(shape, height, width)
    return mask_utils.decode(shape)


def _label(draw: ImageDraw.ImageDraw, mark: _Mark, box: Sequence[float], size: tuple[int, int], taken: list) -> None:
    """Writes the label of a mark at a corner of its box, at the first where no other label is (``taken``)."""
    font = _font(14)
    left, top, right, bottom = draw.textbbox((0, 0), mark.label, font=font)
    width, height = right - left + 6, bottom - top + 5
    x, y, box_width, box_height = box
    corners = [
        (across, down)
        for down in (y - height, y, y + box_height - height, y + box_height)
        for across in (x, x + box_width - width)
    ]
    corners = [(min(max(across, 0), size[0] - width), min(max(down, 0), size[1] - height)) for across, down in corners]

    def is_free(corner: tuple[float, float]) -> bool:
        return not any(
            corner[0] < other[2]
            and other[0] < corner[0] + width
            and corner[1] < other[3]
            and other[1] < corner[1] + height
            for other in taken
        )

    x, y = next(filter(is_free, corners), corners[0])
    taken.append((x, y, x + width, y + height))
    draw.rectangle(taken[-1], fill=mark.color)
    draw.text((x + 3 - left, y + 2 - top), mark.label, fill="white", font=font)


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
