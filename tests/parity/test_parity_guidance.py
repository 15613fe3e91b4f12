"""Guidance beyond S-CFG against diffusers' guiders and its perturbed-attention processor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance  # noqa: E402
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0  # noqa: E402

import scfg  # noqa: E402
from compare import close, model, no_gradients, normal  # noqa: E402, F401
from small import FAMILIES, reference  # noqa: E402

GAMMA = 6.0
CASES: dict[str, tuple[scfg.Guidance, Callable[[], Any]]] = {
    "CFG": (scfg.Guidance(scale=scfg.CFG(GAMMA)), lambda: ClassifierFreeGuidance(GAMMA)),
    "rescale": (scfg.Guidance(scale=scfg.CFG(GAMMA), rescale=scfg.Rescale(0.7)), lambda: ClassifierFreeGuidance(GAMMA, guidance_rescale=0.7)),
    "zero": (scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.ZeroStar()), lambda: ClassifierFreeZeroStarGuidance(GAMMA, zero_init_steps=0)),
    "APG": (scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.APG(eta=0.3, limit=10.0, momentum=-0.5)), lambda: AdaptiveProjectedGuidance(
        GAMMA - 1, adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_rescale=10.0, eta=0.3, use_original_formulation=True)),
    "APG without limit": (scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.APG(eta=0.0, limit=None, momentum=0.0)), lambda: (
        AdaptiveProjectedGuidance(GAMMA - 1, adaptive_projected_guidance_rescale=0.0, eta=0.0, use_original_formulation=True)))}


@pytest.mark.parametrize("name", CASES)
def test_guider(name: str) -> None:
    """Three steps one after the other, since some remember; diffusers' guiders act on the predictions themselves."""
    guidance, make = CASES[name]
    guider, state = make(), None
    for step in range(3):
        guider.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(0))
        if hasattr(guider, "momentum_buffer") and step == 0:
            guider.prepare_inputs({})
        cond, uncond = normal(2, 4, 8, 8, seed=2 * step), normal(2, 4, 8, 8, seed=2 * step + 1)
        guided = guidance.combine({"uncond": uncond, "cond": cond}, None, 1.0, state)
        state = guided.state
        close(guided.out, guider.forward(cond, uncond).pred, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(16, 16), (13, 19)])
def test_perturbed_row(family: str, size: tuple[int, int]) -> None:
    """The third row's pixels attend to themselves in the middle block; the others' outputs do not change."""
    ours, theirs = model(family), reference(family).pipe.unet
    x, context = normal(2, 4, *size), normal(6, 77, ours.config.unet.context_dim, seed=1)
    context[4:] = context[2:4]
    vector, added = None, None
    if ours.config.unet.vector_dim:
        numbers = 5 if ours.config.aesthetic else 6
        pooled, ids = normal(6, ours.config.unet.vector_dim - numbers * 256, seed=2), torch.full((6, numbers), 128.0)
        sinusoids = scfg.unet.timestep_embedding(ids.flatten(), 256).reshape(6, -1)
        vector, added = torch.cat([pooled, sinusoids], 1), {"text_embeds": pooled, "time_ids": ids}
    t = torch.full((2,), 500)
    plain, _ = ours.unet(x, t, context[:4], None if vector is None else vector[:4])
    out, maps = ours.unet(x, t, context, vector, map_pixels=64, perturbed=2, layers=("middle_block",))
    before = theirs.attn_processors
    theirs.set_attn_processor({name: PAGCFGIdentitySelfAttnProcessor2_0() if name.startswith("mid_block") and "attn1" in name else processor
                               for name, processor in before.items()})
    try:
        expected: Tensor = theirs(torch.cat([x] * 3), 500, context, added_cond_kwargs=added).sample
    finally:
        theirs.set_attn_processor(before)
    close(out, expected)
    close(out[:4], plain, 1e-5)
    assert (out[4:] - out[2:4]).abs().max() > 1e-4 and all(len(block.self) == len(block.cross) == 4 for block in maps)
