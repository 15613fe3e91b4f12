"""How much of this project one denoise step goes through: `python tests/benchmarks/calls.py` prints files entered and calls made.

Counted with sys.setprofile at SD 1.x's full structure (small width, which changes no call), official S-CFG included.
"""
import sys
from collections import Counter
from pathlib import Path

import torch

import scfg
from scfg import Guidance

ROOT = Path(scfg.__file__).parent
TINY = Path(__file__).parent.parent / "data" / "tiny_sd1.safetensors"


def calls_of_a_step() -> Counter:
    """Calls by file of one denoise step, maps, segmentation and guidance included."""
    model = scfg.load(TINY)
    prompt = scfg.Prompt(context={row: torch.randn(1, 77, 48) for row in ("uncond", "cond")})
    denoise = model.denoiser(prompt, Guidance(scale=scfg.SCFG(7.5)))
    x, found = torch.randn(1, 4, 64, 64), Counter()

    def count(frame, event, argument):
        if event == "call" and Path(frame.f_code.co_filename).parent == ROOT:
            found[Path(frame.f_code.co_filename).name] += 1

    with torch.no_grad():
        sys.setprofile(count)
        denoise(x, 5.0, None)
        sys.setprofile(None)
    return found


if __name__ == "__main__":
    found = calls_of_a_step()
    print(f"{len(found)} files, {found.total()} calls: {dict(found.most_common())}")
