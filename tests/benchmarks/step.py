"""What a guided step costs, ours beside diffusers': `python tests/benchmarks/step.py`, with tests/parity/requirements.txt installed.

Every part runs in a process of its own: `steps` times our CFG and S-CFG steps, diffusers' CFG step with fused attention, and its step with
explicit attention from which hook-based programs compute S-CFG, in turns; `added` times what S-CFG adds by itself; `memory` counts its bytes;
`profile` splits our CFG step by kind of operation; `load` and `decode` compare loading and decoding. Ratios come first, all is written as JSON.
"""
import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from contenders import FAMILIES, GAMMA, Step, inputs, reference_unet, steps
from timing import alternated, ratio
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from scfg import OFFICIAL, PAPER, SCFG
from scfg.config import UNetConfig
from scfg.unet import Maps, UNet, mean_probabilities

KINDS = {                                             # words in the names of operations
    "convolution": ("conv",), "matrix product": ("mm", "linear"), "attention": ("scaled_dot", "attention"), "group norm": ("group_norm",),
    "layer norm": ("layer_norm",), "activation": ("silu", "gelu"), "copies": ("copy", "cat", "clone", "contiguous")}


@torch.no_grad()
def part_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs; also the largest difference of results, since a step that computes something else is no contender."""
    config = FAMILIES[args.family][0]
    contenders: dict[str, Step] = steps(reference_unet(args.family, args.device, args.dtype), config, args.side, args.compile)
    error = {name: ((contenders[name]() - contenders[theirs]()).abs().max() / contenders[theirs]().abs().max()).item()
             for name, theirs in (("CFG", "diffusers CFG"), ("S-CFG", "diffusers S-CFG, explicit"))}
    seconds = alternated(contenders, args.rounds)
    against = (("CFG", "diffusers CFG"), ("S-CFG", "diffusers S-CFG, explicit"), ("S-CFG", "CFG"), ("S-CFG, paper", "CFG"),
               ("S-CFG", "diffusers CFG"), ("diffusers S-CFG, explicit", "diffusers CFG"))
    return {"ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in against},
            "seconds": {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()}, "differences": error}


def captured_blocks(config: UNetConfig, side: int, limit: int) -> list[tuple[int, int, int]]:
    """(pixels, channels, heads) of every transformer block of at most so many pixels."""
    levels = [(level, width, depth * (2 * config.res_blocks + 1))
              for level, (width, depth) in enumerate(zip(config.channel_mult, config.transformer_depth))]
    levels.append((len(levels) - 1, config.channel_mult[-1], config.middle_depth))
    blocks = [((side >> level) ** 2, width * config.model_channels, count) for level, width, count in levels]
    return [(pixels, width, config.heads or width // config.head_channels)
            for pixels, width, count in blocks if pixels <= limit for _ in range(count)]


@torch.no_grad()
def part_added(args: argparse.Namespace) -> dict[str, Any]:
    """The operations that S-CFG adds to a CFG step, by themselves, on random numbers of the shapes that they have there."""
    config = FAMILIES[args.family][0]
    sizes = captured_blocks(config.unet, args.side, (args.side // config.map_divisor) ** 2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=args.device, dtype=args.dtype)

    given = [(normal(2, heads, n, width // heads), normal(2, heads, n, width // heads), normal(2, heads, 77, width // heads))
             for n, width, heads in sizes]
    difference = normal(1, 4, args.side, args.side).float()

    def added(recipe, rule) -> None:
        completed = []
        for (n, _, _), (q, k, words) in zip(sizes, given):
            grid = (int(n ** 0.5),) * 2
            completed.append(recipe.complete(Maps(mean_probabilities(q, k), mean_probabilities(q, words), grid)))
        1 + rule(difference, recipe.assign(completed), 1.0)

    seconds = alternated({"S-CFG": lambda: added(OFFICIAL, SCFG(GAMMA)), "S-CFG, paper": lambda: added(PAPER, SCFG.paper(GAMMA))}, 4 * args.rounds)
    return {"blocks": len(sizes), "seconds": {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()}}


@torch.no_grad()
def part_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that S-CFG adds to the peak of a step: counted on tensors without numbers, or measured on CUDA."""
    from counting import Bytes
    from torch._subclasses.fake_tensor import FakeTensorMode
    found = {}
    for family, side in (("sd1", 64), ("sd1", 128), ("sdxl", 128)):
        config, peaks = FAMILIES[family][0], []
        with FakeTensorMode(allow_non_fake_inputs=True):
            unet = UNet(config.unet).requires_grad_(False)
            x, prompt = inputs(config, side)
            vector = torch.zeros(2, config.unet.vector_dim) if config.unet.vector_dim else None
            for recipe in (None, OFFICIAL, PAPER):
                with Bytes() as counted:
                    pixels, keep = ((side // config.map_divisor) ** 2, recipe.complete) if recipe else (0, None)
                    out, kept = unet(x, torch.ones(1), torch.cat([*prompt.context.values()]), vector, map_pixels=pixels, keep=keep)
                    uncond, cond = out.chunk(2)
                    scale = SCFG(GAMMA)(cond - uncond, recipe.assign(kept), 1.0) if recipe else GAMMA
                    uncond + scale * (cond - uncond)
                peaks.append(counted.peak / 1e6)
                del out, kept, uncond, cond, scale
        found[f"{family} {8 * side}x{8 * side}"] = {"CFG, peak MB": peaks[0], "S-CFG adds MB": peaks[1] - peaks[0], "paper adds MB": peaks[2] - peaks[0]}
    return found


@torch.no_grad()
def part_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Our CFG step and diffusers' by kind of operation: seconds and arithmetic."""
    contenders, found = steps(reference_unet(args.family, args.device, args.dtype), FAMILIES[args.family][0], args.side), {}
    for name in ("CFG", "diffusers CFG"):
        with FlopCounterMode(display=False) as flops:
            contenders[name]()
        with profile(activities=[ProfilerActivity.CPU]) as measured:
            contenders[name]()
        seconds = {}
        for event in measured.key_averages():
            kind = next((kind for kind, words in KINDS.items() if any(word in event.key for word in words)), "the rest")
            seconds[kind] = seconds.get(kind, 0) + event.self_cpu_time_total / 1e6
        found[name] = {"TFLOP": flops.get_total_flops() / 1e12, "seconds": dict(sorted(seconds.items(), key=lambda item: -item[1]))}
    return found


def part_load(args: argparse.Namespace) -> dict[str, Any]:
    from load import measure
    return measure(args.folder, args.rounds)


def part_decode(args: argparse.Namespace) -> dict[str, Any]:
    from decode import measure
    return measure(args.device, args.dtype, args.rounds)


PARTS = {"steps": part_steps, "added": part_added, "memory": part_memory, "profile": part_profile, "load": part_load, "decode": part_decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--side", type=int, help="of the latent (default: 64 for sd1, 128 for sdxl)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on the cpu, else float16)")
    parser.add_argument("--compile", action="store_true", help="ours and diffusers' networks, for the part `steps`")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for files of up to 11 GB (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("out/step.json"))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: there is {', '.join(PARTS)}")
    args.side = args.side or {"sd1": 64, "sdxl": 128}[args.family]
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "float16"))
    found = {"machine": torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()}, {torch.get_num_threads()} threads",
             "torch": torch.__version__, "family": args.family, "side": args.side, "dtype": str(args.dtype), "compiled": args.compile}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found[part] = process.submit(PARTS[part], args).result()
        tqdm.write(f"{part}: {json.dumps(found[part], indent=1)}")
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
