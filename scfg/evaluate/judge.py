"""Reads a picture of Flatland back into its things, and says what of a caption came true."""

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..diffusion import embedded_checkpoint
from ..flatland import BACKGROUNDS, COLOURS, OBJECTS, Scene

SIDE = 64  # pictures are read at this height and width
SMALLEST = 40  # pixels of that picture; smaller pieces are specks, not things


class Found(NamedTuple):
    name: str
    colour: str
    centre: tuple[float, float]  # x, y in 0..1
    mask: Tensor  # (64 64) bool


class Reading(NamedTuple):
    things: tuple[Found, ...]
    background: str


class Verdict(NamedTuple):
    objects: tuple[bool, ...]  # one for each thing of the caption
    colours: tuple[bool, ...]
    background: bool
    relation: bool | None  # None where the caption has none
    number: bool  # as many things as the caption has
    whole: bool  # all of these


class Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.first = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1)
        self.second = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(8, out_channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.first(x)))
        return x + F.silu(self.norms[1](self.second(x)))


class Judge(nn.Module):
    """Every pixel's object (or none) and colour, and the background of the whole picture."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 128)):
        super().__init__()
        self.down = nn.ModuleList(Block(before, width, stride=2) for before, width in zip((3, *widths), widths))
        self.up = nn.ModuleList(Block(before + width, width) for before, width in zip(widths[1:], widths))
        self.things = nn.Conv2d(widths[0], 1 + len(OBJECTS) + len(COLOURS), 1)
        self.background = nn.Linear(widths[-1], len(BACKGROUNDS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (b 3 64 64) in [0, 1] -> logits of object (b 17 64 64), colour (b 8 64 64) and background (b 6)."""
        x, skips = pictures * 2 - 1, []
        for block in self.down:
            x = block(x)
            skips.append(x)
        background, x = self.background(x.mean((-2, -1))), skips.pop()
        for block in reversed(self.up):
            skip = skips.pop()
            x = block(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="bilinear"), skip], dim=1))
        logits = F.interpolate(self.things(x), size=pictures.shape[-2:], mode="bilinear")
        objects, colours = torch.split(logits, [1 + len(OBJECTS), len(COLOURS)], dim=1)
        return objects, colours, background

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[Reading]:
        """Pictures (b 3 h w) in [0, 1] -> what is on each; a thing is a connected piece of pixels of an object."""
        things, colours, backgrounds = self(F.interpolate(pictures, size=(SIDE, SIDE), mode="area"))
        things, colours = things.log_softmax(1), colours.log_softmax(1)
        readings = []
        for thing, colour, background, labels in zip(things, colours, backgrounds, pieces(things.argmax(1) > 0)):
            masks = [labels == label for label in labels.unique() if label > 0]
            masks = [mask for mask in masks if mask.sum() >= SMALLEST]
            found = (
                Found(best(OBJECTS, thing[1:], mask), best(tuple(COLOURS), colour, mask), centre(mask), mask)
                for mask in masks
            )
            readings.append(Reading(tuple(found), tuple(BACKGROUNDS)[background.argmax()]))
        return readings


def best(names: Sequence[str], logits: Tensor, mask: Tensor) -> str:
    """The name whose log probabilities (n h w) have the largest mean over the mask."""
    return names[int(logits[:, mask].mean(1).argmax())]


def centre(mask: Tensor) -> tuple[float, float]:
    y, x = (mask.nonzero() + 0.5).mean(0) / SIDE
    return float(x), float(y)


def pieces(masks: Tensor) -> Tensor:
    """Masks (b h w) -> labels (b h w), one positive number for every connected piece, corners touching; 0 elsewhere."""
    height, width = masks.shape[-2:]
    numbers = rearrange(torch.arange(1, height * width + 1, device=masks.device), "(h w) -> h w", h=height)
    labels, before = repeat(numbers, "h w -> b h w", b=len(masks)).float() * masks, None
    while before is None or not torch.equal(labels, before):  # the highest number of a piece spreads over it
        labels, before = F.max_pool2d(labels, 3, stride=1, padding=1) * masks, labels
    return labels.long()


def relates(relation: str, first: Found, second: Found) -> bool:
    """Whether the first thing stands so to the second: that way, and farther that way than across."""
    right, down = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    along, across = {
        "left of": (-right, down),
        "right of": (right, down),
        "above": (-down, right),
        "below": (down, right),
    }[relation]
    return along > abs(across)


def verdict(scene: Scene, reading: Reading) -> Verdict:
    """What of the scene's caption is in the picture.

    The caption's things are paired with those found so that as many objects and colours as possible agree, objects
    first: what has the other's colour is the right object. A relation holds when it holds in every best pairing and
    each of the two agrees with the caption in its object or its colour.
    """
    background = reading.background == scene.background
    wanted, found = scene.things, reading.things
    nobody: list[Found | None] = [None] * max(0, len(wanted) - len(found))
    pairings = []
    for some in permutations([*found, *nobody], len(wanted)):
        objects = tuple(f is not None and f.name == thing.name for thing, f in zip(wanted, some))
        colours = tuple(f is not None and f.colour == thing.colour for thing, f in zip(wanted, some))
        placed = [f for f in some if f is not None]
        holds = scene.relation is not None and all(map(max, objects, colours)) and relates(scene.relation, *placed)
        pairings.append(((sum(objects + colours), sum(objects)), objects, colours, holds))
    most = max(score for score, *_ in pairings)
    _, objects, colours, holds = next(pairing for pairing in pairings if pairing[0] == most)
    relation = None if scene.relation is None else all(holds for score, _, _, holds in pairings if score == most)
    number = len(found) == len(wanted)
    return Verdict(
        objects,
        colours,
        background,
        relation,
        number,
        all((*objects, *colours, background, relation is not False, number)),
    )


def load_judge() -> Judge:
    """The judge whose weights come with the package."""
    judge = Judge()
    weights = load_file(embedded_checkpoint().with_name("judge.safetensors"))
    judge.load_state_dict({name: value.float() for name, value in weights.items()})
    return judge.eval()
