"""The pictures of the vision base: scenes of coloured shapes, and how they are drawn.

A scene is drawn from numbers alone, so the same random source gives the same picture everywhere.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
# Drawn larger and shrunk, so that edges are smooth.
ZOOM = 3
COLORS = {
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "red": (250, 10, 10),
    "green": (10, 245, 20),
    "blue": (15, 15, 250),
    "yellow": (250, 250, 10),
    "teal": (5, 128, 128),
    "brown": (160, 44, 40),
    "orange": (255, 145, 10),
    "purple": (150, 30, 190),
}
KINDS = ("circle", "rectangle", "triangle", "star", "cross")
SIZES = ("small", "big")
SMALL_SIDES, BIG_SIDES = (10, 15), (21, 27)
COUNT_SHARES = {1: 0.4, 2: 0.2, 3: 0.2, 4: 0.2}
# A share of the lone shapes is of any size, cut off at the edge too; between these sides no size is told.
ANY_SIZE_SHARE, ANY_SIDES, UNTOLD_SIDES = 0.6, (8, 34), (16, 20)
JITTER, BACKGROUND, NOISE_SHARE, NOISE = 10, (222, 255), 0.4, 5.0
TURNED_SHARE, FEW_LOOKS_SHARE = 0.15, 0.5
GAP = 2


@dataclass(frozen=True)
class Shape:
    """One shape: what it is, how it looks and where its middle lies (in pixels).

    Attributes:
        kind: one of ``KINDS``.
        color: one of ``COLORS``.
        size: one of ``SIZES``, or empty where it is neither.
        x: of the middle, from the left.
        y: of the middle, from the top.
        side: of the square around it.
        turn: angle in radians.
        flat: height as a share of the width; 1 for all but rectangles.
    """

    kind: str
    color: str
    size: str
    x: float
    y: float
    side: float
    turn: float = 0.0
    flat: float = 1.0


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn.

    Attributes:
        shapes: at least one, from left to right.
        background: a light colour.
        seed: of the colours' jitter and of the noise.
    """

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]
    seed: int


def _size_word(side: float) -> str:
    if UNTOLD_SIDES[0] <= side <= UNTOLD_SIDES[1]:
        return ""
    return "small" if side < UNTOLD_SIDES[0] else "big"


def _place(rng: random.Random, side: float, others: list[Shape]) -> tuple[float, float] | None:
    """A free place for a shape of this side, or None after many tries."""
    low, high = side / 2 + 1, SIDE - side / 2 - 1
    for _ in range(40):
        x, y = rng.uniform(low, high), rng.uniform(low, high)
        if all(max(abs(x - o.x), abs(y - o.y)) > (side + o.side) / 2 + GAP and abs(x - o.x) > GAP for o in others):
            return x, y
    return None


def _looks(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Colours and kinds; half of the scenes use two of each, so that some occur more than once."""
    colors, kinds = list(COLORS), list(KINDS)
    if count > 1 and rng.random() < FEW_LOOKS_SHARE:
        colors, kinds = rng.sample(colors, 2), rng.sample(kinds, 2)
    return [(rng.choice(colors), rng.choice(kinds)) for _ in range(count)]


def _shape(rng: random.Random, look: tuple[str, str], side: float, place: tuple[float, float]) -> Shape:
    color, kind = look
    turn = rng.uniform(0, 2 * math.pi) if rng.random() < TURNED_SHARE else 0.0
    flat = rng.uniform(0.4, 1.0) if kind == "rectangle" else 1.0
    # Upright rectangles are lying ones turned by a quarter.
    turn += math.pi / 2 if kind == "rectangle" and rng.random() < 0.5 else 0.0
    return Shape(kind, color, _size_word(side), *place, side, turn, flat)


def make_scene(rng: random.Random, count: int | None = None) -> Scene:
    """Makes one scene.

    Args:
        rng: The random source.
        count: How many shapes; drawn from ``COUNT_SHARES`` if None.
    """
    if count is None:
        count = rng.choices(list(COUNT_SHARES), list(COUNT_SHARES.values()))[0]
    background = tuple(rng.randint(*BACKGROUND) for _ in range(3))
    if count == 1 and rng.random() < ANY_SIZE_SHARE:
        side = rng.uniform(*ANY_SIDES)
        place = (rng.uniform(side * 0.4, SIDE - side * 0.4), rng.uniform(side * 0.4, SIDE - side * 0.4))
        lone = _shape(rng, _looks(rng, 1)[0], side, place)
        return Scene((lone,), background, rng.getrandbits(32))
    while True:
        shapes: list[Shape] = []
        for look in _looks(rng, count):
            side = rng.uniform(*rng.choice((SMALL_SIDES, BIG_SIDES)))
            free = _place(rng, side, shapes)
            if free is None:
                break
            shapes.append(_shape(rng, look, side, free))
        else:
            return Scene(tuple(sorted(shapes, key=lambda s: s.x)), background, rng.getrandbits(32))


def _outline(shape: Shape) -> list[tuple[float, float]]:
    """Corners of a shape around (0, 0), before it is turned; a circle has none."""
    r = shape.side / 2
    if shape.kind == "rectangle":
        h = r * shape.flat
        return [(-r, -h), (r, -h), (r, h), (-r, h)]
    if shape.kind == "triangle":
        return [(0, -r * 0.87), (r, r * 0.87), (-r, r * 0.87)]
    if shape.kind == "star":
        radii = (r, r * 0.42)
        return [
            (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5)) for i in range(10)
        ]
    t = r * 0.34
    return [(-t, -r), (t, -r), (t, -t), (r, -t), (r, t), (t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t), (-t, -t)]


def draw(scene: Scene, *, noisy: bool = True) -> Image.Image:
    """Draws a scene as an RGB picture of 64 by 64 pixels.

    Args:
        scene: What to draw.
        noisy: Whether some pictures get a little noise in their brightness.
    """
    rng = random.Random(scene.seed)
    picture = Image.new("RGB", (SIDE * ZOOM, SIDE * ZOOM), scene.background)
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        fill = tuple(min(255, max(0, c + rng.randint(-JITTER, JITTER))) for c in COLORS[shape.color])
        x, y, r = shape.x * ZOOM, shape.y * ZOOM, shape.side * ZOOM / 2
        if shape.kind == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
            continue
        cos, sin = math.cos(shape.turn) * ZOOM, math.sin(shape.turn) * ZOOM
        pen.polygon([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in _outline(shape)], fill=fill)
    picture = picture.reduce(ZOOM)
    if not noisy or rng.random() >= NOISE_SHARE:
        return picture
    grain = np.random.default_rng(scene.seed).normal(0, NOISE, (SIDE, SIDE, 1))
    return Image.fromarray(np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8))
