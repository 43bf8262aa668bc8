"""Detects on images and videos: draws what is found, and writes it as COCO-format JSON.

predict.py --config-file F --input image.jpg --output out MODEL.WEIGHTS output/model_final.pth
predict.py --config-file F --input folder 'more/*.png' clip.mp4 --output out --confidence 0.3 MODEL.WEIGHTS W
predict.py --config-file F --input folder --output out --attention MODEL.WEIGHTS W    # the gates beside the detections
An interrupted call goes on when it is given again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import quiet  # noqa: F401

from sge_det.analysis.inputs import add_layer_options, parse_inputs, report_faults
from sge_det.analysis.predict import predict
from sge_det.analysis.predictor import setup_prediction
from sge_det.engine.training import add_dataset_option
from sge_det.errors import user_errors


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = arguments.add_argument
    add("--config-file", required=True, metavar="F", help="the detector, plain or with SGE")
    add("--input", required=True, nargs="+", metavar="PATH", help="images, folders, globs or videos")
    add("--output", required=True, type=Path, metavar="DIR", help="folder of the drawings and of predictions.json")
    add("--attention", action="store_true", help="draw the mean gate of an SGE block beside the detections")
    add_layer_options(arguments)
    add_dataset_option(arguments, "the data set whose classes the model knows, where DATASETS.TEST is not there")
    return arguments


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, files, overrides = parse_inputs(parser(), argv)
    cfg = setup_prediction(args.config_file, overrides, args.dataset)
    path, faults = predict(
        cfg,
        files,
        args.output,
        confidence=args.confidence,
        attention=args.attention,
        stage=args.stage,
        block=args.block,
    )
    if drawn := len(files) - len(faults):
        print(f"{drawn} {'file' if drawn == 1 else 'files'} drawn into {args.output}, detections in {path}")
    report_faults(faults, files, "the others are done")


if __name__ == "__main__":
    main()
