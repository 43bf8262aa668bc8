"""The bootstrap over images: COCO's metrics of a data set whose images are drawn anew, with replacement.

An image that is drawn k times counts k times, in the detections as in the objects. The matches of its detections do not
change, so a sample costs some passes over the true positives, and no evaluation.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from .matching import AREAS, THRESHOLDS, Matches

# How COCO reckons them: a recall of 0.57 is 0.5700000000000001.
RECALLS = np.linspace(0.0, 1.0, 101)
# True positives that are handled together, so that a step stays in the cache.
_CHUNK = 1 << 16


def image_weights(images: int, samples: int, seed: int = 0) -> np.ndarray:
    """How often each image is drawn when as many are drawn as there are, with replacement: (samples, images)."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), samples).astype(np.int32)


class Scorer:
    """The average precision and recall of a detector's matches for any weights of the images.

    For each size, threshold and category (a segment) it keeps the true positives, and of the other detections only
    what is needed to count those before a true positive: precision is greatest at one.
    """

    def __init__(self, matches: Matches):
        images, sizes, categories = matches.objects.shape
        self._objects = matches.objects.reshape(images, -1)
        self.shape = sizes, len(THRESHOLDS), categories
        bounds = np.searchsorted(matches.category, np.arange(categories + 1))
        parts: dict[str, list[np.ndarray]] = {}
        counted_before = skipped_before = 0

        def keep(**arrays: np.ndarray) -> None:
            for name, array in arrays.items():
                parts.setdefault(name, []).append(array)

        for size in range(sizes):
            # counted at some threshold; at another it may be ignored, and is skipped
            counted = ~matches.ignored[:, size].all(1)
            place = np.concatenate([[0], np.cumsum(counted)])
            keep(counted=matches.image[counted])
            for threshold in range(len(THRESHOLDS)):
                positive = np.flatnonzero(matches.positive[:, size, threshold])
                skipped = np.flatnonzero(matches.ignored[:, size, threshold] & counted)
                segment = (size * len(THRESHOLDS) + threshold) * categories + matches.category[positive]
                keep(
                    image=matches.image[positive],
                    segment=segment,
                    place=place[positive + 1] + counted_before,
                    skipped=matches.image[skipped],
                    skips=np.searchsorted(skipped, positive) + skipped_before,
                    first_place=place[bounds[:-1]] + counted_before,
                    first_skip=np.searchsorted(skipped, bounds[:-1]) + skipped_before,
                )
                skipped_before += len(skipped)
            counted_before += int(counted.sum())
        joined = {name: np.concatenate(arrays).astype(np.intp) for name, arrays in parts.items()}
        self._counted, self._skipped, self._image = joined["counted"], joined["skipped"], joined["image"]
        self._place, self._skips, self._segment = joined["place"], joined["skips"], joined["segment"]
        self._first_place, self._first_skip = joined["first_place"], joined["first_skip"]
        self._start = np.searchsorted(self._segment, np.arange(int(np.prod(self.shape))))
        self._filled = np.flatnonzero(np.diff(self._start, append=len(self._segment)))

    @property
    def rows(self) -> int:
        """How many samples are best handled together."""
        return max(1, _CHUNK // max(1, len(self._counted), len(self._image)))

    def __call__(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The average precision over 101 recalls, and the recall, for weights (B, I) of the images.

        Returns:
            two arrays (B, A, T, C), 0-1; NaN where there is no object.
        """
        batch = len(weights)
        sizes, thresholds, categories = self.shape
        objects = (weights.astype(self._objects.dtype) @ self._objects).reshape(batch, sizes, 1, -1)
        objects = np.broadcast_to(objects, (batch, sizes, thresholds, categories)).reshape(batch, -1)
        precision, found = np.zeros(objects.shape), np.zeros(objects.shape)
        if len(self._image):
            self._score(weights, np.maximum(objects, 1), precision, found)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = found / objects
        precision[objects == 0] = np.nan
        recall[objects == 0] = np.nan
        return precision.reshape(batch, *self.shape), recall.reshape(batch, *self.shape)

    def _score(self, weights: np.ndarray, objects: np.ndarray, precision: np.ndarray, found: np.ndarray) -> None:
        segment, filled = self._segment, self._filled
        starts = self._start[filled]
        positives = _running(weights, self._image)
        counted, skipped = _running(weights, self._counted), _running(weights, self._skipped)
        before = positives[:, self._start]
        found[:] = np.diff(before, axis=1, append=positives[:, -1:])
        positives = positives[:, 1:] - before.take(segment, axis=1)
        # detections that count, up to and with each true positive
        offset = counted[:, self._first_place] - skipped[:, self._first_skip]
        total = counted.take(self._place, axis=1)
        total -= skipped.take(self._skips, axis=1)
        total -= offset.take(segment, axis=1)
        np.maximum(total, 1, out=total)
        best = positives / total
        # the greatest precision at this or a greater recall: the offset keeps segments apart
        apart = 2.0 * (len(self._start) - segment)
        best += apart
        np.maximum.accumulate(best[:, ::-1], axis=1, out=best[:, ::-1])
        best -= apart
        best *= self._recalls_reached(positives, objects, starts)
        precision[:, filled] = np.add.reduceat(best, starts, axis=1) / len(RECALLS)

    def _recalls_reached(self, positives: np.ndarray, objects: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """At how many of the 101 recalls each true positive is the first that reaches them."""
        recall = positives / objects.take(self._segment, axis=1)
        reached = (recall * 100 + 1e-9).astype(np.int32)
        over = RECALLS.take(reached) > recall
        reached += 1
        reached -= over
        # the recall 0 is reached by the first true positive, not by none
        reached *= positives > 0
        newly = reached.copy()
        newly[:, 1:] -= reached[:, :-1]
        newly[:, starts] = reached[:, starts]
        return newly


def _running(weights: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(B, N + 1) the running sums of the weights of (N,) images."""
    sums = np.zeros((len(weights), len(images) + 1), dtype=np.int32)
    np.cumsum(weights.take(images, axis=1), axis=1, dtype=np.int32, out=sums[:, 1:])
    return sums


def summary_metrics(precision: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """The metrics of :func:`.coco.coco_metrics`, in its order, from a :class:`Scorer` for all ``AREAS``.

    Args:
        precision, recall: (B, A, T, C), 0-1, NaN where there is no object.

    Returns:
        (B, 7 + C) in points (0-100); NaN where a metric is undefined.
    """
    by_size = [_mean(precision[:, size], (1, 2)) for size in range(len(AREAS))]
    by_threshold = _mean(precision[:, 0], 2)
    summary = [by_size[0], by_threshold[:, 0], by_threshold[:, 5], *by_size[1:], _mean(recall[:, 0], (1, 2))]
    return 100 * np.concatenate([np.stack(summary, axis=1), _mean(precision[:, 0], 1)], axis=1)


def _mean(values: np.ndarray, axes: int | tuple[int, ...]) -> np.ndarray:
    """The mean of what is not NaN, NaN where all is."""
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(defined, values, 0).sum(axes) / defined.sum(axes)


def bootstrap_metrics(
    matches: Sequence[Matches], weights: np.ndarray, progress: Callable[[int], object] = lambda samples: None
) -> np.ndarray:
    """The metrics of detectors for each sample of the images, the same for all.

    Two threads or more share the work where there are as many cores; an interrupt ends it at the next chunk, after
    milliseconds.

    Args:
        matches: of N detectors on the same data set, for all ``AREAS``.
        weights: (B, I) of :func:`image_weights`.
        progress: told how many samples of a detector were done since the last call, N * B in all.

    Returns:
        (N, B, 7 + C) as in :func:`summary_metrics`.
    """
    categories = matches[0].objects.shape[2] if matches else 0
    result = np.empty((len(matches), len(weights), 7 + categories))

    def fill(scorer: Scorer, detector: int, chunk: slice) -> int:
        result[detector, chunk] = summary_metrics(*scorer(weights[chunk]))
        return len(result[detector, chunk])

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores)
    waiting: deque[Future[int]] = deque()
    try:
        for detector, of_detector in enumerate(matches):
            scorer = Scorer(of_detector)
            for start in range(0, len(weights), scorer.rows):
                waiting.append(pool.submit(fill, scorer, detector, slice(start, start + scorer.rows)))
                # few in waiting: their scorers are all that is kept
                if len(waiting) > 4 * cores:
                    progress(waiting.popleft().result())
        while waiting:
            progress(waiting.popleft().result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return result
