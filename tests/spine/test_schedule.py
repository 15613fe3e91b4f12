import math
from dataclasses import FrozenInstanceError
from typing import get_args

import numpy as np
import pytest
import torch

from scfg import BadInput, Schedule
from scfg.config import SD1, SD2_V
from scfg.schedule import Spacing

SCHEDULE = Schedule()
SPACINGS = ["leading", "linspace", "trailing", "karras", "lcm"]


def test_the_table_is_stable_diffusions():
    sigmas = SCHEDULE.sigmas
    assert sigmas.shape == (1000,) and sigmas.dtype == np.float64 and (np.diff(sigmas) > 0).all()
    assert math.isclose(sigmas[0], 0.02916, rel_tol=1e-3) and math.isclose(sigmas[-1], 14.6146, rel_tol=1e-4)


def test_a_schedule_is_a_value_of_its_config():
    assert SD1.schedule == Schedule("eps") and SD2_V.schedule == Schedule("v") and hash(SCHEDULE) == hash(Schedule())
    with pytest.raises(FrozenInstanceError):
        SCHEDULE.prediction = "v"
    other = Schedule(beta_end=0.02, timesteps=500)
    assert other.sigmas.shape == (500,) and other.sigmas[0] == pytest.approx(SCHEDULE.sigmas[0])
    assert other.time(other.sigmas[499]) == 499 and other.moment(other.sigmas[499]).progress == 0
    assert len(SCHEDULE.sigmas) == 1000  # the other's table is its own


def test_time_inverts_the_table_and_is_linear_in_log_sigma():
    sigmas = SCHEDULE.sigmas
    assert [SCHEDULE.time(sigmas[t]) for t in (0, 1, 500, 999)] == [0, 1, 500, 999]
    assert math.isclose(SCHEDULE.time(math.sqrt(sigmas[10] * sigmas[11])), 10.5, rel_tol=1e-9)
    assert [SCHEDULE.time(sigma) for sigma in (0.0, 0.001, 100.0)] == [0, 0, 999]  # beyond the table its ends


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 999, 1000])
@pytest.mark.parametrize("drop_lowest", [True, False])
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("to_zero", [True, False, None])
def test_every_spacing_falls(spacing, steps, drop_lowest, rounded, to_zero):
    if spacing == "lcm" and steps > 50:
        with pytest.raises(BadInput, match="a whole number from 1 to 50"):
            SCHEDULE.spaced(spacing, steps, rounded, drop_lowest, to_zero)
        return
    sigmas = SCHEDULE.spaced(spacing, steps, rounded, drop_lowest, to_zero)
    assert len(sigmas) == steps + 1 and all(a > b for a, b in zip(sigmas, sigmas[1:-1]))
    lowest = SCHEDULE.sigmas[0] * (1 + 1e-9)  # a run whose last step starts there can end at 0 alone
    may = sigmas[-2] > lowest and spacing != "karras" and (spacing == "leading" or to_zero is not None)
    assert sigmas[-1] == (SCHEDULE.sigmas[0] if may and not to_zero else 0) and sigmas[-2] > sigmas[-1]


def times(*args, **options) -> list[float]:
    return [SCHEDULE.time(sigma) for sigma in SCHEDULE.spaced(*args, **options)[:-1]]


def test_timesteps():
    assert times("leading", 4) == [751, 501, 251, 1]
    assert times("leading", 4, to_zero=False) == [751, 501, 251, 1]
    assert times("linspace", 4, rounded=True, drop=True) == pytest.approx([999, 749, 500, 250])
    assert times("linspace", 4) == pytest.approx([999, 666, 333, 0])
    assert times("lcm", 4) == pytest.approx([999, 759, 499, 259])  # 2310.04378: of 999, 979, ... 19
    assert times("trailing", 4) == pytest.approx([999, 749, 499, 249])
    assert np.allclose(SCHEDULE.spaced("karras", 5)[:-1:4], [SCHEDULE.sigmas[-1], SCHEDULE.sigmas[0]])


def test_linspace_timesteps_are_rounded_only_where_asked():
    assert times("linspace", 5) == pytest.approx([999, 749.25, 499.5, 249.75, 0])
    assert times("linspace", 5, rounded=True) == pytest.approx([999, 749, 500, 250, 0])
    assert times("linspace", 4, drop=True) == pytest.approx([999, 749.25, 499.5, 249.75])


def test_leading_ends_at_zero_or_at_the_lowest_noise_level():
    assert SCHEDULE.spaced("leading", 4)[-1] == 0
    assert SCHEDULE.spaced("leading", 4, to_zero=False)[-1] == SCHEDULE.sigmas[0]


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_step_count_beyond_the_training_s_is_refused(spacing, steps):
    most = 50 if spacing == "lcm" else 1000
    with pytest.raises(BadInput, match=rf"steps: give a whole number from 1 to {most}, not {steps}"):
        SCHEDULE.spaced(spacing, steps)


def test_an_unknown_spacing_is_refused_and_the_known_are_named():
    assert list(get_args(Spacing)) == SPACINGS
    with pytest.raises(BadInput, match="spacing is one of leading, linspace, trailing, karras, lcm, not 'cosine'"):
        SCHEDULE.spaced("cosine", 4)


@pytest.mark.parametrize("sigma", [0.03, 1.0, 14.6])
def test_both_predictions_find_the_clean_latent(sigma):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 4, 3, 3, dtype=torch.float64, generator=generator)
    x, a = x0 + sigma * noise, 1 / (sigma**2 + 1)
    assert torch.allclose(Schedule("eps").moment(sigma).to_x0(x, noise), x0)
    v = a**0.5 * noise - (1 - a) ** 0.5 * x0  # Salimans & Ho, 2202.00512
    assert torch.allclose(Schedule("v").moment(sigma).to_x0(x, v), x0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sigma", [0.0, 0.03, 1.0, 14.6])
def test_dx0_dx_and_dx0_dout_are_the_derivatives_of_the_clean_latent(prediction, sigma):
    moment = Schedule(prediction).moment(sigma)
    x, out = (torch.tensor([[[[1.3]]]], dtype=torch.float64, requires_grad=True) for _ in "xo")
    by_x, by_out = torch.autograd.grad(moment.to_x0(x, out), (x, out))
    assert by_x.item() == moment.dx0_dx and by_out.item() == moment.dx0_dout


def test_a_moment_says_how_far_a_run_is():
    first, last = (SCHEDULE.moment(SCHEDULE.sigmas[t]) for t in (999, 0))
    assert (first.t, first.progress, last.t, last.progress) == (999, 0, 0, 1)
    assert SCHEDULE.moment(SCHEDULE.sigmas[333]).progress == pytest.approx(1 - 333 / 999)  # linear in timesteps
    assert SCHEDULE.moment(0.0).progress == 1 and SCHEDULE.moment(50.0).progress == 0
    assert all(isinstance(number, float) for number in SCHEDULE.moment(SCHEDULE.sigmas[500]))


def test_a_moment_is_that_of_one_number():
    expected = SCHEDULE.moment(2.0)
    assert expected.sigma == 2 and SCHEDULE.moment(torch.tensor(2.0)) == SCHEDULE.moment(np.float64(2)) == expected
    for sigma in (-1, -1e-9, math.inf, math.nan, torch.tensor([2.0, 2.0]), torch.tensor([2.0]), np.ones(3)):
        with pytest.raises(BadInput, match="sigma is one number from 0 to 1e38 for the whole batch") as caught:
            SCHEDULE.moment(sigma)
        assert "\n" not in str(caught.value)
