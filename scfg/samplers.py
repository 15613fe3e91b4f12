"""Samplers over falling sigmas, x = x0 + sigma * noise: generators, so that progress, previews and stopping are the
caller's loop. What the caller sends back takes the place of x.

`eta` is the share of noise that is drawn afresh: 0 follows the probability flow, 1 its stochastic equation.
"""

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

Denoise = Callable[[Tensor, float, Any], Any]  # (x, sigma, the previous evaluation's result or None) -> one with .x0
Noise = Callable[[], Tensor]  # unit normal, shaped as x
Steps = Generator[tuple[Tensor, Any], Tensor | None, None]  # x after a step, and what was computed at its start
Sampler = Callable[[Denoise, Tensor, Sequence[float], Noise], Steps]


def changed(x: Tensor, sent: Tensor | None) -> Tensor:
    """What the caller sent back, or x itself where that is nothing."""
    return x if sent is None else sent


def ddim(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 0.0) -> Steps:
    """DDIM (2010.02502, eq. 12 and 16): Euler's method in sigma; eta moves a share of it into fresh noise."""
    result = None
    for sigma, target in pairwise(sigmas):
        result = denoise(x, sigma, result)
        fresh = eta * target * math.sqrt(sigma**2 - target**2) / sigma
        x = result.x0 + (x - result.x0) * (math.sqrt(target**2 - fresh**2) / sigma)
        if fresh:
            x = x + fresh * noise()
        x = changed(x, (yield x, result))


def euler(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Euler's method in sigma (Karras et al. 2022, 2206.00364): DDIM's step; the levels it usually runs over differ."""
    return ddim(denoise, x, sigmas, noise)


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 1.0) -> Steps:
    """Euler's method down to less noise than wanted, and fresh noise up to it: DDIM's step, with its eta."""
    return ddim(denoise, x, sigmas, noise, eta)


def heun(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Heun's method in sigma (2206.00364, algorithm 1): two evaluations a step, one in a last step to zero."""
    latest = None
    for sigma, target in pairwise(sigmas):
        latest = result = denoise(x, sigma, latest)
        slope = (x - result.x0) / sigma
        end = x + (target - sigma) * slope
        if target:
            latest = denoise(end, target, result)
            end = x + (target - sigma) * (slope + (end - latest.x0) / target) / 2
        x = changed(end, (yield end, result))


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise, eta: float = 1.0) -> Steps:
    """SDE-DPM-Solver++(2M) (2211.01095, section 5; midpoint); first order in the first and the last step."""
    result: Any = None
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        previous, result = result, denoise(x, sigma, result)
        x0 = result.x0
        if previous is not None and i < len(sigmas) - 2:
            ratio = math.log(sigmas[i - 1] / sigma) / math.log(sigma / target)  # h_last / h, h in log(1 / sigma)
            x0 = x0 + (x0 - previous.x0) / (2 * ratio)
        x = x0 + (x - x0) * (target / sigma) ** (1 + eta)
        if eta and target:
            x = x + target * math.sqrt(1 - (target / sigma) ** (2 * eta)) * noise()
        x = changed(x, (yield x, result))


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """DPM-Solver++(2M) (2211.01095, algorithm 2): the former without fresh noise."""
    return dpmpp_2m_sde(denoise, x, sigmas, noise, eta=0.0)


def unipc(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """UniPC of order 2 (2302.04867, B2): DPM-Solver++(2M) whose every step is corrected by the evaluation at its end,
    unless the caller changed what it came to."""
    result: Any = None
    sent, start = None, x
    q, bend, a, c = 1.0, 0.0, 0.0, 1 / 2
    for i, (sigma, target) in enumerate(pairwise(sigmas)):
        previous, result = result, denoise(x, sigma, result)
        x0 = result.x0
        if previous is not None and sent is None:  # the last step once more, now that its end is known
            x = q * start + (1 - q) * (previous.x0 + a * bend + c * (x0 - previous.x0))
        start, q, bend, a, c = x, target / sigma, 0.0, 0.0, 1 / 2
        if previous is not None and i < len(sigmas) - 2:
            h, r = -math.log(q), math.log(sigmas[i - 1] / sigma) / math.log(q)  # in log(1 / sigma); r = -h_last / h
            b1, b2 = 1 / (1 - q) - 1 / h, (1 - 2 * (1 - (1 - q) / h) / h) / (1 - q)
            bend, a = (previous.x0 - x0) / r, (b1 - b2) / (1 - r)
            c = b1 - a
        x = q * x + (1 - q) * (x0 + bend / 2)
        sent = yield x, result
        x = changed(x, sent)


ALL = (ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc)
SAMPLERS: dict[str, Callable[..., Steps]] = {sampler.__name__: sampler for sampler in ALL}
MULTISTEP = {"dpmpp_2m", "dpmpp_2m_sde", "unipc"}  # of linspace noise levels they leave the lowest out
