"""Areas of the picture, from words, masks or the segmentation, combined by &, | and ~."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BadInput
from ..resize import by_area
from ..segment import Regions, Word, blur

if TYPE_CHECKING:  # areas of words need no Pillow
    from PIL import Image

# words that name nothing that could be seen
FUNCTION_WORDS = frozenset(
    "a an the of in on at to by with and or left right above below under over next from for is as".split()
)
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
SMALLEST = 1 / 256  # share of the picture below which an area is not guided on its own
SIMPLE = re.compile(r"[^|&~(),:'\"\s]+( [^|&~(),:'\"\s]+)*")  # a phrase or path that needs no quotes in a description


class Area:
    """A part of the picture: a value that is 0 to 1 at every pixel, given a step's regions.

    It equals another of the same description, pickles, and prints as what `parse_area` reads. In place of an Area its
    description serves everywhere.
    """

    @property
    def phrases(self) -> tuple[str, ...]:
        """Those of the prompt that it needs."""
        return ()

    @property
    def needs_regions(self) -> bool:
        """Whether it changes from step to step."""
        return False

    def of(self, regions: Regions | None) -> Tensor:
        """(b|1 1 h w), on any grid."""
        raise NotImplementedError

    def on(self, device: torch.device) -> "Area":
        """The same area with what does not change computed once, on a device, since the host waits for copies there."""
        return self if self.needs_regions else Placed(self, self.of(None).to(device))

    def __call__(self, regions: Regions | None, size: Sequence[int]) -> Tensor:
        """(b|1 1 h w) of this size."""
        return resized(self.of(regions), size)

    def __repr__(self) -> str:
        return str(self)

    def __and__(self, other: "Area | str") -> "Area":
        return Intersection((*parts(self, Intersection), *parts(area_of(other), Intersection)))

    def __or__(self, other: "Area | str") -> "Area":
        return Union((*parts(self, Union), *parts(area_of(other), Union)))

    def __rand__(self, other: str) -> "Area":
        return area_of(other) & self

    def __ror__(self, other: str) -> "Area":
        return area_of(other) | self

    def __invert__(self) -> "Area":
        return Complement(self)

    def feathered(self, times: int) -> "Area":
        """Blurred so many times: its edge is then about sqrt(2 * times) pixels of its grid wide."""
        return Feathered(self, times)


@dataclass(frozen=True, repr=False)
class Combined(Area):
    """Several areas as one."""

    areas: tuple[Area, ...]

    def on(self, device: torch.device) -> Area:
        return (
            replace(self, areas=tuple(area.on(device) for area in self.areas))
            if self.needs_regions
            else super().on(device)
        )

    @property
    def phrases(self) -> tuple[str, ...]:
        return tuple(phrase for area in self.areas for phrase in area.phrases)

    @property
    def needs_regions(self) -> bool:
        return any(area.needs_regions for area in self.areas)


@dataclass(frozen=True, repr=False)
class Union(Combined):
    def of(self, regions: Regions | None) -> Tensor:
        return reduce(torch.maximum, on_one_grid([area.of(regions) for area in self.areas]))

    def __str__(self) -> str:
        return " | ".join(map(str, self.areas))


@dataclass(frozen=True, repr=False)
class Intersection(Combined):
    def of(self, regions: Regions | None) -> Tensor:
        return reduce(torch.minimum, on_one_grid([area.of(regions) for area in self.areas]))

    def __str__(self) -> str:
        return " & ".join(f"({area})" if isinstance(area, Union) else str(area) for area in self.areas)


@dataclass(frozen=True, repr=False)
class Derived(Area):
    """Made from one other area."""

    area: Area

    def on(self, device: torch.device) -> Area:
        return replace(self, area=self.area.on(device)) if self.needs_regions else super().on(device)

    @property
    def phrases(self) -> tuple[str, ...]:
        return self.area.phrases

    @property
    def needs_regions(self) -> bool:
        return self.area.needs_regions


@dataclass(frozen=True, repr=False)
class Complement(Derived):
    def of(self, regions: Regions | None) -> Tensor:
        return 1 - self.area.of(regions)

    def __str__(self) -> str:
        return f"~({self.area})" if isinstance(self.area, Union | Intersection) else f"~{self.area}"


@dataclass(frozen=True, repr=False)
class Feathered(Derived):
    times: int

    def of(self, regions: Regions | None) -> Tensor:
        return reduce(lambda area, _: blur(area), range(self.times), self.area.of(regions))

    def __str__(self) -> str:
        return f"feathered({self.area}, {self.times})"


@dataclass(frozen=True, repr=False, eq=False)
class Placed(Derived):
    """An area that does not change, on a device."""

    values: Tensor  # (b|1 1 h w)

    def of(self, regions: Regions | None) -> Tensor:
        return self.values

    def __eq__(self, other: object) -> bool:
        return self.area == (other.area if isinstance(other, Placed) else other)

    def __hash__(self) -> int:
        return hash(self.area)

    def __str__(self) -> str:
        return str(self.area)


@dataclass(frozen=True, repr=False)
class Foreground(Area):
    """The pixels that the segmentation takes for the foreground."""

    needs_regions = True

    def of(self, regions: Regions | None) -> Tensor:
        if regions is None:
            raise BadInput("the foreground is known only where regions were read")
        return regions.foreground

    def __str__(self) -> str:
        return "foreground"


@dataclass(frozen=True, repr=False)
class Words(Area):
    """The pixels where a token of the phrase scores best; where it occurs more than once, all of its places.

    Tokens compete with those of the prompt's other words that name something; against_all: with all tokens, the
    start, end and padding tokens too, as in S-CFG. soft: the phrase's share of the competing scores instead.
    """

    phrase: str
    soft: bool = False
    against_all: bool = False

    needs_regions = True

    @property
    def phrases(self) -> tuple[str, ...]:
        return (self.phrase,)

    def of(self, regions: Regions | None) -> Tensor:
        if regions is None or not regions.words:
            what = f"the area of {self.phrase!r} needs a prompt that knows its words"
            raise BadInput(f"{what}, as Diffusion.prompt makes it")
        words = regions.words * (len(regions.scores) if len(regions.words) == 1 else 1)  # one text serves all pictures
        return torch.stack([self.among(*one) for one in zip(regions.scores, words, strict=True)])[:, None]

    def among(self, scores: Tensor, words: Sequence[Word]) -> Tensor:
        """The area (h w) of one picture, by its tokens' scores (t h w) and the words of its prompt."""
        naming = [word for word in words if word.text.lower() not in FUNCTION_WORDS]
        own, others = (
            {i for word in some for i in range(word.start, word.stop)}
            for some in (find_phrase(words, self.phrase), naming)
        )
        if not own:  # words of another step's text
            return torch.zeros_like(scores[0])
        rivals = range(len(scores)) if self.against_all else sorted(own | others)
        # stacked, since a GPU's host would wait for lists of numbers
        of_own = torch.stack([scores[i] for i in rivals if i in own])
        rest = torch.stack([torch.zeros_like(scores[0]), *(scores[i] for i in rivals if i not in own)])
        if self.soft:
            return of_own.sum(0) / (of_own.sum(0) + rest.sum(0))
        return (of_own.amax(0) > rest.amax(0) if len(rest) > 1 else of_own[0] >= 0).float()

    def __str__(self) -> str:
        flags = [name for name in ("soft", "against_all") if getattr(self, name)]
        if not flags and SIMPLE.fullmatch(self.phrase) and not is_picture(self.phrase) and self.phrase != "foreground":
            return self.phrase
        return f"words({', '.join([quoted(self.phrase), *flags])})"


@dataclass(frozen=True, repr=False, eq=False)
class Mask(Area):
    """Values that are given: a picture file's, or a tensor's, which has no description."""

    path: str | None
    values: Tensor  # (b|1 1 h w), 0 to 1

    def of(self, regions: Regions | None) -> Tensor:
        return self.values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return self.path == other.path and torch.equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.path, self.values.shape))

    def __str__(self) -> str:
        if self.path is None:
            return "a mask"
        simple = is_picture(self.path) and SIMPLE.fullmatch(self.path)
        return self.path if simple else f"mask({quoted(self.path)})"


def area_of(area: Area | str) -> Area:
    """An area, or that of a description."""
    if isinstance(area, Area):
        return area
    if isinstance(area, str):
        from .description import parse_area

        return parse_area(area)
    raise BadInput(f"an area is one of scfg.words, scfg.mask, scfg.foreground or a description, not {area!r}")


def parts(area: Area, kind: type[Union] | type[Intersection]) -> tuple[Area, ...]:
    """What an area of this kind is made of; of another kind, the area itself."""
    return area.areas if isinstance(area, kind) else (area,)


def on_one_grid(areas: Sequence[Tensor]) -> list[Tensor]:
    size = max([area.shape[-2:] for area in areas], key=math.prod)
    return [resized(area, size) for area in areas]


def resized(area: Tensor, size: Sequence[int]) -> Tensor:
    """An area (b 1 h w) on a grid of this size: averaged where either side is coarser, else repeated."""
    if area.shape[-2:] == tuple(size):
        return area
    if area.shape[-2] > size[0] or area.shape[-1] > size[1]:
        return by_area(area, size)
    return F.interpolate(area, size=size, mode="nearest")


def nowhere(area: Area) -> str:
    """What is said of an area that is too small."""
    return f"{area} is nowhere, or nearly: nothing of its own there"


def fitted(area: Area, regions: Regions | None, pictures: int, size: Sequence[int]) -> Tensor:
    """An area's values (b|1 1 h w) for a batch, which it must be of unless it is of one picture."""
    values = area(regions, size)
    if len(values) not in (1, pictures):
        raise BadInput(f"{area} is of {len(values)} pictures, not of {pictures}")
    return values


def too_small(inside: Tensor) -> Tensor:
    """(b 1 1 1) where an area (b 1 h w) is empty, or nearly."""
    return inside.mean((-2, -1), keepdim=True) < SMALLEST


def mask(picture: "str | Path | Tensor | np.ndarray | Image.Image") -> Mask:
    """From a picture or its file, white inside, transparent outside; or from values from 0 to 1, (h w) or (b 1 h w)."""
    if not isinstance(picture, Tensor | np.ndarray):
        from PIL import Image

        from .picture import lightness, opened

        if isinstance(picture, Image.Image):
            return Mask(None, torch.from_numpy(lightness(picture))[None, None])
        if not isinstance(picture, str | Path):
            raise BadInput(f"a mask is a picture, its file, or an array of values from 0 to 1, not {picture!r}")
        with opened(picture) as image:
            return Mask(str(picture), torch.from_numpy(lightness(image))[None, None])
    try:
        values = picture if isinstance(picture, Tensor) else torch.from_numpy(np.ascontiguousarray(picture))
        values = values.detach().to("cpu", torch.float32, copy=True)
    except TypeError as error:
        raise BadInput(f"a mask of an array has values from 0 to 1: {error}") from None
    values = values[(None,) * max(0, 4 - values.ndim)]
    if values.ndim != 4 or values.shape[1] != 1 or not values.numel() or not 0 <= values.min() <= values.max() <= 1:
        bounds = f" from {values.min():g} to {values.max():g}" if values.numel() else ""
        what = f"a mask is (h w) or (b 1 h w) with values from 0 to 1; this one is {tuple(picture.shape)}{bounds}"
        raise BadInput(what)
    return Mask(None, values)


def foreground() -> Foreground:
    """As the segmentation finds it."""
    return Foreground()


def words(phrase: str, soft: bool = False, against_all: bool = False) -> Words:
    """The area of a phrase of the prompt, see Words."""
    return Words(phrase, soft, against_all)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compilers do not know Unicode
def find_phrase(words: Sequence[Word], phrase: str) -> list[Word]:
    """Every word that is part of the phrase where it occurs in the prompt.

    Blanks do not matter, since CLIP's words are not always ours: it reads "64" as two words and "red-car" as three.
    Both are compared in CLIP's Unicode form, NFC.
    """
    sought, *texts = (normalize("NFC", text).lower() for text in ("".join(phrase.split()), *(w.text for w in words)))

    def starting_at(first: int) -> range:
        """The words that make up the phrase, if it begins here."""
        rest, i = sought, first
        while rest and i < len(texts) and rest.startswith(texts[i]):
            if i > first and not 0 <= words[i].start - words[i - 1].stop <= 2:  # of another prompt; 2: another chunk's
                return range(0)
            rest, i = rest.removeprefix(texts[i]), i + 1
        return range(0) if rest else range(first, i)

    found = [words[i] for first in range(len(words)) for i in starting_at(first)]
    if not found:
        known = " ".join(word.text for word in words) or "none"
        raise BadInput(f"{phrase!r} is not in the prompt, whose words are: {known}")
    return found


def is_picture(text: str) -> bool:
    return Path(text).suffix.lower() in PICTURES


def quoted(text: str) -> str:
    """As a description holds it: in single quotes, with backslashes before these and before backslashes."""
    return "'" + re.sub(r"(['\\])", r"\\\1", text) + "'"
