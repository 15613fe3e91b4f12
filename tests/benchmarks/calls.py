"""How much of this project one denoise step goes through: `python tests/benchmarks/calls.py`.

Prints the files entered, the calls made and the depth of nested calls, of our own functions alone, counted with
sys.setprofile at SD 1.x's full structure (small width, which changes no call), official S-CFG included.
"""

import sys
from collections import Counter
from pathlib import Path

import torch

import scfg

ROOT = Path(scfg.__file__).parent
TINY = Path(__file__).parent.parent / "data" / "tiny_sd1.safetensors"


def calls_of_a_step() -> tuple[Counter, int]:
    """Calls by file of one denoise step, maps, segmentation and guidance included; and the depth of nested calls."""
    model = scfg.load(TINY)
    prompt = scfg.Prompt(context={row: torch.randn(1, 77, 48) for row in ("uncond", "cond")})
    denoise, x, found, depths = model.denoiser(prompt, scfg.SCFG(7.5)), torch.randn(1, 4, 64, 64), Counter(), [0]

    def count(frame, event, argument):
        file = Path(frame.f_code.co_filename)
        if ROOT in file.parents and event in ("call", "return"):
            depths.append(depths[-1] + (1 if event == "call" else -1))
            found[file.name] += event == "call"

    with torch.no_grad():
        sys.setprofile(count)
        denoise(x, 5.0)
        sys.setprofile(None)
    return found, max(depths)


if __name__ == "__main__":
    found, depth = calls_of_a_step()
    print(f"{len(found)} files, {found.total()} calls, depth {depth}: {dict(found.most_common())}")
