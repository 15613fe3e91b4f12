"""What a guided step costs, ours beside diffusers': `python tests/benchmarks/step.py`.

tests/parity/requirements.txt must be installed. Every part runs in a process of its own: `steps` times our CFG and
S-CFG steps, diffusers' CFG step with fused attention, and its step with explicit attention from which hook-based
programs compute S-CFG, in turns; `added` times what S-CFG adds by itself; `memory` counts its bytes; `profile` splits a
step by kind of operation; `flatland` times the embedded model; `decode` and `load` compare decoding and loading.
Ratios come first, all is written as JSON.
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
from contenders import (
    FAMILIES,
    GAMMA,
    MOMENT,
    PAPER_RULE,
    RULE,
    OpenVINO,
    Step,
    inputs,
    reference_unet,
    steps,
    their_step,
)
from counting import Bytes
from timing import alternated, ratio, synchronise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from tqdm import tqdm

import scfg
from scfg import OFFICIAL, PAPER, Capture, Conditioning, Maps, Outputs, Tokens, cpu
from scfg.config import UNetConfig
from scfg.unet import UNet, probabilities

KINDS = {  # words in the names of operations
    "convolution": ("conv",),
    "matrix product": ("mm", "linear"),
    "attention": ("scaled_dot", "attention"),
    "group norm": ("group_norm",),
    "layer norm": ("layer_norm",),
    "activation": ("silu", "gelu"),
    "copies": ("copy", "cat", "clone", "contiguous"),
}
PAIRS = (
    ("CFG", "diffusers CFG"),
    ("S-CFG", "diffusers S-CFG, explicit"),
    ("S-CFG", "CFG"),
    ("S-CFG, paper", "CFG"),
    ("S-CFG", "diffusers CFG"),
    ("diffusers S-CFG, explicit", "diffusers CFG"),
    ("CFG, packed", "diffusers CFG"),
    ("CFG, packed", "CFG"),
    ("S-CFG, packed", "diffusers CFG"),
    ("OpenVINO CFG", "diffusers CFG"),
    ("CFG, packed", "OpenVINO CFG"),
)
QUICK = ("CFG", "S-CFG", "CFG, packed", "S-CFG, packed", "diffusers CFG")
COMPARED = (*PAIRS[:2], ("CFG, packed", "CFG"), ("OpenVINO CFG", "diffusers CFG"))


@torch.no_grad()
def part_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Pairs; also how far results differ, since a step that computes something else is no contender.

    Of S-CFG's differences the 99th percentile counts: maps of random weights are nearly flat, and single pixels change
    their region.
    """
    config = FAMILIES[args.family][0]
    reference = reference_unet(args.family, args.device, args.dtype)
    contenders: dict[str, Step] = steps(reference, config, args.side, args.compile)
    if args.quick:
        contenders = {name: contenders[name] for name in QUICK if name in contenders}
    if args.openvino:
        converted, (x, prompt) = OpenVINO(reference, config, args.side), inputs(config, args.side)
        contenders["OpenVINO CFG"] = their_step(converted, config, x, prompt)
    results, differences = {name: step() for name, step in contenders.items()}, {}  # the warm-up as well
    pairs = [(a, b) for a, b in PAIRS if {a, b} <= set(contenders) and not (args.compile and "explicit" in a + b)]
    for a, b in COMPARED:
        if {a, b} <= set(contenders):
            apart = (results[a] - results[b]).abs().flatten() / results[b].abs().max()
            differences[f"{a} - {b}"] = {"99th percentile": apart.quantile(0.99).item(), "largest": apart.max().item()}
    seconds = alternated(contenders, args.rounds, warm=True)
    return {
        "ratios": {f"{a} / {b}": ratio(seconds[a], seconds[b]) for a, b in pairs},
        "seconds": {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()},
        "differences": differences,
    }


def captured_blocks(config: UNetConfig, side: int, limit: int) -> list[tuple[int, int, int]]:
    """(pixels, channels, heads) of every transformer block of at most so many pixels."""
    levels = [
        (level, width, depth * (2 * config.res_blocks + 1))
        for level, (width, depth) in enumerate(zip(config.channel_mult, config.transformer_depth))
    ]
    levels.append((len(levels) - 1, config.channel_mult[-1], config.middle_depth))
    blocks = [((side >> level) ** 2, width * config.model_channels, count) for level, width, count in levels]
    return [
        (pixels, width, config.heads or width // config.head_channels)
        for pixels, width, count in blocks
        if pixels <= limit
        for _ in range(count)
    ]


@torch.no_grad()
def part_added(args: argparse.Namespace) -> dict[str, Any]:
    """The operations that S-CFG adds to a CFG step, by themselves, on random numbers of the shapes they have there."""
    config = FAMILIES[args.family][0]
    sizes = captured_blocks(config.unet, args.side, (args.side // config.map_divisor) ** 2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=args.device, dtype=args.dtype)

    def heads_of(tokens: int, width: int, heads: int) -> torch.Tensor:
        return normal(2, tokens, heads, width // heads).transpose(1, 2)  # in memory as the network has them

    given = [tuple(heads_of(tokens, width, heads) for tokens in (n, n, 77)) for n, width, heads in sizes]
    difference = normal(1, 4, args.side, args.side).float()
    outputs = Outputs(difference, difference, difference, None, difference, difference, MOMENT.dx0_dout)

    def added(recipe, rule) -> None:
        completed, rows = [], slice(0 if recipe.foreground == "uncond" else 1, None)  # those whose maps are read
        for (n, _, _), (q, k, words) in zip(sizes, ([x[rows] for x in of_block] for of_block in given)):
            grid = (int(n**0.5),) * 2
            completed.append(recipe.complete(Maps(probabilities(q, k), probabilities(q, words), grid)))
        uncond = [block[:1] for block in completed] if len(completed[0]) == 2 else None
        regions = recipe.assign([block[-1:] for block in completed], uncond, Tokens(77))
        1 + rule(outputs, regions, MOMENT), rule.flags(regions, MOMENT)

    step = steps(reference_unet(args.family, args.device, args.dtype), config, args.side)["CFG"]
    contest = {
        "S-CFG": lambda: added(OFFICIAL, RULE),
        "S-CFG, paper": lambda: added(PAPER, PAPER_RULE),
        "CFG step": step,
    }
    seconds = alternated(contest, args.rounds)
    return {
        "blocks": len(sizes),
        "shares of a CFG step": {name: ratio(seconds[name], seconds["CFG step"]) for name in ("S-CFG", "S-CFG, paper")},
        "seconds": {name: statistics.median(all_of_it) for name, all_of_it in seconds.items()},
    }


@torch.no_grad()
def counted_peaks(family: str, side: int) -> dict[str, float]:
    """MB at the peak of a step, counted on tensors without numbers."""
    config, peaks = FAMILIES[family][0], {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = UNet(config.unet).requires_grad_(False)
        x, prompt = inputs(config, side)
        vector = torch.zeros(2, config.unet.vector_dim) if config.unet.vector_dim else None
        for name, rule in (("CFG", None), ("S-CFG", RULE), ("S-CFG, paper", PAPER_RULE)):
            recipe = rule and rule.recipe
            with Bytes() as counted:
                capture = Capture((side // config.map_divisor) ** 2, make=recipe.complete) if recipe else None
                conditioning = Conditioning(torch.cat([*prompt.context.values()]), vector)
                out, kept = unet(x, torch.ones(1), conditioning, capture=capture)
                uncond, cond = out.chunk(2)
                outputs, scale = Outputs(x, cond, uncond, None, cond - uncond, x, MOMENT.dx0_dout), GAMMA
                if recipe:
                    of_uncond, of_cond = zip(*(block.chunk(2) for block in kept.values()))
                    scale = rule(outputs, recipe.assign(of_cond, of_uncond, Tokens(77)), MOMENT)
                    del of_uncond, of_cond
                uncond + scale * (cond - uncond)
            peaks[name] = counted.peak / 1e6
            del out, kept, uncond, cond, scale, outputs, conditioning
    return peaks


@torch.no_grad()
def cuda_peaks(family: str, side: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """MB at the peak of a step, as CUDA's allocator has them."""
    contenders, peaks = steps(reference_unet(family, device, dtype), FAMILIES[family][0], side), {}
    for name, step in contenders.items():
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return peaks


def part_memory(args: argparse.Namespace) -> dict[str, Any]:
    """What S-CFG adds to the peak of a step; on a CPU the library's workspace is not counted."""
    found = {}
    for family, side in (("sd1", 64), ("sd1", 128), ("sdxl", 128)):
        on_cpu = args.device == "cpu"
        peaks = counted_peaks(family, side) if on_cpu else cuda_peaks(family, side, args.device, args.dtype)
        added = {f"{name} adds MB": peaks[name] - peaks["CFG"] for name in ("S-CFG", "S-CFG, paper")}
        found[f"{family} {8 * side}x{8 * side}"] = {"CFG, peak MB": peaks["CFG"], **added}
    return found


def tera(step: Step) -> float:
    """Arithmetic in TFLOP, fused attention on the CPU included."""

    def count(q, k, v, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(q, k, v)

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={fused: count}) as flops:
        step()
    return flops.get_total_flops() / 1e12


def kind_of(event: Any) -> str:
    """The kind of the outermost operation that has one."""
    found = "the rest"
    while event is not None:
        found = next((kind for kind, words in KINDS.items() if any(word in event.name for word in words)), found)
        event = event.cpu_parent
    return found


@torch.no_grad()
def part_profile(args: argparse.Namespace) -> dict[str, Any]:
    """Our CFG step and diffusers' by kind of operation: seconds, and arithmetic."""
    reference, cuda, found = reference_unet(args.family, args.device, args.dtype), args.device != "cpu", {}
    contenders = steps(reference, FAMILIES[args.family][0], args.side)
    for name in ("CFG", "diffusers CFG"):
        arithmetic, seconds = tera(contenders[name]), {}
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as measured:
            contenders[name]()
            synchronise()
        for event in measured.events():
            if event.device_type == DeviceType.CPU:
                taken = event.self_device_time_total if cuda else event.self_cpu_time_total
                seconds[kind_of(event)] = seconds.get(kind_of(event), 0) + taken / 1e6
        found[name] = {"TFLOP": arithmetic, "seconds": dict(sorted(seconds.items(), key=lambda item: -item[1]))}
    return found


@torch.no_grad()
def part_flatland(args: argparse.Namespace) -> dict[str, Any]:
    """The embedded model's sampling by itself: one picture, 20 steps of its own guidance."""
    model = scfg.load(device=args.device)
    prompt = model.prompt("a red car left of a blue star on grass")
    seconds = alternated({"20 steps": lambda: list(model.sample(prompt, steps=20))}, args.rounds)["20 steps"]
    return {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}


def part_load(args: argparse.Namespace) -> dict[str, Any]:
    from load import measure

    return measure(args.folder, args.rounds)


def part_decode(args: argparse.Namespace) -> dict[str, Any]:
    from decode import measure

    return measure(args.device, args.dtype, args.rounds)


PARTS = {
    "steps": part_steps,
    "added": part_added,
    "memory": part_memory,
    "profile": part_profile,
    "flatland": part_flatland,
    "decode": part_decode,
    "load": part_load,
}


def processor() -> str:
    """The CPU's name and the instruction sets that matter here."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines())
    except (OSError, ValueError):
        return platform.machine()
    said = {name.strip(): value.strip() for name, value in lines.items()}
    sets = [name for name in said.get("flags", "").split() if name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    return f"{said.get('model name', platform.machine())} ({', '.join(sets)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--family", choices=FAMILIES, default="sd1")
    parser.add_argument("--side", type=int, help="of the latent (default: 64 for sd1, 128 for sdxl)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "float16", "bfloat16"], help="(default: float32 on the cpu, else float16)"
    )
    parser.add_argument("--compile", action="store_true", help="our step and diffusers' network, for the part `steps`")
    parser.add_argument(
        "--keep", action="store_true", help="freed memory is kept, as sample.py does, for all contenders"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="our CFG and S-CFG steps, plain and packed, and diffusers' CFG step only, for the part `steps`",
    )
    parser.add_argument("--openvino", action="store_true", help="OpenVINO's CFG step too, which must be installed")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="for files of up to 5 GB (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("out/step.json"))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: there is {', '.join(PARTS)}")
    args.side = args.side or {"sd1": 64, "sdxl": 128}[args.family]
    args.dtype = getattr(torch, args.dtype or ("float32" if args.device == "cpu" else "float16"))
    on_cpu = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    found = {
        "machine": on_cpu if args.device == "cpu" else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "family": args.family,
        "side": args.side,
        "dtype": str(args.dtype),
        "compiled": args.compile,
        "freed memory kept": args.keep,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts or PARTS:
        initializer = cpu.keep_freed_memory if args.keep else None
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer) as process:
            found[part] = process.submit(PARTS[part], args).result()
        tqdm.write(f"{part}: {json.dumps(found[part], indent=1)}")
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
