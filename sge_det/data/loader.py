"""Loaders: a training order that depends on the seed alone, and errors that name the image."""

import atexit
import contextlib
import functools
import itertools
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from PIL import Image

from ..errors import Resumable, UserError
from .datasets import check_masks
from .images import image_fault, readable

# Images after which a mapper that passes all of them over is told.
_MOST_PASSED_OVER = 1000
_open_iterators: list[Iterator] = []
# What the doctor loaded and the training loader will want: reading COCO twice takes as long again.
_kept: list[tuple[Any, list[dict]]] = []


def build_train_loader(cfg: CfgNode, seed: int, *, keep: bool = False) -> "ReplayableLoader":
    """The training loader of ``cfg``, with the order and the augmentations that ``seed`` determines.

    Args:
        keep: hold what was read of the data sets for the next loader of them.

    Raises:
        UserError: there is nothing to train on, or the batch cannot be divided among the processes.
    """
    dicts = _training_dicts(cfg, keep=keep)
    if cfg.MODEL.MASK_ON:
        entries = ((f"an object in {d['file_name']}", entry) for d in dicts for entry in d.get("annotations", ()))
        check_masks(cfg, entries, are_trained=True)
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name == "TrainingSampler":
        sampler = TrainingSampler(len(dicts), seed=seed)
    elif name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dicts, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        sampler = RepeatFactorTrainingSampler(factors, seed=seed)
    else:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN {name} is not supported: set TrainingSampler or RepeatFactorTrainingSampler"
        )
    return seeded_loader(
        dicts,
        build_mapper(cfg, is_train=True),
        sampler,
        seed,
        cfg.SOLVER.IMS_PER_BATCH,
        by_aspect=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        timeout=cfg.DATALOADER.get("TIMEOUT", 0),
    )


def seeded_loader(
    dicts: list[dict],
    mapper: Callable[[dict], dict],
    sampler: Iterable[int],
    seed: int,
    batch_size: int,
    *,
    by_aspect: bool = True,
    num_workers: int = 0,
    timeout: int = 0,
) -> "ReplayableLoader":
    """A training loader, with the order of ``sampler`` and the augmentations that ``seed`` determines.

    Args:
        dicts: the images in Detectron2's format.
        mapper: from such a dict to an example.
        sampler: yields indices of ``dicts`` without end, this process's share of them.
        batch_size: of all processes together.
        by_aspect: batches hold images that are wide, or images that are not.
        num_workers, timeout: as in :class:`ReplayableLoader`.

    Raises:
        UserError: the batch cannot be divided among the processes.
    """
    world = comm.get_world_size()
    if batch_size < 1 or batch_size % world:
        raise UserError(f"SOLVER.IMS_PER_BATCH {batch_size} is not a multiple of the {world} processes")
    return ReplayableLoader(
        _SeededDataset(DatasetFromList(dicts, copy=False), mapper, seed),
        sampler,
        batch_size // world,
        wide=[_is_wide(d) for d in dicts] if by_aspect else None,
        num_workers=num_workers,
        timeout=timeout,
    )


def _training_dicts(cfg: CfgNode, *, keep: bool) -> list[dict]:
    names = cfg.DATASETS.TRAIN
    arguments = {
        "filter_empty": cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "min_keypoints": cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
        "proposal_files": proposal_files(cfg),
    }
    # a name that is registered anew has another function
    key = (*((name, DatasetCatalog[name]) for name in names), *arguments.values())
    held = [dicts for own, dicts in _kept if own == key]
    _kept.clear()
    if held:
        dicts = held[0]
        classes = MetadataCatalog.get(names[0]).get("thing_classes")
        if classes and not keep and all("annotations" in entry for entry in dicts):
            print_instances_class_histogram(dicts, classes)  # which the doctor had read before there was a log
    else:
        try:
            dicts = get_detection_dataset_dicts(names, **arguments)
        except AssertionError as error:
            raise UserError(
                f"DATASETS.TRAIN {names} cannot be trained on: {error or 'no image has an object'}"
            ) from error
    if not isinstance(dicts, list):
        raise UserError(
            f"{names[0]} is registered as a {type(dicts).__name__}: its function must return a list of dicts"
        )
    if keep:
        _kept.append((key, dicts))
    return dicts


def proposal_files(cfg: CfgNode, split: str = "TRAIN") -> tuple[str, ...] | None:
    """The files of precomputed proposals of the data sets; None for a model that makes its own.

    Args:
        split: "TRAIN" or "TEST".

    Raises:
        UserError: there is not one for each set, or one cannot be found.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return None
    key = f"DATASETS.PROPOSAL_FILES_{split}"
    files, names = tuple(cfg.DATASETS[f"PROPOSAL_FILES_{split}"]), cfg.DATASETS[split]
    if len(files) != len(names):
        kind = "training" if split == "TRAIN" else "test"
        raise UserError(
            f"MODEL.LOAD_PROPOSALS is on, and {key} names {len(files)} files for {len(names)} {kind} sets: give one "
            "for each"
        )
    for file in files:
        if "://" not in file and not Path(file).is_file():
            raise UserError(f"{key} names {file}, which does not exist")
    return files


def _is_wide(example: dict) -> bool:
    """Whether an image is wider than high; read from its file where the data set does not say."""
    if "width" in example and "height" in example:
        return example["width"] > example["height"]
    try:
        with Image.open(example["file_name"]) as image:
            width, height = image.size
            # the orientations that Detectron2's reader turns by a quarter
            return width < height if image.getexif().get(274, 1) >= 5 else width > height
    except OSError as error:
        raise UserError(f"the image {example['file_name']} cannot be read: {error}") from error


class ReplayableLoader:
    """An endless loader of batches that depend on nothing but the seed and the batch's number.

    Neither the model, nor the number of workers, nor an interruption changes them: set ``start`` to the number of
    batches already used and it goes on with the next one.

    Args:
        dataset: maps (position, index) to an example.
        sampler: yields indices without end, the same at each iteration over it.
        batch_size: examples in a batch of this process.
        wide: for each index, whether the image is wider than high; batches then hold images of one kind. None: mixed.
        num_workers: processes that load; 0 loads in this one.
        timeout: seconds after which a batch that they do not give is an error; 0 waits for ever.
    """

    def __init__(
        self,
        dataset,
        sampler,
        batch_size: int,
        *,
        wide: Sequence[bool] | None = None,
        num_workers: int = 0,
        timeout: int = 0,
    ):
        self.dataset = dataset
        self.sampler = sampler
        self.batch_size = batch_size
        self.wide = wide
        self.num_workers = num_workers
        self.timeout = timeout
        self.start = 0

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Yields batches as lists of (position in the stream, index in the data set), from ``start`` on."""
        return itertools.islice(self._all_batches(), self.start, None)

    def _all_batches(self) -> Iterator[list[tuple[int, int]]]:
        rank, world = comm.get_rank(), comm.get_world_size()
        waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for count, index in enumerate(self.sampler):
            batch = waiting[self.wide is not None and self.wide[index]]
            batch.append((count * world + rank, index))
            if len(batch) == self.batch_size:
                yield batch.copy()
                batch.clear()

    def __iter__(self) -> Iterator[list[dict]]:
        loader = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=_Batches(self),
            num_workers=self.num_workers,
            collate_fn=list,
            # else the loader's start would draw from the generator that the heads sample with
            generator=torch.Generator(),
            worker_init_fn=leave_signals_to_parent,
        )
        yield from with_plain_errors(loader, self.timeout)


def leave_signals_to_parent(worker: int) -> None:
    """A worker whose whole group is signalled goes on until the step ends; without its parent it ends by itself."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_IGN)


def with_plain_errors(loader: torch.utils.data.DataLoader, timeout: float = 0) -> Iterator[Any]:
    """The batches of a loader, whose workers' errors arrive as they were and who ends with them."""
    iterator = iter(loader)
    _open_iterators.append(iterator)
    try:
        while True:
            with _limited(iterator, timeout):
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                except (ConnectionError, EOFError, pickle.UnpicklingError) as error:
                    if lost := _lost_worker(iterator):
                        raise lost from error
                    raise
            yield batch
    except UserError as error:
        # a worker's error arrives with its traceback as its text
        kind = Resumable if isinstance(error, Resumable) else UserError
        raise kind(str(error).rsplit(f"{kind.__name__}: ", 1)[-1].strip()) from None
    finally:
        if iterator in _open_iterators:
            _open_iterators.remove(iterator)
        _end_workers(iterator)


def _lost_worker(iterator: Iterator) -> RuntimeError | None:
    """The loader's own error for a worker that was killed in the middle of handing over a batch."""
    for worker in getattr(iterator, "_workers", []):
        worker.join(timeout=1)  # its sockets close a moment before it counts as ended
        if worker.exitcode:
            how = signal.Signals(-worker.exitcode).name if worker.exitcode < 0 else f"exit code {worker.exitcode}"
            return RuntimeError(f"DataLoader worker (pid {worker.pid}) ended by {how} while it handed over a batch")
    return None


@contextlib.contextmanager
def _limited(iterator: Iterator, seconds: float) -> Iterator[None]:
    """Ends the workers where the block takes longer, which then raises.

    The loader's own limit does not hold once a worker has announced a batch that it does not hand over.
    """
    workers = getattr(iterator, "_workers", [])
    if not workers or not seconds:
        yield
        return
    is_late = threading.Event()

    def end() -> None:
        is_late.set()
        for worker in workers:
            worker.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if is_late.is_set():
            raise RuntimeError(f"DataLoader timed out after {seconds} seconds") from error
        raise
    finally:
        timer.cancel()


def _end_workers(iterator: Iterator) -> None:
    """Ends the workers, those too that are stopped, which this process would wait for at its own end."""
    workers = getattr(iterator, "_workers", [])
    if workers:
        iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


@atexit.register
def _end_all_workers() -> None:
    """Before multiprocessing waits for workers that heed no SIGTERM; an error keeps loaders from their own end."""
    while _open_iterators:
        _end_workers(_open_iterators.pop())


def build_test_loader(cfg: CfgNode, name: str, *, alone: bool = False) -> "EvaluationLoader":
    """Detectron2's loader of a test set, which tells of an image that cannot be read as :func:`map_image` does.

    Args:
        alone: this process gets all images; otherwise its share of them.
    """
    mapper = functools.partial(map_image, build_mapper(cfg, is_train=False))
    sampler = {"sampler": range(len(DatasetCatalog.get(name)))} if alone else {}
    loader = build_detection_test_loader(cfg, name, mapper=mapper, **sampler)
    if loader.num_workers:
        loader.worker_init_fn = leave_signals_to_parent
    return EvaluationLoader(loader, cfg.DATALOADER.get("TIMEOUT", 0))


class EvaluationLoader:
    """Batches of ``loader``, each within ``timeout`` seconds; the errors of its workers are one sentence."""

    def __init__(self, loader: torch.utils.data.DataLoader, timeout: float = 0):
        self.loader = loader
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[dict]]:
        return with_plain_errors(self.loader, self.timeout)


class _Batches:
    def __init__(self, loader: ReplayableLoader):
        self.loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.loader.batches()


class _SeededDataset(torch.utils.data.Dataset):
    """Examples whose augmentation is drawn from the seed and their position in the stream."""

    def __init__(self, examples: Sequence[dict], mapper: DatasetMapper, seed: int):
        self.examples = examples
        self.mapper = mapper
        self.seed = seed

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        position, index = key
        # Detectron2's augmentations draw from this generator
        np.random.seed((self.seed * 1_000_003 + position) % 2**32)
        for _ in range(_MOST_PASSED_OVER):
            mapped = map_image(self.mapper, self.examples[index])
            if mapped is not None:
                return mapped
            # as in Detectron2, where a mapper may pass an image over
            index = np.random.randint(len(self))
        raise UserError(f"the mapper gives nothing (None) for {_MOST_PASSED_OVER} images one after the other")

    def with_mapper(self, mapper: DatasetMapper) -> "_SeededDataset":
        return _SeededDataset(self.examples, mapper, self.seed)


def build_mapper(cfg: CfgNode, *, is_train: bool) -> DatasetMapper:
    """Detectron2's mapper of ``cfg``, with what :func:`map_image` takes from it: ``pixel_range``."""
    mapper = DatasetMapper(cfg, is_train=is_train)
    mapper.pixel_range = tuple(cfg.INPUT.get("PIXEL_RANGE", ()))
    return mapper


def map_image(mapper: Callable[[dict], dict | None], example: dict) -> dict | None:
    """``mapper(example)``, with a sentence that names the image where it cannot be read.

    Images of more than 8 bits are scaled by the mapper's ``pixel_range``, if it has one.

    Raises:
        UserError: the image is missing, damaged, deeper than 8 bits without a ``pixel_range``, or not of the size that
            the annotations say.
    """
    file = str(example["file_name"])
    pixel_range = getattr(mapper, "pixel_range", ())
    fault = image_fault(file, pixel_range=pixel_range) if os.path.isfile(file) else None
    if fault:
        raise UserError(f"the image {file} {fault}")
    try:
        name = readable(file, pixel_range)
        if name == file:
            return mapper(example)
        mapped = mapper({**example, "file_name": name})
        return mapped if mapped is None else {**mapped, "file_name": example["file_name"]}
    except FileNotFoundError as error:
        raise Resumable(f"the image {file} cannot be read, it is not there: put it back") from error
    except (OSError, SyntaxError) as error:
        raise UserError(f"the image {file} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ == "SizeMismatchError":
            raise UserError(f"the image {example['file_name']} is not of the annotated size: {error}") from error
        raise
