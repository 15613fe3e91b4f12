"""A second model that takes a run over."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..config import Config
from ..errors import BadInput
from ..samplers import Denoise
from ..schedule import Schedule


def handover_time(schedule: Schedule, start: float) -> int:
    """The timestep below which a refiner acts that leaves the share `start` of the training's to another model."""
    return round(schedule.timesteps * (1 - start))


def hand_over(late: Denoise, schedule: Schedule, start: float = 0.8) -> Callable[[Denoise], Denoise]:
    """Denoise -> Denoise: the given one for a share `start` of the timesteps, counted from noise, then `late`.

    `late` is another model's denoiser, with its own encoding of the text; the sampler goes on with what it remembers.
    """

    def handed_over(early: Denoise) -> Denoise:
        def denoise(x: Tensor, sigma: float, previous: Any) -> Any:
            acting = early if schedule.time(sigma) >= handover_time(schedule, start) else late
            return acting(x, sigma, previous)

        return denoise

    return handed_over


def check_refiner(base: Config, refiner: Config) -> None:
    """Raise BadInput where one model cannot go on with the other's latents; warn where it is no refiner."""
    if (refiner.latent_scale, refiner.vae.latent_channels) != (base.latent_scale, base.vae.latent_channels):
        raise BadInput(f"{refiner.name} cannot refine what {base.name} began: their latents are not the same")
    if not refiner.aesthetic_scores:
        warnings.warn(f"{refiner.name} is no refiner: it is used as one all the same", stacklevel=3)
