"""Image files as people have them: what Detectron2's reader would spoil without a word, or fail on, is found before."""

import os
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

# The longer side over the shorter: resized to the usual 1333 pixels, nothing is left of what is thinner.
_MOST_ASPECT = 200
_MOST_THREADS = 8
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


def image_fault(file: str | os.PathLike[str], size: Sequence[int] | None = None, *, decode: bool = False) -> str | None:
    """What is wrong with an image file, if anything: what follows "the image F" in a sentence.

    Args:
        size: the height and width that it must have, turned as EXIF says.
        decode: read its pixels as well, not its head alone.
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
                fault = _head_fault(image, size)
                if fault is None and decode:
                    image.load()
                return fault and f"cannot be used: {fault}"
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return f"cannot be read: {str(error).splitlines()[0][:300] if str(error) else type(error).__name__}"


def _head_fault(image: Image.Image, size: Sequence[int] | None) -> str | None:
    if image.mode.startswith("I") or image.mode == "F":
        return (
            f"its pixels have more than 8 bits (Pillow's mode {image.mode}), of which reading would leave 0 or 255: "
            "scale it to 8 bits"
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


def image_faults(images: Sequence[dict], folder: str, most: int | None = None) -> list[tuple[str, str]]:
    """The (file, fault) of those of COCO's ``images`` that cannot be used.

    Args:
        folder: to which their file names are relative.
        most: look at so many of them, evenly spaced, and not at all, which shows its progress.
    """
    if most is not None and len(images) > most:
        images = [images[place * len(images) // most] for place in range(most)]
    files = [str(Path(folder, image["file_name"])) for image in images]
    sizes = [(image["height"], image["width"]) for image in images]
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file, size: image_fault(file, size, decode=True), files, sizes)
        told = tqdm(found, total=len(files), desc="opening images", unit="image", disable=most is not None)
        return [(file, fault) for file, fault in zip(files, told, strict=True) if fault]
