"""Weights files from strangers: each is read correctly, or refused in a sentence; none reaches memory not its own."""

import argparse
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_safetensors

from sge_det import UserError
from sge_det.checkpoint import convert_file, read_source
from sge_det.checkpoint.safe_load import load_checkpoint, load_file

ADDRESS = struct.pack("<Q", 0x4141414141414140)


def text(value):
    value = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(value)) + value


def octets(value):
    return b"c_codecs\nencode\n" + text(value.decode("latin1")) + text("latin1") + b"\x86R"


def dtype(name, state=b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t"):
    return b"cnumpy\ndtype\n" + text(name) + b"\x89\x88\x87R" + state + b"b"


def array(kind, shape, data):
    empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + octets(b"b") + b"\x87R"
    return empty + b"(K\x01" + shape + kind + b"\x89" + octets(data) + b"tb"


def entry(value):
    """A pickle of a dict with one entry."""
    return b"\x80\x02}" + text("conv1_w") + value + b"s."


def tensor(size, stride=b"K\x01\x85", offset=b"K\x00", elements=b"K\x04", kind=b"ctorch\nFloatStorage\n", key="0"):
    storage = b"(" + text("storage") + kind + text(key) + text("cpu") + elements + b"tQ"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + size + stride + b"\x89" + hooks + b"tR"


def long(value):
    return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)


def zipped(program, data=bytes(16), **members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", data)
        for name, value in members.items():
            archive.writestr(f"archive/{name}", value)
    return content.getvalue()


def header(content, data=b""):
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(content)) + content + data


def legacy(content):
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


POINTERS = dtype("O8")
SCALAR = b"cnumpy.core.multiarray\nscalar\n" + POINTERS + octets(ADDRESS) + b"\x86R"
F4 = dtype("f4", b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t")
FLAGGED = dtype("f8", b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK?t")
FIELDS = dtype("i8", b"(K\x03X\x01\x00\x00\x00<N" + text("a") + b"\x85}J\x08\x00\x00\x00J\x01\x00\x00\x00K\x00t")
DEEP = b"\x80\x02" + b")" + b"\x85" * 200_000
HUGE = long(10**13)
LEGACY = legacy({"a": torch.arange(4.0)})

# what a file holds, and what its refusal says
HOSTILE = {
    "pointer.pkl": (entry(SCALAR), "'O8', which is no kind of numbers"),
    "pointer.pth": (zipped(entry(SCALAR)), "'O8', which is no kind of numbers"),
    "pointers.pkl": (entry(array(POINTERS, b"K\x01\x85", ADDRESS)), "'O8'"),
    "pointers.pth": (zipped(entry(array(POINTERS, b"K\x01\x85", ADDRESS))), "'O8'"),
    "flags.pkl": (entry(array(FLAGGED, b"K\x01\x85", bytes(8))), "not of plain numbers"),
    "fields.pkl": (entry(array(FIELDS, b"K\x01\x85", bytes(8))), "not of plain numbers"),
    "text.pkl": (entry(array(dtype("S8"), b"K\x01\x85", bytes(8))), "'S8'"),
    "void.pkl": (entry(array(dtype("V8"), b"K\x01\x85", bytes(8))), "'V8'"),
    "dates.pkl": (entry(array(dtype("M8[ns]"), b"K\x01\x85", bytes(8))), "no kind of numbers"),
    "elements.pkl": (entry(array(F4, HUGE + b"\x85", bytes(8))), "10000000000000 numbers where it has 8 bytes"),
    "short.pkl": (entry(array(F4, b"K\x03\x85", bytes(8))), "3 numbers where it has 8 bytes"),
    "negative.pkl": (entry(array(F4, b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86", bytes(8))), "whole numbers from 0"),
    "empty.pkl": (entry(array(F4, b"K\x00" + HUGE + HUGE + b"\x87", b"")), "claims a tensor of 0x10000000000000"),
    "boolean.pkl": (entry(array(dtype("b1"), b"K\x01\x85", b"\x02")), "neither true nor false"),
    "size.pkl": (entry(b"c__builtin__\nbytearray\n" + HUGE + b"\x85R"), "bytes are made of something else"),
    "length.pkl": (b"\x80\x04\x8e" + struct.pack("<Q", 10**13), "10000000000000 bytes are announced"),
    "memo.pkl": (b"\x80\x02}r\xff\xff\xff\xff" * 2 + b"h\x00.", "damaged"),
    "number.pkl": (b"\x80\x02\x8b" + struct.pack("<I", 300) + bytes(300) + b".", "a number in it is too long"),
    "digits.pkl": (b"L" + b"9" * 5000 + b"L\n.", "a number in it is too long"),
    "deep.pkl": (DEEP + b".", "more than 100 deep"),
    "deep_key.pkl": (b"\x80\x02}" + DEEP[2:] + b"K\x01s.", "a tuple is a key"),
    "deep_member.pkl": (b"\x80\x04\x8f(" + DEEP[2:] + b"\x90.", "a tuple is a key of a dict or in a set"),
    "deep_frozen.pkl": (b"\x80\x04(" + DEEP[2:] + b"\x91.", "a tuple is a key of a dict or in a set"),
    "itself.pkl": (b"\x80\x02]q\x00h\x00a.", "contains itself"),
    "collisions.pkl": (b"\x80\x02}" + long(2**61 - 1) + b"Ns.", "is a key"),
    "unfinished.pkl": (
        entry(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85K\x00\x87R"),
        "no content",
    ),
    "name.pkl": (entry(b"cnumpy\nndarray\n"), "no content"),
    "instance.pkl": (b"(ios\nsystem\n.", "refused: to read it would call os.system"),
    "extension.pkl": (b"\x80\x02\x82\x01.", "no pickle of weights"),
    "escape.pkl": (b"\x80\x02c\x1b[2J\nx\n.", r"call '\\x1b\[2J\.x'"),
    "old_escape.pkl": (b"(i\x1b[2J\nx\n.", "it is no pickle"),
    "key.pkl": (b"\x80\x02}" + text("a\x1b[2J\n") + b"Ns.", r"the name 'a\\x1b\[2J\\n' in it"),
    "long_key.pkl": (b"\x80\x02}" + text("a" * 10_000) + b"Ns.", r"the name a{100} in it"),
    "storage.pth": (zipped(entry(tensor(HUGE + b"\x85", elements=HUGE))), "a storage of 40000000000000 bytes"),
    "beyond.pth": (zipped(entry(tensor(b"K\x05\x85"))), "beyond its storage of 16 bytes"),
    "offset.pth": (zipped(entry(tensor(b"K\x01\x85", offset=b"J\xff\xff\xff\xff"))), "whole numbers from 0"),
    "far.pth": (zipped(entry(tensor(b"K\x01\x85", offset=HUGE))), "beyond its storage"),
    "strides.pth": (zipped(entry(tensor(b"K\x02\x85", long(2**46) + b"\x85"))), "beyond its storage"),
    "backwards.pth": (zipped(entry(tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"))), "from 0 on"),
    "expanded.pth": (zipped(entry(tensor(long(10**12) + b"\x85", b"K\x00\x85"))), "many times the bytes"),
    "missing.pth": (
        zipped(entry(tensor(b"K\x04\x85", key="../../etc/passwd"))),
        "storage '../../etc/passwd' is not in",
    ),
    "smaller.pth": (zipped(entry(tensor(b"K\x04\x85")), bytes(12)), "16 bytes where it has 12"),
    "kind.pth": (zipped(entry(tensor(b"K\x04\x85", kind=b"ctorch\nfloat32\n"))), "no kind and size"),
    "allocate.pth": (zipped(entry(b"ctorch\nFloatTensor\n" + HUGE + b"\x85R")), "refused"),
    "untyped.pth": (zipped(entry(b"ctorch.storage\nUntypedStorage\n" + HUGE + b"\x85R")), "no function"),
    "sparse.pth": (zipped(entry(b"ctorch._utils\n_rebuild_sparse_tensor\n)R")), "_rebuild_sparse_tensor"),
    "order.pth": (zipped(entry(tensor(b"K\x04\x85")), byteorder=b"big"), "another byte order"),
    "script.pth": (zipped(entry(tensor(b"K\x04\x85")), **{"constants.pkl": b""}), "TorchScript"),
    "cut.pth": (LEGACY[:-3], "ends early"),
    "numbers.pth": (LEGACY.replace(struct.pack("<q", 4), struct.pack("<q", 2**60)), "1152921504606846976 numbers"),
    "shapes.safetensors": (
        header({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}),
        "not as long as its data",
    ),
    "product.safetensors": (
        header({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
        "claims a tensor of 4294967296x4294967296",
    ),
    "overlap.safetensors": (
        header({key: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for key in "ab"}, bytes(4)),
        "not as long as its data",
    ),
    "hole.safetensors": (
        header({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, bytes(4)),
        "not as long as its data",
    ),
    "header.safetensors": (struct.pack("<Q", 2**63) + b"{}", "no file of safetensors"),
    "nested.safetensors": (header(b'{"a":' + b"[" * 200_000), "cannot be read"),
    "twice.safetensors": (header(b'{"a": {}, "a": {}}'), "twice"),
    "key.safetensors": (header({"\x1b[2J": {}}), r"the name '\\x1b\[2J' in it"),
    "list.safetensors": (header([]), "no table"),
    "metadata.safetensors": (header({"__metadata__": {"sge_det": "[]"}}), "no table"),
    "author.safetensors": (
        header({"__metadata__": {"sge_det": '{"__author__": [1]}'}}),
        "__author__ in them is a list",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_a_sentence_and_leave_nothing(tmp_path, name):
    content, refusal = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    # none of it gets as far as the code that crashed; that is the next test
    with pytest.raises(UserError, match=refusal) as raised:
        convert_file(str(tmp_path / name), str(tmp_path / "out.pth"))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400 + len(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [name]


READ_ALL = """
import os, pathlib, sys
from sge_det import get_config
from sge_det.checkpoint import convert_file, read_source
from sge_det.engine.doctor import examine_files
from sge_det.errors import UserError

def convert(path):
    convert_file(str(path), str(path) + ".out.pth")

def examine(path):
    cfg = get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.WEIGHTS", str(path)])
    examine_files(cfg)

for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for use in convert, examine:
        child = os.fork()
        if child == 0:
            try:
                use(path)
            except UserError:
                pass
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(path.name, use.__name__, os.WTERMSIG(status), flush=True)
"""


def test_pointers_in_a_file_are_never_followed(tmp_path):
    """Both files ended the converter and the doctor with SIGSEGV where their dtypes were NumPy's to set up."""
    for name in ("pointer.pkl", "pointer.pth"):
        (tmp_path / name).write_bytes(HOSTILE[name][0])
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split("\n")[:4] == [
        f"{name} {use} 0" for name in ("pointer.pkl", "pointer.pth") for use in ("convert", "examine")
    ]


@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.safetensors"])
def test_what_is_no_file_is_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)  # opening it would wait for a writer
    (tmp_path / f"zero_{name}").symlink_to("/dev/zero")
    (tmp_path / f"folder_{name}").mkdir()
    (tmp_path / f"loop_{name}").symlink_to(tmp_path / f"loop_{name}")
    for path in list(tmp_path.iterdir()):
        with pytest.raises(UserError, match="there is no weights file"):
            load_file(path)


def test_a_file_larger_than_memory_is_told(tmp_path, monkeypatch):
    path = tmp_path / "large.safetensors"
    path.write_bytes(bytes(100_001))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 100}.__getitem__)
    with pytest.raises(UserError, match="larger than this machine's memory"):
        load_file(path)


def test_lists_that_repeat_each_other_are_walked_once(tmp_path):
    # 2**90 lists by their paths, 90 in memory
    program = b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(90))
    (tmp_path / "laughs.pkl").write_bytes(b"\x80\x02}" + text("a") + b"(" + program[2:] + b"ls.")
    assert list(load_file(tmp_path / "laughs.pkl")) == ["a"]


REPEATED = b"](K\x01eq\x000" + b"".join(b"](" + b"h%c" % i * 10 + b"eq%c0" % (i + 1) for i in range(12))


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"\x80\x02}" + text("conv1.weight") + REPEATED + b"h\x0cs.", "'conv1.weight' is a list, not a tensor"),
        (pickle.dumps({1: np.zeros(1), "1": np.ones(1)}, 2), "the entry 1 has no name, as it is a int"),
        (b"\x80\x04" + b"]0" * 600_000 + b"N.", "more values than weights need"),
    ],
)
def test_what_would_grow_without_end_is_refused(tmp_path, content, refusal):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(UserError, match=refusal):
        read_source(str(tmp_path / "a.pkl"), strict=False)


@pytest.mark.parametrize("config", ["mean=[" * 200_000, "to_rgb" + " " * 100_000, "mean = [" + "1." * 100_000 + "]"])
def test_text_in_a_file_does_not_keep_the_search_busy(tmp_path, config):
    # quadratic in the length of the first, an hour
    state = {"backbone.layer1.0.conv1.weight": torch.zeros(1), "bbox_head.fc_cls.weight": torch.zeros(1)}
    torch.save({"state_dict": state, "meta": {"config": config}}, tmp_path / "a.pth")
    assert read_source(str(tmp_path / "a.pth")).recipe.pixel_mean == (123.675, 116.28, 103.53)


STATE = OrderedDict(
    a=torch.randn(3, 4, 2),
    column=torch.randn(6, 5)[:, 2],
    turned=torch.randn(4, 3).T,
    none=torch.zeros(0, 7),
    number=torch.tensor(3),
    parameter=torch.nn.Parameter(torch.randn(2)),
    **{str(kind): torch.arange(4).to(kind) for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int8)},
    **{str(kind): torch.arange(4).to(kind) for kind in (torch.uint8, torch.int16, torch.int32, torch.bool)},
    **{str(kind): torch.arange(4).to(torch.float32).to(kind) for kind in (torch.complex64, torch.float8_e4m3fn)},
    wide=torch.arange(4).to(torch.uint16),
)


@pytest.mark.parametrize("zip_format", [True, False])
def test_torch_files_are_read_as_torch_reads_them(tmp_path, zip_format):
    # torch cannot read kinds without a storage of their own from its old format
    state = OrderedDict(item for item in STATE.items() if zip_format or not re.search("float8|wide", item[0]))
    state._metadata = OrderedDict({"": {"version": 3}})
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.tag = "kept by torch alone"
    content = {
        "model": state,
        "tied": [STATE["a"], STATE["a"]],
        "tagged": parameter,
        "optimizer": {
            "state": {0: {"momentum_buffer": torch.ones(2)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        },
        "milestones": Counter({3: 1}),
        "default": defaultdict(list),
        "bytes": b"\x00\xff",
        "set": {1, 2},
        "args": argparse.Namespace(lr=0.1),
        "size": torch.Size([1, 2]),
        "numbers": [2**70, -1, 1.5, float("inf"), None, True, 1j, "täxt"],
        "numpy": np.float64(0.5),
    }
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zip_format)
    found, expected = load_file(path), torch.load(path, weights_only=False)
    assert found["model"].keys() == expected["model"].keys()
    for key, value in expected["model"].items():
        assert found["model"][key].dtype == value.dtype
        assert found["model"][key].stride() == value.stride() or not value.numel()
        assert torch.equal(found["model"][key].to(torch.complex128), value.to(torch.complex128)), key
    assert found["model"]._metadata == state._metadata
    assert found["tied"][0].data_ptr() == found["tied"][1].data_ptr()
    assert torch.equal(found["tagged"], parameter)
    assert found["optimizer"].pop("state")[0]["momentum_buffer"].tolist() == [1, 1]
    assert found["optimizer"] == {"param_groups": expected["optimizer"]["param_groups"]}
    for key in ("milestones", "default", "bytes", "set", "args", "size", "numbers", "numpy"):
        assert found[key] == expected[key]


def test_safetensors_files_are_read_as_their_library_reads_them(tmp_path):
    state = {key: value.detach().clone().contiguous() for key, value in STATE.items() if "complex" not in key}
    (tmp_path / "a.safetensors").write_bytes(save_safetensors(state, {"format": "pt", "other": "x"}))
    found = load_checkpoint(tmp_path / "a.safetensors")["model"]
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].double(), value.double())


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("order", "<>")
def test_arrays_are_read_as_pickle_reads_them(tmp_path, protocol, order):
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "c8", "c16", "b1")
    content = {kind: np.arange(6).reshape(2, 3).astype(order + kind) for kind in kinds}
    content |= {"turned": np.asfortranarray(content["f4"]), "shared": [content["f4"]] * 2, "none": np.zeros((0, 3))}
    content |= {"scalar": np.float32(1.5), "long": "x" * 70_000, "bytes": b"\xff" * 300, "nested": {"a": ({1, 2}, [])}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = load_file(tmp_path / "a.pkl")
    for key in (*kinds, "turned", "none", "scalar"):
        np.testing.assert_array_equal(found[key], content[key])
        assert found[key].dtype == content[key].dtype.newbyteorder("=")
    assert found["shared"][0] is found["shared"][1]
    assert torch.as_tensor(found["f4"]).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [found[key] for key in ("long", "bytes", "nested")] == [content[k] for k in ("long", "bytes", "nested")]


def test_a_flipped_byte_in_a_torch_file_is_told(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"a": torch.randn(100)}}, path)
    content = path.read_bytes()
    place = content.index(load_file(path)["model"]["a"].numpy().tobytes()) + 17
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(UserError, match="checksum of"):
        load_file(path)


GOOD_METADATA = {"channel_order": "RGB", "pixel_mean": [1, 2.5, 3], "pixel_std": (1, 1, 1), "stride_in_1x1": None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("channel_order", ["RGB"]),
        ("channel_order", "RBG"),
        ("pixel_mean", [1, 2]),
        ("pixel_mean", [1, 2, float("nan")]),
        ("pixel_mean", np.ones(3)),
        ("pixel_mean", [1, 2, "3"]),
        ("pixel_std", [1, 0, 1]),
        ("pixel_std", 1.0),
        ("stride_in_1x1", "no"),
        ("transplanted", [True]),
    ],
)
def test_metadata_of_a_wrong_type_is_named(tmp_path, key, value):
    model = {"res2.0.conv1.weight": torch.ones(1)}
    torch.save({"model": model, "metadata": GOOD_METADATA}, tmp_path / "good.pth")
    assert read_source(str(tmp_path / "good.pth")).recipe.pixel_mean == (1, 2.5, 3)
    torch.save({"model": model, "metadata": GOOD_METADATA | {key: value}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=rf"a\.pth: its metadata has no {key} that can be used"):
        read_source(str(tmp_path / "a.pth"))
