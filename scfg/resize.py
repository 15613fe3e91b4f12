"""Averages over areas, by operators that every device has."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def by_area(x: Tensor, size: Sequence[int]) -> Tensor:
    """x (b c h w) averaged over the areas of the pixels of a size (height, width): F.interpolate's "area".

    Apple's GPUs have that only for sizes that divide those of x.
    """
    if not any(old % new for old, new in zip(x.shape[-2:], size)):
        return F.interpolate(x, size=tuple(size), mode="area")
    return along_width(along_width(x, size[1]).mT, size[0]).mT


def along_width(x: Tensor, width: int) -> Tensor:
    """(... w) -> (... width): pixel i is the mean of those from floor(i w / width) to ceil((i + 1) w / width) - 1."""
    pixels = torch.arange(width, device=x.device)
    first, end = pixels * x.shape[-1] // width, -(-(pixels + 1) * x.shape[-1] // width)
    every = first[:, None] + torch.arange(-(-x.shape[-1] // width) + 1, device=x.device)
    inside = every < end[:, None]
    return (x[..., every.clamp_max(x.shape[-1] - 1)] * inside).sum(-1) / inside.sum(-1)
