"""Config values of every kind for every key: what is taken trains and detects, the rest is refused beforehand.

    fuzz_configs.py --cases 1000

Each case is a sample config with one value replaced. setup_config must refuse it by a UserError, or a training
iteration and a detection must run with it and end in finite numbers or a UserError of their own.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import yaml
from detectron2.utils.events import EventStorage

from sge_det.config import get_config_file
from sge_det.data.sample import make_sample_coco
from sge_det.engine.doctor.values import default_values
from sge_det.engine.training import Trainer, setup_config
from sge_det.errors import UserError

# A case that takes longer, or more memory, has hung or grown without end.
SECONDS, MEMORY = 120, 12 << 30
WHOLE = [-(2**63), -7, -1, 0, 1, 2, 3, 7, 100, 2**31, 2**32, 2**63, 10**30]
REAL = [-1e30, -1.0, -0.0, 0.0, 1e-30, 0.3, 1.0, 2.5, 1e30, float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "nonsense", "none", "GN", "GroupNorm", "a\0b", "x" * 5000, "mps", "cuda:99", "p2", "res2"]
ODD = [None, {}, [], [[]], [None], {"a": 1}, True]


def configs() -> dict[str, str]:
    """The sample config that reads a key, by the start of the key; Faster R-CNN's for all others."""
    names = {"MODEL.RETINANET": "retinanet", "MODEL.ROI_MASK": "mask_rcnn", "MODEL.ROI_BOX_CASCADE": "cascade_rcnn"}
    return {start: f"sample/{name}_SGE_R_50_FPN.yaml" for start, name in names.items()}


def value_for(default: object, draw: random.Random) -> object:
    """Something to stand where ``default`` stands: of its kind four times of five."""
    if draw.random() < 0.2:
        return draw.choice([*ODD, *TEXTS, *WHOLE, *REAL])
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return draw.choice(WHOLE)
    if isinstance(default, float):
        return draw.choice(REAL)
    if isinstance(default, str):
        return draw.choice(TEXTS)
    if isinstance(default, list | tuple) and default:
        entries = [value_for(entry, draw) if draw.random() < 0.5 else entry for entry in default]
        return draw.choice([entries, entries[:1], [*entries, *entries], [], default * 2])
    return draw.choice([[], TEXTS[:2], WHOLE[:4], REAL[:4], [[]]])


def plain(value: object) -> object:
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def write(folder: Path, key: str, value: object) -> str:
    base = next(
        (name for start, name in configs().items() if key.startswith(start)), "sample/faster_rcnn_SGE_R_50_FPN.yaml"
    )
    content: dict = {"_BASE_": os.path.abspath(get_config_file(base))}
    node = content
    *path, last = key.split(".")
    for name in path:
        node = node.setdefault(name, {})
    node[last] = plain(value)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True))
    return str(file)


def case(folder: Path, datasets: list, key: str, value: object, tally: Counter) -> None:
    tiny = ["OUTPUT_DIR", str(folder / "out")] if key != "OUTPUT_DIR" else []
    for own, small in (("INPUT.MIN_SIZE_TRAIN", "(64,)"), ("INPUT.MIN_SIZE_TEST", "64"), ("SOLVER.IMS_PER_BATCH", "2")):
        tiny += [own, small] if own != key else []
    try:
        cfg = setup_config(write(folder, key, value), tiny, datasets)
    except UserError as error:
        assert len(str(error)) < 2000, "a sentence, no book"
        tally["refused"] += 1
        return
    if key == "OUTPUT_DIR":
        cfg.OUTPUT_DIR = str(folder / "out")
    try:
        step(cfg)
    except UserError:
        tally["taken, refused in training"] += 1
        return
    tally["taken"] += 1


def step(cfg) -> None:
    """One iteration and one detection."""
    cfg.freeze()
    trainer = Trainer(cfg)
    trainer.iter = 0
    with EventStorage(0) as trainer.storage:
        trainer.run_step()
    # optimizers that are handed enormous rates leave no finite weights: the next step's loss tells, as the guard does
    trainer.scheduler.step()
    model = trainer.build_model(cfg).eval()
    with torch.no_grad():
        (found,) = model([{"image": torch.zeros(len(cfg.MODEL.PIXEL_MEAN), 64, 64), "height": 64, "width": 64}])
    for name, entry in found["instances"].get_fields().items():
        if isinstance(entry, torch.Tensor) and entry.is_floating_point():
            assert np.isfinite(entry.numpy()).all(), f"{name} is not finite"


def _expire(signum, frame):
    raise TimeoutError(f"more than {SECONDS} seconds")


def run(cases: int, *, keys: list[str] | None = None, seed: int = 0, first: int = 0) -> tuple[Counter, list[str]]:
    """The tally of ``cases`` cases, as many of each key as of any other, and a line for each that went wrong.

    Those before ``first`` are passed over, so that a run can be cut into pieces.
    """
    draw = random.Random(seed)
    defaults = default_values()
    keys = sorted(keys or defaults)
    tally: Counter = Counter()
    wrong = []
    before = signal.signal(signal.SIGALRM, _expire)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_sample_coco(folder / "set", train=4, val=2, size=64, seed=0)
        datasets = [
            (f"fuzz_{split}", str(folder / f"set/annotations/instances_{split}.json"), str(folder / f"set/{split}"))
            for split in ("train", "val")
        ]
        try:
            for number in range(cases):
                key = keys[number % len(keys)]
                value = value_for(defaults[key], draw)
                if number < first:
                    continue
                signal.alarm(SECONDS)
                try:
                    case(folder, datasets, key, value, tally)
                except Exception as error:
                    wrong.append(f"{key} {value!r:.80}: {type(error).__name__}: {str(error)[:200]}")
                finally:
                    signal.alarm(0)
        finally:
            signal.signal(signal.SIGALRM, before)
    return tally, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="N", help="pass over the N cases before")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tally, wrong = run(args.cases, seed=args.seed, first=args.first)
    print("\n".join(wrong))
    print(
        f"{sum(tally.values()) + len(wrong)} cases:",
        ", ".join(f"{count} {what}" for what, count in sorted(tally.items())),
    )
    print(f"{len(wrong)} ended in errors that are not ours")
    sys.exit(bool(wrong))
