"""A prompt of its own by region, in one evaluation of the network: tokens are weighed by where their text counts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import Config
from ..data import fits
from ..errors import BadInput, shown
from ..guidance import COND, Row
from ..schedule import Moment
from ..segment import Tokens, Word
from ..text import Conditioner
from ..unet import LEAST, Conditioning
from .area import Area, area_of, fitted, nowhere, too_small


@dataclass(frozen=True)
class Part:
    """An area's own text, from `start` to `end`, shares of the run counted in timesteps."""

    area: Area  # or its description
    prompt: Any  # a Prompt or the like, of one text for all pictures, or of one for each
    base: float = 0.0  # how much the whole picture's prompt still counts there
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", area_of(self.area))
        if isinstance(self.prompt, str):
            raise BadInput(f"a part's prompt is encoded: give model.prompt({self.prompt!r})")
        for name in ("base", "start", "end"):
            if not fits(getattr(self, name), float):
                raise BadInput(f"a part's {name} is a number, not {shown(getattr(self, name))}")
        if not 0 <= self.base <= 1:
            raise BadInput(f"base is a share from 0 to 1, not {self.base}")


@dataclass(frozen=True)
class RegionalPrompt:
    """The whole picture's prompt, and parts with their own. Stands wherever a Prompt does."""

    whole: Any  # a Prompt or the like
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if isinstance(self.whole, str):
            raise BadInput(f"the whole prompt is encoded: give model.prompt({self.whole!r})")
        if not isinstance(self.parts, tuple | list) or not all(isinstance(part, Part) for part in self.parts):
            raise BadInput(f"parts are Part(area, prompt) in a tuple, not {shown(self.parts)}")

    @property
    def words(self) -> tuple[tuple[Word, ...], ...]:
        words: tuple[tuple[Word, ...], ...] = self.whole.words
        return words

    @property
    def chunk(self) -> int | None:
        return self.whole.chunk

    @property
    def pictures(self) -> int:
        return self.whole.pictures

    @property
    def needs_regions(self) -> bool:
        return any(part.area.needs_regions for part in self.parts)

    def conditioner(self, config: Config, device: torch.device, dtype: torch.dtype) -> "RegionalConditioner":
        prompts = tuple(part.prompt.conditioner(config, device, dtype) for part in self.parts)
        placed = tuple(part.area.on(device) for part in self.parts)
        return RegionalConditioner(self.whole.conditioner(config, device, dtype), self.parts, prompts, placed)


@dataclass(frozen=True)
class RegionalConditioner:
    """A regional prompt on the network's device."""

    whole: Conditioner
    parts: tuple[Part, ...]
    prompts: tuple[Conditioner, ...]  # of the parts
    placed: tuple[Area, ...]  # theirs

    @property
    def layout(self) -> Tokens:
        return self.whole.layout

    def condition(self, rows: Sequence[Row], moment: Moment, previous: Any, shape: Sequence[int]) -> Conditioning:
        """The whole prompt's tokens and those of every part that acts, weighed in the conditional rows by their areas.

        Parts whose area is nearly nowhere, or that of a word before the first segmentation, do not act.
        """
        whole = self.whole.condition(rows, moment, previous, shape)
        rows = whole.rows or rows
        areas, flags = self.areas(moment, previous, shape)
        if not areas:
            return whole._replace(flags=flags)

        def weighed(own: Conditioning, in_cond: Tensor, in_uncond: Tensor) -> Tensor:
            shares = torch.cat([in_uncond if row.text == "uncond" else in_cond for row in rows])
            counts = own.tokens.new_ones(*own.tokens.shape[:2], 1, 1) if own.weight is None else own.weight
            return shares * counts.float()

        everywhere = torch.ones(shape[0], 1, *shape[-2:], dtype=torch.float32, device=whole.tokens.device)
        base = everywhere
        for i, area in areas.items():
            base = base * (1 - area * (1 - self.parts[i].base))
        tokens, weights = [whole.tokens], [weighed(whole, base.clamp_min(LEAST), everywhere)]
        for i, area in areas.items():
            own = self.prompts[i].condition([COND] * len(rows), moment, previous, shape)
            if own.rows:
                raise BadInput(
                    "AND and a weight after the last colon are for the whole picture's prompt, not for a region's"
                )
            tokens.append(own.tokens)
            weights.append(weighed(own, area.clamp_min(LEAST), 0 * area))
        return whole._replace(tokens=torch.cat(tokens, 1), weight=torch.cat(weights, 1), flags=flags)

    def areas(self, moment: Moment, previous: Any, shape: Sequence[int]) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        """The areas (b 1 h w) of the parts that act, and in which pictures (b) one is nearly nowhere."""
        known, areas, flags = previous.regions if previous else None, {}, {}
        for i, part in enumerate(self.parts):
            words = part.area.needs_regions
            if not part.start <= moment.progress <= part.end or (words and not known):
                continue
            area = fitted(self.placed[i], known, shape[0], shape[-2:]).float()
            flags[nowhere(part.area)] = too_small(area).flatten().expand(shape[0])
            # whether a mask is small is asked on the host, which need not wait for a device then
            if words or not too_small(part.area(None, shape[-2:])).all():
                areas[i] = torch.where(too_small(area), 0, area).expand(shape[0], 1, *shape[-2:])
        return areas, flags
