"""What ends a run, by the error or the file that does it: told in a sentence, and what counts most of several."""

import argparse
import errno
import json
import logging
import os
import pickle
import signal

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf

from sge_det.config import add_sge_config
from sge_det.engine import launching, lazy, logs, stopping
from sge_det.engine.claims import locked
from sge_det.engine.evaluations import Evaluations
from sge_det.engine.faults import in_words
from sge_det.engine.fingerprint import Contents, differences, fingerprint, source_hash
from sge_det.engine.logs import LogFile
from sge_det.engine.steps import StepTrainer, build_steps
from sge_det.engine.switches import switches_of
from sge_det.errors import Resumable, Stopped, UserError

FAULTS = {
    "the disk that holds x.json is full": OSError(errno.ENOSPC, "No space left", "x.json"),
    "out cannot be written: Input/output error; see to its disk": OSError(errno.EIO, "Input/output error"),
    "a.jpg is not there any more: put it back": FileNotFoundError(errno.ENOENT, "No such file", "a.jpg"),
    "raise DATALOADER.TIMEOUT or see to what they wait for": RuntimeError("DataLoader timed out after 5 seconds"),
    "a loader worker ended (DataLoader worker (pid 7) is killed": RuntimeError(
        "DataLoader worker (pid 7) is killed\nby signal: Killed."
    ),
    "did not answer within --timeout ([gloo] Connection closed by peer": RuntimeError(
        "[gloo] Connection closed by peer"
    ),
}


@pytest.mark.parametrize("words", FAULTS)
def test_faults_of_the_machine_are_told_and_can_be_gone_on_from(words):
    told = in_words(FAULTS[words], "out")
    assert isinstance(told, Resumable) and words in str(told)


def test_mistakes_in_the_code_are_no_faults_of_the_machine():
    for error in (ValueError("gloo"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("odd")):
        assert in_words(error, "out") is None
    mistake = UserError("as it is")
    assert in_words(mistake, "out") is mistake


def test_a_log_that_cannot_be_written_says_so_once_and_the_run_goes_on(capsys):
    log = LogFile("/dev/full")
    logger = logging.Logger("alone")
    logger.addHandler(log)
    logger.info("first")
    logger.info("second")
    log.flush()
    log.close()
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("warning: the disk that holds /dev/full is full") and "the log ends here" in told


def test_a_record_that_cannot_be_formatted_does_not_end_the_log(tmp_path, capsys):
    log = LogFile(tmp_path / "log.txt")
    logger = logging.Logger("alone")
    logger.addHandler(log)
    logger.info("%d", "no number")
    logger.info("next")
    log.close()
    assert "Logging error" in capsys.readouterr().err
    assert (tmp_path / "log.txt").read_text().endswith("next\n")


def files(folder, *texts):
    """What processes of a run that ended badly leave: their traceback, or nothing."""
    places = []
    for number, text in enumerate(texts):
        place = folder / str(number)
        if text is not None:
            place.write_bytes(pickle.dumps(text))
        places.append(str(place))
    return places


MISTAKE = "Traceback ...\nsge_det.errors.UserError: DATASETS.TRAIN is empty\n"
LOST = "Traceback ...\nsge_det.errors.Resumable: another process of the run is gone\n"
FAULT = "Traceback ...\nKeyError: 'x'\n"


@pytest.mark.parametrize(
    ("codes", "texts", "kind", "words"),
    [
        ([1, 1], [LOST, MISTAKE], UserError, "^DATASETS.TRAIN is empty$"),
        ([1, -9], [LOST, None], Resumable, "^process 5 of the run was killed by SIGKILL: see to what killed it$"),
        ([1, 1], [FAULT, LOST], Resumable, "^another process of the run is gone$"),
        ([1, 1], [FAULT, None], RuntimeError, "KeyError: 'x'"),
        ([1, None], [None, None], RuntimeError, r"ended with exit codes \[1, None\]"),
        ([130, 130], [None, None], Stopped, str(int(signal.SIGINT))),
        ([-15, 143], [None, LOST], Stopped, str(int(signal.SIGTERM))),
    ],
)
def test_of_several_ends_that_counts_which_says_most(tmp_path, codes, texts, kind, words):
    with pytest.raises(kind, match=words) as told:
        launching._tell(codes, files(tmp_path, *texts), 4)
    assert type(told.value) is kind


def test_processes_that_all_end_well_tell_nothing(tmp_path):
    launching._tell([0, 0], files(tmp_path, None, None), 0)


class Process:
    """Ends with a code after a number of looks; never where that is None."""

    def __init__(self, code, looks=None):
        self.code, self.looks = code, looks

    def is_alive(self):
        if self.looks is None:
            return True
        self.looks -= 1
        return self.looks >= 0

    @property
    def exitcode(self):
        return None if self.looks is None or self.looks >= 0 else self.code


class Stop:
    def __init__(self):
        self.is_set = False

    def set(self):
        self.is_set = True


def test_a_process_that_does_not_follow_one_that_failed_is_waited_for_a_while(monkeypatch):
    monkeypatch.setattr(launching, "_GRACE_SECONDS", 0.05)
    monkeypatch.setattr(launching, "_POLL_SECONDS", 0.01)
    stop = Stop()
    launching._watch([Process(1, 0), Process(0)], stop)  # returns, though the second goes on for ever
    launching._watch([Process(0, 2), Process(0, 3)], stop)
    assert not stop.is_set
    monkeypatch.setattr(launching, "asked", lambda: signal.SIGTERM)
    launching._watch([Process(143, 2)], stop)
    assert stop.is_set


def yaml_config(*overrides):
    cfg = get_cfg()
    add_sge_config(cfg)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "4", *overrides])
    return cfg


def test_a_batch_that_cannot_be_cut_is_told():
    passes = ["SOLVER.GRADIENT_ACCUMULATION_STEPS", "3"]
    with pytest.raises(UserError, match=r"STEPS 3: SOLVER\.IMS_PER_BATCH 4 is not a multiple of 3 passes"):
        build_steps(yaml_config(*passes), None, (), None)


def test_the_scale_of_float16_is_of_the_checkpoint(monkeypatch):
    def trainer(precision):
        model = torch.nn.Linear(1, 1)
        model.train()
        return StepTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1), precision=precision)

    first, second = trainer("float16"), trainer("float16")
    first.grad_scaler.load_state_dict({**first.grad_scaler.state_dict(), "scale": 8.0})
    second.load_state_dict(first.state_dict())
    assert second.grad_scaler.get_scale() == 8.0
    assert "grad_scaler" not in trainer("").state_dict()
    trainer("").load_state_dict(trainer("").state_dict())


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"model_ema": 3}, r"train\.model_ema holds keys \(.*\) and has no value of its own, and 3 stands there"),
        ({"model_ema": {"nonsense": 1}}, r"there is no config key train\.model_ema\.nonsense: train\.model_ema has"),
        ({"gradient_accumulation_steps": 2}, r"needs dataloader\.train\.total_batch_size"),
    ],
)
def test_switches_that_lazy_configs_cannot_have(train, words):
    with pytest.raises(UserError, match=words):
        switches_of(OmegaConf.create({"train": train}))


def test_what_a_run_is_made_of_is_told_where_it_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "mine_alone.py"
    module.write_text("a = 1")
    before = source_hash("mine_alone")
    module.write_text("a = 2")
    assert source_hash("mine_alone") != before
    (tmp_path / "mine_without_source").mkdir()
    assert source_hash("mine_without_source") == source_hash("nowhere_at_all") == ""
    with pytest.raises(UserError, match=r"the module nowhere_at_all\.x cannot be imported"):
        source_hash("nowhere_at_all.x")
    with pytest.raises(UserError, match=r"no\.json cannot be read: No such file"):
        Contents()._file(str(tmp_path / "no.json"))


@pytest.fixture
def registered(tmp_path):
    content = {"images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}], "annotations": []}
    (tmp_path / "a.json").write_text(json.dumps({**content, "categories": [{"id": 1, "name": "cat"}]}))
    DatasetCatalog.register("of_mine", list)
    yield MetadataCatalog.get("of_mine")
    DatasetCatalog.remove("of_mine")
    MetadataCatalog.remove("of_mine")


def test_sets_of_other_kinds_go_by_name_or_are_refused(registered, tmp_path):
    assert Contents(coco_only=False).of_names(["of_mine"], "") == {"of_mine": "of_mine"}
    with pytest.raises(UserError, match="of_mine is not in COCO's format on disk: the gain cannot be measured on it"):
        Contents().of_names(["of_mine"], "")
    registered.set(json_file=str(tmp_path / "a.json"), image_root=str(tmp_path))
    with pytest.raises(UserError, match=r"data set of_mine: the image \S+a\.png is not there"):
        Contents().of_names(["of_mine"], "")
    (tmp_path / "a.png").write_bytes(b"1")
    (tmp_path / "weights.pth").write_bytes(b"2")
    found = Contents().of_names(["of_mine"], str(tmp_path / "weights.pth"))
    assert set(found) == {"of_mine", "MODEL.WEIGHTS"}
    (tmp_path / "a.png").write_bytes(b"12")
    assert Contents().of_names(["of_mine"], "")["of_mine"] != found["of_mine"]


def test_an_attention_of_ones_own_counts_with_its_source():
    own = ["MODEL.SGE.ENABLED", "True", "MODEL.SGE.ATTENTION"]
    contents = Contents(coco_only=False)
    for attention, module in (("torch.nn.modules.linear:Identity", "torch.nn.modules"), ("json:JSONDecoder", "json")):
        made = fingerprint(yaml_config(*own, attention, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"), contents, 1)
        assert list(made["source"]) == ["sge_det", module]
        assert not any(key.startswith("MODEL.SGE.INIT") for key in made["config"])
    other = {**made, "processes": 2, "start": {"SEED": "1"}, "source": {**made["source"], "json": "0"}}
    assert list(differences(other, made)) == [
        "weights of a run with SEED 1, here absent",
        "other source code of json",
        "2 processes, this command has 1",
    ]


def test_evaluations_that_no_run_writes_are_told_with_what_to_do(tmp_path):
    for content in ('{"x": {}}', '{"1": 3}', '{"1": {"bbox/AP": "high"}}', "[" * 99_999):
        (tmp_path / "evaluations.json").write_text(content)
        with pytest.raises(UserError, match=r"evaluations\.json .*: remove it, and evaluations count anew"):
            Evaluations(tmp_path).read(5)
    os.remove(tmp_path / "evaluations.json")
    Evaluations(tmp_path).read(5)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(monkeypatch, capfd):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(stopping.os, "_exit", end)
    with stopping.signals_handled():
        with stopping.waiting():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stopping.asked() == signal.SIGUSR1
            with pytest.raises(Stopped), stopping.waiting(False):
                pass
            with pytest.raises(Ended, match="143"):
                os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(stopping._request, "pid", -1)
        stopping._request.handle(signal.SIGINT)  # in a worker that was forked: nothing
        assert stopping.asked() == signal.SIGUSR1
    assert stopping.asked() is None
    told = capfd.readouterr().err.splitlines()
    assert told == ["stopping: the step ends first, and a checkpoint is written; again: at once", "stopped at once"]


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def fail(lock, **options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with pytest.raises(UserError, match=r"cannot be written \(FileSystem .* flock\): name another"), locked(tmp_path):
        pass


@pytest.fixture
def without_logs():
    yield
    for name in logs._LOGGERS:
        logger = logging.getLogger(name)
        for handler in [handler for handler in logger.handlers if isinstance(handler, LogFile)]:
            logger.removeHandler(handler)
            handler.close()


def test_a_second_run_of_a_process_has_a_log_of_its_own(tmp_path, monkeypatch, without_logs):
    monkeypatch.setattr(logs, "collect_env_info", lambda: "the environment")
    monkeypatch.setattr(logs, "setup_logger", lambda *given, name, **keys: logging.getLogger(name))
    for name in ("first", "second"):
        logs.start_logs(tmp_path / name, argparse.Namespace(), f"config of the {name}")
        logging.getLogger("sge_det").warning(f"said in the {name}")
    for name, other in (("first", "second"), ("second", "first")):
        text = (tmp_path / name / "log.txt").read_text()
        assert f"said in the {name}" in text and f"said in the {other}" not in text
    (tmp_path / "third/log.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^OUTPUT_DIR \S+third cannot be written: Is a directory: name another$"):
        logs.start_logs(tmp_path / "third", argparse.Namespace(), "")


def test_lazy_configs_are_kept_as_they_are_and_models_that_cannot_be_are_told(tmp_path):
    cfg = OmegaConf.create({"train": {"device": "cpu"}, "model": {"_target_": "torch.nn.Linear", "in_features": 2}})
    lazy._save(cfg, tmp_path)
    assert OmegaConf.load(tmp_path / "config.yaml") == cfg
    with pytest.raises(UserError, match=r"the model of this config cannot be built \(TypeError: .*out_features"):
        lazy.build_lazy_model(cfg, 0)
    cfg.model.out_features = 3
    first, second = lazy.build_lazy_model(cfg, 4), lazy.build_lazy_model(cfg, 4)
    assert torch.equal(first.weight, second.weight) and first.weight.shape == (3, 2)
