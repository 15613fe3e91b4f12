"""Noise levels: sigma <-> timestep, spacings, and what a network's output says about the clean latent.

x = x0 + sigma * noise; the network sees x / sqrt(sigma^2 + 1).
"""
from typing import Literal

import numpy as np
from torch import Tensor

Spacing = Literal["leading", "linspace", "trailing", "karras"]
Prediction = Literal["eps", "v"]


def sigma_table() -> np.ndarray:
    """sigma(t) = sqrt((1 - a) / a) of the 1000 training steps (1000,), float64; betas linear in sqrt, 0.00085 to 0.012."""
    betas = np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2
    a = np.cumprod(1 - betas)
    return np.sqrt((1 - a) / a)


SIGMAS = sigma_table()


def time_of(sigma: float) -> float:
    """Timestep of a sigma: linear in log sigma between table entries, exact on them."""
    return float(np.interp(np.log(sigma), np.log(SIGMAS), np.arange(1000)))


def spaced_sigmas(spacing: Spacing, steps: int, drop_lowest: bool = False) -> list[float]:
    """The `steps + 1` sigmas of a run, falling; the last is where it ends.

    With linspace, `drop_lowest` spreads one point more and leaves the lowest out (DPM-Solver++'s habit).
    """
    if spacing == "karras":                           # Karras et al. 2022 (2206.00364), eq. 5 with rho = 7
        ramp = np.linspace(SIGMAS[-1] ** (1 / 7), SIGMAS[0] ** (1 / 7), steps)
        return [*(ramp ** 7).tolist(), 0.0]
    if spacing == "leading":
        t = np.arange(steps) * (1000 // steps) + (steps < 1000)      # the offset of one has no room in a thousand steps
        return [*SIGMAS[t][::-1].tolist(), float(SIGMAS[0])]
    if spacing == "linspace":
        drop = int(drop_lowest and steps < 1000)                              # there are no 1001 timesteps
        t = np.linspace(0, 999, steps + drop).round().astype(int)[drop:]
        return [*SIGMAS[t][::-1].tolist(), 0.0]
    if spacing == "trailing":
        t = (1000 - np.arange(steps) * 1000 / steps).round().astype(int) - 1
        return [*SIGMAS[t].tolist(), 0.0]
    raise ValueError(f"spacing is one of leading, linspace, trailing, karras, not {spacing!r}")


def gain(sigma: float, prediction: Prediction) -> float:
    """What x0 changes by when the network's output grows by one."""
    if prediction not in ("eps", "v"):
        raise ValueError(f"prediction is eps or v, not {prediction!r}")
    return -sigma if prediction == "eps" else -sigma / (sigma ** 2 + 1) ** 0.5


def to_x0(x: Tensor, sigma: float, out: Tensor, prediction: Prediction) -> Tensor:
    """The clean latent that the network's output stands for: an affine rule in x and out for either prediction."""
    return (x if prediction == "eps" else x / (sigma ** 2 + 1)) + gain(sigma, prediction) * out
