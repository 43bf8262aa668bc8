import json

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from reference_models import gates_by_formula
from sample_detectors import FASTER, save_weights

from sge_det.analysis.predictor import Predictor, setup_prediction
from sge_det.analysis.visualize import visualize_dataset, visualize_images
from sge_det.engine.training import plain_twin, setup_config
from sge_det.errors import UserError
from sge_det.modeling.gates import layer_maps, sge_layers


@pytest.fixture(scope="module")
def weights(sample_datasets, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    save_weights(FASTER, path, sample_datasets)
    return path


@pytest.fixture
def cfg(weights, sample_datasets):
    return setup_prediction(FASTER, [*TINY, "MODEL.WEIGHTS", str(weights)], sample_datasets)


@pytest.fixture
def picture(sample):
    return sorted((sample / "val").glob("*.jpg"))[0]


def test_maps_are_the_formulas(cfg, tmp_path):
    """On an image that is scaled by 2 and padded: gates and activations of the cells that are not padding alone."""
    path = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 55, 3)).astype(np.uint8)).save(path)
    predictor = Predictor(cfg)
    name = "backbone.bottom_up.res4.1.sge"
    predictor.layer = name
    layer = sge_layers(predictor.model)[name]
    seen = {}
    handle = layer.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].numpy().astype(np.float64)))
    instances, maps = predictor.look(predictor.read(path))
    handle.remove()
    assert seen["x"].shape[2:] == (4, 8)  # 64x110, padded to 64x128, at a stride of 16
    gamma, beta = (p.detach().double().numpy().ravel() for p in (layer.weight, layer.bias))
    gates = gates_by_formula(seen["x"], gamma, beta, layer.groups)[0]
    groups = seen["x"][0].reshape(layer.groups, -1, 4, 8)
    assert (maps.label, maps.stride) == ("res4.1", 16)
    # 7 cells cover 112 of the 110 pixels, which are 55 in the file
    assert maps.gates.shape == (layer.groups, 4, 7)
    assert maps.covers == pytest.approx((112 / 2, 32))
    np.testing.assert_allclose(maps.gates, gates[..., :7], atol=2e-5)
    np.testing.assert_allclose(maps.before, groups.mean((0, 1))[:, :7], atol=1e-5)
    np.testing.assert_allclose(maps.after, (groups * gates[:, None]).mean((0, 1))[:, :7], atol=1e-5)
    assert instances.image_size == (32, 55)
    torch.testing.assert_close(instances.scores, predictor(predictor.read(path)).scores)
    assert not any(layer._forward_pre_hooks for layer in sge_layers(predictor.model).values())
    assert layer_maps(predictor.model, name, {"image": torch.zeros(3, 64, 64), "height": 64, "width": 64})[
        1
    ].covers == (
        64,
        64,
    )


def test_a_figure_for_each_image(cfg, picture, tmp_path):
    (tmp_path / "damaged.jpg").write_bytes(b"no image")
    files = [picture, tmp_path / "damaged.jpg"]
    figures, faults = visualize_images(cfg, files, tmp_path / "out", stage="res4", block=0, groups="1,2")
    assert [figure.name for figure in figures] == [f"{picture.stem}_res4.0.png"]
    assert list(faults) == [tmp_path / "damaged.jpg"]
    with Image.open(figures[0]) as figure:
        figure.load()
        assert figure.width > 1000


def test_two_weights_side_by_side(cfg, weights, picture, sample_datasets, tmp_path):
    (alone,), _ = visualize_images(cfg, [picture], tmp_path / "one")
    (both,), _ = visualize_images(cfg, [picture], tmp_path / "two", compare_weights=str(weights))
    with Image.open(alone) as one, Image.open(both) as two:
        assert two.height > one.height
    with pytest.raises(UserError, match=r"--compare-weights none\.pth is not there"):
        visualize_images(cfg, [picture], tmp_path / "none", compare_weights="none.pth")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "res6"}, "no SGE in 'res6': it has in res2, res3, res4, res5"),
        ({"block": 3}, r"res5 has no block 3: its 3 blocks with SGE are 0 to 2"),
        ({"groups": "16"}, "there is no group 16, the layer has the groups 0 to 15"),
        ({"confidence": 2.0}, "--confidence"),
    ],
)
def test_what_is_not_there_is_told_before_any_image_is_read(cfg, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        visualize_images(cfg, [tmp_path / "never.jpg"], tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_videos_and_plain_models_have_no_figure(cfg, sample_datasets, picture, tmp_path):
    with pytest.raises(UserError, match=r"clip\.mp4 is a video"):
        visualize_images(cfg, [tmp_path / "clip.mp4"], tmp_path / "out")
    for function in (lambda c: visualize_images(c, [picture], tmp_path), lambda c: visualize_dataset(c, tmp_path)):
        with pytest.raises(UserError, match="the model has no SGE"):
            function(plain_twin(cfg))


def test_all_blocks_over_a_data_set(weights, sample_datasets, tmp_path):
    cfg = setup_config(FASTER, [*TINY, "MODEL.WEIGHTS", str(weights)], sample_datasets, eval_only=True)
    blocks = visualize_dataset(cfg, tmp_path, images=2)
    with Image.open(tmp_path / "blocks.png") as figure:
        figure.load()
    record = json.loads((tmp_path / "blocks.json").read_text())
    assert (record["dataset"], record["images"]) == ("tiny_val", 2)
    stages = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}
    labels = [f"{stage}.{number}" for stage, count in stages.items() for number in range(count)]
    assert list(record["blocks"]) == [block.label for block in blocks] == labels
    state = torch.load(weights, weights_only=True)["model"]
    for label, found in record["blocks"].items():
        for key, name in (("gamma", "weight"), ("beta", "bias")):
            assert found[key] == pytest.approx(state[f"backbone.bottom_up.{label}.sge.{name}"].ravel().tolist())
        assert 0 < found["gate"]["spatial_sd"] <= found["gate"]["sd"] < 0.5
    with pytest.raises(UserError, match="--limit must be at least 1, got 0"):
        visualize_dataset(cfg, tmp_path, images=0)
