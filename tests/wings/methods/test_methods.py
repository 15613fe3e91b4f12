"""What others published, in the slots of a Guidance, by its formulas in float64 and on the embedded checkpoint."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import error, seeded
from handmade import SHAPE, at, halves, one_of, outputs

from torch.nn import functional

import scfg
from scfg import (
    APG,
    CFG,
    FDG,
    OFFICIAL,
    PAG,
    SCFG,
    SEG,
    TCFG,
    Energy,
    Guidance,
    Interval,
    OptimizedScale,
    Product,
    Ramp,
    Rescale,
    Schedule,
    Site,
)

CAPTION = "a red car left of a blue star on grass"
SIGMAS = Schedule().sigmas
OUTPUTS, MOMENT = at(3.0)


def moment_at(t: int) -> scfg.Moment:
    return Schedule().moment(float(SIGMAS[t]))


def test_slots_that_ask_for_nothing_change_no_bit():
    """eta 1 without limit and momentum is CFG; phi 0, a perturbation of scale 0 and a constant strength do nothing."""
    plain = Guidance(scale=CFG(5.0)).combine(OUTPUTS, None, MOMENT)
    for slots in (
        {"direction": APG(1.0, None, 0.0)},
        {"rescale": Rescale(0.0)},
        {"perturb": PAG(0.0)},
        {"perturb": SEG(0.0)},
        {"direction": FDG(1.0, 1.0)},
        {"when": Ramp(1.0, 1.0)},
        {"when": Interval(0.0, 100.0)},
        {"scale": Product(CFG(5.0), CFG(1.0))},
        {"scale": Energy(5.0, 5.0)},
    ):
        found = Guidance(**{"scale": CFG(5.0)} | slots).combine(OUTPUTS, None, MOMENT)
        assert torch.equal(found.out, plain.out) and torch.equal(found.scale, plain.scale), slots
    assert torch.equal(Guidance(scale=CFG(1.0)).combine(OUTPUTS, None, MOMENT).out, OUTPUTS.cond)


def test_outside_an_interval_only_the_conditional_row_is_evaluated():
    nothing = Guidance(scale=CFG(5.0), perturb=PAG(), when=Interval(3.0, 3.0))
    assert [row.name for row in nothing.rows(MOMENT)] == ["cond"]
    alone = OUTPUTS._replace(uncond=None, difference=None, perturbed=None)
    assert torch.equal(nothing.combine(alone, None, MOMENT).out, OUTPUTS.cond)
    inside = Guidance(scale=CFG(5.0), perturb=PAG(), when=Interval(2.9, 3.0))
    assert [row.name for row in inside.rows(MOMENT)] == ["uncond", "cond", "perturbed"]


RULES = [CFG(5.0), SCFG(5.0), SCFG.paper(5.0), SCFG.mean(5.0), Energy(7.0, 4.0), Product(SCFG(5.0), Energy(1.5, 0.8))]


@pytest.mark.parametrize("rule", RULES, ids=["cfg", "scfg", "paper", "mean", "energy", "product"])
@pytest.mark.parametrize("direction", [None, APG(), OptimizedScale(), TCFG(), FDG()], ids=str)
@pytest.mark.parametrize("others", [{}, {"perturb": PAG(), "rescale": Rescale()}], ids=["", "pag+rescale"])
def test_any_combination_is_finite_repeatable_and_independent_of_the_batch(rule, direction, others):
    guidance, states = Guidance(direction=direction, scale=rule, when=Ramp(), **others), [None] * 3
    for sigma in (9.0, 3.0):
        found = []
        for i, pictures in enumerate((slice(None), slice(None), slice(1, None))):
            given, moment = at(sigma, pictures=pictures)
            found.append(guidance.combine(given, halves() if i < 2 else one_of(halves()), moment, states[i]))
            states[i] = found[-1].state
        assert rule == CFG(5.0) or found[0].scale.std() > 0.01
        assert found[0].out.isfinite().all() and torch.equal(found[0].out, found[1].out)
        assert error(found[2].out, found[0].out[1:]) < 1e-6 and error(found[2].scale, found[0].scale[1:]) < 1e-6


def test_apg_against_the_formula_in_float64():
    """2410.02416, algorithm 1, on x0 = gain * out + offset, with momentum over two steps."""
    gain, offset = -2.5, seeded(*SHAPE, seed=7).double()
    guidance = Guidance(direction=APG(eta=0.2, limit=3.0, momentum=-0.5), scale=CFG(6.0))
    moment, state, running = Schedule().moment(1.0), None, 0
    for seed in (1, 2):
        uncond, cond = seeded(*SHAPE, seed=seed).double(), seeded(*SHAPE, seed=seed + 10).double()
        given = outputs(moment, cond, uncond)._replace(x0=gain * cond + offset, dx0_dout=gain)
        guided = guidance.combine(given, None, moment, state)
        state = guided.state
        c, u = gain * cond + offset, gain * uncond + offset
        running = c - u - 0.5 * running
        step = running * (3.0 / running.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None, None]
        assert (running.flatten(1).norm(dim=1) > 3).all()  # the limit acts
        unit = c / c.flatten(1).norm(dim=1)[:, None, None, None]
        parallel = (step * unit).sum((1, 2, 3), keepdim=True) * unit
        assert error(gain * guided.out + offset, c + 5 * (step - parallel + 0.2 * parallel)) < 1e-7


@pytest.mark.parametrize("sigma", [9.0, 0.5])
def test_tangential_damping_against_the_formula_in_float64(sigma):
    """2503.18137, algorithm 1: uncond' = (uncond v1) v1, v1 the first right singular vector of both noises."""
    moment, x = Schedule().moment(sigma), sigma * seeded(*SHAPE, seed=3).double()
    cond, uncond = seeded(*SHAPE, seed=1).double(), 0.7 * seeded(*SHAPE, seed=2).double()
    found = Guidance(direction=TCFG(), scale=CFG(6.0)).combine(outputs(moment, cond, uncond, x=x), None, moment).out
    for i in range(2):
        pair = torch.stack([cond[i].flatten(), uncond[i].flatten()])
        values, vectors = torch.linalg.eigh(pair @ pair.T)  # of the two noises' products: no singular vectors needed
        first = vectors[:, -1] @ pair / values[-1].sqrt()
        damped = ((pair[1] @ first) * first).view_as(cond[i])
        assert error(found[i], damped + 6 * (cond[i] - damped)) < 1e-10
        assert error(damped, uncond[i]) > 0.1


def test_low_and_high_frequencies_add_up_and_are_guided_apart():
    """A constant is of low frequency alone; a chequerboard, away from the borders, of high frequency alone."""
    board = torch.ones(1, 4, 16, 16)
    board[..., ::2, 1::2] = board[..., 1::2, ::2] = -1
    given, moment = at(3.0)
    for difference, share in ((torch.ones(1, 4, 16, 16), 0.25), (board, 0.5)):
        found, state = FDG(0.25, 0.5)(given._replace(difference=difference), moment, None)
        assert error(found[..., 4:-4, 4:-4], share * difference[..., 4:-4, 4:-4]) < 1e-6 and state is None
    for size in ((16, 12), (13, 19), (2, 2), (1, 3)):
        difference = seeded(2, 4, *size)
        low, high = (
            FDG(*weights)(given._replace(difference=difference), moment, None)[0] for weights in ((1, 0), (0, 1))
        )
        assert error(low + high, difference) < 1e-6 and low.shape == difference.shape


@pytest.mark.parametrize("size", [(8, 8), (7, 7), (6, 9), (1, 5)])
@pytest.mark.parametrize("sigma", [0.0, 0.4, 2.0, 50.0, math.inf])
def test_smoothed_energy_blurs_queries_in_its_layers_alone(size, sigma):
    """2408.00760 and its authors' program: a kernel of 6 sigma + 1 taps, at most the side's, borders reflected."""
    h, w = size
    q, k, v = (seeded(1, 2, h * w, 8, seed=seed).double() for seed in (1, 2, 3))
    seg, here = (
        SEG(sigma=sigma, layers=("middle_block",)),
        Site("middle_block.1.transformer_blocks.0", "self", size, None),
    )
    picture = q.permute(0, 1, 3, 2).reshape(1, 16, h, w)
    if math.isinf(sigma):
        blurred = picture.mean((-2, -1), keepdim=True).expand_as(picture)
    elif sigma == 0:
        blurred = picture
    else:
        taps = [min(math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2, side - (side % 2 - 1)) for side in size]
        lines = [torch.exp(-0.5 * ((torch.arange(n) - (n - 1) / 2).double() / sigma) ** 2) for n in taps]
        kernel = torch.outer(lines[0] / lines[0].sum(), lines[1] / lines[1].sum()).expand(16, 1, *taps)
        margins = (taps[1] // 2, taps[1] // 2, taps[0] // 2, taps[0] // 2)
        blurred = functional.conv2d(functional.pad(picture, margins, mode="reflect"), kernel, groups=16)
    expected = scfg.attention(blurred.reshape(1, 2, 8, h * w).permute(0, 1, 3, 2), k, v, here)
    assert error(seg.attend(q, k, v, here), expected) < 1e-6
    plain = scfg.attention(q, k, v, here)
    assert sigma == 0 or error(expected, plain) > 1e-3
    for elsewhere in (here._replace(kind="cross"), here._replace(block="input_blocks.1.1.transformer_blocks.0")):
        assert torch.equal(seg.attend(q, k, v, elsewhere), plain)


@pytest.mark.parametrize("schedule", [Schedule("eps"), Schedule("v")], ids=["eps", "v"])
def test_cfg_pp_against_the_paper_in_float64(schedule):
    """2406.08070, algorithm 2, in its variance-preserving form: x0 of the guided noise, renoised by the unconditional."""
    target, sigmas = seeded(*SHAPE, seed=4).double(), [5.0, 2.0, 0.7, 0.0]
    x, guidance, shares = 5 * seeded(*SHAPE, seed=5).double(), Guidance(scale=CFG(0.6)), []

    def denoise(x, sigma, previous):
        moment = schedule.moment(sigma)
        cond, uncond = torch.tanh(x - target), torch.tanh(0.5 * x)
        given = outputs(moment, cond, uncond, x=x)
        shares.append((cond, uncond))
        x0 = moment.to_x0(x, guidance.combine(given, None, moment).out)
        return scfg.Denoised(x0, given, None, None, {}, None, {})

    for i, (after, _) in enumerate(scfg.euler_cfg_pp(denoise, x, sigmas, None)):
        sigma, following = sigmas[i], sigmas[i + 1]
        a, a_next = 1 / (sigma**2 + 1), 1 / (following**2 + 1)
        moment, (cond, uncond) = schedule.moment(sigma), shares[i]
        eps = [(x - moment.to_x0(x, out)) / sigma for out in (uncond, cond)]
        guided, z = eps[0] + 0.6 * (eps[1] - eps[0]), math.sqrt(a) * x
        x0 = (z - math.sqrt(1 - a) * guided) / math.sqrt(a)
        x = (math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * eps[0]) / math.sqrt(a_next)
        assert error(after, x) < 1e-6
        x = after
    assert i == 2


def test_cfg_pp_without_guidance_is_euler_and_takes_what_is_sent(flat):
    unguided = Guidance(scale=CFG(3.0), when=Interval(100.0, 200.0))
    steps = {
        sampler: list(flat.sample(CAPTION, unguided, sampler=sampler, steps=3))
        for sampler in ("euler", scfg.euler_cfg_pp)
    }
    assert error(steps[scfg.euler_cfg_pp][-1].x, steps["euler"][-1].x) < 1e-5
    run = flat.sample(CAPTION, CFG(0.6), sampler=scfg.euler_cfg_pp, steps=3)
    first = next(run)
    second = run.send(2 * first.x)
    *_, again = zip(range(2), flat.sample(CAPTION, CFG(0.6), sampler=scfg.euler_cfg_pp, steps=3))
    assert error(second.x, again[1].x) > 1e-2


def as_eps(v: torch.Tensor, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The noise that a velocity stands for."""
    return (sigma * x / math.sqrt(sigma**2 + 1) + v) / math.sqrt(sigma**2 + 1)


def both_kinds(sigma: float) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """What a v network and an eps network say that mean the same, by kind; and x, v of uncond and of cond."""
    x, uncond, cond = (seeded(*SHAPE, seed=seed).double() for seed in (1, 2, 3))
    x, cond = sigma * x, cond + 0.8 * uncond
    moments = {kind: Schedule(kind).moment(sigma) for kind in ("v", "eps")}
    eps = (as_eps(v, x, sigma) for v in (cond, uncond))
    given = {"v": outputs(moments["v"], cond, uncond, x=x), "eps": outputs(moments["eps"], *eps, x=x)}
    return {kind: (given[kind], moments[kind]) for kind in given}, (x, uncond, cond)


@pytest.mark.parametrize("sigma", [12.0, 1.0, 0.05])
@pytest.mark.parametrize("prediction", ["v", "eps"])
def test_the_optimized_scale_against_the_formula_in_float64(sigma, prediction):
    """2503.18886, eq. 7 and 8, on velocities: s = <cond, uncond> / |uncond|^2, and s * uncond is guided from."""
    kinds, (x, uncond, cond) = both_kinds(sigma)
    given, moment = kinds[prediction]
    assert error(given.x0, x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * cond) < 1e-12
    s = (cond * uncond).sum((1, 2, 3), keepdim=True) / uncond.square().sum((1, 2, 3), keepdim=True)
    expected = s * uncond + 6 * (cond - s * uncond)
    guided = Guidance(direction=OptimizedScale(), scale=CFG(6.0)).combine(given, None, moment)
    found = moment.to_x0(x, guided.out)
    assert error(found, x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * expected) < 1e-7
    plain = moment.to_x0(x, Guidance(scale=CFG(6.0)).combine(given, None, moment).out)
    assert error(plain, found) > 1e-3 and 0.5 < s.min() and (abs(s - 1) > 0.02).all()


@pytest.mark.parametrize("sigma", [12.0, 1.0, 0.05])
@pytest.mark.parametrize("direction", [OptimizedScale(), APG(limit=3.0), TCFG(), FDG()], ids=str)
def test_directions_guide_to_one_x0_whether_the_network_says_eps_or_v(sigma, direction):
    kinds, _ = both_kinds(sigma)
    guidance, found, states = Guidance(direction=direction, scale=CFG(6.0)), {}, {}
    for kind, (given, moment) in kinds.items():
        guided = guidance.combine(given, None, moment)
        again = guidance.combine(given, None, moment, guided.state)
        found[kind], states[kind] = [moment.to_x0(given.x, one.out) for one in (guided, again)], guided.state
    assert error(found["eps"][0], found["v"][0]) < 1e-7 and error(found["eps"][1], found["v"][1]) < 1e-7
    assert states["v"] is None or error(states["eps"], states["v"]) < 1e-7


def test_a_network_is_guided_alike_as_eps_and_as_v(flat):
    """The embedded network predicts v; a model that says the same as eps takes the same steps."""

    class Eps(torch.nn.Module):
        def forward(self, x, t, conditioning, **options):
            sigma = float(flat.config.schedule.sigmas[round(t[0].item())])
            out, captured = flat.unet(x, t, conditioning, **options)
            x = torch.cat([x] * (len(out) // len(x)))
            return (sigma * x + out) / math.sqrt(sigma**2 + 1), captured

    guidance = Guidance(direction=OptimizedScale(), scale=SCFG(4.0))
    as_v, sigma = flat.denoiser(CAPTION, guidance), float(flat.config.schedule.sigmas[700])
    as_eps = replace(as_v, network=Eps(), schedule=Schedule("eps"))
    x = sigma * seeded(2, 4, 16, 16)
    v, eps = as_v(x, sigma), as_eps(x, sigma)
    assert error(eps.outputs.cond, v.outputs.cond) > 1e-1  # the two say something else
    assert error(eps.x0, v.x0) < 1e-4 and error(eps.scale, v.scale) < 1e-4
    assert error(flat.denoiser(CAPTION, SCFG(4.0))(x, sigma).x0, v.x0) > 1e-3


def test_a_ramp_and_an_interval_say_when():
    linear, cosine = Ramp(0.0, 2.0), Ramp(0.5, 1.5, "cosine")
    assert [linear(moment_at(t)) for t in (999, 0)] == [0, 2]
    assert cosine(moment_at(999)) == 0.5 and cosine(moment_at(0)) == 1.5
    for t in (900, 250):
        done = 1 - t / 999
        assert linear(moment_at(t)) == pytest.approx(2 * done)
        assert cosine(moment_at(t)) == pytest.approx(0.5 + (1 - math.cos(math.pi * done)) / 2)
    names = [[row.name for row in Guidance(scale=CFG(5.0), when=linear).rows(moment_at(t))] for t in (999, 300)]
    assert names == [["cond"], ["uncond", "cond"]]
    assert [Interval(1.0, 2.0)(Schedule().moment(sigma)) for sigma in (1.0, 1.5, 2.0, 2.5)] == [0, 1, 1, 0]


def test_a_strength_between_acts_on_the_scale_and_on_the_perturbation():
    half = Guidance(scale=CFG(5.0), perturb=PAG(2.0), when=lambda moment: 0.5).combine(OUTPUTS, None, MOMENT)
    assert torch.equal(half.scale, torch.full_like(half.scale, 3.0))
    expected = OUTPUTS.cond + 2 * OUTPUTS.difference + OUTPUTS.cond - OUTPUTS.perturbed
    assert error(half.out, expected) < 1e-6


def test_rescaling_against_the_formula_in_float64():
    """2305.08891, eq. 15 and 16, every picture by itself."""
    guided, cond = 3 * seeded(*SHAPE).double() + 0.5, seeded(*SHAPE, seed=1).double()
    guided[1] *= 4
    found = Rescale(0.7)(guided, cond)
    for i in range(2):
        rescaled = guided[i] * cond[i].std() / guided[i].std()
        assert error(found[i], 0.7 * rescaled + 0.3 * guided[i]) < 1e-7
    whole = Guidance(scale=CFG(8.0), rescale=Rescale(1.0)).combine(OUTPUTS, None, MOMENT).out
    assert torch.allclose(whole.std((1, 2, 3)), OUTPUTS.cond.std((1, 2, 3)), rtol=1e-5)


def test_rescaling_nothing_leaves_a_constant():
    assert torch.equal(Rescale(0.0)(torch.ones(1, 4, 3, 3), seeded(1, 4, 3, 3)), torch.ones(1, 4, 3, 3))
    assert Rescale(0.7)(torch.ones(1, 4, 3, 3), seeded(1, 4, 3, 3)).isfinite().all()


def test_the_energy_is_that_of_the_difference_at_a_pixel():
    energy, norm = Energy(7.0, 4.0), OUTPUTS.difference.double().norm(dim=1, keepdim=True)
    expected = 4 + 3 * torch.exp(-norm / norm.mean((2, 3), keepdim=True))
    found = energy(OUTPUTS, None, MOMENT)
    assert found.shape == (2, 1, 12, 16) and error(found.double(), expected) < 1e-6 and found.std() > 0.1
    same = OUTPUTS._replace(difference=torch.zeros(SHAPE))
    assert torch.equal(energy(same, None, MOMENT), torch.full((2, 1, 12, 16), 7.0))
    assert error(energy(OUTPUTS._replace(difference=100 * OUTPUTS.difference), None, MOMENT), found) < 1e-5


def test_a_product_multiplies_scales_and_passes_on_flags():
    rules = SCFG(5.0, min_contrast=1.2), Energy(1.5, 0.8)
    scales = [rule(OUTPUTS, halves(), MOMENT) for rule in rules]
    for product in (Product(*rules), Product(*rules[::-1])):
        assert torch.equal(product(OUTPUTS, halves(), MOMENT), scales[0] * scales[1])
        assert product.flags(halves(), MOMENT).keys() == rules[0].flags(halves(), MOMENT).keys() != set()
    assert Product(CFG(2.0), CFG(3.0))(OUTPUTS, None, MOMENT) == 6 and Product(CFG(2.0), CFG(3.0)).recipe is None
    assert Product(CFG(2.0), CFG(3.0)).flags(None, MOMENT) == {}


def test_two_recipes_of_one_step_are_refused(flat):
    with pytest.raises(scfg.BadInput, match="read by one recipe"):
        Product(SCFG(2.0), SCFG.paper(1.0)).recipe
    with pytest.raises(scfg.BadInput, match="read by one recipe"):
        flat.denoiser(CAPTION, Product(SCFG(2.0), SCFG.paper(1.0)))(seeded(1, 4, 16, 16), 5.0)
    assert Product(SCFG(2.0), CFG(1.0)).recipe == Product(Energy(), SCFG(2.0)).recipe == OFFICIAL


def test_a_step_without_guidance_ends_what_a_direction_remembers():
    guidance = Guidance(direction=APG(), scale=CFG(3.0), when=Interval(1.0, 2.0))
    guided = guidance.combine(*at(1.5)[:1], None, at(1.5)[1])
    assert guided.state is not None
    after = guidance.combine(at(0.5)[0], None, at(0.5)[1], guided.state)
    assert after.state is None and torch.equal(after.out, at(0.5)[0].cond)


def test_printing_a_guidance_shows_the_order_and_the_rows():
    slots = {"perturb": PAG(), "direction": APG(), "scale": SCFG(7.5), "rescale": Rescale(), "when": Interval(0.3, 5.0)}
    lines = str(Guidance(**slots)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["direction", "scale", "perturb", "rescale", "when", "rows a step"]
    assert lines[-1] == "rows a step: 3 (uncond, cond, perturbed); 1 (cond) where `when` is 0"
    assert str(Guidance(scale=CFG(5.0))).splitlines()[-1] == "rows a step: 2 (uncond, cond)"


def test_perturbed_attention_is_the_identity_in_its_layers_and_nowhere_else():
    q, k, v = (seeded(1, 2, 6, 8, seed=seed) for seed in (1, 2, 3))
    pag, bias = PAG(layers=("input_blocks.1", "middle_block.1.transformer_blocks.0")), seeded(1, 1, 6, 6)

    def attended(block: str, kind: str = "self") -> torch.Tensor:
        return pag.attend(q, k, v, Site(block, kind, (2, 3), bias if kind == "cross" else None))

    for block in ("input_blocks.1.1.transformer_blocks.0", "middle_block.1.transformer_blocks.0"):
        assert torch.equal(attended(block), v)
        assert torch.equal(attended(block, "cross"), scfg.attention(q, k, v, Site(block, "cross", (2, 3), bias)))
    for block in ("input_blocks.11.1.transformer_blocks.0", "middle_block.1.transformer_blocks.01"):
        assert torch.equal(attended(block), scfg.attention(q, k, v, Site(block, "self", (2, 3), None)))


@pytest.mark.parametrize("layers", [("middle_block",), ("input_blocks.3", "output_blocks.0.1.transformer_blocks.0")])
def test_pag_against_the_formula_on_a_network(flat, layers):
    """2403.17377, eq. 16: what the text gives, and away from what it gives under the identity."""
    x, sigma, prompt = 5 * seeded(2, 4, 16, 16), 5.0, flat.prompt(CAPTION)
    visited = []

    def attend(q, k, v, site):
        here = site.kind == "self" and any(site.block.startswith(layer) for layer in layers)
        visited.extend([site.block] * here)
        return v if here else scfg.attention(q, k, v, site)

    found = flat.denoiser(prompt, Guidance(scale=CFG(3.0), perturb=PAG(2.0, layers)))(x, sigma)
    t = torch.full((2,), flat.config.schedule.time(sigma))
    context = scfg.Conditioning(prompt.context["cond"].expand(2, -1, -1))
    with torch.no_grad():
        perturbed, _ = flat.unet(x / math.sqrt(sigma**2 + 1), t, context, attend=attend)
    assert len(visited) == len(layers)
    plain = flat.denoiser(prompt, CFG(3.0))(x, sigma).outputs
    assert error(found.outputs.perturbed, perturbed) < 1e-5 and error(perturbed, plain.cond) > 1e-3
    assert torch.equal(found.outputs.cond, plain.cond) and torch.equal(found.outputs.uncond, plain.uncond)
    out = plain.cond + 2 * (plain.cond - plain.uncond) + 2 * (plain.cond - perturbed)
    assert error(found.x0, flat.config.schedule.moment(sigma).to_x0(x, out)) < 1e-5


def test_layers_that_are_not_there_are_named(flat):
    for layers in (("middle",), ("middle_block", "input_blocks.0"), ("input_blocks",), ("input_blocks.1.1.attn",)):
        guidance = Guidance(perturb=PAG(layers=layers), scale=CFG(3.0))
        if layers == ("input_blocks",):  # all of them, as the beginning of their names
            flat.denoiser(CAPTION, guidance)
            continue
        with pytest.raises(scfg.BadInput, match=f"no transformer block is in {layers[-1]!r}: ") as caught:
            flat.denoiser(CAPTION, guidance)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Interval(9, 0.3), "no noise level lies above 9 and up to 0.3: give the lower one first"),
        (lambda: Rescale(7), "phi is a share from 0 to 1, not 7"),
        (lambda: Rescale(-0.1), "phi is a share from 0 to 1, not -0.1"),
        (
            lambda: PAG(layers="middle_block"),
            r"layers are names of blocks in a tuple, such as \('middle_block',\), not",
        ),
        (lambda: SEG(layers=()), r"layers are names of blocks in a tuple"),
        (lambda: SEG(sigma=-1.0), "sigma is the width of a blur in pixels, from 0 to infinity, not -1"),
        (lambda: PAG(layers=()), r"layers are names of blocks in a tuple, .* not \(\)"),
    ],
)
def test_misuse_is_one_line(make, message):
    with pytest.raises(scfg.BadInput, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_everything_together_in_one_line(flat):
    slots = {"perturb": PAG(), "direction": APG(), "rescale": Rescale(), "when": Interval(0.3, 9.0)}
    denoise = flat.denoiser(CAPTION, Guidance(scale=SCFG(3.0), **slots), segment=OFFICIAL)
    sigmas, noise = flat.sigmas(8), flat.noise([0], (64, 64))
    x = noise() * math.sqrt(sigmas[0] ** 2 + 1)
    steps = [list(scfg.run(denoise, "dpmpp_2m", x, sigmas, noise)) for _ in range(2)]
    assert torch.equal(steps[0][-1].latent, steps[1][-1].latent) and steps[0][-1].latent.isfinite().all()
    given = [step.denoised.outputs for step in steps[0]]
    rows = sum(1 + (one.uncond is not None) + (one.perturbed is not None) for one in given)
    inside = sum(0.3 < step.sigma <= 9.0 for step in steps[0])
    assert 0 < inside < 8 and rows == 3 * inside + (8 - inside)  # what an interval saves, counted
    assert all(step.denoised.regions is not None for step in steps[0])  # found where nothing is guided too
    scales = [step.denoised.scale.std() for step in steps[0]]
    assert [scale > 0.05 for scale in scales] == [0.3 < step.sigma <= 9.0 for step in steps[0]]
    states = [step.denoised.state is not None for step in steps[0]]
    assert states == [0.3 < step.sigma <= 9.0 for step in steps[0]]


@pytest.mark.parametrize(
    "slots",
    [
        {"direction": APG()},
        {"direction": OptimizedScale()},
        {"perturb": PAG()},
        {"rescale": Rescale()},
        {"when": Ramp()},
        {"scale": Energy(4.0, 2.0)},
        {"scale": Product(SCFG(3.0), Energy(1.5, 0.8))},
    ],
    ids=lambda slots: type(next(iter(slots.values()))).__name__,
)
@pytest.mark.slow
def test_each_changes_the_picture_of_a_run_and_lets_gradients_through(flat, slots):
    guidance = Guidance(**{"scale": CFG(3.0)} | slots)
    plain, found = (list(flat.sample(CAPTION, one, steps=3))[-1].latent for one in (CFG(3.0), guidance))
    assert found.isfinite().all() and error(found, plain) > 1e-3
    x = (5 * seeded(1, 4, 16, 16)).requires_grad_()
    (gradient,) = torch.autograd.grad(flat.denoiser(CAPTION, guidance)(x, 5.0).x0.square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
