"""The benchmark's contenders compute the same, at small width: diffusers' has fused and explicit attention."""

import copy
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from compare import close, model, no_gradients  # noqa: E402, F401
from contenders import steps  # noqa: E402
from small import reference  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_contenders_agree(family: str) -> None:
    """Plain and semantic-aware guidance, each with its counterpart."""
    unet = copy.deepcopy(reference(family).pipe.unet)
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name:  # random maps are nearly flat: rounding decided which token a pixel belongs to
            parameter.mul_(4)
    results = {name: step() for name, step in steps(unet, model(family).config, 32).items()}
    close(results["CFG"], results["diffusers CFG"])
    close(results["S-CFG"], results["diffusers S-CFG, explicit"])
    assert (results["S-CFG"] - results["CFG"]).abs().max() > 1e-3
