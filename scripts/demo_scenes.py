"""Procedurally drawn scenes with captions and exact object masks.

The demo checkpoint is trained on these scenes and ``evaluate_editing.py`` edits fresh ones. A scene is one or
two objects (kind and colour) on a background; everything about it follows from one ``numpy`` generator, so a
seed names a scene. Only NumPy and Pillow are needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 128
"""Height and width of a scene in pixels."""

KINDS = ("apple", "pear", "cup", "star", "fish", "house")
COLOURS = {
    "red": (206, 40, 42),
    "green": (54, 158, 66),
    "blue": (46, 92, 204),
    "yellow": (238, 206, 44),
    "purple": (140, 58, 172),
    "orange": (242, 130, 28),
}
BACKGROUNDS = ("wooden table", "white cloth", "stone floor", "sandy beach", "dark blanket")

# Objects are drawn at twice the size and reduced, which gives smooth edges.
_OVERSAMPLING = 2


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is and where it stands (pixels of the final picture)."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    tilt: float = 0.0

    @property
    def phrase(self) -> str:
        return with_article(f"{self.colour} {self.kind}")


@dataclass(frozen=True)
class Scene:
    """Objects on a background; ``texture_seed`` fixes the background's grain."""

    objects: tuple[SceneObject, ...]
    background: str
    texture_seed: int
    light: float = 1.0
    tags: dict = field(default_factory=dict, compare=False)

    @property
    def caption(self) -> str:
        return caption_of([o.phrase for o in self.objects], self.background)

    def replaced(self, index: int, kind: str | None = None, colour: str | None = None) -> Scene:
        """The same scene with another kind or colour for the object at ``index``."""
        old = self.objects[index]
        new = SceneObject(kind or old.kind, colour or old.colour, old.x, old.y, old.radius, old.tilt)
        objects = tuple(new if i == index else o for i, o in enumerate(self.objects))
        return Scene(objects, self.background, self.texture_seed, self.light)


def with_article(phrase: str) -> str:
    """``"apple"`` -> ``"an apple"``, ``"red apple"`` -> ``"a red apple"``."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption_of(phrases: list[str], background: str | None) -> str:
    """The sentence for object phrases (with their articles) and a background; without one, the objects alone."""
    text = " and ".join(phrases)
    return text if background is None else f"{text} on {with_article(background)}"


def vocabulary() -> list[str]:
    """Every word that a caption can contain."""
    words = {"a", "an", "and", "on"} | set(KINDS) | set(COLOURS)
    for background in BACKGROUNDS:
        words |= set(background.split())
    return sorted(words)


def sample_scene(rng: np.random.Generator, number_of_objects: int | None = None) -> Scene:
    """Draws the description of a scene; two objects never overlap and never share kind or colour."""
    if number_of_objects is None:
        number_of_objects = 2 if rng.random() < 0.3 else 1
    kinds = rng.permutation(len(KINDS))[:number_of_objects]
    colours = rng.permutation(len(COLOURS))[:number_of_objects]
    objects = []
    for i in range(number_of_objects):
        radius = rng.uniform(28, 39) if number_of_objects == 1 else rng.uniform(21, 26)
        if number_of_objects == 1:
            x = rng.uniform(radius + 6, SIZE - radius - 6)
        else:
            x = SIZE * (0.26 + 0.48 * i) + rng.uniform(-3, 3)
        y = rng.uniform(radius + 6, SIZE - radius - 6)
        objects.append(
            SceneObject(
                KINDS[kinds[i]],
                list(COLOURS)[colours[i]],
                float(x),
                float(y),
                float(radius),
                float(rng.uniform(-12, 12)),
            )
        )
    return Scene(
        tuple(objects),
        BACKGROUNDS[rng.integers(len(BACKGROUNDS))],
        int(rng.integers(2**31)),
        float(rng.uniform(0.92, 1.06)),
    )


def draw_scene(scene: Scene) -> tuple[Image.Image, np.ndarray]:
    """The picture and the objects' masks.

    Returns:
        An RGB picture of ``SIZE`` x ``SIZE`` and a float32 array ``(objects, SIZE, SIZE)`` with the share of each
        pixel that the object covers (0 to 1).
    """
    picture = _background(scene.background, np.random.default_rng(scene.texture_seed)).astype(np.float32)
    masks = []
    for item in scene.objects:
        colours, alpha = _draw_object(item)
        shadow = (
            np.asarray(
                Image.fromarray((alpha * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(4)),
                np.float32,
            )
            / 255
        )
        shadow = np.roll(shadow, (4, 3), (0, 1))
        picture *= 1 - 0.30 * shadow[..., None]
        picture = picture * (1 - alpha[..., None]) + colours * alpha[..., None]
        masks.append(alpha)
    picture = np.clip(picture * scene.light, 0, 255)
    return Image.fromarray(np.round(picture).astype(np.uint8)), np.stack(masks)


def _background(name: str, rng: np.random.Generator) -> np.ndarray:
    """Colours of a background, float (SIZE, SIZE, 3): quiet textures, so that the objects stay the subject."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    phase = rng.uniform(0, 2 * math.pi, 4)
    soft = soft_noise(rng, 5)
    if name == "wooden table":
        base = np.array((164, 112, 66), np.float32)
        grain = np.sin(2 * math.pi * (7 * y + 0.35 * soft) + phase[0]) * 0.55 + 0.45 * soft
        return base * (1 + 0.10 * grain[..., None])
    if name == "white cloth":
        base = np.array((226, 224, 220), np.float32)
        folds = np.sin(2 * math.pi * (2.2 * x + 0.8 * y + 0.2 * soft) + phase[1])
        return base * (1 + 0.045 * folds[..., None])
    if name == "stone floor":
        base = np.array((128, 132, 138), np.float32)
        size = 40
        joints = ((np.arange(SIZE) + int(phase[0] * 6)) % size < 2).astype(np.float32)
        lines = np.maximum(joints[:, None], joints[None, :])
        return base * (1 + 0.08 * soft - 0.20 * lines)[..., None]
    if name == "sandy beach":
        base = np.array((222, 196, 146), np.float32)
        ripples = np.sin(2 * math.pi * (4 * y + 1.2 * x + 0.3 * soft) + phase[2])
        return base * (1 + 0.05 * ripples + 0.03 * soft)[..., None]
    if name == "dark blanket":
        base = np.array((52, 56, 70), np.float32)
        weave = np.sin(2 * math.pi * 5 * x + phase[3]) * np.sin(2 * math.pi * 5 * y + phase[1])
        return base * (1 + 0.14 * weave + 0.08 * soft)[..., None]
    raise ValueError(f"unknown background {name!r}; expected one of {BACKGROUNDS}")


def soft_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise between about -1 and 1, (SIZE, SIZE), with ``cells`` bumps along a side."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _draw_object(item: SceneObject) -> tuple[np.ndarray, np.ndarray]:
    """Colours (SIZE, SIZE, 3) and coverage (SIZE, SIZE) of one object."""
    big = SIZE * _OVERSAMPLING
    layer = Image.new("RGB", (big, big))
    shape = Image.new("L", (big, big))
    pen = _Pen(ImageDraw.Draw(layer), ImageDraw.Draw(shape), item)
    _DRAWINGS[item.kind](pen)
    colours = np.asarray(layer.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    alpha = np.asarray(shape.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32) / 255
    # Colour outside the shape is black and would darken the rim: undo the mixing.
    colours = colours / np.maximum(alpha, 1 / 255)[..., None]
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    light = 1.08 - 0.22 * ((x - item.x) + (y - item.y)) / (2 * item.radius)
    return np.clip(colours * np.clip(light, 0.75, 1.25)[..., None], 0, 255), alpha


class _Pen:
    """Draws in the object's own frame: unit = radius, origin = centre, y downwards, tilted."""

    def __init__(self, layer: ImageDraw.ImageDraw, shape: ImageDraw.ImageDraw, item: SceneObject):
        self.layer, self.shape, self.item = layer, shape, item
        self.colour = COLOURS[item.colour]
        angle = math.radians(item.tilt)
        self.cos, self.sin = math.cos(angle), math.sin(angle)

    def _points(self, points):
        scale = self.item.radius * _OVERSAMPLING
        return [
            (
                (self.item.x * _OVERSAMPLING) + scale * (x * self.cos - y * self.sin),
                (self.item.y * _OVERSAMPLING) + scale * (x * self.sin + y * self.cos),
            )
            for x, y in points
        ]

    def polygon(self, points, colour=None):
        points = self._points(points)
        self.layer.polygon(points, fill=colour or self.colour)
        self.shape.polygon(points, fill=255)

    def ellipse(self, x, y, width, height, colour=None):
        turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        self.polygon([(x + width * math.cos(a), y + height * math.sin(a)) for a in turns], colour)

    def darker(self, factor):
        return tuple(int(c * factor) for c in self.colour)


_WOOD, _LEAF, _LIGHT = (92, 60, 36), (70, 130, 60), (244, 240, 226)


def _apple(pen):
    pen.polygon([(-0.06, -0.60), (0.06, -0.60), (0.14, -1.0), (0.03, -1.0)], _WOOD)
    pen.ellipse(-0.30, 0.10, 0.62, 0.80)
    pen.ellipse(0.30, 0.10, 0.62, 0.80)


def _pear(pen):
    pen.polygon([(-0.05, -0.80), (0.05, -0.80), (0.10, -1.05), (0.01, -1.05)], _WOOD)
    pen.ellipse(0, 0.35, 0.72, 0.62)
    pen.ellipse(0, -0.42, 0.40, 0.46)
    pen.polygon([(-0.40, -0.40), (0.40, -0.40), (0.70, 0.25), (-0.70, 0.25)])


def _cup(pen):
    pen.ellipse(0.72, 0.02, 0.32, 0.42)
    pen.ellipse(0.72, 0.02, 0.15, 0.24, _LIGHT)
    pen.polygon([(-0.78, -0.70), (0.78, -0.70), (0.58, 0.85), (-0.58, 0.85)])
    pen.ellipse(0, -0.70, 0.78, 0.20, pen.darker(0.45))


def _star(pen):
    points = []
    for i in range(10):
        length = 1.08 if i % 2 == 0 else 0.52
        angle = -math.pi / 2 + i * math.pi / 5
        points.append((length * math.cos(angle), length * math.sin(angle)))
    pen.polygon(points)


def _fish(pen):
    pen.polygon([(0.40, 0), (1.05, -0.55), (1.05, 0.55)], pen.darker(0.75))
    pen.polygon([(-0.20, -0.45), (0.35, -0.85), (0.40, -0.30)], pen.darker(0.75))
    pen.ellipse(-0.18, 0, 0.84, 0.58)
    pen.ellipse(-0.62, -0.14, 0.14, 0.14, _LIGHT)
    pen.ellipse(-0.64, -0.14, 0.07, 0.07, (20, 20, 20))


def _house(pen):
    pen.polygon([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.88), (-0.72, 0.88)])
    pen.polygon([(-0.95, -0.12), (0.95, -0.12), (0, -0.95)], pen.darker(0.55))
    pen.polygon([(-0.20, 0.30), (0.20, 0.30), (0.20, 0.88), (-0.20, 0.88)], _LIGHT)


_DRAWINGS = {"apple": _apple, "pear": _pear, "cup": _cup, "star": _star, "fish": _fish, "house": _house}
