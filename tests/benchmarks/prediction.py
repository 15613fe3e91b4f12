"""How reliably a network's answer to noise tells what it predicts: `python tests/benchmarks/prediction.py`.

Tiny networks of every family's structure are trained for a moment, each on synthetic latents of its own kind, to
predict eps or v; scfg.formats.predicts is then asked about each, and about networks that were not trained, of which it
has to be unsure. Printed beside the answers is what decides them, so that thresholds can be judged.
"""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

import scfg
from scfg.config import SD1, SD2_BASE, SDXL, SDXL_REFINER, Config
from scfg.formats.prediction import answer_to_pure_noise, likeness_to_little_noise, predicts
from scfg.schedule import Schedule
from scfg.unet import Conditioning, UNet

SIDE, BATCH, RATE = 8, 8, 2e-3  # of training: latent pixels along a side, latents a step, Adam's highest rate
TOKENS, CONTEXT, POOLED = 8, 64, 32  # of the random texts
ZEROED = ("out_layers.3.", "proj_out.", "out.2.")  # layers that latent diffusion's networks start at zero


class Family(NamedTuple):
    config: Config
    below: int = 1000  # the timesteps it is trained on
    kinds: Sequence[str] = ("eps", "v", "v, zero SNR", "untrained", "untrained x2")


FAMILIES = {
    "SD 1.x": Family(SD1),
    "SD 2.x": Family(SD2_BASE),  # base and v are one network
    "SDXL": Family(SDXL),
    "SDXL refiner": Family(SDXL_REFINER),
    # as it was published for eps (2307.01952): pure noise is then a level that it never saw
    "refiner, t < 200": Family(SDXL_REFINER, 200, ("eps",)),
}


class Asked(NamedTuple):
    """One network and its answer."""

    answer: str  # "right", "unsure" or "wrong"
    share: float
    cosine: float
    losses: tuple[float, float] | None  # at the start and at the end of its training


class Pictures(NamedTuple):
    """Latents of one kind: smooth fields and some white noise about a mean."""

    mean: Tensor  # (4 1 1)
    std: float
    white: float  # std of the white noise, where that of the smooth fields is 1

    @classmethod
    def draw(cls) -> "Pictures":
        std, white = torch.rand(2).tolist()
        return cls(torch.randn(4, 1, 1) / 2, 0.8 + 0.3 * std, 0.15 + 0.2 * white)

    def latents(self, batch: int) -> Tensor:
        """(batch 4 SIDE SIDE)"""
        fields = F.interpolate(torch.randn(batch, 4, 2, 2), size=(SIDE, SIDE), mode="bicubic")
        x = fields / fields.std() + 0.3 * torch.randn(batch, 4, 1, 1) + self.white * torch.randn(batch, 4, SIDE, SIDE)
        return self.std * x / x.std() + self.mean


def tiny(config: Config) -> Config:
    """A family with all its levels, ResBlocks and places of attention, at the least width and depth."""
    unet, scores = config.unet, 5 if config.aesthetic_scores else 6
    unet = replace(
        unet,
        model_channels=32,
        channel_mult=(1, 1, 2, 2)[: len(unet.channel_mult)],
        head_channels=unet.head_channels and 32,
        transformer_depth=tuple(min(depth, 1) for depth in unet.transformer_depth),
        middle_depth=1,
        context_dim=CONTEXT,
        vector_dim=unet.vector_dim and POOLED + 256 * scores,
    )
    return replace(config, unet=unet)


def target_of(kind: str, a: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    return noise if kind == "eps" else a.sqrt() * noise - (1 - a).sqrt() * x0


def train(unet: UNet, kind: str, steps: int, below: int) -> tuple[float, float]:
    """Train a network from the state that latent diffusion's begin in; the loss at the start and at the end."""
    for name, parameter in unet.named_parameters():
        if any(part in name for part in ZEROED):
            torch.nn.init.zeros_(parameter)
    schedule = Schedule(terminal_alpha=4.897e-08 if "zero SNR" in kind else None)
    signal = 1 / (torch.tensor(schedule.sigmas) ** 2 + 1)
    pictures, vector_dim, losses = Pictures.draw(), unet.config.vector_dim, []
    adam = torch.optim.Adam(unet.parameters(), RATE, betas=(0.9, 0.99), fused=True)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 10, 3 * (steps - step) / steps)
        x0, t = pictures.latents(BATCH), (below * (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH).long()
        a, noise = signal[t].float()[:, None, None, None], torch.randn_like(x0)
        vector = torch.randn(BATCH, vector_dim) if vector_dim else None
        conditioning = Conditioning(torch.randn(BATCH, TOKENS, CONTEXT), vector)
        out, _ = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, conditioning)
        loss = F.mse_loss(out, target_of(kind, a, x0, noise))
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    few = max(1, steps // 10)
    return sum(losses[:few]) / few, sum(losses[-2 * few :]) / len(losses[-2 * few :])


def ask(name: str, kind: str, number: int, steps: int) -> Asked:
    """Make a network, train it unless it is to stay random, and ask what it predicts."""
    family = FAMILIES[name]
    torch.manual_seed(random.Random(f"{name}, {kind}, {number}").getrandbits(32))
    config = tiny(family.config)
    unet, losses = UNet(config.unet), None
    if kind.startswith("untrained"):
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.mul_(2 if kind.endswith("x2") else 1)
    else:
        losses = train(unet, kind, steps, family.below)
    # the file says nothing: the family's own schedule is taken, zero terminal SNR or not
    model = scfg.Diffusion(config, unet.eval().requires_grad_(False), vae=None, text=None)
    found = predicts(model)
    if kind.startswith("untrained"):
        answer = "right" if found is None else "wrong"
    else:
        answer = "unsure" if found is None else "right" if found == kind.split(",")[0] else "wrong"
    return Asked(answer, answer_to_pure_noise(model)[0], likeness_to_little_noise(model), losses)


def spread(values: Sequence[float]) -> str:
    return " ".join(f"{of(values):6.2f}" for of in (min, median, max))


def row(name: str, kind: str, all_asked: Sequence[Asked]) -> str:
    counts = Counter(asked.answer for asked in all_asked)
    shares = " ".join(f"{100 * counts[answer] / len(all_asked):6.1f}%" for answer in ("right", "unsure", "wrong"))
    losses = [asked.losses for asked in all_asked if asked.losses]
    fall = " -> ".join(f"{median(values):.2f}" for values in zip(*losses)) if losses else ""
    found = " | ".join(spread([getattr(asked, field) for asked in all_asked]) for field in ("share", "cosine"))
    return f"{name:16} | {kind:12} | {fall:12} | {shares} | {found}"


def table(names: Sequence[str], networks: int, of: Callable[[str, str, int], Asked]) -> Iterator[str]:
    titles = f"{'right':>7} {'unsure':>7} {'wrong':>7}", f"{'share at pure noise':20}", f"{'cosine at little':20}"
    yield f"{'family':16} | {'trained for':12} | {'loss':12} | " + " | ".join(titles)
    yield f"{'':47} | {'':23} | " + " | ".join([f"{'min':>6} {'median':>6} {'max':>6}"] * 2)
    for name in names:
        for kind in FAMILIES[name].kinds:
            yield row(name, kind, [of(name, kind, number) for number in range(networks)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=50, help="of every family and kind (default: %(default)s)")
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=60, help="of every training (default: %(default)s)")
    args = parser.parse_args()
    started, total = time.perf_counter(), args.networks * sum(len(FAMILIES[name].kinds) for name in args.family)
    with tqdm(total=total, unit="network") as progress:

        def counted(name: str, kind: str, number: int) -> Asked:
            asked = ask(name, kind, number, args.steps)
            progress.update()
            return asked

        for line in table(args.family, args.networks, counted):
            progress.write(line)
    minutes = (time.perf_counter() - started) / 60
    print(f"{args.networks} networks each, {args.steps} steps of training, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
