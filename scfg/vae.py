"""The autoencoder between pictures and latents. Attribute names are the original checkpoint's keys."""
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .config import VAEConfig
from .layers import Conv3x3


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))      # the original pads right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Self-attention with one head over all pixels."""
    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(to(h), "b c h w -> b 1 (h w) c").contiguous() for to in (self.q, self.k, self.v))   # fused attention wants it so
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """ResBlocks at one resolution and the step to the next."""
    def __init__(self, in_channels: int, out_channels: int, blocks: int,
                 downsample: nn.Module = nn.Identity(), upsample: nn.Module = nn.Identity()):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(blocks))
        self.downsample = downsample
        self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (before, width) in enumerate(zip([config.channels] + widths, widths)):
            downsample = Downsample(width) if i < len(widths) - 1 else nn.Identity()
            self.down.append(Level(before, width, config.res_blocks, downsample=downsample))
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        h = self.conv_in(image)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Band(NamedTuple):
    x: Tensor                                         # the rows of a band, with one more above and below where there is one
    rows: slice                                       # where the band's own rows lie in the whole
    own: slice                                        # and where in x


def bands(x: Tensor, upsample: Upsample | None, rows: int) -> Iterator[Band]:
    """So many rows (an even number) at a time of x, or of what it is upsampled to, which is never whole."""
    height = 2 * x.shape[2] if upsample else x.shape[2]
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        first, last = max(top - 1, 0), min(bottom + 1, height)
        if upsample:                                  # one row further: the outermost of a convolved band lacks a neighbour
            low = max(top // 2 - 1, 0)
            part = upsample(x[:, :, low:bottom // 2 + 1])[:, :, first - 2 * low:last - 2 * low]
        else:
            part = x[:, :, first:last]
        yield Band(part, slice(top, bottom), slice(top - first, bottom - first))


def affine(norm: nn.GroupNorm, parts: Iterable[Band]) -> tuple[Tensor, Tensor]:
    """What the norm multiplies a channel by and what it then adds, (b c 1 1) each, from all bands of its input."""
    count, total, squares = 0, 0, 0
    for band in parts:
        groups = rearrange(band.x[:, :, band.own].float(), "b (g c) h w -> b g (c h w)", g=norm.num_groups)
        variance, mean = (moment.double() for moment in torch.var_mean(groups, -1, correction=0))
        count, total = count + groups.shape[-1], total + groups.shape[-1] * mean
        squares = squares + groups.shape[-1] * (variance + mean ** 2)
    mean = total / count
    deviation = (squares / count - mean ** 2 + norm.eps).sqrt()
    mean, deviation = (repeat(of_group, "b g -> b (g c) 1 1", c=len(norm.weight) // norm.num_groups) for of_group in (mean, deviation))
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


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()                     # counted from the finest level, used from the coarsest
        for i, (width, before) in enumerate(zip(widths, widths[1:] + [widths[-1]])):
            upsample = Upsample(width) if i > 0 else nn.Identity()
            self.up.append(Level(before, width, config.res_blocks + 1, upsample=upsample))
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.mid(self.conv_in(latent))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    def in_bands(self, latent: Tensor, rows: int) -> Tensor:
        """The same with at most so many rows of what lies between two layers: its peak is two tensors of the finest level."""
        h, upsample = self.mid(self.conv_in(latent)), None
        for level in reversed(self.up):
            for block in level.block:
                h, upsample = block_in_bands(block, h, upsample, rows), None
            upsample = level.upsample
        scale, shift = affine(self.norm_out, bands(h, None, rows))
        image = h.new_empty(len(h), 3, *h.shape[2:])
        for band in bands(h, None, rows):
            image[:, :, band.rows] = self.conv_out(F.silu(band.x * scale + shift).to(h.dtype))[:, :, band.own]
        return image


class VAE(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (b 3 h w) in [-1, 1] -> mean and log variance of its unscaled latent, each (b c h/f w/f)."""
        mean, log_variance = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def decode(self, latent: Tensor, rows: int | None = None) -> Tensor:
        """Unscaled latent (b c h w) -> image (b 3 f*h f*w), about [-1, 1]; rows: so many at a time, for large pictures."""
        if rows and rows % 2:
            raise ValueError(f"bands have an even number of rows, not {rows}")
        latent = self.post_quant_conv(latent)
        return self.decoder.in_bands(latent, rows) if rows else self.decoder(latent)
