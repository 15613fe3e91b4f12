"""On normal data of standard deviation s the ideal denoiser is x s^2 / (s^2 + sigma^2): the exact flow is known."""
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from scfg.samplers import ddim, dpmpp_2m

DEVIATION = 0.7


class Ideal(NamedTuple):
    x0: Tensor


def denoise(x, sigma, previous):
    return Ideal(x * DEVIATION ** 2 / (DEVIATION ** 2 + sigma ** 2))


def final_error(sampler, steps: int) -> float:
    sigmas = np.geomspace(10, 0.1, steps + 1).tolist()
    x = torch.tensor([3.0], dtype=torch.float64)
    *_, (found, _) = sampler(denoise, x, sigmas, None)
    exact = x * np.sqrt((DEVIATION ** 2 + 0.1 ** 2) / (DEVIATION ** 2 + 10 ** 2))
    return (found - exact).abs().item()


@pytest.mark.parametrize("sampler, order", [(ddim, 1), (dpmpp_2m, 2)])
def test_order_of_convergence(sampler, order):
    assert np.log2(final_error(sampler, 64) / final_error(sampler, 128)) == pytest.approx(order, abs=0.25)


def test_eta_keeps_the_distribution_of_the_noise():
    generator = torch.Generator().manual_seed(0)
    sigmas = np.geomspace(10, 0.1, 200).tolist()
    x = torch.randn(20000, generator=generator, dtype=torch.float64) * np.sqrt(DEVIATION ** 2 + 100)
    *_, (found, _) = ddim(denoise, x, sigmas, lambda: torch.randn(20000, generator=generator, dtype=torch.float64), eta=1.0)
    assert found.std().item() == pytest.approx(np.sqrt(DEVIATION ** 2 + 0.01), rel=0.03)
    assert abs(np.corrcoef(x, found)[0, 1]) < 0.1                              # the first noise is forgotten; without eta it is not
    *_, (same, _) = ddim(denoise, x, sigmas, None)
    assert np.corrcoef(x, same)[0, 1] > 0.99


def test_a_sampler_is_a_generator_that_hands_over_the_previous_result():
    seen = []

    def recording(x, sigma, previous):
        seen.append(previous)
        return denoise(x, sigma, previous)

    steps = ddim(recording, torch.ones(1), [3.0, 2.0, 1.0], None)
    _, first = next(steps)
    assert seen == [None]                                                     # nothing runs ahead of the caller
    next(steps)
    assert seen[1] is first
