"""What a network predicts, by its answer to noise: files often do not say."""

import logging
import math
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
SURE = 0.5  # cosine between noise and what was found of it


@torch.no_grad()
def predicts(model: Diffusion) -> Prediction | None:
    """What the network's output means, or None where that cannot be told.

    It is shown noise over an empty latent. With little noise, both eps and v are about that noise; a network that does
    not find it there was not trained, or predicts something else. With nothing but noise eps still is the noise; v is
    minus the expected latent, which knows nothing of it (2202.00512, appendix D).
    """
    config, unet = model.config, model.unet
    fixed, channels = torch.Generator().manual_seed(0), config.unet.in_channels
    noise = torch.randn(2, channels, 16, 16, generator=fixed)
    last = config.schedule.timesteps - 1
    t = [last, last // 5]
    sigma = torch.tensor([config.schedule.sigmas[one] for one in t], dtype=torch.float32)[:, None, None, None]
    zeros = torch.zeros(1, 1, config.unet.context_dim)
    pooled = torch.zeros(1, pooled_size(model)) if config.unet.vector_dim else None
    texts = dict.fromkeys(("uncond", "cond"), zeros)
    prompt = Prompt(texts, {} if pooled is None else dict.fromkeys(("uncond", "cond"), pooled))
    conditioner = prompt.conditioner(config, model.device, model.dtype)
    x = (noise * sigma / (sigma**2 + 1).sqrt()).to(model.device, model.dtype)
    conditioning = conditioner.condition([COND], config.schedule.moment(1.0), None, x.shape)
    out, _ = unet(x, torch.tensor(t, device=model.device), conditioning)
    at_noise, at_picture = F.cosine_similarity(out.float().flatten(1).cpu(), noise.flatten(1)).tolist()
    if not math.isfinite(at_noise + at_picture) or at_picture < SURE:
        return None
    return "eps" if at_noise > SURE else "v"


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
