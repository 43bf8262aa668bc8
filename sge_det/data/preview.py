"""A contact sheet of a COCO set: its first images in a grid, with their masks, boxes and names."""

import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as mask_utils

from ..errors import UserError
from ..files import write_file

_TILE, _GAP = 300, 6  # Mean width of the images on the contact sheet and the space between them, in pixels.
_TILE_COLORS = [(255, 92, 80), (70, 160, 255), (255, 200, 40), (90, 220, 110), (200, 120, 255), (60, 220, 220)]
_INK = (34, 32, 38)

Color = tuple[int, ...]


def contact_sheet(
    image_dir: str | os.PathLike[str],
    annotation_file: str | os.PathLike[str],
    output_png: str | os.PathLike[str],
    rows: int = 4,
    cols: int = 6,
) -> None:
    """Draws the first images of a COCO set in a grid, with their masks, boxes and category names.

    Args:
        image_dir: The folder of the images.
        annotation_file: COCO annotations of these images.
        output_png: The PNG file to write.
        rows: Rows of the grid; fewer are drawn where the images do not fill them.
        cols: Columns of the grid.

    Raises:
        UserError: If a file cannot be read or written.
    """
    try:
        content = json.loads(Path(annotation_file).read_text())
        images = content["images"][: rows * cols]
        names = {category["id"]: category["name"] for category in content["categories"]}
        used = sorted({annotation["category_id"] for annotation in content["annotations"]})
        colors = dict(zip(used, itertools.cycle(_TILE_COLORS)))
        by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
        for annotation in content["annotations"]:
            by_image.get(annotation["image_id"], []).append(annotation)
        lines = []
        for first in range(0, len(images), cols):
            row = images[first : first + cols]
            # All images of a row have one height, at which the row is as wide as the sheet.
            aspects = sum(image["width"] / image["height"] for image in row) * cols / len(row)
            height = cols * _TILE / aspects
            lines.append(
                [_tile(Path(image_dir) / i["file_name"], height, by_image[i["id"]], names, colors) for i in row]
            )
        width = max(sum(tile.width + _GAP for tile in line) for line in lines) - _GAP
        sheet = Image.new("RGB", (width, sum(line[0].height + _GAP for line in lines) - _GAP), (255, 255, 255))
        y = 0
        for line in lines:
            x = 0
            for tile in line:
                sheet.paste(tile, (x, y))
                x += tile.width + _GAP
            y += line[0].height + _GAP
        content = io.BytesIO()
        sheet.save(content, format="PNG")
        write_file(Path(output_png), content.getvalue())
    except OSError as error:
        raise UserError(f"The preview {output_png} cannot be made: {error.strerror or error}.") from error


def _tile(
    path: Path, height: float, annotations: list[dict[str, Any]], names: dict[int, str], colors: dict[int, Color]
) -> Image.Image:
    """An image, height pixels high, with its annotations on it."""
    image = Image.open(path).convert("RGB")
    scale = 2 * round(height) / image.height  # Drawn at twice the size, then reduced.
    tile = image.resize((2 * round(image.width * scale / 2), 2 * round(height)), Image.Resampling.LANCZOS)
    # The large ones first, so that the marks of the small ones stay on top.
    annotations = sorted(annotations, key=lambda a: -a["area"])
    for annotation in annotations:
        mask = _mask_image(annotation["segmentation"], tile.size, scale)
        outline = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(5)))
        color = colors[annotation["category_id"]]
        tile.paste(color, mask=mask.point(lambda value: 0.12 * value))
        tile.paste(color, mask=outline)
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(size=20)
    for annotation in annotations:
        color = colors[annotation["category_id"]]
        x, y, w, h = (scale * value for value in annotation["bbox"])
        draw.rectangle((x, y, min(x + w, tile.width - 1), min(y + h, tile.height - 1)), outline=color, width=3)
        label = names[annotation["category_id"]] + (" crowd" if annotation["iscrowd"] else "")
        _, _, text_width, text_height = draw.textbbox((0, 0), label, font=font)
        if text_width > 2 * w:
            continue  # A label would hide more than it says; the color tells the kind.
        x, y = max(0, min(x, tile.width - text_width - 8)), max(0, y - text_height - 6)
        draw.rectangle((x, y, x + text_width + 8, y + text_height + 6), fill=color)
        draw.text((x + 4, y + 2), label, fill=_INK, font=font)
    return tile.reduce(2)


def _mask_image(segmentation: Any, size: tuple[int, int], scale: float) -> Image.Image:
    """A COCO segmentation, scaled, as an "L" image of 0 and 255."""
    if isinstance(segmentation, list):
        mask = Image.new("L", size)
        draw = ImageDraw.Draw(mask)
        for polygon in segmentation:
            draw.polygon([scale * value for value in polygon], fill=255)
        return mask
    if isinstance(segmentation["counts"], list):
        segmentation = mask_utils.frPyObjects(segmentation, *segmentation["size"])
    decoded = Image.fromarray(255 * mask_utils.decode(segmentation))
    return decoded.resize(size, Image.Resampling.BICUBIC).point(lambda value: 255 * (value > 127))
