"""Regions without attention: a rule that segments the clean latent of the same step by k-means."""

import torch
from einops import rearrange

import scfg


def clusters(x0: torch.Tensor, count: int = 4) -> torch.Tensor:
    pixels = rearrange(x0, "b c h w -> b (h w) c")
    centres = pixels[:, torch.linspace(0, pixels.shape[1] - 1, count).long()]
    for _ in range(10):
        masks = torch.nn.functional.one_hot(torch.cdist(pixels, centres).argmin(-1), count).float()
        centres = masks.mT @ pixels / masks.sum(1)[..., None].clamp_min(1)
    return rearrange(masks, "b (h w) k -> b k h w", h=x0.shape[2])


def levelled(outputs: scfg.Outputs, regions: None, moment: scfg.Moment) -> torch.Tensor:
    """S-CFG's formula on these regions, with the whole picture's mean difference as level."""
    masks, norm = clusters(outputs.x0), outputs.difference.norm(dim=1, keepdim=True)
    means = (masks * norm).sum((2, 3), keepdim=True) / masks.sum((2, 3), keepdim=True).clamp_min(1)
    return 2.0 * (masks * norm.mean((2, 3), keepdim=True) / means.clamp_min(1e-8)).sum(1, keepdim=True).clamp(0.8, 3.0)


def main() -> scfg.Step:
    return [*scfg.load().sample("a red car left of a blue star on grass", levelled, steps=8)][-1]


if __name__ == "__main__":
    print(main())
