"""A prompt in, a picture and its regions out: python sample.py "a red car left of a blue star on grass"."""
import argparse
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

import scfg
from scfg.area import described, elapsed, places
from scfg.diffusion import MULTISTEP
from scfg.flatland import WORDS
from scfg.guidance import NAMED
from scfg.memory import keep_freed_memory
from scfg.noise import spaced_sigmas
from scfg.report import report, to_image

SAMPLER_NAMES = {                                                 # as Stable Diffusion tools call them
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun",
    "unipc": "UniPC", "ddim": "DDIM"}
DIRECTIONS = {"apg": scfg.APG(), "zero": scfg.ZeroStar()}
NATIVE = "; ".join(f"{c.name} {c.size[0]}x{c.size[1]}, scale {c.scale:g}, {c.spacing or 'the usual'} spacing"
                   for c in (*scfg.config.FAMILIES, scfg.config.FLATLAND))
LARGEST_SIDE = 8192
EXAMPLE = "'car:scale=9' or 'sky.png & ~car:start=0.2,end=0.6,prompt=a night sky'"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")                 # one line, without the usage


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number from {low} to {high}")
        return value
    return parse


REGION_OPTIONS = {                                                # and prompt
    "scale": number(float, 0, 1000), "times": number(float, 0, 1000), "start": number(float, 0, 1), "end": number(float, 0, 1),
    "feather": number(int, 0, 1000), "base": number(float, 0, 1)}


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not all(side.isascii() and side.isdigit() and 0 < int(side) <= LARGEST_SIDE for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: give WIDTHxHEIGHT in pixels, such as 512x768, up to {LARGEST_SIDE} each")
    return int(width), int(height)


class Asked(NamedTuple):
    """A --region: what is guided there, what it shows there, or both."""
    said: str
    guided: scfg.Region | None
    told: scfg.Part | None

    @property
    def area(self) -> scfg.Area:
        return (self.guided or self.told).area


def region(text: str) -> Asked:
    """AREA:name=value,...; a prompt comes last and may hold commas."""
    description, _, options = text.partition(":")
    options, prompt = [*re.split(r"(?:^|,)\s*prompt=", options, maxsplit=1), ""][:2]
    values = {}
    for name, _, value in (option.strip().partition("=") for option in options.split(",") if option.strip()):
        if name not in REGION_OPTIONS:
            raise argparse.ArgumentTypeError(f"{text!r} asks for {name!r}: a region has {', '.join(REGION_OPTIONS)} and prompt, as in {EXAMPLE}")
        if name in values:
            raise argparse.ArgumentTypeError(f"{text!r} gives {name} twice: give it once")
        try:
            values[name] = REGION_OPTIONS[name](value)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {name} {error}, as in {EXAMPLE}") from None
    if not prompt and not {"scale", "times"} & set(values):
        raise argparse.ArgumentTypeError(f"{text!r} asks for nothing: give a scale, times or a prompt, as in {EXAMPLE}")
    if "base" in values and not prompt:
        raise argparse.ArgumentTypeError(f"{text!r}: base is what the whole prompt still counts where another one is given, as in {EXAMPLE}")
    if values.get("start", 0) >= values.get("end", 1):
        raise argparse.ArgumentTypeError(f"{text!r} is over before it starts: give a start below its end, as in {EXAMPLE}")
    try:
        area = described(description)
    except scfg.BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    area = area.feathered(values.pop("feather")) if "feather" in values else area
    base, when = values.pop("base", 0.0), {name: values[name] for name in ("start", "end") if name in values}
    guided = scfg.Region(area, **values) if {"scale", "times"} & set(values) else None
    return Asked(text, guided, scfg.Part(area, prompt, base, **when) if prompt else None)


def add_guidance(parser: Parser) -> None:
    add = parser.add_argument
    add("--guidance", choices=NAMED, default="scfg", help="one scale a region, by the authors' program, their paper, their mean or the "
        "conditional half's foreground; or plain (default: %(default)s)")
    add("--scale", type=number(float, 0, 1000), help="guidance scale (default: the family's own, see below)")
    add("--region", type=region, action="append", default=[], metavar="AREA:...",
        help="a scale, or times, or a prompt for a word's area, a mask file's, the foreground or what | & ~ make of them, with start, end, "
        f"feather and base (what the whole prompt still counts there), prompt last: {EXAMPLE}; a mask is white inside; may be given again")
    add("--direction", choices=DIRECTIONS, help="apg: less of what saturates colours; zero: the unconditional output scaled first (CFG-Zero*)")
    add("--pag", type=number(float, 0, 100), metavar="SCALE", help="perturbed-attention guidance besides, of this scale (usual: 3)")
    add("--rescale", type=number(float, 0, 1), metavar="PHI", help="share by which contrast is brought back to the unguided one's (usual: 0.7)")
    when = parser.add_mutually_exclusive_group()
    when.add_argument("--interval", type=number(float, 0, 1000), nargs=2, metavar=("LOW", "HIGH"), help="guide at noise levels sigma in (LOW, HIGH] only")
    when.add_argument("--ramp", choices=["linear", "cosine"], help="guide from not at all to twice as strongly as time goes by")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, epilog=f"Native to the families: {NATIVE}. The embedded model, Flatland, knows these words: "
                    f"{' '.join(WORDS)}.")
    add = parser.add_argument
    add("prompt", nargs="?", default="a red car left of a blue star on grass", help="what the picture shows (default: %(default)s)")
    add("--negative", help="what it shall not show (default: the empty text, for SDXL zeros)")
    add_guidance(parser)
    add("--sampler", choices=SAMPLER_NAMES, default="dpmpp_2m", help="how to go from noise to picture (default: %(default)s)")
    add("--spacing", choices=["leading", "linspace", "trailing", "karras"],
        help="of the noise levels (default: the family's own or, where that is the usual, leading for ddim and linspace for others)")
    add("--eta", type=number(float, 0, 1), help="share of fresh noise (default: 0 for ddim, 1 for euler_ancestral and dpmpp_2m_sde)")
    add("--steps", type=number(int, 1, 1000), default=30, help="of denoising (default: %(default)s)")
    add("--size", type=size, metavar="WxH", help="of the picture in pixels (default: the family's own)")
    add("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, help="of the first picture; the others count on (default: %(default)s)")
    add("--count", type=number(int, 1, 10000), default=1, help="pictures to make (default: %(default)s)")
    add("--batch", type=number(int, 1, 1000), default=4, help="pictures made at once; they depend on their seeds alone (default: %(default)s)")
    add("--checkpoint", type=Path, help="original Stable Diffusion 1.x, 2.x or SDXL file, .safetensors or .ckpt (default: the embedded model)")
    add("--refiner", type=Path, help="an SDXL refiner's file; it takes over from an SDXL checkpoint")
    add("--refiner-from", type=number(float, 0, 1), help="the share of the timesteps before it does (default: 0.8)")
    add("--vae", type=Path, help="a file whose VAE is used instead of the checkpoint's")
    add("--prediction", choices=["eps", "v"], help="what the network predicts, where the family is not to be trusted")
    add("--clip-skip", type=number(int, 1, 100), help="take the text towers' N-th last layer (default: 1 for SD 1.x, 2 for others)", metavar="N")
    add("--tokenizer", type=Path, help="transformers folder or bpe_simple_vocab_16e6.txt.gz, for files without a vocabulary")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute (default: %(default)s)")
    add("--offload", action="store_true", help="keep the text towers off the device but while they encode")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="of the network (default: float32 on the cpu, else float16)")
    add("--out", type=Path, default=Path("out"), help="folder for the pictures (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.refiner_from is not None and not args.refiner:
        parser.error("--refiner-from says when a refiner takes over: give its file with --refiner")
    if args.interval and args.interval[0] >= args.interval[1]:
        parser.error("--interval LOW HIGH: no noise level lies above {:g} and up to {:g}; give the lower one first".format(*args.interval))
    try:
        "".join([args.prompt, args.negative or "", *(asked.said for asked in args.region)]).encode()
    except UnicodeEncodeError:
        parser.error("the prompt is not UTF-8 text: check the terminal's encoding")
    return args


def parameters(args: argparse.Namespace, model: scfg.Diffusion, seed: int, picture: Image.Image) -> str:
    """The text that Stable Diffusion tools read from a PNG's 'parameters' chunk."""
    negative = f"\nNegative prompt: {args.negative}" if args.negative else ""
    facts = {"Steps": args.steps, "Sampler": SAMPLER_NAMES[args.sampler], "CFG scale": args.scale, "Seed": seed,
             "Size": f"{picture.width}x{picture.height}", "Model": args.checkpoint.stem if args.checkpoint else model.config.name,
             "Guidance": args.guidance, "Regions": " ".join(repr(asked.said) for asked in args.region) or None, "Direction": args.direction,
             "PAG scale": args.pag, "CFG Rescale phi": args.rescale, "Interval": args.interval and "{:g} to {:g}".format(*args.interval),
             "Ramp": args.ramp, "Schedule type": args.spacing, "Eta": args.eta, "Clip skip": args.clip_skip,
             "VAE": args.vae and args.vae.stem, "Refiner": args.refiner and args.refiner.stem,
             "Refiner switch at": args.refiner_from if args.refiner else None, "Prediction": args.prediction, "Precision": args.dtype}
    return f"{args.prompt}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)


def save(image: Image.Image, path: Path, text: str) -> None:
    """Write a PNG whole or not at all."""
    info = PngInfo()
    info.add_text("parameters", text)
    part = path.with_suffix(".part")
    try:
        image.save(part, "png", pnginfo=info)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    tqdm.write(str(path))


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise scfg.BadInput(f"cannot write into the folder {folder} ({error.strerror}): choose another with --out") from None


def next_number(folder: Path) -> int:
    """Earlier pictures are never overwritten: files count on from the highest number in the folder."""
    numbers = [path.name.split("-")[0] for path in folder.glob("*-*.png")]
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def guidance_of(args: argparse.Namespace) -> scfg.Guidance:
    scale, regions = NAMED[args.guidance](args.scale), tuple(asked.guided for asked in args.region if asked.guided)
    return scfg.Guidance(
        perturb=scfg.PAG(args.pag) if args.pag else None,
        direction=DIRECTIONS.get(args.direction),
        scale=scfg.ByRegion(scale, regions) if regions else scale,
        rescale=scfg.Rescale(args.rescale) if args.rescale else None,
        when=scfg.Interval(*args.interval) if args.interval else scfg.Ramp(shape=args.ramp) if args.ramp else None)


def in_short(args: argparse.Namespace) -> str:
    """Which guidance, for a line or a title."""
    guidance = guidance_of(args)
    beside = [str(slot) for slot in (guidance.direction, guidance.perturb, guidance.rescale, guidance.when) if slot]
    return ", ".join([f"{args.guidance} at scale {args.scale:g}", *beside, *(repr(asked.said) for asked in args.region)])


def idle(args: argparse.Namespace) -> list[str]:
    """What was asked for and never acts, since no step of the run lies in its time."""
    levels = spaced_sigmas(args.spacing, args.steps, drop_lowest=args.sampler in MULTISTEP)[:-1]
    guided = [sigma for sigma in levels if guidance_of(args).strength(sigma)]
    never = [] if guided else ["guidance"]
    for asked in args.region:
        told = levels[1:] if asked.area.needs_regions else levels             # the first step is what finds a word
        for what, its_levels in ((asked.guided, guided), (asked.told, told)):
            if what and not any(what.start <= elapsed(sigma) <= what.end for sigma in its_levels):
                never.append(repr(asked.said))
    return [f"{what} never acts: none of the {args.steps} steps lies in its time" for what in dict.fromkeys(never)]


class Made(NamedTuple):
    latent: Tensor                                    # (b c h w)
    scores: Tensor                                    # (b t h w) of every token, mean of the middle third of the steps
    scale: Tensor                                     # (b h w) mean of all steps
    notes: Counter[tuple[str, int]]                   # in how many steps each was made, by seed


def prepare(args: argparse.Namespace) -> tuple[scfg.Diffusion, scfg.Prompt, scfg.Refiner | None]:
    """Load what is asked for, fill in what the family has of its own, and say what will be run."""
    def load(path: Path | None, **options) -> tuple[scfg.Diffusion, scfg.Prompt]:
        model = scfg.load(path, device=args.device, dtype=args.dtype and getattr(torch, args.dtype), tokenizer=args.tokenizer,
                          offload=args.offload, **options)
        return model, model.prompt(args.prompt, args.negative, args.clip_skip, [asked.told for asked in args.region if asked.told])
    model, prompt = load(args.checkpoint, prediction=args.prediction, vae=args.vae)
    for phrase in (phrase for asked in args.region for phrase in asked.area.phrases):
        places(prompt.words[0], phrase)                                       # a word that is not there, said before any work
    args.scale = model.config.scale if args.scale is None else args.scale
    args.size = args.size or model.config.size
    args.spacing = args.spacing or model.spacing(args.sampler)
    model.latent_shape(args.size)                                             # a size that cannot be, said before any work
    args.refiner_from = 0.8 if args.refiner_from is None else args.refiner_from
    refiner = scfg.Refiner(*load(args.refiner), args.refiner_from) if args.refiner else None
    model.check(args.sampler, args.steps, args.eta, refiner)
    for line in idle(args):
        warnings.warn(line, stacklevel=2)
    check_writable(args.out)
    print(f"{model.config.name}: {args.size[0]}x{args.size[1]}, {in_short(args)}, {args.steps} steps of "
          f"{SAMPLER_NAMES[args.sampler]} over {args.spacing} noise levels, {args.count} from seed {args.seed}"
          + (f", {refiner.model.config.name} from {refiner.start:g} on" if refiner else ""))
    return model, prompt, refiner


def make(model: scfg.Diffusion, prompt: scfg.Prompt, refiner: scfg.Refiner | None, args: argparse.Namespace, seeds: Sequence[int],
         progress: tqdm) -> Made:
    """One batch of pictures, from noise to latent."""
    middle = range(args.steps // 3, max(args.steps // 3 + 1, args.steps * 2 // 3))
    guidance, scores, scale, notes = guidance_of(args), 0, 0, Counter()
    for step in model.sample(prompt, guidance, args.sampler, args.spacing, args.steps, args.size, seeds, eta=args.eta,
                             refiner=refiner, watch=middle):
        denoised = step.denoised
        if step.index in middle:
            scores = scores + denoised.regions.scores / len(middle)
        scale = scale + denoised.scale[:, 0] / step.count
        notes.update((f"{note.what}: {note.instead}", seeds[i]) for note in denoised.notes for i in note.pictures or range(len(seeds)))
        progress.update(len(seeds))
    return Made(step.latent, scores, scale, notes)


def write(model: scfg.Diffusion, prompt: scfg.Prompt, args: argparse.Namespace, seeds: Sequence[int], made: Made) -> None:
    """Decode a batch, one by one to save memory, and write every picture with its regions beside it."""
    for seed, latent, scores, scale in zip(seeds, made.latent, made.scores, made.scale):
        picture = to_image(model.decode(latent[None])[0])
        name, text = f"{next_number(args.out):05d}-{seed}", parameters(args, model, seed, picture)
        title = f"{args.prompt}   ({in_short(args)}, seed {seed})"
        save(report(picture, scores, scale, prompt.words[0], title, prompt.chunk), args.out / f"{name}-regions.png", text)
        save(picture, args.out / f"{name}.png", text)


def run(args: argparse.Namespace) -> Tensor:
    """Make and write all pictures; returns their final latents (count c h w)."""
    started = time.perf_counter()
    model, prompt, refiner = prepare(args)
    loading, sampling, decoding, latents, notes = time.perf_counter() - started, 0.0, 0.0, [], Counter()
    with tqdm(total=args.count * args.steps, desc="sampling", unit="step") as progress:
        for first in range(args.seed, args.seed + args.count, args.batch):
            seeds = range(first, min(first + args.batch, args.seed + args.count))
            started = time.perf_counter()
            made = make(model, prompt, refiner, args, seeds, progress)
            sampled = time.perf_counter()
            write(model, prompt, args, seeds, made)
            sampling, decoding = sampling + sampled - started, decoding + time.perf_counter() - sampled
            latents.append(made.latent)
            notes += made.notes
    for what in dict.fromkeys(what for what, _ in notes):
        times = {seed: count for (said, seed), count in notes.items() if said == what}
        print(f"note, in {sum(times.values())} of {args.steps * args.count} steps, {len(times)} of {args.count} pictures "
              f"(seed {', '.join(map(str, [*times][:8]))}{', ...' * (len(times) > 8)}): {what}")
    print(f"load {loading:.1f} s, sampling {sampling:.1f} s, decoding and writing {decoding:.1f} s")
    return torch.cat(latents)


def main() -> None:
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):           # a prompt may hold letters that a terminal lacks
        stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)     # not into a progress bar
    try:
        run(parse())
    except (scfg.BadInput, FloatingPointError, OSError) as error:
        print("sample.py:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)):
            raise
        print("sample.py: not enough memory for this: try a smaller --size or --batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; pictures named above are whole. To go on, raise --seed by their number.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
