"""What a run's sentences advise is done to the letter, and it helps: each is provoked, read, and followed."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from detectron2.modeling.backbone import ResNet
from started_tool import NARROW

from sge_det.engine.claims import claimed
from sge_det.engine.loss_guard import LossGuard
from sge_det.engine.training import Trainer, setup_config, train
from sge_det.errors import Resumable, UserError

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
SMALL = [
    *(
        "SOLVER.MAX_ITER",
        "3",
        "SOLVER.CHECKPOINT_PERIOD",
        "1",
        "SOLVER.EARLY_STOPPING.PATIENCE",
        "9",
        "TEST.EVAL_PERIOD",
        "1",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def one_block_a_stage():
    make = ResNet.make_stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ResNet,
            "make_stage",
            staticmethod(
                lambda *given, **keys: make(
                    *given, **keys | {"num_blocks": 1, "stride_per_block": keys["stride_per_block"][:1]}
                )
            ),
        )
        patch.setattr(Trainer, "test", classmethod(lambda cls, *given, **keys: {"bbox": {"AP": 1.0}}))
        yield


class Command:
    """The user's command, to which what is advised is added."""

    def __init__(self, datasets, folder):
        self.datasets, self.folder = datasets, Path(folder)

    def give(self, *overrides, folder=None, resume=False, overwrite=False):
        cfg = setup_config(
            FASTER, [*TINY, *NARROW, *SMALL, "OUTPUT_DIR", str(folder or self.folder), *overrides], self.datasets
        )
        with claimed(cfg, resume=resume, overwrite=overwrite):
            train(cfg, resume=resume)

    def refused(self, *overrides, **how):
        with pytest.raises(UserError) as told:
            self.give(*overrides, **how)
        return str(told.value)


def weights(folder):
    return torch.load(Path(folder, "model_final.pth"), weights_only=True)["model"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, sample_datasets, one_block_a_stage):
    """A run that nothing happened to."""
    command = Command(sample_datasets, tmp_path_factory.mktemp("whole"))
    command.give()
    return command


@pytest.fixture
def cut_off(whole, tmp_path):
    """The command of a run that was killed after its second iteration, in its folder."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / "model_final.pth").unlink()
    (folder / "model_final.pth.sha256.json").unlink()
    for path in folder.glob("model_0000002.pth*"):
        path.unlink()
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    return Command(whole.datasets, folder)


def same(first, second):
    first, second = weights(first), weights(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_folder_that_holds_a_run_names_three_ways_and_each_is_one(whole, cut_off, tmp_path):
    told = cut_off.refused()
    assert (
        "give the same command with --resume to go on with it or with --overwrite to remove it, or name another" in told
    )
    cut_off.give(folder=tmp_path / "another")
    assert same(tmp_path / "another", whole.folder)
    cut_off.give(resume=True)
    assert same(cut_off.folder, whole.folder)
    cut_off.give(overwrite=True)
    assert same(cut_off.folder, whole.folder)


def _tag(content):
    def damage(folder):
        (folder / "last_checkpoint").write_text(content)

    return damage


def _tag_is_a_folder(folder):
    (folder / "last_checkpoint").unlink()
    (folder / "last_checkpoint").mkdir()


def _write(name, content):
    return lambda folder: (folder / name).write_text(content)


# what is damaged, and words of the sentence that names the file to remove
TO_REMOVE = {
    "fingerprint": (_write("fingerprint.json", "{"), "to go on without this check"),
    "evaluations": (_write("evaluations.json", "[3]"), "and evaluations count anew"),
    "tag outside": (_tag("../elsewhere/model_final.pth"), "and the newest checkpoint is used"),
    "tag of nothing": (_tag("model_0000001.pkl"), "and the newest checkpoint is used"),
    "tag a folder": (_tag_is_a_folder, "and the newest checkpoint is used"),
}


@pytest.mark.parametrize("name", TO_REMOVE)
def test_what_is_to_be_removed_is_removed_and_the_run_goes_on(whole, cut_off, name):
    damage, words = TO_REMOVE[name]
    damage(cut_off.folder)
    told = cut_off.refused(resume=True)
    assert words in told
    (path,) = {word.rstrip(",:") for word in told.split() if word.startswith(str(cut_off.folder))}
    assert re.search(r"remove it\b", told)
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    cut_off.give(resume=True)
    assert same(cut_off.folder, whole.folder)


def _damage_all(folder):
    for path in folder.glob("model_*.pth"):
        path.write_bytes(path.read_bytes()[:-100])


def _remove_all(folder):
    for path in folder.glob("model_*.pth*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"), [(_damage_all, "start anew in another OUTPUT_DIR"), (_remove_all, "name another OUTPUT_DIR")]
)
def test_another_folder_where_nothing_is_left_to_go_on_from(whole, cut_off, tmp_path, damage, words):
    damage(cut_off.folder)
    if damage is _remove_all:
        (cut_off.folder / "last_checkpoint").write_text("")
    assert words in cut_off.refused(resume=True)
    cut_off.give(folder=tmp_path / "another")
    assert same(tmp_path / "another", whole.folder)


@pytest.mark.parametrize("lacking", ["trainer", "iteration"])
def test_a_new_run_starts_from_the_weights_of_a_checkpoint_that_is_not_whole(cut_off, tmp_path, lacking):
    path = cut_off.folder / "model_0000001.pth"
    content = torch.load(path, weights_only=True)
    del content[lacking]
    torch.save(content, path)
    # a file that was changed is passed over: a warning says what to remove where that was meant
    path.with_name("model_0000000.pth").unlink()
    told = cut_off.refused(resume=True)
    (beside,) = re.findall(r"if you have changed them yourself, remove (\S+?\.json)", told)
    (cut_off.folder / beside).unlink()
    told = cut_off.refused(resume=True)
    (given,) = re.findall(r"start a new run from its weights, with MODEL\.WEIGHTS (\S+) and another OUTPUT_DIR", told)
    cut_off.give("MODEL.WEIGHTS", given, "SOLVER.BASE_LR", "1e-9", folder=tmp_path / "new")
    started = weights(tmp_path / "new")
    learned = {key: value for key, value in content["model"].items() if "running" not in key and "num_" not in key}
    assert all(torch.allclose(started[key], value, atol=1e-6) for key, value in learned.items())


def test_a_checksum_that_is_no_more_is_removed(cut_off, tmp_path, whole):
    beside = cut_off.folder / "model_0000001.pth.sha256.json"
    beside.write_text("{}")
    (given,) = re.findall(r"the checksum (\S+) of these weights is damaged: remove it", _loading(cut_off, beside))
    Path(given).unlink()
    cut_off.give("MODEL.WEIGHTS", str(cut_off.folder / "model_0000001.pth"), folder=tmp_path / "new")
    assert not same(tmp_path / "new", whole.folder)


def _loading(command, beside):
    return command.refused("MODEL.WEIGHTS", str(beside).removesuffix(".sha256.json"), folder=command.folder / "new")


def test_a_full_disk_is_freed_and_the_run_goes_on(whole, cut_off, monkeypatch):
    save = torch.save

    def full(data, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(Resumable) as told:
        cut_off.give(resume=True)
    assert re.search(r"the last good checkpoint is \S*model_0000001\.pth: free some space$", str(told.value))
    monkeypatch.setattr(torch, "save", save)
    cut_off.give(resume=True)
    assert same(cut_off.folder, whole.folder)


def test_a_run_at_its_end_is_trained_on_as_is_said(whole, cut_off, caplog):
    cut_off.give(resume=True)
    caplog.clear()
    cut_off.give(resume=True)
    assert re.search(r"already trained to iteration 3: raise SOLVER\.MAX_ITER \(3\) to train on", caplog.text)
    cut_off.give("SOLVER.MAX_ITER", "4", resume=True)
    assert torch.load(cut_off.folder / "model_final.pth", weights_only=True)["iteration"] == 3
    assert not same(cut_off.folder, whole.folder)


def test_another_config_is_given_as_it_was_or_elsewhere(whole, cut_off, tmp_path):
    told = cut_off.refused("SEED", "5", resume=True)
    assert "give it as it was to go on with --resume, or name another OUTPUT_DIR" in told
    (was,) = re.findall(r"made with SEED (\S+), this command has 5", told)
    cut_off.give("SEED", "5", folder=tmp_path / "another")
    cut_off.give("SEED", was, resume=True)
    assert same(cut_off.folder, whole.folder)
    assert not same(tmp_path / "another", whole.folder)


def test_both_options_at_once_name_the_choice(cut_off):
    assert cut_off.refused(resume=True, overwrite=True).endswith(
        "--resume goes on with a run and --overwrite removes it: give one of them"
    )


@pytest.fixture
def explodes(monkeypatch):
    """The loss of the third iteration is none, unless the rate is low."""
    step, check = Trainer.run_step, LossGuard._check
    now = {}

    def run_step(trainer):
        now["explodes"] = trainer.iter == 2 and trainer.cfg.SOLVER.BASE_LR > 1e-3
        step(trainer)

    def _check(guard, *given):
        if now["explodes"]:
            guard._vote("loss_cls nan", "cpu")
        check(guard, *given)

    monkeypatch.setattr(Trainer, "run_step", run_step)
    monkeypatch.setattr(LossGuard, "_check", _check)


def test_a_loss_that_is_none_is_passed_over_or_a_new_run_is_slower(cut_off, tmp_path, explodes):
    told = cut_off.refused(resume=True)
    assert re.search(
        r"lower SOLVER\.BASE_LR in a new run, or pass over .* SOLVER\.SKIP_NONFINITE 1 and --resume;", told
    )
    assert re.search(r"the last good checkpoint is \S*model_0000001\.pth$", told)
    cut_off.give("SOLVER.SKIP_NONFINITE", "1", resume=True)
    assert weights(cut_off.folder)
    cut_off.give("SOLVER.BASE_LR", "0.0001", folder=tmp_path / "slower")
    assert weights(tmp_path / "slower")


def test_a_machine_without_memory_is_told_and_the_run_goes_on_once_there_is_some(whole, cut_off, monkeypatch):
    def run_step(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as full:
        full.setattr(Trainer, "run_step", run_step)
        with pytest.raises(Resumable) as told:
            cut_off.give(resume=True)
    assert "CUDA out of memory" in str(told.value)
    assert "end what else uses it, lower DATALOADER.NUM_WORKERS, or begin a new run with less" in str(told.value)
    cut_off.give("DATALOADER.NUM_WORKERS", "1", resume=True)
    assert same(cut_off.folder, whole.folder)


def test_weights_that_are_none_are_not_saved_and_a_new_run_is_slower(cut_off, tmp_path, monkeypatch):
    step = Trainer.run_step

    def run_step(trainer):
        step(trainer)
        if trainer.iter == 2 and trainer.cfg.SOLVER.BASE_LR > 1e-3:
            next(trainer.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "run_step", run_step)
    told = cut_off.refused(resume=True)
    assert "model_0000001.pth. In a new run, lower SOLVER.BASE_LR, or clip gradients with" in told
    cut_off.give("SOLVER.BASE_LR", "0.0001", folder=tmp_path / "slower")
    assert all(value.isfinite().all() for value in weights(tmp_path / "slower").values())


def test_weights_that_are_not_there_are_left_out(whole, tmp_path):
    command = Command(whole.datasets, tmp_path / "run")
    told = command.refused("MODEL.WEIGHTS", "nowhere.pth")
    assert "or train from scratch with MODEL.WEIGHTS ''" in told
    command.give("MODEL.WEIGHTS", "")
    assert same(command.folder, whole.folder)
