"""Guidance is a value: it goes to JSON and back, regions included, and makes the same picture."""

import json

import torch

import scfg


def main(steps: int = 8) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The latents of a guidance and of what comes back from JSON; and the JSON."""
    regions = scfg.Region("red car", scale=5.0), scfg.Region("~(car | star)", times=0.5, start=0.2)
    guidance = scfg.Guidance(
        scale=scfg.ByRegion(scfg.SCFG(2.0), regions),
        direction=scfg.APG(),
        perturb=scfg.PAG(1.0),
        when=scfg.Interval(0.3, 9.0),
    )
    text = json.dumps(scfg.to_dict(guidance), indent=2)
    model = scfg.load()
    prompt = model.prompt("a red car left of a blue star on grass")
    *_, made = model.sample(prompt, guidance, steps=steps)
    *_, again = model.sample(prompt, scfg.from_dict(json.loads(text)), steps=steps)
    return made.latent, again.latent, text


if __name__ == "__main__":
    print(main())
