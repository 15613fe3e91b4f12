"""A rule of one's own: any function (outputs, regions, moment) -> scale map (b 1 h w) or number."""

import torch
from torch.nn import functional as F

import scfg


class Foreground:
    """More guidance where something stands; `recipe` says how attention maps are read as regions."""

    recipe = scfg.OFFICIAL

    def __call__(self, outputs: scfg.Outputs, regions: scfg.Regions, moment: scfg.Moment) -> torch.Tensor:
        foreground = F.interpolate(regions.foreground, size=outputs.difference.shape[-2:], mode="nearest")
        return 1.5 + 2.5 * foreground


def main(steps: int = 8) -> dict[str, torch.Tensor]:
    """The scale map of the last step by each rule."""
    model, scales = scfg.load(), {}
    fading = lambda outputs, regions, moment: 4.0 - 3.0 * moment.progress  # noqa: E731 (a lambda will do)
    for name, rule in {"foreground": Foreground(), "fading": fading}.items():
        *_, step = model.sample("a red car left of a blue star on grass", rule, steps=steps)
        scales[name] = step.denoised.scale
    return scales


if __name__ == "__main__":
    print(main())
