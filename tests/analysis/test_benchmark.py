import collections
import csv
import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from sge_det.analysis import benchmark, history
from sge_det.analysis import kernels as kernel_benchmark
from sge_det.errors import UserError
from sge_det.layers import kernels, sge_compiled
from sge_det.layers.sge import SpatialGroupEnhance

SHAPE = (2, 256, 50, 76)
ACTIVATION = 4 * torch.Size(SHAPE).numel()


def test_contestants_that_are_sge_agree():
    tails = benchmark.contestants(128)
    x, shortcut = torch.randn(2, 128, 5, 7), torch.randn(2, 128, 5, 7)
    with torch.no_grad():
        for module in (benchmark.TEXTBOOK, benchmark.LAYER):
            tails[module][0].weight.fill_(0.7)
        expected = tails[benchmark.TEXTBOOK][1](x, shortcut)
        torch.testing.assert_close(tails[benchmark.LAYER][1](x, shortcut), expected)
        tails[benchmark.TAIL][0].weight.fill_(0.7)
        torch.testing.assert_close(tails[benchmark.TAIL][1](x.clone(), shortcut), expected)


def test_saved_bytes_are_one_activation_more_than_without_attention():
    layer = SpatialGroupEnhance()
    x, shortcut = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    plain = benchmark.saved_bytes(lambda x, shortcut: F.relu_(x + shortcut), x, shortcut)
    assert plain == ACTIVATION
    saved = benchmark.saved_bytes(layer.residual, x, shortcut, layer)
    assert ACTIVATION <= saved - plain <= 1.05 * ACTIVATION
    # a square keeps what it squares, and the counted storage is counted once
    assert benchmark.saved_bytes(lambda x, _: x.square() + x.square(), x, shortcut) == ACTIVATION


def test_peak_bytes_of_the_tail_are_its_output_and_little_more():
    layer, x, shortcut = SpatialGroupEnhance(), torch.randn(SHAPE), torch.randn(SHAPE)
    assert benchmark.peak_bytes(lambda: (x + 1) * 2) == pytest.approx(2 * ACTIVATION, rel=1e-3)
    with torch.no_grad():
        assert ACTIVATION <= benchmark.peak_bytes(lambda: layer.residual(x, shortcut)) <= 1.1 * ACTIVATION
        assert benchmark.peak_bytes(lambda: layer.residual(x.clone(), shortcut, inplace=True)) <= 1.1 * ACTIVATION


def test_times_are_taken_in_turn():
    order = []

    def contestant(name, seconds):
        def run():
            order.append(name)
            return seconds

        return run

    names = ["a", "b", "c", "d", "e"]
    contestants = {name: contestant(name, index) for index, name in enumerate(names)}
    times = benchmark.interleaved_times(contestants, rounds=59)
    assert all(sorted(order[first : first + 5]) == names for first in range(0, 5 * 60, 5))
    followed = collections.Counter(itertools.pairwise(order))
    assert all(followed[pair] >= 4 for pair in itertools.permutations(names, 2))
    assert times == {name: [index] * 59 for index, name in enumerate(names)}
    assert benchmark.summary([0.001, 0.002, 0.003]) == {"median_ms": 2.0, "quartiles_ms": [1.5, 2.5]}


def test_layer_tool(run_tool, tmp_path):
    shapes = ["--shapes", "1,64,5,5", "2,64,3,4"]
    options = [*shapes, "--rounds", 2, "--compile", "--json", "layer.json", "--history", "history.csv"]
    done = run_tool("benchmark.py", "layer", *options, env={"TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stderr
    assert "ratios to the textbook" in done.stdout and "| 2x64x3x4" in done.stdout
    result = json.loads((tmp_path / "layer.json").read_text())
    assert [entry["shape"] for entry in result["shapes"]] == [[1, 64, 5, 5], [2, 64, 3, 4]]
    assert set(result["shapes"][0]["contestants"]) == {
        *("copy", "no attention", "textbook", "layer", "block tail", "timm se", "timm eca", "timm cbam"),
        *("compiled textbook", "compiled layer", "KERNEL compile"),
    }
    assert "seconds of the first call" in done.stdout
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert tuple(rows[0]) == history.COLUMNS and len(rows) == 2 * 2 * 10
    assert history.append_history(tmp_path / "history.csv", result) == len(rows)
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 1 + 2 * len(rows)
    assert history.history_figure(tmp_path / "history.csv").startswith(b"\x89PNG")
    with pytest.raises(UserError, match="holds no ratios of the layer"):
        history.history_figure(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"other\.csv is no history of benchmarks"):
        history.append_history(tmp_path / "other.csv", result)


@pytest.mark.parametrize("shape", ["1,100,5,5", "1,64,5", "1,64,0,5"])
def test_layer_tool_says_what_is_wrong_with_a_shape(fork_tool, shape):
    done = fork_tool("benchmark.py", "layer", "--shapes", shape)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: a shape is N,C,H,W") and shape in done.stderr


def test_model_tool(run_tool, tmp_path):
    arguments = ["--config-file", "sample/faster_rcnn_SGE_R_50_FPN.yaml", "--size", 64, 96, "--rounds", 2]
    others = ["save memory", "blocks checkpointed", "x in bfloat16", "ignore padding", "backbone compiled"]
    options = ["--with", *others, "--history", "history.csv", "--json", "model.json", "MODEL.DEVICE", "cpu"]
    # compiled is then what it was: no compiler is needed
    done = run_tool("benchmark.py", "model", *arguments, *options, env={"TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "model.json").read_text())
    for mode in ("inference", "training step"):
        assert mode in done.stdout
        entry = result[mode]
        assert entry["time_ratio"] == entry["sge"]["median_ms"] / entry["plain"]["median_ms"]
        assert entry["memory_ratio"] == entry["sge"]["peak_bytes"] / entry["plain"]["peak_bytes"] > 0.5
        assert set(others) < set(entry)
    peaks = {name: timed["peak_bytes"] for name, timed in result["training step"].items() if isinstance(timed, dict)}
    assert peaks["save memory"] < peaks["x in bfloat16"] < peaks["sge"]
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert len(rows) == 2 * 2 * (1 + len(others)) and {row["shape"] for row in rows} == {"1x3x64x96"}


def test_model_tool_wants_the_config_with_sge(fork_tool):
    config = "sample/faster_rcnn_SGE_R_50_FPN.yaml"
    done = fork_tool("benchmark.py", "model", "--config-file", config, "MODEL.SGE.ENABLED", "False")
    assert done.returncode == 2 and "the plain twin is made from it" in done.stderr


def test_gpu_command_goes_as_far_as_a_cpu_goes(call_tool, tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "_given_up", set())
    for name in ("_forward", "_backward"):  # as they are, which takes no compiler
        monkeypatch.setattr(sge_compiled, f"_compiled{name}", getattr(sge_compiled, name))
    arguments = ["--device", "cpu", "--shapes", "1,64,5,5", "--rounds", 2, "--images", 1, "--size", 64, 64]
    config = ["--config-file", "sample/faster_rcnn_SGE_R_50_FPN.yaml"]
    done = call_tool("benchmark.py", "gpu", *arguments, *config, "--json", "gpu.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    runs = {check["kernel"]: check["runs"] for check in result["checks"]}
    assert runs == {"eager": True, "compile": True, "triton": False}
    assert len(result["checks"]) == 3 * 3 * 2 and all(check["holds"] for check in result["checks"])
    assert [(entry["dtype"], entry["shape"]) for entry in result["layer"]] == [
        ("float32", [1, 64, 5, 5]),
        ("bfloat16", [1, 64, 5, 5]),
    ]
    assert {"eager", "compile", "textbook", "timm se"} <= set(result["layer"][0]["contestants"])
    assert [entry["kernel"] for entry in result["detector"]] == ["eager", "compile"]
    assert "cannot run" in done.stdout and "### detector" in done.stdout


def test_gpu_command_tells_of_wrong_numbers(call_tool, monkeypatch):
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setattr(sge_compiled, "_compiled_backward", sge_compiled._backward)

    def wrong(x, shortcut, out, *rest):
        kept = sge_compiled._forward(x, shortcut, out, *rest)
        out.mul_(1.1)
        return kept

    monkeypatch.setattr(sge_compiled, "_compiled_forward", wrong)
    monkeypatch.setattr(kernel_benchmark, "_time_shape", lambda *args: {})
    monkeypatch.setattr(kernel_benchmark, "_time_detector", lambda *args: {})
    monkeypatch.setattr(kernel_benchmark, "report", lambda result: "")
    done = call_tool("benchmark.py", "gpu", "--device", "cpu")
    assert done.returncode == 1 and "wrong: compile, float32, contiguous_format" in done.stderr
