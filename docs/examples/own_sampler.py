"""A sampler of one's own: a generator over falling sigmas; here the midpoint method of DPM-Solver-2 (2206.00927)."""

from itertools import pairwise

from torch import Tensor

import scfg


def midpoint(denoise, x: Tensor, sigmas, noise):
    """Half a step of Euler's method in log sigma, then a whole step along the slope found there."""
    result = None
    for sigma, target in pairwise(sigmas):
        start = result = denoise(x, sigma, result)
        middle = (sigma * target) ** 0.5
        at_middle = start.x0 + (x - start.x0) * middle / sigma
        if target:
            result = denoise(at_middle, middle, start)
        x = x + (target - sigma) * (at_middle - result.x0) / middle if target else start.x0
        yield x, start


def main(steps: int = 20, sampler=midpoint) -> Tensor:
    *_, last = scfg.load().sample("a red car left of a blue star on grass", scfg.CFG(2.0), sampler=sampler, steps=steps)
    return last.latent


if __name__ == "__main__":
    print(main())
