"""Flatland: a toy world of flat icons on plain grounds, with captions and exact masks, all drawn from a seed.

Some compositions are kept from training, so that it can be measured what a model makes of what it never saw.
"""

from math import cos, pi, radians, sin
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Points = list[tuple[float, float]]
Part = tuple[str, Points]  # the paint's name, and a polygon in icon units: -1..1, y downwards

COLOURS: dict[str, RGB] = {
    "red": (220, 25, 35),
    "orange": (255, 130, 0),
    "yellow": (255, 228, 20),
    "green": (40, 200, 60),
    "blue": (30, 85, 240),
    "purple": (135, 35, 190),
    "pink": (255, 120, 195),
    "white": (252, 252, 252),
}
# name: (phrase in the caption, ground colour, texture colour)
BACKGROUNDS: dict[str, tuple[str, RGB, RGB]] = {
    "grass": ("on grass", (62, 96, 56), (76, 114, 66)),
    "sand": ("on sand", (204, 180, 138), (188, 162, 120)),
    "sea": ("at sea", (44, 108, 118), (66, 130, 138)),
    "snow": ("in snow", (184, 202, 220), (206, 220, 234)),
    "night": ("at night", (14, 18, 44), (104, 108, 132)),
    "brick": ("on brick", (112, 64, 56), (132, 88, 78)),
}
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

NEUTRALS: dict[str, RGB] = {"cream": (236, 228, 208), "black": (34, 34, 38), "brown": (104, 70, 44)}
OUTLINE = 0.05  # width, in units of the icon's radius
SUPERSAMPLING = 4
SINGLE_SHARE = 1 / 3
SINGLE_RADIUS = (0.21, 0.26)
SINGLE_CENTRE = (0.32, 0.68)
PAIR_RADIUS = (0.172, 0.21)
PAIR_CENTRES = (0.255, 0.745)  # along the relation's axis
PAIR_JITTER = (0.015, 0.12)  # along and across it: two of the largest icons, outlined, must still not touch


def oval(x: float, y: float, width: float, height: float, start: float = 0, end: float = 360) -> Points:
    """Arc of an ellipse around (x, y) with these half-axes, from start to end degrees (clockwise from the right)."""
    angles = np.radians(np.linspace(start, end, 41))
    return [(x + width * cos(a), y + height * sin(a)) for a in angles]


def rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def star(tips: int, inner: float) -> Points:
    turns = [pi * i / tips - pi / 2 for i in range(2 * tips)]
    return [((1, inner)[i % 2] * cos(a), (1, inner)[i % 2] * sin(a) + 0.06) for i, a in enumerate(turns)]


def heart() -> Points:
    angles = np.linspace(0, 2 * pi, 41)
    return [(sin(a) ** 3, (5 * cos(2 * a) + 2 * cos(3 * a) + cos(4 * a) - 13 * cos(a)) / 16 - 0.1) for a in angles]


def crescent() -> Points:
    return oval(0.3, 0, 1, 1, 55, 305) + oval(1.0, 0, 0.829, 0.819, 261, 99)


def petals(count: int) -> list[Part]:
    angles = [radians(360 * i / count - 90) for i in range(count)]
    lobes = [("body", oval(0.6 * cos(a), 0.6 * sin(a), 0.38, 0.38)) for a in angles]
    return lobes + [
        ("body", oval(0, 0, 0.55, 0.55)),
        ("dark", oval(0, 0, 0.34, 0.34)),
        ("body", oval(0, 0, 0.24, 0.24)),
    ]


# Parts are painted in order; "hole" cuts through the parts before it.
ICONS: dict[str, list[Part]] = {
    "ball": [("body", oval(0, 0, 0.95, 0.95)), ("light", oval(-0.4, -0.42, 0.2, 0.16))],
    "box": [
        ("body", rectangle(-0.86, -0.5, 0.86, 0.9)),
        ("body", rectangle(-0.95, -0.88, 0.95, -0.45)),
        ("dark", rectangle(-0.86, -0.45, 0.86, -0.33)),
    ],
    "star": [("body", star(5, 0.48))],
    "heart": [("body", heart())],
    "moon": [("body", crescent())],
    "ring": [("body", oval(0, 0, 1, 1)), ("hole", oval(0, 0, 0.42, 0.42))],
    "house": [
        ("body", rectangle(-0.72, -0.1, 0.72, 0.95)),
        ("body", [(-1, -0.02), (0, -0.98), (1, -0.02)]),
        ("dark", rectangle(-0.72, -0.02, 0.72, 0.05)),
        ("dark", rectangle(0.14, 0.42, 0.42, 0.95)),
        ("cream", rectangle(-0.48, 0.36, -0.18, 0.64)),
    ],
    "tree": [
        ("brown", rectangle(-0.17, 0.5, 0.17, 1)),
        ("body", [(-0.85, 0.68), (0, -0.3), (0.85, 0.68)]),
        ("body", [(-0.7, 0.15), (0, -0.7), (0.7, 0.15)]),
        ("body", [(-0.52, -0.35), (0, -1), (0.52, -0.35)]),
    ],
    "fish": [
        ("body", [(0.2, 0), (1, -0.66), (0.84, 0), (1, 0.66)]),
        ("body", oval(-0.2, 0, 0.8, 0.64)),
        ("dark", oval(-0.45, 0, 0.2, 0.5, -70, 70) + oval(-0.53, 0, 0.2, 0.5, 70, -70)),
        ("black", oval(-0.66, -0.14, 0.11, 0.11)),
    ],
    "mushroom": [
        ("body", [(-0.3, 0.2), (0.3, 0.2), (0.36, 0.95), (-0.36, 0.95)]),
        ("dark", oval(0, 0.2, 0.5, 0.16)),
        ("body", oval(0, 0.24, 1, 1.15, 180, 360)),
        ("light", oval(-0.42, -0.16, 0.15, 0.15)),
        ("light", oval(0.3, -0.42, 0.15, 0.15)),
    ],
    "cup": [
        ("body", oval(0.55, 0.02, 0.45, 0.48)),
        ("hole", oval(0.6, 0.02, 0.16, 0.22)),
        ("body", [(-0.92, -0.75), (0.5, -0.75), (0.34, 0.85), (-0.76, 0.85)]),
        ("dark", oval(-0.21, -0.75, 0.71, 0.16)),
    ],
    "car": [
        ("body", [(-0.72, 0), (-0.44, -0.7), (0.4, -0.7), (0.76, 0)]),
        ("body", [(-1, -0.12), (0.86, -0.12), (1, 0.06), (1, 0.52), (-1, 0.52)]),
        ("cream", [(-0.38, -0.18), (-0.26, -0.46), (-0.04, -0.46), (-0.04, -0.18)]),
        ("cream", [(0.14, -0.18), (0.14, -0.46), (0.28, -0.46), (0.42, -0.18)]),
        ("black", oval(-0.54, 0.54, 0.21, 0.21)),
        ("black", oval(0.54, 0.54, 0.21, 0.21)),
    ],
    "boat": [
        ("body", [(-1, 0.32), (1, 0.32), (0.64, 0.92), (-0.64, 0.92)]),
        ("dark", rectangle(-0.26, -1, -0.18, 0.32)),
        ("body", [(-0.18, -0.98), (0.92, 0.26), (-0.18, 0.26)]),
        ("body", [(-0.26, -0.8), (-0.26, 0.26), (-0.86, 0.26)]),
    ],
    "flower": petals(6),
    "key": [
        ("body", rectangle(-0.1, -0.24, 1, 0.18)),
        ("body", rectangle(0.32, 0.1, 0.56, 0.52)),
        ("body", rectangle(0.74, 0.1, 1, 0.62)),
        ("body", oval(-0.42, -0.03, 0.58, 0.58)),
        ("hole", oval(-0.5, -0.03, 0.19, 0.19)),
    ],
    "kite": [
        ("dark", [(0, 0.4), (0.42, 0.6), (0.2, 0.78), (0.5, 1), (0.02, 0.8), (0.2, 0.64)]),
        ("body", [(0, -1), (0.86, -0.3), (0, 0.68), (-0.86, -0.3)]),
        ("dark", rectangle(-0.03, -0.94, 0.03, 0.6)),
        ("dark", rectangle(-0.78, -0.33, 0.78, -0.27)),
    ],
}
OBJECTS: tuple[str, ...] = tuple(ICONS)
PHRASES = [phrase for phrase, _, _ in BACKGROUNDS.values()]
# Kept from training: a tenth of the (object, colour) kinds, and a tenth of the pairs of two different objects.
UNSEEN_KINDS: frozenset[tuple[str, str]] = frozenset(
    {
        ("ball", "purple"),
        ("box", "pink"),
        ("star", "green"),
        ("heart", "blue"),
        ("moon", "red"),
        ("ring", "white"),
        ("house", "orange"),
        ("tree", "yellow"),
        ("fish", "pink"),
        ("mushroom", "blue"),
        ("cup", "green"),
        ("car", "purple"),
        ("flower", "white"),
    }
)
UNSEEN_PAIRS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair)
    for pair in (
        ("car", "star"),
        ("ball", "tree"),
        ("house", "moon"),
        ("fish", "boat"),
        ("cup", "key"),
        ("heart", "flower"),
        ("ring", "kite"),
        ("mushroom", "box"),
        ("car", "fish"),
        ("star", "cup"),
        ("boat", "kite"),
        ("tree", "key"),
    )
)
WORDS: tuple[str, ...] = tuple(sorted({"a", "an", *OBJECTS, *COLOURS, *" ".join([*RELATIONS, *PHRASES]).split()}))


class Thing(NamedTuple):
    """An icon: centre in 0..1 of the picture's width and height, radius in units of its shorter side."""

    name: str
    colour: str
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """One or two things on a background; the relation is the first thing's to the second. The seed sets the texture."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str
    seed: int

    @property
    def seen(self) -> bool:
        """Whether training shows scenes of this composition."""
        kinds = {(thing.name, thing.colour) for thing in self.things}
        return not kinds & UNSEEN_KINDS and frozenset(thing.name for thing in self.things) not in UNSEEN_PAIRS

    @property
    def caption(self) -> str:
        """For example "a red car left of an orange star on grass"."""
        nouns = [f"{'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.name}" for thing in self.things]
        return " ".join([f" {self.relation} ".join(nouns), BACKGROUNDS[self.background][0]])


def compose(seed: int, seen: bool = True) -> Scene:
    """The scene of this seed, of a composition that training shows, or of one that it does not."""
    rng = np.random.default_rng(seed)
    while (scene := draw(rng, seed)).seen != seen:
        pass
    return scene


def draw(rng: np.random.Generator, seed: int) -> Scene:
    """Any scene, the next of this generator."""
    background = str(rng.choice(list(BACKGROUNDS)))
    kinds = [(name, colour) for name in OBJECTS for colour in COLOURS]
    first, second = (kinds[int(i)] for i in rng.choice(len(kinds), 2, replace=False))
    if rng.random() < SINGLE_SHARE:
        x, y = rng.uniform(*SINGLE_CENTRE, 2).tolist()
        return Scene((Thing(*first, x, y, rng.uniform(*SINGLE_RADIUS)),), None, background, seed)
    relation = str(rng.choice(RELATIONS))
    along, across = rng.uniform(-1, 1, (2, 2)) * np.array(PAIR_JITTER)[:, None] + np.array([PAIR_CENTRES, (0.5, 0.5)])
    if relation in ("right of", "below"):
        along = along[::-1]
    xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
    radii = rng.uniform(*PAIR_RADIUS, 2)
    things = (Thing(*kind, float(x), float(y), float(r)) for kind, x, y, r in zip((first, second), xs, ys, radii))
    return Scene(tuple(things), relation, background, seed)


def texture(background: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Strokes as places (n 1|k 2) in 0..1, shapes (n|1 k 2) and a width, both in units of the shorter side."""
    match background:
        case "grass":
            lean, height = rng.uniform(-0.02, 0.02, 60), rng.uniform(0.03, 0.06, 60)
            return rng.random((60, 1, 2)), np.stack([np.zeros((60, 2)), np.stack([lean, -height], 1)], 1), 0.012
        case "sea":
            wave = np.array([(-0.09, 0), (-0.045, -0.02), (0, 0), (0.045, -0.02), (0.09, 0)])
            return rng.random((22, 1, 2)), wave[None], 0.014
        case "brick":
            rows = (np.arange(-1, 9) + rng.random()) / 8
            courses = [[(0, y), (1, y)] for y in rows]
            phase = rng.random()
            joints = [
                [(x, y), (x, y + 1 / 8)] for i, y in enumerate(rows) for x in (np.arange(4) + i / 2 + phase) / 4 % 1
            ]
            return np.array(courses + joints), np.zeros((1, 2, 2)), 0.014
        case _:
            count, width = {"sand": (70, 0.016), "snow": (40, 0.026), "night": (14, 0.018)}[background]
            return rng.random((count, 1, 2)), np.array([[(-width / 2, 0), (width / 2, 0)]]), width


def draw_ground(scene: Scene, size: tuple[int, int]) -> Image.Image:
    _, ground, mark = BACKGROUNDS[scene.background]
    picture = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(picture)
    # A generator of its own, so that a scene put together by hand has a texture as well.
    places, shapes, width = texture(scene.background, np.random.default_rng((scene.seed, 1)))
    for stroke in (places * size + shapes * min(size)).reshape(len(places), -1).tolist():
        draw.line(stroke, mark, max(1, round(width * min(size))))
    return picture


def paints(colour: str) -> dict[str, RGB]:
    """Every paint of an icon in this colour, by the names used in ICONS."""
    body = np.array(COLOURS[colour])
    tones = {"body": body, "dark": body * 0.68, "light": body * 0.4 + 153, "outline": body * 0.25}
    return NEUTRALS | {name: (int(r), int(g), int(b)) for name, (r, g, b) in tones.items()}


def draw_thing(thing: Thing, size: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    """Picture and silhouette ("L", outline included) of one thing alone."""
    paint = paints(thing.colour)
    picture, silhouette = Image.new("RGB", size, paint["outline"]), Image.new("L", size)
    colour, shape = ImageDraw.Draw(picture), ImageDraw.Draw(silhouette)
    scale, centre = thing.radius * min(size), np.array((thing.x, thing.y)) * size
    for name, points in ICONS[thing.name]:
        outline = (np.array(points) * scale + centre).ravel().tolist()
        colour.polygon(outline, paint["outline" if name == "hole" else name])
        shape.polygon(outline, 0 if name == "hole" else 255)
        # Half of this stroke falls on the part itself, where the part's paint covers it.
        shape.line(outline + outline[:4], 255, round(2 * OUTLINE * scale))
    return picture, silhouette


def render(scene: Scene, size: tuple[int, int] = (64, 64)) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene at size (width, height): picture (h w 3) uint8, and one mask per thing (k h w) bool."""
    large = (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING)
    picture, masks = draw_ground(scene, large), []
    for thing in scene.things:
        icon, silhouette = draw_thing(thing, large)
        picture.paste(icon, mask=silhouette)
        masks.append(np.asarray(silhouette.reduce(SUPERSAMPLING)) > 127)
    # Area averaging, unlike a sharper filter, leaves no halo beside the outlines.
    return np.asarray(picture.reduce(SUPERSAMPLING)), np.stack(masks)
