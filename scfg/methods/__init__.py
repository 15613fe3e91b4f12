"""Guidance that others published, as values for the slots of a Guidance; and rules beside CFG and S-CFG."""

from .direction import APG, OptimizedScale
from .perturb import PAG
from .rescale import Rescale
from .rules import Energy, Product
from .when import Interval, Ramp

__all__ = ["APG", "Energy", "Interval", "OptimizedScale", "PAG", "Product", "Ramp", "Rescale"]
