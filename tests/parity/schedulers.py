"""diffusers' schedulers, without their rounding and with one noise for all of them."""

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


class Unrounded:
    """Gives the network each Karras sigma's own timestep, where diffusers rounds it."""

    def set_timesteps(self, *args, **kwargs) -> None:
        """Set diffusers' sigmas and, for Karras spacing, fractional timesteps."""
        super().set_timesteps(*args, **kwargs)
        if self.config.use_karras_sigmas:
            table = np.log(((1 - self.alphas_cumprod.double()) / self.alphas_cumprod.double()).sqrt().numpy())
            self.timesteps = torch.tensor(
                [float(self._sigma_to_t(sigma, table)) for sigma in self.sigmas[:-1].double().numpy()]
            )


class UnitStart:
    """Starts from unit variance after scaling, sqrt(sigma^2 + 1) * noise, also where diffusers takes sigma * noise."""

    @property
    def init_noise_sigma(self) -> Tensor:
        """Standard deviation of the first x."""
        return (self.sigmas.max() ** 2 + 1) ** 0.5


class DPM(Unrounded, DPMSolverMultistepScheduler):
    """DPM-Solver++, and its SDE."""


class UniPC(Unrounded, UniPCMultistepScheduler):
    """UniPC."""


class Euler(UnitStart, EulerDiscreteScheduler):
    """Euler."""


class Ancestral(UnitStart, EulerAncestralDiscreteScheduler):
    """Euler with noise."""


class Heun(UnitStart, HeunDiscreteScheduler):
    """Heun."""


SCHEDULERS = {
    "dpmpp_2m": DPM,
    "dpmpp_2m_sde": DPM,
    "euler": Euler,
    "euler_ancestral": Ancestral,
    "heun": Heun,
    "unipc": UniPC,
}


def scheduler(sampler: str, spacing: str, prediction: str = "eps") -> SchedulerMixin:
    """diffusers' scheduler for a sampler and a spacing."""
    common = {**BETAS, "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[prediction], "steps_offset": 1}
    common |= {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    if sampler == "ddim":
        return DDIMScheduler(**common, clip_sample=False, set_alpha_to_one=spacing != "leading")
    return SCHEDULERS[sampler](**common, **({"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}))
