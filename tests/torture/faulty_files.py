"""Counts the operations that Python code makes on files below a folder, ends or fails the k-th, or records them all.

Caught: opening for writing, write, truncate, fsync, rename, replace, unlink, mkdir and rmdir, whoever calls them:
``open``, ``pathlib``, ``os``, ``shutil``, ``tempfile``, ``logging``, ``torch.save`` into our files, TensorBoard's
writer, in all threads and in processes that are forked. A write is one call of the system: Python's buffers lie above.
Not caught: reading, and files that C++ code opens by itself, of which the tools have none that writes.

A :class:`Disk` plays a record back: what the files hold after k operations, and what of that outlasts a power cut.
"""

import builtins
import errno
import io
import mmap
import os
import pickle
import shutil
import signal
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# As they are, for what must not be counted.
_open, _fdopen = io.open, os.fdopen
_os = {name: getattr(os, name) for name in ("open", "write", "replace", "unlink", "mkdir", "rmdir", "truncate")}
# What takes no room on a disk.
_FREEING = ("fsync", "unlink", "rmdir")


class Counter:
    """How many operations there were, in all processes that were forked since."""

    def __init__(self):
        self._shared = mmap.mmap(-1, 8)

    def next(self) -> int:
        value = self.value + 1
        self._shared[:] = struct.pack("q", value)
        return value

    @property
    def value(self) -> int:
        return struct.unpack("q", self._shared[:])[0]


@dataclass
class Faults:
    """What is to happen to the files below ``root``.

    Attributes:
        root: the folder.
        kind: "SIGKILL": the process ends in the middle of the operation; "ENOSPC": it fails, and so does all after it
            that takes room; any other name of an error: it fails with that, once.
        at: the operation, counted from 1; none for 0.
        record: a file to which the operations are appended.
    """

    root: Path
    kind: str = "EIO"
    at: int = 0
    record: Path | None = None
    counter: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self.root = Path(os.path.realpath(self.root))
        self._lock = threading.RLock()
        self._record = None

    def install(self) -> None:
        """From now on, in this process."""
        if self.record is not None:
            self._record = _os["open"](self.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        builtins.open = io.open = self._opened
        os.fdopen = lambda descriptor, *arguments, **options: self._opened(descriptor, *arguments, **options)
        os.open = self._os_open
        os.write = self._os_write
        os.fsync = os.fdatasync = self._fsync
        os.ftruncate = lambda descriptor, size: self._truncate(descriptor, size)
        os.truncate = self._truncate
        os.replace = os.rename = self._rename
        os.unlink = os.remove = self._unlink
        os.mkdir = self._mkdir
        os.rmdir = self._rmdir
        os.link = os.symlink = self._not_expected
        usage = shutil.disk_usage
        shutil.disk_usage = lambda path: usage(path)._replace(free=0) if self._is_full() else usage(path)

    def _is_full(self) -> bool:
        return self.kind == "ENOSPC" and 0 < self.at <= self.counter.value

    # ---- what is below the folder, and what becomes of it

    def _place(self, path, folder: int | None = None) -> str | None:
        """The place below the root; None for any other."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
            if not path.startswith("/") or path.endswith(" (deleted)"):
                return None  # a pipe; a file that no name leads to
        path = os.fsdecode(path)
        if folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        return os.path.relpath(path, self.root) if path.startswith(f"{self.root}/") else None

    def _reached(self, operation: str, half=None) -> None:
        """Counts an operation, and ends or fails it where it is the one."""
        count = self.counter.next()
        if count < self.at or not self.at:
            return
        if count > self.at and (self.kind != "ENOSPC" or operation in _FREEING):
            return
        if count == self.at and half is not None and self.kind in ("SIGKILL", "ENOSPC"):
            half()  # after any other error Python's buffers try the same bytes again
        if self.kind == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        number = getattr(errno, self.kind)
        raise OSError(number, os.strerror(number))

    def _note(self, *entry) -> None:
        if self._record is not None:
            _os["write"](self._record, pickle.dumps(entry))

    # ---- the operations

    def _os_open(self, path, flags, mode=0o777, *, dir_fd=None):
        with self._lock:
            place = self._place(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
            if place is None:
                return _os["open"](path, flags, mode, dir_fd=dir_fd)
            self._reached("open")
            is_new = not os.path.lexists(self.root / place)
            try:
                descriptor = _os["open"](path, flags, mode, dir_fd=dir_fd)
            except OSError:
                self._note("failed", place)
                raise
            self._note("open", place, is_new, bool(flags & os.O_TRUNC))
            return descriptor

    def _opened(
        self, file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, closefd=True, opener=None
    ):
        """As ``io.open``, on a :class:`_Raw` where it writes."""
        if not set(mode) & set("wax+") or (isinstance(file, int) and self._place(file) is None):
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int) and self._place(file) is None:
            return _open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        letters = mode.replace("b", "").replace("t", "").replace("U", "")
        flags = {
            "r": os.O_RDWR,
            "w": os.O_CREAT | os.O_TRUNC,
            "a": os.O_CREAT | os.O_APPEND,
            "x": os.O_CREAT | os.O_EXCL,
        }
        access = os.O_RDWR if "+" in letters else os.O_WRONLY
        raw = _Raw(
            file,
            letters,
            closefd=closefd,
            opener=opener or (lambda path, _: os.open(path, flags[letters.strip("+")] | access | os.O_CLOEXEC, 0o666)),
        )
        raw.faults = self
        if buffering == 0:
            return raw
        size = buffering if buffering > 1 else io.DEFAULT_BUFFER_SIZE
        buffered = (io.BufferedRandom if "+" in letters else io.BufferedWriter)(raw, size)
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode
        return text

    def write(self, descriptor: int, data, write) -> int:
        with self._lock:
            place = self._place(descriptor)
            if place is None:
                return write(data)
            data = bytes(data)
            self._reached("write", lambda: write(data[: len(data) // 2]))
            status = os.fstat(descriptor)
            appends = _flags(descriptor) & os.O_APPEND
            offset = status.st_size if appends else os.lseek(descriptor, 0, os.SEEK_CUR)
            count = write(data)
            self._note("write", place, offset, data[:count])
            return count

    def _os_write(self, descriptor: int, data) -> int:
        return self.write(descriptor, data, lambda part: _os["write"](descriptor, part))

    def _fsync(self, descriptor) -> None:
        with self._lock:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            place = self._place(number)
            if place is None and os.readlink(f"/proc/self/fd/{number}") == str(self.root):
                place = "."
            if place is not None:
                self._reached("fsync")
                self._note("fsync", place)  # and no wait for the disk

    def _truncate(self, file, size) -> None:
        with self._lock:
            place = self._place(file)
            if place is not None:
                self._reached("truncate")
            _os["truncate"](file, size)
            if place is not None:
                self._note("truncate", place, size)

    def _rename(self, source, target, *, src_dir_fd=None, dst_dir_fd=None) -> None:
        self._named("rename", _os["replace"], (source, src_dir_fd), (target, dst_dir_fd))

    def _unlink(self, path, *, dir_fd=None) -> None:
        self._named("unlink", lambda path: _os["unlink"](path, dir_fd=dir_fd), (path, dir_fd))

    def _mkdir(self, path, mode=0o777, *, dir_fd=None) -> None:
        self._named("mkdir", lambda path: _os["mkdir"](path, mode, dir_fd=dir_fd), (path, dir_fd))

    def _rmdir(self, path, *, dir_fd=None) -> None:
        self._named("rmdir", lambda path: _os["rmdir"](path, dir_fd=dir_fd), (path, dir_fd))

    def _named(self, operation, function, *paths) -> None:
        with self._lock:
            places = [self._place(*path) for path in paths]
            if places[0] is not None:
                self._reached(operation)
            try:
                function(*(path for path, _ in paths))
            except OSError:
                operation = "failed"
                raise
            finally:
                if places[0] is not None:
                    self._note(operation, *places)

    def _not_expected(self, *arguments, **options) -> None:
        raise AssertionError(f"a link is made, which the record knows nothing of: {arguments}")


class _Raw(io.FileIO):
    """A file below the buffers."""

    faults: Faults

    def write(self, data) -> int:
        return self.faults.write(self.fileno(), data, super().write)

    def truncate(self, size=None) -> int:
        size = self.tell() if size is None else size
        self.faults._truncate(self.fileno(), size)
        return size


def _flags(descriptor: int) -> int:
    with _open(f"/proc/self/fdinfo/{descriptor}") as file:
        return int(next(line for line in file if line.startswith("flags:")).split()[1], 8)


class Disk:
    """Files in folders, and what of them would be there after a power cut.

    What was synced last outlasts it, of a file its bytes and of a folder its names, and nothing else.

    Args:
        start: a folder with what was there before, synced.
    """

    def __init__(self, start: Path):
        self._made = 0
        self.now: dict[int, bytes | dict[str, int]] = {0: {}}
        self.synced: dict[int, bytes | dict[str, int]] = {0: {}}
        for path in sorted(start.rglob("*")):
            self._add(str(path.relative_to(start)), {} if path.is_dir() else path.read_bytes())
        self.synced = {key: dict(value) if isinstance(value, dict) else value for key, value in self.now.items()}

    def _find(self, place: str) -> int:
        found = 0
        for name in Path(place).parts:
            found = self.now[found][name]
        return found

    def _add(self, place: str, content: bytes | dict) -> None:
        self._made += 1
        self.now[self._made], self.synced[self._made] = content, type(content)()
        self.now[self._find(os.path.dirname(place))][os.path.basename(place)] = self._made

    def apply(self, operation: str, place: str, *rest) -> None:
        """Plays one entry of a record."""
        if operation == "failed":
            return
        if operation == "open":
            is_new, empties = rest
            if is_new:
                self._add(place, b"")
            elif empties:
                self.now[self._find(place)] = b""
        elif operation == "mkdir":
            self._add(place, {})
        elif operation == "write":
            offset, data = rest
            before = self.now[self._find(place)].ljust(offset, b"\0")
            self.now[self._find(place)] = before[:offset] + data + before[offset + len(data) :]
        elif operation == "truncate":
            self.now[self._find(place)] = self.now[self._find(place)][: rest[0]].ljust(rest[0], b"\0")
        elif operation == "fsync":
            content = self.now[self._find(place)]
            self.synced[self._find(place)] = dict(content) if isinstance(content, dict) else content
        elif operation == "rename":
            number = self._find(place)
            del self.now[self._find(os.path.dirname(place))][os.path.basename(place)]
            self.now[self._find(os.path.dirname(rest[0]))][os.path.basename(rest[0])] = number
        else:
            del self.now[self._find(os.path.dirname(place))][os.path.basename(place)]

    def lay_out(self, folder: Path, *, names_synced: bool, bytes_synced: bool) -> None:
        """Makes ``folder`` hold what is there: after all that happened, or where only what was synced outlasts it.

        Names that outlast a power cut without their files' bytes are what many file systems make of a file that was
        renamed before it was synced: it is empty.
        """
        names, contents = (self.synced if synced else self.now for synced in (names_synced, bytes_synced))

        def lay(number: int, place: Path) -> None:
            for name, child in names[number].items():
                if isinstance(self.now[child], dict):
                    (place / name).mkdir()
                    lay(child, place / name)
                else:
                    (place / name).write_bytes(contents[child])

        lay(0, folder)


def read_record(path: Path) -> Iterator[tuple]:
    """The operations of a record, in their order."""
    with _open(path, "rb") as file:
        while True:
            try:
                yield pickle.load(file)
            except EOFError:
                return
