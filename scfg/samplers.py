"""Samplers over falling sigmas, x = x0 + sigma * noise. Each is a generator: progress, previews and stopping are the caller's loop."""
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

Denoise = Callable[[Tensor, float, Any], Any]         # (x, sigma, the previous step's result or None) -> a result with .x0
Noise = Callable[[], Tensor]                          # unit normal, shaped as x


def ddim(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 0.0) -> Iterator[tuple[Tensor, Any]]:
    """DDIM (Song et al. 2020, 2010.02502, eq. 12 and 16): Euler's method in sigma; eta moves a share of it into fresh noise."""
    result = None
    for sigma, target in pairwise(sigmas):
        result = denoise(x, sigma, result)
        fresh = eta * target * math.sqrt(sigma ** 2 - target ** 2) / sigma
        x = result.x0 + (x - result.x0) * (math.sqrt(target ** 2 - fresh ** 2) / sigma)
        if fresh:
            x = x + fresh * noise()
        yield x, result


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Iterator[tuple[Tensor, Any]]:
    """DPM-Solver++(2M) (Lu et al. 2022, 2211.01095, algorithm 2); first order in the first and the last step."""
    result, before = None, None                       # before: the sigma of the previous step
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        previous, result = result, denoise(x, sigma, result)
        x0 = result.x0
        if previous is not None and i < len(sigmas) - 2:
            ratio = math.log(before / sigma) / math.log(sigma / target)          # h_last / h, h in log(1 / sigma)
            x0 = x0 + (x0 - previous.x0) / (2 * ratio)
        x = x0 + (x - x0) * (target / sigma)
        before = sigma
        yield x, result
