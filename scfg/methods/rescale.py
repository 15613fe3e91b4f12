"""What happens to the guided output last: the rescale slot of a Guidance."""

from dataclasses import dataclass

from torch import Tensor

from ..data import check_guidance
from ..errors import BadInput


@dataclass(frozen=True)
class Rescale:
    """Towards the conditional output's standard deviation over a picture, by a share phi (2305.08891, eq. 15, 16)."""

    phi: float = 0.7

    def __post_init__(self) -> None:
        check_guidance(self)
        if not 0 <= self.phi <= 1:
            raise BadInput(f"phi is a share from 0 to 1, not {self.phi}")

    def __call__(self, guided: Tensor, cond: Tensor) -> Tensor:
        ratio = cond.std((1, 2, 3), keepdim=True) / (guided.std((1, 2, 3), keepdim=True) + 1e-8)
        return guided * (1 + self.phi * (ratio - 1))
