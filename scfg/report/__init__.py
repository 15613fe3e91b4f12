"""What a run computed, shown: pictures of regions and scales, notes in words."""

from .record import Record, note_lines, watch
from .sheet import named_areas, panels, sheet, to_image

__all__ = ["Record", "named_areas", "note_lines", "panels", "sheet", "to_image", "watch"]
