"""What a run computed as a picture: regions coloured and named, the guidance scale at every place."""

import math
from collections.abc import Sequence
from itertools import cycle
from textwrap import wrap
from typing import NamedTuple

import numpy as np
from einops import rearrange
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from ..segment import Word

PANEL = 384  # pixels along the longer side of a shown picture
MARGIN, LINE = 16, 20
INK, PAPER, FAINT = (30, 30, 34), (255, 255, 255), (120, 120, 128)
START, END = (205, 205, 210), (110, 110, 118)
WORD_COLOURS = [
    (230, 60, 60),
    (60, 110, 230),
    (250, 190, 40),
    (40, 160, 90),
    (160, 80, 200),
    (250, 130, 50),
    (60, 190, 210),
    (235, 120, 180),
    (150, 110, 70),
    (170, 205, 60),
    (90, 90, 170),
    (20, 110, 110),
]
VIRIDIS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)


class Named(NamedTuple):
    name: str
    mask: np.ndarray  # (h w) bool
    colour: tuple[int, int, int]


def named_colour(text: str) -> tuple[int, int, int] | None:
    """The colour that a word names."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(text)
    except ValueError:
        return None
    return red, green, blue


def word_colours(words: Sequence[Word]) -> list[tuple[int, int, int]]:
    """A word that names a colour is shown in it; others in colours that are not nearly one of those."""
    named = [named_colour(word.text) for word in words]
    free = [one for one in WORD_COLOURS if all(math.dist(one, other) > 150 for other in named if other)]
    others = cycle(free or WORD_COLOURS)
    return [colour or next(others) for colour in named]


def named_areas(scores: Tensor, words: Sequence[Word], chunk: int | None = None) -> list[Named]:
    """Token scores (t h w) -> the areas of the start tokens, of every word, and of the rest: ends and padding.

    There is a start token every `chunk` tokens.
    A pixel belongs to its best token, a word owns the pixels of all its tokens; words without a pixel are left out.
    """
    best = scores.argmax(0).cpu().numpy()
    start = best % (chunk or len(scores)) == 0
    owned = [
        Named(word.text, (best >= word.start) & (best < word.stop) & ~start, colour)
        for word, colour in zip(words, word_colours(words))
    ]
    rest = ~np.logical_or.reduce([start, *(area.mask for area in owned)])
    return [
        area
        for area in (Named("start token", start, START), Named("end and padding", rest, END), *owned)
        if area.mask.any()
    ]


def to_image(picture: Tensor) -> Image.Image:
    """Picture (3 h w) in [0, 1] -> 8 bit."""
    return Image.fromarray(rearrange((picture * 255).round().byte().cpu(), "c h w -> h w c").numpy())


def enlarged(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.resize(size, Image.Resampling.NEAREST if image.width < size[0] else Image.Resampling.LANCZOS)


def coloured(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Values (h w) between low and high -> a picture in viridis colours."""
    place = np.clip((values - low) / (high - low) if high > low else np.full_like(values, 0.5), 0, 1) * (
        len(VIRIDIS) - 1
    )
    channels = [np.interp(place, range(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def panels(
    image: Image.Image, areas: Sequence[Named], scale: np.ndarray, longer: int = PANEL
) -> tuple[Image.Image, Image.Image, Image.Image]:
    """The picture, its areas over it, and the scale map (h w), each with a longer side of that many pixels."""
    zoom = longer / max(image.size)
    size = max(1, round(image.width * zoom)), max(1, round(image.height * zoom))
    paint = np.zeros((*areas[0].mask.shape, 3), np.uint8)
    for area in areas:
        paint[area.mask] = area.colour
    shown = enlarged(image.convert("RGB"), size)
    regions = Image.blend(shown, Image.fromarray(paint).resize(size, Image.Resampling.NEAREST), 0.65)
    return shown, regions, coloured(scale, scale.min(), scale.max()).resize(size, Image.Resampling.NEAREST)


def sheet(
    image: Image.Image, scores: Tensor, scale: Tensor, words: Sequence[Word], title: str, chunk: int | None = None
) -> Image.Image:
    """The picture, its regions (scores (t h w)) with their names, and the scale map (h w) with its colour bar."""
    areas, values = named_areas(scores, words, chunk), scale.cpu().numpy().astype(float)
    drawn = panels(image, areas, values)
    width, height = drawn[0].size

    wide, font = max(width, 200), ImageFont.load_default(14)
    lines = wrap(title, int((3 * wide + 2 * MARGIN) / font.getlength("n")))
    top = MARGIN + (len(lines) + 1) * LINE
    page = Image.new("RGB", (4 * MARGIN + 3 * wide, top + height + MARGIN + max(2, len(areas)) * LINE + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    for i, line in enumerate(lines):
        draw.text((MARGIN, MARGIN - 4 + i * LINE), line, INK, font)
    lefts = [MARGIN + i * (wide + MARGIN) for i in range(3)]
    for left, panel, caption in zip(
        lefts, drawn, ("picture", "regions, mean of the middle steps", "guidance scale, mean")
    ):
        page.paste(panel, (left, top))
        draw.text((left, top - LINE), caption, FAINT, font)
    for i, area in enumerate(sorted(areas, key=lambda area: -area.mask.mean())):
        y = top + height + MARGIN // 2 + i * LINE
        draw.rectangle((lefts[1], y + 2, lefts[1] + 14, y + 16), area.colour, FAINT)
        share = f"{area.mask.mean():.0%}" if area.mask.mean() >= 0.01 else "<1%"
        draw.text((lefts[1] + 22, y), f"{area.name}  {share}", INK, font)
    y = top + height + MARGIN // 2
    bar = coloured(np.linspace(0, 1, wide)[None].repeat(12, 0), 0, 1)
    page.paste(bar, (lefts[2], y))
    draw.text((lefts[2], y + 14), f"{values.min():.2f}", INK, font)
    draw.text((lefts[2] + wide, y + 14), f"{values.max():.2f}", INK, font, anchor="ra")
    return page
