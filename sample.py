"""A prompt in, a picture and its regions out: python sample.py "a red car left of a blue star on grass"."""

import math
import signal
import time
from argparse import Namespace

if __name__ == "__main__":  # an interrupt while modules load ends the program in silence
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
from torch import Tensor
from tqdm import tqdm

import scfg
from scfg import cli, cpu
from scfg.cli import parse
from scfg.report import Record, note_lines, sheet, to_image


def run(args: Namespace) -> Tensor:
    """Make and write all pictures; returns their final latents (count c h w)."""
    times = [time.perf_counter()]
    model = cli.load(args.checkpoint, args)
    job = cli.plan(model, args)
    cli.check_writable(args.out)
    print(cli.summary(args, model))
    times += [time.perf_counter(), 0.0, 0.0]

    latents, flags, made = [], [], cli.texts_of(args.out) if args.resume else set()
    with tqdm(total=args.count * args.steps, desc="sampling", unit="step") as progress:
        for first in range(args.seed, args.seed + args.count, args.batch):
            seeds = range(first, min(first + args.batch, args.seed + args.count))
            texts = [cli.parameters(args, model, seeds, i) for i in range(len(seeds))]
            lacking = [i for i, text in enumerate(texts) if cli.without_batch(text) not in made]
            if not lacking:
                progress.update(len(seeds) * args.steps)
                continue
            started = time.perf_counter()
            noise, record = model.noise(seeds, args.size), Record(regions=not args.no_regions)
            x = noise() * math.sqrt(job.sigmas[0] ** 2 + 1)
            for step in scfg.run(job.denoise, job.sampler, x, job.sigmas, noise):
                record.add(step)
                progress.update(len(seeds))
            sampled = time.perf_counter()
            for i in lacking:
                write(model, job.prompt.chunk, args, seeds[i], texts[i], step.latent, record, i)
            times[2] += sampled - started
            times[3] += time.perf_counter() - sampled
            latents.append(step.latent)
            flags.append((seeds, record.flags))
    for line in note_lines(flags, args.steps):
        print(line)
    if not latents:
        print(f"nothing to make: {args.out} holds every picture of this command")
    print(cli.spent(model, times[1] - times[0], times[2], times[3]))
    return torch.cat(latents) if latents else torch.empty(0, *model.latent_shape(args.size))


def write(
    model: scfg.Diffusion,
    chunk: int | None,
    args: Namespace,
    seed: int,
    text: str,
    latents: Tensor,
    record: Record,
    i: int,
) -> None:
    """Decode the i-th latent of a batch, by itself to save memory, and write the picture with its regions beside it."""
    picture, regions = to_image(model.decode(latents[i : i + 1])[0]), None
    if not args.no_regions:
        title = f"{args.prompt}   ({cli.in_short(args)}, seed {seed})"
        regions = sheet(picture, record.scores[i], record.scale[i], record.words[0], title, chunk)
    cli.save(args.out, seed, text, picture, regions)


def main() -> None:
    cpu.keep_freed_memory()
    with cli.reporting_errors("sample.py"):
        run(parse())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
