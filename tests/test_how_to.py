"""What the pages on one question tell people to type does what they say."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import forked_python
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, TINY
from started_tool import MICRO

PAGES = sorted((ROOT / "docs/how_to").glob("*.md"))
# what a person would wait for: a whole training on large images
SHORT = ["SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0", "TEST.DETECTIONS_PER_IMAGE", "5"]


def blocks_of(page, language):
    text = (ROOT / "docs/how_to" / page).read_text(encoding="utf-8")
    blocks = re.findall(rf"<!-- tested: {language} -->\n```{language}\n(.*?)```", text, re.S)
    assert blocks
    return blocks


def commands(page):
    lines = "\n".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


@pytest.fixture
def work(tmp_path, sample):
    """What the pages take to be there: the project's folders, train.json, val.json and images."""
    for name in ("tools", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        data = json.loads((sample / f"annotations/instances_{split}.json").read_text())
        for image in data["images"]:
            file = sample / split / image["file_name"]
            image["file_name"] = f"{split}_{file.name}"
            shutil.copyfile(file, tmp_path / "images" / image["file_name"])
        (tmp_path / f"{split}.json").write_text(json.dumps(data))
    return tmp_path


def run(command, work):
    assert command[0] == "python"
    done = forked_python.run([sys.executable, *command[1:]], cwd=work, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def test_every_marked_block_is_of_a_page_that_is_tested():
    marked = [page.name for page in PAGES if "<!-- tested: " in page.read_text(encoding="utf-8")]
    assert marked == ["my_backbone.md", "my_cluster.md", "my_weights.md", "other_formats.md", "read_a_report.md"]


def test_my_backbone(capsys):
    for code in blocks_of("my_backbone.md", "python"):
        names = {}
        exec(compile(code, "my_backbone.md", "exec"), names)
        if "y" in names:
            assert names["y"].shape == (2, 256, 50, 68)
    assert capsys.readouterr().out.count("Insertion(") == 16  # a ResNet-50's blocks


def test_my_weights(work):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet50().state_dict(), work / "resnet50.pth")
    *prepare, train = commands("my_weights.md")
    printed = [run(command, work) for command in prepare]
    assert ": 0 errors, " in printed[-1]
    run([*train, *TINY, *SHORT, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"], work)
    assert (work / "output/model_final.pth").is_file()


@pytest.mark.slow
def test_my_cluster(work):
    *runs, report = commands("my_cluster.md")
    short = [*TINY, *SHORT, *MICRO, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    for command in runs:
        run([*command, *short], work)
        assert not (work / "output/gain/report.json").exists()
    assert "left out: plain/seed1, sge/seed1" in run([*report, *short], work)


def write_yolo(data, split, names, work):
    (work / "yolo/labels" / split).mkdir(parents=True)
    (work / "yolo/data.yaml").write_text(f"names: {names}")
    for image in data["images"]:
        lines = []
        for name, (left, top, width, height) in objects_of(data, image):
            sides = (left + width / 2) / image["width"], (top + height / 2) / image["height"]
            sides += width / image["width"], height / image["height"]
            lines.append(" ".join(map(str, (names.index(name), *sides))))
        (work / f"yolo/labels/{split}/{Path(image['file_name']).stem}.txt").write_text("\n".join(lines))
    return work / "yolo/images" / split


def write_voc(data, split, names, work):
    (work / "voc" / split / "annotations").mkdir(parents=True)
    for image in data["images"]:
        root = ElementTree.Element("annotation")
        for name, (left, top, width, height) in objects_of(data, image):
            found = ElementTree.SubElement(root, "object")
            ElementTree.SubElement(found, "name").text = name
            box = ElementTree.SubElement(found, "bndbox")
            # the first pixel is 1, and the far edge is in the box
            corners = (left + 1, top + 1, left + width, top + height)
            for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                ElementTree.SubElement(box, side).text = str(value)
        path = work / f"voc/{split}/annotations/{Path(image['file_name']).stem}.xml"
        path.write_bytes(ElementTree.tostring(root))
    return work / "voc" / split / "images"


def objects_of(data, image=None):
    """(category, box) of each object."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    return [
        (names[entry["category_id"]], entry["bbox"])
        for entry in data["annotations"]
        if image is None or entry["image_id"] == image["id"]
    ]


def test_other_formats(work, monkeypatch):
    monkeypatch.chdir(work)
    sets = {split: json.loads((work / f"{split}.json").read_text()) for split in ("train", "val")}
    # alone, the validation set of VOC would number what is left from the start
    missing = sets["val"]["categories"][0]["id"]
    sets["val"]["annotations"] = [e for e in sets["val"]["annotations"] if e["category_id"] != missing]
    names = [category["name"] for category in sets["train"]["categories"]]
    (check,) = commands("other_formats.md")
    for code, write in zip(blocks_of("other_formats.md", "python"), (write_yolo, write_voc), strict=True):
        for split, before in sets.items():
            folder = write(before, split, names, work)
            folder.mkdir(parents=True)
            for image in before["images"]:
                shutil.copyfile(work / "images" / image["file_name"], folder / image["file_name"])
        exec(compile(code, "other_formats.md", "exec"), {})
        for split, before in sets.items():
            after = json.loads((work / f"mine/{split}.json").read_text())
            assert {category["name"] for category in after["categories"]} == {*names}
            found, expected = (sorted(objects_of(data), key=lambda each: each[1]) for data in (after, before))
            assert [name for name, _ in found] == [name for name, _ in expected]
            np.testing.assert_allclose([box for _, box in found], [box for _, box in expected], atol=0.01)
        assert ": 0 errors, " in run(check, work)
        shutil.rmtree(work / "mine")


def test_read_a_report(work):
    truth = json.loads((work / "val.json").read_text())
    for arm in ("plain", "mine"):
        for seed in (0, 1):
            found = [
                {
                    "image_id": entry["image_id"],
                    "category_id": entry["category_id"],
                    "bbox": [side + (seed + 2 * (arm == "plain")) for side in entry["bbox"]],
                    "score": 0.9 - 0.001 * place,
                }
                for place, entry in enumerate(truth["annotations"])
            ]
            (work / f"{arm}_{seed}.json").write_text(json.dumps(found))
    (command,) = commands("read_a_report.md")
    assert "undecided" in run(command, work).lower()
    assert {"report.html", "report.md", "report.json", "metrics.csv"} <= set(os.listdir(work / "output/compare"))
