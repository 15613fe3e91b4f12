"""A published checkpoint, ours beside diffusers': `python tests/real_weights.py FILE` (tests/parity/requirements.txt).

Writes a page of figures, and beside it a PNG with both pictures: scfg's left, diffusers' right. diffusers reads the
same file with its own `from_single_file`; the description of the family that it otherwise asks a hub for is written
here, with the file's widths. Nothing is downloaded. Exit status: 0 where all is equal, 1 where something differs, 2
where the input cannot be used.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries are imported

import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTokenizer

import scfg
from scfg import formats
from scfg.checkpoint import DROPPED, read
from scfg.cli.arguments import Parser, number, size
from scfg.config import SDXL, SDXL_REFINER, Config, TextConfig
from scfg.guidance import RULES
from scfg.report import to_image

sys.path[1:1] = [str(Path(__file__).parent / name) for name in (".", "parity", "benchmarks")]
try:
    import diffusers
    from counting import Bytes
    from schedulers import scheduler
    from timing import ratio, synchronise
except ImportError as missing:
    sys.exit(f"real_weights.py: {missing}: pip install -r tests/parity/requirements.txt")

TEXTS = ("a red car left of a blue house", "a photo of a cat on a wooden table", "An astronaut's 3 horses, on Mars")
SEED, FEWEST = 0, 4  # of the noise; steps, among which are three noise levels and a warm first one
PIPELINES = {SDXL.name: "StableDiffusionXLPipeline", SDXL_REFINER.name: "StableDiffusionXLImg2ImgPipeline"}


class Comparison(NamedTuple):
    what: str
    difference: float  # the largest, in units of diffusers' largest value
    limit: float

    @property
    def equal(self) -> bool:
        return self.difference <= self.limit  # which NaN is not


@dataclass
class Figures:
    """All that the page says."""

    facts: dict[str, str] = field(default_factory=dict)
    equality: list[Comparison] = field(default_factory=list)
    within: dict[int, float] = field(default_factory=dict)  # n -> the share of pixels that differ by n/255 at most
    seconds: dict[str, list[float]] = field(default_factory=dict)  # a step, in turns
    memory: dict[str, float] = field(default_factory=dict)  # MiB
    guidance: list[list[str]] = field(default_factory=list)  # S-CFG, a row for a rule at a noise level
    shares: dict[str, list[float]] = field(default_factory=dict)  # of the picture, by word; official, paper by level
    pictures: Tensor = torch.zeros(0)  # (2 3 H W): ours, diffusers'


class Sides(NamedTuple):
    ours: scfg.Diffusion
    pipe: Any  # diffusers'
    size: tuple[int, int]
    steps: int

    def compared(self, what: str, ours: Tensor, theirs: Tensor, times: float = 1) -> Comparison:
        """The limit is rounding's: that of the network's precision, `times` as much for what it has added up to."""
        difference = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        return Comparison(what, float(difference), times * max(1e-4, 20 * torch.finfo(self.ours.dtype).eps))


def unet_description(config: Config) -> dict[str, Any]:
    """What the published diffusers folder says of a family's U-Net, with the widths of the file."""
    unet, xl = config.unet, bool(config.unet.vector_dim)
    widths = [unet.model_channels * m for m in unet.channel_mult]
    attended = [False, True, True] + [False] * (len(widths) - 3) if xl else [True, True, True, False]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": config.size[0] // 8,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "cross_attention_dim": unet.context_dim,
        "attention_head_dim": [width // 64 for width in widths] if unet.linear_projections else 8,
        "transformer_layers_per_block": 1 if not xl else 4 if config.aesthetic_scores else [1, 2, 10],
        "use_linear_projection": unet.linear_projections,
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)],
        "addition_embed_type": "text_time" if xl else None,
        "addition_time_embed_dim": 256 if xl else None,
        "projection_class_embeddings_input_dim": unet.vector_dim or None,
    }


def vae_description(config: Config) -> dict[str, Any]:
    levels = len(config.vae.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [config.vae.channels * m for m in config.vae.channel_mult],
        "layers_per_block": 2,
        "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 0.13025 if config.unet.vector_dim else 0.18215,
    }


def text_description(tower: TextConfig) -> dict[str, Any]:
    """A text tower; of SD 2.x's only the layers that are used."""
    clip, sd2 = tower.prefix.endswith(".transformer."), tower.prefix == "cond_stage_model.model."
    return {
        "architectures": ["CLIPTextModelWithProjection" if tower.pooled else "CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": tower.width,
        "intermediate_size": 4 * tower.width,
        "num_hidden_layers": tower.layers - sd2,
        "num_attention_heads": tower.width // 64,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "projection_dim": tower.pooled or tower.width,
        "vocab_size": tower.vocabulary,
        "bos_token_id": tower.vocabulary - 2,
        "eos_token_id": tower.vocabulary - 1,
    }


def describe(config: Config, folder: Path) -> None:
    """A folder that says to diffusers what the networks are."""
    towers = dict(
        zip(("text_encoder_2",) if config.aesthetic_scores else ("text_encoder", "text_encoder_2"), config.text)
    )
    parts = {"unet": unet_description(config), "vae": vae_description(config)}
    index = {name: ("diffusers", part["_class_name"]) for name, part in parts.items()}
    for name, tower in towers.items():
        parts[name] = text_description(tower)
        index[name] = ("transformers", *parts[name]["architectures"])
    for name, part in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(part))
    index["_class_name"] = PIPELINES.get(config.name, "StableDiffusionPipeline")
    (folder / "model_index.json").write_text(json.dumps(index))


def padded_with(tokenizer: CLIPTokenizer, pad: str) -> CLIPTokenizer:
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in bpe["merges"]]
    return CLIPTokenizer(vocab=bpe["vocab"], merges=merges, model_max_length=77, pad_token=pad)


def their_pipeline(file: Path, ours: scfg.Diffusion) -> Any:
    """diffusers' pipeline of the same file, as its own reader of such files makes it."""
    config, tokenizer = ours.config, ours.towers().checked_tokenizer()
    plain, marked = padded_with(tokenizer, "<|endoftext|>"), padded_with(tokenizer, "!")
    pipeline: Any = getattr(diffusers, PIPELINES.get(config.name, "StableDiffusionPipeline"))
    given: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    given |= {"tokenizer": marked if config.text[0].pad == 0 else plain}
    if config.unet.vector_dim:
        given = {"tokenizer": plain, "tokenizer_2": marked, "add_watermarker": False}
    if config.aesthetic_scores:
        given |= {"text_encoder": None, "tokenizer": None}
        given |= {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    given["scheduler"] = scheduler("ddim", "leading", config.schedule.prediction)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        describe(config, Path(folder))
        options = {"config": folder, "local_files_only": True, "torch_dtype": ours.dtype}
        try:
            pipe = pipeline.from_single_file(str(file), **options, **given).to(ours.device)
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise scfg.BadInput(f"diffusers cannot read {file} ({type(error).__name__}: {first})") from error
    pipe.vae.to(ours.vae.quant_conv.weight.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def of_texts(sides: Sides) -> list[Comparison]:
    """The states of every text and, where there is one, the pooled text: the larger difference."""
    rows = []
    for text in TEXTS:
        prompt, theirs = sides.ours.prompt(text), their_texts(sides.pipe, text)
        pairs = [sides.compared(f"text states, {text!r}", prompt.context["cond"], theirs[0])]
        if prompt.pooled:
            pairs.append(sides.compared(f"text states, {text!r}", prompt.pooled["cond"], theirs[1]))
        rows.append(max(pairs, key=lambda pair: (math.isnan(pair.difference), pair.difference)))
    return rows


def their_texts(pipe: Any, text: str) -> tuple[Tensor, Tensor | None]:
    if hasattr(pipe, "text_encoder_2"):
        states, _, pooled, _ = pipe.encode_prompt(text, device=pipe.device)
        return states, pooled
    return pipe.encode_prompt(text, pipe.device, 1, True)[0], None


class Run(NamedTuple):
    starts: list[Tensor]  # our x at the start of every step
    sigmas: list[float]
    latents: tuple[Tensor, Tensor]  # ours, diffusers'
    seconds: dict[str, list[float]]


def run_both(sides: Sides, bar: tqdm) -> Run:
    """Both whole runs with plain guidance from the same noise, a step of each in turns; the first two are not timed."""
    ours, config = sides.ours, sides.ours.config
    noise, sigmas = ours.noise([SEED], sides.size)().to(ours.dtype), ours.sigmas(sides.steps, "ddim", "leading")
    x = noise.float() * math.sqrt(sigmas[0] ** 2 + 1)
    denoise = ours.denoiser(TEXTS[0], scfg.CFG(config.scale))
    steps, taken, seconds = scfg.run(denoise, "ddim", x, sigmas, lambda: noise), [], {"diffusers": [], "scfg": []}
    mark = [0.0]

    def turn(_: Any, index: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        """diffusers has finished a step: ours comes now."""
        for name, work in (("diffusers", lambda: None), ("scfg", lambda: taken.append(next(steps)))):
            work()
            synchronise()
            seconds[name].append(time.perf_counter() - mark[0])
            mark[0] = time.perf_counter()
        bar.update(2)
        return values

    start = {"latents": noise, "height": sides.size[1], "width": sides.size[0]}
    start = {"image": noise, "denoising_start": 1e-6} if config.aesthetic_scores else start
    options = {"num_inference_steps": sides.steps, "guidance_scale": config.scale, "output_type": "latent"}
    theirs = sides.pipe(TEXTS[0], callback_on_step_end=turn, **options, **start).images
    starts = [x, *(step.x for step in taken[:-1])]
    return Run(starts, sigmas, (taken[-1].latent, theirs), {name: own[1:] for name, own in seconds.items()})


def levels(steps: int) -> tuple[int, int, int]:
    """The steps whose noise levels are looked at."""
    return 1, steps // 2, steps - 1


class Evaluation(NamedTuple):
    """One evaluation of both networks for the rows uncond and cond, on one conditioning."""

    ours: Callable[[], Tensor]
    theirs: Callable[[], Tensor]


def evaluation(sides: Sides, x: Tensor, sigma: float, t: Tensor) -> Evaluation:
    ours, (width, height) = sides.ours, sides.size
    scaled, moment = (x / math.sqrt(sigma**2 + 1)).to(ours.dtype), ours.config.schedule.moment(sigma)
    conditioner = ours.prompt(TEXTS[0]).conditioner(ours.config, ours.device, ours.dtype)
    rows = scfg.Guidance(scale=scfg.CFG(1.0)).rows(moment)
    conditioning, added = conditioner.condition(rows, moment, None, x.shape), None
    if ours.config.unet.vector_dim:
        target = [(score,) for score in ours.config.aesthetic_scores or ()] or [(height, width)] * 2
        ids = torch.tensor([(height, width, 0, 0, *own) for own in target], device=x.device)
        added = {"text_embeds": torch.cat([conditioner.pooled[row.text] for row in rows]), "time_ids": ids}
    return Evaluation(
        lambda: ours.unet(scaled, x.new_full((1,), moment.t), conditioning)[0],
        lambda: sides.pipe.unet(torch.cat([scaled] * 2), t, conditioning.tokens, added_cond_kwargs=added).sample,
    )


def of_networks(sides: Sides, run: Run, bar: tqdm) -> list[Comparison]:
    """The U-Net on the latents of our run, the VAE on its result and the picture of that."""
    rows, timesteps = [], scheduler("ddim", "leading")
    timesteps.set_timesteps(sides.steps)
    for i in levels(sides.steps):
        t, sigma = timesteps.timesteps[i], run.sigmas[i]
        both = evaluation(sides, run.starts[i], sigma, t.to(sides.ours.device))
        rows.append(sides.compared(f"U-Net, timestep {t}, sigma {sigma:.3g}", both.ours(), both.theirs()))
        bar.update()
    ours, theirs = sides.ours.vae, sides.pipe.vae
    latent = (run.latents[0] / sides.ours.config.latent_scale).to(theirs.dtype)
    picture = ours.decode(latent)
    rows.append(sides.compared("VAE, decoded", picture, theirs.decode(latent).sample))
    encoded = ours.encode(picture.clamp(-1, 1))[0]
    rows.append(sides.compared("VAE, encoded", encoded, theirs.encode(picture.clamp(-1, 1)).latent_dist.mean))
    bar.update(2)
    return rows


def decoded(sides: Sides, run: Run) -> Tensor:
    """Both results as pictures (2 3 H W) in [0, 1], each decoded by its own side."""
    latent, pipe = run.latents[1].to(sides.pipe.vae.dtype), sides.pipe
    image = pipe.vae.decode(latent / pipe.vae.config.scaling_factor).sample
    theirs = pipe.image_processor.postprocess(image, output_type="pt").float()
    return torch.cat([sides.ours.decode(run.latents[0]), theirs]).cpu()


def added_memory(sides: Sides, run: Run) -> dict[str, float]:
    """What a step adds at its peak in MiB: by the device's own count or, on a CPU, in bytes of tensors."""
    x, sigma = run.starts[1], run.sigmas[1]
    timestep = torch.tensor(round(sides.ours.config.schedule.time(sigma)), device=x.device)
    rules = {"scfg, CFG": scfg.CFG(5.0), "scfg, S-CFG": scfg.SCFG(5.0)}
    work: dict[str, Callable[[], Any]] = {"diffusers, CFG": evaluation(sides, x, sigma, timestep).theirs}
    for name, rule in rules.items():
        denoise = sides.ours.denoiser(TEXTS[0], rule)
        work[name] = lambda denoise=denoise: denoise(x, sigma)
    found = {}
    for name, step in work.items():
        if x.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        else:
            with Bytes() as counted:
                step()
            found[name] = counted.peak / 2**20
    return found


def of_guidance(sides: Sides, run: Run, figures: Figures, bar: tqdm) -> None:
    """Contrast, foreground and scale of every recipe at three noise levels of our run; the share of every word."""
    ours, prompt = sides.ours, sides.ours.prompt(TEXTS[0])
    for i in levels(sides.steps):
        for name, rule in RULES.items():
            if name == "cfg":
                continue
            found = ours.denoiser(prompt, rule(ours.config.scale))(run.starts[i], run.sigmas[i])
            regions, scale = found.regions, found.scale
            numbers = [regions.contrast().mean(), regions.foreground.mean(), scale.min(), scale.mean(), scale.max()]
            figures.guidance.append([str(i + 1), f"{run.sigmas[i]:.3g}", name, *(f"{float(n):.3f}" for n in numbers)])
            if name in ("scfg", "scfg-paper"):
                for word, share in shares(regions).items():
                    figures.shares.setdefault(word, []).append(share)
            bar.update()


def shares(regions: scfg.Regions) -> dict[str, float]:
    """The share of the pixels that every word owns, and those of the start token and of end and filler tokens."""
    owned, words = regions.tokens[0], regions.words[0]
    spans = {"start token": (0, 1), "end and filler": (words[-1].stop, len(owned))}
    spans |= {f"{i + 1}. {word.text}": (word.start, word.stop) for i, word in enumerate(words)}
    return {name: float(owned[start:stop].amax(0).mean()) for name, (start, stop) in spans.items()}


@torch.no_grad()
def measure(sides: Sides) -> Figures:
    """Every figure."""
    figures = Figures()
    with tqdm(total=len(TEXTS) + 2 * sides.steps + 5 + 1 + 3 * (len(RULES) - 1) + 3, desc="comparing") as bar:
        figures.equality += of_texts(sides)
        bar.update(len(TEXTS))
        run = run_both(sides, bar)
        figures.equality += of_networks(sides, run, bar)
        figures.equality.append(sides.compared(f"latent after {sides.steps} steps of CFG", *run.latents, times=10))
        figures.seconds, figures.pictures = run.seconds, decoded(sides, run)
        apart = (figures.pictures[0] - figures.pictures[1]).abs().amax(0)
        figures.within = {n: float((apart <= n / 255 + 1e-6).float().mean()) for n in (1, 2)}
        bar.update()
        of_guidance(sides, run, figures, bar)
        figures.memory = added_memory(sides, run)
        bar.update(3)
    return figures


def facts(file: Path, sides: Sides) -> dict[str, str]:
    tensors, _ = read(file) if file.suffix == ".safetensors" else formats.read(file)
    dropped, config = sum(bool(DROPPED.fullmatch(name)) for name in tensors), sides.ours.config
    device = sides.ours.device
    return {
        "family": config.name,
        "prediction": config.schedule.prediction,
        "tensors": f"{len(tensors)}, of which {dropped} are buffers and leftovers of training, which are not used",
        "picture": f"{sides.size[0]}x{sides.size[1]}, {sides.steps} steps of DDIM, CFG at {config.scale:g}, seed {SEED}",
        "device": f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, {sides.ours.dtype}",
        "diffusers' reader": "from_single_file, with a description of the family written by this script",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("scfg", "diffusers", "transformers", "torch")),
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines] + [""]


def page(file: Path, picture: Path, figures: Figures) -> str:
    """The report, in Markdown."""
    seconds, compared = figures.seconds, ratio(figures.seconds["scfg"], figures.seconds["diffusers"])
    lines = [f"# {file.name}: scfg beside diffusers", "", *table(["fact", "value"], list(figures.facts.items()))]
    lines += ["## Equality", "", "The largest difference, in units of diffusers' largest value.", ""]
    verdicts = [
        (c.what, f"{c.difference:.1e}", f"{c.limit:.0e}", "equal" if c.equal else "DIFFERS") for c in figures.equality
    ]
    lines += table(["compared", "difference", "limit", "result"], verdicts)
    within = " and ".join(f"{100 * share:.2f} % within {n}/255" for n, share in figures.within.items())
    lines += [f"Pixels of the two pictures: {within}.", "", f"![scfg left, diffusers right]({picture.name})", ""]
    lines += ["## Time and memory", ""]
    timed = [
        (name, f"{statistics.median(own):.3f}", f"{figures.memory[f'{name}, CFG']:.1f}")
        for name, own in seconds.items()
    ]
    timed.append(("scfg, S-CFG", "", f"{figures.memory['scfg, S-CFG']:.1f}"))
    lines += table(["step of CFG", "median seconds", "MiB that it adds at its peak"], timed)
    spread = f"{compared['low']:.2f} to {compared['high']:.2f} in {len(seconds['scfg'])} turns"
    lines += [f"scfg's seconds over diffusers': {compared['median']:.2f} ({spread}).", "", "## S-CFG", ""]
    lines += [f"At three noise levels of the CFG run of {TEXTS[0]!r}.", ""]
    lines += table(["step", "sigma", "recipe", "contrast", "foreground", "min scale", "mean", "max"], figures.guidance)
    found = [(word, *(f"{100 * share:.1f} %" for share in own)) for word, own in figures.shares.items()]
    heads = [f"{name}, step {row[0]}" for row in figures.guidance[:: len(RULES) - 1] for name in ("official", "paper")]
    return "\n".join([*lines, "Shares of the picture, by word:", "", *table(["word", *heads], found)])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="real_weights.py", description="A checkpoint, ours beside diffusers'.")
    parser.add_argument("file", type=Path, help="an original Stable Diffusion 1.x, 2.x or SDXL file")
    parser.add_argument("--steps", type=number(int, FEWEST, 999), default=20, help="of DDIM (default: %(default)s)")
    parser.add_argument("--size", type=size, metavar="WxH", help="of the picture (default: the family's own)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], help="(default: as scfg.load's)")
    parser.add_argument(
        "--tokenizer", type=Path, help="CLIP's (default: the file's own, else from transformers' cache)"
    )
    parser.add_argument("--output", type=Path, default=Path("report.md"), help="the page (default: %(default)s)")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> bool:
    """Write the page and the picture; return whether all is equal."""
    if args.output.suffix == ".png" or not args.output.parent.is_dir():
        raise scfg.BadInput(f"--output names a page such as report.md in a folder that exists, not {args.output}")
    dtype = args.dtype and getattr(torch, args.dtype)
    ours = scfg.load(args.file, device=args.device, dtype=dtype, tokenizer=args.tokenizer)
    sides = Sides(ours, None, args.size or ours.config.size, args.steps)
    ours.latent_shape(sides.size)  # a size that cannot be, said before any work
    sides = sides._replace(pipe=their_pipeline(args.file, ours))
    torch.backends.cudnn.allow_tf32 = False  # its rounding would hide what is looked for
    figures = measure(sides)
    figures.facts = facts(args.file, sides)
    picture, report = args.output.with_suffix(".png"), page(args.file, args.output.with_suffix(".png"), figures)
    to_image(rearrange(figures.pictures, "sides c h w -> c h (sides w)")).save(picture)
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
            print("real_weights.py:", " ".join(str(error).split()) or "not enough memory", file=sys.stderr)
            return 2


if __name__ == "__main__":
    sys.exit(main())
