"""Times SGE: the layer beside its rivals, a detector beside its plain twin, or all of it on a GPU. Tables are Markdown.

benchmark.py layer --history    # appends the ratios to docs/performance.csv
benchmark.py layer --compile --shapes 2,256,100,152 1,2048,25,38 --rounds 50 --json layer.json
benchmark.py model --config-file configs/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml --json model.json
benchmark.py gpu --json gpu.json    # checks the kernels eager, compile and triton first; ends with 1 if one is wrong
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401
import torch

from sge_det.analysis import benchmark, kernels
from sge_det.analysis.history import append_history, history_figure
from sge_det.config import load_config
from sge_det.errors import UserError, user_errors
from sge_det.files import write_file, write_json

HISTORY = Path(__file__).resolve().parent.parent / "docs" / "performance.csv"
GPU_CONFIG = "COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.yaml"


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    common.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's)")
    common.add_argument("--rounds", type=int, metavar="N", help="times that each is timed (layer 31, model 7)")
    history = argparse.ArgumentParser(add_help=False)
    history.add_argument(
        "--history",
        type=Path,
        nargs="?",
        const=HISTORY,
        metavar="FILE",
        help="append the ratios (docs/performance.csv)",
    )
    commands = arguments.add_subparsers(dest="command", required=True)
    layer = commands.add_parser("layer", parents=[common, history], help="block tails, on the CPU")
    layer.add_argument("--compile", action="store_true", help="compiled contestants too; compiling takes minutes")
    layer.add_argument("--shapes", type=shape, nargs="+", metavar="N,C,H,W", help="default: R-50's stages, two batches")
    layer.add_argument("--quick", action="store_true", help="two small shapes, few rounds")
    model = commands.add_parser("model", parents=[common, history], help="a detector with random weights")
    model.add_argument("--config-file", required=True, metavar="FILE", help="the detector with SGE")
    model.add_argument("--images", type=int, default=1, metavar="N", help="images in a batch (default %(default)s)")
    model.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"), help="of the images, px")
    model.add_argument(
        "--with",
        dest="others",
        nargs="+",
        default=(),
        choices=benchmark.OTHERS,
        metavar="NAME",
        help=f"more contestants: {', '.join(benchmark.OTHERS)}",
    )
    picture = commands.add_parser("picture", help="the history's latest ratios of the layer as a picture")
    picture.add_argument("--history", type=Path, default=HISTORY, metavar="FILE", help="default: docs/performance.csv")
    picture.add_argument("--output", type=Path, required=True, metavar="PNG", help="where the picture goes")
    gpu = commands.add_parser("gpu", parents=[common], help="all kernels, checked and timed, layer and detector")
    gpu.add_argument("--device", help="default: cuda, or cpu where there is none")
    gpu.add_argument("--config-file", default=GPU_CONFIG, metavar="FILE", help="the detector (default %(default)s)")
    gpu.add_argument("--shapes", type=shape, nargs="+", metavar="N,C,H,W", help="default: R-50's stages, two batches")
    gpu.add_argument("--images", type=int, default=2, metavar="N", help="images in a batch (default %(default)s)")
    gpu.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"), help="of the images, px")
    model.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return arguments


def shape(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.command == "picture":
        write_file(args.output, history_figure(args.history))
        return
    for name in ("threads", "rounds", "images"):
        value = getattr(args, name, None)
        if value is not None and value < (2 if name == "rounds" else 1):
            raise UserError(f"--{name} {value} is too few")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.command == "layer":
        shapes = args.shapes or (benchmark.QUICK_SHAPES if args.quick else benchmark.SHAPES)
        result = benchmark.benchmark_layer(shapes, args.rounds or (7 if args.quick else 31), args.compile)
        print(benchmark.layer_report(result))
    elif args.command == "gpu":
        result = benchmark_gpu(args)
        print(kernels.report(result))
    else:
        overrides = args.opts if "MODEL.DEVICE" in args.opts else [*args.opts, "MODEL.DEVICE", default_device()]
        cfg = load_config(args.config_file, overrides)
        result = benchmark.benchmark_model(cfg, args.rounds or 7, args.images, tuple(args.size), args.others)
        print(benchmark.model_report(result))
    if args.json:
        write_json(args.json, result)
    if getattr(args, "history", None):
        print(f"{append_history(args.history, result)} rows appended to {args.history}")
    if args.command == "gpu" and (wrong := kernels.failures(result)):
        print("wrong: " + "; ".join(wrong), file=sys.stderr)
        sys.exit(1)


def benchmark_gpu(args: argparse.Namespace) -> dict:
    device = args.device or default_device()
    cfg = load_config(args.config_file, ["MODEL.DEVICE", device])
    return kernels.benchmark_kernels(
        torch.device(device),
        cfg,
        shapes=args.shapes or benchmark.SHAPES,
        rounds=args.rounds or 20,
        model_rounds=min(args.rounds or 5, 5),
        images=args.images,
        size=tuple(args.size),
    )


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
