"""Speed on CPUs, by an explicit call."""

import ctypes
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .diffusion import Diffusion
from .errors import BadInput

# numbers of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**30  # bytes: larger than any tensor of a step
BAND = 2**25  # bytes of tiles that a convolution has at once
POINTWISE, SAME_3X3 = ((1, 1), (1, 1), (0, 0)), ((3, 3), (1, 1), (1, 1))  # kernel, stride and padding
Compute = Callable[[Tensor], Tensor]
FEWEST = 32  # channels of a layer that is packed; the narrow ones take no time, and a model is asked for their weights


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees for its next tensors, on Linux; elsewhere it returns False.

    By default every large tensor comes from the kernel page by page and goes back when it is freed: a tenth of a step's
    time at 512x512 on a CPU, half of it at 128x128.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, LARGEST))


class Packed(nn.Module):
    """A layer that oneDNN computes from weights in the order in which it reads them; it has no gradients."""

    def __init__(self, layer: nn.Linear | nn.Conv2d):
        super().__init__()
        self.of = repr(layer)
        with torch.no_grad():
            self.compute = packed(layer)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise BadInput("packed weights have no gradients: do without scfg.cpu.pack where gradients are needed")
        with torch.no_grad():
            return self.compute(x)

    def extra_repr(self) -> str:
        return self.of


def packed(layer: nn.Linear | nn.Conv2d) -> Compute:
    """The fastest way to compute a layer."""
    if isinstance(layer, nn.Linear):
        return packed_linear(layer.weight, layer.bias)
    shape = layer.kernel_size, layer.stride, layer.padding
    if shape == POINTWISE:
        return pointwise(layer)
    return winograd(layer) if shape == SAME_3X3 and layer.weight.dtype == torch.float32 else packed_convolution(layer)


def packed_linear(weight: Tensor, bias: Tensor | None) -> Compute:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def packed_convolution(layer: nn.Conv2d) -> Compute:
    """Its output lies in memory pixel by pixel (channels last), which attention and the next convolution want."""
    how = layer.padding, layer.stride, layer.dilation, layer.groups
    plain, bias = layer.weight.to_mkldnn(), layer.bias
    # the stub of this private function wants lists of Any
    weight = torch._C._nn.mkldnn_reorder_conv2d_weight(plain, *how)  # type: ignore[arg-type]

    def compute(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how, "none", [], "")

    return compute


def pointwise(layer: nn.Conv2d) -> Compute:
    """A 1x1 convolution is a product over channels."""
    product = packed_linear(layer.weight[:, :, 0, 0].contiguous(), layer.bias)
    return lambda x: rearrange(product(rearrange(x, "b c h w -> b h w c")), "b h w c -> b c h w")


def winograd(layer: nn.Conv2d) -> Compute:
    """A 3x3 convolution with 16 products in place of 36 for every 2x2 outputs: F(2x2, 3x3) of 1509.09308.

    Tiles of 4x4 inputs, two apart, are transformed; each of their 16 places is one matrix product over channels.
    """
    g = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64, device="cpu")
    weight = torch.einsum("ia, o c a b, j b -> i j o c", g, layer.weight.double(), g).float()
    products = [[packed_linear(weight[i, j].contiguous(), None) for j in range(4)] for i in range(4)]
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    of_a_row = 64 * (layer.in_channels + layer.out_channels)  # bytes of a tile

    def band(x: Tensor) -> list[list[Tensor]]:
        """Padded rows (b h w c) -> the 2x2 outputs of every tile, each (b h/2 w/2 o)."""
        inputs = [into_tiles(row, 2) for row in into_tiles(x, 1)]
        middle = [[product(x) for product, x in zip(*row)] for row in zip(products, inputs)]
        columns = [out_of_tiles([row[j] for row in middle]) for j in range(4)]
        return [out_of_tiles([column[k] for column in columns]) for k in range(2)]

    def compute(x: Tensor) -> Tensor:
        (h, w), x = x.shape[-2:], rearrange(x, "b c h w -> b h w c")
        x = F.pad(x, (0, 0, 1, 1 + w % 2, 1, 1 + h % 2))
        rows = max(1, BAND // (of_a_row * len(x) * (x.shape[2] // 2)))  # of tiles
        out = x.new_empty(len(x), x.shape[1] - 2, x.shape[2] - 2, len(bias))
        for top in range(0, out.shape[1], 2 * rows):
            for k, row in enumerate(band(x[:, top : top + 2 * rows + 2])):
                for j, pixels in enumerate(row):
                    torch.add(pixels, bias, out=out[:, top + k : top + 2 * rows : 2, j::2])
        return rearrange(out[:, :h, :w], "b h w o -> b o h w")

    return compute


def into_tiles(x: Tensor, axis: int) -> list[Tensor]:
    """The four transformed inputs of all tiles along an axis of (b h w c)."""
    size = x.shape[axis] - 2
    d0, d1, d2, d3 = (x[(slice(None),) * axis + (slice(i, i + size, 2),)] for i in range(4))
    return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]


def out_of_tiles(m: list[Tensor]) -> list[Tensor]:
    """The two outputs of all tiles along an axis."""
    middle = m[1] - m[2]
    return [m[0] + m[1] + m[2], middle - m[3]]


@torch.no_grad()
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has what packing needs, and agrees with plain layers."""
    try:
        with torch.random.fork_rng(devices=[]):
            tried: dict[nn.Linear | nn.Conv2d, Tensor] = {
                nn.Linear(64, 96, dtype=dtype, device="cpu"): torch.randn(2, 5, 64, dtype=dtype, device="cpu"),
                nn.Conv2d(64, 96, 3, padding=1, dtype=dtype, device="cpu"): torch.randn(
                    2, 64, 7, 5, dtype=dtype, device="cpu"
                ),
            }
        apart = [(Packed(layer)(x) - layer(x)).abs().max().item() for layer, x in tried.items()]
    except (AttributeError, RuntimeError, TypeError):  # private names of another version, or no oneDNN
        return False
    return max(apart) < 100 * torch.finfo(dtype).eps


def pack_layers(network: nn.Module) -> None:
    """Replace a network's linear layers and convolutions by packed ones, in place."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if (type(layer) is nn.Linear or type(layer) is nn.Conv2d) and len(layer.weight) >= FEWEST:
                setattr(parent, name, Packed(layer))


def pack(model: Diffusion) -> bool:
    """Make a model on the CPU faster, for good and in place; False, and nothing changed, where that is not possible.

    The layers of its U-Net, and of a VAE that is not in float16, are replaced by packed ones, whose results differ by
    rounding (about 1e-6 of the largest value). They have no gradients, and the networks' state dicts lose them.
    """
    if model.device.type != "cpu" or not can_pack(model.dtype):
        return False
    pack_layers(model.unet)
    if model.vae.quant_conv.weight.dtype != torch.float16:  # which may have to decode in float32
        pack_layers(model.vae)
    return True
