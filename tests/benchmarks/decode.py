"""Decoding of SD's VAE, ours beside diffusers', on the same random weights."""

from typing import Any

import contenders  # noqa: F401  its paths
import original
import torch
from diffusers import AutoencoderKL
from timing import alternated, ratio

from scfg.config import SD1
from scfg.vae import VAE


@torch.no_grad()
def measure(device: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds and ratio at 512x512 and 1024x1024."""
    torch.manual_seed(0)
    reference = (
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        .eval()
        .to(device, dtype)
    )
    with torch.device("meta"):
        ours = VAE(SD1.vae)
    ours.load_state_dict(original.vae(reference), assign=True)
    found = {}
    for side in (512, 1024):
        latent = torch.randn(1, 4, side // 8, side // 8, device=device, dtype=dtype)
        contest = {"ours": lambda: ours.decode(latent), "diffusers": lambda: reference.decode(latent).sample}
        difference = (contest["ours"]() - contest["diffusers"]()).abs().max().item()
        seconds = alternated(contest, rounds)
        found[f"{side}x{side}"] = {
            "ours / diffusers": ratio(seconds["ours"], seconds["diffusers"]),
            "difference": difference,
            "seconds": {name: sorted(values)[len(values) // 2] for name, values in seconds.items()},
        }
    return found
