import os
import pickle

import numpy as np
import pytest
import torch

from sge_det import UserError, get_config
from sge_det.checkpoint import convert_file
from sge_det.checkpoint.checkpointer import Checkpointer
from sge_det.checkpoint.safe_load import load_checkpoint, load_file, write_weights
from sge_det.engine.doctor import examine_files


class Code:
    """Unpickling it makes a file."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


class Command(Code):
    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def save_pickle(content, path, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


WRITERS = {
    "weights.pkl": save_pickle,
    "zoo.pkl": lambda content, path: save_pickle({"model": content, "__author__": "x"}, path, 4),
    "python2.pkl": lambda content, path: save_pickle(content, path, 0),
    "zip.pth": lambda content, path: torch.save({"model": content}, path),
    "legacy.pth": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle.pth": save_pickle,
    "release.pth.tar": lambda content, path: torch.save({"state_dict": content}, path),
    "zip.pkl": torch.save,
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", [Code, Command])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path, name, kind):
    canary, path = tmp_path / "canary", tmp_path / name
    content = {"conv1_w": np.zeros(1, np.float32), "bad": kind(canary)}
    pickle.loads(pickle.dumps(content))
    assert canary.exists()  # it does harm where nothing stops it
    canary.unlink()
    WRITERS[name](content, path)
    called = r"posix\.system" if kind is Command else r"((builtins|__builtin__)\.)?exec,"
    refusal = rf"{name} is refused: to read it would call {called}"
    cfg = get_config("sample/faster_rcnn_SGE_R_50_FPN.yaml", ["MODEL.WEIGHTS", str(path)])
    with pytest.raises(UserError, match=refusal):
        load_file(path)
    with pytest.raises(UserError, match=refusal):
        convert_file(str(path), str(tmp_path / "out.pth"))
    with pytest.raises(UserError, match=refusal):
        Checkpointer(torch.nn.Linear(1, 1)).load(str(path))
    findings = [str(finding) for finding in examine_files(cfg) if finding.severity == "error"]
    assert len(findings) == 1
    assert "is refused" in findings[0]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_arrays_and_plain_containers_are_read(tmp_path, protocol):
    content = {
        "weights": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "scalar": np.float64(0.5),
        "list": [1, 2.5, "text", None, True, b"bytes"],
        "tuple": (1, {"inner": {3}}),
    }
    save_pickle(content, tmp_path / "a.pkl", protocol)
    found = load_file(tmp_path / "a.pkl")
    for key in ("weights", "fortran"):
        np.testing.assert_array_equal(found[key], content[key])
        assert found[key].dtype == content[key].dtype
    assert found["scalar"] == 0.5
    assert found["list"] == content["list"]
    assert found["tuple"] == content["tuple"]


def test_pickles_of_python_2_are_read(tmp_path):
    # a NumPy array as Python 2 wrote it, bytes as its strings
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\n"
        b"tR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb"
    )
    (tmp_path / "a.pkl").write_bytes(b"(dS'conv1_w'\n" + array + b"s.")
    np.testing.assert_array_equal(load_file(tmp_path / "a.pkl")["conv1_w"], np.array([1, 2], np.float32))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.safetensors", "a.pth.tar"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04K\x01", bytes(range(256)) * 8, b"PK\x03\x04broken"])
def test_damaged_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} (cannot be read|is refused)"):
        load_checkpoint(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no weights file"):
        load_file(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_what_is_written_is_read(tmp_path, name):
    shared = torch.randn(4, 3)
    state = {"a": shared, "b": shared, "c": shared.T, "d": torch.zeros(0, 2), "e": torch.tensor(3)}
    metadata = {"source": "x", "pixel_mean": [1.5, 2.0, 3.0], "stride_in_1x1": None}
    write_weights(tmp_path / "folder" / name, state, metadata, by_suffix=True)
    found = load_checkpoint(tmp_path / "folder" / name)
    assert found["metadata"] == metadata
    assert found["matching_heuristics"] is True
    assert found["model"].keys() == state.keys()
    assert all(torch.equal(found["model"][key], value) for key, value in state.items())
    assert [path.name for path in (tmp_path / "folder").iterdir()] == [name]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path, ending):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_weights(tmp_path / f"file/a{ending}", {"a": torch.zeros(1)}, {}, by_suffix=False)
    (tmp_path / f"folder{ending}").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        write_weights(tmp_path / f"folder{ending}", {"a": torch.zeros(1)}, {}, by_suffix=False)
    with pytest.raises(UserError, match=r"must end in \.pth or \.safetensors"):
        write_weights(tmp_path / "a.pkl", {"a": torch.zeros(1)}, {}, by_suffix=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", f"folder{ending}"]


@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_write_that_breaks_off_keeps_what_was_there(tmp_path, monkeypatch, ending):
    path = tmp_path / f"a{ending}"
    write_weights(path, {"a": torch.zeros(1)}, {}, by_suffix=False)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sge_det.files.os.replace", full)
    with pytest.raises(UserError, match=r"the disk that holds \S+a\.\w+ is full"):
        write_weights(path, {"a": torch.ones(1)}, {}, by_suffix=False)
    assert load_checkpoint(path)["model"]["a"] == 0
    assert list(tmp_path.iterdir()) == [path]
