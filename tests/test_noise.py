import math

import numpy as np
import pytest
import torch

from scfg.noise import SIGMAS, spaced_sigmas, time_of, to_x0

SPACINGS = ["leading", "linspace", "trailing", "karras"]


def test_the_table_is_stable_diffusions():
    assert SIGMAS.shape == (1000,) and math.isclose(SIGMAS[0], 0.02916, rel_tol=1e-3) and math.isclose(SIGMAS[-1], 14.6146, rel_tol=1e-4)


def test_time_of_inverts_the_table_and_is_linear_in_log_sigma():
    assert [time_of(SIGMAS[t]) for t in (0, 1, 500, 999)] == [0, 1, 500, 999]
    assert math.isclose(time_of(math.sqrt(SIGMAS[10] * SIGMAS[11])), 10.5, rel_tol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
@pytest.mark.parametrize("drop_lowest", [True, False])
def test_every_spacing_falls(spacing, steps, drop_lowest):
    sigmas = spaced_sigmas(spacing, steps, drop_lowest)
    assert len(sigmas) == steps + 1 and all(a > b for a, b in zip(sigmas, sigmas[1:-1]))


def test_timesteps():
    def times(*args):
        return [round(time_of(sigma)) for sigma in spaced_sigmas(*args)[:-1]]
    assert times("leading", 4) == [751, 501, 251, 1] and spaced_sigmas("leading", 4)[-1] == SIGMAS[0]
    assert times("linspace", 4, True) == [999, 749, 500, 250] and spaced_sigmas("linspace", 4, True)[-1] == 0
    assert times("linspace", 4) == [999, 666, 333, 0]
    assert times("trailing", 4) == [999, 749, 499, 249]
    assert np.allclose(spaced_sigmas("karras", 5)[:-1:4], [SIGMAS[-1], SIGMAS[0]])


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_both_predictions_find_the_clean_latent(sigma):
    x0, noise = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    x, a = x0 + sigma * noise, 1 / (sigma ** 2 + 1)
    assert torch.allclose(to_x0(x, sigma, noise, "eps"), x0)
    with pytest.raises(ValueError, match="eps or v"):
        to_x0(x, sigma, noise, "epsilon")
    assert torch.allclose(to_x0(x, sigma, a ** 0.5 * noise - (1 - a) ** 0.5 * x0, "v"), x0)            # Salimans & Ho, 2202.00512
