import pytest
import torch
from conftest import DATA, seeded
from safetensors.torch import load_file
from torch.nn import functional as F

from scfg import OFFICIAL, PAPER, Maps, Recipe, Tokens, Word, segment_maps
from scfg.segment import CONDITIONAL, blur


def oracle_maps() -> tuple[list[Maps], dict]:
    data = load_file(DATA / "segmentation.safetensors")
    names = sorted(name.removeprefix("self_") for name in data if name.startswith("self_"))
    sides = {"4": (8, 8), "8": (4, 4)}
    return [Maps(data[f"self_{name}"], data[f"cross_{name}"], sides[name[0]]) for name in names], data


def test_official_recipe_element_for_element():
    maps, data = oracle_maps()
    regions = segment_maps(maps)
    assert torch.equal(regions.tokens, data["region_mask"])
    assert torch.equal(regions.foreground, data["foreground_mask"])


def test_paper_recipe_element_for_element():
    maps, _ = oracle_maps()
    data, regions = load_file(DATA / "segmentation.paper.safetensors"), segment_maps(maps, PAPER)
    assert torch.equal(regions.tokens.argmax(1), data["region"])
    assert torch.equal(regions.foreground, data["foreground"])


def random_maps(rows: int, height: int, width: int, tokens: int = 9) -> Maps:
    n = height * width
    return Maps(seeded(rows, n, n).softmax(-1), (3 * seeded(rows, n, tokens, seed=1)).softmax(-1), (height, width))


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_a_batch_equals_its_pictures_one_by_one(recipe):
    maps = [random_maps(8, 6, 10), random_maps(8, 3, 5)]
    together = segment_maps(maps, recipe)
    for i in range(4):
        alone = segment_maps([Maps(m.self[[i, 4 + i]], m.cross[[i, 4 + i]], m.size) for m in maps], recipe)
        assert torch.allclose(alone.scores[0], together.scores[i], rtol=1e-5)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.foreground[0], together.foreground[i])


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_permuting_tokens_permutes_regions(recipe):
    maps, order = random_maps(2, 5, 7), torch.tensor([0, 4, 2, 8, 1, 3, 7, 6, 5])
    straight = segment_maps([maps], recipe)
    permuted = segment_maps([maps._replace(cross=maps.cross[..., order])], recipe)
    assert torch.equal(permuted.tokens, straight.tokens[:, order])
    assert torch.equal(permuted.foreground, straight.foreground)


def test_ties_belong_to_all_officially_and_to_the_first_in_the_paper():
    uniform = Maps(torch.full((2, 4, 4), 0.25), torch.full((2, 4, 3), 1 / 3), (2, 2))
    assert segment_maps([uniform], OFFICIAL).tokens.sum() == 12
    in_the_paper = segment_maps([uniform], PAPER).tokens
    assert in_the_paper[:, 0].sum() == in_the_paper.sum() == 4


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_a_token_that_nothing_attends_to_owns_nothing(recipe):
    maps = random_maps(2, 5, 7)
    without = segment_maps([maps._replace(cross=F.pad(maps.cross, (0, 3)))], recipe)
    straight = segment_maps([maps], recipe)
    assert torch.allclose(without.scores[:, :9], straight.scores, rtol=1e-5) and not without.scores[:, 9:].any()
    assert torch.equal(without.tokens[:, :9], straight.tokens)
    assert not without.tokens[:, 9:].any() and torch.equal(without.foreground, straight.foreground)
    assert torch.allclose(without.contrast(), straight.contrast())


def test_completion_is_the_polynomial_of_the_self_map():
    maps = random_maps(2, 3, 4)
    s, c = maps.self.double(), maps.cross.double()
    expected = {OFFICIAL: (s + 3 * s @ s) @ c / 4, PAPER: (s + s @ s + s @ s @ s + s @ s @ s @ s) @ c / 4}
    for recipe, value in expected.items():
        assert torch.allclose(recipe.complete(maps).flatten(2).mT.double(), value, atol=1e-6)


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_maps_of_heads_are_completed_as_their_mean(recipe):
    maps = random_maps(8, 3, 4)
    heads = Maps(maps.self.reshape(2, 4, 12, 12), maps.cross.reshape(2, 4, 12, 9), maps.size)
    mean = Maps(heads.self.mean(1), heads.cross.mean(1), maps.size)
    assert torch.equal(recipe.complete(heads), recipe.complete(mean))
    assert torch.equal(segment_maps([heads], recipe).tokens, segment_maps([mean], recipe).tokens)


def halves_of(blocks: list[Maps], recipe: Recipe) -> tuple:
    """Completed maps of the conditional and of the unconditional rows, in the order that `assign` takes."""
    uncond, cond = zip(*(recipe.complete(maps).chunk(2) for maps in blocks))
    return cond, uncond


@pytest.mark.parametrize("recipe", [OFFICIAL, CONDITIONAL, PAPER])
def test_regions_of_maps_are_what_assign_makes_of_the_completed_halves(recipe):
    blocks = [random_maps(4, 6, 10), random_maps(4, 3, 5)]
    words = ((Word("a", 1, 2), Word("cat", 2, 4)), ())
    cond, uncond = halves_of(blocks, recipe)
    regions, expected = recipe.assign(cond, uncond, Tokens(9, words)), segment_maps(blocks, recipe)
    assert regions.tokens.shape == regions.scores.shape == (2, 9, 6, 10)  # the largest grid
    assert regions.foreground.shape == (2, 1, 6, 10) and regions.contrast().shape == (2, 1, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(regions[:3], expected[:3]))
    assert regions.words == words and expected.words == ()


def test_the_foreground_is_of_the_half_that_a_recipe_names():
    blocks = [random_maps(4, 6, 10)]
    (cond, uncond), tokens = halves_of(blocks, OFFICIAL), Tokens(9)
    of_uncond, of_cond = (r.assign(cond, uncond, tokens) for r in (OFFICIAL, CONDITIONAL))
    assert 0 < of_uncond.foreground.mean() < 1 and not torch.equal(of_uncond.foreground, of_cond.foreground)
    assert torch.equal(of_uncond.tokens, of_cond.tokens)
    swapped = CONDITIONAL.assign(uncond, cond, tokens)
    assert torch.equal(swapped.foreground, of_uncond.foreground)
    in_the_paper = PAPER.assign(*halves_of(blocks, PAPER), tokens)
    assert torch.equal(in_the_paper.foreground, 1 - in_the_paper.tokens[:, :1])


def test_without_an_unconditional_half_the_foreground_is_the_conditional_one_s():
    cond, uncond = halves_of([random_maps(4, 6, 10)], OFFICIAL)
    expected = CONDITIONAL.assign(cond, uncond, Tokens(9))
    alone = OFFICIAL.assign(cond, None, Tokens(9))
    assert all(torch.equal(a, b) for a, b in zip(alone[:3], expected[:3]))
    second = OFFICIAL.assign(cond, uncond, Tokens(9, zero_uncond=torch.tensor([False, True])))  # in the second picture
    straight = OFFICIAL.assign(cond, uncond, Tokens(9))
    assert torch.equal(second.foreground[0], straight.foreground[0])
    assert torch.equal(second.foreground[1], expected.foreground[1])
    assert not torch.equal(straight.foreground[1], expected.foreground[1])
    every = OFFICIAL.assign(cond, uncond, Tokens(9, zero_uncond=torch.tensor([True])))  # one for all pictures
    assert torch.equal(every.foreground, expected.foreground)


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_later_start_tokens_of_a_long_prompt_own_nothing(recipe):
    """A prompt of two chunks of nine tokens whose start tokens, 0 and 9, have one state and so one map."""
    maps = random_maps(2, 5, 7, tokens=18)
    cross = maps.cross.clone()
    cross[:, :15, [0, 9]] = 2  # where they are attended to
    sharp = (10 * torch.eye(35) + seeded(2, 35, 35)).softmax(-1)
    maps = Maps(sharp, cross / cross.sum(-1, keepdim=True), (5, 7))
    cond, uncond = halves_of([maps], recipe)
    long, one = recipe.assign(cond, uncond, Tokens(9)), recipe.assign(cond, uncond, Tokens(18))
    assert not long.tokens[:, 9].any() and not long.scores[:, 9].any() and one.scores[:, 9].any()
    assert torch.equal(long.scores[:, :9], one.scores[:, :9]) and torch.equal(long.scores[:, 10:], one.scores[:, 10:])
    assert long.tokens[:, 0].any() and torch.equal(long.tokens.sum(1), torch.ones(1, 5, 7))
    if recipe is PAPER:
        assert torch.equal(long.foreground, 1 - long.tokens[:, :1])
    else:  # the start tokens' maps together against the others'
        layer = blur(uncond[0])
        start, rest = layer[:, [0, 9]].sum(1), layer.sum(1) - layer[:, [0, 9]].sum(1)
        expected = rest / rest.mean((-2, -1), keepdim=True) > start / start.mean((-2, -1), keepdim=True)
        assert torch.equal(long.foreground[:, 0].bool(), expected) and 0 < long.foreground.mean() < 1


def test_contrast_is_one_where_maps_are_flat_and_grows_with_them():
    flat = segment_maps([Maps(torch.full((2, 4, 4), 0.25), torch.full((2, 4, 3), 1 / 3), (2, 2))])
    assert torch.allclose(flat.contrast(), torch.ones(1, 1, 1, 1))
    sharp = flat._replace(scores=torch.eye(3)[None, :, :, None])  # three pixels, each with a token of its own
    assert sharp.contrast().flatten().tolist() == pytest.approx([3.0])


def test_blur_keeps_constants_and_has_the_published_taps():
    assert torch.allclose(blur(torch.ones(1, 1, 4, 6)), torch.ones(1, 1, 4, 6))
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[..., 2, 2] = 1
    taps = torch.tensor([0.2119, 0.5761, 0.2119])
    assert torch.allclose(blur(impulse)[0, 0, 1:4, 1:4], taps[:, None] * taps, atol=1e-4)
    assert torch.allclose(blur(torch.ones(1, 2, 1, 5)), torch.ones(1, 2, 1, 5))  # one row has nothing to reflect
