"""Pictures too large for memory: decoded in bands, or refused before any work."""

from .bands import decode_in_bands
from .maps import check_maps

__all__ = ["check_maps", "decode_in_bands"]
