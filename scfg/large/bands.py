"""Exact decoding in bands of pictures too large to be decoded at once."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import BadInput
from ..vae import VAE, ResBlock, Upsample


class Band(NamedTuple):
    x: Tensor  # the rows of a band, with one more above and below where there is one
    rows: slice  # where the band's own rows lie in the whole
    own: slice  # and where in x


def bands(x: Tensor, upsample: Upsample | None, rows: int) -> Iterator[Band]:
    """So many rows (an even number) at a time of x, or of what it is upsampled to, which is never whole."""
    height = 2 * x.shape[2] if upsample else x.shape[2]
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        if upsample:  # one row further: the outermost of a convolved band lacks a neighbour
            low = max(top // 2 - 1, 0)
            part = upsample(x[:, :, low : bottom // 2 + 1])[:, :, first - 2 * low : last - 2 * low]
        else:
            part = x[:, :, first:last]
        yield Band(part, slice(top, bottom), slice(top - first, bottom - first))


def affine(norm: nn.GroupNorm, parts: Iterable[Band]) -> tuple[Tensor, Tensor]:
    """What the norm multiplies a channel by and what it then adds, (b c 1 1) each, from all bands of its input."""
    zero = norm.weight.new_zeros((), dtype=torch.float32)
    count, mean, squares = 0, zero, zero  # squares: the sum of those of distances to the mean
    for band in parts:
        groups = rearrange(band.x[:, :, band.own].float(), "b (g c) h w -> b g (c h w)", g=norm.num_groups)
        variance, own = torch.var_mean(groups, -1, correction=0)
        size, apart = groups.shape[-1], own - mean
        count += size  # a band joins those before as Chan et al. 1979 have it, which loses nothing to cancellation
        mean = mean + apart * (size / count)
        squares = squares + size * variance + apart**2 * (size * (count - size) / count)
    deviation = (squares / count + norm.eps).sqrt()
    mean, deviation = (
        repeat(of_group, "b g -> b (g c) 1 1", c=len(norm.weight) // norm.num_groups) for of_group in (mean, deviation)
    )
    scale = norm.weight[:, None, None] / deviation
    return scale.float(), (norm.bias[:, None, None] - mean * scale).float()


def block_in_bands(block: ResBlock, x: Tensor, upsample: Upsample | None, rows: int) -> Tensor:
    """block(upsample(x)), or of x itself, which is then overwritten: what lies between is never whole."""
    scale, shift = affine(block.norm1, bands(x, upsample, rows))
    whole = len(x), block.norm2.num_channels, *(side * (2 if upsample else 1) for side in x.shape[2:])
    keeps_x = upsample is None and isinstance(block.nin_shortcut, nn.Identity)
    h, out = x.new_empty(whole), x if keeps_x else x.new_empty(whole)
    for band in bands(x, upsample, rows):
        h[:, :, band.rows] = block.conv1(F.silu(band.x * scale + shift).to(x.dtype))[:, :, band.own]
        if not keeps_x:
            out[:, :, band.rows] = block.nin_shortcut(band.x[:, :, band.own])
    scale, shift = affine(block.norm2, bands(h, None, rows))
    for band in bands(h, None, rows):
        out[:, :, band.rows] += block.conv2(F.silu(band.x * scale + shift).to(x.dtype))[:, :, band.own]
    return out


def decode_in_bands(vae: VAE, latent: Tensor, rows: int = 32) -> Tensor:
    """vae.decode up to rounding, with so many rows (an even number) of what lies between two layers at once.

    Its peak of memory is two tensors of the finest level. The statistics of norms are those of the whole picture, so
    that no seam shows.
    """
    if rows % 2:
        raise BadInput(f"bands have an even number of rows, not {rows}")
    decoder = vae.decoder
    h, upsample = decoder.mid(decoder.conv_in(vae.post_quant_conv(latent))), None
    for level in reversed(decoder.up):
        for block in level.block:  # type: ignore[union-attr]  # a ModuleList does not say what it holds
            h, upsample = block_in_bands(block, h, upsample, rows), None  # type: ignore[arg-type]
        upsample = level.upsample
    scale, shift = affine(decoder.norm_out, bands(h, None, rows))
    image = h.new_empty(len(h), 3, *h.shape[2:])
    for band in bands(h, None, rows):
        image[:, :, band.rows] = decoder.conv_out(F.silu(band.x * scale + shift).to(h.dtype))[:, :, band.own]
    return image
