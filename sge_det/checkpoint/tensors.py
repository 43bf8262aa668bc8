"""From bytes to arrays and tensors: every size that a file claims is checked against the bytes that it has."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .pickles import Damaged, Name, Shell

_MOST_DIMENSIONS = 16
# Tied weights share their storage, but not by the hundred.
_MOST_SHARING = 8
_LEAST_CLAIM = 1 << 20

_DTYPE_NAMES = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
)
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES if hasattr(torch, name)}
_STORAGES = {
    **{"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"},
    **{"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexDouble": "complex128", "ComplexFloat": "complex64"},
}


class StorageKind(str):
    """The name of a storage's dtype; "" for one of bytes, whose tensors say what they are."""

    __slots__ = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements."""
        return DTYPES[self] if self else torch.uint8


TORCH_VALUES: dict[str, Any] = {
    **{f"torch.{name}": value for name, value in DTYPES.items()},
    **{
        f"{module}.{kind}Storage": StorageKind(name)
        for module in ("torch", "torch.cuda")
        for kind, name in _STORAGES.items()
    },
    "torch.storage.UntypedStorage": StorageKind(),
}


def count(shape: Any) -> int:
    """The number of elements of a shape.

    Raises:
        Damaged: it is none.
    """
    if not isinstance(shape, list | tuple) or len(shape) > _MOST_DIMENSIONS:
        raise Damaged("a tensor in it has no shape")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise Damaged("a tensor in it has a shape that is not of whole numbers from 0 on")
    # a tensor of no elements has strides all the same, which are products of the other sizes
    if math.prod(size or 1 for size in shape) > 2**47:
        raise Damaged(f"it claims a tensor of {'x'.join(str(size)[:20] for size in shape)} numbers")
    return math.prod(shape)


def check_booleans(data: np.ndarray) -> None:
    """Checks that bytes are 0 or 1: what compilers make of other booleans is undefined.

    Raises:
        Damaged: one is not.
    """
    if data.size and data.max() > 1:
        raise Damaged("a boolean in it is neither true nor false")


class DType(str):
    """NumPy's name of a dtype: a byte order, one of the letters b, i, u, f, c, and the bytes of an element."""

    __slots__ = ()


def _dtype(name: Any, *_: Any) -> Shell:
    found = re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", name) if isinstance(name, str) else None
    if found is None:
        raise Damaged(f"an array in it is of {ascii(name)[:20]}, which is no kind of numbers")

    def fill(state: Any) -> DType:
        # (version, byte order, subtype, names, fields, size, alignment, flags[, metadata])
        if not isinstance(state, tuple) or len(state) < 7 or state[1] not in ("<", ">", "|", "="):
            raise Damaged("an array in it has no byte order")
        if any(part is not None for part in state[2:5]) or any(flags != 0 for flags in state[7:8]):
            raise Damaged("an array in it is not of plain numbers")
        return DType(state[1] + found[1])

    return Shell(fill)


def _array(data: Any, dtype: Any, shape: Any, order: str = "C") -> np.ndarray:
    if not isinstance(dtype, DType) or order not in ("C", "F"):
        raise Damaged("an array in it has no dtype")
    if isinstance(data, str):
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray):
        raise Damaged("an array in it has no bytes")
    kind = np.dtype(str(dtype))
    if count(shape) * kind.itemsize != len(data):
        raise Damaged(f"it claims an array of {count(shape)} numbers where it has {len(data)} bytes")
    if kind.kind == "b":
        check_booleans(np.frombuffer(data, np.uint8))
    # torch takes numbers in this machine's byte order alone, and memory that it can write to
    return np.frombuffer(data, kind).reshape(shape, order=order).astype(kind.newbyteorder("="))


def _empty_array(kind: Any, *_: Any) -> Shell:
    if not isinstance(kind, Name) or kind.path != "numpy.ndarray":
        raise Damaged("an array in it is of another class than NumPy's")

    def fill(state: Any) -> np.ndarray:
        # ([version,] shape, dtype, whether in Fortran's order, bytes)
        shape, dtype, is_fortran, data = state[-4:]
        return _array(data, dtype, shape, "F" if is_fortran else "C")

    return Shell(fill)


def _scalar(dtype: Any, data: Any) -> np.generic:
    return _array(data, dtype, ())[()]


def _not_called(*_: Any) -> Any:
    raise Damaged("an array in it is made without its bytes")


ARRAYS = {
    "numpy.dtype": _dtype,
    "numpy.ndarray": _not_called,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
}


class Storages:
    """The storages of a torch file, and the tensors in them.

    Args:
        size: of the file, in bytes; all storages together are no larger.
    """

    def __init__(self, size: int):
        self._left = size
        self._claims_left = _MOST_SHARING * size + _LEAST_CLAIM
        self._memory: dict[str, Tensor] = {}
        self.kinds: dict[str, StorageKind] = {}

    def add(self, key: Any, kind: Any, elements: Any) -> tuple["Storage", bool]:
        """A storage by its key, and whether it is new: its memory has to be filled then."""
        if type(key) not in (str, int) or not isinstance(kind, StorageKind) or type(elements) is not int:
            raise Damaged("a storage in it has no kind and size")
        key, size = str(key), elements * kind.dtype.itemsize
        known = self._memory.get(key)
        if known is None:
            if not 0 <= size <= self._left:
                raise Damaged(f"it claims a storage of {size} bytes, which it does not have")
            self._left -= size
            self._memory[key] = torch.empty(size, dtype=torch.uint8)
            self.kinds[key] = kind
        elif len(known) != size:
            raise Damaged(f"it claims two sizes for the storage {key[:20]!a}")
        return Storage(self, key, kind), known is None

    def bytes(self, key: str) -> np.ndarray:
        """The memory of a storage, to be filled."""
        return self._memory[key].numpy()

    def tensor(self, key: str, dtype: torch.dtype, shape: Any, strides: Any, offset: Any) -> Tensor:
        """A view of a storage."""
        elements = count(shape)
        if type(offset) is not int or not isinstance(strides, list | tuple) or len(strides) != len(shape):
            raise Damaged("a tensor in it has no strides")
        if offset < 0 or not all(type(stride) is int and 0 <= stride < 2**47 for stride in strides):
            raise Damaged("a tensor in it has strides that are not whole numbers from 0 on")
        memory = self._memory[key]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if elements and (last + 1) * dtype.itemsize > len(memory):
            raise Damaged(f"a tensor in it ends at element {last}, beyond its storage of {len(memory)} bytes")
        self._claims_left -= elements * dtype.itemsize
        if self._claims_left < 0:
            raise Damaged("its tensors claim many times the bytes that it has")
        if not elements:
            return torch.empty(shape, dtype=dtype)
        whole = len(memory) // dtype.itemsize * dtype.itemsize
        return memory[:whole].view(dtype).as_strided(shape, strides, offset)

    def check(self) -> None:
        """Checks the content of what has been filled.

        Raises:
            Damaged: a boolean is neither true nor false.
        """
        for key, kind in self.kinds.items():
            if kind == "bool":
                check_booleans(self.bytes(key))


class Storage:
    """A storage as pickles hand it to the functions that make tensors."""

    def __init__(self, storages: Storages, key: str, kind: StorageKind):
        self.storages, self.key, self.kind = storages, key, kind

    def tensor(self, offset: Any, shape: Any, strides: Any, dtype: torch.dtype | None = None) -> Tensor:
        """A view of it."""
        return self.storages.tensor(self.key, dtype or self.kind.dtype, shape, strides, offset)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    # rest: whether a gradient is wanted, hooks, and bits of complex views
    if not isinstance(storage, Storage) or any(rest[2:]):
        raise Damaged("a tensor in it has no storage")
    return storage.tensor(offset, shape, strides)


def _tensor_of_bytes(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    dtype = rest[2] if len(rest) > 2 else None
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype) or storage.kind or any(rest[3:]):
        raise Damaged("a tensor in it has no storage")
    return storage.tensor(offset, shape, strides, dtype)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise Damaged("a parameter in it is no tensor")
    return data


def _of_class(build: Any, kind: Any, arguments: Any, *_: Any) -> Tensor:
    if not isinstance(build, Name) or build.path not in _TENSOR_BUILDERS or not isinstance(arguments, tuple):
        raise Damaged("a tensor in it is made of no storage")
    return build.build(*arguments)


def _shape(*sizes: Any) -> torch.Size:
    shape = sizes[0] if sizes else ()
    count(shape)
    return torch.Size(shape)


def _device(*name: Any) -> str:
    return ":".join(str(part)[:20] for part in name)


_TENSOR_BUILDERS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.nn.parameter.Parameter": _parameter,
}
TENSORS = _TENSOR_BUILDERS | {
    "torch._tensor._rebuild_from_type_v2": _of_class,
    "torch.Tensor": _not_called,
    "torch.Size": _shape,
    "torch.device": _device,
}


def fits(shapes: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether (begin, end) pairs follow each other from 0 to ``size`` without a hole."""
    end = 0
    for begin, after in sorted(shapes):
        if begin != end or after < begin:
            return False
        end = after
    return end == size
