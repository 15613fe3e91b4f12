"""How the rows of one step become one prediction: guidance as a value, its parts as pure functions of the step's values."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .segment import OFFICIAL, PAPER, Regions, Segmentation, blur


class Guided(NamedTuple):
    out: Tensor                                       # (b c h w) the guided prediction
    scale: Tensor                                     # (b 1 h w) the scale that acted at every pixel
    state: Any                                        # what the next step's guidance is told
    notes: tuple[str, ...]                            # what a reader of the result should know


@dataclass(frozen=True)
class CFG:
    """One scale everywhere (Ho & Salimans 2022, 2207.12598)."""
    gamma: float = 7.5
    segmentation: None = None                         # it needs no maps

    def __call__(self, difference: Tensor, regions: Regions | None) -> float:
        return self.gamma

    def notes(self, regions: Regions | None) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class SCFG:
    """Semantic-aware guidance (arXiv 2404.05384): every region's share of the difference is brought to one level.

    SCFG(7.5) is what the authors' program computes, SCFG.paper(7.5) what their paper says, SCFG.mean(7.5) the former
    with the whole picture as benchmark.
    """
    gamma: float = 7.5
    segmentation: Segmentation = OFFICIAL
    benchmark: Literal["foreground", "image"] = "foreground"      # whose mean difference every region is brought to
    limits: tuple[float, float] | None = (0.8, 3.0)   # of the rate, before
    ceiling: float | None = 15.0                      # that of gamma * rate
    smooth: bool = True                               # blur the rate at latent size

    @classmethod
    def paper(cls, gamma: float = 7.5) -> "SCFG":
        return cls(gamma, PAPER, limits=None, ceiling=None, smooth=False)

    @classmethod
    def mean(cls, gamma: float = 7.5) -> "SCFG":
        return cls(gamma, benchmark="image")

    def __call__(self, difference: Tensor, regions: Regions) -> Tensor:
        """Difference cond - uncond (b c h w) -> scale map (b 1 h w): gamma * U / D_i in region i (eq. 13)."""
        size = difference.shape[-2:]
        norm = difference.norm(dim=1, keepdim=True)
        tokens, foreground = (F.interpolate(mask, size=size, mode="nearest") for mask in (regions.tokens, regions.foreground))
        level = masked_mean(norm, foreground if self.benchmark == "foreground" else torch.ones_like(foreground))
        means = masked_mean(norm, tokens)                                     # D_i, (b t 1 1)
        rates = torch.where(means > 0, level / (means + 1e-8), 0)
        rate = (rates * tokens).sum(1, keepdim=True)
        if self.limits:
            rate = rate.clamp(*self.limits)
        else:                                                                 # without a lower limit nothing to compare with
            rate = torch.where(level > 0, rate, 1)                            # would switch guidance off
        if self.ceiling and self.gamma > 0:
            rate = rate.clamp_max(self.ceiling / self.gamma)
        return self.gamma * (1 + blur(rate - 1) if self.smooth else rate)     # a rate of one stays exactly one

    def notes(self, regions: Regions) -> tuple[str, ...]:
        empty = self.benchmark == "foreground" and (regions.foreground.sum((1, 2, 3)) == 0).nonzero().flatten().tolist()
        what = f"rate {self.limits[0]:g}" if self.limits else "plain CFG"
        return (f"no foreground found in picture {', '.join(map(str, empty))} of the batch: {what} there",) if empty else ()


def masked_mean(values: Tensor, masks: Tensor) -> Tensor:
    """Mean of values (b 1 h w) over every mask (b m h w), (b m 1 1); 0 for an empty one."""
    return (values * masks).sum((-2, -1), keepdim=True) / (masks.sum((-2, -1), keepdim=True) + 1e-8)


ScaleRule = CFG | SCFG
NAMED: dict[str, Callable[[float], ScaleRule]] = {"scfg": SCFG, "scfg-paper": SCFG.paper, "scfg-mean": SCFG.mean, "cfg": CFG}


@dataclass(frozen=True)
class Guidance:
    """Named slots in the order in which they act; everything acts on the network's outputs.

    direction(uncond, cond, sigma, state) -> (difference, state) replaces cond - uncond; rescale(guided, cond) -> guided comes last;
    when(sigma) -> bool says whether guidance acts at all, else the conditional row alone is evaluated. `perturb` has no method yet.
    """
    perturb: None = None
    direction: Callable[[Tensor, Tensor, float, Any], tuple[Tensor, Any]] | None = None
    scale: ScaleRule = SCFG()
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None
    when: Callable[[float], bool] | None = None

    def __post_init__(self):
        if self.perturb is not None:
            raise ValueError("Guidance.perturb has no method yet: leave it None")

    def rows(self, sigma: float) -> tuple[str, ...]:
        """The rows that the network must evaluate at this noise level, in the order of its batch."""
        return ("uncond", "cond") if self.when is None or self.when(sigma) else ("cond",)

    def segmentation(self, sigma: float) -> Segmentation | None:
        """The recipe by which this step's maps are to be read; None where it needs none."""
        return self.scale.segmentation if "uncond" in self.rows(sigma) else None

    def combine(self, rows: dict[str, Tensor], regions: Regions | None, sigma: float, state: Any = None) -> Guided:
        """The network's outputs by row, each (b c h w) -> the guided one."""
        cond = rows["cond"]
        one = torch.ones_like(cond[:, :1])
        if "uncond" not in rows:
            return Guided(cond, one, state, ())
        uncond = rows["uncond"]
        difference = cond - uncond
        if self.direction:
            difference, state = self.direction(uncond, cond, sigma, state)
        scale = one * self.scale(difference, regions)
        guided = uncond + scale * difference
        if self.rescale:
            guided = self.rescale(guided, cond)
        return Guided(guided, scale, state, self.scale.notes(regions))
