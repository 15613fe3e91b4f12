"""How sharp the embedded model's attention is on the world's own captions."""

import pytest

from scfg import flatland
from scfg.guidance import named_rule

FLAT = "attention shows no regions: plain CFG there"


@pytest.mark.filterwarnings("ignore:this model never saw 'xq'")
@pytest.mark.parametrize("name", ["scfg", "scfg-paper"])
def test_flat_attention_is_flagged_and_ordinary_attention_is_not(flat, name):
    """The least contrast of ordinary captions, in their first step, is 1.34 (paper: 1.20).

    That of texts without a known word is 1.18 (1.16).
    """
    rule, captions = named_rule(name, 3.0, flat.config), [flatland.compose(10**6 + i).caption for i in range(48)]
    assert rule.min_contrast == flatland.FLATLAND.min_contrast[name == "scfg-paper"] > 1
    for texts in (captions, ["", "xq"], ["xq", captions[0]]):
        first = next(flat.sample(texts, rule, steps=20, seeds=list(range(len(texts)))))
        expected = [text in ("", "xq") for text in texts]
        assert first.denoised.flags[FLAT].tolist() == expected
        assert (first.denoised.scale == 3).flatten(1).all(1).tolist() == expected
