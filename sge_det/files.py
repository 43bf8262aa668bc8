"""Files that are there whole or not at all, after a power cut too: written beside, synced, renamed."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import Resumable, UserError, shortage

# What a report with its pictures, or a log's next lines, need.
_LEAST_FREE_BYTES = 4 << 20
# How long another process may take to write the same file.
_LONGEST_WAIT_SECONDS = 60.0
_LONGEST_NAME = 200


class Part:
    """What is written to, in place of the file that it becomes.

    Attributes:
        sha256: of what was written, in order; so far.
        size: its number of bytes.
        error: why the last write failed. Libraries turn it into errors of their own.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Writes all of ``data``."""
        try:
            count = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        self.size += count
        return count

    def flush(self) -> None:
        """Hands everything to the system."""
        self._file.flush()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Part]:
    """Gives a file to write, which becomes ``path`` at the end of the block and not at all where that fails.

    No reader ever sees half of it, and a power cut leaves the old file or the new one. A part that a killed process
    left is taken over by the next that writes the same file; two that write it at once take turns.

    Raises:
        UserError: it cannot be written; what was there is kept.
    """
    path = Path(path)
    try:
        _make_folder(path.parent)
        part = _part_of(path)
        file = _open_alone(part)
    except OSError as error:
        raise cannot_write(path, error) from error
    writer = Part(file)
    try:
        with file:
            yield writer
            file.flush()
            os.fsync(file.fileno())
            # the file is closed, and others may write their part, after it has its name
            os.replace(part, path)
        sync_folder(path.parent)
    except OSError as error:
        _remove(part)
        raise cannot_write(path, writer.error or error) from error
    except BaseException as error:
        _remove(part)
        if writer.error is not None:
            raise cannot_write(path, writer.error) from error
        raise


def _part_of(path: Path) -> Path:
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.part")


def _open_alone(part: Path) -> BinaryIO:
    """Opens a file, empty, for this process alone; the lock goes with the process that holds it."""
    deadline = time.monotonic() + _LONGEST_WAIT_SECONDS
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if _lock(descriptor) and _is_still(descriptor, part):
                os.ftruncate(descriptor, 0)
                return os.fdopen(descriptor, "wb")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise OSError(errno.EBUSY, "another process is writing it")
        time.sleep(0.02)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _is_still(descriptor: int, part: Path) -> bool:
    """Whether nobody has renamed or removed it since it was opened."""
    try:
        there = os.stat(part)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, so that they outlast a power cut.

    Raises:
        UserError: it cannot be made.
    """
    try:
        _make_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def make_output(folder: Path, option: str = "OUTPUT_DIR") -> None:
    """:func:`make_folder` for a folder of results.

    Args:
        option: of the command line, or key of a config, that names it.

    Raises:
        UserError: it cannot be made; says that another can be named.
    """
    try:
        _make_folder(folder)
    except OSError as error:
        raise cannot_write_output(folder, error, option) from error


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise FileExistsError(error.errno, f"{folder} is there, and is no folder") from error
    sync_folder(folder.parent)


def is_plain_name(path: str) -> bool:
    """Whether libraries take a path as it is: Detectron2 takes those of checkpoints for URLs, TensorBoard for UTF-8."""
    return path.isprintable() and "?" not in path and path == path.strip()


def check_folder(path: str | Path, option: str) -> None:
    """Checks that there is a folder in which files can be written, or that one can be made, before any work.

    Makes nothing.

    Args:
        option: of the command line, or key of a config, that names it.

    Raises:
        UserError: a file is in its place, or in that of a folder that it would lie in, or nothing can be written there,
            or its name is not taken as it is by what writes and reads there.
    """
    if not is_plain_name(str(path)):
        raise UserError(f"{option} {str(path)!a}: name a folder without ? and without characters that do not print")
    try:
        there = next(part for part in (Path(path), *Path(path).parents) if _is_taken(part))
        if not there.is_dir():
            raise UserError(f"{option} {path}: {there} is a file; name a folder")
        with tempfile.TemporaryFile(dir=there):  # which has no name, where the system can
            pass
    except OSError as error:
        raise cannot_write_output(path, error, option) from error


def _is_taken(path: Path) -> bool:
    """Whether anything is there, a link that leads nowhere too.

    Raises:
        OSError: nobody can be there, or it cannot be seen.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk.

    Raises:
        OSError: the disk fails.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
            raise
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Removes a file, if it is there, so that a power cut does not bring it back.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        path.unlink(missing_ok=True)
        if path.parent.is_dir():
            sync_folder(path.parent)
    except OSError as error:
        kind = Resumable if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS) else UserError
        raise kind(f"{path} cannot be removed: {error.strerror or error}") from error


def drop_torn_line(path: Path) -> None:
    """Cuts off the last line of a file that is appended to, if a killed process or a full disk left it without an end.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with open(path, "r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_write(path, error) from error


def publish_folder(part: Path, folder: Path) -> None:
    """Renames a folder that was written beside its place, once all in it is on the disk.

    Raises:
        OSError: the disk fails, or something is in its place.
    """
    for place, _, names in os.walk(part):
        for name in names:
            with open(os.path.join(place, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))
    part.rename(folder)
    sync_folder(folder.parent)


def publish_file(part: Path, path: Path) -> None:
    """Gives a file that a library has written beside ``path`` that name, once it is on the disk.

    Raises:
        OSError: the disk fails.
    """
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes ``path`` as :func:`replacing` does; names of files that are no text have ? where they are not.

    Raises:
        UserError: it cannot be written; what was there is kept.
    """
    with replacing(path) as part:
        part.write(content.encode(errors="replace") if isinstance(content, str) else content)


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as JSON, NaN and infinity as null; otherwise as :func:`write_file`."""
    write_file(path, json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str, tables: Sequence[str] = ()) -> dict[str, Any]:
    """Reads what :func:`write_json` wrote of a dict; others may have changed it since.

    Args:
        remedy: what to do where it cannot be read, the end of the sentence.
        tables: entries that are dicts themselves where they are there.

    Raises:
        UserError: it cannot be read, or is no such dict.
        FileNotFoundError: it is not there.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no dict")
        wrong = next((name for name in tables if not isinstance(content.get(name, {}), dict)), None)
        if wrong is not None:
            raise ValueError(f"its {wrong} is no dict")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:200]
        raise UserError(f"{path} cannot be read ({reason}): {remedy}") from error
    return content


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def cannot_write(path: str | Path, error: OSError) -> UserError:
    """The sentence for a file or folder that cannot be written."""
    if lacking := shortage(error):
        return Resumable(f"{path} cannot be written: {lacking}")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(path)
    if error.errno in (errno.EIO, errno.EROFS):
        return Resumable(f"{path} cannot be written: {error.strerror}; see to its disk")
    return UserError(f"{path} cannot be written: {error.strerror or error}")


def cannot_write_output(folder: str | Path, error: OSError, option: str = "OUTPUT_DIR") -> UserError:
    """The sentence for a folder of results that cannot be written: of its disk, or to name another."""
    told = cannot_write(folder, error)
    return told if isinstance(told, Resumable) else UserError(f"{option} {told}: name another")


def disk_full(path: str | Path) -> Resumable:
    """The sentence for a full disk."""
    return Resumable(f"the disk that holds {path} is full: free some space")


def is_disk_full(folder: Path) -> bool:
    """Whether there is no room left for even a few files in ``folder``."""
    return shutil.disk_usage(folder).free < _LEAST_FREE_BYTES
