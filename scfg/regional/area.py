"""Areas of the picture, from words, masks or the segmentation, combined by &, | and ~."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ..segment import Regions, Word, blur

if TYPE_CHECKING:  # areas of words need no Pillow
    from PIL import Image

# words that name nothing that could be seen
FUNCTION_WORDS = frozenset(
    "a an the of in on at to by with and or left right above below under over next from for is as".split()
)
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
SMALLEST = 1 / 256  # share of the picture below which an area is not guided on its own


@dataclass(frozen=True, repr=False)
class Area:
    """A part of the picture, as a function of a step's regions: 0 to 1 at every pixel."""

    of: Callable[[Regions | None], Tensor]  # (b|1 1 h w), on any grid
    label: str
    phrases: tuple[str, ...] = ()  # of the prompt, which it needs
    needs_regions: bool = False

    def __call__(self, regions: Regions | None, size: tuple[int, int]) -> Tensor:
        """(b|1 1 h w) of this size."""
        return resized(self.of(regions), size)

    def combined(self, other: "Area", sign: str, join: Callable[[Tensor, Tensor], Tensor]) -> "Area":
        def of(regions: Regions | None) -> Tensor:
            areas = self.of(regions), other.of(regions)
            size = max((area.shape[-2:] for area in areas), key=math.prod)
            return join(*(resized(area, size) for area in areas))

        needs_regions = self.needs_regions or other.needs_regions
        return Area(of, f"({self.label} {sign} {other.label})", self.phrases + other.phrases, needs_regions)

    def __repr__(self) -> str:
        return self.label

    def __and__(self, other: "Area") -> "Area":
        return self.combined(other, "&", torch.minimum)

    def __or__(self, other: "Area") -> "Area":
        return self.combined(other, "|", torch.maximum)

    def __invert__(self) -> "Area":
        return Area(lambda regions: 1 - self.of(regions), f"~{self.label}", self.phrases, self.needs_regions)

    def feathered(self, times: int) -> "Area":
        """Blurred so many times: its edge is then about sqrt(2 * times) pixels of its grid wide."""

        def of(regions: Regions | None) -> Tensor:
            return reduce(lambda area, _: blur(area), range(times), self.of(regions))

        label = f"{self.label} feathered {times}"
        if self.needs_regions:
            return Area(of, label, self.phrases, True)
        once = of(None)  # what does not change with a step
        return Area(lambda regions: on_device(once, regions), label, self.phrases)


def resized(area: Tensor, size: tuple[int, int]) -> Tensor:
    """An area (b 1 h w) on a grid of this size: averaged where either side is coarser, else repeated."""
    if area.shape[-2:] == tuple(size):
        return area
    coarser = area.shape[-2] > size[0] or area.shape[-1] > size[1]
    return F.interpolate(area, size=size, mode="area" if coarser else "nearest")


def fitted(area: Area, regions: Regions | None, pictures: int, size: tuple[int, int]) -> Tensor:
    """An area's values (b|1 1 h w) for a batch, which it must be of unless it is of one picture."""
    values = area(regions, size)
    if len(values) not in (1, pictures):
        raise BadInput(f"{area.label} is of {len(values)} pictures, not of {pictures}")
    return values


def too_small(inside: Tensor) -> Tensor:
    """(b 1 1 1) where an area (b 1 h w) is empty, or nearly."""
    return inside.mean((-2, -1), keepdim=True) < SMALLEST


def mask(picture: str | Path | Tensor) -> Area:
    """From a picture file, white inside and transparent outside; or from a tensor (h w) or (b 1 h w) from 0 to 1."""
    if isinstance(picture, Tensor):
        values = picture.float()[(None,) * max(0, 4 - picture.ndim)]
        if values.ndim != 4 or values.shape[1] != 1 or not values.numel() or not 0 <= values.min() <= values.max() <= 1:
            bounds = f" from {picture.min():g} to {picture.max():g}" if picture.numel() else ""
            what = f"a mask is (h w) or (b 1 h w) with values from 0 to 1; this one is {tuple(picture.shape)}{bounds}"
            raise BadInput(what)
        return Area(lambda regions: on_device(values, regions), "a mask")
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture) as image:
                values = torch.from_numpy(lightness(image))[None, None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadInput(f"{picture} is no picture to be used as a mask: {error}") from None
    return Area(lambda regions: on_device(values, regions), str(picture))


def lightness(image: "Image.Image") -> np.ndarray:
    """(h w), 0 to 1, on black where it is transparent."""
    if image.mode.startswith("I"):  # 16 bits, which conversion would cut off at 255
        return np.clip(np.asarray(image, dtype=np.float32) / 65535, 0, 1)
    light, opaque = np.moveaxis(np.asarray(image.convert("RGBA").convert("LA"), dtype=np.float32) / 255, -1, 0)
    return light * opaque


def on_device(values: Tensor, regions: Regions | None) -> Tensor:
    """On the device where the regions are."""
    return values if regions is None else values.to(regions.scores.device)


def foreground() -> Area:
    """As the segmentation finds it."""
    return Area(lambda regions: regions.foreground, "the foreground", needs_regions=True)


def find_phrase(words: Sequence[Word], phrase: str) -> list[Word]:
    """Every word that is part of the phrase where it occurs in the prompt.

    Blanks do not matter, since CLIP's words are not always ours: it reads "64" as two words and "red-car" as three.
    """
    sought, texts = "".join(phrase.lower().split()), [word.text.lower() for word in words]

    def starting_at(first: int) -> range:
        """The words that make up the phrase, if it begins here."""
        rest, i = sought, first
        while rest and i < len(texts) and rest.startswith(texts[i]):
            rest, i = rest.removeprefix(texts[i]), i + 1
        return range(0) if rest else range(first, i)

    found = [words[i] for first in range(len(words)) for i in starting_at(first)]
    if not found:
        known = " ".join(word.text for word in words) or "none"
        raise BadInput(f"{phrase!r} is not in the prompt, whose words are: {known}")
    return found


def words(phrase: str, soft: bool = False, against_all: bool = False) -> Area:
    """The pixels where a token of the phrase scores best; where it occurs more than once, all of its places.

    Tokens compete with those of the prompt's other words that name something; against_all: with all tokens, the
    start, end and padding tokens too, as in S-CFG. soft: the phrase's share of the competing scores instead.
    """

    def of(regions: Regions) -> Tensor:
        if not regions.words:
            raise BadInput(f"the area of {phrase!r} needs a prompt that knows its words, as Diffusion.prompt makes it")
        found = []
        for scores, own_words in zip(regions.scores, regions.words):
            naming = [word for word in own_words if word.text.lower() not in FUNCTION_WORDS]
            own, others = (
                [i for word in some for i in range(word.start, word.stop)]
                for some in (find_phrase(own_words, phrase), naming)
            )
            rivals = range(len(scores)) if against_all else sorted({*own, *others})
            rest, total = scores[[i for i in rivals if i not in own]], scores[own].sum(0)
            if soft:
                found.append(total / (total + rest.sum(0)))
            else:
                found.append((scores[own].amax(0) > rest.amax(0) if len(rest) else total >= 0).float())
        return torch.stack(found)[:, None]

    return Area(of, repr(phrase), (phrase,), needs_regions=True)


def parse_area(text: str) -> Area:
    """The area of a description: words of the prompt, a picture file or "foreground", and what |, & and ~ make of them.

    | binds loosest, ~ tightest.
    """
    text = text.strip()
    for sign, join in (("|", Area.__or__), ("&", Area.__and__)):
        if sign in text:
            return reduce(join, map(parse_area, text.split(sign)))
    if text.startswith("~"):
        return ~parse_area(text[1:])
    if Path(text).suffix.lower() in PICTURES:
        return mask(text)
    if not text:
        raise BadInput("an area is a word of the prompt, a picture file or foreground; and what | & ~ make of them")
    return foreground() if text == "foreground" else words(text)
