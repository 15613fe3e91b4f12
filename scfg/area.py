"""Areas of the picture, from words, masks or the segmentation, combined by &, | and ~; and regions: areas that are guided on their own."""
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .config import BadInput
from .noise import time_of
from .segment import Regions, Word, blur

# words that name nothing that could be seen
FUNCTION_WORDS = frozenset("a an the of in on at to by with and or left right above below under over next from for is as".split())
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
SMALLEST = 1 / 256                                    # share of the picture below which an area is not guided on its own


@dataclass(frozen=True, repr=False)
class Area:
    """A part of the picture, as a function of a step's regions: 0 to 1 at every pixel."""
    of: Callable[[Regions | None], Tensor]            # (b|1 1 h w), on any grid
    said: str
    phrases: tuple[str, ...] = ()                     # of the prompt, which it needs
    needs_regions: bool = False

    def __call__(self, regions: Regions | None, size: tuple[int, int]) -> Tensor:
        """(b|1 1 h w) of this size."""
        return resized(self.of(regions), size)

    def joined(self, other: "Area", sign: str, join: Callable[[Tensor, Tensor], Tensor]) -> "Area":
        def of(regions: Regions | None) -> Tensor:
            areas = self.of(regions), other.of(regions)
            size = max((area.shape[-2:] for area in areas), key=math.prod)
            return join(*(resized(area, size) for area in areas))
        return Area(of, f"({self.said} {sign} {other.said})", self.phrases + other.phrases, self.needs_regions or other.needs_regions)

    def __repr__(self) -> str:
        return self.said

    def __and__(self, other: "Area") -> "Area":
        return self.joined(other, "&", torch.minimum)

    def __or__(self, other: "Area") -> "Area":
        return self.joined(other, "|", torch.maximum)

    def __invert__(self) -> "Area":
        return Area(lambda regions: 1 - self.of(regions), f"~{self.said}", self.phrases, self.needs_regions)

    def feathered(self, times: int) -> "Area":
        """Blurred so many times: its edge is then about sqrt(2 * times) pixels of its grid wide."""
        def of(regions: Regions | None) -> Tensor:
            return reduce(lambda area, _: blur(area), range(times), self.of(regions))
        once = None if self.needs_regions else of(None)           # what does not change with a step
        return Area(of if once is None else lambda regions: beside(once, regions), f"{self.said} feathered {times}", self.phrases, self.needs_regions)


def resized(area: Tensor, size: tuple[int, int]) -> Tensor:
    return area if area.shape[-2:] == size else F.interpolate(area, size=size, mode="area" if area.shape[-2] > size[0] or area.shape[-1] > size[1] else "nearest")


def too_small(inside: Tensor) -> Tensor:
    """(b 1 1 1) where an area (b 1 h w) is empty, or nearly."""
    return inside.mean((-2, -1), keepdim=True) < SMALLEST


def mask(picture: str | Path | Tensor) -> Area:
    """From a picture file, white inside, what is transparent outside; or from a tensor (h w) or (b 1 h w) of values from 0 to 1."""
    if isinstance(picture, Tensor):
        values = picture.float()[(None,) * max(0, 4 - picture.ndim)]
        if values.ndim != 4 or values.shape[1] != 1 or not values.numel() or not 0 <= values.min() <= values.max() <= 1:
            raise BadInput(f"a mask is (h w) or (b 1 h w) with values from 0 to 1; this one is {tuple(picture.shape)}"
                           + (f" from {picture.min():g} to {picture.max():g}" if picture.numel() else ""))
        return Area(lambda regions: beside(values, regions), "a mask")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(picture) as image:
                values = torch.from_numpy(lightness(image))[None, None]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadInput(f"{picture} is no picture to be used as a mask: {error}") from None
    return Area(lambda regions: beside(values, regions), str(picture))


def lightness(image: Image.Image) -> np.ndarray:
    """(h w), 0 to 1, on black where it is transparent."""
    if image.mode.startswith("I"):                    # 16 bits, which conversion would cut off at 255
        return np.clip(np.asarray(image, dtype=np.float32) / 65535, 0, 1)
    light, opaque = np.moveaxis(np.asarray(image.convert("RGBA").convert("LA"), dtype=np.float32) / 255, -1, 0)
    return light * opaque


def beside(values: Tensor, regions: Regions | None) -> Tensor:
    """On the device where the regions are."""
    return values if regions is None else values.to(regions.scores.device)


def foreground() -> Area:
    """As the segmentation finds it."""
    return Area(lambda regions: regions.foreground, "the foreground", needs_regions=True)


def places(words: Sequence[Word], phrase: str) -> list[Word]:
    """Every word that is part of the phrase where it occurs in the prompt; blanks do not matter, since CLIP's words are not always ours: 6 4, red - car."""
    sought, texts = "".join(phrase.lower().split()), [word.text.lower() for word in words]

    def said_from(first: int) -> range:
        """The words that make up the phrase, if it begins here."""
        rest, i = sought, first
        while rest and i < len(texts) and rest.startswith(texts[i]):
            rest, i = rest.removeprefix(texts[i]), i + 1
        return range(0) if rest else range(first, i)

    found = [words[i] for first in range(len(words)) for i in said_from(first)]
    if not found:
        raise BadInput(f"{phrase!r} is not in the prompt, whose words are: {' '.join(word.text for word in words) or 'none'}")
    return found


def words(phrase: str, soft: bool = False, against_all: bool = False) -> Area:
    """The pixels where a token of the phrase scores best; where it occurs more than once, all of its places.

    Tokens compete with those of the prompt's other words that name something; against_all: with all tokens, the start, end
    and padding tokens too, as in S-CFG. soft: the phrase's share of the competing scores instead.
    """
    def of(regions: Regions) -> Tensor:
        if not regions.words:
            raise BadInput(f"the area of {phrase!r} needs a prompt that knows its words, as Diffusion.prompt makes it")
        found = []
        for scores, said in zip(regions.scores, regions.words):
            own = [i for word in places(said, phrase) for i in range(word.start, word.stop)]
            others = [i for word in said if word.text.lower() not in FUNCTION_WORDS for i in range(word.start, word.stop)]
            rivals = range(len(scores)) if against_all else sorted({*own, *others})
            rest = scores[[i for i in rivals if i not in own]]
            total = scores[own].sum(0)
            found.append(total / (total + rest.sum(0)) if soft else (scores[own].amax(0) > rest.amax(0) if len(rest) else total >= 0).float())
        return torch.stack(found)[:, None]
    return Area(of, repr(phrase), (phrase,), needs_regions=True)


def described(text: str) -> Area:
    """The area of a description: words of the prompt, a picture file or "foreground", joined by | (loosest), & and ~ (tightest)."""
    text = text.strip()
    for sign, join in (("|", Area.__or__), ("&", Area.__and__)):
        if sign in text:
            return reduce(join, map(described, text.split(sign)))
    if text.startswith("~"):
        return ~described(text[1:])
    if Path(text).suffix.lower() in PICTURES:
        return mask(text)
    if not text:
        raise BadInput("an area is a word of the prompt, a picture file or foreground; and what | & ~ make of them")
    return foreground() if text == "foreground" else words(text)


def elapsed(sigma: float) -> float:
    """The share of the training's timesteps that lies behind this noise level: 0 at pure noise, 1 at none."""
    return 1 - time_of(sigma) / 999 if sigma > 0 else 1.0


@dataclass(frozen=True, repr=False)
class Region:
    """An area and what guidance does there, from `start` to `end`, shares of the run counted in timesteps."""
    area: Area
    scale: float | None = None                        # in place of the scale that it would have,
    times: float = 1.0                                # which is then multiplied
    start: float = 0.0
    end: float = 1.0

    def acts(self, sigma: float) -> bool:
        return self.start <= elapsed(sigma) <= self.end

    def __repr__(self) -> str:
        facts = ("scale", self.scale, None), ("times", self.times, 1), ("from", self.start, 0), ("to", self.end, 1)
        return f"{self.area}: {', '.join(f'{name} {value:g}' for name, value, usual in facts if value != usual) or 'nothing'}"
