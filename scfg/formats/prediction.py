"""What a network predicts, by its answer to noise: files often do not say."""

import logging
import warnings
from dataclasses import replace

import torch
from torch.nn import functional as F

from ..config import SD2_V, predicting
from ..diffusion import Diffusion
from ..guidance import COND
from ..schedule import Prediction
from ..text import Prompt
from .family import WEBUI_TERMINAL_ALPHA

log = logging.getLogger("scfg")
SURE = 0.3  # cosine between noise and what an answer owes to it: untrained networks stay below
NEAR = 0.4  # from the share of noise that eps or v would have in the answer


def predicts(model: Diffusion) -> Prediction | None:
    """What the network's output means, or None where that cannot be told."""
    share, cosine = answer_to_noise(model)
    if not cosine > SURE:  # also where it is not a number
        return None
    # eps is all of pure noise, v hardly any of it (2202.00512, appendix D)
    expected: dict[Prediction, float] = {"eps": 1.0, "v": (model.config.schedule.sigmas[-1] ** 2 + 1) ** -0.5}
    return next((kind for kind, its in expected.items() if abs(share - its) < NEAR), None)


@torch.no_grad()
def answer_to_noise(model: Diffusion) -> tuple[float, float]:
    """How much of the noise is in the answer to nothing but noise, and how much the answer to little of it is alike.

    The network is shown noise and its opposite over an empty latent: half the difference of its answers is what they
    owe to the noise, without the latent that it expects. Pure noise: the share of the noise in that, since how large
    the answer is tells eps from v, and how alike it is does not: v that no longer knows of the noise may echo a little
    of it. Little noise: the cosine, since both eps and v are about the noise, at whatever size.
    """
    config, unet = model.config, model.unet
    noise = torch.randn(1, config.unet.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    last = config.schedule.timesteps - 1
    t = [last, last, last // 5, last // 5]
    sigma = torch.tensor([config.schedule.sigmas[one] for one in t], dtype=torch.float32)[:, None, None, None]
    zeros = torch.zeros(1, 1, config.unet.context_dim)
    pooled = torch.zeros(1, pooled_size(model)) if config.unet.vector_dim else None
    texts = dict.fromkeys(("uncond", "cond"), zeros)
    prompt = Prompt(texts, {} if pooled is None else dict.fromkeys(("uncond", "cond"), pooled))
    conditioner = prompt.conditioner(config, model.device, model.dtype)
    x = (torch.cat([noise, -noise] * 2) * sigma / (sigma**2 + 1).sqrt()).to(model.device, model.dtype)
    conditioning = conditioner.condition([COND], config.schedule.moment(1.0), None, x.shape)
    if config.unet.guidance_dim:
        conditioning = conditioning._replace(guidance=x.new_zeros(1, config.unet.guidance_dim))
    out, _ = unet(x, torch.tensor(t, device=model.device), conditioning)
    at_noise, at_picture = (out[::2] - out[1::2]).float().flatten(1).cpu() / 2
    alone = noise.flatten()
    share = at_noise @ alone / (alone @ alone)
    return share.item(), F.cosine_similarity(at_picture, alone, dim=0).item()


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
        warnings.warn(f"{what}; prediction (--prediction) says otherwise", stacklevel=3)
    elif found != usual and config.name != SD2_V.name:
        what = f"{unsaid}: taken as {found}, by its answer to noise"
        warnings.warn(f"{what}; prediction (--prediction) says otherwise", stacklevel=3)
    else:
        log.info(f"{unsaid}: taken as {found}, by its answer to noise")
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
