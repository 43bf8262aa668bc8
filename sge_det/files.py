"""Files that are there whole or not at all."""

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import UserError

# What a report with its pictures, or a log's next lines, need.
_LEAST_FREE_BYTES = 4 << 20


def write_file(path: Path, content: str | bytes) -> None:
    """Writes ``path`` by way of a temporary file beside it, so that no reader ever sees half of it.

    Raises:
        UserError: it cannot be written; what was there is kept.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON, NaN as null; otherwise as :func:`write_file`."""
    write_file(path, json.dumps(_without_nan(content), indent=1, allow_nan=False) + "\n")


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def cannot_write(path: Path, error: OSError) -> UserError:
    """The sentence for a file or folder that cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path)
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def disk_full(path: Path) -> UserError:
    """The sentence for a full disk."""
    return UserError(f"the disk that holds {path} is full: free some space and run the same command again to go on")


def is_disk_full(folder: Path) -> bool:
    """Whether there is no room left for even a few files in ``folder``."""
    return shutil.disk_usage(folder).free < _LEAST_FREE_BYTES
