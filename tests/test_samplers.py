"""On normal data of standard deviation s the ideal denoiser is x s^2 / (s^2 + sigma^2): the exact flow is known.

All is linear there, so x is kept as its coefficients of the independent noises drawn: standard deviations come out exactly.
"""
import inspect
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from scfg.samplers import ddim, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, heun, unipc

DEVIATION = 0.7


class Ideal(NamedTuple):
    x0: Tensor


def denoise(x, sigma, previous):
    return Ideal(x * DEVIATION ** 2 / (DEVIATION ** 2 + sigma ** 2))


def final(sampler, steps: int, **options) -> tuple[Tensor, float]:
    """Coefficients of the first noise and of those drawn later, from sigma 10 to 0.1; and the exact standard deviation there."""
    x, drawn = torch.zeros(steps + 1, dtype=torch.float64), iter(torch.eye(steps + 1, dtype=torch.float64)[1:])
    x[0] = np.sqrt(DEVIATION ** 2 + 100)
    *_, (found, _) = sampler(denoise, x, np.geomspace(10, 0.1, steps + 1).tolist(), lambda: next(drawn), **options)
    return found, np.sqrt(DEVIATION ** 2 + 0.01)


@pytest.mark.parametrize("sampler, order", [
    (ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 2), (euler_ancestral, 1), (dpmpp_2m_sde, 2)])
def test_order_of_convergence(sampler, order):
    errors = []
    for steps in (256, 512):
        found, exact = final(sampler, steps)
        errors.append(abs(found.norm().item() - exact))
        assert ("eta" in inspect.signature(sampler).parameters and sampler is not ddim) == (found[1:].count_nonzero() > 0)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_unipc_s_correction_is_worth_its_lines():
    """Its last step is of first order, which hides its order; its error is another matter."""
    errors = [abs(found.norm().item() - exact) for found, exact in (final(sampler, 64) for sampler in (unipc, dpmpp_2m))]
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("sampler", [ddim, euler_ancestral, dpmpp_2m_sde])
def test_eta_forgets_the_first_noise_and_keeps_the_distribution(sampler):
    for eta, forgotten in ((1.0, True), (0.5, None), (0.0, False)):
        found, exact = final(sampler, 400, eta=eta)
        assert found.norm().item() == pytest.approx(exact, rel=0.01)
        share = (found[0] / found.norm()).item()
        assert share < 0.1 if forgotten else share < 0.9 if forgotten is None else share == 1


@pytest.mark.parametrize("sampler", [ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc])
@pytest.mark.parametrize("sigmas", [[3.0, 0.0], [3.0, 1.0, 0.0], [9.0, 3.0, 1.0, 0.2, 0.0]])
def test_the_end_is_the_last_clean_expectation(sampler, sigmas):
    *_, (x, result) = sampler(denoise, torch.ones(3), sigmas, lambda: torch.ones(3))
    assert torch.allclose(x, result.x0, atol=1e-6)


@pytest.mark.parametrize("sampler", [ddim, euler_ancestral, heun, dpmpp_2m_sde, unipc])
def test_a_sampler_is_a_generator_that_hands_over_the_previous_result(sampler):
    seen, made = [], []

    def recording(x, sigma, previous):
        seen.append(previous)
        made.append(denoise(x, sigma, previous))
        return made[-1]

    steps = sampler(recording, torch.ones(1), [3.0, 2.0, 1.0, 0.5], lambda: torch.zeros(1))
    _, first = next(steps)
    assert first is made[0] and len(made) == (2 if sampler is heun else 1)    # nothing runs ahead of the caller
    list(steps)
    assert seen == [None, *made[:-1]]


def test_a_sampler_stays_within_20_lines():
    for sampler in (ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc):
        assert len(inspect.getsource(sampler).splitlines()) <= 20
