"""What takes the place of cond - uncond: the direction slot of a Guidance."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..guidance import Outputs
from ..schedule import Moment


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Every picture's inner product of x and y, both (b c h w), as (b 1 1 1)."""
    return (x * y).sum((1, 2, 3), keepdim=True)


def parallel(x: Tensor, axis: Tensor) -> Tensor:
    """Every picture's part of x along its axis, both (b c h w)."""
    return inner(x, axis) / (inner(axis, axis) + 1e-8) * axis


@dataclass(frozen=True)
class APG:
    """Less of the difference's part along the conditional x0, which saturates (2410.02416, algorithm 1)."""

    eta: float = 0.0  # how much of the parallel part stays
    limit: float | None = 15.0  # of the difference's norm, over a whole picture
    momentum: float = -0.5  # share of the steps before in the running difference

    def __call__(self, outputs: Outputs, moment: Moment, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The direction in the network's units; the running difference in those of x0, in which the paper works."""
        difference = outputs.difference
        if self.momentum and state is not None:
            difference = difference + self.momentum / outputs.dx0_dout * state
        state = outputs.dx0_dout * difference if self.momentum else None
        if self.limit is not None:
            norm = abs(outputs.dx0_dout) * difference.flatten(1).norm(dim=1)[:, None, None, None]
            difference = difference * (self.limit / (norm + 1e-8)).clamp_max(1)
        return difference + (self.eta - 1) * parallel(difference, outputs.x0), state


@dataclass(frozen=True)
class OptimizedScale:
    """The unconditional velocity first scaled to be as near as it can to the conditional one (2503.18886, eq. 7 and 8).

    This is one of the two parts of CFG-Zero*; its other part, first steps of zero velocity, is not here. The paper
    works on velocities: outputs of other kinds are projected as the v that they stand for.
    """

    def __call__(self, outputs: Outputs, moment: Moment, state: None) -> tuple[Tensor, None]:
        dx0_dv = -moment.sigma / (moment.sigma**2 + 1) ** 0.5
        # x0 = x / (sigma^2 + 1) + dx0_dv * v
        cond = (outputs.x0 - outputs.x / (moment.sigma**2 + 1)) / dx0_dv
        uncond = cond - outputs.dx0_dout / dx0_dv * outputs.difference
        return (cond - parallel(cond, uncond)) * dx0_dv / outputs.dx0_dout, None


@dataclass(frozen=True)
class TCFG:
    """The unconditional noise without what is foreign to the conditional one (tangential damping, 2503.18137, alg. 1).

    It is projected on the first right singular vector of the two. The paper works on noise: outputs of other kinds are
    projected as the eps that they stand for.
    """

    def __call__(self, outputs: Outputs, moment: Moment, state: None) -> tuple[Tensor, None]:
        dx0_deps = -moment.sigma
        cond = (outputs.x0 - outputs.x) / dx0_deps
        uncond = cond - outputs.dx0_dout / dx0_deps * outputs.difference
        cc, cu, uu = inner(cond, cond), inner(cond, uncond), inner(uncond, uncond)
        # the leading eigenvector (cos, sin) of their products [[cc, cu], [cu, uu]]
        angle = torch.atan2(2 * cu, cc - uu) / 2
        first = angle.cos() * cond + angle.sin() * uncond
        damped = parallel(uncond, first)
        return (cond - damped) * dx0_deps / outputs.dx0_dout, None


@dataclass(frozen=True)
class FDG:
    """Low and high frequencies guided differently (frequency-decoupled guidance, 2506.19713; two levels).

    low, high: what the difference's frequencies are multiplied by. A scale of 10 with low = 4/9 is the paper's guidance
    of the high frequencies at 10 and of the low ones at 5.
    """

    low: float = 4 / 9
    high: float = 1.0

    def __call__(self, outputs: Outputs, moment: Moment, state: None) -> tuple[Tensor, None]:
        difference = outputs.difference
        half = [max(1, side // 2) for side in difference.shape[-2:]]
        coarse = F.interpolate(binomial(difference), size=half, mode="bilinear")
        low = binomial(F.interpolate(coarse, size=difference.shape[-2:], mode="bilinear"))
        return self.high * difference + (self.low - self.high) * low, None


def binomial(x: Tensor) -> Tensor:
    """(b c h w) under 1 4 6 4 1 along both axes, edges reflected: the filter of a Laplacian pyramid."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (2, 2, 2, 2), mode="reflect" if min(height, width) > 2 else "replicate")
    rows = torch.stack([tap / 16 * padded[..., i : i + height, :] for i, tap in enumerate((1, 4, 6, 4, 1))]).sum(0)
    return torch.stack([tap / 16 * rows[..., i : i + width] for i, tap in enumerate((1, 4, 6, 4, 1))]).sum(0)
