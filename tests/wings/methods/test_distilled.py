"""Latent consistency models: guidance as an embedding, their sampler and their timesteps."""

import math
import warnings
from dataclasses import replace

import families
import pytest
import torch
from conftest import error, seeded
from families import FAMILIES
from safetensors.torch import save_file

import scfg
from scfg import CFG, SCFG, BadInput, Guidance
from scfg.config import SD1, Config


def lcm_of(family: Config) -> Config:
    config = families.small(family)
    return replace(config, unet=replace(config.unet, guidance_dim=256), text=())


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load(family: Config) -> scfg.Diffusion:
        path = tmp_path_factory.mktemp("lcm") / "lcm.safetensors"
        save_file(families.original(lcm_of(family)), path)
        with pytest.warns(UserWarning, match="answer to noise is unsure: taken as eps"):
            return scfg.load(path)

    return load


def prompt_for(model: scfg.Diffusion) -> scfg.Prompt:
    pooled = {"uncond": seeded(1, 48), "cond": seeded(1, 48, seed=1)} if model.config.unet.vector_dim else {}
    states = {
        "uncond": seeded(1, 77, model.config.unet.context_dim),
        "cond": seeded(1, 77, model.config.unet.context_dim),
    }
    return scfg.Prompt(states, pooled)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_lcm_is_recognised_and_evaluates_one_row_that_knows_the_scale(load, name):
    model = load(FAMILIES[name])
    assert model.config.unet.guidance_dim == 256 and model.config.spacing == "lcm"
    x, prompt = seeded(2, 4, 8, 8), prompt_for(model)
    found = [model.denoiser(prompt, CFG(scale))(x, 3.0) for scale in (8.0, 8.0, 1.5)]
    assert all(one.outputs.uncond is None and (one.scale == 1).all() for one in found)
    assert torch.equal(found[0].x0, found[1].x0) and error(found[0].x0, found[2].x0) > 1e-4
    by_default = model.denoiser(prompt)(x, 3.0)
    assert torch.equal(by_default.x0, model.denoiser(prompt, CFG(model.config.scale))(x, 3.0).x0)


def test_the_scale_is_sines_and_cosines_of_a_thousand_times_what_it_is_over_one(load):
    """2310.04378's authors' embedding, number by number."""
    told = []
    denoiser = load(SD1).denoiser(prompt_for(load(SD1)), CFG(3.5))
    unet = denoiser.network.unet
    denoiser.network.unet = lambda x, t, conditioning, **rest: (
        told.append(conditioning.guidance) or unet(x, t, conditioning, **rest)
    )
    denoiser(seeded(1, 4, 8, 8), 3.0)
    for i in (0, 1, 64, 127):
        angle = 2500 * 10000 ** (-i / 127)
        assert told[0][0, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
        assert told[0][0, 128 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_what_does_not_act_beside_built_in_guidance_is_said_or_refused(load):
    model = load(SD1)
    prompt = prompt_for(model)
    for guidance in (SCFG(4.0), Guidance(scale=CFG(4.0), perturb=scfg.PAG(3.0))):
        with pytest.warns(UserWarning, match="the network of an LCM guides itself, at scale 4: .* do not act"):
            denoiser = model.denoiser(prompt, guidance)
        x = seeded(1, 4, 8, 8)
        assert torch.equal(denoiser(x, 3.0).x0, model.denoiser(prompt, CFG(4.0))(x, 3.0).x0)
    with pytest.raises(BadInput, match="an LCM is told one guidance scale"):
        model.denoiser(prompt, scfg.Energy())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.denoiser(prompt, CFG(4.0))


def test_a_network_that_is_not_told_its_scale_refuses(load, tiny):
    model, x, t = load(SD1), seeded(1, 4, 8, 8), torch.ones(1)
    context = seeded(1, 77, model.config.unet.context_dim)
    with pytest.raises(BadInput, match="this U-Net takes a guidance beside its tokens"):
        model.unet(x, t, scfg.Conditioning(context))
    with pytest.raises(BadInput, match="this U-Net takes no guidance"):
        tiny.unet(x, t, scfg.Conditioning(context[:, :, :48], guidance=torch.ones(1, 256)))


def test_the_sampler_goes_to_the_clean_latent_and_up_to_the_next_level():
    sigmas, drawn = [14.0, 6.0, 2.0, 0.0], [seeded(1, 4, 4, 4, seed=i) for i in range(9)]
    fresh = iter(drawn)

    def denoise(x, sigma, previous):
        return scfg.Denoised(x / 2, None, None, None, {}, None, {})

    x = seeded(1, 4, 4, 4, seed=20)
    found = [step.x for step in scfg.run(denoise, scfg.lcm, x, sigmas, lambda: next(fresh))]
    expected = x.double()
    for i, target in enumerate(sigmas[1:]):
        expected = expected / 2 + (target * drawn[i].double() if target else 0)
        assert error(found[i].double(), expected) < 1e-6


def test_its_own_timesteps(load):
    model = load(SD1)
    times = [model.config.schedule.time(sigma) for sigma in model.sigmas(4, scfg.lcm)[:-1]]
    assert times == pytest.approx([999, 759, 499, 259])
