"""Reading and writing of weights files. Reading never runs what a file says."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..errors import UserError
from ..files import replacing
from .checksums import KEY, Unreadable, check_file, check_tensors, checksums
from .pickles import Damaged, Inert, Refused, Stream, check_name
from .strangers import folder_told, what_file
from .tensors import DTYPES, check_booleans, count, fits
from .torch_files import ZIP_MAGIC, is_legacy, load_legacy, load_pickle, load_zip

# Names of safetensors' dtypes.
_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
_LONGEST_HEADER = 100 << 20


def check_address(path: str) -> None:
    """Checks that weights given by an address, if they are, can be fetched.

    Raises:
        UserError: nobody has told Detectron2's ``PathManager`` how to fetch such addresses.
    """
    known = tuple(PathManager._path_handlers)  # a user's own among them
    if "://" in path and not path.startswith(known) and not os.path.exists(path):
        raise UserError(
            f"the weights {path[:300]} cannot be fetched: addresses begin with https://, http://, ftp:// or "
            "detectron2://; download the file, and name it"
        )


def load_file(path: str | Path, *, beside: bool = False) -> Any:
    """Reads a weights file: safetensors, a torch file of either format, or a pickle of NumPy arrays.

    Args:
        path: its name decides between safetensors (``.safetensors``), pickle (``.pkl``) and torch (all others).
        beside: whether torch's files may hold what training scripts keep beside weights, as
            :class:`.pickles.Inert`.

    Returns:
        what it holds, tensors on the CPU. A safetensors file gives ``{"model": tensors}`` with the rest of what
        :func:`write_weights` put in.

    Raises:
        Unreadable: it is not there, is damaged (see :mod:`.checksums`), or names something that would have to be
            called: says which.
    """
    path = Path(path)
    size = _size(path)
    try:
        check_file(path, lambda: _load(path, size, verify=False, beside=beside))
        return _load(path, size, beside=beside)
    except Unreadable:
        raise
    except Refused as error:
        raise Unreadable(
            f"{path} is refused: to read it would call {error}, and weights need no such thing: save the dict of "
            "weights alone, where it was written"
        ) from error
    except MemoryError as error:
        raise Unreadable(f"the weights {path} cannot be read: there is too little memory for them") from error
    except OSError as error:
        raise Unreadable(f"the weights {path} cannot be read: {error.strerror or error}") from error
    except Damaged as error:
        raise Unreadable(f"the weights {path} cannot be read: {what_file(path) or error}") from error
    except Exception as error:
        # there is no list of what bytes that are no weights make a parser of zip, JSON, UTF-8 and numbers raise
        first = str(error).strip().split("\n")[0][:200]
        text = first if first.isprintable() else ascii(first)
        what = what_file(path) or f"they are damaged ({type(error).__name__}: {text})"
        raise Unreadable(f"the weights {path} cannot be read: {what}") from error


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise Unreadable(f"there is no weights file {path}") from error
    if stat.S_ISDIR(status.st_mode):
        raise Unreadable(f"there is no weights file {path}: {folder_told(path)}")
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(f"there is no weights file {path}: it is a device or a pipe")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if status.st_size > memory:
        raise Unreadable(f"the weights {path} cannot be read: they are larger than this machine's memory")
    return status.st_size


def _load(path: Path, size: int, *, verify: bool = True, beside: bool = False) -> Any:
    with open(path, "rb") as file:
        if path.suffix == ".safetensors":
            content = _load_safetensors(Stream(file, size))
            check_tensors(content, path)
            return content
        begin = file.read(len(ZIP_MAGIC))
        if begin == ZIP_MAGIC:
            return load_zip(file, size, verify=verify, beside=beside)
        file.seek(0)
        value, rest = load_pickle(file, size)
        if is_legacy(value):
            return load_legacy(rest, beside=beside)
        if path.suffix != ".pkl":
            raise Damaged("it is no file that torch.save wrote; name a pickle of NumPy arrays so that it ends in .pkl")
        return value


def _load_safetensors(stream: Stream) -> dict[str, Any]:
    length = int.from_bytes(stream.take(8), "little")
    if length > _LONGEST_HEADER:
        raise Damaged("it is no file of safetensors")
    header = json.loads(stream.take(length).decode(), object_pairs_hook=_without_repeats)
    if not isinstance(header, dict):
        raise Damaged("its header is no table of tensors")
    metadata = header.pop("__metadata__", {})
    tensors, places = {}, {}
    for key, entry in header.items():
        check_name(key)
        tensors[key], places[key] = _tensor_entry(entry)
    if not fits(list(places.values()), stream.left):
        raise Damaged("its tensors are not as long as its data")
    model = {}
    for key in sorted(places, key=places.get):
        dtype, shape = tensors[key]
        begin, end = places[key]
        memory = torch.empty(end - begin, dtype=torch.uint8)
        stream.fill(memoryview(memory.numpy()))
        if dtype is torch.bool:
            check_booleans(memory.numpy())
        model[key] = memory.view(dtype).reshape(shape) if len(memory) else torch.empty(shape, dtype=dtype)
    return {"model": {key: model[key] for key in header}} | _extra(metadata)


def _tensor_entry(entry: Any) -> tuple[tuple[torch.dtype, list[int]], tuple[int, int]]:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise Damaged("its header is no table of tensors")
    name, shape, place = (entry.get(part) for part in ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(_SAFETENSORS.get(name, ""))
    if dtype is None:
        raise Damaged(f"it holds a tensor of {name[:20]!a}, which no weights are")
    if not isinstance(place, list) or len(place) != 2 or not all(type(value) is int for value in place):
        raise Damaged("its header does not say where the tensors are")
    if place[1] - place[0] != count(shape) * dtype.itemsize:
        raise Damaged(f"it claims a tensor of {count(shape)} numbers where it has {place[1] - place[0]} bytes")
    return (dtype, shape), (place[0], place[1])


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise Damaged("a name in its header stands there twice")
    return result


def _extra(metadata: Any) -> dict[str, Any]:
    """What :func:`write_weights` put into a safetensors file besides the tensors."""
    text = metadata.get("sge_det") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        return {}
    extra = json.loads(text)
    if not isinstance(extra, dict):
        raise Damaged("its metadata is no table")
    return {key: value for key, value in extra.items() if key != "model"}


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads weights into the form that Detectron2's checkpointer takes.

    Returns:
        a dict with the tensors or arrays in "model", and as far as the file says so "metadata" (see
        :func:`write_weights`), "matching_heuristics" and "__author__".

    Raises:
        Unreadable: as :func:`load_file`.
    """
    content = load_file(path, beside=True)
    if isinstance(content, dict):
        if Path(path).suffix == ".pkl" and not isinstance(content.get("model"), dict):
            content = {"model": content.get("blobs", content), "__author__": "Caffe2", "matching_heuristics": True}
        elif "model_state" in content:
            content = {"model": content["model_state"], "__author__": "pycls", "matching_heuristics": True}
        elif "model" not in content:
            content = {"model": content}
    weights = content["model"] if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        kind = what_is(weights)
        raise Unreadable(f"the weights {path} cannot be read: they are a {kind}, not a dict of tensors")
    for key, kind in (("__author__", str), ("matching_heuristics", bool)):
        if not isinstance(content.get(key, kind()), kind):
            raise Unreadable(f"the weights {path} cannot be read: {key} in them is a {type(content[key]).__name__}")
    return content


def what_is(value: Any) -> str:
    """The kind of a value that was read, in a sentence on what it should be."""
    return value.path if isinstance(value, Inert) else type(value).__name__


def write_weights(path: str | Path, state: dict[str, Tensor], metadata: dict[str, Any], *, by_suffix: bool) -> None:
    """Writes weights for ``MODEL.WEIGHTS``, whole or not at all, with a checksum of each tensor.

    Args:
        path: ends in .pth or .safetensors.
        state: tensors under Detectron2's names.
        metadata: numbers, strings and lists, kept in the file under "metadata".
        by_suffix: let Detectron2 match names by their ends (backbone files, whose names lack the model's prefix).

    Raises:
        UserError: another ending, or a place where nothing can be written.
    """
    path = Path(path)
    check_output(path)
    extra = {"__author__": "sge_det", "matching_heuristics": by_suffix, "metadata": metadata}
    with replacing(path) as part:
        if path.suffix == ".safetensors":
            from safetensors.torch import save

            # no two tensors of the file may share memory
            tensors = {key: value.clone().contiguous() for key, value in state.items()}
            # torch's files have a checksum of each tensor, these have none of their own
            extra[KEY] = checksums({"model": state})
            part.write(save(tensors, {"format": "pt", "sge_det": json.dumps(extra)}))
        else:
            torch.save({"model": state, **extra}, part)


def check_output(path: str | Path) -> None:
    """Checks that weights can be written under this name.

    Raises:
        UserError: it does not end in .pth or .safetensors, or is a folder.
    """
    if Path(path).suffix not in (".pth", ".safetensors"):
        raise UserError(f"{path}: the output must end in .pth or .safetensors, which MODEL.WEIGHTS takes")
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name the file to write")
