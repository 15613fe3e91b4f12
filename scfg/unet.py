"""The U-Net of every Stable Diffusion family. Attribute names are the original checkpoint's keys; attention maps are return values."""
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UNetConfig
from .layers import Conv3x3, Linear


class Maps(NamedTuple):
    """Attention probabilities of one transformer block, averaged over heads, fp32; every row sums to one."""
    self: Tensor                                      # (b n n), n = h * w
    cross: Tensor                                     # (b n t)
    size: tuple[int, int]                             # (h, w)


class Asked(NamedTuple):
    """What the transformer blocks attend to, and which maps they return."""
    context: Tensor                                   # (r*b t d)
    shares: Tensor | None                             # (r*b k H W) of the context's k equal parts at every pixel; None: it has one
    padding: Tensor | None                            # (r*b 1 1 t) minus infinity at tokens that do not count, else 0; None: all do
    pixels: int                                       # blocks with at most this many return maps,
    keep: Callable[[Maps], Any]                       # or what this makes of them,
    rows: int                                         # of the first rows and of the context's first part
    alone: int = 0                                    # so many of the last rows' pixels attend to themselves only

    def bias(self, size: tuple[int, int]) -> Tensor | None:
        """What is added to a block's attention logits, (r*b 1 n|1 t): a token then counts as often as its part's share says."""
        if self.shares is None:
            return self.padding
        shares = F.interpolate(self.shares, size=size, mode="area").log().to(self.context.dtype)
        shares = repeat(shares, "b k h w -> b 1 (h w) (k t)", t=self.context.shape[1] // shares.shape[1])
        return shares if self.padding is None else shares + self.padding

    @property
    def tokens(self) -> int:
        """Those of the context's first part."""
        return self.context.shape[1] // (1 if self.shares is None else self.shares.shape[1])


def all_of_it(maps: Maps) -> Maps:
    return maps


def expand(x: Tensor, rows: int) -> Tensor:
    """Repeat the batch as a whole until it has `rows` rows: the rows of a guided step share x until they differ."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids (b channels) of timesteps (b), cosines first, wavelengths from 2 pi to 20000 pi (Ho et al. 2020)."""
    half = torch.arange(channels // 2, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * half / (channels // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def mean_probabilities(q: Tensor, k: Tensor, padding: Tensor | None = None) -> Tensor:
    """Queries (b heads n d), keys (b heads m d) -> softmax(q k^T / sqrt d + padding (b 1 m)), averaged over heads, (b n m), in fp32.

    One head at a time: no (b heads n m) tensor ever exists.
    """
    q, total = q.float() * q.shape[-1] ** -0.5, 0
    for q_head, k_head in zip(q.unbind(1), k.float().unbind(1)):
        logits = q_head @ k_head.mT
        total = total + (logits if padding is None else logits + padding).softmax(dim=-1)
    return total / q.shape[1]


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, embedding: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), Conv3x3(in_channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(                                                          # dropout keeps the names' numbers
            nn.GroupNorm(32, out_channels), nn.SiLU(), nn.Dropout(0), Conv3x3(out_channels, out_channels))
        self.skip_connection = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = self.out_layers(h + self.emb_layers(embedding[:len(x)])[:, :, None, None])
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor, mapped: tuple[int, int] | None, bias: Tensor | None = None,
                padding: Tensor | None = None, alone: int = 0) -> tuple[Tensor, Tensor | None]:
        """Pixels (b n c) attend to context (b m d), logits biased; returns (b n c) and, if asked for, the map of (rows, m), padding alone added.

        The pixels of the last rows, so many as are `alone`, attend to themselves: their attention is the identity (2403.17377).
        """
        q = rearrange(self.to_q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k = rearrange(self.to_k(context), "b m (heads d) -> b heads m d", heads=self.heads)
        v = rearrange(self.to_v(context), "b m (heads d) -> b heads m d", heads=self.heads)
        others = len(q) - alone
        out = F.scaled_dot_product_attention(q[:others], k[:others], v[:others], attn_mask=bias)
        out = rearrange(torch.cat([out, v[others:]]) if alone else out, "b heads n d -> b n (heads d)")
        if not mapped:
            return self.to_out(out), None
        rows, tokens = mapped
        padding = padding if padding is None else padding[:rows, 0, :, :tokens]
        return self.to_out(out), mean_probabilities(q[:rows], k[:rows, :, :tokens], padding)


class GEGLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0), Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(channels, channels, heads)
        self.ff = FeedForward(channels)
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, size: tuple[int, int], asked: Asked) -> tuple[Tensor, list]:
        """Pixels (b n c) -> pixels (r*b n c) and what is kept of this block's maps."""
        rows, captured = len(asked.context), x.shape[1] <= asked.pixels
        x = expand(x, rows) if asked.alone else x
        normed = self.norm1(x)
        out, self_map = self.attn1(normed, normed, (asked.rows, x.shape[1]) if captured else None, alone=asked.alone)
        x = expand(x + out, rows)
        out, cross_map = self.attn2(self.norm2(x), asked.context, (asked.rows, asked.tokens) if captured else None, asked.bias(size), asked.padding)
        x = x + out
        x = x + self.ff(self.norm3(x))
        return x, [asked.keep(Maps(expand(self_map, asked.rows), cross_map, size))] if captured else []


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""
    def __init__(self, channels: int, depth: int, config: UNetConfig):
        super().__init__()
        heads = config.heads or channels // config.head_channels
        self.linear = config.linear_projections
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, config.context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, asked: Asked) -> tuple[Tensor, list]:
        size, kept = tuple(x.shape[-2:]), []
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h, maps = block(h, size, asked)
            kept += maps
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=size[0])
        h = h if self.linear else self.proj_out(h)
        return expand(x, len(h)) + h, kept


class Block(nn.ModuleList):
    """The layers between two skip connections."""
    def forward(self, x: Tensor, embedding: Tensor, asked: Asked, size: tuple[int, int] | None = None) -> tuple[Tensor, list]:
        """`size` is what an upsampling at the end has to reach: that of the next skip, also where it is odd."""
        kept = []
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x, maps = layer(x, asked)
                kept += maps
            elif isinstance(layer, Upsample):
                x = layer(x, size)
            else:
                x = layer(x)
        return x, kept


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        base, embedding = config.model_channels, 4 * config.model_channels
        widths = [base * m for m in config.channel_mult]

        def stage(in_channels: int, width: int, depth: int) -> Block:
            block = Block([ResBlock(in_channels, width, embedding)])
            return block.append(SpatialTransformer(width, depth, config)) if depth else block

        self.time_embed = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        if config.vector_dim:
            self.label_emb = nn.Sequential(nn.Sequential(
                nn.Linear(config.vector_dim, embedding), nn.SiLU(), nn.Linear(embedding, embedding)))

        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(config.in_channels, base, 3, padding=1)])])
        channels, skips = base, [base]
        for level, (width, depth) in enumerate(zip(widths, config.transformer_depth)):
            for _ in range(config.res_blocks):
                self.input_blocks.append(stage(channels, width, depth))
                channels = width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Block([Downsample(width)]))
                skips.append(width)

        self.middle_block = stage(channels, channels, config.middle_depth).append(ResBlock(channels, channels, embedding))

        self.output_blocks = nn.ModuleList()
        for level, (width, depth) in reversed(list(enumerate(zip(widths, config.transformer_depth)))):
            for i in range(config.res_blocks + 1):
                self.output_blocks.append(stage(channels + skips.pop(), width, depth))
                channels = width
                if level and i == config.res_blocks:
                    self.output_blocks[-1].append(Upsample(width))
        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, config.out_channels, 3, padding=1))

    def attending(self) -> list[str]:
        """The prefixes of the keys of its blocks with attention."""
        blocks = {f"{side}.{i}": block for side in ("input_blocks", "output_blocks") for i, block in enumerate(getattr(self, side))}
        return [name for name, block in {"middle_block": self.middle_block, **blocks}.items() if any(isinstance(layer, SpatialTransformer) for layer in block)]

    def forward(self, x: Tensor, t: Tensor, context: Tensor, vector: Tensor | None = None, *, map_pixels: int = 0,
                keep: Callable[[Maps], Any] = all_of_it, shares: Tensor | None = None, counted: Tensor | None = None,
                perturbed: int = 0, layers: Collection[str] = ()) -> tuple[Tensor, list]:
        """Noisy latents x (b c h w), timesteps t (b), context (r*b t d), vector (r*b v) -> prediction (r*b c h w), kept maps.

        The context may hold r rows for every x, row by row for the whole batch: x is expanded where they first differ.
        Blocks of at most `map_pixels` pixels also compute their Maps; the list holds keep(maps) of each, in the order
        in which the blocks run. The prediction comes from fused attention in either case.
        shares (r*b k h w): how much each of the context's k equal parts counts at a pixel, one at least more than nothing; maps
        are those of the first part as if it were alone. counted (r*b t): the tokens that are more than filling, at least one a row.
        perturbed: so many of the last rows have no maps and, in the blocks named by `layers` ("middle_block", "input_blocks.4"),
        identity self-attention.
        """
        if perturbed and (isinstance(layers, str) or not layers or not set(layers) <= set(self.attending())):
            raise ValueError(f"perturbed layers are some of {', '.join(self.attending())}, in a tuple; not {layers!r}")
        padding = counted if counted is None else torch.where(counted[:, None, None], 0.0, -math.inf).to(context.dtype)
        asked = Asked(context, shares, padding, map_pixels, keep, len(context) - perturbed)
        embedding = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        if (vector is None) == bool(self.config.vector_dim):
            raise ValueError(f"this U-Net takes {'a' if self.config.vector_dim else 'no'} vector beside its context")
        embedding = expand(embedding, len(context))
        if vector is not None:
            embedding, x = embedding + self.label_emb(vector), expand(x, len(context))
        alone, kept, skips = asked._replace(alone=perturbed), [], []
        for i, block in enumerate(self.input_blocks):
            x, maps = block(x, embedding, alone if f"input_blocks.{i}" in layers else asked)
            kept += maps
            skips.append(x)
        x, maps = self.middle_block(x, embedding, alone if "middle_block" in layers else asked)
        kept += maps
        for i, block in enumerate(self.output_blocks):
            x = torch.cat([x, expand(skips.pop(), len(x))], dim=1)
            x, maps = block(x, embedding, alone if f"output_blocks.{i}" in layers else asked, skips[-1].shape[-2:] if skips else None)
            kept += maps
        return self.out(x), kept
