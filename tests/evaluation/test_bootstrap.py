import signal
import threading

import numpy as np
import pytest
from generated_coco import generated, slow_metrics
from hotcoco import COCO

from sge_det.evaluation import bootstrap
from sge_det.evaluation.bootstrap import Scorer, bootstrap_metrics, image_weights, summary_metrics
from sge_det.evaluation.coco import coco_metrics, evaluate_detections
from sge_det.evaluation.matching import Objects


def matched(truth, detections, task="bbox"):
    return Objects(COCO(truth), task, truth).match(detections)


def drawn(truth, detections, weights):
    """The data set with each image as often as it was drawn, under new ids."""
    copies = {}
    for image, weight in zip(truth["images"], weights):
        copies[image["id"]] = [1000 * image["id"] + copy for copy in range(weight)]
    images = [image | {"id": new} for image in truth["images"] for new in copies[image["id"]]]
    annotations = [entry | {"image_id": new} for entry in truth["annotations"] for new in copies[entry["image_id"]]]
    annotations = [entry | {"id": place} for place, entry in enumerate(annotations, 1)]
    found = [entry | {"image_id": new} for entry in detections for new in copies[entry["image_id"]]]
    return truth | {"images": images, "annotations": annotations}, found


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_image_once_is_the_evaluation_itself(task, seed):
    """Crowds, ties, all sizes, more than 100 detections, a category and a size without objects."""
    truth, detections = generated(seed, large=seed < 2)
    metrics = summary_metrics(*Scorer(matched(truth, detections, task))(np.ones((1, 24), dtype=np.int32)))[0]
    wanted = coco_metrics(evaluate_detections(COCO(truth), detections, task))
    assert metrics == pytest.approx(list(wanted.values()), abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_samples_equal_evaluations_of_resampled_data(task):
    truth, detections = generated(4)
    for place, entry in enumerate(detections):
        entry["score"] += 1e-5 * place  # no ties: copies of an image would shuffle its own
    weights = image_weights(24, 4, seed=1)
    # two images alone: most metrics are of few objects, some of none
    weights = np.concatenate([weights, np.zeros((1, 24), dtype=np.int32)])
    weights[-1, [3, 4]] = 7, 17
    samples = bootstrap_metrics([matched(truth, detections, task)], weights)[0]
    for sample, row in zip(samples, weights):
        wanted = slow_metrics(*drawn(truth, detections, row), task)
        assert sample == pytest.approx(list(wanted.values()), abs=1e-9, nan_ok=True)
    assert np.ptp(samples[:4, 0]) > 1


def test_weights_are_draws_with_replacement():
    weights = image_weights(10, 4000, seed=3)
    assert (weights.sum(1) == 10).all()
    # a binomial of 10 draws with a chance of 1/10
    assert weights.mean(0) == pytest.approx(np.ones(10), abs=0.06)
    assert weights.var(0) == pytest.approx(np.full(10, 0.9), abs=0.1)
    assert (weights == image_weights(10, 4000, seed=3)).all()
    assert (weights != image_weights(10, 4000, seed=4)).any()


def test_three_images_of_which_one_arm_misses_one():
    """By hand: the missed image is drawn 0 to 3 times; without its copies there were 0, 1/3 and 1/2 alone."""
    images = [{"id": i, "file_name": "", "height": 99, "width": 99} for i in range(3)]
    objects = [{"image_id": i, "category_id": 1, "bbox": [9, 9, 40, 40], "iscrowd": 0, "area": 1600} for i in range(3)]
    truth = {"images": images, "categories": [{"id": 1, "name": "cup"}]}
    truth["annotations"] = [entry | {"id": place} for place, entry in enumerate(objects, 1)]
    found = [entry | {"score": 0.9 - 0.1 * place} for place, entry in enumerate(objects)]
    weights = image_weights(3, 2000)
    all_of_them, without = bootstrap_metrics([matched(truth, found), matched(truth, found[:2])], weights)[:, :, 0]
    values, counts = np.unique(np.round(all_of_them - without, 9), return_counts=True)
    # recalls 1, 2/3, 1/3, 0 reach 101, 67, 34 and 0 of the 101
    assert values == pytest.approx([0, 100 * 34 / 101, 100 * 67 / 101, 100])
    assert counts / 2000 == pytest.approx([8 / 27, 12 / 27, 6 / 27, 1 / 27], abs=0.03)


def test_undefined_is_not_zero():
    truth, detections = generated(0)
    rare = next(place for place, image in enumerate(truth["images"]) if place % 6 == 5)
    weights = np.zeros((2, 24), dtype=np.int32)
    weights[0, rare] = 24  # an image without objects
    weights[1] = 1
    none, full = bootstrap_metrics([matched(truth, detections)], weights)[0]
    assert np.isnan(none).all()
    assert np.isfinite(full[:7]).all()


def test_no_detections_and_no_detectors():
    truth, _ = generated(0)
    samples = bootstrap_metrics([matched(truth, [], "segm")], np.ones((2, 24), dtype=np.int32))[0]
    assert (samples[:, :7] == 0).all()
    assert bootstrap_metrics([], np.ones((2, 24), dtype=np.int32)).shape == (0, 2, 7)


def test_progress_is_true():
    truth, detections = generated(1)
    told = []
    bootstrap_metrics([matched(truth, detections)] * 3, image_weights(24, 50), told.append)
    assert sum(told) == 150


def test_an_interrupt_ends_it(monkeypatch):
    """It arrives while results are waited for; what is left is not done."""
    truth, detections = generated(1)
    matches = matched(truth, detections)
    monkeypatch.setattr(bootstrap, "_CHUNK", 1)
    told, others = [], set(threading.enumerate())
    # where tests run in the background the shell has made them deaf to it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(samples):
        told.append(samples)
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            bootstrap_metrics([matches], image_weights(24, 3000), interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sum(told) < 100
    for thread in threading.enumerate():
        if thread not in others and "ThreadPool" in thread.name:
            thread.join(5)
            assert not thread.is_alive()
