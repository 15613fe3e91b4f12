"""Guidance that others published: values for the slots of a Guidance, rules beside CFG and S-CFG, CFG++'s sampler."""

from .direction import APG, FDG, TCFG, OptimizedScale
from .distilled import distilled, lcm
from .perturb import PAG, SEG
from .rescale import Rescale
from .rules import Energy, Product
from .sampler import euler_cfg_pp
from .when import Interval, Ramp

__all__ = ["APG", "Energy", "FDG", "Interval", "OptimizedScale", "PAG", "Product", "Ramp", "Rescale", "SEG", "TCFG"]
__all__ += ["distilled", "euler_cfg_pp", "lcm"]
