"""A VAE from another file, be it alone there or in a whole checkpoint."""

import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import FIRST_STAGE, UNET, build, family_of, shortened, vae_sizes, with_prefix
from ..config import Config, VAEConfig
from ..errors import BadInput
from ..vae import VAE
from .pickled import read


def read_vae(path: Path) -> tuple[Config | None, VAEConfig, dict[str, Tensor]]:
    """The family (None of a VAE alone), the VAE's sizes, and its tensors by the names of a whole checkpoint."""
    tensors, metadata = read(path)
    family = family_of(path, tensors, metadata) if with_prefix(tensors, UNET) else None
    networks = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    alone = {k: v for k, v in (with_prefix(tensors, FIRST_STAGE) or tensors).items() if k.startswith(networks)}
    named = {FIRST_STAGE + name: tensor for name, tensor in alone.items()}
    try:
        sizes = vae_sizes(family.vae if family else VAEConfig(), named)
        _, complaints = build(lambda: VAE(sizes), alone, torch.float32)
    except Exception as error:  # foreign layouts and absurd shapes fail in many ways
        raise BadInput(f"{path} holds no VAE of Stable Diffusion's layout ({type(error).__name__})") from None
    if complaints:
        raise BadInput(f"{path} holds no whole VAE: {shortened(complaints)}")
    return family, sizes, named


def with_vae(
    vae: Path, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Tensor], Config]:
    """A checkpoint's tensors with another file's VAE, and its config with that VAE's sizes, if the two go together."""
    family, sizes, first_stage = read_vae(vae)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(FIRST_STAGE)} | first_stage
    config = family_of(path, tensors, metadata)
    if family and family.latent_scale != config.latent_scale:
        what = f"{vae} is {family.name}, whose latents are not those of {config.name}"
        raise BadInput(f"{what}: give a VAE of this family")
    if sizes.latent_channels != config.unet.in_channels:
        channels = config.unet.in_channels
        what = f"{vae} has latents of {sizes.latent_channels} channels, those of {config.name} have {channels}"
        raise BadInput(f"{what}: give a VAE of this family")
    if not family:
        warnings.warn(f"a VAE alone does not say its family: {vae} is taken for one of {config.name}", stacklevel=4)
    return tensors, replace(config, vae=replace(sizes, overflows=config.vae.overflows))
