"""scfg: Stable Diffusion sampling in which attention maps are values, so that regions can be seen and guided one by one."""
from .config import BadInput
from .diffusion import Denoised, Diffusion, Refiner, Step, load
from .guidance import CFG, SCFG, Guidance
from .segment import OFFICIAL, PAPER, Regions, Segmentation, segment
from .text import Prompt, Word
from .unet import Maps

__all__ = ["BadInput", "CFG", "Denoised", "Diffusion", "Guidance", "Maps", "OFFICIAL", "PAPER", "Prompt", "Refiner", "Regions", "SCFG",
           "Segmentation", "Step", "Word", "load", "segment"]
