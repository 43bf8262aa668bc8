"""Figures of SGE's gates: for images, and over a data set."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from ..checkpoint.checkpointer import check_weights_path
from ..data.loader import build_test_loader
from ..errors import UserError
from ..files import make_folder, write_file, write_json
from ..modeling.gates import blocks, choose_groups, find_layer, gate_statistics, required_layers, sge_layers
from .figures import Block, View, attention_figure, blocks_figure
from .inputs import common_folder, is_video
from .predictor import Predictor, Unreadable, categories, with_confidence

BLOCKS_FIGURE, BLOCKS_FILE = "blocks.png", "blocks.json"


def visualize_images(
    cfg: CfgNode,
    files: Sequence[Path],
    output: Path,
    *,
    stage: str = "res5",
    block: int = -1,
    groups: str = "top:8",
    compare_weights: str = "",
    confidence: float = 0.5,
) -> tuple[list[Path], dict[Path, str]]:
    """Writes a figure of an SGE layer for each image into ``output``: see :func:`.figures.attention_figure`.

    Args:
        cfg: from :func:`.predictor.setup_prediction`.
        files: images.
        output: a folder.
        stage, block: of the layer, as in :func:`.modeling.gates.find_layer`.
        groups: as in :func:`.modeling.gates.choose_groups`; chosen by the gates of ``MODEL.WEIGHTS``.
        compare_weights: weights of the same model, which are shown beside ``MODEL.WEIGHTS``; none by default.
        confidence: least score of detections, 0-1.

    Returns:
        the figures, and the files that could not be read, each with the reason.

    Raises:
        UserError: something that the user can put right.
    """
    videos = [file for file in files if is_video(file)]
    if videos:
        raise UserError(f"--input {videos[0]} is a video: give images, or draw it with tools/predict.py --attention")
    cfg = with_confidence(cfg, confidence)
    weights = [cfg.MODEL.WEIGHTS]
    other = cfg.clone()
    if compare_weights:
        check_weights_path(compare_weights, "--compare-weights", "")
        other.MODEL.WEIGHTS = compare_weights
        weights.append(compare_weights)
    names = [entry["name"] for entry in categories(cfg)]
    predictors = [Predictor(cfg), *([Predictor(other)] if compare_weights else [])]
    for predictor in predictors:
        predictor.layer = find_layer(predictor.model, stage, block)
    layer = sge_layers(predictors[0].model)[predictors[0].layer]
    choose_groups(groups, np.zeros((layer.groups, 1, 1)))  # a wrong --groups is told before any image is worked on
    make_folder(output)
    figures, faults = [], {}
    for file, target in tqdm(list(zip(files, _figure_files(files, output), strict=True)), unit="image"):
        views = []
        try:
            image = predictors[0].read(file)
        except Unreadable as error:
            faults[file] = str(error)
            continue
        for predictor, name in zip(predictors, weights, strict=True):
            instances, maps = predictor.look(image)
            views.append(View(name, predictor.rgb(image), instances, maps))
        maps = views[0].maps
        chosen = choose_groups(groups, maps.gates)
        title = (
            f"{file.name}: SGE of {maps.label}, {layer.groups} groups, maps of {maps.before.shape[0]}x"
            f"{maps.before.shape[1]}, stride {maps.stride}"
        )
        target = target.with_name(f"{target.name}_{maps.label}.png")
        write_file(target, attention_figure(views, chosen, names, title))
        figures.append(target)
    return figures, faults


def _figure_files(files: Sequence[Path], output: Path) -> list[Path]:
    """The figures' paths without ending: the images' own, without theirs where that does not make two alike."""
    root = common_folder(files)
    names = [output / file.absolute().relative_to(root) for file in files]
    bare = [name.with_suffix("") for name in names]
    return [short if bare.count(short) == 1 else name for short, name in zip(bare, names, strict=True)]


def block_statistics(model: nn.Module, loader, *, images: int | None = None) -> list[Block]:
    """What each SGE layer of a detector does over images; shows its progress.

    Args:
        model: a Detectron2 detector with SGE.
        loader: batches as Detectron2's test loaders give them.
        images: as many batches at most; all by default.

    Raises:
        UserError: the model has no SGE.
    """
    layers = required_layers(model)
    labels = blocks(model)
    total = len(loader) if images is None else min(images, len(loader))
    batches = tqdm(islice(loader, total), desc="gates of all blocks", unit="batch", total=total)
    statistics = gate_statistics(model, batches, per_block=True)
    return [
        Block(
            labels[name],
            gamma=layer.weight.detach().flatten().cpu().numpy(),
            beta=layer.bias.detach().flatten().cpu().numpy(),
            **statistics[labels[name]]["gate"],
        )
        for name, layer in layers.items()
    ]


def visualize_dataset(cfg: CfgNode, output: Path, *, images: int | None = None) -> list[Block]:
    """Writes ``blocks.png`` and ``blocks.json``, all SGE layers over the first of ``DATASETS.TEST``, into ``output``.

    Args:
        cfg: from :func:`.engine.training.setup_config`, with ``eval_only``.
        output: a folder.
        images: the first so many at most; all by default.

    Returns:
        what the figure shows.

    Raises:
        UserError: something that the user can put right.
    """
    if not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: name a data set, or give one with --dataset NAME JSON IMAGES")
    if images is not None and images < 1:
        raise UserError(f"--limit must be at least 1, got {images}")
    predictor = Predictor(cfg)
    required_layers(predictor.model)
    make_folder(output)
    name = cfg.DATASETS.TEST[0]
    loader = build_test_loader(cfg, name, alone=True)
    found = block_statistics(predictor.model, loader, images=images)
    count = len(loader) if images is None else min(images, len(loader))
    title = f"SGE over {count} images of {name}\n{cfg.MODEL.WEIGHTS}"
    write_file(output / BLOCKS_FIGURE, blocks_figure(found, title))
    record = {
        block.label: {
            "gate": {"mean": block.mean, "sd": block.sd, "spatial_sd": block.spatial_sd},
            "gamma": block.gamma.tolist(),
            "beta": block.beta.tolist(),
        }
        for block in found
    }
    write_json(output / BLOCKS_FILE, {"dataset": name, "images": count, "blocks": record})
    return found
