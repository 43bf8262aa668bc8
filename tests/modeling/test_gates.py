import json

import numpy as np
import pytest
import torch
from conftest import TINY
from reference_models import gates_by_formula
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import sge_det
from sge_det.data.datasets import register_dataset
from sge_det.engine.training import Trainer, build_seeded_model, plain_twin, setup_config
from sge_det.modeling.gates import blocks, find_layer, gate_statistics, sge_layers

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


@pytest.fixture
def model(sample_datasets, tmp_path):
    """A sample detector whose gates are not constant."""
    cfg = setup_config(FASTER, [*TINY, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    model = build_seeded_model(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in sge_layers(model).values():
        nn.init.normal_(layer.weight, std=0.5, generator=generator)
        nn.init.normal_(layer.bias, std=0.5, generator=generator)
    return model


def image(height=64, width=96, seed=0):
    return {"image": torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed)) * 255}


def test_recorded_gates_are_the_formulas(model):
    inputs = {}
    layers = sge_layers(model)
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].numpy().copy()}))
        for name, layer in layers.items()
    ]
    with sge_det.record_gates(model) as gates, torch.no_grad():
        model([image()])
    for handle in handles:
        handle.remove()
    assert list(gates) == list(layers)
    assert len(gates) == 16
    for name, layer in layers.items():
        gamma, beta = (p.detach().double().numpy().ravel() for p in (layer.weight, layer.bias))
        wanted = gates_by_formula(inputs[name], gamma, beta, layer.groups)
        assert gates[name].shape == wanted.shape
        np.testing.assert_allclose(gates[name].numpy(), wanted, atol=2e-5)
        assert wanted.std() > 0.05


def test_recording_changes_nothing_and_ends(model):
    with torch.no_grad():
        before = model([image()])[0]["instances"]
        with sge_det.record_gates(model) as gates:
            during = model([image()])[0]["instances"]
        recorded = dict(gates)
        after = model([image(seed=1)])[0]["instances"]
    assert torch.equal(before.scores, during.scores)
    assert torch.equal(before.pred_boxes.tensor, during.pred_boxes.tensor)
    assert not torch.equal(before.pred_boxes.tensor, after.pred_boxes.tensor)
    assert all(gates[name] is recorded[name] for name in recorded)
    assert not any(layer.observers for layer in sge_layers(model).values())


def test_recording_leaves_no_hook_after_an_error(model):
    with pytest.raises(ZeroDivisionError), sge_det.record_gates(model):
        raise ZeroDivisionError
    assert not any(layer.observers for layer in sge_layers(model).values())


def test_gates_are_recorded_in_any_model():
    layer = sge_det.SpatialGroupEnhance(groups=2)
    model = nn.ModuleDict({"first": layer, "last": nn.Identity()})
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    with sge_det.record_gates(model) as gates:
        model["first"](x=x).sum().backward()
    assert list(gates) == ["first"]
    assert gates["first"].shape == (3, 2, 5, 6)
    assert not gates["first"].requires_grad
    assert x.grad is not None


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.sge = sge_det.SpatialGroupEnhance(groups=2)
        nn.init.normal_(self.sge.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, x):
        return self.sge.residual(x, x)


@pytest.mark.parametrize("way", ["function", "in place", "a part"])
def test_gates_are_recorded_in_a_compiled_model(way):
    model = nn.Sequential(Chain())
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    if way == "function":
        model = torch.compile(model, backend="eager")
    elif way == "in place":
        model.compile(backend="eager")
    else:
        model[0] = torch.compile(model[0], backend="eager")
    expected = model(x)
    with sge_det.record_gates(model) as gates:
        torch.testing.assert_close(model(x), expected)
    assert list(gates) == list(sge_layers(model)) == ["0.sge"]
    (layer,) = sge_layers(model).values()
    gamma, beta = (p.detach().double().numpy().ravel() for p in (layer.weight, layer.bias))
    np.testing.assert_allclose(gates["0.sge"].numpy(), gates_by_formula(x.numpy(), gamma, beta, 2), atol=2e-5)
    gates.clear()
    model(x)
    assert not gates


def test_an_exported_model_is_told_to_show_no_gates():
    x = torch.randn(2, 4, 5, 6)
    program = torch.export.export(Chain(), (x,))
    for model in (torch.jit.trace(Chain(), x), torch.jit.script(Chain()), program.module()):
        with pytest.raises(sge_det.UserError, match="an exported model"), sge_det.record_gates(model):
            pass


def test_two_may_look_on_at_once():
    model, x = Chain(), torch.randn(2, 4, 5, 6)
    with sge_det.record_gates(model) as outer:
        with sge_det.record_gates(model) as inner:
            model(x)
        assert torch.equal(outer["sge"], inner["sge"])
        kept = inner["sge"]
        model(2 * x)
    assert inner["sge"] is kept and not torch.equal(outer["sge"], kept)
    assert model.sge.observers == ()


def test_layers_are_found_by_stage_and_block(model):
    assert find_layer(model, "res5") == "backbone.bottom_up.res5.2.sge"
    assert find_layer(model, "res4", 0) == find_layer(model, "res4", -6) == "backbone.bottom_up.res4.0.sge"
    assert list(blocks(model).values())[:4] == ["res2.0", "res2.1", "res2.2", "res3.0"]
    with pytest.raises(sge_det.UserError, match=r"no SGE in 'res6': it has in res2, res3, res4, res5"):
        find_layer(model, "res6")
    with pytest.raises(sge_det.UserError, match=r"res5 has no block 3: its 3 blocks with SGE are 0 to 2"):
        find_layer(model, "res5", 3)


def test_a_model_without_sge_is_told(sample_datasets):
    cfg = plain_twin(setup_config(FASTER, TINY, sample_datasets))
    model = build_seeded_model(cfg)
    with pytest.raises(sge_det.UserError, match="the model has no SGE"), sge_det.record_gates(model):
        pass
    with pytest.raises(sge_det.UserError, match="the model has no SGE"):
        find_layer(model, "res5")
    assert gate_statistics(model, [[image()]]) == {}


def test_statistics_sum_up_what_is_recorded(model):
    batches = [[image(seed=1)], [image(64, 64, seed=2), image(64, 96, seed=3)]]
    layers = sge_layers(model)
    seen = {name: [] for name in layers}
    with torch.no_grad():
        for batch in batches:
            with sge_det.record_gates(model) as gates:
                model.backbone(model.preprocess_image(batch).tensor)
            for name in layers:
                seen[name].append(gates[name].double().numpy())
    per_stage, per_block = gate_statistics(model, batches), gate_statistics(model, batches, per_block=True)
    assert list(per_stage) == ["res2", "res3", "res4", "res5"]
    assert list(per_block) == list(blocks(model).values())

    def check(found, names):
        values = np.concatenate([gates.ravel() for name in names for gates in seen[name]])
        variances = np.concatenate([gates.var((2, 3)).ravel() for name in names for gates in seen[name]])
        gamma = np.concatenate([layers[name].weight.detach().numpy().ravel() for name in names])
        assert found["gate"]["mean"] == pytest.approx(values.mean())
        assert found["gate"]["sd"] == pytest.approx(values.std())
        assert found["gate"]["spatial_sd"] == pytest.approx(np.sqrt(variances.mean()))
        assert found["gamma"] == {"mean": pytest.approx(gamma.mean(), abs=1e-6), "sd": pytest.approx(gamma.std())}

    check(per_block["res3.1"], ["backbone.bottom_up.res3.1.sge"])
    check(per_stage["res5"], [f"backbone.bottom_up.res5.{block}.sge" for block in range(3)])
    assert not model.training


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """The state after three iterations, and the records in metrics.json, by log period."""
    found = {}
    register_dataset("logged_train", str(sample / "annotations/instances_train.json"), str(sample / "train"))
    for period in (0, 2, 1):
        folder = tmp_path_factory.mktemp("logged")
        overrides = ["SOLVER.MAX_ITER", "3", "MODEL.SGE.LOG_PERIOD", str(period), "OUTPUT_DIR", str(folder)]
        cfg = setup_config(
            FASTER, [*TINY, *overrides, "DATASETS.TRAIN", "('logged_train',)", "DATASETS.TEST", "()"], ()
        )
        trainer = Trainer(cfg)
        trainer.train()
        records = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        found[period] = trainer.model, records, list(folder.glob("events.out.tfevents.*"))
    return found


def test_logging_does_not_change_the_training(trained):
    without, with_log = trained[0][0].state_dict(), trained[1][0].state_dict()
    assert all(torch.equal(without[key], with_log[key]) for key in without)
    assert not any(layer.observers for layer in sge_layers(trained[1][0]).values())


def test_gates_are_logged_in_their_period(trained):
    def logged(period):
        return {record["iteration"] for record in trained[period][1] if any(key.startswith("sge/") for key in record)}

    assert logged(0) == set()
    assert logged(2) == {1}
    assert logged(1) == {2}  # Detectron2 writes the last value since its last writing
    (record,) = [record for record in trained[2][1] if record["iteration"] == 1]
    names = [f"{what}_{number}" for what in ("gate", "gamma", "beta") for number in ("mean", "sd")]
    wanted = {f"sge/{stage}_{name}" for stage in sge_det.config.STAGES for name in [*names, "gate_spatial_sd"]}
    assert {key for key in record if key.startswith("sge/")} == wanted
    assert record["sge/res2_gate_mean"] == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)
    (events,) = trained[2][2]
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert wanted <= set(accumulator.Tags()["scalars"])
    (event,) = accumulator.Scalars("sge/res5_gate_sd")
    assert event.value == pytest.approx(record["sge/res5_gate_sd"], abs=1e-6)
