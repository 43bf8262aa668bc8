"""A pickle machine of our own: it builds plain containers by itself and calls nothing that a file names.

Python's unpickler (and torch's, with ``weights_only``) imports what a file names and hands the file's values to it:
``numpy.dtype.__setstate__`` alone lets them turn bytes into pointers. Here a name is a word to look up in a table of
functions of ours, which check what they are given; no memory is taken that the file itself does not fill.
"""

import codecs
import pickle
import struct
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

# No list in a list in ... of a weights file is deeper; what is would overflow the stack of those that walk it.
_DEEPEST = 100
# Of a number: random generators keep some of 2500 bytes, but as arrays.
_LONGEST_NUMBER = 255
# Empty containers take some 200 times the memory that they take in a file.
# The checkpoint of a Mask R-CNN with R-101 takes 26,000 steps.
_MOST_STEPS = 1_000_000
# Of what a refusal repeats.
_LONGEST_NAME = 100
_LONGEST_KEY = 500
# Python hashes integers modulo 2**61 - 1: larger keys can be made to collide.
_LARGEST_KEY = 1 << 60


class Damaged(ValueError):
    """What is wrong with a file, in words that go on "the weights FILE cannot be read: "."""


class Refused(ValueError):
    """The name of something that a file wants called and that weights do not need."""


# What training scripts keep beside their weights: settings, paths, dates, criteria, histories of losses.
_BESIDE_WEIGHTS = (
    *("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "torchmetrics."),
    *("omegaconf.", "mmengine.", "mmcv.", "addict.", "easydict.", "yacs.config.", "fvcore.common.config."),
    *("detectron2.config.", "pathlib.", "datetime.", "typing.", "uuid.", "torch.optim.", "torch.nn.modules."),
    *("functools.partial", "types.SimpleNamespace"),
    *(f"builtins.{name}" for name in ("int", "long", "float", "str", "unicode", "bool", "object")),
)


@dataclass(eq=False)
class Inert:
    """What stands for a value that a file has beside its weights: nothing is called for it, and nothing is in it.

    Attributes:
        path: the name that the file has for it.
    """

    path: str


class Stream:
    """A file that is never read beyond its end, whatever length it claims for its parts.

    Args:
        file: at the place to begin at.
        size: the number of bytes from there on.
    """

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self.left = size

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        self._claim(count)
        data = self._file.read(count)
        if len(data) != count:
            raise Damaged("it ends early")
        return data

    def fill(self, memory: memoryview) -> None:
        """Reads into all of ``memory``, which is of bytes."""
        self._claim(len(memory))
        while memory:
            count = self._file.readinto(memory)
            if not count:
                raise Damaged("it ends early")
            memory = memory[count:]

    def line(self) -> bytes:
        """What comes before the next line feed."""
        data = self._file.readline(self.left)
        self.left -= len(data)
        if not data.endswith(b"\n"):
            raise Damaged("it ends early")
        return data[:-1]

    def _claim(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise Damaged(f"it ends early: {count} bytes are announced where {self.left} are left")
        self.left -= count


@dataclass(frozen=True)
class Name:
    """A name in a pickle, of one of the functions that build values."""

    path: str
    build: Callable


@dataclass(eq=False)
class Shell:
    """What was made without its content, which a later step of the pickle brings.

    Attributes:
        fill: makes the value from that content.
        places: where in the pickle's memo it stands.
    """

    fill: Callable[[Any], Any]
    places: list[int] = field(default_factory=list)


def _plain(kind: type) -> Callable:
    """A container from another one; a number would be taken as a size to allocate by some."""

    def build(*content: Any) -> Any:
        if len(content) > 1 or (content and not isinstance(content[0], list | tuple | set | frozenset)):
            raise Damaged(f"a {kind.__name__} is made of something else than a container")
        if kind in (set, frozenset):
            for value in content[0] if content else ():
                _check_key(value)
        return kind(*content)

    return build


def _bytes(kind: type) -> Callable:
    def build(content: str | bytes = b"", encoding: str = "latin1") -> bytes | bytearray:
        if isinstance(content, str) and encoding in ("latin1", "latin-1"):
            return kind(content.encode("latin1"))
        if isinstance(content, list) and all(type(value) is int and 0 <= value < 256 for value in content):
            return kind(content)
        if not isinstance(content, bytes | bytearray):
            raise Damaged("bytes are made of something else than text")
        return kind(content)

    return build


def _complex(real: float, imaginary: float) -> complex:
    return complex(float(real), float(imaginary))


def _ordered(*content: Any) -> OrderedDict:
    result = OrderedDict()
    pairs = content[0] if content else ()
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        _set_item(result, *pair)
    return result


def _dict(*content: Any) -> dict:
    return dict(_ordered(*content))


def _default_dict(*_: Any) -> dict:
    # without what it would call for keys that are not there
    return {}


def _counter(*content: Any) -> Counter:
    result = Counter()
    for key, count in (content[0] if content else {}).items():
        _set_item(result, key, count)
    return result


PLAIN: dict[str, Callable] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _counter,
    "argparse.Namespace": Namespace,
    "_codecs.encode": _bytes(bytes),
    "builtins.bytes": _bytes(bytes),
    "builtins.bytearray": _bytes(bytearray),
    "builtins.complex": _complex,
    **{f"builtins.{kind.__name__}": _plain(kind) for kind in (list, tuple, set, frozenset)},
    "builtins.dict": _dict,
}


def _attribute(owner: Any, name: Any = "") -> Inert:
    """Of what is inert alone: Python's own ``getattr`` is a door to everything."""
    if not isinstance(owner, Inert):
        raise Refused("builtins.getattr")
    return Inert(f"{owner.path}.{name}"[:_LONGEST_NAME])


def _check_key(key: Any) -> None:
    """Keys are hashed and compared in C, which overflows the stack for a deep one."""
    parts = key if type(key) is tuple and len(key) < 100 else (key,)
    for part in parts:
        if type(part) in (int, float) and -_LARGEST_KEY < part < _LARGEST_KEY:
            continue
        if type(part) is str:
            check_name(part)
        elif type(part) not in (bytes, bool, type(None), Inert):
            raise Damaged(f"a {type(part).__name__} is a key of a dict or in a set")


def check_name(name: str) -> None:
    """Checks a name from a file, which may stand in a sentence later.

    Raises:
        Damaged: it does not print on a line.
    """
    if len(name) > _LONGEST_KEY or not name.isprintable():
        raise Damaged(f"the name {_shown(name)} in it is none that a tensor has")


def _shown(name: str) -> str:
    return (name if name.isprintable() else ascii(name))[:_LONGEST_NAME]


def _set_item(target: dict, key: Any, value: Any) -> None:
    _check_key(key)
    target[key] = value


class Unpickler:
    """Reads one pickle, of any protocol.

    Args:
        stream: stands behind the pickle afterwards.
        builders: the functions that may be called, by the names that pickles have for them, besides ``PLAIN``.
        values: what other names stand for.
        persistent: gives what a persistent id (of a tensor's storage) stands for.
        beside: whether what training scripts keep beside weights may be there, as :class:`Inert`.
    """

    def __init__(
        self,
        stream: Stream,
        builders: dict[str, Callable],
        values: dict[str, Any] | None = None,
        persistent: Callable[[Any], Any] | None = None,
        *,
        beside: bool = False,
    ):
        self.stream = stream
        self.builders = PLAIN | builders | ({"builtins.getattr": _attribute} if beside else {})
        self.beside = beside
        self.values = values or {}
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        """The pickle's value.

        Raises:
            Refused: it names something that weights do not need.
            Damaged: it is no pickle, or one that no writer of weights makes. (So are all other exceptions.)
        """
        for _ in range(_MOST_STEPS):
            code = self.stream.take(1)
            if code == pickle.STOP:
                value = self.stack.pop()
                check_value(value)
                return value
            step = _STEPS.get(code)
            if step is None:
                raise Damaged("it is no pickle of weights")
            step(self)
        raise Damaged("it makes more values than weights need")

    def call(self, function: Any, arguments: Any) -> Any:
        """What the pickle gets for calling a name."""
        if isinstance(function, Inert):
            return Inert(function.path)
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Damaged("something is called that is no function")
        return function.build(*arguments)

    def find(self, module: str, name: str) -> Any:
        """What a name stands for; nothing is imported."""
        # Python 2's builtins, NumPy 2's core
        module = {"__builtin__": "builtins"}.get(module, module)
        path = f"{module}.{name}"
        key = path.replace("numpy._core.", "numpy.core.", 1)
        if key in self.values:
            return self.values[key]
        if key not in self.builders:
            if self.beside and path.startswith(_BESIDE_WEIGHTS):
                return Inert(_shown(path))
            raise Refused(_shown(path))
        return Name(key, self.builders[key])

    def keep(self, place: int) -> None:
        """Puts the top of the stack into the memo."""
        value = self.stack[-1]
        if isinstance(value, Shell):
            value.places.append(place)
        self.memo[place] = value

    def build(self) -> None:
        """Gives the top of the stack but one its content."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Shell):
            value = target.fill(state)
            self.stack[-1] = value
            for place in target.places:
                if self.memo.get(place) is target:
                    self.memo[place] = value
        elif type(target) is OrderedDict:
            _set_versions(target, state)
        elif type(target) is Inert:
            pass
        elif type(target) is Namespace and type(state) is dict and all(type(key) is str for key in state):
            vars(target).update(state)
        else:
            raise Damaged(f"a {type(target).__name__} gets a state, which nothing in weights needs")

    def items(self) -> list[Any]:
        """What was put on the stack since the last mark, taken off it."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            return
        if type(target) is not list:
            raise Damaged(f"a {type(target).__name__} is appended to")
        target.extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            return
        if type(target) not in (dict, OrderedDict, Counter) or len(values) % 2:
            raise Damaged(f"a {type(target).__name__} gets items")
        for i in range(0, len(values), 2):
            _set_item(target, values[i], values[i + 1])

    def add_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Inert:
            return
        if type(target) is not set:
            raise Damaged(f"a {type(target).__name__} gets members")
        for value in values:
            _check_key(value)
            target.add(value)


def _set_versions(target: OrderedDict, state: Any) -> None:
    """A state dict's ``_metadata``: the version of each module."""
    versions = state.get("_metadata") if isinstance(state, dict) else None
    if isinstance(versions, dict) and all(
        type(name) is str
        and isinstance(entry, dict)
        and all(value is None or type(value) in (int, bool, str) for value in entry.values())
        for name, entry in versions.items()
    ):
        target._metadata = versions


_CONTAINERS = (list, tuple, set, frozenset, dict, OrderedDict, Counter, Namespace)


def check_value(value: Any) -> None:
    """Checks that no container holds itself or is too deep, and that nothing is left without its content.

    Raises:
        Damaged: it is so.
    """
    heights: dict[int, int] = {}
    above: set[int] = set()
    steps: list[tuple[Any, bool]] = [(value, False)]
    while steps:
        value, leaving = steps.pop()
        if isinstance(value, Shell | Name):
            raise Damaged("something in it has no content")
        if type(value) not in _CONTAINERS or id(value) in heights:
            continue
        if leaving:
            above.discard(id(value))
            # of what stands at several places too: each is walked once, as lists can repeat each other 2**n times
            heights[id(value)] = 1 + max((heights.get(id(child), 0) for child in _children(value)), default=0)
            if heights[id(value)] > _DEEPEST:
                raise Damaged(f"it is nested more than {_DEEPEST} deep")
            continue
        if id(value) in above:
            raise Damaged("something in it contains itself")
        above.add(id(value))
        steps.append((value, True))
        steps += [(child, False) for child in _children(value)]


def _children(value: Any) -> Iterable:
    content = vars(value) if type(value) is Namespace else value
    return content.values() if isinstance(content, dict) else content


def _number(text: bytes) -> int:
    if len(text) > 2 * _LONGEST_NUMBER:
        raise Damaged("a number in it is too long")
    return int(text)


def _int(machine: Unpickler) -> int | bool:
    text = machine.stream.line()
    return {b"00": False, b"01": True}.get(text) if text in (b"00", b"01") else _number(text)


def _long(machine: Unpickler, size: int) -> int:
    if size > _LONGEST_NUMBER:
        raise Damaged("a number in it is too long")
    return int.from_bytes(machine.stream.take(size), "little", signed=True)


def _quoted(machine: Unpickler) -> str:
    text = machine.stream.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise Damaged("a text in it has no quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin1")


def _unsigned(machine: Unpickler, size: int) -> int:
    return int.from_bytes(machine.stream.take(size), "little")


def _text(machine: Unpickler, size: int) -> str:
    return str(machine.stream.take(_unsigned(machine, size)), "utf-8", "surrogatepass")


def _old_text(machine: Unpickler, size: int) -> str:
    # Python 2's strings are bytes
    return machine.stream.take(_unsigned(machine, size)).decode("latin1")


def _push(read: Callable[[Unpickler], Any]) -> Callable[[Unpickler], None]:
    def step(machine: Unpickler) -> None:
        value = read(machine)  # first: it may take the stack itself
        machine.stack.append(value)

    return step


def _tuple_of(count: int) -> Callable[[Unpickler], None]:
    def step(machine: Unpickler) -> None:
        if len(machine.stack) < count:
            raise Damaged("it is no pickle of weights")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return step


def _get(size: int) -> Callable[[Unpickler], None]:
    return _push(lambda machine: machine.memo[_unsigned(machine, size)])


def _put(size: int) -> Callable[[Unpickler], None]:
    return lambda machine: machine.keep(_unsigned(machine, size))


def _mark(machine: Unpickler) -> None:
    machine.marks.append(machine.stack)
    machine.stack = []


def _reduce(machine: Unpickler) -> Any:
    arguments = machine.stack.pop()
    return machine.call(machine.stack.pop(), arguments)


def _reduce_with_keywords(machine: Unpickler) -> Any:
    if machine.stack.pop() and not (len(machine.stack) > 1 and isinstance(machine.stack[-2], Inert)):
        raise Damaged("something is called with keywords")
    return _reduce(machine)


def _stack_global(machine: Unpickler) -> Any:
    name, module = machine.stack.pop(), machine.stack.pop()
    if type(name) is not str or type(module) is not str:
        raise Damaged("a name in it is no text")
    return machine.find(module, name)


def _global(machine: Unpickler) -> Any:
    return machine.find(machine.stream.line().decode(), machine.stream.line().decode())


def _instance(machine: Unpickler) -> None:
    path = ".".join(machine.stream.line().decode("latin1") for _ in range(2))
    if not all(part.isidentifier() for part in path.split(".")):  # a text file that happens to begin so
        raise Damaged("it is no pickle")
    raise Refused(_shown(path))


def _persistent(machine: Unpickler) -> Any:
    if machine.persistent is None:
        raise Damaged("it refers to storages, which are not in it")
    return machine.persistent(machine.stack.pop())


def _frozen(machine: Unpickler) -> frozenset:
    return PLAIN["builtins.frozenset"](machine.items())


def _pairs(machine: Unpickler) -> dict:
    values, result = machine.items(), {}
    for i in range(0, len(values), 2):
        _set_item(result, values[i], values[i + 1])
    return result


_STEPS: dict[bytes, Callable[[Unpickler], Any]] = {
    pickle.PROTO: lambda machine: machine.stream.take(1),
    pickle.FRAME: lambda machine: machine.stream.take(8),
    pickle.MARK: _mark,
    pickle.POP: lambda machine: machine.stack.pop() if machine.stack else machine.items(),
    pickle.POP_MARK: lambda machine: machine.items(),
    pickle.DUP: _push(lambda machine: machine.stack[-1]),
    # values
    pickle.NONE: _push(lambda machine: None),
    pickle.NEWTRUE: _push(lambda machine: True),
    pickle.NEWFALSE: _push(lambda machine: False),
    pickle.INT: _push(_int),
    pickle.LONG: _push(lambda machine: _number(machine.stream.line().rstrip(b"L"))),
    pickle.BININT: _push(lambda machine: struct.unpack("<i", machine.stream.take(4))[0]),
    pickle.BININT1: _push(lambda machine: _unsigned(machine, 1)),
    pickle.BININT2: _push(lambda machine: _unsigned(machine, 2)),
    pickle.LONG1: _push(lambda machine: _long(machine, _unsigned(machine, 1))),
    pickle.LONG4: _push(lambda machine: _long(machine, _unsigned(machine, 4))),
    pickle.FLOAT: _push(lambda machine: float(machine.stream.line())),
    pickle.BINFLOAT: _push(lambda machine: struct.unpack(">d", machine.stream.take(8))[0]),
    pickle.STRING: _push(_quoted),
    pickle.BINSTRING: _push(lambda machine: _old_text(machine, 4)),
    pickle.SHORT_BINSTRING: _push(lambda machine: _old_text(machine, 1)),
    pickle.UNICODE: _push(lambda machine: str(machine.stream.line(), "raw-unicode-escape")),
    pickle.SHORT_BINUNICODE: _push(lambda machine: _text(machine, 1)),
    pickle.BINUNICODE: _push(lambda machine: _text(machine, 4)),
    pickle.BINUNICODE8: _push(lambda machine: _text(machine, 8)),
    pickle.SHORT_BINBYTES: _push(lambda machine: machine.stream.take(_unsigned(machine, 1))),
    pickle.BINBYTES: _push(lambda machine: machine.stream.take(_unsigned(machine, 4))),
    pickle.BINBYTES8: _push(lambda machine: machine.stream.take(_unsigned(machine, 8))),
    pickle.BYTEARRAY8: _push(lambda machine: bytearray(machine.stream.take(_unsigned(machine, 8)))),
    # containers
    pickle.EMPTY_LIST: _push(lambda machine: []),
    pickle.EMPTY_DICT: _push(lambda machine: {}),
    pickle.EMPTY_TUPLE: _push(lambda machine: ()),
    pickle.EMPTY_SET: _push(lambda machine: set()),
    pickle.LIST: _push(lambda machine: machine.items()),
    pickle.DICT: _push(_pairs),
    pickle.TUPLE: _push(lambda machine: tuple(machine.items())),
    pickle.FROZENSET: _push(_frozen),
    pickle.TUPLE1: _tuple_of(1),
    pickle.TUPLE2: _tuple_of(2),
    pickle.TUPLE3: _tuple_of(3),
    pickle.APPEND: lambda machine: machine.append([machine.stack.pop()]),
    pickle.APPENDS: lambda machine: machine.append(machine.items()),
    pickle.SETITEM: lambda machine: machine.set_items([machine.stack.pop(-2), machine.stack.pop()]),
    pickle.SETITEMS: lambda machine: machine.set_items(machine.items()),
    pickle.ADDITEMS: lambda machine: machine.add_items(machine.items()),
    # the memo
    pickle.GET: _push(lambda machine: machine.memo[_number(machine.stream.line())]),
    pickle.BINGET: _get(1),
    pickle.LONG_BINGET: _get(4),
    pickle.PUT: lambda machine: machine.keep(_number(machine.stream.line())),
    pickle.BINPUT: _put(1),
    pickle.LONG_BINPUT: _put(4),
    pickle.MEMOIZE: lambda machine: machine.keep(len(machine.memo)),
    # names, and what is made with them
    pickle.GLOBAL: _push(_global),
    pickle.STACK_GLOBAL: _push(_stack_global),
    pickle.INST: _instance,
    pickle.REDUCE: _push(_reduce),
    pickle.NEWOBJ: _push(_reduce),
    pickle.NEWOBJ_EX: _push(_reduce_with_keywords),
    pickle.BUILD: lambda machine: machine.build(),
    pickle.BINPERSID: _push(_persistent),
}
