import pytest
import torch
from conftest import DATA, error, seeded
from safetensors.torch import load_file
from test_segment import oracle_maps

import scfg
from scfg import (APG, CFG, OFFICIAL, PAG, PAPER, SCFG, ByRegion, Energy, Guidance, Interval, Product, Ramp, Region, Regions, Rescale, ZeroStar,
                  segment)
from scfg.noise import SIGMAS

RECIPES = [SCFG, SCFG.paper, SCFG.mean, SCFG.conditional]


@pytest.mark.parametrize("gamma", [3.0, 7.5, 20.0])
def test_official_rate_and_output(gamma):
    maps, data = oracle_maps()
    guided = Guidance(scale=SCFG(gamma)).combine({"uncond": data["eps_uncond"], "cond": data["eps_cond"]}, segment(maps, OFFICIAL), 1.0)
    assert error(guided.scale / gamma, data[f"rate.{gamma}"]) < 1e-5
    assert error(guided.out, data[f"eps.{gamma}"]) < 1e-5


@pytest.mark.parametrize("gamma", [3.0, 7.5, 20.0])
def test_paper_scale(gamma):
    maps, data = oracle_maps()
    expected = load_file(DATA / "segmentation.paper.safetensors")[f"scale.{gamma}"]
    assert error(SCFG.paper(gamma)(data["eps_cond"] - data["eps_uncond"], segment(maps, PAPER), 1.0), expected) < 1e-5


def halves(b: int = 2, h: int = 6, w: int = 8) -> Regions:
    """Token 1 owns the left half and token 2 the right half; the foreground is everything."""
    tokens = torch.zeros(b, 5, h, w)
    tokens[:, 1, :, :w // 2] = 1
    tokens[:, 2, :, w // 2:] = 1
    return Regions(tokens, torch.ones(b, 1, h, w), tokens + 0.01)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rate_does_not_depend_on_the_size_of_the_difference(recipe):
    difference = seeded(2, 4, 12, 16)
    assert error(recipe(5.0)(100 * difference, halves(), 1.0), recipe(5.0)(difference, halves(), 1.0)) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_regions_are_plain_guidance(recipe):
    rows = {"uncond": seeded(2, 4, 12, 16), "cond": seeded(2, 4, 12, 16)}
    rows["cond"] = rows["uncond"] + torch.sign(seeded(2, 4, 12, 16, seed=3))                       # |d| is 2 everywhere
    guided, plain = (Guidance(scale=rule).combine(rows, halves(), 1.0) for rule in (recipe(5.0), CFG(5.0)))
    assert torch.allclose(guided.scale, plain.scale, rtol=1e-5)


def test_one_region_over_the_foreground_has_rate_one_there():
    regions = halves()._replace(foreground=halves().tokens[:, 1:2])
    scale = SCFG.paper(5.0)(seeded(2, 4, 12, 16), regions, 1.0)
    assert torch.allclose(scale[..., :8], torch.full_like(scale[..., :8], 5.0))


def test_official_from_18_75_on_is_plain_15():
    rows = {"uncond": seeded(2, 4, 12, 16), "cond": seeded(2, 4, 12, 16, seed=1)}
    guided, plain = (Guidance(scale=rule).combine(rows, halves(), 1.0) for rule in (SCFG(18.75), CFG(15.0)))
    assert torch.allclose(guided.out, plain.out, atol=1e-4)


def test_without_a_foreground():
    regions, difference = halves()._replace(foreground=torch.zeros(2, 1, 6, 8)), seeded(2, 4, 12, 16)
    assert torch.allclose(SCFG(5.0)(difference, regions, 1.0), torch.tensor(4.0))                       # the official clamp
    assert torch.equal(SCFG.paper(5.0)(difference, regions, 1.0), torch.full((2, 1, 12, 16), 5.0))
    assert "no foreground" in SCFG.paper(5.0).notes(regions, 1.0)[0].what and SCFG.paper(5.0).notes(halves(), 1.0) == ()


def test_with_all_rates_one_the_output_is_cfg_bit_for_bit():
    rows = {"uncond": seeded(2, 4, 12, 16), "cond": seeded(2, 4, 12, 16, seed=1)}
    only_one = SCFG(7.3, limits=(1.0, 1.0))
    a, b = (Guidance(scale=rule).combine(rows, halves(), 1.0) for rule in (only_one, CFG(7.3)))
    assert torch.equal(a.out, b.out)


def test_slots_act_where_their_names_say():
    rows = {"uncond": seeded(1, 4, 3, 3), "cond": seeded(1, 4, 3, 3, seed=1)}
    late = Guidance(scale=CFG(3.0), when=lambda sigma: sigma > 1)
    assert late.rows(2.0) == ("uncond", "cond") and late.rows(0.5) == ("cond",)
    assert torch.equal(late.combine({"cond": rows["cond"]}, None, 0.5).out, rows["cond"])
    twice = Guidance(scale=CFG(3.0), direction=lambda outputs, state: (2 * (outputs.cond - outputs.uncond), "seen"))
    guided = twice.combine(rows, None, 1.0)
    assert error(guided.out, rows["cond"] + 4 * (rows["cond"] - rows["uncond"])) < 1e-6 and guided.state == "seen"
    assert torch.equal(Guidance(scale=CFG(3.0), rescale=lambda guided, cond: cond).combine(rows, None, 1.0).out, rows["cond"])


ROWS = {"uncond": seeded(2, 4, 12, 16), "cond": seeded(2, 4, 12, 16, seed=1), "perturbed": seeded(2, 4, 12, 16, seed=2)}
LEFT = torch.zeros(12, 16)
LEFT[:, :8] = 1
RULES = [CFG(5.0), SCFG(5.0), SCFG.paper(5.0), SCFG.mean(5.0), Energy(7.0, 4.0), Product(SCFG(5.0), Energy(1.5, 0.8)),
         ByRegion(SCFG(5.0), (Region(scfg.mask(LEFT), scale=9.0), Region(scfg.foreground(), times=0.5, end=0.6)))]


def test_identities_are_exact():
    """scale 1 is the conditional output; eta 1 without limit and momentum is CFG; phi 0, a zero-width interval and an empty region do nothing."""
    plain = Guidance(scale=CFG(5.0)).combine(ROWS, halves(), 3.0)
    assert torch.equal(Guidance(scale=CFG(1.0)).combine(ROWS, halves(), 3.0).out, ROWS["cond"])
    assert torch.equal(Guidance(direction=APG(1.0, None, 0.0), scale=CFG(5.0)).combine(ROWS, halves(), 3.0).out, plain.out)
    assert torch.equal(Guidance(scale=CFG(5.0), rescale=Rescale(0.0)).combine(ROWS, halves(), 3.0).out, plain.out)
    assert torch.equal(Guidance(perturb=PAG(0.0), scale=CFG(5.0)).combine(ROWS, halves(), 3.0).out, plain.out)
    nothing = Guidance(scale=CFG(5.0), when=Interval(3.0, 3.0))
    assert nothing.rows(3.0) == ("cond",) and torch.equal(nothing.combine({"cond": ROWS["cond"]}, None, 3.0).out, ROWS["cond"])
    for region in (Region(scfg.mask(torch.zeros(3, 4)), scale=9.0), Region(scfg.foreground()), Region(scfg.foreground(), scale=9.0, end=0.1)):
        guided = Guidance(scale=ByRegion(CFG(5.0), (region,))).combine(ROWS, halves(), 3.0)
        assert torch.equal(guided.out, plain.out) and torch.equal(guided.scale, plain.scale)
    assert torch.equal(Guidance(scale=CFG(5.0), when=lambda sigma: True).combine(ROWS, halves(), 3.0).out, plain.out)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("direction", [None, APG(), ZeroStar()], ids=["plain", "apg", "zero"])
@pytest.mark.parametrize("others", [{}, {"perturb": PAG(), "rescale": Rescale()}], ids=["", "pag+rescale"])
def test_any_combination_is_finite_repeatable_and_independent_of_the_batch(rule, direction, others):
    guidance, states, regions = Guidance(direction=direction, scale=rule, when=Ramp(), **others), [None] * 4, halves()
    one = Regions(*(values[1:] for values in regions[:3]))
    for sigma in (9.0, 3.0):
        found = []
        for i, (rows, where) in enumerate([(ROWS, regions), (ROWS, regions), ({k: v[1:] for k, v in ROWS.items()}, one)]):
            found.append(guidance.combine(rows, where, sigma, states[i], 0.1 * rows["cond"] + 1, -2.0))
            states[i] = found[-1].state
        assert found[0].out.isfinite().all() and torch.equal(found[0].out, found[1].out)
        assert error(found[2].out, found[0].out[1:]) < 1e-6 and error(found[2].scale, found[0].scale[1:]) < 1e-6


def test_doubling_a_region_doubles_it_and_leaves_the_rest_exactly():
    """guided - uncond, what guidance adds up to, is scale times the difference."""
    for base in (CFG(5.0), SCFG(5.0)):
        plain = Guidance(scale=base).combine(ROWS, halves(), 3.0)
        doubled = Guidance(scale=ByRegion(base, (Region(scfg.mask(LEFT), times=2.0),))).combine(ROWS, halves(), 3.0)
        assert torch.equal(doubled.scale[..., :8], 2 * plain.scale[..., :8]) and torch.equal(doubled.out[..., 8:], plain.out[..., 8:])
        added, twice = (guided.out - ROWS["uncond"] for guided in (plain, doubled))
        assert error(twice[..., :8], 2 * added[..., :8]) < 1e-6


def test_regions_act_in_their_order_softly_and_in_their_time():
    soft = ByRegion(CFG(4.0), (Region(scfg.mask(LEFT / 2), scale=8.0), Region(scfg.mask(LEFT), times=3.0, start=0.5)))
    early, late = (soft(ROWS["cond"], None, float(SIGMAS[t])) for t in (900, 100))
    assert early[0, 0, 0, 0] == 6 and late[0, 0, 0, 0] == 18 and torch.all(late[..., 8:] == 4)
    tiny = torch.zeros(32, 32)
    tiny[0, 0] = 1
    nowhere = ByRegion(CFG(4.0), (Region(scfg.mask(tiny), scale=8.0),))
    assert torch.all(nowhere(ROWS["cond"], None, 3.0) == 4)
    assert list(map(str, nowhere.notes(None, 3.0))) == ["a mask is nowhere, or nearly: nothing of its own there"]


def test_apg_against_the_formula_in_float64():
    """2410.02416, algorithm 1, on x0 = gain * out + offset, with momentum over two steps."""
    apg, gain, offset = APG(eta=0.2, limit=3.0, momentum=-0.5), -2.5, seeded(2, 4, 12, 16, seed=7).double()
    guidance, state, running = Guidance(direction=apg, scale=CFG(6.0)), None, 0
    for seed in (1, 2):
        uncond, cond = seeded(2, 4, 12, 16, seed=seed).double(), seeded(2, 4, 12, 16, seed=seed + 10).double()
        guided = guidance.combine({"uncond": uncond, "cond": cond}, None, 1.0, state, gain * cond + offset, gain)
        state = guided.state
        c, u = gain * cond + offset, gain * uncond + offset
        running = c - u - 0.5 * running
        step = running * (3.0 / running.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None, None]
        unit = c / c.flatten(1).norm(dim=1)[:, None, None, None]
        parallel = (step * unit).sum((1, 2, 3), keepdim=True) * unit
        assert error(gain * guided.out + offset, c + 5 * (step - parallel + 0.2 * parallel)) < 1e-7


def test_a_ramp_and_an_interval_say_when():
    linear, cosine = Ramp(0.0, 2.0), Ramp(0.5, 1.5, "cosine")
    assert [linear(float(SIGMAS[t])) for t in (999, 0)] == [0, 2] and cosine(float(SIGMAS[999])) == 0.5 and cosine(float(SIGMAS[0])) == 1.5
    assert Guidance(when=linear).rows(float(SIGMAS[-1])) == ("cond",) and Guidance(when=linear).rows(1.0) == ("uncond", "cond")
    half = Guidance(scale=CFG(5.0), when=lambda sigma: 0.5).combine(ROWS, None, 1.0)
    assert torch.equal(half.scale, torch.full_like(half.scale, 3.0))
    assert [Interval(1.0, 2.0)(sigma) for sigma in (1.0, 1.5, 2.0, 2.5)] == [0, 1, 1, 0]


def test_two_recipes_of_one_step_are_refused():
    with pytest.raises(scfg.BadInput, match="segmented by one recipe"):
        Product(SCFG(2.0), SCFG.paper(1.0)).segmentation
    assert Product(SCFG(2.0), CFG(1.0)).segmentation == Product(Energy(), SCFG(2.0)).segmentation == OFFICIAL


def test_a_step_without_guidance_ends_what_a_direction_remembers():
    guidance = Guidance(direction=APG(), scale=CFG(3.0), when=Interval(1.0, 2.0))
    guided = guidance.combine(ROWS, None, 1.5)
    assert guided.state is not None and guidance.combine(ROWS, None, 0.5, guided.state).state is None


def test_rescaling_nothing_leaves_a_constant():
    assert torch.equal(Rescale(0.0)(torch.ones(1, 4, 3, 3), seeded(1, 4, 3, 3)), torch.ones(1, 4, 3, 3))


def test_printing_a_guidance_shows_the_order_and_the_rows():
    everything = Guidance(perturb=PAG(), direction=APG(), scale=SCFG(7.5), rescale=Rescale(), when=Interval(0.3, 5.0))
    lines = str(everything).splitlines()
    assert [line.split(":")[0] for line in lines] == ["direction", "scale", "perturb", "rescale", "when", "rows a step"]
    assert lines[-1] == "rows a step: 3 (uncond, cond, perturbed); 1 (cond) where `when` is 0"
    assert str(Guidance(scale=CFG(5.0))).splitlines()[-1] == "rows a step: 2 (uncond, cond)"


def test_a_number_is_no_guidance():
    with pytest.raises(scfg.BadInput, match=r"a scale of 5 needs a rule: CFG\(5\) guides plainly"):
        Guidance(scale=5.0)


def test_flat_maps_are_plain_guidance_and_say_so():
    flat = halves()._replace(scores=torch.ones(2, 5, 6, 8))
    assert flat.contrast().flatten().tolist() == [1, 1]
    rule = SCFG(5.0, contrast=1.2)
    assert torch.all(rule(ROWS["cond"], flat, 1.0) == 5) and list(map(str, rule.notes(flat, 1.0))) == ["attention shows no regions: plain CFG there"]
    assert rule.notes(halves(), 1.0) == () and not torch.all(rule(ROWS["cond"], halves(), 1.0) == 5)
    mixed = flat._replace(scores=torch.stack([flat.scores[0], halves().scores[1]]))
    assert list(map(str, rule.notes(mixed, 1.0))) == ["attention shows no regions in picture 0 of the batch: plain CFG there"]
    without = mixed._replace(foreground=torch.zeros(2, 1, 6, 8))              # what flat maps say of the foreground is not said
    assert [note.pictures for note in rule.notes(without, 1.0)] == [(1,), (0,)]
