"""Trains and evaluates a detector, plain or with SGE, from a config.

train_net.py --config-file configs/COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml --num-gpus 8
train_net.py --config-file F --eval-only MODEL.WEIGHTS output/model_final.pth
train_net.py --config-file F --dataset my_train train.json images/ --dataset my_val val.json images/
train_net.py --config-file F MODEL.SGE.ENABLED False    # the plain twin
"""

import argparse

import quiet  # noqa: F401
from detectron2.config import CfgNode

from sge_det.engine.claims import claimed
from sge_det.engine.training import evaluate, run_tool, setup_config, start_run, train
from sge_det.files import check_folder


def set_up(args: argparse.Namespace) -> CfgNode:
    cfg = setup_config(args.config_file, args.opts, args.dataset, eval_only=args.eval_only, resume=args.resume)
    check_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    return cfg


def run(args: argparse.Namespace) -> dict:
    cfg = set_up(args)
    if args.eval_only:
        start_run(cfg, args)
        return evaluate(cfg, resume=args.resume)
    with claimed(cfg, resume=args.resume, overwrite=args.overwrite):
        start_run(cfg, args)
        return train(cfg, resume=args.resume)


def main(argv: list[str] | None = None) -> None:
    run_tool(argv, __doc__, set_up, run)


if __name__ == "__main__":
    main()
