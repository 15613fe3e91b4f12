"""A guidance scale of its own by region."""

import pytest
import torch
from conftest import error, seeded
from handmade import LEFT, at, halves, one_of
from test_area import REGIONS

import scfg
from scfg import CFG, OFFICIAL, PAPER, SCFG, ByRegion, Guidance, Region, Schedule

SIGMAS = Schedule().sigmas
NOWHERE = "a mask is nowhere, or nearly: nothing of its own there"
OUTPUTS, MOMENT = at(3.0)


def test_a_region_acts_from_its_start_to_its_end():
    region = Region(scfg.foreground(), times=2.0, start=0.25, end=0.5)
    moments = [Schedule().moment(float(SIGMAS[t])) for t in (999, 700, 600, 400)]
    assert [region.acts(moment) for moment in moments] == [False, True, True, False]
    assert str(region) == "foreground: times 2, from 0.25, to 0.5"
    assert Region(scfg.foreground()).acts(Schedule().moment(0.0)) and Region(scfg.foreground()).acts(moments[0])


def test_a_region_is_given_as_an_area_or_as_its_description():
    for given in (scfg.words("car"), "car"):
        region = Region(given, scale=9.0)
        assert isinstance(region.area, scfg.Area) and str(region) == "car: scale 9"
        outputs, moment = at(3.0, pictures=slice(1, None))
        scale = ByRegion(CFG(5.0), (region,))(outputs, REGIONS, moment)
        assert scale[0, 0, 0].tolist() == [9.0] * 8 + [5.0] * 8 and (scale[0, 0, 6:] == 5).all()
    assert Region("car & ~red").area == scfg.words("car") & ~scfg.words("red")
    with pytest.raises(scfg.BadInput, match="words of the prompt, picture files or foreground"):
        Region("")


@pytest.mark.parametrize(
    "region",
    [
        Region(scfg.mask(torch.zeros(3, 4)), scale=9.0),
        Region(scfg.foreground()),
        Region(scfg.foreground(), scale=9.0, end=0.1),
        Region(scfg.foreground(), times=3.0, start=0.9),
    ],
    ids=["empty", "nothing", "over", "not yet"],
)
@pytest.mark.parametrize("base", [CFG(5.0), SCFG(5.0)], ids=["cfg", "scfg"])
def test_a_region_that_asks_for_nothing_or_is_nowhere_changes_no_bit(region, base):
    assert 0.1 < MOMENT.progress < 0.9
    plain, guided = (
        Guidance(scale=rule).combine(OUTPUTS, halves(), MOMENT) for rule in (base, ByRegion(base, (region,)))
    )
    assert torch.equal(guided.out, plain.out) and torch.equal(guided.scale, plain.scale)


def test_doubling_a_region_doubles_it_and_leaves_the_rest_exactly():
    """guided - uncond, what guidance adds up to, is scale times the difference."""
    for base in (CFG(5.0), SCFG(5.0)):
        plain = Guidance(scale=base).combine(OUTPUTS, halves(), MOMENT)
        assert base == CFG(5.0) or plain.scale.std() > 0.01
        twice = ByRegion(base, (Region(scfg.mask(LEFT), times=2.0),))
        doubled = Guidance(scale=twice).combine(OUTPUTS, halves(), MOMENT)
        assert torch.equal(doubled.scale[..., :8], 2 * plain.scale[..., :8])
        assert torch.equal(doubled.out[..., 8:], plain.out[..., 8:])
        added, added_twice = (guided.out - OUTPUTS.uncond for guided in (plain, doubled))
        assert error(added_twice[..., :8], 2 * added[..., :8]) < 1e-6


def test_regions_act_in_their_order_softly_and_in_their_time():
    late = Region(scfg.mask(LEFT), times=3.0, start=0.5)
    soft = ByRegion(CFG(4.0), (Region(scfg.mask(LEFT / 2), scale=8.0), late))
    a, b = (soft(*at(float(SIGMAS[t]))[:1], None, at(float(SIGMAS[t]))[1]) for t in (900, 100))
    assert a[0, 0, 0, 0] == 6 and b[0, 0, 0, 0] == 18 and torch.all(a[..., 8:] == 4) and torch.all(b[..., 8:] == 4)
    other_order = ByRegion(CFG(4.0), soft.regions[::-1])(OUTPUTS, None, Schedule().moment(float(SIGMAS[100])))
    assert other_order[0, 0, 0, 0] == 10  # half of 12 and half of 8


def test_an_area_that_is_nearly_nowhere_leaves_the_scale_and_is_told():
    tiny = torch.zeros(32, 32)
    tiny[0, 0] = 1
    nowhere = ByRegion(CFG(4.0), (Region(scfg.mask(tiny), scale=8.0),))
    assert torch.all(nowhere(OUTPUTS, None, MOMENT) == 4)
    assert {name: where.tolist() for name, where in nowhere.flags(None, MOMENT).items()} == {NOWHERE: [True]}
    somewhere = ByRegion(CFG(4.0), (Region(scfg.mask(LEFT), scale=8.0),))
    assert not somewhere.flags(None, MOMENT)[NOWHERE].any()
    over = ByRegion(CFG(4.0), (Region(scfg.mask(tiny), scale=8.0, end=0.01),))
    assert over.flags(None, MOMENT) == {}


def test_areas_of_a_batch_are_each_of_their_picture():
    masks = scfg.mask(torch.stack([LEFT, torch.zeros_like(LEFT)])[:, None])
    rule = ByRegion(CFG(4.0), (Region(masks, scale=8.0),))
    scale = rule(OUTPUTS, None, MOMENT)
    assert scale[0, 0, 0].tolist() == [8.0] * 8 + [4.0] * 8 and (scale[1] == 4).all()
    assert rule.flags(None, MOMENT)[NOWHERE].tolist() == [False, True]


def test_a_mask_of_two_pictures_for_three_is_one_line(flat):
    masks = scfg.mask(torch.stack([LEFT, LEFT])[:, None])
    rule = ByRegion(CFG(4.0), (Region(masks, scale=8.0),))
    x = 5 * seeded(3, 4, 16, 16)
    with pytest.raises(scfg.BadInput, match="^a mask is of 2 pictures, not of 3$"):
        flat.denoiser("a red car on grass", rule)(x, 5.0)
    flat.denoiser("a red car on grass", rule)(x[:2], 5.0)


def test_the_other_rules_flags_and_recipe_are_kept():
    flat = halves()._replace(scores=torch.ones(2, 5, 6, 8))
    base = SCFG(5.0, min_contrast=1.2)
    rule = ByRegion(base, (Region(scfg.mask(torch.zeros(4, 4)), scale=9.0),))
    assert rule.flags(flat, MOMENT).keys() == base.flags(flat, MOMENT).keys() | {NOWHERE}
    assert rule.flags(flat, MOMENT)["attention shows no regions: plain CFG there"].tolist() == [True, True]
    assert rule.recipe == OFFICIAL and ByRegion(SCFG.paper(5.0), ()).recipe == PAPER
    assert ByRegion(CFG(5.0), (Region(scfg.mask(LEFT)),)).recipe is None
    assert ByRegion(CFG(5.0), (Region("car"),)).recipe == ByRegion(CFG(5.0), (Region("foreground"),)).recipe == OFFICIAL


def test_a_words_scale_follows_the_picture_as_it_forms(flat):
    """In a run with CFG, which needs no maps of its own: they are read for the word."""
    rule, seen = ByRegion(CFG(3.0), (Region("car", scale=5.0),)), []
    for step in flat.sample("a red car left of a blue star on grass", rule, steps=4):
        regions, scale = step.denoised.regions, step.denoised.scale
        area = scfg.words("car")(regions, (16, 16))
        assert torch.equal(scale, torch.where(area > 0, 5.0, 3.0)) and 4 < area.sum() < 200
        seen.append(area)
    assert not torch.equal(seen[0], seen[-1])


@pytest.mark.parametrize("base", [CFG(5.0), SCFG(5.0)], ids=["cfg", "scfg"])
@pytest.mark.parametrize("direction", [None, "APG", "OptimizedScale"])
@pytest.mark.parametrize("others", [False, True], ids=["", "pag+rescale"])
def test_any_combination_is_finite_repeatable_and_independent_of_the_batch(base, direction, others):
    methods = pytest.importorskip("scfg.methods")
    rule = ByRegion(base, (Region(scfg.mask(LEFT), scale=9.0), Region(scfg.foreground(), times=0.5, end=0.6)))
    slots = {"perturb": methods.PAG(), "rescale": methods.Rescale()} if others else {}
    slots |= {"direction": direction and getattr(methods, direction)(), "when": methods.Ramp()}
    guidance, states = Guidance(scale=rule, **slots), [None] * 3
    for sigma in (9.0, 3.0):
        found = []
        for i, pictures in enumerate((slice(None), slice(None), slice(1, None))):
            outputs, moment = at(sigma, pictures=pictures)
            regions = halves() if i < 2 else one_of(halves())
            found.append(guidance.combine(outputs, regions, moment, states[i]))
            states[i] = found[-1].state
        assert found[0].scale.std() > 0.1
        assert found[0].out.isfinite().all() and torch.equal(found[0].out, found[1].out)
        assert error(found[2].out, found[0].out[1:]) < 1e-6 and error(found[2].scale, found[0].scale[1:]) < 1e-6
