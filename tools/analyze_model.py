"""What SGE adds to a detector: parameters, FLOPs and activations beside the plain twin's and the paper's figures.

analyze_model.py --config-file configs/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml
analyze_model.py --config-file F --height 640 --width 640 MODEL.SGE.STAGES "['res4', 'res5']"

The weights do not matter and need not be there. Tables are Markdown.
"""

import argparse
from collections.abc import Sequence

import quiet  # noqa: F401

from sge_det.analysis.cost import analysis_report, analyze
from sge_det.config import load_config
from sge_det.errors import user_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--config-file", required=True, metavar="F", help="the detector with SGE")
    add("--height", type=int, default=800, metavar="PX", help="of the image (default %(default)s)")
    add("--width", type=int, default=1333, metavar="PX", help="of the image (default %(default)s)")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_intermixed_args(argv)
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
    print(analysis_report(analyze(cfg, args.height, args.width)))


if __name__ == "__main__":
    main()
