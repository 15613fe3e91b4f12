import pytest
import torch
from conftest import DATA, error, seeded
from safetensors.torch import load_file
from test_segment import oracle_maps

from scfg import CFG, OFFICIAL, PAPER, SCFG, Guidance, Regions, segment

RECIPES = [SCFG, SCFG.paper, SCFG.mean]


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
    assert error(SCFG.paper(gamma)(data["eps_cond"] - data["eps_uncond"], segment(maps, PAPER)), expected) < 1e-5


def halves(b: int = 2, h: int = 6, w: int = 8) -> Regions:
    """Token 1 owns the left half and token 2 the right half; the foreground is everything."""
    tokens = torch.zeros(b, 5, h, w)
    tokens[:, 1, :, :w // 2] = 1
    tokens[:, 2, :, w // 2:] = 1
    return Regions(tokens, torch.ones(b, 1, h, w), tokens)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_rate_does_not_depend_on_the_size_of_the_difference(recipe):
    difference = seeded(2, 4, 12, 16)
    assert error(recipe(5.0)(100 * difference, halves()), recipe(5.0)(difference, halves())) < 1e-5


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_regions_are_plain_guidance(recipe):
    rows = {"uncond": seeded(2, 4, 12, 16), "cond": seeded(2, 4, 12, 16)}
    rows["cond"] = rows["uncond"] + torch.sign(seeded(2, 4, 12, 16, seed=3))                       # |d| is 2 everywhere
    guided, plain = (Guidance(scale=rule).combine(rows, halves(), 1.0) for rule in (recipe(5.0), CFG(5.0)))
    assert torch.allclose(guided.scale, plain.scale, rtol=1e-5)


def test_one_region_over_the_foreground_has_rate_one_there():
    regions = halves()._replace(foreground=halves().tokens[:, 1:2])
    scale = SCFG.paper(5.0)(seeded(2, 4, 12, 16), regions)
    assert torch.allclose(scale[..., :8], torch.full_like(scale[..., :8], 5.0))


def test_official_from_18_75_on_is_plain_15():
    rows = {"uncond": seeded(2, 4, 12, 16), "cond": seeded(2, 4, 12, 16, seed=1)}
    guided, plain = (Guidance(scale=rule).combine(rows, halves(), 1.0) for rule in (SCFG(18.75), CFG(15.0)))
    assert torch.allclose(guided.out, plain.out, atol=1e-4)


def test_without_a_foreground():
    regions, difference = halves()._replace(foreground=torch.zeros(2, 1, 6, 8)), seeded(2, 4, 12, 16)
    assert torch.allclose(SCFG(5.0)(difference, regions), torch.tensor(4.0))                       # the official clamp
    assert torch.equal(SCFG.paper(5.0)(difference, regions), torch.full((2, 1, 12, 16), 5.0))
    assert "no foreground" in SCFG.paper(5.0).notes(regions)[0] and SCFG.paper(5.0).notes(halves()) == ()


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
    twice = Guidance(scale=CFG(3.0), direction=lambda u, c, sigma, state: (2 * (c - u), "seen"))
    guided = twice.combine(rows, None, 1.0)
    assert error(guided.out, rows["uncond"] + 6 * (rows["cond"] - rows["uncond"])) < 1e-6 and guided.state == "seen"
    assert torch.equal(Guidance(scale=CFG(3.0), rescale=lambda guided, cond: cond).combine(rows, None, 1.0).out, rows["cond"])
    with pytest.raises(ValueError, match="no method yet"):
        Guidance(perturb="middle")
