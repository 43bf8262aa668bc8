import json
import math

import numpy as np
import pytest
import torch
from conftest import TINY
from pycocotools.coco import COCO
from reference_models import gates_by_formula
from torch import nn

from sge_det.analysis.pointing import Objects, cell_centres, play, pointing_game, pointing_report, pointing_share
from sge_det.engine.training import build_seeded_model, setup_config
from sge_det.errors import UserError
from sge_det.modeling.gates import sge_layers

FASTER = "sample/faster_rcnn_SGE_R_50_FPN.yaml"


def test_the_share_of_maps_whose_strongest_position_is_inside():
    maps = torch.tensor(
        [
            [9.0, 1.0, 2.0, 3.0],  # strongest inside
            [1.0, 9.0, 2.0, 3.0],  # outside
            [1.0, 2.0, 3.0, 9.0],  # where neither counts; of the rest, inside
            [5.0, 5.0, 5.0, 0.0],  # two of three equals are inside
        ]
    )
    inside, outside = torch.tensor([0, 2]), torch.tensor([1])
    assert pointing_share(maps, inside, outside) == pytest.approx((1 + 0 + 1 + 2 / 3) / 4)


def test_a_constant_map_points_by_chance():
    share = pointing_share(torch.full((3, 10), 0.731), torch.arange(3), torch.arange(3, 10))
    assert share == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("axis", "centres"),
    [
        # 4 cells of stride 16 cover 64 pixels, the image is as it is in the file
        ((4, 64, 64, 64), [8, 24, 40, 56]),
        # the last cell's centre, 56, is padding; the file is twice as large
        ((4, 64, 50, 100), [16, 48, 80]),
        # 3 cells are not enough at stride 16
        ((3, 70, 70, 70), [16, 48]),
        ((1, 1, 1, 1), [0.5]),
    ],
)
def test_the_cells_lie_where_the_strides_put_them(axis, centres):
    assert cell_centres(*axis).tolist() == centres


@pytest.fixture
def annotations(tmp_path):
    """One image of 40x30 pixels: a small triangle, a large box's polygon, a crowd; and one without objects."""

    def entry(identity, box, segmentation, area, crowd=0):
        return {
            "id": identity, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": segmentation,
            "area": area, "iscrowd": crowd,
        }  # fmt: skip

    rle = {"size": [30, 40], "counts": [0, 30 * 4, 30 * 36]}  # the four columns on the left
    content = {
        "images": [
            {"id": 1, "width": 40, "height": 30, "file_name": "1.jpg"},
            {"id": 2, "width": 40, "height": 30, "file_name": "2.jpg"},
        ],
        "categories": [{"id": 1, "name": "thing"}],
        "annotations": [
            entry(1, [8, 8, 8, 8], [[8, 8, 16, 8, 8, 16]], 32),
            # as if it were large
            entry(2, [20, 4, 16, 20], [[20, 4, 36, 4, 36, 24, 20, 24]], 100.0**2),
            entry(3, [0, 0, 4, 30], rle, 120, crowd=1),
        ],
    }
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def test_regions_are_those_of_boxes_and_masks(annotations):
    objects = Objects(annotations)
    assert objects.shapes == ["bbox", "segm"]
    assert objects.has_any(1)
    assert not objects.has_any(2)
    ys, xs = np.arange(30) + 0.5, np.arange(40) + 0.5
    boxes = objects.regions(1, "bbox", ys, xs)
    assert boxes["small"].sum() == 8 * 8
    assert boxes["large"].sum() == 16 * 20
    assert boxes["medium"].sum() == 0
    assert boxes["all"].sum() == 8 * 8 + 16 * 20
    assert boxes["outside"].sum() == 30 * 40 - 8 * 8 - 16 * 20 - 4 * 30
    masks = objects.regions(1, "segm", ys, xs)
    coco = COCO(str(annotations))
    triangle, box, crowd = (coco.annToMask(coco.anns[i]).astype(bool) for i in (1, 2, 3))
    assert np.array_equal(masks["small"], triangle)
    assert np.array_equal(masks["all"], triangle | box)
    assert np.array_equal(masks["outside"], ~(triangle | box | crowd))


@pytest.fixture
def detector(sample_datasets, tmp_path):
    cfg = setup_config(FASTER, [*TINY, "OUTPUT_DIR", str(tmp_path)], sample_datasets)
    model = build_seeded_model(cfg)
    generator = torch.Generator().manual_seed(0)
    for layer in sge_layers(model).values():
        nn.init.normal_(layer.weight, std=0.5, generator=generator)
    return cfg, model.eval()


def test_the_game_is_the_formulas(detector, annotations):
    """Against equation 5 in NumPy and a region by hand, on an image as large as the file says."""
    _, model = detector
    picture = torch.rand(3, 32, 64, generator=torch.Generator().manual_seed(1)) * 255
    content = json.loads(annotations.read_text())
    content["annotations"] = content["annotations"][1:2]
    content["images"][0] |= {"height": 32, "width": 64}
    annotations.write_text(json.dumps(content))
    inputs = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].numpy().copy()}))
        for name, layer in sge_layers(model).items()
    ]
    with torch.no_grad():
        model.backbone(model.preprocess_image([{"image": picture}]).tensor)
    for handle in handles:
        handle.remove()
    batch = [{"image": picture, "image_id": 1, "height": 32, "width": 64}, {"image": picture, "image_id": 2}]
    result = play(model, [batch], Objects(annotations))
    assert (result["images"], result["without_objects"]) == (1, 1)
    expected = []
    names = [name for name in sge_layers(model) if ".res2." in name]
    for name in names:
        x = inputs[name]
        layer = sge_layers(model)[name]
        gamma, beta = (value.detach().numpy().ravel() for value in (layer.weight, layer.bias))
        gates = gates_by_formula(x, gamma, beta, layer.groups)[0]
        before = x.astype(np.float64).reshape(layer.groups, -1, *x.shape[2:]).mean(1)
        ys, xs = ((np.arange(side) + 0.5) * 4 for side in gates.shape[1:])
        inside = np.outer((ys >= 4) & (ys < 24), (xs >= 20) & (xs < 36))
        shares = [
            np.mean([inside.ravel()[group.argmax()] for group in maps]) for maps in (before, before * gates, gates)
        ]
        expected.append([inside.mean(), *shares, gates[:, inside].mean() / gates[:, ~inside].mean()])
    found = result["bbox"]["res2"]
    chance, before, after, gate, _ = np.mean(expected, axis=0)
    for key, value in {
        "chance": chance, "before": before, "after": after, "gate": gate,
        "after_minus_before": after - before, "gate_minus_chance": gate - chance,
    }.items():  # fmt: skip
        assert found["all"][key]["mean"] == pytest.approx(value, abs=1e-6), key
    assert found["large"]["gate"] == found["all"]["gate"]
    assert found["small"]["images"] == 0
    assert math.isnan(found["small"]["gate"]["mean"])
    # one image has no interval over images
    assert math.isnan(found["all"]["gate"]["low"])


def test_gates_that_are_constant_show_nothing(detector):
    cfg, model = detector
    for layer in sge_layers(model).values():
        nn.init.zeros_(layer.weight)
    result = pointing_game(cfg, model, limit=2)
    assert result["images"] == 2
    for stage in ("res2", "res3"):
        figures = result["bbox"][stage]["all"]
        assert figures["images"] == 2
        assert figures["gate_minus_chance"]["mean"] == pytest.approx(0, abs=1e-6)
        assert figures["after_minus_before"]["mean"] == pytest.approx(0, abs=1e-6)
        assert figures["gate_ratio"]["mean"] == pytest.approx(1, abs=1e-6)
    assert "| res5, small" in pointing_report(result)
    with pytest.raises(UserError, match="--limit must be at least 1, got 0"):
        pointing_game(cfg, model, limit=0)


def test_a_model_without_sge_is_refused(detector):
    cfg, _ = detector
    cfg.MODEL.SGE.ENABLED = False
    with pytest.raises(UserError, match="the model has no SGE"):
        pointing_game(cfg, build_seeded_model(cfg))


def test_no_objects_is_said(detector, annotations):
    content = json.loads(annotations.read_text())
    content["annotations"] = content["annotations"][2:]
    annotations.write_text(json.dumps(content))
    with pytest.raises(UserError, match="has no objects"):
        Objects(annotations)


def test_only_data_sets_in_cocos_format(detector):
    from detectron2.data import DatasetCatalog

    cfg, model = detector
    DatasetCatalog.register("tiny_not_coco", list)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = ("tiny_not_coco",)
    try:
        with pytest.raises(UserError, match="tiny_not_coco is not one in COCO's format"):
            pointing_game(cfg, model)
    finally:
        DatasetCatalog.remove("tiny_not_coco")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "MODEL.WEIGHTS"),
        (["MODEL.WEIGHTS", "no_such.pth"], "no_such.pth"),
    ],
)
def test_bad_input_is_one_sentence(run_tool, fork_tool, sample_datasets, arguments, words):
    done = (run_tool if arguments else fork_tool)(
        "pointing_game.py", "--config-file", FASTER, "--dataset", *sample_datasets[1], *arguments,
        "DATASETS.TEST", f"('{sample_datasets[1][0]}',)", "MODEL.DEVICE", "cpu",
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
