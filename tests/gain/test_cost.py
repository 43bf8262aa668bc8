"""What runs cost, over all stretches in which they came to their end."""

import json
import math
import os
import time

import pytest

from sge_det.gain import cost
from sge_det.gain.parts import Cost


def test_stretches_of_a_run_are_summed(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    cost.begin(tmp_path, "core", 2)
    (tmp_path / "metrics.json").write_text("{}")
    os.utime(tmp_path / "metrics.json", (1060.0, 1060.0))  # killed after that
    now[0] = 5000.0
    cost.begin(tmp_path, "core", 4)
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    os.utime(tmp_path / "last_checkpoint", (5030.0, 5030.0))  # stopped by a signal, with a checkpoint
    now[0] = 9000.0
    cost.begin(tmp_path, "GPU", 8)
    now[0] = 9100.0
    assert cost.end(tmp_path) == {
        "seconds": 60 + 30 + 100,
        "stretches": 3,
        "device_seconds": {"core": 60 * 2 + 30 * 4, "GPU": 100 * 8},
    }
    assert cost.end(tmp_path)["seconds"] == 190  # ended once


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stretches": 3}', '{"stretches": [{"start": 1}]}'])
def test_a_broken_file_costs_no_run(tmp_path, content):
    (tmp_path / cost.STRETCHES_FILE).write_text(content)
    cost.begin(tmp_path, "GPU", 1)
    assert cost.end(tmp_path)["stretches"] == 1


def test_one_that_was_killed_before_its_first_line_has_cost_nothing(tmp_path):
    cost.begin(tmp_path, "core", 1)
    cost.begin(tmp_path, "core", 1)
    (killed, _) = json.loads((tmp_path / cost.STRETCHES_FILE).read_text())["stretches"]
    assert killed["seconds"] == 0


def test_hours_of_an_arm():
    runs = [
        {"seconds": 3600.0, "device_seconds": {"GPU": 7200.0}},
        {"seconds": 1800.0, "device_seconds": {"GPU": 1800.0, "core": 900.0}},
    ]
    assert cost.of_arm(runs) == Cost(2, hours=1.5, gpu_hours=2.5, core_hours=0.25)
    before = cost.of_arm([*runs, {"seconds": 60.0}])
    assert before.runs == 3 and math.isnan(before.gpu_hours)
