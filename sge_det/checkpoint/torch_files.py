"""What ``torch.save`` writes, in both its formats, read without torch's unpickler."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from .pickles import Damaged, Stream, Unpickler
from .tensors import ARRAYS, TENSORS, TORCH_VALUES, Storages

ZIP_MAGIC = b"PK\x03\x04"
# The first pickle of the format before zip files, its version, and what a machine must be like.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_BUILDERS = ARRAYS | TENSORS


def load_zip(path: Path) -> Any:
    """Reads a file that ``torch.save`` has written since version 1.6.

    Raises:
        Damaged, Refused: as :class:`.pickles.Unpickler`; what a checksum in it does not match is damaged.
    """
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = _members(archive, size)
        root = _root(members)
        order = members.get(f"{root}byteorder")
        if order is not None and _content(archive, order, 100) != b"little":
            raise Damaged("it was written on a machine with another byte order")
        storages = Storages(size)

        def storage(reference: Any) -> Any:
            if not isinstance(reference, tuple) or len(reference) != 5 or reference[0] not in ("storage", b"storage"):
                raise Damaged("a storage in it has no kind and size")
            _, kind, key, _, elements = reference
            found, is_new = storages.add(key, kind, elements)
            if is_new:
                member = members.get(f"{root}data/{key}")
                if member is None:
                    raise Damaged(f"the storage {str(key)[:20]!a} is not in it")
                _fill(archive, member, storages.bytes(found.key))
            return found

        program = members[f"{root}data.pkl"]
        with archive.open(program) as file:
            value = Unpickler(Stream(file, program.file_size), _BUILDERS, TORCH_VALUES, storage).load()
            while file.read(1 << 16):  # to its end, where its checksum is compared
                pass
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


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo, longest: int) -> bytes:
    if member.file_size > longest:
        raise Damaged(f"{member.filename[:60]!a} in it is too long")
    return archive.read(member)


def _fill(archive: zipfile.ZipFile, member: zipfile.ZipInfo, memory: Any) -> None:
    if member.file_size != len(memory):
        raise Damaged(f"it claims a storage of {len(memory)} bytes where it has {member.file_size}")
    with archive.open(member) as file:
        Stream(file, member.file_size).fill(memoryview(memory))
        file.read(1)  # at its end its checksum is compared


def load_legacy(stream: Stream) -> Any:
    """Reads a file that ``torch.save`` wrote before version 1.6, behind its first pickle, :data:`_LEGACY_MAGIC`.

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
        if not isinstance(reference, tuple) or len(reference) != 6 or reference[0] not in ("storage", b"storage"):
            raise Damaged("a storage in it has no kind and size")
        _, kind, key, _, elements, view = reference
        if view is not None:
            raise Damaged("a storage in it is a part of another, as nobody has written them since 2017")
        return storages.add(key, kind, elements)[0]

    value = Unpickler(stream, _BUILDERS, TORCH_VALUES, storage).load()
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
