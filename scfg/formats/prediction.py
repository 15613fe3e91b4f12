"""What a network predicts, by its answer to noise: files often do not say."""

import logging
import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import SD2_V, predicting
from ..diffusion import Diffusion
from ..guidance import COND
from ..schedule import Prediction
from ..text import Prompt
from ..unet import exact
from .family import EPS_SAYS_NOTHING, WEBUI_TERMINAL_ALPHA

log = logging.getLogger("scfg")
SURE = 0.25  # cosine between noise and what an answer owes to it: networks of random weights stay below 0.2
NEAR = 0.4  # from the share of noise that eps or v would have in the answer


def predicts(model: Diffusion) -> Prediction | None:
    """What the network's output means, or None where that cannot be told.

    The answer to nothing but noise is all of it for eps, and hardly any for v (2202.00512, appendix D), of which an
    untrained network has as little: the answer to a little noise, which eps and v are both about, tells them apart.
    """
    share, cosine = answer_to_pure_noise(model)
    if cosine > SURE and abs(share - 1) < NEAR:
        return "eps"
    expected = (model.config.schedule.sigmas[-1] ** 2 + 1) ** -0.5
    return "v" if abs(share - expected) < NEAR and likeness_to_little_noise(model) > SURE else None


def answer_to_pure_noise(model: Diffusion) -> tuple[float, float]:
    """The share of the noise in the network's answer to it, and their cosine.

    The share tells eps from v, which may echo a little of the noise.
    """
    noise = fixed_noise(model, 8)  # the least that every U-Net takes: nearly every file is asked this
    out = answer(model, noise, model.config.schedule.timesteps - 1)
    share = out.flatten() @ noise.flatten() / (noise.flatten() @ noise.flatten())
    return share.item(), F.cosine_similarity(out.flatten(), noise.flatten(), dim=0).item()


def likeness_to_little_noise(model: Diffusion) -> float:
    """The cosine between a little noise and what the network's answer owes to it.

    That is half the difference of the answers to the noise and to its opposite, without the latent that is expected.
    """
    noise = fixed_noise(model, 16)
    there, opposite = answer(model, torch.cat([noise, -noise]), model.config.schedule.timesteps // 5)
    return F.cosine_similarity((there - opposite).flatten(), noise.flatten(), dim=0).item()


def fixed_noise(model: Diffusion, side: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(
        1, model.config.unet.in_channels, side, side, generator=generator, dtype=torch.float32, device="cpu"
    )


@torch.no_grad()
def answer(model: Diffusion, noise: Tensor, t: int) -> Tensor:
    """The output (b c h w) for noise over an empty latent at a timestep, on the CPU in fp32."""
    config = model.config
    zeros = torch.zeros(1, 1, config.unet.context_dim, dtype=torch.float32, device="cpu")
    pooled = {"cond": zeros.new_zeros(1, pooled_size(model))} if config.unet.vector_dim else {}
    conditioner = Prompt({"uncond": zeros, "cond": zeros}, pooled).conditioner(config, model.device, model.dtype)
    sigma = float(config.schedule.sigmas[t])
    x = (noise * sigma / math.sqrt(sigma**2 + 1)).to(model.device, model.dtype)
    conditioning = conditioner.condition([COND], config.schedule.moment(sigma), None, x.shape)
    if config.unet.guidance_dim:
        conditioning = conditioning._replace(guidance=x.new_zeros(1, config.unet.guidance_dim))
    with exact(x.device):
        out, _ = model.unet(x, x.new_full((len(x),), t, dtype=torch.float32), conditioning)
    return out.float().cpu()


def pooled_size(model: Diffusion) -> int:
    """Channels of the pooled text in the vector, which holds sinusoids beside it."""
    return model.config.unet.vector_dim - 256 * (5 if model.config.aesthetic_scores else 6)


def ask_prediction(model: Diffusion) -> Diffusion:
    """A model whose file does not say what it predicts, with what its network answers, or else the family's usual."""
    config, found = model.config, predicts(model)
    usual = config.schedule.prediction
    unsaid = f"this {config.name} file does not say what it predicts"
    if found is None:
        what = f"{unsaid}, and its answer to noise is unsure: taken as {usual}, as is usual"
        warnings.warn(f"{what}; prediction (--prediction) says otherwise", stacklevel=4)
    elif found != usual and config.name != SD2_V.name:
        what = f"{unsaid}: taken as {found}, by its answer to noise"
        warnings.warn(f"{what}; prediction (--prediction) says otherwise", stacklevel=4)
    else:
        log.info(f"{unsaid}: taken as {found}, by its answer to noise")
    if config.schedule.terminal_alpha and (found or usual) == "eps":
        warnings.warn(f"this file asks for zero terminal SNR {EPS_SAYS_NOTHING}", stacklevel=4)
    return replace(model, config=predicting(config, found or usual))


def check_prediction(model: Diffusion, requested: Prediction) -> None:
    """Warn where a network answers noise as one of another prediction than was asked for."""
    found = predicts(model)
    if found and found != requested:
        what = f"prediction {requested} was asked for, but this network answers noise as one of {found}"
        warnings.warn(what, stacklevel=2)


def with_zero_terminal_snr(model: Diffusion) -> Diffusion:
    """A model whose noise levels reach pure noise (2305.08891), with trailing spacing; warns where it predicts eps.

    At pure noise, eps says nothing of the latent.
    """
    config = model.config
    if config.schedule.prediction == "eps":
        what = "zero terminal SNR was asked for, but this network predicts eps, which says nothing at pure noise"
        warnings.warn(what, stacklevel=2)
    schedule = replace(config.schedule, terminal_alpha=WEBUI_TERMINAL_ALPHA)
    return replace(model, config=replace(config, schedule=schedule, spacing="trailing"))
