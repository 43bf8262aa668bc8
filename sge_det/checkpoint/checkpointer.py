"""Weights in and checkpoints out: nothing half-written, nothing silently left at its random start."""

import errno
import logging
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from ..errors import Resumable, UserError
from ..files import remove_file, replacing, write_file
from ..layers.attention import is_sge_key
from .checksums import (
    Unreadable,
    checksums,
    first_not_finite,
    read_sidecar,
    sha256,
    sidecar,
    unusable,
    write_sidecar,
)
from .safe_load import check_address, load_checkpoint, load_file
from .strangers import folder_told

logger = logging.getLogger(__name__)

_TAG = "last_checkpoint"
_LONGEST_TAG = 1000


def check_weights_exist(cfg: CfgNode) -> None:
    """:func:`check_weights_path` for ``MODEL.WEIGHTS``."""
    check_weights_path(cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", "MODEL.WEIGHTS ''")


def check_weights_path(path: str, key: str, nothing: str) -> None:
    """Checks that a config's weights are a file that is there (URLs are left to Detectron2), or none.

    Args:
        path: of the weights; "" for none.
        key: of the config, or of the command line, that names them.
        nothing: how it is set to none on the command line; "" where nothing can be done without weights.

    Raises:
        UserError: it is not there, or is no file; says how to get it.
    """
    check_address(path)
    if not path or "://" in path or os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise UserError(f"{key} {path} is no file of weights: {folder_told(Path(path))}")
    if os.path.exists(path):
        raise UserError(f"{key} {path} is no file of weights: it is a device or a pipe")
    others = f"name others with {key}"
    others = f", {others}, or train from scratch with {nothing}" if nothing else f", or {others}"
    # names too long for any file are of none, too
    raise UserError(f"{key} {path[:300]} is not there: put the weights there (see 'Weights' in the README){others}")


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints of a run that it can go on from, the last one first.

    That is the one that ``last_checkpoint`` names, whether it is there or not, and those that are older; all of them
    where ``last_checkpoint`` is not there, or was left empty by a power cut.

    Raises:
        UserError: ``last_checkpoint`` names a file outside the folder, or nothing that is a checkpoint's name.
    """
    folder = Path(folder)
    there = [path for path in folder.glob("model_*.pth") if re.fullmatch(r"model_(\d+|final)\.pth", path.name)]
    there.sort(key=lambda path: (_iteration(path), path.name), reverse=True)
    name = _tagged(folder / _TAG)
    if not name:
        return there
    last = folder / name
    return [last, *(path for path in there if path != last and _iteration(path) <= _iteration(last))]


def last_checkpoint(folder: str | Path) -> Path | None:
    """The checkpoint that a run goes on from, if nothing is wrong with it; None where there is none.

    Raises:
        UserError: as :func:`checkpoints`.
    """
    return next(iter(checkpoints(folder)), None)


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, then its checksum.

    Raises:
        UserError: it cannot be removed.
    """
    remove_file(path)
    remove_file(sidecar(path))


def _tagged(tag: Path) -> str:
    try:
        status = tag.lstat()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UserError(f"{tag} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LONGEST_TAG:
        raise UserError(f"{tag} is no file that names a checkpoint: remove it, and the newest checkpoint is used")
    name = tag.read_bytes().decode("utf-8", "replace").strip()
    if name and (not name.isprintable() or name != os.path.basename(name) or not name.endswith(".pth")):
        raise UserError(
            f"{tag} names {name!a}, but it must name a .pth file in its own folder: correct it, or remove it, and the "
            "newest checkpoint is used"
        )
    return name


def _iteration(path: Path) -> float:
    """The number of iterations that a checkpoint comes after; infinite where only its content says it."""
    if found := re.fullmatch(r"model_(\d+)\.pth", path.name):
        return int(found[1])
    try:
        iteration = (read_sidecar(path) or {}).get("iteration")
    except Unreadable:
        iteration = None
    return iteration if type(iteration) is int else math.inf


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but it refuses weights that are not this model's, and writes each file whole or not.

    Args:
        whole_model: every parameter must be in the file (evaluation); otherwise the backbone's must (fine-tuning).
        metadata: kept in every checkpoint: what the model expects of its images.
        model, save_dir, save_to_disk, checkpointables: as in ``DetectionCheckpointer``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        whole_model: bool = False,
        metadata: dict[str, Any] | None = None,
        **checkpointables,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self.whole_model = whole_model
        self.metadata = metadata
        self.resumed_from: Path | None = None
        self._resuming = False

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint and its checksum, and names it in ``last_checkpoint``.

        Raises:
            UserError: it cannot be written, or something in it is not finite; what was there is kept.
        """
        more = {key: value.state_dict() for key, value in self.checkpointables.items()}
        if self._write(name, kwargs | more):
            self.tag_last_checkpoint(f"{name}.pth")

    def save_model(self, name: str, **kwargs: Any) -> None:
        """Writes the model alone, as something that no run goes on from.

        Raises:
            UserError: as :meth:`save`.
        """
        self._write(name, kwargs)

    def _write(self, name: str, more: dict[str, Any]) -> bool:
        if not self.save_dir or not self.save_to_disk:
            return False
        data = {"model": self.model.state_dict(), **more}
        if self.metadata is not None:
            data["metadata"] = self.metadata
        path = Path(self.save_dir, f"{name}.pth")
        self._check_finite(data, path)
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            # a checksum of what is no longer there would make the file look damaged
            remove_file(sidecar(path))
            with replacing(path) as part:
                torch.save(data, part)
            about = {"iteration": more.get("iteration"), "tensors": checksums(data)}
            write_sidecar(path, part.sha256.hexdigest(), part.size, **about)
        except UserError as error:
            cause = error.__cause__
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = getattr(cause, "strerror", None) or error
            raise Resumable(
                f"the checkpoint {path} cannot be written ({'the disk is full' if full else reason}), "
                f"{self.last_good()}: {'free some space' if full else 'see to its disk'}"
            ) from error
        return True

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_file(Path(self.save_dir, _TAG), last_filename_basename)

    def _check_finite(self, data: dict[str, Any], path: Path) -> None:
        wrong = first_not_finite(data)
        if wrong is None:
            return
        iteration = data.get("iteration")
        when = "" if iteration is None else f" after iteration {iteration}"
        raise UserError(
            f"{wrong.removeprefix('model/')} is no longer finite{when}: {path} is not written, and "
            f"{self.last_good()}. In a new run, lower SOLVER.BASE_LR, or clip gradients with "
            "SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def last_good(self) -> str:
        """A few words on the checkpoint to go back to."""
        last = last_checkpoint(self.save_dir) if self.save_dir else None
        return f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"

    def has_checkpoint(self) -> bool:
        return bool(self.save_dir) and (
            last_checkpoint(self.save_dir) is not None or Path(self.save_dir, _TAG).exists()
        )

    def get_checkpoint_file(self) -> str:
        last = last_checkpoint(self.save_dir)
        return str(last) if last else ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Goes on from the last checkpoint that can be read, or loads ``path`` into the model where there is none.

        Raises:
            UserError: as :meth:`load`; none of the checkpoints can be read, or the one that can is not whole.
        """
        if not resume or not self.has_checkpoint():
            return self.load(path, checkpointables=[])
        found = checkpoints(self.save_dir)
        if not found:
            raise UserError(f"{self.save_dir} has a {_TAG} that names none, and no checkpoint: name another OUTPUT_DIR")
        if not _tagged(Path(self.save_dir, _TAG)):
            logger.warning(f"{self.save_dir} has no {_TAG} that names one: the newest checkpoint is {found[0].name}")
        self._resuming = True
        first = None
        try:
            for place in found:
                try:
                    content = self.load(str(place))
                except Unreadable as error:
                    first = first or error
                    continue
                self.resumed_from = place
                self._add_checksum(place)
                if first is not None:
                    logger.warning(f"{found[0].name} cannot be used ({first}): going on from {place.name}, before it")
                return content
        finally:
            self._resuming = False
        raise UserError(
            f"no checkpoint in {self.save_dir} can be used, of {len(found)}: {first}; start anew in another OUTPUT_DIR"
        ) from first

    def _add_checksum(self, path: Path) -> None:
        """Gives a checkpoint its checksum where the run was killed between the two, now that it has been read."""
        if self.save_to_disk and self.checkpointables and not sidecar(path).is_file():
            data = load_file(str(path))
            about = {"iteration": data.get("iteration"), "tensors": checksums(data)}
            write_sidecar(path, sha256(path), path.stat().st_size, **about)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads ``path`` into the model, and what else it holds into the checkpointables.

        Raises:
            UserError: it cannot be read (then it is :class:`.checksums.Unreadable`, and nothing is changed), or its
                weights are not this model's.
        """
        self._path = path
        if self._resuming and not Path(path).is_file():
            raise Unreadable(f"there is no weights file {path}")
        try:
            return super().load(path, checkpointables)
        except UserError:
            raise
        except Exception as error:
            # entries that are no tensors, states of hooks and optimizers: whatever they make of other types
            first = str(error).strip().split("\n")[0][:300]
            raise UserError(f"the weights {path} cannot be read: {first or type(error).__name__}") from error
        finally:
            self._parsed_url_during_load = None  # Detectron2 leaves it behind where it fails

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = self._read_file(filename)
        if self._resuming:
            self._check_complete(checkpoint)
        return checkpoint

    def _check_complete(self, checkpoint: dict[str, Any]) -> None:
        """A run never starts anew, at iteration 0 or without its optimizer's momentum, where it should go on."""
        for key, part in self.checkpointables.items():
            lacking = _lacking(part.state_dict(), checkpoint.get(key), key)
            if lacking is None and key == "trainer":
                numbers = checkpoint.get("iteration"), checkpoint[key]["iteration"]
                lacking = None if all(type(number) is int and number >= 0 for number in numbers) else "iteration"
            if lacking is not None:
                raise UserError(
                    f"{self._path} has no {lacking}, so that the run cannot go on from it as it was: start a new run "
                    f"from its weights, with MODEL.WEIGHTS {self._path} and another OUTPUT_DIR"
                )

    def _read_file(self, filename: str) -> dict[str, Any]:
        # Detectron2 reads a .pkl with an unpickler that runs what it says, and no .safetensors at all
        if filename.endswith((".pkl", ".pyth", ".safetensors")):
            checkpoint = load_checkpoint(filename)
            if checkpoint.get("__author__") == "Caffe2":
                blobs = checkpoint["model"]
                checkpoint["model"] = {key: blobs[key] for key in blobs if not str(key).endswith("_momentum")}
            return checkpoint
        return super()._load_file(filename)

    def _torch_load(self, f: str) -> Any:
        return load_file(f)

    def _check_usable(self, weights: Any) -> None:
        """Raises Unreadable where a tensor that would fill one of the model's is no number or no weight."""
        names = set()
        for key, own in self.model.state_dict().items():
            parts = key.split(".") if own.is_floating_point() else []
            names |= {".".join(parts[start:]) for start in range(len(parts))}
        for key, value in weights.items() if isinstance(weights, dict) else ():
            if str(key).removeprefix("module.") not in names or not isinstance(value, torch.Tensor | np.ndarray):
                continue
            wrong = unusable(key, torch.as_tensor(value))
            if wrong:
                raise Unreadable(f"the weights {self._path} cannot be used: {key} {wrong}")

    def _load_model(self, checkpoint: dict[str, Any]):
        self._check_usable(checkpoint.get("model"))
        incompatible = super()._load_model(checkpoint)
        wanted = [
            key
            for key in self.model.state_dict()
            if not key.endswith("num_batches_tracked") and key not in ("pixel_mean", "pixel_std")
        ]
        whole = self.whole_model or self._resuming
        unfilled = {*incompatible.missing_keys, *(entry[0] for entry in incompatible.incorrect_shapes)}
        attention = [key for key in unfilled if is_sge_key(key)]
        required = wanted if whole else [key for key in wanted if ".bottom_up." in key and not is_sge_key(key)]
        lacking = [key for key in required if key in unfilled]
        if lacking:
            wrong_shape = {entry[0]: entry[1:] for entry in incompatible.incorrect_shapes}
            example = lacking[0]
            if example in wrong_shape:
                example += " has the shape {} in the file and {} in the model".format(*wrong_shape[example])
            else:
                example += " is not in the file"
            raise UserError(
                f"the weights {self._path} do not match the model: they fill {len(required) - len(lacking)} of the "
                f"{len(required)} tensors of {'it' if whole else 'its backbone'}; {example}. Name the "
                "weights of this model in MODEL.WEIGHTS, or give the config, and as many classes, that they were "
                "trained with"
            )
        if attention:
            logger.warning(
                f"{self._path} has no weights for {len(attention)} SGE parameters: they start at MODEL.SGE.INIT, and "
                "the backbone does not compute what these weights were trained for"
            )
        return incompatible


def _lacking(own: Any, state: Any, name: str) -> str | None:
    """The first part of a trainer's state that a checkpoint does not have; hooks come and go with the config."""
    if not isinstance(own, dict):
        return None
    if not isinstance(state, dict):
        return name
    for key, part in own.items():
        if key in ("hooks", "passed_over", "seed"):
            continue
        if key not in state:
            return f"{name}'s {key}"
        if key in ("_trainer", "optimizer"):
            lacking = _lacking(dict.fromkeys(part) if key == "optimizer" else part, state[key], key.strip("_"))
            if lacking is not None:
                return lacking
    return None
