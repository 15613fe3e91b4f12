"""One row more, under another attention function: the perturb slot of a Guidance."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from ..data import check_guidance
from ..errors import BadInput, shown
from ..unet import Site, attention


def check_layers(layers: tuple[str, ...]) -> None:
    if not isinstance(layers, tuple | list) or not layers or not all(isinstance(layer, str) for layer in layers):
        raise BadInput(f"layers are names of blocks in a tuple, such as ('middle_block',), not {shown(layers)}")


def is_perturbed(site: Site, layers: tuple[str, ...]) -> bool:
    """Whether it is self-attention in one of the layers."""
    return site.kind == "self" and any(f"{site.block}.".startswith(f"{layer}.") for layer in layers)


@dataclass(frozen=True)
class PAG:
    """Away from what the text gives when the pixels of these blocks attend to themselves only (2403.17377, eq. 16)."""

    scale: float = 3.0
    layers: tuple[str, ...] = ("middle_block",)

    def __post_init__(self) -> None:
        check_layers(self.layers)
        check_guidance(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Identity self-attention in the layers; elsewhere the network's own attention."""
        return v if is_perturbed(site, self.layers) else attention(q, k, v, site)


@dataclass(frozen=True)
class SEG:
    """Away from what the text gives when the queries of these blocks are blurred over the picture (2408.00760).

    sigma: of the Gaussian, in pixels of the block; infinite: every query becomes the mean. The kernel's size and its
    reflected borders are those of the authors' program, on each side of a picture that is not square.
    """

    scale: float = 3.0
    sigma: float = math.inf
    layers: tuple[str, ...] = ("middle_block",)

    def __post_init__(self) -> None:
        check_layers(self.layers)
        check_guidance(self)
        if not self.sigma >= 0:
            raise BadInput(f"sigma is the width of a blur in pixels, from 0 to infinity, not {self.sigma}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
        """Self-attention of blurred queries in the layers; elsewhere the network's own attention."""
        if is_perturbed(site, self.layers):
            queries = rearrange(q, "b heads (h w) d -> b (heads d) h w", h=site.size[0])
            queries = gaussian(gaussian(queries, self.sigma).mT, self.sigma).mT
            q = rearrange(queries, "b (heads d) h w -> b heads (h w) d", heads=q.shape[1])
        return attention(q, k, v, site)


def gaussian(x: Tensor, sigma: float) -> Tensor:
    """(b c h w) blurred along h by at most 6 sigma + 1 taps, and no more than the side has; infinite: the mean."""
    if math.isinf(sigma):
        return x.mean(-2, keepdim=True).expand_as(x)
    taps = min(math.ceil(6 * sigma), x.shape[-2]) | 1
    if taps == 1:
        return x
    at = torch.arange(taps, device=x.device) - taps // 2
    kernel = (-(at.float() ** 2) / (2 * sigma**2)).softmax(0).to(x.dtype)
    padded = F.pad(x, (0, 0, taps // 2, taps // 2), mode="reflect")
    return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None, :, None]).view_as(x)
