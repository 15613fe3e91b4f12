from dataclasses import dataclass, replace

import pytest
import torch
from conftest import DATA, error, seeded
from handmade import SHAPE, at, halves, one_of, outputs
from safetensors.torch import load_file
from test_segment import oracle_maps

from scfg import CFG, OFFICIAL, PAPER, SCFG, BadInput, Guidance, Moment, Row, Schedule, attention, segment_maps
from scfg.config import SD1
from scfg.guidance import Guided, named_rule
from scfg.segment import CONDITIONAL

RULES = [SCFG, SCFG.paper, SCFG.mean, SCFG.conditional]
NOW = Schedule().moment(1.0)


def of(difference: torch.Tensor):
    """Outputs whose rows differ by so much."""
    uncond = seeded(*difference.shape, seed=8)
    return outputs(NOW, uncond + difference, uncond)._replace(difference=difference)


def guided(rule, now: Moment = NOW, regions=None, state=None, **slots) -> Guided:
    """What a rule, and whatever else, makes of the three rows by hand."""
    return Guidance(scale=rule, **slots).combine(at(now.sigma)[0], regions, now, state)


@dataclass(frozen=True)
class Away:
    """The least that the perturb slot takes: identity self-attention in the middle."""

    scale: float = 2.0
    layers: tuple[str, ...] = ("middle_block",)

    def attend(self, q, k, v, site):
        return v if site.kind == "self" and site.block.startswith("middle_block.") else attention(q, k, v, site)


def doubled(outputs, moment, state):
    """A direction that counts its steps."""
    return 2 * outputs.difference, (state or 0) + 1


@pytest.mark.parametrize("gamma", [3.0, 7.5, 20.0])
def test_official_rate_and_output(gamma):
    maps, data = oracle_maps()
    said = outputs(NOW, data["eps_cond"], data["eps_uncond"])
    found = Guidance(scale=SCFG(gamma)).combine(said, segment_maps(maps, OFFICIAL), NOW)
    assert error(found.scale / gamma, data[f"rate.{gamma}"]) < 1e-5
    assert error(found.out, data[f"eps.{gamma}"]) < 1e-5


@pytest.mark.parametrize("gamma", [3.0, 7.5, 20.0])
def test_paper_scale(gamma):
    maps, data = oracle_maps()
    expected = load_file(DATA / "segmentation.paper.safetensors")[f"scale.{gamma}"]
    said = outputs(NOW, data["eps_cond"], data["eps_uncond"])
    assert error(SCFG.paper(gamma)(said, segment_maps(maps, PAPER), NOW), expected) < 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_the_rate_does_not_depend_on_the_size_of_the_difference(rule):
    difference = seeded(*SHAPE)
    difference[..., :8] *= 3  # so that the rate is no constant
    large, small = (rule(5.0)(of(times * difference), halves(), NOW) for times in (100, 1))
    assert error(large, small) < 1e-5 and small.max() > 1.5 * small.min()


@pytest.mark.parametrize("rule", RULES)
def test_equal_regions_are_plain_guidance(rule):
    said = of(torch.sign(seeded(*SHAPE, seed=3)))  # |d| is 2 everywhere
    by_region, plain = (Guidance(scale=r).combine(said, halves(), NOW) for r in (rule(5.0), CFG(5.0)))
    assert torch.allclose(by_region.scale, plain.scale, rtol=1e-5)


def test_one_region_over_the_foreground_has_rate_one_there():
    regions = halves()._replace(foreground=halves().tokens[:, 1:2])
    difference = seeded(*SHAPE)
    difference[..., 8:] *= 2
    scale = SCFG.paper(5.0)(of(difference), regions, NOW)
    assert torch.allclose(scale[..., :8], torch.full_like(scale[..., :8], 5.0))
    assert (scale[..., 8:] < 4).all()  # the other region's is brought down


@pytest.mark.parametrize("rule", RULES)
def test_every_region_s_share_is_brought_to_one_level(rule):
    """gamma * U / D_i (eq. 13), away from the border, which the official rule blurs."""
    difference, regions = seeded(*SHAPE), halves()
    difference[..., 8:] *= 1.5
    regions = regions._replace(foreground=regions.tokens[:, 1:2])
    scale, norm = rule(4.0)(of(difference), regions, NOW), difference.norm(dim=1, keepdim=True)
    left, right = (half.mean((-2, -1), keepdim=True) for half in (norm[..., :8], norm[..., 8:]))
    level = left if rule != SCFG.mean else norm.mean((-2, -1), keepdim=True)
    rates = [level / own if rule == SCFG.paper else (level / own).clamp(0.8, 3) for own in (left, right)]
    assert torch.allclose(scale[..., :7], 4 * rates[0].expand(-1, -1, 12, 7), rtol=1e-5)
    assert torch.allclose(scale[..., 9:], 4 * rates[1].expand(-1, -1, 12, 7), rtol=1e-5)
    assert not torch.allclose(rates[0], rates[1], rtol=0.1)


def test_the_named_variants_differ_in_what_they_are_named_after():
    assert [rule(5.0).recipe for rule in RULES] == [OFFICIAL, PAPER, OFFICIAL, CONDITIONAL]
    assert [rule(5.0).benchmark for rule in RULES] == ["foreground", "foreground", "image", "foreground"]
    assert [(rule(5.0).smooth, rule(5.0).rate_range, rule(5.0).max_scale) for rule in RULES[:2]] == [
        (True, (0.8, 3.0), 15.0),
        (False, None, None),
    ]
    assert all(rule(5.0).min_contrast == 0 for rule in RULES)  # exact, no fallback unless asked for
    for rule in (CFG, *RULES):
        with pytest.raises(TypeError, match="gamma"):
            rule()


def test_official_from_18_75_on_is_plain_15():
    by_region, plain = guided(SCFG(18.75), regions=halves()), guided(CFG(15.0))
    assert torch.allclose(by_region.out, plain.out, atol=1e-4)


def test_without_a_foreground():
    regions, said = halves()._replace(foreground=torch.zeros(2, 1, 6, 8)), of(seeded(*SHAPE))
    assert torch.allclose(SCFG(5.0)(said, regions, NOW), torch.tensor(4.0))  # the official clamp
    assert torch.equal(SCFG.paper(5.0)(said, regions, NOW), torch.full((2, 1, 12, 16), 5.0))
    for rule, instead in ((SCFG(5.0), "rate 0.8 there"), (SCFG.paper(5.0), "plain CFG there")):
        ((message, where),) = rule.flags(regions, NOW).items()
        assert message == f"no foreground found: {instead}" and where.tolist() == [True, True]
        assert not rule.flags(halves(), NOW)[message].any()
    half = halves()._replace(foreground=torch.cat([torch.zeros(1, 1, 6, 8), torch.ones(1, 1, 6, 8)]))
    assert SCFG(5.0).flags(half, NOW)["no foreground found: rate 0.8 there"].tolist() == [True, False]
    assert SCFG.mean(5.0).flags(regions, NOW) == {}  # which compares with the whole picture


def test_with_all_rates_one_the_output_is_cfg_bit_for_bit():
    difference = seeded(*SHAPE)
    difference[..., :8] *= 2
    only_one, said = SCFG(7.3, rate_range=(1.0, 1.0)), of(difference)
    a, b, free = (Guidance(scale=rule).combine(said, halves(), NOW) for rule in (only_one, CFG(7.3), SCFG(7.3)))
    assert torch.equal(a.out, b.out) and torch.equal(a.scale, b.scale) and not torch.equal(free.out, b.out)


def test_slots_act_where_their_names_say():
    said, _ = at(1.0)
    twice = guided(CFG(3.0), direction=lambda outputs, moment, state: (2 * outputs.difference, "seen"))
    assert error(twice.out, said.cond + 4 * (said.cond - said.uncond)) < 1e-6 and twice.state == "seen"
    assert torch.equal(guided(CFG(3.0), rescale=lambda found, cond: cond).out, said.cond)
    away = guided(CFG(3.0), perturb=Away(2.0))
    assert error(away.out, said.cond + 2 * (said.cond - said.uncond) + 2 * (said.cond - said.perturbed)) < 1e-6


def test_rescaling_comes_last_and_is_given_the_guided_and_the_conditional_output():
    said, given = at(1.0)[0], []
    slots = {"direction": doubled, "perturb": Away()}
    found = guided(CFG(3.0), rescale=lambda *both: given.append(both) or both[0] / 2, **slots)
    ((before, cond),) = given
    assert torch.equal(cond, said.cond) and torch.equal(before, guided(CFG(3.0), **slots).out)
    assert torch.equal(found.out, before / 2)


def test_when_says_how_strongly_and_where_it_is_zero_only_the_conditional_row_counts():
    late = Guidance(scale=CFG(3.0), when=lambda moment: moment.sigma > 1, perturb=Away(), direction=doubled)
    above, below = Schedule().moment(2.0), Schedule().moment(0.5)
    assert [row.name for row in late.rows(above)] == ["uncond", "cond", "perturbed"]
    assert late.rows(below) == (Row("cond", "cond"),)
    said, _ = at(0.5)
    alone = said._replace(uncond=None, perturbed=None, difference=None)
    found = late.combine(alone, None, below)
    assert torch.equal(found.out, said.cond) and torch.equal(found.scale, torch.ones(2, 1, 12, 16))
    assert found.flags == {} and found.state is None
    half = guided(CFG(5.0), when=lambda moment: 0.5)
    assert torch.equal(half.scale, torch.full_like(half.scale, 3.0))
    assert error(half.out, guided(CFG(3.0)).out) < 1e-6
    half = guided(CFG(1.0), when=lambda moment: 0.5, perturb=Away(2.0))
    assert torch.equal(half.out, guided(CFG(1.0), perturb=Away(1.0)).out)
    assert torch.equal(guided(CFG(5.0), when=lambda moment: True).out, guided(CFG(5.0)).out)


def test_rows_are_what_a_step_must_evaluate():
    assert Guidance(scale=CFG(5.0)).rows(NOW) == (Row("uncond", "uncond"), Row("cond", "cond"))
    *two, perturbed = Guidance(scale=CFG(5.0), perturb=(away := Away())).rows(NOW)
    assert tuple(two) == Guidance(scale=CFG(5.0)).rows(NOW)
    assert perturbed == Row("perturbed", "cond", away.attend)


def test_identities_are_exact():
    """Scale 1 is the conditional output; a perturbation of scale 0 and a rescaling to itself do nothing."""
    plain = guided(CFG(5.0))
    assert torch.equal(guided(CFG(1.0)).out, at(1.0)[0].cond)
    assert torch.equal(guided(CFG(5.0), perturb=Away(0.0)).out, plain.out)
    assert torch.equal(guided(CFG(5.0), rescale=lambda found, cond: found).out, plain.out)
    assert torch.equal(guided(CFG(5.0), direction=lambda outputs, *others: (outputs.difference, None)).out, plain.out)


EVERY_SLOT = {
    "direction": doubled,
    "perturb": Away(),
    "rescale": lambda found, cond: torch.lerp(found, cond, 0.3),
    "when": lambda moment: 0.5 + moment.progress / 2,
}


@pytest.mark.parametrize("rule", [rule(5.0) for rule in (CFG, *RULES)], ids=["cfg", "scfg", "paper", "mean", "cond"])
@pytest.mark.parametrize("slots", [{}, EVERY_SLOT], ids=["", "every slot"])
def test_any_combination_is_finite_repeatable_and_independent_of_the_batch(rule, slots):
    guidance, states, regions = Guidance(scale=rule, **slots), [None] * 3, halves()
    for sigma in (9.0, 3.0):
        found = []
        for i, (pictures, where) in enumerate([(slice(None), regions)] * 2 + [(slice(1, None), one_of(regions))]):
            said, now = at(sigma, pictures=pictures)
            found.append(guidance.combine(said, where, now, states[i]))
            states[i] = found[-1].state
        assert found[0].out.isfinite().all() and torch.equal(found[0].out, found[1].out)
        assert error(found[2].out, found[0].out[1:]) < 1e-6 and error(found[2].scale, found[0].scale[1:]) < 1e-6
    assert (rule == CFG(5.0)) == bool((found[0].scale == found[0].scale[0, 0, 0, 0]).all())


def test_a_step_without_guidance_ends_what_a_direction_remembers():
    guidance = Guidance(direction=doubled, scale=CFG(3.0), when=lambda moment: moment.sigma > 1)
    above, below, state, states = Schedule().moment(1.5), Schedule().moment(0.5), None, []
    for moment in (above, above, below, above):
        state = guidance.combine(at(moment.sigma)[0], None, moment, state).state
        states.append(state)
    assert states == [1, 2, None, 1]


def test_printing_a_guidance_shows_the_order_and_the_rows():
    slots = {"direction": doubled, "rescale": lambda found, cond: found, "when": lambda moment: 1.0}
    lines = str(Guidance(perturb=Away(), scale=SCFG(7.5), **slots)).splitlines()
    assert [line.split(":")[0] for line in lines] == ["direction", "scale", "perturb", "rescale", "when", "rows a step"]
    assert lines[-1] == "rows a step: 3 (uncond, cond, perturbed); 1 (cond) where `when` is 0"
    assert str(Guidance(scale=CFG(5.0))).splitlines() == ["scale: CFG(gamma=5.0)", "rows a step: 2 (uncond, cond)"]


def test_a_guidance_is_frozen_and_needs_a_scale():
    with pytest.raises(TypeError, match="scale"):
        Guidance(direction=doubled)
    with pytest.raises(AttributeError):
        Guidance(scale=CFG(5.0)).scale = CFG(3.0)


@pytest.mark.parametrize("scale", [5.0, 5])
def test_a_number_is_no_guidance(scale):
    with pytest.raises(BadInput, match=r"CFG\(") as caught:
        Guidance(scale=scale)
    assert repr(scale) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("slot", ["scale", "direction", "rescale", "when", "perturb"])
def test_a_slot_that_cannot_be_called_is_named(slot):
    with pytest.raises(BadInput, match=slot) as caught:
        Guidance(**{"scale": CFG(5.0)} | {slot: "0.7"})
    assert "'0.7'" in str(caught.value) and "\n" not in str(caught.value)


def test_flat_maps_are_plain_guidance_and_say_so():
    flat, said, sentence = (
        halves()._replace(scores=torch.ones(2, 5, 6, 8)),
        of(seeded(*SHAPE)),
        "attention shows no regions",
    )
    sentence = f"{sentence}: plain CFG there"
    said.difference[..., :8] *= 2
    assert flat.contrast().flatten().tolist() == [1, 1]
    rule = SCFG(5.0, min_contrast=1.2)
    assert torch.all(rule(said, flat, NOW) == 5) and rule.flags(flat, NOW)[sentence].tolist() == [True, True]
    assert not any(where.any() for where in rule.flags(halves(), NOW).values())
    assert torch.equal(rule(said, halves(), NOW), SCFG(5.0)(said, halves(), NOW))
    assert not torch.all(rule(said, halves(), NOW) == 5)
    mixed = flat._replace(scores=torch.stack([flat.scores[0], halves().scores[1]]))
    assert rule.flags(mixed, NOW)[sentence].tolist() == [True, False]
    scale = rule(said, mixed, NOW)
    assert torch.all(scale[0] == 5) and torch.equal(scale[1], SCFG(5.0)(said, halves(), NOW)[1])
    without = mixed._replace(foreground=torch.zeros(2, 1, 6, 8))  # what flat maps say of the foreground is not said
    assert [where.tolist() for where in rule.flags(without, NOW).values()] == [[True, False], [False, True]]
    assert sentence not in SCFG(5.0).flags(flat, NOW)  # without a threshold there is none


def test_named_rules_have_the_fallback_that_their_config_asks_for():
    names = {"cfg": CFG, "scfg": SCFG, "scfg-paper": SCFG.paper, "scfg-mean": SCFG.mean, "scfg-cond": SCFG.conditional}
    for name, rule in names.items():
        assert named_rule(name, 5.0, SD1) == rule(5.0)  # none there
    flat = replace(SD1, min_contrast=(1.31, 1.18))
    found = {name: getattr(named_rule(name, 5.0, flat), "min_contrast", None) for name in names}
    assert found == {"cfg": None, "scfg": 1.31, "scfg-paper": 1.18, "scfg-mean": 1.31, "scfg-cond": 1.31}
    assert all(named_rule(name, 5.0, flat).gamma == 5 for name in names)


class Least:
    """A rule that is no more than callable."""

    def __call__(self, outputs, regions, moment):
        assert regions is None
        return 2 + moment.progress


def test_a_rule_is_any_callable_that_gives_a_number_or_a_map():
    half = torch.ones(1, 1, 12, 16)
    half[..., :8] = 4
    plain = guided(CFG(3.0))
    for number in (3.0, 3, torch.tensor(3.0), torch.full((1, 1, 1, 1), 3.0)):
        found = guided(lambda outputs, regions, moment: number)
        assert torch.equal(found.out, plain.out) and torch.equal(found.scale, plain.scale) and found.flags == {}
    by_map = guided(lambda outputs, regions, moment: half)
    assert torch.equal(by_map.scale, half.expand(2, 1, 12, 16))
    assert torch.equal(by_map.out[..., :8], guided(CFG(4.0)).out[..., :8])
    assert torch.equal(by_map.out[..., 8:], at(1.0)[0].cond[..., 8:])
    own = torch.tensor([2.0, 3.0])[:, None, None, None]  # of each picture
    assert torch.equal(guided(lambda *given: own).out[1], plain.out[1])
    assert torch.equal(guided(Least()).out, guided(CFG(2 + NOW.progress)).out)
    assert Guidance(scale=Least()).recipe is None and Guidance(scale=SCFG(3.0)).recipe == OFFICIAL


@pytest.mark.parametrize(
    "value, named",
    [
        (None, "None"),
        ("3", "'3'"),
        (torch.ones(2), "(2,)"),  # of the batch
        (torch.ones(1), "(1,)"),
        (torch.ones(12, 16), "(12, 16)"),
        (torch.ones(2, 12, 16), "(2, 12, 16)"),
        (torch.ones(2, 1, 12, 17), "(2, 1, 12, 17)"),
        (torch.ones(2, 1, 6, 8), "(2, 1, 6, 8)"),
        (torch.ones(3, 1, 12, 16), "(3, 1, 12, 16)"),
        (torch.ones(2, 4, 12, 16), "(2, 4, 12, 16)"),  # a scale a channel
        (torch.ones(1, 2, 1, 12, 16), "(1, 2, 1, 12, 16)"),
    ],
)
def test_what_a_rule_cannot_give_is_refused_in_one_line(value, named):
    with pytest.raises(BadInput) as caught:
        guided(lambda outputs, regions, moment: value)
    expected = f"a rule gives a number or a scale map of (2, 1, 12, 16), not {named}"
    assert str(caught.value) == expected


def test_a_rule_is_given_what_the_direction_slot_made_of_the_difference():
    given = []
    guided(
        lambda outputs, regions, moment: given.append((outputs, regions, moment)) or 3.0,
        regions=halves(),
        direction=doubled,
    )
    ((seen, regions, moment),), (said, _) = given, at(1.0)
    assert torch.equal(seen.difference, 2 * (said.cond - said.uncond)) and moment is NOW
    assert all(torch.equal(a, b) for a, b in zip(regions[:3], halves()[:3]))
    for name in ("x", "cond", "uncond", "perturbed", "x0"):
        assert torch.equal(getattr(seen, name), getattr(said, name))


def test_a_rule_s_flags_are_handed_on():
    class Flagged(Least):
        def flags(self, regions, moment):
            return {"late": torch.tensor([False, True])}

    assert guided(Flagged()).flags["late"].tolist() == [False, True]
    assert guided(Flagged(), when=lambda moment: 0.0).flags == {}  # where it does not act
