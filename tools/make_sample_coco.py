"""Makes a small COCO-format detection set on the spot: nothing to download, the same for the same seed.

make_sample_coco.py datasets/sample
make_sample_coco.py datasets --coco-layout  # datasets/coco, for COCO configs with DETECTRON2_DATASETS=datasets
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401

from sge_det.data.preview import contact_sheet
from sge_det.data.sample import SPLITS, make_sample_coco
from sge_det.errors import user_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("output_dir", type=Path, metavar="OUTPUT_DIR", help="the folder to make")
    add("--train", type=int, default=400, metavar="N", help="training images (default %(default)s)")
    add("--val", type=int, default=100, metavar="N", help="validation images (default %(default)s)")
    add("--size", type=int, default=192, metavar="PX", help="longer side of the images (default %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the drawing (default %(default)s)")
    add(
        "--coco-layout",
        action="store_true",
        help="write OUTPUT_DIR/coco with COCO 2017's file names and 80 categories",
    )
    add("--preview", type=Path, metavar="FILE.png", help="also draw the first validation images with their labels")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    sample = make_sample_coco(
        args.output_dir, train=args.train, val=args.val, size=args.size, seed=args.seed, coco_layout=args.coco_layout
    )
    print(f"{'Wrote' if sample.created else 'Kept, already complete:'} {sample.root}")
    for split in SPLITS:
        print(f"  {split}: {sample.image_dir(split)}, {sample.annotation_file(split)}")
    if args.coco_layout:
        print(f"COCO configs run on it as they are with DETECTRON2_DATASETS={sample.root.resolve().parent}")
    else:
        print("Register it with Detectron2:")
        print("  from detectron2.data.datasets import register_coco_instances")
        for split in SPLITS:
            json_file, images = str(sample.annotation_file(split)), str(sample.image_dir(split))
            print(f'  register_coco_instances("sample_{split}", {{}}, {json_file!r}, {images!r})')
        print("A few objects with holes have RLE masks: train mask heads with INPUT.MASK_FORMAT bitmask.")
    if args.preview:
        contact_sheet(sample.image_dir("val"), sample.annotation_file("val"), args.preview)
        print(f"Preview: {args.preview}")


if __name__ == "__main__":
    main()
