"""Pretrains a ResNet of timm's, plain or with SGE, on classified images; the paper's ImageNet recipe by default.

pretrain.py --train imagenet/train --val imagenet/val --model sge_resnet50 --output output/sge_resnet50 --num-gpus 8
pretrain.py --train imagenet/train --val imagenet/val --model resnet50 --output output/resnet50    # the plain twin
torchrun --nproc-per-node 8 tools/pretrain.py ...
pretrain.py --train train.tar --val test.tar --model sge_resnet50 --output out --img-size 64 --epochs 10 \\
    --model-kwargs 'channels=(16,32,64,128)' --groups 16
"""

import argparse
import sys

import quiet  # noqa: F401
from detectron2.utils.logger import setup_logger

from sge_det.engine.launching import TIMEOUT_SECONDS, check_launch, find_place, launch
from sge_det.errors import UserError, user_errors

try:
    from sge_det.engine.pretraining.loop import pretrain
    from sge_det.engine.pretraining.options import add_options, from_options
except UserError as error:  # without timm
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(arguments)
    add = arguments.add_argument
    add("--resume", action="store_true", help="go on with the run that --output holds")
    add("--overwrite", action="store_true", help="remove the run that --output holds, and start anew")
    add("--num-gpus", type=int, default=1, help="GPUs (or CPU processes) on each machine")
    add("--num-machines", type=int, default=1, help="machines")
    add("--machine-rank", type=int, default=0, help="this machine among them")
    add("--dist-url", default=None, help="where the processes meet")
    add("--timeout", type=float, default=TIMEOUT_SECONDS, metavar="SECONDS", help="default %(default)s")
    return arguments


def run(args: argparse.Namespace) -> None:
    asked_for = from_options(args)
    setup_logger(name="sge_det")
    result = pretrain(asked_for, resume=args.resume, overwrite=args.overwrite)
    averaged = "" if result["ema"] is None else f"; averaged weights: {result['ema']['top1']:.2f}"
    print(f"{args.output}: top-1 {result['top1']:.2f}, top-5 {result['top5']:.2f}{averaged}")


def start(args: argparse.Namespace) -> None:
    place = find_place()
    check_launch(args, place)
    # a mistake is told here, once, before any process is started
    from_options(args).check(place.world if place else args.num_gpus * args.num_machines)
    launch(run, args)


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    again = "--resume in place of --overwrite" if args.overwrite else "--resume"
    user_errors(go_on=f"give the same command with {again} to go on")(start)(args)


if __name__ == "__main__":
    main()
