"""Image files as people have them: what Detectron2's reader would spoil without a word, or fail on, is found before."""

import functools
import io
import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler
from PIL import Image
from tqdm import tqdm

# The longer side over the shorter: resized to the usual 1333 pixels, nothing is left of what is thinner.
_MOST_ASPECT = 200
_MOST_THREADS = 8
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
# Before the path of a file that Detectron2's readers are to get scaled to 8 bits.
_SCALED = "sge-scaled://"


def image_fault(
    file: str | os.PathLike[str],
    size: Sequence[int] | None = None,
    *,
    decode: bool = False,
    pixel_range: Sequence[float] = (),
) -> str | None:
    """What is wrong with an image file, if anything: what follows "the image F" in a sentence.

    Args:
        size: the height and width that it must have, turned as EXIF says.
        decode: read its pixels as well, not its head alone.
        pixel_range: ``INPUT.PIXEL_RANGE``, without which pixels of more than 8 bits cannot be used.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            return "cannot be read: it is no regular file"
        if not os.path.getsize(file):
            return "cannot be read: it is empty"
        with warnings.catch_warnings():
            # between Pillow's two bounds an image is large, and no bomb
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                fault = _head_fault(image, size, pixel_range)
                if fault is None and decode:
                    _pixels(file, image) if pixel_range and _is_deep(image) else image.load()
                return fault and f"cannot be used: {fault}"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return f"cannot be read: {str(error).splitlines()[0][:300] if str(error) else type(error).__name__}"


def _head_fault(image: Image.Image, size: Sequence[int] | None, pixel_range: Sequence[float]) -> str | None:
    if is_clipped(image) and not pixel_range:
        return (
            f"its pixels have more than 8 bits (Pillow's mode {image.mode}), of which reading would leave 0 or 255: "
            "set INPUT.PIXEL_RANGE (LOW, HIGH), the values that are to become 0 and 255"
        )
    width, height = image.size
    if max(width, height) > _MOST_ASPECT * min(width, height):
        return f"it is {width}x{height}, too thin to be resized: cut it into pieces"
    if size is None:
        return None
    is_turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED
    if is_turned:
        width, height = height, width
    if (height, width) != tuple(size):
        how = ", as its EXIF orientation turns it" if is_turned else ""
        return f"it is {width}x{height}{how}, its annotations say {size[1]}x{size[0]} (width x height)"
    return None


def is_clipped(image: Image.Image) -> bool:
    """Whether pixels have more than 8 bits, of which Pillow's conversion would leave 0 or 255."""
    return image.mode.startswith("I") or image.mode == "F"


def _is_deep(image: Image.Image) -> bool:
    """Whether pixels have more than 8 bits, in colours too, of which Pillow takes the upper 8."""
    return is_clipped(image) or any(";16" in str(tile[3]) for tile in image.tile)


def _pixels(file: str | os.PathLike[str], image: Image.Image) -> np.ndarray:
    """The values of a deep image as they are, (H, W) or (H, W, 3) in RGB, float64.

    Raises:
        OSError: they cannot be read, or some are no numbers.
    """
    if is_clipped(image):
        values = np.asarray(image).astype(np.float64)
    else:
        found = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_UNCHANGED)
        if found is None or found.ndim != 3:
            raise OSError("its colours of more than 8 bits cannot be read")
        values = found[..., 2::-1].astype(np.float64)
    if np.isnan(values).any():
        raise OSError("some of its pixels are no numbers (NaN)")
    return values


def scaled_image(file: str | os.PathLike[str], pixel_range: Sequence[float] = ()) -> Image.Image:
    """An image whose deep pixels are scaled to 8 bits: the lower value to 0, the upper to 255, and what is beyond to
    these. One of 8 bits is left as it is.

    Args:
        pixel_range: the two values; by default the least and the largest of the image, for pictures of it.

    Raises:
        OSError: it cannot be read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(file)
    if not _is_deep(image):
        return image
    values = _pixels(file, image)
    low, high = pixel_range or (values.min(), values.max())
    shares = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    scaled = Image.fromarray(np.rint(255 * shares).astype(np.uint8))
    scaled.getexif()[_EXIF_ORIENTATION] = image.getexif().get(_EXIF_ORIENTATION, 1)
    return scaled


def readable(file: str | os.PathLike[str], pixel_range: Sequence[float]) -> str:
    """The name by which Detectron2's readers get an image in 8 bits: the file's, or one by which it is scaled.

    Raises:
        OSError: it cannot be read.
    """
    if not pixel_range:
        return str(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            low, high = pixel_range
            return f"{_SCALED}{low!r},{high!r}/{os.path.abspath(file)}" if _is_deep(image) else str(file)


class _ScaledImages(PathHandler):
    """Gives a deep image as a PNG of 8 bits."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_SCALED]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **_) -> io.BytesIO:
        values, _, file = path.removeprefix(_SCALED).partition("/")
        scaled = scaled_image(file, [float(value) for value in values.split(",")])
        content = io.BytesIO()
        scaled.save(content, "PNG", compress_level=0, exif=scaled.getexif())
        content.seek(0)
        return content


PathManager.register_handler(_ScaledImages(), allow_override=True)


def image_faults(
    images: Sequence[dict], folder: str, most: int | None = None, *, pixel_range: Sequence[float] = ()
) -> list[tuple[str, str]]:
    """The (file, fault) of those of COCO's ``images`` that cannot be used.

    Args:
        folder: to which their file names are relative.
        most: look at so many of them, evenly spaced, and not at all, which shows its progress.
        pixel_range: as in :func:`image_fault`.
    """
    if most is not None and len(images) > most:
        images = [images[place * len(images) // most] for place in range(most)]
    files = [str(Path(folder, image["file_name"])) for image in images]
    sizes = [(image["height"], image["width"]) for image in images]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        look = functools.partial(image_fault, decode=True, pixel_range=pixel_range)
        found = pool.map(look, files, sizes)
        told = tqdm(found, total=len(files), desc="opening images", unit="image", disable=most is not None)
        return [(file, fault) for file, fault in zip(files, told, strict=True) if fault]
