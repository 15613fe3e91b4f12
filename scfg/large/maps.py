"""Attention maps that cannot fit into memory are refused before any work."""

import math

import torch

from ..denoise import Denoiser
from ..errors import BadInput
from ..memory import free_memory
from ..unet import AT_ONCE


def check_maps(
    denoiser: Denoiser, device: torch.device, pictures: int, size: tuple[int, int], factor: int, remedy: str = ""
) -> None:
    """Raise BadInput where regions are read from maps that do not fit into the memory that is free on the device.

    pictures: that are made at once. size: (width, height) in pixels, of a VAE of this factor. remedy: what else to do.
    """
    if not (denoiser.segment or denoiser.guidance.recipe):
        return
    needed, free = map_bytes(denoiser, pictures, size, factor), free_memory(device)
    if device.type != "cpu":  # where more than one head is computed at once
        free = max(0, free - 2 * AT_ONCE * torch.float32.itemsize)
    if needed > free:
        shrunk = (free / needed) ** 0.25  # of a side: maps have the square of the picture's pixels
        step = factor * denoiser.map_divisor  # multiples of it leave no rest, which would be one more pixel
        width, height = (max(step, int(side * shrunk) // step * step) for side in size)
        many = f", {pictures} at once" if pictures > 1 else ""
        what = f"attention maps of {size[0]}x{size[1]} pixels{many} take {needed / 1e9:.0f} GB"
        fewer = ", or make fewer pictures at once" if pictures > 1 else ""
        raise BadInput(f"{what}, and {free / 1e9:.1f} GB are free: {width}x{height} would fit{fewer}{remedy}")


def map_bytes(denoiser: Denoiser, pictures: int, size: tuple[int, int], factor: int) -> int:
    """The most memory that reading regions takes, for the rows uncond and cond.

    Four maps of one block exist at once: a head's logits and probabilities, the sum over heads without it and with it.
    """
    pixels = math.prod(math.ceil(side / factor / denoiser.map_divisor) for side in size)
    return 4 * 2 * pictures * pixels**2 * torch.float32.itemsize
