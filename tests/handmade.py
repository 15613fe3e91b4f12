"""Outputs and regions made by hand, for rules and the slots of a Guidance."""

import torch
from conftest import seeded
from torch import Tensor

from scfg import Moment, Outputs, Regions, Schedule

SHAPE = (2, 4, 12, 16)
LEFT = torch.zeros(12, 16)
LEFT[:, :8] = 1


def outputs(moment: Moment, cond: Tensor, uncond: Tensor, perturbed: Tensor | None = None, x: Tensor | None = None):
    """What a network said at a moment, and what it means; x: by default noise of that level."""
    x = moment.sigma * seeded(*cond.shape, seed=9).to(cond) if x is None else x
    x0 = moment.to_x0(x, cond)
    return Outputs(x, cond, uncond, perturbed, cond - uncond, x0, moment.dx0_dout)


def at(sigma: float, schedule: Schedule = Schedule(), pictures: slice = slice(None)) -> tuple[Outputs, Moment]:
    """Three rows of two pictures, or of some of them, at a noise level."""
    uncond, cond, perturbed, x = (seeded(*SHAPE, seed=seed)[pictures] for seed in (0, 1, 2, 3))
    moment = schedule.moment(sigma)
    return outputs(moment, cond, uncond, perturbed, sigma * x), moment


def halves(b: int = 2, h: int = 6, w: int = 8) -> Regions:
    """Token 1 owns the left half and token 2 the right half; the foreground is everything."""
    tokens = torch.zeros(b, 5, h, w)
    tokens[:, 1, :, : w // 2] = 1
    tokens[:, 2, :, w // 2 :] = 1
    return Regions(tokens, torch.ones(b, 1, h, w), tokens + 0.01)


def one_of(regions: Regions) -> Regions:
    """The last picture's."""
    return Regions(*(values[-1:] for values in regions[:3]))
