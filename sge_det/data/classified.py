"""Classified images: read by timm, ordered and augmented by (seed, epoch, image) alone."""

import random
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.utils import comm
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms import ToTensor

from ..errors import UserError
from .images import is_clipped

try:
    from timm.data.readers import create_reader
except ImportError as error:
    raise UserError("pretraining needs timm, which is missing: pip install timm") from error


class Images(Dataset):
    """Classified images as timm finds them. timm's own data set takes the next image for one that cannot be read.

    Args:
        option: what the path was given as, ``"train"`` or ``"val"``.
        path: a folder with a folder for each class, or a tar of it.

    Attributes:
        classes: their names, in the order of the labels.
        transform: from PIL's image to a tensor.

    Raises:
        UserError: there are no such images.
    """

    def __init__(self, option: str, path: str):
        self.option, self.path = option, path
        try:
            self.reader = create_reader("", root=path)
        except (OSError, RuntimeError, ValueError, AssertionError, tarfile.TarError) as error:
            raise UserError(f"--{option} {path} has no images in a folder for each class: {error}") from error
        if len(self.reader) == 0:
            raise UserError(f"--{option} {path} has no images in a folder for each class")
        # timm's names for it, of folders and of tars
        found = getattr(self.reader, "class_to_idx", None) or self.reader.class_name_to_idx
        self.classes = sorted(found, key=found.get)
        self.transform: Callable[[Image.Image], Tensor] = ToTensor()

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            file, label = self.reader[index]
            with file:
                image = Image.open(file)
                if is_clipped(image):
                    raise ValueError("its pixels have more than 8 bits")
                image = image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(
                f"--{self.option} {self.path}: {self.reader.filename(index)} cannot be read as an image ({error}): "
                "mend or remove it"
            ) from error
        return self.transform(image), label


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
        UserError: there are none, or the two differ in their classes.
    """
    train, val = Images("train", train_path), Images("val", val_path)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"--train {train_path} and --val {val_path} differ in their classes: {', '.join(odd[:5])}")
    return SeededImages(train, seed), val, train.classes
