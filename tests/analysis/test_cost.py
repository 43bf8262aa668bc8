import itertools

import pytest
import torch
from conftest import TINY
from detectron2.layers import ShapeSpec
from torch import nn

import sge_det
from sge_det.analysis import cost
from sge_det.analysis.cost import Analysis, PaperFigure, analysis_report, analyze, count_flops, sge_flops
from sge_det.engine.training import setup_config
from sge_det.modeling.resnet import build_sge_resnet_backbone

SIDE = 64


def operations_one_by_one(channels, groups, positions):
    """Multiply-adds of one sample, each counted as the equations' sums and products are written out."""
    count = 0
    for _group in range(groups):
        size = channels // groups
        count += sum(1 for _ in itertools.product(range(size), range(positions)))  # the mean vector
        count += sum(1 for _ in itertools.product(range(size), range(positions)))  # dot products with it
        count += size  # their mean, g . g
        for _step in ("subtract the mean", "square and sum", "divide", "gamma and beta", "sigmoid"):
            count += positions
        count += sum(1 for _ in itertools.product(range(size), range(positions)))  # the product with x
    return count


@pytest.mark.parametrize(("channels", "groups", "positions"), [(4, 2, 1), (12, 3, 10), (64, 16, 35)])
def test_operations_of_a_layer(channels, groups, positions):
    assert sge_flops(1, channels, groups, positions) == operations_one_by_one(channels, groups, positions)
    assert sge_flops(3, channels, groups, positions) == 3 * sge_flops(1, channels, groups, positions)


@pytest.fixture
def tiny_config(sample_datasets, tmp_path):
    def config(detector, *overrides):
        path = f"sample/{detector}_SGE_R_50_FPN.yaml"
        return setup_config(path, [*TINY, "OUTPUT_DIR", str(tmp_path), *overrides], sample_datasets)

    return config


@pytest.mark.sampled(3)
@pytest.mark.parametrize("detector", ["faster_rcnn", "mask_rcnn", "cascade_rcnn", "retinanet"])
def test_a_model_and_its_twin_differ_by_the_layers(detector, tiny_config):
    cfg = tiny_config(detector)
    analysis = analyze(cfg, SIDE, SIDE)
    ours, plain = analysis.costs["total"]
    backbone, plain_backbone = analysis.costs["backbone.bottom_up"]
    stages = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
    layers = [
        (cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2**index, (SIDE // stride) ** 2, blocks)
        for index, (stride, blocks) in enumerate(zip(stages.values(), blocks_of(cfg), strict=True))
    ]
    groups = cfg.MODEL.SGE.GROUPS
    assert ours.parameters - plain.parameters == sum(2 * groups * blocks for _, _, blocks in layers)
    flops = sum(blocks * sge_flops(1, channels, groups, positions) for channels, positions, blocks in layers)
    assert ours.flops - plain.flops == backbone.flops - plain_backbone.flops == flops
    elements = sum(blocks * channels * positions for channels, positions, blocks in layers)
    assert ours.activations - plain.activations == elements
    parts = [costs for part, costs in analysis.costs.items() if part != "total"]
    for kind in ("parameters", "flops", "activations"):
        assert sum(getattr(model, kind) for model, _ in parts) == getattr(ours, kind)
    assert analysis.costs["head" if detector == "retinanet" else "roi_heads"][0].flops > 0
    assert not analysis.paper


def blocks_of(cfg):
    return {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[cfg.MODEL.RESNETS.DEPTH]


def test_the_heads_see_as_many_boxes_as_the_config_allows(tiny_config):
    few, more = (
        analyze(tiny_config("faster_rcnn", "MODEL.RPN.POST_NMS_TOPK_TEST", str(n)), SIDE, SIDE) for n in (10, 20)
    )
    flops = [analysis.costs["roi_heads"][0].flops for analysis in (few, more)]
    assert flops[1] == 2 * flops[0]


@pytest.mark.parametrize(("depth", "added", "published"), [(50, 2048, (4.122, 4.127)), (101, 4224, (7.849, 7.858))])
def test_the_papers_classifier_comes_out_to_the_last_digit(depth, added, published):
    cfg = sge_det.get_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml")
    cfg.MODEL.RESNETS.DEPTH = depth
    from sge_det.analysis.cost import _PAPER_HANDLES, _Classifier, _parameters

    counts, parameters = [], []
    for enabled in (False, True):
        cfg.MODEL.SGE.ENABLED = enabled
        backbone = build_sge_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
        classifier = _Classifier(backbone, 2048).eval()
        parameters.append(_parameters(classifier))
        counts.append(count_flops(classifier, torch.zeros(1, 3, 224, 224), _PAPER_HANDLES)[""] / 1e9)
    assert parameters[1] - parameters[0] == added
    # torchvision's resnet50 and resnet101
    assert parameters[0] == {50: 25_557_032, 101: 44_549_160}[depth]
    assert tuple(round(count, 3) for count in counts) == published


def test_counting_leaves_the_model_as_it_was():
    layer = sge_det.SpatialGroupEnhance(4)
    nn.init.normal_(layer.weight)
    x = torch.randn(1, 8, 5, 5)
    before = layer(x)
    model = nn.Sequential(layer)
    assert count_flops(model, x)[""] == sge_flops(1, 8, 4, 25)
    assert torch.equal(model(x), before)


def test_the_report_names_what_the_tables_hold(tiny_config):
    analysis = analyze(tiny_config("faster_rcnn"), SIDE, SIDE)
    text = analysis_report(analysis)
    ours, plain = analysis.costs["total"]
    (total,) = [line for line in text.splitlines() if line.startswith("| total") and f"{ours.parameters:,}" in line]
    assert f"{plain.parameters:,}" in total
    assert f"+{ours.parameters - plain.parameters:,}" in total


def test_the_papers_figures_stand_beside_ours():
    figures = [
        PaperFigure("parameters", "M", (25.56, 25.56), (25.557, 25.559), (25.557, 25.559)),
        PaperFigure("backbone", "GFLOPs", (1.5, 2.5), (3.5, 4.5), (5.5, 6.5)),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _lines(figures)]
    assert ["parameters, plain (M)", "25.56", "25.56", "25.56"] in rows
    assert ["backbone, plain (GFLOPs)", "1.5", "3.500", "5.500"] in rows
    assert ["backbone, SGE (GFLOPs)", "2.5", "4.500", "6.500"] in rows
    assert not any("paper" in line for line in _lines([]))


def _lines(figures):
    return analysis_report(Analysis(64, 64, {}, figures)).splitlines()


@pytest.mark.parametrize(
    ("key", "value", "is_in_paper"),
    [
        ("MODEL.RESNETS.DEPTH", 101, True),
        ("MODEL.RESNETS.DEPTH", 34, False),
        ("MODEL.RESNETS.NUM_GROUPS", 32, False),
        ("MODEL.RESNETS.RES5_DILATION", 2, False),
        ("MODEL.SGE.GROUPS", 32, False),
        ("MODEL.SGE.STAGES", ["res4", "res5"], False),
        ("MODEL.SGE.ATTENTION", "se", False),
    ],
)
def test_the_paper_has_its_own_networks_alone(monkeypatch, key, value, is_in_paper):
    cfg = sge_det.get_config("COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml", [key, str(value)])
    counted = []
    monkeypatch.setattr(cost, "count_flops", lambda *_: counted.append(1) or {"": 1e9})
    with torch.device("meta"):
        figures = cost._paper_figures(cfg)
    assert (bool(figures), bool(counted)) == (is_in_paper, is_in_paper)
    assert all("ResNet-101" in figure.name for figure in figures)


@pytest.mark.parametrize(
    ("overrides", "size", "words"),
    [
        ([], ["--height", "8"], "--height 8"),
        (["MODEL.SGE.ENABLED", "False"], [], "MODEL.SGE.ENABLED"),
    ],
)
def test_bad_input_is_one_sentence(run_tool, fork_tool, overrides, size, words):
    done = (run_tool if overrides else fork_tool)(
        "analyze_model.py", "--config-file", "sample/faster_rcnn_SGE_R_50_FPN.yaml", *size, "MODEL.DEVICE", "cpu",
        *overrides,
    )  # fmt: skip
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
    assert "Traceback" not in done.stderr
