"""The drawings of the sample set: objects put together from parts, distractors, backgrounds, and the camera."""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_NATIVE_SIZE = 192  # The longer image side, in pixels, at which the object areas below hold.
_SUPERSAMPLING = 3
_EMPTY_EVERY = 20  # One image in 20 has no object, and one in 20 has a crowd.
# Objects keep at least this part of their silhouette visible, so that no unlabelled sliver is drawn.
_MIN_VISIBLE = 0.45
_MIN_AREA = 50  # Square pixels; what is smaller is not recognisable.

_PALETTE = [(214, 69, 65), (235, 151, 50), (244, 200, 66), (94, 170, 92), (43, 156, 150), (66, 133, 214), (92, 90, 190)]
_PALETTE += [(162, 88, 180), (222, 104, 150), (238, 236, 228), (90, 98, 112), (150, 104, 72)]
_SKIN = [(255, 219, 190), (241, 194, 155), (214, 160, 118), (172, 118, 80), (124, 80, 54)]
_HAIR = [(46, 34, 30), (92, 58, 36), (160, 104, 54), (222, 182, 96), (176, 74, 40), (186, 186, 190)]
_CLAY = [(200, 110, 74), (176, 84, 62), (224, 214, 196), (84, 124, 150), (120, 140, 104)]
_STEPS = np.linspace(0, 1, 33)
_WHITE, _INK = (250, 250, 246), (34, 32, 38)

Color = tuple[int, ...]


def _pick(rng: np.random.Generator, colors: list[Color]) -> Color:
    """A color of the list, changed a little."""
    return tuple(int(c) for c in np.clip(colors[rng.integers(len(colors))] + rng.normal(0, 9, 3), 0, 255))


def _shade(color: Color, factor: float) -> Color:
    """The color made darker (factor below 1) or lighter (above 1)."""
    target = 255 if factor > 1 else 0
    weight = abs(factor - 1)
    return tuple(int(c + (target - c) * weight) for c in color)


def _ellipse(
    cx: float, cy: float, rx: float, ry: float, turn: float = 0, start: float = 0, stop: float = 1
) -> np.ndarray:
    """Points (N, 2) of an ellipse, or of its arc from start to stop (fractions of a turn, clockwise from the right)."""
    angle = 2 * np.pi * (start + (stop - start) * _STEPS)
    x, y = rx * np.cos(angle), ry * np.sin(angle)
    return np.stack([cx + x * np.cos(turn) - y * np.sin(turn), cy + x * np.sin(turn) + y * np.cos(turn)], axis=1)


def _rounded(points: list[tuple[float, float]]) -> np.ndarray:
    """The closed polygon with its corners cut twice (Chaikin), points (4 N, 2)."""
    outline = np.array(points, dtype=float)
    for keep in (0.86, 0.75):
        ahead = np.roll(outline, -1, axis=0)
        outline = np.stack([keep * outline + (1 - keep) * ahead, (1 - keep) * outline + keep * ahead], axis=1)
        outline = outline.reshape(-1, 2)
    return outline


def _leaf(x: float, y: float, length: float, width: float, angle: float) -> np.ndarray:
    """Points (N, 2) of a leaf that grows from (x, y) towards the angle (radians)."""
    t = np.linspace(0, 1, 14)
    half = width * np.sin(np.pi * t**0.8)
    along, across = np.concatenate([t, t[::-1]]) * length, np.concatenate([half, -half[::-1]])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([x + along * cos - across * sin, y + along * sin + across * cos], axis=1)


class _Pen:
    """Draws in an object's own coordinates (x right, y down, about -1 to 1) onto a transparent image."""

    def __init__(self, scale: float, angle: float, stretch: float, flip: bool) -> None:
        """scale: pixels per unit; angle: radians; stretch: width over height; flip: mirrored left to right."""
        cos, sin = np.cos(angle), np.sin(angle)
        unit = scale * _SUPERSAMPLING
        pose = np.diag([(-1 if flip else 1) * stretch**0.5, stretch**-0.5])
        self._matrix = unit * np.array([[cos, -sin], [sin, cos]]) @ pose
        self._unit = unit
        # Whole output pixels each way, and wide enough for the corners of the turned square.
        half = int(np.ceil(scale * 1.5)) * _SUPERSAMPLING
        self._origin = np.array([half, half])
        self._image = Image.new("RGBA", (2 * half, 2 * half))
        self._draw = ImageDraw.Draw(self._image)

    def _pixels(self, points: np.ndarray) -> list[float]:
        return (np.asarray(points) @ self._matrix.T + self._origin).ravel().tolist()

    def fill(self, points: np.ndarray, color: Color, edge: float = 0.03) -> None:
        """Fills a polygon and draws its outline, edge wide, in a darker shade."""
        xy = self._pixels(points)
        self._draw.polygon(xy, fill=color)
        if edge:
            dark = _shade(color[:3], 0.5)
            self._draw.line(xy + xy[:4], fill=dark, width=max(1, round(edge * self._unit)))

    def line(self, points: np.ndarray, width: float, color: Color) -> None:
        """Draws an open line."""
        self._draw.line(self._pixels(points), fill=color, width=max(1, round(width * self._unit)), joint="curve")

    def erase(self, points: np.ndarray) -> None:
        """Makes a polygon transparent."""
        self._draw.polygon(self._pixels(points), fill=(0, 0, 0, 0))

    def patch(self) -> np.ndarray:
        """What was drawn, anti-aliased and cut to its extent: uint8 (H, W, 4), not premultiplied."""
        left, top, right, bottom = (side // _SUPERSAMPLING for side in self._image.getbbox())
        box = (left, top, right + 1, bottom + 1)
        return np.asarray(self._image.crop([_SUPERSAMPLING * side for side in box]).reduce(_SUPERSAMPLING))


def _person(pen: _Pen, rng: np.random.Generator, parts: tuple[str, ...]) -> None:
    skin, hair, shirt, hat = _pick(rng, _SKIN), _pick(rng, _HAIR), _pick(rng, _PALETTE), _pick(rng, _PALETTE)
    style = rng.choice(["short", "long", "bun", "hat"])
    if "hair" in parts and style == "long":
        pen.fill(_rounded([(-0.5, -0.8), (0.5, -0.8), (0.6, 0.5), (-0.6, 0.5)]), _shade(hair, 0.85))
    if "hair" in parts and style == "bun":
        pen.fill(_ellipse(0, -0.93, 0.2, 0.18), hair)
    if "shoulders" in parts:
        pen.fill(_rounded([(-0.14, 0), (0.14, 0), (0.17, 0.5), (-0.17, 0.5)]), _shade(skin, 0.85))
        pen.fill(
            _rounded([(-0.8, 1.05), (-0.74, 0.56), (-0.24, 0.34), (0, 0.5), (0.24, 0.34), (0.74, 0.56), (0.8, 1.05)]),
            shirt,
        )
        if rng.random() < 0.5:
            for y in (0.68, 0.86):
                pen.line([(-0.62, y), (0.62, y)], 0.07, _shade(shirt, 1.5))
        pen.line([(-0.22, 0.38), (0, 0.52), (0.22, 0.38)], 0.05, _shade(shirt, 0.6))
    if "head" in parts:
        for side in (-1, 1):
            pen.fill(_ellipse(side * 0.43, -0.24, 0.09, 0.13), skin)
        pen.fill(_ellipse(0, -0.28, 0.43, 0.5), skin)
    if "hair" in parts:
        if style == "hat":
            pen.fill(_ellipse(0, -0.44, 0.47, 0.48, start=0.5, stop=1), hat)
            pen.fill(_rounded([(-0.52, -0.54), (0.52, -0.54), (0.52, -0.38), (-0.52, -0.38)]), _shade(hat, 1.35))
            pen.fill(_ellipse(0, -0.94, 0.1, 0.1), _shade(hat, 1.35))
        else:
            fringe = [(0.46, -0.3), (0.3, -0.52), (0.1, -0.58), (-0.12, -0.5), (-0.3, -0.56), (-0.46, -0.3)]
            pen.fill(np.concatenate([_ellipse(0, -0.36, 0.47, 0.48, start=0.5, stop=1), fringe]), hair)
    if "face" in parts:
        look = rng.uniform(-0.03, 0.03)
        for side in (-1, 1):
            pen.fill(_ellipse(side * 0.27, -0.08, 0.08, 0.06), _shade(_pick(rng, [(236, 130, 120)]), 1.1), edge=0)
            pen.fill(_ellipse(side * 0.17, -0.27, 0.1, 0.095), _WHITE, edge=0.02)
            pen.fill(_ellipse(side * 0.17 + look, -0.26, 0.055, 0.06), _INK, edge=0)
            pen.line([(side * 0.08, -0.42), (side * 0.26, -0.43)], 0.045, _shade(hair, 0.8))
        if rng.random() < 0.25:
            for side in (-1, 1):
                pen.line(_ellipse(side * 0.18, -0.27, 0.15, 0.14), 0.04, _INK)
            pen.line([(-0.04, -0.28), (0.04, -0.28)], 0.04, _INK)
        pen.line([(0.01, -0.2), (0.05, -0.1), (-0.02, -0.09)], 0.035, _shade(skin, 0.65))
        if rng.random() < 0.5:
            pen.line(_ellipse(0, -0.02, 0.16, 0.11, start=0.04, stop=0.46), 0.05, (150, 40, 44))
        else:
            pen.fill(_ellipse(0, 0, 0.15, 0.12, start=0, stop=0.5), (150, 40, 44), edge=0.02)


def _car(pen: _Pen, rng: np.random.Generator, parts: tuple[str, ...]) -> None:
    paint = _pick(rng, _PALETTE)
    roof = rng.uniform(-0.6, -0.48)
    rear, front = (-0.95, 0.3) if rng.random() < 0.35 else (-0.5, 0.26)  # A van or a saloon.
    if "body" in parts:
        cabin = [(rear - 0.12, 0), (rear, roof), (front, roof), (front + 0.36, 0)]
        pen.fill(_rounded(cabin), paint)
        chassis = [(-1.02, 0.3), (-1.0, -0.06), (-0.6, -0.12), (0.55, -0.12), (0.96, 0), (1.04, 0.3)]
        pen.fill(_rounded(chassis), paint)
        pen.fill(_rounded([(-1.02, 0.2), (1.02, 0.2), (1.0, 0.33), (-1.0, 0.33)]), _shade(paint, 0.6), edge=0)
        pen.line([(-0.9, -0.04), (0.8, -0.04)], 0.035, _shade(paint, 1.4))
        pen.fill(_rounded([(0.86, -0.02), (0.98, 0), (0.98, 0.11), (0.86, 0.11)]), (255, 236, 150), edge=0.02)
        pen.fill(_rounded([(-1.0, -0.02), (-0.92, -0.02), (-0.92, 0.12), (-1.0, 0.12)]), (206, 40, 40), edge=0.02)
    if "windows" in parts:
        middle = (rear + front) / 2 + 0.05
        top, sill = roof + 0.08, -0.13
        panes = [
            [(rear + 0.02, sill), (rear + 0.08, top), (middle - 0.04, top), (middle - 0.04, sill)],
            [(middle + 0.04, sill), (middle + 0.04, top), (front - 0.02, top), (front + 0.22, sill)],
        ]
        see_through = "body" in parts and rng.random() < 0.25
        glass = _shade(_pick(rng, [(150, 196, 222), (70, 92, 112)]), 1.1)
        for pane in panes:
            if see_through:
                pen.erase(pane)
            else:
                pen.fill(pane, glass)
                (x, y), (x1, _) = pane[0], pane[-1]
                pen.line([(0.7 * x + 0.3 * x1, y - 0.02), (0.5 * x + 0.5 * x1, top + 0.04)], 0.05, _shade(glass, 1.5))
    if "body" in parts:
        pen.line([(0.0, -0.1), (0.0, 0.2)], 0.025, _shade(paint, 0.55))
        pen.line([(-0.16, -0.01), (-0.06, -0.01)], 0.04, _shade(paint, 0.45))
    if "wheels" in parts:
        rim = _pick(rng, [(206, 208, 212), (150, 154, 160)])
        spokes = rng.integers(4, 7)
        for x in (-0.56, 0.56):
            pen.fill(_ellipse(x, 0.3, 0.24, 0.24), (44, 44, 50))
            pen.fill(_ellipse(x, 0.3, 0.135, 0.135), rim, edge=0.02)
            for turn in np.arange(spokes) / spokes * 2 * np.pi:
                pen.line([(x, 0.3), (x + 0.12 * np.cos(turn), 0.3 + 0.12 * np.sin(turn))], 0.03, _shade(rim, 0.55))


def _boat(pen: _Pen, rng: np.random.Generator, parts: tuple[str, ...]) -> None:
    hull, trim = _pick(rng, _PALETTE), _pick(rng, _PALETTE)
    cloth = _WHITE if rng.random() < 0.4 else _shade(_pick(rng, _PALETTE), 1.25)
    if "mast" in parts:
        pen.fill(np.array([(-0.05, -0.98), (0.05, -0.98), (0.05, 0.5), (-0.05, 0.5)]), (128, 86, 54), edge=0.02)
        pen.fill(np.array([(0.04, -0.98), (0.34, -0.89), (0.04, -0.8)]), trim)
    if "sails" in parts:
        belly = rng.uniform(0.02, 0.14)
        t = np.linspace(0, 1, 12)
        leech = np.stack([0.09 + 0.72 * t + belly * np.sin(np.pi * t), -0.76 + 1.02 * t], axis=1)
        pen.fill(np.concatenate([leech, [(0.09, 0.32)]]), cloth)
        for at in (4, 8):
            pen.line([(0.09, leech[at, 1] + 0.03), leech[at]], 0.03, _shade(cloth, 0.75))
        if rng.random() < 0.75:
            luff = np.stack([-0.09 - 0.58 * t - 0.5 * belly * np.sin(np.pi * t), -0.6 + 0.88 * t], axis=1)
            pen.fill(np.concatenate([luff, [(-0.09, 0.32)]]), trim if rng.random() < 0.5 else cloth)
    if "hull" in parts:
        pen.fill(_rounded([(-0.98, 0.4), (-0.3, 0.46), (1.02, 0.36), (0.66, 0.92), (-0.62, 0.92)]), hull)
        pen.line([(-0.78, 0.55), (0.82, 0.53)], 0.08, _shade(trim, 1.3))
        for x in (-0.36, 0, 0.36):
            pen.fill(_ellipse(x, 0.72, 0.075, 0.075), (232, 240, 244), edge=0.035)


def _plant(pen: _Pen, rng: np.random.Generator, parts: tuple[str, ...]) -> None:
    clay, petal, green = _pick(rng, _CLAY), _pick(rng, _PALETTE[:10]), _pick(rng, [(74, 148, 66), (108, 168, 72)])
    heads = [(rng.uniform(-0.12, 0.12), rng.uniform(-0.66, -0.55), 0.3)]
    if rng.random() < 0.55:
        heads += [(-0.45, rng.uniform(-0.3, -0.1), 0.21), (0.45, rng.uniform(-0.3, -0.1), 0.21)]
    if "leaves" in parts:
        for x, y, _ in heads:
            pen.line([(0, 0.35), (0.45 * x, 0.1), (x, y)], 0.07, _shade(green, 0.7))
        for angle in (-2.75, -2.35, -0.8, -0.4):
            pen.fill(_leaf(0, 0.33, rng.uniform(0.55, 0.75), 0.13, angle + rng.normal(0, 0.1)), green)
    if "bloom" in parts:
        count = rng.integers(5, 9)
        slim = 1.3 / count
        for x, y, size in heads:
            for turn in 2 * np.pi * (np.arange(count) / count + rng.random()):
                at = x + 0.62 * size * np.cos(turn), y + 0.62 * size * np.sin(turn)
                pen.fill(_ellipse(*at, 0.48 * size, 1.5 * slim * size, turn), petal)
            pen.fill(_ellipse(x, y, 0.36 * size, 0.36 * size), (250, 206, 80) if petal[2] > 90 else (110, 66, 40))
    if "pot" in parts:
        pen.fill(_rounded([(-0.42, 0.36), (0.42, 0.36), (0.3, 1.02), (-0.3, 1.02)]), clay)
        pen.line([(-0.33, 0.66), (0.33, 0.66)], 0.09, _shade(clay, 1.4 if rng.random() < 0.5 else 0.7))
        pen.fill(_rounded([(-0.5, 0.28), (0.5, 0.28), (0.48, 0.48), (-0.48, 0.48)]), _shade(clay, 1.12))


def _plain(pen: _Pen, rng: np.random.Generator, parts: tuple[str, ...]) -> None:
    color = _pick(rng, _PALETTE + _SKIN)
    if "disc" in parts:
        pen.fill(_ellipse(0, 0, 0.55, 0.55), color)
    if "ring" in parts:
        pen.line(_ellipse(0, 0, 0.5, 0.5), 0.2, color)
    if "slab" in parts:
        pen.fill(_rounded([(-0.8, -0.3), (0.8, -0.3), (0.8, 0.3), (-0.8, 0.3)]), color)
    if "wedge" in parts:
        pen.fill(np.array([(-0.6, 0.5), (0.1, -0.8), (0.6, 0.5)]), color)


@dataclass(frozen=True)
class _Kind:
    """What can be drawn: all parts of a named kind make an object, a single part makes a distractor."""

    draw: Callable[[_Pen, np.random.Generator, tuple[str, ...]], None]
    parts: tuple[str, ...]
    side: float = 1.0  # The square root of the mask area of an upright object, in the pen's units.
    supercategory: str = ""


# The names are COCO's, so that the same images also serve under COCO's 80 categories.
KINDS = {
    "person": _Kind(_person, ("shoulders", "head", "hair", "face"), 1.42, "person"),
    "car": _Kind(_car, ("body", "windows", "wheels"), 1.2, "vehicle"),
    "boat": _Kind(_boat, ("mast", "sails", "hull"), 1.33, "vehicle"),
    "potted plant": _Kind(_plant, ("leaves", "bloom", "pot"), 1.18, "furniture"),
}
_PLAIN = _Kind(_plain, ("disc", "ring", "slab", "wedge"))


def _patch(rng: np.random.Generator, kind: _Kind, parts: tuple[str, ...], side: float) -> np.ndarray:
    """Draws a kind in a random pose, side pixels the square root of a whole object's area: uint8 (H, W, 4)."""
    angle = np.clip(rng.normal(0, 0.14), -0.35, 0.35)
    pen = _Pen(side / kind.side, angle, stretch=rng.uniform(0.85, 1.18), flip=rng.random() < 0.5)
    kind.draw(pen, rng, parts)
    return pen.patch()


def _crowd_patch(rng: np.random.Generator, kind: _Kind, unit: float) -> np.ndarray:
    """Draws a dense cluster of tiny objects of one kind: uint8 (H, W, 4)."""
    across, down = int(rng.integers(4, 7)), int(rng.integers(3, 5))
    step = 12 * unit
    image = Image.new("RGBA", (round((across + 2) * step), round((down + 2) * step)))
    for row in range(down):
        for column in range(across):
            tiny = Image.fromarray(_patch(rng, kind, kind.parts, rng.uniform(10, 13) * unit))
            x, y = (np.array([column + 0.5 * (row % 2), row]) + rng.uniform(0.1, 0.5, 2)) * step
            image.alpha_composite(tiny, (round(x), round(y)))
    return np.asarray(image.crop(image.getbbox()))


def _muted(rng: np.random.Generator, low: float, high: float) -> Color:
    """A color of little saturation whose value lies between low and high."""
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.08, 0.42), rng.uniform(low, high))
    return tuple(int(255 * c) for c in rgb)


def _noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Smooth noise (height, width), float32 of about unit deviation, with so many cells along a side."""
    grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, width: int, height: int, unit: float) -> np.ndarray:
    """A gradient with texture and clutter: float32 (height, width, 3)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    turn = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(turn), math.sin(turn)
    ramp = 0.5 + 0.5 * (cos * (x / width * 2 - 1) + sin * (y / height * 2 - 1)) / 1.42
    first, second, third = (np.array(_muted(rng, 0.5, 0.98), np.float32) for _ in range(3))
    pixels = first + (second - first) * ramp[..., None]
    if rng.random() < 0.45:  # A ground below a skyline.
        skyline = height * rng.uniform(0.4, 0.75) + 5 * unit * _noise(rng, width, 1, 9)[0]
        pixels = np.where((y > skyline)[..., None], third * (0.85 + 0.25 * y / height)[..., None], pixels)
    elif rng.random() < 0.5:  # Stripes or checks.
        wave = np.sin((x * cos + y * sin) / unit * rng.uniform(0.15, 0.5))
        if rng.random() < 0.5:
            wave = wave * np.sin((y * cos - x * sin) / unit * rng.uniform(0.15, 0.5))
        pixels = pixels + 9 * np.sign(wave)[..., None]
    for cells, strength in ((5, 9), (16, 6), (48, 5)):
        pixels = pixels + strength * _noise(rng, width, height, cells)[..., None]
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).resize(
        (2 * width, 2 * height), Image.Resampling.NEAREST
    )
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(8, 20)):
        color = (*_muted(rng, 0.25, 0.95), int(rng.integers(60, 150)))
        at = rng.uniform(0, 2, 2) * (width, height)
        reach = 2 * unit * rng.uniform(5, 26)
        if rng.random() < 0.5:
            points = at + reach * np.cumsum(rng.normal(0, 0.6, (6, 2)), axis=0)
            draw.line(points.ravel().tolist(), color, width=int(rng.integers(1, 7)), joint="curve")
        else:
            angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 8)))
            points = at + reach * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            draw.polygon(points.ravel().tolist(), fill=color)
    return np.asarray(image.reduce(2), dtype=np.float32)


def _camera(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Light falloff, a little blur and sensor noise: uint8 (H, W, 3) from float32 (H, W, 3)."""
    height, width = pixels.shape[:2]
    light = 1 + 0.09 * np.clip(_noise(rng, width, height, 3), -2, 2)
    image = Image.fromarray(np.clip(pixels * light[..., None], 0, 255).astype(np.uint8))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.6))), dtype=np.float32)
    pixels = pixels + rng.uniform(2, 8) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


@dataclass
class DrawnObject:
    """Something drawn: its kind ("" for a distractor) and how much of each pixel it shows in, (H, W) in 0..1."""

    kind: str
    crowd: bool
    visible: np.ndarray
    whole: float


def _place(
    rng: np.random.Generator, pixels: np.ndarray, objects: list[DrawnObject], patch: np.ndarray, kind: str, crowd: bool
) -> None:
    """Draws a patch over the image and appends its object, or does neither where it would hide too much."""
    height, width = pixels.shape[:2]
    color, alpha = patch[..., :3].astype(np.float32), patch[..., 3].astype(np.float32) / 255
    whole = float(alpha.sum())
    ph, pw = alpha.shape
    light = np.linspace(1.1, 0.88, ph, dtype=np.float32)[:, None, None]
    # A quarter may lie up to a third outside the image, and some overlap others even where there is room.
    outside = rng.choice([0, 0, 0, 1 / 3])
    apart = rng.random() < 0.6
    for attempt in range(12):
        x, y = (
            int(rng.uniform(*sorted((-outside * extent, side - (1 - outside) * extent))))
            for extent, side in ((pw, width), (ph, height))
        )
        rows, columns = slice(max(y, 0), min(y + ph, height)), slice(max(x, 0), min(x + pw, width))
        inside = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
        cover = alpha[inside]
        if cover.sum() < max(_MIN_VISIBLE * whole, _MIN_AREA):
            continue
        hidden = [float((o.visible[rows, columns] * cover).sum()) if o.kind else 0.0 for o in objects]
        if apart and attempt < 8 and any(hidden):
            continue
        # Distractors may vanish, objects may not.
        if any(h and o.visible.sum() - h < max(_MIN_VISIBLE * o.whole, _MIN_AREA) for o, h in zip(objects, hidden)):
            continue
        for other in objects:
            other.visible[rows, columns] *= 1 - cover
        visible = np.zeros((height, width), np.float32)
        visible[rows, columns] = cover
        below = pixels[rows, columns]
        pixels[rows, columns] = below + (color[inside] * light[inside[0]] - below) * cover[..., None]
        objects.append(DrawnObject(kind, crowd, visible, whole))
        return


def draw_scene(rng: np.random.Generator, size: int, index: int) -> tuple[np.ndarray, list[DrawnObject]]:
    """Draws one image: its pixels, uint8 (H, W, 3) with the longer side of size pixels, and what it shows."""
    shorter = round(size * rng.uniform(0.68, 0.95))
    width, height = (size, shorter) if rng.random() < 0.65 else (shorter, size)
    unit = size / _NATIVE_SIZE
    pixels = _background(rng, width, height, unit)
    objects: list[DrawnObject] = []
    names = list(KINDS)
    for _ in range(rng.integers(3, 8)):
        kind = [_PLAIN, *KINDS.values()][rng.integers(1 + len(KINDS))]
        part = kind.parts[rng.integers(len(kind.parts))]
        _place(rng, pixels, objects, _patch(rng, kind, (part,), unit * rng.uniform(16, 62)), "", False)
    sides: list[float] = []
    if index % _EMPTY_EVERY != 8:
        sides += list(rng.uniform(106, 126, int(rng.random() < 0.86)))
        sides += list(rng.uniform(36, 84, rng.integers(0, 3)))
        sides += list(rng.uniform(16, 29, rng.integers(0, 2) if sides else rng.integers(1, 3)))
    if index % _EMPTY_EVERY == 16:
        name = names[rng.integers(len(names))]
        _place(rng, pixels, objects, _crowd_patch(rng, KINDS[name], unit), name, True)
    for side in sides:
        name = names[rng.integers(len(names))]
        patch = _patch(rng, KINDS[name], KINDS[name].parts, max(13.0, unit * side))
        _place(rng, pixels, objects, patch, name, False)
    return _camera(rng, pixels), [o for o in objects if o.kind]
