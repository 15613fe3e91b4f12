"""What takes the place of cond - uncond: the direction slot of a Guidance."""

from dataclasses import dataclass

from torch import Tensor

from ..guidance import Outputs
from ..schedule import Moment


def parallel(x: Tensor, axis: Tensor) -> Tensor:
    """Every picture's part of x along its axis, both (b c h w)."""
    share = (x * axis).sum((1, 2, 3), keepdim=True) / (axis.square().sum((1, 2, 3), keepdim=True) + 1e-8)
    return share * axis


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
