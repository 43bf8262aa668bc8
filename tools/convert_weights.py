"""Converts weights into a file for MODEL.WEIGHTS, and says what they are and what became of every tensor.

convert_weights.py sge_resnet50.pth.tar weights/sge_resnet50.pth
convert_weights.py resnet50.safetensors weights/transplanted.pth --transplant
convert_weights.py model_final_280758.pkl start.pth --transplant --config-file F MODEL.RESNETS.STRIDE_IN_1X1 True
"""

import argparse

import quiet  # noqa: F401

from sge_det.checkpoint import convert_file, transplant_file
from sge_det.config import load_config
from sge_det.errors import UserError, user_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="release, torchvision, timm, Detectron2 or mmdetection weights: docs/weights.md",
    )
    add("output", metavar="OUTPUT", help="the file to write, .pth or .safetensors")
    add("--transplant", action="store_true", help="plain weights: add SGE without a change of the outputs")
    add("--weights-of", choices=("raw", "ema"), help="which to take where the file holds averaged weights too")
    add("--config-file", metavar="F", help="the config they are for: every tensor of its model is accounted for")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return arguments


@user_errors
def main(argv: list[str] | None = None) -> None:
    args = parser().parse_intermixed_args(argv)
    if args.opts and not args.config_file:
        raise UserError(f"{' '.join(args.opts)}: config overrides go with --config-file")
    cfg = load_config(args.config_file, args.opts) if args.config_file else None
    convert = transplant_file if args.transplant else convert_file
    print("\n".join(convert(args.source, args.output, cfg=cfg, weights_of=args.weights_of).lines()))


if __name__ == "__main__":
    main()
