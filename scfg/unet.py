"""The U-Net of every Stable Diffusion family. Attribute names are the original checkpoint's keys.

Attention maps are return values, attention functions are arguments.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .config import UNetConfig
from .errors import BadInput

# Weights of tokens: 0 for filler, which is excluded. LEAST outside a text's area, where its own map must stay defined:
# weights below NOWHERE become a bias of SILENCED, because log(1e-30) = -69 is within the range of attention logits.
LEAST, NOWHERE, SILENCED = 1e-30, 1e-20, -1e4
# numbers of maps that are computed at once, where that is fewer than all: 256 MB; what a CPU's cache holds
AT_ONCE, AT_ONCE_ON_CPU = 2**26, 2**18


class Maps(NamedTuple):
    """Attention probabilities of one transformer block in fp32, the mean over heads; every row sums to one.

    Where heads are asked for, (b heads n n) and (b heads n t).
    """

    self: Tensor  # (b n n), n = h * w
    cross: Tensor  # (b n t)
    size: tuple[int, int]  # (h, w)


class Capture(NamedTuple):
    """Which transformer blocks return maps, and `make`, which is applied to the Maps of each."""

    pixels: int = 0  # blocks of at most this many pixels,
    blocks: Collection[str] = ()  # and these, such as "input_blocks.4.1.transformer_blocks.0"
    heads: bool = False  # every head's maps, or their mean
    make: Callable[[Maps], Any] = lambda maps: maps
    entries: slice = slice(None)  # of the r*b entries, those whose maps are returned


class Site(NamedTuple):
    """Where an attention function is called, and what it adds to the logits."""

    block: str  # "input_blocks.4.1.transformer_blocks.0"
    kind: Literal["self", "cross"]
    size: tuple[int, int]  # (h, w) of the pixels
    bias: Tensor | None  # (b 1 n|1 t), the logarithm of the tokens' weight


Captured = dict[str, Any]  # by block, what a Capture makes of its maps
Attend = Callable[[Tensor, Tensor, Tensor, Site], Tensor]  # q, k, v (b heads n d) -> (b heads n d)


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """Without the caller's autocast, which would round what is exact here."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Conditioning(NamedTuple):
    """What the network is conditioned on, r*b entries: all pictures of the first row, then all of the next."""

    tokens: Tensor  # (r*b t d)
    vector: Tensor | None = None  # (r*b v), XL's
    weight: Tensor | None = None  # (r*b t h w | 1 1) how many times a token counts at a pixel; filler: 0 everywhere
    own: int | None = None  # the number of leading tokens that maps describe; None: all
    flags: Mapping[str, Tensor] = {}  # messages for the user -> (b) the pictures that they are true of
    layout: Any = None  # this step's segment.Tokens, where they change from step to step
    rows: Sequence[Any] = ()  # the guidance.Rows of these entries, where they are more than were asked for
    merge: Callable[[Any, Any], Any] = lambda evaluated, asked: evaluated  # denoise.Evaluated, by the rows asked for
    guidance: Tensor | None = None  # (1 g), what an LCM is told of its scale
    # tokens, and by block their keys and values; these act while they are the tokens above
    projected: tuple[Tensor, Mapping[str, tuple[Tensor, Tensor]]] | None = None

    def known(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The keys and values (r*b t c) of the tokens by block, where they were projected before."""
        return self.projected[1] if self.projected and self.projected[0] is self.tokens else {}

    def bias(self, size: tuple[int, int]) -> Tensor | None:
        """What the weight adds to the attention logits of h x w pixels, (r*b 1 h*w|1 t)."""
        if self.weight is None:
            return None
        weight = self.weight
        if weight.shape[-2:] != (1, 1):
            from .resize import by_area

            weight = by_area(weight, size)
        bias = weight.log().masked_fill((weight > 0) & (weight < NOWHERE), SILENCED)
        return rearrange(bias, "b t h w -> b 1 (h w) t").to(self.tokens.dtype)


class Call(NamedTuple):
    """What one call of the network hands down to its blocks."""

    conditioning: Conditioning
    capture: Capture
    attend: Attend | None
    inject: Mapping[str, Tensor]
    known: Mapping[str, tuple[Tensor, Tensor]]  # by block, keys and values of the tokens


def expand(x: Tensor, rows: int) -> Tensor:
    """Repeat the batch as a whole until it has `rows` rows: the rows of a guided step share x until they differ."""
    return torch.cat([x] * (rows // len(x))) if len(x) < rows else x


def timestep_embedding(t: Tensor, channels: int) -> Tensor:
    """Sinusoids (b channels) of timesteps (b), cosines first, wavelengths from 2 pi to 20000 pi (Ho et al. 2020)."""
    half = torch.arange(channels // 2, dtype=torch.float32, device=t.device)
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * half / (channels // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The network's own attention function, q (b heads n d), k and v (b heads m d) -> (b heads n d)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=site.bias)


def probabilities(q: Tensor, k: Tensor, bias: Tensor | None = None, heads: bool = False) -> Tensor:
    """softmax(q k^T / sqrt d + bias) in fp32, q (b heads n d), k (b heads m d), bias (b 1 n|1 m).

    The mean over heads (b n m), or with `heads` (b heads n m). For the mean a few heads are computed at a time, so that
    no large (b heads n m) ever exists.
    """
    (b, count, n, d), at_once = q.shape, AT_ONCE_ON_CPU if q.device.type == "cpu" else AT_ONCE
    group = count
    while not heads and group > 1 and (b * group * n * k.shape[2] > at_once or count % group):
        group -= 1
    # products of half precision are exact in fp32, in which this sums them
    fast = q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16) and not q.requires_grad
    q, k = (q, k) if fast else (q.float() * d**-0.5, k.float())
    total: Any = None  # a tensor after the first group
    for i in range(0, count, group):
        queries, keys = q[:, i : i + group].flatten(0, 1), k[:, i : i + group].flatten(0, 1).mT
        product = torch.bmm(queries, keys, out_dtype=torch.float32) * d**-0.5 if fast else queries @ keys
        logits = rearrange(product, "(b heads) n m -> b heads n m", b=b)
        maps = (logits if bias is None else logits + bias).softmax(-1)
        mean = maps if heads else maps[:, 0] if group == 1 else maps.mean(1)
        total = mean if total is None else total + mean
    return total if group == count else total * (group / count)


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class ResBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, embedding: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(32, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        # Dropout(0) only keeps the checkpoint's layer numbers
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out_channels),
            nn.SiLU(),
            nn.Dropout(0),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.in_layers(x)
        h = self.out_layers(h + self.emb_layers(embedding[: len(x)])[:, :, None, None])
        return self.skip_connection(x) + h


class Attention(nn.Module):
    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, site: Site, call: Call, captured: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Pixels (b n c) attend to keys and values (b m c): the output (b n c), and where it is captured the map."""
        q = rearrange(self.to_q(x), "b n (heads d) -> b heads n d", heads=self.heads)
        k = rearrange(keys, "b m (heads d) -> b heads m d", heads=self.heads)
        v = rearrange(values, "b m (heads d) -> b heads m d", heads=self.heads)
        fused = F.scaled_dot_product_attention  # what `attention` calls
        out = call.attend(q, k, v, site) if call.attend else fused(q, k, v, attn_mask=site.bias)
        out = self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))
        if not captured:
            return out, None
        # rows that are still shared have one map for all
        entries = call.capture.entries if len(q) == len(call.conditioning.tokens) else slice(None)
        own, bias = call.conditioning.own if site.kind == "cross" else None, site.bias
        if bias is not None:
            # what all own tokens share cancels in their softmax; taken off first, it costs no precision
            bias = bias[entries, :, :, :own] - bias[entries, :, :, :own].amax(-1, keepdim=True)
        return out, probabilities(q[entries], k[entries, :, :own], bias, call.capture.heads)


class GEGLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    name = ""  # its key in the U-Net, set there

    def __init__(self, channels: int, context_dim: int, heads: int):
        super().__init__()
        feed_forward = nn.Sequential(GEGLU(channels, 4 * channels), nn.Dropout(0), nn.Linear(4 * channels, channels))
        self.attn1 = Attention(channels, channels, heads)
        self.ff = nn.ModuleDict({"net": feed_forward})
        self.attn2 = Attention(channels, context_dim, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def forward(self, x: Tensor, size: tuple[int, int], bias: Tensor | None, call: Call) -> tuple[Tensor, Captured]:
        """Pixels (b n c) -> pixels (r*b n c), and what is made of this block's maps where it is captured."""
        tokens, capture = call.conditioning.tokens, call.capture
        captured = x.shape[1] <= capture.pixels or self.name in capture.blocks
        normed, site = self.norm1(x), Site(self.name, "self", size, None)
        out, self_map = self.attn1(normed, self.attn1.to_k(normed), self.attn1.to_v(normed), site, call, captured)
        x = x + out
        x = x if len(x) == len(tokens) else expand(x, len(tokens))  # from here the rows differ
        keys, values = call.known.get(self.name) or (self.attn2.to_k(tokens), self.attn2.to_v(tokens))
        out, cross_map = self.attn2(self.norm2(x), keys, values, Site(self.name, "cross", size, bias), call, captured)
        x = x + out
        x = x + self.ff["net"](self.norm3(x))
        if self_map is None or cross_map is None:
            return x, {}
        self_map = self_map if len(self_map) == len(cross_map) else expand(self_map, len(cross_map))
        return x, {self.name: capture.make(Maps(self_map, cross_map, size))}


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(self, channels: int, depth: int, config: UNetConfig):
        super().__init__()
        heads = config.heads or channels // (config.head_channels or channels)
        self.linear = config.linear_projections
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        blocks = [TransformerBlock(channels, config.context_dim, heads) for _ in range(depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, call: Call) -> tuple[Tensor, Captured]:
        size = x.shape[-2], x.shape[-1]
        captured: Captured = {}
        bias = call.conditioning.bias(size)
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        h = rearrange(h, "b c h w -> b (h w) c")
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h, of_block = block(h, size, bias, call)
            captured |= of_block
        h = self.proj_out(h) if self.linear else h
        h = rearrange(h, "b (h w) c -> b c h w", h=size[0])
        h = h if self.linear else self.proj_out(h)
        return expand(x, len(h)) + h, captured


class Block(nn.ModuleList):
    """The layers between two skip connections."""

    name = ""  # its key in the U-Net, set there

    def forward(
        self, x: Tensor, embedding: Tensor, call: Call, size: tuple[int, int] | None = None
    ) -> tuple[Tensor, Captured]:
        """size: that of the next skip, the target of an upsampling at the end; it may be odd."""
        captured: Captured = {}
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            elif isinstance(layer, SpatialTransformer):
                x, captured = layer(x, call)
            else:
                x = layer(x, size) if isinstance(layer, Upsample) else layer(x)
        if self.name in call.inject:
            x = expand(x, len(call.inject[self.name])) + call.inject[self.name]
        return x, captured


def mlp(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_channels, out_channels), nn.SiLU(), nn.Linear(out_channels, out_channels))


def stage(in_channels: int, width: int, depth: int, config: UNetConfig) -> Block:
    """A ResBlock, and a spatial transformer of so many blocks; 0: none."""
    block = Block([ResBlock(in_channels, width, 4 * config.model_channels)])
    return block.append(SpatialTransformer(width, depth, config)) if depth else block


class UNet(nn.Module):
    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        base, embedding = config.model_channels, 4 * config.model_channels
        widths = [base * m for m in config.channel_mult]
        self.time_embed = mlp(base, embedding)
        if config.guidance_dim:  # an LCM's, which methods.distilled reads
            self.time_embed.cond_proj = nn.Linear(config.guidance_dim, base, bias=False)
        if config.vector_dim:
            self.label_emb = nn.Sequential(mlp(config.vector_dim, embedding))

        self.input_blocks = nn.ModuleList([Block([nn.Conv2d(config.in_channels, base, 3, padding=1)])])
        channels, skips = base, [base]
        for level, width in enumerate(widths):
            for depth in config.depths(level)[: config.res_blocks]:
                self.input_blocks.append(stage(channels, width, depth, config))
                channels = width
                skips.append(width)
            if level < len(widths) - 1:
                self.input_blocks.append(Block([Downsample(width)]))
                skips.append(width)

        self.middle_block = stage(channels, channels, config.middle_depth or 0, config)
        if config.middle_depth is not None:
            self.middle_block.append(ResBlock(channels, channels, embedding))

        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for depth in config.depths(level)[config.res_blocks :]:
                block = stage(channels + skips.pop(), width, depth, config)
                self.output_blocks.append(block)
                channels = width
            if level:
                block.append(Upsample(width))
        self.out = nn.Sequential(nn.GroupNorm(32, base), nn.SiLU(), nn.Conv2d(base, config.out_channels, 3, padding=1))
        for name, module in self.named_modules():
            if isinstance(module, TransformerBlock | Block):
                module.name = name

    def transformer_names(self) -> list[str]:
        """The names of its transformer blocks, by which a Site and a Capture know them."""
        return [module.name for module in self.modules() if isinstance(module, TransformerBlock)]

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """With the keys and values of its tokens, for as long as the weights stay as they are."""
        tokens, blocks = conditioning.tokens, [block for block in self.modules() if isinstance(block, TransformerBlock)]
        projected = {block.name: (block.attn2.to_k(tokens), block.attn2.to_v(tokens)) for block in blocks}
        return conditioning._replace(projected=(tokens, projected))

    def embed(self, t: Tensor, conditioning: Conditioning, dtype: torch.dtype) -> Tensor:
        """What every ResBlock is told, (r*b e): the timesteps, XL's vector, an LCM's guidance scale."""
        for name, size in (("vector", self.config.vector_dim), ("guidance", self.config.guidance_dim)):
            if (getattr(conditioning, name) is None) == bool(size):
                raise BadInput(f"this U-Net takes {'a' if size else 'no'} {name} beside its tokens")
        time = timestep_embedding(t, self.config.model_channels).to(dtype)
        if conditioning.guidance is not None:
            time = time + conditioning.guidance @ self.get_parameter("time_embed.cond_proj.weight").mT
        embedding = expand(self.time_embed[:3](time), len(conditioning.tokens))
        return embedding if conditioning.vector is None else embedding + self.label_emb(conditioning.vector)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        capture: Capture | None = None,
        attend: Attend | None = None,
        residuals: Sequence[Tensor] = (),
        inject: Mapping[str, Tensor] = {},
    ) -> tuple[Tensor, Captured]:
        """Scaled latents x (b c h w), timesteps t (b), r rows of conditioning -> output (r*b c h w), captured by block.

        The rows share x, which is expanded where they first differ. Capturing does not change the output.
        attend: an attention function in place of the network's own. residuals: added to every skip, in the order of
        the input blocks, and to the middle (ControlNet). inject: added to a block's output, by name (T2I-Adapter).
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise BadInput(f"a latent is (b {self.config.in_channels} h w), not {tuple(x.shape)}")
        call = Call(conditioning, capture or Capture(), attend, inject, conditioning.known())
        rows, skips = len(conditioning.tokens), []
        captured: Captured = {}
        embedding = self.embed(t, conditioning, x.dtype)
        x = x if conditioning.vector is None else expand(x, rows)
        for block in self.input_blocks:
            x, of_block = block(x, embedding, call)
            captured |= of_block
            skips.append(x)
        x, of_block = self.middle_block(x, embedding, call)
        captured |= of_block
        if residuals:
            skips = [expand(skip, len(more)) + more for skip, more in zip(skips, residuals[:-1], strict=True)]
            x = x + residuals[-1]
        for block in self.output_blocks:
            skip = skips.pop()
            x = torch.cat([x, skip if len(skip) == len(x) else expand(skip, len(x))], dim=1)
            x, of_block = block(x, embedding, call, skips[-1].shape[-2:] if skips else None)
            captured |= of_block
        return self.out(x), captured
