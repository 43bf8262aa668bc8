"""Pictures of detections and of what SGE does: drawn here, from arrays, by whoever has them.

Everything is safe for colour-blind readers: Okabe and Ito's colours for classes and lines, perceptually uniform maps
(inferno, viridis) for values.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps, get_data_path, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from ..modeling.gates import LayerMaps

# Okabe and Ito's palette.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Large enough to be read at half the size.
_STYLE = rc_context({"font.size": 13, "axes.titlesize": 13, "font.family": "DejaVu Sans"})
_WIDTH = 12.0  # inches
_DPI = 110
_GATES, _ACTIVATION = "inferno", "viridis"
# Of the image under gates.
_OPACITY = 0.65
# Where all gates start, with MODEL.SGE.INIT as the paper has it.
_START = 1 / (1 + math.exp(-1))
# Groups that are shown in rows of four; more go in rows of eight.
_FEW_GROUPS = 16
# Detections in figures: the longer side of the drawing in pixels, and the size of its labels in points.
_DRAWN_SIDE, _LABELS = 500, 17
_FONT = str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))  # comes with matplotlib


def draw_detections(
    image: np.ndarray, instances: Instances, names: Sequence[str], scale: float = 1.0, text: float = 0.0
) -> np.ndarray:
    """Draws boxes, masks where there are any, classes and scores on an image; a class has one colour everywhere.

    Args:
        image: (H, W, 3), uint8, RGB.
        instances: Detectron2's, on the CPU, in pixels of the image.
        names: of the classes.
        scale: of the drawing to the image.
        text: size of the labels in points of the drawing; by default Detectron2's choice.

    Returns:
        (H * scale, W * scale, 3), uint8, RGB.
    """
    canvas = Visualizer(image, scale=scale)
    if text:
        canvas._default_font_size = text / scale
    colors = [COLORS[number % len(COLORS)] for number in instances.pred_classes.tolist()]
    canvas.overlay_instances(
        boxes=instances.pred_boxes,
        masks=list(instances.pred_masks.numpy()) if instances.has("pred_masks") else None,
        assigned_colors=colors,
        alpha=0.35,
    )
    height, width = image.shape[:2]
    lowest = height - 1.6 * canvas._default_font_size  # where Detectron2 would let the label run out of the image
    found = zip(instances.pred_boxes.tensor.tolist(), instances.pred_classes.tolist(), instances.scores)
    for (left, top, right, _), number, score in found:
        is_left = left + right <= width
        place = (max(left, 0) if is_left else min(right, width), min(max(top, 0), lowest))
        side = "left" if is_left else "right"
        canvas.draw_text(f"{names[number]} {score:.0%}", place, color="white", horizontal_alignment=side)
    return canvas.output.get_image()


def overlay(image: np.ndarray, values: np.ndarray, covers: tuple[float, float], low: float, high: float) -> np.ndarray:
    """Lays a map over an image, in the colours of the gates.

    Args:
        image: (H, W, 3), uint8, RGB.
        values: (h, w).
        covers: (width, height) in pixels of the image that the map covers; they begin together.
        low, high: the values of the darkest and the brightest colour.

    Returns:
        (H, W, 3), uint8, RGB.
    """
    height, width = image.shape[:2]
    size = (max(round(covers[0]), width), max(round(covers[1]), height))
    upsampled = cv2.resize(values.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)[:height, :width]
    share = (upsampled - low) / max(high - low, 1e-6)
    colors = colormaps[_GATES](np.clip(share, 0, 1))[..., :3] * 255
    return np.rint(_OPACITY * colors + (1 - _OPACITY) * _grey(image)).astype(np.uint8)


def _grey(image: np.ndarray) -> np.ndarray:
    return np.repeat((image @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)


@dataclass(frozen=True)
class View:
    """What a detector makes of an image.

    Attributes:
        name: of the detector or its weights.
        image: (H, W, 3), uint8, RGB.
        instances: the detections, on the CPU.
        maps: of one SGE layer.
    """

    name: str
    image: np.ndarray
    instances: Instances
    maps: LayerMaps


@_STYLE
def attention_figure(views: Sequence[View], groups: Sequence[int], names: Sequence[str], title: str) -> bytes:
    """What an SGE layer does on an image, as PNG.

    Detections; the mean activation before and after SGE, on one colour scale; the distribution of the gates; the gates
    of some groups over the image, on one colour scale.

    Args:
        views: of one image and one layer; of one detector, or of two that are to be compared.
        groups: whose gates are shown.
        names: of the classes.
        title: the first line.
    """
    letters = ["A: ", "B: "][: len(views)] if len(views) > 1 else [""]
    few = len(groups) * len(views) <= _FEW_GROUPS
    columns = 4 if few else 8
    pairs = [(view, letter, group) for group in groups for view, letter in zip(views, letters, strict=True)]
    ratio = min(max(views[0].image.shape[0] / views[0].image.shape[1], 0.35), 2.0)
    rows = -(-len(pairs) // columns)
    heights = [
        len(views) * (_WIDTH / 4 * ratio + 0.35) + 1.05,  # with the colour bar
        rows * ((_WIDTH - 1) / columns * ratio + (0.4 if few else 0.35)),
    ]
    lines = [title, *(f"{letter}{view.name}" for view, letter in zip(views, letters, strict=True))]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.3 * len(lines)), dpi=_DPI, layout="constrained")
    figure.suptitle("\n".join(lines), fontsize=14)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    _summary(above, views, letters, groups, names)

    chosen = [view.maps.gates[groups] for view in views]
    norm = Normalize(float(min(gates.min() for gates in chosen)), float(max(gates.max() for gates in chosen)))
    axes = below.subplots(rows, columns, squeeze=False).ravel()
    for ax, (view, letter, group) in zip(axes, pairs, strict=False):
        ax.imshow(_grey(view.image).astype(np.uint8), extent=_extent(view.image))
        gates = view.maps.gates[group]
        shown = _map(ax, view, gates, _GATES, norm, alpha=_OPACITY)
        ax.set_title(f"{letter}group {group}, sd {gates.std():.3f}" if few else f"{letter}{group}", fontsize=12)
    for ax in axes[len(pairs) :]:
        ax.axis("off")
    bar = below.colorbar(shown, ax=axes, location="right", aspect=30, fraction=0.04, pad=0.01)
    bar.set_label("gate (0-1)")
    return _png(figure)


def _summary(
    figure: SubFigure, views: Sequence[View], letters: Sequence[str], groups: Sequence[int], names: Sequence[str]
) -> None:
    """The detections, the activations before and after, and the distribution of the gates."""
    grid = figure.add_gridspec(len(views), 4)
    if len(views) > 1:
        places = [(grid[0, number], grid[1, 2 * number], grid[1, 2 * number + 1]) for number in range(2)]
        last = grid[0, 2:]
    else:
        places, last = [(grid[0, 0], grid[0, 1], grid[0, 2])], grid[0, 3]
    every = [maps for view in views for maps in (view.maps.before, view.maps.after)]
    norm = Normalize(float(min(maps.min() for maps in every)), float(max(maps.max() for maps in every)))
    flat = []
    for view, letter, (detections, *maps) in zip(views, letters, places, strict=True):
        ax = figure.add_subplot(detections)
        _detections(ax, view, names)
        ax.set_title(f"{letter}detections")
        for place, values, when in zip(maps, (view.maps.before, view.maps.after), ("before", "after"), strict=True):
            flat.append(figure.add_subplot(place))
            shown = _map(flat[-1], view, values, _ACTIVATION, norm)
            flat[-1].set_title(f"{letter}activation {when} SGE")
    bar = figure.colorbar(shown, ax=flat, location="bottom", shrink=0.9, aspect=40, pad=0.02)
    bar.locator = MaxNLocator(5)
    bar.set_label("mean over channels")
    _distribution(figure.add_subplot(last), views, letters, groups)


def _detections(ax: Axes, view: View, names: Sequence[str]) -> None:
    scale = _DRAWN_SIDE / max(view.image.shape[:2])
    ax.imshow(draw_detections(view.image, view.instances, names, scale, _LABELS), extent=_extent(view.image))
    _bare(ax)


def _map(ax: Axes, view: View, values: np.ndarray, colors: str, norm: Normalize, alpha: float = 1.0) -> AxesImage:
    width, height = view.maps.covers
    shown = ax.imshow(
        values, cmap=colors, norm=norm, alpha=alpha, extent=(0, width, height, 0), interpolation="bilinear"
    )
    # the map may reach into the padding
    right, bottom = _extent(view.image)[1:3]
    ax.set_xlim(0, right)
    ax.set_ylim(bottom, 0)
    _bare(ax)
    return shown


def _extent(image: np.ndarray) -> tuple[float, float, float, float]:
    return 0, image.shape[1], image.shape[0], 0


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_anchor("N")


def _distribution(ax: Axes, views: Sequence[View], letters: Sequence[str], groups: Sequence[int]) -> None:
    everything = np.concatenate([view.maps.gates.ravel() for view in views])
    low, high = min(everything.min(), _START), max(everything.max(), _START)
    room = max((high - low) * 0.05, 0.01)
    edges = np.linspace(low - room, high + room, 41)
    for view, letter, color in zip(views, letters, COLORS[:2], strict=False):
        for gates, style in (
            (view.maps.gates, {"histtype": "stepfilled", "alpha": 0.35, "label": f"{letter}all groups"}),
            (view.maps.gates[groups], {"histtype": "step", "lw": 2, "label": f"{letter}shown groups"}),
        ):
            weights = np.full(gates.size, 100 / gates.size)
            ax.hist(gates.ravel(), bins=edges, weights=weights, color=color, **style)
    ax.axvline(_START, color="black", ls="--", lw=1.2, label="start, sigmoid(1)")
    ax.set_title("distribution of gates")
    ax.set_xlabel("gate")
    ax.set_ylabel("share of positions (%)")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_ylim(top=ax.get_ylim()[1] * 1.45)
    ax.legend(fontsize=10, loc="upper left", frameon=False, handlelength=1.2, borderaxespad=0.1)


@dataclass(frozen=True)
class Block:
    """An SGE layer over a data set.

    Attributes:
        label: "res5.2".
        gamma, beta: of all groups, (G,).
        mean, sd: of the gates (0-1) over positions, groups and images.
        spatial_sd: the root of the mean variance of the gates within a map.
    """

    label: str
    gamma: np.ndarray
    beta: np.ndarray
    mean: float
    sd: float
    spatial_sd: float


@_STYLE
def blocks_figure(blocks: Sequence[Block], title: str) -> bytes:
    """Where in a network SGE works, as PNG: for each block the gates' mean and spread and the learnt gamma and beta."""
    figure = Figure(figsize=(_WIDTH, 11), dpi=_DPI, layout="constrained")
    figure.suptitle(title, fontsize=14)
    gates, spread, gamma, beta = figure.subplots(4, 1, sharex=True)
    places = np.arange(len(blocks))
    stages = [block.label.split(".")[0] for block in blocks]
    known = list(dict.fromkeys(stages))
    colors = [COLORS[known.index(stage) % len(COLORS)] for stage in stages]
    for place, block, color in zip(places, blocks, colors, strict=True):
        gates.errorbar(place, block.mean, block.sd, fmt="o", color=color, ms=8, capsize=4, lw=2)
        spread.bar(place, block.spatial_sd, width=0.6, color=color)
        for ax, values in ((gamma, block.gamma), (beta, block.beta)):
            # a fixed sideways shift keeps equal values apart
            sideways = np.linspace(-0.22, 0.22, len(values))
            ax.plot(place + sideways, values, ".", color=color, ms=5, alpha=0.7)
            ax.plot([place - 0.33, place + 0.33], [values.mean()] * 2, color="black", lw=2)
    gates.axhline(_START, color="black", ls="--", lw=1)
    beta.axhline(1, color="black", ls="--", lw=1)
    gamma.axhline(0, color="black", ls="--", lw=1)
    for ax, label, what in (
        (gates, "gate (0-1)", "gates: mean ± standard deviation over positions, groups and images"),
        (spread, "gate", "what of it is attention: standard deviation of the gates over the positions of a map"),
        (gamma, "gamma", "learnt gamma, a dot for each group; black: mean"),
        (beta, "beta", "learnt beta, a dot for each group; black: mean"),
    ):
        ax.set_ylabel(label)
        ax.set_title(what, loc="left")
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        for place in places[1:]:
            if stages[place] != stages[place - 1]:
                ax.axvline(place - 0.5, color="#bbbbbb", lw=1)
    beta.set_xticks(places, [block.label for block in blocks], rotation=0 if len(blocks) <= 16 else 90)
    beta.set_xlim(-0.6, len(blocks) - 0.4)
    beta.set_xlabel("block, from the image upwards; dashed: the start of training")
    return _png(figure)


def captioned(panels: Sequence[tuple[np.ndarray, str]]) -> np.ndarray:
    """Panels of equal size beside one another, each under its line of text; sides even, as video codecs want them.

    Args:
        panels: (H, W, 3), uint8, RGB, with a text.
    """
    height, width = panels[0][0].shape[:2]
    font = _fitting_font([text for _, text in panels], width)
    gap, head = max(width // 80, 2), sum(font.getmetrics()) + 4
    canvas = Image.new("RGB", (len(panels) * (width + gap) - gap, height + head), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (panel, text) in enumerate(panels):
        left = place * (width + gap)
        canvas.paste(Image.fromarray(panel), (left, head))
        draw.text((left + 2, head - 4), text, fill="black", font=font, anchor="ls")
    return even(np.asarray(canvas))


def _fitting_font(texts: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """A font in which each text fits into ``width`` pixels, but readable all the same."""
    for size in range(max(width // 28, 11), 8, -1):
        font = ImageFont.truetype(_FONT, size)
        if max(map(font.getlength, texts)) <= width - 4:
            break
    return font


def even(image: np.ndarray) -> np.ndarray:
    """The image with an even height and width, as video codecs want it; a row or column is repeated where needed."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
