"""Guidance beyond S-CFG against diffusers' guiders and its perturbed-attention processor."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("kornia")

from diffusers.guiders import (  # noqa: E402
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0  # noqa: E402

import scfg  # noqa: E402
from compare import close, model, no_gradients, normal  # noqa: E402, F401
from small import FAMILIES, reference  # noqa: E402

pytestmark = pytest.mark.slow

GAMMA = 6.0
CASES: dict[str, tuple[scfg.Guidance, Callable[[], Any]]] = {
    "CFG": (scfg.Guidance(scale=scfg.CFG(GAMMA)), lambda: ClassifierFreeGuidance(GAMMA)),
    "rescale": (
        scfg.Guidance(scale=scfg.CFG(GAMMA), rescale=scfg.Rescale(0.7)),
        lambda: ClassifierFreeGuidance(GAMMA, guidance_rescale=0.7),
    ),
    "zero": (
        scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.OptimizedScale()),
        lambda: ClassifierFreeZeroStarGuidance(GAMMA, zero_init_steps=0),
    ),
    "TCFG": (
        scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.TCFG()),
        lambda: TangentialClassifierFreeGuidance(GAMMA),
    ),
    "FDG": (
        scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.FDG(low=0.4, high=1.0)),
        lambda: FrequencyDecoupledGuidance([GAMMA, 1 + 0.4 * (GAMMA - 1)]),
    ),
    "APG": (
        scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.APG(eta=0.3, limit=10.0, momentum=-0.5)),
        lambda: AdaptiveProjectedGuidance(
            GAMMA - 1,
            adaptive_projected_guidance_momentum=-0.5,
            adaptive_projected_guidance_rescale=10.0,
            eta=0.3,
            use_original_formulation=True,
        ),
    ),
    "APG without limit": (
        scfg.Guidance(scale=scfg.CFG(GAMMA), direction=scfg.APG(eta=0.0, limit=None, momentum=0.0)),
        lambda: AdaptiveProjectedGuidance(
            GAMMA - 1, adaptive_projected_guidance_rescale=0.0, eta=0.0, use_original_formulation=True
        ),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_guider(name: str) -> None:
    """Three steps one after the other, since some remember; diffusers' guiders act on the predictions themselves."""
    guidance, make = CASES[name]
    guider, state, moment, x = make(), None, scfg.Schedule("v").moment(3.0), normal(2, 4, 8, 8, seed=9)
    for step in range(3):
        guider.set_state(step=step, num_inference_steps=3, timestep=torch.tensor(0))
        if hasattr(guider, "momentum_buffer") and step == 0:
            guider.prepare_inputs({})
        cond, uncond = normal(2, 4, 8, 8, seed=2 * step), normal(2, 4, 8, 8, seed=2 * step + 1)
        outputs = scfg.Outputs(x, cond, uncond, None, cond - uncond, cond, 1.0)
        if name == "zero":  # which is defined on velocities: the outputs are v
            outputs = outputs._replace(x0=moment.to_x0(x, cond), dx0_dout=moment.dx0_dout)
        if name == "TCFG":  # on noise: the outputs are eps
            outputs = outputs._replace(x0=x - moment.sigma * cond, dx0_dout=-moment.sigma)
        guided = guidance.combine(outputs, None, moment, state)
        state = guided.state
        close(guided.out, guider.forward(cond, uncond).pred, 1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_optimized_scale_fits_velocities_whatever_the_network_predicts(prediction: str) -> None:
    """The guided x0 is that of diffusers' guider on the velocities of the same two x0."""
    moment, of_v = (scfg.Schedule(kind).moment(3.0) for kind in (prediction, "v"))
    x, cond, uncond = 3 * normal(2, 4, 8, 8, seed=9), normal(2, 4, 8, 8, seed=1), normal(2, 4, 8, 8, seed=2)
    outputs = scfg.Outputs(x, cond, uncond, None, cond - uncond, moment.to_x0(x, cond), moment.dx0_dout)
    guidance, make = CASES["zero"]
    guider = make()
    guider.set_state(step=0, num_inference_steps=3, timestep=torch.tensor(0))
    velocities = [(moment.to_x0(x, out) - of_v.dx0_dx * x) / of_v.dx0_dout for out in (cond, uncond)]
    expected = of_v.to_x0(x, guider.forward(*velocities).pred)
    close(moment.to_x0(x, guidance.combine(outputs, None, moment).out), expected, 1e-5)
    plain = scfg.Guidance(scale=scfg.CFG(GAMMA)).combine(outputs, None, moment).out
    assert (moment.to_x0(x, plain) - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(16, 16), (13, 19)])
def test_perturbed_row(family: str, size: tuple[int, int]) -> None:
    """The third row, a call of its own, whose pixels attend to themselves in the middle block."""
    ours, theirs = model(family), reference(family).pipe.unet
    x, context = normal(2, 4, *size), normal(6, 77, ours.config.unet.context_dim, seed=1)
    context[4:] = context[2:4]
    vector, added = None, None
    if ours.config.unet.vector_dim:
        numbers = 5 if ours.config.aesthetic_scores else 6
        pooled, ids = normal(6, ours.config.unet.vector_dim - numbers * 256, seed=2), torch.full((6, numbers), 128.0)
        sinusoids = scfg.unet.timestep_embedding(ids.flatten(), 256).reshape(6, -1)
        vector, added = torch.cat([pooled, sinusoids], 1), {"text_embeds": pooled, "time_ids": ids}
    t, pag = torch.full((2,), 500), scfg.PAG(layers=("middle_block",))
    plain, _ = ours.unet(x, t, scfg.Conditioning(context[:4], None if vector is None else vector[:4]))
    alone = scfg.Conditioning(context[4:], None if vector is None else vector[4:])
    perturbed, _ = ours.unet(x, t, alone, attend=pag.attend)
    before = theirs.attn_processors
    own = [name for name in before if name.startswith("mid_block") and "attn1" in name]
    theirs.set_attn_processor(before | {name: PAGCFGIdentitySelfAttnProcessor2_0() for name in own})
    try:
        expected: Tensor = theirs(torch.cat([x] * 3), 500, context, added_cond_kwargs=added).sample
    finally:
        theirs.set_attn_processor(before)
    close(torch.cat([plain, perturbed]), expected)
    assert (perturbed - plain[2:]).abs().max() > 1e-4
