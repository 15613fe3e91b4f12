"""Noise levels: sigma <-> timestep, spacings, progress, and what a network's output says about the clean latent.

x = x0 + sigma * noise; the network sees x / sqrt(sigma^2 + 1).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
from torch import Tensor

from .errors import BadInput, shown, whole_number

Spacing = Literal["leading", "linspace", "trailing", "karras", "lcm"]
Prediction = Literal["eps", "v"]
HIGHEST = 1e38  # sigmas lie below: latents are float32
DISTILLED = 50  # the timesteps that an LCM was distilled on (2310.04378)


class Moment(NamedTuple):
    """A noise level and what follows from it: numbers on the host."""

    sigma: float
    t: float  # the timestep, 0 to 999
    progress: float  # 0 at pure noise, 1 at none, linear in timesteps
    dx0_dx: float  # the clean latent is dx0_dx * x + dx0_dout * out
    dx0_dout: float

    def to_x0(self, x: Tensor, out: Tensor) -> Tensor:
        """The clean latent that the network's output stands for, both (b c h w)."""
        return self.dx0_dx * x + self.dx0_dout * out


@dataclass(frozen=True)
class Schedule:
    """The noise levels of training, betas linear in their square roots, and what the network was trained to predict."""

    prediction: Prediction = "eps"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    timesteps: int = 1000
    terminal_alpha: float | None = None  # zero terminal SNR, with this in place of the last a, 0; None: without
    leading_offset: int = 1  # added to the timesteps of leading spacing
    ddim_to_zero: bool | None = None  # whether DDIM ends at 0 or at sigma(0), see `spaced`

    @cached_property
    def sigmas(self) -> np.ndarray:
        """sigma(t) = sqrt((1 - a) / a), a the cumulative product of 1 - beta; (timesteps,), float64, rising."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps) ** 2
        a = np.cumprod(1 - betas)
        if self.terminal_alpha:  # 2305.08891, algorithm 1
            s = np.sqrt(a)
            a = ((s - s[-1]) * s[0] / (s[0] - s[-1])) ** 2
            a[-1] = self.terminal_alpha
        return np.sqrt((1 - a) / a)

    def time(self, sigma: float) -> float:
        """The timestep of a sigma: linear in log sigma between entries of the table, exact on them."""
        sigma = max(sigma, self.sigmas[0])  # there is none below 0
        return float(np.interp(np.log(sigma), np.log(self.sigmas), np.arange(self.timesteps)))

    def moment(self, sigma: float) -> Moment:
        """What follows from a noise level, one for the whole batch; raises BadInput where it cannot be one."""
        number = hasattr(type(sigma), "__float__") and not getattr(sigma, "ndim", 0)
        if not number or not 0 <= float(sigma) < HIGHEST:
            raise BadInput(f"sigma is one number from 0 to 1e38 for the whole batch, not {shown(sigma)}")
        sigma = float(sigma)
        t, a = self.time(sigma), 1 / (sigma**2 + 1)
        dx0_dx, dx0_dout = (1.0, -sigma) if self.prediction == "eps" else (a, -sigma * a**0.5)  # v: 2202.00512, app. D
        return Moment(sigma, t, 1 - t / (self.timesteps - 1), dx0_dx, dx0_dout)

    def spaced(
        self, spacing: Spacing, steps: int, rounded: bool = False, drop: bool = False, to_zero: bool | None = True
    ) -> list[float]:
        """The `steps + 1` sigmas of a run, falling; the last is where it ends.

        linspace: timesteps are rounded or not, and with drop one point more is spread and the lowest left out.
        to_zero: the run ends at 0 or, but for karras, at sigma(0); None: at sigma(0) for leading alone.
        """
        most = DISTILLED if spacing == "lcm" else self.timesteps
        steps = whole_number("steps", steps, 1, most)
        if spacing == "karras":  # Karras et al. 2022 (2206.00364), eq. 5 with rho = 7
            ramp = np.linspace(self.sigmas[-1] ** (1 / 7), self.sigmas[0] ** (1 / 7), steps)
            return [*(ramp**7).tolist(), 0.0]
        extra, every = int(drop and steps < self.timesteps), np.arange(self.timesteps)
        t: np.ndarray
        if spacing == "leading":  # its offset has no room where every timestep is a step
            offset = self.leading_offset * (steps + extra < self.timesteps)
            t = (every[extra : steps + extra] * (self.timesteps // (steps + extra)) + offset)[::-1]
        elif spacing == "linspace":
            t = np.linspace(0, self.timesteps - 1, steps + extra)[extra:][::-1]
            t = t.round() if rounded else t
        elif spacing == "trailing":
            t = (self.timesteps - np.arange(steps) * self.timesteps / steps).round() - 1
        elif spacing == "lcm":
            t = every[:: -self.timesteps // most][np.arange(steps) * most // steps]
        else:
            raise BadInput(f"spacing is one of {', '.join(get_args(Spacing))}, not {spacing!r}")
        levels = self.sigmas[t] if spacing == "leading" else np.exp(np.interp(t, every, np.log(self.sigmas)))
        to_zero = spacing != "leading" if to_zero is None else to_zero
        return [*levels.tolist(), 0.0 if to_zero or t[-1] == 0 else float(self.sigmas[0])]
