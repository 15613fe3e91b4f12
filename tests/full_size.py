"""A full-size SD 1.5 file of random weights, loaded and sampled: `python tests/full_size.py FOLDER`.

Writes FOLDER/sd15-random.safetensors (fp16, 2.1 GB, original names), then loads it in a process of its own and makes one picture
of 512x512 in two steps with S-CFG; prints load time, step time and peak resident memory.
"""
import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import families
import torch
from safetensors.torch import save_file

import scfg
from scfg.config import SD1


def write(path: Path) -> None:
    save_file(families.original(SD1, torch.float16), path)


def measure(path: Path) -> None:
    started = time.perf_counter()
    model = scfg.load(path)
    loaded = time.perf_counter()
    prompt = scfg.Prompt(context={row: torch.randn(1, 77, 768) for row in ("uncond", "cond")})
    for step in model.sample(prompt, scfg.SCFG(7.5), steps=2):
        print(f"step {step.index + 1} of {step.count} after {time.perf_counter() - loaded:.1f} s")
    stepped = time.perf_counter()
    picture = model.decode(step.latent)
    print(f"load {loaded - started:.1f} s, 2 steps {stepped - loaded:.1f} s, decode {time.perf_counter() - stepped:.1f} s, "
          f"picture {tuple(picture.shape)}, peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.1f} GiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--measure", action="store_true", help="load the file that is there")
    args = parser.parse_args()
    file = args.folder / "sd15-random.safetensors"
    if args.measure:
        measure(file)
    else:
        write(file)
        subprocess.run([sys.executable, __file__, str(args.folder), "--measure"], check=True)
