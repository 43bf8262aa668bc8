"""What ``torch.save`` writes, in both its formats, read without torch's unpickler."""

import io
import zipfile
import zlib
from collections import Counter
from typing import Any, BinaryIO

from .pickles import Damaged, Inert, Stream, Unpickler
from .tensors import ARRAYS, TENSORS, TORCH_VALUES, Storages

ZIP_MAGIC = b"PK\x03\x04"
# The first pickle of the format before zip files, its version, and what a machine must be like.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_BUILDERS = ARRAYS | TENSORS


class _Archive:
    """The members of a zip file that are stored as they are.

    Args:
        file: the zip file.
        size: its number of bytes.
        verify: compare what is read with its checksum.
    """

    def __init__(self, file: BinaryIO, size: int, *, verify: bool):
        self._file, self._size, self._verify = file, size, verify
        with zipfile.ZipFile(file) as archive:
            self.members = _members(archive, size)

    def read(self, name: str) -> bytes:
        """All of a member."""
        content = bytearray(self.members[name].file_size)
        self.fill(name, memoryview(content))
        return bytes(content)

    def fill(self, name: str, memory: memoryview) -> None:
        """Reads a member into memory of its size."""
        member = self.members[name]
        self._file.seek(member.header_offset)
        stream = Stream(self._file, self._size - member.header_offset)
        header = stream.take(30)
        if not header.startswith(ZIP_MAGIC):
            raise Damaged(f"{name[:60]!a} is not where it should be in it")
        # the name and what else stands before the content
        stream.take(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"))
        stream.fill(memory)
        if self._verify and zlib.crc32(memory) != member.CRC:
            raise Damaged(f"the checksum of {name[:60]!a} in it is another")


def load_zip(file: BinaryIO, size: int, *, verify: bool = True, beside: bool = False) -> Any:
    """Reads a file that ``torch.save`` has written since version 1.6.

    Args:
        file: the file.
        size: its number of bytes.
        verify: compare each part of it with its checksum.
        beside: as in :class:`.pickles.Unpickler`.

    Raises:
        Damaged, Refused: as :class:`.pickles.Unpickler`; what does not match its checksum is damaged.
    """
    archive = _Archive(file, size, verify=verify)
    root = _root(archive.members)
    order = archive.members.get(f"{root}byteorder")
    if order is not None and (order.file_size > 100 or archive.read(order.filename) != b"little"):
        raise Damaged("it was written on a machine with another byte order")
    storages = Storages(size)

    def storage(reference: Any) -> Any:
        if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] not in ("storage", b"storage"):
            raise Damaged("a storage in it has no kind and size")
        _, kind, key, _, elements = reference
        found, is_new = storages.add(key, kind, elements)
        if is_new:
            name, memory = f"{root}data/{found.key}", storages.bytes(found.key)
            if name not in archive.members:
                raise Damaged(f"the storage {found.key[:20]!a} is not in it")
            if archive.members[name].file_size != len(memory):
                raise Damaged(
                    f"it claims a storage of {len(memory)} bytes where it has {archive.members[name].file_size}"
                )
            archive.fill(name, memoryview(memory))
        return found

    program = archive.read(f"{root}data.pkl")
    stream = Stream(io.BytesIO(program), len(program))
    value = Unpickler(stream, _BUILDERS, TORCH_VALUES, storage, beside=beside).load()
    storages.check()
    return value


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    twice = [name for name, times in Counter(info.filename for info in infos).items() if times > 1]
    if twice:
        raise Damaged(f"it holds {twice[0][:60]!a} twice")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise Damaged(f"{info.filename[:60]!a} in it is compressed, which torch.save does not do")
    if sum(info.file_size for info in infos) > size:
        raise Damaged("its parts are larger than it is")
    return {info.filename: info for info in infos}


def _root(members: dict[str, zipfile.ZipInfo]) -> str:
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise Damaged("it is no file that torch.save wrote")
    if f"{roots[0]}constants.pkl" in members:
        raise Damaged("it is a TorchScript program, not weights")
    return roots[0]


def load_legacy(stream: Stream, *, beside: bool = False) -> Any:
    """Reads a file that ``torch.save`` wrote before version 1.6, behind its first pickle, :data:`_LEGACY_MAGIC`.

    Args:
        stream: the file from there on.
        beside: as in :class:`.pickles.Unpickler`.

    Raises:
        Damaged, Refused: as :class:`.pickles.Unpickler`.
    """
    version = Unpickler(stream, {}).load()
    machine = Unpickler(stream, {}).load()
    if version != _LEGACY_VERSION or not isinstance(machine, dict):
        raise Damaged("it is of a format of torch.save that nobody knows")
    if machine.get("little_endian") is not True:
        raise Damaged("it was written on a machine with another byte order")
    storages = Storages(stream.left)

    def storage(reference: Any) -> Any:
        # a class of a module, with its source
        if isinstance(reference, tuple) and len(reference) == 4 and isinstance(reference[1], Inert):
            return reference[1]
        if not isinstance(reference, tuple) or len(reference) != 6 or reference[0] not in ("storage", b"storage"):
            raise Damaged("a storage in it has no kind and size")
        _, kind, key, _, elements, view = reference
        if view is not None:
            raise Damaged("a storage in it is a part of another, as nobody has written them since 2017")
        return storages.add(key, kind, elements)[0]

    value = Unpickler(stream, _BUILDERS, TORCH_VALUES, storage, beside=beside).load()
    keys = Unpickler(stream, {}).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages.kinds):
        raise Damaged("its storages are not those that its tensors are in")
    for key in map(str, keys):
        memory = storages.bytes(key)
        elements = int.from_bytes(stream.take(8), "little", signed=True)
        if elements * storages.kinds[key].dtype.itemsize != len(memory):
            raise Damaged(f"it claims a storage of {len(memory)} bytes where it has {elements} numbers")
        stream.fill(memoryview(memory))
    storages.check()
    return value


def is_legacy(value: Any) -> bool:
    """Whether a file's first pickle is what those of ``torch.save`` began with."""
    return type(value) is int and value == _LEGACY_MAGIC


def load_pickle(file: BinaryIO, size: int) -> tuple[Any, Stream]:
    """The first pickle of a file, and what comes behind it."""
    stream = Stream(file, size)
    return Unpickler(stream, ARRAYS).load(), stream
