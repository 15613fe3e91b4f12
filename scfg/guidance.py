"""How the rows of one step become one prediction: guidance as a value, its parts as pure functions of the step's values."""
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .area import Region, elapsed, too_small
from .config import BadInput
from .segment import CONDITIONAL, OFFICIAL, PAPER, Regions, Segmentation, blur

NOTHING = "nothing of its own there"


class Note(NamedTuple):
    """What a reader of the result should know."""
    what: str
    instead: str
    pictures: tuple[int, ...] = ()                    # of the batch; none: all

    def __str__(self) -> str:
        return self.what + (f" in picture {', '.join(map(str, self.pictures))} of the batch" if self.pictures else "") + f": {self.instead}"


class Guided(NamedTuple):
    out: Tensor                                       # (b c h w) the guided prediction
    scale: Tensor                                     # (b 1 h w) the scale that acted at every pixel
    state: Any                                        # what the next step's direction is told
    notes: tuple[Note, ...]


class Outputs(NamedTuple):
    """What the network said, and what that means for the clean latent."""
    uncond: Tensor                                    # (b c h w)
    cond: Tensor                                      # (b c h w)
    x0: Tensor                                        # (b c h w) the clean latent that cond stands for
    gain: float                                       # by which x0 grows with an output


@dataclass(frozen=True)
class CFG:
    """One scale everywhere (Ho & Salimans 2022, 2207.12598)."""
    gamma: float = 7.5
    segmentation: None = None                         # it needs no maps

    def __call__(self, difference: Tensor, regions: Regions | None, sigma: float) -> float:
        return self.gamma

    def notes(self, regions: Regions | None, sigma: float) -> tuple[Note, ...]:
        return ()


@dataclass(frozen=True)
class SCFG:
    """Semantic-aware guidance (arXiv 2404.05384): every region's share of the difference is brought to one level.

    SCFG(7.5) is what the authors' program computes, SCFG.paper(7.5) what their paper says, SCFG.mean(7.5) the former
    with the whole picture as benchmark, SCFG.conditional(7.5) with the conditional half's foreground. Unlike theirs, each is plain
    CFG where a picture's maps are too flat to say anything; with contrast=0 it is not.
    """
    gamma: float = 7.5
    segmentation: Segmentation = OFFICIAL
    benchmark: Literal["foreground", "image"] = "foreground"      # whose mean difference every region is brought to
    limits: tuple[float, float] | None = (0.8, 3.0)   # of the rate, before
    ceiling: float | None = 15.0                      # that of gamma * rate
    smooth: bool = True                               # blur the rate at latent size
    contrast: float = 1.31                            # below which a picture's maps say nothing, see Regions.contrast

    @classmethod
    def paper(cls, gamma: float = 7.5) -> "SCFG":
        return cls(gamma, PAPER, limits=None, ceiling=None, smooth=False, contrast=1.18)

    @classmethod
    def conditional(cls, gamma: float = 7.5) -> "SCFG":
        return cls(gamma, CONDITIONAL)

    @classmethod
    def mean(cls, gamma: float = 7.5) -> "SCFG":
        return cls(gamma, benchmark="image")

    def __call__(self, difference: Tensor, regions: Regions, sigma: float) -> Tensor:
        """Difference cond - uncond (b c h w) -> scale map (b 1 h w): gamma * U / D_i in region i (eq. 13)."""
        size = difference.shape[-2:]
        norm = difference.norm(dim=1, keepdim=True)
        tokens, foreground = (F.interpolate(mask, size=size, mode="nearest") for mask in (regions.tokens, regions.foreground))
        level = masked_mean(norm, foreground if self.benchmark == "foreground" else torch.ones_like(foreground))
        means = masked_mean(norm, tokens)                                     # D_i, (b t 1 1)
        rates = torch.where(means > 0, level / (means + 1e-8), 0)
        rate = (rates * tokens).sum(1, keepdim=True)
        # without a lower limit nothing to compare with would switch guidance off
        rate = rate.clamp(*self.limits) if self.limits else torch.where(level > 0, rate, 1)
        if self.ceiling and self.gamma > 0:
            rate = rate.clamp_max(self.ceiling / self.gamma)
        rate = 1 + blur(rate - 1) if self.smooth else rate                    # a rate of one stays exactly one
        return self.gamma * torch.where(regions.contrast() < self.contrast, 1, rate)

    def notes(self, regions: Regions, sigma: float) -> tuple[Note, ...]:
        flat = regions.contrast().flatten() < self.contrast
        empty = (regions.foreground.sum((1, 2, 3)) == 0) & (self.benchmark == "foreground") & ~flat
        return (noted("no foreground found", empty, f"rate {self.limits[0]:g} there" if self.limits else "plain CFG there")
                + noted("attention shows no regions", flat, "plain CFG there"))


def noted(what: str, where: Tensor, instead: str) -> tuple[Note, ...]:
    """A note on the pictures (b) where it is so; none if it is nowhere."""
    pictures = tuple(where.nonzero().flatten().tolist())
    return (Note(what, instead, pictures if len(pictures) < len(where) else ()),) if pictures else ()


def masked_mean(values: Tensor, masks: Tensor) -> Tensor:
    """Mean of values (b 1 h w) over every mask (b m h w), (b m 1 1); 0 for an empty one."""
    return (values * masks).sum((-2, -1), keepdim=True) / (masks.sum((-2, -1), keepdim=True) + 1e-8)


@dataclass(frozen=True)
class Energy:
    """No attention: the scale falls from `high` to `low` as the difference at a pixel rises above its mean over the picture.

    scale = low + (high - low) exp(-|d| / mean |d|); in the spirit of SAMG (2604.26503).
    """
    high: float = 9.0
    low: float = 6.0
    segmentation: None = None

    def __call__(self, difference: Tensor, regions: Regions | None, sigma: float) -> Tensor:
        norm = difference.norm(dim=1, keepdim=True)
        return self.low + (self.high - self.low) * (-norm / (norm.mean((-2, -1), keepdim=True) + 1e-8)).exp()

    def notes(self, regions: Regions | None, sigma: float) -> tuple[Note, ...]:
        return ()


@dataclass(frozen=True)
class ByRegion:
    """Another rule, whose scale is replaced or multiplied in regions, one after the other."""
    base: "ScaleRule"
    regions: tuple[Region, ...]

    @property
    def segmentation(self) -> Segmentation | None:
        return self.base.segmentation or (OFFICIAL if any(region.area.needs_regions for region in self.regions) else None)

    def __call__(self, difference: Tensor, regions: Regions | None, sigma: float) -> Tensor:
        scale = self.base(difference, regions, sigma) * torch.ones_like(difference[:, :1])
        for region in self.regions:
            if region.acts(sigma):
                inside = region.area(regions, difference.shape[-2:]).to(scale)
                wanted = (scale if region.scale is None else torch.full_like(scale, region.scale)) * region.times
                scale = torch.lerp(scale, wanted, torch.where(too_small(inside), 0, inside).expand_as(scale))
        return scale

    def notes(self, regions: Regions | None, sigma: float) -> tuple[Note, ...]:
        small = [(region.area.said, too_small(region.area.of(regions)).flatten()) for region in self.regions if region.acts(sigma)]
        return sum((noted(f"{area} is nowhere, or nearly", where, NOTHING) for area, where in small), self.base.notes(regions, sigma))


@dataclass(frozen=True)
class Product:
    """Two rules' scales multiplied, such as S-CFG's by an Energy around one."""
    first: "ScaleRule"
    second: "ScaleRule"

    @property
    def segmentation(self) -> Segmentation | None:
        first, second = self.first.segmentation, self.second.segmentation
        if first and second and first != second:
            raise BadInput(f"a step's maps are segmented by one recipe, not by those of {self.first} and {self.second}")
        return first or second

    def __call__(self, difference: Tensor, regions: Regions | None, sigma: float) -> Tensor | float:
        return self.first(difference, regions, sigma) * self.second(difference, regions, sigma)

    def notes(self, regions: Regions | None, sigma: float) -> tuple[Note, ...]:
        return self.first.notes(regions, sigma) + self.second.notes(regions, sigma)


ScaleRule = CFG | SCFG | Energy | ByRegion | Product
NAMED: dict[str, Callable[[float], ScaleRule]] = {"scfg": SCFG, "scfg-paper": SCFG.paper, "scfg-mean": SCFG.mean, "scfg-cond": SCFG.conditional, "cfg": CFG}


@dataclass(frozen=True)
class PAG:
    """Away from what the text gives when pixels of these blocks attend to themselves only (2403.17377, eq. 16)."""
    scale: float = 3.0
    layers: tuple[str, ...] = ("middle_block",)


@dataclass(frozen=True)
class APG:
    """Less of the difference's part along the conditional x0, which saturates (2410.02416, algorithm 1)."""
    eta: float = 0.0                                  # how much of the parallel part stays
    limit: float | None = 15.0                        # of the difference's norm, over a whole picture
    momentum: float = -0.5                            # share of the steps before in the running difference

    def __call__(self, outputs: Outputs, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Direction in the network's units and the running difference, in those of x0, which the paper reckons in."""
        difference = outputs.cond - outputs.uncond
        if self.momentum and state is not None:
            difference = difference + self.momentum / outputs.gain * state
        state = outputs.gain * difference if self.momentum else None
        if self.limit is not None:
            norm = abs(outputs.gain) * difference.flatten(1).norm(dim=1)[:, None, None, None]
            difference = difference * (self.limit / (norm + 1e-8)).clamp_max(1)
        return difference + (self.eta - 1) * along(difference, outputs.x0), state


@dataclass(frozen=True)
class ZeroStar:
    """The unconditional output first scaled to be as near as it can to the conditional one: CFG-Zero* (2503.18886)."""
    def __call__(self, outputs: Outputs, state: None) -> tuple[Tensor, None]:
        return outputs.cond - along(outputs.cond, outputs.uncond), None


def along(x: Tensor, axis: Tensor) -> Tensor:
    """Every picture's part of x parallel to its axis, both (b c h w)."""
    share = (x * axis).sum((1, 2, 3), keepdim=True) / (axis.square().sum((1, 2, 3), keepdim=True) + 1e-8)
    return share * axis


@dataclass(frozen=True)
class Rescale:
    """Towards the conditional output's standard deviation over a picture, by a share phi (2305.08891, eq. 15 and 16)."""
    phi: float = 0.7

    def __call__(self, guided: Tensor, cond: Tensor) -> Tensor:
        ratio = cond.std((1, 2, 3), keepdim=True) / (guided.std((1, 2, 3), keepdim=True) + 1e-8)
        return guided * (1 + self.phi * (ratio - 1))


@dataclass(frozen=True)
class Interval:
    """Fully for noise levels in (low, high], not at all outside (2404.07724)."""
    low: float
    high: float

    def __call__(self, sigma: float) -> float:
        return float(self.low < sigma <= self.high)


@dataclass(frozen=True)
class Ramp:
    """From one strength at pure noise to another at none, over the timesteps, in a straight line or half a cosine (2404.13040)."""
    first: float = 0.0
    last: float = 2.0
    shape: Literal["linear", "cosine"] = "linear"

    def __call__(self, sigma: float) -> float:
        done = elapsed(sigma) if self.shape == "linear" else (1 - cos(pi * elapsed(sigma))) / 2
        return self.first + (self.last - self.first) * done


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Named slots; everything acts on the network's outputs, in the order that str() shows.

    With d the direction, guided = cond + strength * ((scale - 1) * d + perturb.scale * (cond - perturbed)), then rescaled.
    direction(outputs, state) -> (d, state) stands in for cond - uncond; scale is told d; rescale(guided, cond) comes last;
    when(sigma) is the strength: where it is 0 the conditional row alone is evaluated.
    """
    perturb: PAG | None = None
    direction: Callable[[Outputs, Any], tuple[Tensor, Any]] | None = None
    scale: ScaleRule = SCFG()
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None
    when: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.scale, int | float):
            raise BadInput(f"a scale of {self.scale:g} needs a rule: CFG({self.scale:g}) guides plainly, SCFG({self.scale:g}) by region")

    def strength(self, sigma: float) -> float:
        return 1.0 if self.when is None else float(self.when(sigma))

    def rows(self, sigma: float) -> tuple[str, ...]:
        """The rows that the network must evaluate at this noise level, in the order of its batch."""
        if not self.strength(sigma):
            return ("cond",)
        return ("uncond", "cond", "perturbed") if self.perturb else ("uncond", "cond")

    def segmentation(self, sigma: float) -> Segmentation | None:
        """The recipe by which this step's maps are to be read; None where it needs none."""
        return self.scale.segmentation if "uncond" in self.rows(sigma) else None

    def combine(self, rows: dict[str, Tensor], regions: Regions | None, sigma: float, state: Any = None,
                x0: Tensor | None = None, gain: float = 1.0) -> Guided:
        """The network's outputs by row, each (b c h w) -> the guided one. x0, gain: what cond stands for (see Outputs), by default itself."""
        cond, strength = rows["cond"], self.strength(sigma)
        one = torch.ones_like(cond[:, :1])
        if not strength:
            return Guided(cond, one, None, ())        # a direction remembers an unbroken run of guided steps
        direction = cond - rows["uncond"]
        if self.direction:
            direction, state = self.direction(Outputs(rows["uncond"], cond, cond if x0 is None else x0, gain), state)
        scale = torch.lerp(one, one * self.scale(direction, regions, sigma), strength)
        guided = cond + (scale - 1) * direction
        if self.perturb:
            guided = guided + strength * self.perturb.scale * (cond - rows["perturbed"])
        if self.rescale:
            guided = self.rescale(guided, cond)
        return Guided(guided, scale, state, self.scale.notes(regions, sigma))

    def __str__(self) -> str:
        """What acts, in its order, and the rows of a step."""
        slots = [f"{name}: {part}" for name in ("direction", "scale", "perturb", "rescale", "when") if (part := getattr(self, name))]
        rows = ("uncond", "cond") + ("perturbed",) * bool(self.perturb)
        return "\n".join([*slots, f"rows a step: {len(rows)} ({', '.join(rows)})" + ("; 1 (cond) where `when` is 0" if self.when else "")])
