"""scfg: Stable Diffusion sampling in which attention maps are values, so that regions can be seen and guided one by one."""
from .area import Area, Region, foreground, mask, words
from .config import BadInput
from .diffusion import Denoised, Diffusion, Refiner, Step, load
from .guidance import APG, CFG, PAG, SCFG, ByRegion, Energy, Guidance, Interval, Product, Ramp, Rescale, ZeroStar
from .memory import keep_freed_memory
from .segment import OFFICIAL, PAPER, Regions, Segmentation, Word, segment
from .text import Part, Prompt
from .unet import Maps

__all__ = ["APG", "Area", "BadInput", "ByRegion", "CFG", "Denoised", "Diffusion", "Energy", "Guidance", "Interval", "Maps", "OFFICIAL", "PAG",
           "PAPER", "Part", "Product", "Prompt", "Ramp", "Refiner", "Region", "Regions", "Rescale", "SCFG", "Segmentation", "Step", "Word",
           "ZeroStar", "foreground", "keep_freed_memory", "load", "mask", "segment", "words"]
