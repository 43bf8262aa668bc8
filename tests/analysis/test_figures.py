import io

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from sge_det.analysis.figures import Block, View, attention_figure, blocks_figure, even
from sge_det.errors import UserError
from sge_det.modeling.gates import LayerMaps, choose_groups, rank_groups


def decode(png):
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def view(name, groups=24, seed=0, height=60):
    generator = np.random.default_rng(seed)
    gates = generator.uniform(0.2, 0.9, (groups, 4, 5)).astype(np.float32)
    instances = Instances((height, 80))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 20.0, 50.0, 40.0]]))
    instances.scores, instances.pred_classes = torch.tensor([0.9]), torch.tensor([1])
    before = generator.normal(size=(4, 5)).astype(np.float32)
    image = generator.integers(0, 255, (height, 80, 3)).astype(np.uint8)
    return View(name, image, instances, LayerMaps("res5.2", 16, gates, before, before / 2, (80.0, 64.0)))


def test_groups_are_ranked_by_how_much_they_vary():
    gates = np.array(
        [
            [[0.7, 0.7], [0.7, 0.7]],  # constant
            [[0.1, 0.1], [0.1, 0.9]],  # sd 0.346
            [[0.1, 0.9], [0.1, 0.9]],  # sd 0.4, the most
            [[0.9, 0.9], [0.9, 0.7]],  # sd 0.087, though its mean is the highest
            [[0.7, 0.7], [0.7, 0.7]],  # constant as well: equals stay in order
        ]
    )
    assert rank_groups(gates) == [2, 1, 3, 0, 4]
    assert choose_groups("top:2", gates) == [2, 1]
    assert choose_groups("top:99", gates) == [2, 1, 3, 0, 4]
    assert choose_groups("all", gates) == [0, 1, 2, 3, 4]
    assert choose_groups("3,0,3", gates) == [3, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5", "there is no group 5, the layer has the groups 0 to 4"),
        ("1,77", "there is no group 77"),
        ("-1", "names no groups: give top:8, all, or numbers"),
        ("top:0", "names no groups"),
        ("top", "names no groups"),
        ("3-5", "names no groups"),
        ("", "names no groups"),
    ],
)
def test_groups_that_are_not_there(text, message):
    with pytest.raises(UserError, match=message):
        choose_groups(text, np.zeros((5, 2, 2)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("groups", [[3], [0, 1, 2, 3, 4, 5, 6, 7], list(range(24))])
def test_a_figure_of_one_detector(groups):
    picture = decode(attention_figure([view("w.pth")], groups, ["cat", "dog"], "a.jpg"))
    assert picture.shape[1] > 1200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 1000
    # the rows of the groups' panels add to its height
    few = decode(attention_figure([view("w.pth")], [3], ["cat", "dog"], "a.jpg"))
    assert (picture.shape[0] > few.shape[0]) == (len(groups) > 4)


def test_a_figure_of_two_detectors_differs_where_they_differ():
    first, second = view("a.pth"), view("b.pth", seed=1)
    same = View("b.pth", first.image, first.instances, first.maps)
    alike, different = (
        decode(attention_figure([first, other], [1, 2], ["cat", "dog"], "t")) for other in (same, second)
    )
    assert alike.shape[0] > decode(attention_figure([first], [1, 2], ["cat", "dog"], "t")).shape[0]
    assert alike.shape == different.shape
    assert (alike != different).any()


def test_figures_of_long_images_stay_small():
    picture = decode(attention_figure([view("w.pth", height=800)], [0, 1], ["cat", "dog"], "long.jpg"))
    assert picture.shape[0] < 3000


def test_blocks():
    generator = np.random.default_rng(0)
    blocks = [
        Block(f"res{stage}.{number}", *generator.normal(size=(2, 16)), mean=0.7, sd=0.1, spatial_sd=0.05)
        for stage in (2, 3, 4, 5)
        for number in range(6)
    ]
    picture = decode(blocks_figure(blocks, "title"))
    assert picture.shape[1] > 1200
    constant = [Block(b.label, np.zeros(16), np.ones(16), 0.731, 0.0, 0.0) for b in blocks]
    assert (decode(blocks_figure(constant, "title")) != picture).any()


def test_video_frames_have_even_sides():
    image = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    padded = even(image)
    assert padded.shape == (6, 8, 3)
    assert np.array_equal(padded[:5, :7], image)
    assert np.array_equal(even(padded), padded)
