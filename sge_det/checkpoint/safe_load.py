"""Reading and writing of weights files. Reading never runs what a file says."""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

# The names of an entry point under NumPy 1 and NumPy 2.
_NUMPY_CORES = ("numpy.core", "numpy._core")
_DTYPES = {name: value for name, value in vars(getattr(np, "dtypes", object())).items() if isinstance(value, type)}
_PLAIN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, bytearray, complex, bytes)},
}


def _numpy_globals() -> dict[tuple[str, str], Any]:
    rebuild, _, _ = np.zeros(1).__reduce__()
    scalar, _ = np.float64(0).__reduce__()
    names = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for core in _NUMPY_CORES:
        names[f"{core}.multiarray", "_reconstruct"] = rebuild
        names[f"{core}.multiarray", "scalar"] = scalar
    names |= {("numpy.dtypes", name): value for name, value in _DTYPES.items()}
    return names


_NUMPY = _numpy_globals()


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays, scalars and dtypes, and plain containers."""

    def find_class(self, module: str, name: str) -> Any:
        # Python 2 wrote "__builtin__"
        known = ("builtins" if module == "__builtin__" else module, name)
        if known in _PLAIN:
            return _PLAIN[known]
        if known in _NUMPY:
            return _NUMPY[known]
        if known == ("_codecs", "encode"):  # how Python 3 writes bytes at protocol 2
            return lambda text, encoding: text.encode("latin1")
        raise _Refused(f"{module}.{name}")


class _Refused(pickle.UnpicklingError):
    """Names the global that a pickle asked for."""


def load_file(path: str | Path) -> Any:
    """Reads a weights file: safetensors, a torch file of either format, or a pickle of NumPy arrays.

    Args:
        path: its name decides between safetensors (``.safetensors``), pickle (``.pkl``) and torch (all others).

    Returns:
        what it holds, tensors on the CPU. A safetensors file gives ``{"model": tensors}`` with the rest of what
        :func:`write_weights` put in.

    Raises:
        UserError: it is not there, is damaged, or holds something that would run code: names it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return _load_safetensors(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                return _ArrayUnpickler(file, encoding="latin1").load()
        return load_torch(path)
    except _Refused as error:
        raise UserError(f"{path} is refused: to read it would call {error}, and weights need no such thing") from error
    except UserError:
        raise
    except (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error
    except (AttributeError, TypeError, IndexError, ImportError, AssertionError) as error:
        # what the unpickler meets in bytes that are no pickle
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    first = str(error).strip().split("\n")[0]
    return UserError(f"the weights {path} cannot be read: {first or type(error).__name__}")


def load_torch(file: Any) -> Any:
    """``torch.load`` on the CPU that builds tensors, NumPy scalars and plain containers only.

    Raises:
        UserError: the file holds something else, which could run code: names it.
    """
    try:
        with _admit(_NUMPY | {("argparse", "Namespace"): argparse.Namespace}):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|(?:function|type|class)(?= [\w.]+\.)) ([\w.]*\w)", str(error))
        if found is None:
            # torch's own text advises to read the file without this guard
            raise pickle.UnpicklingError("it is no file that torch.save wrote") from error
        name = getattr(file, "name", file)
        raise UserError(
            f"{name} is refused: to read it would call {found[1]}, and weights need no such thing"
        ) from error


def _admit(names: dict[tuple[str, str], Callable]) -> contextlib.AbstractContextManager:
    # torch before 2.5 has no such list, and reads tensors all the same
    safe_globals = getattr(torch.serialization, "safe_globals", None)
    if safe_globals is None:
        return contextlib.nullcontext()
    return safe_globals([(value, ".".join(name)) for name, value in names.items()])


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            content = {"model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118 (no mapping)
            header = file.metadata() or {}
        return content | json.loads(header.get("sge_det", "{}"))
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads weights into the form that Detectron2's checkpointer takes.

    Returns:
        a dict with the tensors or arrays in "model", and as far as the file says so "metadata" (see
        :func:`write_weights`), "matching_heuristics" and "__author__".

    Raises:
        UserError: as :func:`load_file`.
    """
    content = load_file(path)
    if isinstance(content, dict):
        if Path(path).suffix == ".pkl" and not isinstance(content.get("model"), dict):
            content = {"model": content.get("blobs", content), "__author__": "Caffe2", "matching_heuristics": True}
        elif "model_state" in content:
            content = {"model": content["model_state"], "__author__": "pycls", "matching_heuristics": True}
        elif "model" not in content:
            content = {"model": content}
    weights = content["model"] if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        kind = type(weights).__name__
        raise UserError(f"the weights {path} cannot be read: they are a {kind}, not a dict of tensors")
    return content


def write_weights(path: str | Path, state: dict[str, Tensor], metadata: dict[str, Any], *, by_suffix: bool) -> None:
    """Writes weights for ``MODEL.WEIGHTS``, whole or not at all: beside the file, then renamed.

    Args:
        path: ends in .pth or .safetensors.
        state: tensors under Detectron2's names.
        metadata: numbers, strings and lists, kept in the file under "metadata".
        by_suffix: let Detectron2 match names by their ends (backbone files, whose names lack the model's prefix).

    Raises:
        UserError: another ending, or a place where nothing can be written.
    """
    path = Path(path)
    extra = {"__author__": "sge_det", "matching_heuristics": by_suffix, "metadata": metadata}
    part = path.with_name(path.name + ".part")
    check_output(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            # no two tensors of the file may share memory
            tensors = {key: value.clone().contiguous() for key, value in state.items()}
            content = save(tensors, {"format": "pt", "sge_det": json.dumps(extra)})
            part.write_bytes(content)
        else:
            with open(part, "wb") as file:
                torch.save({"model": state, **extra}, file)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def check_output(path: str | Path) -> None:
    """Checks that weights can be written under this name.

    Raises:
        UserError: it does not end in .pth or .safetensors, or is a folder.
    """
    if Path(path).suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: the output must end in .pth or .safetensors, which MODEL.WEIGHTS takes")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the file to write")


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
