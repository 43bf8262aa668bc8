"""Trains and evaluates a detector from a lazy config, with the guards of train_net.py.

lazy_train_net.py --config-file lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.py --num-gpus 8
lazy_train_net.py --config-file F --eval-only train.init_checkpoint=output/model_final.pth
lazy_train_net.py --config-file F --dataset my_train train.json images/ --dataset my_val val.json images/
lazy_train_net.py --config-file F model.backbone.bottom_up.stages.groups=32
"""

import argparse

import quiet  # noqa: F401
from omegaconf import DictConfig

from sge_det.engine.lazy import (
    claimed_lazily,
    evaluate_lazily,
    lazy_words,
    setup_lazy_config,
    start_lazy_run,
    train_lazily,
)
from sge_det.engine.training import run_tool
from sge_det.files import check_folder


def set_up(args: argparse.Namespace) -> DictConfig:
    with lazy_words():
        cfg = setup_lazy_config(args.config_file, args.opts, args.dataset, eval_only=args.eval_only, resume=args.resume)
    check_folder(cfg.train.output_dir, "train.output_dir")
    return cfg


def run(args: argparse.Namespace) -> dict:
    cfg = set_up(args)
    with lazy_words():
        if args.eval_only:
            start_lazy_run(cfg, args)
            return evaluate_lazily(cfg, resume=args.resume)
        with claimed_lazily(cfg, resume=args.resume, overwrite=args.overwrite):
            start_lazy_run(cfg, args)
            return train_lazily(cfg, resume=args.resume)


def main(argv: list[str] | None = None) -> None:
    run_tool(argv, __doc__, set_up, run)


if __name__ == "__main__":
    main()
