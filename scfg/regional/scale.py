"""A guidance scale of its own by region."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..data import check_guidance
from ..errors import BadInput
from ..guidance import Outputs, Rule
from ..schedule import Moment
from ..segment import OFFICIAL, Recipe, Regions
from .area import Area, area_of, fitted, nowhere, too_small


@dataclass(frozen=True, repr=False)
class Region:
    """An area and its guidance, from `start` to `end`, shares of the run counted in timesteps."""

    area: Area  # or its description
    scale: float | None = None  # replaces the rule's scale; None: keeps it
    times: float = 1.0  # multiplies the scale
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", area_of(self.area))
        check_guidance(self)
        if not 0 <= self.start <= self.end <= 1:
            raise BadInput(f"a region acts from start to end, shares of the run, not from {self.start} to {self.end}")

    def acts(self, moment: Moment) -> bool:
        return (self.start, self.end) == (0, 1) or self.start <= moment.progress <= self.end

    def __repr__(self) -> str:
        facts = ("scale", self.scale, None), ("times", self.times, 1), ("from", self.start, 0), ("to", self.end, 1)
        given = ", ".join(f"{name} {value:g}" for name, value, default in facts if value != default)
        return f"{self.area}: {given or 'nothing'}"


@dataclass(frozen=True)
class ByRegion:
    """Another rule, whose scale is replaced or multiplied in regions, one after the other.

    An area smaller than 1/256 of the picture leaves the scale as it is; a flag says so.
    """

    base: Rule
    regions: tuple[Region, ...]

    @property
    def recipe(self) -> Recipe | None:
        needed = any(region.area.needs_regions for region in self.regions)
        return getattr(self.base, "recipe", None) or (OFFICIAL if needed else None)

    def at(self, moment: Moment) -> "ByRegion":
        """With the regions that act at this moment, without their beginnings and ends."""
        base = self.base.at(moment) if hasattr(self.base, "at") else self.base
        acting = [replace(region, start=0.0, end=1.0) for region in self.regions if region.acts(moment)]
        return ByRegion(base, tuple(acting))

    def on(self, device: torch.device) -> "ByRegion":
        """With areas that do not change placed on a device."""
        base = self.base.on(device) if hasattr(self.base, "on") else self.base
        return ByRegion(base, tuple(replace(region, area=region.area.on(device)) for region in self.regions))

    def __call__(self, outputs: Outputs, regions: Regions | None, moment: Moment) -> Tensor:
        like = outputs.difference[:, :1]
        scale = self.base(outputs, regions, moment) * torch.ones_like(like)
        for region in self.regions:
            if region.acts(moment):
                inside = fitted(region.area, regions, len(like), like.shape[-2:]).to(scale)
                wanted = (scale if region.scale is None else torch.full_like(scale, region.scale)) * region.times
                scale = torch.lerp(scale, wanted, torch.where(too_small(inside), 0, inside).expand_as(scale))
        return scale

    def flags(self, regions: Regions | None, moment: Moment) -> dict[str, Tensor]:
        """In which pictures (b|1) an area is too small, beside the other rule's flags."""
        found = self.base.flags(regions, moment) if hasattr(self.base, "flags") else {}
        for region in self.regions:
            if region.acts(moment):
                found = found | {nowhere(region.area): too_small(region.area.of(regions)).flatten()}
        return found
