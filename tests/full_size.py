"""A full-size file of random weights, loaded and sampled: `python tests/full_size.py FOLDER [--family sdxl]`.

Writes FOLDER/<family>-random.safetensors (fp16, original names; 2.1 GB for SD 1.5, 6.9 GB for SDXL), then loads it in a
process of its own, encodes a text and makes one picture of 512x512 in two steps with S-CFG; prints times and peak
resident memory.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import families
import torch
from families import FAMILIES
from safetensors.torch import save_file

import scfg

TEXT = [49406, 320, 1125, 539, 320, 2368, 49407]  # "a photo of a cat" in CLIP's numbers: no tokenizer is at hand


def measure(path: Path) -> None:
    started = time.perf_counter()
    model = scfg.load(path)
    loaded = time.perf_counter()
    with torch.no_grad():
        states, pooled = model.text.encode([TEXT], model.device)
        empty, nothing = model.text.encode([[TEXT[0], TEXT[-1]]], model.device)
    context = {"uncond": torch.cat(empty, -1), "cond": torch.cat(states, -1)}
    prompt = scfg.Prompt(context, {} if pooled is None else {"uncond": nothing, "cond": pooled})
    encoded = time.perf_counter()
    for step in model.sample(prompt, scfg.SCFG(7.5), steps=2, size=(512, 512)):
        print(f"step {step.index + 1} of {step.count} after {time.perf_counter() - encoded:.1f} s")
    stepped = time.perf_counter()
    picture = model.decode(step.latent)
    print(
        f"load {loaded - started:.1f} s, text {encoded - loaded:.1f} s, 2 steps {stepped - encoded:.1f} s, "
        f"decode {time.perf_counter() - stepped:.1f} s, picture {tuple(picture.shape)}, "
        f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--measure", action="store_true", help="load the file that is there")
    args = parser.parse_args()
    file = args.folder / f"{args.family}-random.safetensors"
    if args.measure:
        measure(file)
    else:
        save_file(families.original(FAMILIES[args.family], torch.float16), file)
        subprocess.run([sys.executable, __file__, str(args.folder), "--family", args.family, "--measure"], check=True)
