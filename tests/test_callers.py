"""A caller's own settings of torch, its threads and its processes change no bit of a result."""

import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import error

import scfg
from scfg.prompting import encode

TEXT = "a (red:1.2) [car|star] on grass AND a blue star:0.7"


def picture(model: scfg.Diffusion, seed: int = 5) -> torch.Tensor:
    """By most of what a step can do: words by step, AND, S-CFG, a region, a perturbation, fresh noise."""
    area = scfg.ByRegion(scfg.SCFG(3.0), (scfg.Region("car|star", scale=4.0), scfg.Region("foreground", times=0.9)))
    guidance = scfg.Guidance(scale=area, perturb=scfg.PAG(2.0), direction=scfg.FDG(0.5), rescale=scfg.Rescale(0.5))
    prompt = encode(model, TEXT, None, None, model.sigmas(3, "dpmpp_2m_sde"))
    *_, step = model.sample(prompt, guidance, steps=3, sampler="dpmpp_2m_sde", seeds=seed)
    return model.decode(step.latent)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SETTINGS = {
    "none": nullcontext,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "another device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "deterministic algorithms": deterministic,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this model never saw")
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_settings_of_torch_change_nothing(flat, setting):
    expected = picture(flat)
    with setting():
        assert torch.equal(picture(flat), expected)
        loaded = scfg.load()
        assert torch.equal(picture(loaded), expected)
    assert torch.equal(picture(loaded), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this model never saw")
def test_eight_threads_give_the_bits_of_one(flat):
    expected = [picture(flat, seed) for seed in range(4)]
    fresh = scfg.load()  # whatever is made when first needed is made by all at once
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: picture(fresh, i % 4), range(24)))
    assert all(torch.equal(one, expected[i % 4]) for i, one in enumerate(found))


@pytest.mark.filterwarnings("ignore:this model never saw")
def test_a_model_goes_to_another_process(flat):
    before = picture(flat)  # what a run leaves in the networks goes along
    assert torch.equal(picture(pickle.loads(pickle.dumps(flat))), before)


def test_float64_is_float64_throughout():
    """Differences of the step are its slope, to which float32 anywhere in it would leave a hundredth."""
    model = scfg.load(dtype=torch.float64)
    step, generator = model.denoiser("a red car on grass", scfg.CFG(2.0)), torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert step(x, 3.0).x0.dtype == step(x, 3.0).outputs.cond.dtype == torch.float64
    assert torch.autograd.gradcheck(lambda latent: step(latent, 3.0).x0.sum(), (x,))


def test_the_number_of_threads_changes_rounding_alone(flat):
    """What docs/trust.md says of it."""
    before, latents = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            *_, step = flat.sample("a red car on grass", scfg.SCFG(4.0), steps=8, seeds=[3, 4])
            latents.append(step.latent)
    finally:
        torch.set_num_threads(before)
    assert all(error(latent, latents[0]) < 1e-4 for latent in latents[1:])
