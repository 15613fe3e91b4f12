"""A published checkpoint, scfg beside diffusers: `python tests/real_weights.py FILE`.

tests/parity/requirements.txt must be installed. Writes a page of figures, and beside it a PNG of two pictures: scfg's
left, diffusers' right. diffusers reads the same file with its own `from_single_file`; nothing is downloaded. Exit
status: 0 where all is equal, 1 where something differs, 2 where the input cannot be used.
"""

import argparse
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

import scfg
from scfg.checkpoint import UNUSED
from scfg.cli.arguments import Parser, size
from scfg.cli.region import number
from scfg.formats.content import read_file
from scfg.guidance import RULES
from scfg.report import to_image

sys.path[1:1] = [str(Path(__file__).parent / name) for name in (".", "parity", "benchmarks")]
try:
    from counting import Bytes
    from published import pipeline
    from timing import ratio, synchronise
except ImportError as error:
    print(f"real_weights.py: {error}: pip install -r tests/parity/requirements.txt", file=sys.stderr)
    sys.exit(2)

TEXTS = ("a red car left of a blue house", "a photo of a cat on a wooden table", "An astronaut's 3 horses, on Mars")
SEED = 0
RECIPES = [name for name in RULES if name != "cfg"]
OWNERS = ("scfg", "scfg-paper")  # recipes whose words own different pixels: the others' own the first's


class Comparison(NamedTuple):
    what: str
    difference: float  # the largest, in units of diffusers' largest value
    limit: float

    @property
    def equal(self) -> bool:
        return self.difference <= self.limit  # NaN is not


class Sides(NamedTuple):
    ours: scfg.Diffusion
    pipe: Any  # diffusers'
    size: tuple[int, int]
    steps: int

    @property
    def levels(self) -> tuple[int, ...]:
        """The steps that are looked at."""
        return 0, self.steps // 2, self.steps - 1

    def compare(self, what: str, ours: Tensor, theirs: Tensor, limit: float = 1e-4) -> Comparison:
        """In 16 bits rounding alone goes beyond the limit: it is 20 units in the last place of one there."""
        difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        return Comparison(what, float(difference), max(limit, 20 * torch.finfo(self.ours.dtype).eps))


class Run(NamedTuple):
    starts: list[Tensor]  # our x at the start of every step
    sigmas: list[float]
    latents: tuple[Tensor, Tensor]  # at the end, ours and diffusers'
    seconds: dict[str, list[float]]  # of every step but the first


@dataclass
class Figures:
    """Everything that the page shows."""

    facts: dict[str, str] = field(default_factory=dict)
    equality: list[Comparison] = field(default_factory=list)
    within: dict[int, float] = field(default_factory=dict)  # n -> the share of pixels that differ by at most n/255
    seconds: dict[str, list[float]] = field(default_factory=dict)  # of steps that took turns
    memory: dict[str, float] = field(default_factory=dict)  # MiB that a step adds at its peak
    guidance: list[list[str]] = field(default_factory=list)  # a line for a recipe at a noise level
    words: dict[str, list[float]] = field(
        default_factory=dict
    )  # a word's share of the picture, by noise level and recipe
    pictures: Tensor = torch.zeros(0)  # (2 3 H W): ours and diffusers'


def compare_texts(sides: Sides) -> list[Comparison]:
    """The states of every text and, for XL, the pooled text: the larger difference of the two."""
    lines = []
    for text in TEXTS:
        prompt = sides.ours.prompt(text)
        if sides.ours.config.unet.vector_dim:
            context, _, pooled, _ = sides.pipe.encode_prompt(text, device=sides.pipe.device)
            theirs = [context, pooled]
        else:
            theirs = [sides.pipe.encode_prompt(text, sides.pipe.device, 1, True)[0]]
        ours = [states["cond"] for states in (prompt.context, prompt.pooled) if states]
        both = [sides.compare(f"text states, {text!r}", *pair) for pair in zip(ours, theirs, strict=True)]
        lines.append(max(both, key=lambda one: (math.isnan(one.difference), one.difference)))
    return lines


def run_both(sides: Sides, bar: tqdm) -> Run:
    """Two whole runs with plain guidance from the same noise; their steps take turns, and the first is not timed."""
    ours, config = sides.ours, sides.ours.config
    noise, sigmas = ours.noise([SEED], sides.size)().to(ours.dtype), ours.sigmas(sides.steps, "ddim", "leading")
    x = noise.float() * math.sqrt(sigmas[0] ** 2 + 1)
    steps = scfg.run(ours.denoiser(TEXTS[0], scfg.CFG(config.scale)), "ddim", x, sigmas, lambda: noise)
    taken: list[scfg.Step] = []
    marks = [0.0]

    def turn(pipe: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        """diffusers has finished a step, now comes ours."""
        synchronise()
        marks.append(time.perf_counter())
        taken.append(next(steps))
        synchronise()
        marks.append(time.perf_counter())
        bar.update(2)
        return values

    start = {"latents": noise, "width": sides.size[0], "height": sides.size[1]}
    if config.aesthetic_scores:  # the refiner's pipeline starts from a picture whose noise is not yet removed
        start = {"image": noise, "denoising_start": 1e-6}
    options = {"num_inference_steps": sides.steps, "guidance_scale": config.scale, "output_type": "latent"}
    theirs = sides.pipe(TEXTS[0], callback_on_step_end=turn, **options, **start).images
    between = [after - before for before, after in zip(marks, marks[1:])]
    seconds = {"diffusers": between[2::2], "scfg": between[3::2]}
    return Run([x, *(step.x for step in taken[:-1])], sigmas, (taken[-1].latent, theirs), seconds)


def evaluations(sides: Sides, run: Run, i: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One evaluation of our U-Net and one of diffusers' at step i of our run, on the same rows uncond and cond."""
    ours, (width, height), x, sigma = sides.ours, sides.size, run.starts[i], run.sigmas[i]
    moment, scaled = ours.config.schedule.moment(sigma), (x / math.sqrt(sigma**2 + 1)).to(ours.dtype)
    conditioner = ours.prompt(TEXTS[0]).conditioner(ours.config, ours.device, ours.dtype)
    rows = scfg.Guidance(scale=scfg.CFG(1.0)).rows(moment)
    conditioning, added = conditioner.condition(rows, moment, None, x.shape), None
    if ours.config.unet.vector_dim:
        target = [(score,) for score in ours.config.aesthetic_scores or ()] or [(height, width)] * 2
        ids = torch.tensor([(height, width, 0, 0, *one) for one in target], device=x.device)
        added = {"text_embeds": torch.cat([conditioner.pooled[row.text] for row in rows]), "time_ids": ids}
    t = sides.pipe.scheduler.timesteps[i].to(x.device)
    return (
        lambda: ours.unet(scaled, x.new_full((1,), moment.t), conditioning)[0],
        lambda: sides.pipe.unet(torch.cat([scaled] * 2), t, conditioning.tokens, added_cond_kwargs=added).sample,
    )


def compare_networks(sides: Sides, run: Run, bar: tqdm) -> list[Comparison]:
    """The U-Net on latents of our run; the VAE on its last latent, and on the picture of that."""
    lines = []
    for i in sides.levels:
        ours, theirs = evaluations(sides, run, i)
        lines.append(sides.compare(f"U-Net, step {i + 1}, sigma {run.sigmas[i]:.3g}", ours(), theirs()))
        bar.update()
    ours, theirs = sides.ours.vae, sides.pipe.vae
    latent = (run.latents[0] / sides.ours.config.latent_scale).to(theirs.dtype)
    picture = theirs.decode(latent).sample
    lines.append(sides.compare("VAE, decoding", ours.decode(latent), picture))
    picture = picture.clamp(-1, 1)
    lines.append(sides.compare("VAE, encoding", ours.encode(picture)[0], theirs.encode(picture).latent_dist.mean))
    bar.update(2)
    return lines


def decode_both(sides: Sides, run: Run) -> Tensor:
    """The pictures of two runs (2 3 H W) in [0, 1], each decoded by its own side."""
    ours, theirs, pipe = *run.latents, sides.pipe
    image = pipe.vae.decode(theirs.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor).sample
    return torch.cat([sides.ours.decode(ours), pipe.image_processor.postprocess(image, output_type="pt")]).float().cpu()


def peak(step: Callable[[], Any], device: torch.device) -> float:
    """MiB that a step adds at its peak: by the device's own count or, on a CPU, in bytes of tensors."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with Bytes() as memory:
        step()
    return memory.peak / 2**20


def measure_memory(sides: Sides, run: Run, bar: tqdm) -> dict[str, float]:
    cfg, s_cfg = (sides.ours.denoiser(TEXTS[0], rule) for rule in (scfg.CFG(5.0), scfg.SCFG(5.0)))
    at: tuple[Tensor, float] = run.starts[0], run.sigmas[0]
    steps = {"diffusers": evaluations(sides, run, 0)[1], "scfg": partial(cfg, *at), "scfg, S-CFG": partial(s_cfg, *at)}
    found = {}
    for name, step in steps.items():
        found[name] = peak(step, sides.ours.device)
        bar.update()
    return found


def measure_guidance(sides: Sides, run: Run, figures: Figures, bar: tqdm) -> None:
    """What every recipe makes of the maps at three noise levels of our run."""
    prompt = sides.ours.prompt(TEXTS[0])
    for i in sides.levels:
        for name in RECIPES:
            denoiser = sides.ours.denoiser(prompt, RULES[name](sides.ours.config.scale))
            _, _, scale, regions, *_ = denoiser(run.starts[i], run.sigmas[i])
            values = [regions.contrast().mean(), regions.foreground.mean(), scale.min(), scale.mean(), scale.max()]
            line = [str(i + 1), f"{run.sigmas[i]:.3g}", name, *(f"{float(value):.3f}" for value in values)]
            figures.guidance.append(line)
            for word, share in word_shares(regions).items() if name in OWNERS else ():
                figures.words.setdefault(word, []).append(share)
            bar.update()


def word_shares(regions: scfg.Regions) -> dict[str, float]:
    """The share of the pixels that a token of every word owns, and one of the start token and of the rest."""
    owners, words = regions.tokens[0], regions.words[0]
    spans = {"(start token)": (0, 1), "(end and filler)": (words[-1].stop, len(owners))}
    spans |= {f"{i + 1}. {word.text}": (word.start, word.stop) for i, word in enumerate(words)}
    return {name: float(owners[start:stop].amax(0).mean()) for name, (start, stop) in spans.items()}


@torch.no_grad()
def measure(sides: Sides) -> Figures:
    """Every figure."""
    figures = Figures()
    amount = len(TEXTS) + 2 * sides.steps + 3 * len(RECIPES) + 9
    with tqdm(total=amount, desc="comparing") as bar:
        figures.equality += compare_texts(sides)
        bar.update(len(TEXTS))
        run = run_both(sides, bar)
        figures.equality += compare_networks(sides, run, bar)
        figures.equality.append(sides.compare(f"latent after {sides.steps} steps of CFG", *run.latents, limit=1e-3))
        figures.seconds, figures.pictures = run.seconds, decode_both(sides, run)
        apart = (figures.pictures[0] - figures.pictures[1]).abs().amax(0)
        figures.within = {n: float((apart <= n / 255 + 1e-6).float().mean()) for n in (1, 2)}
        bar.update()
        measure_guidance(sides, run, figures, bar)
        figures.memory = measure_memory(sides, run, bar)
    return figures


def facts(file: Path, sides: Sides) -> dict[str, str]:
    ours, device = sides.ours, sides.ours.device
    tensors, _ = read_file(file)
    unused = sum(bool(UNUSED.fullmatch(name)) for name in tensors)
    settings = f"{sides.steps} steps of DDIM over leading timesteps, CFG at {ours.config.scale:g}, seed {SEED}"
    return {
        "family": ours.config.name,
        "prediction": ours.config.schedule.prediction,
        "tensors": f"{len(tensors)}, of which {unused} are not used (buffers and leftovers of training)",
        "picture": f"{sides.size[0]}x{sides.size[1]}, {settings}",
        "device": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, {ours.dtype}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("scfg", "diffusers", "transformers", "torch")),
    }


def table(*lines: Sequence[object]) -> list[str]:
    """In Markdown; the first line is the head."""
    head, *others = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *others)] + [""]


def page(title: str, picture: str, figures: Figures) -> str:
    """The report, in Markdown."""
    seconds, compared = figures.seconds, ratio(figures.seconds["scfg"], figures.seconds["diffusers"])
    result = {True: "equal", False: "DIFFERS"}
    equality = [(one.what, f"{one.difference:.1e}", f"{one.limit:.0e}", result[one.equal]) for one in figures.equality]
    within = " and ".join(f"{100 * share:.2f} % within {n}/255" for n, share in figures.within.items())
    medians = {name: f"{statistics.median(times):.3f}" for name, times in seconds.items()}
    costs = [(name, medians.get(name, ""), f"{mib:.1f}") for name, mib in figures.memory.items()]
    spread = f"{compared['low']:.2f} to {compared['high']:.2f} in {len(seconds['scfg'])} turns"
    columns = [f"{recipe}, step {step}" for step, _, recipe, *_ in figures.guidance if recipe in OWNERS]
    words = [(word, *(f"{100 * share:.1f} %" for share in shares)) for word, shares in figures.words.items()]
    return "\n".join(
        [f"# {title}: scfg beside diffusers", "", *table(("fact", "value"), *figures.facts.items())]
        + ["## Equality", "", "The largest difference, in units of diffusers' largest value.", ""]
        + table(("compared", "difference", "limit", "result"), *equality)
        + [f"Pixels of the two pictures: {within}.", "", f"![scfg left, diffusers right]({picture})", ""]
        + ["## Time and memory", "", "Steps took turns; scfg's weights are not packed (`scfg.cpu.pack`).", ""]
        + table(("CFG step", "median seconds", "MiB that it adds at its peak"), *costs)
        + [f"scfg's seconds over diffusers': {compared['median']:.2f} ({spread}).", "", "## S-CFG", ""]
        + [f"At three noise levels of the CFG run of {TEXTS[0]!r}.", ""]
        + table(("step", "sigma", "recipe", "contrast", "foreground", "min scale", "mean", "max"), *figures.guidance)
        + ["Share of the pixels that each word owns:", "", *table(("word", *columns), *words)]
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="real_weights.py", description="A checkpoint, scfg beside diffusers.")
    add, default = parser.add_argument, "(default: %(default)s)"
    add("file", type=Path, help="an original Stable Diffusion 1.x, 2.x or SDXL file")
    add("--steps", type=number(int, 3, 999), default=20, help=f"of DDIM {default}")
    add("--size", type=size, metavar="WxH", help="of the picture in pixels (default: the family's own)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help=default)
    add(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="the widest shows most (default: float32 on the cpu, else float16)",
    )
    add("--prediction", choices=["eps", "v"], help="of an SD 2.x file (default: by its answer to noise)")
    add("--tokenizer", type=Path, help="CLIP's folder or .gz file (default: the file's own, or transformers' cache)")
    add("--output", type=Path, default=Path("report.md"), help=f"the page; the PNG gets its name {default}")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> bool:
    """Write the page and the pictures; return whether all is equal."""
    image = args.output.with_suffix(".png")
    if image == args.output or not args.output.parent.is_dir():
        raise scfg.BadInput(f"--output is a page such as report.md in a folder that exists, not {args.output}")
    options = {"device": args.device, "dtype": args.dtype and getattr(torch, args.dtype)}
    ours = scfg.load(args.file, prediction=args.prediction, tokenizer=args.tokenizer, **options)
    picture_size = args.size or ours.config.size
    ours.latent_shape(picture_size)  # a size that cannot be is refused before any work
    torch.backends.cudnn.allow_tf32 = False  # its rounding would cover differences
    sides = Sides(ours, pipeline(args.file, ours), picture_size, args.steps)
    figures = measure(sides)
    figures.facts = facts(args.file, sides)
    report = page(args.file.name, image.name, figures)
    to_image(rearrange(figures.pictures, "sides c h w -> c h (sides w)")).save(image)
    args.output.write_text(report, encoding="utf-8")
    print(report)
    return all(one.equal for one in figures.equality)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
        try:
            return 0 if compare(args) else 1
        except (scfg.BadInput, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            line = " ".join(str(error).split())
            print("real_weights.py:", line or "not enough memory: try a smaller --size", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
