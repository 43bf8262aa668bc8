"""Classified images: read by timm, ordered and augmented by (seed, epoch, image) alone."""

import contextlib
import hashlib
import logging
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import ToTensor

from ..errors import UserError, shortage
from .images import is_clipped

try:
    from timm.data.readers import create_reader
    from timm.data.readers.img_extensions import add_img_extensions, get_img_extensions, set_img_extensions
    from timm.utils.misc import natural_key
except ImportError as error:
    raise UserError("pretraining needs timm, which is missing: pip install timm") from error

logger = logging.getLogger(__name__)

# What torchvision's ImageFolder takes and timm would leave out without a word, and with it a class of such files.
_MORE_KINDS = (".bmp", ".pgm", ".ppm", ".tif", ".tiff", ".webp")


class Images(Dataset):
    """Classified images as timm finds them, in an order of their names alone. timm's own data set takes the next image
    for one that cannot be read.

    Args:
        option: what the path was given as, ``"train"`` or ``"val"``.
        path: a folder with a folder for each class, or a tar of it.

    Attributes:
        classes: their names, in the order of the labels.
        digest: of the images' names, their classes' folders among them, in their order.
        transform: from PIL's image to a tensor.

    Raises:
        UserError: there are no such images, or some are in no class's folder.
    """

    def __init__(self, option: str, path: str):
        self.option, self.path = option, path
        if Path(path).is_file() and Path(path).suffix != ".tar":
            raise UserError(f"--{option} {path} is no folder and no .tar: unpack it, or make a tar without compression")
        try:
            with _more_kinds():
                self.reader = create_reader("", root=path)
        except (OSError, RuntimeError, tarfile.TarError) as error:
            raise UserError(f"--{option} {path} has no images in a folder for each class: {error}") from error
        except (ValueError, AssertionError) as error:  # of a tar without any
            raise UserError(f"--{option} {path} has no images in a folder for each class") from error
        files = [self.reader.filename(index, absolute=True) for index in range(len(self.reader))]
        # timm leaves names that differ in nothing but case or zeros (A and a, 1 and 01) in an order of chance
        self._order = sorted(range(len(files)), key=lambda index: (natural_key(files[index]), files[index]))
        # timm's names for it, of folders and of tars
        found = getattr(self.reader, "class_to_idx", None) or self.reader.class_name_to_idx
        self.classes = sorted(found, key=lambda name: (natural_key(name), name))
        self._labels = {found[name]: label for label, name in enumerate(self.classes)}
        if {"", "."} & found.keys():
            stray = next(name for name in map(self.name, range(len(self))) if os.path.dirname(name) in ("", "."))
            raise UserError(f"--{option} {path}: {stray} is in no class's folder: move it into one, or away")
        names = "\n".join(files[index].removeprefix(path).lstrip("/") for index in self._order)
        self.digest = hashlib.sha256(os.fsencode(names)).hexdigest()
        self.transform: Callable[[Image.Image], Tensor] = ToTensor()

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        """The image's file, as seen from the folder or in the tar."""
        return self.reader.filename(self._order[index])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            file, label = self.reader[self._order[index]]
            with file:
                image = Image.open(file)
                if is_clipped(image):
                    raise ValueError("its pixels have more than 8 bits")
                image = image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
            if shortage(error):
                raise
            raise UserError(
                f"--{self.option} {self.path}: {self.name(index)} cannot be read as an image ({error}): "
                "mend or remove it"
            ) from error
        return self.transform(image), self._labels[int(label)]


@contextlib.contextmanager
def _more_kinds() -> Iterator[None]:
    """Within, timm takes more kinds of files for images."""
    before = get_img_extensions()
    add_img_extensions(_MORE_KINDS)
    try:
        yield
    finally:
        set_img_extensions(before)


class SeededImages(Dataset):
    """Images whose augmentations depend on (seed, epoch, image) alone.

    Args:
        images: with their transform.
        seed: of the run.
    """

    def __init__(self, images: Images, seed: int):
        self.images = images
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = place
        state = np.random.SeedSequence((self.seed, epoch, index)).generate_state(3)
        random.seed(int(state[0]))
        np.random.seed(state[1])
        torch.manual_seed(int(state[2]))
        return self.images[index]


class EpochSampler(Sampler):
    """This process's images of an epoch, as (epoch, image), from a step on.

    Args:
        count: images in the set.
        batch: images of a step in all processes; what does not fill one is left out.
        seed: of the run; with the epoch, of the order.
    """

    def __init__(self, count: int, batch: int, seed: int):
        self.count, self.batch, self.seed = count, batch, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        steps = order[: len(self) * comm.get_world_size()].reshape(-1, self.batch)[self.start :]
        own = steps[:, comm.get_rank() :: comm.get_world_size()]
        return ((self.epoch, int(index)) for index in own.reshape(-1))

    def __len__(self) -> int:
        return self.count // self.batch * self.batch // comm.get_world_size()


def load_sets(train_path: str, val_path: str, seed: int) -> tuple[SeededImages, Images, list[str]]:
    """The training images, the validation images and the names of their classes.

    Args:
        train_path, val_path: as :class:`Images` takes them.
        seed: of the augmentations.

    Raises:
        UserError: there are none, or of one class alone; the two differ in their classes; or one holds the other.
    """
    places = {"train": Path(train_path), "val": Path(val_path)}
    for inner, outer in (("train", "val"), ("val", "train")):
        if places[outer].resolve() in places[inner].resolve().parents:
            raise UserError(
                f"--{inner} {places[inner]} lies in --{outer} {places[outer]}, which so holds the images of both: give "
                "folders of which none lies in the other"
            )
    train, val = Images("train", train_path), Images("val", val_path)
    if train.classes != val.classes:
        odd = [f"{name} has images in --train alone" for name in train.classes if name not in val.classes]
        odd += [f"{name} has images in --val alone" for name in val.classes if name not in train.classes]
        raise UserError(
            f"--train {train_path} and --val {val_path} differ in their classes: {', '.join(odd[:5])}; give both the "
            "same"
        )
    if len(train.classes) < 2:
        raise UserError(
            f"--train {train_path} has images of one class alone, {train.classes[0]}: give a folder with a folder for "
            "each of two classes at least"
        )
    if places["train"].resolve() == places["val"].resolve():
        logger.warning(f"--train and --val are the same images, {train_path}: top-1 is of what was learnt by heart")
    return SeededImages(train, seed), val, train.classes
