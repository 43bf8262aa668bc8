"""Checksums of weights: of a checkpoint and of its tensors, beside it; of the tensors of a safetensors file, in it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import write_json

# Of the table of tensors' checksums in a safetensors file.
KEY = "sge_det_checksums"
_LARGEST_SIDECAR = 1 << 25


class Unreadable(UserError):
    """A weights file that is not there, damaged, or refused."""


def tensors_of(content: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dicts and lists in each other, with their places, for instance "model/stem.conv1.weight".

    A dict or list that stands at several places is walked once.
    """
    seen: set[int] = set()

    def walk(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
        if isinstance(value, Tensor):
            yield path, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
                yield from walk(part, f"{path}/{key}" if path else str(key))

    return walk(content, "")


def checksums(content: Any) -> dict[str, str]:
    """The SHA-256 of the kind, shape and values of each tensor in ``content``, by its place."""
    return {path: _checksum(tensor) for path, tensor in tensors_of(content)}


def _checksum(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def differing(content: Any, expected: Any) -> list[str]:
    """The places of tensors that are not as a table of checksums says, or stand in one of the two alone."""
    found = checksums(content)
    expected = expected if isinstance(expected, dict) else {}
    return [name for name in {**found, **expected} if found.get(name) != expected.get(name)]


def check_tensors(content: dict[str, Any], path: Path) -> None:
    """Takes the table of checksums out of what a file holds, if it has one, and compares.

    Raises:
        Unreadable: tensors are not what was written; names the first.
    """
    expected = content.pop(KEY, None)
    wrong = differing(content, expected) if expected is not None else []
    if wrong:
        raise Unreadable(f"the weights {path} are damaged: {_told(wrong)}")


def _told(wrong: list[str]) -> str:
    return f"{len(wrong)} tensors are not what was written ({str(wrong[0])[:100]!a} for instance)"


def sidecar(path: Path) -> Path:
    """The file that holds the checksum of a whole weights file."""
    return path.with_name(f"{path.name}.sha256.json")


def write_sidecar(path: Path, digest: str, size: int, **about: Any) -> None:
    """Writes the checksum of a weights file beside it, with what else ``about`` says of it.

    Raises:
        UserError: it cannot be written.
    """
    write_json(sidecar(path), {"file": path.name, "bytes": size, "sha256": digest, **about})


def read_sidecar(path: Path) -> dict[str, Any] | None:
    """What stands beside a weights file, or None.

    Raises:
        Unreadable: it is damaged.
    """
    place = sidecar(path)
    if not place.is_file():
        return None
    try:
        if place.stat().st_size > _LARGEST_SIDECAR:
            raise ValueError("it is too long")
        content = json.loads(place.read_text(encoding="utf-8"))
        if not (isinstance(content["sha256"], str) and type(content["bytes"]) is int):
            raise ValueError("it holds no checksum")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unreadable(
            f"the checksum {place} of these weights is damaged: remove it if you know that they are not"
        ) from error
    return content


def check_file(path: Path, load: Callable[[], Any]) -> None:
    """Compares a weights file with the checksum beside it, if there is one.

    Args:
        path: the weights file.
        load: reads it in spite of checksums in it, to tell what is wrong with it.

    Raises:
        Unreadable: they differ; names tensors if it can.
    """
    expected = read_sidecar(path)
    if expected is None:
        return
    size, wanted = path.stat().st_size, expected["bytes"]
    if size == wanted and sha256(path) == expected["sha256"]:
        return
    what = f"{size} bytes where {wanted} were written" if size != wanted else "bytes are not what was written"
    try:
        wrong = differing(load(), expected.get("tensors"))
    except Exception:
        wrong = []  # it cannot be read at all
    raise Unreadable(
        f"the weights {path} are damaged: {_told(wrong) if wrong else what}; if you have changed them yourself, remove "
        f"{sidecar(path)}"
    )


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_not_finite(content: Any) -> str | None:
    """The place of the first tensor in ``content`` that holds NaN or infinity."""
    for path, tensor in tensors_of(content):
        if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
            return path
    return None


def unusable(name: str, tensor: Tensor) -> str | None:
    """What is wrong with a tensor that is to fill a model's parameter or statistic, in words; None where nothing is."""
    if name.endswith("num_batches_tracked"):
        return None
    if tensor.is_complex() or not tensor.is_floating_point():
        return f"is {'complex' if tensor.is_complex() else 'of ' + str(tensor.dtype).removeprefix('torch.')}"
    values = tensor.float() if tensor.element_size() == 1 else tensor  # 8-bit floats are not computed with
    if not values.isfinite().all():
        return "holds NaN or infinity"
    if name.endswith("running_var") and (values < 0).any():
        return "holds a negative variance"
    return None
