"""Scenes of rendered objects, with captions, true masks and, for every edit, the true target picture.

``train_demo_checkpoint.py`` trains the demo's checkpoint on these scenes and ``evaluate_editing.py`` measures edits of
them. A scene is a background with nothing, one or two objects, or a bowl or basket of fruits on it; everything about
it follows from one ``numpy`` generator, so a seed names a scene. The objects are the pictures of ``sprites/`` (see the
NOTICE there); grounds, containers, light and shadows are drawn here. Only NumPy and Pillow are needed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

SIZE = 128
"""Height and width of a scene in pixels."""
SPRITES = Path(__file__).resolve().parent / "sprites"

FRUITS = ("apple", "pear", "orange", "lemon", "strawberry")
ANIMALS = ("cat", "dog", "rabbit", "fox", "bear", "panda", "frog")
KINDS = (*FRUITS, *ANIMALS, "cup", "car", "gift", "house", "cap", "mushroom")
PLURALS = {"strawberry": "strawberries", **{kind: f"{kind}s" for kind in (*FRUITS, "fruit") if kind != "strawberry"}}

COLOURS = ("red", "green", "blue", "yellow")
COLOURED = {"apple": ("red", "green"), "car": COLOURS, "gift": COLOURS, "cap": COLOURS}
"""What comes in several colours, and in which; the others have their own."""

SEEN_KINDS = (*KINDS, "fruit", "nothing")
SEEN_COLOURS = (*COLOURS, "none")
"""What a judge can see: ``fruit`` is a mixture, ``nothing`` the bare ground; colours only of what has several."""

CONTAINERS = ("bowl", "basket")
BACKGROUNDS = ("a wooden table", "a white cloth", "a stone floor", "sand", "grass", "a blue blanket")

_HUES = {"red": 355, "green": 125, "blue": 215, "yellow": 47}
_SPRITE_COLOURS = {"car": "red", "gift": "yellow", "cap": "blue"}  # as the pictures have them
_PILE = (  # centres and sizes of the fruits in a container, in its half widths; from behind to the front
    *((-0.34, -0.46, 0.62), (0.30, -0.50, 0.62), (-0.62, -0.16, 0.60), (0.0, -0.24, 0.64), (0.60, -0.18, 0.60)),
    *((-0.34, 0.06, 0.62), (0.32, 0.05, 0.62)),
)


@dataclass(frozen=True)
class Item:
    """One object: what it is and where it stands; pixels of the picture, ``size`` of its longer side."""

    kind: str
    colour: str | None
    x: float
    y: float
    size: float
    tilt: float = 0.0

    @property
    def phrase(self) -> str:
        return with_article(f"{self.colour} {self.kind}" if self.colour else self.kind)


@dataclass(frozen=True)
class Filling:
    """A bowl or basket of fruits; ``kind`` "fruit" stands for several kinds. ``size`` is its width."""

    container: str
    kind: str
    x: float
    y: float
    size: float
    seed: int

    @property
    def phrase(self) -> str:
        return f"a {self.container} of {PLURALS[self.kind]}"


@dataclass(frozen=True)
class Scene:
    """Parts on a background; ``texture_seed`` fixes its grain, ``light`` the brightness of all."""

    parts: tuple[Item | Filling, ...]
    background: str
    texture_seed: int
    light: float = 1.0

    @property
    def caption(self) -> str:
        return caption_of([part.phrase for part in self.parts], self.background)

    def replaced(self, index: int, **changes) -> Scene:
        """The same scene with other fields in the part at ``index``."""
        part = dataclasses.replace(self.parts[index], **changes)
        return dataclasses.replace(self, parts=(*self.parts[:index], part, *self.parts[index + 1 :]))

    def without(self, index: int) -> Scene:
        """The same scene without the part at ``index``."""
        return dataclasses.replace(self, parts=(*self.parts[:index], *self.parts[index + 1 :]))


def with_article(phrase: str) -> str:
    """``"apple"`` -> ``"an apple"``, ``"red apple"`` -> ``"a red apple"``."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def caption_of(phrases: list[str], background: str | None) -> str:
    """The sentence for phrases with their articles and a background; without one of the two, the other alone."""
    text = " and ".join(phrases)
    return " on ".join(part for part in (text, background) if part)


def vocabulary() -> list[str]:
    """Every word that a caption can contain."""
    words = {"a", "an", "and", "on", "of", *KINDS, *PLURALS.values(), *COLOURS, *CONTAINERS}
    for background in BACKGROUNDS:
        words |= set(background.split())
    return sorted(words)


# --- descriptions ---------------------------------------------------------------------------------


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draws the description of a scene: one object (half of them), a filling, two objects, or nothing (1 in 20)."""
    fate = rng.random()
    if fate < 0.05:
        parts: tuple[Item | Filling, ...] = ()
    elif fate < 0.30:
        parts = (_sample_filling(rng),)
    else:
        kinds = [KINDS[i] for i in rng.permutation(len(KINDS))[: 1 if fate < 0.78 else 2]]
        parts = tuple(_sample_item(rng, kind, place, len(kinds)) for place, kind in enumerate(kinds))
    background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    return Scene(parts, background, int(rng.integers(2**31)), float(rng.uniform(0.92, 1.06)))


def _sample_item(rng: np.random.Generator, kind: str, place: int, of: int) -> Item:
    colours = COLOURED.get(kind)
    colour = colours[rng.integers(len(colours))] if colours else None
    size = rng.uniform(58, 80) if of == 1 else rng.uniform(46, 56)
    margin = size / 2 + 4
    x = rng.uniform(margin, SIZE - margin) if of == 1 else SIZE * (0.26 + 0.48 * place) + rng.uniform(-3, 3)
    y = rng.uniform(margin, SIZE - margin - 4)
    return Item(kind, colour, float(x), float(y), float(size), float(rng.uniform(-10, 10)))


def _sample_filling(rng: np.random.Generator) -> Filling:
    kind = ("fruit", *FRUITS)[rng.integers(1 + len(FRUITS))]
    container = CONTAINERS[rng.integers(2)]
    size = rng.uniform(88, 108)
    margin = size / 2 + 4
    x, y = rng.uniform(margin, SIZE - margin), rng.uniform(56, 74)
    return Filling(container, kind, float(x), float(y), float(size), int(rng.integers(2**31)))


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A scene's picture, and what its parts cover.

    Attributes:
        picture: RGB, ``SIZE`` x ``SIZE``.
        whole: float32 (parts, SIZE, SIZE), the share of each pixel (0 to 1) that a part covers.
        subject: the same of what the part's ``kind`` names: of a filling, the fruits that can be seen.
    """

    picture: Image.Image
    whole: np.ndarray
    subject: np.ndarray


def draw_scene(scene: Scene) -> Drawing:
    """Draws a scene: ground, soft shadows, parts."""
    rng = np.random.default_rng(scene.texture_seed)
    ground = _ground(scene.background, rng)
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    side = 1 if rng.random() < 0.5 else -1  # where the light comes from
    canvas = ground * (1.04 - 0.10 * (y + 0.5 * side * (x - 0.5)))[..., None]
    whole, subject = [], []
    for part in scene.parts:
        layers = [_item_layer(part)] if isinstance(part, Item) else _filling_layers(part)
        cover = 1 - np.prod([1 - layer[..., 3] for layer in layers], 0)
        canvas *= 1 - 0.42 * _shadow(cover, part, side)[..., None]
        visible = np.zeros((SIZE, SIZE), np.float32)
        for number, layer in enumerate(layers):
            alpha = layer[..., 3:]
            canvas = canvas * (1 - alpha) + layer[..., :3] * alpha
            if isinstance(part, Item) or 0 < number < len(layers) - 1:
                visible = np.maximum(visible, alpha[..., 0])
            elif number:
                visible = visible * (1 - alpha[..., 0])
        whole.append(cover)
        subject.append(visible)
    picture = Image.fromarray(np.round(np.clip(canvas * scene.light, 0, 255)).astype(np.uint8))
    shape = (len(scene.parts), SIZE, SIZE)
    return Drawing(picture, np.reshape(whole, shape).astype(np.float32), np.reshape(subject, shape).astype(np.float32))


def _shadow(cover: np.ndarray, part: Item | Filling, side: int) -> np.ndarray:
    """Darkness around a part's foot and on the side that the light does not reach, 0 to 1."""
    rows = np.nonzero(cover.max(1) > 0.5)[0]
    foot = rows.max() if len(rows) else part.y
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    width = 0.40 * part.size
    contact = np.exp(-(((x - part.x - 3 * side) / width) ** 2 + ((y - foot + 2) / (0.22 * width + 2)) ** 2) * 1.3)
    cast = np.asarray(Image.fromarray(cover * 255).convert("L").filter(ImageFilter.GaussianBlur(5)), np.float32) / 255
    cast = np.pad(cast, ((4, 0), (4, 4)))[:SIZE, 4 - 4 * side :][:, :SIZE]  # moved down and aside
    return np.maximum(contact, 0.55 * cast)


@functools.lru_cache(None)
def _sprite(kind: str, colour: str | None) -> Image.Image:
    """The picture of an object, RGBA, in one of its colours."""
    name = "green_apple" if (kind, colour) == ("apple", "green") else kind
    with Image.open(SPRITES / f"{name}.webp") as file:
        picture = file.convert("RGBA")
    own = _SPRITE_COLOURS.get(kind)
    return picture if colour in (None, own) or own is None else _repainted(picture, own, colour)


def _repainted(picture: Image.Image, old: str, new: str) -> Image.Image:
    """Hues near the old colour are turned so that their mean becomes the new one's; all else stays."""
    pixels = np.asarray(picture, np.float32)
    hsv = np.asarray(picture.convert("RGB").convert("HSV"), np.float32)
    hue = hsv[..., 0] * (360 / 255)
    distance = np.abs((hue - _HUES[old] + 180) % 360 - 180)
    weight = np.clip((48 - distance) / 12, 0, 1) * np.clip((hsv[..., 1] - 50) / 40, 0, 1)
    mean = np.degrees(np.angle((weight * pixels[..., 3] * np.exp(1j * np.radians(hue))).sum()))
    turned = hsv.copy()
    turned[..., 0] = ((hue + _HUES[new] - mean) % 360) * (255 / 360)
    if new == "green":  # the brightest of them at equal values
        turned[..., 1:] *= (0.85, 0.82)
    elif old == "blue":  # and the darkest
        turned[..., 2] *= 0.93
    rgb = np.asarray(Image.fromarray(turned.astype(np.uint8), "HSV").convert("RGB"), np.float32)
    colours = pixels[..., :3] * (1 - weight[..., None]) + rgb * weight[..., None]
    return Image.fromarray(np.round(np.concatenate([colours, pixels[..., 3:]], -1)).astype(np.uint8), "RGBA")


def _item_layer(item: Item) -> np.ndarray:
    """Colours (0 to 255) and coverage (0 to 1) of one object, float32 (SIZE, SIZE, 4)."""
    sprite = _sprite(item.kind, item.colour)
    scale = max(sprite.size) / item.size
    angle = math.radians(item.tilt)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    # From a pixel of the scene to one of the sprite, whose pixels are averaged where it is made smaller.
    step = max(1, round(scale))
    small = sprite.reduce(step) if step > 1 else sprite
    shift_x = (sprite.width / 2 - cos * item.x + sin * -item.y) / step
    shift_y = (sprite.height / 2 + sin * item.x - cos * item.y) / step
    turn = (cos / step, sin / step, shift_x, -sin / step, cos / step, shift_y)
    layer = np.asarray(
        small.transform((SIZE, SIZE), Image.Transform.AFFINE, turn, Image.Resampling.BICUBIC), np.float32
    )
    return np.concatenate([layer[..., :3], layer[..., 3:] / 255], -1)


def _filling_layers(part: Filling) -> list[np.ndarray]:
    """The container's back, each fruit from behind to the front, and the container's front."""
    back, front = _container(part)
    rng = np.random.default_rng(part.seed)
    half = part.size / 2
    fruits = []
    for x, y, size in _PILE:
        turn, jitter, kind = rng.uniform(-25, 25), rng.uniform(-1.5, 1.5, 2), FRUITS[rng.integers(len(FRUITS))]
        kind = kind if part.kind == "fruit" else part.kind
        colour = "red" if kind == "apple" else None
        place = part.x + half * x + jitter[0], part.y + half * y + jitter[1]
        fruits.append(_item_layer(Item(kind, colour, *place, half * size, turn)))
    return [back, *fruits, front]


def _container(part: Filling) -> tuple[np.ndarray, np.ndarray]:
    """Back and front of a bowl or basket, float32 (SIZE, SIZE, 4) each; ``part.y`` is the rim's height."""
    fine = 2
    y, x = (np.mgrid[0 : SIZE * fine, 0 : SIZE * fine].astype(np.float32) + 0.5) / fine
    half, rim = part.size / 2, part.size * 0.10
    u, v = (x - part.x) / half, y - part.y
    edge = rim * np.sqrt(np.clip(1 - u**2, 0, None))
    depth = 0.74 * half
    t = np.clip(v / depth, 0, 1)
    is_bowl = part.container == "bowl"
    width = np.sqrt(np.clip(1 - 0.80 * t**2.4, 0, None)) if is_bowl else 1 - 0.22 * t
    foot = depth + (rim * 0.45 if is_bowl else rim * 0.6) * np.sqrt(np.clip(1 - (u / 0.8) ** 2, 0, None)) - rim * 0.3
    inside = (np.abs(u) <= 1) & (np.abs(v) <= edge)
    body = (np.abs(u) <= width) & (v >= edge * 0.82) & (v <= foot)
    # The surface's turn from the light: a cylinder's, brighter at the upper left.
    around = np.clip(u / np.maximum(width, 0.05), -1, 1)
    shade = 0.62 + 0.42 * np.sqrt(np.clip(1 - (0.75 * around + 0.22) ** 2, 0, 1)) - 0.16 * t
    if is_bowl:
        colour = np.array((108, 168, 222), np.float32)
        gloss = 60 * np.exp(-(((around + 0.45) / 0.16) ** 2 + ((t - 0.34) / 0.22) ** 2))
        band = np.where(np.abs(v - edge) < 0.09 * half, 34, 0)
        front = colour * shade[..., None] + (gloss + band)[..., None]
        back = np.array((70, 112, 160), np.float32) * (0.8 + 0.2 * u[..., None])
    else:
        colour = np.array((190, 134, 76), np.float32)
        angle = np.arcsin(around)
        weave = np.sin(angle * 15) * np.sin((v - edge) / half * 17)
        band = np.where(np.abs(v - edge) < 0.10 * half, 0.16, 0)
        front = colour * (shade * (1 + 0.20 * weave) + band)[..., None]
        back = np.array((112, 74, 40), np.float32) * (0.85 + 0.15 * u[..., None])
    parts = []
    for pixels, shape in ((back, inside), (front, body)):
        parts.append([np.broadcast_to(pixels, (*shape.shape, 3)), shape])
    if not is_bowl:  # a handle, behind the fruits
        radius = np.hypot(u / 0.92, np.minimum(v, 0) / (0.92 * half))
        handle = (np.abs(radius - 0.94) < 0.06) & (v <= 0)
        tint = colour * (0.78 + 0.22 * np.cos(np.arctan2(v / half, u) * 16))[..., None]
        parts[0][0] = np.where(handle[..., None], tint, parts[0][0])
        parts[0][1] = parts[0][1] | handle
    return tuple(_reduced(pixels, shape, fine) for pixels, shape in parts)


def _reduced(pixels: np.ndarray, shape: np.ndarray, factor: int) -> np.ndarray:
    """Colours and coverage of a shape at ``factor`` times the size, made smaller."""
    blocks = (SIZE, factor, SIZE, factor)
    alpha = shape.astype(np.float32).reshape(blocks).mean((1, 3))
    colours = (pixels * shape[..., None]).reshape(*blocks, 3).sum((1, 3)) / np.maximum(alpha * factor**2, 1)[..., None]
    return np.concatenate([np.clip(colours, 0, 255), alpha[..., None]], -1).astype(np.float32)


# --- grounds --------------------------------------------------------------------------------------


def _soft_noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise between about -1 and 1, (SIZE, SIZE), with ``cells`` bumps along a side."""
    coarse = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _ground(name: str, rng: np.random.Generator) -> np.ndarray:
    """Colours of a background, float32 (SIZE, SIZE, 3): quiet textures, so that the objects stay the subject."""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / SIZE
    phase = rng.uniform(0, 2 * math.pi, 4)
    soft, fine = _soft_noise(rng, 5), _soft_noise(rng, 40)
    if name == "a wooden table":
        grain = np.sin(2 * math.pi * (7 * y + 0.35 * soft) + phase[0]) * 0.55 + 0.45 * soft
        planks = ((y * SIZE + 10 * phase[1]) % 44 < 1.6).astype(np.float32)
        return np.array((172, 118, 70), np.float32) * (1 + 0.08 * grain + 0.03 * fine - 0.22 * planks)[..., None]
    if name == "a white cloth":
        folds = np.sin(2 * math.pi * (2.2 * x + 0.8 * y + 0.2 * soft) + phase[1])
        return np.array((230, 227, 222), np.float32) * (1 + 0.045 * folds)[..., None]
    if name == "a stone floor":
        size = 40
        joints = ((np.arange(SIZE) + int(phase[0] * 6)) % size < 2).astype(np.float32)
        lines = np.maximum(joints[:, None], joints[None, :])
        return np.array((140, 143, 149), np.float32) * (1 + 0.06 * soft + 0.03 * fine - 0.18 * lines)[..., None]
    if name == "sand":
        ripples = np.sin(2 * math.pi * (4 * y + 1.2 * x + 0.3 * soft) + phase[2])
        return np.array((226, 200, 150), np.float32) * (1 + 0.045 * ripples + 0.03 * fine)[..., None]
    if name == "grass":
        blades = np.sin(2 * math.pi * (3 * x + 0.5 * soft) + phase[3]) * 0.25 + soft * 0.5
        return np.array((104, 164, 74), np.float32) * (1 + 0.07 * blades + 0.07 * fine)[..., None]
    if name == "a blue blanket":
        weave = np.sin(2 * math.pi * 5 * x + phase[3]) * np.sin(2 * math.pi * 5 * y + phase[1])
        return np.array((66, 84, 138), np.float32) * (1 + 0.09 * weave + 0.07 * soft)[..., None]
    raise ValueError(f"unknown background {name!r}; expected one of {BACKGROUNDS}")
