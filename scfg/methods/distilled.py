"""Networks that were distilled with their guidance: latent consistency models (Luo et al. 2023, 2310.04378)."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..denoise import Denoiser
from ..errors import BadInput
from ..guidance import CFG, Guidance
from ..samplers import Denoise, Noise, Steps, changed
from ..unet import Attend, Capture, Captured, Conditioning, UNet


def scale_embedding(scale: float, channels: int) -> Tensor:
    """What an LCM is told of its guidance scale, (1 channels): sines, then cosines, of 1000 (scale - 1)."""
    frequencies = torch.exp(torch.linspace(0, -math.log(10000), channels // 2, dtype=torch.float64, device="cpu"))
    angles = 1000 * (scale - 1) * frequencies
    return torch.cat([angles.sin(), angles.cos()]).float()[None]


class Distilled:
    """A network that is told its guidance scale."""

    def __init__(self, unet: UNet, scale: float):
        weight = unet.get_parameter("out.2.weight")
        self.unet, self.embedding = unet, scale_embedding(scale, unet.config.guidance_dim).to(weight)

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        capture: Capture | None = None,
        attend: Attend | None = None,
    ) -> tuple[Tensor, Captured]:
        return self.unet(x, t, conditioning._replace(guidance=self.embedding), capture=capture, attend=attend)


def unguided(moment: Any) -> float:
    return 0.0


def distilled(denoiser: Denoiser, unet: UNet) -> Denoiser:
    """An LCM's denoise step: its network is told the scale, and the conditional row is all that is evaluated.

    Raises BadInput for a rule without one scale; warns of what then does not act.
    """
    guidance = denoiser.guidance
    scale = getattr(guidance.scale, "gamma", None)
    if scale is None:
        raise BadInput(f"an LCM is told one guidance scale: give a rule that has one, such as CFG(8.0), not {guidance}")
    if guidance != Guidance(scale=CFG(scale)):
        what = f"the network of an LCM guides itself, at scale {scale:g}"
        warnings.warn(f"{what}: regions, negative prompts and other guidance do not act", stacklevel=4)
    return replace(denoiser, network=Distilled(unet, scale), guidance=Guidance(scale=CFG(scale), when=unguided))


def lcm(denoise: Denoise, x: Tensor, sigmas: Sequence[float], noise: Noise) -> Steps:
    """Multistep consistency sampling (2310.04378, algorithm 3): to the clean latent, then up to the next level."""
    result = None
    for sigma, target in pairwise(sigmas):
        result = denoise(x, sigma, result)
        x = result.x0 + target * noise() if target else result.x0
        x = changed(x, (yield x, result))
