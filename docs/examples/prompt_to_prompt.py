"""Prompt-to-prompt (2208.01626): another word in the same picture, by the cross-attention of the first prompt."""

from dataclasses import replace

import torch

import scfg
from scfg.report import to_image


def main(share: float = 0.6, steps: int = 8) -> torch.Tensor:
    model, maps = scfg.load(), {}
    sigmas, noise = model.sigmas(steps), model.noise([0], (64, 64))

    def network(x, t, conditioning, **options):
        def attend(q, k, v, site):
            if site.kind == "self" or 1 - t[0] / 999 > share:
                return scfg.attention(q, k, v, site)
            own = scfg.unet.probabilities(q, k, site.bias, heads=True)  # (2 heads n t): uncond, cond
            return maps.setdefault((site.block, t[0].item()), own) @ v  # what the first run leaves, by block and time

        return model.unet(x, t, conditioning, **(options | {"attend": attend}))

    start, texts = noise() * (sigmas[0] ** 2 + 1) ** 0.5, ("a red car on grass", "a red boat on grass")
    runs = [replace(model.denoiser(text, scfg.CFG(2.0)), network=network) for text in texts]
    return model.decode(torch.cat([[*scfg.run(r, "dpmpp_2m", start, sigmas, noise)][-1].latent for r in runs]))


if __name__ == "__main__":
    to_image(main()[1]).save("boat.png")
