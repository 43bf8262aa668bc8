"""The pointing game: do the groups' strongest positions lie in objects, and do SGE's gates open there?

Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, play it with saliency maps; here each
channel group of each SGE layer plays it with three maps: its mean activation before SGE, the same after SGE, and the
gate of eq. 5 itself.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from ..data.annotations import read_annotations
from ..data.loader import build_test_loader
from ..errors import UserError
from ..evaluation.bootstrap import image_weights
from ..layers.sge import SpatialGroupEnhance
from ..modeling.gates import evaluating, map_stride, observe, required_layers, stage_of

# COCO's sizes: least and largest area of an object in pixels of the original image, both inclusive.
SIZES = {
    "all": (0.0, math.inf),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, math.inf),
}
SHAPES = {"bbox": "box", "segm": "mask"}
CONFIDENCE = 0.95
_BOOTSTRAP_SAMPLES = 1000

# What an image yields for a stage and a size, in this order.
_CHANCE, _BEFORE, _AFTER, _GATE, _GATE_INSIDE, _GATE_OUTSIDE = range(6)


class Objects:
    """The annotated objects of a data set.

    Attributes:
        shapes: "bbox", and "segm" where every object has a mask.

    Args:
        json_file: COCO instance annotations.

    Raises:
        UserError: they cannot be read, or there is no object in them (crowd regions are none).
    """

    def __init__(self, json_file: str | Path):
        annotations = read_annotations(json_file)
        content = annotations.content
        self._of_image: dict[int, list[dict]] = {}
        for entry in content["annotations"]:
            self._of_image.setdefault(entry["image_id"], []).append(entry)
        objects = [entry for entry in content["annotations"] if not entry.get("iscrowd")]
        if not objects:
            raise UserError(f"{json_file} has no objects, so there is nothing to point at")
        self.shapes = [shape for shape in SHAPES if shape == "bbox" or all(o.get("segmentation") for o in objects)]
        self._coco = annotations.coco

    def has_any(self, image_id: int) -> bool:
        """Whether there is an object, other than a crowd region, on the image."""
        return any(not entry.get("iscrowd") for entry in self._of_image.get(image_id, []))

    def regions(self, image_id: int, shape: str, ys: np.ndarray, xs: np.ndarray) -> dict[str, np.ndarray]:
        """Which points of a grid lie in objects.

        As COCO ignores them, points in crowd regions alone, and for a size those in objects of other sizes alone,
        count neither as inside nor as outside.

        Args:
            shape: "bbox" or "segm".
            ys, xs: the grid's coordinates, (H,) and (W,), in pixels of the original image; pixel k covers [k, k + 1).

        Returns:
            "outside": (H, W), where there is neither object nor crowd; and for each of ``SIZES``: (H, W), in an object
            of that size.
        """
        covers = [(entry, self._cover(entry, shape, ys, xs)) for entry in self._of_image[image_id]]
        nothing = np.zeros((len(ys), len(xs)), dtype=bool)
        regions = {"outside": ~np.logical_or.reduce([nothing, *(cover for _, cover in covers)])}
        for size, (least, most) in SIZES.items():
            fitting = [c for entry, c in covers if not entry.get("iscrowd") and least <= entry["area"] <= most]
            regions[size] = np.logical_or.reduce([nothing, *fitting])
        return regions

    def _cover(self, entry: dict, shape: str, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
        if shape == "segm" and entry.get("segmentation"):
            mask = self._coco.ann_to_mask(entry).astype(bool)
            return mask[np.ix_(ys.astype(int), xs.astype(int))]
        x, y, width, height = entry["bbox"]
        return np.outer((y <= ys) & (ys < y + height), (x <= xs) & (xs < x + width))


def cell_centres(cells: int, padded: int, resized: int, original: int) -> np.ndarray:
    """Where the cells of a map lie along one axis of the original image.

    With the stride of :func:`.modeling.gates.map_stride` cell i covers the pixels [i * stride, (i + 1) * stride) of the
    resized image, as in Detectron2's ROIAlign, and its centre lies at (i + 0.5) * stride.

    Args:
        cells: of the map.
        padded, resized, original: pixels of the image as the backbone sees it, before its padding, and in the file.

    Returns:
        the centres in pixels of the original image (pixel k covers [k, k + 1)), of the cells whose centre is not in
        the padding.
    """
    centres = (np.arange(cells) + 0.5) * map_stride(cells, padded)
    return centres[centres < resized] * original / resized


def pointing_share(maps: Tensor, inside: Tensor, outside: Tensor) -> float:
    """The share of maps whose strongest position is inside.

    Where several positions are equally strong, the share of them that is inside counts; a constant map so has the
    share of chance.

    Args:
        maps: (G, P) values at P positions.
        inside, outside: indices of positions; what is in neither does not count.
    """
    within, without = maps[:, inside], maps[:, outside]
    top = torch.maximum(within.amax(1), without.amax(1)).unsqueeze(1)
    hits, misses = (within == top).sum(1), (without == top).sum(1)
    return (hits / (hits + misses)).mean().item()


@dataclass
class _Image:
    """What the layers show on one image: for each (shape, stage, size) a row for each layer."""

    objects: Objects
    id: int
    padded: tuple[int, int]
    resized: tuple[int, int]
    original: tuple[int, int]
    rows: dict[tuple[str, str, str], list[list[float]]] = field(default_factory=dict)
    _grids: dict[tuple[int, int], tuple[int, int, dict]] = field(default_factory=dict)

    def see(self, stage: str, gates: Tensor, before: Tensor) -> None:
        """Plays with a layer's ``gates`` and ``before``, the groups' mean activations, both (G, H, W)."""
        size = tuple(gates.shape[1:])
        if size not in self._grids:
            self._grids[size] = self._grid(size, gates.device)
        height, width, regions = self._grids[size]
        gates, before = (maps[:, :height, :width].flatten(1) for maps in (gates, before))
        after = before * gates
        for (shape, name), (inside, outside) in regions.items():
            row = [len(inside) / (len(inside) + len(outside))]
            row += [pointing_share(maps, inside, outside) for maps in (before, after, gates)]
            row += [gates[:, indices].double().mean().item() for indices in (inside, outside)]
            self.rows.setdefault((shape, stage, name), []).append(row)

    def _grid(self, size: tuple[int, int], device: torch.device) -> tuple[int, int, dict]:
        ys, xs = (cell_centres(*axis) for axis in zip(size, self.padded, self.resized, self.original, strict=True))
        found = {}
        for shape in self.objects.shapes:
            regions = self.objects.regions(self.id, shape, ys, xs)
            outside = torch.from_numpy(np.flatnonzero(regions.pop("outside"))).to(device)
            for name, region in regions.items():
                inside = torch.from_numpy(np.flatnonzero(region)).to(device)
                if len(inside) and len(outside):
                    found[shape, name] = inside, outside
        return len(ys), len(xs), found


def play(model: nn.Module, loader: Iterable[list[dict]], objects: Objects, limit: int | None = None) -> dict:
    """Plays the pointing game with all SGE layers of a detector; shows its progress.

    The backbone alone runs, in evaluation mode. An image counts for a stage and a size if at least one position of
    the stage's maps lies in such an object and one outside of all; images without objects are passed over. Layers and
    groups count alike within an image, and images count alike.

    Args:
        model: a Detectron2 detector with SGE.
        loader: batches as Detectron2's test loaders give them.
        objects: of these images.
        limit: as many images with objects at most, the first of ``loader``; all by default.

    Returns:
        ``{"images": n, "without_objects": m, "bbox": {"res2": {"all": {"images": k, "chance": {"mean", "low", "high"},
        ...}, "small": ...}, ...}, "segm": ...}``. Shares lie in 0-1: ``chance`` is the share of positions that lie in
        objects, ``before`` and ``after`` are the shares of groups whose mean activation before and after SGE is
        strongest in an object, ``gate`` those whose gate is; ``after_minus_before`` and ``gate_minus_chance`` their
        differences on the same images; ``gate_ratio`` the mean gate inside over that outside (1 without SGE). ``low``
        and ``high`` are 95% bootstrap intervals over the images. NaN where no image counts.

    Raises:
        UserError: the model has no SGE, or there is no object on any image.
    """
    layers = required_layers(model)
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    images: list[_Image] = []
    passed, count = 0, 0
    rows: dict[tuple[str, str, str], list[np.ndarray]] = {}

    def see(name: str, layer: SpatialGroupEnhance, x: Tensor) -> None:
        gates = layer.gates(x)
        before = x.to(gates.dtype).unflatten(1, (layer.groups, -1)).mean(2)
        for image, *maps in zip(images, gates, before, strict=True):
            image.see(stage_of(name), *maps)

    total = len(loader) if hasattr(loader, "__len__") else None
    with observe(model, see), evaluating(model):
        for batch in tqdm(loader, desc="pointing game", unit="batch", total=total, leave=False):
            used = [entry for entry in batch if objects.has_any(entry["image_id"])]
            passed += len(batch) - len(used)
            used = used[: None if limit is None else limit - count]
            if used:
                tensor = model.preprocess_image(used).tensor
                images[:] = [
                    _Image(
                        objects,
                        entry["image_id"],
                        padded=tuple(tensor.shape[-2:]),
                        resized=tuple(entry["image"].shape[-2:]),
                        original=(entry["height"], entry["width"]),
                    )
                    for entry in used
                ]
                model.backbone(tensor)
                for image in images:
                    for key, of_layers in image.rows.items():
                        rows.setdefault(key, []).append(np.mean(of_layers, axis=0))
                count += len(used)
            if count == limit:
                break
    if not count:
        raise UserError("there is no object on any of these images, so there is nothing to point at")
    result: dict = {"images": count, "without_objects": passed}
    stages = list(dict.fromkeys(map(stage_of, layers)))
    for shape in objects.shapes:
        result[shape] = {
            stage: {size: _summary(rows.get((shape, stage, size), [])) for size in SIZES} for stage in stages
        }
    return result


def _summary(rows: Sequence[np.ndarray]) -> dict:
    table = np.array(rows).reshape(-1, 6)
    count = len(table)
    if not count:
        return {"images": 0} | {name: dict.fromkeys(("mean", "low", "high"), math.nan) for name in _figures(np.ones(6))}
    drawn = image_weights(count, _BOOTSTRAP_SAMPLES) / count
    means, samples = _figures(table.mean(0)), _figures(drawn @ table)
    tail = (1 - CONFIDENCE) / 2
    summary: dict = {"images": count}
    for name, mean in means.items():
        low, high = np.quantile(samples[name], (tail, 1 - tail)) if count > 1 else (math.nan, math.nan)
        summary[name] = {"mean": float(mean), "low": float(low), "high": float(high)}
    return summary


def _figures(means: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of :func:`play` from the means over images, (..., 6)."""
    columns = np.moveaxis(means, -1, 0)
    return {
        "chance": columns[_CHANCE],
        "before": columns[_BEFORE],
        "after": columns[_AFTER],
        "gate": columns[_GATE],
        "after_minus_before": columns[_AFTER] - columns[_BEFORE],
        "gate_minus_chance": columns[_GATE] - columns[_CHANCE],
        "gate_ratio": columns[_GATE_INSIDE] / columns[_GATE_OUTSIDE],
    }


def pointing_game(cfg: CfgNode, model: nn.Module, limit: int | None = None) -> dict:
    """Plays the pointing game on the first of ``cfg.DATASETS.TEST``; see :func:`play`.

    Raises:
        UserError: the model has no SGE, the data set is not one in COCO's format, or it has no objects.
    """
    required_layers(model)
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set, or give one with --dataset NAME JSON IMAGES")
    name = cfg.DATASETS.TEST[0]
    json_file = MetadataCatalog.get(name).get("json_file")
    if json_file is None:
        raise UserError(f"the data set {name} is not one in COCO's format: it has no annotation file")
    return play(model, build_test_loader(cfg, name, alone=True), Objects(json_file), limit)


HEADER = (
    *("images", "chance", "before SGE", "after SGE", "gate"),
    *("after - before", "gate - chance", "gate inside / outside"),
)


def pointing_row(runs: Sequence[dict]) -> list[str]:
    """The texts under ``HEADER`` for a stage and a size: shares in per cent.

    Args:
        runs: the figures of one run, shown with their intervals over the images, or of several on the same images,
            shown as mean and standard deviation over the runs.
    """
    images = runs[0]["images"]
    if not images:
        return ["0", *("absent",) * (len(HEADER) - 1)]

    def text(name: str, digits: str, factor: float = 1, *, interval: bool = False) -> str:
        figures = [run[name] for run in runs]
        values = [figure["mean"] * factor for figure in figures]
        shown = f"{np.mean(values):{digits}}"
        if len(runs) > 1:
            return shown if name == "chance" else f"{shown} ± {np.std(values, ddof=1):{digits.lstrip('+')}}"
        low, high = figures[0]["low"], figures[0]["high"]
        # JSON has null for NaN
        if not interval or low is None or math.isnan(low):
            return shown
        return f"{shown} ({low * factor:{digits}} to {high * factor:{digits}})"

    shares = [text(name, ".1f", 100) for name in ("chance", "before", "after", "gate")]
    differences = [text(name, "+.1f", 100, interval=True) for name in ("after_minus_before", "gate_minus_chance")]
    return [str(images), *shares, *differences, text("gate_ratio", ".3f", interval=True)]


EXPLANATION = (
    "Shares of groups (%) whose strongest position lies in an object: of their mean activation before SGE and after "
    "it, and of the gate alone. Chance is the share of all positions that lie in objects. Differences are in "
    "percentage points; without SGE the last column is 1. Positions in crowd regions, and for a size in objects of "
    "other sizes alone, do not count; nor does an image on which no position of the stage's map lies in such an object."
)
OVER_IMAGES = " In parentheses: 95% bootstrap intervals over the images."
OVER_SEEDS = " Mean ± standard deviation over the seeds."


def pointing_report(result: dict) -> str:
    """What :func:`play` found, as Markdown."""
    parts = [f"{result['images']} images with objects; {result['without_objects']} without were passed over."]
    for shape, title in SHAPES.items():
        if shape not in result:
            continue
        rows = [
            [f"{stage}, {size}", *pointing_row([figures])]
            for stage, sizes in result[shape].items()
            for size, figures in sizes.items()
        ]
        align = ("left", *("right",) * len(HEADER))
        header = [f"in an object's {title}", *HEADER]
        parts.append(tabulate(rows, header, tablefmt="github", colalign=align, disable_numparse=True))
    return "\n\n".join([*parts, EXPLANATION + OVER_IMAGES])
