"""A run that a second model takes over."""

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
from scfg import CFG, SCFG, Guidance, Schedule
from scfg.config import SD1, SD2_V, SDXL, SDXL_REFINER, VAEConfig
from scfg.edit import check_refiner, hand_over, handover_time

MERGES = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
ZEROS = "the unconditional context is all zeros: the foreground is the conditional row's"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Small models of random weights, base and refiner."""
    folder, metadata = tmp_path_factory.mktemp("refiner"), families.tokenizer_metadata(MERGES)
    for name in ("sdxl", "sdxl_refiner"):
        config = families.small(FAMILIES[name], len(families.vocabulary(MERGES)))
        save_file(families.original(config), folder / f"{name}.safetensors", metadata)
    return lambda name: scfg.load(folder / f"{name}.safetensors")


def run(model, denoise, steps: int = 5, seed: int = 3) -> list[scfg.Step]:
    sigmas, noise = model.sigmas(steps, "euler"), model.noise([seed], (64, 64))
    return list(scfg.run(denoise, "euler", noise() * math.sqrt(sigmas[0] ** 2 + 1), sigmas, noise))


@pytest.mark.slow
def test_the_refiner_takes_over_at_its_share_of_the_timesteps(load):
    base, refiner = load("sdxl"), load("sdxl_refiner")
    early, late = (model.denoiser(model.prompt("cat"), CFG(5.0)) for model in (base, refiner))
    steps = run(base, hand_over(late, base.config.schedule, 0.6)(early))
    alone = list(base.sample(base.prompt("cat"), CFG(5.0), sampler="euler", steps=5, size=(64, 64), seeds=3))
    same = [torch.equal(a.latent, b.latent) for a, b in zip(steps, alone, strict=True)]
    assert same == [True, True, True, False, False]  # timesteps 999, 799, 599 | 399, 199
    expected = late(alone[2].x, alone[3].sigma)
    assert error(steps[3].denoised.x0, expected.x0) < 1e-5
    assert error(steps[3].denoised.x0, alone[3].denoised.x0) > 1e-3


def test_a_refiners_share_ends_where_diffusers_ends_it():
    schedule = Schedule()
    taken = hand_over(lambda *_: "refiner", schedule, 0.8)(lambda *_: "base")
    found = [taken(None, schedule.sigmas[t], None) for t in (999, 200, 199, 0)]
    assert found == ["base", "base", "refiner", "refiner"]
    assert handover_time(schedule, 0.8) == 200 and handover_time(schedule, 0.0) == 1000
    for start, who in ((0.0, "refiner"), (1.0, "base")):
        only = hand_over(lambda *_: "refiner", schedule, start)(lambda *_: "base")
        assert {only(None, schedule.sigmas[t], None) for t in (999, 500, 0)} == {who}


def test_what_was_computed_before_passes_over_to_the_other_model():
    """Whatever the sampler hands to one denoise step, result and noise level, it hands to the other."""
    calls, schedule = [], Schedule()

    def denoise(name):
        return lambda x, sigma, previous: calls.append((name, x, sigma, previous)) or f"{name} {sigma:.1f}"

    both = hand_over(denoise("late"), schedule, 0.5)(denoise("early"))
    high, low = float(schedule.sigmas[900]), float(schedule.sigmas[100])
    result = both("x", high, None)
    both("y", low, result)
    assert calls == [("early", "x", high, None), ("late", "y", low, f"early {high:.1f}")]


class Sum:
    """A direction whose state is how many steps it has seen, beside their sum."""

    def __call__(self, outputs, moment, state):
        count, total = state or (0, 0)
        return outputs.difference, (count + 1, total + outputs.difference)


@pytest.mark.slow
def test_flags_and_state_pass_over(load):
    """Of the direction's state, what the base left is what the refiner goes on with; flags are counted on."""
    base, refiner = load("sdxl"), load("sdxl_refiner")
    guidance = Guidance(direction=Sum(), scale=SCFG(5.0))
    early, late = (model.denoiser(model.prompt("cat"), guidance) for model in (base, refiner))
    steps = run(base, hand_over(late, base.config.schedule, 0.6)(early))
    assert [step.denoised.state[0] for step in steps] == [1, 2, 3, 4, 5]
    counts = [step.denoised.flags[ZEROS].tolist() for step in steps]
    assert counts == [[1], [2], [3], [3], [3]]  # the refiner's negative is the empty text: it is no zeros
    expected = late(steps[2].x, steps[3].sigma, steps[2].denoised)
    assert torch.equal(steps[3].denoised.x0, expected.x0)
    assert torch.equal(steps[3].denoised.state[1], expected.state[1])
    assert error(steps[3].denoised.state[1], late(steps[2].x, steps[3].sigma).state[1]) > 1e-3


def test_a_multistep_sampler_goes_on_with_what_it_remembers(load):
    """dpmpp_2m's first step of the refiner is of second order: it uses the base's last x0."""
    base, refiner = load("sdxl"), load("sdxl_refiner")
    early, late = (model.denoiser(model.prompt("cat"), CFG(5.0)) for model in (base, refiner))
    sigmas, noise = base.sigmas(6), base.noise([3], (64, 64))
    x = noise() * math.sqrt(sigmas[0] ** 2 + 1)
    steps = list(scfg.run(hand_over(late, base.config.schedule, 0.5)(early), "dpmpp_2m", x, sigmas, noise))
    first = next(i for i, sigma in enumerate(sigmas) if base.config.schedule.time(sigma) < 500)
    fresh = next(scfg.run(late, "dpmpp_2m", steps[first - 1].x, sigmas[first:], noise))
    assert 1 < first < 5 and torch.equal(fresh.denoised.x0, steps[first].denoised.x0)
    assert error(steps[first].x, fresh.x) > 1e-3


@pytest.mark.slow
def test_prompts_for_other_numbers_of_pictures_are_refused(load):
    base, refiner = load("sdxl"), load("sdxl_refiner")
    early, late = base.denoiser("cat", CFG(5.0)), refiner.denoiser(["cat"] * 3, CFG(5.0))
    with pytest.raises(scfg.BadInput, match="3 prompts for 1 pictures"):
        run(base, hand_over(late, base.config.schedule)(early), steps=9)


def test_a_share_of_a_sampler_that_evaluates_twice_a_step_is_counted_by_its_noise_levels(load):
    """Heun's second evaluation of a step lies at the step's end, where the refiner may already act."""
    schedule, seen = SDXL.schedule, []

    def denoise(name):
        def step(x, sigma, previous):
            seen.append((name, round(schedule.time(sigma))))
            return scfg.Denoised(0.5 * x, None, None, None, {}, None, {})

        return step

    sigmas = [float(schedule.sigmas[t]) for t in (999, 600, 300)]
    x = sigmas[0] * seeded(1, 4, 8, 8)
    list(scfg.run(hand_over(denoise("late"), schedule, 0.5)(denoise("early")), "heun", x, sigmas, lambda: x))
    assert seen == [("early", 999), ("early", 600), ("early", 600), ("late", 300)]


@pytest.mark.parametrize(
    "base, refiner",
    [
        (SDXL, SD1),
        (SD1, SDXL_REFINER),
        (SDXL, replace(SDXL_REFINER, vae=VAEConfig(latent_channels=16))),
        (replace(SDXL, vae=VAEConfig(latent_channels=16)), SDXL_REFINER),
    ],
)
def test_models_whose_latents_differ_are_refused(base, refiner):
    match = f"^{refiner.name} cannot refine what {base.name} began: their latents are not the same$"
    with pytest.raises(scfg.BadInput, match=match):
        check_refiner(base, refiner)


def test_a_model_that_is_no_refiner_is_used_as_one_with_a_warning():
    for base, refiner in ((SDXL, SDXL), (SD1, SD2_V)):
        with pytest.warns(UserWarning, match=f"{refiner.name} is no refiner: it is used as one all the same"):
            check_refiner(base, refiner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_refiner(SDXL, SDXL_REFINER)
