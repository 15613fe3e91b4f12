import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import error, seeded
from torch import Tensor

import scfg
from scfg import CFG, OFFICIAL, SAMPLERS, SCFG, BadInput, Guidance, Prompt, run

GUIDANCE = {"cfg": CFG(7.5), "scfg": SCFG(7.5)}
TEXT = "a red car on grass"


def last(steps):
    *_, step = steps
    return step


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_eight_steps_equal_the_original(tiny, prompt, oracle, sampler, guidance):
    name = sampler.replace("_", "")
    steps = list(tiny.sample(prompt, GUIDANCE[guidance], sampler=sampler, steps=8, latent=oracle["init"], seeds=[0, 1]))
    assert error(steps[-1].latent, oracle[f"{name}_{guidance}"]) < 1e-4
    if guidance == "scfg":
        for i in (0, 4):
            scale, regions = steps[i].denoised.scale, steps[i].denoised.regions
            assert error(scale / 7.5, oracle[f"{name}_rate_{i}"]) < 1e-5 and scale.max() > 1.1 * scale.min()
            assert torch.equal(regions.tokens.argmax(1).float(), oracle[f"{name}_regions_{i}"])
            assert torch.equal(regions.foreground, oracle[f"{name}_fg_{i}"])


@pytest.mark.filterwarnings("ignore:.*far from pure noise")
@pytest.mark.slow
def test_noise_of_a_picture_is_its_seeds_alone(flat):
    words = [TEXT, "a blue star at sea", "a white key in snow", "a pink fish on sand"]
    stochastic = functools.partial(SAMPLERS["ddim"], eta=1.0)
    for rule, steps in ((CFG(4.0), 3), (SCFG(4.0), 1)):  # in one step no near tie of two tokens can grow
        for sampler in ("dpmpp_2m", stochastic, "dpmpp_2m_sde"):
            options = {"sampler": sampler, "sigmas": flat.sigmas(steps, "ddim" if sampler is stochastic else sampler)}
            together = last(flat.sample(words, rule, seeds=5, **options)).latent
            for i, text in enumerate(words):
                alone = last(flat.sample(text, rule, seeds=5 + i, **options)).latent
                assert error(alone[0], together[i]) < 1e-4
    shuffled = last(flat.sample(TEXT, CFG(4.0), steps=2, seeds=[9, 4])).latent
    straight = last(flat.sample(TEXT, CFG(4.0), steps=2, seeds=[4, 9])).latent
    assert error(shuffled, straight.flip(0)) < 1e-4 and error(shuffled, straight) > 1e-2


@pytest.mark.slow
def test_with_all_rates_one_the_picture_is_cfgs_bit_for_bit(tiny, prompt):
    rules = SCFG(7.5, rate_range=(1.0, 1.0)), CFG(7.5), SCFG(7.5)
    one, plain, free = (last(tiny.sample(prompt, rule, steps=4, size=(256, 256), seeds=1)).latent for rule in rules)
    assert torch.equal(one, plain) and not torch.equal(free, plain)


@pytest.mark.filterwarnings("ignore:.*far from pure noise")
@pytest.mark.parametrize("width, height", [(1216, 832), (136, 72)])
@pytest.mark.slow
def test_any_size(tiny, prompt, width, height):
    single = Prompt(context={row: context[:1] for row, context in prompt.context.items()})
    step = last(tiny.sample(single, SCFG(7.5), sampler="ddim", steps=1, size=(width, height)))
    assert step.latent.shape == (1, 4, height // 8, width // 8)
    grid = step.denoised.regions.tokens.shape[-2:]
    assert grid == (math.ceil(height / 32), math.ceil(width / 32))
    if width < 200:
        assert tiny.decode(step.latent).shape == (1, 3, height, width)


def test_steps_say_where_a_run_is(flat):
    sigmas, steps = flat.sigmas(4), list(flat.sample(TEXT, SCFG(4.0), steps=4))
    assert [(step.index, step.count) for step in steps] == [(i, 4) for i in range(4)]
    assert [(step.sigma, step.next_sigma) for step in steps] == list(itertools.pairwise(sigmas))
    for step in steps:
        assert torch.equal(step.latent, step.x / math.sqrt(step.next_sigma**2 + 1))
        assert step.denoised.x0.shape == step.x.shape == (1, 4, 16, 16)
    assert torch.allclose(steps[-1].x, steps[-1].denoised.x0, atol=1e-6) and sigmas[-1] == 0


def test_a_run_without_guidance_is_the_config_s_own(flat):
    own = SCFG(flat.config.scale, min_contrast=flat.config.min_contrast[0])
    assert own.min_contrast > 1
    a, b = (last(flat.sample(TEXT, rule, steps=2)).latent for rule in (None, own))
    assert torch.equal(a, b)


def test_two_denoisers_take_turns(flat):
    """CFG whose regions are read in the middle of a run alone; reading them changes no bit."""
    sigmas, noise = flat.sigmas(4), flat.noise([0], (64, 64))
    plain, reading = (flat.denoiser(TEXT, CFG(4.0), segment=segment) for segment in (None, OFFICIAL))

    def denoise(x, sigma, previous):
        return (reading if sigma in sigmas[1:3] else plain)(x, sigma, previous)

    steps = list(run(denoise, "dpmpp_2m", noise() * math.sqrt(sigmas[0] ** 2 + 1), sigmas, noise))
    assert [step.denoised.regions is not None for step in steps] == [False, True, True, False]
    assert torch.equal(steps[-1].latent, last(flat.sample(TEXT, CFG(4.0), steps=4)).latent)


def test_outside_its_interval_guidance_costs_one_row(flat):
    guidance = Guidance(scale=SCFG(4.0), when=lambda moment: moment.sigma > 1)
    denoise, sigmas, noise = flat.denoiser(TEXT, guidance, segment=OFFICIAL), flat.sigmas(4), flat.noise([0], (64, 64))
    steps = list(run(denoise, "dpmpp_2m", noise() * math.sqrt(sigmas[0] ** 2 + 1), sigmas, noise))
    guided = [step.denoised.outputs.uncond is not None for step in steps]
    assert guided == [sigma > 1 for sigma in sigmas[:-1]] and guided[0] and not guided[-1]
    assert all(step.denoised.regions is not None for step in steps)


def test_the_callers_gradient_mode_is_left_alone(flat):
    for step in itertools.islice(flat.sample(TEXT, steps=2), 1):
        assert torch.is_grad_enabled() and not step.x.requires_grad
    with torch.no_grad():
        for _ in itertools.islice(flat.sample(TEXT, steps=2), 1):
            assert not torch.is_grad_enabled()


class Result(NamedTuple):
    """The least that a sampler takes."""

    x0: Tensor


def half(x, sigma, previous):
    return Result(x / 2)


def quiet() -> Tensor:
    return torch.zeros(1, 1, 2, 2)


START = 8 * torch.ones(1, 1, 2, 2)


def test_any_callable_is_a_sampler():
    def jump(denoise, x, sigmas, noise):
        for sigma in sigmas[:-1]:
            result = denoise(x, sigma, None)
            x = yield result.x0 + 1, result
            x = result.x0 + 1 if x is None else x

    class Jump:
        __call__ = staticmethod(jump)

    for sampler in (jump, functools.partial(jump), Jump()):
        steps = list(run(half, sampler, START, [4.0, 2.0, 1.0], quiet))
        assert [step.x.mean().item() for step in steps] == [5, 3.5]
    by_name = [step.x for step in run(half, "euler", START, [4.0, 2.0, 0.0], quiet)]
    assert all(map(torch.equal, by_name, [x for x, _ in SAMPLERS["euler"](half, START, [4.0, 2.0, 0.0], quiet)]))


def test_a_model_samples_with_any_callable(flat):
    by_name = last(flat.sample(TEXT, CFG(4.0), sampler="euler", steps=2)).latent
    for sampler in (SAMPLERS["euler"], functools.partial(SAMPLERS["euler"]), lambda *given: SAMPLERS["euler"](*given)):
        assert torch.equal(last(flat.sample(TEXT, CFG(4.0), sampler=sampler, steps=2)).latent, by_name)


@dataclass
class Unhashable:
    """As dataclasses are unless they are frozen."""

    def __call__(self, *given):
        return SAMPLERS["euler"](*given)


def test_a_sampler_need_not_be_hashable(flat):
    by_name = [step.x for step in run(half, "euler", START, [4.0, 2.0, 0.0], quiet)]
    assert all(map(torch.equal, by_name, [step.x for step in run(half, Unhashable(), START, [4.0, 2.0, 0.0], quiet)]))
    assert flat.sigmas(4, Unhashable()) == flat.sigmas(4, "euler")


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "euler"])
def test_a_sampler_with_options_has_the_noise_levels_of_its_name(tiny, name):
    assert tiny.sigmas(6, functools.partial(SAMPLERS[name])) == tiny.sigmas(6, name)


@pytest.mark.parametrize("sampler", [None, 3, "leapfrog"])
def test_what_is_no_sampler_is_refused(sampler):
    with pytest.raises(BadInput, match="no sampler .*euler_ancestral"):
        run(half, sampler, START, [4.0, 2.0], quiet)


def test_anyone_s_sigmas_are_taken_and_need_not_end_at_zero(flat):
    sigmas = [9.0, 3.3, 0.7, 0.2]
    expected = list(flat.sample(TEXT, CFG(4.0), sigmas=sigmas))
    assert [(step.sigma, step.next_sigma) for step in expected] == list(itertools.pairwise(sigmas))
    for kind in (tuple(sigmas), np.array(sigmas), torch.tensor(sigmas, dtype=torch.float64)):
        assert torch.equal(last(flat.sample(TEXT, CFG(4.0), sigmas=kind)).latent, expected[-1].latent)
    first = seeded(4, 16, 16)[None] * math.sqrt(9.0**2 + 1)
    assert torch.equal(expected[0].denoised.outputs.x, first)  # unit variance at the first sigma


BAD_SIGMAS = [[], [3.0], [1.0, 2.0], [3.0, 3.0, 1.0], [3.0, 1.0, 2.0, 0.0], [3.0, -1.0], [-1.0, -2.0], [-1.0]]
BAD_SIGMAS += [[math.inf, 1.0], [math.nan, 1.0], [3.0, math.nan]]


@pytest.mark.parametrize("sigmas", BAD_SIGMAS, ids=str)
def test_sigmas_that_do_not_fall_are_refused(tiny, prompt, sigmas):
    for start in (
        lambda: run(half, "euler", START, sigmas, quiet),
        lambda: tiny.sample(prompt, CFG(3.0), sigmas=sigmas, size=(64, 64)),
    ):
        with pytest.raises(BadInput, match="sigmas") as caught:
            start()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [1, 999, 1000])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_noise_levels_of_every_sampler_can_be_run(flat, sampler, steps):
    sigmas = flat.sigmas(steps, sampler, "trailing") if steps == 1 else flat.sigmas(steps, sampler)
    run(half, sampler, START, sigmas, quiet)
    assert len(sigmas) == steps + 1


def test_what_is_sent_takes_the_place_of_x():
    steps = run(half, "euler", START, [4.0, 2.0, 1.0, 0.0], quiet)
    untouched = [step.x for step in run(half, "euler", START, [4.0, 2.0, 1.0, 0.0], quiet)]
    first = next(steps)
    second = steps.send(2 * first.x)
    third = steps.send(None)
    assert torch.equal(first.x, untouched[0])
    assert torch.equal(second.denoised.x0, first.x) and torch.equal(second.x, 2 * untouched[1])
    assert torch.equal(third.x, 2 * untouched[2])


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 1, 2, 2), (1, 2, 2), ()])
def test_what_is_sent_has_the_shape_of_x(shape):
    steps = run(half, "euler", START, [4.0, 2.0, 0.0], quiet)
    next(steps)
    with pytest.raises(BadInput, match=r"takes the place of x, \(1, 1, 2, 2\)") as caught:
        steps.send(torch.zeros(shape))
    assert str(shape) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("broken", range(4))
def test_a_step_that_is_not_finite_is_named_one_step_later_at_the_latest(broken, number):
    sigmas, begun, yielded = [5.0, 4.0, 3.0, 2.0, 0.0], [], []

    def denoise(x, sigma, previous):
        begun.append(sigma)
        return Result(x / 2 if sigma != sigmas[broken] else x * number)

    with pytest.raises(FloatingPointError, match=rf"step {broken + 1} of 4\b") as caught:
        for step in run(denoise, "euler", START, sigmas, quiet):
            yielded.append(step.index)
    assert "\n" not in str(caught.value)
    assert len(begun) <= broken + 2 and yielded == list(range(min(broken + 1, 3)))  # the last is never handed out


@pytest.mark.filterwarnings("ignore:.*far from pure noise")
def test_numbers_that_are_not_finite_stop_a_model_s_run(tiny, prompt):
    broken = Prompt(context={row: context * float("nan") for row, context in prompt.context.items()})
    for steps in (3, 1):
        with pytest.raises(FloatingPointError, match=rf"step 1 of {steps}\b.* float32"):
            list(tiny.sample(broken, CFG(3.0), steps=steps, size=(64, 64), sampler="euler"))


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "euler_ancestral", "euler"])
def test_a_latent_that_is_a_seed_s_own_first_noise_gives_the_seed_s_picture(flat, sampler):
    latent, options = flat.noise([5], (64, 64))(), {"sampler": sampler, "steps": 3}
    own = last(flat.sample(TEXT, CFG(4.0), seeds=5, **options)).latent
    assert torch.equal(last(flat.sample(TEXT, CFG(4.0), seeds=5, latent=latent, **options)).latent, own)
    other = last(flat.sample(TEXT, CFG(4.0), seeds=6, latent=latent, **options)).latent
    assert torch.equal(other, own) == (sampler == "euler")  # later noise is the seed's


def test_wrong_calls_say_what_to_do(flat):
    prompt = flat.prompt([TEXT] * 2)
    cases = [
        ({"size": (66, 64)}, "66 pixels .*64 and 68"),
        ({"size": (64, 0)}, "from 1 to 65536, not 0"),
        ({"size": 64}, r"size \(width, height\): give several numbers, not 64"),
        ({"size": (64, 64, 3)}, r"size is \(width, height\)"),
        ({"sampler": "leapfrog"}, "no sampler 'leapfrog'"),
        ({"steps": 0}, "steps: give a whole number from 1 to 1000, not 0"),
        ({"seeds": [1, 2, 3]}, "2 prompts for 3 pictures"),
        ({"seeds": []}, "2 prompts for 0 pictures"),
        ({"latent": seeded(2, 4, 16, 16), "seeds": [1]}, "2 latents for 1 pictures"),
        ({"guidance": 5.0}, r"CFG\(.* not 5.0"),
    ]
    for options, message in cases:
        with pytest.raises(BadInput, match=message) as caught:
            next(flat.sample(prompt, **options))
        assert "\n" not in str(caught.value)


def test_an_unknown_spacing_is_refused(flat):
    with pytest.raises(BadInput, match="'cosine'"):
        flat.sigmas(4, spacing="cosine")


@pytest.mark.parametrize("shape", [(1, 3, 15, 17), (1, 3, 16, 15), (3, 16, 16), (1, 4, 16, 16), (1, 3, 0, 16)])
def test_pictures_that_cannot_be_encoded_are_refused(flat, shape):
    with pytest.raises(BadInput) as caught:
        flat.encode(torch.zeros(shape))
    assert "\n" not in str(caught.value)


def test_encode_and_decode_are_inverse_on_the_model_s_pictures(flat):
    """On pictures that were drawn: tests/wings/flatland."""
    images = flat.decode(last(flat.sample([TEXT, "a blue star at sea"], CFG(2.0), steps=10)).latent)
    assert images.shape == (2, 3, 64, 64) and images.min() >= 0 and images.max() <= 1 and images.std() > 0.1
    latent = flat.encode(images)
    assert latent.shape == (2, 4, 16, 16) and 0.8 < latent.std() < 1.25
    assert -10 * math.log10((flat.decode(latent) - images).square().mean()) > 20


def test_a_sampler_s_noise_levels_are_the_usual_ones(flat, tiny):
    spaced = scfg.Schedule().spaced
    assert tiny.config.spacing is flat.config.spacing is None
    assert tiny.sigmas(7, "ddim") == spaced("leading", 7, rounded=True, to_zero=False)
    assert tiny.sigmas(7, "dpmpp_2m") == tiny.sigmas(7) == spaced("linspace", 7, rounded=True, drop=True)
    for sampler in ("dpmpp_2m_sde", "unipc"):
        assert tiny.sigmas(7, sampler) == tiny.sigmas(7)
    for sampler in ("euler", "heun", "euler_ancestral"):
        assert tiny.sigmas(7, sampler) == spaced("linspace", 7)
    assert tiny.sigmas(7, "euler", "leading")[-1] == 0 and tiny.sigmas(7, "ddim", "leading")[-1] > 0
