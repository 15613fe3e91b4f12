"""How much memory is free, and decoding within it."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .vae import VAE

WHOLE = 128 * 128  # latent pixels that are decoded at once
ROOM = 0.8  # share of the free memory that is counted on: convolutions take some to work in
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def free_memory(device: torch.device) -> float:
    """Bytes that this process can still take; infinity where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    found = [math.inf]
    if device.type == "cpu":
        with suppress(OSError):  # no Linux
            found.append(bytes_of("/proc/meminfo", "MemAvailable"))
            own = bytes_of("/proc/self/status", "RssAnon")
            for limit in LIMITS:
                with suppress(OSError, ValueError):  # the other version of cgroups, or "max"
                    found.append(int(Path(limit).read_text()) - own)
    return max(0, min(found))


def bytes_of(path: str, name: str) -> int:
    """A line "name: NUMBER kB" of a file in /proc."""
    lines = [line.split() for line in Path(path).read_text().splitlines()]
    return 1024 * next(int(words[1]) for words in lines if words and words[0] == f"{name}:")


def whole_bytes(vae: VAE) -> int:
    """The memory that decoding a latent pixel whole takes at its peak.

    That is before the finest level's first convolution, of as many channels as the level before has: what it is of, the
    same normed and that after its nonlinearity.
    """
    level: Any = vae.decoder.up[0]  # a ModuleList does not say what it holds
    numbers = 3 * level.block[0].norm1.num_channels * 4 ** (len(vae.decoder.up) - 1)
    return int(numbers * vae.quant_conv.weight.element_size())


def decode(vae: VAE, latent: Tensor) -> Tensor:
    """vae.decode of WHOLE latent pixels at once, or as many as memory has room for; larger pictures in bands."""
    pixels, room = math.prod(latent.shape[-2:]), ROOM * free_memory(latent.device) / whole_bytes(vae)
    if pixels > (most := min(WHOLE, room)):
        from .large import decode_in_bands

        return torch.cat([decode_in_bands(vae, one) for one in torch.split(latent, 1)])
    return torch.cat([vae.decode(some) for some in torch.split(latent, int(most) // pixels)])
