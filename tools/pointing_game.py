"""The pointing game: how often SGE's groups are strongest on an object, before and after SGE, and how often by chance.

pointing_game.py --config-file F MODEL.WEIGHTS output/model_final.pth
pointing_game.py --config-file F --dataset mine_val val.json images/ --limit 200 --json pointing.json MODEL.WEIGHTS W

It is played on the first of DATASETS.TEST, by stage and object size. Tables are Markdown.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401

from sge_det.analysis.pointing import pointing_game, pointing_report
from sge_det.engine.training import add_dataset_option, load_model, setup_config
from sge_det.errors import user_errors
from sge_det.files import write_json


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--config-file", required=True, metavar="F", help="the detector with SGE")
    add_dataset_option(arguments, "register a COCO-format data set (repeatable), as in train_net.py")
    add("--limit", type=int, metavar="N", help="the first N images with objects (default: all)")
    add("--json", type=Path, metavar="FILE", help="also write the figures there")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_intermixed_args(argv)
    cfg = setup_config(args.config_file, args.opts, args.dataset, eval_only=True)
    result = pointing_game(cfg, load_model(cfg), args.limit)
    print(pointing_report(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
