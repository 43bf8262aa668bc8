"""Annotations with values of every kind in every field: what is taken is finite and decodes, the rest is refused.

    fuzz_annotations.py --cases 2000

Each case is a small sound file of which some fields are replaced. It must be refused by a UserError, or be taken by
hotcoco, by Detectron2's loader and by pycocotools' decoder without any other exception.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from detectron2.data.datasets.coco import load_coco_json
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from sge_det.data.annotations import read_annotations
from sge_det.errors import UserError
from sge_det.evaluation.coco import coco_metrics, evaluate_detections

FIELDS = {
    "images": ("id", "file_name", "height", "width", "license", "date_captured"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation", "attributes"),
    "categories": ("id", "name", "supercategory", "keypoints"),
}
NUMBERS = st.one_of(
    st.integers(-3, 30),
    st.integers(),
    st.sampled_from([2**31, 2**53, 2**64, -(2**63), 10**30, 1e8, 1e9, 1e308]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=4),
)
RLE = st.fixed_dictionaries(
    {
        "size": st.one_of(st.just([20, 20]), st.lists(NUMBERS, max_size=3)),
        "counts": st.one_of(st.lists(NUMBERS, max_size=6), st.text(max_size=12), st.just([100, 50, 250])),
    }
)
VALUES = st.one_of(
    NUMBERS,
    st.lists(NUMBERS, max_size=6),
    st.lists(st.lists(NUMBERS, max_size=8), max_size=3),
    RLE,
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
)


def sound() -> dict:
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 20, "width": 20} for n in range(3)]
    shape = {"bbox": [2, 2, 10, 7], "area": 35, "segmentation": [[2.0, 2.0, 12.0, 2.0, 12.0, 9.0]]}
    objects = [{"id": n, "image_id": n % 3, "category_id": 1, "iscrowd": 0, **shape} for n in range(4)]
    return {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}


CHANGES = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(
        lambda key: st.tuples(st.just(key), st.integers(0, 3), st.sampled_from(FIELDS[key]), VALUES)
    ),
    min_size=1,
    max_size=3,
)


def case(folder: Path, changes: list[tuple], tally: Counter) -> None:
    content = sound()
    for key, place, name, value in changes:
        content[key][place % len(content[key])][name] = value
    path = folder / "fuzz.json"
    path.write_text(json.dumps(content))
    read_annotations.__globals__["_read"].cache_clear()  # files of one size within one tick of the clock
    try:
        found = read_annotations(path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        tally["refused"] += 1
        return
    boxes = np.array([[*entry["bbox"], entry["area"]] for entry in found.content["annotations"]], dtype=float)
    assert np.isfinite(boxes).all() and (boxes[:, 2:] >= 0).all()
    results = [
        {"image_id": e["image_id"], "category_id": e["category_id"], "bbox": e["bbox"], "score": 0.5}
        for e in found.content["annotations"]
    ]
    coco_metrics(evaluate_detections(found.coco, results, "bbox"))
    for entry in found.content["annotations"]:
        if entry.get("segmentation"):
            found.coco.ann_to_mask(entry)
    load_coco_json(found.readable, "", None)
    tally["taken, with a word" if found.warnings or found.notes else "taken"] += 1


def run(cases: int) -> Counter:
    tally: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder:

        @seed(0)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(CHANGES)
        def check(changes):
            case(Path(folder), changes, tally)

        check()
    return tally


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    tally = run(parser.parse_args().cases)
    print(f"{sum(tally.values())} cases:", ", ".join(f"{count} {what}" for what, count in sorted(tally.items())))
    sys.exit(0)
