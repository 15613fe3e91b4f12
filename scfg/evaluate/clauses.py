"""Reads a picture of Flatland back into its things, and says of every clause of a caption whether it came true."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..flatland.scenes import ACROSS, ALONG, COLOURS, GROUNDS, MOST, OBJECTS, PATTERNS, SIZES, Group, Scene
from .judge import Block

SIDE = 128  # pictures are read at this height and width
GRID = 64  # and things at this one
SMALLEST = 16  # cells of the grid; fewer are a speck, not a thing
SPREAD = 2  # cells around a centre whose votes count for it
HEADS = {  # what is read at every cell
    "object": ("", *OBJECTS),
    "colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "pattern": PATTERNS,
    "hidden": ("", "hidden"),
}


class Found(NamedTuple):
    name: str
    colour: str
    size: str
    pattern: str
    hidden: bool  # in part, by another thing
    centre: tuple[float, float]  # x, y in 0..1, of all of it
    mask: Tensor  # (64 64) bool: what is seen of it


class Reading(NamedTuple):
    things: tuple[Found, ...]
    ground: str


class Clause(NamedTuple):
    """One thing that a caption says, and whether it is so in the picture."""

    kind: str  # object, colour, size, pattern, number, a relation, ground, or "nothing else"
    text: str
    true: bool


class Judge(nn.Module):
    """At every cell what stands there and where its centre is; and the ground of the whole picture."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 128)):
        super().__init__()
        self.down = nn.ModuleList(Block(before, width, stride=2) for before, width in zip((3, *widths), widths))
        self.up = nn.ModuleList(Block(before + width, width) for before, width in zip(widths[1:], widths))
        self.cells = nn.Conv2d(widths[0], sum(map(len, HEADS.values())) + 2, 1)
        self.ground = nn.Linear(widths[-1], len(GROUNDS))

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Pictures (b 3 128 128) in [0, 1] -> logits (b n 64 64) by head, the way to the centre (b 2 64 64: x, y, in
        cells) and logits of the ground (b 8)."""
        x, skips = pictures * 2 - 1, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        ground, x = self.ground(x.mean((-2, -1))), skips.pop()
        for block in reversed(self.up):
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="bilinear"), skip], dim=1))
        *logits, way = torch.split(self.cells(x), [*map(len, HEADS.values()), 2], dim=1)
        return dict(zip(HEADS, logits)), way * 8, ground

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[Reading]:
        """Pictures (b 3 h w) in [0, 1] -> what is on each."""
        logits, way, ground = self(F.interpolate(pictures, size=(SIDE, SIDE), mode="area"))
        chances = {head: of_head.log_softmax(1) for head, of_head in logits.items()}
        readings = []
        for i, own in enumerate(way):
            masks = gathered(chances["object"][i].argmax(0) > 0, own)
            things = (found({head: of_head[i] for head, of_head in chances.items()}, own, mask) for mask in masks)
            readings.append(Reading(tuple(things), tuple(GROUNDS)[ground[i].argmax()]))
        return readings


def as_arrays(scene: Scene, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the judge should read of a scene drawn at 128x128: whose every cell is (64 64), 0 or 1 + a thing's number;
    and of each thing (5 7) the indices of its HEADS and its centre."""
    shares = masks.reshape(len(masks), GRID, SIDE // GRID, GRID, SIDE // GRID).mean((2, 4))
    things = np.zeros((MOST, len(HEADS) + 2), np.float32)
    for row, thing in zip(things, scene.things):
        group = scene.groups[thing.group]
        names = group.name, group.colour, group.size, group.pattern, "hidden" if scene.hidden[thing.group] else ""
        row[:] = [*(values.index(name) for values, name in zip(HEADS.values(), names)), thing.x, thing.y]
    return np.where(shares.max(0) >= 0.5, 1 + shares.argmax(0), 0).astype(np.uint8), things


def places(way: Tensor) -> Tensor:
    """Where each cell's thing has its centre (2 h w), from the way there; in cells."""
    ys, xs = torch.meshgrid(*map(torch.arange, way.shape[-2:]), indexing="ij")
    return way + torch.stack([xs, ys]).to(way)


def gathered(inside: Tensor, way: Tensor) -> list[Tensor]:
    """Masks (h w) of the things that cells (h w) are inside of: cells that point to one place are one thing."""
    x, y = places(way)
    votes = torch.zeros(inside.shape, device=inside.device)
    at = y[inside].round().long().clamp(0, GRID - 1), x[inside].round().long().clamp(0, GRID - 1)
    votes = votes.index_put(at, votes.new_ones(()), accumulate=True)
    window = 2 * SPREAD + 1
    near, centres = F.avg_pool2d(votes[None], window, 1, SPREAD)[0] * window**2, []
    while near.max() >= SMALLEST:
        row, column = divmod(int(near.argmax()), GRID)
        centres.append((column, row))
        near[max(row - 2 * SPREAD, 0) : row + 2 * SPREAD + 1, max(column - 2 * SPREAD, 0) : column + 2 * SPREAD + 1] = 0
    if not centres:
        return []
    nearest = torch.stack([torch.hypot(x - column, y - row) for column, row in centres]).argmin(0)
    return [(nearest == i) & inside for i in range(len(centres))]


def found(chances: dict[str, Tensor], way: Tensor, mask: Tensor) -> Found:
    """The thing of a mask, by the mean of its cells' log probabilities."""
    means = {head: of_head[:, mask].mean(1) for head, of_head in chances.items()}
    means["object"][0] = -torch.inf
    name, colour, size, pattern, hidden = (names[int(means[head].argmax())] for head, names in HEADS.items())
    x, y = (places(way)[:, mask].median(1).values + 0.5) / GRID
    return Found(name, colour, size, pattern, bool(hidden), (float(x), float(y)), mask)


def matched(groups: Sequence[Group], things: Sequence[Found]) -> list[list[Found]]:
    """The things found for each group, no more than it has: the likeliest pairs first, by object before colour."""
    wanted = [(number, group) for number, group in enumerate(groups) for _ in range(group.number)]
    scores = [
        (
            8 * (group.name == thing.name)
            + 4 * (group.colour == thing.colour)
            + 2 * (group.pattern == thing.pattern)
            + (group.size == thing.size),
            -i,
            -j,
        )
        for i, (_, group) in enumerate(wanted)
        for j, thing in enumerate(things)
    ]
    of_group: list[list[Found]] = [[] for _ in groups]
    taken: set[tuple[str, int]] = set()
    for score, i, j in sorted(scores, reverse=True):
        if score >= 4 and not taken & {("wanted", i), ("found", j)}:
            taken |= {("wanted", i), ("found", j)}
            of_group[wanted[-i][0]].append(things[-j])
    return of_group


def verdict(scene: Scene, reading: Reading) -> list[Clause]:
    """Every clause of the scene's caption, and last whether nothing else is in the picture."""
    of_group, clauses = matched(scene.groups, reading.things), []
    for group, own in zip(scene.groups, of_group):
        parts = {"name": group.name, "colour": group.colour, "size": group.size, "pattern": group.pattern}
        for kind, wanted in parts.items():
            is_so = bool(own) and all(getattr(thing, kind) == wanted for thing in own)
            if wanted or kind == "pattern":  # what is not called striped or spotted is plain
                what = "object" if kind == "name" else kind
                clauses.append(Clause(what, f"{wanted or 'plain'} ({group.phrase})", is_so))
        clauses.append(Clause("number", group.phrase, len(own) == group.number))
    for i, relation in enumerate(scene.relations):
        text = f"{scene.groups[i].phrase} {relation} {scene.groups[i + 1].phrase}"
        clauses.append(Clause(relation, text, stand_so(relation, of_group[i], of_group[i + 1])))
    clauses.append(Clause("ground", GROUNDS[scene.ground], reading.ground == scene.ground))
    return [*clauses, Clause("nothing else", scene.caption, len(reading.things) <= len(scene.things))]


def stand_so(relation: str, first: Sequence[Found], second: Sequence[Found]) -> bool:
    """Whether things stand so to others: each that way, all of them farther that way than across; in front: lower, and
    hiding."""
    if not first or not second:
        return False
    if relation in ACROSS:
        near, far = (first[0], second[0])[:: 1 if relation == "in front of" else -1]
        return far.hidden and near.centre[1] > far.centre[1] and touches(near.mask, far.mask)
    axis, sign = ALONG[relation]
    beyond = min(sign * thing.centre[axis] for thing in first) > max(sign * thing.centre[axis] for thing in second)
    means = [[sum(thing.centre[k] for thing in some) / len(some) for k in (0, 1)] for some in (first, second)]
    away = [a - b for a, b in zip(*means)]
    return beyond and sign * away[axis] > abs(away[1 - axis])


def touches(first: Tensor, second: Tensor) -> bool:
    grown = F.max_pool2d(first[None].float(), 5, 1, 2)[0] > 0
    return bool((grown & second).any())


def load_judge(path: Path) -> Judge:
    """The judge whose weights come with the package."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return judge.eval()
