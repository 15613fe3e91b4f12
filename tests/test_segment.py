import pytest
import torch
from conftest import DATA, seeded
from safetensors.torch import load_file
from torch.nn import functional as F

from scfg import OFFICIAL, PAPER, Maps, segment
from scfg.segment import blur


def oracle_maps() -> tuple[list[Maps], dict]:
    data = load_file(DATA / "segmentation.safetensors")
    names = sorted(name.removeprefix("self_") for name in data if name.startswith("self_"))
    sides = {"4": (8, 8), "8": (4, 4)}
    return [Maps(data[f"self_{name}"], data[f"cross_{name}"], sides[name[0]]) for name in names], data


def test_official_recipe_element_for_element():
    maps, data = oracle_maps()
    regions = segment(maps)
    assert torch.equal(regions.tokens, data["region_mask"])
    assert torch.equal(regions.foreground, data["foreground_mask"])


def test_paper_recipe_element_for_element():
    maps, _ = oracle_maps()
    data, regions = load_file(DATA / "segmentation.paper.safetensors"), segment(maps, PAPER)
    assert torch.equal(regions.tokens.argmax(1), data["region"])
    assert torch.equal(regions.foreground, data["foreground"])


def random_maps(rows: int, height: int, width: int, tokens: int = 9) -> Maps:
    n = height * width
    return Maps(seeded(rows, n, n).softmax(-1), (3 * seeded(rows, n, tokens, seed=1)).softmax(-1), (height, width))


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_a_batch_equals_its_pictures_one_by_one(recipe):
    maps = [random_maps(8, 6, 10), random_maps(8, 3, 5)]
    together = segment(maps, recipe)
    for i in range(4):
        alone = segment([Maps(m.self[[i, 4 + i]], m.cross[[i, 4 + i]], m.size) for m in maps], recipe)
        assert torch.allclose(alone.scores[0], together.scores[i], rtol=1e-5)
        assert torch.equal(alone.tokens[0], together.tokens[i]) and torch.equal(alone.foreground[0], together.foreground[i])


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_permuting_tokens_permutes_regions(recipe):
    maps, order = random_maps(2, 5, 7), torch.tensor([0, 4, 2, 8, 1, 3, 7, 6, 5])
    straight, permuted = segment([maps], recipe), segment([maps._replace(cross=maps.cross[..., order])], recipe)
    assert torch.equal(permuted.tokens, straight.tokens[:, order])
    assert torch.equal(permuted.foreground, straight.foreground)


def test_ties_belong_to_all_officially_and_to_the_first_in_the_paper():
    uniform = Maps(torch.full((2, 4, 4), 0.25), torch.full((2, 4, 3), 1 / 3), (2, 2))
    assert segment([uniform], OFFICIAL).tokens.sum() == 12
    assert segment([uniform], PAPER).tokens[:, 0].sum() == segment([uniform], PAPER).tokens.sum() == 4


@pytest.mark.parametrize("recipe", [OFFICIAL, PAPER])
def test_a_token_that_nothing_attends_to_owns_nothing(recipe):
    maps = random_maps(2, 5, 7)
    without = segment([maps._replace(cross=F.pad(maps.cross, (0, 3)))], recipe)
    straight = segment([maps], recipe)
    assert torch.allclose(without.scores[:, :9], straight.scores, rtol=1e-5) and not without.scores[:, 9:].any()
    assert torch.equal(without.tokens[:, :9], straight.tokens) and torch.equal(without.foreground, straight.foreground)
    assert torch.allclose(without.contrast(), straight.contrast())


def test_completion_is_the_polynomial_of_the_self_map():
    maps = random_maps(2, 3, 4)
    s, c = maps.self.double(), maps.cross.double()
    expected = {OFFICIAL: (s + 3 * s @ s) @ c / 4, PAPER: (s + s @ s + s @ s @ s + s @ s @ s @ s) @ c / 4}
    for recipe, value in expected.items():
        assert torch.allclose(recipe.complete(maps).flatten(2).mT.double(), value, atol=1e-6)


def test_blur_keeps_constants_and_has_the_published_taps():
    assert torch.allclose(blur(torch.ones(1, 1, 4, 6)), torch.ones(1, 1, 4, 6))
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[..., 2, 2] = 1
    taps = torch.tensor([0.2119, 0.5761, 0.2119])
    assert torch.allclose(blur(impulse)[0, 0, 1:4, 1:4], taps[:, None] * taps, atol=1e-4)
