"""Shows SGE's gates: on images, block by block over a data set.

visualize_attention.py --config-file F --input a.jpg b.jpg --output out MODEL.WEIGHTS output/model_final.pth
visualize_attention.py --config-file F --input a.jpg --output out --stage res4 --groups 3,17 MODEL.WEIGHTS W
visualize_attention.py --config-file F --input a.jpg --output out --compare-weights W2 MODEL.WEIGHTS W
visualize_attention.py --config-file F --output out MODEL.WEIGHTS W    # all blocks over DATASETS.TEST

With --input there is a figure for each image; without it, or with --dataset as well, one over the data set: blocks.png,
and its numbers in blocks.json.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401

from sge_det.analysis.inputs import add_layer_options, parse_inputs, report_faults
from sge_det.analysis.predictor import setup_prediction
from sge_det.analysis.visualize import BLOCKS_FIGURE, visualize_dataset, visualize_images
from sge_det.engine.training import add_dataset_option, setup_config
from sge_det.errors import user_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--config-file", required=True, metavar="F", help="the detector with SGE")
    add("--input", nargs="+", default=[], metavar="IMAGE", help="images, folders of images or globs")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the figures")
    add_layer_options(arguments)
    add(
        "--groups",
        default="top:8",
        metavar="G",
        help="top:N, those that vary most over the image; all; or numbers, 3,17 (default %(default)s)",
    )
    add("--compare-weights", default="", metavar="W2", help="weights that are shown beside MODEL.WEIGHTS")
    add_dataset_option(
        arguments, "register a COCO-format data set, as in train_net.py; its blocks' figure is made with --input too"
    )
    add("--limit", type=int, metavar="N", help="the first N images of the data set (default: all)")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, files, overrides = parse_inputs(parser(), argv)
    faults: dict[Path, str] = {}
    if files:
        cfg = setup_prediction(args.config_file, overrides, args.dataset)
        figures, faults = visualize_images(
            cfg,
            files,
            args.output,
            stage=args.stage,
            block=args.block,
            groups=args.groups,
            compare_weights=args.compare_weights,
            confidence=args.confidence,
        )
        for figure in figures:
            print(figure)
    if args.dataset or not files:
        cfg = setup_config(args.config_file, overrides, args.dataset, eval_only=True)
        visualize_dataset(cfg, args.output, images=args.limit)
        print(args.output / BLOCKS_FIGURE)
    report_faults(faults, files, "the others are done")


if __name__ == "__main__":
    main()
