"""Attention maps -> regions of the picture being formed (S-CFG, arXiv 2404.05384, section 3.2)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from .unet import AT_ONCE, AT_ONCE_ON_CPU, LEAST, Maps


class Word(NamedTuple):
    """A word of a prompt, and its tokens."""

    text: str
    start: int  # its tokens are start .. stop - 1 of the context
    stop: int


class Tokens(NamedTuple):
    """What is fixed for a run about the tokens that maps describe."""

    chunk: int  # tokens from one start token of a long prompt to the next; tokens 0, chunk, 2 * chunk are start tokens
    words: tuple[tuple[Word, ...], ...] = ()  # the words of each picture's text, in order
    zero_uncond: Tensor | None = None  # (b|1) pictures whose unconditional context is all zeros; None: none
    all_zero: bool = False  # whether it is that of every picture


class Regions(NamedTuple):
    """Which pixel belongs to which token, on the largest captured grid."""

    tokens: Tensor  # (b t h w) 0 or 1: the pixels that every token owns
    foreground: Tensor  # (b 1 h w) 0 or 1
    scores: Tensor  # (b t h w) the soft maps behind the tokens
    words: tuple[tuple[Word, ...], ...] = ()  # the words of each picture's text, in order

    def contrast(self) -> Tensor:
        """How far above its mean over the picture a pixel's best token is, on average (b 1 1 1): 1 where maps are flat.

        On Flatland the least of ordinary captions in their first steps is 1.34 by the official recipe and 1.20 by the
        paper's; the empty text has 1.16 and 1.10. Words that a model does not know can be attended to as sharply as
        others.
        """
        return relative(self.scores).amax(1, keepdim=True).mean((-2, -1), keepdim=True)


def blur(x: Tensor) -> Tensor:
    """3x3 Gaussian of sigma sqrt(1/2) pixels over every channel of (b c h w), edges reflected."""
    middle = 1 / (1 + 2 * math.exp(-1))
    side = middle * math.exp(-1)
    rows = F.pad(x, (1, 1, 1, 1), mode="reflect" if min(x.shape[-2:]) > 1 else "replicate")
    rows = side * rows[..., :-2] + middle * rows[..., 1:-1] + side * rows[..., 2:]
    return side * rows[..., :-2, :] + middle * rows[..., 1:-1, :] + side * rows[..., 2:, :]


def relative(x: Tensor) -> Tensor:
    """Values (... h w) divided by their mean over the picture."""
    return x / x.mean((-2, -1), keepdim=True).clamp_min(LEAST)


def together(layers: Sequence[Tensor], grid: Sequence[int]) -> list[list[int]]:
    """The numbers of the layers (b t h w) on a grid, in parts that are small enough to be computed at once."""
    same = [i for i, layer in enumerate(layers) if layer.shape[-2:] == grid]
    most = max(1, (AT_ONCE_ON_CPU if layers[0].is_cpu else AT_ONCE) // layers[same[0]].numel())
    return [same[i : i + most] for i in range(0, len(same), most)]


@dataclass(frozen=True)
class Recipe:
    """How attention maps are read as regions."""

    powers: tuple[float, ...]  # weights of S C, S^2 C, ... in the completed map; S the self map, C the cross map
    smooth: bool  # blur every layer's maps
    normalise: Literal["mean", "sum"]  # what a token's map is divided by, over space
    ties: bool  # pixels with equal best tokens belong to all of them, or to the first
    # pixels where the other tokens together beat the start token, in the unconditional or the conditional row; or
    # "assigned": where the owning token is no start token
    foreground: Literal["uncond", "cond", "assigned"]

    def complete(self, maps: Maps) -> Tensor:
        """A block's cross map completed by its self map, (b t h w); S is applied to t columns, never squared.

        w1 S C + w2 S^2 C + ... is summed as S (w1 C + S (w2 C + ...)).
        """
        by_self, cross = maps.self, maps.cross
        if by_self.ndim == 4:  # every head's
            by_self, cross = by_self.mean(1), cross.mean(1)
        total = self.powers[-1] * cross
        for weight in self.powers[-2::-1]:
            total = torch.baddbmm(cross, by_self, total, beta=weight)
        return rearrange(by_self @ total, "b (h w) t -> b t h w", h=maps.size[0])

    def assign(self, cond: Sequence[Tensor], uncond: Sequence[Tensor] | None, tokens: Tokens) -> Regions:
        """Completed maps of all layers, each (b t h w) -> Regions of the conditional row on the largest of their grids.

        The foreground is the conditional row's where there is no unconditional one or its context is all zeros: maps
        of zeros are uniform, and comparing them would compare rounding errors. The start tokens of a long prompt are
        identical, so only the first may own pixels. A token that nothing attends to owns nothing.
        """
        grids = list(dict.fromkeys([layer.shape[-2:] for layer in cond]))
        size = max(grids, key=math.prod)
        uncond = uncond if self.foreground == "uncond" else None
        scores, sums = cond[0].new_zeros(()), []  # over layers; of the start token and of all others, (l b 2 h w)
        for chosen in [part for grid in grids for part in together(cond, grid)]:
            rows = torch.cat([half[i] for half in (cond, uncond) if half is not None for i in chosen])
            rows = rows if rows.shape[-2:] == size else F.interpolate(rows, size=size, mode="bilinear")
            rows = rearrange(blur(rows) if self.smooth else rows, "(l b) t h w -> l b t h w", b=len(cond[0]))
            layers, source = rows[: len(chosen)], rows[-len(chosen) :]  # source: of the foreground
            total = layers.mean((-2, -1), keepdim=True) + 1e-8
            if self.normalise == "sum":
                total = layers.sum((-2, -1), keepdim=True).clamp_min(LEAST)
            scores = scores + (layers / total).sum(0) / len(cond)
            if self.foreground != "assigned":
                if uncond is not None and tokens.zero_uncond is not None:
                    source = torch.where(tokens.zero_uncond[:, None, None, None], layers, source)
                by_place = rearrange(source, "l b (chunks t) h w -> l b t chunks h w", t=tokens.chunk)
                sums.append(torch.stack([by_place[:, :, 0].sum(2), by_place[:, :, 1:].sum((2, 3))], 2))
        counts = scores.new_ones(scores.shape[1], 1, 1)
        counts[tokens.chunk :: tokens.chunk] = 0  # the later start tokens
        scores = scores * counts
        best = scores.argmax(1, keepdim=True)
        owners = torch.zeros_like(scores).scatter(1, best, 1.0)
        if self.ties:
            owners = (scores == scores.amax(1, keepdim=True)).to(scores.dtype)
        attention = relative(torch.cat(sums)).sum(0) if sums else None
        foreground = best % tokens.chunk != 0 if attention is None else attention[:, 1:] > attention[:, :1]
        return Regions(owners, foreground.to(scores.dtype), scores, tokens.words)


OFFICIAL = Recipe(powers=(1 / 4, 3 / 4), smooth=True, normalise="mean", ties=True, foreground="uncond")
CONDITIONAL = replace(OFFICIAL, foreground="cond")
PAPER = Recipe(powers=(1 / 4,) * 4, smooth=False, normalise="sum", ties=False, foreground="assigned")


def segment_maps(maps: Iterable[Maps], recipe: Recipe = OFFICIAL) -> Regions:
    """Maps of the captured blocks, rows [uncond; cond] -> Regions of the conditional rows."""
    uncond, cond = zip(*(recipe.complete(block).chunk(2) for block in maps))
    return recipe.assign(cond, uncond, Tokens(chunk=cond[0].shape[1]))
