"""Rules beside CFG and S-CFG: the scale slot of a Guidance."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import BadInput
from ..guidance import Outputs, Rule
from ..schedule import Moment
from ..segment import Recipe, Regions


@dataclass(frozen=True)
class Energy:
    """No attention: scale = low + (high - low) * exp(-|d| / mean |d|), d the difference at a pixel.

    So the scale falls from `high` where the texts agree to `low` where they differ most. The formula is this project's;
    that the difference's size can take the place of attention maps is SAMG's idea (2604.26503).
    """

    high: float = 9.0
    low: float = 6.0

    def __call__(self, outputs: Outputs, regions: Regions | None, moment: Moment) -> Tensor:
        norm = outputs.difference.norm(dim=1, keepdim=True)
        return self.low + (self.high - self.low) * (-norm / (norm.mean((-2, -1), keepdim=True) + 1e-8)).exp()


@dataclass(frozen=True)
class Product:
    """Two rules' scales multiplied, such as S-CFG's by an Energy around one."""

    first: Rule
    second: Rule

    @property
    def recipe(self) -> Recipe | None:
        first, second = (getattr(rule, "recipe", None) for rule in (self.first, self.second))
        if first and second and first != second:
            what = f"a step's maps are read by one recipe, not by those of {self.first} and {self.second}"
            raise BadInput(f"{what}: give both rules the same")
        return first or second

    def at(self, moment: Moment) -> "Product":
        """With what acts of both at this moment."""
        return Product(*(rule.at(moment) if hasattr(rule, "at") else rule for rule in (self.first, self.second)))

    def on(self, device: torch.device) -> "Product":
        """With what does not change placed on a device."""
        return Product(*(rule.on(device) if hasattr(rule, "on") else rule for rule in (self.first, self.second)))

    def __call__(self, outputs: Outputs, regions: Regions | None, moment: Moment) -> Tensor | float:
        return self.first(outputs, regions, moment) * self.second(outputs, regions, moment)

    def flags(self, regions: Regions | None, moment: Moment) -> dict[str, Tensor]:
        flags: dict[str, Tensor] = {}
        for rule in (self.first, self.second):
            flags |= rule.flags(regions, moment) if hasattr(rule, "flags") else {}
        return flags
