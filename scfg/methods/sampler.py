"""A sampler that guides differently, by what a step's two outputs were."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ..samplers import Denoise, Noise, Steps, changed


def euler_cfg_pp(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """CFG++ (2406.08070, algorithm 2): Euler's step from the guided x0 along the unconditional noise.

    Its guidance scale lies between 0 and 1, such as 0.6. A step that is not guided is Euler's.
    """
    result = None
    for sigma, target in pairwise(sigmas):
        result = denoise(x, sigma, result)
        said, uncond = result.outputs, result.outputs.x0
        if said.uncond is not None:
            uncond = uncond - said.dx0_dout * (said.cond - said.uncond)
        x = result.x0 + (x - uncond) * (target / sigma)
        x = changed(x, (yield x, result))
