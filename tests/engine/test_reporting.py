"""What trackers are told: Weights & Biases offline, the others in a stand-in that takes the same calls."""

import json
import sys
import types

import pytest
from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage

from sge_det.config import add_sge_config
from sge_det.engine import doctor, reporting
from sge_det.engine.reporting import ReportWriter, Tracker, build_report_writer
from sge_det.errors import UserError


def config(folder, name):
    cfg = get_cfg()
    add_sge_config(cfg)
    cfg.OUTPUT_DIR, cfg.REPORT_TO = str(folder / "sge" / "seed0"), name
    (folder / "sge" / "seed0").mkdir(parents=True, exist_ok=True)
    return cfg


def log(writer, steps, **more):
    with EventStorage(steps[0]) as storage:
        for step in steps:
            storage.iter = step
            storage.put_scalar("total_loss", 10.0 - step, smoothing_hint=False)
            storage.put_scalar("[metric]images/s", 3.0, smoothing_hint=False)
            storage.put_scalars(**more, smoothing_hint=False)
            writer.write()
        writer.write()  # nothing new
        writer.close()


def test_weights_and_biases_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config(tmp_path, "wandb")
    folder = tmp_path / "sge" / "seed0"
    log(build_report_writer(cfg), [0, 1])
    known = json.loads((folder / "report_to.json").read_text())
    log(build_report_writer(cfg), [2, 3])  # the run goes on, and is the same one there
    assert json.loads((folder / "report_to.json").read_text()) == known
    files = sorted((folder / "wandb").glob(f"offline-run-*-{known['run']}/*.wandb"))
    assert files
    told = b"".join(file.read_bytes() for file in files)
    for words in (b"total_loss", b"images/s", b"seed0", b"GRADIENT_ACCUMULATION_STEPS"):
        assert words in told
    assert b"[metric]" not in told


class Stub(types.ModuleType):
    """Records the calls that MLflow's and trackio's modules take."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id="run1"), name=kwargs.get("name", "run1"))

        return call


@pytest.mark.parametrize(("name", "logs"), [("mlflow", "log_metrics"), ("trackio", "log")])
def test_the_others_are_told_each_value_once(tmp_path, monkeypatch, name, logs):
    stub = Stub(name)
    monkeypatch.setitem(sys.modules, name, stub)
    cfg = config(tmp_path, name)
    log(build_report_writer(cfg), [0, 1], **{"bbox/AP-cup (red)": 1.0})
    told = [(args[0], kwargs["step"]) for call, args, kwargs in stub.calls if call == logs]
    # MLflow refuses a name with parentheses, and all the others with it
    category = "bbox/AP-cup _red_" if name == "mlflow" else "bbox/AP-cup (red)"
    assert told == [({"total_loss": 10.0 - step, "images/s": 3.0, category: 1.0}, step) for step in (0, 1)]
    first = next(kwargs for call, _, kwargs in stub.calls if call in ("start_run", "init"))
    stub.calls.clear()
    build_report_writer(cfg)
    again = next(kwargs for call, _, kwargs in stub.calls if call in ("start_run", "init"))
    if name == "mlflow":
        assert (first["run_id"], again["run_id"]) == (None, "run1")
    else:
        assert first["name"] == again["name"]
        assert (first["resume"], again["resume"]) == ("never", "allow")
        # another run in a folder of the same name is another run
        build_report_writer(config(tmp_path / "other", name))
        assert stub.calls[-1][2]["name"] not in ("sge/seed0", first["name"])


def test_a_tracker_that_fails_does_not_end_the_run(monkeypatch):
    calls, said = [], []
    monkeypatch.setattr(reporting.logger, "warning", said.append)

    def fail(values, step):
        calls.append(step)
        raise OSError("no route to host")

    log(ReportWriter("wandb", Tracker("run1", fail, lambda: calls.append("finish"))), [0, 1, 2])
    assert calls == [0]
    assert said == ["wandb is told no more of this run (OSError: no route to host)"]


def test_a_tracker_that_does_not_start_is_told(tmp_path, monkeypatch):
    stub = types.ModuleType("wandb")
    stub.init = lambda **kwargs: (_ for _ in ()).throw(RuntimeError("no API key configured"))
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with pytest.raises(UserError, match=r"REPORT_TO wandb: it does not start .no API key configured.*WANDB_MODE"):
        build_report_writer(config(tmp_path, "wandb"))


def test_a_tracker_that_is_not_installed_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    cfg = config(tmp_path, "trackio")
    with pytest.raises(UserError, match="pip install trackio"):
        build_report_writer(cfg)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = [finding for finding in doctor.examine_settings(cfg) if finding.key == "REPORT_TO"]
    assert [finding.severity for finding in found] == ["error"]
    cfg.REPORT_TO = "neptune"
    found = [finding for finding in doctor.examine_settings(cfg) if finding.key == "REPORT_TO"]
    assert "one of '', wandb, mlflow, trackio" in str(found[0])
