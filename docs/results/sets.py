"""Writes the sets of docs/results.md, as their authors publish them, as COCO files: train, test, fit and val.json.

sets.py bccd BCCD_Dataset/BCCD OUTPUT
sets.py cards TensorFlow-Object-Detection-API-Tutorial-Train-Multiple-Objects-Windows-10/images OUTPUT

fit and val divide train: every fifth image, by its id, validates. The cards' photographs, which lie in folders of their
own, are linked in OUTPUT/images.
"""

import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path

BCCD = ("Platelets", "RBC", "WBC")
CARDS = ("nine", "ten", "jack", "queen", "king", "ace")


def coco(images: list[tuple[int, str, Path]], categories: tuple[str, ...]) -> dict:
    """COCO instances of ``images``, each an id, a file name and Pascal VOC's file of its boxes (pixels).

    Boxes of no extent are left out.
    """
    whole = {"images": [], "annotations": []}
    for number, file_name, boxes in images:
        root = ET.parse(boxes).getroot()
        size = {side: int(root.findtext(f"size/{side}")) for side in ("width", "height")}
        whole["images"].append({"id": number, "file_name": file_name, **size})
        for entry in root.iter("object"):
            left, top, right, bottom = (
                float(entry.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax")
            )
            width, height = right - left, bottom - top
            if width > 0 and height > 0:
                whole["annotations"].append(
                    {
                        "id": len(whole["annotations"]) + 1,
                        "image_id": number,
                        "category_id": categories.index(entry.findtext("name")) + 1,
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
    return whole | {"categories": [{"id": place + 1, "name": name} for place, name in enumerate(categories)]}


def subset(whole: dict, keep: set[int]) -> dict:
    return {
        "images": [image for image in whole["images"] if image["id"] in keep],
        "annotations": [entry for entry in whole["annotations"] if entry["image_id"] in keep],
        "categories": whole["categories"],
    }


def bccd(folder: Path) -> dict[str, dict]:
    """Train and val against test, as their authors split them; an image's id is its place among all."""
    boxes = sorted((folder / "Annotations").glob("*.xml"))
    test = set((folder / "ImageSets/Main/test.txt").read_text().split())
    images = [(place, f"{path.stem}.jpg", path) for place, path in enumerate(boxes, 1)]
    return {
        "train": coco([image for image in images if image[2].stem not in test], BCCD),
        "test": coco([image for image in images if image[2].stem in test], BCCD),
    }


def cards(folder: Path, output: Path) -> dict[str, dict]:
    """Folder train against folder test; a file's name begins with its folder's, an image's id is its place there."""
    (output / "images").mkdir(parents=True, exist_ok=True)
    sets = {}
    for part in ("train", "test"):
        images = []
        for place, boxes in enumerate(sorted((folder / part).glob("*.xml")), 1):
            photograph = next((path for path in boxes.parent.glob(f"{boxes.stem}.*") if path != boxes), None)
            if photograph is None:
                raise SystemExit(f"{boxes}: there is no photograph of that name beside it")
            link = output / "images" / f"{part}_{photograph.name}"
            if not link.exists():
                link.symlink_to(photograph.resolve())
            images.append((place, link.name, boxes))
        sets[part] = coco(images, CARDS)
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("bccd", "cards"))
    parser.add_argument("folder", type=Path, help="bccd: holds Annotations and ImageSets; cards: holds train and test")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    for part in {"bccd": ("Annotations", "ImageSets/Main/test.txt"), "cards": ("train", "test")}[args.set]:
        if not (args.folder / part).exists():
            parser.error(f"{args.folder / part} is not there: name the folder as above")
    args.output.mkdir(parents=True, exist_ok=True)
    sets = bccd(args.folder) if args.set == "bccd" else cards(args.folder, args.output)
    for name, content in sets.items():
        if not content["images"]:
            parser.error(f"{args.folder} has no boxes (.xml) of the {name} images")
    ids = {image["id"] for image in sets["train"]["images"]}
    sets["fit"] = subset(sets["train"], {number for number in ids if number % 5})
    sets["val"] = subset(sets["train"], {number for number in ids if number % 5 == 0})
    for name, content in sets.items():
        (args.output / f"{name}.json").write_text(json.dumps(content))
        print(f"{name}.json: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    main()
