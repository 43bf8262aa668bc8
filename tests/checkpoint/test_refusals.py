"""Each refusal of the readers of weights by the smallest file that earns it, and what is like it and is read."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch

from sge_det import UserError
from sge_det.checkpoint import safe_load
from sge_det.checkpoint.checkpointer import Checkpointer, checkpoints, last_checkpoint, remove_checkpoint
from sge_det.checkpoint.checksums import sidecar
from sge_det.checkpoint.pickles import Damaged, Stream
from sge_det.checkpoint.safe_load import load_checkpoint, load_file


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def dtype(state):
    return b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R" + state + b"b"


F4 = dtype(b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00t")

# programs of pickle's machine, without their protocol and end
REFUSED = {
    "a set of a number": (b"cbuiltins\nset\nK\x03\x85R", "a set is made of something else than a container"),
    "a list with a state": (b"]}b", "a list gets a state"),
    "append to a dict": (b"}K\x01a", "a dict is appended to"),
    "items of a list": (b"](K\x01K\x02u", "a list gets items"),
    "an odd number of items": (b"}(K\x01u", "a dict gets items"),
    "members of a list": (b"](K\x01\x90", "a list gets members"),
    "a text without quotes": (b"Sabc\n", "a text in it has no quotes"),
    "a tuple of too few": (b"K\x01\x86", "no pickle of weights"),
    "keywords": (b"cbuiltins\nset\n)}" + text("a") + b"K\x01s\x92", "called with keywords"),
    "a name of numbers": (b"K\x01K\x02\x93", "a name in it is no text"),
    "a key that is a list": (b"}]K\x01s", "a list is a key of a dict"),
    "a line without its end": (b"cnumpy", "it ends early"),
    "a dtype without a state": (dtype(b"K\x00"), "an array in it has no byte order"),
    "a number of no dtype": (b"cnumpy.core.multiarray\nscalar\nK\x01K\x02\x86R", "an array in it has no dtype"),
    "a number of no bytes": (b"cnumpy.core.multiarray\nscalar\n" + F4 + b"K\x02\x86R", "an array in it has no bytes"),
    "an array of another class": (b"cnumpy.core.multiarray\n_reconstruct\nK\x01\x85R", "another class than NumPy's"),
    "an array that is called": (b"cnumpy\nndarray\n)R", "an array in it is made without its bytes"),
    "a storage elsewhere": (b"K\x01Q", "it refers to storages, which are not in it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_programs_that_no_writer_of_weights_makes(tmp_path, name):
    program, words = REFUSED[name]
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + program + b".")
    with pytest.raises(UserError, match=words):
        load_file(tmp_path / "a.pkl")


READ = {
    "a list": (b"cbuiltins\nlist\n](K\x01K\x02e\x85R", [1, 2]),
    "bytes of a list": (b"cbuiltins\nbytearray\n](K\x01K\x02e\x85R", bytearray(b"\1\2")),
    "an ordered dict of a dict": (b"ccollections\nOrderedDict\n}K\x01K\x02s\x85R", OrderedDict({1: 2})),
    "a dict of pairs": (b"cbuiltins\ndict\n](K\x01K\x02\x86e\x85R", {1: 2}),
    "a dict from the stack": (b"(K\x01K\x02d", {1: 2}),
    "a key of bytes": (b"}C\x01aK\x01s", {b"a": 1}),
    "no keywords": (b"cbuiltins\nset\n)}\x92", set()),
    "a text of Python 2": (b"T\x03\x00\x00\x00abc", "abc"),
}


@pytest.mark.parametrize("name", READ)
def test_programs_that_are_read_as_pickle_reads_them(tmp_path, name):
    program, value = READ[name]
    program = b"\x80\x04" + program + b"."
    (tmp_path / "a.pkl").write_bytes(program)
    found = load_file(tmp_path / "a.pkl")
    assert found == value == pickle.loads(program)
    assert type(found) is type(value)


def storage(elements=4, key="0"):
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K%c" % elements + b"tQ"


def view(of=None, size=b"K\x04\x85", strides=b"K\x01\x85"):
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + (of or storage()) + b"K\x00" + size + strides + b"\x89NtR"


TORCH = {
    "a shape that is a number": (view(size=b"K\x04"), "a tensor in it has no shape"),
    "strides of other dimensions": (view(strides=b")"), "a tensor in it has no strides"),
    "two sizes of one storage": (
        b"(" + view() + view(storage(2), b"K\x02\x85") + b"t",
        "two sizes for the storage '0'",
    ),
    "a tensor of a number": (view(b"K\x01"), "a tensor in it has no storage"),
    "bytes of a number": (
        b"ctorch._utils\n_rebuild_tensor_v3\n(K\x01K\x00K\x04\x85K\x01\x85\x89NNtR",
        "a tensor in it has no storage",
    ),
    "a parameter of a number": (b"ctorch._utils\n_rebuild_parameter\n(K\x01\x89NtR", "a parameter in it is no tensor"),
    "a class of a number": (b"ctorch._tensor\n_rebuild_from_type_v2\n(K\x01K\x01K\x01NtR", "is made of no storage"),
    "a storage of a number": (b"K\x01Q", "a storage in it has no kind and size"),
    "a storage of no kind": (storage().replace(b"ctorch\nFloatStorage\n", b"K\x01"), "has no kind and size"),
}


def zipped(members, **options):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", **options) as archive:
        for name, data in members:
            archive.writestr(f"archive/{name}", data)
    return content.getvalue()


@pytest.mark.parametrize("name", TORCH)
def test_tensors_that_torch_would_not_write(tmp_path, name):
    program, words = TORCH[name]
    (tmp_path / "a.pth").write_bytes(zipped([("data.pkl", b"\x80\x02" + program + b"."), ("data/0", bytes(16))]))
    with pytest.raises(UserError, match=words):
        load_file(tmp_path / "a.pth")


def test_tensors_of_a_class_and_devices_are_read(tmp_path):
    marked = torch.arange(3.0)
    marked.mark = "mine"  # torch writes those by their class
    torch.save({"a": marked, "device": torch.device("cpu")}, tmp_path / "a.pth")
    found = load_file(tmp_path / "a.pth")
    assert torch.equal(found["a"], marked)
    assert found["device"] == "cpu"


def test_archives_that_torch_would_not_write(tmp_path):
    program = b"\x80\x02" + view() + b"."
    members = [("data.pkl", program), ("data/0", bytes(16))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's of the same
        twice = zipped([*members, members[1]])
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in [members[0], ("data/0", bytes(5000))]:
            archive.writestr(f"archive/{name}", data)
        # one part under many names: each is as long as that, together they are longer than the file
        archive.filelist += [_renamed(archive.filelist[1], f"archive/data/{number}") for number in range(1, 9)]
    for archive, words in (
        (twice, r"it holds 'archive/data/0' twice"),
        (content.getvalue(), "its parts are larger than it is"),
        (zipped(members, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    ):
        (tmp_path / "a.pth").write_bytes(archive)
        with pytest.raises(UserError, match=words):
            load_file(tmp_path / "a.pth")


def _renamed(info, name):
    other = zipfile.ZipInfo(name)
    for attribute in ("CRC", "compress_size", "file_size", "header_offset"):
        setattr(other, attribute, getattr(info, attribute))
    return other


def legacy(program, keys=("0",), version=1001, machine=None, numbers=4):
    """A file as ``torch.save`` wrote it before version 1.6."""
    machine = {"protocol_version": version, "little_endian": True} if machine is None else machine
    parts = [pickle.dumps(value, 2) for value in (torch.serialization.MAGIC_NUMBER, version, machine)]
    content = struct.pack("<q", numbers) + np.arange(4, dtype="<f4").tobytes()
    return b"".join([*parts, b"\x80\x02" + program + b".", pickle.dumps(list(keys), 2), content])


OLD = view(storage().replace(b"tQ", b"NtQ"))
OLD_FILES = {
    "another version": (legacy(OLD, version=7), "a format of torch.save that nobody knows"),
    "another byte order": (legacy(OLD, machine={"little_endian": False}), "another byte order"),
    "a storage of a number": (legacy(b"K\x01Q"), "a storage in it has no kind and size"),
    "a part of a storage": (legacy(view(storage().replace(b"tQ", b"K\x01\x85tQ"))), "a part of another"),
    "other storages": (legacy(OLD, keys=("1",)), "its storages are not those"),
    "other numbers": (legacy(OLD, numbers=9), "a storage of 16 bytes where it has 9 numbers"),
    "no end": (legacy(OLD)[:-3], "it ends early"),
}


@pytest.mark.parametrize("name", OLD_FILES)
def test_old_files_that_torch_would_not_have_written(tmp_path, name):
    content, words = OLD_FILES[name]
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_file(tmp_path / "a.pth")


def test_old_files_are_read(tmp_path):
    (tmp_path / "a.pth").write_bytes(legacy(OLD))
    assert load_file(tmp_path / "a.pth").tolist() == [0, 1, 2, 3]


HEADERS = {
    "an entry that is a number": ({"a": 3}, "no table of tensors"),
    "a kind that is a number": ({"a": {"dtype": 3}}, "no table of tensors"),
    "an unknown kind": ({"a": {"dtype": "F128", "shape": [], "data_offsets": [0, 16]}}, "a tensor of 'F128'"),
    "no places": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, "where the tensors are"),
    "places of text": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}, "where the tensors are"),
    "another length": ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, "3 numbers where it has 4 bytes"),
    "before the data": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, "not as long as its data"),
    "beyond the data": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [2**62, 2**62 + 4]}}, "not as long as"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors_that_lie(tmp_path, name):
    content, words = HEADERS[name]
    content = json.dumps(content).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(4))
    with pytest.raises(UserError, match=words):
        load_file(tmp_path / "a.safetensors")


def test_a_stream_ends_where_the_file_does():
    """The file may have become shorter since its size was asked for."""
    for read in (lambda stream: stream.take(3), lambda stream: stream.fill(memoryview(bytearray(3)))):
        with pytest.raises(Damaged, match=r"^it ends early$"):
            read(Stream(io.BytesIO(b"ab"), 5))
        with pytest.raises(Damaged, match="3 bytes are announced where 2 are left"):
            read(Stream(io.BytesIO(b"abc"), 2))


@pytest.mark.parametrize(
    ("error", "words"),
    [(MemoryError(), "too little memory for them"), (OSError(5, "Input/output error"), "output error")],
)
def test_what_the_machine_refuses_is_told(tmp_path, monkeypatch, error, words):
    torch.save({}, tmp_path / "a.pth")

    def fail(*given, **keys):
        raise error

    monkeypatch.setattr(safe_load, "_load", fail)
    with pytest.raises(UserError, match=rf"a\.pth cannot be read: .*{words}"):
        load_file(tmp_path / "a.pth")


def test_pickles_are_no_torch_files_and_pycls_has_a_name_of_its_own(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UserError, match=r"no file that torch\.save wrote"):
        load_file(tmp_path / "a.pth")
    torch.save({"model_state": {"a": torch.ones(2)}}, tmp_path / "b.pth")
    found = load_checkpoint(tmp_path / "b.pth")
    assert (found["__author__"], found["matching_heuristics"]) == ("pycls", True)
    assert torch.equal(found["model"]["a"], torch.ones(2))


def test_weights_alone_are_nothing_to_go_on_from_and_go_with_their_checksum(tmp_path):
    model = torch.nn.Linear(2, 2)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save_model("model_best", iteration=3)
    assert last_checkpoint(tmp_path) is None and not checkpointer.has_checkpoint()
    assert checkpointer.get_checkpoint_file() == ""
    path = tmp_path / "model_best.pth"
    assert torch.equal(load_file(path)["model"]["weight"], model.weight) and sidecar(path).is_file()
    remove_checkpoint(path)
    remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []
    Checkpointer(model, str(tmp_path), save_to_disk=False).save("model_0000001")
    assert list(tmp_path.iterdir()) == []
    checkpointer.save("model_0000001", iteration=1)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")


def test_a_last_checkpoint_whose_checksum_is_damaged_is_the_last_all_the_same(tmp_path):
    checkpointer = Checkpointer(torch.nn.Linear(1, 1), str(tmp_path))
    checkpointer.save("model_0000004", iteration=4)
    checkpointer.save("model_final", iteration=9)
    for content in ("{", "{}", '{"sha256": "a", "bytes": "b"}', '{"sha256": "a", "bytes": 1, "iteration": "x"}'):
        sidecar(tmp_path / "model_final.pth").write_text(content)
        assert [path.name for path in checkpoints(tmp_path)] == ["model_final.pth", "model_0000004.pth"]
    with open(sidecar(tmp_path / "model_final.pth"), "w") as file:
        file.truncate(1 << 26)
    with pytest.raises(UserError, match=r"the checksum .* is damaged: remove it"):
        load_file(tmp_path / "model_final.pth")


def test_a_tag_below_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="last_checkpoint cannot be read: Not a directory"):
        checkpoints(tmp_path / "file")


def test_counters_are_read(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"steps": Counter({"a": 2})}))
    assert load_file(tmp_path / "a.pkl") == {"steps": Counter({"a": 2})}
