"""Speed on CPUs, by an explicit call."""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .diffusion import Diffusion
from .errors import BadInput

# numbers of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**30  # bytes: larger than any tensor of a step
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
        self.of, self.bias = repr(layer), layer.bias
        self.compute = packed_linear(layer) if isinstance(layer, nn.Linear) else packed_convolution(layer)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            raise BadInput("packed weights have no gradients: do without scfg.cpu.pack where gradients are needed")
        return self.compute(x)

    def extra_repr(self) -> str:
        return self.of


def packed_linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
    bias = layer.bias
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed_convolution(layer: nn.Conv2d) -> Callable[[Tensor], Tensor]:
    """Its output lies in memory pixel by pixel (channels last), which attention and the next convolution want."""
    how = layer.padding, layer.stride, layer.dilation, layer.groups
    weight, bias = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.detach().to_mkldnn(), *how), layer.bias

    def compute(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *how, "none", [], "")

    return compute


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has what packing needs, and agrees with plain layers."""
    try:
        with torch.random.fork_rng(devices=[]):
            tried = {
                nn.Linear(64, 96, dtype=dtype): torch.randn(2, 5, 64, dtype=dtype),
                nn.Conv2d(64, 96, 3, padding=1, dtype=dtype): torch.randn(2, 64, 7, 5, dtype=dtype),
            }
        apart = [(Packed(layer)(x) - layer(x)).abs().max().item() for layer, x in tried.items()]
    except (AttributeError, RuntimeError, TypeError):  # private names of another version, or no oneDNN
        return False
    return max(apart) < 100 * torch.finfo(dtype).eps


@torch.no_grad()
def pack_layers(network: nn.Module) -> None:
    """Replace a network's linear layers and convolutions by packed ones, in place."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) in (nn.Linear, nn.Conv2d) and len(layer.weight) >= FEWEST:
                setattr(parent, name, Packed(layer))


def pack(model: Diffusion) -> bool:
    """Make a model on the CPU faster, for good and in place; False, and nothing changed, where that is not possible.

    The layers of its U-Net and VAE are replaced by packed ones, whose results differ by rounding (about 1e-6 of the
    largest value). They have no gradients, and the networks' state dicts lose them.
    """
    if model.device.type != "cpu" or not can_pack(model.dtype):
        return False
    pack_layers(model.unet)
    pack_layers(model.vae)
    return True
