"""Damaged and hostile weights files by the thousand: each is read correctly or refused with a UserError.

python tests/torture/fuzz_weights.py --mutated 2000 --crafted 500 --odd 500

Files are read in child processes with a memory limit. A signal, an exception that is not UserError, a read that takes
too long, memory that is not the file's, and a file left behind by a refused conversion are failures, and are printed
with the number that makes the file again (--only NUMBER keeps it).
"""

import argparse
import io
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from sge_det.checkpoint import convert_file, read_source
from sge_det.checkpoint.checkpointer import Checkpointer
from sge_det.checkpoint.safe_load import load_file, write_weights
from sge_det.errors import UserError

MEMORY = 2 << 30
SECONDS = 20
NUMBERS = [-(2**31), -2, -1, 0, 1, 2, 3, 16, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 10**13]


def resnet() -> dict[str, torch.Tensor]:
    """The names of torchvision's ResNet-18, with few channels."""
    generator = torch.Generator().manual_seed(0)

    def norm(name, channels):
        return {f"{name}.{part}": torch.rand(channels, generator=generator) for part in parts}

    parts = ("weight", "bias", "running_mean", "running_var")
    state = {"conv1.weight": torch.rand(2, 3, 7, 7, generator=generator)} | norm("bn1", 2)
    for stage in range(1, 5):
        for block in range(2):
            name, before = f"layer{stage}.{block}", 2 ** (stage - 1 if not block and stage > 1 else stage)
            for conv, channels in ((1, before), (2, 2**stage)):
                shape = (2**stage, channels, 3, 3)
                state[f"{name}.conv{conv}.weight"] = torch.rand(shape, generator=generator)
                state |= norm(f"{name}.bn{conv}", 2**stage)
            if before != 2**stage:
                state[f"{name}.downsample.0.weight"] = torch.rand(2**stage, before, 1, 1, generator=generator)
                state |= norm(f"{name}.downsample.1", 2**stage)
    return state


def pickled(content: object, protocol: int) -> bytes:
    return pickle.dumps(content, protocol)


def saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def good_files(folder: Path) -> list[tuple[str, bytes]]:
    """One of each kind of weights: its ending and content."""
    state = resnet()
    arrays = {key: value.numpy() for key, value in state.items()}
    blobs = {"res2_0_branch2a_w": np.ones((4, 4, 1, 1), np.float32), "res2_0_branch2a_bn_s": np.ones(4, ">f4")}
    write_weights(folder / "ours.safetensors", state, {"channel_order": "RGB"}, by_suffix=True)
    module = torch.nn.Linear(3, 2)
    training = {"model": module.state_dict(), "optimizer": {"state": {0: {"m": torch.ones(2)}}}, "best": np.float64(1)}
    training |= {"args": argparse.Namespace(lr=0.1), "tied": [state["conv1.weight"]] * 2, "epoch": 3}
    return [
        (".pth", saved(state)),
        (".pth", saved({"state_dict": state, "meta": {"config": "mean=[1, 2, 3]"}})),
        (".pth", saved(training)),
        (".pth", saved(state, _use_new_zipfile_serialization=False)),
        (".pth.tar", saved(training, _use_new_zipfile_serialization=False)),
        (".pkl", pickled(arrays, 2)),
        (".pkl", pickled({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}, 4)),
        (".pkl", pickled({"blobs": blobs}, 0)),
        (".pkl", pickled(arrays, 5)),
        (".safetensors", safetensors.torch.save(state)),
        (".safetensors", (folder / "ours.safetensors").read_bytes()),
    ]


def mutate(rng: random.Random, content: bytes) -> bytes:
    """One to four changes, mostly where lengths, names and programs are: in the first and last thousand bytes."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        size = max(len(data), 1)
        near_ends = rng.randrange(min(size, 1500)), size - 1 - rng.randrange(min(size, 900))
        place = rng.choice((rng.randrange(size), *near_ends))
        span = rng.choice((1, 1, 2, 4, 8, 64, 500))
        kind = rng.randrange(8)
        if kind <= 2 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 3:
            data[place : place + span] = rng.randbytes(span)
        elif kind == 4:
            del data[place : place + span]
        elif kind == 5:
            data[place:place] = data[rng.randrange(size) :][:span]
        elif kind == 6:
            number = rng.choice(NUMBERS)
            width = rng.choice((4, 8))
            data[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")
        else:
            del data[place : None if rng.random() < 0.3 else place + 1]
    return bytes(data)


def mutate_member(rng: random.Random, content: bytes) -> bytes:
    """Changes one part of a zip file and gives it the checksum of what it is then."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice([name for name in members if name.endswith("data.pkl")] * 4 + list(members))
    members[name] = mutate(rng, members[name])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return buffer.getvalue()


NAMES = [
    *("numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar"),
    *("numpy.core.numeric._frombuffer", "numpy._core.multiarray._reconstruct", "torch._utils._rebuild_tensor_v2"),
    *("torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter", "torch._tensor._rebuild_from_type_v2"),
    *("torch.FloatStorage", "torch.storage.UntypedStorage", "torch.BoolStorage", "torch.float32", "torch.Tensor"),
    *("torch.Size", "torch.device", "torch.FloatTensor", "torch._utils._rebuild_sparse_tensor"),
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "argparse.Namespace"),
    *("_codecs.encode", "__builtin__.bytearray", "builtins.bytes", "builtins.set", "builtins.dict", "builtins.list"),
    *("builtins.frozenset", "builtins.complex", "builtins.tuple", "builtins.getattr", "os.system", "torch.load"),
    *("numpy.dtypes.Float32DType", "numpy.core.numeric.zeros", "ctypes.string_at", "torch.nn.parameter.Parameter"),
]
TEXTS = ["O8", "f4", "<f8", "V16", "b1", "U4", "|", "<", "storage", "0", "1", "cpu", "latin1", "model", "conv1.weight"]


def a_name(path: str) -> bytes:
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def a_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def a_number(number: int) -> bytes:
    return b"\x8a\x09" + number.to_bytes(9, "little", signed=True)


def some_bytes(data: bytes) -> bytes:
    return b"C" + bytes([len(data)]) + data


def craft(rng: random.Random, depth: int = 0) -> bytes:
    """Opcodes for one value, out of what readers of weights take for their own."""
    kind = rng.randrange(22 if depth < 5 else 8)

    def some(limit=4):
        return b"".join(craft(rng, depth + 1) for _ in range(rng.randrange(limit)))

    if kind == 0:
        return b"J" + rng.randbytes(4)
    if kind == 1:
        return a_number(rng.choice(NUMBERS))
    if kind in (2, 3):
        return a_text(rng.choice(TEXTS))
    if kind == 4:
        return rng.choice([b"N", b"\x88", b"\x89", b"]", b"}", b")", b"\x8f", b"G" + rng.randbytes(8)])
    if kind == 5:
        return some_bytes(rng.randbytes(rng.choice((0, 1, 4, 8, 16))))
    if kind == 6:
        return b"h" + bytes([rng.randrange(6)])
    if kind == 7:
        return a_name(rng.choice(NAMES))
    if kind <= 11:  # a call
        call = a_name(rng.choice(NAMES)) + b"(" + some(7) + b"t" + rng.choice([b"R", b"R", b"\x81"])
        return call + rng.choice([b"", b"", b"q" + bytes([rng.randrange(6)]), b"(" + some(9) + b"tb"])
    if kind == 12:
        return craft_array(rng)
    if kind == 13:
        return craft_tensor(rng)
    if kind == 14:
        return craft(rng, depth + 1) + b"Q"
    if kind == 15:
        return b"(" + some(6) + b"t"
    if kind == 16:
        return b"](" + some(6) + b"e"
    if kind == 17:
        return b"}(" + some(7) + b"u"
    if kind == 18:
        return craft(rng, depth + 1) + craft(rng, depth + 1) + b"b"
    if kind == 19:
        return craft(rng, depth + 1) + b"r" + struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1)))
    if kind == 20:
        return rng.choice([b"\x8e", b"\x96", b"\x8d", b"\x95"]) + struct.pack("<Q", rng.choice(NUMBERS) % 2**64)
    return bytes([rng.randrange(256)]) + some(3)


def craft_array(rng: random.Random) -> bytes:
    """An array as NumPy pickles it, with sizes and kinds out of the air."""
    name = rng.choice(["f4", "f4", "f4", "f8", "i1", "b1", "c8", "O8", "V4", "U1", "f4,f4"])
    state = (
        b"(K\x03" + a_text("<") + b"NNN" + 2 * b"J\xff\xff\xff\xff" + b"K" + bytes([rng.choice([0, 0, 0, 0, 1, 63])])
    )
    kind = a_name("numpy.dtype") + b"(" + a_text(name) + b"\x89\x88tR" + state + b"tb"
    data = rng.randbytes(rng.choice((0, 4, 8, 16)))
    shape = b"".join(a_number(rng.choice([1, 2, 4] * 9 + NUMBERS)) for _ in range(rng.randrange(4)))
    empty = a_name("numpy.core.multiarray._reconstruct") + b"(" + a_name("numpy.ndarray") + b"K\x00\x85C\x01btR"
    return empty + b"(K\x01(" + shape + b"t" + kind + rng.choice([b"\x88", b"\x89"]) + some_bytes(data) + b"tb"


def craft_tensor(rng: random.Random) -> bytes:
    """A tensor as torch pickles it, with sizes, strides and offsets out of the air."""

    def number(*usual):
        return a_number(rng.choice([*usual * 9, *NUMBERS]))

    kind = a_name("torch." + rng.choice(["Float", "Float", "Double", "Bool", "Long"]) + "Storage")
    storage = b"(" + a_text("storage") + kind + a_text(rng.choice(["0", "0", "1", "7"])) + a_text("cpu")
    storage += number(4, 2, 16) + rng.choice([b"", b"N"]) + b"tQ"
    rank = rng.randrange(4)
    sizes, strides = (b"(" + b"".join(number(*usual) for _ in range(rank)) + b"t" for usual in ((1, 2, 4), (0, 1, 2)))
    rest = b"\x89" + a_name("collections.OrderedDict") + b")RtR"
    return a_name("torch._utils._rebuild_tensor_v2") + b"(" + storage + number(0, 0, 1) + sizes + strides + rest


def crafted_file(rng: random.Random) -> tuple[str, bytes]:
    """A pickle of a dict with a few crafted values, in one of the wrappings in which pickles come."""
    entries = b"".join(
        a_text(name) + rng.choice([craft, craft, craft_array, craft_tensor, craft_tensor])(rng)
        for name in rng.sample(["conv1.weight", "model", "metadata", "layer1.0.conv1.weight", "meta", "a"], 2)
    )
    program = b"\x80\x02}(" + entries + b"u."
    wrapping = rng.randrange(3)
    if wrapping == 0:
        return ".pkl", program
    if wrapping == 1:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            for key in range(2):
                archive.writestr(f"archive/data/{key}", rng.randbytes(rng.choice((16, 16, 8))))
        return ".pth", buffer.getvalue()
    keys = pickle.dumps(["0"], 2)
    elements = rng.choice([4, 4, *(number for number in NUMBERS if abs(number) < 2**63)])
    return ".pth", _legacy_head() + program + keys + struct.pack("<q", elements) + bytes(16)


def _legacy_head() -> bytes:
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, info))


def rename(state: dict[str, torch.Tensor], *patterns: tuple[str, str]) -> dict[str, torch.Tensor]:
    result = {}
    for key, value in state.items():
        for pattern, replacement in patterns:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def kinds_of_states() -> list[dict[str, torch.Tensor]]:
    """A state of each kind that the converter knows, with few channels."""
    plain = resnet()
    sge = plain | {
        f"layer{n}.{b}.sge.{part}": torch.rand(1, 2, 1, 1)
        for n in range(1, 5)
        for b in (0, 1)
        for part in ("weight", "bias")
    }
    backbone = rename(
        plain,
        (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
        (r"\bbn(\d)\b", r"conv\1.norm"),
        (r"downsample\.0", "shortcut"),
        (r"downsample\.1", "shortcut.norm"),
        (r"^conv1", "stem.conv1"),
    )
    c2 = rename(
        backbone,
        (r"^stem\.conv1\.norm\.weight", "res_conv1_bn_s"),
        (r"^stem\.conv1\.weight", "conv1_w"),
        (r"^res(\d)\.(\d)\.conv1\.weight", r"res\1_\2_branch2a_w"),
        (r"^res(\d)\.(\d)\.conv1\.norm\.weight", r"res\1_\2_branch2a_bn_s"),
        (r"^res(\d)\.(\d)\.conv2\.weight", r"res\1_\2_branch2b_w"),
        (r"^res(\d)\.(\d)\.shortcut\.weight", r"res\1_\2_branch1_w"),
    )
    detector = {f"backbone.bottom_up.{key}": value for key, value in backbone.items()}
    detector |= {"pixel_mean": torch.rand(3, 1, 1), "pixel_std": torch.rand(3, 1, 1), "roi_heads.a": torch.rand(2)}
    mmdet = {f"backbone.{key}": value for key, value in plain.items()}
    for level in range(4):
        mmdet[f"neck.lateral_convs.{level}.conv.weight"] = torch.rand(2, 2, 1, 1)
        mmdet[f"neck.fpn_convs.{level}.conv.weight"] = torch.rand(2, 2, 3, 3)
    rpn = {
        f"rpn_head.rpn_{part}.weight": torch.rand(size, 2, 1, 1)
        for part, size in (("conv", 2), ("cls", 3), ("reg", 12))
    }
    heads = {"bbox_head.fc_cls.weight": torch.rand(5, 4), "bbox_head.fc_reg.weight": torch.rand(20, 4)}
    heads |= {"bbox_head.shared_fcs.0.weight": torch.rand(4, 8)}
    masks = {"mask_head.conv_logits.weight": torch.rand(5, 2, 1, 1), "mask_head.upsample.bias": torch.rand(2)}
    cascade = rename(heads, (r"^bbox_head\.", "bbox_head.0."))
    retina = {
        "bbox_head.retina_cls.weight": torch.rand(36, 2, 3, 3),
        "bbox_head.retina_reg.weight": torch.rand(36, 2, 3, 3),
    }
    timm = rename(sge, (r"\.sge\.", ".se."))
    return [
        *(plain, sge, timm, backbone, c2, detector, mmdet | rpn | heads, mmdet | rpn | heads | masks),
        *(mmdet | rpn | cascade, mmdet | retina),
    ]


SHAPES = [
    (),
    (0,),
    (1,),
    (2,),
    (3,),
    (1, 1),
    (2, 2),
    (0, 2, 1, 1),
    (2, 0, 1, 1),
    (1, 2, 1, 1),
    (4, 4, 3, 3),
    (2, 2, 3, 3, 1),
]


def odd_file(rng: random.Random) -> tuple[str, bytes]:
    """Weights of a known kind with tensors that are missing, renamed, or of another shape and kind of numbers."""
    state = dict(rng.choice(kinds_of_states()))
    for _ in range(rng.choice((1, 1, 2, 5))):
        key = rng.choice([*list(state), *(key for key in state if not re.search(r"bn|norm|layer|res\d", key))])
        value = torch.rand(rng.choice(SHAPES))
        kind = rng.randrange(6)
        if kind == 0:
            del state[key]
        elif kind == 1:
            state[key + rng.choice(["", ".x", "_momentum", ".num_batches_tracked"])] = value
        elif kind == 2:
            state[key] = value.to(rng.choice([torch.int64, torch.bool, torch.complex64, torch.float16, torch.uint8]))
        elif kind == 3:
            state[rng.choice([key.replace("0", "7"), key[1:], key.replace(".", ""), "", "9" * 300])] = value
        elif kind == 4:
            state[key] = rng.choice(
                [None, 1, "text", [1.0], [[1], [2, 3]], 2**70, {}, b"x", np.zeros(2), np.float32(1)]
            )
        else:
            state[key] = value
    content = rng.choice(
        [state, {"model": state}, {"state_dict": state, "meta": rng.choice([None, 1, {"config": 3}, state])}]
    )
    if rng.random() < 0.3:
        content = {
            "model": state,
            "matching_heuristics": rng.choice([True, False]),
            "__author__": rng.choice(["Caffe2", "x"]),
        }
    if rng.random() < 0.2:
        return ".pkl", pickled(
            {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in state.items()}, 2
        )
    return ".pth", saved(content)


def make(number: int, mutated: int, crafted: int, files: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """The file of a number: its ending and its content."""
    rng = random.Random(number)
    if number >= mutated:
        return crafted_file(rng) if number < crafted else odd_file(rng)
    ending, content = files[number % len(files)]
    is_zip = content.startswith(b"PK")
    changed = (mutate_member if is_zip and rng.random() < 0.8 else mutate)(rng, content)
    return ending, changed


def check_memory(content: object, data: bytes) -> None:
    """Every byte of an array or a tensor is the file's (pickles hold bytes as text too), at its place."""
    stack, seen = [content], set()
    while stack:
        value = stack.pop()
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            stack += value.values() if isinstance(value, dict) else value
        if isinstance(value, torch.Tensor):
            memory = torch.tensor([], dtype=torch.uint8).set_(value.untyped_storage()).numpy().tobytes()
            value.double().sum() if not value.is_complex() else value.sum()
            assert memory in data, "a tensor's memory is not the file's"
        elif isinstance(value, np.ndarray):
            value.sum()
            forms = [order.tobytes("A") for order in (value, value.byteswap())]
            forms += [form.decode("latin1").encode() for form in forms]
            # the oldest protocol writes bytes with escapes
            assert any(form in data for form in forms) or data[:1] != b"\x80", "an array's memory is not the file's"


def read(path: Path, data: bytes) -> str:
    """Reads a file in all ways in which the tools do."""
    try:
        content = load_file(path)
    except UserError as error:
        outcome = f"refused: {type(error).__name__}"
    else:
        outcome = "read"
        check_memory(content, data)
        if path.suffix == ".safetensors":
            expected = safetensors.torch.load(data)
            assert content["model"].keys() == expected.keys()
            for key, value in expected.items():
                # NaN is not equal to itself
                assert content["model"][key].numpy().tobytes() == value.numpy().tobytes()
    out = path.with_name("out.pth")
    for use in (
        lambda: convert_file(str(path), str(out)),
        lambda: read_source(str(path), strict=False),
        lambda: Checkpointer(torch.nn.Linear(3, 2), whole_model=True).load(str(path)),
    ):
        try:
            use()
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 2000, f"no sentence: {str(error)[:300]!r}"
        if out.exists():
            outcome = "converted"
            load_file(out)
            out.unlink()
        assert os.listdir(path.parent) == [path.name], f"left behind: {os.listdir(path.parent)}"
    return outcome


def child(numbers: range, mutated: int, crafted: int, files: list, folder: Path, report: int) -> None:
    """Reads the files of some numbers; tells each before it begins, and then how it ended."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    for number in numbers:
        os.write(report, f"{number} began\n".encode())
        signal.alarm(SECONDS)
        ending, data = make(number, mutated, crafted, files)
        path = folder / f"a{ending}"
        path.write_bytes(data)
        try:
            outcome = read(path, data)
        except BaseException:
            outcome = "failed: " + traceback.format_exc().strip().replace("\n", " | ")[-1500:]
        for left in folder.iterdir():
            left.unlink()
        os.write(report, f"{number} {outcome}\n".encode())
    signal.alarm(0)


def fuzz(mutated: int, crafted: int, odd: int, first: int = 0) -> tuple[Counter, dict[int, str]]:
    """Reads that many files, from a number on.

    Returns:
        how many ended in which way, and the failures by their numbers.
    """
    outcomes: Counter = Counter()
    failures: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "good").mkdir()
        (Path(folder) / "files").mkdir()
        files = good_files(Path(folder) / "good")
        ends = first + mutated, first + mutated + crafted
        numbers = range(first, ends[1] + odd)
        while numbers:
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(reading)
                try:
                    child(numbers, *ends, files, Path(folder) / "files", writing)
                finally:
                    os._exit(0)
            os.close(writing)
            began = None
            with os.fdopen(reading) as lines:
                for line in lines:
                    number, outcome = line.rstrip("\n").split(" ", 1)
                    began = int(number) if outcome == "began" else None
                    if outcome != "began":
                        what = ("mutated", "crafted", "odd")[sum(int(number) >= end for end in ends)]
                        outcomes[f"{what}: {outcome.split(':')[0]}"] += 1
                        if outcome.startswith("failed"):
                            failures[int(number)] = outcome
            _, status = os.waitpid(process, 0)
            if began is None:
                break
            name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status}"
            failures[began] = name
            outcomes[f"signal {name}"] += 1
            for left in (Path(folder) / "files").iterdir():
                left.unlink()
            numbers = range(began + 1, numbers.stop)
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutated", type=int, default=2000, help="how many good files are changed (2000)")
    parser.add_argument("--crafted", type=int, default=500, help="how many pickles are made up (500)")
    parser.add_argument("--odd", type=int, default=500, help="how many are whole files of odd tensors (500)")
    parser.add_argument("--first", type=int, default=0, help="the number to begin with: others are other files")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="write the file of this number here")
    args = parser.parse_args()
    ends = args.first + args.mutated, args.first + args.mutated + args.crafted
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            ending, data = make(args.only, *ends, good_files(Path(folder)))
        Path(f"fuzz{args.only}{ending}").write_bytes(data)
        print(f"wrote fuzz{args.only}{ending}")
        return 0
    outcomes, failures = fuzz(args.mutated, args.crafted, args.odd, args.first)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6d} {outcome}")
    for number, failure in failures.items():
        print(f"FAILED {number}: {failure}")
    print(f"{sum(outcomes.values())} files, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
