"""What makes steps faster where they are many operations for a GPU."""

from .compiled import Compiled, compiled

__all__ = ["Compiled", "compiled"]
