"""What is wrong with detections: hotcoco's kinds of errors (TIDE), calibration and confusion, as plain numbers."""

import math
from dataclasses import dataclass

import hotcoco
import numpy as np

# TIDE (Bolya et al., ECCV 2020): what AP50 gains where all errors of a kind are put right.
TIDE = {
    "Cls": "wrong class",
    "Loc": "badly placed",
    "Both": "wrong class and badly placed",
    "Dupe": "found twice",
    "Bkg": "background taken for an object",
    "Miss": "missed",
    "FP": "all false detections",
    "FN": "all missed objects",
}
CALIBRATION = {"ECE": "expected calibration error", "MCE": "largest calibration error"}
CONFUSION = {
    "found": "objects found with their class",
    "confused": "objects found with another class",
    "unfound": "objects not found",
    "background": "detections on no object",
}
# A detection counts as made from this score on, where confusion is counted; AP has no such bound.
CONFIDENT = 0.5
_IOU = 0.5


@dataclass
class Errors:
    """The errors of the detections of one run.

    Attributes:
        figures: by the keys of :data:`TIDE`, points of AP50; of :data:`CALIBRATION`, points (0-100) by which scores
            differ from the share of true detections; of :data:`CONFUSION`, per cent of the objects, the last of the
            detections, of those with a score of at least :data:`CONFIDENT`. NaN where there are none, and of
            calibration where a score is not from 0 to 1: it is no share then.
        confusion: (K, K) per cent: of the objects of each category, those taken for each other one. The rows of
            categories without objects are NaN.
    """

    figures: dict[str, float]
    confusion: np.ndarray


def errors_of(evaluation: hotcoco.COCOeval) -> Errors:
    """The errors at IoU 0.5 of an evaluation that has been accumulated, at most 100 detections an image."""
    figures = {kind: 100 * float(value) for kind, value in evaluation.tide_errors(pos_thr=_IOU)["delta_ap"].items()}
    figures |= _calibration(evaluation)
    counts = evaluation.confusion_matrix(iou_thr=_IOU, max_det=100, min_score=CONFIDENT)["matrix"].astype(float)
    objects, detections = counts[:-1].sum(1), counts[:, :-1].sum()
    found = np.trace(counts[:-1, :-1])
    shares = {
        "found": (found, objects.sum()),
        "confused": (counts[:-1, :-1].sum() - found, objects.sum()),
        "unfound": (counts[:-1, -1].sum(), objects.sum()),
        "background": (counts[-1, :-1].sum(), detections),
    }
    figures |= {name: float(100 * count / total) if total else math.nan for name, (count, total) in shares.items()}
    with np.errstate(invalid="ignore", divide="ignore"):
        confusion = 100 * counts[:-1, :-1] / objects[:, None]
    np.fill_diagonal(confusion, 0)
    return Errors({name: figures[name] for name in (*TIDE, *CALIBRATION, *CONFUSION)}, confusion)


def _calibration(evaluation: hotcoco.COCOeval) -> dict[str, float]:
    absent = dict.fromkeys(CALIBRATION, math.nan)
    try:
        found = evaluation.calibration(iou_threshold=_IOU)
    except ValueError:  # scores that are no shares, such as logits, which AP takes as they are
        return absent
    return {name: 100 * found[name.lower()] for name in CALIBRATION} if found["num_detections"] else absent
