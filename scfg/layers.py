"""The layers with most of the weights, which may be stored in fewer bits than are computed with: a layer widens them as it uses them."""
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS, PIXELS = 256, 512                           # with fewer Winograd's transforms cost more than the products that they save
TILES, KERNELS = 256, 64                              # at once: what is in hand stays near the cores, and small for large pictures
PIECE = 2 ** 22                                       # numbers of a kernel at once: memory for more is fresh every time, which takes longer

# B^T, G and A^T of the paper; rows and columns in one product
INPUT, KERNEL, OUTPUT = (torch.kron(matrix, matrix) for matrix in (
    torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
    torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
    torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])))


def winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve x (b c h w) with weight (k c 3 3), zeros around, with 2.25 times fewer products: F(2x2, 3x3) (Lavin & Gray 2015, 1509.09308, 4.1).

    Tiles of 4x4, two apart, give 2x2 each; what odd sides have over is cut off.
    """
    h, w = x.shape[2:]
    kernels = x.new_empty(16, *weight.shape[:2])
    for first in range(0, len(weight), KERNELS):
        some = weight[first:first + KERNELS].to(x.dtype)
        kernels[:, first:first + KERNELS] = (KERNEL @ rearrange(some, "k c i j -> (i j) (k c)")).view(16, *some.shape[:2])
    tiles = F.pad(x, (1, 1 + w % 2, 1, 1 + h % 2)).unfold(2, 4, 2).unfold(3, 4, 2)            # (b c y x 4 4), nothing copied yet
    out = x.new_empty(len(x), len(weight), 2 * tiles.shape[2], 2 * tiles.shape[3])
    rows = max(1, TILES // (len(x) * tiles.shape[3]))
    for top in range(0, tiles.shape[2], rows):
        band = tiles[:, :, top:top + rows]
        products = kernels @ (INPUT @ rearrange(band, "b c y x i j -> (i j) (c b y x)")).view(16, x.shape[1], -1)
        out[:, :, 2 * top:2 * (top + rows)] = rearrange(OUTPUT @ products.flatten(1), "(i j) (k b y x) -> b k (y i) (x j)",
                                                        i=2, k=len(weight), b=len(x), x=tiles.shape[3])
    return out.add_(bias[:, None, None])[:, :, :h, :w]


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, zeros around; on a CPU, whose libraries have no such algorithm, by Winograd's where it pays."""
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        w, on_cpu = self.weight, x.device.type == "cpu"
        if on_cpu and x.dtype == torch.float32 and not torch.is_grad_enabled() and min(w.shape[:2]) >= CHANNELS and x.numel() >= PIXELS * x.shape[1]:
            return winograd(x, w, self.bias)
        channels = PIECE // w[0].numel() if on_cpu else len(w)                # of the output, at once
        if len(w) <= channels:
            return F.conv2d(x, w.to(x.dtype), self.bias, padding=1)
        pieces = zip(w.split(channels), self.bias.split(channels))
        return torch.cat([F.conv2d(x, some.to(x.dtype), bias, padding=1) for some, bias in pieces], 1)
