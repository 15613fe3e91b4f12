"""Attention maps -> regions of the forming picture (S-CFG, arXiv 2404.05384, section 3.2)."""
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .unet import Maps

LEAST = 1e-30                                         # a sum of probabilities below which float32 says nothing


class Word(NamedTuple):
    text: str
    start: int                                        # its tokens are start .. stop - 1 of the context
    stop: int


class Regions(NamedTuple):
    """Which pixel belongs to which token, on the largest captured grid."""
    tokens: Tensor                                    # (b t h w) 0 or 1
    foreground: Tensor                                # (b 1 h w) 0 or 1
    scores: Tensor                                    # (b t h w) the soft maps behind the tokens
    words: tuple[tuple[Word, ...], ...] = ()          # of each picture's text, in order

    def contrast(self) -> Tensor:
        """How far above its mean over the picture a pixel's best token is, on average (b 1 1 1): 1 where attention says nothing.

        On Flatland the least of ordinary captions is 1.34 by the official recipe and 1.20 by the paper's, in their first steps; the
        empty text has 1.16 and 1.10. Words that mean nothing to a model can be attended to as sharply as others.
        """
        return (self.scores / self.scores.mean((-2, -1), keepdim=True).clamp_min(LEAST)).amax(1, keepdim=True).mean((-2, -1), keepdim=True)


def blur(x: Tensor) -> Tensor:
    """3x3 Gaussian of sigma sqrt(1/2) pixels over every channel of (b c h w), edges reflected."""
    side = math.exp(-1)
    taps = torch.tensor([side, 1.0, side], dtype=x.dtype, device=x.device) / (1 + 2 * side)
    rows = F.pad(x, (1, 1, 1, 1), mode="reflect" if min(x.shape[-2:]) > 1 else "replicate")
    rows = taps[0] * rows[..., :-2] + taps[1] * rows[..., 1:-1] + taps[2] * rows[..., 2:]
    return taps[0] * rows[..., :-2, :] + taps[1] * rows[..., 1:-1, :] + taps[2] * rows[..., 2:, :]


@dataclass(frozen=True)
class Segmentation:
    """A recipe from attention maps to regions."""
    powers: tuple[float, ...]                         # weights of S C, S^2 C, ... in the completed cross map
    smooth: bool                                      # blur every layer's maps
    normalise: Literal["mean", "sum"]                 # what a token's map is divided by, over space
    ties: bool                                        # pixels with equal best tokens belong to all of them, or to the first
    foreground: Literal["uncond", "cond", "assigned"] # where the half's other tokens outdo its start token, or own the pixel

    def complete(self, maps: Maps) -> Tensor:
        """One block's cross map, completed by its self map, as pictures (b t h w); S is applied to t columns, never squared."""
        step, total = maps.cross, 0
        for weight in self.powers:
            step = maps.self @ step
            total = total + weight * step
        return rearrange(total, "b (h w) t -> b t h w", h=maps.size[0])

    def assign(self, completed: list[Tensor], silent: Tensor | None = None, chunk: int | None = None) -> Regions:
        """Completed maps of all layers, rows [uncond; cond], each (2b t h w) -> Regions on the largest of their grids.

        silent (b): pictures whose unconditional context is all zeros. Its maps are uniform, and which is the greater is decided by
        rounding, so that their foreground is taken from the conditional half. chunk: tokens from one start token of a long prompt to
        the next (default: it has one); these have one state and so one region, the first one's. A token that nothing attends to owns nothing.
        """
        size = max((layer.shape[-2:] for layer in completed), key=math.prod)
        chunk = chunk or completed[0].shape[1]
        scores, start, rest = 0, 0, 0
        for layer in completed:
            layer = F.interpolate(layer, size=size, mode="bilinear") if layer.shape[-2:] != size else layer
            layer = blur(layer) if self.smooth else layer
            uncond, cond = layer.chunk(2)
            total = cond.mean((-2, -1), keepdim=True) + 1e-8 if self.normalise == "mean" else cond.sum((-2, -1), keepdim=True).clamp_min(LEAST)
            scores = scores + cond / total / len(completed)
            if self.foreground != "assigned":
                half = cond if self.foreground == "cond" else uncond
                half = half if silent is None else torch.where(silent[:, None, None, None], cond, half)
                chunks = rearrange(half, "b (chunks t) h w -> b chunks t h w", t=chunk)
                first, others = chunks[:, :, :1].sum((1, 2))[:, None], chunks[:, :, 1:].sum((1, 2))[:, None]
                start = start + first / first.mean((-2, -1), keepdim=True).clamp_min(LEAST)
                rest = rest + others / others.mean((-2, -1), keepdim=True).clamp_min(LEAST)
        scores = scores.index_fill(1, torch.arange(chunk, scores.shape[1], chunk, device=scores.device), 0)
        best = scores.argmax(1, keepdim=True)
        equal_best = scores == scores.amax(1, keepdim=True)
        tokens = equal_best.to(scores.dtype) if self.ties else torch.zeros_like(scores).scatter(1, best, 1.0)
        foreground = best % chunk != 0 if self.foreground == "assigned" else rest > start
        return Regions(tokens, foreground.to(scores.dtype), scores)


OFFICIAL = Segmentation(powers=(1 / 4, 3 / 4), smooth=True, normalise="mean", ties=True, foreground="uncond")
CONDITIONAL = replace(OFFICIAL, foreground="cond")
PAPER = Segmentation(powers=(1 / 4,) * 4, smooth=False, normalise="sum", ties=False, foreground="assigned")


def segment(maps: list[Maps], recipe: Segmentation = OFFICIAL) -> Regions:
    """Maps of the captured blocks, rows [uncond; cond] -> Regions of the conditional rows."""
    return recipe.assign([recipe.complete(block) for block in maps])
