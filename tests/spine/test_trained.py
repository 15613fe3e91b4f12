"""The method on the embedded checkpoint, whose attention is a trained network's."""

import pytest
import torch
from conftest import seeded
from torch.nn import functional as F

import scfg
from scfg import CFG, SCFG, Capture
from scfg.guidance import named_rule

CAPTION = "a red car left of a blue star on grass"


def test_the_paper_recipe_finds_regions_where_tokens_get_no_attention_at_all(flat):
    """Some tokens' probabilities are zero in float32; none of it may become no number."""
    denoise = flat.denoiser(CAPTION, SCFG.paper(3.0), capture=Capture(256))
    denoised = denoise(5 * seeded(1, 4, 16, 16), 5.0)
    assert min(block.cross[1].sum(0).min() for block in denoised.maps.values()) == 0
    regions = denoised.regions
    assert regions.scores.isfinite().all() and regions.tokens.sum((2, 3)).count_nonzero() > 3
    assert denoised.scale.isfinite().all() and denoised.scale.std() > 0.1


def test_a_neglected_word_is_attended_more(flat):
    """Attend-and-Excite (2301.13826): descend 1 - max of a word's attention by the latent itself.

    It takes the maps that a step returns, and gradients through them.
    """
    prompt = flat.prompt(CAPTION)
    denoise, x, sigma = flat.denoiser(prompt, CFG(3.0), capture=Capture(256)), 9 * seeded(1, 4, 16, 16), 9.0
    (star,) = (word for word in prompt.words[0] if word.text == "star")

    def attention(x: torch.Tensor) -> torch.Tensor:
        maps = [block.cross[1:, :, star.start] for block in denoise(x, sigma).maps.values() if block.size == (16, 16)]
        return F.avg_pool1d(torch.stack(maps).mean(0)[None], 3, 1, 1).max()

    before = attention(x)
    for _ in range(5):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(1 - attention(x), x)
        x = x - 20 * gradient / gradient.norm()
    assert attention(x.detach()) > 1.1 * before


@pytest.mark.filterwarnings("ignore:this model never saw 'xq'")
@pytest.mark.parametrize("name", ["scfg", "scfg-paper"])
def test_a_named_rule_is_plain_where_attention_is_flat_and_no_other_is(flat, name):
    """The config asks for that fallback; the rule by itself is exact and has none."""
    prompt, x, flag = flat.prompt(["xq", CAPTION]), 14.6 * seeded(2, 4, 16, 16), "attention shows no regions"
    rule = named_rule(name, 3.0, flat.config)
    found = flat.denoiser(prompt, rule)(x, 14.6)
    assert found.flags[f"{flag}: plain CFG there"].tolist() == [1, 0]
    assert (found.scale[0] == 3).all() and found.scale[1].std() > 0.1
    exact = flat.denoiser(prompt, {"scfg": SCFG, "scfg-paper": SCFG.paper}[name](3.0))(x, 14.6)
    assert exact.scale[0].std() > 0.01 and torch.equal(exact.scale[1], found.scale[1])
    assert not any(flag in name for name in exact.flags)
    assert scfg.SCFG(3.0).min_contrast == 0
