"""What each head of a named block attends to: maps are captured by the block's name, head by head."""

import torch
from einops import rearrange
from PIL import Image

import scfg

BLOCK = "output_blocks.2.1.transformer_blocks.0"  # model.unet.transformer_names() lists all


def main(word: str = "star", steps: int = 8, path: str = "heads.png") -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the maps of a word side by side; returns the self and the cross map, (heads n n) and (heads n t)."""
    model = scfg.load()
    prompt = model.prompt("a red car left of a blue star on grass")
    capture = scfg.Capture(blocks={BLOCK}, heads=True)
    denoiser = model.denoiser(prompt, scfg.SCFG(2.0), capture=capture)
    sigmas, noise = model.sigmas(steps), model.noise([0], (64, 64))
    x = noise() * (sigmas[0] ** 2 + 1) ** 0.5
    *_, step = zip(range(steps // 2), scfg.run(denoiser, "dpmpp_2m", x, sigmas, noise), strict=False)
    maps = step[1].denoised.maps[BLOCK]
    (token,) = [one.start for one in prompt.words[0] if one.text == word]
    pictures = rearrange(maps.cross[-1, :, :, token], "heads (h w) -> h (heads w)", h=maps.size[0])
    grey = (255 * pictures / pictures.max()).byte().numpy()
    Image.fromarray(grey).resize((8 * grey.shape[1], 8 * grey.shape[0]), Image.NEAREST).save(path)
    return maps.self[-1], maps.cross[-1]


if __name__ == "__main__":
    main()
