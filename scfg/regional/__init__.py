"""Areas of the picture, a guidance scale of their own by region, and prompts of their own by region."""

from .area import Area, foreground, mask, words
from .description import parse_area
from .prompt import Part, RegionalPrompt
from .scale import ByRegion, Region

__all__ = ["Area", "ByRegion", "Part", "Region", "RegionalPrompt", "foreground", "mask", "parse_area", "words"]
