"""Flatland: a toy world of shaded things before a horizon, with captions whose every clause is true, drawn from a seed.

Some compositions are kept from training, so that it can be measured what a model makes of what it never saw.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

from .icons import ICONS, RGB

COLOURS: dict[str, RGB] = {
    "red": (222, 36, 44),
    "orange": (250, 132, 20),
    "yellow": (250, 218, 40),
    "green": (52, 178, 66),
    "teal": (20, 160, 158),
    "blue": (48, 92, 232),
    "purple": (140, 56, 196),
    "pink": (250, 132, 192),
    "white": (244, 244, 246),
    "grey": (132, 136, 144),
}
GROUNDS: dict[str, str] = {  # name: phrase in the caption
    "grass": "on grass",
    "sea": "at sea",
    "sand": "on sand",
    "snow": "in snow",
    "night": "at night",
    "space": "in space",
    "water": "under water",
    "room": "indoors",
}
OBJECTS: tuple[str, ...] = tuple(ICONS)
PLURALS = {"box": "boxes", "fish": "fish", "cactus": "cacti"}  # the others take an s
NUMBERS = ("", "", "two", "three")  # by count, where the article does not say it
SIZES = {"small": (0.098, 0.108), "": (0.136, 0.15), "large": (0.19, 0.21)}  # radii, of the shorter side
PATTERNS = ("", "striped", "spotted")
ALONG = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # an axis and which way
ACROSS = ("in front of", "behind")
RELATIONS = (*ALONG, *ACROSS)
MOST, LONGEST = 5, 30  # things of a scene, words of a caption

# How often scenes are of so many groups, groups of so many things, and with which words.
GROUP_SHARES = {1: 0.12, 2: 0.3, 3: 0.36, 4: 0.22}
NUMBER_SHARES = {1: 0.72, 2: 0.17, 3: 0.11}
SIZE_SHARES = {"": 0.5, "small": 0.3, "large": 0.2}
PATTERN_SHARES = {"": 0.56, "striped": 0.22, "spotted": 0.22}
RELATION_SHARES = dict(zip(RELATIONS, (0.2, 0.2, 0.2, 0.2, 0.1, 0.1)))

APART = 0.1  # of the shorter side: between the centres of groups beside each other, along their relation
HIDDEN = (0.1, 0.4)  # share of a thing that the one in front of it hides
PLACES, ATTEMPTS = 200, 12  # that are tried for a group, and for all of them


Value = TypeVar("Value")


class Group(NamedTuple):
    """Things of one kind that the caption names together: "two large striped red cars"."""

    name: str
    colour: str
    size: str = ""
    pattern: str = ""
    number: int = 1

    @property
    def phrase(self) -> str:
        words = [self.size, self.pattern, self.colour, self.name if self.number == 1 else plural(self.name)]
        described = " ".join(filter(None, words))
        return f"{NUMBERS[self.number] or ('an' if described[0] in 'aeiou' else 'a')} {described}"


class Thing(NamedTuple):
    """One of a group: centre in 0..1 of the picture's width and height, radius in units of its shorter side."""

    group: int
    x: float
    y: float
    radius: float


class Scene(NamedTuple):
    """One to four groups of things on a ground; relation i is that of group i to group i + 1. Things lie from back to
    front. The seed sets the ground's shapes."""

    groups: tuple[Group, ...]
    relations: tuple[str, ...]
    things: tuple[Thing, ...]
    ground: str
    seed: int

    @property
    def hard(self) -> bool:
        """Whether it holds three things or more."""
        return len(self.things) > 2

    @property
    def hidden(self) -> tuple[bool, ...]:
        """Of each group, whether another is in front of it."""
        ahead = [relation == "in front of" for relation in self.relations]
        behind = [relation == "behind" for relation in self.relations]
        return tuple(a or b for a, b in zip([False, *ahead], [*behind, False]))

    @property
    def unseen(self) -> tuple[str, ...]:
        """What of it training never shows: "kind", "number", "pair"."""
        names = [group.name for group in self.groups]
        there = {
            "kind": UNSEEN_KINDS & {(group.name, group.colour) for group in self.groups},
            "number": UNSEEN_NUMBERS & {(group.name, group.number) for group in self.groups},
            "pair": UNSEEN_PAIRS & {frozenset(pair) for pair in zip(names, names[1:])},
        }
        return tuple(what for what, found in there.items() if found)

    @property
    def caption(self) -> str:
        """For example "a red car left of two small striped blue stars on grass"."""
        phrases = [group.phrase for group in self.groups]
        joined = [f"{phrase} {relation}" for phrase, relation in zip(phrases, self.relations)] + phrases[-1:]
        return " ".join([*joined, GROUNDS[self.ground]])


def plural(name: str) -> str:
    return PLURALS.get(name, name + "s")


def a_tenth(values: Sequence[Value], seed: int) -> frozenset[Value]:
    chosen = np.random.default_rng(seed).permutation(len(values))[: len(values) // 10]
    return frozenset(values[int(i)] for i in chosen)


UNSEEN = ("kind", "number", "pair")
# Kept from training: a tenth of the (object, colour) kinds, of the (object, count) ones, and of the pairs of objects
# that a relation joins.
UNSEEN_KINDS = a_tenth([(name, colour) for name in OBJECTS for colour in COLOURS], 1)
UNSEEN_NUMBERS = frozenset((name, count) for count in (2, 3) for name in a_tenth(OBJECTS, 10 * count))
UNSEEN_PAIRS = a_tenth([frozenset((a, b)) for i, a in enumerate(OBJECTS) for b in OBJECTS[:i]], 3)
WORDS: tuple[str, ...] = tuple(
    sorted(
        {"a", "an", *NUMBERS[2:], *filter(None, [*SIZES, *PATTERNS]), *COLOURS, *OBJECTS, *map(plural, OBJECTS)}
        | set(" ".join([*RELATIONS, *GROUNDS.values()]).split())
    )
)


def compose(seed: int, seen: bool = True, hard: bool | None = None) -> Scene:
    """The scene of this seed, hard, easy or either.

    It is of a composition that training shows, or else of an unseen kind, number or pair, in turns.
    """
    rng, wanted = np.random.default_rng(seed), UNSEEN[seed % len(UNSEEN)]
    while True:
        scene = draw(rng, seed)
        if scene and hard in (None, scene.hard) and (not scene.unseen if seen else wanted in scene.unseen):
            return scene


def pick(rng: np.random.Generator, shares: Mapping[Value, float]) -> Value:
    return list(shares)[int(rng.choice(len(shares), p=list(shares.values())))]


def draw(rng: np.random.Generator, seed: int) -> Scene | None:
    """Any scene, the next of this generator, or None where its things find no place."""
    ground, number = str(rng.choice(list(GROUNDS))), pick(rng, GROUP_SHARES)
    kinds = [(name, colour) for name in OBJECTS for colour in COLOURS]
    groups = [
        Group(*kinds[int(i)], pick(rng, SIZE_SHARES), pick(rng, PATTERN_SHARES), pick(rng, NUMBER_SHARES))
        for i in rng.choice(len(kinds), number, replace=False)
    ]
    relations = [pick(rng, RELATION_SHARES) for _ in groups[1:]]
    if sum(group.number for group in groups) > MOST or not all(map(may_relate, relations, groups, groups[1:])):
        return None
    scene = Scene(tuple(groups), tuple(relations), place(rng, groups, relations) or (), ground, seed)
    return scene if scene.things and len(scene.caption.split()) <= LONGEST else None


def may_relate(relation: str, first: Group, second: Group) -> bool:
    """What is in front hides a part of one thing of about its size."""
    return relation not in ACROSS or (
        first.number == second.number == 1 and {first.size, second.size} != {"small", "large"}
    )


def formation(rng: np.random.Generator, count: int) -> np.ndarray:
    """Centres (count 2) of a group's things around its own, in units of their radius: a row, leaning a little."""
    if count == 1:
        return np.zeros((1, 2))
    if count == 3 and rng.random() < 0.5:
        row = np.array([(-1.1, 0.9), (1.1, 0.9), (0, -1.1)]) * rng.choice([1, -1])
    else:
        row = np.stack([2.15 * (np.arange(count) - (count - 1) / 2), np.zeros(count)], 1)
    angle = rng.uniform(-0.3, 0.3)
    return row @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def place(rng: np.random.Generator, groups: list[Group], relations: list[str]) -> tuple[Thing, ...] | None:
    """Things from back to front, so that every relation holds and nothing else overlaps; None where none is found."""
    radii = [rng.uniform(*SIZES[group.size]) for group in groups]
    shapes = [formation(rng, group.number) * radius for group, radius in zip(groups, radii)]
    if any((np.ptp(shape, 0) + 2 * radius > 1).any() for shape, radius in zip(shapes, radii)):
        return None
    attempts = (attempt(rng, groups, relations, radii, shapes) for _ in range(ATTEMPTS))
    centres = next((found for found in attempts if found), None)
    if centres is None:
        return None
    depth = [0]  # of each group: what is behind another is drawn before it
    for relation in relations:
        depth.append(depth[-1] + {"in front of": -1, "behind": 1}.get(relation, 0))
    things = [Thing(i, float(x), float(y), radii[i]) for i, places in enumerate(centres) for x, y in places]
    return tuple(sorted(things, key=lambda thing: depth[thing.group]))


def attempt(
    rng: np.random.Generator, groups: list[Group], relations: list[str], radii: list[float], shapes: list[np.ndarray]
) -> list[np.ndarray] | None:
    """Centres (count 2) of every group's things, or None where one of them finds no place beside those before it."""
    placed: list[np.ndarray] = []
    for i, (radius, shape) in enumerate(zip(radii, shapes)):
        relation = relations[i - 1] if i else None
        tried = rng.uniform(radius - shape.min(0), 1 - radius - shape.max(0), (PLACES, 2))[:, None] + shape
        for other, its_radius in list(zip(placed, radii))[: -1 if relation in ACROSS else None]:
            distances = np.linalg.norm(tried[:, :, None] - other, axis=-1)
            tried = tried[(distances > 1.02 * (radius + its_radius)).all((1, 2))]
        if relation in ALONG:
            tried = tried[stands(relation, placed[-1], tried)]
        elif relation:
            before, way = (groups[i - 1].name, placed[-1][0], radii[i - 1]), 1 if relation == "behind" else -1
            tried = (one for one in tried if hides(*((groups[i].name, one[0], radius), before)[::way]))
        if (found := next(iter(tried), None)) is None:
            return None
        placed.append(found)
    return placed


def stands(relation: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Whether things (m 2) stand so to others (n k 2), clearly: (n) bool."""
    axis, sign = ALONG[relation]
    gap = (sign * first[:, axis]).min() - (sign * second[..., axis]).max(1)
    away = np.abs(first.mean(0) - second.mean(1))
    return (gap > APART / 2) & (away[:, axis] > 1.3 * away[:, 1 - axis])


Outline = tuple[str, np.ndarray, float]  # an icon's name, its centre and its radius


def hides(near: Outline, far: Outline) -> bool:
    """Whether the near thing stands lower and covers a part of the far one."""
    lower = near[1][1] - far[1][1] > 0.3 * min(near[2], far[2]) and np.linalg.norm(near[1] - far[1]) > APART
    return bool(lower) and HIDDEN[0] < hidden_share(near, far) < HIDDEN[1]


@cache
def silhouette(name: str, side: int = 64) -> np.ndarray:
    """Where an icon is (side side), bool."""
    image = Image.new("L", (side, side))
    shape = ImageDraw.Draw(image)
    for paint, points in ICONS[name]:
        shape.polygon((((np.array(points) + 1) / 2) * side).ravel().tolist(), 0 if paint == "hole" else 1)
    return np.asarray(image, bool)


def hidden_share(near: Outline, far: Outline) -> float:
    """The share of the far thing that the near one covers."""
    inside = silhouette(far[0])
    side = len(inside)
    points = ((np.argwhere(inside)[:, ::-1] + 0.5) / side * 2 - 1) * far[2] + far[1]
    own = np.floor(((points - near[1]) / near[2] + 1) / 2 * side).astype(int)
    within = ((own >= 0) & (own < side)).all(1)
    return float(silhouette(near[0])[own[within, 1], own[within, 0]].sum() / len(points))
