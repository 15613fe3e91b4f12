"""One step, from the noisy latent to everything that is computed of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from conftest import error, seeded
from torch import Tensor

from scfg import (
    CFG,
    OFFICIAL,
    PAPER,
    SCFG,
    BadInput,
    Capture,
    Conditioning,
    Denoised,
    Guidance,
    Maps,
    Prompt,
    Regions,
    Tokens,
    attention,
    run,
    segment_maps,
)
from scfg.denoise import ZEROS
from scfg.segment import Recipe

SIGMA = 14.6
LARGE, MIDDLE = "input_blocks.1.1.transformer_blocks.0", "middle_block.1.transformer_blocks.0"


@pytest.fixture(scope="module")
def four() -> Prompt:
    """Random texts of four pictures, none of which is the unconditional one."""
    return Prompt({"uncond": seeded(1, 77, 48).expand(4, -1, -1), "cond": seeded(4, 77, 48, seed=1)})


def text_of(prompt: Prompt, i: int) -> Prompt:
    return Prompt({text: states[i : i + 1] for text, states in prompt.context.items()})


def noisy(*shape: int, sigma: float = SIGMA, seed: int = 0) -> Tensor:
    return math.sqrt(sigma**2 + 1) * seeded(*shape, seed=seed)


def margin(regions: Regions) -> float:
    """By how much the best token of a pixel is better than the next, at the pixel where that is least."""
    best, second = regions.scores.topk(2, dim=1).values.unbind(1)
    return (best - second).min().item()


def varies(scale: Tensor) -> bool:
    """Whether the scale of every picture is a map rather than a number."""
    return bool((scale.amax((1, 2, 3)) > 1.1 * scale.amin((1, 2, 3))).all())


def same_regions(a: Regions, b: Regions) -> bool:
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.foreground, b.foreground)


@torch.no_grad()
@pytest.mark.parametrize("rule", [SCFG(7.5), SCFG.mean(7.5), SCFG.conditional(7.5)], ids=["official", "mean", "cond"])
@pytest.mark.parametrize("seed", [48, 59])
def test_a_step_of_four_pictures_equals_the_four_alone(tiny, four, rule, seed):
    """Where no two tokens are so near to each other that rounding decides between them."""
    x = noisy(4, 4, 16, 16, seed=seed)
    together = tiny.denoiser(four, rule)(x, SIGMA)
    assert margin(together.regions) > 1e-4 and varies(together.scale)
    alone = [tiny.denoiser(text_of(four, i), rule)(x[i : i + 1], SIGMA) for i in range(4)]
    for name in ("tokens", "foreground"):
        assert torch.equal(torch.cat([getattr(one.regions, name) for one in alone]), getattr(together.regions, name))
    assert error(torch.cat([one.regions.scores for one in alone]), together.regions.scores) < 1e-5
    assert error(torch.cat([one.scale for one in alone]), together.scale) < 1e-5
    assert error(torch.cat([one.x0 for one in alone]), together.x0) < 1e-5
    for name in ("x", "cond", "uncond", "difference", "x0"):
        found = torch.cat([getattr(one.outputs, name) for one in alone])
        assert error(found, getattr(together.outputs, name)) < 1e-5


def test_a_step_with_gradients_equals_one_without(tiny, four):
    x, denoise = noisy(4, 4, 16, 16, seed=48), tiny.denoiser(four, SCFG(7.5))
    with torch.no_grad():
        without = denoise(x, SIGMA)
    given = denoise(x.clone().requires_grad_(), SIGMA)
    assert given.x0.requires_grad and not without.x0.requires_grad
    assert margin(without.regions) > 1e-4 and varies(without.scale) and same_regions(given.regions, without.regions)
    for found, expected in (
        (given.scale, without.scale),
        (given.x0, without.x0),
        (given.outputs.cond, without.outputs.cond),
    ):
        assert error(found.detach(), expected) < 1e-6


def test_gradients_flow_through_maps_scores_and_guidance(flat):
    denoise = flat.denoiser(flat.prompt("a red car on grass"), SCFG(4.0))
    x = seeded(1, 4, 16, 16).requires_grad_()
    denoised = denoise(x, 2.0, None)
    assert varies(denoised.scale)
    for value in (denoised.x0, denoised.regions.scores[:, 2], denoised.scale):
        (gradient,) = torch.autograd.grad(value.square().sum(), x, retain_graph=True)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@dataclass(frozen=True)
class Recording:
    """A recipe that keeps the regions it finds."""

    recipe: Recipe
    found: list[Regions] = field(default_factory=list)

    @property
    def foreground(self) -> str:
        return self.recipe.foreground

    def complete(self, maps: Maps) -> Tensor:
        return self.recipe.complete(maps)

    def assign(self, cond, uncond, tokens) -> Regions:
        self.found.append(self.recipe.assign(cond, uncond, tokens))
        return self.found[-1]


@dataclass(frozen=True)
class Given:
    """A recipe that finds, one evaluation after the other, what it was given."""

    regions: Iterator[Regions]
    foreground: str = "assigned"

    def complete(self, maps: Maps) -> Tensor:
        return maps.cross[..., :1].mT[..., None]

    def assign(self, cond, uncond, tokens) -> Regions:
        return next(self.regions)


@pytest.mark.parametrize("rule", [SCFG(7.5), SCFG.paper(7.5)], ids=["official", "paper"])
@pytest.mark.slow
def test_twenty_steps_of_four_pictures_equal_the_four_alone_given_their_regions(tiny, four, rule):
    """Near ties, which rounding decides, are left out by giving the pictures alone what was found together."""
    sigmas, noise, recording = tiny.sigmas(20), tiny.noise(range(3, 7), (128, 128)), Recording(rule.recipe)
    x = noise() * math.sqrt(sigmas[0] ** 2 + 1)
    together = list(run(tiny.denoiser(four, replace(rule, recipe=recording)), "dpmpp_2m", x, sigmas, noise))
    assert len(recording.found) == 20 and all(varies(step.denoised.scale) for step in together)
    assert not same_regions(recording.found[0], recording.found[-1])
    for i in range(4):
        own = (Regions(*(values[i : i + 1] for values in regions[:3])) for regions in recording.found)
        denoise = tiny.denoiser(text_of(four, i), replace(rule, recipe=Given(own)))
        alone = list(run(denoise, "dpmpp_2m", x[i : i + 1], sigmas, noise))
        assert error(alone[-1].latent[0], together[-1].latent[i]) < 1e-4
        for a, b in zip(alone, together):
            assert error(a.denoised.scale[0], b.denoised.scale[i]) < 1e-4


def test_everything_computed_comes_back(flat):
    prompt, x = flat.prompt("a red car on grass"), noisy(1, 4, 16, 16, sigma=2.0)
    denoised = flat.denoiser(prompt, SCFG(4.0), capture=Capture(256))(x, 2.0)
    outputs, regions = denoised.outputs, denoised.regions
    assert isinstance(denoised, Denoised) and denoised.x0.shape == x.shape == outputs.uncond.shape == outputs.cond.shape
    assert (
        outputs.x is x and torch.equal(outputs.difference, outputs.cond - outputs.uncond) and outputs.perturbed is None
    )
    assert denoised.scale.shape == (1, 1, 16, 16) and varies(denoised.scale)
    assert regions.tokens.shape == regions.scores.shape == (1, 16, 16, 16) and regions.foreground.shape == (
        1,
        1,
        16,
        16,
    )
    assert [word.text for word in regions.words[0]] == ["a", "red", "car", "on", "grass"]
    assert list(denoised.maps) == flat.unet.transformer_names()
    guided = outputs.cond + (denoised.scale - 1) * outputs.difference
    assert error(denoised.x0, flat.config.schedule.moment(2.0).to_x0(x, guided)) < 1e-6
    assert same_regions(segment_maps(list(denoised.maps.values())), regions)


@pytest.mark.parametrize("sigma", [0.1, 2.0, 14.0])
@pytest.mark.parametrize("model", ["tiny", "flat"])
def test_a_rule_is_given_the_clean_latent_that_the_conditional_output_stands_for(request, model, sigma):
    """By the formulas of either prediction: tiny says eps, flat says v."""
    given, model = [], request.getfixturevalue(model)
    prompt = Prompt({text: seeded(1, 16, model.config.unet.context_dim, seed=len(text)) for text in ("uncond", "cond")})

    def rule(outputs, regions, moment):
        given.append((outputs, regions, moment))
        return 3.0

    x = noisy(2, 4, 16, 16, sigma=sigma)
    denoised = model.denoiser(prompt, rule)(x, sigma)
    ((outputs, regions, moment),) = given
    assert regions is None and moment.sigma == sigma and outputs.x is x
    if model.config.schedule.prediction == "eps":
        x0, dx0_dout = x - sigma * outputs.cond, -sigma
    else:
        x0, dx0_dout = (
            x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * outputs.cond,
            -sigma / math.sqrt(sigma**2 + 1),
        )
    assert error(outputs.x0, x0) < 1e-6 and outputs.dx0_dout == pytest.approx(dx0_dout)
    assert torch.equal(outputs.x0, denoised.outputs.x0)
    assert error(denoised.x0, x0 + dx0_dout * 2 * outputs.difference) < 1e-5
    assert error(denoised.x0, x0) > 1e-3


def test_the_two_models_predict_differently(tiny, flat):
    """What the test before relies on."""
    assert (tiny.config.schedule.prediction, flat.config.schedule.prediction) == ("eps", "v")


def test_the_network_is_given_what_it_was_trained_on(tiny, four):
    """x at unit variance, the timestep of sigma, rows of text for the whole batch one after the other."""
    calls = []

    def network(x, t, conditioning, *, capture=None, attend=None):
        calls.append((x, t, conditioning, capture, attend))
        return tiny.unet(x, t, conditioning, capture=capture, attend=attend)

    x = noisy(4, 4, 16, 16)
    denoise = replace(tiny.denoiser(four, CFG(7.5)), network=network)
    denoise(x, 2.0)
    ((scaled, t, conditioning, capture, attend),) = calls
    assert torch.equal(scaled, x / math.sqrt(5)) and capture is None and attend is None
    assert t.tolist() == pytest.approx([tiny.config.schedule.time(2.0)] * 4)
    assert torch.equal(conditioning.tokens, torch.cat([four.context["uncond"], four.context["cond"]]))
    assert conditioning.weight is None and conditioning.vector is None


@dataclass(frozen=True)
class Away:
    """Identity self-attention in the middle."""

    scale: float = 2.0
    layers: tuple[str, ...] = ("middle_block",)

    def attend(self, q, k, v, site):
        return v if site.kind == "self" and site.block.startswith("middle_block.") else attention(q, k, v, site)


@torch.no_grad()
def test_rows_of_another_attention_have_a_call_of_their_own_which_captures_nothing(tiny, four):
    calls, away = [], Away()

    def network(x, t, conditioning, *, capture=None, attend=None):
        calls.append((len(conditioning.tokens), capture, attend))
        return tiny.unet(x, t, conditioning, capture=capture, attend=attend)

    x = noisy(4, 4, 16, 16, seed=48)
    plain = tiny.denoiser(four, SCFG(7.5))(x, SIGMA)
    denoise = tiny.denoiser(four, Guidance(scale=SCFG(7.5), perturb=away), capture=Capture(16))
    found = replace(denoise, network=network)(x, SIGMA)
    assert [(rows, capture is None, attend) for rows, capture, attend in calls] == [
        (8, False, None),
        (4, True, away.attend),
    ]
    assert torch.equal(found.outputs.cond, plain.outputs.cond) and same_regions(found.regions, plain.regions)
    assert all(len(maps.cross) == 8 for maps in found.maps.values())
    now = tiny.config.schedule.moment(SIGMA)
    perturbed = denoise.prompt.condition(Guidance(scale=CFG(1.0)).rows(now)[1:], now, None, x.shape)
    expected, _ = tiny.unet(x / math.sqrt(SIGMA**2 + 1), x.new_full((4,), now.t), perturbed, attend=away.attend)
    assert error(found.outputs.perturbed, expected) < 1e-6
    assert error(found.outputs.perturbed, found.outputs.cond) > 1e-5
    pushed = plain.x0 - SIGMA * 2 * (found.outputs.cond - expected)  # eps: x0 falls by sigma times the output
    assert error(found.x0, pushed) < 1e-5


def interval(moment) -> float:
    """Guidance in the middle of a run."""
    return float(1 < moment.sigma < 5)


@torch.no_grad()
@pytest.mark.parametrize("rule", [CFG(7.5), SCFG(7.5)], ids=["cfg", "scfg"])
@pytest.mark.parametrize("capture", [None, Capture(16), Capture(blocks=(MIDDLE, LARGE))], ids=["", "small", "named"])
def test_regions_and_maps_are_found_where_only_the_conditional_row_is_evaluated(tiny, four, rule, capture):
    denoise = tiny.denoiser(four, Guidance(scale=rule, when=interval), segment=OFFICIAL, capture=capture)
    inside, outside = (denoise(noisy(4, 4, 16, 16, sigma=sigma), sigma) for sigma in (3.0, 0.5))
    assert inside.outputs.uncond is not None and inside.outputs.difference is not None
    assert outside.outputs.uncond is None and outside.outputs.difference is None
    assert torch.equal(outside.scale, torch.ones(4, 1, 16, 16)) and torch.equal(outside.x0, outside.outputs.x0)
    assert inside.regions.tokens.shape == outside.regions.tokens.shape == (4, 77, 4, 4)
    # of that row alone
    x, t = noisy(4, 4, 16, 16, sigma=0.5) / math.sqrt(0.5**2 + 1), torch.full((4,), tiny.config.schedule.time(0.5))
    _, completed = tiny.unet(x, t, Conditioning(four.context["cond"]), capture=Capture(16, make=OFFICIAL.complete))
    expected = OFFICIAL.assign(list(completed.values()), None, Tokens(77))
    assert error(outside.regions.scores, expected.scores) < 1e-5 and ZEROS not in outside.flags
    assert same_regions(outside.regions, expected)
    for denoised, rows in ((inside, 8), (outside, 4)):
        assert all(len(maps.cross) == len(maps.self) == rows for maps in denoised.maps.values())
        assert set(denoised.maps) >= set(capture.blocks if capture else ()) and bool(denoised.maps) == bool(capture)


@torch.no_grad()
def test_without_a_recipe_of_its_own_an_unguided_step_reads_no_maps(tiny, four):
    calls = []

    def network(x, t, conditioning, *, capture=None, attend=None):
        calls.append(capture)
        return tiny.unet(x, t, conditioning, capture=capture, attend=attend)

    guidance = Guidance(scale=SCFG(7.5), when=interval)
    denoise = replace(tiny.denoiser(four, guidance), network=network)
    inside, outside = (denoise(noisy(4, 4, 16, 16, sigma=sigma), sigma) for sigma in (3.0, 0.5))
    assert inside.regions is not None and outside.regions is None and calls[0].pixels == 16 and calls[1] is None
    with_maps = tiny.denoiser(four, guidance, capture=Capture(16))(noisy(4, 4, 16, 16, sigma=0.5), 0.5)
    assert with_maps.regions is None and len(with_maps.maps) == 6
    assert torch.equal(with_maps.x0, outside.x0)


@torch.no_grad()
def test_reading_regions_changes_nothing_where_the_rule_reads_none(tiny, four):
    x = noisy(4, 4, 16, 16)
    plain, watched = (tiny.denoiser(four, CFG(7.5), segment=segment)(x, SIGMA) for segment in (None, OFFICIAL))
    assert torch.equal(plain.x0, watched.x0) and plain.regions is None and watched.regions is not None


@torch.no_grad()
def test_the_recipe_given_is_read_in_place_of_the_rule_s(tiny, four):
    x = noisy(4, 4, 16, 16)
    own, given = (tiny.denoiser(four, SCFG(7.5), segment=segment)(x, SIGMA) for segment in (None, PAPER))
    paper = tiny.denoiser(four, SCFG.paper(7.5))(x, SIGMA)
    assert same_regions(given.regions, paper.regions) and not same_regions(given.regions, own.regions)


@torch.no_grad()
@pytest.mark.parametrize("segment", [None, OFFICIAL, PAPER], ids=["the rule's", "official", "paper"])
@pytest.mark.slow
def test_maps_are_returned_by_block_on_request_together_with_regions(tiny, four, segment):
    """What is asked for beside the small blocks of which regions are read changes no bit of regions or picture."""
    x, rule = noisy(4, 4, 16, 16, seed=48), SCFG(7.5)
    plain = tiny.denoiser(four, rule, segment=segment)(x, SIGMA)
    assert plain.maps == {} and varies(plain.scale)
    for capture in (Capture(16), Capture(256), Capture(blocks=(LARGE,)), Capture(blocks=(LARGE, MIDDLE))):
        found = tiny.denoiser(four, rule, segment=segment, capture=capture)(x, SIGMA)
        assert same_regions(found.regions, plain.regions) and torch.equal(found.regions.scores, plain.regions.scores)
        assert torch.equal(found.scale, plain.scale) and torch.equal(found.x0, plain.x0)
        assert set(found.maps) >= set(capture.blocks) and len(found.maps) >= (16 if capture.pixels == 256 else 1)
        for name, maps in found.maps.items():
            n = maps.size[0] * maps.size[1]
            assert (
                maps.self.shape == (8, n, n)
                and maps.cross.shape == (8, n, 77)
                and name in tiny.unet.transformer_names()
            )
        small = [maps for maps in found.maps.values() if math.prod(maps.size) <= 16]
        assert same_regions(segment_maps(small, segment or OFFICIAL), found.regions)
        if LARGE in found.maps:
            assert found.maps[LARGE].size == (16, 16)
            assert not same_regions(segment_maps([*small, found.maps[LARGE]], segment or OFFICIAL), found.regions)


@torch.no_grad()
def test_maps_are_made_into_what_the_caller_wants_and_heads_are_kept(tiny, four):
    x = noisy(4, 4, 16, 16, seed=48)
    plain = tiny.denoiser(four, SCFG(7.5))(x, SIGMA)
    heads = tiny.denoiser(four, SCFG(7.5), capture=Capture(blocks=(MIDDLE,), heads=True))(x, SIGMA)
    assert heads.maps[MIDDLE].self.shape == (8, 8, 4, 4) and heads.maps[MIDDLE].cross.shape == (8, 8, 4, 77)
    assert margin(plain.regions) > 1e-4 and same_regions(heads.regions, plain.regions)  # of the mean over heads
    assert error(heads.x0, plain.x0) < 1e-6
    sizes = tiny.denoiser(four, SCFG(7.5), capture=Capture(blocks=(MIDDLE,), make=lambda maps: maps.size))(x, SIGMA)
    assert sizes.maps[MIDDLE] == (2, 2) and same_regions(sizes.regions, plain.regions)
    alone = tiny.denoiser(four, CFG(7.5), capture=Capture(blocks=(MIDDLE,), make=lambda maps: maps.size))(x, SIGMA)
    assert alone.maps == {MIDDLE: (2, 2)} and alone.regions is None


class Telling:
    """A rule that counts as worth telling what is so in some pictures, and at some noise levels."""

    def __call__(self, outputs, regions, moment):
        return 3.0

    def flags(self, regions, moment):
        flags = {"second": torch.tensor([False, True])}
        return flags | {"late": torch.tensor([True, True])} if moment.sigma < 2 else flags


def counts(denoised: Denoised) -> dict[str, list[int]]:
    return {message: where.tolist() for message, where in denoised.flags.items()}


def test_flags_are_counted_through_the_previous_result(tiny, prompt):
    denoise, x = tiny.denoiser(prompt, Telling()), noisy(2, 4, 8, 8)
    with torch.no_grad():
        first = denoise(x, 3.0)
        second = denoise(x, 1.0, first)
        third = denoise(x, 0.5, second)
        anew = denoise(x, 0.5)
    assert counts(first) == {"second": [0, 1]}
    assert counts(second) == {"second": [0, 2], "late": [1, 1]} and counts(third) == {"second": [0, 3], "late": [2, 2]}
    assert counts(anew) == {"second": [0, 1], "late": [1, 1]} and counts(first) == {"second": [0, 1]}


@pytest.mark.parametrize(
    "sampler, evaluations, late", [("euler", 4, 2), ("dpmpp_2m", 4, 2), ("unipc", 4, 2), ("heun", 7, 4)]
)
def test_flags_of_a_run_count_every_evaluation(tiny, prompt, sampler, evaluations, late):
    """Heun evaluates at a step's end too, but at 0: at 9, 4, 4, 1.5, 1.5, 0.5, 0.5."""
    denoise, sigmas = tiny.denoiser(prompt, Telling()), [9.0, 4.0, 1.5, 0.5, 0.0]
    *_, last = run(denoise, sampler, noisy(2, 4, 8, 8, sigma=9.0), sigmas, lambda: seeded(2, 4, 8, 8))
    assert counts(last.denoised) == {"second": [0, evaluations], "late": [late, late]}


def test_flags_outlive_steps_without_guidance(tiny, prompt):
    guidance = Guidance(scale=Telling(), when=interval)
    sigmas = [9.0, 4.0, 1.5, 0.5, 0.0]
    *_, last = run(tiny.denoiser(prompt, guidance), "euler", noisy(2, 4, 8, 8, sigma=9.0), sigmas, None)
    assert counts(last.denoised) == {"second": [0, 2], "late": [1, 1]}


def test_what_a_direction_remembers_goes_through_the_previous_result(tiny, prompt):
    def direction(outputs, moment, state):
        return outputs.difference, [*(state or []), moment.sigma]

    guidance = Guidance(scale=CFG(3.0), direction=direction, when=lambda moment: moment.sigma != 1.5)
    x, sigmas = noisy(2, 4, 8, 8, sigma=9.0), [9.0, 4.0, 1.5, 0.5, 0.2, 0.0]
    states = [step.denoised.state for step in run(tiny.denoiser(prompt, guidance), "euler", x, sigmas, None)]
    assert states == [[9.0], [9.0, 4.0], None, [0.5], [0.5, 0.2]]


@torch.no_grad()
def test_an_all_zero_unconditional_context_is_flagged_and_has_the_conditional_half_s_foreground(tiny, four):
    zero = four.context["uncond"].clone()
    zero[2] = 0
    prompt, x = Prompt(four.context | {"uncond": zero}), noisy(4, 4, 16, 16, seed=48)
    found = tiny.denoiser(prompt, SCFG(7.5))(x, SIGMA)
    straight, cond = (tiny.denoiser(four, rule(7.5))(x, SIGMA).regions.foreground for rule in (SCFG, SCFG.conditional))
    assert counts(found) == {ZEROS: [0, 0, 1, 0], "no foreground found: rate 0.8 there": [0, 0, 0, 0]}
    assert torch.equal(found.regions.foreground[2], cond[2]) and not torch.equal(straight[2], cond[2])
    assert torch.equal(found.regions.foreground[[0, 1, 3]], straight[[0, 1, 3]])
    assert ZEROS not in tiny.denoiser(prompt, SCFG.conditional(7.5))(x, SIGMA).flags  # which asks for that
    assert ZEROS not in tiny.denoiser(prompt, CFG(7.5))(x, SIGMA).flags


@torch.no_grad()
def test_a_prompt_is_whatever_has_a_layout_and_a_condition(tiny, prompt):
    """It is asked for the rows of a step at its moment, with the result of the step before."""
    asked, denoise = [], tiny.denoiser(prompt, Guidance(scale=CFG(3.0), when=interval))

    class Changing:
        layout = denoise.prompt.layout

        def condition(self, rows, moment, previous, shape):
            asked.append(([row.name for row in rows], moment.sigma, previous, tuple(shape)))
            found = denoise.prompt.condition(rows, moment, previous, shape)
            return found._replace(flags={"changed": torch.tensor([True, moment.sigma < 2])})

    changing, x = replace(denoise, prompt=Changing()), noisy(2, 4, 8, 8, sigma=3.0)
    first = changing(x, 3.0)
    second = changing(x, 0.5, first)
    assert torch.equal(first.x0, denoise(x, 3.0).x0)
    assert asked[0] == (["uncond", "cond"], 3.0, None, (2, 4, 8, 8))
    names, sigma, previous, _ = asked[1]
    assert names == ["cond"] and sigma == 0.5 and previous is first
    assert counts(second) == {"changed": [2, 1]}


@torch.no_grad()
def test_one_prompt_serves_any_number_of_pictures_and_others_are_refused(tiny, prompt):
    x = noisy(3, 4, 8, 8)
    single = text_of(prompt, 0)
    found = tiny.denoiser(single, CFG(3.0))(x, SIGMA)
    apart = torch.cat([tiny.denoiser(single, CFG(3.0))(x[i : i + 1], SIGMA).x0 for i in range(3)])
    assert error(found.x0, apart) < 1e-5
    with pytest.raises(BadInput, match="2 prompts for 3 pictures"):
        tiny.denoiser(prompt, CFG(3.0))(x, SIGMA)


@pytest.mark.parametrize("sigma", [-1, -0.5, float("nan"), float("inf"), torch.tensor([1.0, 2.0]), torch.tensor([1.0])])
def test_a_sigma_that_is_no_single_noise_level_is_refused(tiny, prompt, sigma):
    with pytest.raises(BadInput, match="sigma is one number from 0 to 1e38 for the whole batch") as caught:
        tiny.denoiser(prompt, CFG(3.0))(noisy(2, 4, 8, 8), sigma)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_sigma_is_a_number_of_any_kind(tiny, prompt):
    denoise, x = tiny.denoiser(prompt, SCFG(3.0)), noisy(2, 4, 8, 8)
    expected = denoise(x, 2.0).x0
    assert torch.equal(denoise(x, torch.tensor(2.0)).x0, expected) and torch.equal(denoise(x, 2).x0, expected)
    assert torch.equal(denoise(x, 0.0).x0, x)  # where there is no noise all is clean


def test_texts_are_read_by_the_denoiser(flat):
    x, text = noisy(1, 4, 16, 16, sigma=2.0), "a red car on grass"
    with torch.no_grad():
        expected = flat.denoiser(flat.prompt(text), SCFG(4.0))(x, 2.0)
        assert torch.equal(flat.denoiser(text, SCFG(4.0))(x, 2.0).x0, expected.x0)
        assert torch.equal(flat.denoiser([text], SCFG(4.0))(x, 2.0).x0, expected.x0)


def test_guidance_is_a_rule_a_guidance_or_the_config_s_own(flat):
    text, x = "a red car on grass", noisy(1, 4, 16, 16, sigma=2.0)
    own = flat.denoiser(text).guidance.scale
    assert own == SCFG(flat.config.scale, min_contrast=flat.config.min_contrast[0]) and own.min_contrast > 1
    assert flat.denoiser(text, SCFG(4.0)).guidance == Guidance(scale=SCFG(4.0))
    with torch.no_grad():
        by_function = flat.denoiser(text, lambda outputs, regions, moment: 4.0)(x, 2.0)
        assert torch.equal(by_function.x0, flat.denoiser(text, CFG(4.0))(x, 2.0).x0)
    with pytest.raises(BadInput, match=r"CFG\(.* not 5.0"):
        flat.denoiser(text, 5.0)


def test_layers_in_which_no_block_is_are_refused(tiny, prompt):
    for layer in ("middle", "input_blocks.3", "input_blocks.4.0", "input_blocks.1.1.transformer_blocks.1"):
        with pytest.raises(BadInput, match=f"no transformer block is in '{layer}'"):
            tiny.denoiser(prompt, Guidance(scale=CFG(3.0), perturb=Away(layers=("middle_block", layer))))
    for layer in ("middle_block", "input_blocks.4", "input_blocks.4.1", LARGE):
        tiny.denoiser(prompt, Guidance(scale=CFG(3.0), perturb=Away(layers=(layer,))))


@torch.no_grad()
def test_a_network_of_another_precision_is_given_and_gives_its_own(tiny, prompt):
    """The latent and guidance stay in float32."""
    given = []

    def network(x, t, conditioning, *, capture=None, attend=None):
        given.append((x.dtype, conditioning.tokens.dtype))
        found, captured = tiny.unet(
            x.float(), t, conditioning._replace(tokens=conditioning.tokens.float()), capture=capture
        )
        return found.bfloat16(), captured

    placed = prompt.conditioner(tiny.config, tiny.device, torch.bfloat16)
    denoise = replace(tiny.denoiser(prompt, SCFG(3.0)), network=network, dtype=torch.bfloat16, prompt=placed)
    x = noisy(2, 4, 8, 8)
    found = denoise(x, SIGMA)
    assert given == [(torch.bfloat16, torch.bfloat16)]
    assert {value.dtype for value in (found.x0, found.scale, found.outputs.cond, found.regions.scores)} == {
        torch.float32
    }
    assert error(found.outputs.cond, tiny.denoiser(prompt, SCFG(3.0))(x, SIGMA).outputs.cond) < 0.1
