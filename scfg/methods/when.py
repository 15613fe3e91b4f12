"""How strongly guidance acts at which noise level: the `when` slot of a Guidance."""

from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from ..data import check_guidance
from ..errors import BadInput, shown
from ..schedule import Moment


@dataclass(frozen=True)
class Interval:
    """Fully for noise levels in (low, high], not at all outside (2404.07724)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        check_guidance(self)
        if not self.low <= self.high:
            raise BadInput(f"no noise level lies above {self.low} and up to {self.high}: give the lower one first")

    def __call__(self, moment: Moment) -> float:
        return float(self.low < moment.sigma <= self.high)


@dataclass(frozen=True)
class Ramp:
    """From one strength at pure noise to another at none, over the timesteps: linear or half a cosine (2404.13040)."""

    first: float = 0.0
    last: float = 2.0
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        check_guidance(self)
        if not isinstance(self.shape, str) or self.shape not in ("linear", "cosine"):
            raise BadInput(f"a ramp is linear or cosine, not {shown(self.shape)}")

    def __call__(self, moment: Moment) -> float:
        done = moment.progress if self.shape == "linear" else (1 - cos(pi * moment.progress)) / 2
        return self.first + (self.last - self.first) * done
