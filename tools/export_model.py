"""Exports a detector and its backbone, runs what was exported on other sizes and compares it with the model.

export_model.py --config-file F --format torchscript --output out MODEL.WEIGHTS output/model_final.pth
export_model.py --config-file F --format onnx --output out --image street.jpg MODEL.WEIGHTS W
export_model.py --config-file F --format exported_program --output out --size 800,1216 --size 640,960 MODEL.WEIGHTS W
Ends with 1 where something that was exported differs from the model.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image

from sge_det.config import load_config
from sge_det.data.images import image_fault, readable
from sge_det.engine.training import load_model
from sge_det.errors import UserError, user_errors
from sge_det.export import FORMATS, SIZES, export_model, report


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--config-file", required=True, metavar="F", help="the detector, plain or with SGE")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the files and of export.json")
    add("--format", required=True, choices=FORMATS)
    add("--image", metavar="FILE", help="on which the detector finds something (default: noise)")
    add(
        "--size",
        type=size,
        action="append",
        metavar="H,W",
        help="that is tried, as often as wanted; the first makes it",
    )
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return arguments


def size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split(","))
    if min(height, width) < 1:
        raise ValueError("an image has at least one pixel")
    return height, width


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_intermixed_args(argv)
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    image = None if args.image is None else read(args.image, cfg)
    exports = export_model(load_model(cfg), args.output, args.format, sizes=args.size or SIZES, image=image)
    print(report(exports))
    sys.exit(0 if all(export.holds for export in exports if export.file) else 1)


def read(path: str, cfg: CfgNode) -> torch.Tensor:
    pixel_range = cfg.INPUT.PIXEL_RANGE
    fault = image_fault(path, decode=True, pixel_range=pixel_range)
    if fault:
        raise UserError(f"the image {path} {fault}")
    image = read_image(readable(path, pixel_range), cfg.INPUT.FORMAT)
    return torch.as_tensor(image.transpose(2, 0, 1).copy())


if __name__ == "__main__":
    main()
