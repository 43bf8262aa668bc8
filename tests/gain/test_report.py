import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from sge_det import UserError
from sge_det.gain import Question, compare_results, plots
from sge_det.gain.tables import pointing_tables


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.images, self.tables, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "table":
            self.tables.append(0)
        if tag == "tr":
            self.tables[-1] += 1
        if tag == "img":
            self.images.append(attributes["src"])
        self.links += [value for key, value in attributes.items() if key in ("href", "src", "srcset", "data", "action")]
        assert tag not in ("script", "link", "iframe", "object", "embed")


@pytest.fixture(scope="module")
def compared(sample, tmp_path_factory):
    """Three arms, two seeds, boxes and masks: the ground truth with some objects left out or misnamed."""
    folder = tmp_path_factory.mktemp("compared")
    truth_file = sample / "annotations/instances_val.json"
    truth = json.loads(truth_file.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    arms = {}
    for number, name in enumerate(("plain", "sge", "b<ig>")):
        for seed in range(2):
            found = []
            for place, entry in enumerate(truth["annotations"]):
                if (place + seed) % (number + 2) == 0:
                    continue
                mask = entry["segmentation"]
                if isinstance(mask, list):
                    mask = mask_utils.merge(mask_utils.frPyObjects(mask, *sizes[entry["image_id"]]))
                elif isinstance(mask["counts"], list):
                    mask = mask_utils.frPyObjects(mask, *sizes[entry["image_id"]])
                counts = mask["counts"].decode() if isinstance(mask["counts"], bytes) else mask["counts"]
                found.append(
                    {
                        "image_id": entry["image_id"],
                        "category_id": entry["category_id"],
                        "bbox": entry["bbox"],
                        "score": 0.9 - 0.01 * place,
                        "segmentation": {"size": mask["size"], "counts": counts},
                    }
                )
            path = folder / f"{number}{seed}.json"
            path.write_text(json.dumps(found))
            arms.setdefault(name, []).append(path)
    output = folder / "out"
    compare_results(truth_file, arms, output, bootstrap=200, image_root=sample / "val")
    return output, truth


def test_report_json_has_the_schema(compared):
    output, truth = compared
    report = json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["schema"] == 2
    assert list(report["arms"]) == ["plain", "sge", "b<ig>"]
    metrics = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"]
    metrics += [f"AP-{category['name']}" for category in truth["categories"]]
    for arm in report["arms"].values():
        assert arm["seeds"] == [0, 1]
        for task in ("bbox", "segm"):
            assert list(arm[task]) == metrics
            assert all(set(score) == {"mean", "sd", "values"} for score in arm[task].values())
    assert list(report["differences"]) == ["sge", "b<ig>"]
    for difference in report["differences"].values():
        for task in ("bbox", "segm"):
            assert list(difference[task]) == metrics
            found = {"mean", "values", "seed_correlation", "intervals", "images_by_seed"}
            found |= {"probability_of_improvement", "effect_size"}
            assert set(difference[task]["AP"]) == found
            assert set(difference[task]["AP"]["intervals"]) == {"seeds", "welch", "images", "both"}
            assert [set(interval) for interval in difference[task]["AP"]["images_by_seed"]] == [{"low", "high"}] * 2
    assert "sge - plain" in report["verdict"]
    assert report["pointing"] == {}
    assert [(v["arm"], v["task"], v["primary"]) for v in report["verdicts"]] == [
        (name, task, task == "bbox") for task in ("bbox", "segm") for name in ("sge", "b<ig>")
    ]
    assert {v["sentence"].startswith("Exploratory") for v in report["verdicts"] if not v["primary"]} == {True}


def test_page_is_self_contained_and_whole(compared):
    output, truth = compared
    text = (output / "report.html").read_text()
    page = Page(text)
    assert page.links == page.images
    assert not re.search(r"url\(|@import|https?://", text)
    # forest, dots, categories, precision-recall, errors, and up to six gallery images for each of two arms
    with_objects = {entry["image_id"] for entry in truth["annotations"] if not entry["iscrowd"]}
    assert len(page.images) == 5 + 2 * min(len(with_objects), 6)
    for source in page.images:
        head, data = source.split(",", 1)
        assert head == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 5
    # a header and the metrics for boxes and masks, then a header and the categories for both
    # before them the intervals of two arms, and each seed's values: 3 arms, 2 differences and their intervals
    assert page.tables[:2] == [1 + 2 * 2, 1 + 2 * (3 + 2 * 2)]
    assert page.tables[2:6] == [1 + 7] * 2 + [1 + len(truth["categories"])] * 2
    assert all(count > 1 for count in page.tables)
    assert "<ig>" not in text


def test_the_declared_metric_may_be_of_a_category_with_any_name(tmp_path):
    name = "<i>x|$y_{"
    box = {"category_id": 1, "bbox": [5, 5, 20, 20]}
    truth = {"images": [{"id": 1, "file_name": "1.jpg", "height": 50, "width": 50}]}
    truth |= {"annotations": [box | {"id": 1, "image_id": 1, "area": 400, "iscrowd": 0}]}
    truth |= {"categories": [{"id": 1, "name": name}]}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    arms = {}
    for arm, score in (("a", 0.5), ("b", 0.6)):
        # a byte of a file's name that is no text
        arms[arm] = [tmp_path / f"{arm}\udcff.json"]
        arms[arm][0].write_text(json.dumps([box | {"image_id": 1, "score": score}]))
    compare_results(
        tmp_path / "truth.json", arms, tmp_path / "out", bootstrap=0, question=Question(metric=f"AP-{name}")
    )
    page, text = ((tmp_path / f"out/report.{kind}").read_text() for kind in ("html", "md"))
    assert "<i>" not in page and "(all but AP-&lt;i&gt;x|$y_{ are exploratory)" in page
    assert "<i>" not in text and r"AP-&lt;i&gt;x\|\$y\_\{" in text
    truth["categories"][0]["name"] = "half \ud800"
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    with pytest.raises(UserError, match=r"category 1 has the name .half .*: a text is needed"):
        compare_results(tmp_path / "truth.json", arms, tmp_path / "out", bootstrap=0)


def test_markdown_has_every_metric(compared):
    output, truth = compared
    lines = (output / "report.md").read_text().splitlines()
    for metric in (
        "AP",
        "AP50",
        "AP75",
        "APs",
        "APm",
        "APl",
        "AR100",
        *(f"AP-{c['name']}" for c in truth["categories"]),
    ):
        assert sum(line.startswith(f"| {metric} ") for line in lines) == 2
    absent = [line for line in lines if "absent" in line and line.startswith("|")]
    assert absent == [line for line in lines if line.startswith("| APl")]


@pytest.mark.parametrize("name", ["report.md", "report.html"])
def test_each_seed_and_each_interval_is_shown(compared, name):
    """With two seeds too: the values of each, their intervals over the images, and the four intervals of the mean."""
    output, _ = compared
    report, text = json.loads((output / "report.json").read_text()), (output / name).read_text()
    for task in ("bbox", "segm"):
        for arm in report["arms"].values():
            assert all(f"{value:.2f}" in text for value in arm[task]["AP"]["values"])
        for difference in report["differences"].values():
            found = difference[task]["AP"]
            spans = [*found["intervals"].values(), *found["images_by_seed"]]
            assert len(spans) == 4 + 2
            assert all(f"{span['low']:+.2f} to {span['high']:+.2f}" in text for span in spans)
            assert all(f"{value:+.2f}" in text for value in found["values"])


def test_pointing_figures_are_means_over_the_seeds():
    def run(shift):
        means = {"chance": 0.25, "before": 0.3 + shift, "after": 0.5, "gate": 0.5, "after_minus_before": 0.2 - shift}
        means |= {"gate_minus_chance": 0.25, "gate_ratio": 1.5 + shift}
        figures = {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name, mean in means.items()}
        nothing = {"images": 0} | {name: {"mean": None, "low": None, "high": None} for name in means}
        return {
            "images": 9,
            "without_objects": 1,
            "bbox": {"res5": {"all": {"images": 9, **figures}, "large": nothing}},
        }

    (one,) = pointing_tables({"0": run(0.0)})
    assert one.header[0] == "in an object's box"
    assert one.rows[0] == [
        *("res5, all", "9", "25.0", "30.0", "50.0", "50.0"),
        *("+20.0 (+10.0 to +30.0)", "+25.0 (+15.0 to +35.0)", "1.500 (1.400 to 1.600)"),
    ]
    assert one.rows[1] == ["res5, large", "0", *["absent"] * 7]
    (two,) = pointing_tables({"0": run(0.0), "1": run(0.2)})
    # the standard deviation of two numbers is their distance over the root of 2
    assert two.rows[0] == [
        *("res5, all", "9", "25.0", "40.0 ± 14.1", "50.0 ± 0.0", "50.0 ± 0.0"),
        *("+10.0 ± 14.1", "+25.0 ± 0.0", "1.600 ± 0.141"),
    ]


def test_a_picture_of_many_arms_can_be_drawn():
    """Agg refuses 65,536 pixels and more."""
    figure, _ = plots._figure(9999.0, 1)
    assert 10_000 < figure.get_size_inches()[1] * figure.dpi < 1 << 16
