"""Writes BCCD, as its authors publish it, as the COCO files of docs/results.md.

bccd.py BCCD_Dataset/BCCD OUTPUT
"""

import argparse
import json
import xml.etree.ElementTree as ET
from pathlib import Path

CATEGORIES = ("Platelets", "RBC", "WBC")


def coco(folder: Path, names: list[str], first_of_all: list[str]) -> dict:
    """COCO instances of the images ``names``; an image's id is its place among all, from 1."""
    images, annotations = [], []
    for name in names:
        root = ET.parse(folder / "Annotations" / f"{name}.xml").getroot()
        image = {"id": first_of_all.index(name) + 1, "file_name": f"{name}.jpg"}
        image |= {side: int(root.findtext(f"size/{side}")) for side in ("width", "height")}
        images.append(image)
        for entry in root.iter("object"):
            left, top, right, bottom = (
                float(entry.findtext(f"bndbox/{end}")) for end in ("xmin", "ymin", "xmax", "ymax")
            )
            width, height = right - left, bottom - top
            if width > 0 and height > 0:
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": CATEGORIES.index(entry.findtext("name")) + 1,
                        "bbox": [left, top, width, height],
                        "area": width * height,
                        "iscrowd": 0,
                    }
                )
    categories = [{"id": place + 1, "name": name} for place, name in enumerate(CATEGORIES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def subset(whole: dict, keep: set[int]) -> dict:
    return {
        "images": [image for image in whole["images"] if image["id"] in keep],
        "annotations": [entry for entry in whole["annotations"] if entry["image_id"] in keep],
        "categories": whole["categories"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds Annotations, ImageSets and JPEGImages")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    for part in ("Annotations", "ImageSets/Main/test.txt"):
        if not (args.folder / part).exists():
            parser.error(f"{args.folder / part} is not there: name the folder BCCD_Dataset/BCCD")
    names = sorted(path.stem for path in (args.folder / "Annotations").glob("*.xml"))
    test = sorted((args.folder / "ImageSets/Main/test.txt").read_text().split())
    sets = {
        "train": coco(args.folder, [name for name in names if name not in test], names),
        "test": coco(args.folder, test, names),
    }
    ids = {image["id"] for image in sets["train"]["images"]}
    sets["fit"] = subset(sets["train"], {image for image in ids if image % 5})
    sets["val"] = subset(sets["train"], {image for image in ids if image % 5 == 0})
    args.output.mkdir(parents=True, exist_ok=True)
    for name, content in sets.items():
        (args.output / f"{name}.json").write_text(json.dumps(content))
        print(f"{name}.json: {len(content['images'])} images, {len(content['annotations'])} boxes")


if __name__ == "__main__":
    main()
