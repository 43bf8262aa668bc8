"""Trains and evaluates a detector from a lazy config, with the guards of train_net.py.

lazy_train_net.py --config-file lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.py --num-gpus 8
lazy_train_net.py --config-file F --eval-only train.init_checkpoint=output/model_final.pth
lazy_train_net.py --config-file F --dataset my_train train.json images/ --dataset my_val val.json images/
lazy_train_net.py --config-file F model.backbone.bottom_up.stages.groups=32
"""

import argparse

import quiet  # noqa: F401

from sge_det.config import find_config
from sge_det.engine.launching import check_launch, find_place, launch
from sge_det.engine.lazy import (
    claimed_lazily,
    evaluate_lazily,
    lazy_words,
    setup_lazy_config,
    start_lazy_run,
    train_lazily,
)
from sge_det.engine.training import argument_parser
from sge_det.errors import UserError, user_errors


def run(args: argparse.Namespace) -> dict:
    with lazy_words():
        cfg = setup_lazy_config(args.config_file, args.opts, args.dataset, eval_only=args.eval_only)
        if args.eval_only:
            start_lazy_run(cfg, args)
            return evaluate_lazily(cfg, resume=args.resume)
        with claimed_lazily(cfg, resume=args.resume, overwrite=args.overwrite):
            start_lazy_run(cfg, args)
            return train_lazily(cfg, resume=args.resume)


def main(argv: list[str] | None = None) -> None:
    args = argument_parser(epilog=__doc__).parse_args(argv)
    go_on = "give the same command with --resume to go on"
    if args.eval_only:
        go_on = "run the same command again"
    elif args.overwrite:
        go_on = "give the same command with --resume in place of --overwrite to go on"
    user_errors(go_on=go_on)(start)(args)


def start(args: argparse.Namespace) -> None:
    if args.eval_only and args.overwrite:
        raise UserError("--overwrite is for training: --eval-only removes nothing")
    check_launch(args, find_place())
    args.config_file = find_config(args.config_file) if args.config_file else ""
    with lazy_words():
        # A mistake is told here, once, before any process is started.
        setup_lazy_config(args.config_file, args.opts, args.dataset, eval_only=args.eval_only)
    launch(run, args)


if __name__ == "__main__":
    main()
