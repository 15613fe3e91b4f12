"""On normal data of standard deviation s the ideal denoiser is x s^2 / (s^2 + sigma^2): the exact flow is known.

All is linear there, so x is kept as its coefficients of the independent noises drawn: standard deviations come out
exactly.
"""

import inspect
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import seeded
from torch import Tensor

from scfg import SAMPLERS
from scfg.samplers import MULTISTEP, ddim, dpmpp_2m, dpmpp_2m_sde, euler, euler_ancestral, heun, unipc

DEVIATION = 0.7
STOCHASTIC = (euler_ancestral, dpmpp_2m_sde)  # unless eta is 0
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)


class Ideal(NamedTuple):
    x0: Tensor


def denoise(x, sigma, previous):
    return Ideal(x * DEVIATION**2 / (DEVIATION**2 + sigma**2))


def final(sampler, steps: int, **options) -> tuple[Tensor, float]:
    """Coefficients of the first noise and of those drawn later, from 10 to 0.1; and the exact deviation there."""
    x, drawn = torch.zeros(steps + 1, dtype=torch.float64), iter(torch.eye(steps + 1, dtype=torch.float64)[1:])
    x[0] = np.sqrt(DEVIATION**2 + 100)
    *_, (found, _) = sampler(denoise, x, np.geomspace(10, 0.1, steps + 1).tolist(), lambda: next(drawn), **options)
    return found, np.sqrt(DEVIATION**2 + 0.01)


def test_samplers_are_known_by_the_names_of_their_functions():
    assert list(SAMPLERS.values()) == [ddim, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_sde, unipc]
    assert all(SAMPLERS[sampler.__name__] is sampler for sampler in SAMPLERS.values()) and MULTISTEP < set(SAMPLERS)


@pytest.mark.parametrize(
    "sampler, order",
    [(ddim, 1), (euler, 1), (heun, 2), (dpmpp_2m, 2), (unipc, 2), (euler_ancestral, 1), (dpmpp_2m_sde, 2)],
)
def test_order_of_convergence(sampler, order):
    errors = []
    for steps in (256, 512):
        found, exact = final(sampler, steps)
        errors.append(abs(found.norm().item() - exact))
        assert (sampler in STOCHASTIC) == (found[1:].count_nonzero() > 0)
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_unipc_s_correction_is_worth_its_lines():
    """Its last step is of first order, which hides its order; its error is another matter."""
    of_both = (final(sampler, 64) for sampler in (unipc, dpmpp_2m))
    errors = [abs(found.norm().item() - exact) for found, exact in of_both]
    assert errors[0] < errors[1] / 5


@pytest.mark.parametrize("sampler", [ddim, euler_ancestral, dpmpp_2m_sde])
def test_eta_forgets_the_first_noise_and_keeps_the_distribution(sampler):
    for eta, forgotten in ((1.0, True), (0.5, None), (0.0, False)):
        found, exact = final(sampler, 400, eta=eta)
        assert found.norm().item() == pytest.approx(exact, rel=0.01)
        share = (found[0] / found.norm()).item()
        assert share < 0.1 if forgotten else share < 0.9 if forgotten is None else share == 1


def test_only_samplers_that_draw_noise_take_an_eta():
    taking = {name for name, sampler in SAMPLERS.items() if "eta" in inspect.signature(sampler).parameters}
    assert taking == {"ddim", "euler_ancestral", "dpmpp_2m_sde"}


@every_sampler
@pytest.mark.parametrize("sigmas", [[3.0, 0.0], [3.0, 1.0, 0.0], [9.0, 3.0, 1.0, 0.2, 0.0]])
def test_the_end_is_the_last_clean_expectation(sampler, sigmas):
    *_, (x, result) = sampler(denoise, torch.ones(3), sigmas, lambda: torch.ones(3))
    assert torch.allclose(x, result.x0, atol=1e-6)


class Recorder:
    """A Denoise that keeps what it was given and what it gave."""

    def __init__(self, denoise=denoise):
        self.denoise, self.seen, self.previous, self.made = denoise, [], [], []

    def __call__(self, x, sigma, previous):
        self.seen.append(x)
        self.previous.append(previous)
        self.made.append(self.denoise(x, sigma, previous))
        return self.made[-1]


@every_sampler
def test_a_sampler_is_a_generator_that_hands_over_the_previous_result(sampler):
    recorder = Recorder()
    steps = sampler(recorder, torch.ones(1), [3.0, 2.0, 1.0, 0.5], lambda: torch.zeros(1))
    _, first = next(steps)
    made = recorder.made
    assert first is made[0] and len(made) == (2 if sampler is heun else 1)  # nothing runs ahead of the caller
    results = [first, *(result for _, result in steps)]
    assert len(made) == (6 if sampler is heun else 3)
    assert recorder.previous[0] is None and all(a is b for a, b in zip(recorder.previous[1:], made[:-1]))
    # what is yielded is what was computed at a step's start
    assert all(a is b for a, b in zip(results, made[:: 2 if sampler is heun else 1], strict=True))


SIGMAS = [9.0, 4.0, 2.0, 1.0, 0.4, 0.0]


def repeatable():
    """The noises of a run, the same for every run."""
    drawn = iter(range(100, 200))
    return lambda: seeded(3, seed=next(drawn))


@every_sampler
def test_sending_nothing_changes_nothing(sampler):
    iterated = [x for x, _ in sampler(denoise, seeded(3), SIGMAS, repeatable())]
    steps = sampler(denoise, seeded(3), SIGMAS, repeatable())
    sent = [steps.send(None)[0] for _ in SIGMAS[1:]]
    assert len(iterated) == 5 and all(torch.equal(a, b) for a, b in zip(iterated, sent))
    with pytest.raises(StopIteration):
        steps.send(None)


@every_sampler
@pytest.mark.parametrize("at", range(4))
def test_what_is_sent_back_is_what_is_denoised_next(sampler, at):
    recorder, changed = Recorder(), 10 + seeded(3, seed=7)
    steps, expected = sampler(recorder, seeded(3), SIGMAS, repeatable()), None
    for i, _ in enumerate(SIGMAS[1:]):
        before = len(recorder.seen)
        x, _ = steps.send(changed if i == at + 1 else None)
        seen = recorder.seen[before]
        assert torch.equal(seen, changed) if i == at + 1 else i == 0 or torch.equal(seen, expected)
        expected = x
    untouched = [x for x, _ in sampler(denoise, seeded(3), SIGMAS, repeatable())]
    assert not torch.allclose(x, untouched[-1], atol=1e-3)


@every_sampler
@pytest.mark.parametrize("at", range(3))
def test_what_is_sent_back_is_not_undone(sampler, at):
    """Where the clean latent is one constant, a step is the way there from what was sent, however it came about."""
    constant, changed = seeded(3, seed=1), seeded(3, seed=7)
    options = {"eta": 0.0} if sampler in STOCHASTIC else {}
    steps = sampler(lambda x, sigma, previous: Ideal(constant), seeded(3), SIGMAS, repeatable(), **options)
    for i, (sigma, target) in enumerate(zip(SIGMAS, SIGMAS[1:])):
        x, _ = steps.send(changed if i == at + 1 else None)
        if i == at + 1:
            assert torch.allclose(x, constant + (target / sigma) * (changed - constant), atol=1e-5)


@pytest.mark.parametrize("at", range(3))
def test_unipc_goes_on_from_what_was_sent(at):
    """Its step is linear in what was sent: by q directly, by 1 - q through the clean latent, extrapolated."""
    before, sigma, target = SIGMAS[at : at + 3]
    ends = []
    for sent in (5.0, 6.0):
        steps = unipc(denoise, seeded(3), SIGMAS, repeatable())
        for _ in range(at + 1):
            next(steps)
        ends.append(steps.send(torch.full((3,), sent))[0])
    q, gain, r = (
        target / sigma,
        DEVIATION**2 / (DEVIATION**2 + sigma**2),
        np.log(before / sigma) / np.log(sigma / target),
    )
    slope = q + (1 - q) * gain * (1 + 1 / (2 * r))
    assert torch.allclose(ends[1] - ends[0], torch.full((3,), slope, dtype=torch.float32), atol=1e-5)


def test_unipc_corrects_a_step_unless_something_is_sent():
    """What it denoises is what it yielded; where it goes on from is not, but for what is sent, be it the same."""
    recorder = Recorder()
    found = [x for x, _ in unipc(recorder, seeded(3), SIGMAS, repeatable())]
    assert all(torch.equal(a, b) for a, b in zip(recorder.seen[1:], found))
    steps = unipc(denoise, seeded(3), SIGMAS, repeatable())
    first, _ = next(steps)
    second, _ = steps.send(first)
    plain = [x for x, _ in dpmpp_2m(denoise, seeded(3), SIGMAS, repeatable())]
    assert torch.equal(first, found[0]) and torch.allclose(first, plain[0])
    assert torch.allclose(second, plain[1], atol=1e-6)  # not corrected it is the latter
    assert not torch.allclose(found[1], plain[1], atol=1e-3)


@every_sampler
def test_a_sampler_stays_within_20_lines(sampler):
    assert len(inspect.getsource(sampler).splitlines()) <= 20
