import itertools
import math

import numpy as np
import pytest
import torch
from conftest import error, seeded

import scfg
from scfg import CFG, SCFG, Guidance, flatland

GUIDANCE = {"cfg": CFG(7.5), "scfg": SCFG(7.5, contrast=0)}           # maps of random weights are nearly flat


def last(steps):
    *_, step = steps
    return step


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("guidance", GUIDANCE)
def test_eight_steps_equal_the_original(tiny, prompt, oracle, sampler, guidance):
    name = sampler.replace("_", "")
    steps = list(tiny.sample(prompt, GUIDANCE[guidance], sampler, steps=8, latent=oracle["init"]))
    assert error(steps[-1].latent, oracle[f"{name}_{guidance}"]) < 1e-4
    if guidance == "scfg":
        for i in (0, 4):
            assert error(steps[i].denoised.scale / 7.5, oracle[f"{name}_rate_{i}"]) < 1e-5
            assert torch.equal(steps[i].denoised.regions.tokens.argmax(1).float(), oracle[f"{name}_regions_{i}"])
            assert torch.equal(steps[i].denoised.regions.foreground, oracle[f"{name}_fg_{i}"])


def test_noise_of_a_picture_is_its_seeds_alone(flat):
    words = ["a red car on grass", "a blue star at sea", "a white key in snow", "a pink fish on sand"]
    for rule, steps in ((CFG(4.0), 3), (SCFG(4.0), 1)):                       # in one step no near tie of two tokens can grow
        for sampler, eta in (("dpmpp_2m", None), ("ddim", 1), ("dpmpp_2m_sde", None)):
            together = last(flat.sample(flat.prompt(words), rule, sampler, steps=steps, seeds=5, eta=eta)).latent
            for i, text in enumerate(words):
                alone = last(flat.sample(flat.prompt(text), rule, sampler, steps=steps, seeds=5 + i, eta=eta)).latent
                assert error(alone[0], together[i]) < 1e-4
    shuffled = last(flat.sample(words[0], CFG(4.0), steps=2, seeds=[9, 4])).latent
    straight = last(flat.sample(flat.prompt(words[0]), CFG(4.0), steps=2, seeds=[4, 9])).latent
    assert error(shuffled, straight.flip(0)) < 1e-4


@pytest.mark.parametrize("rule", [SCFG(7.5), SCFG.paper(7.5), SCFG.mean(7.5)])
def test_four_pictures_at_once_equal_four_alone_over_many_steps(tiny, oracle, rule):
    context = {"uncond": oracle["context_uncond"].expand(4, -1, -1), "cond": oracle["unet_context"]}
    together = last(tiny.sample(scfg.Prompt(context=context), rule, steps=6, size=(256, 256), seeds=3)).latent
    for i in range(4):
        alone = scfg.Prompt(context={row: rows[i:i + 1] for row, rows in context.items()})
        assert error(last(tiny.sample(alone, rule, steps=6, size=(256, 256), seeds=3 + i)).latent[0], together[i]) < 1e-4


def test_with_all_rates_one_the_picture_is_cfgs_bit_for_bit(tiny, prompt):
    one = SCFG(7.5, limits=(1.0, 1.0))
    a, b = (last(tiny.sample(prompt, rule, steps=4, size=(256, 256), seeds=1)) for rule in (one, CFG(7.5)))
    assert torch.equal(a.latent, b.latent)


@pytest.mark.parametrize("width, height", [(1216, 832), (136, 72)])
def test_any_size(tiny, prompt, width, height):
    single = scfg.Prompt(context={row: context[:1] for row, context in prompt.context.items()})
    step = last(tiny.sample(single, SCFG(7.5), "ddim", steps=1, size=(width, height)))
    assert step.latent.shape == (1, 4, height // 8, width // 8)
    grid = step.denoised.regions.tokens.shape[-2:]
    assert grid == (math.ceil(height / 32), math.ceil(width / 32))
    if width < 200:
        assert tiny.decode(step.latent).shape == (1, 3, height, width)


def test_everything_computed_comes_back(flat):
    prompt = flat.prompt("a red car on grass")
    for step in flat.sample(prompt, SCFG(4.0), steps=2, maps=True):
        denoised = step.denoised
        assert set(denoised.out) == {"uncond", "cond"} and denoised.x0.shape == step.latent.shape
        assert denoised.scale.shape == (1, 1, 16, 16) and denoised.regions.tokens.shape == (1, 16, 16, 16)
        assert torch.equal(scfg.segment(denoised.maps).tokens, denoised.regions.tokens)
    watched = [step.denoised.regions is not None for step in flat.sample(prompt, CFG(4.0), steps=4, watch=range(1, 3))]
    assert watched == [False, True, True, False]


def test_watching_changes_nothing(flat):
    prompt = flat.prompt("a red car on grass")
    a, b = (last(flat.sample(prompt, CFG(4.0), steps=3, watch=range(n))).latent for n in (0, 3))
    assert torch.equal(a, b)


def test_outside_its_interval_guidance_costs_one_row(flat):
    rows = [tuple(step.denoised.out) for step in flat.sample(
        flat.prompt("a red car on grass"), Guidance(scale=SCFG(4.0), when=lambda sigma: sigma > 1), steps=4, watch=range(4))]
    assert rows[0] == ("uncond", "cond") and rows[-1] == ("cond",)


def test_the_callers_gradient_mode_is_left_alone(flat):
    for _ in itertools.islice(flat.sample(flat.prompt("a red car on grass"), steps=2), 1):
        assert torch.is_grad_enabled()


def test_gradients_flow_through_maps_scores_and_guidance(flat):
    denoise = flat.denoiser(flat.prompt("a red car on grass"), SCFG(4.0))
    x = seeded(1, 4, 16, 16).requires_grad_()
    denoised = denoise(x, 2.0, None)
    for value in (denoised.x0, denoised.regions.scores[:, 2], denoised.scale):
        gradient, = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_numbers_that_are_not_finite_stop_the_run(tiny, prompt):
    broken = scfg.Prompt(context={row: context * float("nan") for row, context in prompt.context.items()})
    with pytest.raises(FloatingPointError, match=r"step 1 of 3 .* torch.float32: try --dtype float32"):
        list(tiny.sample(broken, steps=3, size=(64, 64)))


def test_wrong_calls_say_what_to_do(flat):
    prompt = flat.prompt(["a red car on grass"] * 2)
    for options, message in [({"size": (66, 64)}, "nearest sizes are 64 and 68"), ({"size": (64, 0)}, "nearest sizes"),
                             ({"sampler": "leapfrog"}, "no sampler 'leapfrog'"), ({"eta": 0.5}, "dpmpp_2m adds none"),
                             ({"seeds": [1, 2, 3]}, "2 prompts for 3 pictures")]:
        with pytest.raises(scfg.BadInput, match=message):
            next(flat.sample(prompt, **options))


def test_encode_and_decode_are_inverse_on_the_world(flat):
    pictures = [flatland.render(flatland.compose(seed))[0] for seed in range(10 ** 6, 10 ** 6 + 8)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    latent = flat.encode(images)
    assert latent.shape == (8, 4, 16, 16) and 0.8 < latent.std() < 1.25
    assert -10 * math.log10((flat.decode(latent) - images).square().mean()) > 20
