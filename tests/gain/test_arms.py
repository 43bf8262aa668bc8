import itertools

import pytest
import torch
from conftest import ROOT, TINY

from sge_det import SpatialGroupEnhance, UserError, build_optimizer
from sge_det.data.loader import build_train_loader
from sge_det.engine.training import Trainer, build_seeded_model, setup_config
from sge_det.gain import choose_arms
from sge_det.gain.arms import BUILT_IN
from sge_det.modeling.gates import gate_statistics

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


@pytest.fixture(scope="module")
def cfg(sample_datasets):
    return setup_config(FASTER, [*TINY, "SEED", "5", "MODEL.SGE.INIT", "[0.25, 0.5]"], sample_datasets)


@pytest.fixture(scope="module")
def models(cfg):
    return {arm.name: (arm.config(cfg), build_seeded_model(arm.config(cfg))) for arm in choose_arms(cfg, BUILT_IN)}


def test_all_arms_share_start_values(models):
    plain = models["plain"][1].state_dict()
    sizes = {}
    for name, (_, model) in models.items():
        state = model.state_dict()
        assert set(plain) <= set(state), name
        assert all(torch.equal(state[key], plain[key]) for key in plain), name
        sizes[name] = len(state)
    assert all(size > sizes["plain"] for name, size in sizes.items() if name != "plain")


def test_all_arms_share_the_data_order(models):
    batches = {}
    for name, (config, _) in models.items():
        loader = build_train_loader(config, config.SEED)
        batches[name] = list(itertools.islice(loader, 3))
    for found in batches.values():
        for ours, theirs in zip(found, batches["plain"]):
            assert [example["file_name"] for example in ours] == [example["file_name"] for example in theirs]
            assert all(torch.equal(a["image"], b["image"]) for a, b in zip(ours, theirs))


def test_sge_fixed_starts_with_constant_gates_whatever_its_weights_hold(cfg, models, tmp_path):
    trained = models["sge"][1].state_dict()
    assert any(value.any() for key, value in trained.items() if key.endswith("sge.weight"))
    torch.save({"model": trained}, tmp_path / "trained.pth")
    base = cfg.clone()
    base.MODEL.WEIGHTS, base.OUTPUT_DIR = str(tmp_path / "trained.pth"), str(tmp_path)
    arms = {arm.name: arm.config(base) for arm in choose_arms(base, ["sge", "sge-fixed"])}
    start = {}
    for name, config in arms.items():
        trainer = Trainer(config)
        trainer.resume_or_load(resume=False)
        start[name] = trainer.model.state_dict()
    for key, value in start["sge-fixed"].items():
        if ".sge." in key:
            assert torch.equal(value, torch.full_like(value, 0.0 if key.endswith("weight") else 0.5))
        else:
            assert torch.equal(value, start["sge"][key])


def test_sge_fixed_holds_its_gates(models):
    config, model = models["sge-fixed"]
    optimizer = build_optimizer(config, model)
    layers = [module for module in model.modules() if isinstance(module, SpatialGroupEnhance)]
    before = [(layer.weight.clone(), layer.bias.clone()) for layer in layers]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for layer, (weight, bias) in zip(layers, before):
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.bias, bias)
        assert (weight == 0).all()
        assert (bias == 0.5).all()


def test_sge_constant_learns_beta_alone(models):
    config, model = models["sge-constant"]
    optimizer = build_optimizer(config, model)
    layers = [module for module in model.modules() if isinstance(module, SpatialGroupEnhance)]
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) if parameter.requires_grad else None
    optimizer.step()
    assert layers
    for layer in layers:
        assert (layer.weight == 0).all()
        assert (layer.bias != 0.5).all()
        x = torch.randn(2, 2 * layer.groups, 5, 7, generator=generator)
        gates = torch.sigmoid(layer.bias).repeat_interleave(2, 1)
        torch.testing.assert_close(layer(x), x * gates)


def test_sge_constant_drops_the_gamma_of_its_weights_and_keeps_beta(cfg, models, tmp_path):
    trained = models["sge"][1].state_dict()
    trained |= {key: torch.full_like(value, 0.75) for key, value in trained.items() if ".sge." in key}
    torch.save({"model": trained}, tmp_path / "trained.pth")
    base = cfg.clone()
    base.MODEL.WEIGHTS, base.OUTPUT_DIR = str(tmp_path / "trained.pth"), str(tmp_path)
    trainer = Trainer(choose_arms(base, ["plain", "sge-constant"])[1].config(base))
    trainer.resume_or_load(resume=False)
    for key, value in trainer.model.state_dict().items():
        expected = torch.zeros_like(value) if key.endswith("sge.weight") else trained[key]
        assert torch.equal(value, expected), key


def test_ablations_are_arms(cfg):
    arms = choose_arms(
        cfg,
        ["sge", "raw"],
        [["raw", "MODEL.SGE.NORMALIZE", "False"], ["ones", "MODEL.SGE.INIT", "[1.0, 1.0]"]],
    )
    layers = [
        [m for m in build_seeded_model(arm.config(cfg)).modules() if isinstance(m, SpatialGroupEnhance)] for arm in arms
    ]
    assert [{layer.normalize for layer in found} for found in layers] == [{True}, {False}, {True}]
    assert all((layer.weight == 1).all() and (layer.bias == 1).all() for layer in layers[2])


def test_custom_arms(cfg):
    arms = choose_arms(
        cfg, ["plain", "wide"], [["wide", "MODEL.SGE.GROUPS", "32"], ["late", "MODEL.SGE.STAGES", "['res5']"]]
    )
    assert [arm.name for arm in arms] == ["plain", "wide", "late"]
    assert arms[1].config(cfg).MODEL.SGE.GROUPS == 32
    assert arms[2].config(cfg).MODEL.SGE.STAGES == ["res5"]
    assert cfg.MODEL.SGE.GROUPS == 16


@pytest.mark.parametrize(
    ("names", "custom", "words"),
    [
        (["plain", "sgee"], [], "there is no arm sgee"),
        (["plain", "plain"], [], "given twice"),
        (["plain"], [], "at least two arms"),
        (["plain", "sge"], [["../up", "SEED", "1"]], "does not fit a folder"),
        (["plain", "sge"], [["se", "SEED", "1"]], "already"),
        (["plain", "sge"], [["x", "MODEL.SGE.GROPS", "1"]], "arm x: .*did you mean MODEL.SGE.GROUPS"),
        (["plain", "sge"], [["x", "MODEL.SGE.GROUPS"]], "arm x: .*has no value"),
        (["plain", "sge"], [["x", "MODEL.SGE.GROUPS", "16"]], "sge and x are the same config"),
        (["plain", "x"], [["x", "MODEL.SGE.CONSTANT", "True"]], "arm x: .*CONSTANT holds gamma at 0, but INIT"),
        (
            ["plain", "x"],
            [["x", "MODEL.SGE.NORMALIZE", "False", "MODEL.SGE.KERNEL", "triton"]],
            "arm x: .*NORMALIZE False goes with the KERNEL 'eager' alone",
        ),
    ],
)
def test_bad_arms(cfg, names, custom, words):
    with pytest.raises(UserError, match=words):
        choose_arms(cfg, names, custom)


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (
            "--config-file F --output D --seeds 0 1 SOLVER.MAX_ITER 5 MODEL.WEIGHTS x",
            "SOLVER.MAX_ITER 5 MODEL.WEIGHTS x",
        ),
        ("--seeds 0 --arms plain sge SOLVER.MAX_ITER 5", "SOLVER.MAX_ITER 5"),
        ("--dataset A.B c.json D --config-file F SEED 1", "SEED 1"),
        ("--arm wide MODEL.SGE.GROUPS 32 --seeds 1", ""),
        ("--arm wide MODEL.SGE.GROUPS 32 -- SOLVER.MAX_ITER 5", "SOLVER.MAX_ITER 5"),
        ("SOLVER.MAX_ITER 5", "SOLVER.MAX_ITER 5"),
        ("--jobs 2", ""),
        ("--seeds 0 1 --report-only SOLVER.MAX_ITER 5", "SOLVER.MAX_ITER 5"),
        ("--keep-going SOLVER.MAX_ITER 5 MODEL.WEIGHTS x", "SOLVER.MAX_ITER 5 MODEL.WEIGHTS x"),
        ("--run sge 3 SOLVER.MAX_ITER 5", "SOLVER.MAX_ITER 5"),
        ("--config-file=F --output=D SOLVER.MAX_ITER 5", "SOLVER.MAX_ITER 5"),
    ],
)
def test_overrides_at_the_end(argv, overrides, monkeypatch):
    import importlib.util

    monkeypatch.syspath_prepend(ROOT / "tools")
    spec = importlib.util.spec_from_file_location("measure_gain", ROOT / "tools/measure_gain.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    options, rest = tool.split_overrides(argv.split())
    assert rest == overrides.split()
    assert [*options, *rest] == [word for word in argv.split() if word != "--"]


class OneLayer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.res2 = torch.nn.Sequential(SpatialGroupEnhance(2))

    def preprocess_image(self, batch):
        return type("Images", (), {"tensor": batch})

    def backbone(self, x):
        return self.res2(x)


def test_gate_statistics_over_batches():
    model = OneLayer()
    layer = model.res2[0]
    torch.manual_seed(0)
    batches = [torch.randn(1, 4, 5, 6), torch.randn(2, 4, 3, 3)]
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.0, 2.0]).view(1, 2, 1, 1))
    found = gate_statistics(model, batches)["res2"]
    assert found["gate"]["spatial_sd"] == pytest.approx(0, abs=1e-7)  # a scaling of the channels
    low, high = torch.sigmoid(layer.bias.flatten()).tolist()
    assert (found["gate"]["mean"], found["gate"]["sd"]) == pytest.approx(((low + high) / 2, (high - low) / 2))
    with torch.no_grad():
        layer.weight.fill_(1.5)
    found = gate_statistics(model, batches)["res2"]
    maps = [gates for batch in batches for gates in layer.gates(batch).detach().double().flatten(0, 1)]
    every = torch.cat([gates.flatten() for gates in maps])
    within = torch.stack([gates.var(unbiased=False) for gates in maps]).mean().sqrt()
    assert found["gate"]["mean"] == pytest.approx(every.mean().item())
    assert found["gate"]["sd"] == pytest.approx(every.std(unbiased=False).item())
    assert found["gate"]["spatial_sd"] == pytest.approx(within.item())
    assert found["gate"]["spatial_sd"] > 0.1
    assert found["gamma"] == pytest.approx({"mean": 1.5, "sd": 0})
    assert found["beta"] == pytest.approx({"mean": 1, "sd": 1})
    assert model.training
    assert not layer._forward_pre_hooks
    assert gate_statistics(torch.nn.Linear(1, 1), batches) == {}
