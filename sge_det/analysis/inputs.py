"""What people give to be looked at: images and videos, as files, folders and globs."""

import argparse
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError

IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
VIDEOS = {".mp4", ".m4v", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv"}


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--stage`` and ``--block``, which name an SGE layer, and ``--confidence``."""
    add = parser.add_argument
    add("--stage", default="res5", metavar="S", help="of the SGE layer, res2 to res5 (default %(default)s)")
    add("--block", type=int, default=-1, metavar="K", help="its block in the stage, from 0; -1 is the last (default)")
    add("--confidence", type=float, default=0.5, metavar="C", help="least score drawn, 0-1 (default %(default)s)")


def parse_inputs(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[Path], list[str]]:
    """Parses a command line with ``--input`` and KEY VALUE pairs at its end, the last option that ``parser`` gets.

    Returns:
        the arguments, the files that ``--input`` names (none where it was not given), and the KEY VALUE pairs.

    Raises:
        UserError: ``--input`` names something that is not there.
    """
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    args = parser.parse_intermixed_args(argv)
    inputs, overrides = split_input(args.input, args.opts)
    return args, find_files(inputs) if args.input else [], overrides


def split_input(inputs: Sequence[str], overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Parts ``--input A B`` from the KEY VALUE pairs behind it, which argparse takes for inputs as well."""
    for place, word in enumerate(inputs):
        if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR", word) and not Path(word).exists():
            return list(inputs[:place]), [*inputs[place:], *overrides]
    return list(inputs), list(overrides)


def find_files(inputs: Sequence[str]) -> list[Path]:
    """The images and videos that ``--input`` names.

    Args:
        inputs: files, folders (their images and videos, not those of folders in them) and globs.

    Raises:
        UserError: one of them names nothing.
    """
    found: list[Path] = []
    for word in inputs:
        path = Path(word).expanduser()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            fitting = sorted(entry for entry in path.iterdir() if _is_known(entry))
            if not fitting:
                raise UserError(f"--input {word}: there are no images or videos in this folder")
            found += fitting
        else:
            fitting = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if _is_known(Path(name)))
            if not fitting:
                hint = "; download it" if "://" in word else ""
                raise UserError(
                    f"--input {word}: there is no such file or folder, and no image or video matches it{hint}"
                )
            found += fitting
    if not found:
        raise UserError("give images, folders, globs or videos with --input")
    unique: dict[str, Path] = {}
    for file in found:
        unique.setdefault(os.path.abspath(file), file)
    return list(unique.values())


def _is_known(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in IMAGES | VIDEOS


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def common_folder(files: Sequence[Path]) -> Path:
    """The folder below which all ``files`` lie: what the names of outputs are relative to."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def report_faults(faults: dict[Path, str], files: Sequence[Path], done: str) -> None:
    """Ends with what could not be read, when all else is done.

    Raises:
        UserError: there is such a file.
    """
    if faults:
        reasons = "; ".join(f"{file}: {reason.rstrip('.')}" for file, reason in faults.items())
        others = f", {done}" if len(faults) < len(files) else ""
        raise UserError(f"{len(faults)} of {len(files)} files cannot be read{others}: {reasons}")
