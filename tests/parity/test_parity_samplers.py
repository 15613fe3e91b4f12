"""Noise levels and trajectories against diffusers' schedulers, on the small SD 1.x."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import scfg  # noqa: E402
from compare import close, model, no_gradients, normal  # noqa: E402, F401
from schedulers import scheduler  # noqa: E402
from small import NARROW, reference  # noqa: E402

pytestmark = pytest.mark.slow


def reference_sigmas(sampler: str, spacing: str, steps: int) -> Tensor:
    """diffusers' sigmas at the start of every step, and at the end of the last."""
    reference = scheduler(sampler, spacing)
    reference.set_timesteps(steps)
    if sampler != "ddim":
        return reference.sigmas
    ends = torch.cat([reference.timesteps, torch.tensor([-1])])  # whose alpha is the final one
    alphas = torch.cat([reference.alphas_cumprod, reference.final_alpha_cumprod[None]]).double()[ends]
    return ((1 - alphas) / alphas).sqrt()


def test_sigma_table() -> None:
    """The thousand sigmas of training, up to diffusers' single precision."""
    alphas = scheduler("ddim", "leading").alphas_cumprod.double().numpy()
    np.testing.assert_allclose(scfg.Schedule().sigmas, np.sqrt((1 - alphas) / alphas), rtol=1e-4)


@pytest.mark.parametrize(
    "sampler, spacing, steps",
    [
        ("ddim", "leading", 8),
        ("ddim", "leading", 7),
        ("ddim", "linspace", 7),
        ("ddim", "trailing", 7),
        ("dpmpp_2m", "linspace", 7),
        ("dpmpp_2m", "trailing", 7),
        ("dpmpp_2m", "karras", 7),
        ("unipc", "linspace", 7),
        ("euler", "linspace", 10),
        ("euler", "linspace", 7),
        ("euler", "karras", 7),
        ("heun", "linspace", 7),
        ("euler_ancestral", "linspace", 7),
        ("euler", "leading", 7),
        ("heun", "leading", 7),
        # diffusers' multistep schedulers leave the lowest of one point more out, as they do of linspace
        ("dpmpp_2m", "leading", 7),
        ("dpmpp_2m_sde", "leading", 7),
        ("unipc", "leading", 7),
    ],
)
def test_spacing(sampler: str, spacing: str, steps: int) -> None:
    """The sigmas that steps start from and end at; between table entries they tell timesteps one apart."""
    prompt = scfg.Prompt(context={"uncond": normal(1, 77, NARROW), "cond": normal(1, 77, NARROW, seed=1)})
    sigmas = model("sd1").sigmas(steps, sampler, spacing)
    taken = list(model("sd1").sample(prompt, scfg.CFG(5.0), sampler=sampler, sigmas=sigmas, size=(64, 64)))
    assert [step.index for step in taken] == list(range(steps))
    ours = [step.sigma for step in taken] + [taken[-1].next_sigma]
    expected = reference_sigmas(sampler, spacing, steps)
    expected = torch.cat([expected[:1], expected[1:-1:2], expected[-1:]]) if sampler == "heun" else expected
    np.testing.assert_allclose(np.array(ours), expected.numpy(), rtol=1e-4)
    assert (ours[-1] > 0) == (sampler == "ddim" and spacing == "leading")


def trajectories(
    sampler: str, spacing: str, steps: int, prediction: str, eta: float | None = None, seeds: tuple[int, ...] = (3,)
) -> tuple[Tensor, Tensor]:
    """The ends of scfg's and diffusers' guided runs: the same contexts, seeds and draws of noise."""
    pipe = reference("sd1").pipe
    cond, uncond = (normal(len(seeds), 77, NARROW, seed=seed) for seed in (2, 1))
    prompt = scfg.Prompt(context={"uncond": uncond, "cond": cond})
    ours = model("sd1", prediction)
    run = scfg.SAMPLERS[sampler] if eta is None else partial(scfg.SAMPLERS[sampler], eta=eta)
    sigmas = ours.sigmas(steps, sampler, spacing)
    *_, last = ours.sample(prompt, scfg.CFG(7.5), sampler=run, sigmas=sigmas, size=(128, 96), seeds=seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, 4, 12, 16, generator=generator) for generator in generators])
    pipe.scheduler = scheduler(sampler, spacing, prediction)
    expected = pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        latents=noise,
        num_inference_steps=steps,
        guidance_scale=7.5,
        height=96,
        width=128,
        generator=generators,
        eta=eta or 0.0,
        output_type="latent",
    ).images
    return last.latent, expected


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    "sampler, spacing, steps",
    [
        ("ddim", "leading", 8),
        ("ddim", "leading", 5),
        ("ddim", "trailing", 8),
        ("dpmpp_2m", "linspace", 7),
        ("dpmpp_2m", "linspace", 16),
        ("dpmpp_2m", "karras", 7),
        ("dpmpp_2m", "leading", 7),
        ("euler", "linspace", 10),
        ("euler", "linspace", 7),
        ("euler", "leading", 7),
        ("euler", "trailing", 7),
        ("euler", "karras", 7),
        ("heun", "trailing", 6),
        ("heun", "linspace", 6),
        ("heun", "leading", 6),
        ("heun", "karras", 5),
        ("unipc", "leading", 7),
        ("unipc", "linspace", 7),
        ("unipc", "trailing", 9),
        ("unipc", "karras", 7),
        ("unipc", "trailing", 2),
    ],
)
def test_sampler(sampler: str, spacing: str, steps: int, prediction: str) -> None:
    """Samplers that add no noise."""
    close(*trajectories(sampler, spacing, steps, prediction))


@pytest.mark.parametrize(
    "sampler, spacing, steps, prediction, eta",
    [
        ("ddim", "leading", 8, "eps", 0.6),
        ("ddim", "trailing", 8, "v", 1.0),
        ("euler_ancestral", "trailing", 7, "eps", None),
        ("euler_ancestral", "linspace", 10, "v", None),
        ("euler_ancestral", "linspace", 7, "eps", None),
        ("euler_ancestral", "leading", 7, "v", None),
        ("dpmpp_2m_sde", "leading", 7, "eps", None),
        ("dpmpp_2m_sde", "linspace", 7, "v", None),
        ("dpmpp_2m_sde", "trailing", 16, "eps", None),
        ("dpmpp_2m_sde", "karras", 7, "eps", None),
    ],
)
def test_noisy_sampler(sampler: str, spacing: str, steps: int, prediction: str, eta: float | None) -> None:
    """Samplers that add noise, each picture's drawn from its own generator after its first latent."""
    close(*trajectories(sampler, spacing, steps, prediction, eta, seeds=(3, 7)))
