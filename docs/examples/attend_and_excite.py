"""Attend-and-Excite (2301.13826): between steps the latent moves so that every thing's word is attended to."""

import torch

import scfg


def neglect(maps: dict[str, scfg.Maps], tokens: list[int]) -> torch.Tensor:
    """1 minus the attention that the most neglected token has at its best pixel, mean over blocks."""
    best = torch.stack([block.cross[-1][:, tokens].amax(0) for block in maps.values()])  # of the conditional row
    return 1 - best.mean(0).min()


def main(rate: float = 0.1, steps: int = 8) -> list[float]:
    model, losses = scfg.load(), []
    prompt = model.prompt("a red car left of a blue star on grass")
    tokens = [word.start for word in prompt.words[0] if word.text in ("car", "star")]
    denoise = model.denoiser(prompt, scfg.CFG(2.0), capture=scfg.Capture(pixels=256))
    step = next(run := model.sample(prompt, scfg.CFG(2.0), steps=steps))
    while step.next_sigma:
        x = step.x.requires_grad_()
        loss = neglect(denoise(x, step.next_sigma).maps, tokens)
        losses.append(loss.item())
        (slope,) = torch.autograd.grad(loss, x)
        step = run.send(x.detach() - rate * step.next_sigma * slope / slope.std())
    return losses


if __name__ == "__main__":
    print(main())
