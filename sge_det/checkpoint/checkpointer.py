"""Weights in and checkpoints out: nothing half-written, nothing silently left at its random start."""

import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from torch import nn

from ..errors import UserError
from .safe_load import load_checkpoint, load_file

logger = logging.getLogger(__name__)

# What is left where a checkpoint did not fit.
_LEAST_FREE_BYTES = 4 << 20


def check_weights_exist(cfg: CfgNode) -> None:
    """Checks that ``MODEL.WEIGHTS`` names a file that is there (URLs are left to Detectron2), or nothing.

    Raises:
        UserError: it is not there; says how to get it.
    """
    path = cfg.MODEL.WEIGHTS
    if path and "://" not in path and not Path(path).is_file():
        raise UserError(
            f"MODEL.WEIGHTS {path} is not there: put the weights there (see 'Weights' in the README), name others with "
            "MODEL.WEIGHTS FILE, or train from scratch with MODEL.WEIGHTS ''"
        )


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

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        data |= {key: value.state_dict() for key, value in self.checkpointables.items()}
        if self.metadata is not None:
            data["metadata"] = self.metadata
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        part = Path(f"{path}.part")
        try:
            with open(part, "wb") as file:
                torch.save(data, file)
            os.replace(part, path)
            self.tag_last_checkpoint(f"{name}.pth")
        except (OSError, RuntimeError) as error:
            is_full = shutil.disk_usage(self.save_dir).free < _LEAST_FREE_BYTES
            part.unlink(missing_ok=True)
            what = "the disk is full" if is_full else getattr(error, "strerror", None) or str(error).split("\n")[0]
            raise UserError(
                f"the checkpoint {path} cannot be written, {what}: make room and resume from the one before it"
            ) from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        with open(f"{path}.part", "w") as file:
            file.write(last_filename_basename)
        os.replace(f"{path}.part", path)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads ``path`` into the model, and what else it holds into the checkpointables.

        Raises:
            UserError: it cannot be read, or its weights are not this model's.
        """
        self._path = path
        try:
            return super().load(path, checkpointables)
        except UserError:
            raise
        except (
            *(pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError, AssertionError),
            *(ValueError, AttributeError, TypeError),  # its entries are no tensors
        ) as error:
            first = str(error).strip().split("\n")[0]
            raise UserError(f"the weights {path} cannot be read: {first}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
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

    def _load_model(self, checkpoint: dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        wanted = [
            key
            for key in self.model.state_dict()
            if not key.endswith("num_batches_tracked") and key not in ("pixel_mean", "pixel_std")
        ]
        unfilled = {*incompatible.missing_keys, *(entry[0] for entry in incompatible.incorrect_shapes)}
        attention = [key for key in unfilled if ".sge." in key]
        required = (
            wanted if self.whole_model else [key for key in wanted if ".bottom_up." in key and ".sge." not in key]
        )
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
                f"{len(required)} tensors of {'it' if self.whole_model else 'its backbone'}; {example}. Name the "
                "weights of this model in MODEL.WEIGHTS, or set the config to theirs (MODEL.RESNETS.DEPTH for instance)"
            )
        if attention:
            logger.warning(
                f"{self._path} has no weights for {len(attention)} SGE parameters: they start at MODEL.SGE.INIT, and "
                "the backbone does not compute what these weights were trained for"
            )
        return incompatible
