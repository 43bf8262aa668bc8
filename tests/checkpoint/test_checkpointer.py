import itertools
import json
import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from sge_det import UserError
from sge_det.checkpoint.checkpointer import Checkpointer, checkpoints, last_checkpoint
from sge_det.checkpoint.checksums import checksums, sidecar
from sge_det.checkpoint.safe_load import load_checkpoint, load_file, write_weights


class Part:
    """A trainer's state, as far as a checkpointer knows of it."""

    def __init__(self):
        self.loaded = None
        self.iteration = 0

    def state_dict(self):
        optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}
        return {"iteration": self.iteration, "hooks": {}, "_trainer": {"iteration": 0, "optimizer": optimizer}}

    def load_state_dict(self, state):
        self.loaded = state


def linear(value=0.0):
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


def run_of(folder, iterations=(2, 5, 8), final=None):
    """A folder with a run's checkpoints, in which all weights are the iteration's number."""
    model, part = linear(), Part()
    checkpointer = Checkpointer(model, str(folder), trainer=part)
    for iteration in (*iterations, *([final] if final is not None else [])):
        for parameter in model.parameters():
            parameter.data.fill_(iteration)
        part.iteration = iteration
        checkpointer.save("model_final" if iteration == final else f"model_{iteration:07d}", iteration=iteration)
    return folder


def resume(folder):
    model, part = linear(-1), Part()
    checkpointer = Checkpointer(model, str(folder), trainer=part)
    checkpointer.resume_or_load("", resume=True)
    if part.loaded is not None:
        assert part.loaded["iteration"] == model.bias[0]
    return int(model.bias[0])


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def test_checkpoints_are_read_by_plain_detectron2_and_by_torch(tmp_path):
    run_of(tmp_path)
    model, part = linear(), Part()
    rest = DetectionCheckpointer(model, str(tmp_path), trainer=part).resume_or_load("", resume=True)
    assert rest["iteration"] == part.loaded["iteration"] == model.weight[0, 0] == 8
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000008.pth"
    torch.load(tmp_path / "model_0000008.pth", weights_only=True)
    assert load_file(tmp_path / "model_0000008.pth").keys() == {"model", "trainer", "iteration"}


def test_a_byte_flipped_anywhere_is_told(tmp_path):
    run_of(tmp_path, [3])
    path = tmp_path / "model_0000003.pth"
    size = path.stat().st_size
    assert size < 10_000
    for place in (*range(0, size, 13), size - 1):
        flip(path, place, place % 8)
        with pytest.raises(UserError, match=r"model_0000003\.pth are damaged"):
            load_checkpoint(path)
        flip(path, place, place % 8)
    load_checkpoint(path)


def test_the_tensors_that_are_not_what_was_written_are_named(tmp_path):
    path = run_of(tmp_path, [3]) / "model_0000003.pth"
    flip(path, path.read_bytes().index(torch.full((2, 2), 3.0).numpy().tobytes()) + 5)
    with pytest.raises(UserError, match=r"1 tensors are not what was written \('model/weight' for instance\)"):
        load_checkpoint(path)


def test_a_checkpoint_that_its_owner_changed_says_what_to_remove(tmp_path):
    path = run_of(tmp_path, [3]) / "model_0000003.pth"
    content = torch.load(path, weights_only=True)
    content["model"]["bias"] += 1
    torch.save(content, path)
    with pytest.raises(UserError, match=r"'model/bias' for .* yourself, remove /.*/model_0000003\.pth\.sha256\.json$"):
        load_checkpoint(path)
    sidecar(path).unlink()
    assert load_checkpoint(path)["model"]["bias"][0] == 4


def test_a_byte_flipped_anywhere_in_the_checksum_is_told_or_harmless(tmp_path):
    run_of(tmp_path, [3])
    path = tmp_path / "model_0000003.pth"
    told = 0
    for place in range(sidecar(path).stat().st_size):
        flip(sidecar(path), place, 4)
        try:
            assert torch.equal(load_checkpoint(path)["model"]["bias"], torch.full((2,), 3.0))
        except UserError as error:
            assert "damaged" in str(error)
            told += 1
        flip(sidecar(path), place, 4)
    assert told > 64  # all digits of the checksum, at least


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_byte_flipped_in_a_tensor_is_told_without_a_file_beside(tmp_path, name):
    path = tmp_path / name
    state = {"a": torch.arange(50.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    write_weights(path, state, {}, by_suffix=False)
    start = path.read_bytes().index(state["a"].numpy().tobytes())
    for place in range(start, start + 200, 7):
        flip(path, place)
        with pytest.raises(UserError, match="1 tensors are not what" if name != "a.pth" else "checksum of"):
            load_checkpoint(path)
        flip(path, place)
    assert load_checkpoint(path)["model"].keys() == state.keys()


def test_the_checksum_is_of_kind_shape_and_values():
    tensors = [
        torch.zeros(4),
        torch.zeros(2, 2),
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4) - 0.0,
        torch.ones(4),
    ]
    found = [checksums({"a": tensor})["a"] for tensor in [*tensors, torch.zeros(8)[::2]]]
    assert found[0] == found[3] == found[5]
    assert len(set(found)) == 4


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "code"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, caplog, damage):
    path = run_of(tmp_path) / "model_0000008.pth"
    if damage == "gone":
        path.unlink()
    elif damage == "code":
        sidecar(path).unlink()
        torch.save({"model": print}, path)
    else:
        flip(path, 700)
        path.write_bytes({"cut": path.read_bytes()[:-100], "flip": path.read_bytes(), "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == 5
    warning = caplog.messages[-1]
    assert "model_0000008.pth cannot be used" in warning
    assert "model_0000005.pth, before it" in warning


def test_two_damaged_ones_and_all(tmp_path):
    run_of(tmp_path, final=8, iterations=(2, 5))
    for name in ("model_final", "model_0000005"):
        flip(tmp_path / f"{name}.pth", 800)
    assert resume(tmp_path) == 2
    flip(tmp_path / "model_0000002.pth", 800)
    with pytest.raises(UserError, match=r"no checkpoint in \S+ can be used, of 3: .*model_final\.pth are damaged"):
        resume(tmp_path)


def test_later_checkpoints_of_an_older_run_are_not_taken(tmp_path):
    run_of(tmp_path, (2, 5, 8))
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    flip(tmp_path / "model_0000005.pth", 800)
    assert resume(tmp_path) == 2


@pytest.mark.parametrize("final", [None, 9])
def test_a_missing_or_empty_tag_is_no_start_at_0(tmp_path, caplog, final):
    run_of(tmp_path, final=final)
    newest = final or 8
    (tmp_path / "last_checkpoint").unlink()
    assert resume(tmp_path) == newest
    assert "has no last_checkpoint" in caplog.messages[-1]
    (tmp_path / "last_checkpoint").write_text("")
    assert resume(tmp_path) == newest


def test_a_tag_without_any_checkpoint_is_no_start_at_0(tmp_path):
    (tmp_path / "last_checkpoint").write_text("")
    with pytest.raises(UserError, match="no checkpoint: name another OUTPUT_DIR"):
        resume(tmp_path)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(UserError, match="no checkpoint in"):
        resume(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    assert resume(tmp_path) == -1  # there never was a run


OUTSIDE = [
    "../{}/model_0000008.pth",
    "/etc/passwd",
    "{}/../model_0000008.pth",
    "model_0000008.pth\nx",
    "a\0.pth",
    "x.pkl",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "..", "."])
def test_a_tag_that_points_outside_its_folder_is_refused(tmp_path, name):
    run_of(tmp_path / "run")
    (tmp_path / "run/last_checkpoint").write_text(name.format("run"))
    for use in (resume, last_checkpoint, checkpoints):
        with pytest.raises(UserError, match=r"must name a \.pth file in its own folder"):
            use(tmp_path / "run")


def test_a_tag_that_is_no_file_is_refused(tmp_path):
    run_of(tmp_path)
    (tmp_path / "last_checkpoint").unlink()
    for make in (
        lambda tag: tag.symlink_to("/dev/zero"),
        lambda tag: tag.mkdir(),
        lambda tag: tag.write_text("x" * 5000),
    ):
        make(tmp_path / "last_checkpoint")
        with pytest.raises(UserError, match="is no file that names a checkpoint"):
            resume(tmp_path)
        tag = tmp_path / "last_checkpoint"
        tag.rmdir() if tag.is_dir() and not tag.is_symlink() else tag.unlink()


LACKS = {
    "trainer": lambda content: content.pop("trainer"),
    "iteration": lambda content: content.pop("iteration"),
    "no iteration": lambda content: content.update(iteration=-5),
    "has no iteration": lambda content: content["trainer"].update(iteration="8"),
    "trainer's iteration": lambda content: content["trainer"].pop("iteration"),
    "trainer's _trainer": lambda content: content["trainer"].pop("_trainer"),
    "trainer's optimizer": lambda content: content["trainer"]["_trainer"].pop("optimizer"),
    "optimizer's state": lambda content: content["trainer"]["_trainer"]["optimizer"].pop("state"),
    "bias is not in the file": lambda content: content["model"].pop("bias"),
    "fill 1 of the 2": lambda content: content["model"].update(weight=torch.zeros(3, 3)),
}


@pytest.mark.parametrize("what", LACKS)
def test_a_checkpoint_that_is_not_whole_is_told(tmp_path, what):
    path = run_of(tmp_path) / "model_0000008.pth"
    content = torch.load(path, weights_only=True)
    LACKS[what](content)
    sidecar(path).unlink()
    torch.save(content, path)
    with pytest.raises(UserError, match=what):
        resume(tmp_path)


@pytest.mark.parametrize("where", ["weights", "momentum"])
def test_what_is_not_finite_is_never_the_last_checkpoint(tmp_path, where):
    run_of(tmp_path, [2])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model, part = linear(), Part()
    if where == "weights":
        model.bias.data[1] = float("nan")
    else:
        state = part.state_dict()
        state["_trainer"]["optimizer"]["state"][0]["momentum_buffer"][0] = float("inf")
        part.state_dict = lambda: state
    name = "bias" if where == "weights" else "momentum_buffer"
    refusal = rf"{name} is no longer finite after iteration 5.*last good checkpoint is \S+model_0000002\.pth"
    with pytest.raises(UserError, match=refusal):
        Checkpointer(model, str(tmp_path), trainer=part).save("model_0000005", iteration=5)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_written_again_is_never_beside_the_checksum_of_another(tmp_path, monkeypatch):
    """Killed at any of the steps in which a checkpoint is written over: what is left can be resumed from."""
    import sge_det.files as files

    steps = itertools.count()

    class Killed(BaseException):
        pass

    def watch(name, kill_at):
        real = getattr(files.os, name)

        def call(*arguments, **keywords):
            if next(steps) == kill_at:
                raise Killed
            return real(*arguments, **keywords)

        return call

    for kill_at in range(100):
        folder = run_of(tmp_path / str(kill_at), [2, 5])
        model, part = linear(5), Part()
        model.extra = None
        part.iteration = 5
        part.tag = kill_at  # other bytes than before
        steps = itertools.count()
        with monkeypatch.context() as patch:
            for name in ("open", "fsync", "replace", "unlink"):
                patch.setattr(files.os, name, watch(name, kill_at))
            try:
                Checkpointer(model, str(folder), trainer=part, metadata={"a": kill_at}).save(
                    "model_0000005", iteration=5
                )
            except Killed:
                pass
            else:
                break
        assert resume(folder) == 5
    assert kill_at > 8


def test_the_file_beside_says_what_it_is_of(tmp_path):
    path = run_of(tmp_path) / "model_0000008.pth"
    content = json.loads(sidecar(path).read_text())
    assert content["file"] == path.name
    assert content["bytes"] == path.stat().st_size
    assert content["iteration"] == 8


def test_a_checkpoint_whose_run_was_killed_before_its_checksum_gets_one(tmp_path):
    folder = run_of(tmp_path)
    last = folder / "model_0000008.pth"
    before = json.loads(sidecar(last).read_text())
    sidecar(last).unlink()
    Checkpointer(linear(), str(folder), whole_model=True).resume_or_load("", resume=True)
    assert not sidecar(last).exists()  # an evaluation writes nothing
    assert resume(folder) == 8
    assert json.loads(sidecar(last).read_text()) == before
